"""Progress: plain lines where there is no terminal, with rate and time left; a bar where there is one."""

import io
import re
import sys

import pytest

from headsteer_jax.runtime import progress as p


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that goes on only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(p.time, "monotonic", lambda: now[0])
    return now


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


def test_say_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    p.say("train: done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "train: done\n")
