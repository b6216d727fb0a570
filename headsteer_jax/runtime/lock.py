"""One run at a time in a directory."""

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

HEARTBEAT_SECONDS = 10.0  # between two signs of life of a run in a bucket; after three without one it counts as dead


@contextmanager
def hold_lock(workdir: Path) -> Iterator[None]:
    """While in here no other run may write into the directory.

    On a local disk the lock is the operating system's, which ends with the process, however that ends. In a bucket it
    is an object with a sign of life every BEAT seconds; a dead run's is waited for.

    Raises:
      HeadSteerError: another run holds it.
    """
    busy = f"{workdir}: another run is writing here; wait until it has ended, or choose another --workdir"
    if not is_in_bucket(workdir):
        import fcntl

        with explain_errors(workdir / ".lock"):
            file = open(workdir / ".lock", "a")  # noqa: SIM115  # the body's own errors are not the lock's
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HeadSteerError(busy) from None
            yield
        return
    path, own, ended = workdir / ".lock", uuid.uuid4().hex, threading.Event()

    def content() -> str:
        return path.read_text() if path.exists() else ""

    if before := content():
        logger.info(f"{workdir}: another run's lock; waiting whether it is alive")
        for _ in range(3):
            time.sleep(HEARTBEAT_SECONDS)
            if (now := content()) not in ("", before):
                raise HeadSteerError(busy)
            if not now:
                break

    def beat() -> None:
        number = 0
        while not ended.wait(HEARTBEAT_SECONDS):
            number += 1
            with suppress(Exception):  # the network may come back
                path.write_text(f"{own} {number}")

    path.write_text(own)
    time.sleep(HEARTBEAT_SECONDS / 10)  # of two that start at once the first sees the second's
    if not content().startswith(own):
        raise HeadSteerError(busy)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)
