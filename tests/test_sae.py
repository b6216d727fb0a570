"""The autoencoder: equations against float64, AuxK's gradient by hand, training, its measures."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from headsteer_jax import sae as s
from headsteer_jax.config import HeadSteerError


def random_sae(seed: int, D: int = 6, F: int = 10) -> s.SAE:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((F, D))
    return s.SAE(
        *(
            jnp.asarray(a, jnp.float32)
            for a in (
                rng.standard_normal((D, F)),
                rng.standard_normal(F) * 0.1,
                rows / np.linalg.norm(rows, axis=1, keepdims=True),
                rng.standard_normal(D) * 0.1,
            )
        )
    )


@given(st.integers(0, 1000), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_encode_and_decode(seed, k):
    sae, u = random_sae(seed), np.random.default_rng(seed + 1).standard_normal((4, 6)).astype(np.float32)
    z = s.encode(sae, u, k)
    exact = s.SAE(*(np.asarray(a, np.float64) for a in sae))
    expected = np.stack([reference.encode(exact, row, k) for row in u.astype(np.float64)])
    chex.assert_trees_all_close(z, expected, atol=2e-6)
    chex.assert_trees_all_close(s.decode(sae, z), expected @ exact.W_d + exact.b_d, atol=5e-6)
    assert np.all(np.sum(np.asarray(z) > 0, axis=1) <= k)


def test_loss_without_auxk_is_relative_squared_error():
    sae, u = random_sae(0), np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32)
    total, (mse, fired) = s.loss(sae, u, jnp.zeros(10, bool), 3, 2, 0.0)
    z = np.asarray(s.encode(sae, u, 3), np.float64)
    error = ((u - (z @ np.asarray(sae.W_d, np.float64) + np.asarray(sae.b_d))) ** 2).sum()
    np.testing.assert_allclose(total, error / ((u - u.mean(axis=0)) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(mse, error / u.size, rtol=1e-5)
    chex.assert_trees_all_equal(fired, jnp.asarray((z > 0).sum(axis=0), jnp.int32))


def test_auxk_gradient_by_hand():
    """One dead latent j, two inputs: L = sum |e - a_j d_j|^2 / V, so dL/dd_j = -2 sum_i a_ij (e_i - a_ij d_j) / V, and
    through a_ij = (u_i - b_d) . w_j + b_j:  dL/da_ij = -2 d_j . (e_i - a_ij d_j) / V."""
    sae = random_sae(3)._replace(b_e=jnp.full(10, 3.0))  # every latent's activation is positive
    rng = np.random.default_rng(4)
    u, u_hat = (rng.standard_normal((2, 6)).astype(np.float32) for _ in range(2))
    j = 7
    dead = jnp.arange(10) == j
    grads = jax.grad(lambda sae: s.aux_k_loss(sae, u, u_hat, dead, 2))(sae)
    e = (u - u_hat).astype(np.float64)
    V = ((e - e.mean(axis=0)) ** 2).sum()
    w, d, b_d = (np.asarray(a, np.float64) for a in (sae.W_e[:, j], sae.W_d[j], sae.b_d))
    a = (u - b_d) @ w + 3.0
    assert np.all(a > 0)
    left = e - a[:, None] * d
    by_a = -2 * left @ d / V
    np.testing.assert_allclose(grads.W_d[j], -2 * (a[:, None] * left).sum(axis=0) / V, rtol=1e-4)
    np.testing.assert_allclose(grads.W_e[:, j], by_a @ (u - b_d), rtol=1e-4)
    np.testing.assert_allclose(grads.b_e[j], by_a.sum(), rtol=1e-4)
    others = np.arange(10) != j  # living latents and the decoder bias are not touched
    assert not np.asarray(grads.W_d)[others].any()
    assert not np.asarray(grads.W_e)[:, others].any()
    assert not np.asarray(grads.b_d).any()


def test_auxk_is_detached_and_0_without_dead_latents():
    sae, u = random_sae(5), np.random.default_rng(6).standard_normal((4, 6)).astype(np.float32)
    assert s.aux_k_loss(sae, u, 0.5 * u, jnp.zeros(10, bool), 3) == 0
    grads = jax.grad(lambda u_hat: s.aux_k_loss(sae, u, u_hat, jnp.ones(10, bool), 3))(jnp.asarray(0.5 * u))
    assert not np.asarray(grads).any()  # nothing flows back into the reconstruction


def test_explained_variance_of_the_mean_predictor_is_0():
    u = np.random.default_rng(0).standard_normal((500, 8)) * np.arange(1, 9) + 5
    assert abs(s.explained_variance(u, np.broadcast_to(u.mean(axis=0), u.shape))) < 1e-12
    assert s.explained_variance(u, u) == 1
    # a scalar mean over all components would have been beaten by the vector mean
    assert s.explained_variance(u, np.full(u.shape, u.mean())) < 0


def test_scaling():
    x = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32) * 3 + 100
    scaling = s.fit_scaling(x)
    u = np.asarray(s.centre(scaling, x), np.float64)
    np.testing.assert_allclose(u.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1).mean(), 4, rtol=1e-5)
    np.testing.assert_allclose(s.uncentre(scaling, jnp.asarray(u, jnp.float32)), x, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "says"),
    [(np.ones((9, 4)), "same for every image"), (np.full((9, 4), np.nan), "NaN"), (np.array([[1, np.inf]]), "NaN")],
)
def test_scaling_refuses(x, says):
    with pytest.raises(HeadSteerError, match=says):
        s.fit_scaling(x)


def test_gradient_has_no_radial_part():
    sae = random_sae(0)
    grads = s.without_radial(jax.tree.map(lambda a: a + 1.0, sae), sae)
    chex.assert_trees_all_close(jnp.sum(grads.W_d * sae.W_d, axis=1), jnp.zeros(10), atol=1e-6)


def concepts(count: int, D: int, rng: np.random.Generator) -> np.ndarray:
    """Residuals that truly are sparse sums of 12 directions."""
    directions = rng.standard_normal((12, D))
    active = rng.random((count, 12)) < 0.2
    return ((active * rng.uniform(1, 2, active.shape)) @ directions).astype(np.float32)


def sae_config(**fields):
    config = tiny_config()
    return config.model_copy(update={"sae": config.sae.model_copy(update=fields)})


def test_training_learns_and_resumes_bit_for_bit(tmp_path):
    x = concepts(640, 24, np.random.default_rng(0))
    config = sae_config(epochs=40, learning_rate=3e-3)
    saes, scaling, curves = s.train_sae(config, x, tmp_path / "whole")
    assert saes.W_d.shape == (2, 48, 24)
    chex.assert_trees_all_close(jnp.linalg.norm(saes.W_d, axis=-1), jnp.ones((2, 48)), atol=1e-5)
    one = jax.tree.map(lambda a: a[0], saes)
    z = s.encode_all(one, scaling, x, config.sae.k)
    found = s.health(one, scaling, x, z)
    assert found.explained_variance > 0.8
    np.testing.assert_allclose(found.frequency, (z > 0).mean(axis=0))
    assert found.l0 <= config.sae.k
    assert not np.array_equal(saes.W_d[0], saes.W_d[1])

    stopped = s.Checkpoints(tmp_path / "parts" / "checkpoints", keep=2)
    steps = len(x) // config.sae.batch
    state = s.initial_state(config, steps)
    epoch = s.make_epoch(config, steps)
    u = s.centre(scaling, x)
    part = {name: np.zeros((40, 2), np.float32) for name in ("mse", "dead")}
    for number in range(17):
        order = np.random.default_rng([config.seed, 2, number]).permutation(len(x))[: steps * config.sae.batch]
        state, metrics = epoch(state, u, order.reshape(steps, -1))
        for name in part:
            part[name][number] = np.asarray(metrics[name]).mean(axis=0)
    stopped.save(17, (state, part), {})
    resumed, _, curves_resumed = s.train_sae(config, x, tmp_path / "parts")
    chex.assert_trees_all_equal(resumed, saes)
    chex.assert_trees_all_equal(curves_resumed, curves)


@pytest.mark.parametrize(("weight", "revives"), [(0.0, False), (1 / 32, True)])
def test_auxk_revives_dead_latents(weight, revives):
    """Latents whose encoder is too weak to be among the top k get no gradient but AuxK's."""
    x = concepts(640, 24, np.random.default_rng(1))
    config = sae_config(k=2, epochs=60, learning_rate=3e-3, aux_weight=weight)
    steps = len(x) // config.sae.batch
    state = s.initial_state(config, steps)
    weak = jnp.where(jnp.arange(48) < 24, 1e-3, 1.0)
    state = state._replace(sae=state.sae._replace(W_e=state.sae.W_e * weak))
    epoch, u = s.make_epoch(config, steps), s.centre(s.fit_scaling(x), x)
    order = jnp.arange(640).reshape(steps, -1)
    for _ in range(config.sae.epochs):
        state, _ = epoch(state, u, order)
    fires = np.asarray(jax.vmap(lambda sae: s.encode(sae, u, 2).sum(axis=0))(state.sae) > 0)
    assert fires[:, :24].any() == revives
    if revives:
        assert fires[:, :24].mean() > 0.5


def test_batch_larger_than_the_data(tmp_path):
    with pytest.raises(HeadSteerError, match=r"config\.sae\.batch = 64: allowed is at most the 30"):
        s.train_sae(tiny_config(), np.zeros((30, 24), np.float32), tmp_path)
