"""Checkpoints and files: what was saved comes back, damage is refused, and a failed write leaves the old file."""

import errno
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import (
    make_directory,
    read_arrays,
    read_json,
    write_arrays,
    write_atomically,
    write_json,
)
from headsteer_jax.runtime.lock import hold_lock

# TensorStore prints more about a damaged file when its futures are collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "params": {"kernel": jnp.asarray(rng.standard_normal((40, 30)), jnp.float32), "bias": jnp.zeros(30)},
        "average": None,
        "key": jax.random.key_data(jax.random.key(seed)),
        "step": jnp.int32(seed),
    }


def save(checkpoints: Checkpoints, step: int, state: Any, metadata: dict[str, Any]) -> None:
    checkpoints.save(step, state, metadata)
    checkpoints.wait()


def one_line(error: pytest.ExceptionInfo[HeadSteerError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a")
    assert checkpoints.latest() is None
    save(checkpoints, 3, tree(3), {"position": 12, "config": {"seed": 1}})
    again = Checkpoints(tmp_path / "a")  # as another process would
    found, about = again.restore(tree(0))
    chex.assert_trees_all_equal(found, tree(3))
    chex.assert_trees_all_equal_dtypes(found, tree(3))
    assert about == {"position": 12, "config": {"seed": 1}}
    assert again.latest() == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (1, 2, 5):
        save(checkpoints, step, tree(step), {})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [1, 2, 5][-keep:]
    chex.assert_trees_all_equal(checkpoints.restore(tree())[0], tree(5))
    if keep == 2:
        chex.assert_trees_all_equal(checkpoints.restore(tree(), 2)[0], tree(2))


def test_later_ones_are_forgotten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 5)
    for step in (2, 4, 6, 8):
        save(checkpoints, step, tree(step), {})
    checkpoints.forget_after(4)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 4]
    save(checkpoints, 6, tree(1), {})
    chex.assert_trees_all_equal(checkpoints.restore(tree())[0], tree(1))


def test_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Checkpoints(Path("here")), 1, tree(), {})
    assert (tmp_path / "here" / "1").is_dir()


def test_none_is_there(tmp_path: Path) -> None:
    with pytest.raises(HeadSteerError) as error:
        Checkpoints(tmp_path / "none").restore(tree())
    one_line(error, str(tmp_path / "none"), "no checkpoint")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save(Checkpoints(directory), 7, tree(7), {"position": 1})
    return directory


def refused_or_the_same(copy: Path) -> bool:
    """Restore a copy of `saved`. Return True if it is refused in one line; otherwise every value must be as saved."""
    said = ""
    try:
        found, about = Checkpoints(copy).restore(tree())
    except HeadSteerError as error:
        said = str(error)
    if not said:
        chex.assert_trees_all_equal(found, tree(7))
        assert about == {"position": 1}
    assert "\n" not in said
    return bool(said)


def test_every_file_cut_short_is_noticed(saved: Path, tmp_path: Path) -> None:
    """Each file of a checkpoint is cut at three places: it is refused, or not read and the values are the same."""
    files = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    refused = 0
    for number, (name, share) in enumerate((name, share) for name in files for share in (0, 0.5, 0.99)):
        copy = tmp_path / str(number)
        shutil.copytree(saved, copy)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: int(share * len(content))])
        refused += refused_or_the_same(copy)
    assert refused >= 10  # orbax spreads the arrays over more files in some runs than in others, and reads not all


def test_every_file_that_is_missing_is_noticed(saved: Path, tmp_path: Path) -> None:
    files = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file()]
    for number, name in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(saved, copy)
        (copy / name).unlink()
        refused_or_the_same(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"kernel": jnp.zeros((40, 31)), "bias": jnp.zeros(30)}},
        {"params": {"kernel": jnp.zeros((40, 30))}},
        {"params": {"kernel": jnp.zeros((40, 30)), "bias": jnp.zeros(30), "more": jnp.zeros(2)}},
    ],
)
def test_another_model(saved: Path, change: dict[str, Any]) -> None:
    with pytest.raises(HeadSteerError) as error:
        Checkpoints(saved).restore(tree() | change)
    one_line(error, str(saved / "7"), "of another model")


def test_an_interrupted_save_is_not_seen(saved: Path, tmp_path: Path) -> None:
    """When orbax is killed it leaves a directory of another name."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    shutil.copytree(copy / "7", copy / "9.orbax-checkpoint-tmp-0")
    assert Checkpoints(copy).latest() == 7


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: No space left on device")],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, tree(1), {})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises(HeadSteerError) as error:
            save(checkpoints, 2, tree(2), {})
    one_line(error, str(tmp_path / "2"), "disk is full", "intact")
    chex.assert_trees_all_equal(checkpoints.restore(tree())[0], tree(1))


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "not writable"), (errno.EROFS, "not writable")],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(HeadSteerError) as error:
            write_json(path, {"a": 2})
    one_line(error, str(path), says)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left


def test_an_error_of_ours_is_not_disguised(tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


def test_files_are_readable_by_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [])
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})


def test_arrays_come_back(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x", "yz"])}
    write_arrays(tmp_path / "a.npz", arrays)
    chex.assert_trees_all_equal(read_arrays(tmp_path / "a.npz"), arrays)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_damaged_files_are_named(tmp_path: Path, kept: float) -> None:
    write_arrays(tmp_path / "a.npz", {"a": np.random.default_rng(0).standard_normal(1000)})
    write_json(tmp_path / "a.json", {"a": list(range(100))})
    for path, read in ((tmp_path / "a.npz", read_arrays), (tmp_path / "a.json", read_json)):
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
        with pytest.raises(HeadSteerError) as error:
            read(path)
        one_line(error, str(path), "damaged")
    with pytest.raises(HeadSteerError, match="missing"):
        read_arrays(tmp_path / "none.npz")


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HeadSteerError) as error:
        make_directory(tmp_path / "file" / "w")
    one_line(error, "file/w", "--workdir")


def test_damage_falls_back_to_the_checkpoint_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headsteer_jax")
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        save(checkpoints, step, tree(step), {"step": step})
    data = max((tmp_path / "2").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    found, about = Checkpoints(tmp_path, 2).restore(tree())
    chex.assert_trees_all_equal(found, tree(1))
    assert about == {"step": 1}
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "2: " in caplog.text
    assert "damaged" in caplog.text
    assert "resuming from step 1" in caplog.text
    with pytest.raises(HeadSteerError) as error:
        Checkpoints(tmp_path, 2).restore(tree(), 2)
    one_line(error, str(tmp_path / "2"), "damaged")
    # the damaged one is made again
    again = Checkpoints(tmp_path, 2)
    again.forget_after(1)
    save(again, 2, tree(2), {"step": 2})
    chex.assert_trees_all_equal(Checkpoints(tmp_path, 2).restore(tree())[0], tree(2))


@pytest.mark.parametrize("flip", range(40))
def test_a_flipped_bit_is_noticed_or_changes_nothing(saved: Path, tmp_path: Path, flip: int) -> None:
    rng = np.random.default_rng(flip)
    shutil.copytree(saved, tmp_path / "copy")
    files = sorted(path for path in (tmp_path / "copy").rglob("*") if path.is_file() and path.stat().st_size)
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    refused_or_the_same(tmp_path / "copy")


def test_a_checkpoint_of_a_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not passed over for an older one: work would be lost."""
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, 1, tree(1), {})
    with monkeypatch.context() as patch:
        patch.setattr("headsteer_jax.runtime.checkpoint.FORMAT", 2)
        save(checkpoints, 2, tree(2), {})
    with pytest.raises(HeadSteerError) as error:
        checkpoints.restore(tree())
    one_line(error, str(tmp_path / "2"), "it has format 2, but this program reads format 1", "upgrade")


def test_what_is_saved_is_what_there_was_then(tmp_path: Path) -> None:
    """The program goes on and reuses the arrays' memory while a checkpoint is written."""
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 1.5 + 1, x), donate_argnums=0)
    state = {"a": jnp.arange(2**20, dtype=jnp.float32), "b": jnp.ones((300, 70))}
    wanted = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state, {})
    for _ in range(20):
        state = step(state)
    jax.block_until_ready(state)
    chex.assert_trees_all_equal(checkpoints.restore(wanted)[0], wanted)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with hold_lock(tmp_path), pytest.raises(HeadSteerError) as error, hold_lock(tmp_path):
        pass
    one_line(error, str(tmp_path), "another run is writing here")
    with hold_lock(tmp_path):  # it was let go
        pass
