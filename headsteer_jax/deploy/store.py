"""Deployed models on disk: a directory with model.safetensors, config.json and what goes with them.

A directory is written beside its place and then moved into it, so that it is complete or not there at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from pydantic import ValidationError

from headsteer_jax.config.files import first_fault
from headsteer_jax.config.paths import expand_path
from headsteer_jax.deploy.model import FORMAT, VERSION, DeployedConfig, DeployedModel, Params, compute_logits
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime.files import write_bytes, write_json
from headsteer_jax.runtime.settings import open_devices

CONFIG, WEIGHTS, CLASSES = "config.json", "model.safetensors", "classes.json"
# every file that a deployed directory may have; others are the user's
FILES = (
    CONFIG, WEIGHTS, CLASSES, "card.json", "card.md", "speed.json", "speed.png", "model.stablehlo", "model.onnx",
    "model_batch1.onnx",
)  # fmt: skip
REDEPLOY = "deploy it again with headsteer deploy"


def flatten_params(params: Params) -> dict[str, np.ndarray]:
    """Name every array of a model's parameters, such as layers.0.qkv.kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def unflatten_params(arrays: Mapping[str, np.ndarray]) -> Params:
    """Build the parameters from the arrays that `flatten_params` named."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    layers = tree.get("layers", {})
    return tree | {"layers": [layers[str(i)] for i in range(len(layers))]}


def write_model(directory: Path, model: DeployedModel) -> None:
    """Write a model's weights, its description and its classes into a directory.

    Raises:
      HeadSteerError: the disk is full or not writable.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in flatten_params(model.params).items()}
    write_bytes(directory / WEIGHTS, safetensors.numpy.save(arrays, {"format": "np", "writer": FORMAT}))
    write_json(directory / CLASSES, list(model.config.classes))
    write_json(directory / CONFIG, json.loads(model.config.model_dump_json()))


def load_deployed(directory: str | os.PathLike[str]) -> DeployedModel:
    """Load a deployed model: `load_deployed("deployed/cats").apply(images)` computes the logits of uint8 images.

    Raises:
      HeadSteerError: the directory is none that headsteer deploy wrote, or it is damaged or of another version.
    """
    path = Path(expand_path(os.fspath(directory), "load_deployed", buckets=False))
    config = read_description(path)
    with explain_errors(path / WEIGHTS, REDEPLOY, "missing or damaged"):
        try:
            params = unflatten_params(safetensors.numpy.load_file(path / WEIGHTS))
        except safetensors.SafetensorError as error:
            raise ValueError(error) from None
        if len(params["layers"]) != config.depth:
            raise ValueError(f"it has {len(params['layers'])} layers, but config.json has {config.depth}")
        images = jax.ShapeDtypeStruct((1, *config.image), np.uint8)
        shape = jax.eval_shape(lambda images: compute_logits(config, params, images), images).shape
        if shape != (1, len(config.classes)) or _count_parts(config, params) != (config.heads, config.neurons):
            raise ValueError("its shapes are not those of config.json")
    open_devices()
    return DeployedModel(config, jax.device_put(params))


def _count_parts(config: DeployedConfig, params: Params) -> tuple[tuple[int, ...], ...]:
    """Count the heads and the neurons of every layer's weights."""
    rows = [
        [len(layer[name]["kernel"]) if "kernel" in layer[name] else 0 for layer in params["layers"]]
        for name in ("out", "mlp_out")
    ]
    return tuple(count // config.head_width for count in rows[0]), tuple(rows[1])


def find_kind(directory: epath.Path) -> Literal["run", "deployed"]:
    """Find out what a directory holds: a run whose stage train has begun, or a deployed model.

    Raises:
      HeadSteerError: it holds neither.
    """
    if (directory / "train/started.json").exists():
        return "run"
    try:
        content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return "deployed"
    problem = "holds neither a run nor a deployed model" if directory.is_dir() else "no such directory"
    raise HeadSteerError(f"{directory}: {problem}; give one that headsteer run or headsteer deploy wrote")


def read_description(directory: Path) -> DeployedConfig:
    """Read and check the config.json of a deployed directory.

    Raises:
      HeadSteerError: it is missing, not ours, damaged or of another version.
    """
    path = directory / CONFIG
    if not path.exists():
        missing = f"{path}: no such file" if directory.is_dir() else f"{directory}: no such directory"
        raise HeadSteerError(f"{missing}; give a directory that headsteer deploy wrote")
    with explain_errors(path, REDEPLOY, "damaged"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise HeadSteerError(f"{path}: not of a deployed model; give a directory that headsteer deploy wrote")
        if content.get("version") != VERSION:
            raise HeadSteerError(
                f"{path}: version {content.get('version')} of the format, but this HeadSteer reads version {VERSION}; "
                f"{REDEPLOY}, or install the HeadSteer that wrote it"
            )
        try:
            config = DeployedConfig.model_validate_json(json.dumps(content))
        except ValidationError as error:
            raise HeadSteerError(f"{path}: damaged ({first_fault(error)}); {REDEPLOY}") from None
    if len(config.neurons) != config.depth or config.depth != config.model.depth:
        raise HeadSteerError(f"{path}: damaged (it does not describe every layer); {REDEPLOY}")
    return config


def check_output(output: Path) -> None:
    """Check that a deployed model may be written to a directory: it is new, empty, or one that HeadSteer wrote.

    Raises:
      HeadSteerError: it is something else, it holds other files as well, or it is the current directory.
    """
    remedy = "choose another --output"
    with explain_errors(output, remedy):
        place = next(place for place in (output, *output.parents) if place.exists() or place.is_symlink())
        if not place.is_dir():
            raise HeadSteerError(f"{place}: is not a directory; {remedy}")
        if output.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise HeadSteerError(
                f"{output}: is the current directory or one of its parents, and would be replaced; {remedy}"
            )
        for leftover in _list_leftovers(output.resolve()):
            if leftover.is_symlink() or (leftover.exists() and (not leftover.is_dir() or _list_foreign(leftover))):
                raise HeadSteerError(f"{leftover}: HeadSteer did not write it; move it away, or {remedy}")
        if place != output or not any(output.iterdir()):
            return
        try:
            ours = json.loads((output / CONFIG).read_text(encoding="utf-8")).get("format") == FORMAT
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise HeadSteerError(f"{output}: exists, and HeadSteer did not write it; {remedy}")
        if foreign := _list_foreign(output):
            raise HeadSteerError(f"{foreign[0]}: HeadSteer did not write it; move it away, or {remedy}")


def _list_leftovers(output: Path) -> tuple[Path, Path]:
    """List what a killed command may leave beside a directory: the new one, unfinished, and the one it replaces.

    They always have the same names, so that the next command finds them.
    """
    return output.with_name(f".{output.name}.new"), output.with_name(f".{output.name}.old")


def _list_foreign(directory: Path) -> list[Path]:
    """List what a directory holds that is none of a deployed model's files, complete or half written."""
    known = {*FILES, *(f".{name}.part" for name in FILES)}
    return sorted(entry for entry in directory.iterdir() if entry.name not in known or not entry.is_file())


def replace_directory(output: Path, write: Callable[[Path], None]) -> None:
    """Write a directory completely or not at all: beside its place, and then moved into it.

    If the directory is a link, what it points to is replaced. Files that others have put there meanwhile stay.

    Args:
      output: checked by `check_output`; what it holds is replaced.
      write: writes all files into the directory that it gets.

    Raises:
      HeadSteerError: the disk is full or not writable; what was there before is intact.
    """
    output = output.resolve()
    new, old = _list_leftovers(output)
    with explain_errors(output):
        if old.exists() and not output.exists():  # the command was killed between its last two steps
            old.rename(output)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            write(new)
            if output.exists():
                output.rename(old)
            new.rename(output)
            for entry in _list_foreign(old) if old.exists() else ():
                entry.rename(output / entry.name)
        finally:
            if old.exists() and not output.exists():
                old.rename(output)
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not _list_foreign(old):
                shutil.rmtree(old, ignore_errors=True)
