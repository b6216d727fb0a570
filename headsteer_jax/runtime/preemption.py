"""SIGTERM, which announces that the machine is about to be taken away: save what was computed, and end the program.

Training saves a checkpoint after the current call and stops there. Everything else stops at once, as files are written
completely or not at all. Several processes stop together, in training or at the end of a stage. EXIT_CODE tells
the caller to run the same command again. JAX is imported late: that takes seconds, during which SIGTERM must be handled
as well.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = os.EX_TEMPFAIL  # 75: a temporary failure, try again
STOPPED_MESSAGE = "stopped by SIGTERM: the same command continues where it stopped"


class Preempted(BaseException):
    """The signal to stop after SIGTERM; not an Exception, so that no handler of errors catches it and continues."""


class Handler:
    """The handler of SIGTERM: it ends the program at once, or only takes note while `deferred` is true.

    It does not raise: Python may run it inside a library's callback, where exceptions get lost.
    """

    def __init__(self) -> None:
        self.deferred, self.requested, self.questions = False, False, 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note of SIGTERM, and end the program unless it is deferred."""
        self.requested = True
        if not self.deferred:
            os.write(2, f"{STOPPED_MESSAGE}\n".encode())
            os._exit(EXIT_CODE)

    def ask_together(self) -> bool:
        """Say whether one of several processes got SIGTERM; all of them get the same answer to the same question.

        With several processes JAX's own service receives the signal instead of this handler.
        """
        from jax.experimental import multihost_utils

        self.questions += 1  # the service expects consecutive numbers, and says yes once
        self.requested |= multihost_utils.reached_preemption_sync_point(self.questions)
        return self.requested


def install_handler() -> None:
    """Handle SIGTERM as this module describes."""
    signal.signal(signal.SIGTERM, Handler())


def _handler() -> Handler | None:
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Handler) else None


def raise_if_preempted() -> None:
    """Stop all of several processes if one of them got SIGTERM; every process must call this equally often.

    Raises:
      Preempted: one of them got it.
    """
    import jax

    handler = _handler()
    if handler is not None and jax.process_count() > 1 and handler.ask_together():
        raise Preempted


@contextmanager
def defer_to_checkpoints() -> Iterator[Callable[[], bool]]:
    """Defer SIGTERM in the body of this context, and give it a function that says whether to save and stop now.

    Every one of several processes must call the function equally often.

    Raises:
      Preempted: SIGTERM came, and the body ended by itself.
    """
    import jax

    handler = _handler()
    if handler is None:
        yield lambda: False
    elif jax.process_count() > 1:
        yield handler.ask_together
    else:
        handler.deferred = True
        try:
            yield lambda: handler.requested
        finally:
            handler.deferred = False
        if handler.requested:
            raise Preempted
