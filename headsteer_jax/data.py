"""Images and labels: one `Dataset` of three splits, whatever they come from, and the order in which training sees them.

The validation split is always cut from train, stratified by class, before anything is fitted.
"""

import difflib
import importlib.util
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np
from PIL import Image, ImageOps

from headsteer_jax.config import DataConfig, HeadSteerError

DIGIT_SIDE = 8  # scikit-learn's digits are 8x8, grey levels 0 to 16
DIGIT_TEST_FRACTION = 0.25  # share of the source digits that only test canvases use


class LazyImages:
    """[N, height, width, channels] uint8 images that are decoded, in threads, whenever they are asked for.

    Args:
      decode: places in the source -> the images there, in order.
      places: [N] where these images are in the source.
      shape: (height, width, channels).
    """

    _threads = ThreadPoolExecutor(os.cpu_count())  # shared: as many decoders as cores, however many sets are open

    def __init__(
        self, decode: Callable[[list[int]], Iterable[np.ndarray]], places: np.ndarray, shape: tuple[int, int, int]
    ) -> None:
        self._decode, self._places = decode, places
        self.shape = (len(places), *shape)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, indices: np.ndarray) -> "LazyImages":
        """The images at `indices` [M], not decoded either."""
        return LazyImages(self._decode, self._places[indices], self.shape[1:])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """[M] indices -> [M, height, width, channels] uint8.

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
            pass  # the loop raises what a thread raised
        return images


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    images: np.ndarray | LazyImages  # [N, height, width, channels] uint8; `gather` reads both
    labels: np.ndarray  # [N] int32, in [0, C)


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no image."""

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    related: np.ndarray | None = None  # [C, C] bool: pairs of classes known to be alike; None where nothing is known


def stratified_cut(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices [N'] of what stays and of what is cut off, `fraction` of each class (at least 1, never all), sorted."""
    cut = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    cut_indices = np.sort(np.concatenate(cut))
    return np.setdiff1d(np.arange(len(labels)), cut_indices), cut_indices


def compose_digits(
    digits: np.ndarray, values: np.ndarray, per_class: int, side: int, rng: np.random.Generator
) -> Split:
    """Canvases of two digits: class 10 a + b shows an `a` in the left half and a `b` in the right, at random places.

    Args:
      digits: [N, 8, 8] uint8 source digits.
      values: [N] what each shows, 0 to 9.
      per_class: canvases for each of the 100 classes.
      side: the canvas's side in pixels, at least 16.
    """
    labels = np.repeat(np.arange(100, dtype=np.int32), per_class)
    canvases = np.zeros((len(labels), side, side), np.uint8)
    pixel, half = np.arange(DIGIT_SIDE), side // 2
    for shown, first_column in ((labels // 10, 0), (labels % 10, half)):
        chosen = np.zeros(len(labels), np.int64)
        for value in range(10):
            wanted = shown == value
            chosen[wanted] = rng.choice(np.flatnonzero(values == value), wanted.sum())
        rows = rng.integers(0, side - DIGIT_SIDE + 1, len(labels))[:, None, None] + pixel[:, None]
        columns = first_column + rng.integers(0, half - DIGIT_SIDE + 1, len(labels))[:, None, None] + pixel
        canvases[np.arange(len(labels))[:, None, None], rows, columns] = digits[chosen]
    return Split(canvases[..., None], labels)


def double_digits(config: DataConfig, seed: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, two to a canvas; no source digit occurs in two splits.

    Classes "00" to "99"; classes that share a digit at the same place are related.
    """
    from sklearn.datasets import load_digits

    if config.image_size < 2 * DIGIT_SIDE:
        raise HeadSteerError(
            f"config.data.image_size = {config.image_size}: double_digits needs at least {2 * DIGIT_SIDE} pixels"
        )
    source = load_digits()
    digits = np.round(source.images * (255 / 16)).astype(np.uint8)
    values = source.target.astype(np.int32)
    rng = np.random.default_rng([seed, 0])
    fitting, test = stratified_cut(values, DIGIT_TEST_FRACTION, rng)
    train, validation = stratified_cut(values[fitting], config.validation_fraction, rng)

    def compose(chosen: np.ndarray, per_class: int) -> Split:
        split = compose_digits(digits[chosen], values[chosen], per_class, config.image_size, rng)
        assert isinstance(split.images, np.ndarray)
        return Split(np.repeat(split.images, config.channels, axis=3), split.labels)

    tens, ones = np.divmod(np.arange(100), 10)
    related = (tens[:, None] == tens) | (ones[:, None] == ones)
    return Dataset(
        train=compose(fitting[train], config.train_per_class or 400),
        validation=compose(fitting[validation], config.eval_per_class or 100),
        test=compose(test, config.eval_per_class or 100),
        class_names=tuple(f"{label:02d}" for label in range(100)),
        related=related & ~np.eye(100, dtype=bool),
    )


def load(config: DataConfig, seed: int) -> Dataset:
    """The dataset of a config; what is random follows from the seed.

    Validation is cut from train first; then the numbers for each class are limited. Images of one common size keep it
    (`augment.preprocess` resizes on the device); images of several sizes are cropped and resized to image_size as they
    are decoded. A split of more than memory_limit_mb stays lazy; npz files are always held in memory.

    Raises:
      HeadSteerError: missing, unreadable or inconsistent data; one line with the culprit and the mend.
    """
    if config.source == "double_digits":
        dataset = double_digits(config, seed)
        groups = related_pairs(config.related, dataset.class_names) if config.related else dataset.related
        return replace(dataset, related=groups)
    read = {"tfds": _read_tfds, "folder": _read_folder, "npz": _read_npz}[config.source]
    train, test, class_names, related = read(config)
    where = config.path or config.name
    twice = [name for name, count in Counter(class_names).items() if count > 1]
    if twice:
        raise HeadSteerError(f"{where}: two classes are named {twice[0]!r}; give each class its own name")
    for name, split in (("train", train), ("test", test)):
        _check_labels(f"{where}: {name}", split.labels, class_names, "add some or drop the class")

    rng = np.random.default_rng([seed, 0])
    kept, cut = stratified_cut(train.labels, config.validation_fraction, rng)
    _check_labels(
        f"{where}: validation", train.labels[cut], class_names, "add one to train, which needs two: one is cut off"
    )

    def part(split: Split, indices: np.ndarray, per_class: int) -> Split:
        labels = split.labels[indices]
        members = [rng.permutation(indices[labels == label]) for label in range(len(class_names))]
        chosen = np.sort(np.concatenate([some[: per_class or None] for some in members]))
        images = split.images[chosen]
        if isinstance(images, LazyImages) and math.prod(images.shape) <= config.memory_limit_mb * 2**20:
            images = images.gather(np.arange(len(images)))
        return Split(images, split.labels[chosen].astype(np.int32))

    return Dataset(
        train=part(train, kept, config.train_per_class),
        validation=part(train, cut, config.eval_per_class),
        test=part(test, np.arange(len(test.labels)), config.eval_per_class),
        class_names=class_names,
        related=related_pairs(config.related, class_names) if config.related else related,
    )


def related_pairs(groups: Sequence[str], class_names: tuple[str, ...]) -> np.ndarray:
    """[C, C] bool, symmetric: pairs of different classes that some group `name=class|class|...` holds both of.

    Raises:
      HeadSteerError: a group is not of this form, or it names a class twice or one that the dataset does not have.
    """
    pairs = np.zeros((len(class_names), len(class_names)), bool)
    for group in groups:
        name, equals, members = group.partition("=")
        names = [member.strip() for member in members.split("|")]
        if not equals or len(names) < 2:
            raise HeadSteerError(f"config.data.related: {group!r}: a group is `name=class|class|...`, of two or more")
        check_classes(f"config.data.related: {name}", names, class_names)
        places = [class_names.index(member) for member in names]
        pairs[np.ix_(places, places)] = True
    return pairs & ~np.eye(len(class_names), dtype=bool)


def check_classes(field: str, names: Sequence[str], class_names: tuple[str, ...]) -> None:
    """Raises HeadSteerError where a name is given twice, or is no class of the dataset."""
    for name in names:
        if name not in class_names:
            close = difflib.get_close_matches(name, class_names, n=1)
            some = (
                f"did you mean {close[0]!r}?"
                if close
                else f"it has {', '.join(class_names[:8])}{', ...' * (len(class_names) > 8)}"
            )
            raise HeadSteerError(f"{field}: the dataset has no class {name!r}; {some}")
        if list(names).count(name) > 1:
            raise HeadSteerError(f"{field}: {name!r} is named twice; name it once")


Source = tuple[Split, Split, tuple[str, ...], np.ndarray | None]  # train, test, class names, related


def _check_labels(split: str, labels: np.ndarray, class_names: tuple[str, ...], mend: str) -> None:
    """Raises HeadSteerError where a label is no class, or a class has no image; `mend` is the latter's."""
    wrong = labels[(labels < 0) | (labels >= len(class_names))]
    if wrong.size:
        raise HeadSteerError(f"{split}: label {wrong[0]} is none of the {len(class_names)} classes; correct the labels")
    absent = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if absent.size:
        raise HeadSteerError(f"{split}: there is no image of class {class_names[absent[0]]!r}; {mend}")


@contextmanager
def _blaming(culprit: str, mend: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line: the culprit, the reason's first line, the mend."""
    try:
        yield
    except HeadSteerError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise HeadSteerError(f"{culprit}: {reason or type(error).__name__}; {mend}") from None


def _decode(file: str | Path | bytes, culprit: str, shape: tuple[int, int, int], fit: bool) -> np.ndarray:
    """An encoded image -> [height, width, channels] uint8.

    Args:
      file: a path, or a file's content.
      culprit: what an error names.
      shape: (height, width, channels). Grey images are repeated to 3 channels, colours become luma in 1.
      fit: crop the centre and resize (bicubic) to this shape; otherwise an image of another size is an error.
    """
    height, width, channels = shape
    with _blaming(culprit, "replace or remove it"):
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode[0] in "IF":  # Pillow would clip these to 8 bits, not scale them
                raise HeadSteerError(f"{culprit}: its pixels are not of 8 bits (mode {image.mode}); convert it")
            pixels = image.convert("L" if channels == 1 else "RGB")
        if fit:
            pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
        if pixels.size != (width, height):
            raise HeadSteerError(f"{culprit}: {pixels.width}x{pixels.height} pixels, not {width}x{height}; correct it")
        return np.asarray(pixels).reshape(shape)


def _read_npz(config: DataConfig) -> Source:
    """One file: {train,test}_images uint8 [N, h, w] or [N, h, w, 1 or 3], {train,test}_labels integers [N]."""

    def array(file: Any, key: str) -> np.ndarray:
        if key not in file:
            raise HeadSteerError(f"{config.path}: there is no array {key!r}; it holds {', '.join(file) or 'none'}")
        with _blaming(f"{config.path}: array {key!r}", "write the file anew, without pickled objects"):
            return file[key]

    def split(file: Any, what: str) -> Split:
        images, labels = array(file, f"{what}_images"), array(file, f"{what}_labels")
        if images.dtype != np.uint8 or not images.size or (images.ndim != 3 and images.shape[3:] not in ((1,), (3,))):
            raise HeadSteerError(
                f"{config.path}: {what}_images is {images.dtype} {list(images.shape)}; "
                "it should be uint8 [N, height, width] or [N, height, width, 1 or 3]"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise HeadSteerError(
                f"{config.path}: {what}_labels is {labels.dtype} {list(labels.shape)}; "
                f"it should be integers [{len(images)}], one for each image"
            )
        images = images.reshape(*images.shape[:3], -1)
        if config.channels < images.shape[3]:
            images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
        elif config.channels > images.shape[3]:
            images = np.repeat(images, config.channels, axis=3)
        return Split(images, labels.astype(np.int64))

    with (
        _blaming(config.path, "config.data.path should name a readable .npz file"),
        np.load(config.path, allow_pickle=False) as file,
    ):
        train, test = split(file, "train"), split(file, "test")
        if "class_names" in file:
            return train, test, tuple(map(str, array(file, "class_names"))), None
        # Every class has an image, so a label beyond their number is wrong: it must not make as many names.
        classes = min(train.labels.max() + 1, len(train.labels))
        return train, test, tuple(map(str, range(classes))), None


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def _read_folder(config: DataConfig) -> Source:
    """<path>/train/<class>/<image> and <path>/test/<class>/<image>; `val` and `validation` stand in for `test`."""
    root = Path(config.path)

    def directory(*names: str) -> Path:
        for name in names:
            if (root / name).is_dir():
                return root / name
        raise HeadSteerError(f"{root}: there is no directory {names[0]!r} in it; config.data.path needs train and test")

    def classes(split: Path) -> list[str]:
        return sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))

    train, test = directory("train"), directory("test", "val", "validation")
    class_names = classes(train)
    if not class_names:
        raise HeadSteerError(f"{train}: there is no directory in it; it needs one for each class, with its images")
    unknown = set(classes(test)) - set(class_names)
    if unknown:
        raise HeadSteerError(f"{test / min(unknown)}: {train} has no such class; remove it or add training images")
    files = {
        split: [
            (path, label)
            for label, name in enumerate(class_names)
            for path in sorted((split / name).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        for split in (train, test)
    }
    sizes: set[tuple[int, int]] = set()
    for path, _ in files[train] + files[test]:
        with _blaming(str(path), "replace or remove it"), Image.open(path) as image:  # reads the header only
            sizes.add(image.size)
        if len(sizes) > 1:
            break
    fit = len(sizes) > 1
    width, height = (config.image_size, config.image_size) if len(sizes) != 1 else sizes.pop()

    def split(directory: Path) -> Split:
        paths = [path for path, _ in files[directory]]
        shape = (height, width, config.channels)

        def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
            return (_decode(paths[i], str(paths[i]), shape, fit) for i in indices)

        labels = np.array([label for _, label in files[directory]], np.int32)
        return Split(LazyImages(decode, np.arange(len(paths)), shape), labels)

    return split(train), split(test), tuple(class_names), None


def _read_tfds(config: DataConfig) -> Source:
    """A TensorFlow Datasets name with its features image and label; `related` from coarse_label, where it has that.

    Prepared in array_record, it is read without TensorFlow. Labels are read once, whole: that takes as long as reading
    the files does.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files
    from tensorflow_datasets.proto import tf_example_pb2

    where = config.path or tfds.core.constants.DATA_DIR
    prepared = f"{config.name} in {where}"
    with _blaming(prepared, "check config.data.name, and prepare it with file_format='array_record'"):
        try:
            builder = builder_from_files(config.name, data_dir=config.path or None)
        except tfds.core.DatasetNotFoundError:
            builder = _prepare_tfds(config, where)
        info = builder.info
        image_key, label_key = info.supervised_keys or ("image", "label")
        for key, kind, dtype in (
            (image_key, tfds.features.Image, np.uint8),
            (label_key, tfds.features.ClassLabel, np.int64),
        ):
            feature = dict(info.features).get(key)
            if not isinstance(feature, kind) or feature.np_dtype != dtype:
                raise HeadSteerError(
                    f"{prepared}: it has no feature {key!r} that is a {kind.__name__} of {dtype.__name__}; "
                    "only datasets for classification of 8-bit images serve"
                )
        names = tuple(info.features[label_key].names)
        height, width, _ = info.features[image_key].shape
        fit = height is None or width is None
        shape = (*((config.image_size,) * 2 if fit else (height, width)), config.channels)
        coarse_of = np.zeros(len(names), np.int64)

        def split(what: str) -> Split:
            records = builder.as_data_source(what, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

            def features(indices: Sequence[int]) -> Iterator[Any]:
                with _blaming(f"{prepared}, split {what!r}", "prepare it anew"):
                    for record in records.__getitems__(indices):
                        yield tf_example_pb2.Example.FromString(record).features.feature

            def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
                for index, feature in zip(indices, features(indices), strict=True):
                    culprit = f"{prepared}, split {what!r}, image {index}"
                    yield _decode(feature[image_key].bytes_list.value[0], culprit, shape, fit)

            labels = np.zeros(len(records), np.int32)
            for start in range(0, len(labels), 1000):
                indices = range(start, min(start + 1000, len(labels)))
                for index, feature in zip(indices, features(list(indices)), strict=True):
                    labels[index] = feature[label_key].int64_list.value[0]
                    if "coarse_label" in info.features and 0 <= labels[index] < len(names):
                        coarse_of[labels[index]] = feature["coarse_label"].int64_list.value[0]
            return Split(LazyImages(decode, np.arange(len(labels)), shape), labels)

        test = "test" if "test" in info.splits else "validation"
        for what in ("train", test):
            if what not in info.splits:
                raise HeadSteerError(
                    f"{prepared}: it has no split {what!r}, only {', '.join(info.splits)}; choose another"
                )
        splits = split("train"), split(test)
    related = (coarse_of[:, None] == coarse_of) & ~np.eye(len(names), dtype=bool)
    return *splits, names, related if "coarse_label" in info.features else None


def _prepare_tfds(config: DataConfig, where: str) -> Any:
    """Download and prepare a dataset that TFDS knows -> its builder."""
    import tensorflow_datasets as tfds

    missing = f"config.data.name = {config.name!r} is not prepared in {where} (config.data.path)"
    with _blaming(missing, "check the name"):
        try:
            tfds.builder_cls(config.name.partition("/")[0].partition(":")[0])
        except tfds.core.DatasetNotFoundError:
            raise HeadSteerError(f"{missing} and TFDS knows no such dataset; check the name and the path") from None
    if importlib.util.find_spec("tensorflow") is None:
        raise HeadSteerError(f"{missing}; preparing it needs TensorFlow: pip install 'headsteer-jax[prepare]'")
    with _blaming(f"{missing} and could not be downloaded (network?)", f"prepare it elsewhere and copy it to {where}"):
        builder = tfds.builder(config.name, data_dir=config.path or None, file_format="array_record")
        builder.download_and_prepare()
    return builder


def gather(images: np.ndarray | LazyImages, indices: np.ndarray) -> np.ndarray:
    """[M] indices -> [M, height, width, channels] uint8, from a split's images in either form."""
    return images[indices] if isinstance(images, np.ndarray) else images.gather(indices)


T = TypeVar("T")


def prefetched(function: Callable[[int], T], count: int, start: int = 0, threads: int = 2) -> Iterator[T]:
    """function(i) for i in range(start, count), in order, computed ahead in threads.

    What a call raises is raised here when its turn comes.
    """
    # In a tuple, as grain leaves out elements that are None.
    ahead = grain.MapDataset.range(start, count).map(lambda i: (function(int(i)),))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return (element[0] for element in ahead.to_iter_dataset(options))


def batch_indices(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """[batch] indices of training step `step`: each epoch is a permutation that follows from (seed, epoch) alone.

    Resuming is arithmetic: no iterator has a state. The rest of an epoch that does not fill a batch is left out.
    """
    epoch, position = divmod(step, count // batch)
    order = np.random.default_rng([seed, 1, epoch]).permutation(count)
    return order[position * batch : (position + 1) * batch]
