"""What evaluated images cost: multiply-accumulates and the use of each kind of gate; both can be kept in a file."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from headsteer_jax.config.schema import GATE_KINDS, Config
from headsteer_jax.model.gates import SUBLAYERS, Gates
from headsteer_jax.model.macs import count_dense_macs, count_macs


@partial(jax.jit, static_argnums=(0, 1))
def _count_image_macs(config: Config, classes: int, gates: Mapping[str, jax.Array]) -> jax.Array:
    by_layer: dict[int, Gates] = {
        layer: {
            kind: gates[kind][:, layer - config.gate.settings(kind).first_layer] for kind in config.gate.kinds_in(layer)
        }
        for layer in config.gated_layers
    }
    return count_macs(config, classes, by_layer)


def count_image_macs(config: Config, classes: int, gates: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count the MACs of each image from its gates -> [N] float32.

    Args:
      gates: by kind, [N, A, n] of all layers that have it, as `Observed.gates`.
    """
    return np.asarray(_count_image_macs(config, classes, dict(gates)))


def measure_usage(gates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Measure the share of gates that are open in each layer: by kind [A]; attention and MLP apart, [A, 2]."""
    return {kind: g.mean(axis=0 if kind == "sublayers" else (0, 2)) for kind, g in gates.items()}


def measure_compute(config: Config, classes: int, gates: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Measure what images cost in the mean.

    Returns:
      `dense_macs` and `macs` of an image, their ratio `share`, and `usage`: by kind, the share of gates that are open.
    """
    dense, macs = count_dense_macs(config, classes), float(count_image_macs(config, classes, gates).mean(dtype=float))
    usage = {kind: float(g.mean()) for kind, g in gates.items()}
    return {"dense_macs": dense, "macs": macs, "share": macs / dense, "usage": usage}


class ImageGates(NamedTuple):
    """The thresholded gates of N images, with what they cost and the model's answers."""

    gates: dict[str, np.ndarray]  # by kind, [N, A, n] bool: of the layers that have it, the n gates of each
    macs: np.ndarray  # [N] float32
    prediction: np.ndarray  # [N] int32


def pack_gates(images: ImageGates) -> dict[str, np.ndarray]:
    """Pack images' gates, one bit each, as arrays for a file: the last axis is packed into bytes."""
    bits = {kind: np.packbits(g, axis=-1) for kind, g in images.gates.items()}
    return bits | {"macs": images.macs, "prediction": images.prediction}


def unpack_gates(arrays: Mapping[str, np.ndarray], config: Config) -> ImageGates:
    """Unpack the arrays of `pack_gates`, which were made with this config."""
    m = config.model
    counts = {"heads": m.heads, "sublayers": len(SUBLAYERS), "tokens": (config.data.image_size // m.patch) ** 2}
    gates: dict[str, np.ndarray] = {
        kind: np.unpackbits(arrays[kind], axis=-1, count=counts[kind]) > 0 for kind in GATE_KINDS if kind in arrays
    }
    return ImageGates(gates, arrays["macs"], arrays["prediction"])
