"""Studies: which runs they plan, keep, start and refuse, and what is left when one fails or the user stops."""

import html
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from helpers import FinishedRun, environment, headsteer

from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.cli import find_config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime import jobs
from headsteer_jax.runtime.jobs import Job, Outcome, Process, divide_accelerators, run_jobs
from headsteer_jax.stages import STAGES
from headsteer_jax.study import (
    Request,
    check_study,
    describe_failure,
    format_seeds,
    parse_grid,
    parse_seeds,
    plan_runs,
    run_study,
)

ALL_STAGES = tuple(name for name, stage in STAGES.items() if stage.by_default)


def request(config: Path, seeds: str = "0-1", grid: tuple[str, ...] = (), **fields: object) -> Request:
    return Request(str(config), config, {}, parse_seeds(seeds), parse_grid(grid), ALL_STAGES, **fields)  # type: ignore


def adopt(finished: FinishedRun, workdir: Path, seed: int) -> None:
    """Make a run of a seed: the finished one, with records that say that it is this seed's, on the data of seed 0."""
    shutil.copytree(finished.workdir, workdir)
    for file in workdir.glob("*/*.json"):
        if file.name in ("done.json", "started.json"):
            record = json.loads(file.read_text())
            record["config"] |= {"seed": seed, "data.seed": 0 if seed else -1}
            file.write_text(json.dumps(record))


def truncate(file: Path) -> None:
    """Cut a file to its first half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Ended:
    """A job that has ended at once."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def poll(self) -> Outcome:
        return self.outcome

    def stop(self) -> None:
        raise AssertionError("it has ended")

    kill = stop


def starter(
    finished: FinishedRun, errors: Mapping[int, str] = {}, truncated: Mapping[int, str] = {}
) -> tuple[Callable[[Job, Mapping[str, str]], Ended], list[str]]:
    """Make a function that starts a job, and the list of the names of those that it started.

    Args:
      errors: what the jobs of some seeds fail with.
      truncated: a file of some seeds' runs that is cut to its first half.
    """
    names: list[str] = []

    def start(job: Job, environment: Mapping[str, str]) -> Ended:
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in job.arguments[1:])
        seed = int(flags["config.seed"])
        names.append(job.name)
        if seed in errors:
            return Ended(Outcome(2, f"error: {errors[seed]}", 1.0))
        adopt(finished, Path(flags["workdir"]), seed)
        if seed in truncated:
            truncate(Path(flags["workdir"]) / truncated[seed])
        return Ended(Outcome(0, "", 1.0))

    return start, names


def study(directory: Path) -> dict:
    return json.loads((directory / "study.json").read_text())


def run(
    finished: FinishedRun, directory: Path, seeds: str = "0-1", errors: Mapping[int, str] = {},
    truncated: Mapping[int, str] = {}, **fields: object,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """Run a study with jobs that end at once; returns the runs that failed, and those that were started."""
    start, names = starter(finished, errors, truncated)
    failed = run_study(request(finished.config, seeds, **fields), epath.Path(directory), [{}], start)
    return failed, names


@pytest.mark.parametrize(("text", "seeds"), [("0-4", (0, 1, 2, 3, 4)), ("7", (7,)), ("0, 2,5-6", (0, 2, 5, 6))])
def test_seeds_are_ranges_and_lists(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize("text", ["", "a", "4-0", "-1", "1.5", "0--2", "0,,1", "0-1-2", "0-99999", "0-2,1"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(HeadSteerError, match=f"--seeds={text}"):
        parse_seeds(text)


def test_values_of_lists_are_separated_by_semicolons() -> None:
    grid = parse_grid(["gate.budget=0.4, 0.5", "--config.steer.alphas=0,1;0,2"])
    assert grid == {"gate.budget": ("0.4", "0.5"), "steer.alphas": ("0,1", "0,2")}


def test_runs_share_the_data_of_the_config(finished: FinishedRun, tmp_path: Path) -> None:
    runs = plan_runs(request(finished.config, "0,3", ("gate.target=0.5,0.6",)), epath.Path(tmp_path))
    assert [run.name for run in runs] == [f"gate.target={t}/seed_{s}" for t in ("0.5", "0.6") for s in (0, 3)]
    assert [run.config.gate.target for run in runs] == [0.5, 0.5, 0.6, 0.6]
    assert [(run.config.seed, run.config.data_seed) for run in runs] == [(0, 0), (3, 0)] * 2
    assert runs[0].config.data.seed == -1  # it is what `headsteer run` makes


def test_finished_runs_are_kept_and_more_seeds_can_follow(finished: FinishedRun, tmp_path: Path) -> None:
    assert run(finished, tmp_path / "s") == ([], ["seed_0", "seed_1"])
    first = study(tmp_path / "s")
    assert [claim["seeds"] for claim in first["claims"]] == [2] * len(first["claims"]) != []
    summary = json.loads((finished.workdir / "summary.json").read_text())
    gated = next(row for row in first["metrics"] if row["metric"] == "unsteered.accuracy")
    assert gated["mean"] == pytest.approx(summary["gated_accuracy"])
    for claim, row in zip(summary["claims"], first["claims"], strict=True):
        assert row["holds"] == 2 * bool(claim["holds"])
        assert row["value"] == pytest.approx(claim["value"])
    assert run(finished, tmp_path / "s") == ([], [])
    assert study(tmp_path / "s") == first  # to the last digit
    assert run(finished, tmp_path / "s", "0-2") == ([], ["seed_2"])
    assert study(tmp_path / "s")["settings"]["seeds"] == [0, 1, 2]


def test_a_seed_that_fails_is_named_and_the_others_are_reported(finished: FinishedRun, tmp_path: Path) -> None:
    failed, names = run(finished, tmp_path / "s", "0-2", {1: "the loss is NaN"})
    assert (failed, names) == (["seed_1"], ["seed_0", "seed_1", "seed_2"])
    content = study(tmp_path / "s")
    assert content["failed"] == ["seed_1"]
    assert [row["state"] for row in content["runs"]] == ["finished", "failed", "finished"]
    assert content["runs"][1]["error"] == "the loss is NaN"
    assert content["cells"][0]["seeds"] == [0, 2]
    assert "the loss is NaN" in (tmp_path / "s" / "study.html").read_text()
    assert run(finished, tmp_path / "s", "0-2") == ([], ["seed_1"])  # the same command tries it again
    assert study(tmp_path / "s")["failed"] == []


def test_a_damaged_file_stops_no_other_run(finished: FinishedRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        adopt(finished, tmp_path / "s" / f"seed_{seed}", seed)
    truncate(tmp_path / "s" / "seed_0" / "sweep.nc")
    (tmp_path / "s" / "seed_1" / "summary.json").write_text("{}")
    failed, names = run(finished, tmp_path / "s", "0-3", truncated={2: "summary.json"})
    assert (failed, names) == (["seed_0", "seed_1", "seed_2"], ["seed_2", "seed_3"])
    content, page = study(tmp_path / "s"), html.unescape((tmp_path / "s" / "study.html").read_text())
    assert [row["state"] for row in content["runs"]] == ["failed", "failed", "failed", "finished"]
    assert content["cells"][0]["seeds"] == [3]
    damaged = {
        "seed_0/sweep.nc": "missing or damaged (", "seed_1/sweep.nc or summary.json": "damaged ('sae')",
        "seed_2/summary.json": "missing or damaged (",
    }  # fmt: skip
    for row, (file, fault) in zip(content["runs"], damaged.items(), strict=False):
        assert row["error"].startswith(f"{tmp_path / 's' / file}: {fault}")
        assert row["error"].endswith("delete it and its stage's done.json, then run the same command with --overwrite")
        assert row["error"] in page
    for file in ("seed_0/sweep.nc", "seed_0/steer/done.json", "seed_2/summary.json", "seed_2/report/done.json"):
        (tmp_path / "s" / file).unlink()
    asked = request(finished.config, "0-3", overwrite=True)
    unfinished = check_study(asked, epath.Path(tmp_path / "s"), plan_runs(asked, epath.Path(tmp_path / "s")))
    assert [run.name for run in unfinished] == ["seed_0", "seed_2"]  # the remedy has them made again


def test_other_data_of_a_run_that_ends_stop_the_study(finished: FinishedRun, tmp_path: Path) -> None:
    start, names = starter(finished)

    def start_with_other_data(job: Job, environment: Mapping[str, str]) -> Ended:
        ended = start(job, environment)
        if job.name == "seed_1":
            file = tmp_path / "s" / "seed_1" / "train" / "done.json"
            record = json.loads(file.read_text())
            record["data"]["train"]["hashes"][0] = "0" * 12
            file.write_text(json.dumps(record))
        return ended

    with pytest.raises(HeadSteerError, match=r"seed_1: its data differ from those of seed_0: .* in train"):
        run_study(request(finished.config, "0-2"), epath.Path(tmp_path / "s"), [{}], start_with_other_data)
    assert names == ["seed_0", "seed_1"]


def test_a_study_of_a_version_without_a_field_goes_on(finished: FinishedRun, tmp_path: Path) -> None:
    run(finished, tmp_path / "s")
    content = study(tmp_path / "s")
    assert content["settings"]["fields"].pop("steer.allowed_loss") == 0
    (tmp_path / "s" / "study.json").write_text(json.dumps(content))
    assert run(finished, tmp_path / "s") == ([], [])
    content["settings"]["fields"]["steer.allowed_loss"] = 0.5
    (tmp_path / "s" / "study.json").write_text(json.dumps(content))
    with pytest.raises(HeadSteerError, match=r"other settings: config.steer.allowed_loss was 0.5, now 0"):
        run(finished, tmp_path / "s")


def test_runs_of_other_data_or_settings_are_refused(finished: FinishedRun, tmp_path: Path) -> None:
    run(finished, tmp_path / "s")
    with pytest.raises(HeadSteerError, match=r"its grid was over no fields, now gate.target"):
        run_study(request(finished.config, grid=("gate.target=0.5",)), epath.Path(tmp_path / "s"), [{}])
    changed = Request(
        str(finished.config), finished.config, {"gate.target": "0.5"}, (0, 1), {}, ALL_STAGES
    )  # fmt: skip
    with pytest.raises(HeadSteerError, match=r"other settings: config.gate.target was 0.75, now 0.5; choose another"):
        run_study(changed, epath.Path(tmp_path / "s"), [{}])
    file = tmp_path / "s" / "seed_1" / "train" / "done.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"config": record["config"] | {"train.batch": 17}}))
    with pytest.raises(HeadSteerError, match=r"seed_1/train: it is stale \(config.train.batch was 17, now 16\)"):
        run(finished, tmp_path / "s")
    record["data"]["train"]["hashes"][0] = "0" * 12
    file.write_text(json.dumps(record))
    with pytest.raises(HeadSteerError, match=r"seed_1: its data differ from those of seed_0: .* in train"):
        run(finished, tmp_path / "s")


@pytest.mark.parametrize("name", ["report.html", "study.json", "thesis.tex", ".git"])
def test_a_directory_of_something_else_is_refused(name: str, finished: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_text("{}")
    with pytest.raises(HeadSteerError, match=r"choose a"):
        run(finished, tmp_path / "s")
    assert [file.name for file in (tmp_path / "s").iterdir()] == [name]


def test_a_run_is_no_study(finished: FinishedRun) -> None:
    with pytest.raises(HeadSteerError, match=r"no study was started there|no run was started"):
        run(finished, finished.workdir)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--seeds=0-1", "--grid=gate.bugdet=0.4"], "there is no such field; did you mean config.gate.budget?"),
        (["--seeds=0-1", "--grid=gate.budget=0.4,2"], "config.gate.budget = '2'"),
        (["--seeds=0-1", "--grid=gate.budget=0.4,0.40"], "two settings are the same"),
        (["--seeds=0-1", "--grid=gate.budget=0.4", "--grid=gate.budget=0.5"], "has a grid already"),
        (["--seeds=0-1", "--grid=gate.budget=0.4", "--config.gate.budget=0.5"], "leave one of them out"),
        (["--seeds=0-1", "--grid=seed=1,2"], "those of --seeds"),
        (["--seeds=0-1", "--grid=gate.budget"], "must be FIELD=VALUE"),
        (["--seeds=0-1", "--config.gate.target=7"], "config.gate.target"),
        (["--seeds=0-1", "--stages=train,stear"], "there is no stage 'stear'"),
        (["--seeds=0-1", "--jobs=0"], "--jobs=0"),
        (["--seeds=0,4294967296"], "config.seed"),
        (["--seeds=0-1", "--config.data.source=folder"], "config.data.path"),
        (["--seeds=0-1", "--config.steer.classes=zebra"], "zebra"),
        (["--seeds=0-1", "--config.steer.strategies=magic"], "magic"),
        ([], "--seeds"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(flags: list[str], text: str, tmp_path: Path) -> None:
    result = headsteer("study", "double_digits", *flags, f"--workdir={tmp_path / 's'}", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert text in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_study_with_a_failed_run_ends_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headsteer_jax.study.run_study", lambda *arguments: ["seed_1"])
    result = headsteer("study", "double_digits", "--seeds=0-1", f"--workdir={tmp_path / 's'}", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("1 runs failed: seed_1; the same command tries them again; first delete damaged")
    assert result.stderr.count("\n") == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    result = headsteer("study", "double_digits", "--seeds=0-1", f"--workdir={tmp_path / 's'}", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "SLURM_STEP_NUM_TASKS=2: a study is started by one process alone" in result.stderr


class Running:
    """A job that runs until it is asked to stop."""

    def __init__(self) -> None:
        self.asked = 0

    def poll(self) -> Outcome | None:
        return Outcome(75, "", 1.0) if self.asked else None

    def stop(self) -> None:
        self.asked += 1

    kill = stop


def test_ctrl_c_asks_every_job_to_save_and_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Running] = []

    def start(job: Job, environment: Mapping[str, str]) -> Running:
        started.append(Running())
        return started[-1]

    def interrupt(seconds: float) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job(str(number), ()) for number in range(4)], [{}, {}], pytest.fail, start)
    assert [job.asked for job in started] == [1, 1]


def test_a_process_passes_its_lines_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="headsteer_jax.runtime.jobs")
    process = Process(Job("seed_9", ("no-such-command",)), environment())
    while (outcome := process.poll()) is None:
        time.sleep(0.05)
    assert outcome.code == 2
    assert "seed_9: error: no-such-command: no such command" in caplog.text
    assert describe_failure(outcome).startswith("no-such-command: no such command")
    assert describe_failure(Outcome(-9, "step 3", 1.0)) == "killed by SIGKILL"
    assert describe_failure(Outcome(-40, "step 3", 1.0)) == "killed by signal 40"  # it has no name


def test_accelerators_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    devices, gpus = tmp_path / "dev", tmp_path / "gpus"

    def divide(processes: int) -> list[dict[str, str]]:
        return divide_accelerators(processes, devices, gpus)

    devices.mkdir()
    assert divide(2) == [{}, {}]  # a CPU
    for number in range(4):
        (devices / f"accel{number}").touch()
    assert [each["TPU_VISIBLE_CHIPS"] for each in divide(3)] == ["0", "1", "2"]
    assert divide(1) == [{}]
    with pytest.raises(HeadSteerError, match=r"--jobs=5: this host has 4 TPU chips"):
        divide(5)
    for number in range(4):
        (gpus / f"0000:{number}").mkdir(parents=True)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in divide(2)] == ["0,2", "1,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in divide(4)] == ["6", "7", "6", "7"]
    assert {each["XLA_PYTHON_CLIENT_MEM_FRACTION"] for each in divide(4)} == {"0.450"}
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert divide(4) == [{}] * 4


def test_the_command_repeats_the_study() -> None:
    path = find_config("double_digits")
    asked = Request("double_digits", path, {"sae.k": "8"}, (0, 1), {"steer.alphas": ("0,1", "0,2")}, ALL_STAGES)
    assert asked.format_command("studies/a b") == (
        "headsteer study double_digits --seeds=0-1 --config.sae.k=8 '--grid=steer.alphas=0,1;0,2' "
        "'--workdir=studies/a b'"
    )


@pytest.mark.slow
def test_two_processes_at_once_make_what_headsteer_run_makes(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    flags = ("--seeds=0-1", "--jobs=2", f"--stages={','.join(ALL_STAGES)}", f"--workdir={tmp_path / 's'}")
    result = headsteer("study", finished.config, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 's' / 'study.html'}\n"
    assert "seed_1: train: done in" in result.stderr
    first, second = (read_sweep(tmp_path / "s" / f"seed_{seed}" / "sweep.nc") for seed in (0, 1))
    assert first.identical(read_sweep(finished.workdir / "sweep.nc"))
    np.testing.assert_array_equal(first.test_labels, second.test_labels)
    assert not np.array_equal(first.test_table, second.test_table)
