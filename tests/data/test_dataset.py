"""The description of a dataset's content, and how a change of it is named."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headsteer_jax.data.dataset import (
    Dataset,
    LazyImages,
    Split,
    describe_data,
    describe_data_change,
    hash_data,
    image_keys,
)

NAMES = ("cat", "dog", "owl")


def make_split(per_class: int, seed: int, keys: bool = False) -> Split:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(NAMES)), per_class).astype(np.int32)
    images = rng.integers(0, 256, (len(labels), 4, 4, 1), np.uint8)
    return Split(images, labels, rng.integers(0, 2**63, len(labels)).astype(np.uint64) if keys else None)


def make_dataset(keys: bool = False) -> Dataset:
    return Dataset(make_split(5, 0, keys), make_split(2, 1, keys), make_split(3, 2, keys), NAMES)


def select(split: Split, indices: Any) -> Split:
    return Split(split.images[indices], split.labels[indices], None if split.keys is None else split.keys[indices])


def change(before: Dataset, now: Dataset) -> str:
    return describe_data_change(describe_data(before), describe_data(now))


@pytest.mark.parametrize("keys", [False, True])
def test_the_same_data_have_the_same_description(keys: bool) -> None:
    assert change(make_dataset(keys), make_dataset(keys)) == ""
    description = describe_data(make_dataset(keys))
    assert description["classes"] == list(NAMES)
    assert description["image"] == [4, 4, 1]
    assert description["validation"]["images"] == [2, 2, 2]
    assert hash_data(make_dataset(keys)) == hash_data(make_dataset(keys))


def test_images_that_are_decoded_when_needed_have_the_description_of_those_in_memory() -> None:
    dataset = make_dataset()

    def lazy(split: Split) -> Split:
        images = LazyImages(lambda places: (split.images[i] for i in places), np.arange(len(split.labels)), (4, 4, 1))
        return Split(images, split.labels)

    assert describe_data(replace(dataset, train=lazy(dataset.train))) == describe_data(dataset)


def test_keys_are_used_instead_of_pixels() -> None:
    split = make_split(5, 0, keys=True)
    np.testing.assert_array_equal(image_keys(split), split.keys)
    dataset = make_dataset(keys=True)
    assert change(dataset, replace(dataset, train=replace(dataset.train, images=dataset.train.images + 1))) == ""


def test_a_renamed_class() -> None:
    """Sorted by name, the classes are then in another order, and the labels are others."""
    before, order = make_dataset(), np.array([2, 0, 1])  # cat -> zebra: dog, owl, zebra

    def relabel(split: Split) -> Split:
        return Split(split.images, order[split.labels].astype(np.int32))

    now = Dataset(*(relabel(s) for s in (before.train, before.validation, before.test)), ("dog", "owl", "zebra"))
    assert change(before, now) == "class 'cat' is now 'zebra'"


def test_classes_in_another_order() -> None:
    before = make_dataset()
    now = replace(before, class_names=("dog", "cat", "owl"))
    assert change(before, now).startswith("the classes are in another order")


def test_new_and_missing_classes() -> None:
    before = describe_data(make_dataset())
    now = {**before, "classes": [*NAMES[:2], "emu", "fox", "hen"]}
    for split in ("train", "validation", "test"):
        now[split] = {
            "images": [*before[split]["images"][:2], 1, 1, 1],
            "hashes": [*before[split]["hashes"][:2], *"abc"],
        }
    assert describe_data_change(before, now) == (
        "class 'owl' is gone; class 'emu' is new; class 'fox' is new; class 'hen' is new"
    )
    many = {**now, "classes": [*NAMES[:2], *"abcdefg"]}
    for split in ("train", "validation", "test"):
        many[split] = {"images": [1] * 9, "hashes": [*before[split]["hashes"][:2], *"abcdefg"]}
    assert "; 4 more classes differ" in describe_data_change(before, many)


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        (np.delete(np.arange(15), 7), "1 image fewer in train (class 'dog')"),
        (np.delete(np.arange(15), [0, 7, 8]), "3 images fewer in train (2 of 3 classes)"),
        (np.sort(np.append(np.arange(15), 14)), "1 image more in train (class 'owl')"),
        (np.where(np.arange(15) == 3, 4, np.arange(15)), "other images in train (class 'cat')"),
        (np.array([1, 0, *range(2, 15)]), "other images in train (class 'cat')"),  # in another order
    ],
)
@pytest.mark.parametrize("keys", [False, True])
def test_images_more_fewer_or_others(kept: np.ndarray, text: str, keys: bool) -> None:
    before = make_dataset(keys)
    now = replace(before, train=select(before.train, kept))
    assert change(before, now) == text
    assert hash_data(before) != hash_data(now)


def test_images_of_another_size() -> None:
    before = make_dataset(keys=True)
    now = replace(before, train=replace(before.train, images=np.zeros((15, 8, 4, 3), np.uint8)))
    assert change(before, now) == "images were 4x4x1, now 8x4x3"


@given(st.integers(0, 14), st.integers(0, 15), st.integers(1, 255))
def test_one_changed_pixel_is_found(image: int, pixel: int, difference: int) -> None:
    before, images = make_dataset(), make_dataset().train.images.copy()
    images.reshape(15, 16)[image, pixel] ^= np.uint8(difference)
    now = replace(before, train=replace(before.train, images=images))
    assert change(before, now) == f"other images in train (class {NAMES[image // 5]!r})"


def test_two_images_change_places_between_splits() -> None:
    """The sizes stay, the membership does not: a validation image was trained on."""
    before = make_dataset(keys=True)
    train, validation = before.train.keys.copy(), before.validation.keys.copy()
    train[0], validation[0] = before.validation.keys[0], before.train.keys[0]
    now = replace(
        before, train=replace(before.train, keys=train), validation=replace(before.validation, keys=validation)
    )
    assert change(before, now) == "other images in train (class 'cat'); other images in validation (class 'cat')"
