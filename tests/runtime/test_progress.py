"""Progress: a bar on a terminal, otherwise lines in the log with rate and time left; the log is silent by default."""

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from headsteer_jax.runtime import progress as p


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stop the clock, so that time passes only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(p.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def shown_log() -> Iterator[None]:
    """Show the log as the command line does, and hide it again."""
    package = logging.getLogger("headsteer_jax")
    before = package.handlers, package.level, package.propagate
    p.show_log()
    yield
    package.handlers, package.level, package.propagate = before


@pytest.mark.usefixtures("shown_log")
def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with p.progress(100, "dense", initial=20) as bar:
        for _ in range(4):
            clock[0] += 6  # a line every ten seconds at most
            bar.update(10, "loss 0.300")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    # 20 steps in 12 seconds, 60 steps left
    assert re.fullmatch(r"dense: 40/100 step, +1\.67step/s, 00:36 left, loss 0\.300", lines[0])
    assert lines[-1].startswith("dense: 60/100 step")


@pytest.mark.usefixtures("shown_log")
def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with p.progress(3, "quick") as bar:
        clock[0] += 5
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with p.progress(4, "sae", "epoch") as bar:
        bar.update(4, "mse 0.1")
    assert "sae: 100%" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "mse 0.1" in screen.getvalue()


@pytest.mark.usefixtures("shown_log")
def test_a_log_message_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    p.logger.info("train: done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "train: done\n")


def test_the_package_is_silent_unless_its_log_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    p.logger.info("train: done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
