"""The books of a run: what each stage was made from, which stages are stale, and why.

A stage writes `<workdir>/<stage>/started.json` when it starts and `done.json` when it ends. They hold the fields of the
config that it depends on, a description of its data, and hashes of the files that it read. If any of these has changed,
the stage is stale: it is refused, or computed again with --overwrite. New results are written beside the old ones and
replace them when they are complete. A report takes seconds and is written again without --overwrite. If a stage is
computed again, the stages that read it become stale.

The paths of files, and the number of images in one pass of evaluation, are not part of an experiment and may change.
"""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import resource
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from etils.epath import Path
from pydantic import BaseModel, ValidationError

from headsteer_jax.config.files import flatten
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import SPLITS, Dataset, describe_data, describe_data_change
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.weights import fingerprint_weights
from headsteer_jax.runtime.files import REMAKE, Workdir, is_in_bucket, make_directory, read_json, write_json
from headsteer_jax.runtime.staging import (
    discard_new,
    is_stage_directory,
    locate_complete,
    redirect_stage,
    replace_stage,
)
from headsteer_jax.sae.imported import fingerprint_autoencoder

logger = logging.getLogger(__name__)

FORMAT = 3  # of a stage's record; raise it if a field of the config is renamed or moved
PACKAGES = ("headsteer-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")
# these do not affect results; the dense phase is the same wherever it was trained
PLACES = ("data.path", "model.pretrained", "sae.pretrained", "train.dense_from", "train.eval_batch")
FILES: dict[str, Callable[[str], str]] = {
    "model.pretrained": fingerprint_weights, "sae.pretrained": fingerprint_autoencoder,
}  # fmt: skip
Action = Literal["make", "replace", "nothing"]


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what it does, what it depends on, and the function that does it."""

    name: str
    description: str
    run: Callable[[Config, Dataset, Workdir], None]
    fields: tuple[str, ...]
    """The sections and fields of the config that its results depend on."""
    entries: tuple[str, ...] = ()
    """Patterns of the names that it writes in its directory. All others are the user's, and are never deleted."""
    products: tuple[str, ...] = ()
    """The files that it may write in the workdir itself."""
    file: str = ""
    """The field, one of FILES, that names a file that it reads."""
    reads: tuple[str, ...] = ()
    """The stages whose results it reads."""
    optional: bool = False
    """Stages that read it can do without it."""
    derived: bool = False
    """It takes seconds, so stale results are replaced without --overwrite."""
    by_default: bool = True
    """It runs if the command names no stages."""


class SplitRecord(BaseModel):
    """The description of a split in a record: see `describe_data`."""

    images: list[int]
    hashes: list[str]


class DataRecord(BaseModel):
    """The description of the data in a record: see `describe_data`."""

    classes: list[str]
    image: list[int]
    train: SplitRecord
    validation: SplitRecord
    test: SplitRecord


class FileRecord(BaseModel):
    """The description of the file that a stage reads in a record."""

    path: str
    hash: str


class StartedRecord(BaseModel):
    """The content of started.json: what the stage is made from."""

    format: int
    config: dict[str, Any]
    data: DataRecord | None
    file: FileRecord = FileRecord(path="", hash="")  # some stages read none
    inputs: dict[str, str]


class DoneRecord(StartedRecord):
    """The content of done.json."""

    finished: str
    seconds: float
    peak_memory_bytes: int
    products: list[str]


RECORDS: dict[str, type[StartedRecord]] = {"started.json": StartedRecord, "done.json": DoneRecord}


class Inputs(NamedTuple):
    """Everything that a command starts from, by content."""

    config: Config
    data: dict[str, Any] | None  # the result of `describe_data`; None if the data were not read
    hashes: dict[str, str]  # of the files that the fields in FILES name; empty if a file is missing


def read_inputs(config: Config, dataset: Dataset | None) -> Inputs:
    """Read what a command starts from."""
    fields = flatten(config)
    hashes = {name: fingerprint(fields[name]) if fields[name] else "" for name, fingerprint in FILES.items()}
    return Inputs(config, None if dataset is None else describe_data(dataset), hashes)


def stage_fields(config: Config, stage: Stage) -> dict[str, Any]:
    """Select the fields that a stage depends on, by dotted path."""
    return {
        path: value
        for path, value in flatten(config).items()
        if path not in PLACES and any(path == field or path.startswith(f"{field}.") for field in stage.fields)
    }


def describe_inputs(now: Inputs, workdir: Workdir, stage: Stage, unread: Sequence[str] = ()) -> dict[str, Any]:
    """Describe what a stage is made from: the record that it keeps.

    Args:
      unread: optional stages that it reads and that are left out now.
    """
    record = {"format": FORMAT, "config": stage_fields(now.config, stage), "data": now.data}
    if stage.file:
        record["file"] = {"path": flatten(now.config)[stage.file], "hash": now.hashes[stage.file]}
    return record | {"inputs": _inputs_finished(workdir, stage, unread)}


def explain_staleness(now: Inputs, workdir: Workdir, stage: Stage, unread: Sequence[str] = ()) -> str:
    """Say why a stage's results in a directory cannot be used with these inputs.

    Args:
      unread: optional stages that it reads and that are left out now.

    Returns:
      The reason; an empty string if they can be used, or if there are none.

    Raises:
      HeadSteerError: the stage's record is damaged.
    """
    record = read_record(workdir, stage.name)
    return "" if record is None else _explain_difference(record, describe_inputs(now, workdir, stage, unread), stage)


def read_record(workdir: Workdir, name: str) -> dict[str, Any] | None:
    """Read what a stage was made from; None if it never began.

    Raises:
      HeadSteerError: the record is damaged.
    """
    directory = locate_complete(workdir, name)
    for marker in ("done.json", "started.json"):
        if (directory / marker).exists():
            return _read_marker(directory / marker)
    return None


def _read_marker(path: Path) -> dict[str, Any]:
    """Read started.json or done.json and check its form, unless another version of HeadSteer made it.

    Raises:
      HeadSteerError: it is damaged, for instance edited by hand.
    """
    record = read_json(path)
    fault = "" if isinstance(record, dict) else "it holds no record"
    if not fault and record.get("format", 1) == FORMAT:
        fault = _find_fault(record, path.name)
    if fault:
        remedy = REMAKE if path.name == "done.json" else f"move {path.parent} elsewhere, then run the same command"
        raise HeadSteerError(f"{path}: damaged ({fault}); {remedy}")
    return dict(record)


def _find_fault(record: Mapping[str, Any], marker: str) -> str:
    """Say what is wrong with the form of a record; an empty string if nothing is."""
    try:
        RECORDS[marker].model_validate(record, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
    if data := record["data"]:
        lengths = {len(data[split][name]) for split in SPLITS for name in ("images", "hashes")}
        if lengths != {len(data["classes"])}:
            return "data: its lists have not one element for each class"
    return ""


def is_done(workdir: Workdir, stage: Stage) -> bool:
    """Say whether a stage is finished."""
    return (locate_complete(workdir, stage.name) / "done.json").exists()


class Plan(NamedTuple):
    """The plan for a stage: what a command does with it, and why."""

    stage: Stage
    action: Action
    reason: str = ""  # why it is replaced
    left_out: Mapping[str, str] = types.MappingProxyType({})  # stale optional stages that it does not read, and why


def plan_stages(
    now: Inputs, workdir: Workdir, stages: Sequence[Stage], chosen: Sequence[Stage], overwrite: bool
) -> list[Plan]:
    """Decide what to do with each chosen stage, before anything is written.

    Args:
      stages: all of them, in order.
      chosen: those that the user asked for.
      overwrite: replace stale results instead of refusing them.

    Raises:
      HeadSteerError: a chosen stage reads one that is not chosen and is missing or stale; a chosen stage is stale and
        `overwrite` is off; or HeadSteer did not make a chosen stage's directory.
    """
    plans: list[Plan] = []
    remade: set[str] = set()
    left_out: dict[str, str] = {}
    for stage in stages:
        if stage not in chosen:
            if reason := _check_skipped(now, workdir, stage, chosen, remade):
                left_out[stage.name] = reason
            continue
        unread = {name: reason for name, reason in left_out.items() if name in stage.reads}
        plan = _plan_stage(now, workdir, stage, remade, unread)
        if plan.action == "replace" and not (overwrite or stage.derived):
            raise HeadSteerError(
                f"{workdir / stage.name}: it is stale ({plan.reason}); pass --overwrite or another --workdir"
            )
        if plan.action != "nothing":
            remade.add(stage.name)
        plans.append(plan)
    return plans


def _plan_stage(now: Inputs, workdir: Workdir, stage: Stage, remade: set[str], left_out: Mapping[str, str]) -> Plan:
    """Decide what to do with a chosen stage.

    Args:
      remade: the stages that the same command computes.
      left_out: the optional stages that it does not read, and why.
    """
    check_directory(workdir / stage.name)
    record = read_record(workdir, stage.name)
    reason = explain_staleness(now, workdir, stage, tuple(left_out))
    again = [name for name in stage.reads if name in remade]
    if record is not None and again:
        reason = reason or f"{again[0]}, which it reads, is computed again"
    if record is not None and stage.derived and not reason and is_done(workdir, stage):
        pages = [name for name in stage.products if name.endswith(".html")]  # an earlier version wrote fewer
        reason = next((f"{name} is missing" for name in pages if not (workdir / name).exists()), "")
    if record is not None and reason:
        return Plan(stage, "replace", reason, left_out)
    return Plan(stage, "nothing" if is_done(workdir, stage) else "make", "", left_out)


def check_directory(directory: Path) -> None:
    """Check that a stage's directory is HeadSteer's, or that nothing is there.

    Raises:
      HeadSteerError: it is not empty and has no marker of a stage.
    """
    if is_stage_directory(directory) or not (directory.exists() or is_broken_link(directory)):
        return
    begun = {".started.json.part"}  # all that there is if the process died as it began the stage
    if not directory.is_dir() or {entry.name for entry in directory.iterdir()} - begun:
        raise HeadSteerError(f"{directory}: exists, and HeadSteer did not make it; choose another --workdir")


def is_broken_link(path: Path) -> bool:
    """Say whether a path is a symbolic link that leads nowhere, where nothing can be written."""
    return not is_in_bucket(path) and os.path.islink(path) and not path.exists()


def begin_stage(now: Inputs, workdir: Workdir, plan: Plan) -> dict[str, Any]:
    """Make a stage's directory, or the new one beside the old, and write started.json there; return the record.

    An interrupted stage continues with the record that it began with, unless its inputs have changed.

    Raises:
      HeadSteerError: the disk is full or not writable.
    """
    stage, target = plan.stage, stage_workdir(workdir, plan)
    record, started = describe_inputs(now, workdir, stage, tuple(plan.left_out)), target / f"{stage.name}/started.json"
    if plan.action == "replace":
        logger.info(f"{stage.name}: computing it again ({plan.reason}); the old results stay until it is done")
    for name, reason in plan.left_out.items():
        logger.info(f"{stage.name}: leaves out {name}, which is stale ({reason})")
    make_directory(target.path)
    before = None
    with suppress(HeadSteerError):  # what was begun with a damaged record is begun again
        before = _read_marker(started) if started.exists() else None
    if before is not None and not _explain_difference(before, record, stage):
        record = before
    else:
        discard_new(workdir, stage.name, stage.entries, stage.products)
        make_directory(started.parent)
        write_json(started, record)
    if plan.action == "make":
        write_config(now.config, workdir)
    return record


def stage_workdir(workdir: Workdir, plan: Plan) -> Workdir:
    """Return the workdir that a stage writes to; if it replaces old results, it writes beside them."""
    return redirect_stage(workdir, plan.stage.name, plan.stage.products) if plan.action == "replace" else workdir


def finish_stage(record: dict[str, Any], workdir: Workdir, plan: Plan, config: Config, seconds: float) -> None:
    """Write a stage's done.json, and replace old results with the new ones.

    Raises:
      HeadSteerError: the disk is full or not writable.
    """
    stage = plan.stage
    finished = datetime.datetime.now(datetime.UTC).isoformat()
    done = record | {"finished": finished, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
    target = stage_workdir(workdir, plan)
    done["products"] = [product for product in stage.products if (target / product).exists()]
    write_json(target / f"{stage.name}/done.json", done)
    if plan.action == "replace":
        replace_stage(workdir, stage.name, stage.entries, stage.products)
        write_config(config, workdir)


def write_config(config: Config, workdir: Workdir) -> None:
    """Write the config of the last command to config.json, which `load_run` reads."""
    write_json(workdir / "config.json", json.loads(config.model_dump_json()))


def _check_skipped(now: Inputs, workdir: Workdir, stage: Stage, chosen: Sequence[Stage], remade: set[str]) -> str:
    """Check that the chosen stages can read a stage that is not chosen.

    Args:
      remade: the stages that the same command computes.

    Returns:
      Why an optional stage is left out; an empty string if it can be read, or if nothing reads it.

    Raises:
      HeadSteerError: a chosen stage needs it, and it is missing or stale.
    """
    readers = [reader.name for reader in chosen if stage.name in reader.reads]
    if not readers:
        return ""
    if not is_done(workdir, stage):
        if stage.optional:
            return ""
        raise HeadSteerError(
            f"{readers[0]} needs {stage.name}, which is not done in {workdir.path}: add it to --stages"
        )
    reason = explain_staleness(now, workdir, stage)
    if again := [name for name in stage.reads if name in remade]:
        reason = reason or f"{again[0]}, which it reads, is computed again"
    if reason and not stage.optional:
        raise HeadSteerError(
            f"{readers[0]} needs {stage.name}, but {workdir / stage.name} is stale ({reason}); "
            f"add {stage.name} to --stages and pass --overwrite, or choose another --workdir"
        )
    return reason


def _inputs_finished(workdir: Workdir, stage: Stage, unread: Sequence[str]) -> dict[str, str]:
    """Return when each finished stage that this one reads was finished."""
    records = {name: locate_complete(workdir, name) / "done.json" for name in stage.reads if name not in unread}
    return {name: _read_marker(path).get("finished", "") for name, path in records.items() if path.exists()}


def _explain_difference(before: Mapping[str, Any], now: Mapping[str, Any], stage: Stage) -> str:
    """Say how two records of a stage differ in what they were made from; an empty string if they agree."""
    if (version := before.get("format", 1)) != FORMAT:
        return f"another version of HeadSteer made it: its record has format {version}, not {FORMAT}"
    defaults = flatten(Config())  # a field that an older version did not have: its default computes what that did
    added = {path: defaults[path] for path in now["config"] if path in defaults}
    if difference := describe_field_changes(added | before["config"], now["config"]):
        return difference
    if before["data"] and now["data"] and (change := describe_data_change(before["data"], now["data"])):
        return f"the data have changed: {change}"
    if stage.file and "file" not in before:
        return f"its record does not say which config.{stage.file} it was made with"
    if stage.file and (change := _describe_file_change(stage.file, before["file"], now["file"])):
        return change
    return "" if before["inputs"] == now["inputs"] else "a stage that it reads was computed again"


def _describe_file_change(field: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say how a field's file has changed: by its content or, if a hash is missing, by its path; empty if it has not."""
    if before["hash"] and now["hash"]:
        changed = before["hash"] != now["hash"]
        return f"config.{field}: the content of {now['path']} has changed" if changed else ""
    return describe_field_changes({field: before["path"]}, {field: now["path"]})


def describe_field_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the fields that differ; an empty string if none does."""
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
