"""TopK codes as k pairs (value, latent) instead of F numbers that are mostly 0: decoding reads k rows, not F.

XLA's CPU compiler has only dense products, and scatters that process one number at a time. On CPUs these functions are
therefore XLA FFI calls, written in C++ (`sparse.cc`), compiled once by the machine's own compiler and cached. Without a
compiler, and on GPUs and TPUs, whose dense products are fast, training uses dense latents.

Axes: B residuals, K places for active latents, F latents, D width. All float32; latents int32.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from headsteer_jax.runtime.compiled import cache_dir, processor_flags
from headsteer_jax.runtime.precision import EXACT

logger = logging.getLogger(__name__)

SOURCE_FILE = Path(__file__).with_name("sparse.cc")
COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
FFI_NAMES = ("top_k", "sum_rows", "dot_rows", "outer_rows")


def compile_library() -> Path | None:
    """Return the path of the compiled library, compiling it if it is not cached; None if that is not possible.

    It lies in `runtime.compiled.cache_dir()`, under a name that is a hash of everything it depends on.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.info(
            "no C++ compiler (c++, g++, clang++): autoencoders train by dense products, several times slower on a CPU"
        )
        return None
    build = (platform.node(), platform.machine(), processor_flags(), compiler, jax.__version__, *COMPILER_FLAGS)
    digest = hashlib.sha256(SOURCE_FILE.read_bytes() + repr(build).encode()).hexdigest()[:16]
    try:
        directory = cache_dir()
        path = directory / f"sparse-{digest}.so"
        if path.exists():
            return path
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            output = Path(temporary) / path.name
            command = [compiler, *COMPILER_FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE_FILE), "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(output, path)  # atomic, as other processes may compile it at the same time
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        logger.info(
            f"{SOURCE_FILE.name} did not compile ({lines[0] if lines else error}): autoencoders train by dense products"
        )
        return None
    return path


@functools.cache  # a process loads the library and registers it with XLA once
def is_available() -> bool:
    """Return whether these functions can be used: on CPUs, if the library is or can be compiled."""
    if jax.default_backend() != "cpu" or (path := compile_library()) is None:
        return False
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.info(f"{path} cannot be loaded ({error}): autoencoders train by dense products")
        return False
    for name in FFI_NAMES:
        handler = jax.ffi.pycapsule(getattr(library, f"headsteer_{name}"))
        jax.ffi.register_ffi_target(f"headsteer_{name}", handler, platform="cpu")
    return True


def _ffi_call(name: str, shapes: tuple[tuple[int, ...], ...], *arrays: jax.Array) -> list[jax.Array]:
    """Call a foreign function; all its results are float32, except the second one of top_k."""
    types = [jnp.float32, jnp.int32 if name == "top_k" else jnp.float32]
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, types, strict=False)]
    return jax.ffi.ffi_call(f"headsteer_{name}", results, vmap_method="broadcast_all")(*arrays)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def encode_top_k(
    u_BD: jax.Array, W_FD: jax.Array, bias_F: jax.Array, k: jax.Array, max_k: int
) -> tuple[jax.Array, jax.Array]:
    """Compute TopK_k(ReLU(u W^T + bias)).

    Args:
      u_BD: input.
      W_FD: a row for each latent.
      bias_F: of each latent.
      k: int32 scalar, at most max_k.
      max_k: K, the number of places.

    Returns:
      [B, K] values in descending order, 0 from place k on, and [B, K] the latents that have them; of latents with equal
      values the first are chosen.
    """
    return _encode_top_k_fwd(u_BD, W_FD, bias_F, k, max_k)[0]


def _encode_top_k_fwd(u_BD, W_FD, bias_F, k, max_k):  # type: ignore[no-untyped-def]
    a_BF = jnp.matmul(u_BD, W_FD.T, precision=EXACT)
    values_BK, latents_BK = _ffi_call("top_k", ((len(u_BD), max_k),) * 2, a_BF, bias_F, jnp.asarray(k, jnp.int32))
    return (values_BK, latents_BK), (u_BD, W_FD, values_BK, latents_BK)


def _encode_top_k_bwd(max_k, saved, cotangents):  # type: ignore[no-untyped-def]
    u_BD, W_FD, values_BK, latents_BK = saved
    grad_z_BK = jnp.where(values_BK > 0, cotangents[0], 0.0)
    grad_W_FD, grad_bias_F = sum_outer_products(grad_z_BK, latents_BK, u_BD, len(W_FD))
    return sum_weighted_rows(grad_z_BK, latents_BK, W_FD), grad_W_FD, grad_bias_F, None


encode_top_k.defvjp(_encode_top_k_fwd, _encode_top_k_bwd)


@jax.custom_vjp
def sum_weighted_rows(z_BK: jax.Array, latents_BK: jax.Array, W_FD: jax.Array) -> jax.Array:
    """Compute sum_j z[b, j] W[latents[b, j]], [B, D]: decoding without the bias."""
    return _ffi_call("sum_rows", ((len(z_BK), W_FD.shape[1]),), z_BK, latents_BK, W_FD)[0]


def _sum_rows_fwd(z_BK, latents_BK, W_FD):  # type: ignore[no-untyped-def]
    return sum_weighted_rows(z_BK, latents_BK, W_FD), (z_BK, latents_BK, W_FD)


def _sum_rows_bwd(saved, grad_BD):  # type: ignore[no-untyped-def]
    z_BK, latents_BK, W_FD = saved
    (grad_z_BK,) = _ffi_call("dot_rows", (z_BK.shape,), grad_BD, latents_BK, W_FD)
    return grad_z_BK, None, sum_outer_products(z_BK, latents_BK, grad_BD, len(W_FD))[0]


sum_weighted_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def sum_outer_products(z_BK: jax.Array, latents_BK: jax.Array, g_BD: jax.Array, F: int) -> tuple[jax.Array, jax.Array]:
    """Sum z[b, j] g[b], [F, D], and z[b, j], [F], over the (b, j) with latents[b, j] = f."""
    outer_FD, sum_F = _ffi_call("outer_rows", ((F, g_BD.shape[1]), (F,)), z_BK, latents_BK, g_BD)
    return outer_FD, sum_F


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def count_firings(z_BK: jax.Array, latents_BK: jax.Array, F: int) -> jax.Array:
    """Count for how many residuals each latent is above 0: [F] float32. Its derivative is 0."""
    return sum_outer_products((z_BK > 0).astype(jnp.float32), latents_BK, jnp.zeros((len(z_BK), 1)), F)[1]


@count_firings.defjvp
def _count_firings_jvp(F, primals, tangents):  # type: ignore[no-untyped-def]
    fired_F = count_firings(*primals, F)  # JAX 0.7 would differentiate the foreign function for the latents' sake
    return fired_F, jnp.zeros_like(fired_F)
