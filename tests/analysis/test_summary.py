"""From counts to headline numbers: chosen on validation, scored on test, each number again by hand from the images."""

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_run import made_sweep

from headsteer_jax.analysis.claims import claim_control
from headsteer_jax.analysis.scores import Curves, score_settings
from headsteer_jax.analysis.stats import mcnemar_p
from headsteer_jax.analysis.summary import compare_fronts, saved_classes, summarise
from headsteer_jax.config import Config
from headsteer_jax.steer.gates import pattern_to_gates
from headsteer_jax.steer.results import BY_LABEL, SplitResult, SweepResult
from headsteer_jax.steer.tally import StepFunction, pack_bits, unpack_bits


@pytest.fixture(scope="module")
def config_and_result() -> tuple[Config, SweepResult]:
    return made_sweep(classes=8, heads=4, seeds=2, per_class=14)


@pytest.fixture(scope="module")
def config(config_and_result: tuple[Config, SweepResult]) -> Config:
    return config_and_result[0]


@pytest.fixture(scope="module")
def result(config_and_result: tuple[Config, SweepResult]) -> SweepResult:
    return config_and_result[1]


def per_image(split: SplitResult) -> tuple[np.ndarray, np.ndarray]:
    """[G, S, Y, A, N]: was the answer right, and the share of heads that ran."""
    count = len(split.labels)
    return unpack_bits(split.right, count), unpack_bits(split.gates, count).mean(axis=-2)


def unsteered(split: SplitResult) -> tuple[np.ndarray, np.ndarray]:
    """[N]: the same without steering."""
    right = split.table[np.arange(len(split.labels)), split.pattern] == split.labels
    return right, pattern_to_gates(split.pattern, split.heads).mean(axis=-1)


def test_the_alpha_is_chosen_on_validation_and_scored_on_test(config: Config, result: SweepResult) -> None:
    summary, _ = summarise(result, config)
    chosen_on, scored_on = per_image(result.validation), per_image(result.test)
    floor = unsteered(result.validation)[0].mean() - config.steer.tolerance
    alphas = result.alphas
    seen = set()
    for g, name in enumerate(result.strategies):
        for y in range(2):
            best, least = int(np.flatnonzero(alphas == 0)[0]), np.inf
            for a in np.flatnonzero(alphas > 0):
                right, used = (values[g, :, y, a].mean() for values in chosen_on)
                if right >= floor and used < least:
                    best, least = int(a), used
            row = summary["steering"][name]
            row = row if y == 0 else row["by_predicted_class"]
            assert row["alpha"] == alphas[best]
            assert row["accuracy"] == pytest.approx(scored_on[0][g, :, y, best].mean())
            assert row["usage"] == pytest.approx(scored_on[1][g, :, y, best].mean())
            for what in ("usage", "accuracy"):
                assert row[f"{what}_ci"][0] <= row[what] <= row[f"{what}_ci"][1]
            gained = (scored_on[0][g, 0, y, best] & ~unsteered(result.test)[0]).sum()
            lost = (~scored_on[0][g, 0, y, best] & unsteered(result.test)[0]).sum()
            assert row["mcnemar_p"] == pytest.approx(float(mcnemar_p(gained, lost)))
            seen.add(best)
    assert len(seen) > 1


def test_unsteered(config: Config, result: SweepResult) -> None:
    summary, _ = summarise(result, config)
    right, used = unsteered(result.test)
    row = summary["steering"]["unsteered"]
    assert row["accuracy"] == summary["gated_accuracy"] == pytest.approx(right.mean())
    assert row["usage"] == summary["last_layer"]["usage"] == pytest.approx(used.mean())


def test_test_images_do_not_decide_anything(config: Config, result: SweepResult) -> None:
    """With other answers on test, the choices are the same."""
    _, before = summarise(result, config)
    rng = np.random.default_rng(0)
    test = replace(
        result.test, right=rng.permuted(result.test.right, axis=-1), table=rng.permuted(result.test.table, axis=-1)
    )
    _, after = summarise(replace(result, test=test), config)
    for name in ("chosen", "class_chosen", "oracle_patterns"):
        np.testing.assert_array_equal(before[name], after[name])
    # and with other answers on validation they are not
    validation = replace(result.validation, right=np.roll(result.validation.right, 2, axis=3))
    _, other = summarise(replace(result, validation=validation), config)
    assert not np.array_equal(before["class_chosen"], other["class_chosen"])


def test_the_class_that_names_an_image_has_its_alpha(config: Config, result: SweepResult) -> None:
    """Chosen on validation and scored on test, image by image: by label, and by what the model takes each image for."""
    steer = config.steer.model_copy(update={"least_validation": 14})  # more than the model takes for some classes
    config = config.model_copy(update={"steer": steer})
    summary, extra = summarise(result, config)
    alphas, zero = result.alphas, int(np.flatnonzero(result.alphas == 0)[0])
    (right, used), unsteered_right = per_image(result.validation), unsteered(result.validation)[0]
    test_right, test_used = per_image(result.test)
    labels, common = result.test.labels, set()
    for (g, name), y in itertools.product(enumerate(result.strategies), range(2)):
        row = summary["steering"][name] if y == 0 else summary["steering"][name]["by_predicted_class"]
        if name == "global":
            assert row["alpha_per_class"] is None
            continue
        names = [result.validation.labels, result.validation.prediction][y]
        alpha_C = []
        for c in range(8):
            best, least, own = zero, np.inf, names == c
            for a in np.flatnonzero(alphas > 0):
                keeps = right[g, :, y, a][:, own].sum() >= 2 * unsteered_right[own].sum()  # two seeds
                if keeps and used[g, :, y, a][:, own].sum() < least - 1e-9:
                    best, least = int(a), used[g, :, y, a][:, own].sum()
            if own.sum() < config.steer.least_validation:
                best = int(extra["chosen"][g, y])
                common.add(c)
            alpha_C.append(best)
        assert extra["class_chosen"][g, y].tolist() == alpha_C
        named = [labels, result.test.prediction][y]
        at = np.array(alpha_C)[named], np.arange(len(named))
        right_SN, used_SN = (np.stack([values[g, s, y][at] for s in range(2)]) for values in (test_right, test_used))
        assert row["alpha_per_class"]["accuracy"] == pytest.approx(right_SN.mean())
        assert row["alpha_per_class"]["usage"] == pytest.approx(used_SN.mean())
        before_N, before_used_N = unsteered(result.test)
        saved = 0
        for c in range(8):
            own = labels == c
            fell = before_used_N[own].mean() - used_SN[:, own].mean() >= config.steer.saving - 1e-9
            saved += fell and right_SN[:, own].sum() >= 2 * before_N[own].sum()
        assert row["alpha_per_class"]["classes_saved"] == saved
    assert common


def test_no_label_chooses_an_alpha_by_predicted_class() -> None:
    """Every image is taken for class 0; alpha 1 answers those of class 1, and alpha 2 those of class 0."""
    config, result = made_sweep(classes=2, heads=2, seeds=1, per_class=10, strategies=("probe",), alphas=(1.0, 2.0))
    labels = result.test.labels
    right_AN = np.stack([labels == 0, labels == 1, labels == 0])
    gates_AHN = np.stack([np.ones((2, 20), bool), *(np.arange(2)[:, None] == 0) * np.ones((2, 2, 20), bool)])

    def plant(split: SplitResult) -> SplitResult:
        settings = (1, 1, 2)
        correct = np.stack([np.bincount(labels[right], minlength=2) for right in right_AN])
        heads_on = np.stack([[gates_HN[:, labels == c].sum(axis=1) for c in range(2)] for gates_HN in gates_AHN])
        return replace(
            split, pattern=np.full(20, 3, np.int32), prediction=np.zeros(20, np.int32), table=np.zeros((20, 4), int),
            unsteered_correct=np.array([10, 0]), unsteered_heads_on=np.full((2, 2), 10),
            unsteered_right=pack_bits(labels == 0), right=pack_bits(np.broadcast_to(right_AN, (*settings, 3, 20))),
            gates=pack_bits(np.broadcast_to(gates_AHN, (*settings, 3, 2, 20))),
            correct=np.broadcast_to(correct, (*settings, 3, 2)),
            heads_on=np.broadcast_to(heads_on, (*settings, 3, 2, 2)),
        )  # fmt: skip

    result = replace(result, validation=plant(result.validation), test=plant(result.test))
    row = summarise(result, config)[0]["steering"]["probe"]
    assert row["alpha_per_class"]["accuracy"] == 1.0
    by_prediction = row["by_predicted_class"]
    assert by_prediction["alpha_per_class"]["accuracy"] == by_prediction["accuracy"] == 0.5
    assert by_prediction["alpha_per_class"]["usage"] == by_prediction["usage"] == 0.5


def test_the_table_of_classes(config: Config, result: SweepResult) -> None:
    summary, extra = summarise(result, config)
    g, a = 0, int(extra["chosen"][0, 0])
    (right, used), (right_0, used_0) = per_image(result.test), unsteered(result.test)
    rows = {row["name"]: row for row in summary["classes"]}
    saved = 0
    for c, name in enumerate(result.class_names):
        own, row = result.test.labels == c, rows[name]
        assert row["images"] == own.sum()
        assert row["usage_before"] == pytest.approx(used_0[own].mean())
        assert row["usage_after"] == pytest.approx(used[g, :, 0, a][:, own].mean())
        assert row["accuracy_before"] == pytest.approx(right_0[own].mean())
        assert row["accuracy_after"] == pytest.approx(right[g, :, 0, a][:, own].mean())
        heads = unpack_bits(result.test.gates[g, :, 0, a], len(own))[..., own].mean(axis=(0, 2))
        assert row["heads_after"] == np.flatnonzero(heads > 0.5).tolist()
        drop = round(row["usage_before"] - row["usage_after"], 9)
        keeps = right[g, :, 0, a][:, own].sum() >= 2 * right_0[own].sum()  # two seeds
        assert row["saved"] == (drop >= config.steer.saving and bool(keeps))
        saved += row["saved"]
    assert summary["steering"]["class"]["classes_saved"] == saved
    order = [(not row["saved"], row["usage_after"] - row["usage_before"]) for row in summary["classes"]]
    assert order == sorted(order)


def test_saved_means_less_usage_at_no_loss() -> None:
    unsteered = Curves(np.full(5, 0.8), np.full(5, 0.9))
    steered = Curves(np.array([0.6, 0.61, 0.3, 0.6, 0.1]), np.array([0.9, 1.0, 0.89, 0.91, 1.0]))
    count = np.array([5, 5, 5, 5, 0])
    assert saved_classes(steered, unsteered, count, 0.2).tolist() == [True, False, False, True, False]


def claim(summary: dict[str, Any], part: str) -> dict[str, Any]:
    found = [one for one in summary["claims"] if part in one["claim"]]
    assert len(found) == 1
    return found[0]


def test_claims_follow_their_intervals(config: Config, result: SweepResult) -> None:
    summary, _ = summarise(result, config)
    saving, row = claim(summary, "lowers usage"), summary["steering"]["class"]
    assert saving["value"] == pytest.approx(summary["steering"]["unsteered"]["usage"] - row["usage"])
    assert saving["interval"] == [-row["usage_change_ci"][1], -row["usage_change_ci"][0]]
    for one in summary["claims"]:
        if one["holds"] is not None:
            assert one["interval"][0] <= one["value"] <= one["interval"][1]
    related = claim(summary, "share more latents")
    overlap = result.overlap_class_class.mean(axis=0)
    pairs, off = result.related, ~np.eye(8, dtype=bool)
    assert related["value"] == pytest.approx(overlap[pairs].mean() - overlap[off & ~pairs].mean())


PAPER = ("global", "random", "matched_random")  # controls of what [LH26] report


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("global", "class"),
        ("random", "class"),
        ("matched_random", "class"),
        ("mean_difference", "class"),
        ("probe", "class"),
        ("random_direction", "class"),
        ("gate_bias", "gate_aligned"),
        ("random_direction", "mean_difference"),
        ("random_direction", "probe"),
        ("random_bias", "gate_bias"),
        ("image_random", "image_latents"),
        ("matched_superclass", "superclass"),
        ("global_bias", "guessed_difference"),
    ],
)
def test_strategies_are_compared_over_the_usages_that_both_reach(name: str, method: str) -> None:
    strategies = tuple(dict.fromkeys(("class", method, name)))
    config, result = made_sweep(classes=8, heads=4, seeds=2, per_class=14, strategies=strategies)
    summary, extra = summarise(result, config)
    found = claim(summary, f"at equal usage, {name} is less accurate than {method} steering")
    right, used = per_image(result.test)
    settings = np.flatnonzero(result.alphas >= 0)
    first, other = (
        [(used[g, :, 0, a].mean(dtype=float), right[g, :, 0, a].mean(dtype=float)) for a in settings]
        for g in (strategies.index(method), strategies.index(name))
    )
    chosen = int(extra["chosen"][strategies.index(method), 0])
    low = max(used[strategies.index(method), :, 0, chosen].mean(dtype=float), min(u for u, _ in other))
    high = unsteered(result.test)[1].mean()
    assert low < high
    leads = []
    for place in range(21):
        level = low + place / 20 * (high - low) + 1e-9
        leads.append(max(a for u, a in first if u <= level) - max(a for u, a in other if u <= level))
    assert found["usages"] == pytest.approx([low, high])
    assert found["value"] == pytest.approx(np.mean(leads))
    assert found["holds"] == (found["interval"][0] > 0)
    ours = {"superclass", "image_latents", "guessed_difference"}
    assert found["about"] == ("further" if method in ours else "paper" if name in PAPER else "autoencoder")


def compare_paths(
    usage: np.ndarray, accuracy: np.ndarray, resampled: tuple[np.ndarray, np.ndarray], chosen: int
) -> dict[str, Any]:
    """Compare two strategies of which usage and accuracy [2, A] and their resamplings [R, 2, A] are given."""
    config, result = made_sweep(classes=4, heads=3, strategies=("class", "global"), alphas=(1.0, 2.0, 4.0))
    scores = score_settings(result, config, np.random.default_rng(0))
    curves, curves_R = Curves(usage[:, None], accuracy[:, None]), Curves(*(values[:, :, None] for values in resampled))
    scores = replace(scores, test=curves, resampled=curves_R, chosen=np.full((2, 1), chosen))
    return claim_control("class", "global", scores, 0.9)


USAGE = np.array([[0.9, 0.7, 0.5, 0.4], [0.9, 0.7, 0.6, 0.595]])
ACCURACY = np.array([[0.88, 0.875, 0.87, 0.86], [0.88, 0.876, 0.874, 0.80]])


def test_the_last_alpha_of_a_control_that_saturates_does_not_decide() -> None:
    """It costs the control 7.4 points and saves it 0.005 of usage; at all other usages the control is ahead."""
    found = compare_paths(USAGE, ACCURACY, (USAGE[None], ACCURACY[None]), 3)
    assert found["usages"] == [0.595, 0.9]
    # one level below 0.6, six below 0.7, thirteen above, and the unsteered model
    assert found["value"] == pytest.approx((0.07 + 6 * -0.004 + 13 * -0.001) / 21)


def test_a_strategy_reaches_the_usage_of_its_chosen_alpha() -> None:
    found = compare_paths(USAGE, ACCURACY, (USAGE[None], ACCURACY[None]), 1)
    assert found["usages"] == [0.7, 0.9]
    assert found["value"] == pytest.approx(20 * -0.001 / 21)
    at_zero = compare_paths(USAGE, ACCURACY, (USAGE[None], ACCURACY[None]), 0)
    assert (at_zero["value"], at_zero["interval"], at_zero["holds"]) == (None, None, None)


def test_a_resampling_has_the_levels_that_it_reaches() -> None:
    """The second comes down to 0.7 only, and the third to no level at all."""
    usage_R = np.stack([USAGE, np.maximum(USAGE, 0.7), np.full_like(USAGE, 0.95)])
    found = compare_paths(USAGE, ACCURACY, (usage_R, np.stack([ACCURACY] * 3)), 3)
    (condition,) = found["conditions"]
    assert condition.resampled[0] == pytest.approx(found["value"])
    # above 0.7 the best of all its settings is allowed, and at 0.9 the unsteered model; below there is none
    assert condition.resampled[1] == pytest.approx(13 * -0.001 / 14)
    assert np.isnan(condition.resampled[2])
    expected = np.quantile(condition.resampled[:2], [0.025, 0.975])
    np.testing.assert_allclose(found["interval"], expected)
    none = compare_paths(USAGE, ACCURACY, (usage_R[2:], ACCURACY[None]), 3)
    assert (none["value"], none["interval"], none["holds"]) == (None, None, None)


def test_every_claim_says_what_it_is_about() -> None:
    config, result = made_sweep(classes=8, heads=6, sublayers=True)
    about = {one["claim"].split()[0]: one["about"] for one in summarise(result, config)[0]["claims"]}
    assert about["suppression"] == about["related"] == "paper"
    assert about["gate_aligned's"] == "further"
    assert about["gate_aligned"] == "compute"


def test_random_subsets_answer_the_images_that_steering_answers() -> None:
    """The lead against loops; and if every subset answers as the steered model does, nothing is left to chance."""
    config, result = made_sweep(classes=6, heads=3, seeds=1, per_class=20, strategies=("class",))
    summary, extra = summarise(result, config)
    found, row = claim(summary, "random head subsets"), summary["steering"]["class"]
    by_size = [
        np.mean([(result.test.table[:, p] == result.test.labels).mean() for p in range(8) if p.bit_count() == size])
        for size in range(4)
    ]
    assert found["value"] == pytest.approx(row["accuracy"] - np.interp(3 * row["usage"], range(4), by_size))
    assert found["interval"][0] < found["value"] < found["interval"][1]
    right_N = per_image(result.test)[0][0, 0, 0, extra["chosen"][0, 0]].astype(bool)
    answers_N = np.where(right_N, result.test.labels, (result.test.labels + 1) % 6)
    table = np.repeat(answers_N[:, None], 8, axis=1).astype(np.int32)
    again, _ = summarise(replace(result, test=replace(result.test, table=table)), config)
    assert claim(again, "random head subsets")["value"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(claim(again, "random head subsets")["interval"], 0, atol=1e-6)


@pytest.mark.parametrize("sublayers", [False, True])
@pytest.mark.parametrize("method", ["class", "gate_aligned", "guessed_difference"])
def test_the_best_fixed_subsets_are_chosen_on_validation(method: str, sublayers: bool) -> None:
    gates = 5 if sublayers else 3
    strategies = ("class", "gate_aligned", "guessed_difference")
    config, result = made_sweep(
        classes=6, heads=gates, seeds=2, per_class=20, sublayers=sublayers, strategies=strategies
    )
    summary, _ = summarise(result, config)
    found, row = claim(summary, f"{method} steering, the best fixed"), summary["steering"][method]
    best = []
    for size in range(gates + 1):
        members = [p for p in range(2**gates) if p.bit_count() == size]
        on_validation = [(result.validation.table[:, p] == result.validation.labels).mean() for p in members]
        best.append((result.test.table[:, members[int(np.argmax(on_validation))]] == result.test.labels).mean())
    assert found["value"] == pytest.approx(row["accuracy"] - np.interp(gates * row["usage"], range(gates + 1), best))
    assert found["about"] == "pruning"
    assert found["holds"] == (found["interval"][0] > 0)


def test_alpha_0_changes_nothing(config: Config, result: SweepResult) -> None:
    """All strategies keep the unsteered gates and answers at every alpha, so that each change is exactly 0."""
    test, heads = result.test, result.test.heads
    shape = test.gates.shape[:4]
    gates = np.broadcast_to(pack_bits(pattern_to_gates(test.pattern, heads).T), test.gates.shape).copy()
    right = np.broadcast_to(pack_bits(test.prediction == test.labels), test.right.shape).copy()
    heads_on = np.broadcast_to(test.unsteered_heads_on, test.heads_on.shape).copy()
    correct = np.broadcast_to(test.unsteered_correct, test.correct.shape).copy()
    assert shape[1] > 1
    same = replace(test, gates=gates, right=right, heads_on=heads_on, correct=correct)
    summary, _ = summarise(replace(result, test=same), config)
    for name in result.strategies:
        assert summary["steering"][name]["usage_change_ci"] == [0, 0]
        assert summary["steering"][name]["accuracy_change_ci"] == [0, 0]
    assert not claim(summary, "suppression")["holds"]


def test_a_strategy_that_never_comes_down_is_not_judged(config: Config, result: SweepResult) -> None:
    g = result.strategies.index("global")
    heads_on = result.test.heads_on.copy()
    heads_on[g] = result.test.unsteered_heads_on
    summary, _ = summarise(replace(result, test=replace(result.test, heads_on=heads_on)), config)
    assert claim(summary, ", global is")["holds"] is None
    assert claim(summary, ", global is")["value"] is None


def test_random_subsets_are_compared_at_the_usage_of_each_resampling() -> None:
    """If an image is right where head 0 runs, random subsets are right as often as their heads run."""
    config, result = made_sweep(classes=6, heads=3, seeds=2, per_class=20, strategies=("class",))
    labels = result.test.labels
    table = np.where(result.subset & 1, labels[:, None], (labels[:, None] + 1) % 6).astype(np.int32)
    result = replace(result, test=replace(result.test, table=table))
    scores = score_settings(result, config, np.random.default_rng([config.seed, 4]))  # as `summarise` draws
    place = (slice(None), 0, 0, scores.chosen[0, 0])
    expected = scores.interval(scores.resampled.accuracy[place] - scores.resampled.usage[place])
    found = claim(summarise(result, config)[0], "random head subsets")
    np.testing.assert_allclose(found["interval"], expected, atol=1e-6)


def test_what_steering_may_cost_on_test_is_a_limit_of_its_own() -> None:
    config, result = made_sweep(classes=6, heads=3, strategies=("class",))

    def judge(allowed: float) -> tuple[dict[str, Any], float]:
        steer = config.steer.model_copy(update={"allowed_loss": allowed, "saving": 0.0, "tolerance": 0.5})
        summary, _ = summarise(result, config.model_copy(update={"steer": steer}))
        return claim(summary, "lowers usage by at least 0 "), summary["steering"]["class"]["accuracy_change_ci"][0]

    found, lowest = judge(0.0)  # steer.tolerance
    assert found["interval"][0] > 0 > lowest > -0.5
    for allowed, holds in ((0.0, True), (1e-4 - lowest, True), (-1e-4 - lowest, False)):
        found, _ = judge(allowed)
        assert found["claim"].endswith(f"within {allowed or 0.5:g} of accuracy")
        assert found["holds"] == holds


def test_suppression_is_judged_at_the_alpha_below_0_that_uses_most_on_validation() -> None:
    config, result = made_sweep(classes=6, heads=3, alphas=(-3.0, -1.0, -0.5, 1.0), strategies=("class",))
    usage = per_image(result.validation)[1][0, :, 0].mean(axis=(0, 2))
    wanted = max(range(3), key=lambda a: usage[a])
    summary, _ = summarise(result, config)
    found = claim(summary, f"suppression (alpha {result.alphas[wanted]:g},")
    after = per_image(result.test)[1][0, :, 0, wanted].mean()
    assert found["value"] == pytest.approx(after - unsteered(result.test)[1].mean())


def test_fronts_compare_the_best_at_or_below_each_usage(config: Config, result: SweepResult) -> None:
    summary, _ = summarise(result, config)
    found = summary["fronts"]
    right, used = per_image(result.test)
    names = result.strategies
    settings = np.flatnonzero(result.alphas >= 0)
    for name in ("class", "gate_aligned"):
        g = names.index(name)
        points = [(used[g, :, 0, a].mean(), right[g, :, 0, a].mean()) for a in settings]
        for level, best in zip(found["usage"], found[name], strict=True):
            assert best == pytest.approx(max(y for x, y in points if x <= level + 1e-6))
    gaps = np.subtract(found["gate_aligned"], found["class"])
    assert found["lowest_difference"] == pytest.approx(gaps[1:].min())
    assert claim(summary, "gate_aligned's front")["value"] == found["lowest_difference"]


def test_the_least_lead_and_its_interval_are_of_the_same_usages(config: Config, result: SweepResult) -> None:
    """If the resamplings are the sweep itself, the interval is the value; at the lowest usage the lead is another."""
    scores = score_settings(result, config, np.random.default_rng(0))
    settings = scores.test.usage.shape[-1] - scores.zero
    usage, accuracy = (np.array(values) for values in scores.test)
    for name, last, rest in (("class", 0.5, 0.5), ("gate_aligned", 0.1, 0.9)):
        g = scores.names.index(name)
        usage[g, 0, scores.zero :] = np.linspace(0.8, 0.2, settings)
        accuracy[g, 0, scores.zero :] = [rest] * (settings - 1) + [last]
    usage[scores.names.index("gate_aligned"), 0, -2] = 0.21  # one setting above the lowest usage it leads again
    curves = Curves(usage, accuracy)
    resampled = Curves(*(np.repeat(values[None], 5, axis=0) for values in curves))
    found = compare_fronts(replace(scores, test=curves, resampled=resampled), 0.8)
    assert found is not None
    gaps = np.subtract(found["gate_aligned"], found["class"])
    assert (gaps[0], gaps[1]) == pytest.approx((-0.4, 0.4))
    assert found["lowest_difference"] == pytest.approx(0.4)
    np.testing.assert_allclose([*found["lowest_difference_ci"], *found["lowest_resampled"]], 0.4)


def test_the_promised_group_is_chosen_on_validation(config: Config, result: SweepResult) -> None:
    summary, extra = summarise(result, config)
    a = int(extra["chosen"][0, 0])
    (right, used), (right_0, used_0) = per_image(result.validation), unsteered(result.validation)
    labels, promised = result.validation.labels, []
    for c in range(8):
        own = labels == c
        falls = used_0[own].mean() - used[0, :, 0, a][:, own].mean() >= config.steer.saving - 1e-9
        if falls and right[0, :, 0, a][:, own].mean() >= right_0[own].mean() - 1e-9:
            promised.append(c)
    group = summary["steering"]["class"]["group"]
    assert group["promised"]["classes"] == len(promised) > 0
    own = np.isin(result.test.labels, promised)
    (right, used), (right_0, used_0) = per_image(result.test), unsteered(result.test)
    assert group["promised"]["usage_change"] == pytest.approx(used[0, :, 0, a][:, own].mean() - used_0[own].mean())
    assert group["promised"]["accuracy_change"] == pytest.approx(right[0, :, 0, a][:, own].mean() - right_0[own].mean())
    gained, lost = (right[0, 0, 0, a] & ~right_0)[own].sum(), (~right[0, 0, 0, a] & right_0)[own].sum()
    assert (group["promised"]["gained"], group["promised"]["lost"]) == (gained, lost)
    rows = [row for row in summary["classes"] if row["saved"] and row["p_usage_adjusted"] < 0.05]
    assert group["saved_significantly"] == len(rows)


def test_related_classes_share_heads_by_jaccard(config: Config, result: SweepResult) -> None:
    summary, extra = summarise(result, config)
    a, labels = int(extra["chosen"][0, 0]), result.test.labels
    gates = unpack_bits(result.test.gates[0, :, 0, a], len(labels))  # [S, H, N]
    on = [set(np.flatnonzero(gates[..., labels == c].mean(axis=(0, 2)) > 0.5).tolist()) for c in range(8)]
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for i, j in itertools.permutations(range(8), 2):
        kinds[bool(result.related[i, j])].append(len(on[i] & on[j]) / len(on[i] | on[j]) if on[i] | on[j] else 1.0)
    found = summary["overlap"]["heads"]["after"]
    assert found["related"] == pytest.approx(np.mean(kinds[True]))
    assert found["unrelated"] == pytest.approx(np.mean(kinds[False]))
    assert claim(summary, "share more heads")["value"] == pytest.approx(found["related"] - found["unrelated"])


def test_related_classes_are_those_that_are_steered() -> None:
    """A class without steered images runs no head, which is not what it shares with others."""
    config, result = made_sweep(classes=10, heads=4, seeds=2, per_class=14, only=7)
    found = summarise(result, config)[0]["overlap"]["heads"]["before"]
    on = [set(np.flatnonzero(shares > 0.5)) for shares in result.test.unsteered_heads_on[:7] / 14]
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for i, j in itertools.permutations(range(7), 2):
        kinds[i // 5 == j // 5].append(len(on[i] & on[j]) / len(on[i] | on[j]))
    assert found["related"] == pytest.approx(np.mean(kinds[True]))
    assert found["unrelated"] == pytest.approx(np.mean(kinds[False]))


def test_fronts_where_steering_never_lowers_usage(config: Config, result: SweepResult) -> None:
    """Whatever is left in common is compared, without NaN; where nothing is, there is no front."""
    gates = result.test.gates.copy()
    gates[:] = pack_bits(pattern_to_gates(result.test.pattern, 4).T)
    heads_on = result.test.heads_on.copy()
    heads_on[:] = result.test.unsteered_heads_on
    summary, _ = summarise(replace(result, test=replace(result.test, gates=gates, heads_on=heads_on)), config)
    json.dumps(summary, allow_nan=False)
    if "fronts" in summary:
        assert np.isfinite(summary["fronts"]["lowest_difference_ci"]).all()


def test_strategies_against_the_best_subset_of_each_class(config: Config, result: SweepResult) -> None:
    """Alphas and subsets alike are chosen on validation."""
    summary, _ = summarise(result, config)
    right = per_image(result.test)[0]
    right_before, used_before = per_image(result.validation)
    rising, labels = np.flatnonzero(result.alphas >= 0), result.test.labels
    compared = 0
    for g, name in enumerate(result.strategies):
        points = [(used_before[g, :, 0, a].mean(), right_before[g, :, 0, a].mean(), a) for a in rising]
        for row in summary["steering"][name]["against_oracle"]:
            size = round(row["usage"] * 4)
            subsets = [p for p in range(16) if bin(p).count("1") == size]
            hits = 0
            for c in range(8):
                held = result.validation.table[result.validation.labels == c]
                best = max(subsets, key=lambda p: ((held[:, p] == c).mean(), -p))
                hits += (result.test.table[labels == c][:, best] == c).sum()
            assert row["oracle"] == pytest.approx(hits / len(labels))
            best_a = max((y, -a) for x, y, a in points if x <= row["usage"] + 1e-6)[1]
            assert row["front"] == pytest.approx(right[g, :, 0, -best_a].mean())
            low, high = row["difference_ci"]
            assert low <= row["front"] - row["oracle"] + 0.05
            assert high >= row["front"] - row["oracle"] - 0.05
            compared += 1
    assert compared > 5


def test_exact_alphas_are_chosen_on_validation_and_scored_on_test(config: Config, result: SweepResult) -> None:
    """Steps of one strategy, made by hand: 10 images of 4 heads."""
    names = result.strategies
    # alpha      ..-1  -1..0  0..1   1..2   2..4   4..
    alpha = np.array([-1.0, 0.5, 1.0, 2.0, 4.0])
    macs = np.array([90.0, 80, 70, 60, 50, 40])
    validation = StepFunction(alpha, np.array([2, 9, 9, 10, 9, 0]), np.array([40, 38, 36, 30, 18, 4]), macs, 10, 4)
    test = StepFunction(alpha, np.array([1, 8, 8, 7, 6, 5]), np.array([40, 37, 35, 31, 19, 5]), macs, 10, 4)
    steps = {"validation": dict.fromkeys(names, validation), "test": dict.fromkeys(names, test)}
    summary, extra = summarise(replace(result, steps=steps), config)
    floor = unsteered(result.validation)[0].mean() - config.steer.tolerance
    assert 0.8 < floor < 1
    found = summary["steering"]["class"]["exact"]
    wanted = 3.0 if floor <= 0.9 else 1.5  # the middle of the interval of lowest usage whose accuracy is high enough
    at = {3.0: (19 / 40, 0.6), 1.5: (31 / 40, 0.7)}[wanted]
    assert (found["alpha"], found["usage"], found["accuracy"]) == (wanted, *at)
    assert found["macs"] == {3.0: 5.0, 1.5: 6.0}[wanted]  # means over 10 images
    assert found["steps"] == 5
    rows = {row["wanted"]: row for row in found["for_usage"]}
    assert rows[0.75]["alpha"] == 1.0
    assert (rows[0.75]["usage"], rows[0.75]["accuracy"]) == (31 / 40, 0.7)
    assert rows[0.5]["alpha"] == 2.0
    assert rows[0.25]["alpha"] == 4.0
    for dense, usage in zip(extra["exact_alphas"], extra["exact_usage"][0], strict=True):
        assert usage == test.usage[np.searchsorted(alpha, dense, side="right")]
    assert extra["exact_alphas"][[0, -1]].tolist() == pytest.approx([result.alphas[0], result.alphas[-1]])


def gate_macs(gates: np.ndarray) -> np.ndarray:
    """MACs of the last layer of a made sweep with 4 heads of width 8, attention and MLP: [..., 6] gates -> [...]."""
    used, keys = 8 * gates[..., :4].sum(axis=-1), 26
    attention = used * 32 * (1 + 2 * keys) + 2 * keys * used + used * 32
    return gates[..., 4] * attention + gates[..., 5] * 2 * 32 * 128 + 32 * 6


def test_multiply_accumulates_of_heads_and_sublayers() -> None:
    """Every figure against loops; alphas are chosen for the fewest MACs, not for the lowest usage."""
    config, result = made_sweep(classes=5, heads=6, seeds=2, per_class=30, sublayers=True)
    summary, arrays = summarise(result, config)
    test, validation, count = result.test, result.validation, len(result.test.labels)
    dense = 4 * 8 * 32 * (1 + 2 * 26) + 2 * 26 * 32 + 32 * 32 + 2 * 32 * 128
    assert summary["last_layer"]["dense_macs"] == dense
    assert summary["last_layer"]["gates"] == ["0", "1", "2", "3", "attention", "mlp"]
    before = gate_macs(pattern_to_gates(test.pattern, 6))
    assert summary["steering"]["unsteered"]["macs"] == pytest.approx(before.mean())
    floor = unsteered(validation)[0].mean() - config.steer.tolerance
    for g, name in enumerate(result.strategies):
        costs = []
        for split in (validation, test):
            gates = np.moveaxis(unpack_bits(split.gates[g, :, BY_LABEL], count), -2, -1)
            costs.append(gate_macs(gates).mean(axis=(0, -1)))
        right = unpack_bits(validation.right[g, :, BY_LABEL], count).mean(axis=(0, -1))
        allowed = np.flatnonzero((right >= floor) & (result.alphas > 0))
        a = allowed[np.argmin(costs[0][allowed])] if len(allowed) else int(np.flatnonzero(result.alphas == 0)[0])
        row = summary["steering"][name]
        assert row["alpha"] == result.alphas[a]
        assert row["macs"] == pytest.approx(costs[1][a])
        assert row["macs_share"] == pytest.approx(costs[1][a] / dense)
        low, high = row["macs_change_ci"]
        assert low <= costs[1][a] - before.mean() <= high
        np.testing.assert_allclose(row["curve"]["macs"], costs[1])
        np.testing.assert_allclose(arrays["macs"][g, BY_LABEL], costs[1])
    g, first = result.strategies.index("class"), test.labels == 0
    entry = next(entry for entry in summary["classes"] if entry["name"] == result.class_names[0])
    assert entry["macs_before"] == pytest.approx(before[first].mean())
    sizes = pattern_to_gates(np.arange(64), 6)
    for size, entry in enumerate(summary["last_layer"]["by_size"]):
        assert len(entry["heads"]) + len(entry["sublayers"]) == size
        assert entry["random_macs"] == pytest.approx(gate_macs(sizes[sizes.sum(axis=1) == size]).mean())
        fixed = [*entry["heads"], *(4 + ("attention", "mlp").index(name) for name in entry["sublayers"])]
        assert entry["macs"] == gate_macs(np.isin(np.arange(6), fixed))


def test_the_claim_of_compute_has_matched_controls() -> None:
    """Random patterns with as many heads and the same sublayers, image by image; the best one that costs no more."""
    config, result = made_sweep(classes=5, heads=6, seeds=2, per_class=30, sublayers=True)
    summary, _ = summarise(result, config)
    claims = [claim for claim in summary["claims"] if "MACs" in claim["claim"]]
    assert [claim["claim"].split()[0] for claim in claims] == ["class", "gate_aligned"]
    test, validation, count = result.test, result.validation, len(result.test.labels)
    patterns, before = pattern_to_gates(np.arange(64), 6), summary["steering"]["unsteered"]
    for claim in claims:
        name = claim["claim"].split()[0]
        row, g = summary["steering"][name], result.strategies.index(name)
        a = int(np.flatnonzero(result.alphas == row["alpha"])[0])
        right = []
        for s in range(2):
            gates = unpack_bits(test.gates[g, s, BY_LABEL, a], count).T
            for n in range(count):
                alike = (patterns[:, :4].sum(axis=1) == gates[n, :4].sum()) & (patterns[:, 4:] == gates[n, 4:]).all(
                    axis=1
                )
                right.append((test.table[n, alike] == test.labels[n]).mean())
        assert claim["random_pattern"] == pytest.approx(np.mean(right))
        affordable = [p for p in range(64) if gate_macs(patterns[p]) <= row["macs"] + 0.5]
        best = max(affordable, key=lambda p: (validation.table[:, p] == validation.labels).mean())
        assert claim["fixed_pattern"] == pytest.approx((test.table[:, best] == test.labels).mean())
        assert claim["value"] == pytest.approx((before["macs"] - row["macs"]) / summary["last_layer"]["dense_macs"])
        low, high = claim["lead_over_random_ci"]
        assert low <= row["accuracy"] - claim["random_pattern"] <= high
        enough = claim["interval"][0] >= 0.15 and row["accuracy_change_ci"][0] >= -config.steer.allowed_loss
        assert claim["holds"] == (enough and low > 0)


def test_the_lead_over_random_patterns_is_uncertain_by_the_autoencoder_too() -> None:
    """One of two autoencoders is always right, the other never: a quarter of the resamplings has one of them alone."""
    config, result = made_sweep(classes=5, heads=6, seeds=2, per_class=30, sublayers=True)
    right = result.test.right.copy()
    right[:, 0], right[:, 1] = 255, 0
    summary, _ = summarise(replace(result, test=replace(result.test, right=right)), config)
    (found,) = [claim for claim in summary["claims"] if claim["claim"].startswith("class steering lowers the layer's")]
    low, high = found["lead_over_random_ci"]
    assert high - low > 0.9


def test_heads_alone_have_no_claim_of_compute(config: Config, result: SweepResult) -> None:
    assert not any("MACs" in claim["claim"] for claim in summarise(result, config)[0]["claims"])
