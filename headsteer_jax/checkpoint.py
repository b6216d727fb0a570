"""What outlasts a run: checkpoints through orbax, and small JSON and array files, all written atomically."""

import errno
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from headsteer_jax.config import HeadSteerError

Tree = TypeVar("Tree")

# a stage that is not done goes on from what is left of it, and those after it are made again
MEND = "delete it and its stage's done.json, then run the same command with --overwrite"

for _name in ("absl", "asyncio"):  # orbax tells of every save, and of a failed one once for each array
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@contextmanager
def _once() -> Iterator[None]:
    """While orbax works: a failure is raised here; what its threads go on to print about it is left out."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    sys.unraisablehook = hook  # not after a failure: the threads outlast it


@contextmanager
def explained(path: Path) -> Iterator[None]:
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


def make_directory(path: Path) -> Path:
    """The directory, made where it was not.

    Raises:
      HeadSteerError: it cannot be made or written to.
    """
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: beside its place, flushed to disk, then renamed into it."""
    with explained(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def read_json(path: Path) -> Any:
    """Raises HeadSteerError where the file is damaged."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise HeadSteerError(f"{path}: missing or damaged ({error}); {MEND}") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Raises HeadSteerError where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a truncated zip fails in many ways
        raise HeadSteerError(f"{path}: missing or damaged ({error}); {MEND}") from None


class Checkpoints:
    """A directory of checkpoints of one pytree: the newest ones, or the best one.

    A checkpoint is a pytree of arrays and a JSON object; orbax writes both into a temporary directory and renames it,
    so that a half-written one is never read.
    """

    def __init__(self, directory: Path, keep: int = 1) -> None:
        self.directory = Path(os.path.abspath(directory))
        with explained(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
                ),
            )

    def save(self, step: int, tree: Any, about: Mapping[str, Any]) -> None:
        """Save, and wait until it is on disk.

        Raises:
          HeadSteerError: the disk is full or not writable; earlier checkpoints are intact.
        """
        with explained(self.directory / str(step)), _once():
            items = ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(dict(about)))
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest checkpoint's step."""
        return self._manager.latest_step()

    def restore(self, like: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """A checkpoint (None: the newest) as (pytree, JSON object), in the shapes and types of `like`.

        Raises:
          HeadSteerError: there is none, it is damaged, or its arrays have other shapes.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise HeadSteerError(f"{self.directory}: no checkpoint; {MEND}")
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), like)
        path = self.directory / str(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), about=ocp.args.JsonRestore())
        try:
            with _once():
                items = self._manager.restore(step, args=args)
            tree, about = items.state, items.about
        except Exception as error:  # orbax and tensorstore raise whatever the damage leads to
            reason = " ".join(str(error).split()).partition(" See full TensorStore")[0][:160]
            raise HeadSteerError(f"{path}: truncated, damaged or of another model ({reason}); {MEND}") from error
        for have, want in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
            if have.shape != want.shape or have.dtype != want.dtype:
                raise HeadSteerError(
                    f"{path}: of another model: an array of shape {have.shape} where this config has {want.shape}; "
                    "use its own config or another --workdir"
                )
        return tree, about

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a run that goes on from `step` makes them again."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)
