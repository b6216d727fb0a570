"""The source folder: a directory of images for each class, or one of the layouts of ImageNet and Tiny ImageNet."""

import difflib
import hashlib
import logging
import os
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headsteer_jax.config.schema import DataConfig
from headsteer_jax.data.annotations import Annotations, find_annotations
from headsteer_jax.data.dataset import LazyImages, Split
from headsteer_jax.data.decode import decode_image, read_size, readable_suffixes, verify_image
from headsteer_jax.data.names import is_system_name, normalise_name
from headsteer_jax.data.splits import TRAIN_NAMES, USUAL_NAMES, RawData, choose_splits, find_by_role
from headsteer_jax.errors import HeadSteerError, explain_errors

logger = logging.getLogger(__name__)

IMAGENET = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # where Kaggle's and the makers' archives hold the splits
CONTENT_BYTES = 2**30  # the largest split, in bytes, whose files are hashed with their content
LEVELS = 3  # how deep the splits are searched for within single directories


class ImageFile(NamedTuple):
    """An image file of a split."""

    path: str  # relative to the split's directory
    bytes: int
    class_name: str


class SplitFiles(NamedTuple):
    """The image files of a split, class by class."""

    directory: Path
    files: list[ImageFile]
    passed_over: Counter[str]  # the other files, by reason
    examples: dict[str, str]  # of each reason one file


def read_folder(config: DataConfig) -> RawData:
    """Read a directory tree <path>/<split>/<class>/.../<image>.

    The splits are found by name, see `choose_splits`. A split whose images lie in one directory is read if a file of
    its makers has the classes, see `find_annotations`; otherwise it has no labels.

    Raises:
      HeadSteerError: a split is missing, test has a class that train lacks, or an image cannot be read.
    """
    root = _find_root(_check_directory(config), config.splits)
    directories = _list_candidates(root, config.splits)
    train_name = config.splits[0] if config.splits else find_by_role(list(directories), TRAIN_NAMES)
    train = _skip_repeated_level(directories.get(train_name, root / train_name)) if train_name else None
    if train is None or not train.is_dir():
        raise HeadSteerError(f"{_show(root)}: there is no directory {train_name or 'train'!r} in it; {_advise(root)}")
    classes = _list_classes(train)
    if not classes:
        raise HeadSteerError(
            f"{_show(train)}: there is no directory in it; create one for each class and put its images there"
        )
    reasons = {name: _explain_missing_labels(path, classes) for name, path in directories.items()}
    labelled = [name for name, reason in reasons.items() if not reason]
    unlabelled = {name: reason for name, reason in reasons.items() if reason}
    unlabelled |= dict.fromkeys(_list_others(root, list(directories.values())), "its name is not a split's")
    names = choose_splits(_show(root), labelled, unlabelled, config.splits)
    listed = [_list_split(directories[name], classes) if name else None for name in names]
    size = _find_common_size([split for split in listed if split])
    width, height = size or (config.image_size, config.image_size)
    shape, class_names = (height, width, config.channels), tuple(classes)
    train_split, validation, test = (
        _make_split(split, class_names, shape, fit=size is None) if split else None for split in listed
    )
    assert train_split is not None
    return RawData(train_split, test, class_names, validation=validation)


def folder_places(config: DataConfig) -> list[Path]:
    """Return the directories that hold the splits' images; the whole directory if none is there."""
    path = Path(os.path.expanduser(config.path))
    with explain_errors(_show(path), "set config.data.path to a directory that you may read"):
        if not path.is_dir():
            return [path]
        root = _find_root(path, config.splits)
        return list(_list_candidates(root, config.splits).values()) or [root]


def _check_directory(config: DataConfig) -> Path:
    """Check that config.data.path is a directory, and say what it is otherwise."""
    path = Path(os.path.expanduser(config.path))
    with explain_errors(_show(path), "set config.data.path to a directory that you may read"):
        if path.is_dir():
            return path
        if not path.exists():
            raise HeadSteerError(f"{_show(path)}: there is no such directory; correct config.data.path")
        if path.suffix == ".npz":
            raise HeadSteerError(f"{_show(path)}: an npz file, not a directory; pass --config.data.source=npz")
        if path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path)):
            raise HeadSteerError(
                f"{_show(path)}: an archive; unpack it, and set config.data.path to the resulting directory"
            )
        raise HeadSteerError(f"{_show(path)}: a file; set config.data.path to the directory that holds the images")


def _find_root(path: Path, splits: Sequence[str]) -> Path:
    """Find the directory that holds the splits: this one, ImageNet's below it, or one that single directories wrap."""
    root = path
    for _ in range(LEVELS):
        names = [directory.name for directory in _list_directories(root)]
        if find_by_role(names, TRAIN_NAMES) or (splits and (root / splits[0]).is_dir()):
            return root
        for below in IMAGENET:
            if (root / below).is_dir():
                return root / below
        if len(names) != 1:
            break
        root = root / names[0]
    return path


def _list_candidates(root: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Return the directories of the splits that are there, by name: those named by the config, or the usual ones."""
    present = {directory.name: directory for directory in _list_directories(root)}
    if splits:
        by_case = {name.casefold(): path for name, path in present.items()}
        named = {name: by_case.get(name.casefold(), root / name) for name in splits}
        by_name = {name: path for name, path in named.items() if path.is_dir()}
    else:
        by_name = {name: path for name, path in present.items() if name.casefold() in USUAL_NAMES}
    return {name: _skip_repeated_level(path) for name, path in by_name.items()}


def _list_others(root: Path, splits: Sequence[Path]) -> list[str]:
    """List the names of the directories that are not splits, and that neither contain one nor lie in one."""
    return [
        other.name
        for other in _list_directories(root)
        if not any(other == split or other in split.parents or split in other.parents for split in splits)
    ]


def _skip_repeated_level(split: Path) -> Path:
    """Enter a split that only wraps another directory of the same name, as some archives do."""
    inside = _list_directories(split) if split.is_dir() else []
    return inside[0] if len(inside) == 1 and inside[0].name.casefold() == split.name.casefold() else split


def _advise(root: Path) -> str:
    """Say what a directory without a split `train` needs."""
    names = [directory.name for directory in _list_directories(root)]
    if not names:
        return "create train and test there, with a directory for each class"
    return (
        f"it holds {', '.join(map(normalise_name, names[:5]))}{', ...' * (len(names) > 5)}; name the directories of "
        "the splits in config.data.splits or, if these are the classes, pass --config.data.splits=. to cut all splits"
    )


def _list_directories(directory: Path) -> list[Path]:
    """List the directories in a directory, without hidden ones."""
    remedy = "set config.data.path to a directory that you may read"
    with explain_errors(_show(directory), remedy), os.scandir(directory) as entries:  # no system call for each file
        return sorted(Path(entry) for entry in entries if entry.is_dir() and not is_system_name(entry.name))


def _list_classes(split: Path) -> dict[str, Path]:
    """Return the class directories of a split by name, in the names' order.

    Raises:
      HeadSteerError: two names differ in their Unicode form only.
    """
    classes: dict[str, Path] = {}
    for path in _list_directories(split):
        name = normalise_name(path.name)
        if name in classes:
            raise HeadSteerError(
                f"{_show(split)}: two directories are named {name!r}, in two Unicode forms; merge or rename one"
            )
        classes[name] = path
    return dict(sorted(classes.items()))


def _explain_missing_labels(split: Path, classes: Mapping[str, Path]) -> str:
    """Return the reason why a split has no labels; empty if it has."""
    inside = _list_classes(split)
    if len(inside) > 1 or set(inside) & set(classes) or find_annotations(split):
        return ""
    has_file = any(path.is_file() for path in split.iterdir())
    return "no class directories" if inside or has_file else "empty"


def _list_split(split: Path, classes: Mapping[str, Path]) -> SplitFiles:
    """List a split's image files class by class, and log which files are passed over.

    Args:
      classes: the classes of train.

    Raises:
      HeadSteerError: the split has a class that train lacks.
    """
    inside = _list_classes(split)
    annotations = None if set(inside) & set(classes) else find_annotations(split)
    split_files = SplitFiles(split, [], Counter(), {})
    if annotations:
        _list_annotated(split_files, annotations, classes)
    else:
        unknown = set(inside) - set(classes)
        if unknown:
            name = min(unknown)
            spellings = {other.casefold(): other for other in classes}
            close = difflib.get_close_matches(name.casefold(), spellings, n=1, cutoff=0.9)
            advice = f"did you mean {spellings[close[0]]!r}?" if close else "remove it or add training images"
            raise HeadSteerError(f"{_show(inside[name])}: the training split has no such class; {advice}")
        for entry in sorted(os.scandir(split), key=lambda entry: entry.name):
            if not entry.is_dir() and not is_system_name(entry.name):
                _pass_over(split_files, entry.name, "outside of the class directories")
        for name, directory in inside.items():
            for path, size in _walk(split_files, directory):
                split_files.files.append(ImageFile(path, size, name))
    _log_passed_over(split_files)
    return split_files


def _list_annotated(split_files: SplitFiles, annotations: Annotations, classes: Mapping[str, Path]) -> None:
    """List the image files of a split whose classes are in a file of its makers, class by class."""
    unknown = set(annotations.classes.values()) - set(classes)
    if unknown:
        raise HeadSteerError(
            f"{_show(annotations.file)}: the training split has no class {min(unknown)!r}; "
            "rename the class directories of train to match"
        )
    logger.info(f"{_show(split_files.directory)}: reading the classes from {_show(annotations.file)}")
    files = []
    for path, size in _walk(split_files, split_files.directory):
        class_name = annotations.classes.get(Path(path).stem)
        if class_name is None:
            _pass_over(split_files, path, f"not in {annotations.file.name}")
        else:
            files.append(ImageFile(path, size, class_name))
    split_files.files.extend(sorted(files, key=lambda file: file.class_name))
    missing = len(annotations.classes) - len(files)
    if missing > 0:
        logger.warning(f"{_show(split_files.directory)}: {missing} images of {annotations.file.name} are missing")


def _walk(split_files: SplitFiles, directory: Path) -> Iterator[tuple[str, int]]:
    """Yield the image files below a directory and their sizes in bytes, in the order of their normalised names.

    Paths are relative to the split's directory. Other files, and links to directories that are read anyway, are counted
    as passed over.
    """
    images: list[tuple[list[str], str, int]] = []
    real = os.path.realpath(directory)
    visited: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    with explain_errors(_show(directory), "make all of it readable"):
        for place, directories, files in os.walk(directory, followlinks=True, onerror=refuse):
            real_place = os.path.realpath(place)
            is_above = real_place != real and os.path.commonpath([real_place, real]) == real_place
            if real_place in visited or is_above:
                directories.clear()
                _pass_over(
                    split_files,
                    os.path.relpath(place, split_files.directory),
                    "links to a directory that is read anyway",
                )
                continue
            visited.add(real_place)
            place_in_split = os.path.relpath(place, split_files.directory)
            directories[:] = sorted(name for name in directories if not is_system_name(name))
            for name in sorted(files):
                if is_system_name(name):
                    continue
                path = name if place_in_split == "." else os.path.join(place_in_split, name)
                reason, size = _inspect_file(os.path.join(place, name))
                if reason:
                    _pass_over(split_files, path, reason)
                else:
                    images.append((normalise_name(path).split(os.sep), path, size))
    yield from ((path, size) for _, path, size in sorted(images))


def _inspect_file(path: str) -> tuple[str, int]:
    """Return the reason why a file is not an image (empty if it may be one) and its size in bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readable_suffixes():
        return (normalise_name(suffix) if suffix else "without a suffix"), 0
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "broken links", 0
    return ("" if stat.S_ISREG(status.st_mode) else "no regular files"), status.st_size


def _pass_over(split_files: SplitFiles, path: str, reason: str) -> None:
    split_files.passed_over[reason] += 1
    split_files.examples.setdefault(reason, normalise_name(path))


def _log_passed_over(split_files: SplitFiles) -> None:
    """Log how many files of a split are passed over and why, which lie deeper, and which are animated."""
    total, skipped = len(split_files.files) + split_files.passed_over.total(), split_files.passed_over.total()
    if skipped:
        counts = [
            f"{count} {reason} ({split_files.examples[reason]})"
            for reason, count in split_files.passed_over.most_common(5)
        ]
        ellipsis = ", ..." * (len(split_files.passed_over) > 5)
        logger.warning(
            f"{_show(split_files.directory)}: {skipped} of {total} files are passed over: {', '.join(counts)}{ellipsis}"
        )
    deeper = Counter(
        os.path.dirname(file.path) for file in split_files.files if os.path.dirname(file.path).count(os.sep) > 0
    )  # fmt: skip
    if deeper:
        logger.info(
            f"{_show(split_files.directory)}: images of subdirectories count for the class above them: "
            f"{deeper.total()} in {len(deeper)} of them, such as {normalise_name(min(deeper))}"
        )
    animated = sum(file.path.lower().endswith((".gif", ".apng")) for file in split_files.files)
    if animated:
        logger.info(f"{_show(split_files.directory)}: of {animated} GIF or APNG files only the first frame is read")


def _find_common_size(splits: Sequence[SplitFiles]) -> tuple[int, int] | None:
    """Return the (width, height) that all images have; None if they have several sizes, or if there are no images."""
    sizes: set[tuple[int, int]] = set()
    for split in splits:
        for file in split.files:
            sizes.add(read_size(split.directory / file.path))
            if len(sizes) > 1:
                return None
    return sizes.pop() if sizes else None


def _make_split(split_files: SplitFiles, class_names: tuple[str, ...], shape: tuple[int, int, int], fit: bool) -> Split:
    """Make a lazy split of image files, their labels and keys; see `decode_image` for `shape` and `fit`."""
    labels = {name: label for label, name in enumerate(class_names)}
    paths = [os.path.join(split_files.directory, file.path) for file in split_files.files]

    def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
        return (decode_image(paths[i], paths[i], shape, fit) for i in indices)

    def verify(indices: Sequence[int]) -> Iterator[str]:
        for i in indices:
            try:
                verify_image(paths[i], paths[i])
            except HeadSteerError as error:
                yield str(error)
            else:
                yield ""

    return Split(
        LazyImages(decode, np.arange(len(paths)), shape, verify),
        np.array([labels[file.class_name] for file in split_files.files], np.int32),
        _make_keys(split_files),
    )


def _make_keys(split_files: SplitFiles) -> np.ndarray:
    """Hash each image file [N] uint64: its path within its class, the same on every system, its size, and its content.

    The content is left out of a split whose files have more than CONTENT_BYTES: reading them would take minutes.
    """
    reads_content = sum(file.bytes for file in split_files.files) <= CONTENT_BYTES

    def make_key(file: ImageFile) -> int:
        name = normalise_name(file.path).replace(os.sep, "/").removeprefix(f"{file.class_name}/")
        digest = hashlib.blake2b(f"{name}\0{file.bytes}".encode(), digest_size=8)
        if reads_content:
            path = os.path.join(split_files.directory, file.path)
            with explain_errors(normalise_name(path), "replace or remove it"), open(path, "rb") as opened:
                digest.update(opened.read())
        return int.from_bytes(digest.digest())

    with ThreadPoolExecutor() as threads:
        return np.array(list(threads.map(make_key, split_files.files)), np.uint64)


def _show(path: Path) -> str:
    return normalise_name(str(path))
