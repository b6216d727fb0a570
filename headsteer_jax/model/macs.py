"""The multiply-accumulates (MACs) of an image, counted from its gates, and the share of a device's peak (MFU).

Only matrix products count. What a closed gate makes needless is not counted, whether or not a program skips it:

- projections: query, key and value of the kept tokens, for the kept heads;
- attention: both products of the kept heads, each with every pair of kept tokens;
- output: the output projection of the kept tokens, from the kept heads;
- mlp: both matrices, for the kept tokens; if gate.dropped is slice, the first without the closed heads' inputs;
- gates: the decision networks, which always run.

With gate.dropped = identity a closed head still projects its values and passes them on. The last layer computes the CLS
query alone, from the keys and values of all kept tokens. A training step counts as three forward passes, with a teacher
as four; what remat computes again does not count. The MFU is that of arXiv:2204.02311, with two FLOPs for a MAC.

Axes: B images, L layers, H heads, N patches.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config
from headsteer_jax.model.gates import SUBLAYERS, Gates

PARTS = ("projections", "attention", "output", "mlp", "gates")  # of a layer's MACs

# Dense bfloat16 TFLOP/s of a device, from the vendors' data sheets, by whole words of the name that JAX gives it: an
# "NVIDIA L40S" is no "NVIDIA L4". Of the names that fit, the longest counts. A device of TPU7x is half a chip.
PEAKS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
    "NVIDIA A10": 125.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200": 989.0,
    "NVIDIA B200": 2250.0,
}


class Sizes(NamedTuple):
    """The sizes of a model that its MACs depend on."""

    patches: int  # N
    prefix: int  # CLS and the registers, which are always kept
    width: int  # D
    heads: int  # H
    hidden: int  # width of the MLP


def _measure_sizes(config: Config) -> Sizes:
    m = config.model
    patches = (config.data.image_size // m.patch) ** 2
    return Sizes(patches, 1 + m.registers, m.width, m.heads, round(m.mlp_ratio * m.width))


def count_patches(config: Config) -> int:
    """Count the patches of an image, N."""
    return _measure_sizes(config).patches


def _count_decisions(config: Config, layer: int) -> int:
    """Count the MACs of a layer's decision networks."""
    s = _measure_sizes(config)
    gates = {"heads": s.heads, "sublayers": len(SUBLAYERS), "tokens": s.patches}
    return s.width * sum(gates[kind] for kind in config.gate.kinds_in(layer))


def count_layer_parts(
    config: Config, layer: int, patches: Any, heads: Any, attention: Any, mlp: Any
) -> tuple[Any, ...]:
    """Count the MACs of a layer by part, from numbers or arrays alike.

    Args:
      patches: the number of kept patches.
      heads: the number of kept heads.
      attention: whether attention runs, 1 or 0.
      mlp: whether the MLP runs, 1 or 0.
    """
    s, dropped = _measure_sizes(config), config.gate.dropped
    keys = s.prefix + patches
    queries = 1 if layer == config.model.depth - 1 else keys
    used = heads * (s.width // s.heads)  # the width of the heads that run
    passed = s.width - used if dropped == "identity" else 0  # of those whose values pass unchanged
    projections = s.width * (queries * used + 2 * keys * used + queries * passed)
    inputs = used if dropped == "slice" else s.width
    return (
        attention * projections,
        attention * 2 * queries * keys * used,
        attention * queries * (used + passed) * s.width,
        mlp * queries * (inputs + s.width) * s.hidden,
        _count_decisions(config, layer),
    )


def _count_fixed(config: Config, classes: int) -> int:
    """Count the MACs outside of the layers: of the patches' embedding and the classifier."""
    s = _measure_sizes(config)
    return s.patches * config.model.patch**2 * config.data.channels * s.width + s.width * classes


def count_dense_macs(config: Config, classes: int) -> int:
    """Count the MACs of an image in the dense model, which has no decision networks."""
    s = _measure_sizes(config)
    layers = (count_layer_parts(config, layer, s.patches, s.heads, 1, 1)[:-1] for layer in range(config.model.depth))
    return _count_fixed(config, classes) + sum(map(sum, layers))


def count_layer_macs(config: Config, gates: Mapping[int, Gates]) -> jax.Array:
    """Count the MACs of images in each layer by part, from their gates.

    The result is differentiable, so that a loss on it reaches straight-through gates.

    Args:
      gates: by layer and kind, as `out["gates"]`, of at least one layer; what is missing is open. The gates may have
        other leading axes than B, all the same.

    Returns:
      [B, L, 5] float32; the last axis is in the order of PARTS.
    """
    s, shape = _measure_sizes(config), next(g.shape[:-1] for by_kind in gates.values() for g in by_kind.values())
    layers = []
    for layer in range(config.model.depth):
        layer_gates = {kind: jnp.asarray(g, jnp.float32) for kind, g in gates.get(layer, {}).items()}
        patches, heads = (
            layer_gates[kind].sum(axis=-1) if kind in layer_gates else float(count)
            for kind, count in (("tokens", s.patches), ("heads", s.heads))
        )
        sublayers = layer_gates.get("sublayers", jnp.ones(len(SUBLAYERS)))
        attention, mlp = (sublayers[..., i] for i in range(len(SUBLAYERS)))
        parts = count_layer_parts(config, layer, patches, heads, attention, mlp)
        layers.append(jnp.stack([jnp.broadcast_to(jnp.asarray(part, jnp.float32), shape) for part in parts], axis=-1))
    return jnp.stack(layers, axis=-2)


def count_macs(config: Config, classes: int, gates: Mapping[int, Gates]) -> jax.Array:
    """Count the MACs of images in the whole model from their gates; see `count_layer_macs` -> [B] float32."""
    return _count_fixed(config, classes) + count_layer_macs(config, gates).sum(axis=(-2, -1))


def count_macs_from(config: Config, classes: int, layer: int, gates: Mapping[int, Gates]) -> jax.Array:
    """Count the MACs of images from the input of `layer` to the logits; see `count_layer_macs` -> [B] float32.

    Args:
      gates: at least those of `layer`.
    """
    return config.model.width * classes + count_layer_macs(config, gates)[..., layer:, :].sum(axis=(-2, -1))


def count_open_macs(config: Config, classes: int) -> int:
    """Count the MACs of an image with all gates open: those of the dense model and of the decision networks."""
    decisions = sum(_count_decisions(config, layer) for layer in range(config.model.depth))
    return count_dense_macs(config, classes) + decisions


def training_flops(config: Config, classes: int, *, taught: bool = False) -> int:
    """Count the FLOPs of one image in a training step: the forward pass, and the gradients of inputs and weights.

    All gates count as open, because a training step skips nothing.

    Args:
      taught: whether the dense model's forward pass is part of the step, as it is a teacher's.
    """
    return 3 * 2 * count_open_macs(config, classes) + (2 * count_dense_macs(config, classes) if taught else 0)


def peak_tflops(config: Config, device: jax.Device) -> float | None:
    """Return a device's peak; None if it is not known.

    Float32 products run as TF32 on GPUs, with half the peak, and in bfloat16 on TPUs.
    """
    if config.machine.peak_tflops:
        return config.machine.peak_tflops
    names = [name for name in PEAKS if re.match(rf"{re.escape(name)}(?!\w)", device.device_kind)]
    tflops = PEAKS[max(names, key=len)] if names else None
    if tflops and device.platform == "gpu" and config.model.dtype == "float32":
        return tflops / 2
    return tflops


def training_speed(config: Config, flops: int, images_per_second: float, mesh: Mesh) -> dict[str, float]:
    """Compute images_per_second of all devices, tflops_per_device, and mfu if the device's peak is known.

    Args:
      flops: of one image in a step.
    """
    tflops = images_per_second * flops / mesh.size / 1e12
    speed = {"images_per_second": images_per_second, "tflops_per_device": tflops}
    if peak := peak_tflops(config, mesh.devices.flat[0]):
        speed["mfu"] = tflops / peak
    return speed
