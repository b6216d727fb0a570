"""A cache of compiled programs, which saves later runs on this machine the time to compile."""

import hashlib
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Return the directory of compiled programs: headsteer_jax in $XDG_CACHE_HOME, by default ~/.cache.

    Raises:
      RuntimeError: there is no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headsteer_jax"


def keep_compiled_programs() -> None:
    """Let XLA keep compiled programs from run to run, unless JAX_COMPILATION_CACHE_DIR is set.

    Each kind of processor has a directory of its own: machines may share a home directory, and a CPU's programs use
    instructions that another CPU may lack.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(RuntimeError, OSError):  # there is no home directory, or it is not writable
            name = f"xla-{hashlib.sha256(processor_flags().encode()).hexdigest()[:8]}"
            directory = cache_dir() / name
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
            jax.config.update("jax_compilation_cache_dir", str(directory))


def processor_flags() -> str:
    """Return Linux's list of the processor's features, which decides what -march=native compiles to."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
