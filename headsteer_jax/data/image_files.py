"""Image files that a user names: which ones there are, and their pixels; one that cannot be read stops nothing."""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headsteer_jax.config.paths import expand_path, is_unicode
from headsteer_jax.data.decode import decode_image, readable_suffixes
from headsteer_jax.data.names import is_system_name, normalise_name
from headsteer_jax.errors import HeadSteerError, explain_errors

STANDARD_INPUT = "-"  # in place of a path: the paths are read there, one a line
REMEDY = "give image files, or directories of them"


class ImageFile(NamedTuple):
    """An image file that a user named."""

    path: Path
    error: str = ""  # why it cannot be read, as far as that is known before it is opened


def list_images(paths: Sequence[str], lines: Iterable[str] = ()) -> list[ImageFile]:
    """List image files: those that are named, and those that lie below directories that are named, in order.

    What cannot be read is listed too, with the reason, so that it does not stop the others.

    Args:
      paths: files, directories, or `-` for the paths of `lines`. A leading `~` is a home directory, but not in `lines`.
      lines: those of standard input.
    """
    files: list[ImageFile] = []
    for text in paths:
        if text == STANDARD_INPUT:
            files += _list_lines(lines)
        else:
            files += _list_argument(text)
    return files


def _list_lines(lines: Iterable[str]) -> list[ImageFile]:
    """List the image files that the lines of standard input name."""
    files = [file for line in lines if (name := line.rstrip("\r\n")) for file in _list_place(Path(name))]
    missing = f"{STANDARD_INPUT}: standard input names no image; write one path a line to it"
    return files or [ImageFile(Path(STANDARD_INPUT), missing)]


def _list_argument(text: str) -> list[ImageFile]:
    """List the image files that an argument of the command line names."""
    try:
        # a name that is not UTF-8 can be read here; elsewhere it is refused, because it cannot be stored as text
        return _list_place(Path(expand_path(text, "IMAGE", buckets=False) if is_unicode(text) else text))
    except HeadSteerError as error:
        return [ImageFile(Path(text), str(error))]


def _list_place(path: Path) -> list[ImageFile]:
    """List one file, or the images below a directory; if it cannot be read, it is listed with the reason."""
    name = normalise_name(str(path))
    try:
        with explain_errors(name, "correct the path"), explain_errors(name):
            try:
                is_directory = stat.S_ISDIR(path.stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                raise HeadSteerError(f"{name}: no such file; {REMEDY}") from None
            except PermissionError:
                remedy = "give yourself the right to enter its directory (chmod, chown)"
                raise HeadSteerError(f"{name}: cannot be reached; {remedy}") from None
    except HeadSteerError as error:
        return [ImageFile(path, str(error))]
    return _list_directory(path) if is_directory else [ImageFile(path)]


def _list_directory(directory: Path) -> list[ImageFile]:
    """List the images below a directory, sorted, and the directories there that cannot be read."""
    unreadable: list[ImageFile] = []

    def note_error(error: OSError) -> None:
        name = normalise_name(os.fspath(error.filename))
        reason = f"the directory cannot be read ({error.strerror}); give yourself the right to read it (chmod, chown)"
        unreadable.append(ImageFile(Path(error.filename), f"{name}: {reason}"))

    inside = [
        ImageFile(Path(parent, name))
        for parent, _, names in os.walk(directory, onerror=note_error)
        for name in names
        if Path(name).suffix.lower() in readable_suffixes()
        and not is_system_name(name)
        and _may_be_image(Path(parent, name))
    ]
    if not inside and not unreadable:
        return [ImageFile(directory, f"{normalise_name(str(directory))}: there is no image in it; {REMEDY}")]
    return sorted(inside + unreadable)


def _may_be_image(path: Path) -> bool:
    """Say whether something in a directory is a file, as far as the operating system tells."""
    try:
        return path.is_file()
    except OSError:  # reading it will say why
        return True


def read_images(files: Sequence[ImageFile], shape: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """Read image files, cropped at the centre and resized to one shape, as for the data of a run.

    Args:
      shape: height, width and channels.

    Returns:
      [N, height, width, channels] uint8, black where a file cannot be read, and for each file why; empty if it can.
    """
    images, errors = np.zeros((len(files), *shape), np.uint8), [file.error for file in files]
    for place, (path, known_error) in enumerate(files):
        if known_error:
            continue
        try:
            images[place] = decode_image(path, str(path), shape, fit=True)
        except HeadSteerError as error:
            errors[place] = str(error)
    return images, errors
