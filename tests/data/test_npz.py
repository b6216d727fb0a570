"""The source npz: arrays as their makers name and shape them, and one line for what cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import CLASSES, TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, number_of, write_npz

from headsteer_jax.config import DataConfig
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError


def load(path: Path, **fields: Any) -> Dataset:
    colour = {"image_size": 8, "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3, "validation_fraction": 0.2}
    return load_dataset(DataConfig(source="npz", path=str(path), **(colour | fields)), seed=0)


def refused(path: Path, *parts: object, **fields: Any) -> None:
    with pytest.raises(HeadSteerError) as error:
        load(path, **fields)
    assert len(str(error.value).splitlines()) == 1
    for part in (path, *parts):
        assert str(part) in str(error.value)


def check_labels(dataset: Dataset) -> None:
    """Check every image's label, also those of the published validation split, which is test's."""
    labels = dict(enumerate(TRAIN_LABELS)) | {500 + number: label for number, label in enumerate(TEST_LABELS)}
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split.labels.dtype == np.int32
        assert [labels[number] for number in number_of(split.images)] == split.labels.tolist()


# labels


ONE_HOT = np.eye(3)


@pytest.mark.parametrize(
    "convert",
    [
        lambda labels: labels[:, None],  # MedMNIST and Keras
        lambda labels: labels[:, None].astype(np.uint8),
        lambda labels: labels[:, None, None],
        lambda labels: labels.astype(np.uint64),
        lambda labels: labels.astype(np.float32),
        lambda labels: labels[:, None].astype(np.float64),
        lambda labels: ONE_HOT[labels],
        lambda labels: ONE_HOT[labels].astype(bool),
    ],
)
def test_labels_are_read_as_what_they_mean(convert: Any, tmp_path: Path) -> None:
    check_labels(load(write_npz(tmp_path, train_labels=convert(TRAIN_LABELS), test_labels=convert(TEST_LABELS))))


def test_labels_may_be_booleans(tmp_path: Path) -> None:
    path = write_npz(tmp_path, train_labels=TRAIN_LABELS > 0, test_labels=TEST_LABELS > 0, class_names=None)
    dataset = load(path)
    assert dataset.class_names == ("0", "1")
    np.testing.assert_array_equal(dataset.test.labels, TEST_LABELS > 0)


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (ONE_HOT[TRAIN_LABELS] + ONE_HOT[(TRAIN_LABELS + 1) % 3], ["[30, 3]", "several labels of one image"]),
        (np.array(CLASSES)[TRAIN_LABELS], ["<U3", "integers"]),
        (TRAIN_LABELS + 1j, ["complex128"]),
        (np.where(TRAIN_LABELS, np.nan, 1.0), ["float64", "not whole"]),
        (np.full(30, 2**64 - 1, np.uint64), ["label"]),
        (np.zeros((30, 0)), ["[30, 0]"]),
        (np.zeros((30, 2, 2), int), ["[30, 2, 2]"]),
        (np.int64(3), ["int64 []"]),
        (np.array([None] * 30), ["pickled"]),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: np.ndarray, parts: list[str], tmp_path: Path) -> None:
    refused(write_npz(tmp_path, train_labels=labels), *parts)


# class names


@pytest.mark.parametrize(
    "names",
    [
        np.array([b"ant", "b\u00e9e".encode(), b"cat"]),
        np.array(["ant", "be\u0301e", "cat"]),
        np.array([["ant"], ["b\u00e9e"], ["cat"]]),
    ],
)
def test_class_names_may_be_bytes_and_of_any_unicode_form(names: np.ndarray, tmp_path: Path) -> None:
    assert load(write_npz(tmp_path, class_names=names)).class_names == ("ant", "b\u00e9e", "cat")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (np.array([b"ant", b"\xff", b"cat"]), ()),
        (np.array(["be\u0301e", "b\u00e9e", "cat"]), ("two classes are named 'b\u00e9e'",)),
        (np.array(["ant", "bee"]), ("label 2 is none of the 2 classes",)),
        (np.array(["ant"]), ("the only class",)),
        (np.array([1.5, 2.5, 3.5]), ("class_names is float64 [3]", "strings")),
        (np.array(["ant", None, "cat"]), ("class_names", "pickled")),
    ],
)
def test_class_names_must_fit_the_labels(names: np.ndarray, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = write_npz(tmp_path, class_names=names)
    if parts:
        refused(path, *parts)
    else:
        assert load(path).class_names == ("ant", "\\xff", "cat")


def test_one_class_is_refused_at_the_start(tmp_path: Path) -> None:
    path = write_npz(tmp_path, train_labels=TRAIN_LABELS * 0, test_labels=TEST_LABELS * 0, class_names=None)
    refused(path, "'0' is the only class", "at least two")


# splits


def test_the_makers_own_validation_is_used(tmp_path: Path) -> None:
    path = write_npz(tmp_path, val_images=TEST, val_labels=TEST_LABELS[:, None].astype(np.uint8))
    dataset = load(path, eval_per_class=2)
    check_labels(dataset)
    assert len(dataset.train.labels) == 30
    assert set(number_of(dataset.validation.images)) <= set(range(500, 509))
    assert len(dataset.validation.labels) == len(dataset.test.labels) == 6
    assert len(load(path, splits=("train", "test")).validation.labels) == 6


def test_keras_names(tmp_path: Path) -> None:
    path = tmp_path / "keras.npz"
    np.savez(path, x_train=TRAIN, y_train=TRAIN_LABELS[:, None], X_test=TEST, Y_test=TEST_LABELS[:, None])
    dataset = load(path)
    check_labels(dataset)
    assert dataset.class_names == ("0", "1", "2")


@pytest.mark.parametrize(("labels", "reason"), [(None, "no array 'test_labels'"), (TEST_LABELS * 0 - 1, "label is -1")])
def test_a_test_split_without_labels_is_passed_over(
    labels: np.ndarray | None, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "headsteer_jax")
    path = write_npz(tmp_path, valid_images=TEST, valid_labels=TEST_LABELS, test_labels=labels)
    dataset = load(path)
    check_labels(dataset)
    assert len(dataset.test.labels) == 9
    assert len(dataset.validation.labels) == 6
    assert "test from 'valid'; 'test' is passed over (" in caplog.text
    assert reason in caplog.text
    refused(path, "'test'", reason, splits=("train", "test"))


def test_one_split_is_cut(tmp_path: Path) -> None:
    path = write_npz(tmp_path, test_images=None, test_labels=None)
    refused(path, "--config.data.splits=train")
    dataset = load(path, splits=("train",), test_fraction=0.3)
    check_labels(dataset)
    counts = [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)]
    assert counts == [18, 3, 9]
    assert (
        len(set(np.concatenate([number_of(s.images) for s in (dataset.train, dataset.validation, dataset.test)]))) == 30
    )


def test_other_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, images=TRAIN, labels=TRAIN_LABELS)
    refused(path, "no array 'train_images'", "it holds images, labels")


# images


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float32])
def test_whole_numbers_from_0_to_255_are_pixels(dtype: type, tmp_path: Path) -> None:
    check_labels(load(write_npz(tmp_path, train_images=TRAIN.astype(dtype), test_images=TEST.astype(dtype))))


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        (TRAIN.transpose(0, 3, 1, 2), ["[30, 3, 6, 7]", "channels come before", "images.transpose(0, 2, 3, 1)"]),
        (TRAIN[:, None, :, :, 0], ["[30, 1, 6, 7]", "channels come before"]),
        (TRAIN / np.float32(255), ["float32", "from 0 to 1", "(255 * images).round().astype('uint8')"]),
        (TRAIN + 0.25, ["from 0.25 to 255.25", "from 0 to 255"]),
        (TRAIN * 0.5, ["float64", "images.round().astype('uint8')"]),
        (TRAIN.astype(np.int16) - 128, ["int16", "from -128 to 127"]),
        (TRAIN.astype(np.uint16) * 257, ["uint16", "from 0 to 65535"]),
        (TRAIN > 127, ["bool", "(255 * images)"]),
        (np.where(TRAIN > 9, np.nan, 3.0), ["float64", "nan"]),
        (TRAIN.reshape(30, -1), ["[30, 126]", "[N, height, width]"]),
        (np.concatenate([TRAIN, TRAIN[..., :1]], axis=3), ["[30, 6, 7, 4]"]),
        (np.zeros((30, 28, 28, 28), np.uint8), ["[30, 28, 28, 28]"]),
        (np.array(["a"] * 30), ["<U1"]),
    ],
)
def test_images_that_are_no_bytes_are_refused_with_a_remedy(
    images: np.ndarray, parts: list[str], tmp_path: Path
) -> None:
    refused(write_npz(tmp_path, train_images=images), "train_images", *parts)


def test_a_directory_is_called_what_it_is(tmp_path: Path) -> None:
    refused(tmp_path, "a directory", "--config.data.source=folder")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npz(tmp_path)
    check_labels(load(Path("~/set.npz")))
