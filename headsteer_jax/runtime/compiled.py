"""Where programs compiled for this machine are kept from run to run."""

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Where programs compiled for this machine are kept: $XDG_CACHE_HOME/headsteer_jax (default ~/.cache).

    Raises:
      RuntimeError: there is no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headsteer_jax"


def keep_compiled_programs() -> None:
    """Let XLA keep compiled programs from run to run, unless JAX_COMPILATION_CACHE_DIR names a place (or none).

    Apart for each kind of processor: homes are shared, and a CPU's programs use its own instructions.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(RuntimeError):
            name = f"xla-{hashlib.sha256(processor_flags().encode()).hexdigest()[:8]}"
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / name))


def processor_flags() -> str:
    """What instructions this processor has, as Linux tells: -march=native means others on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
