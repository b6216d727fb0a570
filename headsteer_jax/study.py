"""Whole experiments over training seeds and a grid of config fields, each run in a process of its own, and one report.

A study's directory holds a run's directory for each seed, `seed_0`, `seed_1` and so on, below a directory for each cell
of the grid if there is one. Runs that are finished are kept; those that were cut off continue.
"""

import itertools
import json
import logging
import math
import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as LocalPath
from typing import Any, NamedTuple

from etils.epath import Path

from headsteer_jax.analysis.study import RunMeasures, measure_run, summarise_seeds
from headsteer_jax.analysis.sweep_file import read_sweep, to_arrays
from headsteer_jax.books import PLACES, describe_field_changes, is_done, plan_stages, read_inputs, read_record
from headsteer_jax.config.files import flatten, format_override, list_fields, load_config
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import describe_data_change
from headsteer_jax.data.sources import check_source, load_dataset
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.preflight import check_dataset, check_workdir
from headsteer_jax.report.study import write_study
from headsteer_jax.runtime.files import REMAKE, Workdir, is_in_bucket, make_directory, read_json
from headsteer_jax.runtime.jobs import Job, Outcome, Process, Starter, run_jobs
from headsteer_jax.runtime.lock import hold_lock
from headsteer_jax.stages import STAGES, parse_stages
from headsteer_jax.steer.catalogue import find_strategy

logger = logging.getLogger(__name__)

MOST_SEEDS = 1000
MOST_RUNS = 10_000
SECTIONS_THAT_MAY_DIFFER = ("machine.", "report.")  # they do not decide numbers


@dataclass(frozen=True)
class Request:
    """Everything that a study is asked for."""

    config_name: str  # as on the command line
    config_path: LocalPath
    overrides: Mapping[str, str]  # texts by dotted path
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[str, ...]]  # texts by dotted path
    stages: tuple[str, ...]
    overwrite: bool = False

    def format_command(self, workdir: str) -> str:
        """Format the command that asks for this."""
        words = ["headsteer", "study", self.config_name, f"--seeds={format_seeds(self.seeds)}"]
        words += [f"--config.{path}={text}" for path, text in self.overrides.items()]
        words += [f"--grid={path}={_separator(path).join(texts)}" for path, texts in self.grid.items()]
        if self.stages != parse_stages(None):
            words.append(f"--stages={','.join(self.stages)}")
        return shlex.join([*words, f"--workdir={workdir}"])


class StudyRun(NamedTuple):
    """One run of a study."""

    cell: str  # of the grid; empty without one
    seed: int
    name: str  # its directory in the study's
    workdir: Workdir
    config: Config
    overrides: Mapping[str, str]  # texts by dotted path


@dataclass
class State:
    """How far a study is."""

    measures: dict[str, RunMeasures] = field(default_factory=dict)  # of the finished runs, by name
    data: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # what they were begun with, by name
    errors: dict[str, str] = field(default_factory=dict)  # of the runs that failed, or have a damaged file


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read training seeds: numbers and ranges, separated by commas, such as 0-4 or 0,2,5-7.

    Raises:
      HeadSteerError: it is something else, too many, or a seed occurs twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise HeadSteerError(f"--seeds={text}: must be a range or a list, such as 0-4 or 0,2,5")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise HeadSteerError(f"--seeds={text}: more than {MOST_SEEDS} seeds; give fewer")
        seeds += range(first, last + 1)
    if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise HeadSteerError(f"--seeds={text}: seed {repeated[0]} occurs twice; give every seed once")
    return tuple(seeds)


def format_seeds(seeds: Sequence[int]) -> str:
    """Format training seeds as the command line reads them: as a range if they are one."""
    if len(seeds) > 1 and list(seeds) == [*range(seeds[0], seeds[-1] + 1)]:
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def _separator(path: str) -> str:
    """Return what separates values of a field in a grid: a semicolon if the field is itself a list with commas."""
    kinds = {name: str(annotation) for name, annotation, _ in list_fields()}
    return ";" if "tuple[" in kinds.get(path, "") else ","


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read the fields of a grid with their values: FIELD=A,B, or FIELD=A;B for fields that are lists.

    Raises:
      HeadSteerError: it has another form, or a field occurs twice or is one that a grid cannot have.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        path, equals, values = text.partition("=")
        path = path.strip().removeprefix("--").removeprefix("config.")
        parts = tuple(value.strip() for value in values.split(_separator(path)))
        if not equals or not path or not all(parts):
            raise HeadSteerError(f"--grid={text}: must be FIELD=VALUE,VALUE,..., such as gate.budget=0.4,0.5")
        if path == "seed":
            raise HeadSteerError(f"--grid={text}: the seeds of a study are those of --seeds; leave this out")
        if path in grid:
            raise HeadSteerError(f"--grid={text}: config.{path} has a grid already; give all values in one --grid")
        grid[path] = parts
    return grid


def plan_runs(request: Request, directory: Path) -> list[StudyRun]:
    """Plan the runs of a study, cell by cell.

    All runs of a cell have the data that the config itself has: those of its seed.

    Raises:
      HeadSteerError: the config refuses a field or value, or two cells are the same.
    """
    for path in request.grid:
        if path in request.overrides:
            raise HeadSteerError(f"--grid={path}: config.{path} is set by --config.{path} too; leave one of them out")
    if (count := len(request.seeds) * math.prod(map(len, request.grid.values()))) > MOST_RUNS:
        raise HeadSteerError(f"--grid: {count} runs are more than {MOST_RUNS}; give fewer values or seeds")
    runs: list[StudyRun] = []
    cells: dict[str, str] = {}  # the directory of each and its config
    for values in itertools.product(*request.grid.values()):
        chosen = dict(zip(request.grid, values, strict=True))
        base = load_config(request.config_path, {**request.overrides, **chosen})
        fields = flatten(base)
        cell = ",".join(f"{path}={format_override(fields[path])}" for path in chosen)  # 0.4 is also 0.40
        folder, content = re.sub(r"[^\w.=,;+-]", "_", cell), json.dumps(fields)
        if folder in cells or content in cells.values():
            raise HeadSteerError(f"--grid: two settings are the same, {cell}; give every value once")
        cells[folder] = content
        for seed in request.seeds:
            overrides = {**request.overrides, **chosen, "seed": str(seed)}
            if seed != base.seed and base.data.seed == -1:
                overrides["data.seed"] = str(base.seed)
            name = f"{folder}/seed_{seed}" if folder else f"seed_{seed}"
            config = load_config(request.config_path, overrides)
            runs.append(StudyRun(cell, seed, name, Workdir(directory / name), config, overrides))
    return runs


def check_study(request: Request, directory: Path, runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Check a study before anything is computed or written.

    Returns:
      The runs that are not finished.

    Raises:
      HeadSteerError: the directory is something else's or another study's, runs have other data, a run is stale or its
        records are damaged, or the data are missing or do not suit the config.
    """
    check_study_directory(directory, runs[0].config)
    _check_settings(request, directory, runs)
    for run in runs:
        check_source(run.config.data)
        for strategy in run.config.steer.strategies:
            find_strategy(strategy)
        check_workdir(run.config, run.workdir, list(STAGES.values()))
    check_same_data(runs, {run.name: read_data(run) for run in runs})
    unfinished = [run for run in runs if not is_finished(request, run)]
    checked: set[str] = set()
    for run in unfinished:
        if (key := f"{run.cell} {run.config.data_seed}") not in checked:
            checked.add(key)
            # nothing is decoded that need not be: the runs themselves check the images
            check_dataset(run.config, load_dataset(run.config.data, run.config.data_seed, memory=0))
    return unfinished


def check_study_directory(directory: Path, config: Config) -> None:
    """Check that a directory is a study's, or that a study may be made there.

    Raises:
      HeadSteerError: it is not.
    """
    check_workdir(config, Workdir(directory), [])
    study = directory / "study.json"
    if study.exists():
        if read_settings(study) is None:
            raise HeadSteerError(f"{study}: damaged, or no study wrote it; choose another --workdir")
        return
    with explain_errors(directory):
        names = sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []
    strange = [name for name in names if name != ".lock" and not re.fullmatch(r"seed_[0-9]+", name)]
    if strange and not is_in_bucket(directory):
        raise HeadSteerError(
            f"{directory}: holds {strange[0]}, and no study was started there; choose a new directory as --workdir"
        )


def read_settings(study: Path) -> dict[str, Any] | None:
    """Read `settings` of a study.json; None if it has none."""
    with suppress(HeadSteerError, KeyError, TypeError):
        settings = read_json(study)["settings"]
        if isinstance(settings["fields"], dict) and isinstance(settings["grid"], dict):
            return dict(settings)
    return None


def _check_settings(request: Request, directory: Path, runs: Sequence[StudyRun]) -> None:
    """Check that a study that was begun in the directory had the same config and the same fields in its grid."""
    before, now = read_settings(directory / "study.json"), describe_settings(request, directory, runs)
    if before is None:
        return
    if sorted(before["grid"]) != sorted(now["grid"]):
        names = [", ".join(settings["grid"]) or "no fields" for settings in (before, now)]
        change = f"its grid was over {names[0]}, now {names[1]}"
    else:
        defaults = flatten(Config())  # of fields that an older version did not have
        added = {path: defaults[path] for path in now["fields"] if path in defaults}
        change = describe_field_changes(added | before["fields"], now["fields"])
    if change:
        raise HeadSteerError(
            f"{directory}: this study was made with other settings: {change}; choose another --workdir"
        )


def describe_settings(request: Request, directory: Path, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """Describe what a study was asked for: `settings` of study.json.

    `fields` are those of the config that are the same in all runs.
    """
    base = load_config(request.config_path, runs[0].overrides)
    fields = {
        path: value
        for path, value in flatten(base).items()
        if path not in (*PLACES, *request.grid, "seed", "data.seed") and not path.startswith(SECTIONS_THAT_MAY_DIFFER)
    }
    return {
        "config": request.config_name,
        "command": request.format_command(str(directory)),
        "seeds": list(request.seeds),
        "grid": {path: list(texts) for path, texts in request.grid.items()},
        "stages": list(request.stages),
        "data_seed": base.data_seed,
        "confidence": base.steer.confidence,
        "autoencoder_seeds": base.sae.seeds,
        "fields": fields,
    }


def read_data(run: StudyRun) -> dict[str, Any] | None:
    """Read which data a run was begun with; None if it has not begun.

    Raises:
      HeadSteerError: the record is damaged.
    """
    return (read_record(run.workdir, "train") or {}).get("data")


def check_same_data(runs: Sequence[StudyRun], data: Mapping[str, dict[str, Any] | None]) -> None:
    """Check that the runs of a cell that have begun were begun with the same data.

    Args:
      data: from `read_data`, by the run's name; runs that it lacks are not compared.

    Raises:
      HeadSteerError: two of them differ; the message says how.
    """
    first: dict[str, tuple[StudyRun, dict[str, Any]]] = {}
    for run in runs:
        own = data.get(run.name)
        if not own:
            continue
        known, known_data = first.setdefault(run.cell, (run, own))
        if change := describe_data_change(known_data, own):
            raise HeadSteerError(
                f"{run.workdir.path}: its data differ from those of {known.name}: {change}; the runs of a study need "
                "the same data (config.data.seed), so move one of them elsewhere"
            )


def is_finished(request: Request, run: StudyRun) -> bool:
    """Say whether all stages of a run are done.

    Raises:
      HeadSteerError: one of them is stale, and `overwrite` is off.
    """
    chosen = [stage for name, stage in STAGES.items() if name in request.stages]
    now = read_inputs(run.config, None)
    plans = plan_stages(now, run.workdir, list(STAGES.values()), chosen, request.overwrite)
    return all(plan.action == "nothing" for plan in plans)


def run_study(
    request: Request, directory: Path, environments: Sequence[Mapping[str, str]], start: Starter = Process
) -> list[str]:
    """Run what is not finished of a study, and write its report after every run that ends.

    A run that fails, or of which a file is damaged, stops no other one.

    Args:
      environments: variables for each of the processes that run beside each other.
      start: starts a run's process.

    Returns:
      The names of the runs that failed, or of which a file is damaged.

    Raises:
      HeadSteerError: a check fails before anything is written; or data changed meanwhile; or the disk is full.
    """
    runs = plan_runs(request, directory)
    by_name = {run.name: run for run in runs}
    unfinished = check_study(request, directory, runs)
    make_directory(directory)
    state = State()
    with hold_lock(directory), explain_errors(directory):
        waiting, seconds = {run.name for run in unfinished}, list[float]()
        for run in runs:
            if run.name in waiting:
                continue
            take_results(run, state)
            if error := state.errors.get(run.name):
                logger.warning(f"{run.name}: finished before, but cannot be read ({error})")
            else:
                logger.info(f"{run.name}: finished before")
        write_report(request, directory, runs, state)

        def finish(job: Job, outcome: Outcome) -> None:
            waiting.discard(job.name)
            seconds.append(outcome.seconds)
            remaining = f"{len(waiting)} of {len(runs)} runs left"
            if waiting:
                rounds = max(1.0, len(waiting) / len(environments))
                remaining += f", about {rounds * sum(seconds) / len(seconds) / 60:.0f} min"
            if outcome.code:
                state.errors[job.name] = describe_failure(outcome)
            else:
                take_results(by_name[job.name], state)
                check_same_data(runs, state.data)
            if error := state.errors.get(job.name):
                logger.warning(f"{job.name}: failed ({error}); {remaining}")
            else:
                logger.info(f"{job.name}: finished in {outcome.seconds:.0f} s; {remaining}")
            write_report(request, directory, runs, state)

        run_jobs([make_job(request, run) for run in unfinished], environments, finish, start)
    return list(state.errors)


def make_job(request: Request, run: StudyRun) -> Job:
    """Make the command of a run."""
    overrides = (f"--config.{path}={text}" for path, text in run.overrides.items())
    flags = (f"--config={request.config_name}", f"--workdir={run.workdir.path}", f"--stages={','.join(request.stages)}")
    return Job(run.name, ("run", *flags, *overrides, *(["--overwrite"] if request.overwrite else [])))


def describe_failure(outcome: Outcome) -> str:
    """Describe in one line how a run failed."""
    if outcome.code < 0:
        number = -outcome.code
        with suppress(ValueError):  # real-time signals have no name
            return f"killed by {signal.Signals(number).name}"
        return f"killed by signal {number}"
    return outcome.last_line.removeprefix("error: ") or f"exit code {outcome.code}"


def take_results(run: StudyRun, state: State) -> None:
    """Take what the report needs from a finished run; one of which a file is damaged counts as failed."""
    try:
        data, measures = read_data(run), read_measures(run)
    except HeadSteerError as error:
        state.errors[run.name] = str(error)
    else:
        state.data[run.name], state.measures[run.name] = data, measures


def read_measures(run: StudyRun) -> RunMeasures:
    """Read what a study takes from a finished run.

    Raises:
      HeadSteerError: a file is missing or damaged.
    """
    test, summary, sweep = read_json(run.workdir / "train/test.json"), None, None
    if is_done(run.workdir, STAGES["report"]) and is_done(run.workdir, STAGES["steer"]):
        summary = read_json(run.workdir / "summary.json")
        sweep = to_arrays(read_sweep(run.workdir / "sweep.nc"))
    with explain_errors(f"{run.workdir / 'sweep.nc'} or summary.json", REMAKE, fault="damaged"):
        return measure_run(run.config, test, summary, sweep)


def write_report(request: Request, directory: Path, runs: Sequence[StudyRun], state: State) -> None:
    """Write study.json and, once a run is finished, study.html, study.md and the figures."""
    content: dict[str, Any] = {"settings": describe_settings(request, directory, runs)}
    content |= {"claims": [], "metrics": [], "cells": [], "runs": [], "failed": list(state.errors)}
    for run in runs:
        is_finished = run.name in state.measures
        status = "finished" if is_finished else "failed" if run.name in state.errors else "not finished"
        row = {"cell": run.cell, "seed": run.seed, "directory": run.name, "state": status}
        content["runs"].append(row | {"error": state.errors.get(run.name)})
    for cell in dict.fromkeys(run.cell for run in runs):
        members = [run for run in runs if run.cell == cell]
        measures = [state.measures[run.name] for run in members if run.name in state.measures]
        fields = {path: flatten(members[0].config)[path] for path in request.grid}
        content["cells"].append({"cell": cell, "fields": fields, "seeds": [measure.seed for measure in measures]})
        if measures:
            summary = summarise_seeds(measures, members[0].config)
            for name in ("claims", "metrics"):
                content[name] += [{"cell": cell} | row for row in summary[name]]
    write_study(content, directory, runs[0].config.report.dpi)
