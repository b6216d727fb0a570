"""Inside an autoencoder: what each latent fires on, where in the image, and what it does to the gate.

`look_inside` measures, `write_inside` makes a page of it. Axes: N images, T' tokens of each that the autoencoder reads,
D width, F latents, C classes, H heads, K places for a latent's top images, I images that are encoded at once.
"""

import base64
import io
import math
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from headsteer_jax.cache import Residuals, Tokens
from headsteer_jax.checkpoint import Path, write_text
from headsteer_jax.config import Config
from headsteer_jax.data import Dataset, gather
from headsteer_jax.sae import SAE, Scaling, encode_residuals
from headsteer_jax.sae_metrics import class_selectivity, max_cosines

Arrays = dict[str, np.ndarray]

ROWS = 4096  # residuals that are encoded at once
THUMBNAIL = 56  # pixels: images on the page are no larger
BARS = 5  # classes in a latent's histogram
LEVELS = 15  # of a patch's heat: one hexadecimal digit


class Top(NamedTuple):
    """The images that activate each latent most, of those seen so far, strongest first."""

    activation: jax.Array  # [F, K]; 0: an empty place
    image: jax.Array  # [F, K] int32
    tokens: jax.Array  # [F, K, T'] activations there


@jax.jit
def _with_more(top: Top, z_ITF: jax.Array, begin: jax.Array) -> Top:
    """Those of image `begin` and after as well; of images that tie the first come first."""
    F, K = top.activation.shape
    joined = jnp.concatenate([top.activation, z_ITF.max(axis=1).T], axis=1)
    activation_FK, place_FK = jax.lax.top_k(joined, K)  # the lower place first where values tie
    new_FK, i_FK, old_FK = place_FK >= K, jnp.maximum(place_FK - K, 0), jnp.minimum(place_FK, K - 1)
    image_FK = jnp.where(new_FK, begin + i_FK, jnp.take_along_axis(top.image, old_FK, axis=1))
    kept_FKT = jnp.take_along_axis(top.tokens, old_FK[:, :, None], axis=1)
    tokens_FKT = jnp.where(new_FK[:, :, None], z_ITF[i_FK, :, jnp.arange(F)[:, None]], kept_FKT)
    return Top(activation_FK, image_FK.astype(jnp.int32), tokens_FKT)


def _encoded(
    sae: SAE, scaling: Scaling, k: int | None, parts: Iterable[np.ndarray], tokens: int, count: int
) -> Iterator[jax.Array]:
    """[I, T', F] latents of `count` images, the same I every time, so that it is compiled once: the last is filled up
    with images on which nothing fires."""
    size = tokens * max(1, min(ROWS // tokens, count))

    def encode(x_BD: np.ndarray) -> jax.Array:
        z_BF = encode_residuals(sae, scaling, x_BD, k)
        return z_BF.reshape(-1, tokens, z_BF.shape[1])

    held_BD = np.empty((0, sae.b_d.shape[0]), np.float32)
    for x_nD in parts:
        held_BD = np.concatenate([held_BD, x_nD])
        while len(held_BD) >= size:
            yield encode(held_BD[:size])
            held_BD = held_BD[size:]
    if len(held_BD):
        filled_BD = np.pad(held_BD, ((0, size - len(held_BD)), (0, 0)))
        yield encode(filled_BD).at[len(held_BD) // tokens :].set(0.0)


def look_inside(
    sae: SAE, scaling: Scaling, k: int | None, source: Residuals, x_cls_ND: np.ndarray, labels_N: np.ndarray,
    classes: int, gate_DH: np.ndarray, tokens: Tokens, top_images: int,
) -> Arrays:  # fmt: skip
    """What each latent of one autoencoder does on a split. An image's activation is the largest of its tokens'.

    Args:
      k: see `sae.encode`.
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
    F, N = sae.W_e.shape[0], len(labels_N)
    T = source.shape[0] // N
    empty = jnp.zeros((F, top_images))
    top = Top(empty, empty.astype(jnp.int32), jnp.zeros((F, top_images, T)))
    class_counts, sums_CF = np.zeros((classes, F), np.int32), np.zeros((classes, F))
    fired_F, total_F, begin = np.zeros(F, np.int64), np.zeros(F), 0
    for z_ITF in _encoded(sae, scaling, k, source.chunks(), T, N):
        top = _with_more(top, z_ITF, jnp.int32(begin))
        z_IF, held_ITF = np.asarray(z_ITF.max(axis=1)), np.asarray(z_ITF)
        images, latents = np.nonzero(z_IF)
        places = labels_N[begin + images].astype(np.int64) * F + latents
        np.add.at(class_counts.reshape(-1), places, 1)
        np.add.at(sums_CF.reshape(-1), places, z_IF[images, latents].astype(np.float64))
        fired_F += np.count_nonzero(held_ITF, axis=(0, 1))
        total_F += held_ITF.sum(axis=(0, 1), dtype=np.float64)
        begin += len(z_ITF)

    strength_F, living = total_F / np.maximum(fired_F, 1), np.flatnonzero(fired_F)
    W_d, cosine_F = np.asarray(sae.W_d, np.float64), np.zeros(F)
    if len(living) > 1:
        cosine_F[living] = max_cosines(W_d[living])
    mean_CF = sums_CF / np.maximum(np.bincount(labels_N, minlength=classes), 1)[:, None]
    found = {
        "frequency": class_counts.sum(axis=0) / N,
        "strength": strength_F,
        "class_means": mean_CF,
        "selectivity": class_selectivity(mean_CF),
        "cosine": cosine_F,
        "effect": (strength_F / scaling.scale)[:, None] * (W_d @ np.asarray(gate_DH, np.float64)),
        "top_activations": np.asarray(top.activation),
    }
    if tokens != "cls":
        on_cls_F = np.zeros(F)
        for z_ITF in _encoded(sae, scaling, k, (x_cls_ND[i : i + ROWS] for i in range(0, N, ROWS)), 1, N):
            on_cls_F += np.count_nonzero(np.asarray(z_ITF), axis=(0, 1))
        found |= {"token_frequency": fired_F / (N * T), "cls_frequency": on_cls_F / N}
    arrays = {name: values.astype(np.float32) for name, values in found.items()}
    arrays |= {"class_counts": class_counts, "top_images": np.asarray(top.image)}
    if tokens != "cls":
        largest = np.finfo(np.float16).max
        arrays["top_patches"] = np.minimum(np.asarray(top.tokens), largest).astype(np.float16)
    return arrays


def _uri(image: np.ndarray) -> str:
    """[height, width, channels] uint8 -> a small picture as PNG or JPEG, whichever is shorter."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    uris = []
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        picture.save(buffer, kind, quality=85, optimize=True)  # a PNG has no quality
        uris.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(uris, key=len)


def _heat(patches_T: np.ndarray, most: float) -> str:
    """A hexadecimal digit for each patch: 0 where the latent is silent, LEVELS at its strongest."""
    levels = np.ceil(LEVELS * np.asarray(patches_T, np.float64) / most).clip(0, LEVELS).astype(int)
    return "".join(f"{level:x}" for level in levels)


def _rounded(values: np.ndarray) -> list[float]:
    """Four digits are more than the page shows."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def _pictures(latent: int, arrays: Arrays, used: np.ndarray, tokens: str) -> list[list[Any]]:
    """A latent's top images as [place in `used`, activation] and, with patches, [the CLS token's (or null), heat]."""
    fires = np.flatnonzero(arrays["top_activations"][latent] > 0)
    strength = arrays["top_activations"][latent, fires]
    rows: list[list[Any]] = [
        [place, value]
        for place, value in zip(
            np.searchsorted(used, arrays["top_images"][latent, fires]).tolist(), _rounded(strength), strict=True
        )
    ]
    if tokens != "cls":
        first = 1 if tokens == "all" else 0
        for row, patches_T in zip(rows, arrays["top_patches"][latent, fires], strict=True):
            row += [_rounded(patches_T[:1])[0] if first else None, _heat(patches_T[first:], float(strength[0]))]
    return rows


def page_data(arrays: Arrays, dataset: Dataset, config: Config) -> dict[str, Any]:
    """What the page holds, in JSON's types: columns with an entry for each latent that fires, most selective first.

    `images` has entries for the first config.report.inside of them; they name `thumbnails`, which are there once each.
    """
    tokens, frequency = config.sae.tokens, arrays["frequency"]
    order = np.flatnonzero(frequency > 0)
    order = order[np.argsort(-arrays["selectivity"][order], kind="stable")]
    shown = order[: config.report.inside]
    used = np.unique(arrays["top_images"][shown][arrays["top_activations"][shown] > 0])
    parts = np.array_split(used, max(1, len(used) // 256))  # whole images are large
    histogram, spread = [], []
    for count_C, mean_C in zip(arrays["class_counts"][:, order].T, arrays["class_means"][:, order].T, strict=True):
        first = np.lexsort((-mean_C, -count_C))[:BARS]  # a dense latent fires on every image of several classes
        histogram.append([[int(c), int(count_C[c])] for c in first if count_C[c]])
        spread.append([int(np.count_nonzero(count_C)), int(count_C.sum())])
    names = [name for name in ("frequency", "token_frequency", "cls_frequency") if name in arrays]
    return {
        "classes": list(dataset.class_names),
        "latent": order.tolist(),
        **{name: _rounded(arrays[name][order]) for name in (*names, "strength", "selectivity", "cosine")},
        "effect": [_rounded(effect_F[order]) for effect_F in arrays["effect"].T],
        "histogram": histogram,
        "spread": spread,
        "images": [_pictures(latent, arrays, used, tokens) for latent in shown.tolist()],
        "image_class": dataset.train.labels[used].tolist(),
        "thumbnails": [_uri(image) for part in parts for image in gather(dataset.train.images, part)],
        "grid": 0 if tokens == "cls" else math.isqrt(arrays["top_patches"].shape[-1]),
    }


def write_inside(file: Path, name: str, arrays: Arrays, dataset: Dataset, config: Config) -> None:
    """Write one page that opens from disk: a row for each latent that fires; its headings sort.

    Args:
      name: the run's, for the title.
      arrays: of `look_inside`, on the training split.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    template = environment.from_string(resources.files(__package__).joinpath("inside.html.j2").read_text("utf-8"))
    data = page_data(arrays, dataset, config)
    page = template.render(
        name=name, config=config, data=data, latents=len(arrays["frequency"]), images=len(dataset.train.labels),
        bars=BARS, levels=LEVELS,
    )  # fmt: skip
    write_text(file, page)
