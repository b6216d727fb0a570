"""The programs of the stages sae, grid and layers that concern autoencoders: cached residuals, epochs, replacement."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.analysis.layers import configure_layer, keep_first_of_each_class, list_profiled_layers
from headsteer_jax.compilation.planned import Experiment, PlannedProgram, plan_pass
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.macs import count_patches
from headsteer_jax.runtime.mesh import describe_arrays, members_mesh, replicated_sharding
from headsteer_jax.sae.autoencoder import SAEWeights, Scaling
from headsteer_jax.sae.grid import grid_config, grid_ks, grid_members
from headsteer_jax.sae.residuals import make_residual_program
from headsteer_jax.sae.train import (
    Members,
    SAEState,
    choose_epochs,
    choose_rows,
    init_state,
    jit_epochs,
    member_shardings,
    pad_members,
    seed_members,
)
from headsteer_jax.steer.replacement import make_replacement_program

SAE_REMEDIES = ("a smaller config.sae.memory", "a smaller config.sae.batch", "a smaller config.sae.expansion")


def _count_rows(experiment: Experiment) -> int:
    """Count the training residuals that the autoencoders of the config's layer read, of all views."""
    patches, c = count_patches(experiment.config), experiment.config.sae
    tokens = {"cls": 1, "patches": patches, "all": 1 + patches}[c.tokens]
    return c.views * tokens * len(experiment.dataset.train.labels)


def describe_weights(config: Config, members: Members, rows: int) -> SAEState:
    """Describe the state of autoencoders that are trained side by side, without shardings."""
    x_GD = jax.ShapeDtypeStruct((rows, config.model.width), jnp.float32)
    state: SAEState = jax.eval_shape(
        lambda x_GD: init_state(config.sae, members, x_GD, config.latents, config.seed), x_GD
    )
    return state


def plan_epochs(
    experiment: Experiment, config: Config, members: Members, count: int, stage: str, times: int = 1
) -> PlannedProgram:
    """Plan the program that trains autoencoders for some epochs.

    Args:
      config: with the section sae of this training.
      members: to train.
      count: of the training residuals.
      times: how many trainings use it.
    """
    c, D = config.sae, config.model.width
    devices = members_mesh(len(members.k), config.machine, experiment.devices)
    members, (rows, resident) = pad_members(members, devices.shape["member"]), choose_rows(c, (count, D))
    rows = rows if resident else rows // c.batch * c.batch
    epochs, everywhere = choose_epochs(c, resident), replicated_sharding(devices)

    def trace() -> jax.stages.Traced:
        program = jit_epochs(c, members, D, count // c.batch, config.seed, devices)
        shardings = member_shardings(devices)
        state = SAEState(*map(describe_arrays, describe_weights(config, members, rows), shardings))
        u_GD = jax.ShapeDtypeStruct((rows, D), jnp.float32, sharding=everywhere)
        part = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return program.trace(state, describe_arrays(members, shardings.sae), u_GD, part, epochs=epochs)

    name = f"{len(members.k)} autoencoders, {epochs} epoch{'s' * (epochs > 1)}"
    calls = times * -(-c.epochs // epochs) * -(-count // max(rows, 1))
    return PlannedProgram(stage, name, trace, calls, devices, None, SAE_REMEDIES)


def list_autoencoder_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs of the stage sae."""
    config, trained, dataset = experiment.config, experiment.trained, experiment.dataset
    for tokens in dict.fromkeys((config.sae.tokens, "cls")):
        program = make_residual_program(trained, (config.sae_layer,), tokens, experiment.host)
        for name in ("train", "test") if tokens == config.sae.tokens else ("train",):
            yield plan_pass(experiment, "sae", f"residuals of {name}, {tokens}", program, getattr(dataset, name))
    if not config.sae.pretrained:
        if config.sae.views > 1:
            yield _plan_views(experiment)
        yield plan_epochs(experiment, config, seed_members(config.sae), _count_rows(experiment), "sae")
    members = Members(*(column[: config.sae.seeds] for column in seed_members(config.sae)))
    weights = describe_weights(config, members, config.sae.batch).sae
    scaling = Scaling(np.zeros(config.model.width, np.float32), np.ones((), np.float32))
    replacement = make_replacement_program(trained, scaling, config.sae.inference_k, experiment.host)
    inputs = (trained.params, weights)
    yield plan_pass(experiment, "sae", "reconstructed residuals", replacement, dataset.test, params=inputs)


def _plan_views(experiment: Experiment) -> PlannedProgram:
    """Plan the passes over the augmented views of the training split, whose images have the model's size."""
    config, labels = experiment.config, experiment.dataset.train.labels
    side, tokens = config.data.image_size, config.sae.tokens
    images = np.broadcast_to(np.uint8(0), (len(labels), side, side, config.data.channels))
    program = make_residual_program(experiment.trained, (config.sae_layer,), tokens, experiment.host)
    planned = plan_pass(experiment, "sae", f"residuals of views, {tokens}", program, Split(images, labels))
    return planned._replace(calls=planned.calls * (config.sae.views - 1))


def list_grid_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs of the stage grid."""
    config = experiment.config
    c = grid_config(config)
    as_trained = config.model_copy(update={"sae": c})
    program = make_residual_program(experiment.trained, (config.sae_layer,), c.tokens, experiment.host)
    yield plan_pass(experiment, "grid", "residuals of validation", program, experiment.dataset.validation)
    members = grid_members(c, grid_ks(config), config.grid.learning_rates, config.grid.seeds)
    yield plan_epochs(experiment, as_trained, members, _count_rows(experiment), "grid")


def list_layer_autoencoder_programs(experiment: Experiment) -> Iterator[PlannedProgram]:
    """List the programs that train an autoencoder for every layer of the profile."""
    config, dataset, layers = experiment.config, experiment.dataset, list_profiled_layers(experiment.config)
    count = len(dataset.train.labels)
    program = make_residual_program(experiment.trained, layers, "cls", experiment.host)
    test = keep_first_of_each_class(dataset.test, config.layers.per_class)
    yield plan_pass(experiment, "layers", "residuals of train", program, dataset.train)
    yield plan_pass(experiment, "layers", "residuals of test", program, test)
    layer_config = configure_layer(config, layers[0], count)
    yield plan_epochs(experiment, layer_config, seed_members(layer_config.sae), count, "layers", times=len(layers))


def describe_weights_of_one(config: Config) -> SAEWeights:
    """Describe the weights of one autoencoder."""
    state = describe_weights(config, Members(*(column[:1] for column in seed_members(config.sae))), config.sae.batch)
    weights: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.sae)
    return weights
