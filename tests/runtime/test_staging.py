"""Computing a stage again beside its old results: what is complete at every moment, and what is never deleted."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime import staging
from headsteer_jax.runtime.files import Workdir, write_json
from headsteer_jax.runtime.staging import (
    discard_new,
    is_stage_directory,
    locate_complete,
    locate_new,
    redirect_stage,
    remove_stage,
    replace_stage,
)

ENTRIES, PRODUCTS = ("result", "checkpoints"), ("sweep.nc", "figures/front.png", "figures/old.png")


class Killed(BaseException):
    """The process dies here."""


def make(workdir: Workdir, content: str) -> None:
    """Make a stage with two entries, and with products."""
    (workdir / "steer/checkpoints/4").mkdir(parents=True)
    workdir.write_json("steer/started.json", content)
    (workdir / "steer/checkpoints/4/x").write_text(content)
    workdir.write_text("steer/result", content)
    workdir.write_text("sweep.nc", content)
    (workdir / "figures").mkdir(exist_ok=True)
    workdir.write_text("figures/front.png", content)
    if content == "old":
        workdir.write_text("figures/old.png", content)  # the new results have none
    made = [product for product in PRODUCTS if (workdir / product).exists()]
    workdir.write_json("steer/done.json", {"products": made})


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    """Make a workdir in which the stage has old results and complete new ones, and the user has files."""
    workdir = Workdir(epath.Path(tmp_path))
    make(workdir, "old")
    (workdir / "steer" / "notes.txt").write_text("the user's")
    (workdir / "figures" / "mine.png").write_text("the user's")
    make(redirect_stage(workdir, "steer", PRODUCTS), "new")
    return workdir


def contents(workdir: Workdir) -> dict[str, str]:
    path = Path(workdir.path)
    files = (file for file in path.rglob("*") if file.is_file() and file.name != "done.json")
    return {str(file.relative_to(path)): file.read_text().strip('"\n') for file in files}


REPLACED = {
    "steer/started.json": "new", "steer/result": "new", "steer/checkpoints/4/x": "new",
    "steer/notes.txt": "the user's", "sweep.nc": "new", "figures/front.png": "new", "figures/mine.png": "the user's",
}  # fmt: skip


def test_new_results_take_the_place_of_the_old_ones(workdir: Workdir) -> None:
    before = contents(workdir)
    assert {name: before[name] for name in before if not name.startswith(".")} == {
        name: "old" if text == "new" else text for name, text in REPLACED.items()
    } | {"figures/old.png": "old"}
    replace_stage(workdir, "steer", ENTRIES, PRODUCTS)
    assert contents(workdir) == REPLACED
    assert not [path for path in Path(workdir.path).iterdir() if path.name.startswith(".")]
    replace_stage(workdir, "steer", ENTRIES, PRODUCTS)  # there is nothing more to do
    assert contents(workdir) == REPLACED


def test_unfinished_results_replace_nothing(workdir: Workdir) -> None:
    (locate_new(workdir, "steer") / "done.json").unlink()
    before = contents(workdir)
    replace_stage(workdir, "steer", ENTRIES, PRODUCTS)
    assert contents(workdir) == before
    assert locate_complete(workdir, "steer") == workdir / "steer"
    discard_new(workdir, "steer", ENTRIES, PRODUCTS)
    assert contents(workdir) == {name: text for name, text in before.items() if not name.startswith(".")}


def system_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count what changes the disk; the process dies at the call whose number is in the list."""
    die_at = [10**9]

    def guard(call: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            die_at[0] -= 1
            if die_at[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return guarded

    for name in ("rename", "replace", "rmdir", "unlink", "mkdir", "remove"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    yield die_at


def test_at_every_moment_the_old_or_the_new_results_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at each of its changes of the disk in turn; the next one finishes the replacement."""
    die_at, deaths = next(system_calls(monkeypatch)), 0
    for moment in range(100):
        workdir = Workdir(epath.Path(tmp_path) / str(moment))
        make(workdir, "old")
        make(redirect_stage(workdir, "steer", PRODUCTS), "new")
        die_at[0] = moment
        try:
            replace_stage(workdir, "steer", ENTRIES, PRODUCTS)
            die_at[0] = 10**9
        except Killed:
            die_at[0], deaths = 10**9, deaths + 1
            complete = locate_complete(workdir, "steer")
            texts = {(complete / name).read_text().strip('"\n') for name in ("started.json", "result")}
            assert texts == {"new"}
            replace_stage(workdir, "steer", ENTRIES, PRODUCTS)
        expected = {name: text for name, text in REPLACED.items() if text == "new"}
        assert contents(workdir) == expected
        assert not [path for path in Path(workdir.path).iterdir() if path.name.startswith(".")]
        if deaths <= moment:
            break
    assert deaths > 8


def test_a_directory_without_a_marker_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "0.png").write_text("an image")
    assert not is_stage_directory(epath.Path(tmp_path / "train"))
    with pytest.raises(HeadSteerError, match="is in the way, and HeadSteer did not make it"):
        remove_stage(epath.Path(tmp_path / "train"), ("*",))
    assert (tmp_path / "train" / "cat" / "0.png").exists()


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    stage, elsewhere = tmp_path / "train", tmp_path / "elsewhere"
    stage.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("the user's")
    (stage / "checkpoints").symlink_to(elsewhere)
    write_json(stage / "started.json", {})
    remove_stage(epath.Path(stage), ENTRIES)
    assert not stage.exists()
    assert (elsewhere / "precious").exists()


def test_a_link_in_the_place_of_a_stage_is_replaced_and_not_what_it_leads_to(workdir: Workdir, tmp_path: Path) -> None:
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-disk")
    (tmp_path / "steer").rename(elsewhere)
    (tmp_path / "steer").symlink_to(elsewhere)
    replace_stage(workdir, "steer", ENTRIES, PRODUCTS)
    assert (tmp_path / "steer" / "result").read_text() == "new"
    assert not (tmp_path / "steer").is_symlink()
    assert (elsewhere / "result").read_text() == "old"
    assert (elsewhere / "notes.txt").read_text() == "the user's"


def test_a_users_name_is_no_pattern(workdir: Workdir, tmp_path: Path) -> None:
    """`notes[1].txt`, which an interrupted replacement has moved already, says nothing of `notes1.txt`."""
    (locate_new(workdir, "steer") / "notes[1].txt").write_text("moved")
    (tmp_path / "steer" / "notes1.txt").write_text("the user's")
    replace_stage(workdir, "steer", ENTRIES, PRODUCTS)
    assert (tmp_path / "steer" / "notes1.txt").read_text() == "the user's"
    assert (tmp_path / "steer" / "notes[1].txt").read_text() == "moved"


def test_a_removal_that_is_interrupted_leaves_a_marker_and_nothing_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tmp_path / "train"
    (stage / "checkpoints" / "4").mkdir(parents=True)
    write_json(stage / "started.json", {})
    write_json(stage / "done.json", {})

    def killed(self: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(stage)), "rmtree", killed)
        with pytest.raises(Killed):
            remove_stage(epath.Path(stage), ENTRIES)
    assert (stage / "started.json").exists()
    assert not (stage / "done.json").exists()
    remove_stage(epath.Path(stage), ENTRIES)
    assert not list(tmp_path.iterdir())
    assert staging.MARKERS == ("started.json", "done.json")
