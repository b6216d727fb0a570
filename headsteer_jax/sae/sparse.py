"""TopK codes as (values, latents) instead of F numbers of which k are not 0: decoding has k rows to read, not F.

XLA's CPU compiler has only dense products and scatters that go one number at a time. So on CPUs these functions are
XLA FFI calls, written in C++ (`sparse.cc`), compiled once by the machine's own compiler and kept. Where there is no
compiler, and on GPUs and TPUs, whose dense products are fast, sae.py uses dense latents.

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

logger = logging.getLogger(__name__)

SOURCE_FILE = Path(__file__).with_name("sparse.cc")
COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
FFI_NAMES = ("top_k", "sum_rows", "dot_rows", "outer_rows")


def compile_library() -> Path | None:
    """The compiled library, compiled now where it was not before; None where that cannot be done.

    It is in `kept()`, under a name made of all that it depends on.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.info(
            "no C++ compiler (c++, g++, clang++): autoencoders train by dense products, several times slower on a CPU"
        )
        return None
    kind = (platform.node(), platform.machine(), processor_flags(), compiler, jax.__version__, *COMPILER_FLAGS)
    digest = hashlib.sha256(SOURCE_FILE.read_bytes() + repr(kind).encode()).hexdigest()[:16]
    try:
        directory = cache_dir()
        path = directory / f"sparse-{digest}.so"
        if path.exists():
            return path
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            made = Path(temporary) / path.name
            command = [compiler, *COMPILER_FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE_FILE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, path)  # whole or not at all, whoever else compiles it
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        logger.info(
            f"{SOURCE_FILE.name} did not compile ({lines[0] if lines else error}): autoencoders train by dense products"
        )
        return None
    return path


@functools.cache  # a library is loaded and named to XLA once in a process
def is_available() -> bool:
    """Whether these functions can be used: on CPUs, where the library is or can be compiled."""
    if jax.default_backend() != "cpu" or (path := compile_library()) is None:
        return False
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        logger.info(f"{path} cannot be loaded ({error}): autoencoders train by dense products")
        return False
    for name in FFI_NAMES:
        handler = jax.ffi.pycapsule(getattr(loaded, f"headsteer_{name}"))
        jax.ffi.register_ffi_target(f"headsteer_{name}", handler, platform="cpu")
    return True


def _ffi_call(name: str, shapes: tuple[tuple[int, ...], ...], *arrays: jax.Array) -> list[jax.Array]:
    """A foreign function; all its results are float32, but the second of top_k."""
    types = [jnp.float32, jnp.int32 if name == "top_k" else jnp.float32]
    results = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, types, strict=False)]
    return jax.ffi.ffi_call(f"headsteer_{name}", results, vmap_method="broadcast_all")(*arrays)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def encode_top_k(
    u_BD: jax.Array, W_FD: jax.Array, bias_F: jax.Array, k: jax.Array, most: int
) -> tuple[jax.Array, jax.Array]:
    """TopK_k(ReLU(u W^T + bias)).

    Args:
      k: int32 scalar, at most `most`.

    Returns:
      [B, most] values in descending order, 0 from place k on, and [B, most] the latents that have them; of equal
      values the first latents.
    """
    return _encode_top_k_fwd(u_BD, W_FD, bias_F, k, most)[0]


def _encode_top_k_fwd(u_BD, W_FD, bias_F, k, most):  # type: ignore[no-untyped-def]
    a_BF = u_BD @ W_FD.T
    values_BK, latents_BK = _ffi_call("top_k", ((len(u_BD), most),) * 2, a_BF, bias_F, jnp.asarray(k, jnp.int32))
    return (values_BK, latents_BK), (u_BD, W_FD, values_BK, latents_BK)


def _encode_top_k_bwd(most, residuals, cotangents):  # type: ignore[no-untyped-def]
    u_BD, W_FD, values_BK, latents_BK = residuals
    g_BK = jnp.where(values_BK > 0, cotangents[0], 0.0)
    by_W_FD, by_bias_F = sum_outer_products(g_BK, latents_BK, u_BD, len(W_FD))
    return sum_weighted_rows(g_BK, latents_BK, W_FD), by_W_FD, by_bias_F, None


encode_top_k.defvjp(_encode_top_k_fwd, _encode_top_k_bwd)


@jax.custom_vjp
def sum_weighted_rows(z_BK: jax.Array, latents_BK: jax.Array, W_FD: jax.Array) -> jax.Array:
    """sum_j z[b, j] W[latents[b, j]]: [B, D], decoding without the bias."""
    return _ffi_call("sum_rows", ((len(z_BK), W_FD.shape[1]),), z_BK, latents_BK, W_FD)[0]


def _sum_rows_fwd(z_BK, latents_BK, W_FD):  # type: ignore[no-untyped-def]
    return sum_weighted_rows(z_BK, latents_BK, W_FD), (z_BK, latents_BK, W_FD)


def _sum_rows_bwd(residuals, g_BD):  # type: ignore[no-untyped-def]
    z_BK, latents_BK, W_FD = residuals
    (by_z_BK,) = _ffi_call("dot_rows", (z_BK.shape,), g_BD, latents_BK, W_FD)
    return by_z_BK, None, sum_outer_products(z_BK, latents_BK, g_BD, len(W_FD))[0]


sum_weighted_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def sum_outer_products(z_BK: jax.Array, latents_BK: jax.Array, g_BD: jax.Array, F: int) -> tuple[jax.Array, jax.Array]:
    """Over the (b, j) that name latent f: the sum of z[b, j] g[b], [F, D], and that of z[b, j], [F]."""
    outer_FD, sum_F = _ffi_call("outer_rows", ((F, g_BD.shape[1]), (F,)), z_BK, latents_BK, g_BD)
    return outer_FD, sum_F


def count_firings(z_BK: jax.Array, latents_BK: jax.Array, F: int) -> jax.Array:
    """[F] float32: for how many residuals each latent is above 0."""
    on_BK, latents_BK = jax.lax.stop_gradient(((z_BK > 0).astype(jnp.float32), latents_BK))
    return sum_outer_products(on_BK, latents_BK, jnp.zeros((len(z_BK), 1)), F)[1]
