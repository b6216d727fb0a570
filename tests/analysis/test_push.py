"""Why usage changes: the pushes, their limit, and how they resemble the classes' own gate logits."""

import dataclasses

import numpy as np
import pytest
from made_run import made_sweep

from headsteer_jax import load_run
from headsteer_jax.analysis.push import center_classes, explain_usage
from headsteer_jax.steer.catalogue import find_strategy, per_class_strategy
from headsteer_jax.steer.strategies import LatentStatistics
from headsteer_jax.steer.sweep import run_sweep


def test_the_numbers_are_those_of_their_formulas():
    _, result = made_sweep(classes=4, per_class=3)
    pushes = np.zeros((len(result.strategies), result.test.seeds, 4, result.test.heads))
    deviation = center_classes(result.gate_logits)
    pushes[0] = 2 * deviation + 5 * np.sign(deviation.mean(axis=0))  # a constant of each gate does not matter
    pushes[1] = -deviation
    explained = explain_usage(dataclasses.replace(result, push=pushes))
    first, second, none = (explained[name] for name in result.strategies[:3])
    assert first["correlation"] == pytest.approx(1)
    assert second["correlation"] == pytest.approx(-1)
    assert second["same_sign"] == 0
    assert first["limit"] == pytest.approx(np.mean(pushes[0] > 0))  # every class has as many images
    usage = result.test.unsteered_heads_on.sum() / (result.test.count.sum() * result.test.heads)
    assert none == {"limit": pytest.approx(usage), "correlation": None, "same_sign": None}


def test_classes_without_images_and_choices_by_image_are_left_out():
    _, result = made_sweep(classes=4, per_class=3)
    before = explain_usage(result)["class"]
    logits, push = result.gate_logits.copy(), result.push.copy()
    logits[3] = np.nan
    push[2] = np.nan
    after = explain_usage(dataclasses.replace(result, gate_logits=logits, push=push))
    assert result.strategies[2] not in after
    assert after["class"]["limit"] == before["limit"]
    expected = np.sign(result.push[0][:, :3]) == np.sign(logits[:3] - logits[:3].mean(axis=0))
    assert after["class"]["same_sign"] == pytest.approx(expected.mean())
    assert explain_usage(dataclasses.replace(result, push=None)) == {}


def four_latents(statistics: LatentStatistics, label: int) -> tuple[np.ndarray, np.ndarray]:
    return np.argsort(-statistics.class_frequency[label])[:4], np.ones(4)


def test_a_strategy_of_more_latents_does_not_change_what_classes_share(finished):
    run = load_run(finished.workdir)
    config = run.config.model_copy(update={"steer": run.config.steer.model_copy(update={"latents": 2})})
    run = dataclasses.replace(run, trained=run.trained._replace(config=config))
    strategies = {name: find_strategy(name) for name in ("class", "global")}
    more = strategies | {"mine": per_class_strategy(four_latents, "mine")}
    alone, beside = run_sweep(run, strategies), run_sweep(run, more)
    assert beside.latents.shape[-1] == 4
    np.testing.assert_array_equal(np.diagonal(beside.overlap_class_class, axis1=1, axis2=2), 1)
    np.testing.assert_array_equal(beside.overlap_class_class, alone.overlap_class_class)
    np.testing.assert_array_equal(beside.overlap_global_class, alone.overlap_global_class)


def test_a_large_alpha_reaches_the_limit(finished):
    """The sweep itself, with its gates image by image, is the second opinion."""
    run = load_run(finished.workdir)
    config = run.config.model_copy(update={"steer": run.config.steer.model_copy(update={"alphas": (1e9,)})})
    names = ("class", "mean_difference", "probe")  # those of gate_aligned are in units of the largest alpha
    run = dataclasses.replace(run, trained=run.trained._replace(config=config))
    result = run_sweep(run, {name: find_strategy(name) for name in names})
    explained = explain_usage(result)
    for g, name in enumerate(names):
        on = result.test.heads_on[g, :, 0, -1].sum(axis=(1, 2)).mean()
        assert explained[name]["limit"] == pytest.approx(on / (result.test.count.sum() * result.test.heads))
