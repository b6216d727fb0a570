"""Preprocessing and augmentation on the device: stored pixels become what the model sees. Pure functions of a key.

Axes: B images, S config.image_size, C channels (C classes in targets_BC). Until the normalisation pixels are float32,
0 to 1.
"""

import functools

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from headsteer_jax.config.schema import DataConfig


def preprocess(images_BhwC: jax.Array | np.ndarray, config: DataConfig) -> jax.Array:
    """Crop, resize and normalise images: [B, height, width, C] uint8 of any size -> [B, S, S, C] float32."""
    return _normalise(resize_to_square(images_BhwC, config.image_size), config)


def augment_and_normalise(key: jax.Array, images_BhwC: jax.Array | np.ndarray, config: DataConfig) -> jax.Array:
    """Preprocess images with random changes before the normalisation; without changes the bits are `preprocess`'s."""
    return _normalise(augment(key, resize_to_square(images_BhwC, config.image_size), config), config)


def resize_to_square(images_BhwC: jax.Array | np.ndarray, side: int) -> jax.Array:
    """Resize the largest centred square of images: [B, h, w, C] uint8 -> [B, side, side, C] float32, 0 to 1."""
    height, width = images_BhwC.shape[1:3]
    square = min(height, width)
    row, column = (height - square) // 2, (width - square) // 2
    images_BssC = jnp.asarray(images_BhwC)[:, row : row + square, column : column + square].astype(jnp.float32) / 255
    if square == side:
        return images_BssC
    shape = (images_BssC.shape[0], side, side, images_BssC.shape[3])
    return jax.image.resize(images_BssC, shape, "bilinear", antialias=True)


def _normalise(images_BSSC: jax.Array, config: DataConfig) -> jax.Array:
    return (images_BSSC - jnp.array(config.mean, jnp.float32)) / jnp.array(config.std, jnp.float32)


def augment(key: jax.Array, images_BSSC: jax.Array, config: DataConfig) -> jax.Array:
    """Apply the config's random crops, mirroring and RandAugment, drawn for each image independently.

    Args:
      images_BSSC: float32, 0 to 1, like the result. Pixels from outside of an image are black, but for crop_fill.
    """
    return augment_each(jax.random.split(key, images_BSSC.shape[0]), images_BSSC, config)


def augment_each(keys_B: jax.Array, images_BSSC: jax.Array, config: DataConfig) -> jax.Array:
    """Augment each image by its own key; see `augment`."""

    def augment_image(key: jax.Array, image_SSC: jax.Array) -> jax.Array:
        key_scale, key_shift, key_flip, key_operations = jax.random.split(key, 4)
        if config.crop_scale < 1:
            image_SSC = _random_square(key_scale, image_SSC, config.crop_scale)
        if config.crop_padding:
            margin = (config.crop_padding, config.crop_padding)
            mode = "constant" if config.crop_fill == "black" else "symmetric"
            padded_SSC = jnp.pad(image_SSC, (margin, margin, (0, 0)), mode)
            image_SSC = pix.random_crop(key_shift, padded_SSC, image_SSC.shape)
        if config.flip:
            image_SSC = pix.random_flip_left_right(key_flip, image_SSC)
        if config.rand_augment_ops:
            strength = config.rand_augment_magnitude / 10
            keys = jax.random.split(key_operations, config.rand_augment_ops)
            # A scan, because XLA would compute an unrolled operation again for every use of its result.
            image_SSC, _ = jax.lax.scan(lambda x, key: (_random_operation(key, x, strength), None), image_SSC, keys)
        return image_SSC

    return jax.vmap(augment_image)(keys_B, images_BSSC)


def _random_square(key: jax.Array, image_SSC: jax.Array, least: float) -> jax.Array:
    """Cut out a random square of `least` to all of the image's area, and resize it to the image's size."""
    key_area, key_corner = jax.random.split(key)
    side = image_SSC.shape[0]
    enlarged = jax.random.uniform(key_area, minval=least) ** -0.5
    corner = jax.random.uniform(key_corner, (2,)) * (enlarged - 1) * side  # in pixels of the result
    return jax.image.scale_and_translate(
        image_SSC, image_SSC.shape, (0, 1), jnp.stack([enlarged, enlarged]), -corner, "linear", antialias=False
    )


OPERATIONS = (
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
    "identity", "auto_contrast", "solarize", "posterize", "contrast", "brightness", "sharpness", "colour",
)  # fmt: skip
GEOMETRIC_OPERATIONS = 5  # the first ones, which move pixels


def _random_operation(key: jax.Array, image_SSC: jax.Array, strength: float) -> jax.Array:
    """Apply a random operation of RandAugment (arXiv:1909.13719), in a random direction if it has two.

    They are the paper's except equalize, whose sort takes longer than all others together. Grey images have no colour.
    """
    key_operation, key_sign = jax.random.split(key)
    count = len(OPERATIONS) - (image_SSC.shape[2] == 1)
    sign = jax.random.rademacher(key_sign, (), jnp.float32)
    return apply_operation(image_SSC, jax.random.randint(key_operation, (), 0, count), strength, sign)


def apply_operation(image_SSC: jax.Array, number: jax.Array, strength: float, sign: jax.Array) -> jax.Array:
    """Apply OPERATIONS[number] to one image.

    Args:
      strength: RandAugment's magnitude / 10; a comment at each operation says what 1 means.
      sign: 1 or -1, the direction.
    """
    side, channels = image_SSC.shape[1:]
    factor = 1 + 0.9 * strength * sign

    # Under vmap a switch computes every branch, and moving pixels costs most: the geometric operations share one warp,
    # in which at most one of these five numbers is not 0.
    rotate, shear_x, shear_y, right, down = strength * sign * jax.nn.one_hot(number, GEOMETRIC_OPERATIONS)
    cos, sin = jnp.cos(rotate * jnp.pi / 6), jnp.sin(rotate * jnp.pi / 6)  # 30 degrees
    # The source of each pixel (row, column), about the centre: shears of 0.3, shifts of 45% of the side.
    row, column = jnp.meshgrid(*[jnp.arange(side) - (side - 1) / 2] * 2, indexing="ij")
    from_row = cos * row + (0.3 * shear_y - sin) * column + 0.45 * side * down + (side - 1) / 2
    from_column = (0.3 * shear_x + sin) * row + cos * column + 0.45 * side * right + (side - 1) / 2
    # dm_pix.affine_transform interpolates between channels too, and takes 35 times as long.
    plane = functools.partial(map_coordinates, coordinates=[from_row, from_column], order=1, mode="constant")
    image_SSC = jax.vmap(plane, in_axes=2, out_axes=2)(image_SSC)

    def auto_contrast(x: jax.Array) -> jax.Array:
        low, high = jnp.min(x, (0, 1)), jnp.max(x, (0, 1))
        return jnp.where(high > low, (x - low) / jnp.maximum(high - low, 1 / 255), x)

    def posterize(x: jax.Array) -> jax.Array:
        step = 2 ** round(4 * strength)  # 4 of 8 bits are left
        return jnp.floor((x * 255 + 0.01) / step) * step / 255  # 0.01: x * 255 may fall short of its integer

    def sharpness(x: jax.Array) -> jax.Array:
        x_SsC = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
        x_SsC = x_SsC[:-2] + x_SsC[1:-1] + x_SsC[2:]
        smooth = (x_SsC[:, :-2] + x_SsC[:, 1:-1] + x_SsC[:, 2:] + 4 * x) / 13  # Pillow's: 1 around a 5
        return smooth * (1 - factor) + x * factor

    tonal = [
        lambda x: x,
        auto_contrast,
        lambda x: pix.solarize(x, (1 - strength) * 256 / 255),  # everything is inverted; at 0 not even white
        posterize,
        lambda x: pix.adjust_contrast(x, factor),
        lambda x: x * factor,
        sharpness,
        lambda x: pix.rgb_to_grayscale(x, keep_dims=True) * (1 - factor) + x * factor,
    ]
    if channels == 1:
        tonal.pop()
    return jnp.clip(jax.lax.switch(jnp.maximum(number - GEOMETRIC_OPERATIONS, 0), tonal, image_SSC), 0, 1)


def mixup(
    key: jax.Array, images_BSSC: jax.Array | np.ndarray, targets_BC: jax.Array | np.ndarray, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mix every image and its target with a partner's (arXiv:1710.09412): x' = l x + (1 - l) x~, y' = l y + (1 - l) y~.

    l ~ Beta(alpha, alpha) is drawn for each image. Its partner (~) is the image at its place in the reversed batch, as
    training's batches are in random order already.
    """
    share_B = jax.random.beta(key, alpha, alpha, (images_BSSC.shape[0],))
    share_B1, share_B111 = share_B[:, None], share_B[:, None, None, None]
    return (
        share_B111 * images_BSSC + (1 - share_B111) * images_BSSC[::-1],
        share_B1 * targets_BC + (1 - share_B1) * targets_BC[::-1],
    )
