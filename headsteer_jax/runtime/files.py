"""Files that are written completely or not at all, on a disk or in a bucket; every failure is a one-line error."""

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from etils.epath import Path

from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime import hosts

AnyPath = str | os.PathLike[str]

# Without its done.json a stage runs again, from the files that are left, and so do the stages that read it.
REMAKE = "delete it and its stage's done.json, then run the same command with --overwrite"


def is_in_bucket(path: AnyPath) -> bool:
    """Say whether a path is in a Google Cloud Storage bucket."""
    return os.fspath(path).startswith("gs://")


def make_directory(path: str | Path) -> Path:
    """Make a directory, with its parents, unless it exists, and return its path.

    Raises:
      HeadSteerError: it cannot be made or written to.
    """
    path = Path(path)
    with explain_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if not is_in_bucket(path):
            with tempfile.TemporaryFile(dir=path):
                pass
    return path


def check_replaceable(path: AnyPath, mark: str, remedy: str = "choose another path") -> None:
    """Check that writing a file replaces nothing, or only a file that HeadSteer wrote.

    Args:
      mark: a text that every file of this kind has if HeadSteer wrote it.

    Raises:
      HeadSteerError: the file exists, without the mark.
    """
    file = Path(path)
    with explain_errors(file, remedy):
        if file.exists() and (file.is_dir() or mark.encode() not in file.read_bytes()):
            raise HeadSteerError(f"{path}: exists, and HeadSteer did not write it; {remedy}")


def write_atomically(file: AnyPath, write: Callable[[BinaryIO], object]) -> None:
    """Write a file completely or not at all: to a temporary name, flushed to disk, then renamed.

    An object in a bucket needs none of this: it appears only when it is complete.

    Args:
      write: writes the content to the opened file.

    Raises:
      HeadSteerError: the disk is full or not writable; an earlier file is intact.
    """
    path = Path(file)
    with explain_errors(path):
        if is_in_bucket(path):
            buffer = io.BytesIO()
            write(buffer)
            path.write_bytes(buffer.getvalue())
            return
        part = path.with_name(f".{path.name}.part")  # always the same name, so that no killed run's file stays behind
        try:
            with open(part, "wb") as opened:
                write(opened)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Write bytes atomically; see `write_atomically` for the errors."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: AnyPath, text: str) -> None:
    """Write a text in UTF-8 atomically; see `write_atomically` for the errors."""
    write_bytes(path, text.encode())


def write_json(path: AnyPath, value: Any) -> None:
    """Write a value of JSON's types atomically; see `write_atomically` for the errors.

    Raises:
      ValueError: the value holds NaN or infinity.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_arrays(path: AnyPath, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as a compressed .npz atomically; see `write_atomically` for the errors."""
    write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def read_json(path: AnyPath) -> Any:
    """Read a JSON file.

    Raises:
      HeadSteerError: it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise HeadSteerError(f"{path}: missing or damaged ({error}); {REMAKE}") from None


def read_arrays(path: AnyPath) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, by name.

    Raises:
      HeadSteerError: it is missing or damaged.
    """
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a truncated zip fails in many ways
        raise HeadSteerError(f"{path}: missing or damaged ({error}); {REMAKE}") from None


@dataclass(frozen=True)
class Workdir:
    """A run's directory, on a disk or in a bucket.

    Process 0 alone writes a file, completely or not at all. Every process waits for it, and a failure is the same
    one-line error on all of them. `workdir / name` is a path, for code that reads files or keeps checkpoints there.
    """

    path: Path
    redirected: Mapping[str, str] = field(default_factory=dict)
    """The first parts of names that are redirected while a stage is computed again beside its old results."""
    title: str = ""
    """The run's name, if the directory is not named after it: the hub's cache names one after a commit."""

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file or directory in it."""
        first, slash, remainder = name.partition("/")
        return self.path / f"{self.redirected.get(first, first)}{slash}{remainder}"

    @property
    def name(self) -> str:
        """Return the run's name: its title, else the last part of the path."""
        return self.title or self.path.name or os.path.basename(os.path.abspath(self.path))  # `.` has no last part

    def write_json(self, name: str, value: Any) -> None:
        """Write a value of JSON's types.

        Raises:
          HeadSteerError: the disk is full or not writable; a file that was there is then intact.
        """
        hosts.on_first_process(lambda: write_json(self / name, value))

    def write_text(self, name: str, text: str) -> None:
        """Write a text; see `write_json` for the errors."""
        hosts.on_first_process(lambda: write_text(self / name, text))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write bytes; see `write_json` for the errors."""
        hosts.on_first_process(lambda: write_bytes(self / name, content))

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays by name as a compressed .npz; see `write_json` for the errors."""
        hosts.on_first_process(lambda: write_arrays(self / name, arrays))
