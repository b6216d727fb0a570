"""SIGTERM: a machine that is about to be taken away says so; what was computed is saved, and the program ends.

Training saves a checkpoint at the next call and stops there; all else stops at once, as it is written whole or not at
all. The exit code RESUME asks for the same command again. JAX is imported late: it takes seconds, in which SIGTERM must
be heard as well.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

RESUME = os.EX_TEMPFAIL  # 75: a temporary failure, try again


class Preempted(BaseException):
    """Not an Exception: nothing may take it for a mistake and go on."""


class Handler:
    """SIGTERM's: raises Preempted at once, or keeps it in mind while `waits`."""

    def __init__(self) -> None:
        self.waits, self.asked = False, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.waits:
            raise Preempted


def install() -> None:
    """From now on; where several processes are joined later, JAX's own service hears it instead, so that all of them
    stop at the same step."""
    signal.signal(signal.SIGTERM, Handler())


def check() -> None:
    """Raises Preempted where SIGTERM came and its exception got lost, as in a library's callback it can."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, Handler) and handler.asked:
        raise Preempted


@contextmanager
def at_checkpoints() -> Iterator[Callable[[int], bool]]:
    """Within, SIGTERM waits: gives `asked(step)`, true once it is time to save and raise Preempted.

    Of several processes each must ask at the same steps.
    """
    import jax
    from jax.experimental import multihost_utils

    check()
    handler = signal.getsignal(signal.SIGTERM)
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if not isinstance(handler, Handler):
        yield lambda step: False
        return
    handler.waits = True
    try:
        yield lambda step: handler.asked
    finally:
        handler.waits = False
    check()
