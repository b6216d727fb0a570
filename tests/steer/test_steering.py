"""Steering against a float64 reference; the programs against the plain model; alpha 0 against no steering."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import CLASSES, random_params, setting, steer_config

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model import vit
from headsteer_jax.steer import steering as steer
from headsteer_jax.steer.table import gates_to_pattern

K = 4


@pytest.mark.parametrize("mode", ["add", "scale", "clamp", "ablate"])
@pytest.mark.parametrize("form", ["delta", "replace"])
@pytest.mark.parametrize("each", [False, True])
def test_steered_residual_matches_reference(mode, form, each):
    """One alpha for all images, or one for each."""
    one = setting()
    rng = np.random.default_rng(1)
    x, classes = rng.standard_normal((6, 24)).astype(np.float32), rng.integers(0, CLASSES, 6)
    alphas = np.array([-2.0, -0.3, 0.0, 0.5, 3.0, 1.0], np.float32)
    config = steer_config(mode=mode, form=form).steer
    exact = type(one.sae)(*(np.asarray(a, np.float64) for a in one.sae))
    moved = 0
    for given in [alphas] if each else alphas:
        got = jax.jit(lambda x, alpha: steer.apply_steering(one, x, classes, alpha, 20, config))(x, given)
        for i in range(6):
            expected = reference.steered(
                exact, one.scaling.mean.astype(np.float64), float(one.scaling.scale), x[i].astype(np.float64),
                one.strength, (one.choice.latents[classes[i]], one.choice.weights[classes[i]]),
                float(given[i] if each else given), 20, mode, form,
            )  # fmt: skip
            chex.assert_trees_all_close(got[i], expected, atol=2e-5)
            moved += not np.allclose(expected, x[i])
    assert moved > 1  # the settings do move residuals


@pytest.mark.parametrize("mode", ["add", "scale", "ablate"])
def test_alpha_0_in_delta_form_is_the_residual_bit_for_bit(mode):
    x = np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32) * 10
    classes = np.arange(64) % CLASSES
    config = steer_config(mode=mode).steer
    run = jax.jit(lambda x, alpha: steer.apply_steering(setting(), x, classes, alpha, K, config))
    chex.assert_trees_all_equal(run(x, 0.0), x)
    assert not np.array_equal(run(x, 1.0), x)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("target", ["policy", "residual"])
@pytest.mark.parametrize("memory", [1024, 1])
def test_run_suffix_is_the_plain_model(split, layer, target, memory):
    """Against one forward pass for each setting; alpha 0 is the unsteered model bit for bit, in any budget."""
    config = steer_config(target=target, memory=memory)
    config = config.model_copy(update={"model": config.model.model_copy(update={"mlp_ratio": 20.0})})
    model, params = vit.build_model(config, CLASSES), random_params(config, CLASSES)
    layer = layer % 3
    alphas, other = np.array([-2.0, 0.0, 1.0, 4.0, 9.0]), (split.labels + 1) % CLASSES
    settings = [({layer: setting(seed)}, labels) for seed, labels in ((0, split.labels), (1, other))]
    gates, predictions = steer.run_suffix(model, params, split, settings, alphas, config, 64, "test")
    images = split.images / np.float32(255)

    @jax.jit
    def plain(images, steered, labels, alpha):
        def changed(x_BD):
            return steer.apply_steering(steered[layer], x_BD, labels, alpha, K, config.steer)

        intervention = vit.Intervention(gate_input=changed, steer_residual=target == "residual")
        logits, out = model.apply(params, images, interventions={layer: intervention})
        return out["gates"][layer] > 0, jnp.argmax(logits, axis=1)

    for v, (steered, labels) in enumerate(settings):
        for a, alpha in enumerate(alphas):
            wanted, answers = plain(images, steered, labels, alpha)
            chex.assert_trees_all_equal(gates[v, a, :, 0], np.asarray(wanted))
            chex.assert_trees_all_equal(predictions[v, a], np.asarray(answers).astype(np.int32))
    logits, out = jax.jit(lambda images: model.apply(params, images))(images)
    chex.assert_trees_all_equal(gates[0, 1, :, 0], np.asarray(out["gates"][layer]) > 0)
    chex.assert_trees_all_equal(predictions[0, 1], np.argmax(logits, axis=1).astype(np.int32))
    assert len({gates[0, a].tobytes() for a in range(5)}) > 2
    if target == "policy":
        assert not np.array_equal(gates[0], gates[1])


def test_a_budget_that_one_image_does_not_fit_is_one_line(split):
    config = steer_config(target="residual", memory=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"mlp_ratio": 5000.0})})
    model = vit.build_model(config, CLASSES)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    with pytest.raises(
        HeadSteerError, match=r"^config\.steer\.memory = 1: too small, as one image under one alpha needs"
    ):
        steer.run_suffix(model, params, split, [({1: setting()}, split.labels)], np.ones(1), config, 64, "test")


@pytest.mark.parametrize("each", [False, True])
def test_gate_program_is_the_models_gate(split, each):
    """Whatever the number of rows: its chunks are all of one size."""
    config = steer_config(chunk=32)
    model, params = vit.build_model(config, CLASSES), random_params(config, CLASSES)
    x = np.random.default_rng(0).standard_normal((90, 24)).astype(np.float32)
    program, one = steer.GateProgram(model, params, config), setting()
    alphas = np.linspace(-3, 6, 90) if each else np.array([-3.0, 0.0, 2.0, 6.0])
    got = program(one, x, split.labels, alphas, each=each)
    for alpha, row in [(alphas, got)] if each else zip(alphas, got, strict=True):
        steered = steer.apply_steering(one, x, split.labels, jnp.asarray(alpha, jnp.float32), K, config.steer)
        chex.assert_trees_all_equal(
            row, np.asarray(gates_to_pattern(model.apply(params, steered, 2, method="gate_logits")))
        )
    assert len(np.unique(got)) > 2
    assert program(one, x[:0], split.labels[:0], alphas[:0], each=each).size == 0
