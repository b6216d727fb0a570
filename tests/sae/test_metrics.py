"""Measures of autoencoders against closed forms and brute force."""

import itertools

import numpy as np
import pytest
import reference
from builders import random_sae

from headsteer_jax.sae import autoencoder as s
from headsteer_jax.sae import metrics as m


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
        found = m.measure_health(sae, scaling, chunks, k)
        np.testing.assert_allclose(found.mse, error / u.size, rtol=1e-6)
        np.testing.assert_allclose(found.mse_residual, 16 * error / u.size, rtol=1e-6)
        wanted = 1 - error / np.sum((u - u.mean(axis=0)) ** 2)
        np.testing.assert_allclose(found.explained_variance, wanted, atol=1e-6)
        np.testing.assert_allclose(found.l0, (z > 0).sum() / len(x), rtol=1e-3)
        np.testing.assert_allclose(found.frequency, (z > 0).mean(axis=0), atol=3e-4)


def test_explained_variance_of_the_mean_predictor_is_0() -> None:
    """Against the vector mean: a scalar mean over all components would have been beaten by it."""
    x = (np.random.default_rng(0).standard_normal((500, 6)) * np.arange(1, 7) + np.arange(6)).astype(np.float32)
    scaling = s.Scaling(x.mean(axis=0), np.float32(1))
    silent = random_sae(0)._replace(W_d=np.zeros((10, 6), np.float32), b_d=np.zeros(6, np.float32))
    assert abs(m.measure_health(silent, scaling, [x], 3).explained_variance) < 1e-6
    off = scaling._replace(mean=np.full(6, x.mean(), np.float32))
    assert m.measure_health(silent, off, [x], 3).explained_variance < -0.1


def test_max_cosines_by_brute_force() -> None:
    W = np.random.default_rng(0).standard_normal((23, 4)) * np.arange(1, 24)[:, None]
    W[5] = 3 * W[17]
    expected = [
        max(W[i] @ W[j] / np.linalg.norm(W[i]) / np.linalg.norm(W[j]) for j in range(23) if j != i) for i in range(23)
    ]
    np.testing.assert_allclose(m.nearest_cosines(W, chunk=7), expected, rtol=1e-6)
    assert m.nearest_cosines(W)[5] == pytest.approx(1)


def test_class_means_and_selectivity() -> None:
    sae, rng = random_sae(2), np.random.default_rng(3)
    x, labels = rng.standard_normal((300, 6)).astype(np.float32), rng.integers(0, 4, 300)
    scaling = s.Scaling(np.zeros(6, np.float32), np.float32(1))
    z = s.encode_all(sae, scaling, x, 3)
    means = m.mean_activation_by_class(sae, scaling, x, labels, 5, 3)
    np.testing.assert_allclose(means[:4], [z[labels == c].mean(axis=0) for c in range(4)], rtol=1e-5, atol=1e-7)
    assert not means[4].any()  # a class without images
    # one class only: 1; all alike: 0; twice as strong on one of three: (2 - 1) / (2 + 1); silent: 0
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


def test_stability_says_beside_what() -> None:
    rng = np.random.default_rng(7)
    A = rng.standard_normal((40, 30))
    found = m.compare_seeds([A, A[::-1], rng.standard_normal((40, 30))], [A + 0.01 * rng.standard_normal(A.shape)])
    assert found["same_start"] > 0.99
    assert found["random"] < 0.6
    assert found["random"] < found["seeds"] < 0.9  # one pair of three is the same
    assert m.compare_seeds([A], []) == {"seeds": None, "same_start": None, "random": found["random"]}
