"""Parts of a training step in the form that GPUs compute fast; `training_form` chooses it.

As XLA compiles the plain form for a GPU, three things take longer than the matrix products themselves: residuals that
lie in memory with the images last, so that every block transposes them; gradients of kernels, which few of the GPU's
cores compute; and intermediates that the forward pass writes and the backward pass reads.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

TILE = 128  # rows and columns of a product that one core computes at a time
CORES = 132  # of an H100 or H200
SHORTEST = 1024  # rows of a part of a product
ALIGNMENT = 8  # elements of a 16-bit type that a tensor core's copies take at once


def keep_rows_together(x_BTD: jax.Array) -> jax.Array:
    """Let each token's residual lie in one piece of memory, image by image."""
    return with_layout_constraint(x_BTD, Layout(tuple(range(x_BTD.ndim))))


def has_attention(device: jax.Device) -> bool:
    """Say whether cuDNN has a kernel of attention for a device: for NVIDIA's, from Ampere on."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # AMD's are called gfx90a and the like
    return major.isdigit() and int(major) >= 8


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def multiply_rows(x_NI: jax.Array, kernel_IO: jax.Array, precision: Any, devices: int = 1) -> jax.Array:
    """Multiply rows by a kernel, in the rows' dtype: [N, I], [I, O] float32 -> [N, O].

    The kernel's gradient is a sum over all N rows with few results, so one product of it would use few cores. It is
    computed in parts of the rows, which are summed in float32.

    Args:
      devices: how many the rows are divided among; each computes parts of its own rows.
    """
    return jnp.matmul(x_NI, kernel_IO.astype(x_NI.dtype), precision=precision)


def _multiply_forward(x_NI: jax.Array, kernel_IO: jax.Array, precision: Any, devices: int) -> tuple[jax.Array, Any]:
    return multiply_rows(x_NI, kernel_IO, precision, devices), (x_NI, kernel_IO)


def _multiply_backward(precision: Any, devices: int, saved: Any, gradient_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_NI, kernel_IO = saved
    parts = devices * count_parts(len(x_NI) // devices, *kernel_IO.shape)
    x_SMI, gradient_SMO = (rows.reshape(parts, len(rows) // parts, -1) for rows in (x_NI, gradient_NO))
    kernel_SIO = jnp.einsum(
        "SMI,SMO->SIO", x_SMI, gradient_SMO, precision=precision, preferred_element_type=jnp.float32
    )
    x_gradient_NI = jnp.matmul(gradient_NO, kernel_IO.astype(x_NI.dtype).T, precision=precision)
    return x_gradient_NI, kernel_SIO.sum(axis=0)


multiply_rows.defvjp(_multiply_forward, _multiply_backward)


def count_parts(rows: int, width: int, columns: int) -> int:
    """Choose in how many parts of equal length a [width, columns] gradient is summed: two waves of tiles at most."""
    tiles, parts = math.ceil(width / TILE) * math.ceil(columns / TILE), 1
    while parts * tiles < 2 * CORES and rows % (2 * parts) == 0 and rows // (2 * parts) >= SHORTEST:
        parts *= 2
    return parts


def apply_dense(dense: nn.Dense, x_BTD: jax.Array, devices: int) -> jax.Array:
    """Apply a dense layer to every token of images that are divided among devices: [B, T, I] -> [B, T, O]."""
    params = dense.variables["params"]
    dtype = params["kernel"].dtype if dense.dtype is None else dense.dtype
    y_NO = multiply_rows(x_BTD.reshape(-1, x_BTD.shape[-1]).astype(dtype), params["kernel"], dense.precision, devices)
    return (y_NO + params["bias"].astype(dtype)).reshape(*x_BTD.shape[:-1], -1)


@jax.custom_vjp
def gelu_from_input(x: jax.Array) -> jax.Array:
    """Compute x Phi(x), in float32 whatever the dtype of x is, and keep nothing but x for the backward pass."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_share(wide)).astype(x.dtype)


def _normal_share(x: jax.Array) -> jax.Array:
    """Compute Phi(x), the share of a standard normal distribution below x."""
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu_from_input(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    slope = _normal_share(wide) + wide * jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu_from_input.defvjp(_gelu_forward, _gelu_backward)


def attend(
    q_BQHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, tokens: int, implementation: Any = "cudnn"
) -> jax.Array:
    """Compute each head's output by a kernel that never writes the attention weights -> [B, Q, H, K].

    Args:
      q_BQHK, k_BTHK, v_BTHK: bfloat16; both numbers of tokens must be even, or cuDNN has no gradient.
      tokens: how many of them count; what is returned for the others means nothing.
      implementation: of `jax.nn.dot_product_attention`.
    """
    lengths_B = jnp.full((len(q_BQHK),), tokens, jnp.int32)
    return jax.nn.dot_product_attention(
        q_BQHK, k_BTHK, v_BTHK, query_seq_lengths=lengths_B, key_value_seq_lengths=lengths_B,
        implementation=implementation,
    )  # fmt: skip


def pad_tokens(x: jax.Array, multiple: int) -> jax.Array:
    """Append tokens of zeros up to a multiple: [B, T, ...] -> [B, T or more, ...].

    `attend` needs an even number. Other products of attention whose sides are no multiple of ALIGNMENT, as 65 and 197
    tokens make them, get kernels that do not use the tensor cores: they took 15.9 of a step's 54 ms on an H200.
    """
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)))
