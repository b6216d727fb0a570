"""The model's FLOPs, and the share of the devices' peak that training reaches (MFU, arXiv:2204.02311).

Only matrix products count, with a multiplication and an addition each. A backward pass counts as two forward passes.
What remat computes again does not count.
"""

import jax
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config

# dense bfloat16 TFLOP/s of a device, by the name that JAX gives it, from the vendors' data sheets
PEAKS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
}


def forward_flops(config: Config, classes: int) -> int:
    """Count the FLOPs of a forward pass of one image with all heads; the last layer computes the CLS token alone."""
    m, d = config.model, config.data
    patches, D, M = (d.image_size // m.patch) ** 2, m.width, round(m.mlp_ratio * m.width)
    T = 1 + m.registers + patches
    embed = patches * m.patch**2 * d.channels * D

    def layer(queries: int) -> int:
        attention = queries * D * D + 2 * T * D * D + 2 * queries * T * D + queries * D * D
        return attention + 2 * queries * D * M

    gates = (m.depth - config.gate.first_layer) * D * m.heads
    return 2 * (embed + (m.depth - 1) * layer(T) + layer(1) + gates + D * classes)


def training_flops(config: Config, classes: int) -> int:
    """Count the FLOPs of one image in a training step: the forward pass, and the gradients of inputs and weights."""
    return 3 * forward_flops(config, classes)


def peak_tflops(config: Config, device: jax.Device) -> float | None:
    """Return a device's peak; None if it is not known.

    Float32 products run as TF32 on GPUs, with half the peak, and in bfloat16 on TPUs.
    """
    if config.machine.peak_tflops:
        return config.machine.peak_tflops
    tflops = next((peak for name, peak in PEAKS.items() if device.device_kind.startswith(name)), None)
    if tflops and device.platform == "gpu" and config.model.dtype == "float32":
        return tflops / 2
    return tflops


def training_speed(config: Config, classes: int, images_per_second: float, mesh: Mesh) -> dict[str, float]:
    """Compute images_per_second of all devices, tflops_per_device, and mfu if the device's peak is known."""
    tflops = images_per_second * training_flops(config, classes) / mesh.size / 1e12
    speed = {"images_per_second": images_per_second, "tflops_per_device": tflops}
    if peak := peak_tflops(config, mesh.devices.flat[0]):
        speed["mfu"] = tflops / peak
    return speed
