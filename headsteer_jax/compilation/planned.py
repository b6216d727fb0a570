"""A planned program: where it comes from, the shapes of its arguments, and how often a run calls it.

Nothing is a copy: each program comes from the function from which its stage gets it, with descriptions of arrays in
place of arrays, and the devices of any machine in place of this one's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, Split
from headsteer_jax.model.passes import Program, choose_call_size, describe_call
from headsteer_jax.model.vit import TrainedModel, build_model
from headsteer_jax.runtime.mesh import check_batch, local_mesh, training_mesh
from headsteer_jax.train.loop import abstract_params

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


def plan_pass(
    experiment: Experiment, stage: str, name: str, program: Program, split: Split, macs: float | None = None,
    params: Any = None,
) -> PlannedProgram:  # fmt: skip
    """Plan a program that runs over a split once.

    Args:
      macs: that an image needs; None: not known.
      params: the program's first argument; None: the model's parameters.
    """
    devices = experiment.host
    size = choose_call_size(program, len(split.labels), devices.devices.flat[0].platform)
    params = experiment.trained.params if params is None else params

    def trace() -> jax.stages.Traced:
        return program.run.trace(*describe_call(params, split, size, devices))

    calls = -(-len(split.labels) // (size * devices.size))
    flops = None if macs is None else 2.0 * macs * size * devices.size
    return PlannedProgram(stage, name, trace, calls, devices, flops, PASS_REMEDIES)
