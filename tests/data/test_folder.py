"""The source folder: the layouts that people have, what is passed over and said, and names of every kind."""

import contextlib
import os
import shutil
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from scipy.io import savemat

from headsteer_jax.config import DataConfig
from headsteer_jax.data import folder
from headsteer_jax.data.dataset import Dataset, Split, gather_images
from headsteer_jax.data.names import normalise_name
from headsteer_jax.data.sources import data_places, load_dataset
from headsteer_jax.errors import HeadSteerError

CLASSES = ("cat", "dog")
GREY = {"image_size": 8, "validation_fraction": 0.34}


def save(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    """Write a grey image that is recognised by its value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def write(root: Path, split: str, start: int = 0, count: int = 3, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write `count` images of each class, whose values count up from `start`."""
    for label, name in enumerate(classes):
        for number in range(count):
            save(root / split / name / f"{number}.png", start + label * count + number)
    return root


def load(root: Path | str, **fields: Any) -> Dataset:
    return load_dataset(DataConfig(source="folder", path=str(root), **(GREY | fields)), seed=0)


def values(split: Split) -> list[int]:
    """List the values of a split's images, which `save` wrote, in rising order."""
    return sorted(gather_images(split.images, np.arange(len(split.labels)))[:, 0, 0, 0].tolist())


def read_labels(dataset: Dataset) -> dict[int, str]:
    """Map the values of all images to the names of their classes."""
    return {
        int(image[0, 0, 0]): dataset.class_names[label]
        for split in (dataset.train, dataset.validation, dataset.test)
        for image, label in zip(gather_images(split.images, np.arange(len(split.labels))), split.labels, strict=True)
    }


def is_one_line(message: str) -> bool:
    """Say whether a message is one line on every terminal and in every file; raises UnicodeError if it has no UTF-8."""
    return message.encode().decode().splitlines() == [message]


def refused(root: Path | str, *parts: object, **fields: Any) -> None:
    """Check that the data are refused in one line that has these parts."""
    with pytest.raises(HeadSteerError) as error:
        load(root, **fields)
    message = str(error.value)
    assert is_one_line(message), message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "headsteer_jax")


# splits


@pytest.mark.parametrize(
    ("splits", "fields", "train", "validation", "test"),
    [
        (("train", "test"), {}, None, None, "test"),
        (("train", "val"), {}, None, None, "val"),
        (("Train", "VALID", "TEST"), {}, "Train", "VALID", "TEST"),
        (("training", "dev", "testing"), {}, "training", "dev", "testing"),
        (("train", "val", "test"), {"splits": ("train", "test")}, None, None, "test"),
        (("train", "val", "test"), {"splits": ("train", "test", "val")}, "train", "test", "val"),
        (("a", "b", "c"), {"splits": ("c", "A", "b")}, "c", "a", "b"),
        (("in/seg_train", "in/seg_test"), {"splits": ("in/seg_train", "in/seg_test")}, None, None, "in/seg_test"),
    ],
)
def test_splits_are_found_by_name(
    splits: tuple[str, ...],
    fields: dict[str, Any],
    train: str | None,
    validation: str | None,
    test: str,
    tmp_path: Path,
) -> None:
    for number, name in enumerate(splits):
        write(tmp_path, name, start=10 * number)
    dataset = load(tmp_path, **fields)
    start = {name: 10 * number for number, name in enumerate(splits)}

    def of(name: str) -> list[int]:
        return list(range(start[name], start[name] + 6))

    assert values(dataset.test) == of(test)
    if validation is None:
        assert sorted(values(dataset.train) + values(dataset.validation)) == of(fields.get("splits", splits)[0])
        assert len(dataset.validation.labels) == 2
    else:
        assert values(dataset.train) == of(train)
        assert values(dataset.validation) == of(validation)


@pytest.mark.parametrize("wrapped", ["flowers", "a/b"])
def test_classes_without_splits_are_cut_if_the_config_says_so(wrapped: str, tmp_path: Path) -> None:
    root = write(tmp_path, wrapped, count=10)
    refused(root / wrapped, "cat, dog", "--config.data.splits=.")
    dataset = load(root / wrapped, splits=(".",), test_fraction=0.3, validation_fraction=0.3)
    parts = [values(split) for split in (dataset.train, dataset.validation, dataset.test)]
    assert [len(part) for part in parts] == [10, 4, 6]
    assert sorted(value for part in parts for value in part) == list(range(20))
    assert values(load(root / wrapped, splits=(".",), test_fraction=0.3).test) == parts[2]
    for cut, count in ((".", 2), (".", 1)):  # a class needs an image in each of three splits
        small = write(tmp_path / f"small{count}", ".", count=count)
        refused(small, "no image of class 'cat'", "needs three", splits=(cut,))


def test_one_split_is_cut_only_if_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train", count=5)
    refused(tmp_path, "no split 'test' or 'val'", "it has train", "--config.data.splits=train")
    assert len(load(tmp_path, splits=("train",)).test.labels) == 2


@pytest.mark.parametrize(
    ("unlabelled", "reason"),
    [("test/9.png", "no class directories"), ("test/unknown/9.png", "no class directories"), ("test", "empty")],
)
def test_a_split_without_labels_is_passed_over_and_said(
    unlabelled: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(write(tmp_path, "train"), "val", start=20)
    if unlabelled.endswith(".png"):
        save(tmp_path / unlabelled, 99)
    else:
        (tmp_path / unlabelled).mkdir()
    assert values(load(tmp_path).test) == list(range(20, 26))
    assert f"'test' is passed over ({reason})" in caplog.text
    shutil.rmtree(tmp_path / "val")
    refused(tmp_path, "no split 'test' or 'val' with labels", f"test ({reason})")
    refused(tmp_path, "'test'", "has no labels", splits=("train", "test"))


def test_directories_that_are_no_split_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(write(write(tmp_path, "train"), "test"), "extra")
    load(tmp_path)
    assert "'extra' is passed over" in caplog.text
    refused(tmp_path, "there is no split 'valid'", "train, test, extra", splits=("train", "valid", "test"))


@pytest.mark.parametrize("inside", ["set", "set/v2", "."])
def test_directories_that_only_wrap_the_splits_are_looked_through(inside: str, tmp_path: Path) -> None:
    write(write(tmp_path / inside, "train/train"), "test/test", start=20)
    (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    (tmp_path / "README.txt").write_text("hello")
    assert values(load(tmp_path).test) == list(range(20, 26))


# the makers' own layouts


def test_tiny_imagenet_as_it_is_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n01443537", "n01629819")):
        for number in range(3):
            save(root / "train" / name / "images" / f"{name}_{number}.png", label * 3 + number)
        (root / "train" / name / f"{name}_boxes.txt").write_text("x 0 0 1 1\n")
    for number, name in enumerate(("n01629819", "n01443537", "n01629819")):
        save(root / "val" / "images" / f"val_{number}.png", 20 + number)
        with (root / "val" / "val_annotations.txt").open("a") as file:
            file.write(f"val_{number}.png\t{name}\t0\t32\t44\t62\n")
    save(root / "val" / "images" / "val_7.png", 90)
    save(root / "test" / "images" / "test_0.png", 99)
    labels = read_labels(load(tmp_path))
    in_train = {number: "n01443537" if number < 3 else "n01629819" for number in range(6)}
    assert labels == in_train | {20: "n01629819", 21: "n01443537", 22: "n01629819"}
    assert "2 .txt" in caplog.text
    assert "1 not in val_annotations.txt (images/val_7.png)" in caplog.text
    assert "'test' is passed over" in caplog.text
    for number, name in enumerate(("n01629819", "n01443537", "n01629819")):  # sorted into classes, as scripts do
        (root / "val" / name).mkdir(exist_ok=True)
        (root / "val" / "images" / f"val_{number}.png").rename(root / "val" / name / f"val_{number}.png")
    shutil.rmtree(root / "val" / "images")
    assert read_labels(load(tmp_path)) == labels


@pytest.mark.parametrize("labels", ["csv", "devkit", "sorted"])
def test_imagenet_as_it_is_published(labels: str, tmp_path: Path) -> None:
    splits, names = tmp_path / "ILSVRC" / "Data" / "CLS-LOC", ("n01440764", "n01443537")
    for label, name in enumerate(names):
        for number in range(3):
            save(splits / "train" / name / f"{name}_{number}.JPEG", label * 3 + number)
    save(splits / "test" / "ILSVRC2012_test_00000001.JPEG", 99)
    rows = ["ImageId,PredictionString"]
    for number in range(1, 5):
        name = f"ILSVRC2012_val_{number:08d}"
        save(splits / "val" / (names[number % 2] if labels == "sorted" else ".") / f"{name}.JPEG", 20 + number)
        rows.append(f"{name},{names[number % 2]} 1 2 3 4 {names[number % 2]} 5 6 7 8 ")
    if labels == "devkit":
        kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
        kit.mkdir(parents=True)
        (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("8\n5\n8\n5\n")
        synsets = np.zeros(3, [("ILSVRC2012_ID", "f8"), ("WNID", object), ("words", object)])
        synsets[:] = [(5, names[0], "tench"), (8, names[1], "goldfish"), (1001, "n00000000", "fish")]
        savemat(kit / "meta.mat", {"synsets": synsets})
    else:
        (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    for path in (tmp_path, splits):
        found = read_labels(load(path))
        assert found == {n: names[n // 3] for n in range(6)} | {20 + n: names[n % 2] for n in range(1, 5)}


def test_annotations_must_name_classes_of_train(tmp_path: Path) -> None:
    write(tmp_path, "train")
    save(tmp_path / "val" / "images" / "0.png", 9)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\tzebra\n")
    refused(tmp_path, "val_annotations.txt", "no class 'zebra'")
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\n")
    refused(tmp_path, "val_annotations.txt", "download it again")


# files


SUFFIXES = [".jfif", ".tif", ".TIFF", ".ppm", ".pgm", ".gif", ".webp", ".bmp", ".jpe", ".JPEG", ".tga", ".jp2"]


@pytest.mark.parametrize("suffix", SUFFIXES + [".avif"] * features.check("avif"))
def test_whatever_pillow_reads_is_read(suffix: str, tmp_path: Path) -> None:
    write(write(tmp_path, "train"), "test", start=20)
    kind = "PPM" if suffix == ".pgm" else Image.registered_extensions()[suffix.lower()]
    Image.new("L", (8, 8), 200).save(tmp_path / "test" / "cat" / f"new{suffix}", kind)
    dataset = load(tmp_path)
    assert len(dataset.test.labels) == 7
    assert abs(values(dataset.test)[-1] - 200) <= 2


def test_files_of_operating_systems_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(write(tmp_path, "train"), "test")
    before = values(load(tmp_path).train)
    for directory in [tmp_path, *tmp_path.glob("*"), *tmp_path.glob("*/*")]:
        for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "Icon\r"):
            (directory / name).write_bytes(b"\0\5\x16\7")
        for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
            (directory / name).mkdir()
            (directory / name / "0.png").write_bytes(b"\0")
    caplog.clear()
    assert values(load(tmp_path).train) == before
    assert "passed over" not in caplog.text


def test_files_that_are_passed_over_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(write(tmp_path, "train"), "test")
    cat = tmp_path / "train" / "cat"
    for number in range(4):
        (cat / f"{number}.txt").write_text("x")
    (cat / "a.HEIC").write_bytes(b"x")
    (cat / "nameless").write_bytes(b"x")
    (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(cat / "pipe.png")  # opening it would wait for ever
    save(tmp_path / "train" / "lost.png", 200)
    assert len(load(tmp_path).train.labels) == 4
    [line] = [record.getMessage() for record in caplog.records if "files are passed over" in record.getMessage()]
    assert line.startswith(f"{tmp_path}/train: 9 of 15 files are passed over: 4 .txt (cat/0.txt), ")
    assert line.endswith(", ...")  # five reasons
    for part in ("1 .heic (cat/a.HEIC)", "1 outside of the class directories (lost.png)", "1 broken links"):
        assert part in line


def test_nested_directories_belong_to_their_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(write(tmp_path, "train"), "test", start=20)
    flat = load(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "cat" / "batch_2" / "b").mkdir(parents=True)
        (tmp_path / split / "cat" / "2.png").rename(tmp_path / split / "cat" / "batch_2" / "b" / "2.png")
    deep = load(tmp_path)
    assert read_labels(deep) == read_labels(flat)
    assert (
        "images of subdirectories count for the class above them: 1 in 1 of them, such as cat/batch_2/b" in caplog.text
    )


def test_links_are_followed_but_not_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(write(tmp_path / "real", "train"), "test", start=20)
    shutil.move(tmp_path / "real" / "train" / "dog", tmp_path / "elsewhere")
    (tmp_path / "real" / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "train" / "cat" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "train" / "cat" / "self").symlink_to(".")
    assert values(load(tmp_path / "real").test) == list(range(20, 26))
    assert len(load(tmp_path / "real").train.labels) == 4
    assert "2 links to a directory that is read anyway (cat/loop)" in caplog.text


# names


def test_names_are_the_same_in_every_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caffè") for form in ("NFC", "NFD"))
    assert composed != decomposed
    write(tmp_path, "train", classes=(decomposed, "tea"))
    write(tmp_path, "test", classes=(composed, "tea"))
    dataset = load(tmp_path)
    assert dataset.class_names == (composed, "tea")
    write(tmp_path, "train", classes=(composed,))
    refused(tmp_path, "train", f"two directories are named '{composed}'", "Unicode")


ODD_NAMES = [
    "a,b", "a [b]", "(c)", "<script>", "a|b", "a=b", "a\nb", "a\tb", " ", "-", "%s", "{x}", "'", '"', "$(ls)", "~", "é",
    "日本", "x" * 255, "CON", "👍", "\u202eabc", "a\u2028b",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_every_name_of_a_directory_can_be_a_class(name: str, tmp_path: Path) -> None:
    for split, start in (("train", 0), ("test", 20)):
        write(tmp_path, split, start, classes=(name, "other"))
    dataset = load(tmp_path)
    assert normalise_name(name) in dataset.class_names
    assert "\n" not in "".join(dataset.class_names)
    assert read_labels(dataset)[20] == normalise_name(name)
    (tmp_path / "test" / name / "0.png").write_bytes(b"")
    refused(tmp_path, "an empty file, not an image")


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    for split, start in (("train", 0), ("test", 20)):
        write(tmp_path, split, start, classes=("cafe", "tea"))
        os.rename(os.fsencode(tmp_path / split / "cafe"), os.fsencode(tmp_path / split) + b"/caf\xe9")
        os.rename(
            os.fsencode(tmp_path / split) + b"/caf\xe9/0.png", os.fsencode(tmp_path / split) + b"/caf\xe9/\xff.png"
        )
    dataset = load(tmp_path)
    assert dataset.class_names == ("caf\\xe9", "tea")
    "".join(dataset.class_names).encode()
    assert values(dataset.test) == list(range(20, 26))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/test/caf\xe9/\xff.png")).write_bytes(b"")
    refused(tmp_path, "caf\\xe9/\\xff.png: an empty file")


NAME = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_tree_is_read_or_refused_in_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """Directories, links, and files of every content below splits: no error but one line, and nothing is written."""
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    image = save_once(tmp_path.parent)
    names = data.draw(st.lists(NAME, min_size=1, max_size=4, unique_by=str.casefold))
    for split in data.draw(st.lists(st.sampled_from(["train", "Test", "val", "other"]), min_size=1, unique=True)):
        (root / split).mkdir(parents=True)
        for name in names:
            place = root / split / name
            if data.draw(st.booleans()):
                place.mkdir(exist_ok=True)
                for number in range(data.draw(st.integers(0, 3))):
                    suffix = data.draw(st.sampled_from([".png", ".png", ".PNG", ".txt", ""]))
                    (place / f"{number}{suffix}").write_bytes(
                        data.draw(st.sampled_from([image, image, image, b"", b"x"]))
                    )
            elif not place.exists():
                data.draw(st.sampled_from([place.touch, lambda place=place: place.symlink_to("..")]))()
    before = sorted(path for path in root.rglob("*"))
    dataset = None
    with contextlib.suppress(HeadSteerError):
        dataset = load(root)
    if dataset is None:
        refused(root)
    else:
        assert len(dataset.class_names) >= 2
        for split in (dataset.train, dataset.validation, dataset.test):
            assert np.bincount(split.labels, minlength=len(dataset.class_names)).min() >= 1
            assert len(split.keys) == len(split.labels)
    assert sorted(path for path in root.rglob("*")) == before


def save_once(directory: Path) -> bytes:
    path = directory / "image.png"
    if not path.exists():
        save(path, 7)
    return path.read_bytes()


# what is refused


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["there is no such directory"]),
        (lambda path: path.write_bytes(b"x"), ["a file", "set config.data.path to the directory"]),
        (lambda path: zipfile.ZipFile(path, "w").close(), ["an archive", "unpack it"]),
        (lambda path: path.mkdir(), ["no directory 'train'", "create train and test there"]),
    ],
)
def test_a_path_that_is_no_dataset_is_called_what_it_is(make: Any, parts: list[str], tmp_path: Path) -> None:
    make(tmp_path / "data")
    refused(tmp_path / "data", tmp_path / "data", *parts)


def test_an_npz_file_is_recognised(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=0)
    refused(tmp_path / "set.npz", "--config.data.source=npz")


def test_one_class_is_refused_at_the_start(tmp_path: Path) -> None:
    write(write(tmp_path, "train", classes=("only",)), "test", classes=("only",))
    refused(tmp_path, "'only' is the only class", "at least two")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("place", ["train", "test", "train/cat", "train/cat/0.png"])
def test_what_may_not_be_read_is_named(place: str, tmp_path: Path) -> None:
    write(write(tmp_path, "train"), "test")
    (tmp_path / place).chmod(0)
    refused(tmp_path, tmp_path / place, "denied")
    (tmp_path / place).chmod(0o755)


def test_a_class_in_another_spelling_is_called_that(tmp_path: Path) -> None:
    write(write(tmp_path, "train", classes=("Cat", "dog")), "test", classes=("cat", "dog"))
    refused(tmp_path, "test/cat", "no such class; did you mean 'Cat'?")


@pytest.mark.parametrize("path", ["~nobody_of_this_name/set", "x" * 5000, "a\0b", "a\nb"])
def test_a_path_that_cannot_be_is_one_line(path: str) -> None:
    refused(path, "config.data.path")
    with contextlib.suppress(HeadSteerError):  # a refusal, but no other error
        data_places(DataConfig(source="folder", path=path))


# keys and places


def test_keys_are_of_names_and_sizes_and_do_not_depend_on_the_place(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    here, there = tmp_path / "here", tmp_path / "there" / "deeper"
    for root, name in ((here, composed), (there, decomposed)):
        write(write(root, "train", classes=(name, "tea"), count=5), "test", classes=(name, "tea"))
    first, second = load(here, train_per_class=2), load(there, train_per_class=2)
    for name in ("train", "validation", "test"):
        keys = getattr(first, name).keys
        assert keys.dtype == np.uint64
        assert len(set(keys.tolist())) == len(getattr(first, name).labels)
        np.testing.assert_array_equal(keys, getattr(second, name).keys)
    everything = load(here)
    of_image = dict(zip(values_in_order(everything.train), everything.train.keys.tolist(), strict=True))
    assert [of_image[value] for value in values_in_order(first.train)] == first.train.keys.tolist()
    changed = here / "test" / "tea" / "0.png"
    changed.write_bytes(changed.read_bytes() + b"x")
    assert (load(here).test.keys != everything.test.keys).tolist() == [True] + [False] * 5


def test_keys_are_of_contents_but_not_in_large_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(write(tmp_path, "train", count=5), "test", count=5)
    before, changed = load(tmp_path).test.keys, tmp_path / "test" / "cat" / "0.png"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")  # of the same size
    assert (load(tmp_path).test.keys != before).tolist() == [True] + [False] * (len(before) - 1)
    monkeypatch.setattr(folder, "CONTENT_BYTES", 100)
    before = load(tmp_path).test.keys
    changed.write_bytes(changed.read_bytes()[:-1] + b"y")
    np.testing.assert_array_equal(load(tmp_path).test.keys, before)


def test_keys_stay_if_a_class_is_renamed(tmp_path: Path) -> None:
    write(write(tmp_path, "train", count=5), "test", count=5)
    before = load(tmp_path).test
    for split in ("train", "test"):
        (tmp_path / split / "cat").rename(tmp_path / split / "a cat")
    np.testing.assert_array_equal(load(tmp_path).test.keys, before.keys)


def values_in_order(split: Split) -> list[int]:
    return gather_images(split.images, np.arange(len(split.labels)))[:, 0, 0, 0].tolist()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(write(tmp_path / "set", "train"), "Val", start=20)
    assert values(load("~/set").test) == list(range(20, 26))
    config = DataConfig(source="folder", path="~/set")
    assert data_places(config) == [tmp_path / "set" / "Val", tmp_path / "set" / "train"]


def test_places_are_known_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for fields, places in (
        ({"source": "double_digits"}, []),
        ({"source": "npz", "path": "~/x.npz"}, [tmp_path / "x.npz"]),
        ({"source": "folder", "path": str(tmp_path / "no")}, [tmp_path / "no"]),
        ({"source": "tfds", "name": "cifar100:3.0.2", "path": "~/sets"}, [tmp_path / "sets" / "cifar100"]),
        ({"source": "tfds", "name": "glue/cola"}, [tmp_path / "tensorflow_datasets" / "glue"]),
        ({"source": "tfds", "name": "mnist", "path": "gs://bucket/x"}, []),
    ):
        assert data_places(DataConfig(**fields)) == places
