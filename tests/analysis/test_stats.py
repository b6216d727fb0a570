"""Statistics against scipy, statistics by hand, and what can be worked out in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from headsteer_jax.analysis.stats import (
    LabelledTable,
    accuracy_front,
    adjust_p_values,
    bootstrap_means,
    bootstrap_weights,
    choose_alpha,
    fixed_subset_controls,
    mcnemar_p,
    percentile_interval,
    wilcoxon_fewer,
)
from headsteer_jax.steer.tally import class_counts


def test_counts_that_no_resampling_changes_stay_exact() -> None:
    """Each class has one count; float32 quotients would lie beside the mean and miss a bound that equals it."""
    labels, rng = np.repeat(np.arange(7), 11), np.random.default_rng(3)
    counts = rng.integers(0, 7, 7)[labels].astype(np.uint8)
    found = bootstrap_means(lambda _: counts, 1, bootstrap_weights(labels, 20, rng), rng)
    np.testing.assert_array_equal(found, counts.mean())


def test_autoencoders_that_agree_have_the_mean_of_one() -> None:
    """Sums of thirds would lie beside it, and a change of nothing would not be 0."""
    rng = np.random.default_rng(5)
    counts, weights = rng.integers(0, 7, 77).astype(np.uint8), bootstrap_weights(np.zeros(77, int), 200, rng)
    np.testing.assert_array_equal(
        bootstrap_means(lambda _: counts, 3, weights, rng), weights.astype(float) @ counts / 77
    )


def test_an_accuracy_on_the_floor_keeps_it() -> None:
    accuracy = np.array([0.7, (0.7 + 0.7 + 0.7) / 3])
    assert accuracy[1] < 0.7
    assert choose_alpha(np.array([0.0, 1.0]), np.array([0.9, 0.5]), accuracy, 0.7) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_class_counts(images: list[tuple[int, bool]]) -> None:
    """Also of classes without images."""
    labels, values = np.array([label for label, _ in images]), np.array([value for _, value in images])
    for shape in ((), (2, 3)):
        found = class_counts(np.broadcast_to(values, (*shape, len(values))), labels, 6)
        wanted = [sum(value for label, value in images if label == c) for c in range(6)]
        np.testing.assert_array_equal(found, np.broadcast_to(wanted, (*shape, 6)))
        assert found.dtype == np.int64


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_an_exact_binomial_test(gained: int, lost: int) -> None:
    wanted = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar_p(np.array(gained), np.array(lost)) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_benjamini_hochberg_by_its_definition(values: list[float]) -> None:
    """The adjusted p-value of rank i is the least p_j m / j over ranks j >= i."""
    p = np.array(values)
    order = np.argsort(p, kind="stable")
    wanted = np.empty(len(p))
    for rank, place in enumerate(order):
        later = [min(p[order[j]] * len(p) / (j + 1), 1.0) for j in range(rank, len(p))]
        wanted[place] = min(later)
    np.testing.assert_allclose(adjust_p_values(p), wanted, atol=1e-12)


def test_bootstrap_draws_within_classes() -> None:
    labels = np.array([0] * 10 + [1] * 40 + [3] * 3)
    weights = bootstrap_weights(labels, 200, np.random.default_rng(0))
    for label, size in ((0, 10), (1, 40), (3, 3)):
        np.testing.assert_array_equal(weights[:, labels == label].sum(axis=1), size)
    assert (weights == np.round(weights)).all()
    assert len(np.unique(weights[:, 0])) > 2


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    """Of 2,000 coin throws: mean +- 1.96 standard errors, to the bootstrap's own noise."""
    rng = np.random.default_rng(1)
    values = rng.random(2000) < 0.3
    weights = bootstrap_weights(np.zeros(2000, np.int64), 4000, rng)
    low, high = percentile_interval(bootstrap_means(lambda _: values, 1, weights, rng), 0.95)
    error = np.sqrt(values.mean() * (1 - values.mean()) / 2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_over_seeds_has_their_variance() -> None:
    """Seeds that differ and images that do not: the standard error is that of a mean of S draws with replacement."""
    seeds = np.array([0.1, 0.2, 0.6])
    values = np.repeat(seeds[:, None, None], 50, axis=2)  # [S, 1, N]
    rng = np.random.default_rng(2)
    weights = bootstrap_weights(np.zeros(50, np.int64), 20_000, rng)
    found = bootstrap_means(values.__getitem__, 3, weights, rng)
    assert found.shape == (20_000, 1)
    assert found.mean() == pytest.approx(seeds.mean(), abs=0.005)
    assert found.std() == pytest.approx(seeds.std() / np.sqrt(3), rel=0.02)


def test_settings_share_the_resampled_images() -> None:
    """A difference between two settings is paired: of equal settings it is exactly 0."""
    rng = np.random.default_rng(3)
    values = np.repeat((rng.random((2, 1, 30)) < 0.5), 2, axis=1)  # [S, two equal settings, N]
    found = bootstrap_means(values.__getitem__, 2, bootstrap_weights(np.arange(30) % 3, 100, rng), rng)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    assert found.std() > 0.02


def test_interval() -> None:
    low, high = percentile_interval(np.arange(1001)[:, None] * np.array([1.0, 2.0]), 0.9)
    np.testing.assert_allclose([low, high], [[50, 100], [950, 1900]])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_choose_alpha_by_hand(data: st.DataObject) -> None:
    alphas = np.array([-1.0, 0.0, 0.5, 1.0, 2.0])
    number = st.lists(st.integers(0, 10), min_size=5, max_size=5)
    usage, accuracy = np.array(data.draw(number)) / 10, np.array(data.draw(number)) / 10
    floor = data.draw(st.integers(0, 10)) / 10
    best = 1
    for a in (2, 3, 4):
        if accuracy[a] >= floor and (best == 1 or usage[a] < usage[best]):
            best = a
    assert choose_alpha(alphas, usage, accuracy, floor) == best
    two = choose_alpha(alphas, np.stack([usage, usage], 1), np.stack([accuracy, accuracy], 1), np.array([floor, 2.0]))
    assert two.tolist() == [best, 1]


def brute_controls(
    tables: dict, labels: dict, gated: np.ndarray, classes: int, heads: int, related: np.ndarray
) -> dict:
    """Every subset, class by class, in loops."""
    sizes = [bin(p).count("1") for p in range(2**heads)]

    def right(split: str, p: int, c: int | None) -> float:
        hits = [t[p] == y for t, y in zip(tables[split], labels[split], strict=True) if c is None or y == c]
        return sum(hits) / len(hits)

    n = len(labels["test"])
    share = [list(labels["test"]).count(c) / n for c in range(classes)]
    by_size = []
    for size in range(heads + 1):
        members = [p for p in range(2**heads) if sizes[p] == size]
        fixed = max(members, key=lambda p: (right("validation", p, None), -p))
        best = [max(members, key=lambda p: (right("validation", p, c), -p)) for c in range(classes)]

        def of_family(p: int, c: int) -> int:
            family = [d for d in range(classes) if d == c or related[c, d]]
            answers = zip(tables["validation"], labels["validation"], strict=True)
            return sum(t[p] == y for t, y in answers if y in family)

        shared = [max(members, key=lambda p: (of_family(p, c), -p)) for c in range(classes)]
        any_right = [any(t[p] == y for p in members) for t, y in zip(tables["test"], labels["test"], strict=True)]
        by_size.append(
            {
                "usage": size / heads,
                "fixed": right("test", fixed, None),
                "heads": [h for h in range(heads) if fixed >> h & 1],
                "random": np.mean([right("test", p, None) for p in members]),
                "oracle": sum(share[c] * right("test", best[c], c) for c in range(classes)),
                "superclass": sum(share[c] * right("test", shared[c], c) for c in range(classes)),
                "image": np.mean(any_right),
            }
        )
    oracle = []
    for c in range(classes):
        own = [g == y for g, y in zip(gated, labels["validation"], strict=True) if y == c]
        keeps = [p for p in range(2**heads) if right("validation", p, c) >= sum(own) / len(own)]
        oracle.append(min(keeps, key=lambda p: (sizes[p], -right("validation", p, c), p)) if keeps else 2**heads - 1)
    return {
        "all_on": right("test", 2**heads - 1, None),
        "all_off": right("test", 0, None),
        "by_size": by_size,
        "usage": sum(share[c] * sizes[p] for c, p in enumerate(oracle)) / heads,
        "accuracy": sum(share[c] * right("test", p, c) for c, p in enumerate(oracle)),
        "patterns": oracle,
    }


@pytest.mark.parametrize("seed", range(4))
def test_controls_by_trying_every_subset(seed: int) -> None:
    heads, classes, rng = 3, 4, np.random.default_rng(seed)
    labels = {name: np.arange(count) % classes for name, count in (("validation", 22), ("test", 37))}
    tables = {
        name: np.where(
            rng.random((len(y), 2**heads)) < np.linspace(0.4, 0.8, 2**heads), y[:, None], (y[:, None] + 1) % 4
        )
        for name, y in labels.items()
    }
    gated = tables["validation"][np.arange(22), rng.integers(0, 2**heads, 22)]
    related = np.arange(classes)[:, None] // 2 == np.arange(classes) // 2
    related &= ~np.eye(classes, dtype=bool)
    validation_table, test_table = (LabelledTable(tables[name], labels[name]) for name in ("validation", "test"))
    found = fixed_subset_controls(validation_table, test_table, gated, np.arange(2**heads), classes, heads, related)
    wanted = brute_controls(tables, labels, gated, classes, heads, related)
    assert found["all_on"] == pytest.approx(wanted["all_on"])
    assert found["all_off"] == pytest.approx(wanted["all_off"])
    for ours, theirs in zip(found["by_size"], wanted["by_size"], strict=True):
        assert ours.pop("heads") == theirs.pop("heads")
        assert ours == pytest.approx(theirs)
    assert found["class_patterns"].tolist() == wanted["patterns"]
    assert found["oracle"]["usage"] == pytest.approx(wanted["usage"])
    assert found["oracle"]["accuracy"] == pytest.approx(wanted["accuracy"])
    validation = (tables["validation"] == labels["validation"][:, None]).mean(axis=0)
    best = int(np.argmax(validation))
    assert found["best_fixed"]["heads"] == [h for h in range(heads) if best >> h & 1]
    assert found["best_fixed"]["accuracy"] == pytest.approx((tables["test"][:, best] == labels["test"]).mean())


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_front_is_the_best_at_or_below_each_usage(seed: int) -> None:
    rng = np.random.default_rng(seed)
    usage, accuracy = rng.random((3, 8)), rng.random((3, 8))
    levels = np.append(rng.random(5), usage[0, 0])
    found = accuracy_front(usage, accuracy, levels)
    for row, (u, a) in enumerate(zip(usage, accuracy, strict=True)):
        for i, level in enumerate(levels):
            allowed = [float(x) for x, y in zip(a, u, strict=True) if y <= level]
            assert found[row, i] == max(allowed) if allowed else np.isnan(found[row, i])


def test_fewer_is_one_sided() -> None:
    before = np.array([4, 5, 3, 6, 5, 4, 2, 5])
    assert wilcoxon_fewer(before, before) == 1
    # all eight fall: of 2^8 ways to sign the differences one is as extreme
    assert wilcoxon_fewer(before, before - np.array([1, 2, 3, 4, 5, 6, 7, 8]) / 4) == pytest.approx(1 / 256)
    assert wilcoxon_fewer(before, before + 1) > 0.9
