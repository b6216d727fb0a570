"""The source tfds: a dataset of TensorFlow Datasets, read without TensorFlow once it is prepared."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headsteer_jax.config.schema import DataConfig
from headsteer_jax.data.dataset import LazyImages, Split
from headsteer_jax.data.decode import decode_image, verify_image
from headsteer_jax.data.splits import USUAL_NAMES, RawData, choose_splits
from headsteer_jax.errors import HeadSteerError, explain_errors

SAMPLED_LABELS = 100  # of a split; if all of them are -1, the split has no labels


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

    path = os.path.expanduser(config.path)
    directory = path or tfds.core.constants.DATA_DIR
    title = f"{config.name} in {directory}"
    with explain_errors(title, "check config.data.name, and prepare it with file_format='array_record'"):
        try:
            builder = builder_from_files(config.name, data_dir=path or None)
        except tfds.core.DatasetNotFoundError:
            builder = _prepare_tfds(config.name, directory)
        image_key, label_key = _find_tfds_features(builder.info, title)
        class_names = tuple(builder.info.features[label_key].names)
        height, width, _ = builder.info.features[image_key].shape
        fit = height is None or width is None
        side = (config.image_size, config.image_size) if fit else (height, width)
        reader = _TFDSReader(title, builder, image_key, label_key, (*side, config.channels), fit)
        tried = {name.casefold() for name in (config.splits or USUAL_NAMES)}
        tried_splits = [name for name in builder.info.splits if name.casefold() in tried]
        unlabelled = {name: "every label is -1" for name in tried_splits if not reader.has_labels(name)}
        labelled = [name for name in builder.info.splits if name not in unlabelled]
        names = choose_splits(title, labelled, unlabelled, config.splits)
        coarse_C = np.zeros(len(class_names), np.int64)
        train, validation, test = (reader.read_split(name, coarse_C) if name else None for name in names)
    assert train is not None
    related = (coarse_C[:, None] == coarse_C) & ~np.eye(len(class_names), dtype=bool)
    has_coarse = "coarse_label" in builder.info.features
    return RawData(train, test, class_names, related if has_coarse else None, validation)


def tfds_places(config: DataConfig) -> list[Path]:
    """Return the directory of the prepared dataset, unless it is in a bucket."""
    directory = config.path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"  # TFDS's own default
    return (
        []
        if "://" in directory
        else [Path(os.path.expanduser(directory)) / config.name.partition("/")[0].partition(":")[0]]
    )


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
    shape: tuple[int, int, int]  # of every image; see `decode_image`
    fit: bool

    def has_labels(self, name: str) -> bool:
        """Say whether a split has labels: TFDS writes -1 if the makers do not publish them."""
        records = self._open(name)
        indices = list(range(min(len(records), SAMPLED_LABELS)))
        labels = [feature[self.label_key].int64_list.value[0] for _, feature in self._parse(records, name, indices)]
        return not labels or any(label != -1 for label in labels)

    def read_split(self, name: str, coarse_C: np.ndarray) -> Split:
        """Read a split's labels and keys, which takes as long as reading its files does; its images stay lazy.

        Args:
          coarse_C: gets the coarse label of every class that occurs, if the dataset has coarse labels.
        """
        records = self._open(name)
        has_coarse = "coarse_label" in self.builder.info.features

        def images(indices: Sequence[int]) -> Iterator[tuple[str, bytes]]:
            for index, (_, feature) in zip(indices, self._parse(records, name, indices), strict=True):
                yield f"{self.title}, split {name!r}, image {index}", feature[self.image_key].bytes_list.value[0]

        def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
            return (decode_image(image, culprit, self.shape, self.fit) for culprit, image in images(indices))

        def verify(indices: Sequence[int]) -> Iterator[str]:
            for culprit, image in images(indices):
                try:
                    verify_image(image, culprit)
                except HeadSteerError as error:
                    yield str(error)
                else:
                    yield ""

        labels, keys = np.zeros(len(records), np.int32), np.zeros(len(records), np.uint64)
        for start in range(0, len(labels), 1000):
            indices = range(start, min(start + 1000, len(labels)))
            for index, (record, feature) in zip(indices, self._parse(records, name, list(indices)), strict=True):
                labels[index] = feature[self.label_key].int64_list.value[0]
                keys[index] = int.from_bytes(hashlib.blake2b(record, digest_size=8).digest())
                if has_coarse and 0 <= labels[index] < len(coarse_C):
                    coarse_C[labels[index]] = feature["coarse_label"].int64_list.value[0]
        return Split(LazyImages(decode, np.arange(len(labels)), self.shape, verify), labels, keys)

    def _open(self, name: str) -> Any:
        """Open a split's records, which are read as bytes."""
        import tensorflow_datasets as tfds

        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return self.builder.as_data_source(name, deserialize_method=raw)

    def _parse(self, records: Any, name: str, indices: Sequence[int]) -> Iterator[tuple[bytes, Any]]:
        """Yield the bytes and the features of a split's records."""
        from tensorflow_datasets.proto import tf_example_pb2

        with explain_errors(f"{self.title}, split {name!r}", "prepare it again"):
            for record in records.__getitems__(indices):
                yield record, tf_example_pb2.Example.FromString(record).features.feature


def _prepare_tfds(name: str, directory: str) -> Any:
    """Download and prepare a dataset that TFDS knows, and return its builder.

    Raises:
      HeadSteerError: TFDS does not know it, TensorFlow is not installed, or the download fails.
    """
    import tensorflow_datasets as tfds

    missing = f"config.data.name = {name!r} is not prepared in {directory} (config.data.path)"
    with explain_errors(missing, "check the name"):
        try:
            tfds.builder_cls(name.partition("/")[0].partition(":")[0])
        except tfds.core.DatasetNotFoundError:
            raise HeadSteerError(f"{missing} and TFDS knows no such dataset; check the name and the path") from None
    if importlib.util.find_spec("tensorflow") is None:
        raise HeadSteerError(f"{missing}; preparing it needs TensorFlow: pip install 'headsteer-jax[prepare]'")
    with explain_errors(
        f"{missing} and could not be downloaded (network?)", f"prepare it elsewhere and copy it to {directory}"
    ):
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        builder.download_and_prepare()
    return builder
