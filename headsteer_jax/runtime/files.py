"""Files that are written whole or not at all, on a disk or in a bucket, and what goes wrong with them as one line."""

import errno
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from etils.epath import Path

from headsteer_jax.errors import HeadSteerError

AnyPath = str | os.PathLike[str]

# a stage that is not done goes on from what is left of it, and those after it are made again
REMAKE = "delete it and its stage's done.json, then run the same command with --overwrite"

for _name in ("absl", "asyncio"):  # orbax tells of every save, and of a failed one once for each array
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@contextmanager
def explain_write_errors(path: AnyPath) -> Iterator[None]:
    """Turn what the operating system says about a write into one line."""
    try:
        yield
    except HeadSteerError:
        raise
    except Exception as error:  # tensorstore reports a full disk as a ValueError with the system's text
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        denied = getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM)
        if full:
            raise HeadSteerError(
                f"{path}: the disk is full; what was saved before is intact: free some space and run the same command"
            ) from error
        if denied or "Permission denied" in str(error):
            raise HeadSteerError(f"{path}: not writable; choose another --workdir") from error
        raise


def is_in_bucket(path: AnyPath) -> bool:
    return os.fspath(path).startswith("gs://")


def make_directory(path: str | Path) -> Path:
    """The directory, made where it was not.

    Raises:
      HeadSteerError: it cannot be made or written to.
    """
    path = Path(path)
    with explain_write_errors(path):
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
    with explain_write_errors(path):
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
