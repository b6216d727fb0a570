"""Forward passes over a split, on all devices: what the model predicts, which heads it runs, a layer's CLS residual.

Each host takes a share of the images, on a mesh of its own devices; what they found is then told to all.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from headsteer_jax.config.schema import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import Gating, ViT, predict_class, stack_gates
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.mesh import batch_sharding, local_mesh
from headsteer_jax.runtime.progress import progress

CALLS_IN_FLIGHT = (
    2  # under way at once: while one waits for its images, or has work for one core only, the other goes on
)


class Observed(NamedTuple):
    """N images as the model sees them."""

    prediction: np.ndarray  # [N] int32
    gates: np.ndarray  # [N, A, H] bool, of the gated layers
    x: np.ndarray  # [N, D] float32, the CLS residual that enters the layer asked for
    gate_logits: np.ndarray  # [N, H] float32 of that layer

    def accuracy(self, labels: np.ndarray) -> float:
        return float(np.mean(self.prediction == labels))


Observe = Callable[[Any, Split, str], Observed]
PerImageFunction = Callable[
    ..., tuple[jax.Array, ...]
]  # (params, images [B, height, width, channels] uint8, ...) -> arrays


class Program(NamedTuple):
    """A function of images, made ready for every device.

    Each device has `size` images in a call, whatever the number of devices: so results do not depend on that number.
    """

    run: Any  # a jitted or a compiled Function
    size: int
    compiled: bool = False  # for exactly this size: a smaller split is filled up to it


def replicate(tree: Any) -> Any:
    """The same on each of this host's devices."""
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        tree = hosts.to_numpy(tree)
    return jax.device_put(tree, NamedSharding(local_mesh(), PartitionSpec()))


def per_image_program(function: PerImageFunction, size: int, *, arrays: int = 1, fixed: int = 1) -> Program:
    """A function of which each image is computed by itself, for all devices of this host.

    Args:
      function: takes `fixed` pytrees that are the same for all images, the parameters first, then `arrays` arrays with
        leading axis B; returns arrays with that axis.
      size: B.
    """
    spec = ([PartitionSpec()] * fixed) + ([PartitionSpec("data")] * arrays)
    sharded = jax.shard_map(
        function, mesh=local_mesh(), in_specs=tuple(spec), out_specs=PartitionSpec("data"), check_vma=False
    )
    return Program(jax.jit(sharded), size)


class CompiledFit(NamedTuple):
    """A compiled program and how much it takes at once; 0: not even one fits, which needs `needed` bytes."""

    run: Any
    size: int
    needed: int


def compile_within_memory(compile_for: Callable[[int], Any], most: int, memory: int, calls: int = 1) -> CompiledFit:
    """The program for the largest number, at most `most`, that stays within a budget.

    Args:
      compile_for: number -> compiled program.
      memory: MiB of a device, beside the parameters, for what XLA plans as results and intermediates.
      calls: how many are under way at once.
    """
    size = most
    while True:
        compiled = compile_for(size)
        plan = compiled.memory_analysis()
        needed = calls * (plan.temp_size_in_bytes + plan.output_size_in_bytes)
        if needed <= memory * 2**20:
            return CompiledFit(compiled, size, needed)
        if size == 1:
            return CompiledFit(None, 0, needed)
        size = max(1, min(size - 1, int(0.95 * size * memory * 2**20 / needed)))


def memory_error(fit: CompiledFit, memory: int, what: str) -> HeadSteerError:
    return HeadSteerError(
        f"config.machine.sweep_memory = {memory}: too small, as {what} needs {-(-fit.needed // 2**20)} MiB"
    )


def compile_program_within_memory(program: Program, params: Any, split: Split, memory: int) -> Program:
    """The program compiled for images like a split's, with as many in a call as fit a budget, at most program.size.

    Args:
      memory: see `compile_within_memory`.

    Raises:
      HeadSteerError: not even one image fits.
    """

    def compile_for(size: int) -> Any:
        shape = (size * jax.local_device_count(), *split.images.shape[1:])
        images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=batch_sharding(local_mesh()))
        return program.run.lower(replicate(params), images).compile()

    fit = compile_within_memory(compile_for, min(program.size, len(split.labels)), memory, calls=CALLS_IN_FLIGHT)
    if not fit.size:
        raise memory_error(fit, memory, "one image")
    return Program(fit.run, fit.size, compiled=True)


def padded_chunks(begin: int, end: int, size: int, devices: int = 1) -> list[np.ndarray]:
    """Indices of the images from `begin` to `end` in chunks of one size, for one compiled program: the last is filled
    with image 0. A device's part of a chunk is `size` images.
    """
    size *= devices
    filled = np.zeros(-(-(end - begin) // size) * size, np.int64)
    filled[: end - begin] = np.arange(begin, end)
    return list(filled.reshape(-1, size))


def stream_split(
    program: Program, params: Any, split: Split, what: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[np.ndarray, ...]]:
    """What a program gives for the images `start` to `stop` (None: all), call by call in order: arrays, first axis n.

    CALLS are under way while the caller works on one. An image has the same place in a device's part of a call
    whatever `start`, `stop` and the number of devices are, so that its bits are the same. `what` names the work in the
    progress.
    """
    count, params = len(split.labels), replicate(params)
    stop = count if stop is None else stop
    if start >= stop:
        return
    size = program.size if program.compiled else min(program.size, count)
    first = start // size * size  # of the call's images
    chunks = padded_chunks(first, stop, size, jax.local_device_count())

    def one(chunk: np.ndarray) -> tuple[np.ndarray, ...]:
        return jax.device_get(
            program.run(params, jax.device_put(gather_images(split.images, chunk), batch_sharding(local_mesh())))
        )

    with progress(stop, what, "image", initial=start) as bar, ThreadPoolExecutor(CALLS_IN_FLIGHT) as threads:
        calls = (threads.submit(one, chunk) for chunk in chunks)
        waiting = deque(itertools.islice(calls, CALLS_IN_FLIGHT))
        while waiting:
            arrays = waiting.popleft().result()
            waiting.extend(itertools.islice(calls, 1))
            part = tuple(array[max(start - first, 0) : stop - first] for array in arrays)
            first += len(chunks[0])
            bar.update(len(part[0]))
            yield part


def run_over_split(program: Program, params: Any, split: Split, what: str) -> list[np.ndarray]:
    """What a program gives for a whole split: its arrays, with first axis N, on every host.

    Each host has a share of the calls, so that every image is seen once. `what` names the work in the progress.
    """
    count, params = len(split.labels), replicate(params)
    size = min(program.size, count)
    begin, end = (min(call * size, count) for call in hosts.process_share(-(-count // size)))

    def own() -> list[np.ndarray]:
        # a host without a share makes one image's call as well: it must know the arrays' types
        parts = list(stream_split(program, params, split, what, begin, end) if begin < end else stream_split(
            program, params, split, what, 0, 1))  # fmt: skip
        return [np.concatenate(arrays)[: end - begin] for arrays in zip(*parts, strict=True)]

    return [hosts.gather_rows(array) for array in hosts.on_every_process(own)]


def make_observer(model: ViT, config: Config, gating: Gating, layer: int) -> Observe:
    """`(params, split, what) -> Observed`: runs the model over a whole split, without augmentation.

    It is made once and called often, so that the forward pass is compiled once. `what` names the work in the progress.

    Args:
      gating: dense (every head) or thresholded (evaluation's gates).
      layer: whose CLS residual and gate logits are kept; a gated layer.
    """

    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        logits_BC, out = model.apply(params, preprocess(images, config.data), gating=gating)
        return predict_class(logits_BC), stack_gates(out["gates"]) > 0, out["cls"][layer], out["gate_logits"][layer]

    program = per_image_program(forward, config.train.eval_batch)
    return lambda params, split, what: Observed(*run_over_split(program, params, split, what))
