"""Training: dense first, then with gates, and a dense control of the same length.

What a start does: a phase that has a checkpoint goes on from it; else the gated phase and the control start from the
end of the dense phase; the dense phase starts from pretrained weights where the config names some, else from scratch.

Keys: `key(seed)` -> fold_in(0) initialises, fold_in(1 + phase) -> fold_in(step) draws a step's augmentation and noise.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorboardX import SummaryWriter

from headsteer_jax.activations import Observe, observer
from headsteer_jax.augment import mixup, training_images
from headsteer_jax.checkpoint import MEND, Checkpoints, explained, make_directory, write_text
from headsteer_jax.config import Config, HeadSteerError, PhaseConfig
from headsteer_jax.data import Dataset, batch_indices, gather, prefetched
from headsteer_jax.gates import annealed, logistic_noise, usage_loss
from headsteer_jax.pretrained import load_backbone
from headsteer_jax.progress import progress, say
from headsteer_jax.vit import Gating, ViT, build, stack_gates

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
    model: ViT, params: Any, images_BHWC: jax.Array, targets_BC: jax.Array, progress: jax.Array, key: jax.Array,
    config: Config, gated: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Cross-entropy, plus the weighted usage loss where gates are on.

    Args:
      images_BHWC: normalised images.
      targets_BC: soft labels.
      progress: share of the phase that is done, which the annealing follows.
    """
    layers = config.model.depth - config.gate.first_layer
    if gated:
        noise_scale, target = annealed(config.gate, progress)
        noise_BAH = noise_scale * logistic_noise(key, (len(images_BHWC), layers, config.model.heads))
        logits_BC, out = model.apply(params, images_BHWC, gating="sampled", noise_BAH=noise_BAH)
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


def make_steps(model: ViT, config: Config, phase: PhaseConfig, gated: bool) -> Callable[..., Any]:
    """`(state, images [n, B, h, w, c] uint8, labels [n, B]) -> (state, metrics, each [n, ...])`: n steps in one call.

    Several steps in a call let XLA keep its buffers: on a CPU, allocating them afresh costs a quarter of a small step.
    """
    tx = optimizer(config, phase)
    classes = model.classes

    def step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        images, labels = batch
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key_images, key_mixup, key_noise = jax.random.split(key, 3)
        images = training_images(key_images, images, config.data)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), config.train.label_smoothing)
        if config.train.mixup > 0:
            images, targets = mixup(key_mixup, images, targets, config.train.mixup)
        share = state.step / phase.steps
        grads, metrics = jax.grad(
            lambda params: loss_and_metrics(model, params, images, targets, share, key_noise, config, gated),
            has_aux=True,
        )(state.params)
        updates, opt = tx.update(grads, state.optimizer, state.params)
        updates = scale_gates(updates, config.gate.learning_rate_scale)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(params, average, 1.0 - config.train.ema)
        metrics["gradient_norm"] = optax.global_norm(grads)
        return State(params, average, opt, state.key, state.step + 1), metrics

    return jax.jit(
        lambda state, images, labels: jax.lax.scan(step, state, (images, labels)),
        donate_argnums=0,
    )


class Log:
    """metrics.jsonl and TensorBoard, a row a call; rows that a resumed run will write again are dropped first."""

    def __init__(self, directory: Path) -> None:
        self.path = make_directory(directory) / "metrics.jsonl"
        self._board = SummaryWriter(str(directory / "tensorboard"))

    def forget_after(self, phase: str, step: int) -> None:
        rows = [row for row in read_log(self.path) if row["phase"] != phase or row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, phase: str, step: int, values: dict[str, Any]) -> None:
        row = {"phase": phase, "step": step, **{name: np.asarray(value).tolist() for name, value in values.items()}}
        with explained(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            for index, number in enumerate(np.ravel(value)):
                tag = f"{phase}/{name}" + (f"/{index}" if np.ndim(value) else "")
                self._board.add_scalar(tag, float(number), step)

    def close(self) -> None:
        with suppress(OSError):  # a full disk, which the next checkpoint or row reports
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
    """The model's variables before training: random, with the pretrained backbone where the config names one."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    side, channels = config.data.image_size, config.data.channels
    params = jax.jit(model.init)(key, jnp.zeros((1, side, side, channels)))
    if config.model.pretrained:
        params, report = load_backbone(params, config)
        say(str(report))
    return params


def fit(model: ViT, params: Any, phase: Phase, dataset: Dataset, config: Config, directory: Path, log: Log) -> State:
    """One phase, from `params` or from its own last checkpoint, to its end.

    Checkpoints, each with the phase, the step, the data position and the config: `<phase>/last` (two, every
    `train.eval_every` steps and at the end), `<phase>/best` (by validation accuracy; in the gated phase among those
    after annealing).

    Raises:
      HeadSteerError: the loss is not finite (names the step and the last good checkpoint), or the batch is larger than
        the data.
    """
    plan: PhaseConfig = config.train.dense if phase == "dense" else config.train.gated
    gated = phase == "gated"
    count, batch = len(dataset.train.labels), config.train.batch
    if batch > count:
        raise HeadSteerError(f"config.train.batch = {batch}: allowed is at most the {count} training images")
    last, best = (Checkpoints(directory / phase / name, keep) for name, keep in (("last", 2), ("best", 1)))
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + PHASES.index(phase))
    state = State(
        params=jax.tree.map(jnp.array, params),  # a copy: the steps donate their state
        average=jax.tree.map(jnp.array, params) if config.train.ema else None,
        optimizer=optimizer(config, plan).init(params),
        key=jax.random.key_data(key),
        step=jnp.int32(0),
    )
    best_accuracy = -1.0
    if last.latest() is not None:
        state, about = last.restore(state)
        best_accuracy = about["best_accuracy"]
    start = int(state.step)
    if start == plan.steps:
        return state
    best.forget_after(start)
    if start:
        say(f"{phase}: going on from step {start}")
    log.forget_after(phase, start)
    calls = [
        (first, min(first + config.train.steps_per_call, plan.steps))
        for first in range(start, plan.steps, config.train.steps_per_call)
    ]
    offset = config.train.dense.steps if phase != "dense" else 0  # later phases go on in the order of the data

    def batches(call: int) -> tuple[np.ndarray, np.ndarray]:
        indices = np.stack([batch_indices(count, batch, config.seed, offset + i) for i in range(*calls[call])])
        images = gather(dataset.train.images, indices.ravel())
        return images.reshape(*indices.shape, *images.shape[1:]), dataset.train.labels[indices]

    steps = make_steps(model, config, plan, gated)
    observe = observer(model, config, GATING[phase], config.sae_layer)
    pending: tuple[int, Any] | None = None

    def record() -> dict[str, float]:
        """Look at the last call's metrics, when the next one is already under way: the device never waits."""
        assert pending is not None
        step, metrics = pending[0], jax.device_get(pending[1])
        bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
        if bad.size:
            good = last.latest()
            kept = f"the last good checkpoint is {last.directory / str(good)}" if good else "there is no checkpoint yet"
            at, section = step - len(metrics["loss"]) + int(bad[0]) + 1, "dense" if phase == "dense" else "gated"
            raise HeadSteerError(
                f"{phase}: the loss is {metrics['loss'][bad[0]]} at step {at}; {kept}; "
                f"lower config.train.{section}.learning_rate and pass --overwrite"
            )
        means = {name: value.mean(axis=0) for name, value in metrics.items()}
        log.write(phase, step, means)
        return means

    with progress(plan.steps, phase, initial=start) as bar:
        for (first, end), (images, labels) in zip(calls, prefetched(batches, len(calls)), strict=True):
            state, metrics = steps(state, images, labels)
            means = record() if pending else None
            pending = (end, metrics)
            note = f"loss {means['loss']:.3f}, accuracy {means['train_accuracy']:.3f}" if means else ""
            if end % config.train.eval_every == 0 or end == plan.steps:
                record()
                pending = None
                accuracy = validate(observe, state, dataset, phase, end, log)
                about = {
                    "phase": phase, "step": end, "position": (offset + end) * batch,
                    "config": json.loads(config.model_dump_json()),
                }  # fmt: skip
                settled = not gated or end >= config.gate.anneal * plan.steps
                if settled and accuracy > best_accuracy:
                    best_accuracy = accuracy
                    best.save(end, evaluated(state), about | {"best_accuracy": accuracy})
                last.save(end, state, about | {"best_accuracy": best_accuracy})
                note = f"validation accuracy {accuracy:.3f}"
            bar.update(end - first, note)
    return state


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
            params = evaluated(fit(model, params, "dense", dataset, config, directory, log))
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
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, channels)))
    if config.train.use == "best" and phase == "gated":
        return model, Checkpoints(directory / phase / "best").restore(params)[0]
    plan = config.train.dense if phase == "dense" else config.train.gated
    state = State(
        params, params if config.train.ema else None, jax.eval_shape(optimizer(config, plan).init, params),
        *jax.eval_shape(lambda: (jnp.zeros(2, jnp.uint32), jnp.int32(0))),
    )  # fmt: skip
    last = Checkpoints(directory / phase / "last", 2)
    state, _ = last.restore(state)
    if int(state.step) != plan.steps:
        raise HeadSteerError(f"{last.directory}: it ends at step {state.step} of {plan.steps}; {MEND}")
    return model, evaluated(state)
