"""The source npz: one file with the images and labels of every split, under the names of NumPy, MedMNIST or Keras."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from headsteer_jax.config.schema import DataConfig
from headsteer_jax.data.dataset import Split
from headsteer_jax.data.names import normalise_name
from headsteer_jax.data.splits import RawData, choose_splits
from headsteer_jax.errors import HeadSteerError, explain_errors

LAYOUTS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"))  # of the arrays' names; the second one is Keras's
CHANNELS = (1, 3)


def read_npz(config: DataConfig) -> RawData:
    """Read an npz file of images and labels.

    It holds <split>_images, uint8 [N, h, w] or [N, h, w, 1 or 3], <split>_labels, integers [N], and optionally
    class_names; or x_<split> and y_<split>.

    Raises:
      HeadSteerError: an array is missing, damaged, or of another type or shape.
    """
    path = Path(os.path.expanduser(config.path))
    origin = normalise_name(str(path))
    if path.is_dir():
        raise HeadSteerError(
            f"{origin}: a directory; set config.data.path to a .npz file, or pass --config.data.source=folder to read "
            "a directory of images"
        )
    with (
        explain_errors(origin, "set config.data.path to a readable .npz file"),
        np.load(path, allow_pickle=False) as file,
    ):
        keys = _find_splits(file.files)
        labels = {name: _read_labels(origin, file, *pair) for name, pair in keys.items()}
        unlabelled = {
            name: f"there is no array {keys[name][1]!r}" if split_labels is None else "every label is -1"
            for name, split_labels in labels.items()
            if split_labels is None or (split_labels.size and np.all(split_labels == -1))
        }
        if not keys:
            held = ", ".join(map(normalise_name, file.files)) or "none"
            raise HeadSteerError(f"{origin}: there is no array 'train_images'; it holds {held}")
        names = choose_splits(origin, [name for name in keys if name not in unlabelled], unlabelled, config.splits)

        def read(name: str) -> Split | None:
            if not name:
                return None
            images = _read_images(origin, keys[name][0], read_array(origin, file, keys[name][0]), config.channels)
            labels_N = clean_labels(f"{origin}: {keys[name][1]}", labels[name], len(images))
            return Split(images, labels_N)

        train, validation, test = map(read, names)
        assert train is not None
        return RawData(train, test, _read_class_names(origin, file, train.labels), validation=validation)


def read_array(origin: str, file: Any, key: str) -> np.ndarray:
    """Read an array of an npz file; raises HeadSteerError if it is damaged or holds pickled objects."""
    with explain_errors(f"{origin}: array {key!r}", "write the file again without pickled objects"):
        return np.asarray(file[key])


def _find_splits(keys: list[str]) -> dict[str, tuple[str, str]]:
    """Find the names of the splits in a file, and the names of their arrays of images and labels."""
    by_case = {key.casefold(): key for key in keys}
    splits: dict[str, tuple[str, str]] = {}
    for images, labels in LAYOUTS:
        before, after = images.split("{}")
        for key in keys:
            if key.casefold().startswith(before) and key.casefold().endswith(after):
                name = key[len(before) : len(key) - len(after)]
                labels_key = labels.format(name)
                splits.setdefault(name, (key, by_case.get(labels_key.casefold(), labels_key)))
    return splits


def _read_labels(origin: str, file: Any, images_key: str, labels_key: str) -> np.ndarray | None:
    """Read a split's labels as they are; None if there are none."""
    return read_array(origin, file, labels_key) if labels_key in file else None


def clean_labels(culprit: str, labels: np.ndarray | None, count: int) -> np.ndarray:
    """Convert labels to integers [N]: [N, 1], whole floats, booleans and one-hot rows are accepted.

    Raises:
      HeadSteerError: they are not one class for each of `count` images.
    """
    assert labels is not None
    shown = f"{culprit} is {labels.dtype} {list(labels.shape)}; it should be integers [{count}], one for each image"
    if labels.ndim > 1 and labels.size == labels.shape[0] == count:  # [N, 1], as MedMNIST and Keras have it
        labels = labels.reshape(-1)
    if labels.dtype.kind not in "iufb" or labels.shape[:1] != (count,) or labels.ndim > 2:
        raise HeadSteerError(shown)
    if labels.dtype.kind == "f" and not np.all(np.isfinite(labels) & (labels == np.round(labels))):
        raise HeadSteerError(f"{shown}, and these are not whole numbers")
    if labels.ndim == 2:
        if labels.shape[1] == 0 or not np.all((labels == 0) | (labels == 1)) or not np.all(labels.sum(1) == 1):
            raise HeadSteerError(f"{shown}; several labels of one image cannot be used")
        labels = labels.argmax(1)
    return labels.astype(np.int64)


def _read_images(origin: str, key: str, images: np.ndarray, channels: int) -> np.ndarray:
    """Check an array of images and convert it to [N, height, width, channels] uint8."""
    shown = f"{origin}: {key} is {images.dtype} {list(images.shape)}"
    expected = "it should be uint8 [N, height, width] or [N, height, width, 1 or 3]"
    if not images.size or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in CHANNELS):
        if images.ndim == 4 and images.shape[1] in CHANNELS:
            raise HeadSteerError(
                f"{shown}: the channels come before the pixels; {expected}: use images.transpose(0, 2, 3, 1)"
            )
        raise HeadSteerError(f"{shown}; {expected}")
    if images.dtype != np.uint8:
        images = _convert_to_bytes(images, shown, expected)
    images = images.reshape(*images.shape[:3], -1)
    if channels < images.shape[3]:
        return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    return np.repeat(images, channels, axis=3) if channels > images.shape[3] else images


def _convert_to_bytes(images: np.ndarray, shown: str, expected: str) -> np.ndarray:
    """Convert pixels of another type that are whole numbers from 0 to 255, and not all of them 0 and 1."""
    if images.dtype.kind not in "iufb":
        raise HeadSteerError(f"{shown}; {expected}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 255):
        raise HeadSteerError(f"{shown}, with values from {low:g} to {high:g}; {expected}, from 0 to 255")
    remedy = ""
    if high <= 1:
        remedy = "(255 * images).round().astype('uint8')"
    elif images.dtype.kind == "f" and not np.array_equal(images, np.round(images)):
        remedy = "images.round().astype('uint8')"
    if remedy:
        raise HeadSteerError(f"{shown}, with values from {low:g} to {high:g}; {expected}: use {remedy}")
    return images.astype(np.uint8)


def _read_class_names(origin: str, file: Mapping[str, Any], labels: np.ndarray) -> tuple[str, ...]:
    """Read the array class_names, of strings or of bytes in UTF-8; without it classes are named by their numbers."""
    if "class_names" in file:
        names = read_array(origin, file, "class_names")
        if names.dtype.kind in "US" or names.dtype.kind in "iu":
            return tuple(
                normalise_name(name if isinstance(name, bytes) else str(name)) for name in names.ravel().tolist()
            )
        raise HeadSteerError(f"{origin}: class_names is {names.dtype} {list(names.shape)}; it should be strings [C]")
    # Every class has an image, so a label above the number of images is wrong and must not create so many names.
    classes = min(labels.max() + 1, len(labels))
    return tuple(map(str, range(classes)))
