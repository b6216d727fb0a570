"""The sources of images: SOURCES lists every kind of dataset, and `load_dataset` loads the one that a config names.

A new source is one more entry of SOURCES. What its makers do not publish, a validation or a test split, is cut from
train, stratified by class, before anything is fitted.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headsteer_jax.config.schema import DataConfig
from headsteer_jax.data.dataset import Dataset, LazyImages, Split, related_pairs, stratified_cut
from headsteer_jax.data.digits import double_digits
from headsteer_jax.data.folder import folder_places, read_folder
from headsteer_jax.data.names import normalise_name
from headsteer_jax.data.npz import read_npz
from headsteer_jax.data.splits import RawData
from headsteer_jax.data.tfds import read_tfds, tfds_places
from headsteer_jax.errors import HeadSteerError


def _path_places(config: DataConfig) -> list[Path]:
    return [Path(os.path.expanduser(config.path))] if config.path else []


class Source(NamedTuple):
    """A kind of dataset that `data.source` can name."""

    load: Callable[[DataConfig, int, int], Dataset]  # (config, seed, the most MiB of a split in memory)
    required: str = ""  # the field of config.data that it cannot do without
    places: Callable[[DataConfig], list[Path]] = _path_places  # see `data_places`


def check_source(config: DataConfig) -> None:
    """Check, before anything is written, that the source exists and that the config has the field that it needs.

    Raises:
      HeadSteerError: there is no such source, or the field is empty.
    """
    if config.source not in SOURCES:
        raise HeadSteerError(f"config.data.source = {config.source!r}: must be one of {', '.join(SOURCES)}")
    required = SOURCES[config.source].required
    if required and not getattr(config, required):
        raise HeadSteerError(
            f"config.data.{required} = '': must be the dataset's {required}, because data.source is {config.source!r}"
        )


def data_places(config: DataConfig) -> list[Path]:
    """Return the files and directories that hold the dataset, in which nothing may be written.

    They need not exist. Only the names of directories are read.

    Raises:
      HeadSteerError: there is no such source, the config lacks a field that it needs, or a directory is not readable.
    """
    check_source(config)
    return SOURCES[config.source].places(config)


def load_dataset(config: DataConfig, seed: int, memory: int = 4096) -> Dataset:
    """Load the dataset of a config.

    Args:
      seed: it determines everything random.
      memory: the most MiB that a split takes when it is decoded; a larger one stays lazy. The images of an npz file are
        always in memory.

    Raises:
      HeadSteerError: the data are missing, unreadable or inconsistent.
    """
    check_source(config)
    try:
        dataset = SOURCES[config.source].load(config, seed, memory)
    except OSError as error:  # an error that a reader did not expect; otherwise the workdir would be blamed
        culprit = normalise_name(str(error.filename or config.path or config.source))
        reason = error.strerror or str(error) or type(error).__name__
        raise HeadSteerError(f"{culprit}: the data cannot be read ({reason}); make them readable") from error
    groups = related_pairs(config.related, dataset.class_names) if config.related else dataset.related
    return replace(dataset, related=groups)


def cut_dataset(read: Callable[[DataConfig], RawData], config: DataConfig, seed: int, memory: int) -> Dataset:
    """Read published data and cut what is not published from train; then limit the number of images of each class.

    Images of one common size keep it (`augment.preprocess` resizes on the device); images of several sizes are cropped
    and resized to image_size as they are decoded.

    Raises:
      HeadSteerError: two classes have the same name, a label is not a class, or a class has too few images.
    """
    raw = read(config)
    origin = normalise_name(config.path or config.name)
    class_names = tuple(map(normalise_name, raw.class_names))
    _check_classes(origin, class_names)
    published = {"train": raw.train, "validation": raw.validation, "test": raw.test}
    for name, split in published.items():
        if split is not None:
            _check_labels(f"{origin}: {name}", split.labels, class_names, "add some or drop the class")

    def cut(split: Split, name: str, fraction: float, rng: np.random.Generator) -> tuple[Split, Split]:
        remaining, cut_off = (_select(split, indices) for indices in stratified_cut(split.labels, fraction, rng))
        remedy = "add one to train, which needs two: one is cut off"
        if raw.test is None:
            remedy = "add some to train, which needs three: one each is cut off for validation and test"
        _check_labels(f"{origin}: {name}", cut_off.labels, class_names, remedy)
        return remaining, cut_off

    rng = np.random.default_rng([seed, 0])
    train, validation, test = raw.train, raw.validation, raw.test
    if test is None:
        train, test = cut(train, "test", config.test_fraction, np.random.default_rng([seed, 0, 1]))
    if validation is None:
        train, validation = cut(train, "validation", config.validation_fraction, rng)
    limits = (config.train_per_class, config.eval_per_class, config.eval_per_class)
    limited = [
        _decode_small(_limit(split, limit, len(class_names), rng), memory)
        for split, limit in zip((train, validation, test), limits, strict=True)
    ]
    return Dataset(limited[0], limited[1], limited[2], class_names, raw.related)


def _select(split: Split, indices: np.ndarray) -> Split:
    """Return a split of the images at `indices`, which stay lazy if they are."""
    keys = None if split.keys is None else split.keys[indices]
    return Split(split.images[indices], split.labels[indices].astype(np.int32), keys)


def _limit(split: Split, per_class: int, classes: int, rng: np.random.Generator) -> Split:
    """Draw at most `per_class` images of each class, 0 meaning all; their order stays."""
    members = [rng.permutation(np.flatnonzero(split.labels == label)) for label in range(classes)]
    chosen = np.sort(np.concatenate([of_class[: per_class or None] for of_class in members]))
    if len(chosen) == len(split.labels):  # no copy of images that may take most of the memory
        return replace(split, labels=split.labels.astype(np.int32))
    return _select(split, chosen)


def _decode_small(split: Split, memory: int) -> Split:
    """Decode a split's images if they take at most `memory` MiB."""
    images = split.images
    if isinstance(images, LazyImages) and math.prod(images.shape) <= memory * 2**20:
        return replace(split, images=images.gather(np.arange(len(images))))
    return split


def _check_classes(origin: str, class_names: tuple[str, ...]) -> None:
    """Check that there are several classes and that no two have the same name; raises HeadSteerError otherwise."""
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise HeadSteerError(f"{origin}: two classes are named {repeated[0]!r}; give each class its own name")
    if len(class_names) < 2:
        raise HeadSteerError(
            f"{origin}: {class_names[0]!r} is the only class; a classifier needs at least two, each with its images"
        )


def _check_labels(split: str, labels: np.ndarray, class_names: tuple[str, ...], remedy: str) -> None:
    """Check that every label is a class and that every class has an image.

    Args:
      split: the name of the data and the split, for the error.
      remedy: what to do about a class without images.

    Raises:
      HeadSteerError: a label is not a class, or a class has no image.
    """
    wrong = labels[(labels < 0) | (labels >= len(class_names))]
    if wrong.size:
        raise HeadSteerError(f"{split}: label {wrong[0]} is none of the {len(class_names)} classes; correct the labels")
    absent = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if absent.size:
        raise HeadSteerError(f"{split}: there is no image of class {class_names[absent[0]]!r}; {remedy}")


SOURCES = {
    "double_digits": Source(lambda config, seed, memory: double_digits(config, seed)),
    "tfds": Source(functools.partial(cut_dataset, read_tfds), required="name", places=tfds_places),
    "folder": Source(functools.partial(cut_dataset, read_folder), required="path", places=folder_places),
    "npz": Source(functools.partial(cut_dataset, read_npz), required="path"),
}
