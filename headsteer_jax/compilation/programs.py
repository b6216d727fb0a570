"""The programs that the stages of a run would use, with the shapes of their arguments and how often they are called.

Nothing is a copy: each program comes from the function from which its stage gets it, with descriptions of arrays in
place of arrays, and the devices of any machine in place of this one's.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, Split
from headsteer_jax.model.macs import count_dense_macs, count_open_macs, training_flops
from headsteer_jax.model.passes import Program, describe_call, make_observer_program
from headsteer_jax.model.vit import TrainedModel, build_model
from headsteer_jax.runtime.mesh import (
    batch_sharding,
    check_batch,
    local_mesh,
    training_mesh,
)
from headsteer_jax.train.loop import (
    EVALUATION_GATING,
    Phase,
    abstract_params,
    describe_state,
    list_calls,
    list_phases,
    phase_plan,
)
from headsteer_jax.train.losses import is_taught
from headsteer_jax.train.step import make_training_steps

TRAINING_REMEDIES = (
    "config.machine.remat = true", "a larger config.train.accumulate", "a larger config.machine.fsdp",
)  # fmt: skip
PASS_REMEDIES = ("a smaller config.train.eval_batch",)


class Experiment(NamedTuple):
    """An experiment on a machine: what its programs' shapes depend on."""

    trained: TrainedModel  # with descriptions of its parameters
    dataset: Dataset  # whose images are never read
    devices: Any  # of all hosts

    @property
    def config(self) -> Config:
        """The experiment's config."""
        return self.trained.config

    @property
    def training(self) -> Mesh:
        """The mesh of training."""
        return training_mesh(self.config.machine, self.devices)

    @property
    def host(self) -> Mesh:
        """The mesh of a host, for passes over its share of a split."""
        return local_mesh(self.devices)

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return len(self.devices) // self.host.size


def describe_experiment(config: Config, dataset: Dataset, devices: Any) -> Experiment:
    """Describe an experiment on these devices.

    Raises:
      HeadSteerError: the devices or a batch cannot be divided in this way.
    """
    classes = len(dataset.class_names)
    check_batch(config, training_mesh(config.machine, devices))
    trained = TrainedModel(config, build_model(config, classes), abstract_params(config, classes))
    return Experiment(trained, dataset, devices)


class PlannedProgram(NamedTuple):
    """A program that a run compiles: how it is lowered, and how much it is used."""

    stage: str
    name: str
    trace: Callable[[], jax.stages.Traced]
    calls: int  # in a whole run, by all hosts together
    mesh: Mesh  # on which it runs
    model_flops: float | None  # that one call needs on all devices of its mesh; None: what its products take
    remedies: tuple[str, ...]  # settings that lower its memory


def _describe_training_call(experiment: Experiment, phase: Phase, steps: int) -> tuple[Any, ...]:
    """Describe the arguments of a call of `steps` training steps."""
    config, devices, params = experiment.config, experiment.training, experiment.trained.params
    state = describe_state(params, phase, config, devices)
    sharding, shape = batch_sharding(devices, axis=1), (steps, config.train.batch)
    images = jax.ShapeDtypeStruct((*shape, *experiment.dataset.train.images.shape[1:]), jnp.uint8, sharding=sharding)
    labels = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return state, images, labels, *([state.params] if is_taught(config, phase) else [])


def list_training_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs of the training phases: one for each number of steps that a call has."""
    config, devices, model = experiment.config, experiment.training, experiment.trained.model
    for phase in list_phases(config):
        plan = phase_plan(config, phase)
        flops = config.train.batch * training_flops(config, model.classes, taught=is_taught(config, phase))
        state = describe_state(experiment.trained.params, phase, config, devices)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        program = make_training_steps(model, config, plan, phase == "gated", shardings)
        calls = Counter(end - first for first, end in list_calls(0, plan.steps, config.train.steps_per_call))
        for steps, count in calls.items():

            def trace(program: Any = program, phase: Phase = phase, steps: int = steps) -> jax.stages.Traced:
                return program.trace(*_describe_training_call(experiment, phase, steps))

            yield PlannedProgram(
                "train", f"{phase}: {steps} step{'s' * (steps > 1)}", trace, count, devices, steps * flops,
                TRAINING_REMEDIES,
            )  # fmt: skip


def plan_pass(
    experiment: Experiment, stage: str, name: str, program: Program, split: Split, passes: int = 1,
    macs: float | None = None,
) -> PlannedProgram:  # fmt: skip
    """Plan a program that runs over a split.

    Args:
      macs: that an image needs; None: not known.
    """
    size, devices = program.size_for(len(split.labels)), experiment.host

    def trace() -> jax.stages.Traced:
        return program.run.trace(*describe_call(experiment.trained.params, split, size, devices))

    calls = passes * -(-len(split.labels) // (size * devices.size))
    flops = None if macs is None else 2.0 * macs * size * devices.size
    return PlannedProgram(stage, name, trace, calls, devices, flops, PASS_REMEDIES)


def list_evaluation_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs that evaluate on validation while training goes on, and on test at its end."""
    config, model, dataset = experiment.config, experiment.trained.model, experiment.dataset
    for phase in list_phases(config):
        gating, steps = EVALUATION_GATING[phase], phase_plan(config, phase).steps
        program = make_observer_program(model, config, gating, config.sae_layer, experiment.host)
        macs = count_dense_macs(config, model.classes) if gating == "dense" else count_open_macs(config, model.classes)
        evaluations = -(-steps // config.train.eval_every)
        for name, split, passes in (("validation", dataset.validation, evaluations), ("test", dataset.test, 1)):
            yield plan_pass(experiment, "train", f"{phase}: {name}", program, split, passes, macs)


def list_programs(experiment: Experiment, stages: tuple[str, ...]) -> Iterator[PlannedProgram]:
    """List the programs of some stages, in the order of a run."""
    for name, make in PROGRAMS.items():
        if name in stages:
            for list_some in make:
                yield from list_some(experiment)


PROGRAMS: dict[str, tuple[Callable[[Experiment], Iterator[PlannedProgram]], ...]] = {
    "train": (list_training_programs, list_evaluation_programs),
}
