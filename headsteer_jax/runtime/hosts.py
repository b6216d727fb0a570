"""Several processes as one program: one on each host of a cluster, or a single one, with the same code.

Every process runs every line. `on_first_process` is for decisions and files: process 0 makes them and tells the others.
`on_every_process` is for work that each process does for its share. An error in one process is raised in all of them,
so that none waits for another that has left.
"""

import json
import logging
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

logger = logging.getLogger(__name__)

T = TypeVar("T")

BARRIER_SECONDS = 7 * 24 * 3600  # how long a process waits for another that is alive: stages take hours

# variables that a cluster's launcher sets in every process, and how to read the number of processes from them
CLUSTERS: dict[str, Callable[[str], int]] = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda text: sum(bool(name.strip()) for name in text.split(",")),
    "MEGASCALE_NUM_SLICES": int,
}


def start(cluster: str, timeout: int) -> None:
    """Join the cluster, before any device is touched.

    If some process does not arrive in time, this one ends with a one-line error and exit code 2; JAX would abort it.

    Args:
      cluster: `auto`: JAX detects it (TPU slice, SLURM, Open MPI, Kubernetes). `HOST:PORT,PROCESSES,PROCESS`: the
        address of the coordinator, which is process 0, the number of processes, and this process's number. Empty:
        `auto` if a variable of CLUSTERS says that there are several processes, otherwise this process is alone.
      timeout: seconds within which every process must have arrived.

    Raises:
      HeadSteerError: the text has none of these forms, or there is no cluster.
    """
    if not cluster:
        variable = find_cluster()
        if not variable:
            return
        cluster, culprit, remedy = "auto", f"{variable} counts several processes", "; unset it to run alone"
    else:
        culprit, remedy = f"--distributed={cluster}", ""
    arguments = {} if cluster == "auto" else _parse_cluster(cluster)
    coordinator = arguments.get("coordinator_address", "the coordinator that the cluster names")

    def give_up() -> None:
        line = f"error: not all processes met at {coordinator} within {timeout} s; check that each runs this command"
        print(f"{line}, that the address can be reached, or raise --distributed-timeout", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 60)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise HeadSteerError(f"{culprit}: no cluster could be joined ({reason}){remedy}") from None
    finally:
        timer.cancel()


def find_cluster() -> str:
    """Find a variable of CLUSTERS that counts several processes -> NAME=VALUE; an empty string if there is none.

    An empty variable is ignored. So is one that is not a number, with a warning: if there are several processes after
    all, the lock of the workdir lets only one of them run.
    """
    unread = []
    for name, count in CLUSTERS.items():
        text = os.environ.get(name, "").strip()
        try:
            if text and count(text) > 1:
                return f"{name}={text}"
        except ValueError:
            unread.append(f"{name}={text}")
    for variable in unread:  # a warning is shown even before the log is set up
        logger.warning(f"{variable}: not a number, so this process runs alone; --distributed joins a cluster")
    return ""


def _parse_cluster(cluster: str) -> dict[str, Any]:
    """Read HOST:PORT,PROCESSES,PROCESS as arguments of `jax.distributed.initialize`."""
    coordinator, *numbers = cluster.split(",")
    host, _, port = coordinator.rpartition(":")
    if len(numbers) != 2 or not all(text.isdigit() for text in (*numbers, port)) or not host:
        raise HeadSteerError(f"--distributed={cluster}: must be auto or HOST:PORT,PROCESSES,PROCESS")
    processes, number = map(int, numbers)
    if number >= processes:
        raise HeadSteerError(f"--distributed={cluster}: process {number} of {processes}; must be 0 to {processes - 1}")
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": number}


def process_count() -> int:
    """Return the number of processes."""
    return jax.process_count()


def is_first_process() -> bool:
    """Say whether this is process 0, which writes the files and the log for all."""
    return jax.process_index() == 0


def wait_for_all(barrier: str) -> None:
    """Wait until every process has reached the barrier of this name.

    The coordinator keeps it: a collective operation of the devices would time out.
    """
    if process_count() > 1:
        multihost.sync_global_processes(barrier, processes=set(range(process_count())), timeout=BARRIER_SECONDS)


def exchange_bytes(message: bytes) -> list[bytes]:
    """Send this process's message to all, and return every process's message in order."""
    if process_count() == 1:
        return [message]
    wait_for_all("exchange")
    length_P = multihost_utils.process_allgather(np.int32(len(message)))
    padded = np.zeros(max(int(length_P.max()), 1), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, length_P, strict=True)]


def _attempt(function: Callable[[], T]) -> tuple[T | None, str, BaseException | None]:
    """Call a function -> (its result, the line for the other processes, the error to raise here)."""
    try:
        return function(), "", None
    except HeadSteerError as error:
        return None, str(error), error
    except Exception as error:
        return None, f"process {jax.process_index()} failed with {type(error).__name__}: {error}", error


def on_first_process(function: Callable[[], T]) -> T:
    """Call a function on process 0 alone, and return its result, a value of JSON's types, on every process.

    Raises:
      HeadSteerError: process 0 failed; it is raised in every process.
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
    """Call a function on every process, and return this process's result once all have succeeded.

    Args:
      kind: a kind of HeadSteerError that the other processes raise too if one of them raised it.

    Raises:
      HeadSteerError: one of them failed; every process raises the first failure's line.
    """
    if process_count() == 1:
        return function()
    result, line, error = _attempt(function)
    outcome = json.dumps([type(error).__name__, line])
    for name, failure in map(json.loads, exchange_bytes(outcome.encode())):
        if failure:
            raise (kind if name == kind.__name__ else HeadSteerError)(failure) from error
    return result  # type: ignore[return-value]


def check_equal(settings: dict[str, str]) -> None:
    """Check that every process has the same settings.

    Raises:
      HeadSteerError: under some name a process has another text than process 0; it is raised in every process.
    """
    texts = [json.loads(text) for text in exchange_bytes(json.dumps(settings).encode())]
    for name in settings:
        for number, text in enumerate(texts):
            if text[name] != texts[0][name]:
                raise HeadSteerError(
                    f"{name} of process {number} differs from process 0's ({text[name]}, not {texts[0][name]}); "
                    "give every host the same"
                )


def wait_before_exit() -> None:
    """Wait up to 30 seconds for the others before an early exit: JAX aborts them as soon as process 0 is gone."""
    if jax.distributed.is_initialized():
        with suppress(Exception):
            multihost.sync_global_processes("leave", processes=set(range(process_count())), timeout=30)


def process_share(total: int) -> tuple[int, int]:
    """Return this process's share of `total` pieces of work, as the first and the one after the last."""
    number = jax.process_index()
    return total * number // process_count(), total * (number + 1) // process_count()


def gather_rows(array: np.ndarray) -> np.ndarray:
    """Concatenate every process's rows [n, ...], in order; n may differ.

    The dtype must not have 64 bits, as JAX would halve them.
    """
    if process_count() == 1:
        return array
    wait_for_all("join")
    length_P = multihost_utils.process_allgather(np.int32(len(array)))
    padded = np.zeros((int(length_P.max()), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    rows = multihost_utils.process_allgather(padded)
    return np.concatenate([row[:length] for row, length in zip(rows, length_P, strict=True)])


def to_numpy(tree: Any) -> Any:
    """Copy every array of a pytree to NumPy, complete, even if its parts are on several hosts."""

    def leaf_to_numpy(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(leaf_to_numpy, tree)
