"""The sparse autoencoder of a layer's residual: TopK, BatchTopK, JumpReLU or ReLU with L1, any of them Matryoshka.

    u = (x - mean) * scale;  a = ReLU(W_e (u - b_d) + b_e);  z = a where large enough, else 0;  u_hat = W_d^T z + b_d

What is large enough is all that the variants differ in, and the config says it: there is one `encode_scaled`, one `decode_scaled` and
one `loss`. Axes: B, N residuals, D width, F latents, K places for active latents, M dead latents, S autoencoders.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import SAEConfig
from headsteer_jax.errors import HeadSteerError


class SAEWeights(NamedTuple):
    """One autoencoder's parameters, or with a leading axis S those of several. A row of W_e and W_d is a latent's."""

    W_e: jax.Array  # [F, D] encoder
    b_e: jax.Array  # [F]
    W_d: jax.Array  # [F, D] decoder
    b_d: jax.Array  # [D]
    threshold: jax.Array  # [F] not above it a latent is 0: JumpReLU's theta, BatchTopK's one number; TopK, ReLU: 0


class Scaling(NamedTuple):
    """How residuals become the autoencoder's input: saved with it."""

    mean: np.ndarray  # [D] float32, over the training split; 0 without centring
    scale: np.ndarray  # [] float32: the mean norm of (x - mean) * scale is sqrt(D); 1 without scaling


def fit_scaling(chunks: Callable[[], Iterable[np.ndarray]], c: SAEConfig) -> Scaling:
    """Centre and scale from the training split, accumulated in float64.

    Args:
      chunks: gives the split's residuals from the beginning, [n, D] at a time.

    Raises:
      HeadSteerError: the residuals are not finite, or all the same.
    """
    total, count = 0.0, 0
    for x_nD in chunks():
        total, count = total + x_nD.sum(axis=0, dtype=np.float64), count + len(x_nD)
    if not np.isfinite(total).all():
        raise HeadSteerError("the residuals hold NaN or infinity: the model's training went wrong; train it again")
    centre_D = np.asarray(total / count)
    spread = sum(np.linalg.norm(x_nD - centre_D, axis=1).sum() for x_nD in chunks()) / count
    if spread < 1e-6 * (1.0 + np.linalg.norm(centre_D)):
        raise HeadSteerError("the residuals are the same for every image: there is nothing to decompose at this layer")
    mean_D = centre_D if c.centre else np.zeros_like(centre_D)
    length = sum(np.linalg.norm(x_nD - mean_D, axis=1).sum() for x_nD in chunks()) / count if c.scale else 1.0
    scale = np.sqrt(len(mean_D)) / length if c.scale else 1.0
    return Scaling(mean_D.astype(np.float32), np.asarray(scale, np.float32))


def scale_input(scaling: Scaling, x_BD: jax.Array | np.ndarray) -> jax.Array:
    """u = (x - mean) * scale."""
    return (jnp.asarray(x_BD) - scaling.mean) * scaling.scale


def unscale_output(scaling: Scaling, u_BD: jax.Array) -> jax.Array:
    """x = u / scale + mean."""
    return u_BD / scaling.scale + scaling.mean


def keep_top_k(a_BF: jax.Array, k: int | jax.Array, most: int | None = None) -> jax.Array:
    """TopK_k: the k largest of each row stay, the rest become 0.

    Of values that tie with the k-th, all stay: among float32 activations that are not 0 this does not happen in
    practice, and it spares a scatter.

    Args:
      k: how many; where it is not known while compiling, `most` is what it can be at most.
    """
    if isinstance(k, int):
        most = k
        if k >= a_BF.shape[-1]:
            return a_BF
    assert most is not None
    best_BK = jax.lax.top_k(jax.lax.stop_gradient(a_BF), min(most, a_BF.shape[-1]))[0]
    best_BK = jnp.where(jnp.arange(best_BK.shape[-1]) < k, best_BK, jnp.inf)
    # the least of the k, not their last: XLA's CPU compiler would turn the slice into a sort of the whole row
    return jnp.where(a_BF < jnp.min(best_BK, axis=-1, keepdims=True), 0.0, a_BF)  # NaN stays


def compute_pre_activations(sae: SAEWeights, u_BD: jax.Array) -> jax.Array:
    """a = ReLU(W_e (u - b_d) + b_e), [B, F]."""
    return jax.nn.relu((u_BD - sae.b_d) @ sae.W_e.T + sae.b_e)


def encode_scaled(sae: SAEWeights, u_BD: jax.Array, k: int | None) -> jax.Array:
    """z, [B, F] >= 0.

    Args:
      k: TopK's [TopK, eq. 3]; None: what is above the thresholds (BatchTopK, JumpReLU, ReLU).
    """
    a_BF = compute_pre_activations(sae, u_BD)
    return jnp.where(a_BF > sae.threshold, a_BF, 0.0) if k is None else keep_top_k(a_BF, k)


def decode_scaled(sae: SAEWeights, z_BF: jax.Array) -> jax.Array:
    """u_hat = W_d^T z + b_d, [B, D]."""
    return z_BF @ sae.W_d + sae.b_d


def normalise_rows(W_FD: jax.Array) -> jax.Array:
    return W_FD / jnp.linalg.norm(W_FD, axis=-1, keepdims=True)


def encode_all(sae: SAEWeights, scaling: Scaling, x_ND: np.ndarray, k: int | None, chunk: int = 4096) -> np.ndarray:
    """[N, F] float32 latents of one autoencoder for a whole split, in chunks."""
    parts = (x_ND[i : i + chunk] for i in range(0, len(x_ND), chunk))
    return np.concatenate([np.asarray(encode_residuals(sae, scaling, x_BD, k)) for x_BD in parts])


@functools.partial(jax.jit, static_argnames="k")
def encode_residuals(sae: SAEWeights, scaling: Scaling, x_BD: jax.Array, k: int | None) -> jax.Array:
    """[B, F] latents of residuals as they are in the model."""
    return encode_scaled(sae, scale_input(scaling, x_BD), k)


def select_member(saes: SAEWeights, seed: int) -> SAEWeights:
    """One of the autoencoders trained side by side."""
    return jax.tree.map(lambda leaf: leaf[seed], saes)


def fold_scaling(sae: SAEWeights, scaling: Scaling) -> SAEWeights:
    """The same autoencoder of residuals as they are, for export: centring and scale are in its weights.

    Latents are divided by the scale, decoder rows keep their norm: x_hat = W_d^T (z / scale) + (mean + b_d / scale).
    """
    return sae._replace(
        b_e=sae.b_e / scaling.scale,
        b_d=jnp.asarray(scaling.mean + sae.b_d / scaling.scale),
        threshold=sae.threshold / scaling.scale,
    )
