"""Training: first dense, then with gates, and a dense control of the same length.

A phase that has a checkpoint resumes from it. Otherwise the gated phase and the control start from the end of the dense
phase, and the dense phase starts from pretrained weights, if the config names any, or from scratch.

The same program runs on any number of devices and hosts: the state and each batch are sharded over
`mesh.training_mesh`, and each host reads the images of its own devices. SIGTERM ends it after a checkpoint.

If the config has a teacher, it is the end of the dense phase, and the gated phase gets its parameters beside its own.
They are not in the gated phase's checkpoints: a resumed training has them from the dense phase's.

Random keys: `key(seed)` folded with 0 initialises the model; folded with 1 + phase and then with the step, it draws
that step's augmentation and noise.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config, PhaseConfig
from headsteer_jax.data.batches import device_batches
from headsteer_jax.data.dataset import Dataset, describe_data, describe_data_change
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.compute import measure_compute, measure_usage
from headsteer_jax.model.macs import training_flops, training_speed
from headsteer_jax.model.params_file import PARAMS_FILE, read_params
from headsteer_jax.model.passes import Observe, make_observer
from headsteer_jax.model.pretrained import load_backbone
from headsteer_jax.model.vit import Gating, TrainedModel, ViT, build_model, fingerprint_params
from headsteer_jax.runtime import hosts, mesh
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import REMAKE
from headsteer_jax.runtime.preemption import Preempted, defer_to_checkpoints
from headsteer_jax.runtime.progress import progress
from headsteer_jax.train.log import TrainingLog, open_log
from headsteer_jax.train.losses import check_budget, is_taught, name_usage
from headsteer_jax.train.step import State, evaluation_params, init_optimizer, make_schedule, make_training_steps

logger = logging.getLogger(__name__)

Phase = Literal["dense", "gated", "dense_control"]
PHASES: tuple[Phase, ...] = ("dense", "gated", "dense_control")
RESTART = "use the data that it was made with, or pass --overwrite"
EVALUATION_GATING: dict[Phase, Gating] = {"dense": "dense", "gated": "thresholded", "dense_control": "dense"}


def phase_plan(config: Config, phase: Phase) -> PhaseConfig:
    """Return a phase's part of the config; the control has the gated phase's."""
    return config.train.dense if phase == "dense" else config.train.gated


def list_calls(start: int, steps: int, steps_per_call: int) -> list[tuple[int, int]]:
    """List the calls of a phase from step `start` on: the first step of each, and the step after its last."""
    ends = sorted({*range(0, steps, steps_per_call), steps} - set(range(start + 1)))
    return list(zip([start, *ends[:-1]], ends, strict=True))


def init_params(model: ViT, config: Config, seed: int, class_names: Sequence[str] = (), backbone: bool = True) -> Any:
    """Initialise the model's variables, complete on every host: random, with the config's pretrained backbone if any.

    Args:
      class_names: of the dataset, with which those of a pretrained head are compared.
      backbone: load the config's pretrained backbone; without it, only the shapes and dtypes are right.

    Raises:
      HeadSteerError: the backbone cannot be loaded, or hosts have different variables.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0)
    side, channels = config.data.image_size, config.data.channels
    params = jax.jit(model.init)(key, jnp.zeros((1, side, side, channels)))
    if config.model.pretrained and backbone:
        params, report = hosts.on_every_process(lambda: load_backbone(params, config, class_names))
        logger.info(str(report))
    hosts.check_equal({"the initial model": fingerprint_params(params)})
    return params


def init_state(params: Any, phase: Phase, config: Config) -> State:
    """Make the state in which a phase starts from these parameters."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + PHASES.index(phase))
    average = params if config.train.ema else None
    return State(params, average, init_optimizer(config, params), jax.random.key_data(key), jnp.int32(0))


def describe_state(params: Any, phase: Phase, config: Config, devices: Mesh) -> State:
    """Describe a phase's state by the shapes, dtypes and shardings of its arrays.

    Args:
      params: the model's parameters, or arrays' descriptions.
    """
    state = jax.eval_shape(lambda params: init_state(params, phase, config), params)
    described: State = mesh.describe_arrays(state, mesh.state_shardings(state, devices))
    return described


def list_phases(config: Config) -> tuple[Phase, ...]:
    """List the phases that a config trains, in order."""
    trained = {"dense": config.train.dense.steps > 0, "gated": True, "dense_control": config.train.dense_control}
    return tuple(phase for phase in PHASES if trained[phase])


def reference_phase(config: Config) -> Phase:
    """Return the phase whose model is the dense reference: the control, else the dense phase.

    If neither is trained it is the gated phase, whose model with all gates open is a dense one.
    """
    if config.train.dense_control:
        return "dense_control"
    return "dense" if config.train.dense.steps else "gated"


def train_phase(
    model: ViT, params: Any, phase: Phase, dataset: Dataset, config: Config, directory: Path, log: TrainingLog
) -> State:
    """Train one phase to its end, from its last checkpoint, or from `params` if there is none.

    `params` are those of the dense phase's end, if there was one, and then also the gated phase's teacher.

    Checkpoints have the phase, the step, the data position and the config. `<phase>/last` has machine.keep of them;
    they are saved every train.eval_every steps, at the end and on SIGTERM. `<phase>/best` has the one with the best
    validation accuracy, in the gated phase among those after annealing.

    Raises:
      HeadSteerError: the loss is not finite (the message names the step and the last good checkpoint), the batch is
        larger than the data, or it cannot be divided among the devices.
      Preempted: SIGTERM came; a checkpoint is saved.
    """
    count, batch = len(dataset.train.labels), config.train.batch
    if batch > count:
        raise HeadSteerError(f"config.train.batch = {batch}: must be at most the {count} training images")
    devices, data = mesh.training_mesh(config.machine), describe_data(dataset)
    mesh.check_batch(config, devices)
    last = Checkpoints(directory / phase / "last", config.machine.keep)
    best = Checkpoints(directory / phase / "best", 1)
    abstract = describe_state(params, phase, config, devices)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    best_accuracy = -1.0
    if last.latest() is not None:
        state, metadata = last.restore(abstract)
        best_accuracy = metadata["best_accuracy"]
        if change := describe_data_change(metadata["data"], data):
            raise HeadSteerError(f"{last.directory}: the data have changed since this checkpoint: {change}; {RESTART}")
    else:
        state = mesh.place(init_state(params, phase, config), shardings)
    start = int(state.step)
    if start == phase_plan(config, phase).steps:
        return state
    last.forget_after(start)
    best.forget_after(start)
    if best.latest() is None:
        best_accuracy = -1.0
    if start:
        logger.info(f"{phase}: resuming from step {start}")
    log.forget_after(phase, start)
    run = _PhaseRun(model, phase, dataset, config, directory, log, devices, last, best, state, best_accuracy, data)
    return run.train(shardings, (mesh.place(params, shardings.params),) if run.taught else ())


@dataclass
class _PhaseRun:
    """A phase while it is trained: its state, its checkpoints and its log."""

    model: ViT
    phase: Phase
    dataset: Dataset
    config: Config
    directory: Path
    log: TrainingLog
    devices: Mesh
    last: Checkpoints
    best: Checkpoints
    state: State
    best_accuracy: float
    data: dict[str, Any]  # as `describe_data` describes the dataset
    pending: tuple[int, Any] | None = None  # the last call's end and metrics, which are not recorded yet
    recorded: float = field(default_factory=time.monotonic)  # when the call before was recorded

    @property
    def plan(self) -> PhaseConfig:
        """Return the phase's part of the config."""
        return phase_plan(self.config, self.phase)

    @property
    def offset(self) -> int:
        """Return the steps of the phases before: later phases go on in the order of the data."""
        return self.config.train.dense.steps if self.phase != "dense" else 0

    @property
    def taught(self) -> bool:
        """Say whether the dense phase's model teaches in this phase."""
        return is_taught(self.config, self.phase)

    def train(self, shardings: State, teacher: tuple[Any, ...]) -> State:
        """Train from the state's step to the end of the phase.

        Args:
          teacher: the teacher's parameters on the devices, if the phase has one.
        """
        t, steps, start = self.config.train, self.plan.steps, int(self.state.step)
        calls, schedule = list_calls(start, steps, t.steps_per_call), make_schedule(self.plan)
        program = make_training_steps(self.model, self.config, self.phase == "gated", shardings)
        gating, passes = EVALUATION_GATING[self.phase], -(-steps // t.eval_every)
        observe = make_observer(self.model, self.config, gating, self.config.sae_layer, passes)
        self.recorded = time.monotonic()
        with defer_to_checkpoints() as must_stop, progress(steps, self.phase, initial=start) as bar:
            batches = device_batches(self.dataset.train, self.config, self.devices, calls, self.offset)
            for number, ((first, end), (images, labels)) in enumerate(zip(calls, batches, strict=True)):
                profiled = self.config.machine.profile and number == 1
                metrics = self.run_call(program, (schedule.cut(first, end), images, labels, *teacher), profiled)
                note = _describe(self.record()) if self.pending else ""
                self.pending = (end, metrics)
                stopping = must_stop()
                if end % t.eval_every == 0 or end == steps:
                    note = self.evaluate(observe, end)
                elif stopping:
                    self.record()
                    self.save(end)
                if stopping and end < steps:
                    self.close()
                    logger.info(f"{self.phase}: step {end} is saved")
                    raise Preempted
                bar.update(end - first, note)
            self.close()
        return self.state

    def run_call(self, program: Callable[..., Any], inputs: tuple[Any, ...], profiled: bool) -> Any:
        """Start the steps of a call, and return their metrics; a profiled call is waited for."""
        with _profile(self.directory / "profile" / self.phase if profiled else None):
            self.state, metrics = program(self.state, *inputs)
            if profiled:
                jax.block_until_ready(self.state)
        return metrics

    def record(self) -> dict[str, float]:
        """Log the last call's metrics, while the next call is already running, so that the device never waits.

        Raises:
          HeadSteerError: the loss is not finite.
        """
        assert self.pending is not None
        (end, device_metrics), self.pending = self.pending, None
        metrics = jax.device_get(device_metrics)
        count = len(metrics["loss"])
        self.check_loss(metrics["loss"], end - count)
        means = {name: value.mean(axis=0) for name, value in metrics.items()}
        self.log.write(self.phase, end, means)
        seconds, self.recorded = time.monotonic() - self.recorded, time.monotonic()
        images_per_second = count * self.config.train.batch / seconds
        flops = training_flops(self.config, self.model.classes, taught=self.taught)
        speed = training_speed(self.config, flops, images_per_second, self.devices)
        self.log.write(self.phase, end, speed, "speed")
        return means | speed

    def check_loss(self, losses: np.ndarray, start: int) -> None:
        """Check that the losses of the steps after `start` are finite.

        Raises:
          HeadSteerError: one of them is not.
        """
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            good = self.last.latest()
            path = self.last.directory / str(good)
            remains = f"the last good checkpoint is {path}" if good else "there is no checkpoint yet"
            section = "dense" if self.phase == "dense" else "gated"
            raise HeadSteerError(
                f"{self.phase}: the loss is {losses[bad[0]]} at step {start + int(bad[0]) + 1}; {remains}; "
                f"lower config.train.{section}.learning_rate and pass --overwrite"
            )

    def evaluate(self, observe: Observe, end: int) -> str:
        """Evaluate the state after step `end`, save it, and return a note on its accuracy."""
        self.record()
        accuracy = self.validate(observe, end)
        settled = self.phase != "gated" or end >= self.config.gate.anneal * self.plan.steps
        if settled and accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            metadata = {"phase": self.phase, "step": end, "best_accuracy": accuracy, "data": self.data}
            self.best.save(end, evaluation_params(self.state), metadata)
            self.best.wait()  # it must be on disk before a checkpoint that has its accuracy
        self.save(end)
        self.recorded = time.monotonic()
        return f"validation accuracy {accuracy:.3f}"

    def validate(self, observe: Observe, end: int) -> float:
        """Compute the accuracy on the validation split; log it with the thresholded usage and the MACs of its images.

        Raises:
          HeadSteerError: the residuals are not finite.
        """
        split = self.dataset.validation
        observed = observe(evaluation_params(self.state), split, f"{self.phase}: validation")
        accuracy = observed.accuracy(split.labels)
        if not np.isfinite(observed.x).all():
            raise HeadSteerError(f"{self.phase}: the residuals are not finite at step {end}; lower the learning rate")
        row: dict[str, Any] = {"validation_accuracy": accuracy}
        if self.phase == "gated":
            row |= {name_usage("validation_usage", kind): use for kind, use in measure_usage(observed.gates).items()}
            row["validation_macs"] = measure_compute(self.config, self.model.classes, observed.gates)["share"]
        self.log.write(self.phase, end, row)
        return accuracy

    def save(self, end: int) -> None:
        """Save the state after step `end`."""
        metadata = {
            "phase": self.phase, "step": end, "position": (self.offset + end) * self.config.train.batch,
            "best_accuracy": self.best_accuracy, "config": json.loads(self.config.model_dump_json()), "data": self.data,
        }  # fmt: skip
        self.log.flush()
        self.last.save(end, self.state, metadata)

    def close(self) -> None:
        """Wait until all checkpoints are on disk."""
        self.last.close()
        self.best.close()


def _describe(means: dict[str, float]) -> str:
    """Describe a call's metrics in the progress."""
    note = f"loss {means['loss']:.3f}, accuracy {means['train_accuracy']:.3f}"
    return note + (f", MFU {means['mfu']:.1%}" if "mfu" in means else "")


@contextmanager
def _profile(directory: Path | None) -> Iterator[None]:
    """Write a jax.profiler trace of the body of this context, for TensorBoard or Perfetto; None: write nothing."""
    if directory is None:
        yield
    else:
        with jax.profiler.trace(os.fspath(directory)):
            yield


def train_model(config: Config, dataset: Dataset, directory: Path) -> None:
    """Train all phases, each from where it stopped.

    Raises:
      HeadSteerError: as `check_budget`, `init_params` and `train_phase`.
    """
    check_budget(config, len(dataset.class_names))
    model = build_model(config, len(dataset.class_names))
    first = PHASES[0] if config.train.dense.steps else PHASES[1]
    begun = Checkpoints(directory / first / "last", config.machine.keep).latest() is not None
    params = init_params(model, config, config.seed, dataset.class_names, not begun)  # a checkpoint has the backbone
    with open_log(directory, config) as log:
        if config.train.dense.steps:
            params = hosts.to_numpy(
                evaluation_params(train_phase(model, params, "dense", dataset, config, directory, log))
            )
        train_phase(model, params, "gated", dataset, config, directory, log)
        if config.train.dense_control:
            train_phase(model, params, "dense_control", dataset, config, directory, log)


def abstract_params(config: Config, classes: int) -> Any:
    """Return the shapes and dtypes of the model's variables, without computing any."""
    side, channels, model = config.data.image_size, config.data.channels, build_model(config, classes)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, channels))))


def load_trained(config: Config, classes: int, directory: Path, phase: Phase = "gated") -> TrainedModel:
    """Load the model that a finished training left in `directory`.

    A run from the hub has the parameters of a phase in PARAMS_FILE, without any checkpoints.

    Args:
      classes: the number of classes of its dataset.

    Raises:
      HeadSteerError: the checkpoint or the file is missing, damaged or of another config.
    """
    params = abstract_params(config, classes)

    def empty_like(tree: Any) -> Any:
        """Make NumPy arrays of the same shapes, so that every host restores complete arrays."""
        return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)

    steps = phase_plan(config, phase).steps
    if (directory / phase / PARAMS_FILE).exists():
        params = read_params(directory / phase / PARAMS_FILE, params)
    elif config.train.use == "best" and phase == "gated":
        params = Checkpoints(directory / phase / "best", writes=False).restore(empty_like(params))[0]
    else:
        last = Checkpoints(directory / phase / "last", writes=False)
        step = last.latest()
        if step is not None and step != steps:
            raise HeadSteerError(f"{last.directory}: it ends at step {step} of {steps}; {REMAKE}")
        state = jax.eval_shape(lambda params: init_state(params, phase, config), params)
        params = evaluation_params(last.restore(empty_like(state), step)[0])
    return TrainedModel(config, build_model(config, classes), jax.device_put(params, jax.local_devices()[0]))
