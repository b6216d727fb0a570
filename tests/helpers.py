"""Where things lie, and processes that tests start: their environment, the command line, a free port."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # data and weights that are there on some machines only
GOLDENS = ROOT / "tests" / "goldens"

CONFIG = """
from builders import tiny_config

def get_config():
    config = tiny_config()
    data = config.data.model_copy(update={"image_size": 16, "train_per_class": 3, "eval_per_class": 2})
    steer = config.steer.model_copy(update={"least_validation": 1})
    return config.model_copy(update={"data": data, "steer": steer})
"""


def environment(devices: int = 0, **variables: str) -> dict[str, str]:
    """What a process of a test needs: this package and the modules of tests/ are found, and JAX is on the CPU.

    Args:
      devices: so many simulated devices; 0: as this process has them.
    """
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    if devices:
        variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | variables


def run(*arguments: object, cwd: Path = ROOT, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    """run.py in a process of its own."""
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
