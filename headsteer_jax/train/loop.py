"""Training: dense first, then with gates, and a dense control of the same length.

What a start does: a phase that has a checkpoint goes on from it; else the gated phase and the control start from the
end of the dense phase; the dense phase starts from pretrained weights where the config names some, else from scratch.

One program for any number of devices and hosts: the state lives on `mesh.training_mesh`, a batch is dealt out over it,
and each host reads the images of its own devices. SIGTERM ends it after a checkpoint (`preemption`).

Keys: `key(seed)` -> fold_in(0) initialises, fold_in(1 + phase) -> fold_in(step) draws a step's augmentation and noise.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from headsteer_jax.config.schema import Config, PhaseConfig
from headsteer_jax.data.batches import device_batches
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.flops import training_speed
from headsteer_jax.model.passes import Observe, make_observer
from headsteer_jax.model.pretrained import load_backbone
from headsteer_jax.model.vit import Gating, TrainedModel, ViT, build_model, fingerprint_params
from headsteer_jax.runtime import hosts, mesh
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import REMAKE
from headsteer_jax.runtime.preemption import Preempted, defer_to_checkpoints
from headsteer_jax.runtime.progress import progress
from headsteer_jax.train.log import TrainingLog, open_log
from headsteer_jax.train.step import State, evaluation_params, make_optimizer, make_training_steps

logger = logging.getLogger(__name__)

Phase = Literal["dense", "gated", "dense_control"]
PHASES: tuple[Phase, ...] = ("dense", "gated", "dense_control")
EVALUATION_GATING: dict[Phase, Gating] = {
    "dense": "dense",
    "gated": "thresholded",
    "dense_control": "dense",
}  # in evaluation


def init_params(model: ViT, config: Config, seed: int) -> Any:
    """The model's variables before training, whole on every host: random, with the pretrained backbone where the config
    names one.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0)
    side, channels = config.data.image_size, config.data.channels
    params = jax.jit(model.init)(key, jnp.zeros((1, side, side, channels)))
    if config.model.pretrained:
        params, report = hosts.on_every_process(lambda: load_backbone(params, config))
        logger.info(str(report))
    hosts.check_equal({"the initial model": fingerprint_params(params)})
    return params


def init_state(params: Any, phase: Phase, config: Config) -> State:
    """The start of a phase."""
    plan: PhaseConfig = config.train.dense if phase == "dense" else config.train.gated
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + PHASES.index(phase))
    average = params if config.train.ema else None
    return State(params, average, make_optimizer(config, plan).init(params), jax.random.key_data(key), jnp.int32(0))


def train_phase(
    model: ViT, params: Any, phase: Phase, dataset: Dataset, config: Config, directory: Path, log: TrainingLog
) -> State:
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
    state = jax.eval_shape(lambda: init_state(params, phase, config))
    shardings = mesh.state_shardings(state, devices)
    best_accuracy = -1.0
    if last.latest() is not None:
        like = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, shardings)
        state, about = last.restore(like)
        best_accuracy = about["best_accuracy"]
    else:
        state = mesh.place(init_state(params, phase, config), shardings)
    start = int(state.step)
    if start == plan.steps:
        return state
    last.forget_after(start)
    best.forget_after(start)
    if best.latest() is None:
        best_accuracy = -1.0
    if start:
        logger.info(f"{phase}: going on from step {start}")
    log.forget_after(phase, start)
    ends = sorted({*range(0, plan.steps, t.steps_per_call), plan.steps} - set(range(start + 1)))
    calls = list(zip([start, *ends[:-1]], ends, strict=True))
    offset = t.dense.steps if phase != "dense" else 0  # later phases go on in the order of the data
    steps = make_training_steps(model, config, plan, gated, shardings)
    observe = make_observer(model, config, EVALUATION_GATING[phase], config.sae_layer)
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
        reached = training_speed(config, model.classes, done * batch / seconds, devices)
        log.write(phase, step, reached, "speed")
        return means | reached

    def save(step: int) -> None:
        about = {
            "phase": phase, "step": step, "position": (offset + step) * batch, "best_accuracy": best_accuracy,
            "config": json.loads(config.model_dump_json()),
        }  # fmt: skip
        log.flush()
        last.save(step, state, about)

    with defer_to_checkpoints() as asked, progress(plan.steps, phase, initial=start) as bar:
        for number, ((first, end), (images, labels)) in enumerate(
            zip(calls, device_batches(dataset.train, config, devices, calls, offset), strict=True)
        ):
            with _profile(directory / "profile" / phase if config.machine.profile and number == 1 else None):
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
                    best.save(end, evaluation_params(state), about)
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
                logger.info(f"{phase}: step {end} is saved")
                raise Preempted
            bar.update(end - first, note)
        for checkpoints in (last, best):
            checkpoints.close()
    return state


@contextmanager
def _profile(where: Path | None) -> Iterator[None]:
    """A jax.profiler trace, for TensorBoard or Perfetto."""
    if where is None:
        yield
    else:
        with jax.profiler.trace(os.fspath(where)):
            yield


def validate(observe: Observe, state: State, dataset: Dataset, phase: Phase, step: int, log: TrainingLog) -> float:
    """Accuracy on the validation split, logged with every gated layer's thresholded usage.

    Raises:
      HeadSteerError: the residuals are not finite.
    """
    seen = observe(evaluation_params(state), dataset.validation, f"{phase}: validation")
    accuracy = seen.accuracy(dataset.validation.labels)
    if not np.isfinite(seen.x).all():
        raise HeadSteerError(f"{phase}: the residuals are not finite at step {step}; lower the learning rate")
    usage = {"validation_usage": seen.gates.mean(axis=(0, 2))} if phase == "gated" else {}
    log.write(phase, step, {"validation_accuracy": accuracy} | usage)
    return accuracy


def train_model(config: Config, dataset: Dataset, directory: Path) -> None:
    """All phases, each resumed where it stopped; see the top of this file for what starts from what."""
    model = build_model(config, len(dataset.class_names))
    params = init_params(model, config, config.seed)
    with open_log(directory) as log:
        if config.train.dense.steps:
            params = hosts.to_numpy(
                evaluation_params(train_phase(model, params, "dense", dataset, config, directory, log))
            )
        train_phase(model, params, "gated", dataset, config, directory, log)
        if config.train.dense_control:
            train_phase(model, params, "dense_control", dataset, config, directory, log)


def load_trained(config: Config, dataset: Dataset, directory: Path, phase: Phase = "gated") -> TrainedModel:
    """Load the model that a finished training left in `directory`.

    Raises:
      HeadSteerError: the checkpoint is missing, damaged or of another config.
    """
    model = build_model(config, len(dataset.class_names))
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
            raise HeadSteerError(f"{last.directory}: it ends at step {step} of {plan.steps}; {REMAKE}")
        kept = evaluation_params(last.restore(like(lambda: init_state(params(), phase, config)), step)[0])
    return TrainedModel(config, model, jax.device_put(kept, jax.local_devices()[0]))
