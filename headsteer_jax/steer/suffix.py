"""The model from the first steered layer on, for every setting and alpha, where a table cannot answer.

The host calls one program a layer, with the layer's parameters and autoencoder as arguments, so that layers that are
alike share a program: however many layers are steered, by themselves or together, half a dozen programs of one block
are compiled. In the first steered layer the alphas part, as a vmap, so that what does not depend on alpha is computed
once; from there on an image under an alpha is a row like any other. Calls are queued ahead of their results, and
residuals stay on the devices.

Axes: B, N images, R rows (on each device, alpha by alpha, its images), T tokens, D width, V settings, A alphas, n gates
of one kind.
"""

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from headsteer_jax.config.schema import DataConfig, GateKind, SteerConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.model.call_limits import choose_call_limits
from headsteer_jax.model.gates import Gates
from headsteer_jax.model.passes import (
    CALLS_IN_FLIGHT,
    compile_within_memory,
    memory_error,
    padded_chunks,
    replicate,
)
from headsteer_jax.model.vit import (
    ALL_OPEN,
    Block,
    Intervention,
    TrainedModel,
    ViT,
    count_gates,
    decide_gates,
    describe_gates,
    predict_class,
    run_block,
)
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.mesh import batch_sharding, describe_arrays, local_mesh, replicated_sharding
from headsteer_jax.runtime.progress import progress
from headsteer_jax.steer.steering import (
    Steering,
    apply_steering,
    is_unsteered_at_zero,
    replicate_once,
    steer_patches,
)


class SuffixSetting(NamedTuple):
    """Steered layers: their CLS residual is changed, the residuals of their patches, or both."""

    steered: Mapping[int, Steering]  # by layer: of the CLS residual
    steered_by: np.ndarray  # [N] the class that steers each image
    patches: Mapping[int, Steering] = types.MappingProxyType({})  # by layer: of every patch's residual

    @property
    def layers(self) -> list[int]:
        """The layers in which anything is steered, ascending."""
        return sorted({*self.steered, *self.patches})

    def steerings(self, layer: int) -> "LayerSteering":
        """Return what steers one layer."""
        return LayerSteering(self.steered.get(layer), self.patches.get(layer))


class LayerSteering(NamedTuple):
    """One layer's autoencoders and the latents that are changed in them, of its CLS residual and its patches."""

    cls: Steering | None = None  # None: it stays as it is
    patches: Steering | None = None


NOTHING = LayerSteering()


class SuffixResult(NamedTuple):
    """The gates and the answers of every setting under every alpha."""

    gates: dict[int, dict[str, np.ndarray]]  # by layer and kind, [V, A, N, n] bool
    predictions: np.ndarray  # [V, A, N] int32


class LayerForm(NamedTuple):
    """Everything that the program of a layer depends on beside its arguments; layers of one form share a program."""

    model: ViT
    steer: SteerConfig
    kinds: tuple[GateKind, ...]  # of the gates that the layer decides
    last: bool  # the model's last layer computes CLS alone
    parts: bool = False  # the alphas part here: images come in, rows leave
    closed: bool = False  # the gates that read the CLS residual are closed, whatever they decide


def find_form(trained: TrainedModel, layer: int, *, parts: bool = False, closed: bool = False) -> LayerForm:
    """Find the form of a layer's program."""
    model, config = trained.model, trained.config
    return LayerForm(model, config.steer, config.gate.kinds_in(layer), layer == config.model.depth - 1, parts, closed)


def _run_block(
    form: LayerForm, layer_params: Any, steering: LayerSteering, alpha: jax.Array, x_RTD: jax.Array, class_R: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run one block -> its residuals, and its gates by kind as bool.

    Args:
      alpha: one for all rows, or [R].
    """
    block = Block(form.model.model, form.model.gate, form.kinds, form.model.precision, parent=None)

    def read_steered(apply: Callable[..., jax.Array], steered: Steering | None) -> Any:
        return None if steered is None else lambda x: apply(steered, x, class_R, alpha, form.steer)

    counts = count_gates(form.model)
    closed: Gates = {kind: jnp.zeros((len(x_RTD), counts[kind])) for kind in form.kinds if kind != "tokens"}
    change = Intervention(
        gates=closed if form.closed else None,
        gate_input=read_steered(apply_steering, steering.cls),
        token_input=read_steered(steer_patches, steering.patches),
        steer_residual=form.steer.target == "residual",
    )

    def run(block: Block) -> tuple[jax.Array, Gates]:
        changed_RTD, logits, gates = decide_gates(block, x_RTD, "thresholded", ALL_OPEN, change)
        return run_block(block, changed_RTD, gates, 1 if form.last else None), describe_gates(logits, gates)

    y_RTD, gates = block.apply({"params": layer_params}, method=run)
    return y_RTD, {kind: g > 0 for kind, g in gates.items()}


@functools.lru_cache(maxsize=64)
def jit_layer(form: LayerForm, mesh: Mesh) -> Any:
    """Make the jitted `(layer_params, steering, alphas [A], x, class_B [B]) -> (x [R, T, D], gates by kind [R, n])`.

    x is [B, T, D] where the alphas part, and there are A B rows from there on; before, as many as images. It is donated
    if the result has its shape.

    Args:
      form: of the layer.
      mesh: with the axis data, perhaps of devices that this machine does not have.
    """

    def run(layer_params: Any, steering: LayerSteering, alphas_A: jax.Array, x: jax.Array, class_B: jax.Array) -> Any:
        if form.parts:
            run_alpha = functools.partial(_run_block, form, layer_params, steering)
            results = jax.vmap(run_alpha, in_axes=(0, None, None))(alphas_A, x, class_B)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)
        times = len(x) // len(class_B)
        alpha_R = jnp.repeat(alphas_A[:times], len(class_B))
        return _run_block(form, layer_params, steering, alpha_R, x, jnp.tile(class_B, times))

    everywhere, rows = PartitionSpec(), PartitionSpec("data")
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(everywhere, everywhere, everywhere, rows, rows), out_specs=rows, check_vma=False
    )
    return jax.jit(sharded, donate_argnums=() if form.parts or form.last else 3)


@functools.lru_cache(maxsize=8)
def jit_embed(model: ViT, data: DataConfig, mesh: Mesh) -> Any:
    """Make the jitted `(params, images [B, height, width, channels] uint8) -> [B, T, D]`, what enters layer 0."""

    def embed(params: Any, images: jax.Array) -> jax.Array:
        return model.apply(params, preprocess(images, data), method="embed")

    return _jit_rows(embed, mesh)


@functools.lru_cache(maxsize=8)
def jit_classify(model: ViT, mesh: Mesh) -> Any:
    """Make the jitted `(params, x [R, 1, D]) -> [R] int32`, the predicted classes."""
    return _jit_rows(lambda params, x_R1D: predict_class(model.apply(params, x_R1D[:, 0], method="classify")), mesh)


def _jit_rows(function: Callable[..., Any], mesh: Mesh) -> Any:
    """Jit a function of parameters and an array whose rows are divided among the devices."""
    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False))


class LayerCalls:
    """The queue of calls that run a model layer by layer on this process's devices."""

    def __init__(self, trained: TrainedModel) -> None:
        self.trained, self.mesh = trained, local_mesh()
        self.params = replicate(trained.params)
        self._no_alphas = replicate(np.zeros(1, np.float32))

    def layer_params(self, layer: int) -> Any:
        """Return the parameters of one layer."""
        return self.params["params"][f"layers_{layer}"]

    def place_rows(self, rows: Any) -> Any:
        """Divide the rows of arrays among the devices."""
        return jax.device_put(rows, batch_sharding(self.mesh))

    def embed(self, split: Split, indices: np.ndarray) -> jax.Array:
        """Compute what enters layer 0, [B, T, D]."""
        images = self.place_rows(gather_images(split.images, indices))
        embedded: jax.Array = jit_embed(self.trained.model, self.trained.config.data, self.mesh)(self.params, images)
        return embedded

    def run_plain(self, x_BTD: jax.Array, class_B: jax.Array, layers: range, closed: int | None = None) -> jax.Array:
        """Run layers that nothing steers, one of them perhaps with closed gates."""
        for layer in layers:
            program = jit_layer(find_form(self.trained, layer, closed=layer == closed), self.mesh)
            x_BTD, _ = program(self.layer_params(layer), NOTHING, self._no_alphas, x_BTD, class_B)
        return x_BTD

    def run_steered(
        self, x_BTD: jax.Array, steerings: Mapping[int, LayerSteering], alphas_A: jax.Array, class_B: jax.Array
    ) -> tuple[dict[int, dict[str, jax.Array]], jax.Array]:
        """Run the layers from the first steered one on -> their gates by layer and kind, and predictions [R]."""
        first, gates = min(steerings), {}
        for layer in range(first, self.trained.config.model.depth):
            program = jit_layer(find_form(self.trained, layer, parts=layer == first), self.mesh)
            steering = steerings.get(layer, NOTHING)
            x_BTD, gates[layer] = program(self.layer_params(layer), steering, alphas_A, x_BTD, class_B)
        return gates, self.classify(x_BTD)

    def classify(self, x_R1D: jax.Array) -> jax.Array:
        """Predict the classes of rows, [R]."""
        classes: jax.Array = jit_classify(self.trained.model, self.mesh)(self.params, x_R1D)
        return classes


class CallSize(NamedTuple):
    """How much one call takes at once."""

    alphas: int
    images: int  # of each device


def choose_size(
    trained: TrainedModel, mesh: Mesh, steerings: Mapping[int, LayerSteering], alphas: int, images: int
) -> CallSize:
    """Choose as many alphas at once as fit the memory budget, and fewer images if not one alpha fits.

    The plans of the first steered layer and of the one after it decide for all layers, so that layers that are alike
    have programs of one size.

    Args:
      trained: the model, perhaps with descriptions of its parameters.
      mesh: see `jit_layer`.
      steerings: by layer, perhaps with descriptions of their arrays.
      alphas: how many there are.
      images: how many there are.

    Raises:
      HeadSteerError: the budget is too small for one image under one alpha.
    """
    config, model, first, everywhere = trained.config, trained.model, min(steerings), replicated_sharding(mesh)
    params, steerings = describe_arrays((trained.params["params"], dict(steerings)), everywhere)
    tokens, limits = model.positions_count + model.model.registers, choose_call_limits(model, config.machine, mesh)
    size, sharding = min(limits.images, images), batch_sharding(mesh)

    def compile_layer(layer: int, rows: int, size: int, alphas: int) -> Any:
        x = jax.ShapeDtypeStruct((rows * mesh.size, tokens, config.model.width), jnp.float32, sharding=sharding)
        class_B = jax.ShapeDtypeStruct((size * mesh.size,), jnp.int32, sharding=sharding)
        program = jit_layer(find_form(trained, layer, parts=layer == first), mesh)
        alphas_A = jax.ShapeDtypeStruct((alphas,), jnp.float32, sharding=everywhere)
        return program.lower(params[f"layers_{layer}"], steerings.get(layer, NOTHING), alphas_A, x, class_B).compile()

    def planned_bytes(compiled: Any) -> int:
        plan = compiled.memory_analysis()
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)

    while True:

        def compile_for(alphas: int, size: int = size) -> Any:
            programs = [compile_layer(first, size, size, alphas)]
            if first + 1 < config.model.depth:
                programs.append(compile_layer(first + 1, alphas * size, size, alphas))
            return max(programs, key=planned_bytes)

        fit = compile_within_memory(compile_for, alphas, limits.memory, calls=CALLS_IN_FLIGHT)
        if fit.size:
            return CallSize(fit.size, size)
        if size == 1:
            raise memory_error(fit, limits.memory, "one image under one alpha")
        size = max(1, size // 2)


class QueuedCall(NamedTuple):
    """A call whose results are on their way to the host."""

    setting: int
    alphas: np.ndarray  # [A] index into the alphas; the last may come several times
    gates: dict[int, dict[str, jax.Array]]  # by layer and kind, [R, n]
    predictions: jax.Array  # [R]


def _queue_calls(
    calls: LayerCalls, x_BTD: jax.Array, settings: Sequence[tuple[dict[int, LayerSteering], jax.Array]],
    alphas: Sequence[tuple[np.ndarray, jax.Array]], observed: Mapping[int, Sequence[GateKind]],
) -> Iterator[QueuedCall]:  # fmt: skip
    """Run every setting under every alpha on some images; as soon as a call is queued, its results are sent."""
    for v, (steerings, class_B) in enumerate(settings):
        for part_A, alphas_A in alphas:
            gates, predictions = calls.run_steered(x_BTD, steerings, alphas_A, class_B)
            returned: dict[int, dict[str, jax.Array]] = {
                layer: {kind: gates[layer][kind] for kind in kinds} for layer, kinds in observed.items()
            }
            for leaf in jax.tree.leaves((returned, predictions)):
                leaf.copy_to_host_async()
            yield QueuedCall(v, part_A, returned, predictions)


def _delay(queued: Iterator[QueuedCall]) -> Iterator[QueuedCall]:
    """Yield calls when the next ones are queued, so that the devices have work while the host copies results."""
    waiting: deque[QueuedCall] = deque()
    for call in queued:
        waiting.append(call)
        if len(waiting) > CALLS_IN_FLIGHT - 1:
            yield waiting.popleft()
    yield from waiting


def run_suffix(
    trained: TrainedModel, split: Split, settings: Sequence[SuffixSetting], alphas: np.ndarray, description: str,
    kinds: Sequence[GateKind] = ("heads", "sublayers"), *, following: bool = False,
) -> SuffixResult:  # fmt: skip
    """Run the layers from the first steered one on for every setting and alpha; the layers before it run once.

    As many alphas are computed at once as fit config.machine.sweep_memory.

    Args:
      settings: the same layers are steered in each.
      description: names the work in the progress bar.
      kinds: of the gates that are returned, as far as a layer has them.
      following: return the gates of all layers from the first steered one on, and not of the steered ones alone.

    Raises:
      HeadSteerError: the memory budget is too small for one image under one alpha.
    """
    config, layers, count = trained.config, settings[0].layers, len(split.labels)
    calls = LayerCalls(trained)
    steerings_V = replicate_once([{layer: setting.steerings(layer) for layer in layers} for setting in settings])
    returned = range(layers[0], config.model.depth) if following else layers
    observed = {layer: [kind for kind in kinds if kind in config.gate.kinds_in(layer)] for layer in returned}
    size = choose_size(trained, calls.mesh, steerings_V[0], len(alphas), count)
    starts = range(0, len(alphas), size.alphas)
    parts = [np.minimum(np.arange(begin, begin + size.alphas), len(alphas) - 1) for begin in starts]
    alphas_on_devices = [(part_A, replicate(np.asarray(alphas, np.float32)[part_A])) for part_A in parts]
    begin, end = (min(call * size.images, count) for call in hosts.process_share(-(-count // size.images)))
    result = _make_room(trained, observed, (len(settings), len(alphas), end - begin))

    def run_share() -> None:
        """Fill this host's share of the gates and predictions."""
        right = 0  # answers under the last alpha
        with progress(len(settings) * (end - begin), description, "image") as bar:
            for indices in padded_chunks(begin, end, size.images, calls.mesh.size):
                images = slice(indices[0] - begin, min(indices[0] + len(indices), end) - begin)
                classes = {id(s.steered_by): s.steered_by[indices].astype(np.int32) for s in settings}
                classes_on_devices = calls.place_rows(classes)
                class_VB = [classes_on_devices[id(setting.steered_by)] for setting in settings]
                x_BTD = calls.run_plain(calls.embed(split, indices), class_VB[0], range(layers[0]))
                steered_V = list(zip(steerings_V, class_VB, strict=True))
                queued = _queue_calls(calls, x_BTD, steered_V, alphas_on_devices, observed)
                for number, call in enumerate(_delay(queued), 1):
                    _fill_in(result, call, images, calls.mesh.size)
                    if number % len(parts) == 0:
                        answers = result.predictions[call.setting, -1, images]
                        right += int(np.sum(answers == split.labels[begin:end][images]))
                        done = images.stop - images.start
                        bar.update(done, f"accuracy {right / (bar.done + done):.1%} at alpha {alphas[-1]:g}")

    hosts.on_every_process(run_share)
    gathered = {
        layer: {kind: _gather_images(g) for kind, g in by_kind.items()} for layer, by_kind in result.gates.items()
    }
    return SuffixResult(gathered, _gather_images(result.predictions))


def run_suffix_from_unsteered(
    trained: TrainedModel, split: Split, settings: Sequence[SuffixSetting], alphas: np.ndarray, description: str,
    kinds: Sequence[GateKind],
) -> SuffixResult:  # fmt: skip
    """Run `run_suffix` with the unsteered model under alpha 0, whatever alpha 0 is in the config's form and mode."""
    result, steer = run_suffix(trained, split, settings, alphas, description, kinds), trained.config.steer
    parts = [patches for patches, steered in ((False, settings[0].steered), (True, settings[0].patches)) if steered]
    if all(is_unsteered_at_zero(steer, patches=patches) for patches in parts):
        return result
    unchanged = steer.model_copy(update={"form": "delta", "mode": "add", "patch_mode": "add"})
    plain = trained._replace(config=trained.config.model_copy(update={"steer": unchanged}))
    unsteered = run_suffix(plain, split, settings[:1], np.zeros(1), f"{description}, alpha 0", kinds)

    def put(values: np.ndarray, at_zero: np.ndarray) -> np.ndarray:
        return np.where((alphas == 0).reshape(-1, *[1] * (values.ndim - 2)), at_zero, values)

    gates = {
        layer: {kind: put(g, unsteered.gates[layer][kind]) for kind, g in by_kind.items()}
        for layer, by_kind in result.gates.items()
    }
    return SuffixResult(gates, put(result.predictions, unsteered.predictions))


def _make_room(
    trained: TrainedModel, observed: Mapping[int, Sequence[GateKind]], shape: tuple[int, int, int]
) -> SuffixResult:
    """Make arrays for the gates and predictions of V settings, A alphas and n images."""
    counts = count_gates(trained.model)
    gates: dict[int, dict[str, np.ndarray]] = {
        layer: {kind: np.zeros((*shape, counts[kind]), bool) for kind in layer_kinds}
        for layer, layer_kinds in observed.items()
    }
    return SuffixResult(gates, np.zeros(shape, np.int32))


def _fill_in(result: SuffixResult, call: QueuedCall, images: slice, devices: int) -> None:
    """Write the results of a call to the places of its setting, alphas and images; what is left over is padding."""
    count = images.stop - images.start

    def order_by_alpha(rows: jax.Array) -> np.ndarray:
        """Bring the rows of all devices in order: [R, ...] -> [A, n, ...]."""
        by_device = np.asarray(rows).reshape(devices, len(call.alphas), -1, *rows.shape[1:])
        return np.moveaxis(by_device, 1, 0).reshape(len(call.alphas), -1, *rows.shape[1:])[:, :count]

    for layer, by_kind in call.gates.items():
        for kind, rows in by_kind.items():
            result.gates[layer][kind][call.setting, call.alphas, images] = order_by_alpha(rows)
    result.predictions[call.setting, call.alphas, images] = order_by_alpha(call.predictions)


def _gather_images(values: np.ndarray) -> np.ndarray:
    """Gather every host's share of the images: [V, A, n, ...] -> [V, A, N, ...]."""
    return np.moveaxis(hosts.gather_rows(np.moveaxis(values, 2, 0)), 0, 2)


def predict_without_gates(trained: TrainedModel, split: Split, layer: int, description: str) -> np.ndarray:
    """Predict every image's class, [N], with one layer's gates that read its CLS residual closed."""
    calls, count, depth = LayerCalls(trained), len(split.labels), trained.config.model.depth
    size = min(choose_call_limits(trained.model, trained.config.machine, calls.mesh).images, count)
    begin, end = (min(call * size, count) for call in hosts.process_share(-(-count // size)))
    chunks = padded_chunks(begin, end, size, calls.mesh.size)

    def run_share() -> np.ndarray:
        right, note = 0, ""
        with progress(end - begin, description, "image") as bar:
            class_calls: list[jax.Array] = []
            for indices in chunks:
                class_B = calls.place_rows(np.zeros(len(indices), np.int32))
                last_B1D = calls.run_plain(calls.embed(split, indices), class_B, range(depth), layer)
                class_calls.append(calls.classify(last_B1D))
                if len(class_calls) > CALLS_IN_FLIGHT:
                    ready = len(class_calls) - 1 - CALLS_IN_FLIGHT
                    right += int(np.sum(np.asarray(class_calls[ready]) == split.labels[chunks[ready]]))
                    note = f"accuracy {right / ((ready + 1) * len(indices)):.1%}"
                bar.update(min(len(indices), end - indices[0]), note)
            return np.concatenate([np.zeros(0, np.int32), *map(np.asarray, class_calls)])[: end - begin]

    return hosts.gather_rows(hosts.on_every_process(run_share))
