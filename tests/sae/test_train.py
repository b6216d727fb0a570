"""Training: it learns, revives dead latents, resumes bit for bit, and a grid's members train as they do alone."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import concepts, sae_config
from helpers import ROOT, environment

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.sae import autoencoder, grid, objective, train
from headsteer_jax.sae.metrics import measure_health
from headsteer_jax.sae.residuals import ResidualsInMemory


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "relu"])
def test_every_variant_learns(tmp_path: Path, activation: str) -> None:
    x = concepts(640, 24, np.random.default_rng(0))
    config = sae_config(epochs=60, learning_rate=3e-3, activation=activation, l1_weight=0.02)
    trained = train.train_members(config, train.seed_members(config.sae), ResidualsInMemory(x), tmp_path)
    saes, curves = trained.weights, trained.curves
    assert saes.W_d.shape == (3, 48, 24)  # two seeds and the control
    chex.assert_trees_all_close(jnp.linalg.norm(saes.W_d, axis=-1), jnp.ones((3, 48)), atol=1e-5)
    health = measure_health(trained.autoencoders(config.sae.inference_k).member(0), [x])
    assert health.explained_variance > 0.85
    if activation != "relu":
        assert health.l0 == pytest.approx(4, abs=1.0)  # config.sae.k
    np.testing.assert_allclose(curves["mse"][-1, 0], health.mse, rtol=0.15)
    assert not np.array_equal(saes.W_d[0], saes.W_d[1])
    if activation in ("batch_topk", "jumprelu"):
        assert (np.asarray(saes.threshold) > 0).any(axis=1).all()


@pytest.mark.parametrize("latents", [5, 41])
def test_the_number_of_latents_is_free(tmp_path: Path, latents: int) -> None:
    """Fewer latents than the width and than AuxK's D / 2, and a number that nothing divides."""
    x = concepts(640, 24, np.random.default_rng(0))
    config = sae_config(epochs=60, learning_rate=3e-3, latents=latents)
    trained = train.train_members(config, train.seed_members(config.sae), ResidualsInMemory(x), tmp_path)
    assert trained.weights.W_d.shape == (3, latents, 24)
    health = measure_health(trained.autoencoders(4).member(0), [x])
    assert health.frequency.shape == (latents,)
    assert health.explained_variance > (0.2 if latents == 5 else 0.8)


def test_matryoshka_prefixes_reconstruct_by_themselves(tmp_path: Path) -> None:
    x = concepts(640, 24, np.random.default_rng(0))
    scores = {}
    for prefixes in ((), (0.25,)):
        config = sae_config(epochs=60, learning_rate=3e-3, prefixes=prefixes, seeds=1, control=False)
        trained = train.train_members(
            config, train.seed_members(config.sae), ResidualsInMemory(x), tmp_path / str(prefixes)
        )
        sae = trained.autoencoders(4).member(0)
        w = sae.weights
        first = w._replace(W_e=w.W_e[:12], b_e=w.b_e[:12], W_d=w.W_d[:12], threshold=w.threshold[:12])
        scores[prefixes] = measure_health(replace(sae, weights=first), [x]).explained_variance
    assert scores[(0.25,)] > scores[()] + 0.2


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    x = concepts(640, 24, np.random.default_rng(0))
    config = sae_config(epochs=40, learning_rate=3e-3, k_start=8)
    members = train.seed_members(config.sae)
    whole = train.train_members(config, members, ResidualsInMemory(x), tmp_path / "whole")
    # an interruption leaves the checkpoint of epoch 20
    (tmp_path / "parts").mkdir()
    checkpoints = Checkpoints(tmp_path / "parts" / "checkpoints", keep=2)
    D, F = 24, 48
    u = autoencoder.scale_input(autoencoder.fit_scaling(ResidualsInMemory(x).chunks, config.sae), x)
    state = train.init_state(config.sae, members, u, F, config.seed)
    run = train.make_epoch_program(config.sae, members, D, len(x) // config.sae.batch, config.seed)
    curves = {name: np.zeros((40, 3), np.float32) for name in train.CURVES}
    for epoch in range(0, 20, 2):
        state, new_curves = run(state, u, epochs=2)
        for name in curves:
            curves[name][epoch : epoch + 2] = new_curves[name]
    checkpoints.save(20, (train.state_to_checkpoint(state, 3), curves), {"data": "a hash"})
    checkpoints.close()
    with pytest.raises(HeadSteerError, match="checkpoints: the data have changed since this checkpoint; use the data"):
        train.train_members(config, members, ResidualsInMemory(x), tmp_path / "parts", data="another hash")
    resumed = train.train_members(config, members, ResidualsInMemory(x), tmp_path / "parts", data="a hash")
    chex.assert_trees_all_equal(resumed.weights, whole.weights)
    chex.assert_trees_all_equal(resumed.curves, whole.curves)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_one_step_is_adam_by_hand(weight_decay: float) -> None:
    """optax.adamw, whose decay is the encoder's alone, on the gradient without its radial part; then unit rows."""
    config = sae_config(
        batch=32, aux_weight=0.0, warmup=1.0, decay=0.0, epochs=2, seeds=1, control=False, weight_decay=weight_decay
    )  # the first of two steps, at half of the learning rate
    c, rng = config.sae, np.random.default_rng(0)
    u = jnp.asarray(rng.standard_normal((32, 24)), jnp.float32)
    members = train.seed_members(c)
    state = train.init_state(c, members, u, 48, 0)
    sae = autoencoder.select_member(state.sae, 0)
    settings = objective.Objective(c, c.k, 0, use_sparse=False)
    gradient = jax.grad(
        lambda weights: objective.autoencoder_loss(weights, u, jnp.zeros(48, bool), jnp.int32(c.k), settings),
        has_aux=True,
    )
    grads = jax.jit(gradient)(sae)[0]
    radial = (np.asarray(grads.W_d) * sae.W_d).sum(axis=1, keepdims=True)
    grads = grads._replace(W_d=grads.W_d - radial * sae.W_d)
    decays = autoencoder.SAEWeights(W_e=True, b_e=False, W_d=False, b_d=False, threshold=False)
    tx = optax.adamw(c.learning_rate / 2, weight_decay=weight_decay, mask=decays)
    expected = jax.jit(lambda sae, grads: optax.apply_updates(sae, tx.update(grads, tx.init(sae), sae)[0]))(sae, grads)
    W_d = np.asarray(expected.W_d)
    expected = expected._replace(W_d=W_d / np.linalg.norm(W_d, axis=1, keepdims=True))
    after, curves = train.make_epoch_program(c, members, 24, 1, 0)(state, u)
    # Adam's first step is the sign of the gradient, which rounding decides if the gradient is near 0
    clear = jax.tree.map(lambda g: np.abs(g) > 1e-6, grads)
    for actual, desired, mask in zip(autoencoder.select_member(after.sae, 0), expected, clear, strict=True):
        np.testing.assert_allclose(np.asarray(actual)[mask], np.asarray(desired)[mask], atol=2e-6)
    assert after.step == after.epoch == 1
    assert curves["l0"].shape == (1, 1)


def test_a_member_of_a_grid_trains_as_it_does_alone(tmp_path: Path) -> None:
    x = concepts(640, 24, np.random.default_rng(0))
    config = sae_config(epochs=6, learning_rate=3e-3)
    members = grid.grid_members(config.sae, (2, 4, 7), (1e-3, 3e-3), 2)
    assert len(members.k) == 12
    together = train.train_members(config, members, ResidualsInMemory(x), tmp_path / "grid")
    for number in (0, 5, 11):
        member = train.Members(*(column[number : number + 1] for column in members))
        alone = train.train_members(config, member, ResidualsInMemory(x), tmp_path / str(number))
        chex.assert_trees_all_close(
            autoencoder.select_member(alone.weights, 0), autoencoder.select_member(together.weights, number), atol=2e-5
        )
        np.testing.assert_allclose(alone.curves["l0"][:, 0], together.curves["l0"][:, number], rtol=1e-5)
        assert together.curves["l0"][-1, number] <= members.k[number]


def test_the_control_starts_as_the_first_seed_and_sees_another_order(tmp_path: Path) -> None:
    config = sae_config(epochs=1)
    members = train.seed_members(config.sae)
    u = jnp.asarray(concepts(640, 24, np.random.default_rng(0)))
    state = train.init_state(config.sae, members, u, 48, 0)
    chex.assert_trees_all_equal(autoencoder.select_member(state.sae, 0), autoencoder.select_member(state.sae, 2))
    assert not np.array_equal(state.sae.W_d[0], state.sae.W_d[1])
    trained = train.train_members(config, members, ResidualsInMemory(np.asarray(u)), tmp_path)
    assert not np.array_equal(trained.weights.W_d[0], trained.weights.W_d[2])


def test_k_is_annealed() -> None:
    config = sae_config(epochs=10, k=4, k_start=20, k_anneal=0.5, batch=64, seeds=1, control=False)
    u = jnp.asarray(np.random.default_rng(0).standard_normal((640, 24)), jnp.float32)
    members = train.seed_members(config.sae)
    state = train.init_state(config.sae, members, u, 48, 0)
    _, curves = train.make_epoch_program(config.sae, members, 24, 10, 0)(state, u, epochs=10)
    l0 = np.asarray(curves["l0"])[:, 0]
    # k after n of 50 steps is 20 - 16 n / 50, rounded; the mean over each epoch's ten steps
    expected = [np.mean([round(max(4, 20 - 16 * n / 50)) for n in range(10 * e, 10 * e + 10)]) for e in range(10)]
    assert np.all(l0 <= np.array(expected) + 1e-4)
    np.testing.assert_allclose(l0, expected, atol=0.5)  # below it if fewer than k are positive


@pytest.mark.parametrize(("weight", "revives"), [(0.0, False), (1 / 32, True)])
def test_auxk_revives_dead_latents(weight: float, revives: bool) -> None:
    """Latents whose encoder is too weak to be among the top k get no gradient but AuxK's."""
    x = concepts(640, 24, np.random.default_rng(1))
    config = sae_config(k=2, epochs=100, learning_rate=3e-3, aux_weight=weight, control=False)
    c = config.sae
    u = autoencoder.scale_input(autoencoder.fit_scaling(lambda: [x], c), x)
    state = train.init_state(c, train.seed_members(c), u, 48, 0)
    weak = jnp.where(jnp.arange(48) < 24, 1e-3, 1.0)[:, None]
    state = state._replace(sae=state.sae._replace(W_e=state.sae.W_e * weak))
    state, _ = train.make_epoch_program(c, train.seed_members(c), 24, len(x) // c.batch, 0)(state, u, epochs=100)
    sums = jax.jit(jax.vmap(lambda sae: autoencoder.encode_scaled(sae, u, 2).sum(axis=0)))(state.sae)
    fires = np.asarray(sums) > 0
    assert fires[:, :24].any() == revives
    if revives:
        assert fires[:, :24].mean() > 0.3


@pytest.mark.parametrize(("views", "dead_steps"), [(1, 0), (2, 10), (4, 15)])
def test_the_window_of_dead_latents_is_counted_in_passes_over_one_view(views: int, dead_steps: int) -> None:
    """Of the 20 steps of an epoch over all views, a window of one pass takes 20, 10 or 5; then 24 latents are dead."""
    config = sae_config(k=2, views=views, dead_window=1.0, aux_weight=0.0, seeds=1, control=False)
    c = config.sae
    u = jnp.asarray(np.random.default_rng(0).standard_normal((1280, 24)), jnp.float32)
    state = train.init_state(c, train.seed_members(c), u, 48, 0)
    silent = jnp.where(jnp.arange(48) < 24, 0.0, 1.0)
    state = state._replace(sae=state.sae._replace(W_e=state.sae.W_e * silent[:, None]))
    _, curves = train.make_epoch_program(c, train.seed_members(c), 24, 20, 0)(state, u)
    assert curves["dead"][0, 0] == pytest.approx(0.5 * dead_steps / 20, abs=1e-6)


class Counted(ResidualsInMemory):
    """Remembers how many rows it gave at once, at most."""

    most = 0

    def groups(self, rows: int, rng: np.random.Generator) -> Any:
        for part in super().groups(rows, rng):
            Counted.most = max(Counted.most, len(part))
            yield part


@pytest.mark.slow
def test_more_than_fits_is_streamed_and_resumes(tmp_path: Path) -> None:
    x = concepts(30_000, 24, np.random.default_rng(0))  # 2.9 MB
    config = sae_config(epochs=4, learning_rate=3e-3, memory=1, seeds=1, control=False)
    members = train.seed_members(config.sae)
    trained = train.train_members(config, members, Counted(x), tmp_path / "a")
    assert Counted.most <= 2**20 // (3 * 4 * 24)
    assert np.all(trained.curves["mse"] > 0)
    streamed = measure_health(trained.autoencoders(4).member(0), [x])
    in_memory = sae_config(epochs=4, learning_rate=3e-3, seeds=1, control=False)
    whole = train.train_members(in_memory, members, ResidualsInMemory(x), tmp_path / "b")
    held = measure_health(whole.autoencoders(4).member(0), [x])
    assert streamed.explained_variance > held.explained_variance - 0.05
    # interrupted after the second epoch's checkpoint, and continued
    Checkpoints(tmp_path / "a" / "checkpoints", keep=2).forget_after(3)
    again = train.train_members(config, members, ResidualsInMemory(x), tmp_path / "a")
    chex.assert_trees_all_equal(again.weights, trained.weights)


class InBlocks(ResidualsInMemory):
    """Gives whole images of five tokens, as the cache does: fewer rows at a time than `rows`."""

    def groups(self, rows: int, rng: np.random.Generator) -> Any:
        return super().groups(rows // 5 * 5, rng)


@pytest.mark.parametrize("batch", [64, 10923, pytest.param(9999, marks=pytest.mark.slow)])
def test_streaming_uses_every_full_batch(tmp_path: Path, batch: int) -> None:
    """Rows that do not fill a group's last batch go into the next group, so that an epoch has all its steps."""
    x = concepts(40_000, 24, np.random.default_rng(0))
    config = sae_config(epochs=2, memory=1, seeds=1, control=False, batch=batch)
    trained = train.train_members(config, train.seed_members(config.sae), InBlocks(x), tmp_path)
    assert np.isfinite(trained.curves["mse"]).all()
    state = train.init_state(config.sae, train.seed_members(config.sae), jnp.asarray(x[:100]), 48, 0)
    ((state, _), _) = Checkpoints(tmp_path / "checkpoints").restore(
        (train.state_to_checkpoint(state, 1), trained.curves)
    )
    assert state.step == 2 * (40_000 // batch)


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_devices(tmp_path: Path) -> None:
    program = """
import sys, numpy as np
from pathlib import Path
from builders import concepts, sae_config
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.sae import train
from headsteer_jax.sae.residuals import ResidualsInMemory
config = sae_config(epochs=4, learning_rate=3e-3)
x = concepts(640, 24, np.random.default_rng(0))
Checkpoints(Path(sys.argv[1]) / "checkpoints", keep=2).forget_after(int(sys.argv[2]))
trained = train.train_members(config, train.seed_members(config.sae), ResidualsInMemory(x), Path(sys.argv[1]))
np.savez(sys.argv[1] + ".npz", *trained.weights, **trained.curves)
"""
    results = []
    for devices, epoch in (("1", "9"), ("2", "3"), ("1", "3")):  # whole on one; from epoch 3 on two; again on one
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "w"), epoch], check=True, cwd=ROOT,
            env=environment(int(devices)),
        )  # fmt: skip
        with np.load(tmp_path / "w.npz") as arrays:
            results.append(dict(arrays))
    for name, values in results[0].items():
        np.testing.assert_allclose(results[1][name], values, atol=1e-5)
        np.testing.assert_array_equal(results[2][name], values)


@pytest.mark.slow
def test_several_devices_train_the_same(tmp_path: Path) -> None:
    program = """
import sys, numpy as np, jax
from pathlib import Path
from builders import concepts, sae_config
from headsteer_jax.sae import train
from headsteer_jax.sae.residuals import ResidualsInMemory
config = sae_config(epochs=3, learning_rate=3e-3)
x = concepts(640, 24, np.random.default_rng(0))
trained = train.train_members(config, train.seed_members(config.sae), ResidualsInMemory(x), Path(sys.argv[1]))
assert jax.device_count() == int(sys.argv[2])
np.savez(sys.argv[1] + ".npz", *trained.weights, **trained.curves)
"""
    results = []
    for devices in ("1", "4"):
        path = tmp_path / devices
        subprocess.run(
            [sys.executable, "-c", program, str(path), devices], check=True, cwd=ROOT,
            env=environment(int(devices)),
        )  # fmt: skip
        with np.load(f"{path}.npz") as arrays:
            results.append(dict(arrays))
    for name, values in results[0].items():
        np.testing.assert_allclose(results[1][name], values, atol=1e-5)


@pytest.mark.parametrize(("batch", "says"), [(64, r"config\.sae\.batch = 64: must be at most the 30")])
def test_batch_larger_than_the_data(tmp_path: Path, batch: int, says: str) -> None:
    config = sae_config(batch=batch)
    with pytest.raises(HeadSteerError, match=says):
        train.train_members(
            config, train.seed_members(config.sae), ResidualsInMemory(np.zeros((30, 24), np.float32)), tmp_path
        )


def test_nan_stops_with_the_epoch(tmp_path: Path) -> None:
    config = sae_config(learning_rate=1e30, epochs=20)
    with pytest.raises(HeadSteerError, match=r"loss turned NaN in epoch \d+; the last good checkpoint"):
        train.train_members(
            config,
            train.seed_members(config.sae),
            ResidualsInMemory(concepts(640, 24, np.random.default_rng(0))),
            tmp_path,
        )


def test_a_grid_goes_on_without_the_members_that_turn_nan(tmp_path: Path) -> None:
    x = concepts(640, 24, np.random.default_rng(0))
    config = sae_config(epochs=20)
    members = grid.grid_members(config.sae, (4,), (1e-3, 1e30), 1)
    trained = train.train_members(config, members, ResidualsInMemory(x), tmp_path / "a", "grid")
    assert np.isfinite(trained.curves["mse"][-1]).tolist() == [True, False]
    with pytest.raises(HeadSteerError, match=r"lower config\.grid\.learning_rates"):
        train.train_members(
            config, grid.grid_members(config.sae, (4,), (1e30,), 1), ResidualsInMemory(x), tmp_path / "b", "grid"
        )
