"""SIGTERM: a machine that is about to be taken away says so; what was computed is saved, and the program ends.

Training saves a checkpoint at the next call and stops there; all else stops at once, as it is written whole or not at
all. Several processes stop together, in training or at the end of a stage. The exit code RESUME asks for the same
command again. JAX is imported late: it takes seconds, in which SIGTERM must be heard as well.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = os.EX_TEMPFAIL  # 75: a temporary failure, try again
STOPPED_MESSAGE = "stopped by SIGTERM: the same command goes on where it was"


class Preempted(BaseException):
    """Not an Exception: nothing may take it for a mistake and go on."""


class Handler:
    """SIGTERM's: ends the program at once, or keeps it in mind while `waits`.

    It does not raise: Python runs it wherever the program is, in a library's callback too, where exceptions get lost.
    """

    def __init__(self) -> None:
        self.waits, self.asked, self.questions = False, False, 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.waits:
            os.write(2, f"{STOPPED_MESSAGE}\n".encode())
            os._exit(EXIT_CODE)

    def together(self) -> bool:
        """Of several processes, whose SIGTERM JAX's own service hears instead: true in all at the same question."""
        from jax.experimental import multihost_utils

        self.questions += 1  # the service wants consecutive numbers, and says yes once
        self.asked |= multihost_utils.reached_preemption_sync_point(self.questions)
        return self.asked


def install_handler() -> None:
    """From now on."""
    signal.signal(signal.SIGTERM, Handler())


def _handler() -> Handler | None:
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Handler) else None


def raise_if_preempted() -> None:
    """Raises Preempted in all of several processes, where one of them got SIGTERM; they ask together."""
    import jax

    handler = _handler()
    if handler is not None and jax.process_count() > 1 and handler.together():
        raise Preempted


@contextmanager
def defer_to_checkpoints() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM waits: gives `asked()`, true once it is time to save and raise Preempted.

    Of several processes each must ask as often.
    """
    import jax

    handler = _handler()
    if handler is None:
        yield lambda: False
    elif jax.process_count() > 1:
        yield handler.together
    else:
        handler.waits = True
        try:
            yield lambda: handler.asked
        finally:
            handler.waits = False
        if handler.asked:
            raise Preempted
