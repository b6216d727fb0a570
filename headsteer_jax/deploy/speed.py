"""Images a second of several models, measured in turns, so that what slows the machine down slows all of them."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

BATCHES = (1, 64)
ROUNDS = 9
LEAST_SECONDS = 0.1  # of a measurement: a call of one image takes a millisecond or less


def measure_speeds(functions: Mapping[str, Callable[[jax.Array], Any]], images: np.ndarray) -> dict[str, float]:
    """Measure the images a second of functions on the same images: the median of interleaved rounds.

    Args:
      functions: by name; each is called with all images at once.
    """
    on_device = jax.device_put(images)
    calls = {name: _count_calls(function, on_device) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            seconds[name].append(_time_calls(function, on_device, calls[name]))
    return {name: len(images) / median(values) for name, values in seconds.items()}


def measure_batches(
    functions: Mapping[str, Callable[[jax.Array], Any]], images: np.ndarray, batches: Sequence[int] = BATCHES
) -> dict[str, dict[str, float]]:
    """Measure the images a second of functions for several batch sizes: by function, by batch size as a text.

    Args:
      images: some images; they are repeated to fill a batch.
    """
    speeds: dict[str, dict[str, float]] = {name: {} for name in functions}
    for batch in batches:
        for name, speed in measure_speeds(functions, np.resize(images, (batch, *images.shape[1:]))).items():
            speeds[name][str(batch)] = speed
    return speeds


def describe_device() -> str:
    """Name the device on which models run, such as `cpu: Intel Xeon, 2 cores`."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.platform}: {device.device_kind}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"cpu: {name}, {os.cpu_count()} cores"


def _count_calls(function: Callable[[jax.Array], Any], images: jax.Array) -> int:
    """Compile a function, and count the calls that fill LEAST_SECONDS."""
    jax.block_until_ready(function(images))
    return max(1, round(LEAST_SECONDS / _time_calls(function, images, 1)))


def _time_calls(function: Callable[[jax.Array], Any], images: jax.Array, calls: int) -> float:
    """Measure the seconds of one call, in the mean of several."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = function(images)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls
