"""The data: splits share no image, every source is read right, and every bad input gives one line."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from dataset_files import (
    CLASSES,
    IMAGE,
    LABEL,
    TEST,
    TEST_LABELS,
    TRAIN,
    TRAIN_LABELS,
    feature,
    number_of,
    numbered,
    png,
    write_folder,
    write_npz,
    write_tfds,
)
from etils import epath
from helpers import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headsteer_jax.config import Config, DataConfig
from headsteer_jax.data import tfds as tfds_source
from headsteer_jax.data.batches import batch_indices, prefetch
from headsteer_jax.data.dataset import Dataset, LazyImages, Split, gather_images, related_pairs, stratified_cut
from headsteer_jax.data.sources import SOURCES, Source, check_source, load_dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.stages import run_stages


def config(source: str, path: str | Path, **fields: Any) -> DataConfig:
    defaults: dict[str, Any] = {
        "image_size": 8,
        "channels": 3,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "validation_fraction": 0.2,
    }
    return DataConfig(**({"source": source, "path": str(path)} | defaults | fields))


def pixels(split: Split) -> np.ndarray:
    return gather_images(split.images, np.arange(len(split.labels)))


WRITERS: dict[str, Callable[[Path], Path]] = {"npz": write_npz, "folder": write_folder, "tfds": write_tfds}


def one_line(error: pytest.ExceptionInfo[HeadSteerError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# the choice of a source


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"source": "imagenet"},
            "config.data.source = 'imagenet': must be one of double_digits, tfds, folder, npz",
        ),
        (
            {"source": "tfds", "path": "somewhere"},
            "config.data.name = '': must be the dataset's name, because data.source is 'tfds'",
        ),
        (
            {"source": "folder", "name": "somehow"},
            "config.data.path = '': must be the dataset's path, because data.source is 'folder'",
        ),
        ({"source": "npz"}, "config.data.path = '': must be the dataset's path, because data.source is 'npz'"),
    ],
)
def test_a_source_that_cannot_be_is_one_line(fields: dict[str, str], line: str) -> None:
    for check in (check_source, lambda data: load_dataset(data, seed=0)):
        with pytest.raises(HeadSteerError) as error:
            check(DataConfig(**fields))
        assert str(error.value) == line


def test_an_unknown_source_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = Config(data=DataConfig(source="imagenet"))
    with pytest.raises(HeadSteerError, match=r"config\.data\.source = 'imagenet': must be one of double_digits, "):
        run_stages(config, Workdir(epath.Path(tmp_path) / "w"), ("train",), overwrite=False)
    assert not (tmp_path / "w").exists()


def test_an_entry_of_sources_is_all_that_a_new_source_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(TRAIN, TRAIN_LABELS.astype(np.int32))
    dataset = Dataset(split, split, split, CLASSES)
    monkeypatch.setitem(SOURCES, "insects", Source(lambda config, seed, memory: dataset))
    data = DataConfig(source="insects", related=("winged=ant|bee",))
    check_source(data)
    assert load_dataset(data, seed=0).related is not None
    assert load_dataset(DataConfig(source="insects"), seed=0) == dataset


# the cut


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_stratified_cut_takes_its_share_of_each_class(labels_list: list[int], fraction: float, seed: int) -> None:
    labels = np.array(labels_list)
    kept, cut = stratified_cut(labels, fraction, np.random.default_rng(seed))
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, cut])), np.arange(len(labels)))
    for label in set(labels_list):
        members, taken = labels_list.count(label), int((labels[cut] == label).sum())
        assert taken < members
        assert taken == min(max(1, round(fraction * members)), members - 1)
    assert np.all(np.diff(cut) > 0)
    again = stratified_cut(labels, fraction, np.random.default_rng(seed))
    np.testing.assert_array_equal(cut, again[1])


def test_stratified_cut_follows_the_generator() -> None:
    labels = np.zeros(100, int)
    cuts = [stratified_cut(labels, 0.3, np.random.default_rng(seed))[1] for seed in (0, 1)]
    assert set(cuts[0]) != set(cuts[1])


# double digits


def test_no_source_digit_occurs_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source digit is replaced by a pattern that holds its number, so that every pixel can be traced."""
    count = 600
    values = np.arange(count) % 10
    images = np.ones((count, 8, 8))
    for bit in range(10):
        images[:, 1 + bit // 5, bit % 5] = np.where(np.arange(count) >> bit & 1, 16, 4)
    source = type("Source", (), {"images": images, "target": values})
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: source)
    fields = {"image_size": 20, "channels": 1, "mean": (0.0,), "std": (1.0,)}
    dataset = load_dataset(config("double_digits", "", train_per_class=12, eval_per_class=4, **fields), seed=3)

    def digit(columns: np.ndarray) -> int:
        """[20, 8] one digit's columns -> its number."""
        row = np.flatnonzero(columns.any(1))[0]
        bits = columns[row + 1 : row + 3, :5].ravel() > 128
        return int(bits @ 2 ** np.arange(10))

    traced = []
    for split, per_class in ((dataset.train, 12), (dataset.validation, 4), (dataset.test, 4)):
        np.testing.assert_array_equal(np.bincount(split.labels, minlength=100), per_class)
        seen = set()
        for canvas, label in zip(pixels(split)[..., 0], split.labels, strict=True):
            occupied = np.flatnonzero(canvas.any(0))
            left = digit(canvas[:, occupied[0] : occupied[0] + 8])
            right = digit(canvas[:, occupied[-1] - 7 : occupied[-1] + 1])
            assert occupied[-1] - occupied[0] >= 15  # side by side
            assert 10 * values[left] + values[right] == label
            seen |= {left, right}
        traced.append(seen)
    assert all(traced)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not traced[i] & traced[j]


def test_double_digits_relates_classes_that_share_a_digit_at_its_place() -> None:
    fields = {"train_per_class": 1, "eval_per_class": 1, "image_size": 16}
    dataset = load_dataset(config("double_digits", "", **fields), seed=0)
    assert dataset.related is not None
    names = dataset.class_names
    for a in range(0, 100, 7):
        for b in range(100):
            alike = a != b and (names[a][0] == names[b][0] or names[a][1] == names[b][1])
            assert dataset.related[a, b] == alike
    assert dataset.train.images.shape == (100, 16, 16, 3)


def test_double_digits_need_room() -> None:
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("double_digits", "", image_size=15), seed=0)
    one_line(error, "image_size = 15", 16)


# every source


@pytest.fixture(params=list(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    return config(request.param, WRITERS[request.param](tmp_path), name="insects" if request.param == "tfds" else "")


def test_every_image_is_in_one_split_with_its_label(written: DataConfig) -> None:
    dataset = load_dataset(written, seed=0)
    assert dataset.class_names == CLASSES
    assert dataset.related is None
    found = []
    for split in (dataset.train, dataset.validation, dataset.test):
        assert isinstance(split.images, np.ndarray)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        found.append(number_of(split.images))
        source, labels = (TEST, TEST_LABELS) if split is dataset.test else (TRAIN, TRAIN_LABELS)
        rows = found[-1] - number_of(source)[0] if split is dataset.test else found[-1]
        np.testing.assert_array_equal(split.images, source[rows])
        np.testing.assert_array_equal(split.labels, labels[rows])
    np.testing.assert_array_equal(np.sort(np.concatenate(found[:2])), np.arange(30))
    np.testing.assert_array_equal(np.sort(found[2]), np.arange(500, 509))
    np.testing.assert_array_equal(np.bincount(dataset.validation.labels), [2, 2, 2])


def test_limits_take_the_first_of_a_permutation_after_the_cut(written: DataConfig) -> None:
    def numbers(seed: int, **limits: int) -> list[set[int]]:
        dataset = load_dataset(written.model_copy(update=limits), seed)
        for split, limit in ((dataset.train, "train_per_class"), (dataset.validation, "eval_per_class")):
            everything = {8, 2}  # of 10 a class
            assert set(np.bincount(split.labels)) <= (everything if limits.get(limit, 99) == 99 else {limits[limit]})
        parts = (dataset.train, dataset.validation, dataset.test)
        return [set(number_of(pixels(split))) for split in parts]

    everything, few, more = numbers(0), numbers(0, train_per_class=2, eval_per_class=1), numbers(0, train_per_class=5)
    assert [len(part) for part in few] == [6, 3, 3]
    assert few[0] < more[0] < everything[0]  # none of them from validation
    assert few[1] < everything[1] == more[1]
    assert few[2] < everything[2]
    assert numbers(0, train_per_class=2) == numbers(0, train_per_class=2)
    assert numbers(1, train_per_class=2)[0] != few[0]
    assert numbers(1)[1] != everything[1]
    assert numbers(1, eval_per_class=1)[2] != few[2]
    assert len(numbers(0, train_per_class=99)[0]) == 24


def test_channels_follow_the_config(written: DataConfig) -> None:
    grey = load_dataset(written.model_copy(update={"channels": 1}), seed=0)
    colour = load_dataset(written, seed=0)
    assert grey.train.images.shape == (24, 6, 7, 1)
    luma = pixels(colour.train) @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(pixels(grey.train)[..., 0], luma, atol=1)


def test_grey_images_are_repeated_to_three_channels(tmp_path: Path) -> None:
    for train, test in ((TRAIN[..., 0], TEST[..., 0]), (TRAIN[..., :1], TEST[..., :1])):
        dataset = load_dataset(config("npz", write_npz(tmp_path, train_images=train, test_images=test)), seed=0)
        assert dataset.test.images.shape == (9, 6, 7, 3)
        np.testing.assert_array_equal(dataset.test.images, np.stack([TEST[..., 0]] * 3, axis=-1))
    root = write_folder(tmp_path)
    for path in root.glob("*/*/*.PNG"):
        Image.open(path).convert("L").save(path)
    dataset = load_dataset(config("folder", root), seed=0)
    luma = TEST @ np.array([0.299, 0.587, 0.114])
    order = np.argsort(TEST_LABELS, kind="stable")
    np.testing.assert_allclose(pixels(dataset.test), np.stack([luma[order]] * 3, axis=-1), atol=1)


def test_npz_without_class_names(tmp_path: Path) -> None:
    dataset = load_dataset(config("npz", write_npz(tmp_path, class_names=None)), seed=0)
    assert dataset.class_names == ("0", "1", "2")


# lazy images


@pytest.mark.parametrize("source", ["folder", "tfds"])
def test_a_split_above_the_memory_limit_stays_lazy(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "TRAIN", numbered(30, 120, 140))  # 24 of them take 1.2 MB
    monkeypatch.setattr(files, "TEST", numbered(9, 120, 140, start=500))
    monkeypatch.setattr(
        files, "IMAGE", IMAGE | {"image": IMAGE["image"] | {"shape": {"dimensions": ["120", "140", "3"]}}}
    )
    cfg = config(source, WRITERS[source](tmp_path), name="insects" if source == "tfds" else "")
    held, lazy = load_dataset(cfg, seed=0), load_dataset(cfg, seed=0, memory=1)
    assert isinstance(held.train.images, np.ndarray)
    assert isinstance(lazy.test.images, np.ndarray)
    assert isinstance(lazy.train.images, LazyImages)
    assert lazy.train.images.shape == held.train.images.shape
    assert len(lazy.train.images) == 24
    for indices in (np.array([3, 0, 17, 3]), np.arange(24)[::-1], np.array([], int)):
        np.testing.assert_array_equal(
            gather_images(lazy.train.images, indices), gather_images(held.train.images, indices)
        )
    some = lazy.train.images[np.array([5, 2, 9])]
    assert isinstance(some, LazyImages)
    np.testing.assert_array_equal(
        gather_images(some, np.array([2, 0])), gather_images(held.train.images, np.array([9, 5]))
    )


def test_many_images_are_gathered_in_order() -> None:
    lazy = LazyImages(
        lambda places: (np.full((1, 1, 3), place % 251, np.uint8) for place in places), np.arange(3000), (1, 1, 3)
    )
    indices = np.random.default_rng(0).permutation(3000)
    np.testing.assert_array_equal(lazy.gather(indices)[:, 0, 0, 0], indices % 251)


def test_a_damaged_image_is_named_wherever_it_is_decoded(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    bad = root / "train" / "bee" / "001.PNG"
    bad.write_bytes(bad.read_bytes()[:80])  # the header is whole
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("folder", root), seed=0)
    one_line(error, bad, "replace")


# sizes


def test_images_of_several_sizes_are_cropped_and_resized(tmp_path: Path) -> None:
    """Wide, tall and square images with one ramp in the centred square: every one becomes that ramp, shrunk."""
    ramp = np.stack([*np.meshgrid(np.arange(0, 64, 2), np.arange(0, 160, 5), indexing="ij"), np.zeros((32, 32))], -1)
    root = write_folder(tmp_path)
    for number, path in enumerate(sorted(root.glob("*/*/*.PNG"))):
        margin = ((0, 0), (number % 4, number % 4)) if number % 2 else ((number % 4, number % 4), (0, 0))
        Image.fromarray(np.pad(ramp.astype(np.uint8), (*margin, (0, 0)), constant_values=255)).save(path)
    dataset = load_dataset(config("folder", root), seed=0)
    assert dataset.train.images.shape == (24, 8, 8, 3)
    blocks = ramp.reshape(8, 4, 8, 4, 3).mean((1, 3))  # on a ramp every symmetric kernel gives the block's mean
    for split in (dataset.train, dataset.validation, dataset.test):
        np.testing.assert_allclose(
            pixels(split)[:, 2:-2, 2:-2], np.broadcast_to(blocks[2:-2, 2:-2], (len(split.labels), 4, 4, 3)), atol=1
        )


def test_tfds_images_of_unknown_size_are_resized(tmp_path: Path) -> None:
    image = feature("image", dtype="uint8", encodingFormat="png", shape={"dimensions": ["-1", "-1", "3"]})
    encoded = [png(np.full((10 + i, 12, 3), i, np.uint8)) for i in range(30)]
    write_tfds(tmp_path, features={"image": image, "label": LABEL}, train_images=encoded)
    dataset = load_dataset(config("tfds", tmp_path, name="insects"), seed=0)
    assert dataset.train.images.shape == (24, 8, 8, 3)
    numbers = pixels(dataset.train)[:, 0, 0, 0]
    np.testing.assert_array_equal(dataset.train.images, np.broadcast_to(numbers[:, None, None, None], (24, 8, 8, 3)))
    np.testing.assert_array_equal(numbers * 7 % 3, dataset.train.labels)


# folders


@pytest.mark.parametrize("test", ["val", "validation"])
def test_folder_takes_validation_for_test(test: str, tmp_path: Path) -> None:
    dataset = load_dataset(config("folder", write_folder(tmp_path, test)), seed=0)
    np.testing.assert_array_equal(np.sort(number_of(pixels(dataset.test))), np.arange(500, 509))


def _other_class(root: Path) -> None:
    (root / "test" / "wasp").mkdir()


def _no_image(root: Path) -> None:
    for path in (root / "test" / "cat").iterdir():
        path.unlink()
    (root / "test" / "cat" / "notes.txt").write_text("no image")


def _one_image(root: Path) -> None:
    for path in sorted((root / "train" / "cat").iterdir())[1:]:
        path.unlink()


def _no_header(root: Path) -> None:
    (root / "train" / "ant" / "000.jpg").write_bytes(b"no image")


def _sixteen_bits(root: Path) -> None:
    Image.fromarray(np.full((6, 7), 40000, np.uint16)).save(root / "train" / "ant" / "000.png")


def _no_train(root: Path) -> None:
    (root / "train").rename(root / "learning")


def _no_test(root: Path) -> None:
    (root / "test").rename(root / "trial")


def _no_class(root: Path) -> None:
    (root / "train").rename(root / "training")
    (root / "train").mkdir()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_other_class, ["test/wasp"]),
        (_no_image, ["test", "no image of class 'cat'"]),
        (_one_image, ["validation", "'cat'", "two"]),
        (_no_header, ["train/ant/000.jpg", "replace"]),
        (_sixteen_bits, ["train/ant/000.png", "8 bits"]),
        (_no_train, ["'train'", "learning", "config.data.splits"]),
        (_no_test, ["'test'", "trial", "config.data.splits"]),
        (_no_class, ["train", "one for each class"]),
    ],
)
def test_bad_folder(spoil: Callable[[Path], None], parts: list[str], tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    spoil(root)
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("folder", root), seed=0)
    one_line(error, tmp_path, *parts)


# npz


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"test_labels": None}, ["no split 'test' or 'val' with labels", "no array 'test_labels'"]),
        ({"train_images": TRAIN / 255}, ["train_images", "float64", "uint8"]),
        ({"train_images": TRAIN[..., :2]}, ["train_images", "[30, 6, 7, 2]"]),
        ({"test_images": TEST[:, 0, 0]}, ["test_images", "[9, 3]"]),
        ({"test_images": TEST[:0], "test_labels": TEST_LABELS[:0]}, ["test_images", "[0, 6, 7, 3]"]),
        ({"train_labels": TRAIN_LABELS[:29]}, ["train_labels", "[29]", "[30]"]),
        ({"train_labels": TRAIN_LABELS + 0.5}, ["train_labels", "float64", "integers", "not whole"]),
        ({"train_labels": TRAIN_LABELS - 1}, ["train", "label -1", "3 classes"]),
        ({"test_labels": TEST_LABELS + 1}, ["test", "label 3", "3 classes"]),
        ({"train_labels": TRAIN_LABELS * 2**40, "class_names": None}, ["train", "label 1099511627776"]),
        ({"train_labels": TRAIN_LABELS * 0 - 1, "class_names": None}, ["'train'", "every label is -1"]),
        ({"test_labels": TEST_LABELS * 0}, ["test", "no image of class 'bee'"]),
        ({"class_names": np.array(["ant", "bee", "ant"])}, ["two classes", "'ant'"]),
        ({"class_names": np.array(["ant", "bee", "cat", "dog"])}, ["train", "'dog'"]),
        ({"train_images": np.array([None] * 30)}, ["'train_images'", "pickled"]),
    ],
)
def test_bad_npz(arrays: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    path = write_npz(tmp_path, **arrays)
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("npz", path), seed=0)
    one_line(error, path, *parts)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive", "half", "npy", "missing"])
def test_unreadable_npz(content: bytes | str, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    if content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, TRAIN)
    elif content == "missing":
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("npz", path), seed=0)
    one_line(error, path, ".npz")


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    content = bytearray(path.read_bytes())
    place = content.index(TEST.tobytes()[:64])
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("npz", path), seed=0)
    one_line(error, path, "'test_images'")


# TFDS


def test_tfds_reads_supervised_keys_and_validation_for_test(tmp_path: Path) -> None:
    write_tfds(tmp_path, test="validation", supervised=("picture", "kind"))
    dataset = load_dataset(config("tfds", tmp_path, name="insects"), seed=0)
    np.testing.assert_array_equal(dataset.test.images, TEST)
    np.testing.assert_array_equal(dataset.test.labels, TEST_LABELS)


def _publish_split(directory: Path, name: str, source: str) -> None:
    """Add a split to a dataset that `write_tfds` wrote: a copy of another one."""
    info = json.loads((directory / "dataset_info.json").read_text())
    [found] = [split for split in info["splits"] if split["name"] == source]
    info["splits"].append(found | {"name": name})
    (directory / "dataset_info.json").write_text(json.dumps(info))
    for path in directory.glob(f"*-{source}.*"):
        shutil.copy(path, directory / path.name.replace(f"-{source}.", f"-{name}."))


def test_tfds_reads_the_makers_own_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "headsteer_jax")
    write_tfds(tmp_path, train=(TEST, TEST_LABELS))
    for name in ("validation", "extra"):
        _publish_split(tmp_path / "insects" / "1.0.0", name, "test")
    dataset = load_dataset(config("tfds", tmp_path, name="insects"), seed=0)
    for split in (dataset.train, dataset.validation, dataset.test):
        np.testing.assert_array_equal(split.images, TEST)
    assert "validation from 'validation', test from 'test'; 'extra' is passed over" in caplog.text


def test_tfds_passes_over_a_test_split_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "headsteer_jax")
    write_tfds(tmp_path)
    directory, other = tmp_path / "insects" / "1.0.0", tmp_path / "unlabelled"
    _publish_split(directory, "validation", "test")
    write_tfds(other, tested=(TEST, TEST_LABELS * 0 - 1))
    name = "insects-test.array_record-00000-of-00001"
    shutil.copy(other / "insects" / "1.0.0" / name, directory / name)
    dataset = load_dataset(config("tfds", tmp_path, name="insects"), seed=0)
    np.testing.assert_array_equal(dataset.test.labels, TEST_LABELS)
    assert len(dataset.validation.labels) == 6  # cut from train
    assert "'test' is passed over (every label is -1)" in caplog.text
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("tfds", tmp_path, name="insects", splits=("train", "test")), seed=0)
    one_line(error, "'test'", "has no labels", "every label is -1")


def test_tfds_keys_follow_the_records(tmp_path: Path) -> None:
    write_tfds(tmp_path)
    everything = load_dataset(config("tfds", tmp_path, name="insects"), seed=0).train
    few = load_dataset(config("tfds", tmp_path, name="insects", train_per_class=2), seed=0).train
    keys = dict(zip(number_of(pixels(everything)), everything.keys, strict=True))
    assert len(set(keys.values())) == 24
    assert [keys[number] for number in number_of(pixels(few))] == few.keys.tolist()


def test_coarse_labels_relate_classes_and_tensorflow_is_not_imported(tmp_path: Path) -> None:
    """A name that TFDS knows, in its own process: nothing imports TensorFlow."""
    write_tfds(tmp_path, name="cifar100", coarse=(1, 0, 1))
    program = (
        "import sys, numpy as np\n"
        "from headsteer_jax.config import DataConfig\n"
        "from headsteer_jax.data.sources import load_dataset\n"
        "d = load_dataset(DataConfig.model_validate_json(sys.argv[1]), 0)\n"
        "print(len(d.train.images), d.related.astype(int).tolist(), 'tensorflow' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, config("tfds", tmp_path, name="cifar100").model_dump_json()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "24 [[0, 0, 1], [0, 0, 0], [1, 0, 0]] False"


def _nothing(directory: Path) -> None:
    pass


def _cut_short(directory: Path) -> None:
    path = directory / "insects-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-1000])


def _no_records(directory: Path) -> None:
    (directory / "insects-test.array_record-00000-of-00001").unlink()


def _no_json(directory: Path) -> None:
    (directory / "dataset_info.json").write_text("{")


@pytest.mark.parametrize(
    ("fields", "spoil", "parts"),
    [
        ({"file_format": "tfrecord"}, _nothing, ["TFRECORD", "array_record"]),
        ({"features": {"label": LABEL}}, _nothing, ["'image'", "Image"]),
        ({"features": {"image": IMAGE, "label": IMAGE}}, _nothing, ["'label'", "ClassLabel"]),
        ({"test": "extra"}, _nothing, ["'test' or 'val'", "train, extra", "config.data.splits=train"]),
        ({"train_images": [b"no image"] * 30}, _nothing, ["split 'train', image", "replace"]),
        ({"train_images": [png(TRAIN[0][:5])] * 30}, _nothing, ["split 'train', image", "7x5", "7x6"]),
        ({}, _cut_short, ["split 'train'", "prepare it"]),
        ({}, _no_records, ["split 'test'", "prepare it"]),
        ({}, _no_json, ["prepare it"]),
    ],
)
def test_bad_tfds(fields: dict[str, Any], spoil: Callable[[Path], None], parts: list[str], tmp_path: Path) -> None:
    write_tfds(tmp_path, **fields)
    spoil(tmp_path / "insects" / "1.0.0")
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("tfds", tmp_path, name="insects"), seed=0)
    one_line(error, f"insects in {tmp_path}", *parts)


def test_an_image_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    deep = feature("image", dtype="uint16", encodingFormat="png", shape={"dimensions": ["6", "7", "3"]})
    write_tfds(tmp_path, features={"image": deep, "label": LABEL})
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("tfds", tmp_path, name="insects"), seed=0)
    one_line(error, "'image'", "uint8", "8-bit")


def test_preparing_needs_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfds_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("tfds", tmp_path, name="cifar100"), seed=0)
    one_line(error, "cifar100", tmp_path, "pip install 'headsteer-jax[prepare]'")


@pytest.mark.parametrize("name", ["no_such_set", "no such set"])
def test_unknown_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(HeadSteerError) as error:
        load_dataset(config("tfds", tmp_path, name=name), seed=0)
    one_line(error, name, tmp_path, "check")


@pytest.mark.parametrize("online", [True, False])
def test_what_is_not_prepared_is_downloaded(online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        def download_and_prepare(self) -> None:
            if not online:
                raise ConnectionError("no route to host\nand a long story")
            write_tfds(tmp_path, name="cifar100")

        def __getattr__(self, name: str) -> object:
            return getattr(tfds.builder_from_directory(str(tmp_path / "cifar100" / "1.0.0")), name)

    def builder(name: str, data_dir: str, file_format: str) -> Builder:
        assert (name, data_dir, file_format) == ("cifar100", str(tmp_path), "array_record")
        return Builder()

    monkeypatch.setattr(tfds_source.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "builder", builder)
    cfg = config("tfds", tmp_path, name="cifar100")
    if online:
        np.testing.assert_array_equal(load_dataset(cfg, seed=0).test.images, TEST)
        return
    with pytest.raises(HeadSteerError) as error:
        load_dataset(cfg, seed=0)
    one_line(error, "cifar100", tmp_path, "not prepared", "could not be downloaded", "network", "no route to host")


@pytest.mark.skipif(not (SHARED / "data" / "tiny_imagenet100").is_dir(), reason="needs shared/data/tiny_imagenet100")
def test_tiny_imagenet_is_what_tfds_itself_decodes() -> None:
    fields = {"name": "tiny_imagenet100", "image_size": 32, "train_per_class": 2, "eval_per_class": 3}
    dataset = load_dataset(config("tfds", SHARED / "data", **fields), seed=0)
    assert dataset.class_names[:3] == ("goldfish", "bullfrog", "american_alligator")
    assert dataset.train.images.shape == (200, 32, 32, 3)
    assert dataset.test.images.shape == (300, 32, 32, 3)
    test = tfds.data_source("tiny_imagenet100", data_dir=str(SHARED / "data"), split="test")
    expected = {test[i]["image"].tobytes(): test[i]["label"] for i in range(0, 5000, 5)}
    images = pixels(dataset.test)
    checked = [
        expected[image.tobytes()] == label
        for image, label in zip(images, dataset.test.labels, strict=True)
        if image.tobytes() in expected
    ]
    assert len(checked) > 20
    assert all(checked)


# order and prefetching


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_an_epoch_is_a_permutation(count: int, batch: int, seed: int, epoch: int) -> None:
    batch = min(batch, count)
    steps = count // batch
    order = [batch_indices(count, batch, seed, epoch * steps + i) for i in range(steps)]
    assert all(len(indices) == batch for indices in order)
    used = np.concatenate(order)
    assert len(np.unique(used)) == steps * batch
    assert used.min() >= 0
    assert used.max() < count


def test_an_epochs_order_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or make(seed))
    for step in range(30):  # three epochs of ten steps
        assert len(batch_indices(50, 5, 2**31, step)) == 5
    assert drawn == [[2**31, 1, 0], [2**31, 1, 1], [2**31, 1, 2]]


def test_the_order_follows_from_seed_and_step_alone() -> None:
    straight = [batch_indices(20, 6, 7, step) for step in range(9)]
    for step in (8, 2, 5):  # resuming anywhere, in any order
        np.testing.assert_array_equal(batch_indices(20, 6, 7, step), straight[step])
    assert not np.array_equal(straight[0], straight[3])  # another epoch
    assert not np.array_equal(straight[0], batch_indices(20, 6, 8, 0))  # another seed
    left_out = {tuple(set(range(20)) - set(np.concatenate(straight[i : i + 3]))) for i in (0, 3, 6)}
    assert len(left_out) > 1  # what an epoch leaves out changes


def test_prefetched_is_in_order() -> None:
    assert list(prefetch(lambda i: i * i, 7, start=3)) == [9, 16, 25, 36]
    assert list(prefetch(lambda i: i, 3, start=3)) == []
    assert list(prefetch(lambda i: None, 2)) == [None, None]


def test_prefetched_works_ahead() -> None:
    later = threading.Event()

    def function(i: int) -> int:
        if i == 0:
            return 0
        if i == 1:
            later.set()
        return i

    items = prefetch(function, 5)
    assert next(items) == 0
    assert later.wait(10)  # though item 1 was not asked for


def test_prefetched_raises_the_error_itself_in_its_turn() -> None:
    def function(i: int) -> int:
        if i == 3:
            raise HeadSteerError("three.png: unreadable")
        return i

    items = prefetch(function, 9)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(HeadSteerError) as error:
        next(items)
    one_line(error, "three.png: unreadable")
    assert type(error.value) is HeadSteerError


NAMES = ("cat", "dog", "plate", "wok")


def test_related_groups_become_pairs() -> None:
    found = related_pairs(("pets=cat|dog", "kitchen=plate|wok|dog"), NAMES)
    wanted = {("cat", "dog"), ("plate", "wok"), ("plate", "dog"), ("wok", "dog")}
    pairs = {(NAMES[i], NAMES[j]) for i, j in zip(*np.nonzero(found), strict=True)}
    assert pairs == wanted | {(b, a) for a, b in wanted}


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("cat|dog", "a group must have the form"),
        ("pets=cat", "a group must have the form"),
        ("pets=cat|dogs", "no class 'dogs'; did you mean 'dog'?"),
        ("pets=cat|zebra", "no class 'zebra'; it has cat, dog"),
        ("pets=cat|dog|cat", "'cat' is named twice"),
    ],
)
def test_bad_groups_are_named(group: str, says: str) -> None:
    with pytest.raises(HeadSteerError) as error:
        related_pairs((group,), NAMES)
    one_line(error, "config.data.related", says)
