"""Files that are written whole or not at all, on a disk or in a bucket, and what goes wrong with them as one line."""

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from etils.epath import Path

from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime import hosts

AnyPath = str | os.PathLike[str]

# a stage that is not done goes on from what is left of it, and those after it are made again
REMAKE = "delete it and its stage's done.json, then run the same command with --overwrite"


def is_in_bucket(path: AnyPath) -> bool:
    return os.fspath(path).startswith("gs://")


def make_directory(path: str | Path) -> Path:
    """The directory, made where it was not.

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


def remove_directory(path: Path) -> None:
    """Where the program is killed meanwhile nothing is left that would be read as if it were whole: a rename is atomic.

    A bucket has no renames: there what is left of a stage keeps its started.json, which tells of what config it is,
    until the end.
    """
    doomed = path if is_in_bucket(path) else path.with_name(f".{path.name}.removed")
    if doomed != path:
        if doomed.exists():
            doomed.rmtree()
        if path.exists():
            path.rename(doomed)
    (doomed / "done.json").unlink(missing_ok=True)
    for inside in doomed.iterdir() if doomed.exists() else ():
        if inside.is_dir():
            inside.rmtree()
        elif inside.name != "started.json":
            inside.unlink()
    if doomed.exists():
        doomed.rmtree()


def write_atomically(file: AnyPath, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: beside its place, flushed to disk, then renamed into it.

    An object in a bucket appears whole by itself.
    """
    path = Path(file)
    with explain_errors(path):
        if is_in_bucket(path):
            whole = io.BytesIO()
            write(whole)
            path.write_bytes(whole.getvalue())
            return
        part = path.with_name(f".{path.name}.part")  # always the same: one that a killed run left is written over
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
    write_atomically(path, lambda file: file.write(content))


def write_text(path: AnyPath, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: AnyPath, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_arrays(path: AnyPath, arrays: Mapping[str, np.ndarray]) -> None:
    write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def read_json(path: AnyPath) -> Any:
    """Raises HeadSteerError where the file is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, OSError) as error:
        raise HeadSteerError(f"{path}: missing or damaged ({error}); {REMAKE}") from None


def read_arrays(path: AnyPath) -> dict[str, np.ndarray]:
    """Raises HeadSteerError where the file is missing or damaged."""
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a truncated zip fails in many ways
        raise HeadSteerError(f"{path}: missing or damaged ({error}); {REMAKE}") from None


@dataclass(frozen=True)
class Workdir:
    """A run's directory, on a disk or in a bucket.

    Every file is written on process 0 alone, whole or not at all; every process waits for it, and a failure is one line
    on all of them. `workdir / name` is a path, for code that reads or that has checkpoints there.
    """

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        """The last part of the path, which names the run."""
        return self.path.name

    def write_json(self, name: str, value: Any) -> None:
        """Write a value of JSON's types.

        Raises:
          HeadSteerError: the disk is full or not writable; a file that was there is then intact.
        """
        hosts.on_first_process(lambda: write_json(self.path / name, value))

    def write_text(self, name: str, text: str) -> None:
        """Write a text; see `write_json` for the errors."""
        hosts.on_first_process(lambda: write_text(self.path / name, text))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write bytes; see `write_json` for the errors."""
        hosts.on_first_process(lambda: write_bytes(self.path / name, content))

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays by name as a compressed .npz; see `write_json` for the errors."""
        hosts.on_first_process(lambda: write_arrays(self.path / name, arrays))
