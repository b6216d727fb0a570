"""From a trained model to a deployed one, and from a deployed one to a smaller one.

Axes: C classes, L layers, D width, H heads, K head width, M neurons.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from headsteer_jax.config.schema import Config, DataConfig
from headsteer_jax.deploy.model import DeployedConfig, DeployedModel
from headsteer_jax.model.vit import TrainedModel

# by kind of gates: the name of a flax block's decision network
GATE_NAMES = {"heads": "decide", "sublayers": "decide_sublayers", "tokens": "decide_tokens"}


def describe_model(
    config: Config, classes: tuple[str, ...], image: tuple[int, int, int], dynamic: bool = False
) -> DeployedConfig:
    """Describe the deployed model of a run from which nothing is cut; see `convert_model`."""
    m, data = config.model, config.data
    return DeployedConfig(
        classes=classes, image=image,
        data=DataConfig(image_size=data.image_size, channels=data.channels, mean=data.mean, std=data.std),
        model=m.model_copy(update={"pretrained": "", "dtype": "float32"}),
        heads=(m.heads,) * m.depth, neurons=(round(m.mlp_ratio * m.width),) * m.depth,
        gate=config.gate if dynamic else None,
    )  # fmt: skip


def convert_model(
    trained: TrainedModel,
    class_names: tuple[str, ...],
    labels: np.ndarray,
    image: tuple[int, int, int],
    dynamic: bool = False,
) -> DeployedModel:
    """Convert a trained model to a deployed one from which nothing is cut, for some of its classes.

    Args:
      class_names: of all classes.
      labels: [C] the classes that the classifier keeps.
      image: height, width and channels of the stored images.
      dynamic: keep the decision networks; otherwise everything runs.
    """
    config, tree = trained.config, jax.tree.map(np.asarray, trained.params["params"])
    m = config.model
    deployed = describe_model(config, tuple(class_names[label] for label in labels), image, dynamic)
    prefix = [tree["cls"][0] + tree["positions"][0, :1], *([tree["registers"][0]] if m.registers else [])]
    params = {
        "patches": {
            "kernel": tree["patches"]["kernel"].reshape(-1, m.width),
            "bias": tree["patches"]["bias"] + tree["positions"][0, 1:],
        },
        "prefix": np.concatenate(prefix),
        "layers": [_convert_layer(tree[f"layers_{i}"], dynamic) for i in range(m.depth)],
        "norm": dict(tree["norm"]),
        "head": {"kernel": tree["head"]["kernel"][:, labels], "bias": tree["head"]["bias"][labels]},
    }
    return DeployedModel(deployed, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params))


def _convert_layer(tree: Mapping[str, Any], dynamic: bool) -> dict[str, Any]:
    """Convert the parameters of a flax block."""
    qkv = [tree[name] for name in ("query", "key", "value")]
    layer = {name: dict(tree[name]) for name in ("norm1", "out", "norm2", "mlp_in", "mlp_out")}
    layer["qkv"] = {part: np.concatenate([dense[part] for dense in qkv], axis=-1) for part in ("kernel", "bias")}
    if dynamic:
        gates = {kind: tree[name] for kind, name in GATE_NAMES.items() if name in tree}
        layer["gates"] = {
            kind: dict(gate["linear"]) | ({"norm": dict(gate["norm"])} if "norm" in gate else {})
            for kind, gate in gates.items()
        }
    return layer


class KeptParts(NamedTuple):
    """The parts of every layer that stay."""

    heads: tuple[np.ndarray, ...]  # by layer, ascending
    neurons: tuple[np.ndarray, ...]  # by layer, ascending


def keep_all(config: DeployedConfig) -> KeptParts:
    """Return the choice that cuts nothing."""
    return KeptParts(tuple(map(np.arange, config.heads)), tuple(map(np.arange, config.neurons)))


def cut_model(model: DeployedModel, parts: KeptParts) -> DeployedModel:
    """Cut the heads and neurons that do not stay out of the weights.

    The result computes what the model would compute if the rows of `out` and `mlp_out` that belong to them were 0.
    """
    config, layers = model.config, []
    for layer, heads, neurons in zip(model.params["layers"], parts.heads, parts.neurons, strict=True):
        rows = expand_heads(config, heads)
        cut: dict[str, Any] = {"norm1": layer["norm1"], "norm2": layer["norm2"]}
        cut["out"] = {"kernel": np.asarray(layer["out"]["kernel"])[rows], "bias": layer["out"]["bias"]}
        cut["mlp_out"] = {"kernel": np.asarray(layer["mlp_out"]["kernel"])[neurons], "bias": layer["mlp_out"]["bias"]}
        if len(heads):
            columns = np.concatenate([part * layer["qkv"]["bias"].shape[0] // 3 + rows for part in range(3)])
            cut["qkv"] = {part: np.asarray(layer["qkv"][part])[..., columns] for part in ("kernel", "bias")}
        else:
            del cut["norm1"], cut["out"]["kernel"]
        if len(neurons):
            cut["mlp_in"] = {part: np.asarray(layer["mlp_in"][part])[..., neurons] for part in ("kernel", "bias")}
        else:
            del cut["norm2"], cut["mlp_out"]["kernel"]
        layers.append(cut)
    sizes = {"heads": tuple(map(len, parts.heads)), "neurons": tuple(map(len, parts.neurons))}
    params = jax.tree.map(lambda leaf: np.array(leaf, np.float32), model.params | {"layers": layers})
    return DeployedModel(config.model_copy(update=sizes), params)


def expand_heads(config: DeployedConfig, heads: np.ndarray) -> np.ndarray:
    """Return the columns of heads' outputs that belong to some heads: [n] -> [n K]."""
    return (np.asarray(heads, int)[:, None] * config.head_width + np.arange(config.head_width)).reshape(-1)
