"""Augmented versions of a split's images, each as a split of its own: a view."""

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
def _augment(key: jax.Array, places_B: jax.Array, images_BhwC: jax.Array, config: DataConfig) -> jax.Array:
    """Augment images by keys that follow from their places: uint8 -> [B, S, S, C] uint8."""
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(places_B)
    views_BSSC = augment_each(keys_B, resize_to_square(images_BhwC, config.image_size), config)
    return jnp.round(255 * views_BSSC).astype(jnp.uint8)


def make_view(split: Split, config: Config, number: int) -> Split:
    """Make a view of a split: every image augmented, in the same order, as images of data.image_size in 8 bits.

    The images are made when they are read, so they take no memory. Each depends on config.seed, the number of the view
    and the image's place alone.

    Args:
      split: the images themselves.
      config: its `view_data` says how they are augmented.
      number: of the view, from 1.
    """
    count, data = len(split.labels), config.view_data
    key = jax.random.fold_in(jax.random.key(config.seed), 7)

    def decode(indices: list[int]) -> Iterator[np.ndarray]:
        for begin in range(0, len(indices), AT_ONCE):
            index_B = np.resize(indices[begin : begin + AT_ONCE], AT_ONCE)  # the last call repeats some
            images = gather_images(split.images, index_B)
            views = np.asarray(_augment(key, jnp.asarray(number * count + index_B), images, data))
            yield from views[: len(indices) - begin]

    augmentation = data.model_dump(include={"image_size", "crop_padding", "crop_fill", "crop_scale", "flip"})
    augmentation |= data.model_dump(include={"rand_augment_ops", "rand_augment_magnitude"})
    mark = np.uint64(int(sha256_of(augmentation, config.seed, number)[:16], 16))
    shape = (data.image_size, data.image_size, data.channels)
    return Split(LazyImages(decode, np.arange(count), shape), split.labels, image_keys(split) ^ mark)
