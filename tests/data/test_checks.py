"""The checks before training: every image is intact, and the model sees a sensible range."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import CLASSES, TEST, TEST_LABELS, png, write_folder, write_tfds
from pydantic import ValidationError

from headsteer_jax.config import Config, DataConfig
from headsteer_jax.data.checks import check_input_range, verify_images, warn_of_repeated_images
from headsteer_jax.data.dataset import Dataset, LazyImages, Split
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError

COLOUR = {"image_size": 8, "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3, "validation_fraction": 0.2}


@pytest.mark.parametrize("source", ["folder", "tfds"])
def test_every_lazy_image_is_opened_once(source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if source == "folder":
        write_folder(tmp_path)
        names = [tmp_path / "test" / "bee" / "001.PNG", tmp_path / "train" / "ant" / "000.PNG"]
        for path in names:
            path.write_bytes(path.read_bytes()[:-40])  # its header is whole
    else:
        images = [png(image) for image in TEST]
        images[4], images[6] = images[4][:-40], b""
        write_tfds(tmp_path, train=(TEST, TEST_LABELS), train_images=images)
        names = ["split 'train', image 4", "split 'train', image 6"]
    config = DataConfig(source=source, path=str(tmp_path), name="insects" * (source == "tfds"), **COLOUR)
    dataset = load_dataset(config, seed=0, memory=0)
    with pytest.raises(HeadSteerError) as error:
        verify_images(dataset)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert "2 of " in message
    assert message.endswith("images are damaged)")
    assert all(str(name) in message + caplog.text for name in names)


def test_whole_images_pass(tmp_path: Path) -> None:
    dataset = load_dataset(DataConfig(source="folder", path=str(write_folder(tmp_path)), **COLOUR), seed=0, memory=0)
    verify_images(dataset)


def test_a_source_without_a_check_of_its_own_is_decoded() -> None:
    def decode(places: list[int]) -> Any:
        for place in places:
            if place == 7:
                raise HeadSteerError("image 7: broken")
            yield np.zeros((2, 2, 1), np.uint8)

    images, labels = LazyImages(decode, np.arange(30), (2, 2, 1)), np.arange(30) % 3
    few = Split(images[np.arange(3)], labels[:3])
    with pytest.raises(HeadSteerError, match=r"^image 7: broken$"):
        verify_images(Dataset(Split(images, labels), few, few, CLASSES))


def of_images(images: np.ndarray) -> Dataset:
    split = Split(images, (np.arange(len(images)) % 3).astype(np.int32))
    return Dataset(split, split, split, CLASSES)


def photographs(channels: int = 3) -> np.ndarray:
    """Draw images of the mean and spread that photographs have."""
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(118, 60, (100, 12, 10, channels)), 0, 255).astype(np.uint8)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GREY = {"channels": 1, "mean": (0.0,), "std": (1.0,)}


@pytest.mark.parametrize(
    ("images", "fields"),
    [
        (photographs(), IMAGENET),
        (photographs(), {}),
        (photographs(), {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        (photographs(1), GREY),
        (np.where(photographs(1) > 210, 255, 0).astype(np.uint8), GREY),  # ink on paper, a few pixels of it
        (photographs(1) // 4, GREY | {"mean": (0.1,), "std": (0.06,)}),  # dark, with its own statistics
    ],
)
def test_usual_ranges_pass_in_silence(
    images: np.ndarray, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    check_input_range(of_images(images), DataConfig(**(COLOUR | fields)))
    assert not caplog.records


@pytest.mark.parametrize(
    ("images", "fields", "says"),
    [
        (photographs(1) // 12, GREY, "spread 0.0"),  # dark microscopy, not normalised
        (photographs(1), GREY | {"std": (0.004,)}, "spread 31"),
        (photographs(1) // 8 + 220, GREY | {"std": (0.03,)}, "mean 3"),
        (np.where(np.arange(100)[:, None, None, None] < 30, 9, photographs(1)), GREY, "only one colour"),
    ],
)
def test_doubtful_ranges_are_said(
    images: np.ndarray, fields: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_input_range(of_images(images), DataConfig(**(COLOUR | fields)))
    [record] = caplog.records
    assert says in record.getMessage()


@pytest.mark.parametrize(
    ("images", "fields", "parts"),
    [
        (photographs(), {"mean": (0.5,) * 3, "std": (58.395, 57.12, 57.375)}, ("data.std", "spread 0.00")),
        (photographs(), {"std": (0.229 / 255,) * 3}, ("data.std", "spread 138")),
        (photographs() // 128, {}, ("only 0 and 1 of 255", "255")),
        (np.full((20, 8, 8, 3), 255, np.uint8), {}, ("all pixels of an image are equal", "255 to 255")),
        (np.arange(60, dtype=np.uint8).repeat(64).reshape(60, 8, 8, 1), GREY, ("all pixels of an image are equal",)),
    ],
)
def test_absurd_ranges_are_refused(images: np.ndarray, fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(HeadSteerError) as error:
        check_input_range(of_images(images), DataConfig(**(COLOUR | fields)))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("mean", (123.675, 116.28, 103.53), "from 0 to 1"),
        ("mean", (-0.1, 0.5, 0.5), "from 0 to 1"),
        ("std", (58.395, 57.12, 57.375), "at most 1"),
    ],
)
def test_units_of_255_are_refused_by_the_config(field: str, value: tuple[float, ...], allowed: str) -> None:
    with pytest.raises(ValidationError, match=rf"data\.{field} = .*: must be {allowed}, .*divide"):
        Config(data=DataConfig(**(COLOUR | {field: value})))


@pytest.mark.parametrize("splits", [("a", "b", "c", "d"), ("a", "a"), ("a", "")])
def test_splits_are_three_names_at_most(splits: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match=r"data\.splits = .*: must be train,test or train,validation,test"):
        Config(data=DataConfig(splits=splits))


def test_pictures_in_two_splits_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    images = photographs(1)
    train, validation, test = (
        Split(part, np.zeros(len(part), np.int32)) for part in (images[:50], images[50:60], images[48:70])
    )
    warn_of_repeated_images(Dataset(train, validation, test, CLASSES))
    [record] = caplog.records
    assert record.getMessage() == "test: 2 of 22 images also occur in train"
