"""Inside an autoencoder: what each latent fires on, where in the image, and what it does to the gate.

Axes: N images, T' tokens of each that the autoencoder reads, D width, F latents, C classes, H heads, K places for a
latent's top images, I images encoded at once.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.sae.autoencoder import ROWS_AT_ONCE, Autoencoder, encode_compiled, row_slices
from headsteer_jax.sae.metrics import class_selectivity, nearest_cosines
from headsteer_jax.sae.residuals import LabelledResiduals

Arrays = dict[str, np.ndarray]

INSPECTED_IMAGES = 16  # top images that are stored for each latent; pages show config.report.top_images of them


class TopImages(NamedTuple):
    """The images that activate each latent most among those seen so far, strongest first."""

    activation: jax.Array  # [F, K]; 0: no image
    image: jax.Array  # [F, K] int32
    tokens: jax.Array  # [F, K, T'] activations there


@jax.jit
def _merge_top_images(top: TopImages, z_ITF: jax.Array, begin: jax.Array) -> TopImages:
    """Merge images `begin` and following into the top images; of images that tie, the first come first."""
    F, K = top.activation.shape
    candidates = jnp.concatenate([top.activation, z_ITF.max(axis=1).T], axis=1)
    activation_FK, place_FK = jax.lax.top_k(candidates, K)  # of values that tie the lower place comes first
    new_FK, i_FK, old_FK = place_FK >= K, jnp.maximum(place_FK - K, 0), jnp.minimum(place_FK, K - 1)
    image_FK = jnp.where(new_FK, begin + i_FK, jnp.take_along_axis(top.image, old_FK, axis=1))
    old_FKT = jnp.take_along_axis(top.tokens, old_FK[:, :, None], axis=1)
    tokens_FKT = jnp.where(new_FK[:, :, None], z_ITF[i_FK, :, jnp.arange(F)[:, None]], old_FKT)
    return TopImages(activation_FK, image_FK.astype(jnp.int32), tokens_FKT)


def _encode_images(sae: Autoencoder, parts: Iterable[np.ndarray], tokens: int, count: int) -> Iterator[jax.Array]:
    """Yield latents [I, T', F] of `count` images.

    I is the same every time, so that the program is compiled once: the last is padded with images on which no latent
    fires.
    """
    size = tokens * max(1, min(ROWS_AT_ONCE // tokens, count))

    def encode(x_BD: np.ndarray) -> jax.Array:
        z_BF = encode_compiled(sae, x_BD)
        return z_BF.reshape(-1, tokens, z_BF.shape[1])

    pending_BD = np.empty((0, sae.weights.b_d.shape[0]), np.float32)
    for x_nD in parts:
        pending_BD = np.concatenate([pending_BD, x_nD])
        while len(pending_BD) >= size:
            yield encode(pending_BD[:size])
            pending_BD = pending_BD[size:]
    if len(pending_BD):
        padded_BD = np.pad(pending_BD, ((0, size - len(pending_BD)), (0, 0)))
        yield encode(padded_BD).at[len(pending_BD) // tokens :].set(0.0)


class _Firings(NamedTuple):
    """The activations of each latent on a split; an image's is the largest of its tokens'."""

    top: TopImages
    class_counts: np.ndarray  # [C, F] int32, images of each class on which a latent fires
    class_sums: np.ndarray  # [C, F] float64, sums over the images of each class
    tokens: np.ndarray  # [F] int64, tokens on which a latent fires
    token_sums: np.ndarray  # [F] float64, sums over the tokens


def _collect_firings(sae: Autoencoder, split: LabelledResiduals, top_images: int) -> _Firings:
    """Collect in one pass over a split what each latent fires on."""
    F, N, classes = sae.weights.W_e.shape[0], len(split.labels), split.classes
    T = split.residuals.shape[0] // N
    empty = jnp.zeros((F, top_images))
    top = TopImages(empty, empty.astype(jnp.int32), jnp.zeros((F, top_images, T)))
    class_counts, sums_CF = np.zeros((classes, F), np.int32), np.zeros((classes, F))
    fired_F, total_F, begin = np.zeros(F, np.int64), np.zeros(F), 0
    for z_ITF in _encode_images(sae, split.residuals.chunks(), T, N):
        top = _merge_top_images(top, z_ITF, jnp.int32(begin))
        z_IF, dense_ITF = np.asarray(z_ITF.max(axis=1)), np.asarray(z_ITF)
        images, latents = np.nonzero(z_IF)
        cells = split.labels[begin + images].astype(np.int64) * F + latents
        np.add.at(class_counts.reshape(-1), cells, 1)
        np.add.at(sums_CF.reshape(-1), cells, z_IF[images, latents].astype(np.float64))
        fired_F += np.count_nonzero(dense_ITF, axis=(0, 1))
        total_F += dense_ITF.sum(axis=(0, 1), dtype=np.float64)
        begin += len(z_ITF)
    return _Firings(top, class_counts, sums_CF, fired_F, total_F)


def _count_cls_firings(sae: Autoencoder, x_cls_ND: np.ndarray) -> np.ndarray:
    """Count on how many CLS residuals each latent fires: [F]."""
    fired_F = np.zeros(sae.weights.W_e.shape[0])
    for z_ITF in _encode_images(sae, row_slices(x_cls_ND, ROWS_AT_ONCE), 1, len(x_cls_ND)):
        fired_F += np.count_nonzero(np.asarray(z_ITF), axis=(0, 1))
    return fired_F


def rank_latent_classes(class_counts_CF: np.ndarray, class_means_CF: np.ndarray, count: int) -> np.ndarray:
    """Rank the classes on whose images each latent fires most often: [F, `count`] int32, -1 if there are fewer.

    Args:
      class_counts_CF: images of each class on which a latent fires.
      class_means_CF: its mean activation on the images of each class. The means decide between equal counts: a dense
        latent fires on every image of several classes.
    """
    order_CF = np.lexsort((-class_means_CF, -class_counts_CF), axis=0)[:count]
    fires_CF = np.take_along_axis(class_counts_CF, order_CF, axis=0) > 0
    ranked_FC = np.where(fires_CF, order_CF, -1).T.astype(np.int32)
    return np.pad(ranked_FC, ((0, 0), (0, count - ranked_FC.shape[1])), constant_values=-1)


def profile_latents(sae: Autoencoder, split: LabelledResiduals, gate_DH: np.ndarray, top_images: int) -> Arrays:
    """Profile what each latent of one autoencoder does on a split.

    An image's activation is the largest of its tokens'.

    Args:
      sae: one autoencoder.
      split: the residuals that it reads, and their images' classes.
      gate_DH: the gate's weights, or its derivative.
      top_images: K.

    Returns:
      frequency [F]: share of images on which it fires; token_frequency, cls_frequency [F], not with tokens = cls: share
        of tokens, and of CLS residuals; a latent that fires on no CLS residual is never chosen for steering
      strength [F]: mean activation of the tokens on which it fires
      class_counts [C, F] int32: images of each class on which it fires
      class_means [C, F]: its mean activation on the images of each class
      selectivity [F]: their class selectivity index
      cosine [F]: of its decoder row, the largest with that of another latent that fires; 0 if it never fires
      effect [F, H]: what adding its strength does to each head's gate logit
      top_images [F, K] int32, top_activations [F, K] float32: strongest first; 0 and 0 if it fires on fewer
      top_patches [F, K, T'] float16, not with tokens = cls: activations of each token of these images
    """
    N, firings = len(split.labels), _collect_firings(sae, split, top_images)
    strength_F, living = firings.token_sums / np.maximum(firings.tokens, 1), np.flatnonzero(firings.tokens)
    W_d = np.asarray(sae.weights.W_d, np.float64)
    cosine_F = np.zeros(len(W_d))
    if len(living) > 1:
        cosine_F[living] = nearest_cosines(W_d[living])
    mean_CF = firings.class_sums / np.maximum(np.bincount(split.labels, minlength=split.classes), 1)[:, None]
    profile = {
        "frequency": firings.class_counts.sum(axis=0) / N,
        "strength": strength_F,
        "class_means": mean_CF,
        "selectivity": class_selectivity(mean_CF),
        "cosine": cosine_F,
        "effect": (strength_F / sae.scaling.scale)[:, None] * (W_d @ np.asarray(gate_DH, np.float64)),
        "top_activations": np.asarray(firings.top.activation),
    }
    if split.tokens != "cls":
        profile["token_frequency"] = firings.tokens / split.residuals.shape[0]
        profile["cls_frequency"] = _count_cls_firings(sae, split.x_cls) / N
    arrays = {name: values.astype(np.float32) for name, values in profile.items()}
    arrays |= {"class_counts": firings.class_counts, "top_images": np.asarray(firings.top.image)}
    if split.tokens != "cls":
        largest = np.finfo(np.float16).max
        arrays["top_patches"] = np.minimum(np.asarray(firings.top.tokens), largest).astype(np.float16)
    return arrays
