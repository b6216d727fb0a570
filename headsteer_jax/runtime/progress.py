"""Progress of long work: a bar with rate and remaining time on a terminal, lines in the log otherwise.

Everything goes to standard error, on process 0 only.
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
    """A counter of units of work, which `progress` makes."""

    def __init__(self, total: int, label: str, unit: str, initial: int) -> None:
        self._bar = tqdm(
            total=total, desc=label, unit=unit, initial=initial, dynamic_ncols=True,
            disable=not (sys.stderr.isatty() and hosts.is_first_process()),
        )  # fmt: skip
        self._label, self._unit, self._total, self._initial, self._done = label, unit, total, initial, initial
        self._started = self._last_line = time.monotonic()

    def update(self, units: int, note: str = "") -> None:
        """Count `units` more; `note` is shown beside them, such as a loss or an accuracy."""
        self._done += units
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(units)
        if self._bar.disable and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._log_line(note)

    @property
    def done(self) -> int:
        """Return the units counted so far."""
        return self._done

    def close(self) -> None:
        """End the bar, or log a last line if the work took long."""
        self._bar.close()
        if self._bar.disable and time.monotonic() - self._started > PLAIN_SECONDS:
            self._log_line("")

    def _log_line(self, note: str) -> None:
        elapsed = time.monotonic() - self._started
        text = tqdm.format_meter(
            self._done, self._total, elapsed, prefix=self._label, unit=self._unit, initial=self._initial, postfix=note,
            bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}",
        )  # fmt: skip
        logger.info(text)


@contextmanager
def progress(total: int, label: str, unit: str = "step", initial: int = 0) -> Iterator[Progress]:
    """Show the progress of work in the body of this context; the body counts its units.

    Args:
      total: units of the whole work.
      label: the work's name in the bar or the log.
      unit: the name of a unit.
      initial: units that were done before.
    """
    bar = Progress(total, label, unit, initial)
    try:
        yield bar
    finally:
        bar.close()


class TerminalHandler(logging.Handler):
    """A log handler that writes to standard error, above any progress bar, on process 0 only."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if hosts.is_first_process():
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


def show_log() -> None:
    """Show the package's log on standard error; without this call, as in a notebook, the package is silent."""
    package = logging.getLogger("headsteer_jax")
    package.setLevel(logging.INFO)
    package.propagate = False
    package.handlers = [TerminalHandler()]
