"""Images and labels: a `Dataset` of three splits, from any source."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
      verify: returns what is wrong with the images at places in the source, in order; an empty string if an image
        is intact. Without it, images are decoded to find out.
    """

    _threads = ThreadPoolExecutor(os.cpu_count())  # shared by all splits: as many decoders as cores

    def __init__(
        self,
        decode: Callable[[list[int]], Iterable[np.ndarray]],
        places: np.ndarray,
        shape: tuple[int, int, int],
        verify: Callable[[list[int]], Iterable[str]] | None = None,
    ) -> None:
        self._decode, self._places, self._verify = decode, places, verify
        self.shape = (len(places), *shape)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, indices: np.ndarray) -> "LazyImages":
        """Select the images at `indices` [M], without decoding them."""
        return LazyImages(self._decode, self._places[indices], self.shape[1:], self._verify)

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

    def find_faults(self, indices: np.ndarray) -> list[str]:
        """Check, in threads, that the images at `indices` [M] are intact; return a line for each that is not."""

        def check(places: np.ndarray) -> list[str]:
            if self._verify is not None:
                return [fault for fault in self._verify(places.tolist()) if fault]
            faults = []
            for place in places.tolist():
                try:
                    list(self._decode([place]))
                except HeadSteerError as error:
                    faults.append(str(error))
            return faults

        pieces = np.array_split(self._places[indices], os.cpu_count() or 1)
        return [fault for faults in self._threads.map(check, pieces) for fault in faults]


@dataclass(frozen=True)
class Split:
    """The images of a split and their classes."""

    images: np.ndarray | LazyImages  # [N, height, width, channels] uint8; `gather_images` reads both
    labels: np.ndarray  # [N] int32, in [0, C)
    keys: np.ndarray | None = None
    """[N] uint64: a hash of each image's name and size, or of its content. If a source gives none, the fingerprint
    hashes the pixels."""


SPLITS = ("train", "validation", "test")


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
    """Check that names are classes of the dataset and that none is repeated.

    Args:
      field: the config's field that has the names, for the error.

    Raises:
      HeadSteerError: a name occurs twice, or it is not a class of the dataset.
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


SHOWN_CHANGES = 4  # the most changes of classes that are listed


def sha256_of(*parts: Any) -> str:
    """Compute the SHA-256 of arrays' bits and of values in JSON, as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else json.dumps(part).encode())
    return digest.hexdigest()


def image_keys(split: Split) -> np.ndarray:
    """Return a hash of each image [N] uint64: the source's, or one of the pixels."""
    if split.keys is not None:
        return split.keys
    hashes = (
        hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest()
        for start in range(0, len(split.labels), 1000)
        for image in gather_images(split.images, np.arange(start, min(start + 1000, len(split.labels))))
    )
    return np.frombuffer(b"".join(hashes), np.uint64)


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Describe a dataset's content, in JSON's types, so that any change of it can be found and named.

    Returns:
      `classes`, the names in order; `image`, the shape of an image as it is stored; and for each split the number of
      images of each class and a hash of them, in order.
    """
    description: dict[str, Any] = {"classes": list(dataset.class_names), "image": list(dataset.train.images.shape[1:])}
    for name in SPLITS:
        split: Split = getattr(dataset, name)
        keys, of_class = image_keys(split), [np.flatnonzero(split.labels == c) for c in range(len(dataset.class_names))]
        description[name] = {
            "images": [len(members) for members in of_class],
            "hashes": [sha256_of(keys[members])[:12] for members in of_class],
        }
    return description


def hash_data(dataset: Dataset) -> str:
    """Hash a dataset's content: `hash_description` of its description."""
    return hash_description(describe_data(dataset))


def hash_description(description: Mapping[str, Any]) -> str:
    """Hash the description of a dataset (`describe_data`): 16 hexadecimal digits."""
    return sha256_of(description)[:16]


def describe_data_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how the data of two descriptions (`describe_data`) differ; an empty string if they are equal.

    The text names classes that were renamed, are new or are gone, and for each split how many images it has more or
    fewer, or that it has as many images as before but others.
    """
    renamed = _match_renamed_classes(before, now)
    gone = [name for name in before["classes"] if name not in now["classes"] and name not in renamed]
    new = [name for name in now["classes"] if name not in before["classes"] and name not in renamed.values()]
    changes = [f"class {old!r} is now {name!r}" for old, name in renamed.items()]
    changes += [f"class {name!r} is gone" for name in gone] + [f"class {name!r} is new" for name in new]
    if not changes and before["classes"] != now["classes"]:
        changes = ["the classes are in another order"]
    if len(changes) > SHOWN_CHANGES:
        changes[SHOWN_CHANGES:] = [f"{len(changes) - SHOWN_CHANGES} more classes differ"]
    if before["image"] != now["image"]:
        changes.append(f"images were {'x'.join(map(str, before['image']))}, now {'x'.join(map(str, now['image']))}")
    common = [(name, renamed.get(name, name)) for name in before["classes"] if name not in gone]
    return "; ".join(changes + [change for split in SPLITS if (change := _describe_split(split, before, now, common))])


def _match_renamed_classes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Match classes that are gone with new ones that have the same training images, or that are the only ones."""
    gone, new = ([n for n in a["classes"] if n not in b["classes"]] for a, b in ((before, now), (now, before)))
    if len(gone) == len(new) == 1:
        return {gone[0]: new[0]}
    hashes = {now["train"]["hashes"][now["classes"].index(name)]: name for name in new}
    old_hashes = {name: before["train"]["hashes"][before["classes"].index(name)] for name in gone}
    return {name: hashes[text] for name, text in old_hashes.items() if text in hashes}


def _describe_split(
    split: str, before: Mapping[str, Any], now: Mapping[str, Any], common: Sequence[tuple[str, str]]
) -> str:
    """Say how a split differs in the classes that both descriptions have, given by their names before and now."""
    more, touched = 0, []
    for old_name, name in common:
        old, new = before["classes"].index(old_name), now["classes"].index(name)
        more += now[split]["images"][new] - before[split]["images"][old]
        if now[split]["hashes"][new] != before[split]["hashes"][old]:
            touched.append(name)
    if not touched:
        return ""
    classes = f"class {touched[0]!r}" if len(touched) == 1 else f"{len(touched)} of {len(common)} classes"
    if not more:
        return f"other images in {split} ({classes})"
    return f"{abs(more)} image{'s' * (abs(more) > 1)} {'more' if more > 0 else 'fewer'} in {split} ({classes})"
