"""Show how far long work has come: a bar with rate and ETA on a terminal, plain lines in the log otherwise.

Everything goes to standard error; of several hosts process 0 speaks.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from headsteer_jax.runtime import hosts

logger = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0  # between two plain lines


class Progress:
    """Counts units of work; made by `progress`."""

    def __init__(self, total: int, what: str, unit: str, initial: int) -> None:
        self._bar = tqdm(
            total=total, desc=what, unit=unit, initial=initial, dynamic_ncols=True,
            disable=not (sys.stderr.isatty() and hosts.is_first_process()),
        )  # fmt: skip
        self._what, self._unit, self._total, self._initial, self._done = what, unit, total, initial, initial
        self._started = self._said = time.monotonic()

    def update(self, units: int, note: str = "") -> None:
        """Count `units` more; `note` says how it goes (a loss, an accuracy)."""
        self._done += units
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(units)
        if self._bar.disable and time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            self._line(note)

    @property
    def done(self) -> int:
        """Units counted so far."""
        return self._done

    def close(self) -> None:
        self._bar.close()
        if self._bar.disable and time.monotonic() - self._started > PLAIN_SECONDS:
            self._line("")

    def _line(self, note: str) -> None:
        elapsed = time.monotonic() - self._started
        text = tqdm.format_meter(
            self._done, self._total, elapsed, prefix=self._what, unit=self._unit, initial=self._initial, postfix=note,
            bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}",
        )  # fmt: skip
        logger.info(text)


@contextmanager
def progress(total: int, what: str, unit: str = "step", initial: int = 0) -> Iterator[Progress]:
    """Show the progress of `total` units of `what`, `initial` of which were done before."""
    bar = Progress(total, what, unit, initial)
    try:
        yield bar
    finally:
        bar.close()


class TerminalHandler(logging.Handler):
    """Write log messages to standard error, above any progress bar, on process 0 only."""

    def emit(self, record: logging.LogRecord) -> None:
        if hosts.is_first_process():
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


def show_log() -> None:
    """Show the package's log on standard error; without this call, as in a notebook, the package is silent."""
    package = logging.getLogger("headsteer_jax")
    package.setLevel(logging.INFO)
    package.propagate = False
    package.handlers = [TerminalHandler()]
