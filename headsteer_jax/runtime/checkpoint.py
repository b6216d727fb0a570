"""Checkpoints of training states: written through orbax with checksums, on local disk or in a bucket.

A checkpoint is written atomically, every host writes its parts of it, and a damaged one is noticed when it is read.
"""

import functools
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path

from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.files import REMAKE, AnyPath, is_in_bucket

logger = logging.getLogger(__name__)

Tree = TypeVar("Tree")

FORMAT = 1  # of checkpoints: raise it when older programs cannot read them


@contextmanager
def _silence_thread_errors() -> Iterator[None]:
    """Keep orbax's threads from printing about a failure that the caller raises anyway."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    sys.unraisablehook = hook  # not restored after a failure, as the threads outlast it


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep orbax from warning about options that are meant as they are: a notebook stays silent."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        log.setLevel(level)


def _crc32(leaf: Any) -> int:
    """Compute the checksum of an array's bits."""
    return zlib.crc32(np.ascontiguousarray(hosts.to_numpy(leaf)).tobytes())


def _checksums(tree: Any, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Compute the checksums of every array and of the metadata: orbax and its storage notice some damage, not all."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    checksums = {jax.tree_util.keystr(path): _crc32(leaf) for path, leaf in leaves}
    return checksums | {"about": zlib.crc32(json.dumps(metadata, sort_keys=True).encode())}


class DamagedCheckpointError(HeadSteerError):
    """The error for a checkpoint that is not what was written."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask whether SIGTERM came: that would disturb the counting in `preemption`."""

    def reached_preemption(self, step: int) -> bool:
        """Return False: `preemption` alone decides when to stop."""
        return False


TRANSIENT_ERRORS = "UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"


def _is_transient(error: Exception) -> bool:
    """Say whether trying again may help: a file that could not be read need not be damaged."""
    io = isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError)
    return io or isinstance(error, MemoryError) or bool(re.search(TRANSIENT_ERRORS, str(error)))


class Checkpoints:
    """A directory that holds the newest checkpoints of one pytree.

    A checkpoint is a pytree of arrays and a JSON object of metadata, with checksums of both. Orbax writes it into a
    temporary directory and renames that, so that a half-written one is never read. Training goes on while it writes.
    """

    def __init__(self, directory: AnyPath, keep: int = 1, writes: bool = True) -> None:
        """Open the directory.

        Args:
          keep: how many checkpoints stay; older ones are deleted.
          writes: the caller will write here, so the remains of an interrupted write are deleted. A reader passes False,
            as a run may be writing there.
        """
        directory = os.fspath(directory)
        self.directory = Path(directory if is_in_bucket(directory) else os.path.abspath(directory))
        # If they are listed, processes wait for each other through the coordinator, which gives up when one has failed.
        processes = set(range(hosts.process_count())) if hosts.process_count() > 1 else None
        multiprocessing = ocp.options.MultiprocessingOptions(primary_host=0, active_processes=processes)
        with explain_errors(self.directory):
            if writes:
                hosts.on_first_process(lambda: self.directory.mkdir(parents=True, exist_ok=True))
            elif not self.directory.exists():
                raise HeadSteerError(f"{self.directory}: no checkpoint; {REMAKE}")
            with _errors_only():
                options = ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=False, cleanup_tmp_directories=writes, read_only=not writes,
                    single_host_load_and_broadcast=hosts.process_count() > 1, multiprocessing_options=multiprocessing,
                )  # fmt: skip
                self._manager = _Manager(self.directory, options=options)

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any]) -> None:
        """Copy the pytree, and write it while the caller goes on.

        Raises:
          HeadSteerError: the disk is full or not writable, now or in the previous save; earlier checkpoints are intact.
        """
        metadata = json.loads(json.dumps(dict(metadata)))
        entry = {"format": FORMAT, "sums": _checksums(tree, metadata), "about": metadata}
        with explain_errors(self.directory / str(step)), _silence_thread_errors():
            items = ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(entry))
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Wait until every save is on disk.

        Raises:
          HeadSteerError: the disk is full or not writable.
        """
        with explain_errors(self.directory), _silence_thread_errors():
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Return the newest checkpoint's step; None if there is no checkpoint."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, like: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """Read a checkpoint -> (pytree, metadata).

        Args:
          like: a pytree of arrays or of their shapes and shardings: the result's shapes, dtypes and shardings are the
            same. Where it has NumPy's arrays, every host gets the complete array.
          step: the checkpoint's step. None: the newest; if that is damaged, the newest that is not.

        Raises:
          HeadSteerError: there is no checkpoint, it is damaged, of a newer format, or its arrays have other shapes.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        if not steps:
            raise HeadSteerError(f"{self.directory}: no checkpoint; {REMAKE}")
        fault: DamagedCheckpointError | None = None
        for candidate in steps:
            try:
                tree, entry = hosts.on_every_process(
                    functools.partial(self._read, like, candidate), DamagedCheckpointError
                )
                metadata = hosts.on_every_process(
                    functools.partial(self._verify, tree, entry, candidate), DamagedCheckpointError
                )
            except DamagedCheckpointError as error:
                fault = fault or error
                continue
            if fault is not None:
                logger.info(f"{fault}".partition(";")[0] + f": resuming from step {candidate}")
            return tree, metadata
        assert fault is not None
        raise fault

    def _read(self, like: Tree, step: int) -> tuple[Tree, Any]:
        """Read a checkpoint in the shapes and types of `like`; its checksums are not verified yet."""

        def abstract_leaf(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray | np.generic):
                return np.asarray(leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        abstract, path = jax.tree.map(abstract_leaf, like), self.directory / str(step)
        tree, entry = self._restore_items(abstract, step)
        version = int(entry["format"])
        if version > FORMAT:
            raise HeadSteerError(
                f"{path}: it has format {version}, but this program reads format {FORMAT}; upgrade headsteer-jax"
            )
        if not version:
            raise HeadSteerError(f"{path}: an older version of HeadSteer wrote it, without checksums; {REMAKE}")
        for actual, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
            if actual.shape != expected.shape or actual.dtype != expected.dtype:
                raise HeadSteerError(
                    f"{path}: belongs to another model: an array has the shape {actual.shape}, but this config expects "
                    f"{expected.shape}; use its own config or another --workdir"
                )
        return tree, entry

    def _restore_items(self, abstract: Tree, step: int) -> tuple[Tree, dict[str, Any]]:
        """Read a checkpoint through orbax, which raises whatever the damage leads to -> (pytree, its JSON object)."""
        path = self.directory / str(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), about=ocp.args.JsonRestore())
        try:
            with _silence_thread_errors():
                items = self._manager.restore(step, args=args)
            return items.state, items.about | {"format": int(items.about.get("format", 0))}
        except Exception as error:
            if _is_transient(error):
                reason = " ".join(str(error).split())[:160]
                raise HeadSteerError(f"{path}: cannot be read ({reason}); fix that and run the same command") from error
            reason = " ".join(str(error).split()).partition(" See full TensorStore")[0][:160]
            if differs := re.search(r"structures do not match: (\S+): - Source: (MISSING)?", reason):
                name, article = differs[1], "an" if differs[2] else "no"
                raise DamagedCheckpointError(
                    f"{path}: damaged or of another model: it has {article} array {name}, unlike this config's model; "
                    "use its own config or another --workdir"
                ) from error
            raise DamagedCheckpointError(
                f"{path}: truncated, damaged or of another model ({reason}); {REMAKE}"
            ) from error

    def _verify(self, tree: Any, entry: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Compare the checksums with those that were saved, and return the metadata.

        Raises:
          DamagedCheckpointError: one of them differs.
        """
        metadata: Any = entry.get("about")
        saved = entry.get("sums", {})
        actual = _checksums(tree, metadata)
        if wrong := [name for name in actual if actual[name] != saved.get(name)]:
            path = self.directory / str(step)
            raise DamagedCheckpointError(f"{path}: damaged (the checksum of {wrong[0]} is wrong); {REMAKE}")
        return metadata

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps; a run that resumes at `step` makes them again."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        """Wait until every save is on disk, and end the threads that write."""
        self.wait()
        self._manager.close()
