"""Checks of the images before training: each is intact, the model sees a sensible range, no image is in two splits."""

import hashlib
import logging

import numpy as np

from headsteer_jax.config.schema import DataConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset, LazyImages, Split, gather_images
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.progress import progress

logger = logging.getLogger(__name__)

VERIFIED_AT_ONCE = 2000  # images between two updates of the progress bar
SAMPLED_IMAGES = 64  # of train, whose preprocessed pixels are measured

# The spread (standard deviation) of all pixels that the model sees. Published normalisations give 0.2 to 2: pixels from
# 0 to 1 as they are 0.25 to 0.35, mean and std 0.5 about 0.55, ImageNet's about 1.1. Dark microscopy with mean 0 and
# std 1 has 0.01 to 0.05. Photographs divided by a std in units of 255 have 0.004, and pixels of 0 and 1 instead of 0
# and 255 at most 0.002; a std that was divided by 255 twice gives 250.
LEAST_SPREAD, MOST_SPREAD = 0.01, 100.0
USUAL_SPREAD = (0.05, 5.0)


def verify_images(dataset: Dataset) -> None:
    """Open every image of the lazy splits once and check that it is intact; images in memory are decoded already.

    Raises:
      HeadSteerError: an image is damaged; the line names the first one and counts the others.
    """
    splits = (dataset.train, dataset.validation, dataset.test)
    lazy = [split.images for split in splits if isinstance(split.images, LazyImages)]
    faults: list[str] = []
    if not lazy:
        return
    with progress(sum(map(len, lazy)), "verifying images", unit="image") as bar:
        for images in lazy:
            for start in range(0, len(images), VERIFIED_AT_ONCE):
                indices = np.arange(start, min(start + VERIFIED_AT_ONCE, len(images)))
                faults += images.find_faults(indices)
                bar.update(len(indices), f"{len(faults)} damaged" if faults else "")
    if faults:
        for fault in faults[1:20]:
            logger.warning(fault)
        count_note = f" ({len(faults)} of {sum(map(len, lazy))} images are damaged)" if len(faults) > 1 else ""
        raise HeadSteerError(faults[0] + count_note)


def check_input_range(dataset: Dataset, config: DataConfig) -> None:
    """Check what the model would see of a sample of training images; log a warning if the range is unusual.

    Raises:
      HeadSteerError: no sampled image has two different pixels, or the spread of the pixels is absurd.
    """
    count = len(dataset.train.labels)
    sample = np.unique(np.linspace(0, count - 1, min(count, SAMPLED_IMAGES)).astype(int))
    stored = gather_images(dataset.train.images, sample)
    inputs = np.asarray(preprocess(stored, config), np.float64)
    mean, spread = inputs.mean(), inputs.std()
    constant = np.ptp(stored.reshape(len(stored), -1), axis=1) == 0
    low, high = stored.min(), stored.max()
    measured = f"the model would see pixels with mean {mean:.4g} and spread {spread:.4g}"
    if constant.all():
        raise HeadSteerError(
            f"config.data: all pixels of an image are equal in each of {len(stored)} sampled training images ({low} to "
            f"{high} of 255), so there is nothing to learn; correct the images"
        )
    if high <= 1:
        raise HeadSteerError(
            f"config.data: the pixels of {len(stored)} sampled training images are only 0 and 1 of 255 ({measured}); "
            "multiply pixels from 0 to 1 by 255 before they are converted to uint8"
        )
    if not LEAST_SPREAD <= spread <= MOST_SPREAD:
        raise HeadSteerError(
            f"config.data.mean, config.data.std = {config.mean}, {config.std}: {measured}, but a spread near 1 "
            "is usual; give both for pixels from 0 to 1"
        )
    if not USUAL_SPREAD[0] <= spread <= USUAL_SPREAD[1] or abs(mean) > 5 * max(1, spread):
        logger.warning(f"{measured}, but a mean near 0 and a spread near 1 are usual: check config.data.mean and std")
    if constant.mean() > 0.1:
        logger.warning(f"{constant.sum()} of {len(stored)} sampled training images have only one colour each")


def warn_of_repeated_images(dataset: Dataset) -> None:
    """Warn in the log if validation or test has images of train; only splits in memory are compared."""
    train = set(_hash_pictures(dataset.train))
    for name, split in (("validation", dataset.validation), ("test", dataset.test)):
        repeated = sum(picture in train for picture in _hash_pictures(split)) if train else 0
        if repeated:
            logger.warning(f"{name}: {repeated} of {len(split.labels)} images also occur in train")


def _hash_pictures(split: Split) -> list[bytes]:
    """Hash the pixels of each image in memory; an empty list if the split is lazy."""
    if isinstance(split.images, LazyImages):
        return []
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in split.images]
