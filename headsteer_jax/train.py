"""Training: dense first, then with gates, and a dense control of the same length.

What a start does: a phase that has a checkpoint goes on from it; else the gated phase and the control start from the
end of the dense phase; the dense phase starts from pretrained weights where the config names some, else from scratch.

One program for any number of devices and hosts: the state lives on `mesh.training_mesh`, a batch is dealt out over it,
and each host reads the images of its own devices. SIGTERM ends it after a checkpoint (`preemption`).

Keys: `key(seed)` -> fold_in(0) initialises, fold_in(1 + phase) -> fold_in(step) draws a step's augmentation and noise.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tensorboardX import SummaryWriter

from headsteer_jax import hosts, mesh
from headsteer_jax.activations import Observe, observer
from headsteer_jax.augment import mixup, training_images
from headsteer_jax.checkpoint import MEND, Checkpoints, Path, explained, in_bucket, make_directory, write_text
from headsteer_jax.config import Config, HeadSteerError, PhaseConfig
from headsteer_jax.data import Dataset, Split, batch_indices, gather, prefetched
from headsteer_jax.flops import speed
from headsteer_jax.gates import annealed, logistic_noise, usage_loss
from headsteer_jax.preemption import Preempted, at_checkpoints
from headsteer_jax.pretrained import load_backbone
from headsteer_jax.progress import progress, say
from headsteer_jax.vit import Gating, ViT, build, model_fingerprint, stack_gates

Phase = Literal["dense", "gated", "dense_control"]
PHASES: tuple[Phase, ...] = ("dense", "gated", "dense_control")
GATING: dict[Phase, Gating] = {"dense": "dense", "gated": "thresholded", "dense_control": "dense"}  # in evaluation


class State(NamedTuple):
    """Everything that training is: saved whole, restored whole. The data position follows from the step."""

    params: Any
    average: Any  # exponential moving average of params; None without EMA
    optimizer: Any
    key: jax.Array  # [2] uint32, the phase's PRNG key
    step: jax.Array  # int32, optimizer steps done in this phase


def evaluated(state: State) -> Any:
    """The parameters that are evaluated and kept."""
    return state.params if state.average is None else state.average


def optimizer(config: Config, phase: PhaseConfig) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up and a cosine; weight decay on matrices only."""
    warmup = min(round(phase.warmup * phase.steps), phase.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else phase.learning_rate,
        phase.learning_rate,
        warmup,
        phase.steps,
        phase.final * phase.learning_rate,
    )

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(config.train.clip),
        optax.adamw(schedule, weight_decay=config.train.weight_decay, mask=matrices),
    )


def scale_gates(updates: Any, scale: float) -> Any:
    """The optimizer's updates with those of the decision networks times `scale`: a learning rate of their own."""

    def one(path: Any, update: jax.Array) -> jax.Array:
        return update * scale if any(getattr(key, "key", None) == "decide" for key in path) else update

    return updates if scale == 1.0 else jax.tree_util.tree_map_with_path(one, updates)


def loss_and_metrics(
    model: ViT, params: Any, images_BHWC: jax.Array, targets_BC: jax.Array, progress: jax.Array,
    noise_BAH: jax.Array | None, config: Config,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Cross-entropy, plus the weighted usage loss where gates are sampled.

    Args:
      images_BHWC: normalised images.
      targets_BC: soft labels.
      progress: share of the phase that is done, which the annealing follows.
      noise_BAH: logistic noise of the gates, before its scale; None: dense, every head runs.
    """
    if noise_BAH is not None:
        noise_scale, target = annealed(config.gate, progress)
        logits_BC, out = model.apply(params, images_BHWC, gating="sampled", noise_BAH=noise_scale * noise_BAH)
        g_BAH, m_BAH = stack_gates(out["gates"]), stack_gates(out["gate_logits"])
        pressure = config.gate.weight * usage_loss(g_BAH, target, config.gate)
        usage = {
            "usage_loss": pressure,
            "usage_target": target,
            "gate_noise": noise_scale,
            "usage_sampled": jnp.mean(g_BAH, axis=(0, 2)),
            "usage_thresholded": jnp.mean(m_BAH > 0, axis=(0, 2), dtype=jnp.float32),
        }
    else:
        logits_BC, _ = model.apply(params, images_BHWC, gating="dense")
        pressure, usage = jnp.zeros(()), {}
    cross_entropy = jnp.mean(optax.softmax_cross_entropy(logits_BC, targets_BC))
    hits = jnp.argmax(logits_BC, axis=-1) == jnp.argmax(targets_BC, axis=-1)
    metrics = {"loss": cross_entropy + pressure, "cross_entropy": cross_entropy, "train_accuracy": jnp.mean(hits)}
    return cross_entropy + pressure, metrics | usage


def make_steps(
    model: ViT, config: Config, phase: PhaseConfig, gated: bool, shardings: State | None = None
) -> Callable[..., Any]:
    """`(state, images [n, B, h, w, c] uint8, labels [n, B]) -> (state, metrics, each [n, ...])`: n steps in one call.

    Several steps in a call let XLA keep its buffers: on a CPU, allocating them afresh costs a quarter of a small step.

    Args:
      shardings: where the state's arrays live (`mesh.of_state`); None: on one device.
    """
    tx = optimizer(config, phase)
    parts, layers = config.train.accumulate, config.model.depth - config.gate.first_layer

    def gradient(
        params: Any, images: jax.Array, targets: jax.Array, share: jax.Array, noise: jax.Array | None
    ) -> tuple[Any, dict[str, jax.Array]]:
        def of(params: Any, images: jax.Array, targets: jax.Array, noise: jax.Array | None) -> Any:
            return loss_and_metrics(model, params, images, targets, share, noise, config)

        if parts == 1:
            return jax.grad(of, has_aux=True)(params, images, targets, noise)

        def cut(x: jax.Array) -> jax.Array:
            """[B, ...] -> [parts, B / parts, ...], every device's images in each part."""
            return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

        def add(total: Any, some: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(of, has_aux=True)(params, *some)), None

        given = jax.tree.map(cut, (images, targets, noise))
        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(jax.grad(of, has_aux=True), params, *jax.tree.map(lambda x: x[0], given)),
        )
        total, _ = jax.lax.scan(add, zero, given)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    def step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        images, labels = batch
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key_images, key_mixup, key_noise = jax.random.split(key, 3)
        images = training_images(key_images, images, config.data)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.classes), config.train.label_smoothing)
        if config.train.mixup > 0:
            images, targets = mixup(key_mixup, images, targets, config.train.mixup)
        noise = logistic_noise(key_noise, (len(images), layers, config.model.heads)) if gated else None
        grads, metrics = gradient(state.params, images, targets, state.step / phase.steps, noise)
        updates, opt = tx.update(grads, state.optimizer, state.params)
        updates = scale_gates(updates, config.gate.learning_rate_scale)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(params, average, 1.0 - config.train.ema)
        metrics["gradient_norm"] = optax.global_norm(grads)
        return State(params, average, opt, state.key, state.step + 1), metrics

    def steps(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        return jax.lax.scan(step, state, (images, labels))

    if shardings is None:
        return jax.jit(steps, donate_argnums=0)
    devices = shardings.step.mesh  # type: ignore[attr-defined]
    batch = mesh.over_batch(devices, axis=1)
    return jax.jit(
        steps, donate_argnums=0, in_shardings=(shardings, batch, batch),
        out_shardings=(shardings, mesh.everywhere(devices)),
    )  # fmt: skip


class Log:
    """metrics.jsonl and TensorBoard, a row a call; rows that a resumed run will write again are dropped first.

    speed.jsonl beside it: images a second and FLOPs, which are not the same from run to run. Of several hosts process 0
    writes. A bucket's objects cannot be added to: there the rows are written with each checkpoint (`flush`).
    """

    def __init__(self, directory: Path) -> None:
        self._bucket, self._writes = in_bucket(directory), hosts.is_first()
        self._paths = {name: directory / f"{name}.jsonl" for name in ("metrics", "speed")}
        hosts.first(lambda: bool(make_directory(directory)))
        self._rows = {name: read_log(path) if self._bucket else [] for name, path in self._paths.items()}
        self._board = SummaryWriter(str(directory / "tensorboard")) if self._writes and not self._bucket else None

    def forget_after(self, phase: str, step: int) -> None:
        def forget() -> None:
            for name, path in self._paths.items():
                rows = self._rows[name] if self._bucket else read_log(path)
                self._rows[name] = [row for row in rows if row["phase"] != phase or row["step"] <= step]
                write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows[name]))

        hosts.first(forget)

    def write(self, phase: str, step: int, values: dict[str, Any], name: str = "metrics") -> None:
        if not self._writes:
            return
        row = {"phase": phase, "step": step, **{field: np.asarray(value).tolist() for field, value in values.items()}}
        if self._bucket:
            self._rows[name].append(row)
        else:
            with explained(self._paths[name]), self._paths[name].open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self._board is None:
            return
        for field, value in values.items():
            for index, number in enumerate(np.ravel(value)):
                tag = f"{phase}/{field}" + (f"/{index}" if np.ndim(value) else "")
                self._board.add_scalar(tag, float(number), step)

    def flush(self) -> None:
        if self._bucket and self._writes:
            for name, path in self._paths.items():
                write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows[name]))

    def close(self) -> None:
        with suppress(OSError):  # a full disk, which the next checkpoint or row reports
            if self._board is not None:
                self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl's rows; a last line that an interruption cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@contextmanager
def _logging(directory: Path) -> Iterator[Log]:
    log = Log(directory)
    try:
        yield log
    finally:
        log.close()


def initial_params(model: ViT, config: Config, seed: int) -> Any:
    """The model's variables before training, whole on every host: random, with the pretrained backbone where the config
    names one."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    side, channels = config.data.image_size, config.data.channels
    params = jax.jit(model.init)(key, jnp.zeros((1, side, side, channels)))
    if config.model.pretrained:
        params, report = hosts.everywhere(lambda: load_backbone(params, config))
        say(str(report))
    hosts.check_equal({"the initial model": model_fingerprint(params)})
    return params


def initial_state(params: Any, phase: Phase, config: Config) -> State:
    """The start of a phase."""
    plan: PhaseConfig = config.train.dense if phase == "dense" else config.train.gated
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + PHASES.index(phase))
    average = params if config.train.ema else None
    return State(params, average, optimizer(config, plan).init(params), jax.random.key_data(key), jnp.int32(0))


def batches(
    split: Split, config: Config, devices: Mesh, calls: Sequence[tuple[int, int]], offset: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Each call's images [n, B, h, w, c] uint8 and labels [n, B], on the devices, ahead of the call in threads.

    Each host reads the rows of its own devices. The batches follow from the seed and the step alone: they are the same
    on any number of hosts, and a run goes on in the middle of them.

    Args:
      calls: the first step of each, and the one after its last.
      offset: of the phase's first step, in steps of the whole training.
    """
    batch, count = config.train.batch, len(split.labels)
    live, rows = mesh.over_batch(devices, axis=1), mesh.own_rows(mesh.over_batch(devices), batch)

    def one(call: int) -> tuple[jax.Array, jax.Array]:
        indices = np.stack([batch_indices(count, batch, config.seed, offset + i)[rows] for i in range(*calls[call])])
        images = gather(split.images, indices.ravel())
        images = images.reshape(*indices.shape, *images.shape[1:])
        return tuple(
            jax.make_array_from_process_local_data(live, part, (len(part), batch, *part.shape[2:]))
            for part in (images, split.labels[indices])
        )

    return prefetched(one, len(calls), threads=config.machine.prefetch)


def fit(model: ViT, params: Any, phase: Phase, dataset: Dataset, config: Config, directory: Path, log: Log) -> State:
    """One phase, from `params` or from its own last checkpoint, to its end.

    Checkpoints, each with the phase, the step, the data position and the config: `<phase>/last` (machine.keep of them,
    every `train.eval_every` steps, at the end and on SIGTERM), `<phase>/best` (by validation accuracy; in the gated
    phase among those after annealing).

    Raises:
      HeadSteerError: the loss is not finite (names the step and the last good checkpoint), the batch is larger than
        the data, or it cannot be divided among the devices.
      Preempted: after SIGTERM, once a checkpoint is saved.
    """
    plan: PhaseConfig = config.train.dense if phase == "dense" else config.train.gated
    gated = phase == "gated"
    count, batch, t = len(dataset.train.labels), config.train.batch, config.train
    if batch > count:
        raise HeadSteerError(f"config.train.batch = {batch}: allowed is at most the {count} training images")
    devices = mesh.training_mesh(config.machine)
    mesh.check_batch(config, devices)
    last, best = (
        Checkpoints(directory / phase / name, keep) for name, keep in (("last", config.machine.keep), ("best", 1))
    )
    state = jax.eval_shape(lambda: initial_state(params, phase, config))
    shardings = mesh.of_state(state, devices)
    best_accuracy = -1.0
    if last.latest() is not None:
        like = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, shardings)
        state, about = last.restore(like)
        best_accuracy = about["best_accuracy"]
    else:
        state = mesh.placed(initial_state(params, phase, config), shardings)
    start = int(state.step)
    if start == plan.steps:
        return state
    last.forget_after(start)
    best.forget_after(start)
    if best.latest() is None:
        best_accuracy = -1.0
    if start:
        say(f"{phase}: going on from step {start}")
    log.forget_after(phase, start)
    ends = sorted({*range(0, plan.steps, t.steps_per_call), plan.steps} - set(range(start + 1)))
    calls = list(zip([start, *ends[:-1]], ends, strict=True))
    offset = t.dense.steps if phase != "dense" else 0  # later phases go on in the order of the data
    steps = make_steps(model, config, plan, gated, shardings)
    observe = observer(model, config, GATING[phase], config.sae_layer)
    pending: tuple[int, Any] | None = None
    recorded = time.monotonic()

    def record() -> dict[str, float]:
        """Look at the last call's metrics, when the next one is already under way: the device never waits."""
        nonlocal pending, recorded
        assert pending is not None
        (step, metrics), pending = (pending[0], jax.device_get(pending[1])), None
        done = len(metrics["loss"])
        bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
        if bad.size:
            good = last.latest()
            kept = f"the last good checkpoint is {last.directory / str(good)}" if good else "there is no checkpoint yet"
            at, section = step - done + int(bad[0]) + 1, "dense" if phase == "dense" else "gated"
            raise HeadSteerError(
                f"{phase}: the loss is {metrics['loss'][bad[0]]} at step {at}; {kept}; "
                f"lower config.train.{section}.learning_rate and pass --overwrite"
            )
        means = {name: value.mean(axis=0) for name, value in metrics.items()}
        log.write(phase, step, means)
        seconds, recorded = time.monotonic() - recorded, time.monotonic()
        reached = speed(config, model.classes, done * batch / seconds, devices)
        log.write(phase, step, reached, "speed")
        return means | reached

    def save(step: int) -> None:
        about = {
            "phase": phase, "step": step, "position": (offset + step) * batch, "best_accuracy": best_accuracy,
            "config": json.loads(config.model_dump_json()),
        }  # fmt: skip
        log.flush()
        last.save(step, state, about)

    with at_checkpoints() as asked, progress(plan.steps, phase, initial=start) as bar:
        for number, ((first, end), (images, labels)) in enumerate(
            zip(calls, batches(dataset.train, config, devices, calls, offset), strict=True)
        ):
            with _traced(directory / "profile" / phase if config.machine.profile and number == 1 else None):
                state, metrics = steps(state, images, labels)
                if config.machine.profile and number == 1:
                    jax.block_until_ready(state)
            means = record() if pending else None
            pending = (end, metrics)
            stopping, note = asked(), ""
            if means:
                note = f"loss {means['loss']:.3f}, accuracy {means['train_accuracy']:.3f}"
                note += f", MFU {means['mfu']:.1%}" if "mfu" in means else ""
            if end % t.eval_every == 0 or end == plan.steps:
                record()
                accuracy = validate(observe, state, dataset, phase, end, log)
                settled = not gated or end >= config.gate.anneal * plan.steps
                if settled and accuracy > best_accuracy:
                    best_accuracy = accuracy
                    about = {"phase": phase, "step": end, "best_accuracy": accuracy}
                    best.save(end, evaluated(state), about)
                    best.wait()  # on disk before a checkpoint that names it as the best so far
                save(end)
                note = f"validation accuracy {accuracy:.3f}"
                recorded = time.monotonic()
            elif stopping:
                record()
                save(end)
            if stopping and end < plan.steps:
                for checkpoints in (last, best):
                    checkpoints.close()
                say(f"{phase}: step {end} is saved")
                raise Preempted
            bar.update(end - first, note)
        for checkpoints in (last, best):
            checkpoints.close()
    return state


@contextmanager
def _traced(where: Path | None) -> Iterator[None]:
    """A jax.profiler trace, for TensorBoard or Perfetto."""
    if where is None:
        yield
    else:
        with jax.profiler.trace(os.fspath(where)):
            yield


def validate(observe: Observe, state: State, dataset: Dataset, phase: Phase, step: int, log: Log) -> float:
    """Accuracy on the validation split, logged with every gated layer's thresholded usage.

    Raises:
      HeadSteerError: the residuals are not finite.
    """
    seen = observe(evaluated(state), dataset.validation, f"{phase}: validation")
    accuracy = seen.accuracy(dataset.validation.labels)
    if not np.isfinite(seen.x).all():
        raise HeadSteerError(f"{phase}: the residuals are not finite at step {step}; lower the learning rate")
    usage = {"validation_usage": seen.gates.mean(axis=(0, 2))} if phase == "gated" else {}
    log.write(phase, step, {"validation_accuracy": accuracy} | usage)
    return accuracy


def train(config: Config, dataset: Dataset, directory: Path) -> None:
    """All phases, each resumed where it stopped; see the top of this file for what starts from what."""
    model = build(config, len(dataset.class_names))
    params = initial_params(model, config, config.seed)
    with _logging(directory) as log:
        if config.train.dense.steps:
            params = hosts.fetched(evaluated(fit(model, params, "dense", dataset, config, directory, log)))
        fit(model, params, "gated", dataset, config, directory, log)
        if config.train.dense_control:
            fit(model, params, "dense_control", dataset, config, directory, log)


def trained(config: Config, dataset: Dataset, directory: Path, phase: Phase = "gated") -> tuple[ViT, Any]:
    """The model and the parameters that a finished training left in `directory`.

    Raises:
      HeadSteerError: the checkpoint is missing, damaged or of another config.
    """
    model = build(config, len(dataset.class_names))
    side, channels = config.data.image_size, config.data.channels

    def like(make: Callable[[], Any]) -> Any:
        """What is restored as NumPy's: whole on every host."""
        return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), jax.eval_shape(make))

    def params() -> Any:
        return model.init(jax.random.key(0), jnp.zeros((1, side, side, channels)))

    plan = config.train.dense if phase == "dense" else config.train.gated
    if config.train.use == "best" and phase == "gated":
        kept = Checkpoints(directory / phase / "best", writes=False).restore(like(params))[0]
    else:
        last = Checkpoints(directory / phase / "last", writes=False)
        step = last.latest()
        if step is not None and step != plan.steps:
            raise HeadSteerError(f"{last.directory}: it ends at step {step} of {plan.steps}; {MEND}")
        kept = evaluated(last.restore(like(lambda: initial_state(params(), phase, config)), step)[0])
    return model, jax.device_put(kept, jax.local_devices()[0])
