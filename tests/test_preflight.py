"""The checks before a run writes anything: a workdir that is used otherwise, one that holds the data, a full disk."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from builders import CLASSES, tiny_config
from etils import epath

from headsteer_jax import preflight
from headsteer_jax.books import Plan
from headsteer_jax.config import Config, DataConfig, MachineConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.preflight import check_products, check_space, check_workdir, checkpoint_bytes
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.stages import STAGES
from headsteer_jax.train.loop import abstract_params, init_state


def check(path: Path, data: DataConfig | None = None) -> None:
    config = Config(data=data) if data else Config()
    check_workdir(config, Workdir(epath.Path(path)), list(STAGES.values()))


def refusal(path: Path, data: DataConfig | None = None) -> str:
    with pytest.raises(HeadSteerError) as error:
        check(path, data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_that_gates_only_patches_is_trained_but_not_steered() -> None:
    preflight.check_steerable(tiny_config())
    preflight.check_steerable(tiny_config(kinds=("sublayers", "tokens")))
    with pytest.raises(HeadSteerError, match=r"^config\.gate\.kinds = \('tokens',\): steering needs gates that read"):
        preflight.check_steerable(tiny_config(kinds=("tokens",)))


def test_new_and_empty_directories_and_runs_are_taken(tmp_path: Path) -> None:
    check(tmp_path / "new" / "deeper")
    check(tmp_path)
    (tmp_path / "train").mkdir()
    check(tmp_path)  # empty
    (tmp_path / "notes.txt").write_text("the user's")
    check(tmp_path)
    (tmp_path / "train" / "started.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "report.html").write_text("ours")
    check(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "sweep.nc", "summary.json", "report.html", "figures", "activations"])
def test_what_a_run_would_overwrite_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("the user's")
    assert refusal(tmp_path).startswith(f"{tmp_path / name}: exists, but no run was started in {tmp_path}")


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_directory_with_the_name_of_a_stage_is_refused(tmp_path: Path, stage: str) -> None:
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "0.png").write_text("an image")
    line = refusal(tmp_path)
    assert line == f"{tmp_path / stage}: exists, and HeadSteer did not make it; choose another --workdir"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("")
    assert refusal(tmp_path / "w") == f"{tmp_path / 'w'}: is a file; choose a directory as --workdir"


def test_a_home_directory_a_root_and_a_repository_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    for path in (home, tmp_path / "link", home / "x" / "..", Path("/")):
        assert "is a home directory or the root of a disk" in refusal(path)
    subprocess.run(["git", "init", "-q", str(tmp_path / "code")], check=True)
    assert "is the root of a repository (.git)" in refusal(tmp_path / "code")
    check(tmp_path / "code" / "runs" / "first")


@pytest.mark.parametrize(
    ("workdir", "overlaps"),
    [
        (lambda data: data, True),  # its stage train would be the images
        (lambda data: data / "train", True),
        (lambda data: data / "train" / "cat" / "run", True),
        (lambda data: data.parent, True),
        (lambda data: data.parent / "link", True),
        (lambda data: data.parent / "run", False),
        (lambda data: data / "runs" / "run", False),  # beside the splits
    ],
)
def test_a_workdir_apart_from_the_images(tmp_path: Path, workdir: Callable[[Path], Path], overlaps: bool) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        (data / split / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    images = DataConfig(source="folder", path=str(data))
    if overlaps:
        assert "overlaps the data in" in refusal(workdir(data), images)
    else:
        check(workdir(data), images)


def test_the_file_of_the_data_may_not_lie_in_the_workdir(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("")
    data = DataConfig(source="npz", path=str(tmp_path / "data.npz"))
    assert "overlaps the data in" in refusal(tmp_path, data)
    check(tmp_path / "run", data)


@pytest.mark.parametrize("place", ["train", ".train.new", ".sae.removed"])
def test_a_link_that_leads_nowhere_and_a_users_directory_are_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / place).symlink_to("nowhere")
    assert refusal(tmp_path).startswith(f"{tmp_path / place}: exists, and HeadSteer did not make it")
    (tmp_path / place).unlink()
    (tmp_path / place).mkdir()
    check(tmp_path)
    (tmp_path / place / ".started.json.part").touch()  # all that is left if the process dies as it begins the stage
    check(tmp_path)
    (tmp_path / place / "mine").touch()
    assert refusal(tmp_path).startswith(f"{tmp_path / place}: exists, and HeadSteer did not make it")


def test_the_cache_may_not_lie_in_the_data(tmp_path: Path) -> None:
    """Its directories would be taken for classes."""
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "test").mkdir()
    data, workdir = DataConfig(source="folder", path=str(tmp_path / "data")), Workdir(epath.Path(tmp_path / "w"))
    for cache, refused in ((tmp_path / "data" / "train" / "cache", True), (tmp_path / "data" / "cache", False)):
        config = Config(data=data, machine=MachineConfig(activation_cache=str(cache)))
        if refused:
            with pytest.raises(HeadSteerError, match=r"config.machine.activation_cache = .*: lies in the data in"):
                check_workdir(config, workdir, list(STAGES.values()))
        else:
            check_workdir(config, workdir, list(STAGES.values()))


@pytest.mark.parametrize("begun", [False, True])
def test_what_a_stage_writes_into_the_workdir_replaces_only_its_own(tmp_path: Path, begun: bool) -> None:
    workdir, report = Workdir(epath.Path(tmp_path)), STAGES["report"]
    if begun:
        workdir.path.joinpath("report").mkdir()
        workdir.write_json("report/started.json", {"format": 1})
    (tmp_path / "report.html").write_text("whose?")
    check_products(workdir, [Plan(report, "nothing"), Plan(STAGES["steer"], "make")])
    if begun:
        check_products(workdir, [Plan(report, "replace")])
        (tmp_path / "figures").write_text("the user's")
        with pytest.raises(HeadSteerError, match="figures: is not a directory"):
            check_products(workdir, [Plan(report, "replace")])
    else:
        with pytest.raises(HeadSteerError, match="exists, but the stage report was not begun"):
            check_products(workdir, [Plan(report, "make")])
    (tmp_path / "sweep.nc").mkdir()
    with pytest.raises(HeadSteerError, match=r"sweep.nc: is not a file, but a run writes one there"):
        check_products(workdir, [Plan(STAGES["steer"], "make")])


def test_the_space_of_checkpoints_is_what_they_hold() -> None:
    config = tiny_config().model_copy(update={"machine": MachineConfig(keep=3)})
    params = abstract_params(config, CLASSES)
    chex.assert_trees_all_equal_shapes(params["params"]["cls"], jnp.zeros((1, 1, config.model.width)))

    def size(tree: object) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    state = size(jax.eval_shape(lambda params: init_state(params, "gated", config), params))
    phases = 1 + (config.train.dense.steps > 0) + config.train.dense_control
    estimate = checkpoint_bytes(config, params)
    assert estimate == pytest.approx(phases * (3 * state + 2 * size(params)) + state, rel=0.01)


def test_too_small_a_disk_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    check_space(epath.Path(tmp_path / "a" / "b"), 1000)
    with pytest.raises(HeadSteerError, match=r"needs about \d+ MiB for its checkpoints, and the disk has \d+ MiB left"):
        check_space(epath.Path(tmp_path / "a" / "b"), 2**60)
    assert not list(tmp_path.iterdir())
    assert preflight.REPOSITORIES[0] == ".git"
