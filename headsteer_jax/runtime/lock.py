"""The lock that allows only one run at a time in a directory."""

import errno
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from etils.epath import Path

from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime.files import is_in_bucket

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0  # between two signs of life of a run in a bucket
MISSED_HEARTBEATS = 3  # after so many without a sign of life a run counts as dead
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # of Lustre, NFS and FUSE


@contextmanager
def hold_lock(workdir: Path) -> Iterator[None]:
    """Keep every other run from writing into a directory while the body of this context runs.

    Raises:
      HeadSteerError: another run holds the lock.
    """
    with _hold_bucket_lock(workdir) if is_in_bucket(workdir) else _hold_local_lock(workdir):
        yield


def _busy_error(workdir: Path) -> HeadSteerError:
    return HeadSteerError(
        f"{workdir}: another run is writing here; wait until it has ended, or choose another --workdir"
    )


@contextmanager
def _hold_local_lock(workdir: Path) -> Iterator[None]:
    """Hold the operating system's lock of a file, which ends with the process, however that ends.

    If the file system or the operating system has no such locks, the log says so and the run continues.
    """
    with explain_errors(workdir / ".lock"):
        file = open(workdir / ".lock", "ab")  # noqa: SIM115  # explain_errors must not cover the body of the context
    with file:
        try:
            import fcntl

            with explain_errors(workdir / ".lock"):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy_error(workdir) from None
        except (ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            logger.info(
                f"{workdir}: no lock can be held here ({error}); make sure that no other run writes into this directory"
            )
        yield


@contextmanager
def _hold_bucket_lock(workdir: Path) -> Iterator[None]:
    """Hold a lock that is an object in the bucket, rewritten every HEARTBEAT_SECONDS as a sign of life."""
    path, owner = workdir / ".lock", uuid.uuid4().hex
    _wait_for_dead_run(workdir)
    path.write_text(owner, encoding="utf-8")
    time.sleep(HEARTBEAT_SECONDS / 10)  # of two runs that start at once, the first sees the second's object
    if not _read_lock(path).startswith(owner):
        raise _busy_error(workdir)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, owner, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        path.unlink(missing_ok=True)


def _read_lock(path: Path) -> str:
    """Read the lock's content; an empty string if there is no lock."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _wait_for_dead_run(workdir: Path) -> None:
    """Wait, if there is a lock, until it is gone or its run counts as dead.

    Raises:
      HeadSteerError: the lock changes, so its run is alive.
    """
    path = workdir / ".lock"
    before = _read_lock(path)
    if not before:
        return
    logger.info(f"{workdir}: there is another run's lock; waiting to see whether that run is alive")
    for _ in range(MISSED_HEARTBEATS):
        time.sleep(HEARTBEAT_SECONDS)
        now = _read_lock(path)
        if not now:
            return
        if now != before:
            raise _busy_error(workdir)


def _beat(path: Path, owner: str, ended: threading.Event) -> None:
    """Rewrite the lock every HEARTBEAT_SECONDS until `ended` is set."""
    number = 0
    while not ended.wait(HEARTBEAT_SECONDS):
        number += 1
        with suppress(Exception):  # the network may come back
            path.write_text(f"{owner} {number}", encoding="utf-8")
