"""Predictions against the plain model and a float64 reference; steering by rules; what --steer refuses."""

from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import CLASSES, setting, steer_config, trained_model
from helpers import FinishedRun

from headsteer_jax import HeadSteerError, load_run
from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.vit import Intervention, TrainedModel, stack_gates
from headsteer_jax.sae.autoencoder import SAEWeights
from headsteer_jax.steer.answers import (
    Answers,
    ReadImages,
    SteeringRule,
    check_images,
    find_steering_rule,
    make_predict,
    parse_steering,
)

NAMES = ("cat", "dog", "a:b")


def run_plainly(trained: TrainedModel, images: np.ndarray, x: np.ndarray | None = None) -> tuple:
    """Compute classes, probabilities, gates by kind and residuals by one call of the whole model.

    Args:
      x: what the steered layer reads in place of its CLS residual; None: nothing is steered.
    """
    logits, out = run_model(trained, images, x)
    exact = np.exp(np.asarray(logits, np.float64))
    gates = {kind: np.asarray(stack_gates(out["gates"], kind)) > 0 for kind in trained.config.gate.kinds}
    return exact.argmax(axis=1), exact / exact.sum(axis=1, keepdims=True), gates, out["cls"]


def run_model(trained: TrainedModel, images: np.ndarray, x: np.ndarray | None) -> tuple:
    config = trained.config
    change = Intervention(None, None if x is None else lambda _: jnp.asarray(x), config.steer.target == "residual")
    interventions = {} if x is None else {config.sae_layer: change}

    def run(params: object, images: np.ndarray) -> tuple:
        return trained.model.apply(params, preprocess(images, config.data), interventions=interventions)

    return jax.jit(run)(trained.params, images)


def rule_of(steering: object, label: int | None = None, least_confidence: float = 0.0) -> SteeringRule:
    def choose(_: ReadImages, label_B: np.ndarray) -> tuple:
        return steering.choice, label_B if label is None else np.full_like(label_B, label)

    return SteeringRule(steering.sae, steering.strength, choose, least_confidence)


@pytest.mark.parametrize(("kinds", "layer"), [(("heads",), -1), (("heads", "sublayers", "tokens"), 1)])
def test_predictions_are_those_of_the_plain_model(kinds: tuple[str, ...], layer: int, split: Split) -> None:
    config = steer_config(gate={"kinds": kinds})
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"layer": layer})})
    trained, sae = trained_model(config), setting().sae
    predictions = make_predict(trained, sae, 6)(split.images)
    label, probability, gates, cls = run_plainly(trained, split.images)
    np.testing.assert_array_equal(predictions.label, label)
    np.testing.assert_allclose(predictions.confidence, probability.max(axis=1), rtol=1e-5)
    chex.assert_trees_all_equal(predictions.gates, gates)
    assert any(0 < g.mean() < 1 for g in gates.values())
    x = np.asarray(cls[config.sae_layer], np.float64)
    exact = SAEWeights(*(np.asarray(a, np.float64) for a in sae.weights))
    for i in range(len(x)):
        z = reference.encode(exact, (x[i] - sae.scaling.mean) * sae.scaling.scale, sae.k)
        strongest = np.sort(z)[::-1][:6]
        np.testing.assert_allclose(predictions.activations[i], strongest, rtol=1e-4, atol=1e-5)
        active = strongest > 0
        np.testing.assert_allclose(z[predictions.latents[i]][active], strongest[active], rtol=1e-4)
    assert predictions.steered is None
    assert predictions.label.dtype == predictions.latents.dtype == np.int32
    assert predictions.confidence.dtype == predictions.activations.dtype == np.float32


@pytest.mark.parametrize(("target", "mode", "form"), [("policy", "add", "delta"), ("residual", "scale", "replace")])
def test_steered_answers_are_those_of_an_intervention(target: str, mode: str, form: str, split: Split) -> None:
    """Each image is steered by a class, its own prediction or a given one; x' is computed in float64."""
    config = steer_config(target=target, mode=mode, form=form)
    trained, steering = trained_model(config), setting()
    unsteered, _, gates, cls = run_plainly(trained, split.images)
    layer, changed = config.sae_layer, 0
    for label, alpha in ((None, 2.0), (3, -1.0)):
        row = unsteered if label is None else np.full(len(unsteered), label)
        x = np.asarray(cls[layer], np.float64)
        exact, scaling = SAEWeights(*(np.asarray(a, np.float64) for a in steering.sae.weights)), steering.sae.scaling
        steered_x = np.stack([
            reference.steered(
                exact, scaling.mean, float(scaling.scale), x[i], steering.strength,
                (steering.choice.latents[c], steering.choice.weights[c]), alpha, 4, mode, form,
            )
            for i, c in enumerate(row)
        ]).astype(np.float32)  # fmt: skip
        expected, probability, steered_gates, _ = run_plainly(trained, split.images, steered_x)
        predictions = make_predict(trained, steering.sae, 2, rule_of(steering, label), alpha)(split.images)
        np.testing.assert_array_equal(predictions.label, unsteered)
        chex.assert_trees_all_equal(predictions.gates, gates)
        assert predictions.steered is not None
        np.testing.assert_array_equal(predictions.steered.label, expected)
        np.testing.assert_allclose(predictions.steered.confidence, probability.max(axis=1), rtol=1e-4)
        chex.assert_trees_all_equal(predictions.steered.gates, steered_gates)
        changed += (steered_gates["heads"] != gates["heads"]).sum()
    assert changed


@pytest.mark.parametrize(("mode", "target"), [("add", "policy"), ("ablate", "policy"), ("scale", "residual")])
def test_alpha_0_is_the_unsteered_model_bit_for_bit(mode: str, target: str, split: Split) -> None:
    trained, steering = trained_model(steer_config(mode=mode, target=target)), setting()
    predictions = make_predict(trained, steering.sae, 2, rule_of(steering), 0.0)(split.images)
    assert predictions.steered is not None
    unsteered = Answers(predictions.label, predictions.confidence, predictions.gates)
    chex.assert_trees_all_equal(predictions.steered, unsteered)


def test_an_unsure_image_is_not_steered(split: Split) -> None:
    trained, steering = trained_model(steer_config()), setting()
    always = make_predict(trained, steering.sae, 2, rule_of(steering), 4.0)(split.images)
    least = float(np.median(always.confidence))
    found = make_predict(trained, steering.sae, 2, rule_of(steering, None, least), 4.0)(split.images)
    sure = found.confidence >= least
    assert always.steered is not None
    assert found.steered is not None
    np.testing.assert_array_equal(found.steered.label, np.where(sure, always.steered.label, found.label))
    heads, unsteered = always.steered.gates["heads"], found.gates["heads"]
    assert (heads != unsteered)[~sure].any()
    np.testing.assert_array_equal(found.steered.gates["heads"], np.where(sure[:, None, None], heads, unsteered))


def test_a_guess_reads_the_input_of_its_layer(split: Split) -> None:
    """The residual that an early layer's guess is given is the one that enters that layer."""
    config = steer_config(guess_layer=1)
    trained, steering, seen = trained_model(config), setting(), []

    def choose(images: ReadImages, label_B: np.ndarray) -> tuple:
        seen.append(images)
        return steering.choice, label_B

    make_predict(trained, steering.sae, 2, SteeringRule(steering.sae, steering.strength, choose), 1.0)(split.images)
    for layer, read in ((1, seen[0].guess), (2, seen[0].x)):
        x_BTD = trained.model.apply(trained.params, split.images[:64] / np.float32(255), layer, method="before")
        np.testing.assert_allclose(read[:64], x_BTD[:, 0], rtol=1e-4, atol=1e-5)


def test_an_image_has_the_same_bits_among_any_number_of_images(split: Split) -> None:
    """More than one call, one image, and none."""
    trained, steering = trained_model(steer_config()), setting()
    predict = make_predict(trained, steering.sae, 3, rule_of(steering), 2.0)
    everything = predict(split.images)
    for count in (0, 1, 65):
        part = predict(split.images[:count])
        chex.assert_trees_all_equal(part, jax.tree.map(lambda rows, count=count: rows[:count], everything))


def test_a_rule_is_the_choice_of_the_sweep(finished: FinishedRun) -> None:
    """Of every strategy of the run: its latents and weights, drawn ones as well."""
    run, sweep = load_run(finished.workdir), read_sweep(finished.workdir / "sweep.nc")
    for g, name in enumerate(run.config.steer.strategies):
        rule = find_steering_rule(run, name, None)
        read = ReadImages(run.x_train[:3], run.x_train[:3])
        choice, row = rule.choose(read, np.array([5, 0, 7], np.int32))
        recorded = sweep.isel(strategy=g, seed=0)
        np.testing.assert_array_equal(row, [5, 0, 7])
        np.testing.assert_array_equal(choice.latents, recorded["latents"].values[:, : choice.latents.shape[1]])
        np.testing.assert_allclose(choice.weights, recorded["weights"].values[:, : choice.weights.shape[1]], rtol=1e-5)
        np.testing.assert_array_equal(find_steering_rule(run, name, 4).choose(read, row)[1], [4, 4, 4])


def test_run_predict_agrees_with_the_sweep(finished: FinishedRun) -> None:
    """Steered by the predicted class, the test images have the counts of the sweep."""
    run, sweep = load_run(finished.workdir), read_sweep(finished.workdir / "sweep.nc")
    test, alpha = run.dataset.test, float(sweep["alpha"].values[-1])
    predictions = run.predict(test.images, steer="class", alpha=alpha)
    assert predictions.steered is not None
    chosen = {"strategy": "class", "seed": 0, "named_by": "predicted", "alpha": alpha}
    right = np.bincount(test.labels[predictions.steered.label == test.labels], minlength=len(run.dataset.class_names))
    np.testing.assert_array_equal(right, sweep["test_correct"].sel(chosen).values)
    heads = predictions.steered.gates["heads"][:, -1].sum(axis=0)
    np.testing.assert_array_equal(heads, sweep["test_heads_on"].sel(chosen).values.sum(axis=0))
    np.testing.assert_array_equal(predictions.label, sweep["test_prediction"].values)
    assert predictions.latents.shape == (len(test.labels), 5)


@pytest.mark.parametrize("name", ["image_latents", "guessed_bias", "guessed_difference", "global_bias", "gate_bias"])
def test_strategies_without_a_class_steer(name: str, finished: FinishedRun) -> None:
    run = load_run(finished.workdir)
    images = run.dataset.test.images[:5]
    steered = run.predict(images, steer=name, alpha=3.0).steered
    assert steered is not None
    assert steered.label.shape == (5,)
    same = run.predict(images, steer=name, alpha=0.0)
    assert same.steered is not None
    np.testing.assert_array_equal(same.steered.confidence, same.confidence)


def test_the_sweep_and_a_prediction_guess_from_the_same_early_layer(finished: FinishedRun) -> None:
    run = load_run(finished.workdir)
    steer = {"guess_layer": 1, "guess_classes": 2, "least_confidence": 0.2}
    strategies = {"guess": "guessed_bias", "difference": "guessed_difference", "bias": "gate_bias"}
    sweep = run.sweep(strategies, alphas=(3.0,), **steer)
    config = run.config.model_copy(update={"steer": run.config.steer.model_copy(update=steer)})
    early = replace(run, trained=run.trained._replace(config=config))
    test = run.dataset.test
    for name, strategy in strategies.items():
        steered = early.predict(test.images, steer=strategy, alpha=3.0).steered
        assert steered is not None
        chosen = {"strategy": name, "seed": 0, "named_by": "predicted", "alpha": 3.0}
        right = np.bincount(test.labels[steered.label == test.labels], minlength=len(run.dataset.class_names))
        np.testing.assert_array_equal(right, sweep["test_correct"].sel(chosen).values)
    classes, width = len(run.dataset.class_names), run.config.model.width
    for name in ("guess", "difference"):
        assert sweep["extra_macs"].sel(strategy=name).values.tolist() == [(classes + 2) * width] * 2
    assert sweep["extra_macs"].sel(strategy="bias", named_by="true") == 0


def test_a_latent_is_named_by_the_classes_on_which_it_fires_most(finished: FinishedRun) -> None:
    run = load_run(finished.workdir)
    with np.load(finished.workdir / "sae/inside.npz") as arrays:
        counts, means = arrays["class_counts"], arrays["class_means"]
    for latent, named in enumerate(run.latent_classes):
        ranked = sorted(range(len(counts)), key=lambda c: (-counts[c, latent], -means[c, latent]))
        expected = [c for c in ranked[: len(named)] if counts[c, latent]]
        assert [c for c in named if c >= 0] == expected


def test_what_is_asked_is_parsed() -> None:
    assert parse_steering("class:dog", NAMES, "--steer") == ("class", 1)
    assert parse_steering("class:a:b", NAMES, "--steer") == ("class", 2)
    assert parse_steering("global", NAMES, "--steer") == ("global", None)
    assert parse_steering("numpy:mean", NAMES, "--steer") == ("numpy:mean", None)
    assert parse_steering("numpy:mean:a:b", NAMES, "--steer") == ("numpy:mean", 2)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("class:catt", "--steer: the dataset has no class 'catt'; did you mean 'cat'?"),
        ("class:", "--steer: the dataset has no class ''; it has cat, dog, a:b"),
        ("clas:cat", "--steer=clas:cat: there is no strategy 'clas'; did you mean 'class'? There are class, global, "),
        ("clas:42", "--steer=clas:42: there is no strategy 'clas'; did you mean 'class'?"),
        ("clas:snow leopard", "there is no strategy 'clas'; did you mean 'class'?"),
        ("qqq", "--steer=qqq: there is no strategy 'qqq'; choose from class, global, "),
        ("numpy:none", "'numpy:none' cannot be imported"),
        ("image_latents:cat", "chooses for each image by itself; leave out the class: --steer=image_latents"),
    ],
)
def test_what_does_not_exist_is_refused(text: str, line: str) -> None:
    with pytest.raises(HeadSteerError) as error:
        parse_steering(text, NAMES, "--steer")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_the_fault_of_a_users_module_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HeadSteerError, match="'needy:choose' cannot be imported: No module named 'a_package"):
        parse_steering("needy:choose:cat", NAMES, "--steer")


def test_wrong_arguments_of_predict_are_refused(finished: FinishedRun) -> None:
    run = load_run(finished.workdir)
    images = run.dataset.test.images[:2]
    for wrong, line in (
        ({"steer": "class"}, "steer: needs alpha as well"),
        ({"alpha": 1.0}, "alpha: needs steer as well"),
        ({"steer": "class", "alpha": float("nan")}, "alpha=nan: must be a finite number"),
        ({"latents": 10**6}, "latents = 1000000: must be from 0 to"),
        ({"steer": "class:1000", "alpha": 1.0}, "steer: the dataset has no class '1000'"),
    ):
        with pytest.raises(HeadSteerError, match=line):
            run.predict(images, **wrong)
    for wrong_images in (images[0], images.astype(np.float32), images.tolist()):
        with pytest.raises(HeadSteerError, match="must be a uint8 array of shape"):
            run.predict(wrong_images)
    with pytest.raises(HeadSteerError, match=r"uint8 \(1, 2, 2, 1\)"):
        check_images(np.zeros((1, 2, 2, 1), np.uint8), (4, 4, 1))


def test_without_an_autoencoder_there_are_no_latents(split: Split) -> None:
    trained = trained_model(steer_config())
    with_sae = make_predict(trained, replace(setting().sae), 4)(split.images)
    without = make_predict(trained)(split.images)
    assert without.latents.shape == without.activations.shape == (len(split.labels), 0)
    np.testing.assert_array_equal(without.confidence, with_sae.confidence)
    assert without.label.max() < CLASSES
