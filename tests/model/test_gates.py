"""The decision network, the straight-through gradient, the usage loss and the annealing, against closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from headsteer_jax.config import GateConfig
from headsteer_jax.model import gates


def test_threshold_is_strict():
    chex.assert_trees_all_equal(gates.threshold(jnp.array([-1.0, 0.0, 1e-30])), jnp.array([0.0, 0.0, 1.0]))


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([0.5, 1.0, 5.0]))
def test_straight_through(m, noise, temperature):
    """Forward 1[sigmoid((m + noise) / tau) > 1/2]; backward sigmoid' / tau."""
    m, noise = np.float32(m), np.float32(noise)
    assume(m + noise == 0 or abs(m + noise) > 1e-30)  # XLA takes subnormal numbers for 0
    value, slope = jax.value_and_grad(gates.straight_through)(m, noise, temperature)
    s = 1 / (1 + np.exp(-(np.float64(m) + noise) / temperature))
    assert float(value) == (m + noise > 0)
    np.testing.assert_allclose(slope, s * (1 - s) / temperature, rtol=1e-5, atol=1e-6)  # float32's 1 - s


def test_sampling_frequency_is_the_sigmoid():
    """With standard logistic noise a head is kept with probability sigmoid(m)."""
    m = jnp.array([-1.0, 0.0, 1.1])
    noise = gates.logistic_noise(jax.random.key(0), (200_000, 3))
    kept = np.asarray(gates.straight_through(m, noise, 1.0) > 0.5).mean(axis=0)
    p = 1 / (1 + np.exp(-np.asarray(m, float)))
    assert np.all(np.abs(kept - p) < 4 * np.sqrt(p * (1 - p) / 200_000))


@pytest.mark.parametrize("scope", ["layer", "mean"])
@pytest.mark.parametrize("loss", ["absolute", "squared"])
def test_usage_loss(scope, loss):
    g = np.random.default_rng(0).integers(0, 2, (5, 3, 4)).astype(np.float32)
    config = GateConfig(scope=scope, loss=loss)
    means = [g[:, layer].mean() for layer in range(3)] if scope == "layer" else [g.mean()]
    expected = np.mean([abs(u - 0.6) if loss == "absolute" else (u - 0.6) ** 2 for u in means])
    np.testing.assert_allclose(gates.usage_loss(g, 0.6, config), expected, rtol=1e-5)


def test_layer_scope_sees_what_the_mean_hides():
    g = jnp.stack([jnp.ones((2, 3)), jnp.zeros((2, 3))], axis=1)  # one layer full, one empty
    assert gates.usage_loss(g, 0.5, GateConfig(scope="mean")) == 0
    assert gates.usage_loss(g, 0.5, GateConfig(scope="layer")) == 0.5


@pytest.mark.parametrize(
    ("progress", "noise", "target"), [(0.0, 2.0, 1.0), (0.25, 1.0, 0.9), (0.5, 0.0, 0.8), (1.0, 0.0, 0.8)]
)
def test_annealing(progress, noise, target):
    config = GateConfig(noise=2.0, anneal=0.5)
    annealed = gates.anneal_noise(config, progress), gates.anneal_target(config, progress, 0.8)
    chex.assert_trees_all_close(annealed, (noise, target), atol=1e-6)


def test_no_annealing_means_settled_from_the_start():
    config = GateConfig(anneal=0.0)
    annealed = gates.anneal_noise(config, 0.0), gates.anneal_target(config, 0.0, 0.7)
    chex.assert_trees_all_close(annealed, (0.0, 0.7), atol=1e-7)


def test_softmax_of_kept_keys():
    """It is scipy's softmax over the kept keys alone, whatever the dropped ones hold."""
    rng = np.random.default_rng(0)
    scores, keep = rng.normal(0, 3, (4, 2, 5, 6)).astype(np.float32), (rng.random((4, 6)) < 0.5).astype(np.float32)
    keep[:, 0] = 1
    scores[..., 5] = np.where(keep[:, None, None, 5] == 0, 1e30, scores[..., 5])
    found = np.asarray(jax.jit(gates.mask_softmax)(scores, keep))
    for i in range(4):
        kept = keep[i] > 0
        np.testing.assert_allclose(found[i][..., kept], softmax(scores[i][..., kept].astype(float), axis=-1), atol=1e-6)
        assert not found[i][..., ~kept].any()


def test_gradient_of_a_dropped_key():
    """Its weight would grow as exp of its score, cut to the largest kept one, divided by the sum of the kept ones."""
    scores = jnp.array([[[[0.0, 1.0, 0.5, 9.0]]]])
    keep = jnp.array([[1.0, 1.0, 0.0, 0.0]])
    slope = jax.jacobian(lambda keep: gates.mask_softmax(scores, keep)[0, 0, 0])(keep)[:, 0]
    total = 1 + np.e
    np.testing.assert_allclose([slope[2, 2], slope[3, 3]], [np.exp(0.5) / total, np.e / total], rtol=1e-6)
    np.testing.assert_allclose(slope.sum(axis=0), 0, atol=1e-6)  # weights still sum to 1
    by_score = jax.jacobian(lambda s: gates.mask_softmax(s, keep)[0, 0, 0])(scores)[:, 0, 0, 0]
    p = np.array([1, np.e, 0, 0]) / total
    np.testing.assert_allclose(by_score, np.diag(p) - np.outer(p, p), atol=1e-6)


def test_gate_starts_open():
    gate = gates.Gate(6, GateConfig(bias=2.0).settings("heads"), False, 1e-6)
    x = jax.random.normal(jax.random.key(1), (50, 96))
    m, _ = gate.init_with_output(jax.random.key(0), x)
    assert m.shape == (50, 6)
    assert m.min() > 0
