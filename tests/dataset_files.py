"""A dataset of 39 small images on disk, as .npz, as folders, and as TFDS writes it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

CLASSES = ("ant", "bee", "cat")


def numbered(count: int, height: int = 6, width: int = 7, start: int = 0) -> np.ndarray:
    """Make images [count, height, width, 3], each with its number in its pixels, which `number_of` reads."""
    images = np.random.default_rng(count + start).integers(0, 256, (count, height, width, 3), np.uint8)
    numbers = np.arange(start, start + count)
    images[:, 0, 0] = np.stack([numbers // 256, numbers % 256, np.zeros_like(numbers)], axis=1)
    return images


def number_of(images: np.ndarray) -> np.ndarray:
    """Read the numbers of images that `numbered` made."""
    return images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


TRAIN, TEST = numbered(30), numbered(9, start=500)


TRAIN_LABELS, TEST_LABELS = np.arange(30) * 7 % 3, np.arange(9) % 3


def write_npz(directory: Path, **arrays: np.ndarray | None) -> Path:
    """Write the images above as an npz file; `arrays` replace some of its arrays, or remove them if they are None."""
    everything: dict[str, Any] = {
        "train_images": TRAIN, "train_labels": TRAIN_LABELS, "test_images": TEST, "test_labels": TEST_LABELS,
        "class_names": np.array(CLASSES),
    } | arrays  # fmt: skip
    path = directory / "set.npz"
    np.savez(path, **{key: value for key, value in everything.items() if value is not None})
    return path


def write_folder(root: Path, test: str = "test") -> Path:
    """Write the images above as a directory for each split and class."""
    for split, images, labels in (("train", TRAIN, TRAIN_LABELS), (test, TEST, TEST_LABELS)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / CLASSES[label] / f"{number:03d}.PNG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return root


def feature(kind: str, **fields: Any) -> dict[str, Any]:
    name = {"image": "image_feature.Image", "classLabel": "class_label_feature.ClassLabel"}[kind]
    return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", kind: fields}


IMAGE = feature("image", dtype="uint8", encodingFormat="png", shape={"dimensions": ["6", "7", "3"]})


LABEL = feature("classLabel", numClasses="3")


def write_tfds(
    root: Path,
    name: str = "insects",
    test: str = "test",
    features: dict[str, Any] | None = None,
    supervised: tuple[str, str] | None = None,
    coarse: tuple[int, ...] = (),
    file_format: str = "array_record",
    train_images: list[bytes] | None = None,
    train: tuple[Any, Any] | None = None,
    tested: tuple[Any, Any] | None = None,
    names: tuple[str, ...] = (),
) -> Path:
    """Write the images above, or `train` and `tested`, as TFDS writes a prepared dataset."""
    directory = root / name / "1.0.0"
    directory.mkdir(parents=True)
    image_key, label_key = supervised or ("image", "label")
    features = features or {image_key: IMAGE, label_key: LABEL} | ({"coarse_label": LABEL} if coarse else {})
    splits = []
    for split, (images, labels) in (
        ("train", train or (TRAIN, TRAIN_LABELS)),
        (test, tested or (TEST, TEST_LABELS)),
    ):
        encoded = (split == "train" and train_images) or [png(image) for image in images]
        writer = ArrayRecordWriter(str(directory / f"{name}-{split}.{file_format}-00000-of-00001"), "group_size:1")
        for content, label in zip(encoded, labels, strict=True):
            example = tf_example_pb2.Example()
            example.features.feature[image_key].bytes_list.value.append(content)
            example.features.feature[label_key].int64_list.value.append(label)
            if coarse:
                example.features.feature["coarse_label"].int64_list.value.append(coarse[label])
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        splits.append({"filepathTemplate": template, "name": split, "shardLengths": [str(len(labels))]})
    info: dict[str, Any] = {"fileFormat": file_format, "name": name, "splits": splits, "version": "1.0.0"}
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    (directory / "features.json").write_text(
        json.dumps({"featuresDict": {"features": features}, "pythonClassName": kind})
    )
    (directory / f"{label_key}.labels.txt").write_text("\n".join(names or CLASSES) + "\n")
    return root
