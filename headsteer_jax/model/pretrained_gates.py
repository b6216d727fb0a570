"""The gates of AdaViT's published checkpoints: which ones a file has, and whether the config's gates are the same.

The released code has a linear layer for each kind of gate and block: `head_select` and `layer_select` read the CLS
residual, which an optional `norm_policy` normalises for both, and `token_select` reads each patch after the block's
first norm. In evaluation a gate is open if the sigmoid of its logit is above 0.5, or 0.6 for patches.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headsteer_jax.config.schema import GATE_KINDS, Config, GateKind
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.gates import SUBLAYERS
from headsteer_jax.model.layouts import GATES, Layout

MODULES: dict[GateKind, str] = {
    "heads": "decide", "sublayers": "decide_sublayers", "tokens": "decide_tokens",
}  # fmt: skip
THRESHOLDS: dict[GateKind, float] = {"heads": 0.5, "sublayers": 0.5, "tokens": 0.6}  # of the released code
# Options of the released training script under which the blocks compute something else than ours.
OTHER_BLOCKS = {
    "ada_head_v2": "a dropped head takes a part of the MLP's hidden layer with it",
    "ada_token_nonstep": "one layer chooses the patches for all layers",
}


class FileGates(NamedTuple):
    """The gates in a weight file."""

    names: dict[GateKind, dict[int, str]]  # by kind and layer, the linear layer's name, without its leaves
    norms: dict[int, str]  # by layer, the name of the norm that heads' and sublayers' gates share
    left_out: tuple[GateKind, ...]  # kinds that the config does not have
    unneeded: tuple[str, ...]  # beginnings of the names of their tensors


def find_gates(path: Path, layout: Layout, prefix: str, tensors: Iterable[str], config: Config) -> FileGates:
    """Find the gates in a file by the names of its tensors.

    Raises:
      HeadSteerError: the file has gates under names that the released code does not give them.
    """
    tensors = set(tensors)
    depth = config.model.depth

    def find(module: str) -> dict[int, str]:
        """Find a module in the layers that have it."""
        names = {layer: prefix + module.format(layer) for layer in range(depth)}
        return {layer: name for layer, name in names.items() if f"{name}.weight" in tensors}

    names = {kind: find(layout.gates[kind]) for kind in GATE_KINDS if kind in layout.gates}
    norms = find(layout.gate_norm) if layout.gate_norm else {}
    modules = [name for by_layer in (*names.values(), norms) for name in by_layer.values()]
    known = {f"{name}.{leaf}" for name in modules for leaf in ("weight", "bias")}
    gate_tensors = (name for name in tensors if name.startswith(prefix) and layout.gates and GATES.search(name))
    if foreign := sorted({*gate_tensors} - known):
        raise HeadSteerError(
            f"{path}: the tensor {foreign[0]!r} belongs to gates of another form than those of AdaViT's released code "
            f"({layout.gates['heads'].format('N')} and the like); choose a file of that code, or one without gates"
        )
    left_out = tuple(kind for kind, by_layer in names.items() if by_layer and kind not in config.gate.kinds)
    unneeded = [name for kind in left_out for name in names[kind].values()]
    if {"heads", "sublayers"}.isdisjoint(config.gate.kinds):
        unneeded += norms.values()
    return FileGates(names, norms, left_out, tuple(f"{name}." for name in unneeded))


def check_gates(path: Path, gates: FileGates, config: Config, arguments: Mapping[str, Any]) -> list[str]:
    """Check that the config's gates read and switch what the file's gates do.

    Args:
      arguments: of the training script, from inside the file.

    Returns:
      Warnings about settings under which the loaded gates decide, or act, as they were not trained to.

    Raises:
      HeadSteerError: gates are in other layers, one side has a norm that the other does not have, or the file's blocks
        compute something else.
    """
    loaded = [kind for kind in config.gate.kinds if gates.names.get(kind)]
    for option, reason in OTHER_BLOCKS.items():
        if loaded and arguments.get(option):
            raise HeadSteerError(f"{path}: it was trained with {option}: {reason}; choose another file")
    for kind in loaded:
        first, field = config.gate.settings(kind).first_layer, "" if kind == "heads" else f"{kind}."
        layers = sorted(gates.names[kind])
        if layers != list(range(first, config.model.depth)):
            raise HeadSteerError(
                f"{path}: its gates of {kind} are in the layers {', '.join(map(str, layers))}, but "
                f"config.gate.{field}first_layer = {first}; set config.gate.{field}first_layer={layers[0]}, or choose "
                "another file"
            )
    if {"heads", "sublayers"} & set(loaded) and bool(gates.norms) != config.gate.layer_norm:
        says = "normalise" if gates.norms else "do not normalise"
        raise HeadSteerError(
            f"{path}: its gates {says} the CLS residual, but config.gate.layer_norm = {config.gate.layer_norm}; set "
            f"config.gate.layer_norm={str(bool(gates.norms)).lower()}"
        )
    return list(_compare_settings(path, loaded, config, arguments))


def _compare_settings(
    path: Path, loaded: list[GateKind], config: Config, arguments: Mapping[str, Any]
) -> Iterable[str]:
    """Yield the settings of the loaded gates that differ from those of the released code."""
    gate = config.gate
    theirs: dict[str, tuple[Any, Any]] = {}
    if "heads" in loaded:
        theirs["dropped"] = gate.dropped, "identity" if arguments.get("ada_head_attn") else "slice"
    for kind in loaded:
        field = "threshold" if kind == "heads" else f"{kind}.threshold"
        theirs[field] = gate.settings(kind).threshold, THRESHOLDS[kind]
    if "tokens" in loaded:
        theirs["tokens.normalise"] = gate.tokens.normalise, True
    for field, (ours, trained) in theirs.items():
        if ours != trained:
            yield f"{path}: its gates were trained for gate.{field} = {trained}, but config.gate.{field} = {ours}"


def read_gates(
    gates: FileGates, layer: int, config: Config, take: Callable[..., np.ndarray]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Read a layer's gates as our parameters, those kinds that both the file and the config have.

    Args:
      take: the function (name, *shape) that returns a tensor of the file.
    """
    width, counts = config.model.width, {"heads": config.model.heads, "sublayers": len(SUBLAYERS), "tokens": 1}
    read = {}
    for kind in config.gate.kinds_in(layer):
        if layer not in gates.names.get(kind, {}):
            continue
        name = gates.names[kind][layer]
        kernel, bias = take(f"{name}.weight", counts[kind], width).T, take(f"{name}.bias", counts[kind])
        read[MODULES[kind]] = {"linear": {"kernel": kernel, "bias": bias}}
        if kind != "tokens" and layer in gates.norms:
            norm = gates.norms[layer]
            read[MODULES[kind]]["norm"] = {
                "scale": take(f"{norm}.weight", width), "bias": take(f"{norm}.bias", width),
            }  # fmt: skip
    return read
