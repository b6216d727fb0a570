"""The page latents.html, which has a row for every latent that fires."""

import base64
import io
import math
from typing import Any

import numpy as np
from etils.epath import Path
from PIL import Image

from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, gather_images
from headsteer_jax.report.render import render_template
from headsteer_jax.runtime.files import write_text
from headsteer_jax.sae.latents import Arrays, rank_latent_classes

THUMBNAIL = 56  # pixels: the page shows no image larger
CLASSES_SHOWN = 5  # in each latent's histogram
HEAT_LEVELS = 15  # a patch's heat is one hexadecimal digit


def shrink_image(image: np.ndarray, side: int) -> Image.Image:
    """Shrink an image, [height, width, channels] uint8, to at most `side` pixels in height and width."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX)
    return picture


def encode_image(picture: Image.Image, kinds: tuple[str, ...], quality: int) -> str:
    """Encode a picture as a data URI, in the kind of file that is shortest."""
    uris = []
    for kind in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, quality=quality, optimize=True)  # a PNG has no quality
        uris.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(uris, key=len)


def _thumbnail_uri(image: np.ndarray) -> str:
    """Encode an image, [height, width, channels] uint8, as a small PNG or JPEG."""
    return encode_image(shrink_image(image, THUMBNAIL), ("png", "jpeg"), quality=85)


def _heat_digits(patches_T: np.ndarray, most: float) -> str:
    """Write a hexadecimal digit for each patch: 0 if the latent is silent there, f if its activation is `most`."""
    levels = np.ceil(HEAT_LEVELS * np.asarray(patches_T, np.float64) / most).clip(0, HEAT_LEVELS).astype(int)
    return "".join(f"{level:x}" for level in levels)


def _rounded(values: np.ndarray) -> list[float]:
    """Round to four significant digits, which are more than the page shows."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def _pictures(latent: int, arrays: Arrays, used: np.ndarray, tokens: str) -> list[list[Any]]:
    """List a latent's top images.

    Args:
      used: the training images on the page, by number, ascending.
      tokens: config.sae.tokens.

    Returns:
      For each image [its place in `used`, the activation]; if the autoencoder reads patches, also [..., the CLS
      token's activation or None, the patches' heat].
    """
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
            row += [_rounded(patches_T[:1])[0] if first else None, _heat_digits(patches_T[first:], float(strength[0]))]
    return rows


def page_data(arrays: Arrays, dataset: Dataset, config: Config) -> dict[str, Any]:
    """Collect the page's content in JSON's types: columns with an entry for each latent that fires.

    The most selective latents come first. `images` has entries for the first config.report.inside of them, which refer
    to `thumbnails` by number, so that the page holds each image once.
    """
    tokens, frequency = config.sae.tokens, arrays["frequency"]
    order = np.flatnonzero(frequency > 0)
    order = order[np.argsort(-arrays["selectivity"][order], kind="stable")]
    shown = order[: config.report.inside]
    used = np.unique(arrays["top_images"][shown][arrays["top_activations"][shown] > 0])
    parts = np.array_split(used, max(1, len(used) // 256))  # unscaled images are large
    histogram, spread = [], []
    counts_CF, means_CF = (arrays[name][:, order] for name in ("class_counts", "class_means"))
    for count_C, top_classes in zip(counts_CF.T, rank_latent_classes(counts_CF, means_CF, CLASSES_SHOWN), strict=True):
        histogram.append([[int(c), int(count_C[c])] for c in top_classes if c >= 0])
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
        "thumbnails": [_thumbnail_uri(image) for part in parts for image in gather_images(dataset.train.images, part)],
        "grid": 0 if tokens == "cls" else math.isqrt(arrays["top_patches"].shape[-1]),
    }


def write_latents_page(file: Path, name: str, arrays: Arrays, dataset: Dataset, config: Config) -> None:
    """Write a page that opens from disk, with a row for each latent that fires; a click on a heading sorts it.

    Args:
      name: the run's name, for the title.
      arrays: what `profile_latents` returned for the training split.
    """
    data = page_data(arrays, dataset, config)
    page = render_template(
        "latents.html.j2", name=name, config=config, data=data, latents=len(arrays["frequency"]),
        images=len(dataset.train.labels), bars=CLASSES_SHOWN, levels=HEAT_LEVELS,
    )  # fmt: skip
    write_text(file, page)
