"""Forward passes over a split on all devices, for predictions, gates and CLS residuals.

Each host takes a share of the images, on a mesh of its own devices; then every host gets all results.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headsteer_jax.config.schema import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.compute import count_image_macs
from headsteer_jax.model.macs import count_dense_macs
from headsteer_jax.model.skip import is_worthwhile, make_skipping_forward
from headsteer_jax.model.skip_choice import SAMPLE, can_skip, predict_seconds
from headsteer_jax.model.vit import Gating, ViT, predict_class, stack_gates
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.mesh import batch_sharding, describe_arrays, local_mesh, replicated_sharding
from headsteer_jax.runtime.progress import progress

logger = logging.getLogger(__name__)

# While one call waits for its images, or has work for one core only, the other goes on.
CALLS_IN_FLIGHT = 2


class Observed(NamedTuple):
    """The model's predictions, gates and residuals of N images."""

    prediction: np.ndarray  # [N] int32
    x: np.ndarray  # [N, D] float32, the CLS residual that enters the observed layer
    gates: dict[str, np.ndarray]  # by kind, [N, A, n] bool: of the layers that have it, the n gates of each

    def accuracy(self, labels: np.ndarray) -> float:
        """Compute the share of predictions that equal the labels."""
        return float(np.mean(self.prediction == labels))


Observe = Callable[[Any, Split, str], Observed]
# (params, images [B, height, width, channels] uint8, ...) -> arrays
PerImageFunction = Callable[..., tuple[jax.Array, ...]]


class Program(NamedTuple):
    """A function of images that runs on every device.

    Each device has `size` images in a call, so that results do not depend on the number of devices.
    """

    run: Any  # a jitted or a compiled function
    size: int
    compiled: bool = False  # for exactly this size, so that a smaller split is filled up to it


def replicate(tree: Any) -> Any:
    """Copy a pytree of arrays to each of this host's devices."""
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        tree = hosts.to_numpy(tree)
    return jax.device_put(tree, NamedSharding(local_mesh(), PartitionSpec()))


def per_image_program(
    function: PerImageFunction, size: int, *, arrays: int = 1, fixed: int = 1, mesh: Mesh | None = None
) -> Program:
    """Make a program for all devices of this host of a function that computes each image independently.

    Args:
      function: takes pytrees that are the same for all images, the parameters first, and then arrays with leading axis
        B; returns arrays with that axis.
      size: B on each device.
      arrays: the number of the function's arrays.
      fixed: the number of its pytrees.
      mesh: the devices; None: `local_mesh()`.
    """
    spec = ([PartitionSpec()] * fixed) + ([PartitionSpec("data")] * arrays)
    sharded = jax.shard_map(
        function, mesh=mesh or local_mesh(), in_specs=tuple(spec), out_specs=PartitionSpec("data"), check_vma=False
    )
    return Program(jax.jit(sharded), size)


class CompiledFit(NamedTuple):
    """A compiled program, how much it takes at once, and the bytes that this needs; size 0 if not even one fits."""

    run: Any
    size: int
    needed: int


def compile_within_memory(compile_for: Callable[[int], Any], most: int, memory: int, calls: int = 1) -> CompiledFit:
    """Compile a program for the largest number, at most `most`, that stays within a memory budget.

    Args:
      compile_for: compiles the program for a number.
      memory: the MiB of a device, beside the parameters, for results and intermediates as XLA plans them.
      calls: the number of calls that run at once.
    """
    size = most
    while True:
        try:
            compiled = compile_for(size)
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what exceeds the device's memory
            if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                raise
            size //= 2
            continue
        plan = compiled.memory_analysis()
        needed = calls * (plan.temp_size_in_bytes + plan.output_size_in_bytes)
        if needed <= memory * 2**20:
            return CompiledFit(compiled, size, needed)
        if size == 1:
            return CompiledFit(None, 0, needed)
        size = max(1, min(size - 1, int(0.95 * size * memory * 2**20 / needed)))


def memory_error(fit: CompiledFit, memory: int, item: str) -> HeadSteerError:
    """Make the error for a budget that is too small for one `item`."""
    return HeadSteerError(
        f"config.machine.sweep_memory = {memory}: too small, because {item} needs {-(-fit.needed // 2**20)} MiB"
    )


def describe_call(params: Any, split: Split, size: int, mesh: Mesh) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Describe the arguments of a call of a program on a split's images, with `size` of them on each device."""
    images = jax.ShapeDtypeStruct((size * mesh.size, *split.images.shape[1:]), np.uint8, sharding=batch_sharding(mesh))
    return describe_arrays(params, replicated_sharding(mesh)), images


def compile_program_within_memory(
    program: Program, params: Any, split: Split, memory: int, mesh: Mesh | None = None
) -> Program:
    """Compile a program for a split's images, with as many in a call as fit a memory budget, at most program.size.

    Args:
      params: the parameters, or arrays' descriptions.
      memory: see `compile_within_memory`.
      mesh: the program's; None: `local_mesh()`.

    Raises:
      HeadSteerError: not even one image fits.
    """

    def compile_for(size: int) -> Any:
        return program.run.lower(*describe_call(params, split, size, mesh or local_mesh())).compile()

    fit = compile_within_memory(compile_for, min(program.size, len(split.labels)), memory, calls=CALLS_IN_FLIGHT)
    if not fit.size:
        raise memory_error(fit, memory, "one image")
    return Program(fit.run, fit.size, compiled=True)


def padded_chunks(begin: int, end: int, size: int, devices: int = 1) -> list[np.ndarray]:
    """Divide the indices of the images from `begin` to `end` into chunks of one size, for one compiled program.

    The last chunk is filled with image 0. A device's part of a chunk is `size` images.
    """
    size *= devices
    filled = np.zeros(-(-(end - begin) // size) * size, np.int64)
    filled[: end - begin] = np.arange(begin, end)
    return list(filled.reshape(-1, size))


def choose_call_size(program: Program, count: int, platform: str) -> int:
    """Choose a device's images in a call: on a CPU no more than there are.

    On accelerators every split has calls of one size, because the number of rows decides how products are rounded.

    Args:
      count: the images of the split.
      platform: of the devices.
    """
    return min(program.size, count) if platform == "cpu" and not program.compiled else program.size


def stream_split(
    program: Program,
    params: Any,
    split: Split,
    label: str,
    start: int = 0,
    stop: int | None = None,
    *,
    predicted: int | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Run a program on the images from `start` to `stop` (None: all), and yield its arrays [n, ...] call by call.

    CALLS_IN_FLIGHT calls run while the caller works on one. An image has the same place in a device's part of a call
    whatever `start`, `stop` and the number of devices are, so that its bits are the same.

    Args:
      label: the name of the work in the progress.
      predicted: which of the arrays has predicted classes [n], whose accuracy so far the progress shows; None: none.
    """
    count, params, right = len(split.labels), replicate(params), 0
    stop = count if stop is None else stop
    if start >= stop:
        return
    size = choose_call_size(program, count, jax.default_backend())
    first = start // size * size  # the first image of the current call
    chunks = padded_chunks(first, stop, size, jax.local_device_count())

    def run_call(chunk: np.ndarray) -> tuple[np.ndarray, ...]:
        return jax.device_get(
            program.run(params, jax.device_put(gather_images(split.images, chunk), batch_sharding(local_mesh())))
        )

    with progress(stop, label, "image", initial=start) as bar, ThreadPoolExecutor(CALLS_IN_FLIGHT) as threads:
        calls = (threads.submit(run_call, chunk) for chunk in chunks)
        waiting = deque(itertools.islice(calls, CALLS_IN_FLIGHT))
        while waiting:
            arrays = waiting.popleft().result()
            waiting.extend(itertools.islice(calls, 1))
            part = tuple(array[max(start - first, 0) : stop - first] for array in arrays)
            first += len(chunks[0])
            note = ""
            if predicted is not None:
                done = bar.done + len(part[0])
                right += int(np.sum(part[predicted] == split.labels[bar.done : done]))
                note = f"accuracy {right / (done - start):.1%}"
            bar.update(len(part[0]), note)
            yield part


def run_over_split(
    program: Program, params: Any, split: Split, label: str, *, predicted: int | None = None
) -> list[np.ndarray]:
    """Run a program on all images of a split, and return its arrays [N, ...] on every host.

    Each host runs a share of the calls, so that every image is computed once.

    Args:
      label: the name of the work in the progress.
      predicted: see `stream_split`.
    """
    count, params = len(split.labels), replicate(params)
    size = choose_call_size(program, count, jax.default_backend())
    begin, end = (min(call * size, count) for call in hosts.process_share(-(-count // size)))

    def run_share() -> list[np.ndarray]:
        # A host without a share runs one image's call as well, because it must know the arrays' types.
        images = (begin, end) if begin < end else (0, 1)
        parts = list(stream_split(program, params, split, label, *images, predicted=predicted))
        return [np.concatenate(arrays)[: end - begin] for arrays in zip(*parts, strict=True)]

    return [hosts.gather_rows(array) for array in hosts.on_every_process(run_share)]


def _choose_skipping(
    model: ViT, config: Config, program: Program, params: Any, split: Split, passes: int
) -> tuple[bool, str]:
    """Decide whether a pass over a split skips, from the gates of its first images, which the masked program finds.

    Returns:
      The decision, and its reason for the log; the reason is empty if skipping is out of the question.
    """
    count, classes = len(split.labels), model.classes
    tokens = model.positions_count + model.model.registers
    if not can_skip(config, jax.device_count()) or not is_worthwhile(model.model, program.size, tokens):
        return False, ""
    if config.machine.skip == "always":
        return True, "machine.skip is always"
    best = predict_seconds(config, classes, count, 0.0, passes)
    if best.skipping >= best.masked:  # not even with all gates closed
        return False, ""
    sample = min(SAMPLE, count)
    images = jax.device_put(gather_images(split.images, np.arange(sample)), batch_sharding(local_mesh()))
    gates = jax.device_get(program.run(replicate(params), images)[2:])
    macs = count_image_macs(config, classes, dict(zip(config.gate.kinds, gates, strict=True)))
    share = float(macs.mean()) / count_dense_macs(config, classes)
    seconds = predict_seconds(config, classes, count, share, passes)
    reason = f"predicted {seconds.skipping:.0f} s with skipping, {seconds.masked:.0f} s without"
    return seconds.skipping < seconds.masked, reason


def _select_observed(config: Config, layer: int) -> Callable[[jax.Array, dict[str, Any]], tuple[jax.Array, ...]]:
    """Make the function (logits, out) -> predictions, CLS residuals of a layer, and the gates of each kind."""

    def select(logits_BC: jax.Array, out: dict[str, Any]) -> tuple[jax.Array, ...]:
        gates = (stack_gates(out["gates"], kind) > 0 for kind in config.gate.kinds)
        return predict_class(logits_BC), out["cls"][layer], *gates

    return select


def make_observer_program(model: ViT, config: Config, gating: Gating, layer: int, mesh: Mesh | None = None) -> Program:
    """Make the program of `make_observer`, which computes every token: images -> predictions, residuals, gates.

    Args:
      mesh: the devices; None: `local_mesh()`.
    """
    select = _select_observed(config, layer)

    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return select(*model.apply(params, preprocess(images, config.data), gating=gating))

    return per_image_program(forward, config.train.eval_batch, mesh=mesh)


def make_observer(model: ViT, config: Config, gating: Gating, layer: int, passes: int = 1) -> Observe:
    """Make a function `(params, split, label) -> Observed` that runs the model on a split, without augmentation.

    The function is made once and called often, so that the forward pass is compiled once. `label` is the name of the
    work in the progress. With thresholded gates the pass skips what they drop where that is faster; see machine.skip.

    Args:
      gating: dense (every head runs) or thresholded (evaluation's gates).
      layer: the layer whose CLS residual is returned.
      passes: how often the function will be called, if that is known; the more often, the sooner skipping pays.
    """
    program = make_observer_program(model, config, gating, layer)
    select = _select_observed(config, layer)
    skip, prepare, finish = make_skipping_forward(model), jax.jit(lambda x: preprocess(x, config.data)), jax.jit(select)

    def forward_skipping(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return finish(*skip(params, prepare(images)))

    said: set[bool] = set()  # decisions that the log has

    def observe(params: Any, split: Split, label: str) -> Observed:
        skips, reason = False, ""
        if gating == "thresholded":
            skips, reason = _choose_skipping(model, config, program, params, split, passes)
        if reason and skips not in said:
            said.add(skips)
            logger.info(f"{label}: {'leaves out what the gates drop' if skips else 'runs everything'} ({reason})")
        chosen = Program(forward_skipping, program.size) if skips else program
        prediction_N, x_ND, *gates = run_over_split(chosen, params, split, label, predicted=0)
        return Observed(prediction_N, x_ND, dict(zip(config.gate.kinds, gates, strict=True)))

    return observe
