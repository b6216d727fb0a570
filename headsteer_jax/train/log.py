"""The log of training: metrics.jsonl, speed.jsonl, TensorBoard, and Weights & Biases if the config asks for it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from etils.epath import Path
from tensorboardX import SummaryWriter

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import explain_errors
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.files import is_in_bucket, make_directory, write_text
from headsteer_jax.train.tracker import Tracker


class TrainingLog:
    """The log of training: a row in metrics.jsonl and in TensorBoard for each call, and in Weights & Biases if asked.

    speed.jsonl has images a second and FLOPs apart from them, as these differ from run to run. Process 0 alone writes.
    One cannot append to a bucket's objects: there the rows are written with each checkpoint (`flush`).
    """

    def __init__(self, directory: Path, config: Config) -> None:
        self._bucket, self._writes = is_in_bucket(directory), hosts.is_first_process()
        self._paths = {name: directory / f"{name}.jsonl" for name in ("metrics", "speed")}
        hosts.on_first_process(lambda: bool(make_directory(directory)))
        self._rows = {name: read_log(path) if self._bucket else [] for name, path in self._paths.items()}
        self._board = SummaryWriter(str(directory / "tensorboard")) if self._writes and not self._bucket else None
        self._tracker: Tracker | None = None
        if config.machine.logger == "wandb":
            hosts.on_first_process(lambda: self._start_tracker(directory, config))

    def _start_tracker(self, directory: Path, config: Config) -> None:
        self._tracker = Tracker(directory, config)

    def forget_after(self, phase: str, step: int) -> None:
        """Drop a phase's rows after a step, which a resumed run will write again."""

        def forget() -> None:
            for name, path in self._paths.items():
                rows = self._rows[name] if self._bucket else read_log(path)
                self._rows[name] = [row for row in rows if row["phase"] != phase or row["step"] <= step]
                write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows[name]))

        hosts.on_first_process(forget)

    def write(self, phase: str, step: int, values: dict[str, Any], name: str = "metrics") -> None:
        """Write a row of numbers and arrays to the log `name`, metrics or speed, and to TensorBoard and the like."""
        if not self._writes:
            return
        row = {"phase": phase, "step": step, **{field: np.asarray(value).tolist() for field, value in values.items()}}
        if self._bucket:
            self._rows[name].append(row)
        else:
            with explain_errors(self._paths[name]), self._paths[name].open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        scalars = {
            f"{phase}/{field}" + (f"/{index}" if np.ndim(value) else ""): float(number)
            for field, value in values.items()
            for index, number in enumerate(np.ravel(value))
        }
        if self._board is not None:
            for tag, number in scalars.items():
                self._board.add_scalar(tag, number, step)
        if self._tracker is not None:
            self._tracker.write(phase, step, scalars)

    def flush(self) -> None:
        """Write the rows so far, if the log is in a bucket."""
        if self._bucket and self._writes:
            for name, path in self._paths.items():
                write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows[name]))

    def close(self, failed: bool) -> None:
        """Close TensorBoard's file, and end the run of Weights & Biases, as one that failed if it did."""
        with suppress(OSError):  # the next checkpoint or row reports a full disk
            if self._board is not None:
                self._board.close()
        if self._tracker is not None:
            self._tracker.close(failed)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl or speed.jsonl, without a last line that an interruption cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@contextmanager
def open_log(directory: Path, config: Config) -> Iterator[TrainingLog]:
    """Open the log of a training for the body of this context.

    Raises:
      HeadSteerError: the directory is not writable, or Weights & Biases does not start.
    """
    log, failed = TrainingLog(directory, config), True
    try:
        yield log
        failed = False
    finally:
        log.close(failed)
