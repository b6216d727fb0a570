"""A study's statistics against closed forms, and against simulations of nested and of shared images."""

from dataclasses import replace

import numpy as np
import pytest
from made_run import made_run
from scipy import stats

from headsteer_jax.analysis.study import (
    Measure,
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


@pytest.mark.parametrize("seeds", [2, 3, 5, 40])
def test_seeds_without_images_have_students_interval(seeds: int) -> None:
    values = np.random.default_rng(2).standard_normal(seeds)
    pooled = pool_seeds(values.tolist(), None, 0.95, rng())
    expected = stats.t.interval(0.95, seeds - 1, values.mean(), values.std(ddof=1) / np.sqrt(seeds))
    np.testing.assert_allclose(pooled.interval, expected)
    assert pool_seeds([0, 1], None, 0.95, rng()).interval == pytest.approx([-5.853, 6.853], abs=1e-3)


def test_two_seeds_have_students_interval_about_their_resamplings() -> None:
    """The images move both seeds alike, by 0.1 on average; t is 12.7 for the variance between seeds alone."""
    values = np.array([0.2, 0.8])
    moved = np.random.default_rng(5).normal(0.1, 1e-4, 20_000)
    low, high = pool_seeds(values.tolist(), values[:, None] + moved, 0.95, rng()).interval
    np.testing.assert_allclose([low, high], stats.t.interval(0.95, 1, 0.6, 0.3), atol=1e-3)
    moved = np.random.default_rng(5).normal(0.1, 10.0, 20_000)  # the images decide, and have as many degrees of freedom
    low, high = pool_seeds(values.tolist(), values[:, None] + moved, 0.95, rng()).interval
    assert (high - low) / 2 == pytest.approx(stats.norm.ppf(0.975) * moved.std(), rel=0.01)


@pytest.mark.parametrize("seeds", [3, 5])
def test_scaled_percentiles_of_normal_seeds_are_students(seeds: int) -> None:
    """Evenly spaced seeds, and images that add nothing: only the ends of the bootstrap differ from Student's."""
    values = np.linspace(-1, 1, seeds)
    resampled = np.repeat(values[:, None], 20_000, axis=1)
    low, high = pool_seeds(values.tolist(), resampled, 0.95, rng()).interval
    expected = stats.t.interval(0.95, seeds - 1, 0, values.std(ddof=1) / np.sqrt(seeds))
    np.testing.assert_allclose([low, high], expected, rtol=0.15)


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
        (2, {"seed": 1.0, "sae": 0.2, "own": 1.0, "shared": 0.0}),
        (3, {"seed": 1.0, "sae": 0.2, "own": 1.0, "shared": 0.0}),
        (5, {"seed": 0.2, "sae": 0.2, "own": 2.0, "shared": 2.0}),
    ],
    ids=["two seeds", "nested", "shared images"],
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
        each = np.full(autoencoders, 1 / autoencoders)
        members = draw.multinomial(autoencoders, each, (seeds, resamplings)) / autoencoders  # those of each run
        resampled = np.einsum("tsn,rn,trs->tr", values, taken, members, optimize=True)
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


def test_images_are_drawn_alike_for_all_runs_and_autoencoders_for_each(runs) -> None:
    """Autoencoder 0 of every run is always right with all gates open, the others never: images do not matter."""
    made, (_, summaries, config) = made_run(), runs
    arrays = {name: np.array(values) for name, values in made["arrays"].items()}
    for name in ("test_right", "test_gates", "test_macs"):
        arrays[name][:, 1:] = 0
    arrays["test_right"][:, 0], arrays["test_gates"][:, 0] = 255, 255
    rows = [summaries[0]["sae"] | {"explained_variance": float(s == 0)} for s in range(3)]
    summary = summaries[0] | {"sae": summaries[0]["sae"] | {"seeds": rows, "explained_variance": 1 / 3}}
    del summary["claims"]
    steer, count = config.steer.model_copy(update={"bootstrap": 4000}), 4
    measured = [
        measure_run(config.model_copy(update={"seed": seed, "steer": steer}), {}, summary, arrays)
        for seed in range(count)
    ]
    for run in measured[1:]:
        for name in ("unsteered.usage", "unsteered.accuracy", "all_on.accuracy"):  # images alone
            np.testing.assert_array_equal(run.metrics[name].resampled, measured[0].metrics[name].resampled)
    variance = 1 / 3 * (1 - 1 / 3) / 3  # of the share of three draws that take one autoencoder of three
    for name in ("class.usage", "random.accuracy", "explained_variance"):
        resampled = np.stack([run.metrics[name].resampled for run in measured])
        assert set(np.round(3 * resampled, 5).ravel()) == {0, 1, 2, 3}
        correlation = np.corrcoef(resampled)[~np.eye(count, dtype=bool)]
        np.testing.assert_allclose(correlation, 0, atol=4 / np.sqrt(4000))
        error, _ = estimate_error(np.full(count, 1 / 3), resampled)
        assert error == pytest.approx(np.sqrt(variance / count), rel=0.06)  # shared draws would give sqrt(variance)
    pooled = {row["metric"]: row for row in summarise_seeds(measured, config)["metrics"]}
    half = stats.t.ppf(0.975, count - 1) * np.sqrt(variance / count)
    row = pooled["explained_variance"]
    np.testing.assert_allclose(row["interval"], [1 / 3 - half, 1 / 3 + half], atol=0.15 * half)
    assert (row["over"], pooled["class.usage"]["over"]) == ("seeds and autoencoders", "seeds, autoencoders and images")


def test_a_single_autoencoder_is_a_number_only(runs) -> None:
    _, summaries, config = runs
    sae = summaries[0]["sae"]
    summary = summaries[0] | {"sae": sae | {"seeds": sae["seeds"][:1]}}
    metrics = measure_run(config, {}, summary, made_run()["arrays"]).metrics
    assert metrics["gate_agreement"] == Measure(sae["gate_agreement"], None, "seeds")


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
            (low, high), (least, most) = claim["interval"], row["interval"]
            assert least <= row["value"] <= most
            assert 0.4 * (high - low) <= most - least <= 2.5 * (high - low) + 1e-6  # autoencoders are drawn for each
            assert abs(least + most - low - high) / 2 <= 0.5 * (high - low) + 1e-6
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
