"""The devices of a TPU slice that is not there, for which libtpu's compiler compiles on any machine."""

import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.settings import read_platforms


class Generation(NamedTuple):
    """Describes a generation of TPUs, as Google's pages on it do."""

    slices: tuple[str, ...]  # chips along each axis
    one_host: dict[str, tuple[int, int, int]]  # slices whose chips are all on one host; other hosts have 2x2x1 chips
    hbm_gib: float  # of a device: of a chip, or of half of one for TPU7x
    gigahertz: float | None  # the clock at which the matrix units reach the peak of `model.macs.PEAKS`


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
ON_ONE_HOST = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}
GENERATIONS = {
    "v5e": Generation(FLAT, ON_ONE_HOST, 16, 1.5),
    "v5p": Generation(CUBES, {}, 95, 1.75),
    "v6e": Generation(FLAT, ON_ONE_HOST, 32, 1.75),
    "tpu7x": Generation(CUBES, {}, 96, None),
}
GOOGLE_PCI_VENDOR = "0x1ae0"
TPU_PCI_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v3, ..., TPU7x
# libtpu reads these when it is loaded. Without them it asks Google's metadata server what it runs on, and complains.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two compilers may run side by side, as neither opens a device
}


class Machine(NamedTuple):
    """The devices for which programs are compiled, and what is known of one of them."""

    name: str
    devices: Sequence[jax.Device]
    hbm_bytes: int | None  # of a device; None: not known
    gigahertz: float | None = None  # of a TPU, to read the compiler's estimates in cycles


def list_topologies() -> str:
    """List the topologies that exist, in one line."""
    return "; ".join(f"{name}:{{{','.join(g.slices)}}}" for name, g in GENERATIONS.items())


def check_topology(name: str) -> None:
    """Check the name of a topology, before JAX is asked anything.

    Raises:
      HeadSteerError: there is no such topology, or libtpu is not installed.
    """
    generation, _, shape = name.partition(":")
    if generation not in GENERATIONS or shape not in GENERATIONS[generation].slices:
        raise HeadSteerError(f"--topology={name}: no such topology; those that exist are {list_topologies()}")
    if importlib.util.find_spec("libtpu") is None:
        raise HeadSteerError(
            f"--topology={name}: the TPU's compiler is not installed; pip install 'headsteer-jax[tpu]' brings it"
        )


def has_tpu(buses: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Say whether a TPU is attached to this machine, without opening it."""

    def read(file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    return any(
        read(device / "vendor") == GOOGLE_PCI_VENDOR and read(device / "device") in TPU_PCI_DEVICES
        for device in buses.glob("*")
    )


def prepare_compiler(name: str) -> None:
    """Prepare this process to compile for a TPU slice of this name, before JAX opens any device.

    Raises:
      HeadSteerError: there is no such topology, libtpu is not installed, or this machine has a TPU.
    """
    check_topology(name)
    if has_tpu() and read_platforms() != "cpu":
        raise HeadSteerError(
            f"--topology={name}: this machine has a TPU; leave out --topology to compile for it, or set "
            "JAX_PLATFORMS=cpu to compile for another"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # without a TPU programs are written to the cache, but cannot be read from it: JAX then compiles again, and warns
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
    jax.config.update("jax_platforms", "cpu")  # JAX would look for a TPU with the same library


def describe_topology(name: str) -> Machine:
    """Describe a TPU slice, without any hardware, in a process that is prepared for it.

    Raises:
      HeadSteerError: libtpu fails.
    """
    kind, _, shape = name.partition(":")
    generation = GENERATIONS[kind]
    bounds = generation.one_host.get(shape, (2, 2, 1))
    try:
        topology = topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=bounds)
    except Exception as error:  # jaxlib raises RuntimeErrors of several kinds
        reason = " ".join(str(error).split())
        raise HeadSteerError(
            f"--topology={name}: libtpu does not describe it ({reason}); upgrade it by pip install -U 'jax[tpu]'"
        ) from None
    return Machine(name, topology.devices, int(generation.hbm_gib * 2**30), generation.gigahertz)


def describe_attached() -> Machine:
    """Describe the devices of this machine."""
    devices = jax.devices()
    memory = devices[0].memory_stats() or {}
    limit = memory.get("bytes_limit") if devices[0].platform != "cpu" else None
    return Machine(f"{len(devices)} x {devices[0].device_kind}", devices, limit)
