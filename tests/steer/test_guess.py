"""The guess of a class: its temperature against a fine search, and mixtures against loops."""

import numpy as np
import pytest

from headsteer_jax.steer.guess import Guess, fit_guess, fit_temperature, keep_most_probable


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    scaled = logits / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(labels)), labels]))


@pytest.mark.parametrize("too_sure", [0.25, 1.0, 40.0])
def test_the_temperature_undoes_a_scale_of_the_logits(too_sure: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3000, 5))
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (chance.cumsum(axis=1) < rng.random((3000, 1))).sum(axis=1)
    found = fit_temperature(logits * too_sure, labels)
    assert found == pytest.approx(too_sure, rel=0.1)
    tried = np.geomspace(0.5, 2, 401) * too_sure
    best = tried[np.argmin([cross_entropy(logits * too_sure, labels, t) for t in tried])]
    assert found == pytest.approx(best, rel=0.005)


def test_probabilities_are_softmax_over_the_temperature_of_the_images_that_are_left() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 1, (3, 6))
    labels = np.arange(90) % 3
    x = (centres[labels] + rng.normal(0, 1, (90, 6))).astype(np.float32)
    guess = fit_guess((x[:60], labels[:60]), (x[60:], labels[60:]))
    np.testing.assert_allclose(guess.logits, x[60:].astype(float) @ guess.weights.T + guess.bias)
    left_out = np.arange(30) < 11
    part = guess.without(left_out)
    assert part.labels.tolist() == labels[71:].tolist()
    scaled = guess.logits / fit_temperature(guess.logits[11:], labels[71:])
    wanted = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(part.probabilities(x[60:]), wanted, rtol=1e-6)
    assert isinstance(part, Guess)


def test_the_most_probable_classes_share_the_whole() -> None:
    probability = np.random.default_rng(2).dirichlet(np.ones(5), 8)
    for count in (1, 2, 4):
        for row, kept in zip(probability, keep_most_probable(probability, count), strict=True):
            largest = sorted(range(5), key=lambda c, row=row: -row[c])[:count]
            total = sum(row[c] for c in largest)
            np.testing.assert_allclose(kept, [row[c] / total if c in largest else 0 for c in range(5)])
    for everything in (0, 5, 9):
        np.testing.assert_array_equal(keep_most_probable(probability, everything), probability)
