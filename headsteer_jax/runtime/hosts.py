"""Several processes as one program: one on each host of a cluster, or a lone one, by the same code.

Every process runs every line. What is decided or written once is decided or written by process 0, in
`on_first_process`, and told to the others; what each does for its share is done in `on_every_process`. A mistake that
one of them meets is then raised in all of them, so that none waits for another that has left.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from headsteer_jax.errors import HeadSteerError

T = TypeVar("T")

BARRIER_SECONDS = 7 * 24 * 3600  # seconds that one process waits for another that is alive: stages take hours

# what a cluster's launcher sets in each of several processes; a lone host has none of these
CLUSTERS: dict[str, Callable[[str], bool]] = {
    "SLURM_STEP_NUM_TASKS": lambda text: int(text) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda text: int(text) > 1,
    "TPU_WORKER_HOSTNAMES": lambda text: "," in text,
    "MEGASCALE_NUM_SLICES": lambda text: int(text) > 1,
}


def start(where: str, timeout: int) -> None:
    """Join the cluster, before any device is touched.

    Args:
      where: `auto`: as JAX finds it out (TPU slice, SLURM, Open MPI, Kubernetes); `HOST:PORT,PROCESSES,PROCESS`: the
        coordinator, which is process 0, how many there are, and which one this is; empty: `auto` where one of CLUSTERS
        says that there are several, else this process is alone.
      timeout: seconds until all must be there.

    Raises:
      HeadSteerError: the text is not of these forms, or there is no cluster.

    Where not all are there in time the process ends with one line and code 2: JAX itself would abort it.
    """
    if not where:
        if not any(name in os.environ and several(os.environ[name]) for name, several in CLUSTERS.items()):
            return
        where = "auto"
    arguments: dict[str, Any] = {}
    coordinator = "the coordinator that the cluster names"
    if where != "auto":
        coordinator, *numbers = where.split(",")
        host, _, port = coordinator.rpartition(":")
        if len(numbers) != 2 or not all(text.isdigit() for text in (*numbers, port)) or not host:
            raise HeadSteerError(f"--distributed={where}: allowed is auto or HOST:PORT,PROCESSES,PROCESS")
        processes, number = map(int, numbers)
        if number >= processes:
            raise HeadSteerError(
                f"--distributed={where}: process {number} of {processes}; allowed is 0 to {processes - 1}"
            )
        arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": number}

    def too_late() -> None:
        line = f"error: not all processes met at {coordinator} within {timeout} s; check that each runs this command"
        print(f"{line}, that the address can be reached, or raise --distributed_timeout", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(timeout, too_late)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 60)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise HeadSteerError(f"--distributed={where}: no cluster could be joined ({reason})") from None
    finally:
        timer.cancel()


def process_count() -> int:
    return jax.process_count()


def is_first_process() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Until every process is here. By the coordinator: a collective of devices would give up after a while."""
    if process_count() > 1:
        multihost.sync_global_processes(what, processes=set(range(process_count())), timeout=BARRIER_SECONDS)


def exchange_bytes(own: bytes) -> list[bytes]:
    """Every process's bytes, told to all."""
    if process_count() == 1:
        return [own]
    wait_for_all("exchange")
    length_P = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(max(int(length_P.max()), 1), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, length_P, strict=True)]


def _attempt(function: Callable[[], T]) -> tuple[T | None, str, BaseException | None]:
    """(result, the line for the others, what to raise here)."""
    try:
        return function(), "", None
    except HeadSteerError as error:
        return None, str(error), error
    except Exception as error:
        return None, f"process {jax.process_index()} failed with {type(error).__name__}: {error}", error


def on_first_process(function: Callable[[], T]) -> T:
    """What process 0 makes of it, in JSON's types, told to all.

    Raises:
      HeadSteerError: process 0 failed; in every process.
    """
    if process_count() == 1:
        return function()
    result, line, error = _attempt(function) if is_first_process() else (None, "", None)
    line, result = json.loads(exchange_bytes(json.dumps([line, result]).encode())[0])
    if error is not None:
        raise error
    if line:
        raise HeadSteerError(line)
    return result


def on_every_process(function: Callable[[], T], kind: type[HeadSteerError] = HeadSteerError) -> T:
    """What this process makes of it, once all have succeeded.

    Raises:
      HeadSteerError: one of them failed; in every process the first one's line, and of its kind where that is `kind`.
    """
    if process_count() == 1:
        return function()
    result, line, error = _attempt(function)
    own = json.dumps([type(error).__name__, line])
    for name, failed in map(json.loads, exchange_bytes(own.encode())):
        if failed:
            raise (kind if name == kind.__name__ else HeadSteerError)(failed) from error
    return result  # type: ignore[return-value]


def check_equal(what: dict[str, str]) -> None:
    """Raises HeadSteerError, in every process, where one has another text than process 0 under some name."""
    texts = [json.loads(text) for text in exchange_bytes(json.dumps(what).encode())]
    for name in what:
        for number, text in enumerate(texts):
            if text[name] != texts[0][name]:
                raise HeadSteerError(
                    f"{name} of process {number} is not process 0's ({text[name]}, not {texts[0][name]}); "
                    "give every host the same"
                )


def wait_before_exit() -> None:
    """Before a process ends early: where the first one is gone, JAX aborts the others before they can speak."""
    if jax.distributed.is_initialized():
        with suppress(Exception):
            multihost.sync_global_processes("leave", processes=set(range(process_count())), timeout=10)


def process_share(total: int) -> tuple[int, int]:
    """Which of `total` pieces of work are this process's: from, to."""
    number = jax.process_index()
    return total * number // process_count(), total * (number + 1) // process_count()


def gather_rows(array: np.ndarray) -> np.ndarray:
    """Every process's [n, ...], one after the other; n may differ. Not of 64 bits, which JAX would halve."""
    if process_count() == 1:
        return array
    wait_for_all("join")
    length_P = multihost_utils.process_allgather(np.int32(len(array)))
    padded = np.zeros((int(length_P.max()), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    rows = multihost_utils.process_allgather(padded)
    return np.concatenate([row[:length] for row, length in zip(rows, length_P, strict=True)])


def to_numpy(tree: Any) -> Any:
    """The whole of every array as NumPy's, wherever its parts are."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(one, tree)
