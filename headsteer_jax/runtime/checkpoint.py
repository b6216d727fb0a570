"""What outlasts a run: checkpoints through orbax, and small JSON and array files, all written atomically.

On local disk or in a bucket (gs://bucket/path, by etils.epath). Of several hosts process 0 writes the small files, all
write their parts of a checkpoint.
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
    """While orbax works: a failure is raised here; what its threads go on to print about it is left out."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    sys.unraisablehook = hook  # not after a failure: the threads outlast it


def _crc32(leaf: Any) -> int:
    """Of an array's bits."""
    return zlib.crc32(np.ascontiguousarray(hosts.to_numpy(leaf)).tobytes())


def _checksums(tree: Any, about: Mapping[str, Any]) -> dict[str, int]:
    """Checksums of every array and of the JSON object: orbax and its storage notice some damage, not all."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    own = {jax.tree_util.keystr(path): _crc32(leaf) for path, leaf in leaves}
    return own | {"about": zlib.crc32(json.dumps(about, sort_keys=True).encode())}


class Damaged(HeadSteerError):
    """A checkpoint is not what was written."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for its question whether SIGTERM came: it would disturb the counting in `preemption`."""

    def reached_preemption(self, step: int) -> bool:
        return False


TRANSIENT_ERRORS = "UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help: what was not read is not therefore damaged."""
    io = isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError)
    return io or isinstance(error, MemoryError) or bool(re.search(TRANSIENT_ERRORS, str(error)))


class Checkpoints:
    """A directory of checkpoints of one pytree, of which the newest are kept.

    A checkpoint is a pytree of arrays and a JSON object, with checksums of both; orbax writes it into a temporary
    directory and renames that, so that a half-written one is never read, and writes while the program goes on.
    """

    def __init__(self, directory: AnyPath, keep: int = 1, writes: bool = True) -> None:
        """Args:
        keep: the newest so many.
        writes: what an interrupted write left is deleted; a reader must not, as a run may be writing there.
        """
        directory = os.fspath(directory)
        self.directory = Path(directory if is_in_bucket(directory) else os.path.abspath(directory))
        # named one by one, processes wait for each other by the coordinator, which gives up where one has failed
        everyone = set(range(hosts.process_count())) if hosts.process_count() > 1 else None
        together = ocp.options.MultiprocessingOptions(primary_host=0, active_processes=everyone)
        with explain_errors(self.directory):
            if writes:
                hosts.on_first_process(lambda: self.directory.mkdir(parents=True, exist_ok=True))
            elif not self.directory.exists():
                raise HeadSteerError(f"{self.directory}: no checkpoint; {REMAKE}")
            self._manager = _Manager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=False, cleanup_tmp_directories=writes, read_only=not writes,
                    single_host_load_and_broadcast=hosts.process_count() > 1, multiprocessing_options=together,
                ),
            )  # fmt: skip

    def save(self, step: int, tree: Any, about: Mapping[str, Any]) -> None:
        """Copy everything, and write it while the caller goes on; what went wrong with the one before is raised.

        Raises:
          HeadSteerError: the disk is full or not writable; earlier checkpoints are intact.
        """
        about = json.loads(json.dumps(dict(about)))
        entry = {"format": FORMAT, "sums": _checksums(tree, about), "about": about}
        with explain_errors(self.directory / str(step)), _silence_thread_errors():
            items = ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(entry))
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
          HeadSteerError: as `save`.
        """
        with explain_errors(self.directory), _silence_thread_errors():
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest checkpoint's step."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, like: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """A checkpoint as (pytree, JSON object), in the shapes and types of `like`, and where its arrays are.

        Args:
          like: arrays, or their shapes; of several hosts it says by shardings which parts each has, NumPy's arrays
            are whole everywhere.
          step: None: the newest, or where that is damaged the one before.

        Raises:
          HeadSteerError: there is none, it is damaged, of a newer format, or its arrays have other shapes.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        if not steps:
            raise HeadSteerError(f"{self.directory}: no checkpoint; {REMAKE}")
        fault: Damaged | None = None
        for one in steps:
            try:
                tree, entry = hosts.on_every_process(functools.partial(self._read, like, one), Damaged)
                about = hosts.on_every_process(functools.partial(self._checked, tree, entry, one), Damaged)
            except Damaged as error:
                fault = fault or error
                continue
            if fault is not None:
                logger.info(f"{fault}".partition(";")[0] + f": going on from step {one}")
            return tree, about
        assert fault is not None
        raise fault

    def _read(self, like: Tree, step: int) -> tuple[Tree, Any]:
        """As it is on disk, in the shapes and types of `like`."""

        def wanted(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray | np.generic):
                return np.asarray(leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        abstract, path = jax.tree.map(wanted, like), self.directory / str(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), about=ocp.args.JsonRestore())
        try:
            with _silence_thread_errors():
                items = self._manager.restore(step, args=args)
            tree, entry = items.state, items.about
            version = int(entry.get("format", 0))
        except Exception as error:  # orbax and tensorstore raise whatever the damage leads to
            if _is_transient(error):
                reason = " ".join(str(error).split())[:160]
                raise HeadSteerError(
                    f"{path}: cannot be read ({reason}); mend that and run the same command"
                ) from error
            reason = " ".join(str(error).split()).partition(" See full TensorStore")[0][:160]
            raise Damaged(f"{path}: truncated, damaged or of another model ({reason}); {REMAKE}") from error
        if version > FORMAT:
            raise HeadSteerError(
                f"{path}: of format {version}, where this version knows {FORMAT}; upgrade headsteer-jax"
            )
        if not version:
            raise HeadSteerError(f"{path}: of an older version of HeadSteer, without checksums; {REMAKE}")
        for have, want in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
            if have.shape != want.shape or have.dtype != want.dtype:
                raise HeadSteerError(
                    f"{path}: of another model: an array of shape {have.shape} where this config has {want.shape}; "
                    "use its own config or another --workdir"
                )
        return tree, entry

    def _checked(self, tree: Any, entry: Any, step: int) -> dict[str, Any]:
        """The JSON object, once all checksums are right."""
        about, sums = entry.get("about"), entry.get("sums", {})
        found = _checksums(tree, about)
        if wrong := [name for name in found if found[name] != sums.get(name)]:
            path = self.directory / str(step)
            raise Damaged(f"{path}: damaged (the checksum of {wrong[0]} is wrong); {REMAKE}")
        return about

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a run that goes on from `step` makes them again."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        """Wait, and end the threads that write."""
        self.wait()
        self._manager.close()
