"""One training step: the loss, the optimizer, and several steps as one program.

Random keys: `key(seed)` folded with 0 initialises the model; folded with 1 + phase and then with the step, it draws
that step's augmentation and noise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from headsteer_jax.config.schema import Config, PhaseConfig
from headsteer_jax.data.augment import augment_and_normalise, mixup
from headsteer_jax.model.gates import Gates, anneal_noise
from headsteer_jax.model.vit import ViT, draw_noise, training_form
from headsteer_jax.runtime import mesh
from headsteer_jax.train.losses import follow_teacher, has_teacher, limit_usage


class State(NamedTuple):
    """The complete state of a training phase, which a checkpoint saves; the data position follows from the step."""

    params: Any
    average: Any  # exponential moving average of params; None if train.ema is 0
    optimizer: Any
    key: jax.Array  # [2] uint32, the phase's PRNG key
    step: jax.Array  # int32, optimizer steps done in this phase


def evaluation_params(state: State) -> Any:
    """Return the parameters that are evaluated and used later: the average, if there is one."""
    return state.params if state.average is None else state.average


class Schedule(NamedTuple):
    """What a phase prescribes for each of n steps; arguments of the program, so that phases can share one."""

    learning_rate: Any  # [n] float32
    progress: Any  # [n] float32, the share of the phase that is done before the step

    def cut(self, first: int, end: int) -> "Schedule":
        """Cut out the steps from `first` up to and without `end`."""
        return Schedule(*(values_n[first:end] for values_n in self))


def make_learning_rate(phase: PhaseConfig) -> optax.Schedule:
    """Make a phase's learning rate: linear warm-up, then a cosine."""
    warmup = min(round(phase.warmup * phase.steps), phase.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else phase.learning_rate,
        phase.learning_rate,
        warmup,
        phase.steps,
        phase.final * phase.learning_rate,
    )


def make_schedule(phase: PhaseConfig) -> Schedule:
    """Compute the schedule of all of a phase's steps, as NumPy arrays; this waits for the device."""
    steps = np.arange(phase.steps, dtype=np.int32)
    rates = np.broadcast_to(np.asarray(make_learning_rate(phase)(steps), np.float32), steps.shape)
    return Schedule(rates, steps.astype(np.float32) / np.float32(phase.steps))


def make_optimizer(config: Config, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Make AdamW with clipping, and weight decay on matrices only."""

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(config.train.clip),
        optax.adamw(learning_rate, weight_decay=config.train.weight_decay, mask=matrices),
    )


def init_optimizer(config: Config, params: Any) -> optax.OptState:
    """Make the optimizer's state before a phase's first step."""
    return make_optimizer(config, lambda _: 0.0).init(params)  # which has no learning rate, but counts the steps


def is_gate(path: Any) -> bool:
    """Say whether a path in the parameters leads to a decision network."""
    return any(str(getattr(key, "key", "")).startswith("decide") for key in path)


def scale_gates(updates: Any, scale: float) -> Any:
    """Multiply the decision networks' updates by `scale`, which gives them a learning rate of their own."""

    def scale_leaf(path: Any, update: jax.Array) -> jax.Array:
        return update * scale if is_gate(path) else update

    return updates if scale == 1.0 else jax.tree_util.tree_map_with_path(scale_leaf, updates)


class Batch(NamedTuple):
    """The images, labels and noise from which a step computes its loss."""

    images: jax.Array  # [B, height, width, channels], normalised
    targets: jax.Array  # [B, C] soft labels
    noise: Gates | None  # logistic noise of the gates, before it is scaled; None: everything runs


def _run_model(model: ViT, params: Any, images_BHWC: jax.Array, **gating: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Run a model -> logits [B, C], the CLS residuals after the last layer [B, D], and `out`."""

    def run(model: ViT) -> tuple[jax.Array, jax.Array, Any]:
        x_BTD, out = model.blocks(model.embed(images_BHWC), 0, **gating)
        return model.classify(x_BTD[:, 0]), x_BTD[:, 0], out

    result: tuple[jax.Array, jax.Array, Any] = model.apply(params, method=run)
    return result


def loss_and_metrics(
    model: ViT, params: Any, batch: Batch, progress: jax.Array, teacher: Any, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the cross-entropy, plus, if gates are sampled, the weighted losses on their usage and to a teacher.

    Args:
      progress: the share of the phase that is done, which the annealing depends on.
      teacher: parameters of the dense model that teaches; None: there is no teacher.
    """
    pressure, metrics = jnp.zeros(()), dict[str, jax.Array]()
    if batch.noise is None:
        logits_BC, x_BD, _ = _run_model(model, params, batch.images, gating="dense")
    else:
        noise_scale = anneal_noise(config.gate, progress)
        noise = {kind: noise_scale * value for kind, value in batch.noise.items()}
        logits_BC, x_BD, out = _run_model(model, params, batch.images, gating="sampled", noise=noise)
        pressure, metrics = limit_usage(config, model.classes, out["gates"], out["gate_logits"], progress)
        metrics["gate_noise"] = noise_scale
    if teacher is not None:
        taught = _run_model(model, teacher, batch.images, gating="dense")[:2]
        distance, terms = follow_teacher(config.gate, (logits_BC, x_BD), taught)
        pressure, metrics = pressure + distance, metrics | terms
    cross_entropy = jnp.mean(optax.softmax_cross_entropy(logits_BC, batch.targets))
    hits = jnp.argmax(logits_BC, axis=-1) == jnp.argmax(batch.targets, axis=-1)
    loss = cross_entropy + pressure
    return loss, metrics | {"loss": loss, "cross_entropy": cross_entropy, "train_accuracy": jnp.mean(hits)}


class Layout(NamedTuple):
    """Says how the arrays of a step lie on several devices; XLA adds the communication that this needs.

    Without it XLA lets the parameters' cut decide how activations are cut: with machine.fsdp = 4 on eight TPU v5e chips
    it then exchanged 1.26 GB a step, 130 times over, and needed more memory than without the cut.
    """

    batch: NamedSharding  # of images, targets and noise
    replicated: NamedSharding  # of parameters while a gradient is computed
    params: Any  # of parameters between the steps, and of gradients; None: they are replicated then, too

    def cut_batch(self, batch: Any) -> Any:
        """Give every device its own images."""
        return jax.lax.with_sharding_constraint(batch, jax.tree.map(lambda _: self.batch, batch))

    def replicate(self, params: Any) -> Any:
        """Give every device all parameters, which it needs as long as it computes a gradient, or all of a gradient."""
        if self.params is None:
            return params
        return jax.lax.with_sharding_constraint(params, jax.tree.map(lambda _: self.replicated, params))

    def cut_gradient(self, gradient: Any) -> Any:
        """Give every device the part of the gradient that belongs to its part of the parameters."""
        return gradient if self.params is None else jax.lax.with_sharding_constraint(gradient, self.params)


def _list_devices(shardings: State | None) -> list[jax.Device]:
    """List the devices that a step is for; those of its mesh need not be there."""
    if shardings is None:
        return jax.devices()[:1]
    step: Any = shardings.step  # a State of shardings in place of arrays
    return step.mesh.devices.ravel().tolist()


def _choose_layout(shardings: State | None) -> Layout | None:
    """Choose the layout of a step; None on one device, whose program needs none."""
    if shardings is None:
        return None
    step: Any = shardings.step  # a State of shardings in place of arrays
    if step.mesh.size == 1:
        return None
    params = shardings.params if step.mesh.shape["fsdp"] > 1 else None
    return Layout(mesh.batch_sharding(step.mesh), mesh.replicated_sharding(step.mesh), params)


def _make_gradient(model: ViT, config: Config, layout: Layout | None) -> Callable[..., Any]:
    """Make the function (params, batch, progress, teacher) -> (gradient of the loss, metrics).

    With train.accumulate it computes the batch in parts, one after the other, and returns their mean.
    """
    parts = config.train.accumulate

    def gradient(params: Any, batch: Batch, progress: jax.Array, teacher: Any) -> tuple[Any, dict[str, jax.Array]]:
        if layout is not None and teacher is not None:
            teacher = layout.replicate(teacher)

        def loss(params: Any, batch: Batch) -> Any:
            return loss_and_metrics(model, params, batch, progress, teacher, config)

        if layout is None:
            return _average_parts(lambda part: jax.grad(loss, has_aux=True)(params, part), batch, parts)

        def differentiate_on_devices(batch: Batch) -> Any:
            grads, metrics = jax.grad(loss, has_aux=True)(layout.replicate(params), layout.cut_batch(batch))
            # cut inside of the loop over parts, gradients make XLA exchange activations between devices
            return (layout.replicate(grads) if parts > 1 else grads), metrics

        grads, metrics = _average_parts(differentiate_on_devices, batch, parts)
        return layout.cut_gradient(grads), metrics

    return gradient


def _average_parts(differentiate: Callable[[Batch], Any], batch: Batch, parts: int) -> tuple[Any, dict[str, jax.Array]]:
    """Average what `differentiate` returns over the parts of a batch, one after the other."""
    if parts == 1:
        return differentiate(batch)

    def add_part(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, differentiate(part)), None

    split = jax.tree.map(lambda x: _split_batch(x, parts), batch)
    zero = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], split)),
    )
    total, _ = jax.lax.scan(add_part, zero, split)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def _split_batch(x: jax.Array, parts: int) -> jax.Array:
    """Split a batch so that each part has images of every device: [B, ...] -> [parts, B / parts, ...]."""
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)


def make_training_steps(model: ViT, config: Config, gated: bool, shardings: State | None = None) -> Callable[..., Any]:
    """Compile n training steps as one program.

    Several steps in a call let XLA keep its buffers: on a CPU, allocating them afresh costs a quarter of a small step.

    Args:
      gated: whether gates are sampled; otherwise every head runs.
      shardings: the shardings of the state's arrays (`mesh.state_shardings`); None: they are on one device.

    Returns:
      A function (state, Schedule of n steps, images [n, B, h, w, c] uint8, labels [n, B]) -> (state, metrics, each
      [n, ...]). If gates are sampled and the config has a teacher, its parameters are a last argument, which is kept.
    """
    model = training_form(model, config, _list_devices(shardings))
    gradient = _make_gradient(model, config, _choose_layout(shardings))
    teachers = int(gated and has_teacher(config.gate))

    def step(
        state: State, inputs: tuple[Schedule, jax.Array, jax.Array], teacher: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        (learning_rate, progress), images, labels = inputs
        tx = make_optimizer(config, lambda _: learning_rate)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key_images, key_mixup, key_noise = jax.random.split(key, 3)
        images = augment_and_normalise(key_images, images, config.data)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.classes), config.train.label_smoothing)
        if config.train.mixup > 0:
            images, targets = mixup(key_mixup, images, targets, config.train.mixup)
        noise = draw_noise(key_noise, model, len(images)) if gated else None
        grads, metrics = gradient(state.params, Batch(images, targets, noise), progress, teacher)
        updates, opt = tx.update(grads, state.optimizer, state.params)
        updates = scale_gates(updates, config.gate.learning_rate_scale)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(params, average, 1.0 - config.train.ema)
        metrics["gradient_norm"] = optax.global_norm(grads)
        return State(params, average, opt, state.key, state.step + 1), metrics

    def steps(
        state: State, schedule: Schedule, images: jax.Array, labels: jax.Array, *teacher: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        assert len(teacher) == teachers
        inputs = schedule, images, labels
        return jax.lax.scan(lambda state, inputs: step(state, inputs, *teacher or (None,)), state, inputs)

    if shardings is None:
        return jax.jit(steps, donate_argnums=0)
    devices = shardings.step.mesh  # type: ignore[attr-defined]
    batch, replicated = mesh.batch_sharding(devices, axis=1), mesh.replicated_sharding(devices)
    return jax.jit(
        steps, donate_argnums=0, in_shardings=(shardings, replicated, batch, batch, *[shardings.params] * teachers),
        out_shardings=(shardings, replicated),
    )  # fmt: skip
