"""Augmented versions of a split's images as one longer split: each version is a view."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import Config, DataConfig
from headsteer_jax.data.augment import augment_each, resize_to_square
from headsteer_jax.data.dataset import LazyImages, Split, gather_images, image_keys, sha256_of

AT_ONCE = 64  # images of a call of the augmentation, which is compiled for this size


@functools.partial(jax.jit, static_argnames="config")
def _draw_views(key: jax.Array, places_B: jax.Array, images_BhwC: jax.Array, config: DataConfig) -> jax.Array:
    """Augment images by keys that follow from their places: uint8 -> [B, S, S, C] uint8."""
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(places_B)
    views_BSSC = augment_each(keys_B, resize_to_square(images_BhwC, config.image_size), config)
    return jnp.round(255 * views_BSSC).astype(jnp.uint8)


def make_views(split: Split, config: Config, views: int) -> Split:
    """Make the split of all views of a split's images: first the images themselves, then views - 1 augmented versions.

    They are augmented as training images are, by the section `data`, and are images of data.image_size. The version of
    an image depends on config.seed, the number of the view and the image's place alone. They are made when they are
    read, so they take no memory.
    """
    count, data = len(split.labels), config.data
    key = jax.random.fold_in(jax.random.key(config.seed), 7)

    def decode(places: list[int]) -> Iterator[np.ndarray]:
        for begin in range(0, len(places), AT_ONCE):
            place_B = np.resize(places[begin : begin + AT_ONCE], AT_ONCE)  # the last call repeats some
            images = gather_images(split.images, place_B % count)
            views = np.asarray(_draw_views(key, jnp.asarray(place_B), images, data))
            if (first := place_B < count).any():
                plain = resize_to_square(images[first], data.image_size)
                views = np.array(views)
                views[first] = np.asarray(jnp.round(255 * plain), np.uint8)
            yield from views[: len(places) - begin]

    augmentation = data.model_dump(include={"image_size", "crop_padding", "crop_fill", "crop_scale", "flip"})
    augmentation |= data.model_dump(include={"rand_augment_ops", "rand_augment_magnitude"})
    mark = np.uint64(int(sha256_of(augmentation, config.seed)[:16], 16))
    numbers_V1 = np.arange(views, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)  # far apart
    keys_VN = (image_keys(split)[None] + numbers_V1) ^ mark
    shape = (data.image_size, data.image_size, data.channels)
    images = LazyImages(decode, np.arange(views * count), shape)
    return Split(images, np.tile(split.labels, views), keys_VN.reshape(-1))
