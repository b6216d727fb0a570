"""How much one call of a sweep takes at once on a device, where the config leaves it to the kind of device."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from headsteer_jax.config.schema import MachineConfig
from headsteer_jax.model.vit import ViT

CPU_IMAGES = 250
# Of the residuals of one call, T D times its images: with a ViT-S at 17 tokens, 250 images instead of 100 are slower.
CPU_VALUES = 655_360
CPU_MEMORY = 1024  # MiB
ACCELERATOR_IMAGES = 1000
ACCELERATOR_MEMORY = 6144  # MiB, of the 16 GiB that the smallest TPU has
MEMORY_SHARE = 3 / 8  # of an accelerator with less memory than that


class CallLimits(NamedTuple):
    """The most that one call of a sweep takes on one device."""

    images: int
    memory: int  # MiB, in addition to the parameters


def choose_call_limits(model: ViT, machine: MachineConfig, mesh: Mesh) -> CallLimits:
    """Choose the limits of a sweep's calls: those of the config, or what suits the kind of device.

    Args:
      mesh: the devices on which the calls run; they need not be there.
    """
    images, memory, device = machine.sweep_chunk, machine.sweep_memory, mesh.devices.flat[0]
    if device.platform == "cpu":
        values = (model.positions_count + model.model.registers) * model.model.width
        return CallLimits(images or max(1, min(CPU_IMAGES, CPU_VALUES // values)), memory or CPU_MEMORY)
    return CallLimits(images or ACCELERATOR_IMAGES, memory or min(ACCELERATOR_MEMORY, _share_of_memory(device)))


def _share_of_memory(device: jax.Device) -> int:
    """Return a share of the MiB that an accelerator offers, or no limit if it does not say."""
    try:
        offered = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is described, not attached
        offered = None
    return int(MEMORY_SHARE * offered / 2**20) if offered else ACCELERATOR_MEMORY
