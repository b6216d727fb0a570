"""The programs of the stages steer and layers: the table of all gate patterns, and the layers from a steered one on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.analysis.layers import keep_first_of_each_class, list_profiled_layers
from headsteer_jax.compilation.planned import Experiment, PlannedProgram, plan_pass
from headsteer_jax.compilation.sae_programs import describe_weights_of_one
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.call_limits import choose_call_limits
from headsteer_jax.runtime.mesh import batch_sharding, describe_arrays, replicated_sharding
from headsteer_jax.sae.autoencoder import Autoencoder, Scaling
from headsteer_jax.steer.patches import PATCH_STRATEGIES, steers_patches
from headsteer_jax.steer.results import NAMED_BY
from headsteer_jax.steer.steering import Steering
from headsteer_jax.steer.strategies import Choice
from headsteer_jax.steer.suffix import (
    NOTHING,
    CallSize,
    LayerForm,
    LayerSteering,
    choose_size,
    find_form,
    jit_classify,
    jit_embed,
    jit_layer,
)
from headsteer_jax.steer.sweep import choose_method, make_alpha_grid
from headsteer_jax.steer.table import compile_table_program, make_table_program

SWEEP_REMEDIES = ("a smaller config.machine.sweep_memory", "a smaller config.machine.sweep_chunk")


def describe_steering(experiment: Experiment, choices: int) -> Steering:
    """Describe an autoencoder whose latents steer, chosen `choices` times."""
    config = experiment.config
    shape, D = (choices, min(config.steer.latents, config.latents)), config.model.width
    describe: Any = jax.ShapeDtypeStruct  # stands for an array
    scaling = Scaling(describe((D,), jnp.float32), describe((), jnp.float32))
    sae = Autoencoder(describe_weights_of_one(config), scaling, config.sae.inference_k)
    choice = Choice(describe(shape, jnp.int32), describe(shape, jnp.float32))
    return Steering(sae, describe((config.latents,), jnp.float32), choice)


def plan_suffix(
    experiment: Experiment, stage: str, name: str, split: Split, steerings: Mapping[int, LayerSteering],
    alphas: int, settings: int,
) -> Iterator[PlannedProgram]:  # fmt: skip
    """Plan the programs that run the layers from the first steered one on, and those before it.

    Args:
      name: of what is steered.
      steerings: descriptions, by layer.
      alphas: how many there are.
      settings: how many there are.
    """
    trained, mesh, first = experiment.trained, experiment.host, min(steerings)
    size = choose_size(trained, mesh, steerings, alphas, len(split.labels))
    chunks = -(-len(split.labels) // (size.images * mesh.size))
    steered = chunks * settings * -(-alphas // size.alphas)
    rows = size.alphas * size.images
    yield _plan_embedding(experiment, stage, split, size.images, chunks)
    for layer in range(trained.config.model.depth):
        form = find_form(trained, layer, parts=layer == first)
        call = LayerCall(layer, form, steerings.get(layer, NOTHING), size, size.images if layer < first else rows)
        calls = chunks if layer < first else steered
        yield plan_layer(experiment, stage, f"{name}: layer {layer}", call)._replace(calls=calls)
    yield _plan_classifier(experiment, stage, rows, steered)


class LayerCall(NamedTuple):
    """Says how a layer's program is called; see `jit_layer`."""

    layer: int
    form: LayerForm
    steering: LayerSteering  # descriptions
    size: CallSize
    rows: int  # on each device, after the alphas have parted


def plan_layer(experiment: Experiment, stage: str, name: str, call: LayerCall) -> PlannedProgram:
    """Plan one call of a layer's program."""
    layer, form, steering, size, rows = call
    trained, mesh = experiment.trained, experiment.host
    config, everywhere, by_row = trained.config, replicated_sharding(mesh), batch_sharding(mesh)

    def trace() -> jax.stages.Traced:
        tokens = trained.model.positions_count + trained.model.model.registers
        shape = (mesh.size * (size.images if form.parts else rows), tokens, config.model.width)
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_row)
        class_B = jax.ShapeDtypeStruct((mesh.size * size.images,), jnp.int32, sharding=by_row)
        alphas_A = jax.ShapeDtypeStruct((1 if rows == size.images and not form.parts else size.alphas,), jnp.float32)
        fixed = describe_arrays((trained.params["params"][f"layers_{layer}"], steering, alphas_A), everywhere)
        return jit_layer(form, mesh).trace(*fixed, x, class_B)

    return PlannedProgram(stage, name, trace, 1, mesh, None, SWEEP_REMEDIES)


def _plan_embedding(experiment: Experiment, stage: str, split: Split, images: int, calls: int) -> PlannedProgram:
    """Plan the program that computes what enters layer 0."""
    trained, mesh = experiment.trained, experiment.host

    def trace() -> jax.stages.Traced:
        shape = (images * mesh.size, *split.images.shape[1:])
        pixels = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))
        params = describe_arrays(trained.params, replicated_sharding(mesh))
        return jit_embed(trained.model, trained.config.data, mesh).trace(params, pixels)

    return PlannedProgram(stage, "patches embedded", trace, calls, mesh, None, SWEEP_REMEDIES)


def _plan_classifier(experiment: Experiment, stage: str, rows: int, calls: int) -> PlannedProgram:
    """Plan the program that predicts classes."""
    trained, mesh = experiment.trained, experiment.host

    def trace() -> jax.stages.Traced:
        shape = (rows * mesh.size, 1, trained.config.model.width)
        x_R1D = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
        return jit_classify(trained.model, mesh).trace(
            describe_arrays(trained.params, replicated_sharding(mesh)), x_R1D
        )

    return PlannedProgram(stage, "classes predicted", trace, calls, mesh, None, SWEEP_REMEDIES)


def list_sweep_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs of the stage steer."""
    config, trained, dataset = experiment.config, experiment.trained, experiment.dataset
    mesh, layer, classes = experiment.host, config.sae_layer, len(dataset.class_names)
    fitted = compile_table_program(trained, dataset.test, mesh)
    table = make_table_program(trained, mesh)._replace(size=fitted.size, compiled=True)
    labels = np.concatenate([dataset.test.labels, dataset.validation.labels])
    images = Split(dataset.test.images, labels)  # one program passes over test and validation
    yield plan_pass(experiment, "steer", "table of gate patterns", table, images)._replace(remedies=SWEEP_REMEDIES)
    alphas, settings = len(make_alpha_grid(config.steer)), config.sae.seeds * len(NAMED_BY)
    splits = (("validation", dataset.validation, 2 * classes), ("test", dataset.test, classes))
    if choose_method(config) == "suffix":
        strategies = len(config.steer.strategies)
        for name, split, choices in splits:
            steerings = {layer: LayerSteering(describe_steering(experiment, choices))}
            yield from plan_suffix(experiment, "steer", f"every setting of {name}", split, steerings, alphas,
                                   settings * strategies)  # fmt: skip
    if steers_patches(config):
        patches = {layer: LayerSteering(patches=describe_steering(experiment, classes))}
        for name, split, _ in splits:
            yield from plan_suffix(experiment, "steer", f"patches of {name}", split, patches, alphas,
                                   config.sae.seeds * len(PATCH_STRATEGIES))  # fmt: skip


def list_layer_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs that steer every layer by itself and all at once, or close a layer's gates.

    A pass without steering, which the forms and modes need whose alpha 0 is another model, is smaller and left out.
    """
    config, dataset, layers = experiment.config, experiment.dataset, list_profiled_layers(experiment.config)
    test = keep_first_of_each_class(dataset.test, config.layers.per_class)
    steering = LayerSteering(describe_steering(experiment, len(dataset.class_names)))
    together: Sequence[tuple[str, tuple[int, ...]]] = [("all layers", layers)] if len(layers) > 1 else []
    for name, steered in (*((f"layer {layer}", (layer,)) for layer in layers), *together):
        by_layer = dict.fromkeys(steered, steering)
        alphas = 1 + len(config.layers.alphas)
        for planned in plan_suffix(experiment, "layers", name, test, by_layer, alphas, 1):
            yield planned._replace(calls=2 * planned.calls)  # validation has about as many images
    limits = choose_call_limits(experiment.trained.model, config.machine, experiment.host)
    size = CallSize(1, min(limits.images, len(test.labels)))
    chunks = -(-len(test.labels) // (size.images * experiment.host.size))
    for layer in layers:
        call = LayerCall(layer, find_form(experiment.trained, layer, closed=True), NOTHING, size, size.images)
        yield plan_layer(experiment, "layers", f"layer {layer} off", call)._replace(calls=chunks)
    yield _plan_classifier(experiment, "layers", size.images, chunks * len(layers))
