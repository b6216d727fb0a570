"""The programs of the stage train: the phases' steps and the evaluations between and after them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from headsteer_jax.compilation.planned import Experiment, PlannedProgram, plan_pass
from headsteer_jax.model.macs import count_dense_macs, count_open_macs, training_flops
from headsteer_jax.model.passes import make_observer_program
from headsteer_jax.runtime.mesh import batch_sharding
from headsteer_jax.train.loop import EVALUATION_GATING, Phase, describe_state, list_calls, list_phases, phase_plan
from headsteer_jax.train.losses import is_taught
from headsteer_jax.train.step import make_training_steps

TRAINING_REMEDIES = ("config.machine.remat = true", "a larger config.train.accumulate", "a larger config.machine.fsdp")


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


def list_evaluation_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs that evaluate on validation while training goes on, and on test at its end."""
    config, model, dataset = experiment.config, experiment.trained.model, experiment.dataset
    for phase in list_phases(config):
        gating, steps = EVALUATION_GATING[phase], phase_plan(config, phase).steps
        program = make_observer_program(model, config, gating, config.sae_layer, experiment.host)
        macs = count_dense_macs(config, model.classes) if gating == "dense" else count_open_macs(config, model.classes)
        evaluations = -(-steps // config.train.eval_every)
        for name, split, passes in (("validation", dataset.validation, evaluations), ("test", dataset.test, 1)):
            planned = plan_pass(experiment, "train", f"{phase}: {name}", program, split, macs)
            yield planned._replace(calls=passes * planned.calls)
