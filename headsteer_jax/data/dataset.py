"""Images and labels: a `Dataset` of three splits, from any source."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from headsteer_jax.errors import HeadSteerError


class LazyImages:
    """Images [N, height, width, channels] uint8 that are decoded, in threads, each time they are needed.

    Args:
      decode: returns the images at places in the source, in order.
      places: [N] the places of these images in the source.
      shape: (height, width, channels).
    """

    _threads = ThreadPoolExecutor(os.cpu_count())  # shared by all splits: as many decoders as cores

    def __init__(
        self, decode: Callable[[list[int]], Iterable[np.ndarray]], places: np.ndarray, shape: tuple[int, int, int]
    ) -> None:
        self._decode, self._places = decode, places
        self.shape = (len(places), *shape)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, indices: np.ndarray) -> "LazyImages":
        """Select the images at `indices` [M], without decoding them."""
        return LazyImages(self._decode, self._places[indices], self.shape[1:])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Decode images: [M] indices -> [M, height, width, channels] uint8.

        Raises:
          HeadSteerError: an image cannot be read; the message names it.
        """
        places = self._places[indices]
        images = np.empty((len(places), *self.shape[1:]), np.uint8)

        def fill(rows: np.ndarray) -> None:
            for row, image in zip(rows, self._decode(places[rows].tolist()), strict=True):
                images[row] = image

        pieces = max(os.cpu_count() or 1, len(places) // 256)
        for _ in self._threads.map(fill, np.array_split(np.arange(len(places)), pieces)):
            pass  # the loop raises the threads' errors
        return images


@dataclass(frozen=True)
class Split:
    """The images of a split and their classes."""

    images: np.ndarray | LazyImages  # [N, height, width, channels] uint8; `gather_images` reads both
    labels: np.ndarray  # [N] int32, in [0, C)


@dataclass(frozen=True)
class Dataset:
    """Three splits of labelled images that share no image."""

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    related: np.ndarray | None = None  # [C, C] bool: pairs of classes that are known to be alike; None if unknown


def stratified_cut(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut off a fraction of each class, at least one image and never all of them.

    Returns:
      The indices of the images that stay and of those that are cut off, both ascending.
    """
    cut = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    cut_indices = np.sort(np.concatenate(cut))
    return np.setdiff1d(np.arange(len(labels)), cut_indices), cut_indices


def related_pairs(groups: Sequence[str], class_names: tuple[str, ...]) -> np.ndarray:
    r"""Find the pairs of different classes that are in a common group `name=class|class|...` -> [C, C] bool, symmetric.

    In names, a backslash before `|`, `=` or another backslash stands for that character itself.

    Raises:
      HeadSteerError: a group is not of this form, or it names a class twice or one that the dataset does not have.
    """
    pairs = np.zeros((len(class_names), len(class_names)), bool)
    for group in groups:
        name, *members = _split_group(group)
        names = [member if member in class_names else member.strip() for member in members]
        if len(names) < 2:
            raise HeadSteerError(
                f"config.data.related: {group!r}: a group must have the form `name=class|class|...`, "
                "with two or more classes"
            )
        check_classes(f"config.data.related: {name}", names, class_names)
        places = [class_names.index(member) for member in names]
        pairs[np.ix_(places, places)] = True
    return pairs & ~np.eye(len(class_names), dtype=bool)


def _split_group(group: str) -> list[str]:
    """Split a group at its first `=` and, after that, at every `|`, except at those behind a backslash."""
    parts = [""]
    for token in re.findall(r"\\[\\|=]|.", group, re.DOTALL):
        if token == ("=" if len(parts) == 1 else "|"):
            parts.append("")
        else:
            parts[-1] += token[-1]
    return parts


def check_classes(field: str, names: Sequence[str], class_names: tuple[str, ...]) -> None:
    """Check that names are classes of the dataset, none twice.

    Args:
      field: the config's field that has the names, for the error.

    Raises:
      HeadSteerError: a name occurs twice, or it is no class of the dataset.
    """
    for name in names:
        if name not in class_names:
            close = difflib.get_close_matches(name, class_names, n=1)
            advice = (
                f"did you mean {close[0]!r}?"
                if close
                else f"it has {', '.join(class_names[:8])}{', ...' * (len(class_names) > 8)}"
            )
            raise HeadSteerError(f"{field}: the dataset has no class {name!r}; {advice}")
        if list(names).count(name) > 1:
            raise HeadSteerError(f"{field}: {name!r} is named twice; name it once")


def gather_images(images: np.ndarray | LazyImages, indices: np.ndarray) -> np.ndarray:
    """Return the images at indices [M] as [M, height, width, channels] uint8, decoded if they are lazy."""
    return images[indices] if isinstance(images, np.ndarray) else images.gather(indices)


SAMPLED_IMAGES = 16  # of a split, which are decoded for its fingerprint


def sha256_of(*parts: Any) -> str:
    """Compute the SHA-256 of arrays' bits and of values in JSON, as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else json.dumps(part).encode())
    return digest.hexdigest()


def fingerprint_dataset(dataset: Dataset) -> str:
    """Hash the labels and a few images of each split, to find out whether two hosts read the same data."""
    parts: list[Any] = [list(dataset.class_names)]
    for split in (dataset.train, dataset.validation, dataset.test):
        sample = np.linspace(0, len(split.labels) - 1, SAMPLED_IMAGES).astype(int)
        parts += [list(split.images.shape), split.labels.astype(np.int64), gather_images(split.images, sample)]
    return sha256_of(*parts)[:16]
