"""Steering against a float64 reference; the table of patterns against the model; alpha 0 against no steering."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import random_params, tiny_config
from test_sae import random_sae

from headsteer_jax import steer, vit
from headsteer_jax.config import Config
from headsteer_jax.data import Split
from headsteer_jax.latents import Choice
from headsteer_jax.sae import Scaling

K, CLASSES = 4, 7


def steering(**fields: object) -> Config:
    config = tiny_config()
    return config.model_copy(update={"steer": config.steer.model_copy(update=fields)})


def setting(seed: int = 0) -> tuple:
    """An autoencoder of 24 -> 48, scaling, strengths, and a choice of three latents for each class."""
    rng = np.random.default_rng(seed)
    sae = random_sae(seed, 24, 48)
    scaling = Scaling(rng.standard_normal(24).astype(np.float32), np.float32(0.7))
    strength = rng.uniform(0.5, 2, 48).astype(np.float32)
    latents = np.stack([rng.choice(48, 3, replace=False) for _ in range(CLASSES)]).astype(np.int32)
    return sae, scaling, strength, Choice(latents, rng.uniform(0.5, 2, latents.shape).astype(np.float32))


@pytest.mark.parametrize("mode", ["add", "scale", "clamp", "ablate"])
@pytest.mark.parametrize("form", ["delta", "replace"])
def test_steered_residuals_match_reference(mode, form):
    sae, scaling, strength, choice = setting()
    rng = np.random.default_rng(1)
    x, classes = rng.standard_normal((6, 24)).astype(np.float32), rng.integers(0, CLASSES, 6)
    alphas = np.array([-2.0, -0.3, 0.0, 0.5, 3.0], np.float32)
    config = steering(mode=mode, form=form).steer
    got = jax.jit(lambda x: steer.steered_residuals(sae, scaling, strength, choice, x, classes, alphas, 20, config))(x)
    exact = type(sae)(*(np.asarray(a, np.float64) for a in sae))
    chosen = 0
    for (a, alpha), i in itertools.product(enumerate(alphas), range(6)):
        expected = reference.steered(
            exact, scaling.mean.astype(np.float64), float(scaling.scale), x[i].astype(np.float64), strength,
            (choice.latents[classes[i]], choice.weights[classes[i]]), float(alpha), 20, mode, form,
        )  # fmt: skip
        chex.assert_trees_all_close(got[a, i], expected, atol=2e-5)
        chosen += not np.allclose(expected, x[i])
    assert chosen > 5  # the settings do move residuals


@pytest.mark.parametrize("mode", ["add", "scale", "ablate"])
def test_alpha_0_in_delta_form_is_the_residual_bit_for_bit(mode):
    sae, scaling, strength, choice = setting()
    x = np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32) * 10
    classes = np.arange(64) % CLASSES
    config = steering(mode=mode).steer
    got = jax.jit(
        lambda x: steer.steered_residuals(sae, scaling, strength, choice, x, classes, jnp.array([0.0, 1.0]), K, config)
    )(x)
    chex.assert_trees_all_equal(got[0], x)
    assert not np.array_equal(got[1], x)


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(3)
    return Split(rng.integers(0, 256, (90, 8, 8, 1), dtype=np.uint8), (np.arange(90) % CLASSES).astype(np.int32))


@pytest.mark.parametrize("layer", [-1, -2])
def test_table_is_the_model_under_every_pattern(split, layer):
    """Also for a layer before the last, where later gates react to what the earlier one changed."""
    config = tiny_config()
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"layer": layer})})
    model, params = vit.build(config, CLASSES), random_params(config, CLASSES)
    prefix = steer.pattern_table(model, params, split, config, "table")
    exact = reference.in_float64(params)
    rng = np.random.default_rng(0)
    for i, pattern in zip(rng.integers(0, 90, 24), np.arange(24) % 8, strict=True):
        forced = {config.sae_layer: steer.gates_of(np.array(pattern), 3).astype(float)}
        image = split.images[i] / 255.0
        logits, *_ = reference.vit(exact, image, config, "thresholded", forced)
        assert prefix.table[i, pattern] == np.argmax(logits)
    logits, out = model.apply(params, split.images / np.float32(255))
    chex.assert_trees_all_equal(prefix.pattern, steer.pattern_of(out["gates"][config.sae_layer]))
    chex.assert_trees_all_equal(prefix.prediction, np.argmax(logits, axis=1).astype(np.int32))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("target", ["policy", "residual"])
def test_suffix_at_alpha_0_is_the_unsteered_model_bit_for_bit(split, layer, target):
    config = steering(target=target)
    model, params = vit.build(config, CLASSES), random_params(config, CLASSES)
    layer = layer % 3
    sae, scaling, strength, choice = setting()

    @jax.jit
    def run(images, alphas):
        x_BTD, _ = model.apply(params, images, method=lambda m, images: m.blocks(m.embed(images), 0, stop=layer))
        steered = steer.steered_residuals(
            sae, scaling, strength, choice, x_BTD[:, 0], split.labels, alphas, K, config.steer
        )
        return jax.lax.map(lambda x: steer.suffix(model, params, x_BTD, x, layer, target), steered)

    images = split.images / np.float32(255)
    logits, gates = run(images, jnp.array([0.0, 2.0]))
    plain, out = jax.jit(lambda images: model.apply(params, images))(images)
    chex.assert_trees_all_equal(gates[0], out["gates"][layer])
    chex.assert_trees_all_equal(logits[0], plain)
    assert not np.array_equal(logits[1], plain)


def test_sweep_by_table_equals_the_suffix(split):
    """The look-up and the plain way: one pass of the model for every alpha."""
    config = steering(alphas=(-2.0, 0.0, 1.0, 4.0))
    model, params = vit.build(config, CLASSES), random_params(config, CLASSES)
    sae, scaling, strength, choice = setting()
    prefix = steer.pattern_table(model, params, split, config, "table")
    patterns, predictions = steer.Sweep(model, params, split, prefix, config)(
        sae, scaling, strength, choice, split.labels
    )
    assert len(np.unique(patterns)) > 2
    steered = steer.steered_residuals(
        sae,
        scaling,
        strength,
        choice,
        jnp.asarray(prefix.x),
        split.labels,
        jnp.asarray(steer.alpha_grid(config.steer)),
        K,
        config.steer,
    )
    for a, x in enumerate(steered):
        logits, out = model.apply(params, split.images / np.float32(255), gate_input={2: lambda _, x=x: x})
        chex.assert_trees_all_equal(patterns[a].astype(np.int32), np.asarray(steer.pattern_of(out["gates"][2])))
        chex.assert_trees_all_equal(predictions[a].astype(np.int32), np.argmax(logits, axis=1).astype(np.int32))


def test_residual_target_changes_the_block(split):
    model, params = vit.build(tiny_config(), CLASSES), random_params(tiny_config(), CLASSES)
    sae, scaling, strength, choice = setting()
    config = steering(target="residual", alphas=(0.0, 8.0))
    prefix = steer.pattern_table(model, params, split, config, "table")
    patterns, predictions = steer.Sweep(model, params, split, prefix, config)(
        sae, scaling, strength, choice, split.labels
    )
    chex.assert_trees_all_equal(patterns[0].astype(np.int32), prefix.pattern)
    chex.assert_trees_all_equal(predictions[0].astype(np.int32), prefix.prediction)
    looked_up = prefix.table[np.arange(90), patterns[1]]
    assert (predictions[1] != looked_up).any()  # the gates alone do not explain the answers


def test_zero_is_added_to_the_grid():
    np.testing.assert_array_equal(steer.alpha_grid(steering(alphas=(3.0, -1.0)).steer), [-1, 0, 3])
