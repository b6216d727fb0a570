"""The devices of a TPU slice or of GPUs that are not there, for which their compilers compile on any machine."""

import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.settings import CUDA_PLUGINS, read_platforms


class Generation(NamedTuple):
    """Describes a generation of TPUs, as Google's pages on it do."""

    slices: tuple[str, ...]  # chips along each axis
    one_host: dict[str, tuple[int, int, int]]  # slices whose chips are all on one host; other hosts have 2x2x1 chips
    hbm_gib: float  # of a device: of a chip, or of half of one for TPU7x
    gigahertz: float | None  # the clock at which the matrix units reach the peak of `model.macs.PEAKS`


class Gpu(NamedTuple):
    """Describes a GPU, as NVIDIA's data sheets and its driver do."""

    device_kind: str
    memory_mib: int
    capability: tuple[int, int]  # compute capability: major, minor
    cores: int  # streaming multiprocessors
    float_units: int  # of a core, for float32
    threads: int  # of a core, at most
    gigahertz: float  # the largest clock
    bandwidth_gb: int  # of the memory, in 10^9 bytes a second
    l2_mib: int
    shared_kib: int  # memory that the threads of a core share


GPUS = {
    "a100": Gpu("NVIDIA A100", 81_920, (8, 0), 108, 64, 2048, 1.41, 2039, 40, 164),
    "l4": Gpu("NVIDIA L4", 23_034, (8, 9), 58, 128, 1536, 2.04, 300, 48, 100),
    "l40s": Gpu("NVIDIA L40S", 46_068, (8, 9), 142, 128, 1536, 2.52, 864, 96, 100),
    "h100": Gpu("NVIDIA H100", 81_559, (9, 0), 132, 128, 2048, 1.98, 3350, 50, 228),
    "h200": Gpu("NVIDIA H200", 143_771, (9, 0), 132, 128, 2048, 1.98, 4800, 60, 228),
    "b200": Gpu("NVIDIA B200", 183_359, (10, 0), 148, 128, 2048, 1.96, 8000, 126, 228),
}
GPU_COUNTS = ("1", "2", "4", "8")  # in one machine
MEMORY_SHARE = 0.75  # of a GPU's memory, which JAX takes by default
# without a GPU XLA can neither time kernels nor choose the tiles of a product that Triton would compute
GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")

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
    shapes = {name: g.slices for name, g in GENERATIONS.items()} | dict.fromkeys(GPUS, GPU_COUNTS)
    return "; ".join(f"{name}:{{{','.join(sizes)}}}" for name, sizes in shapes.items())


def check_topology(name: str) -> None:
    """Check the name of a topology, before JAX is asked anything.

    Raises:
      HeadSteerError: there is no such topology, or its compiler is not installed.
    """
    generation, _, shape = name.partition(":")
    if generation in GPUS and shape in GPU_COUNTS:
        if not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
            raise HeadSteerError(
                f"--topology={name}: the GPU's compiler is not installed; pip install 'headsteer-jax[cuda]' brings it"
            )
        return
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
    """Prepare this process to compile for a machine of this name, before JAX opens any device.

    Raises:
      HeadSteerError: there is no such topology, its compiler is not installed, or it is a TPU's and this machine has
        one.
    """
    check_topology(name)
    for_gpu = name.partition(":")[0] in GPUS
    if not for_gpu and has_tpu() and read_platforms() != "cpu":
        raise HeadSteerError(
            f"--topology={name}: this machine has a TPU; leave out --topology to compile for it, or set "
            "JAX_PLATFORMS=cpu to compile for another"
        )
    jax.config.update("jax_platforms", "cpu")  # JAX would look for devices with the same libraries
    # without the device programs are written to the cache, but cannot be read from it: JAX compiles again, and warns
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
    if for_gpu:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # it asks the driver, which need not be there
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns of each sort that it cannot choose without one
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *GPU_FLAGS]).strip()
        return
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


def describe_topology(name: str) -> Machine:
    """Describe a TPU slice or GPUs, without any hardware, in a process that is prepared for it.

    Raises:
      HeadSteerError: libtpu or the CUDA plugin fails.
    """
    kind, _, shape = name.partition(":")
    if kind in GPUS:
        return _describe_gpus(name, GPUS[kind], int(shape))
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


def _describe_gpus(name: str, gpu: Gpu, count: int) -> Machine:
    """Describe GPUs of one machine to the CUDA compiler, in the text form of its own description of a device."""
    major, minor = gpu.capability
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {(gpu.shared_kib - 1) << 10}
          shared_memory_per_core: {gpu.shared_kib << 10} core_count: {gpu.cores} fpus_per_core: {gpu.float_units}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {gpu.bandwidth_gb * 10**9} l2_cache_size: {gpu.l2_mib << 20} clock_rate_ghz: {gpu.gigahertz}
          device_memory_size: {gpu.memory_mib << 20} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
        device_description_str: "{gpu.device_kind}"
    """
    try:
        topology = topologies.get_topology_desc(name, "cuda", target_config=target, topology=f"1x1x{count}")
    except Exception as error:  # jaxlib raises RuntimeErrors of several kinds
        reason = " ".join(str(error).split())
        raise HeadSteerError(
            f"--topology={name}: the CUDA plugin does not describe it ({reason}); upgrade it by pip install -U "
            "'jax[cuda13]'"
        ) from None
    return Machine(name, topology.devices, int(MEMORY_SHARE * (gpu.memory_mib << 20)))


def describe_attached() -> Machine:
    """Describe the devices of this machine."""
    devices = jax.devices()
    memory = devices[0].memory_stats() or {}
    limit = memory.get("bytes_limit") if devices[0].platform != "cpu" else None
    return Machine(f"{len(devices)} x {devices[0].device_kind}", devices, limit)
