"""A study's statistics against closed forms, and against simulations of nested and of shared images."""

from dataclasses import replace

import numpy as np
import pytest
from made_run import made_run
from scipy import stats

from headsteer_jax.analysis.study import (
    RunMeasures,
    estimate_error,
    measure_run,
    name_claim,
    pool_seeds,
    summarise_seeds,
)
from headsteer_jax.analysis.sweep_file import name_arrays, to_dataset, to_result
from headsteer_jax.config import Config


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_one_seed_has_the_percentiles_of_its_own_resamplings() -> None:
    resampled = np.random.default_rng(1).normal(0.3, 0.1, (1, 4001))
    pooled = pool_seeds([0.3], resampled, 0.9, rng())
    assert pooled.mean == 0.3
    np.testing.assert_allclose(pooled.interval, np.quantile(resampled, [0.05, 0.95]))
    assert pool_seeds([0.3], None, 0.9, rng()).interval is None  # one number says nothing about others


def test_without_variance_the_interval_is_a_point() -> None:
    for resampled in (np.full((3, 50), 0.1), None):
        pooled = pool_seeds([0.1] * 3, resampled, 0.95, rng())
        assert pooled.interval == [pooled.mean, pooled.mean] == pytest.approx([0.1, 0.1])


def test_many_seeds_without_images_have_students_interval() -> None:
    values = np.random.default_rng(2).standard_normal(40)
    pooled = pool_seeds(values.tolist(), None, 0.95, rng())
    expected = stats.t.interval(0.95, 39, values.mean(), values.std(ddof=1) / np.sqrt(40))
    np.testing.assert_allclose(pooled.interval, expected, atol=0.05)
    assert pool_seeds(values.tolist(), None, 0.95, rng()) == pooled


def test_resamplings_without_a_value_are_left_out() -> None:
    resampled = np.random.default_rng(3).normal(0, 1, (2, 900))
    resampled[0, ::3] = np.nan
    kept = resampled[:, ~np.isnan(resampled[0])]
    assert pool_seeds([0.1, 0.2], resampled, 0.9, rng()) == pool_seeds([0.1, 0.2], kept, 0.9, rng())
    assert pool_seeds([0.1, 0.2], np.full((2, 9), np.nan), 0.9, rng()).interval is None


def test_the_standard_error_adds_what_images_do_to_all_seeds_alike() -> None:
    values, noise = np.array([1.0, 2.0, 4.0]), np.random.default_rng(4).standard_normal((3, 100_000))
    error, freedom = estimate_error(values, 1e-3 * noise)
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(3), rel=1e-3)
    assert freedom == pytest.approx(2, rel=1e-3)
    error, freedom = estimate_error(values, np.repeat(noise[:1], 3, axis=0))
    assert error == pytest.approx(np.sqrt(values.var(ddof=1) / 3 + noise[0].var()), rel=1e-3)
    error, freedom = estimate_error(np.ones(3), 0.2 * noise)  # seeds that agree by chance
    assert error == pytest.approx(0.2 / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    ("seeds", "spread_of"),
    [
        (3, {"seed": 1.0, "sae": 0.2, "own": 1.0, "shared": 0.0}),
        (5, {"seed": 0.2, "sae": 0.2, "own": 2.0, "shared": 2.0}),
    ],
    ids=["nested", "shared images"],
)
def test_intervals_cover_the_true_mean(seeds: int, spread_of: dict[str, float]) -> None:
    autoencoders, images, resamplings, studies = 2, 40, 200, 250
    covered = plain = 0
    for number in range(studies):
        draw = np.random.default_rng([number, 1])
        values = spread_of["seed"] * draw.standard_normal((seeds, 1, 1))
        values = values + spread_of["sae"] * draw.standard_normal((seeds, autoencoders, 1))
        values = values + spread_of["own"] * draw.standard_normal((seeds, 1, images))
        values = values + spread_of["shared"] * draw.standard_normal((1, 1, images))
        taken = draw.multinomial(images, np.full(images, 1 / images), resamplings) / images
        members = draw.multinomial(autoencoders, np.full(autoencoders, 1 / autoencoders), resamplings) / autoencoders
        resampled = np.einsum("tsn,rn,rs->tr", values, taken, members, optimize=True)
        low, high = pool_seeds(values.mean(axis=(1, 2)).tolist(), resampled, 0.95, draw).interval
        covered += low <= 0 <= high
        drawn = draw.integers(0, seeds, (resamplings, seeds))
        low, high = np.quantile(resampled[drawn, np.arange(resamplings)[:, None]].mean(axis=1), [0.025, 0.975])
        plain += low <= 0 <= high
    assert 0.91 <= covered / studies <= 0.99
    if spread_of["shared"] == 0:
        assert plain / studies < 0.88  # percentiles alone are too narrow


@pytest.fixture(scope="module")
def runs() -> tuple[list[RunMeasures], list[dict], Config]:
    """Measure three made-up runs: the second has some answers that the first has not, the third few test images."""
    made = made_run()
    summary, arrays = made["summary"], made["arrays"]
    test = {"dense": 0.9, "gated": 0.91, "dense_control": 0.92, "compute": {"share": 0.6}}
    measured, summaries = [], []
    for seed in (0, 1, 2):
        config = made["config"].model_copy(update={"seed": seed})
        config = config.model_copy(update={"data": config.data.model_copy(update={"seed": 0})})
        claims = [claim | {"holds": claim["holds"] and seed < 2} for claim in summary["claims"]]
        summaries.append(summary | {"claims": claims})
        measured.append(measure_run(config, test | {"gated": 0.91 + 0.01 * seed}, summaries[-1], arrays))
    return measured, summaries, config


def test_a_sweep_survives_its_file() -> None:
    made = made_run()
    result = to_result(made["arrays"])
    again = name_arrays(replace(result))
    for name, values in name_arrays(to_result(again)).items():
        np.testing.assert_array_equal(values, made["arrays"][name])
    assert to_dataset(result, {}).sizes["seed"] == result.test.seeds


def test_metrics_are_the_runs_and_their_resamplings_lie_around_them(runs) -> None:
    measured, summaries, _ = runs
    metrics, steering = measured[0].metrics, summaries[0]["steering"]
    for name in ("class", "gate_aligned", "random"):
        row, guess = steering[name], steering[name]["by_predicted_class"]
        assert metrics[f"{name}.usage"].value == row["usage"]
        assert metrics[f"{name}.classes_saved"].value == row["classes_saved"]
        change = metrics[f"{name}.by_predicted_class.accuracy_change"]
        assert change.value == guess["accuracy"] - steering["unsteered"]["accuracy"]
        for quantity in ("usage", "accuracy"):
            low, high = row[f"{quantity}_change_ci"]
            ends = np.quantile(metrics[f"{name}.{quantity}_change"].resampled, [0.025, 0.975])
            np.testing.assert_allclose(ends, [low, high], atol=0.35 * (high - low) + 1e-6)
    assert metrics["gated_minus_dense_control"].value == pytest.approx(-0.01)
    arrays = made_run()["arrays"]
    for name, pattern in (("all_on", -1), ("all_off", 0)):
        right = arrays["test_table"][:, pattern] == arrays["test_labels"]
        assert metrics[f"{name}.accuracy"].value == pytest.approx(right.mean())
    np.testing.assert_array_equal(metrics["class.usage"].resampled, measured[2].metrics["class.usage"].resampled)


def test_claims_are_counted_and_pooled(runs) -> None:
    measured, summaries, config = runs
    rows = {row["claim"]: row for row in summarise_seeds(measured, config)["claims"]}
    assert list(rows) == [name_claim(claim) for claim in summaries[0]["claims"]]
    assert any(text.startswith("suppression raises usage") for text in rows)
    for claim in summaries[0]["claims"]:
        row = rows[name_claim(claim)]
        assert (row["holds"], row["seeds"]) == (2 * bool(claim["holds"]), 3)
        assert [entry["seed"] for entry in row["by_seed"]] == [0, 1, 2]
        if claim["value"] is not None:
            assert row["value"] == pytest.approx(claim["value"])  # the runs are the same
            low, high = claim["interval"]
            np.testing.assert_allclose(row["interval"], [low, high], atol=0.4 * (high - low) + 1e-6)
    saving = rows[next(text for text in rows if text.startswith("class steering lowers usage"))]
    assert saving["least"] == config.steer.saving
    metrics = {row["metric"]: row for row in summarise_seeds(measured, config)["metrics"]}
    kept = metrics["class.accuracy_change"]["interval"][0] >= -config.steer.allowed_loss
    assert saving["pooled_holds"] == (saving["interval"][0] >= config.steer.saving and kept)


def test_metrics_are_pooled_over_the_runs_that_have_them(runs) -> None:
    measured, _, config = runs
    rows = {row["metric"]: row for row in summarise_seeds(measured, config)["metrics"]}
    gated = rows["gated_accuracy"]
    assert gated["mean"] == pytest.approx(0.92)
    expected = stats.t.interval(0.95, 2, 0.92, 0.01 / np.sqrt(3))
    np.testing.assert_allclose(gated["interval"], expected, atol=0.005)
    assert gated["over"] == "seeds"
    assert rows["class.usage"]["over"] == "seeds, autoencoders and images"
    one = {row["metric"]: row for row in summarise_seeds(measured[:1], config)["metrics"]}
    assert one["gated_accuracy"]["interval"] is None
    assert one["class.usage"]["interval"] is not None
    trained = measure_run(config, {"gated": 0.5}, None, None)
    assert summarise_seeds([trained], config)["claims"] == []
