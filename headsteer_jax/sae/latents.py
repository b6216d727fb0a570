"""Inside an autoencoder: what each latent fires on, where in the image, and what it does to the gate.

Axes: N images, T' tokens of each that the autoencoder reads, D width, F latents, C classes, H heads, K places for a
latent's top images, I images that are encoded at once.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.sae.autoencoder import Autoencoder, encode_compiled, row_slices
from headsteer_jax.sae.metrics import class_selectivity, nearest_cosines
from headsteer_jax.sae.residuals import Residuals, Tokens

Arrays = dict[str, np.ndarray]

ROWS_AT_ONCE = 4096  # residuals that are encoded at once


class TopImages(NamedTuple):
    """The images that activate each latent most, of those seen so far, strongest first."""

    activation: jax.Array  # [F, K]; 0: an empty place
    image: jax.Array  # [F, K] int32
    tokens: jax.Array  # [F, K, T'] activations there


@jax.jit
def _merge_top_images(top: TopImages, z_ITF: jax.Array, begin: jax.Array) -> TopImages:
    """Those of image `begin` and after as well; of images that tie the first come first."""
    F, K = top.activation.shape
    joined = jnp.concatenate([top.activation, z_ITF.max(axis=1).T], axis=1)
    activation_FK, place_FK = jax.lax.top_k(joined, K)  # the lower place first where values tie
    new_FK, i_FK, old_FK = place_FK >= K, jnp.maximum(place_FK - K, 0), jnp.minimum(place_FK, K - 1)
    image_FK = jnp.where(new_FK, begin + i_FK, jnp.take_along_axis(top.image, old_FK, axis=1))
    kept_FKT = jnp.take_along_axis(top.tokens, old_FK[:, :, None], axis=1)
    tokens_FKT = jnp.where(new_FK[:, :, None], z_ITF[i_FK, :, jnp.arange(F)[:, None]], kept_FKT)
    return TopImages(activation_FK, image_FK.astype(jnp.int32), tokens_FKT)


def _encode_images(sae: Autoencoder, parts: Iterable[np.ndarray], tokens: int, count: int) -> Iterator[jax.Array]:
    """[I, T', F] latents of `count` images, the same I every time, so that it is compiled once: the last is filled up
    with images on which nothing fires.
    """
    size = tokens * max(1, min(ROWS_AT_ONCE // tokens, count))

    def encode(x_BD: np.ndarray) -> jax.Array:
        z_BF = encode_compiled(sae, x_BD)
        return z_BF.reshape(-1, tokens, z_BF.shape[1])

    held_BD = np.empty((0, sae.weights.b_d.shape[0]), np.float32)
    for x_nD in parts:
        held_BD = np.concatenate([held_BD, x_nD])
        while len(held_BD) >= size:
            yield encode(held_BD[:size])
            held_BD = held_BD[size:]
    if len(held_BD):
        filled_BD = np.pad(held_BD, ((0, size - len(held_BD)), (0, 0)))
        yield encode(filled_BD).at[len(held_BD) // tokens :].set(0.0)


def profile_latents(
    sae: Autoencoder, source: Residuals, x_cls_ND: np.ndarray, labels_N: np.ndarray, classes: int, gate_DH: np.ndarray,
    tokens: Tokens, top_images: int,
) -> Arrays:  # fmt: skip
    """What each latent of one autoencoder does on a split. An image's activation is the largest of its tokens'.

    Args:
      source: the residuals that the autoencoder reads.
      x_cls_ND: the CLS residuals, which steering changes.
      gate_DH: the gate's weights, or its derivative.
      tokens: cls, patches or all (CLS first): whose residuals `source` holds.
      top_images: K.

    Returns:
      frequency [F]: share of images on which it fires; token_frequency, cls_frequency [F], not with tokens = cls: share
        of tokens, and of CLS residuals, without which a latent is never chosen for steering
      strength [F]: mean activation of the tokens on which it fires
      class_counts [C, F] int32: images of each class on which it fires
      class_means [C, F]: its mean activation on the images of each class
      selectivity [F]: their class selectivity index
      cosine [F]: of its decoder row, the largest with another that fires; 0 for one that never does
      effect [F, H]: what adding its strength does to each head's gate logit
      top_images [F, K] int32, top_activations [F, K] float32: strongest first; 0 and 0 where it fires on fewer
      top_patches [F, K, T'] float16, not with tokens = cls: activations of each token there
    """
    F, N = sae.weights.W_e.shape[0], len(labels_N)
    T = source.shape[0] // N
    empty = jnp.zeros((F, top_images))
    top = TopImages(empty, empty.astype(jnp.int32), jnp.zeros((F, top_images, T)))
    class_counts, sums_CF = np.zeros((classes, F), np.int32), np.zeros((classes, F))
    fired_F, total_F, begin = np.zeros(F, np.int64), np.zeros(F), 0
    for z_ITF in _encode_images(sae, source.chunks(), T, N):
        top = _merge_top_images(top, z_ITF, jnp.int32(begin))
        z_IF, held_ITF = np.asarray(z_ITF.max(axis=1)), np.asarray(z_ITF)
        images, latents = np.nonzero(z_IF)
        places = labels_N[begin + images].astype(np.int64) * F + latents
        np.add.at(class_counts.reshape(-1), places, 1)
        np.add.at(sums_CF.reshape(-1), places, z_IF[images, latents].astype(np.float64))
        fired_F += np.count_nonzero(held_ITF, axis=(0, 1))
        total_F += held_ITF.sum(axis=(0, 1), dtype=np.float64)
        begin += len(z_ITF)

    strength_F, living = total_F / np.maximum(fired_F, 1), np.flatnonzero(fired_F)
    W_d, cosine_F = np.asarray(sae.weights.W_d, np.float64), np.zeros(F)
    if len(living) > 1:
        cosine_F[living] = nearest_cosines(W_d[living])
    mean_CF = sums_CF / np.maximum(np.bincount(labels_N, minlength=classes), 1)[:, None]
    found = {
        "frequency": class_counts.sum(axis=0) / N,
        "strength": strength_F,
        "class_means": mean_CF,
        "selectivity": class_selectivity(mean_CF),
        "cosine": cosine_F,
        "effect": (strength_F / sae.scaling.scale)[:, None] * (W_d @ np.asarray(gate_DH, np.float64)),
        "top_activations": np.asarray(top.activation),
    }
    if tokens != "cls":
        on_cls_F = np.zeros(F)
        for z_ITF in _encode_images(sae, row_slices(x_cls_ND, ROWS_AT_ONCE), 1, N):
            on_cls_F += np.count_nonzero(np.asarray(z_ITF), axis=(0, 1))
        found |= {"token_frequency": fired_F / (N * T), "cls_frequency": on_cls_F / N}
    arrays = {name: values.astype(np.float32) for name, values in found.items()}
    arrays |= {"class_counts": class_counts, "top_images": np.asarray(top.image)}
    if tokens != "cls":
        largest = np.finfo(np.float16).max
        arrays["top_patches"] = np.minimum(np.asarray(top.tokens), largest).astype(np.float16)
    return arrays
