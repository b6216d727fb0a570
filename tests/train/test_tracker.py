"""Logging to Weights & Biases: with a small stand-in of the package, and with the package itself where it is."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_config
from helpers import CONFIG, environment, headsteer

from headsteer_jax.config import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.train.log import open_log, read_log


class StandIn(types.ModuleType):
    """As the package wandb: what is logged is kept."""

    class Error(Exception):
        """As wandb's own."""

    class Settings:
        """As wandb's own."""

        def __init__(self, **values: Any) -> None:
            self.values = values

    def __init__(self, fails: str = "", dies: bool = False) -> None:
        super().__init__("wandb")
        self.fails, self.dies = fails, dies
        self.runs: list[Any] = []

    def init(
        self, *, id: str, resume: str, dir: str, config: dict[str, Any], project: str, name: str, settings: Any
    ) -> Any:
        if self.fails:
            raise self.Error(self.fails)
        run = types.SimpleNamespace(
            id=id, resume=resume, dir=dir, config=config, project=project, name=name, settings=settings,
            url=None, rows=[], axes={}, exit_code=None,
        )  # fmt: skip

        def use(*_: Any) -> None:
            if self.dies:
                raise BrokenPipeError("the service process is gone")

        def finish(exit_code: int) -> None:
            use()
            run.exit_code = exit_code

        run.log = lambda row: use() or run.rows.append(row)
        run.define_metric = lambda name, step_metric: use() or run.axes.update({name: step_metric})
        run.finish = finish
        self.runs.append(run)
        return run


def tracked_config() -> Config:
    config = tiny_config()
    return config.model_copy(update={"machine": config.machine.model_copy(update={"logger": "wandb"})})


def write_rows(directory: Path, config: Config, steps: range) -> None:
    from etils.epath import Path as AnyPath

    with open_log(AnyPath(directory), config) as log:
        for step in steps:
            log.write("dense", step, {"loss": 1 / step, "usage": [0.5, 0.25]})
            log.write("dense", step, {"images_per_second": 9.0}, "speed")


def test_the_same_rows_are_written_and_a_resumed_training_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tracked_config()
    write_rows(tmp_path / "w/train", config, range(1, 3))
    write_rows(tmp_path / "w/train", config, range(3, 4))
    first, second = wandb.runs
    assert first.id == second.id == json.loads((tmp_path / "w/train/wandb/run.json").read_text())["id"]
    assert first.resume == second.resume == "allow"
    assert (first.name, first.project, first.exit_code) == ("w/train", "headsteer", 0)
    assert first.config["gate"]["first_layer"] == config.gate.first_layer
    assert first.axes == {"dense/*": "dense/step"}
    rows = read_log(tmp_path / "w/train/metrics.jsonl")
    tracked = [row for run in wandb.runs for row in run.rows if "dense/loss" in row]
    assert tracked == [
        {"dense/loss": row["loss"], "dense/usage/0": 0.5, "dense/usage/1": 0.25, "dense/step": row["step"]}
        for row in rows
    ]
    assert {"dense/images_per_second": 9.0, "dense/step": 1} in first.rows
    assert list((tmp_path / "w/train/tensorboard").iterdir())


def test_a_training_outlives_its_tracker_and_one_that_fails_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn(dies=True))
    with caplog.at_level("WARNING", logger="headsteer_jax"):
        write_rows(tmp_path / "a", tracked_config(), range(1, 3))
    assert [row["step"] for row in read_log(tmp_path / "a/metrics.jsonl")] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb: the service process is gone; training goes on without it"
    ]
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ZeroDivisionError):
        write_rows(tmp_path / "b", tracked_config(), range(1))
    assert wandb.runs[0].exit_code == 1


def test_without_the_flag_nothing_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_rows(tmp_path, tiny_config(), range(1, 2))
    assert not wandb.runs
    assert not (tmp_path / "wandb").exists()


def test_a_server_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn("api_key not configured\n(no-tty)"))
    with pytest.raises(HeadSteerError) as raised:
        write_rows(tmp_path, tracked_config(), range(1, 2))
    assert str(raised.value) == (
        "config.machine.logger = 'wandb': Weights & Biases does not start (api_key not configured (no-tty)); log in "
        "with wandb login, check the network, or set WANDB_MODE=offline"
    )


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])  # absent, and a directory of its name
def test_without_the_extra_one_line_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    (tmp_path / "tiny.py").write_text(CONFIG)
    result = headsteer("run", "--config=tiny.py", "--logger=wandb", "--stages=train", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(
        "error: config.machine.logger = 'wandb': needs the extra wandb: pip install 'headsteer-jax[wandb]'\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_package_itself_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    (tmp_path / "tiny.py").write_text(CONFIG)
    command = [sys.executable, "-m", "headsteer_jax", "run", "--config=tiny.py", "--logger=wandb", "--stages=train"]
    for settings in ([], ["--overwrite", "--seed=1"]):
        result = subprocess.run(
            [*command, *settings], cwd=tmp_path, env=environment(WANDB_MODE="offline"), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        train = tmp_path / "runs/tiny/train"
        number = json.loads((train / "wandb/run.json").read_text())["id"]
        [record] = (train / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb")
        assert record.stat().st_size > 1000
        assert not (tmp_path / "wandb").exists()
