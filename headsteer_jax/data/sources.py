"""The sources of images: SOURCES lists every kind of dataset, and `load_dataset` loads the one that a config names.

A new source is one more entry of SOURCES. The validation split is always cut from train, stratified by class, before
anything is fitted.
"""

import functools
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from headsteer_jax.config.schema import DataConfig
from headsteer_jax.data.dataset import Dataset, LazyImages, Split, related_pairs, stratified_cut
from headsteer_jax.data.digits import double_digits
from headsteer_jax.errors import HeadSteerError, explain_errors


class RawData(NamedTuple):
    """A published dataset, before the validation split is cut."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    related: np.ndarray | None  # [C, C] bool; None if nothing is known


class Source(NamedTuple):
    """A kind of dataset that `data.source` can name."""

    load: Callable[[DataConfig, int, int], Dataset]  # (config, seed, most MiB of a split that is held in memory)
    required: str = ""  # the field of config.data that it cannot do without


def check_source(config: DataConfig) -> None:
    """Check, before anything is made, that the source exists and that the config has the field that it needs.

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


def load_dataset(config: DataConfig, seed: int, memory: int = 4096) -> Dataset:
    """Load the dataset of a config.

    Args:
      seed: everything random follows from it.
      memory: the most MiB that a split takes when it is decoded; a larger one stays lazy. The images of an npz file are
        always in memory.

    Raises:
      HeadSteerError: the data are missing, unreadable or inconsistent.
    """
    check_source(config)
    dataset = SOURCES[config.source].load(config, seed, memory)
    groups = related_pairs(config.related, dataset.class_names) if config.related else dataset.related
    return replace(dataset, related=groups)


def cut_dataset(read: Callable[[DataConfig], RawData], config: DataConfig, seed: int, memory: int) -> Dataset:
    """Read published data and cut the validation split from train; then limit the number of images of each class.

    Images of one common size keep it (`augment.preprocess` resizes on the device); images of several sizes are cropped
    and resized to image_size as they are decoded.

    Raises:
      HeadSteerError: two classes have the same name, a label is no class, or a class has too few images.
    """
    train, test, class_names, related = read(config)
    origin = config.path or config.name
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise HeadSteerError(f"{origin}: two classes are named {repeated[0]!r}; give each class its own name")
    for name, split in (("train", train), ("test", test)):
        _check_labels(f"{origin}: {name}", split.labels, class_names, "add some or drop the class")

    rng = np.random.default_rng([seed, 0])
    remaining, cut = stratified_cut(train.labels, config.validation_fraction, rng)
    _check_labels(
        f"{origin}: validation", train.labels[cut], class_names, "add one to train, which needs two: one is cut off"
    )

    def take(split: Split, indices: np.ndarray, per_class: int) -> Split:
        labels = split.labels[indices]
        members = [rng.permutation(indices[labels == label]) for label in range(len(class_names))]
        chosen = np.sort(np.concatenate([of_class[: per_class or None] for of_class in members]))
        images = split.images[chosen]
        if isinstance(images, LazyImages) and math.prod(images.shape) <= memory * 2**20:
            images = images.gather(np.arange(len(images)))
        return Split(images, split.labels[chosen].astype(np.int32))

    return Dataset(
        train=take(train, remaining, config.train_per_class),
        validation=take(train, cut, config.eval_per_class),
        test=take(test, np.arange(len(test.labels)), config.eval_per_class),
        class_names=class_names,
        related=related,
    )


def _check_labels(split: str, labels: np.ndarray, class_names: tuple[str, ...], remedy: str) -> None:
    """Check that every label is a class and that every class has an image.

    Args:
      split: the name of the data and the split, for the error.
      remedy: what to do about a class without images.

    Raises:
      HeadSteerError: a label is no class, or a class has no image.
    """
    wrong = labels[(labels < 0) | (labels >= len(class_names))]
    if wrong.size:
        raise HeadSteerError(f"{split}: label {wrong[0]} is none of the {len(class_names)} classes; correct the labels")
    absent = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if absent.size:
        raise HeadSteerError(f"{split}: there is no image of class {class_names[absent[0]]!r}; {remedy}")


def _decode_image(file: str | Path | bytes, culprit: str, shape: tuple[int, int, int], fit: bool) -> np.ndarray:
    """Decode an image -> [height, width, channels] uint8.

    Args:
      file: a path, or a file's content.
      culprit: the image's name in errors.
      shape: (height, width, channels). Grey images are repeated to 3 channels, colours become luma in 1 channel.
      fit: crop the centre and resize (bicubic) to this shape; otherwise an image of another size is an error.

    Raises:
      HeadSteerError: the image cannot be decoded, its pixels do not have 8 bits, or it has another size.
    """
    height, width, channels = shape
    with explain_errors(culprit, "replace or remove it"):
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode[0] in "IF":  # Pillow would clip these to 8 bits, not scale them
                raise HeadSteerError(f"{culprit}: its pixels do not have 8 bits (mode {image.mode}); convert it")
            pixels = image.convert("L" if channels == 1 else "RGB")
        if fit:
            pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
        if pixels.size != (width, height):
            raise HeadSteerError(f"{culprit}: {pixels.width}x{pixels.height} pixels, not {width}x{height}; correct it")
        return np.asarray(pixels).reshape(shape)


def read_npz(config: DataConfig) -> RawData:
    """Read an npz file of images and labels.

    It holds {train,test}_images, uint8 [N, h, w] or [N, h, w, 1 or 3], {train,test}_labels, integers [N], and
    optionally class_names.

    Raises:
      HeadSteerError: an array is missing, damaged, or of another type or shape.
    """

    def array(file: Any, key: str) -> np.ndarray:
        if key not in file:
            raise HeadSteerError(f"{config.path}: there is no array {key!r}; it holds {', '.join(file) or 'none'}")
        with explain_errors(f"{config.path}: array {key!r}", "write the file anew, without pickled objects"):
            return file[key]

    def split(file: Any, name: str) -> Split:
        images, labels = array(file, f"{name}_images"), array(file, f"{name}_labels")
        if images.dtype != np.uint8 or not images.size or (images.ndim != 3 and images.shape[3:] not in ((1,), (3,))):
            raise HeadSteerError(
                f"{config.path}: {name}_images is {images.dtype} {list(images.shape)}; "
                "it should be uint8 [N, height, width] or [N, height, width, 1 or 3]"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise HeadSteerError(
                f"{config.path}: {name}_labels is {labels.dtype} {list(labels.shape)}; "
                f"it should be integers [{len(images)}], one for each image"
            )
        images = images.reshape(*images.shape[:3], -1)
        if config.channels < images.shape[3]:
            images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
        elif config.channels > images.shape[3]:
            images = np.repeat(images, config.channels, axis=3)
        return Split(images, labels.astype(np.int64))

    with (
        explain_errors(config.path, "config.data.path should name a readable .npz file"),
        np.load(config.path, allow_pickle=False) as file,
    ):
        train, test = split(file, "train"), split(file, "test")
        if "class_names" in file:
            return RawData(train, test, tuple(map(str, array(file, "class_names"))), None)
        # Every class has an image, so a label beyond their number is wrong: it must not make as many names.
        classes = min(train.labels.max() + 1, len(train.labels))
        return RawData(train, test, tuple(map(str, range(classes))), None)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_folder(config: DataConfig) -> RawData:
    """Read a directory tree <path>/train/<class>/<image> and <path>/test/<class>/<image>.

    A directory `val` or `validation` stands in for a missing `test`.

    Raises:
      HeadSteerError: a directory is missing, test has a class that train has not, or an image cannot be read.
    """
    root = Path(config.path)
    train, test = _find_split(root, "train"), _find_split(root, "test", "val", "validation")
    class_names = _list_classes(train)
    if not class_names:
        raise HeadSteerError(f"{train}: there is no directory in it; it needs one for each class, with its images")
    unknown = set(_list_classes(test)) - set(class_names)
    if unknown:
        raise HeadSteerError(f"{test / min(unknown)}: {train} has no such class; remove it or add training images")
    files = [_list_images(split, class_names) for split in (train, test)]
    size = _find_common_size([path for split_files in files for path, _ in split_files])
    width, height = size or (config.image_size, config.image_size)
    shape = (height, width, config.channels)
    train_split, test_split = (_make_folder_split(split_files, shape, fit=size is None) for split_files in files)
    return RawData(train_split, test_split, tuple(class_names), None)


def _find_split(root: Path, *names: str) -> Path:
    """Find the first of these directories that exists in `root`."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise HeadSteerError(f"{root}: there is no directory {names[0]!r} in it; config.data.path needs train and test")


def _list_classes(split: Path) -> list[str]:
    return sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(split: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """List a split's image files and their labels, class by class."""
    return [
        (path, label)
        for label, name in enumerate(class_names)
        for path in sorted((split / name).glob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]


def _find_common_size(paths: Sequence[Path]) -> tuple[int, int] | None:
    """Return the (width, height) that all images have; None if they have several sizes, or if there are no images."""
    sizes: set[tuple[int, int]] = set()
    for path in paths:
        with explain_errors(str(path), "replace or remove it"), Image.open(path) as image:  # reads the header only
            sizes.add(image.size)
        if len(sizes) > 1:
            return None
    return sizes.pop() if sizes else None


def _make_folder_split(files: Sequence[tuple[Path, int]], shape: tuple[int, int, int], fit: bool) -> Split:
    """Make a lazy split of image files and their labels; see `_decode_image` for `shape` and `fit`."""
    paths = [path for path, _ in files]

    def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
        return (_decode_image(paths[i], str(paths[i]), shape, fit) for i in indices)

    return Split(LazyImages(decode, np.arange(len(paths)), shape), np.array([label for _, label in files], np.int32))


def read_tfds(config: DataConfig) -> RawData:
    """Read a TensorFlow dataset with an image and a class label, by its name.

    A dataset that was prepared in array_record is read without TensorFlow. Classes with the same coarse_label, if the
    dataset has one, are related.

    Raises:
      HeadSteerError: the dataset is unknown or cannot be read or prepared, or it is not for classification of 8-bit
        images.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    directory = config.path or tfds.core.constants.DATA_DIR
    title = f"{config.name} in {directory}"
    with explain_errors(title, "check config.data.name, and prepare it with file_format='array_record'"):
        try:
            builder = builder_from_files(config.name, data_dir=config.path or None)
        except tfds.core.DatasetNotFoundError:
            builder = _prepare_tfds(config, directory)
        image_key, label_key = _find_tfds_features(builder.info, title)
        class_names = tuple(builder.info.features[label_key].names)
        height, width, _ = builder.info.features[image_key].shape
        fit = height is None or width is None
        side = (config.image_size, config.image_size) if fit else (height, width)
        reader = _TFDSReader(title, builder, image_key, label_key, (*side, config.channels), fit)
        test = "test" if "test" in builder.info.splits else "validation"
        for name in ("train", test):
            if name not in builder.info.splits:
                present = ", ".join(builder.info.splits)
                raise HeadSteerError(f"{title}: it has no split {name!r}, only {present}; choose another")
        coarse_C = np.zeros(len(class_names), np.int64)
        splits = reader.read_split("train", coarse_C), reader.read_split(test, coarse_C)
    related = (coarse_C[:, None] == coarse_C) & ~np.eye(len(class_names), dtype=bool)
    return RawData(*splits, class_names, related if "coarse_label" in builder.info.features else None)


def _find_tfds_features(info: Any, title: str) -> tuple[str, str]:
    """Find the names of a TensorFlow dataset's image and label.

    Raises:
      HeadSteerError: they are not an 8-bit image and a class label.
    """
    import tensorflow_datasets as tfds

    image_key, label_key = info.supervised_keys or ("image", "label")
    for key, kind, dtype in (
        (image_key, tfds.features.Image, np.uint8),
        (label_key, tfds.features.ClassLabel, np.int64),
    ):
        feature = dict(info.features).get(key)
        if not isinstance(feature, kind) or feature.np_dtype != dtype:
            raise HeadSteerError(
                f"{title}: it has no feature {key!r} that is a {kind.__name__} of {dtype.__name__}; "
                "only classification datasets of 8-bit images can be used"
            )
    return image_key, label_key


class _TFDSReader(NamedTuple):
    """A reader of a prepared TensorFlow dataset's splits."""

    title: str  # the dataset's name in errors
    builder: Any
    image_key: str
    label_key: str
    shape: tuple[int, int, int]  # of every image; see `_decode_image`
    fit: bool

    def read_split(self, name: str, coarse_C: np.ndarray) -> Split:
        """Read a split's labels, which takes as long as reading its files does; its images stay lazy.

        Args:
          coarse_C: gets the coarse label of every class that occurs, if the dataset has coarse labels.
        """
        import tensorflow_datasets as tfds

        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = self.builder.as_data_source(name, deserialize_method=raw)
        has_coarse = "coarse_label" in self.builder.info.features

        def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
            for index, feature in zip(indices, self._parse(records, name, indices), strict=True):
                culprit = f"{self.title}, split {name!r}, image {index}"
                yield _decode_image(feature[self.image_key].bytes_list.value[0], culprit, self.shape, self.fit)

        labels = np.zeros(len(records), np.int32)
        for start in range(0, len(labels), 1000):
            indices = range(start, min(start + 1000, len(labels)))
            for index, feature in zip(indices, self._parse(records, name, list(indices)), strict=True):
                labels[index] = feature[self.label_key].int64_list.value[0]
                if has_coarse and 0 <= labels[index] < len(coarse_C):
                    coarse_C[labels[index]] = feature["coarse_label"].int64_list.value[0]
        return Split(LazyImages(decode, np.arange(len(labels)), self.shape), labels)

    def _parse(self, records: Any, name: str, indices: Sequence[int]) -> Iterator[Any]:
        """Yield the features of a split's records."""
        from tensorflow_datasets.proto import tf_example_pb2

        with explain_errors(f"{self.title}, split {name!r}", "prepare it anew"):
            for record in records.__getitems__(indices):
                yield tf_example_pb2.Example.FromString(record).features.feature


def _prepare_tfds(config: DataConfig, directory: str) -> Any:
    """Download and prepare a dataset that TFDS knows, and return its builder.

    Raises:
      HeadSteerError: TFDS does not know it, TensorFlow is not installed, or the download fails.
    """
    import tensorflow_datasets as tfds

    missing = f"config.data.name = {config.name!r} is not prepared in {directory} (config.data.path)"
    with explain_errors(missing, "check the name"):
        try:
            tfds.builder_cls(config.name.partition("/")[0].partition(":")[0])
        except tfds.core.DatasetNotFoundError:
            raise HeadSteerError(f"{missing} and TFDS knows no such dataset; check the name and the path") from None
    if importlib.util.find_spec("tensorflow") is None:
        raise HeadSteerError(f"{missing}; preparing it needs TensorFlow: pip install 'headsteer-jax[prepare]'")
    with explain_errors(
        f"{missing} and could not be downloaded (network?)", f"prepare it elsewhere and copy it to {directory}"
    ):
        builder = tfds.builder(config.name, data_dir=config.path or None, file_format="array_record")
        builder.download_and_prepare()
    return builder


SOURCES = {
    "double_digits": Source(lambda config, seed, memory: double_digits(config, seed)),
    "tfds": Source(functools.partial(cut_dataset, read_tfds), required="name"),
    "folder": Source(functools.partial(cut_dataset, read_folder), required="path"),
    "npz": Source(functools.partial(cut_dataset, read_npz), required="path"),
}


def data_places(config: DataConfig) -> list[Path]:
    """Return places."""
    if config.source == "folder":
        return [Path(config.path) / n for n in ("train", "test", "val")]
    return [Path(config.path)] if config.path else []
