"""Paths, the command line in this process or in another, and finished runs that tests may share."""

import contextlib
import fcntl
import io
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from headsteer_jax.model import skip
from headsteer_jax.runtime.progress import Progress

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # data and weights that only some machines have
GOLDENS = ROOT / "tests" / "goldens"

CONFIG = """
from builders import tiny_config

def get_config():
    config = tiny_config()
    data = config.data.model_copy(update={"image_size": 16, "train_per_class": 3, "eval_per_class": 2})
    steer = config.steer.model_copy(update={"least_validation": 1})
    return config.model_copy(update={"data": data, "steer": steer})
"""


class FinishedRun(NamedTuple):
    """A config file and the workdir of a run in which every stage but grid is done. Tests must not change either."""

    config: Path
    workdir: Path

    def copy(self, directory: Path, *without: str) -> Path:
        """Copy the workdir into a directory, without some of its files or directories; returns the copy."""
        target = directory / "w"
        shutil.copytree(self.workdir, target, ignore=shutil.ignore_patterns(*without))
        return target


def environment(devices: int = 0, **variables: str) -> dict[str, str]:
    """Make the environment of a test's process: it finds this package and the modules of tests/, and runs on the CPU.

    Args:
      devices: the number of simulated devices; 0 means as many as this process has.
    """
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    if devices:
        variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | variables


def run(*arguments: object, cwd: Path = ROOT, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    """Run run.py in a process of its own."""
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def headsteer(*arguments: object, cwd: Path = ROOT, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run a command of `headsteer` in this process, which spares the seconds that imports take.

    Afterwards everything that the command line replaces in a process is as it was.

    Args:
      encoding: of standard output, as PYTHONIOENCODING or the locale sets it.
    """
    from headsteer_jax.cli import run_command_line

    command, err = [*map(str, arguments)], io.StringIO()
    out = io.TextIOWrapper(io.BytesIO(), encoding, newline="")
    with _process_state(), contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command_line(command)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
    out.seek(0)
    return subprocess.CompletedProcess(command, code, out.read(), err.getvalue())


@contextlib.contextmanager
def _process_state() -> Iterator[None]:
    """Put back the hooks, the handler of SIGTERM, the import path and the loggers' settings."""
    hooks, path = (sys.excepthook, sys.unraisablehook), [*sys.path]
    handler = signal.getsignal(signal.SIGTERM)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "headsteer_jax")]
    settings = [(logger.level, logger.propagate, [*logger.handlers]) for logger in loggers]
    try:
        yield
    finally:
        (sys.excepthook, sys.unraisablehook), sys.path[:] = hooks, path
        signal.signal(signal.SIGTERM, handler)
        for logger, (level, propagate, handlers) in zip(loggers, settings, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


def make_finished_run(directory: Path) -> FinishedRun:
    """Make the tiny run in a directory, or use the one that another worker process of these tests has made there."""
    finished = FinishedRun(directory / "tiny.py", directory / "runs" / "tiny")
    with (directory / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = directory / "tiny.done"
        if not marker.exists():
            finished.config.write_text(CONFIG)
            result = headsteer("run", "--config=tiny.py", cwd=directory)
            assert result.returncode == 0, result.stderr
            assert result.stdout == "runs/tiny/report.html\n"
            marker.touch()
    return finished


def note_layer_forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let even tiny models leave out what their gates drop, and return the list to which each layer's form is added."""
    forms: list[str] = []
    choose = skip.choose_form
    monkeypatch.setattr(skip, "SMALLEST", 0)
    monkeypatch.setattr(skip, "choose_form", lambda decided: forms.append(choose(decided)) or forms[-1])
    return forms


def watch_progress(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which every note beside a progress bar is added."""
    notes: list[str] = []
    update = Progress.update

    def note_and_update(self: Progress, units: int, note: str = "") -> None:
        notes.append(note)
        update(self, units, note)

    monkeypatch.setattr(Progress, "update", note_and_update)
    return notes


def free_port() -> int:
    """Find a port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
