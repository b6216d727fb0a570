"""With what each stage was made, what of it is stale, and why."""

import importlib.metadata
import json
import platform
import resource
import sys
from typing import Any

import jax
from etils.epath import Path

from headsteer_jax.config.files import flatten
from headsteer_jax.config.schema import Config
from headsteer_jax.runtime.files import read_json

NEEDS = {
    "train": ("seed", "data", "model", "gate", "train"),
    "sae": ("seed", "data", "model", "gate", "train", "sae"),
    "grid": ("seed", "data", "model", "gate", "train", "sae", "grid"),
    "steer": ("seed", "data", "model", "gate", "train", "sae", "steer", "report.top_images"),
    "layers": (
        "seed",
        "data",
        "model",
        "gate",
        "train",
        "sae",
        "steer.latents",
        "steer.max_frequency",
        "steer.mode",
        "steer.form",
        "steer.target",
        "steer.tolerance",
        "steer.bootstrap",
        "steer.confidence",
        "layers",
    ),
    "report": ("seed", "data", "model", "gate", "train", "sae", "grid", "steer", "layers", "report"),
}
STAGES = tuple(NEEDS)
OPTIONAL = ("grid", "layers")  # what no later stage waits for
SIZES = (
    "sae.cache",
    "steer.memory",
    "steer.chunk",
    "layers.chunk",
)  # how much is done at once, and where: no figure depends on it
FROM = {
    "sae": ("train",),
    "grid": ("train",),
    "steer": ("train", "sae"),
    "layers": ("train",),
}  # what a stage reads; the report: everything
PACKAGES = ("headsteer-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def package_versions() -> dict[str, str]:
    """What made the numbers."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def stage_fields(config: Config, stage: str) -> dict[str, Any]:
    """The fields that a stage depends on, by dotted path."""
    return {
        path: value
        for path, value in flatten(config).items()
        if path not in SIZES and any(path == need or path.startswith(f"{need}.") for need in NEEDS[stage])
    }


def _describe_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The fields that differ, as text; empty where none does."""
    missing = object()
    return "; ".join(
        f"config.{path} was {json.dumps(before.get(path))}, now {json.dumps(now.get(path))}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path, missing) != now.get(path, missing)
    )


def _reads(stage: str) -> tuple[str, ...]:
    """The stages whose results a stage reads."""
    return FROM.get(stage, STAGES[: STAGES.index(stage)])


def _inputs(workdir: Path, stage: str) -> dict[str, str]:
    """When each stage that this one reads was finished: a stage made again makes this one stale."""
    done = {name: workdir / name / "done.json" for name in _reads(stage)}
    return {name: read_json(path)["finished"] for name, path in done.items() if name not in OPTIONAL or path.exists()}


def explain_staleness(config: Config, workdir: Path, stage: str) -> str:
    """Why what is there of a stage is not this config's, or an empty text."""
    for name in ("done.json", "started.json"):
        path = workdir / stage / name
        if path.exists():
            record = read_json(path)
            different = _describe_difference(record["config"], stage_fields(config, stage))
            if different:
                return different
            if record["inputs"] != _inputs(workdir, stage):
                return "a stage before it was made again"
    return ""


def peak_memory_bytes() -> int:
    """This process's largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
