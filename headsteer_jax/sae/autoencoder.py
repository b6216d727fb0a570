"""The sparse autoencoder of a layer's residual: TopK, BatchTopK, JumpReLU or ReLU with L1, any of them Matryoshka.

    u = (x - mean) * scale;  a = ReLU(W_e (u - b_d) + b_e);  z = a where it is large, else 0;  u_hat = W_d^T z + b_d

The variants differ only in what counts as large, which the config sets. `Autoencoder` reads and returns residuals
as they are in the model; training works on the bare weights and the scaled input u.

Axes: B, N residuals, D width, F latents, K places for active latents, S autoencoders.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_array

from headsteer_jax.config.schema import SAEConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.precision import EXACT
from headsteer_jax.runtime.settings import use_own_settings_in_thread

ROWS_AT_ONCE = 4096  # residuals that are encoded at once


class SAEWeights(NamedTuple):
    """The parameters of one autoencoder, or of several with a leading axis S; each latent has a row of W_e and W_d."""

    W_e: jax.Array  # [F, D] encoder
    b_e: jax.Array  # [F]
    W_d: jax.Array  # [F, D] decoder
    b_d: jax.Array  # [D]
    threshold: jax.Array  # [F] a latent is 0 unless above it: JumpReLU's theta, one number in BatchTopK, else 0


class Scaling(NamedTuple):
    """How residuals become the autoencoder's input; saved with it."""

    mean: np.ndarray  # [D] float32, over the residuals of the training; 0 without centring
    scale: np.ndarray  # [] float32: the mean norm of (x - mean) * scale is sqrt(D); 1 without scaling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Autoencoder:
    """A sparse autoencoder of residuals as they are in the model: its weights, their scaling and k.

    It is a pytree with a static k. Autoencoders that were trained side by side are one Autoencoder whose weights have a
    leading axis S; `member` picks one of them, and only a single one can encode and decode.
    """

    weights: SAEWeights
    scaling: Scaling
    k: int | None = field(metadata={"static": True})  # TopK's; None: latents above their thresholds are active

    @use_own_settings_in_thread()
    def encode(self, x_BD: jax.Array | np.ndarray) -> jax.Array:
        """Encode [B, D] residuals: [B, F] latents >= 0, in the units of the scaled input."""
        return encode_scaled(self.weights, scale_input(self.scaling, x_BD), self.k)

    @use_own_settings_in_thread()
    def decode(self, z_BF: jax.Array) -> jax.Array:
        """Decode [B, F] latents: [B, D] residuals."""
        return unscale_output(self.scaling, decode_scaled(self.weights, z_BF))

    @use_own_settings_in_thread()
    def reconstruct(self, x_BD: jax.Array | np.ndarray) -> jax.Array:
        """Encode and decode [B, D] residuals: [B, D], their reconstruction."""
        return self.decode(self.encode(x_BD))

    @use_own_settings_in_thread()
    def member(self, seed: int) -> "Autoencoder":
        """Pick one of several autoencoders that were trained side by side."""
        return replace(self, weights=select_member(self.weights, seed))

    @use_own_settings_in_thread()
    def first(self, count: int) -> "Autoencoder":
        """Keep the first `count` of several autoencoders that were trained side by side."""
        return replace(self, weights=jax.tree.map(lambda leaf: leaf[:count], self.weights))

    @property
    def members(self) -> int:
        """The number of autoencoders, S."""
        return len(self.weights.b_d)

    @property
    def decoder(self) -> np.ndarray:
        """The decoder rows in the residual's units, [F, D]: what one unit of each latent adds to the residual."""
        return np.asarray(self.weights.W_d) / self.scaling.scale


def fit_scaling(chunks: Callable[[], Iterable[np.ndarray]], c: SAEConfig) -> Scaling:
    """Compute centre and scale from the residuals of the training, accumulated in float64.

    Args:
      chunks: returns these residuals from the beginning, [n, D] at a time; called three times.

    Raises:
      HeadSteerError: the residuals are not finite, or are all the same.
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
    mean_D = centre_D if c.ablation.centre else np.zeros_like(centre_D)
    length = sum(np.linalg.norm(x_nD - mean_D, axis=1).sum() for x_nD in chunks()) / count if c.ablation.scale else 1.0
    scale = np.sqrt(len(mean_D)) / length if c.ablation.scale else 1.0
    return Scaling(mean_D.astype(np.float32), np.asarray(scale, np.float32))


def scale_input(scaling: Scaling, x_BD: jax.Array | np.ndarray) -> jax.Array:
    """Scale [B, D] residuals: u = (x - mean) * scale."""
    return (jnp.asarray(x_BD) - scaling.mean) * scaling.scale


def unscale_output(scaling: Scaling, u_BD: jax.Array) -> jax.Array:
    """Undo `scale_input`: x = u / scale + mean, [B, D]."""
    return u_BD / scaling.scale + scaling.mean


@functools.cache
def _make_top_values(count: int) -> Callable[[jax.Array], jax.Array]:
    """Make the function that finds the `count` largest values of each row: [B, F] -> [B, count], descending."""

    @jax.custom_batching.custom_vmap
    def find(a_BF: jax.Array) -> jax.Array:
        return jax.lax.top_k(a_BF, count)[0]

    @find.def_vmap
    def find_of_members(size: int, is_batched: list[bool], a_SBF: jax.Array) -> tuple[jax.Array, bool]:
        # all members' rows as one matrix: a TPU has a unit for that, but sorts every row of an array of three axes
        return find(a_SBF.reshape(-1, a_SBF.shape[-1])).reshape(*a_SBF.shape[:-1], count), True

    return find


def find_top_values(a_BF: jax.Array, count: int) -> jax.Array:
    """Find the `count` largest values of each row, without a gradient: [B, F] -> [B, K], descending."""
    return _make_top_values(min(count, a_BF.shape[-1]))(jax.lax.stop_gradient(a_BF))


def keep_top_k(a_BF: jax.Array, k: int | jax.Array, max_k: int | None = None) -> jax.Array:
    """Keep the k largest values of each row and set the others to 0 (TopK).

    All values that tie with the k-th stay. Among float32 activations that are not 0 this does not happen in practice,
    and it saves a scatter.

    Args:
      a_BF: activations.
      k: how many; it may be traced.
      max_k: the largest value that a traced k can have.
    """
    if isinstance(k, int):
        max_k = k
        if k >= a_BF.shape[-1]:
            return a_BF
    assert max_k is not None
    return keep_from(a_BF, find_top_values(a_BF, max_k), k)


def keep_from(a_BF: jax.Array, best_BK: jax.Array, k: int | jax.Array) -> jax.Array:
    """Keep the values from the k-th of each row's largest ones on, and set the others to 0."""
    best_BK = jnp.where(jnp.arange(best_BK.shape[-1]) < k, best_BK, jnp.inf)
    # the minimum of the k, not the last of them: XLA's CPU compiler would turn that slice into a sort of the whole row
    return jnp.where(a_BF < jnp.min(best_BK, axis=-1, keepdims=True), 0.0, a_BF)  # NaN stays


def compute_pre_activations(sae: SAEWeights, u_BD: jax.Array) -> jax.Array:
    """Compute a = ReLU(W_e (u - b_d) + b_e), [B, F]."""
    return jax.nn.relu(jnp.matmul(u_BD - sae.b_d, sae.W_e.T, precision=EXACT) + sae.b_e)


def encode_scaled(sae: SAEWeights, u_BD: jax.Array, k: int | None) -> jax.Array:
    """Encode scaled residuals: z, [B, F] >= 0.

    Args:
      sae: the weights of one autoencoder.
      u_BD: the scaled input.
      k: TopK's [TopK, eq. 3]; None: latents above their thresholds are active (BatchTopK, JumpReLU, ReLU).
    """
    a_BF = compute_pre_activations(sae, u_BD)
    return jnp.where(a_BF > sae.threshold, a_BF, 0.0) if k is None else keep_top_k(a_BF, k)


def decode_scaled(sae: SAEWeights, z_BF: jax.Array) -> jax.Array:
    """Decode latents into scaled residuals: u_hat = W_d^T z + b_d, [B, D]."""
    return jnp.matmul(z_BF, sae.W_d, precision=EXACT) + sae.b_d


def normalise_rows(W_FD: jax.Array) -> jax.Array:
    """Divide each row by its norm."""
    return W_FD / jnp.linalg.norm(W_FD, axis=-1, keepdims=True)


def encode_split(sae: Autoencoder, x_ND: np.ndarray, chunk: int = ROWS_AT_ONCE) -> np.ndarray:
    """Encode the residuals of a whole split, `chunk` of them at a time: [N, D] -> [N, F] float32."""
    return np.concatenate([z_BF.toarray() for _, z_BF in encode_chunks(sae, row_slices(x_ND, chunk), chunk)])


def encode_chunks(
    sae: Autoencoder, chunks: Iterable[np.ndarray], size: int = ROWS_AT_ONCE
) -> Iterator[tuple[np.ndarray, csr_array]]:
    """Encode residuals chunk by chunk: yield each [B, D] with its latents, [B, F] float32 of which few are not 0.

    Of TopK only the k values of each row and their places leave the device, and the next chunk is encoded meanwhile.

    Args:
      size: the largest B. On accelerators shorter chunks are filled up to it, so that one program encodes every row:
        there the tiles, and so the rounding, depend on the number of rows.
    """
    fill_up = jax.default_backend() != "cpu"
    waiting: deque[tuple[np.ndarray, tuple[jax.Array, ...]]] = deque()
    for x_BD in chunks:
        padding = max(0, size - len(x_BD)) if fill_up else 0
        waiting.append((x_BD, _find_codes(sae, np.pad(x_BD, ((0, padding), (0, 0))))))
        if len(waiting) > 1:
            yield _fetch_codes(sae, *waiting.popleft())
    for call in waiting:
        yield _fetch_codes(sae, *call)


@jax.jit
def _find_codes(sae: Autoencoder, x_BD: jax.Array) -> tuple[jax.Array, ...]:
    """Encode residuals: TopK's values and latents, [B, K] each; for other autoencoders all latents, [B, F]."""
    if sae.k is None or sae.k >= len(sae.weights.b_e):
        return (sae.encode(x_BD),)
    a_BF = compute_pre_activations(sae.weights, scale_input(sae.scaling, x_BD))
    return tuple(jax.lax.top_k(a_BF, sae.k))


def _fetch_codes(sae: Autoencoder, x_BD: np.ndarray, codes: tuple[jax.Array, ...]) -> tuple[np.ndarray, csr_array]:
    """Fetch the results of `_find_codes` for the rows of x."""
    values, *latents = (np.asarray(part)[: len(x_BD)] for part in codes)
    if not latents:
        return x_BD, csr_array(values)
    order_BK = np.argsort(latents[0], axis=1)
    values_BK, latents_BK = (np.take_along_axis(part, order_BK, axis=1) for part in (values, latents[0]))
    active_BK = values_BK != 0
    begins = np.concatenate([[0], np.cumsum(active_BK.sum(axis=1))])
    shape = len(x_BD), len(sae.weights.b_e)
    return x_BD, csr_array((values_BK[active_BK], latents_BK[active_BK], begins), shape=shape)


def row_slices(x_ND: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Yield an array's rows, at most `rows` of them at a time."""
    return (x_ND[begin : begin + rows] for begin in range(0, len(x_ND), rows))


@jax.jit
def encode_compiled(sae: Autoencoder, x_BD: jax.Array) -> jax.Array:
    """Encode residuals in a compiled program: [B, D] -> [B, F]."""
    return sae.encode(x_BD)


def select_member(saes: SAEWeights, seed: int) -> SAEWeights:
    """Pick the weights of one of the autoencoders that were trained side by side."""
    return jax.tree.map(lambda leaf: leaf[seed], saes)


def fold_scaling(sae: Autoencoder) -> SAEWeights:
    """Fold centre and scale into the weights, for export: the result reads residuals as they are in the model.

    Its latents are those of `sae` divided by the scale, and its decoder rows keep their norm:
    x_hat = W_d^T (z / scale) + (mean + b_d / scale).
    """
    weights, scaling = sae.weights, sae.scaling
    return weights._replace(
        b_e=weights.b_e / scaling.scale,
        b_d=jnp.asarray(scaling.mean + weights.b_d / scaling.scale),
        threshold=weights.threshold / scaling.scale,
    )
