"""The losses on what the gates let run, and the distance to a teacher, against NumPy in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import random_params, tiny_config

from headsteer_jax.config import Config, ModelConfig, SublayerGateConfig, TokenGateConfig
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.model import compute
from headsteer_jax.model.gates import straight_through
from headsteer_jax.model.vit import build_model, draw_noise
from headsteer_jax.train import losses, step

ALL = ("heads", "sublayers", "tokens")
B, H, N, D, DEPTH, CLASSES = 5, 3, 4, 24, 3, 3  # of tiny_config, with patches of 4 on 8x8 images


def gated(**gate: object) -> Config:
    return tiny_config(**({"kinds": ALL} | gate))


def draw_gates(config: Config, seed: int = 0, soft: bool = False) -> dict:
    rng, sizes = np.random.default_rng(seed), {"heads": H, "sublayers": 2, "tokens": N}
    draw = {True: lambda shape: rng.uniform(0, 1, shape), False: lambda shape: rng.integers(0, 2, shape).astype(float)}
    return {
        layer: {kind: draw[soft]((B, sizes[kind])) for kind in config.gate.kinds_in(layer)}
        for layer in config.gated_layers
    }


def in_float32(gates: dict) -> dict:
    return jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gates)


def share_by_hand(gates: dict) -> float:
    """Count the MACs of tiny_config (zero dropped heads) over the dense model's, in float64."""

    def count(gates: dict, decisions: int) -> np.ndarray:
        total = np.full(B, N * 4 * 4 * 1 * D + D * CLASSES, float)
        for layer in range(DEPTH):
            own = gates.get(layer, {})
            tokens = 1 + own["tokens"].sum(axis=1) if "tokens" in own else np.full(B, 1.0 + N)
            width = own["heads"].sum(axis=1) * (D / H) if "heads" in own else np.full(B, float(D))
            attention, mlp = own["sublayers"].T if "sublayers" in own else (1.0, 1.0)
            queries = np.ones(B) if layer == DEPTH - 1 else tokens
            total += attention * D * width * (queries + 2 * tokens)  # query, key, value
            total += attention * 2 * queries * tokens * width + attention * queries * width * D
            total += mlp * queries * 2 * D * (4 * D)
            total += decisions * D * sum(g.shape[1] for g in own.values())
        return total

    return float(np.mean(count(gates, 1)) / count({}, 0)[0])


def test_compute_of_evaluated_images():
    """Each image's count, and the means, from gates as a pass over a split returns them."""
    config = gated()
    gates = draw_gates(config)
    stacked = {kind: np.stack([gates[layer][kind] for layer in config.layers_with(kind)], axis=1) > 0 for kind in ALL}
    found = compute.measure_compute(config, CLASSES, stacked)
    assert set(found) == {"dense_macs", "macs", "share", "usage"}
    np.testing.assert_allclose(found["share"], share_by_hand(gates), rtol=1e-6)
    np.testing.assert_allclose(found["macs"], found["share"] * found["dense_macs"], rtol=1e-6)
    assert found["usage"] == {kind: pytest.approx(stacked[kind].mean()) for kind in ALL}
    usage = compute.measure_usage(stacked)
    np.testing.assert_allclose(usage["heads"], [gates[layer]["heads"].mean() for layer in (1, 2)])
    np.testing.assert_allclose(usage["sublayers"], [gates[layer]["sublayers"].mean(axis=0) for layer in (1, 2)])
    first = {layer: {kind: np.repeat(g[:1], B, axis=0) for kind, g in own.items()} for layer, own in gates.items()}
    macs = compute.count_image_macs(config, CLASSES, stacked)
    np.testing.assert_allclose(macs[0], share_by_hand(first) * found["dense_macs"], rtol=1e-6)


@pytest.mark.parametrize("form", ["absolute", "squared"])
def test_budget_loss(form):
    config = gated(budget=0.5, loss=form, weight=3.0, anneal=0.5)
    gates, logits = draw_gates(config, 0), draw_gates(config, 1)
    pressure, metrics = losses.limit_usage(
        config, CLASSES, in_float32(gates), in_float32(jax.tree.map(lambda g: g - 0.5, logits)), jnp.float32(0.25)
    )
    share = share_by_hand(gates)
    gap = share - 0.75  # halfway from 1 to 0.5
    np.testing.assert_allclose(metrics["macs_sampled"], share, rtol=1e-5)
    np.testing.assert_allclose(metrics["macs_thresholded"], share_by_hand(logits), rtol=1e-5)
    np.testing.assert_allclose(metrics["macs_target"], 0.75)
    np.testing.assert_allclose(pressure, 3 * (abs(gap) if form == "absolute" else gap**2), rtol=1e-4)
    for kind in ALL:
        layers = [gates[layer][kind] for layer in config.layers_with(kind)]
        expected = [g.mean(axis=0) if kind == "sublayers" else g.mean() for g in layers]
        name = "usage_sampled" + {"heads": ""}.get(kind, f"_{kind}")
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)
        assert name.replace("sampled", "target") not in metrics


@pytest.mark.parametrize("form", ["absolute", "squared"])
def test_the_budgets_gradient_is_that_of_the_soft_surrogate(form):
    """Finite differences, in float64, of the loss where hard gates move as sigmoid((m + noise) / tau) moves."""
    config = gated(budget=0.3, loss=form, anneal=0.0, temperature=0.7, sublayers=SublayerGateConfig(temperature=2.0))
    rng = np.random.default_rng(2)
    logits = jax.tree.map(lambda g: rng.standard_normal(g.shape), draw_gates(config))
    noise = jax.tree.map(lambda g: rng.logistic(size=g.shape), logits)
    taus = {"heads": 0.7, "sublayers": 2.0, "tokens": 1.0}

    def loss(logits):
        gates = {
            layer: {kind: straight_through(m, noise[layer][kind], taus[kind]) for kind, m in by_kind.items()}
            for layer, by_kind in logits.items()
        }
        return losses.limit_usage(config, CLASSES, gates, logits, jnp.float32(1))[0]

    def surrogate(moved):
        gates = {}
        for layer, by_kind in moved.items():
            gates[layer] = {}
            for kind, m in by_kind.items():
                at, z = logits[layer][kind] + noise[layer][kind], m + noise[layer][kind]
                soft, soft_at = (1 / (1 + np.exp(-x / taus[kind])) for x in (z, at))
                gates[layer][kind] = (at > 0) + soft - soft_at
        gap = share_by_hand(gates) - 0.3
        return config.gate.weight * (abs(gap) if form == "absolute" else gap**2)

    slopes = jax.jit(jax.grad(loss))(in_float32(logits))
    for layer, by_kind in logits.items():
        for kind, m in by_kind.items():
            for i in (0, m.shape[1] - 1):
                ends = []
                for h in (1e-4, -1e-4):
                    moved = jax.tree.map(np.copy, logits)
                    moved[layer][kind][1, i] += h
                    ends.append(surrogate(moved))
                np.testing.assert_allclose(slopes[layer][kind][1, i], (ends[0] - ends[1]) / 2e-4, rtol=1e-3)


@pytest.mark.parametrize("running_only", [False, True])
def test_targets_by_kind_are_adavits(running_only):
    """2 |heads - t| + 2 |sublayers - t| + 2 (tokens - t)^2; in its code heads count where a sublayer runs."""
    config = gated(
        scope="mean", target=0.5, weight=2.0, anneal=0.0, running_only=running_only,
        sublayers=SublayerGateConfig(target=0.4), tokens=TokenGateConfig(target=0.3, loss="squared"),
    )  # fmt: skip
    gates = draw_gates(config)
    heads, sublayers, tokens = (
        np.stack([gates[layer][kind] for layer in config.layers_with(kind)], axis=1) for kind in ALL
    )
    counted = np.broadcast_to((sublayers.sum(axis=-1) > 0)[..., None] | (not running_only), heads.shape)
    assert counted.all() != running_only  # some block of these images does not run
    expected = 2 * abs(heads[counted].mean() - 0.5) + 2 * abs(sublayers.mean() - 0.4) + 2 * (tokens.mean() - 0.3) ** 2
    pressure, metrics = losses.limit_usage(config, CLASSES, in_float32(gates), in_float32(gates), jnp.float32(1))
    np.testing.assert_allclose(pressure, expected, rtol=1e-5)
    targets = [metrics[name] for name in ("usage_target", "usage_target_sublayers", "usage_target_tokens")]
    np.testing.assert_allclose(targets, [0.5, 0.4, 0.3])
    assert "macs_target" not in metrics


def test_each_layer_has_its_own_target_in_the_scope_layer():
    config = gated(kinds=("tokens",), anneal=0.0, tokens=TokenGateConfig(target=0.3))
    gates = draw_gates(config)
    pressure, _ = losses.limit_usage(config, CLASSES, in_float32(gates), in_float32(gates), jnp.float32(1))
    expected = 2 * np.mean([abs(gates[layer]["tokens"].mean() - 0.3) for layer in range(DEPTH)])
    np.testing.assert_allclose(pressure, expected, rtol=1e-5)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def test_teacher_by_hand():
    rng = np.random.default_rng(3)
    student, teacher = (tuple(rng.standard_normal((2, B, 7)) * scale) for scale in (2, 3))
    gate = gated(teacher_logits=0.7, teacher_hidden=0.2, teacher_temperature=4.0).gate
    log_p, log_q = log_softmax(teacher[0] / 4), log_softmax(student[0] / 4)
    logits = 0.7 * 16 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    x, t = ((x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) for x in (student[1], teacher[1]))
    hidden = 0.2 * ((x - t) ** 2).mean()
    cast = [tuple(np.float32(part) for part in parts) for parts in (student, teacher)]
    distance, terms = losses.follow_teacher(gate, *cast)
    np.testing.assert_allclose(terms["teacher_logits"], logits, rtol=1e-4)
    np.testing.assert_allclose(terms["teacher_hidden"], hidden, rtol=1e-4)
    np.testing.assert_allclose(distance, logits + hidden, rtol=1e-4)
    slope = jax.grad(lambda teacher: losses.follow_teacher(gate, cast[0], teacher)[0])(cast[1])
    chex.assert_trees_all_equal(slope, jax.tree.map(np.zeros_like, cast[1]))  # it is frozen


def test_a_steps_loss_is_the_sum_of_its_terms():
    """Targets mixed as mixup does; the teacher's term is measured from logits that the model computes by itself."""
    config = gated(budget=0.5, teacher_logits=1.0, teacher_hidden=1.0)
    model, params = build_model(config, CLASSES), random_params(config, CLASSES)
    teacher = random_params(config, CLASSES, seed=1)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((B, 8, 8, 1)).astype(np.float32)
    targets = rng.dirichlet(np.ones(CLASSES), B).astype(np.float32)

    @jax.jit
    def run(params, teacher):
        noise = draw_noise(jax.random.key(0), model, B)
        inputs = step.Batch(images, targets, noise)
        # at the end of annealing no noise is left
        loss = step.loss_and_metrics(model, params, inputs, jnp.float32(1), teacher, config)
        return loss, model.apply(params, images), model.apply(teacher, images, gating="dense")[0]

    (loss, metrics), (logits, out), dense = jax.tree.map(np.asarray, run(params, teacher))
    cross_entropy = -(targets * log_softmax(logits.astype(float))).sum(axis=1).mean()
    log_p, log_q = (log_softmax(z.astype(float) / config.gate.teacher_temperature) for z in (dense, logits))
    divergence = 25 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    budget = config.gate.weight * abs(share_by_hand(jax.tree.map(np.float64, out["gates"])) - 0.5)
    np.testing.assert_allclose(metrics["cross_entropy"], cross_entropy, rtol=1e-4)
    np.testing.assert_allclose(metrics["teacher_logits"], divergence, rtol=1e-3)
    np.testing.assert_allclose(metrics["usage_loss"], budget, rtol=1e-4)
    np.testing.assert_allclose(loss, cross_entropy + budget + divergence + metrics["teacher_hidden"], rtol=1e-4)


def test_heads_alone_draw_the_noise_that_they_always_drew():
    key, model = jax.random.key(5), build_model(tiny_config(), CLASSES)
    everything = draw_noise(key, build_model(gated(), CLASSES), B)
    assert {kind: noise.shape for kind, noise in everything.items()} == {
        "heads": (B, 2, H), "sublayers": (B, 2, 2), "tokens": (B, 3, N)
    }  # fmt: skip
    heads = jax.random.logistic(key, (B, DEPTH - 1, H))
    chex.assert_trees_all_equal(draw_noise(key, model, B), {"heads": heads})
    chex.assert_trees_all_equal(everything["heads"], heads)
    assert np.unique(np.concatenate([np.ravel(noise) for noise in everything.values()])).size == B * (6 + 4 + 12)


@pytest.mark.parametrize("kinds", [ALL, ("heads",), ("tokens",)])
def test_a_budget_that_cannot_be_reached(kinds):
    closed = jax.tree.map(np.zeros_like, draw_gates(gated(kinds=kinds)))
    least = share_by_hand(closed)
    with pytest.raises(HeadSteerError) as error, explain_errors("nothing"):
        losses.check_budget(gated(kinds=kinds, budget=0.9 * least), CLASSES)
    text = str(error.value)
    named = float(text.split("must be at least ")[1].split(",")[0])
    assert least <= named < least + 2e-4
    assert text.startswith("config.gate.budget = ")
    assert "\n" not in text
    losses.check_budget(gated(kinds=kinds, budget=named), CLASSES)  # what the error names works
    losses.check_budget(gated(kinds=kinds), CLASSES)


def test_counts_beyond_32_bits():
    """DeiT-S has 4.6 G multiply-accumulates; without the first layer's heads and sublayers there is a rest."""
    config = gated(budget=0.01)
    model = ModelConfig.of_size("S", patch=16)
    data = config.data.model_copy(update={"image_size": 224, "channels": 3})
    config = config.model_copy(update={"model": model, "data": data})
    with pytest.raises(HeadSteerError, match=r"config\.gate\.budget = 0\.01: must be at least 0\.01\d+, because"):
        losses.check_budget(config, 1000)


def test_a_teacher_needs_a_dense_phase():
    config = gated(teacher_hidden=0.5).model_dump()
    config["train"]["dense"]["steps"] = 0
    with pytest.raises(ValueError, match=r"gate\.teacher_hidden = 0\.5: must be 0, because the teacher is the dense"):
        Config.model_validate(config)
