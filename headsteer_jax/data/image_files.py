"""Image files that a user names: which ones there are, and their pixels; one that cannot be read stops nothing."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from headsteer_jax.data.decode import decode_image, readable_suffixes
from headsteer_jax.data.names import is_system_name
from headsteer_jax.errors import HeadSteerError

STANDARD_INPUT = "-"  # in place of a path: the paths are read there, one a line
REMEDY = "give image files, or directories of them"


def list_images(paths: Sequence[str], lines: Iterable[str] = ()) -> list[Path]:
    """List image files: those that are named, and those that lie below directories that are named, in order.

    A file of standard input may be missing: like one that is damaged, it is found out when it is read.

    Args:
      paths: files, directories, or `-` for the paths of `lines`.
      lines: those of standard input.

    Raises:
      HeadSteerError: a path does not exist, a directory holds no image, or standard input names nothing.
    """
    files: list[Path] = []
    for text in paths:
        path = Path(text)
        if text == STANDARD_INPUT:
            listed = [Path(name) for line in lines if (name := line.rstrip("\r\n"))]
            if not listed:
                raise HeadSteerError(f"{text}: standard input names no image; write one path a line to it")
            for place in listed:
                files += _list_directory(place) if place.is_dir() else [place]
        elif path.is_dir():
            files += _list_directory(path)
        elif path.exists():
            files.append(path)
        else:
            raise HeadSteerError(f"{path}: no such file; {REMEDY}")
    return files


def _list_directory(directory: Path) -> list[Path]:
    """List the images below a directory, sorted; raises HeadSteerError if there is none."""
    inside = sorted(
        file for file in directory.rglob("*")
        if file.suffix.lower() in readable_suffixes() and not is_system_name(file.name) and file.is_file()
    )  # fmt: skip
    if not inside:
        raise HeadSteerError(f"{directory}: there is no image in it; {REMEDY}")
    return inside


def read_images(files: Sequence[Path], shape: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """Read image files, cropped at the centre and resized to one shape, as for the data of a run.

    Args:
      shape: height, width and channels.

    Returns:
      [N, height, width, channels] uint8, black where a file cannot be read, and for each file why; empty if it can.
    """
    images, errors = np.zeros((len(files), *shape), np.uint8), [""] * len(files)
    for place, file in enumerate(files):
        try:
            if not file.exists():
                raise HeadSteerError(f"{file}: no such file; correct the path")
            images[place] = decode_image(file, str(file), shape, fit=True)
        except HeadSteerError as error:
            errors[place] = str(error)
    return images, errors
