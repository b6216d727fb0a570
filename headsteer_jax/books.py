"""The books of a run: what each stage was made from, which stages are stale, and why.

A stage keeps `<workdir>/<stage>/started.json`, the fields of the config that it depends on, and writes `done.json` at
its end. If one of these fields has changed since, the stage is refused, or made again with --overwrite. A stage that is
made again makes the stages that read it stale.
"""

import datetime
import importlib.metadata
import json
import logging
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from headsteer_jax.config.files import flatten
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import Workdir, make_directory, read_json, remove_directory, write_json

logger = logging.getLogger(__name__)

FORMAT = 2  # of a stage's record; a field of the config that is renamed or moved raises it
PACKAGES = ("headsteer-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what it does, what it depends on, and the function that does it."""

    name: str
    description: str
    run: Callable[[Config, Dataset, Workdir], None]
    fields: tuple[str, ...]
    """The sections and fields of the config that its results depend on."""
    reads: tuple[str, ...] = ()
    """The stages whose results it reads."""
    optional: bool = False
    """Stages that read it can do without it."""
    by_default: bool = True
    """It runs if the command names no stages."""


def stage_fields(config: Config, stage: Stage) -> dict[str, Any]:
    """Select the fields that a stage depends on, by dotted path."""
    return {
        path: value
        for path, value in flatten(config).items()
        if any(path == field or path.startswith(f"{field}.") for field in stage.fields)
    }


def explain_staleness(config: Config, workdir: Workdir, stage: Stage) -> str:
    """Say why a stage's results in a directory cannot be used with this config.

    Returns:
      The reason; an empty text if they can be used, or if there are none.

    Raises:
      HeadSteerError: the stage's record is damaged.
    """
    for name in ("done.json", "started.json"):
        path = workdir / stage.name / name
        if path.exists():
            record = read_json(path)
            if (version := record.get("format", 1)) != FORMAT:
                return f"another version of HeadSteer made it: its record has format {version}, not {FORMAT}"
            if difference := _describe_difference(record["config"], stage_fields(config, stage)):
                return difference
            if record["inputs"] != _inputs_finished(workdir, stage):
                return "a stage that it reads was computed again"
    return ""


def is_done(workdir: Workdir, stage: Stage) -> bool:
    """Say whether a stage is finished."""
    return (workdir / stage.name / "done.json").exists()


def prepare_stage(
    config: Config, workdir: Workdir, stage: Stage, chosen: Sequence[Stage], overwrite: bool
) -> dict[str, Any] | None:
    """Decide whether a stage has to run now, and if so write its started.json and the run's config.json.

    Args:
      chosen: the stages that the user asked for.
      overwrite: delete stale results instead of refusing them.

    Returns:
      The record of a stage that has to run; None if there is nothing to do.

    Raises:
      HeadSteerError: a chosen stage reads this one, which is neither chosen nor done, or its results are stale and
        `overwrite` is off.
    """
    directory = workdir / stage.name
    if stage not in chosen:
        _check_skipped(config, workdir, stage, chosen)
        return None
    reason = explain_staleness(config, workdir, stage)
    if reason and not overwrite:
        raise HeadSteerError(f"{directory}: it is stale ({reason}); pass --overwrite or another --workdir")
    if reason:
        logger.info(f"{stage.name}: computing it again ({reason})")
        remove_directory(directory)
    elif is_done(workdir, stage):
        logger.info(f"{stage.name}: done before, in {read_json(directory / 'done.json')['seconds']:.0f} s")
        return None
    make_directory(directory)
    record: dict[str, Any] = {
        "format": FORMAT, "config": stage_fields(config, stage), "inputs": _inputs_finished(workdir, stage),
    }  # fmt: skip
    write_json(directory / "started.json", record)
    write_json(workdir / "config.json", json.loads(config.model_dump_json()))
    return record


def finish_record(record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Add to a stage's record the time of its end, its duration, and the process's largest memory so far."""
    finished = datetime.datetime.now(datetime.UTC).isoformat()
    return record | {"finished": finished, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}


def _check_skipped(config: Config, workdir: Workdir, stage: Stage, chosen: Sequence[Stage]) -> None:
    """Check that a stage that is not chosen can be read by the chosen ones.

    Raises:
      HeadSteerError: a chosen stage reads it, and it is not done or stale.
    """
    readers = [reader.name for reader in chosen if stage.name in reader.reads]
    if not readers or (stage.optional and not is_done(workdir, stage)):
        return
    if not is_done(workdir, stage):
        raise HeadSteerError(
            f"{readers[0]} needs {stage.name}, which is not done in {workdir.path}: add it to --stages"
        )
    if reason := explain_staleness(config, workdir, stage):
        raise HeadSteerError(
            f"{readers[0]} needs {stage.name}, but {workdir / stage.name} is stale ({reason}); "
            f"add {stage.name} to --stages and pass --overwrite, or choose another --workdir"
        )


def _inputs_finished(workdir: Workdir, stage: Stage) -> dict[str, str]:
    """Return for each finished stage that this one reads when it was finished."""
    records = {name: workdir / name / "done.json" for name in stage.reads}
    return {name: read_json(path)["finished"] for name, path in records.items() if path.exists()}


def _describe_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the fields that differ; an empty text if none does."""
    missing = object()
    return "; ".join(
        f"config.{path} was {json.dumps(before.get(path))}, now {json.dumps(now.get(path))}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path, missing) != now.get(path, missing)
    )


def package_versions() -> dict[str, str]:
    """Collect the versions of Python and of the packages that the numbers depend on, the platform and the device."""
    versions = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def peak_memory_bytes() -> int:
    """Return this process's largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
