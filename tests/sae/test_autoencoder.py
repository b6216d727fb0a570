"""The autoencoder and its objective: equations against float64, gradients by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import random_sae
from hypothesis import given, settings
from hypothesis import strategies as st

from headsteer_jax.config import SAEConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae import autoencoder, objective, sparse


@given(st.integers(0, 1000), st.one_of(st.none(), st.integers(1, 12)))
@settings(max_examples=25, deadline=None)
def test_encode_and_decode(seed, k):
    sae, u = random_sae(seed), np.random.default_rng(seed + 1).standard_normal((4, 6)).astype(np.float32)
    z = autoencoder.encode_scaled(sae, u, k)
    exact = autoencoder.SAEWeights(*(np.asarray(a, np.float64) for a in sae))
    expected = np.stack([reference.encode(exact, row, k) for row in u.astype(np.float64)])
    chex.assert_trees_all_close(z, expected, atol=2e-6)
    chex.assert_trees_all_close(autoencoder.decode_scaled(sae, z), expected @ exact.W_d + exact.b_d, atol=5e-6)
    assert k is None or np.all(np.sum(np.asarray(z) > 0, axis=1) <= k)


SCALING = autoencoder.Scaling(np.full(6, 7.0, np.float32), np.float32(0.4))


def rounding_of_reconstruction(exact, x, z, scale):
    """The most that float32 may be off, whatever the order of the sums.

    A latent takes 10 roundings: 2 for scaling, 1 for b_d, 6 of a sum of 6 products, 1 for b_e. The reconstruction takes
    3 more than its sum of 10 has terms. Each is at most 2^-24 of the sizes that are summed, which may cancel.
    """
    u = np.abs(x - 7.0) * scale + np.abs(exact.b_d)
    sizes = np.where(z > 0, u @ np.abs(exact.W_e).T + np.abs(exact.b_e), 0)
    return (10 + 13) * 2.0**-24 * ((sizes @ np.abs(exact.W_d) + np.abs(exact.b_d)) / scale + 7)


@pytest.mark.parametrize("k", [3, None])
def test_an_autoencoder_reads_and_gives_residuals_as_they_are(k):
    weights, x = random_sae(1), np.random.default_rng(2).standard_normal((50, 6)).astype(np.float32) * 3 + 7
    sae = autoencoder.Autoencoder(weights, SCALING, k)
    exact = autoencoder.SAEWeights(*(np.asarray(a, np.float64) for a in weights))
    scale = np.float64(SCALING.scale)
    z = np.stack([reference.encode(exact, row, k) for row in (x.astype(np.float64) - 7) * scale])
    x_hat = (z @ exact.W_d + exact.b_d) / scale + 7
    np.testing.assert_allclose(sae.encode(x), z, atol=1e-5)
    assert (np.abs(sae.reconstruct(x) - x_hat) <= rounding_of_reconstruction(exact, x, z, scale)).all()
    np.testing.assert_allclose(autoencoder.encode_split(sae, x, chunk=7), z, atol=1e-5)
    np.testing.assert_allclose(sae.decoder, exact.W_d / scale, rtol=1e-6)


def test_one_of_several_autoencoders_is_picked():
    several = [random_sae(seed) for seed in range(3)]
    sae = autoencoder.Autoencoder(jax.tree.map(lambda *leaves: jnp.stack(leaves), *several), SCALING, 3)
    assert (sae.members, sae.first(2).members) == (3, 2)
    chex.assert_trees_all_equal(sae.member(1).weights, several[1])
    chex.assert_trees_all_equal(sae.first(2).member(1).weights, several[1])
    assert jax.tree.structure(sae.member(0)) == jax.tree.structure(sae)  # a pytree with a static k


def test_folded_weights_read_residuals_as_they_are():
    weights, x = random_sae(1), np.random.default_rng(2).standard_normal((50, 6)).astype(np.float32) * 3 + 7
    for k in (3, None):
        sae = autoencoder.Autoencoder(weights, SCALING, k)
        folded, z = autoencoder.fold_scaling(sae), sae.encode(x)
        np.testing.assert_allclose(autoencoder.encode_scaled(folded, x, k), z / 0.4, atol=2e-5)
        np.testing.assert_allclose(autoencoder.decode_scaled(folded, z / 0.4), sae.decode(z), rtol=1e-5)


def loss_and_grads(sae, u, k=3, dead=None, k_aux=0, use_sparse=False, **fields):
    """The loss of a config with these fields, and its gradients."""
    settings = objective.Objective(SAEConfig(**fields), 5, k_aux, use_sparse)
    dead = jnp.zeros(len(sae.b_e), bool) if dead is None else dead
    return jax.value_and_grad(
        lambda weights: objective.autoencoder_loss(weights, u, dead, jnp.int32(k), settings), has_aux=True
    )(sae)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "relu"])
@pytest.mark.parametrize("prefixes", [(), (0.25, 0.5)])
def test_loss_of_every_variant(activation, prefixes):
    """The loss in float64 by its formula; the decoder's gradient by hand, as the reconstruction is linear in it."""
    sae, u = random_sae(0), np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32)
    (total, metrics), grads = loss_and_grads(
        sae, u, activation=activation, prefixes=prefixes, l1_weight=0.3, l0_weight=0.7
    )
    exact = autoencoder.SAEWeights(*(np.asarray(a, np.float64) for a in sae))
    a = np.maximum((u - exact.b_d) @ exact.W_e.T + exact.b_e, 0)
    smallest = 0.0
    if activation == "topk":
        z = np.stack([reference.encode(exact, row, 3) for row in u.astype(np.float64)])
    elif activation == "batch_topk":
        smallest = np.sort(a, axis=None)[-3 * len(u)]
        z = np.where(a >= smallest, a, 0)
    else:
        z = np.where(a > (exact.threshold if activation == "jumprelu" else 0), a, 0)
        z = np.where(a > exact.threshold, a, 0)
    lengths = [2, 5, 10] if prefixes else [10]  # 0.25 of 10 latents is 2.5, to the even
    variance = ((u - u.mean(axis=0)) ** 2).sum()
    errors = [u - (z[:, :n] @ exact.W_d[:n] + exact.b_d) for n in lengths]
    penalty = {
        "jumprelu": 0.7 * ((z > 0).sum() / 8 / 3 - 1) ** 2,
        "relu": 0.3 * z.sum() / 8 / np.sqrt(6),  # decoder rows have norm 1
    }.get(activation, 0.0)
    np.testing.assert_allclose(total, np.mean([(e**2).sum() for e in errors]) / variance + penalty, rtol=1e-5)
    np.testing.assert_allclose(metrics.mse, (errors[-1] ** 2).mean(), rtol=1e-5)
    np.testing.assert_array_equal(metrics.fired, (z > 0).sum(axis=0))
    np.testing.assert_allclose(metrics.l0, (z > 0).sum() / 8)
    np.testing.assert_allclose(metrics.threshold, smallest, rtol=1e-6)
    grad_W = np.zeros((10, 6))
    for n, e in zip(lengths, errors, strict=True):
        grad_W[:n] -= 2 * z[:, :n].T @ e / variance / len(lengths)
    if activation == "relu":
        grad_W += 0.3 * z.sum(axis=0)[:, None] * exact.W_d / 8 / np.sqrt(6)
    np.testing.assert_allclose(grads.W_d, grad_W, atol=1e-6)


@pytest.mark.skipif(not sparse.is_available(), reason="needs a CPU and a C++ compiler")
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
@pytest.mark.parametrize("prefixes", [(), (0.25, 0.5)])
def test_sparse_codes_change_nothing_but_rounding(activation, prefixes):
    sae, u = random_sae(5, 8, 60), np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    dead = jnp.arange(60) % 4 == 0
    dense, by_codes = (
        loss_and_grads(sae, u, dead=dead, k_aux=6, use_sparse=use_sparse, activation=activation, prefixes=prefixes)
        for use_sparse in (False, True)
    )
    chex.assert_trees_all_close(dense, by_codes, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "relu"])
@pytest.mark.parametrize(
    "use_sparse",
    [False, pytest.param(True, marks=pytest.mark.skipif(not sparse.is_available(), reason="needs a compiler"))],
)
@pytest.mark.parametrize("leaf", ["W_e", "b_e", "W_d", "b_d"])
def test_nan_in_any_parameter_is_a_nan_loss(activation, use_sparse, leaf):
    sae = random_sae(0, 6, 48)
    if use_sparse and leaf == "W_d":
        pytest.skip("a row that no latent uses is not read; training checks the parameters as well")
    broken = sae._replace(**{leaf: getattr(sae, leaf).at[3].set(jnp.nan)})
    u = np.random.default_rng(1).standard_normal((300, 6)).astype(np.float32)
    (total, _), _ = loss_and_grads(broken, u, activation=activation, use_sparse=use_sparse)
    assert np.isnan(total)


def test_jump_gradients_are_the_straight_through_estimates():
    """arXiv:2407.14435, eq. 11, 12: dz/dtheta = -theta / eps K((a - theta) / eps), dH/dtheta = -1 / eps K."""
    a, theta = np.array([[0.2, 0.9, 1.2, 3.0], [1.1, 1.0, 0.7, 0.0]]), np.array([1.0, 1.0, 1.0, 0.1])
    eps = 0.5
    grad_z, grad_on = np.random.default_rng(0).standard_normal((2, 2, 4))
    (z, on), pull = jax.vjp(lambda a, t: objective.jump_relu(a, t, eps), jnp.asarray(a), jnp.asarray(theta))
    np.testing.assert_allclose(z, a * (a > theta), rtol=1e-6)
    np.testing.assert_array_equal(on, a > theta)
    grad_a, grad_theta = pull((jnp.asarray(grad_z, jnp.float32), jnp.asarray(grad_on, jnp.float32)))
    kernel = (a > 0) & (np.abs(a - theta) < eps / 2)
    np.testing.assert_allclose(grad_a, grad_z * (a > theta), rtol=1e-6)
    np.testing.assert_allclose(grad_theta, (-(theta * grad_z + grad_on) / eps * kernel).sum(axis=0), rtol=1e-5)


@given(st.integers(0, 1000), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_batch_threshold_is_the_nth_largest(seed, count):
    a = np.maximum(
        np.random.default_rng(seed).standard_normal(200) * 10.0 ** np.random.default_rng(seed).integers(-6, 6), 0
    )
    a = a.astype(np.float32).reshape(10, 20)
    assert objective.find_batch_threshold(jnp.asarray(a), count) == np.sort(a, axis=None)[-count]


def test_top_k_with_a_traced_k():
    a = np.random.default_rng(0).random((20, 30)).astype(np.float32)
    traced = jax.jit(lambda k: autoencoder.keep_top_k(a, k, 9))
    for k in (1, 4, 9):
        np.testing.assert_array_equal(traced(k), autoencoder.keep_top_k(a, k))


def test_initial_weights():
    u = jnp.asarray(np.random.default_rng(0).standard_normal((30, 6)), jnp.float32)
    key = jax.random.key(0)
    tied, data, untied, jump = (
        objective.init_weights(key, u, SAEConfig(**fields), 20)
        for fields in (
            {},
            {"ablation": {"init": "data"}},
            {"ablation": {"init": "untied"}},
            {"activation": "jumprelu", "k": 2},
        )
    )
    for sae in (tied, data, untied, jump):
        np.testing.assert_allclose(np.linalg.norm(sae.W_d, axis=1), 1, rtol=1e-6)
        assert not np.asarray(sae.b_e).any()
        assert not np.asarray(sae.b_d).any()
    for sae in (tied, data):
        np.testing.assert_array_equal(sae.W_e, sae.W_d)
    assert np.abs(np.sum(untied.W_e * untied.W_d, axis=1)).mean() < 0.6
    rows = u / np.linalg.norm(u, axis=1, keepdims=True)
    nearest = np.argmax(np.asarray(data.W_d) @ rows.T, axis=1)
    np.testing.assert_allclose(data.W_d, rows[nearest], atol=5e-3)
    assert len(set(nearest.tolist())) == 20  # without replacement
    np.testing.assert_allclose(jump.threshold, 1.2815516, rtol=1e-5)  # a tenth of a standard normal lies above


def test_auxk_gradient_by_hand():
    """One dead latent j, two inputs: L = sum |e - a_j d_j|^2 / V, so dL/dd_j = -2 sum_i a_ij (e_i - a_ij d_j) / V, and
    through a_ij = (u_i - b_d) . w_j + b_j:  dL/da_ij = -2 d_j . (e_i - a_ij d_j) / V."""
    sae = random_sae(3)._replace(b_e=jnp.full(10, 3.0))  # every latent's activation is positive
    rng = np.random.default_rng(4)
    u, u_hat = (rng.standard_normal((2, 6)).astype(np.float32) for _ in range(2))
    j = 7
    dead = jnp.arange(10) == j
    grads = jax.grad(lambda sae: objective.aux_k_loss(sae, u, u_hat, dead, 2))(sae)
    e = (u - u_hat).astype(np.float64)
    V = ((e - e.mean(axis=0)) ** 2).sum()
    w, d, b_d = (np.asarray(a, np.float64) for a in (sae.W_e[j], sae.W_d[j], sae.b_d))
    a = (u - b_d) @ w + 3.0
    assert np.all(a > 0)
    error = e - a[:, None] * d
    grad_a = -2 * error @ d / V
    np.testing.assert_allclose(grads.W_d[j], -2 * (a[:, None] * error).sum(axis=0) / V, rtol=1e-4)
    np.testing.assert_allclose(grads.W_e[j], grad_a @ (u - b_d), rtol=1e-4)
    np.testing.assert_allclose(grads.b_e[j], grad_a.sum(), rtol=1e-4)
    others = np.arange(10) != j  # living latents and the decoder bias are not touched
    assert not np.asarray(grads.W_d)[others].any()
    assert not np.asarray(grads.W_e)[others].any()
    assert not np.asarray(grads.b_d).any()


def test_auxk_is_detached_and_0_without_dead_latents():
    sae, u = random_sae(5), np.random.default_rng(6).standard_normal((4, 6)).astype(np.float32)
    assert objective.aux_k_loss(sae, u, 0.5 * u, jnp.zeros(10, bool), 3) == 0
    grads = jax.grad(lambda u_hat: objective.aux_k_loss(sae, u, u_hat, jnp.ones(10, bool), 3))(jnp.asarray(0.5 * u))
    assert not np.asarray(grads).any()  # nothing flows back into the reconstruction


def test_scaling():
    x = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32) * 3 + 100
    scaling = autoencoder.fit_scaling(lambda: np.array_split(x, 3), SAEConfig())
    u = np.asarray(autoencoder.scale_input(scaling, x), np.float64)
    np.testing.assert_allclose(u.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1).mean(), 4, rtol=1e-5)
    np.testing.assert_allclose(autoencoder.unscale_output(scaling, jnp.asarray(u, jnp.float32)), x, rtol=1e-6)
    off = autoencoder.fit_scaling(lambda: [x], SAEConfig(ablation={"centre": False}))
    assert not off.mean.any()
    np.testing.assert_allclose(np.linalg.norm(x * off.scale, axis=1).mean(), 4, rtol=1e-5)
    assert autoencoder.fit_scaling(lambda: [x], SAEConfig(ablation={"scale": False})).scale == 1


@pytest.mark.parametrize(
    ("x", "says"),
    [(np.ones((9, 4)), "same for every image"), (np.full((9, 4), np.nan), "NaN"), (np.array([[1, np.inf]]), "NaN")],
)
def test_scaling_refuses(x, says):
    with pytest.raises(HeadSteerError, match=says):
        autoencoder.fit_scaling(lambda: [x], SAEConfig())


def test_gradient_has_no_radial_part():
    sae = random_sae(0)
    grads = objective.remove_radial_gradient(jax.tree.map(lambda a: a + 1.0, sae), sae)
    chex.assert_trees_all_close(jnp.sum(grads.W_d * sae.W_d, axis=1), jnp.zeros(10), atol=1e-6)


def test_dead_latents_take_turns_if_there_is_no_room_for_all() -> None:
    """Independent: the dead latents in a circle, `room` places of which each step takes those after the last."""
    rng = np.random.default_rng(0)
    dead, room = rng.random(40) < 0.5, 6
    seen = set()
    for turn in range(7):  # 7 turns of 6 places go round the circle of 40
        circle = [(turn * room + step) % 40 for step in range(40)]
        expected = [latent for latent in circle if dead[latent]][:room]
        is_dead, chosen = objective.take_turns(jnp.asarray(dead), room, turn)
        assert np.asarray(chosen).tolist() == expected
        assert np.all(is_dead == 1)
        seen |= set(expected)
    assert seen == set(np.flatnonzero(dead).tolist())


@pytest.mark.parametrize("turn", [0, 5])
def test_with_room_for_all_dead_latents_the_turn_has_no_effect(turn: int) -> None:
    dead = np.zeros(40, bool)
    dead[[3, 17, 30]] = True
    is_dead, chosen = objective.take_turns(jnp.asarray(dead), 6, turn)
    assert np.asarray(chosen).tolist() == [3, 17, 30, 0, 1, 2]
    assert np.asarray(is_dead).tolist() == [1, 1, 1, 0, 0, 0]
