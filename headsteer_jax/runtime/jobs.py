"""Commands in processes of their own, several at once: what they log appears under their names.

A process that dies takes none of the others with it. After SIGTERM or Ctrl-C all of them get SIGTERM, upon which
training saves a checkpoint (`runtime/preemption.py`), and are waited for; a second Ctrl-C ends them at once.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime import preemption

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
PACKAGE = str(Path(__file__).resolve().parents[2])
# -P and this start the copy of the package that runs here, installed or not, whatever the current directory holds
START = f"""import sys
if {PACKAGE!r} not in sys.path:
    sys.path.insert(0, {PACKAGE!r})
from headsteer_jax.cli import main
main()"""
MEMORY_SHARE = 0.9  # of a GPU that several processes share
GPUS = Path("/proc/driver/nvidia/gpus")
TPU_CHIPS = ("accel[0-9]*", "vfio/[0-9]*")  # in /dev, of older and newer hosts


class Job(NamedTuple):
    """A command of `headsteer`, and the name under which its lines appear."""

    name: str
    arguments: tuple[str, ...]


class Outcome(NamedTuple):
    """The end of a job."""

    code: int  # its exit code; negative: the signal that killed it
    last_line: str  # of its standard error
    seconds: float


class Started(Protocol):
    """A job that runs, or has ended."""

    def poll(self) -> Outcome | None:
        """Return how it ended; None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""


Starter = Callable[[Job, Mapping[str, str]], Started]


class Process:
    """A job in a process of its own, in a session of its own, so that Ctrl-C does not reach it directly."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, *job.arguments], env=os.environ | dict(environment),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._job, self._last_line, self._began = job, "", time.monotonic()
        self._reader = threading.Thread(target=self._pass_on_lines, daemon=True)
        self._reader.start()

    def _pass_on_lines(self) -> None:
        """Log what the process writes to standard error, line by line, under the job's name."""
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            if line := raw.decode(errors="replace").rstrip():
                self._last_line = line.strip()
                logger.info(f"{self._job.name}: {line}")

    def poll(self) -> Outcome | None:
        """Return how it ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._reader.join(timeout=1)  # a process that it left behind may hold the pipe open
        return Outcome(code, self._last_line, time.monotonic() - self._began)

    def stop(self) -> None:
        """Send it SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send it SIGKILL."""
        self._process.kill()


def run_jobs(
    jobs: Sequence[Job],
    environments: Sequence[Mapping[str, str]],
    finish: Callable[[Job, Outcome], None],
    start: Starter = Process,
) -> None:
    """Run jobs in order, as many at once as there are environments.

    Args:
      environments: variables of the processes that run beside each other, such as their devices.
      finish: called for every job that ends by itself, in this thread.

    Raises:
      KeyboardInterrupt: Ctrl-C; the jobs have saved and ended.
      Preempted: SIGTERM; likewise.
    """
    waiting, running = deque(jobs), dict[int, tuple[Job, Started]]()
    with preemption.defer_to_checkpoints() as is_stopped:
        try:
            while (waiting or running) and not is_stopped():
                for place, environment in enumerate(environments):
                    if place not in running and waiting:
                        job = waiting.popleft()
                        running[place] = job, start(job, environment)
                for place, (job, started) in list(running.items()):
                    if outcome := started.poll():
                        del running[place]
                        finish(job, outcome)
                if running:
                    time.sleep(POLL_SECONDS)
        finally:  # the loop was left early
            _stop_all([started for _, started in running.values()])


def _stop_all(running: Sequence[Started]) -> None:
    """Ask jobs to save and end, and wait for them; a second Ctrl-C ends them at once."""
    if not running:
        return
    logger.info("stopping: the runs save what they have; Ctrl-C ends them at once")
    try:
        for started in running:
            started.stop()
        while any(started.poll() is None for started in running):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        for started in running:
            with suppress(OSError):
                started.kill()
        raise


def divide_accelerators(processes: int, devices: Path = Path("/dev"), gpus: Path = GPUS) -> list[dict[str, str]]:
    """Divide a host's accelerators among processes: the variables that give each of them its share.

    Every process gets as many GPUs as the others, or shares one and its memory; or it gets one TPU chip. A process
    alone, or on a CPU, keeps everything.

    Args:
      devices: the directory of the TPU chips.
      gpus: the directory of the NVIDIA driver that has an entry for each GPU.

    Raises:
      HeadSteerError: there are fewer TPU chips than processes.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if processes == 1 or platforms == "cpu":
        return [{} for _ in range(processes)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(_count_entries(gpus))]
    if names and "tpu" not in platforms:
        return [_choose_gpus(names, place, processes) for place in range(processes)]
    chips = sum(len(list(devices.glob(pattern))) for pattern in TPU_CHIPS)
    if not chips:
        return [{} for _ in range(processes)]
    if chips < processes:
        raise HeadSteerError(
            f"--jobs={processes}: this host has {chips} TPU chips, and each runs one process; choose --jobs={chips}"
        )
    one_chip = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    # each process is a slice of its own, with a port of its own
    return [
        one_chip
        | {"TPU_VISIBLE_CHIPS": str(place), "TPU_VISIBLE_DEVICES": str(place)}
        | {"TPU_MESH_CONTROLLER_ADDRESS": f"localhost:{8476 + place}", "TPU_MESH_CONTROLLER_PORT": str(8476 + place)}
        for place in range(processes)
    ]


def _count_entries(directory: Path) -> int:
    """Count the entries of a directory; 0 if there is none."""
    return len(list(directory.iterdir())) if directory.is_dir() else 0


def _choose_gpus(names: Sequence[str], place: int, processes: int) -> dict[str, str]:
    """Choose the GPUs of one of several processes, and its share of the memory if it shares one."""
    if len(names) >= processes:
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[place::processes])}
    sharing = -(-processes // len(names))
    return {
        "CUDA_VISIBLE_DEVICES": names[place % len(names)],
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get(
            "XLA_PYTHON_CLIENT_MEM_FRACTION", f"{MEMORY_SHARE / sharing:.3f}"
        ),
    }
