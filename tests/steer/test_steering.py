"""Steering against a float64 reference; the programs against the plain model; alpha 0 against no steering."""

import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import CLASSES, setting, steer_config, trained_model

from headsteer_jax.data.dataset import Split
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import Intervention, TrainedModel, build_model
from headsteer_jax.sae.autoencoder import SAEWeights
from headsteer_jax.steer import steering as steer
from headsteer_jax.steer import suffix
from headsteer_jax.steer.gates import gates_to_pattern


@pytest.mark.parametrize("mode", ["add", "scale", "clamp", "ablate"])
@pytest.mark.parametrize("form", ["delta", "replace"])
@pytest.mark.parametrize("alpha_per_image", [False, True])
def test_steered_residual_matches_reference(mode, form, alpha_per_image):
    """One alpha for all images, or one for each."""
    steering = setting()
    rng = np.random.default_rng(1)
    x, classes = rng.standard_normal((6, 24)).astype(np.float32), rng.integers(0, CLASSES, 6)
    alphas = np.array([-2.0, -0.3, 0.0, 0.5, 3.0, 1.0], np.float32)
    config = steer_config(mode=mode, form=form).steer
    steering = steering._replace(sae=replace(steering.sae, k=20))
    scaling = steering.sae.scaling
    exact = SAEWeights(*(np.asarray(a, np.float64) for a in steering.sae.weights))
    moved = 0
    for alpha in [alphas] if alpha_per_image else alphas:
        steered = jax.jit(lambda x, alpha: steer.apply_steering(steering, x, classes, alpha, config))(x, alpha)
        for i in range(6):
            expected = reference.steered(
                exact, scaling.mean.astype(np.float64), float(scaling.scale), x[i].astype(np.float64),
                steering.strength, (steering.choice.latents[classes[i]], steering.choice.weights[classes[i]]),
                float(alpha[i] if alpha_per_image else alpha), 20, mode, form,
            )  # fmt: skip
            chex.assert_trees_all_close(steered[i], expected, atol=2e-5)
            moved += not np.allclose(expected, x[i])
    assert moved > 1  # the settings do move residuals


@pytest.mark.parametrize("mode", ["add", "scale", "ablate"])
def test_alpha_0_in_delta_form_is_the_residual_bit_for_bit(mode):
    x = np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32) * 10
    classes = np.arange(64) % CLASSES
    config = steer_config(mode=mode).steer
    run = jax.jit(lambda x, alpha: steer.apply_steering(setting(), x, classes, alpha, config))
    chex.assert_trees_all_equal(run(x, 0.0), x)
    assert not np.array_equal(run(x, 1.0), x)


@pytest.mark.parametrize(
    ("layer", "target", "memory"),
    [
        (-1, "policy", 1024),
        (-2, "residual", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product((-1, -2), ("policy", "residual"), (1024, 1))
            if case not in ((-1, "policy", 1024), (-2, "residual", 1))
        ),
    ],
)
def test_run_suffix_is_the_plain_model(split, layer, target, memory):
    """Against one forward pass for each setting; alpha 0 is the unsteered model bit for bit, in any budget."""
    config = steer_config(target=target, memory=memory)
    config = config.model_copy(update={"model": config.model.model_copy(update={"mlp_ratio": 20.0})})
    trained = trained_model(config)
    model, params = trained.model, trained.params
    layer = layer % 3
    alphas, other = np.array([-2.0, 0.0, 1.0, 4.0, 9.0]), (split.labels + 1) % CLASSES
    settings = [
        suffix.SuffixSetting({layer: setting(seed)}, labels) for seed, labels in ((0, split.labels), (1, other))
    ]
    found = suffix.run_suffix(trained, split, settings, alphas, "test")
    gates, predictions = found.gates[layer]["heads"], found.predictions
    images = split.images / np.float32(255)

    @jax.jit
    def plain(images, steered, labels, alpha):
        def changed(x_BD):
            return steer.apply_steering(steered[layer], x_BD, labels, alpha, config.steer)

        intervention = Intervention(gate_input=changed, steer_residual=target == "residual")
        logits, out = model.apply(params, images, interventions={layer: intervention})
        return out["gates"][layer]["heads"] > 0, jnp.argmax(logits, axis=1)

    for v, (steered, labels, _) in enumerate(settings):
        for a, alpha in enumerate(alphas):
            expected, answers = plain(images, steered, labels, alpha)
            chex.assert_trees_all_equal(gates[v, a], np.asarray(expected))
            chex.assert_trees_all_equal(predictions[v, a], np.asarray(answers).astype(np.int32))
    logits, out = jax.jit(lambda images: model.apply(params, images))(images)
    chex.assert_trees_all_equal(gates[0, 1], np.asarray(out["gates"][layer]["heads"]) > 0)
    chex.assert_trees_all_equal(predictions[0, 1], np.argmax(logits, axis=1).astype(np.int32))
    assert len({gates[0, a].tobytes() for a in range(5)}) > 2
    if target == "policy":
        assert not np.array_equal(gates[0], gates[1])


def test_a_budget_that_one_image_does_not_fit_is_one_line(split):
    split = Split(split.images[:2], split.labels[:2])  # of more images, more sizes would be compiled
    config = steer_config(target="residual", memory=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"mlp_ratio": 5000.0})})
    model = build_model(config, CLASSES)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    with pytest.raises(
        HeadSteerError, match=r"^config\.machine\.sweep_memory = 1: too small, because one image under one alpha needs"
    ):
        suffix.run_suffix(
            TrainedModel(config, model, params), split, [suffix.SuffixSetting({1: setting()}, split.labels)],
            np.ones(1), "test",
        )  # fmt: skip


@pytest.mark.parametrize("alpha_per_row", [False, True])
def test_gate_program_is_the_models_gate(split, alpha_per_row):
    """Whatever the number of rows: its chunks are all of one size."""
    config = steer_config(chunk=32)
    trained = trained_model(config)
    x = np.random.default_rng(0).standard_normal((90, 24)).astype(np.float32)
    program, steering = steer.GateProgram(trained), setting()
    run = program.patterns_at if alpha_per_row else program.patterns_on_grid
    alphas = np.linspace(-3, 6, 90) if alpha_per_row else np.array([-3.0, 0.0, 2.0, 6.0])
    patterns = run(steering, x, split.labels, alphas)

    @jax.jit
    def plain(alpha):
        steered = steer.apply_steering(steering, x, split.labels, alpha, config.steer)
        return gates_to_pattern(trained.model.apply(trained.params, steered, 2, method="gate_logits"))

    for alpha, row in [(alphas, patterns)] if alpha_per_row else zip(alphas, patterns, strict=True):
        chex.assert_trees_all_equal(row, np.asarray(plain(np.asarray(alpha, np.float32))))
    assert len(np.unique(patterns)) > 2
    assert run(steering, x[:0], split.labels[:0], alphas[:0]).size == 0


@pytest.mark.skipif(
    not hasattr(jax.monitoring, "unregister_event_duration_listener"), reason="this JAX cannot remove a listener"
)
def test_layers_that_are_alike_share_the_programs_of_the_suffix(split):
    """Steering another layer, or two at once, compiles no program for a layer that has one of its form already."""
    config = steer_config(target="residual")
    config = config.model_copy(update={"model": config.model.model_copy(update={"depth": 6})})
    trained, compiled = trained_model(config), []

    def count(event: str, _: float, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def steer_layers(*layers: int) -> int:
        before = len(compiled)
        settings = [suffix.SuffixSetting({layer: setting(layer) for layer in layers}, split.labels)]
        suffix.run_suffix(trained, split, settings, np.array([0.0, 1.0]), "test")
        return len(compiled) - before

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        assert steer_layers(2) > 4
        assert steer_layers(3) == 0
        assert steer_layers(1) == 0
        together = steer_layers(2, 4)
        assert together <= 3  # a steered layer after the first one
        assert steer_layers(1, 2, 3) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
