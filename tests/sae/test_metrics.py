"""Measures of autoencoders against closed forms and brute force."""

import itertools

import numpy as np
import pytest
import reference
from builders import random_sae

from headsteer_jax.config import SAEConfig
from headsteer_jax.sae import autoencoder as s
from headsteer_jax.sae import metrics as m
from headsteer_jax.sae.residuals import LabelledResiduals, ResidualsInMemory


@pytest.mark.parametrize("k", [3, None])
def test_health_is_that_of_the_whole_split_in_float64(k: int | None) -> None:
    sae = random_sae(0)._replace(threshold=np.full(10, 0.3, np.float32))
    x = (5 + 2 * np.random.default_rng(1).standard_normal((9000, 6)) * np.arange(1, 7)).astype(np.float32)
    scaling = s.Scaling(np.full(6, 4.0, np.float32), np.float32(0.25))
    exact = s.SAEWeights(*(np.asarray(a, np.float64) for a in sae))
    u = (x.astype(np.float64) - 4.0) * 0.25
    z = np.stack([reference.encode(exact, row, k) for row in u])
    error = np.sum((u - (z @ exact.W_d + exact.b_d)) ** 2)
    for chunks in ([x], np.array_split(x, 7), [x[:1], x[1:]]):
        health = m.measure_health(s.Autoencoder(sae, scaling, k), chunks)
        np.testing.assert_allclose(health.mse, error / u.size, rtol=1e-6)
        np.testing.assert_allclose(health.mse_residual, 16 * error / u.size, rtol=1e-6)
        explained = 1 - error / np.sum((u - u.mean(axis=0)) ** 2)
        np.testing.assert_allclose(health.explained_variance, explained, atol=1e-6)
        np.testing.assert_allclose(health.l0, (z > 0).sum() / len(x), rtol=1e-3)
        np.testing.assert_allclose(health.frequency, (z > 0).mean(axis=0), atol=3e-4)


def test_explained_variance_of_the_mean_predictor_is_0() -> None:
    """Against the vector mean: a scalar mean over all components would have been beaten by it."""
    x = (np.random.default_rng(0).standard_normal((500, 6)) * np.arange(1, 7) + np.arange(6)).astype(np.float32)
    scaling = s.Scaling(x.mean(axis=0), np.float32(1))
    silent = random_sae(0)._replace(W_d=np.zeros((10, 6), np.float32), b_d=np.zeros(6, np.float32))
    assert abs(m.measure_health(s.Autoencoder(silent, scaling, 3), [x]).explained_variance) < 1e-6
    off = scaling._replace(mean=np.full(6, x.mean(), np.float32))
    assert m.measure_health(s.Autoencoder(silent, off, 3), [x]).explained_variance < -0.1


def test_max_cosines_by_brute_force() -> None:
    W = np.random.default_rng(0).standard_normal((23, 4)) * np.arange(1, 24)[:, None]
    W[5] = 3 * W[17]
    expected = [
        max(W[i] @ W[j] / np.linalg.norm(W[i]) / np.linalg.norm(W[j]) for j in range(23) if j != i) for i in range(23)
    ]
    np.testing.assert_allclose(m.nearest_cosines(W, chunk=7), expected, rtol=1e-6)
    assert m.nearest_cosines(W)[5] == pytest.approx(1)


def test_class_means_and_selectivity() -> None:
    rng = np.random.default_rng(3)
    x, labels = rng.standard_normal((300, 6)).astype(np.float32), rng.integers(0, 4, 300)
    scaling = s.Scaling(np.zeros(6, np.float32), np.float32(1))
    sae = s.Autoencoder(random_sae(2), scaling, 3)
    z = s.encode_split(sae, x)
    means = m.mean_activation_by_class(sae, x, labels, 5)
    np.testing.assert_allclose(means[:4], [z[labels == c].mean(axis=0) for c in range(4)], rtol=1e-5, atol=1e-7)
    assert not means[4].any()  # a class without images
    # one class only: 1; all equally: 0; twice as strong on one of three: (2 - 1) / (2 + 1); silent: 0
    chosen = m.class_selectivity(np.array([[3.0, 1, 2, 0], [0, 1, 1, 0], [0, 1, 1, 0]]))
    np.testing.assert_allclose(chosen, [1, 0, 1 / 3, 0])


def test_matched_cosine_is_the_best_permutation() -> None:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((5, 3)), rng.standard_normal((6, 3))
    unit = [W / np.linalg.norm(W, axis=1, keepdims=True) for W in (A, B)]
    cosines = unit[0] @ unit[1].T
    best = max(np.mean([cosines[i, j] for i, j in enumerate(order)]) for order in itertools.permutations(range(6), 5))
    assert m.match_decoders(A, B) == pytest.approx(best)
    assert m.match_decoders(A, 2 * A[[3, 1, 0, 4, 2]]) == pytest.approx(1)
    assert np.isnan(m.match_decoders(A, B[:0]))


def test_seeds_are_compared_with_a_control_and_with_chance() -> None:
    rng = np.random.default_rng(7)
    A = rng.standard_normal((40, 30))
    result = m.compare_seeds([A, A[::-1], rng.standard_normal((40, 30))], [A + 0.01 * rng.standard_normal(A.shape)])
    assert result["same_start"] > 0.99
    assert result["random"] < 0.6
    assert result["random"] < result["seeds"] < 0.9  # one pair of three is the same
    assert m.compare_seeds([A], []) == {"seeds": None, "same_start": None, "random": result["random"]}


def test_measures_of_several_seeds_and_their_control() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((200, 6)).astype(np.float32), rng.integers(0, 4, 200)
    scaling, weights = s.Scaling(np.zeros(6, np.float32), np.float32(1)), [random_sae(seed) for seed in (0, 1, 0)]
    members = s.Autoencoder(s.SAEWeights(*(np.stack(leaves) for leaves in zip(*weights, strict=True))), scaling, 3)  # type: ignore[arg-type]
    train, test = ResidualsInMemory(x[:150]), ResidualsInMemory(x[150:])
    labelled, c = LabelledResiduals(train, "cls", x[:150], labels[:150], 4), SAEConfig(seeds=2)
    health = m.measure_autoencoders(members, c, labelled, test, {"accuracy": np.array([0.5, 1.0])})
    assert [row["accuracy"] for row in health["seeds"]] == [0.5, 1.0]
    for seed, row in enumerate(health["seeds"]):
        on_test = m.measure_health(members.member(seed), [x[150:]])
        on_train = m.measure_health(members.member(seed), [x[:150]])
        assert (row["mse"], row["l0"]) == (on_test.mse, on_test.l0)
        assert row["dead_fraction"] == np.mean(on_train.frequency == 0)
    for name in health["seeds"][0]:
        assert health[name] == np.mean([row[name] for row in health["seeds"]])
    assert health["stability"]["same_start"] == pytest.approx(1)  # this control is the first seed
    assert "frequency" not in health
