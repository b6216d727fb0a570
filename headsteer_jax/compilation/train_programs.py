"""The programs of the stages train and front: the phases' steps and the evaluations between and after them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from headsteer_jax.analysis.front import list_budgets
from headsteer_jax.compilation.planned import PASS_REMEDIES, Experiment, PlannedProgram, plan_pass
from headsteer_jax.model.macs import count_dense_macs, count_open_macs, training_flops
from headsteer_jax.model.passes import choose_call_size, make_observer_program
from headsteer_jax.model.skip import is_worthwhile, jit_skipping_programs
from headsteer_jax.model.skip_choice import can_skip
from headsteer_jax.model.vit import TrainedModel, build_model
from headsteer_jax.runtime.mesh import batch_sharding, describe_arrays, replicated_sharding
from headsteer_jax.train.loop import EVALUATION_GATING, Phase, describe_state, list_calls, list_phases, phase_plan
from headsteer_jax.train.losses import is_taught
from headsteer_jax.train.step import Schedule, make_training_steps

TRAINING_REMEDIES = ("config.machine.remat = true", "a larger config.train.accumulate", "a larger config.machine.fsdp")


def _describe_training_call(experiment: Experiment, phase: Phase, steps: int) -> tuple[Any, ...]:
    """Describe the arguments of a call of `steps` training steps."""
    config, devices, params = experiment.config, experiment.training, experiment.trained.params
    state = describe_state(params, phase, config, devices)
    sharding, shape = batch_sharding(devices, axis=1), (steps, config.train.batch)
    images = jax.ShapeDtypeStruct((*shape, *experiment.dataset.train.images.shape[1:]), jnp.uint8, sharding=sharding)
    labels = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    values_n = jax.ShapeDtypeStruct((steps,), jnp.float32, sharding=replicated_sharding(devices))
    return state, Schedule(values_n, values_n), images, labels, *([state.params] if is_taught(config, phase) else [])


def list_training_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs of the training phases: one for each number of steps that a call has."""
    for phase in list_phases(experiment.config):
        yield from _list_steps(experiment, phase)


def _list_steps(experiment: Experiment, phase: Phase) -> Iterator[PlannedProgram]:
    """List the programs of a phase's steps."""
    config, devices, model = experiment.config, experiment.training, experiment.trained.model
    plan = phase_plan(config, phase)
    flops = config.train.batch * training_flops(config, model.classes, taught=is_taught(config, phase))
    state = describe_state(experiment.trained.params, phase, config, devices)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    program: Any = make_training_steps(model, config, phase == "gated", shardings)
    calls = Counter(end - first for first, end in list_calls(0, plan.steps, config.train.steps_per_call))
    for steps, count in calls.items():

        def trace(steps: int = steps) -> jax.stages.Traced:
            return program.trace(*_describe_training_call(experiment, phase, steps))

        yield PlannedProgram(
            "train", f"{phase}: {steps} step{'s' * (steps > 1)}", trace, count, devices, steps * flops,
            TRAINING_REMEDIES,
        )  # fmt: skip


def list_evaluation_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs that evaluate on validation while training goes on, and on test at its end."""
    for phase in list_phases(experiment.config):
        yield from _list_passes(experiment, phase)


def _list_passes(experiment: Experiment, phase: Phase) -> Iterator[PlannedProgram]:
    """List the programs that evaluate a phase; those that skip have no calls, as gates decide whether any is made."""
    config, model, dataset = experiment.config, experiment.trained.model, experiment.dataset
    gating, steps = EVALUATION_GATING[phase], phase_plan(config, phase).steps
    program = make_observer_program(model, config, gating, config.sae_layer, experiment.host)
    macs = count_dense_macs(config, model.classes) if gating == "dense" else count_open_macs(config, model.classes)
    evaluations = -(-steps // config.train.eval_every)
    for name, split, passes in (("validation", dataset.validation, evaluations), ("test", dataset.test, 1)):
        planned = plan_pass(experiment, "train", f"{phase}: {name}", program, split, macs)
        yield planned._replace(calls=passes * planned.calls)
        if gating == "thresholded" and can_skip(config, len(experiment.devices)):
            size = choose_call_size(program, len(split.labels), experiment.devices[0].platform)
            yield from _list_skipping_programs(experiment, f"{phase}: {name}, skipping", size)


def _list_skipping_programs(experiment: Experiment, name: str, images: int) -> Iterator[PlannedProgram]:
    """List the programs of a pass that leaves out what the gates drop, if its batches are worth it."""
    (_, model, params), mesh = experiment.trained, experiment.host
    tokens = model.positions_count + model.model.registers
    if not is_worthwhile(model.model, images, tokens):
        return
    programs, everywhere, by_image = jit_skipping_programs(model), replicated_sharding(mesh), batch_sharding(mesh)
    x_BTD = jax.ShapeDtypeStruct((images, tokens, model.model.width), jnp.float32, sharding=by_image)
    for layer in range(model.model.depth):
        kinds, last = model.gate.kinds_in(layer), layer == model.model.depth - 1
        layer_params = describe_arrays(params["params"][f"layers_{layer}"], everywhere)

        def trace_decision(layer_params: Any = layer_params, kinds: Any = kinds) -> jax.stages.Traced:
            return programs.decide.trace(layer_params, x_BTD, kinds)

        def trace_layer(layer_params: Any = layer_params, kinds: Any = kinds, last: bool = last) -> jax.stages.Traced:
            decided = describe_arrays(programs.decide.eval_shape(layer_params, x_BTD, kinds), everywhere)
            return programs.run_layer.trace(layer_params, x_BTD, decided, kinds, last, "kept")

        for part, trace in (("decides", trace_decision), ("runs", trace_layer)):
            yield PlannedProgram("train", f"{name}: layer {layer} {part}", trace, 0, mesh, None, PASS_REMEDIES)


def list_front_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs of the stage front: a gated phase of each budget but the run's own, and its evaluation."""
    config, (_, model, params) = experiment.config, experiment.trained
    for budget in list_budgets(config, model.classes):
        if budget != config.gate.budget:
            budgeted = config.model_copy(update={"gate": config.gate.model_copy(update={"budget": budget})})
            trained = TrainedModel(budgeted, build_model(budgeted, model.classes), params)
            budgeted_experiment = experiment._replace(trained=trained)
            for list_some in (_list_steps, _list_passes):
                for planned in list_some(budgeted_experiment, "gated"):
                    yield planned._replace(stage="front", name=f"{planned.name}, budget {budget:g}")
