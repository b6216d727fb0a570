"""The embedded dataset double_digits: two of scikit-learn's handwritten digits on a canvas, in 100 classes."""

import numpy as np

from headsteer_jax.config.schema import Config, DataConfig
from headsteer_jax.data.dataset import Dataset, Split, stratified_cut
from headsteer_jax.errors import HeadSteerError

DIGIT_SIDE = 8  # scikit-learn's digits are 8x8, grey levels 0 to 16
DIGIT_TEST_FRACTION = 0.25  # share of the source digits that only test canvases use


def compose_digits(
    digits: np.ndarray, values: np.ndarray, per_class: int, side: int, rng: np.random.Generator
) -> Split:
    """Compose canvases of two digits at random places: class 10 a + b has an `a` in the left half, a `b` in the right.

    Args:
      digits: [N, 8, 8] uint8 source digits.
      values: [N] the digits that they show, 0 to 9.
      per_class: the number of canvases for each of the 100 classes.
      side: the canvas's side in pixels, at least 16.
    """
    labels = np.repeat(np.arange(100, dtype=np.int32), per_class)
    canvases = np.zeros((len(labels), side, side), np.uint8)
    pixel, half = np.arange(DIGIT_SIDE), side // 2
    for digit, first_column in ((labels // 10, 0), (labels % 10, half)):
        chosen = np.zeros(len(labels), np.int64)
        for value in range(10):
            has_value = digit == value
            chosen[has_value] = rng.choice(np.flatnonzero(values == value), has_value.sum())
        rows = rng.integers(0, side - DIGIT_SIDE + 1, len(labels))[:, None, None] + pixel[:, None]
        columns = first_column + rng.integers(0, half - DIGIT_SIDE + 1, len(labels))[:, None, None] + pixel
        canvases[np.arange(len(labels))[:, None, None], rows, columns] = digits[chosen]
    return Split(canvases[..., None], labels)


def find_strokes(images: np.ndarray, patch: int) -> np.ndarray:
    """Find the patches that show a part of a digit: [N, side, side, channels] uint8 -> [N, P] bool, row by row.

    A patch shows a stroke if its brightest pixel has at least half of the full brightness. Both digits of a canvas
    belong to its class.
    """
    count, side = len(images), images.shape[1] // patch
    bright = images[:, : side * patch, : side * patch].max(axis=-1) >= 128
    return bright.reshape(count, side, patch, side, patch).any(axis=(2, 4)).reshape(count, side * side)


def find_own_patches(config: Config, split: Split) -> np.ndarray | None:
    """Find the patches of a split that show each image's class, [N, P] bool; None if the dataset does not know them."""
    if config.data.source != "double_digits" or not isinstance(split.images, np.ndarray):
        return None
    return find_strokes(split.images, config.model.patch)


def double_digits(config: DataConfig, seed: int) -> Dataset:
    """Make the dataset from scikit-learn's 1,797 handwritten digits, so that no source digit occurs in two splits.

    The classes are "00" to "99"; two classes with the same digit at the same place are related.

    Raises:
      HeadSteerError: the canvas is too small for two digits.
    """
    from sklearn.datasets import load_digits

    if config.image_size < 2 * DIGIT_SIDE:
        raise HeadSteerError(
            f"config.data.image_size = {config.image_size}: double_digits needs at least {2 * DIGIT_SIDE} pixels"
        )
    source = load_digits()
    digits = np.round(source.images * (255 / 16)).astype(np.uint8)
    values = source.target.astype(np.int32)
    rng = np.random.default_rng([seed, 0])
    fitting, test = stratified_cut(values, DIGIT_TEST_FRACTION, rng)
    train, validation = stratified_cut(values[fitting], config.validation_fraction, rng)

    def compose(chosen: np.ndarray, per_class: int) -> Split:
        split = compose_digits(digits[chosen], values[chosen], per_class, config.image_size, rng)
        assert isinstance(split.images, np.ndarray)
        return Split(np.repeat(split.images, config.channels, axis=3), split.labels)

    tens, ones = np.divmod(np.arange(100), 10)
    related = (tens[:, None] == tens) | (ones[:, None] == ones)
    return Dataset(
        train=compose(fitting[train], config.train_per_class or 400),
        validation=compose(fitting[validation], config.eval_per_class or 100),
        test=compose(test, config.eval_per_class or 100),
        class_names=tuple(f"{label:02d}" for label in range(100)),
        related=related & ~np.eye(100, dtype=bool),
    )
