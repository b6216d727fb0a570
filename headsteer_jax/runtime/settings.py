"""JAX's process-wide settings that change results: HeadSteer computes with its own and restores the user's.

A user may have switched JAX to 64 bits, to strict promotion or to another random generator, by an environment variable
or in a notebook. JAX_DEFAULT_MATMUL_PRECISION, the devices and switches for debugging stay as they are.
"""

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
from jax import experimental

from headsteer_jax.errors import HeadSteerError

JAX_DEFAULTS: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_debug_key_reuse": False,
    "jax_high_dynamic_range_gumbel": False,
    "jax_softmax_custom_jvp": False,
    "jax_disable_jit": False,
    "jax_check_tracer_leaks": False,
    "jax_default_device": None,
    "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow",
}  # the defaults of JAX 0.10; settings that a version does not have are skipped


# XLA's plugins for GPUs; without one of them its flags for GPUs have no effect but on the cache's keys
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
GPU_PLUGINS = (*CUDA_PLUGINS, "jax_rocm60_plugin", "jax_rocm7_plugin")
DETERMINISM = ("--xla_gpu_exclude_nondeterministic_ops", "--xla_gpu_deterministic_ops")


def request_determinism() -> None:
    """Let XLA use no GPU kernel that adds in any order, unless XLA_FLAGS says whether it should.

    XLA still times the other kernels and takes the fastest. Its choices are kept with the compiled programs
    (`keep_compiled_programs`), so a run that is resumed computes with the same ones. Without timing, which the second
    flag forbids, a training step of a ViT-S took 1.6 times as long on an H200. XLA reads its flags when it opens the
    devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not any(flag in flags for flag in DETERMINISM) and any(map(importlib.util.find_spec, GPU_PLUGINS)):
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISM[0]}=true".strip()


def gives_up_bits() -> bool:
    """Say whether XLA_FLAGS allows GPU kernels that add in any order, in so many words.

    If a flag is given twice, its last value counts, as for XLA.
    """
    flags = dict(flag.partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split())
    values = [flags[flag] for flag in DETERMINISM if flag in flags]
    return bool(values) and all(value in ("false", "0") for value in values)


def open_devices() -> None:
    """Let JAX find the devices, before anything is written.

    Raises:
      HeadSteerError: it finds none, for instance because JAX_PLATFORMS names a kind that this machine lacks.
    """
    request_determinism()
    try:
        jax.devices()
    except Exception as error:  # plugins fail in many ways; JAX itself asserts that it knows one for cuda
        reason = " ".join(str(error).split()) or "JAX has no plugin for it"
        chosen = read_platforms()
        remedy = "unset it, or install the JAX for this device" if chosen else "set JAX_PLATFORMS=cpu to run on the CPU"
        culprit = f"JAX_PLATFORMS={chosen}" if chosen else "JAX"
        raise HeadSteerError(f"{culprit}: no device could be opened ({reason}); {remedy}") from None


def read_platforms() -> str | None:
    """Return the kinds of devices that the user allows: JAX_PLATFORMS, or jax_platforms as set in Python."""
    return jax.config.values["jax_platforms"]


def apply_own_settings() -> None:
    """Give this process HeadSteer's settings permanently, as the command line does."""
    for name in _find_differences():
        jax.config.update(name, JAX_DEFAULTS[name])


@contextmanager
def use_own_settings() -> Iterator[None]:
    """Compute with HeadSteer's settings in the body of this context, in every thread; then restore the user's.

    It can also decorate a function.
    """
    with ExitStack() as restored:
        with ThreadPoolExecutor(1) as thread:  # a fresh thread sees the process's settings without this thread's own
            process_wide = thread.submit(_find_differences).result()
        for name, value in process_wide.items():
            restored.callback(jax.config.update, name, value)
            jax.config.update(name, JAX_DEFAULTS[name])
        with use_own_settings_in_thread():
            yield


@contextmanager
def use_own_settings_in_thread() -> Iterator[None]:
    """Do the same in this thread alone, which is quicker and suits a function that is traced."""
    with ExitStack() as restored:
        for name in _find_differences():
            short = name.removeprefix("jax_")
            # enable_x64 was experimental in JAX 0.7; a few settings cannot be set for one thread
            context = getattr(jax if hasattr(jax, short) else experimental, short, None)
            if context is not None:
                restored.enter_context(context(JAX_DEFAULTS[name]))
        yield


def _find_differences() -> dict[str, Any]:
    """Return the settings that this thread sees and that are not HeadSteer's, by name."""
    current = {name: getattr(jax.config, name) for name in JAX_DEFAULTS if hasattr(jax.config, name)}
    return {
        name: value
        for name, value in current.items()
        if value != JAX_DEFAULTS[name] and not (value is None and name.startswith("jax_transfer_guard"))
    }  # without a guard everything is allowed too
