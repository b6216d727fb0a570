"""The model equals a float64 reference, image by image and head by head."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import random_params, tiny_config

from headsteer_jax.config import Config, MachineConfig
from headsteer_jax.model import vit
from headsteer_jax.model.vit import Intervention, build_model, stack_gates


def with_model(config: Config, **fields: object) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=fields)})


@pytest.mark.parametrize("gating", ["dense", "thresholded"])
@pytest.mark.parametrize("dropped", ["zero", "identity"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_matches_reference(images, gating, dropped, layer_norm, gelu):
    config = with_model(tiny_config(dropped=dropped, layer_norm=layer_norm), gelu=gelu)
    params = random_params(config, 7)
    logits, out = jax.jit(lambda x: vit.build_model(config, 7).apply(params, x, gating=gating))(images)
    exact = reference.in_float64(params)
    decisions = []
    for i, image in enumerate(images):
        answer, gates, gate_logits, cls = reference.vit(exact, image.astype(np.float64), config, gating)
        chex.assert_trees_all_close(logits[i], answer, rtol=2e-5, atol=2e-5)
        for layer in gates:
            chex.assert_trees_all_close(
                out["gate_logits"][layer]["heads"][i], gate_logits[layer]["heads"], rtol=2e-5, atol=2e-5
            )
            chex.assert_trees_all_equal(np.asarray(out["gates"][layer]["heads"][i], float), gates[layer]["heads"])
            decisions.append(gates[layer]["heads"])
        for layer in cls:
            chex.assert_trees_all_close(out["cls"][layer][i], cls[layer], rtol=2e-5, atol=2e-5)
    if gating == "thresholded":  # the comparison saw heads on and off
        assert 0 < np.mean(decisions) < 1
    assert sorted(out["gates"]) == [1, 2]


@pytest.mark.parametrize("dropped", ["zero", "identity"])
def test_forced_gates_match_reference(images, dropped):
    config = tiny_config(dropped=dropped)
    params = random_params(config, 7)
    forced = {1: np.array([0.0, 1.0, 1.0]), 2: np.array([1.0, 0.0, 0.0])}
    batched = {layer: Intervention(gates=jnp.tile(g, (len(images), 1))) for layer, g in forced.items()}
    logits, _ = jax.jit(lambda x: vit.build_model(config, 7).apply(params, x, interventions=batched))(images)
    for i, image in enumerate(images):
        answer, *_ = reference.vit(
            reference.in_float64(params), image.astype(np.float64), config, "thresholded", forced
        )
        chex.assert_trees_all_close(logits[i], answer, rtol=2e-5, atol=2e-5)


def test_sampled_without_noise_equals_thresholded(images):
    config = tiny_config()
    model, params = vit.build_model(config, 7), random_params(config, 7)
    sampled, out = model.apply(params, images, gating="sampled", noise={"heads": jnp.zeros((5, 2, 3))})
    thresholded, expected = model.apply(params, images)
    chex.assert_trees_all_equal(sampled, thresholded)
    chex.assert_trees_all_equal(out["gates"], expected["gates"])


@pytest.mark.parametrize("cut", [1, 2])
def test_prefix_then_suffix_is_the_whole(images, cut):
    config = tiny_config()
    model, params = vit.build_model(config, 7), random_params(config, 7)
    whole, _ = model.apply(params, images)

    def halves(m, images):
        x, _ = m.blocks(m.embed(images), 0, stop=cut)
        x, _ = m.blocks(x, cut)
        return m.classify(x[:, 0])

    chex.assert_trees_all_equal(model.apply(params, images, method=halves), whole)


def test_gate_input_steers_the_gate_alone(images):
    """Policy steering: the gate reads something else, the block computes on x."""
    config = tiny_config()
    model, params = vit.build_model(config, 7), random_params(config, 7)
    other = jnp.asarray(np.random.default_rng(1).standard_normal((5, 24)), jnp.float32)
    steered, out = model.apply(params, images, interventions={2: Intervention(gate_input=lambda _: other)})
    gates = model.apply(params, other, 2, method="gate_logits") > 0
    chex.assert_trees_all_equal(out["gates"][2]["heads"], gates.astype(jnp.float32))
    forced, _ = model.apply(params, images, interventions={2: Intervention(gates=gates.astype(jnp.float32))})
    chex.assert_trees_all_equal(steered, forced)


def test_bfloat16_is_the_type_of_training_only_and_keeps_parameters_and_outputs_in_float32(images):
    config = with_model(tiny_config(), dtype="bfloat16")
    params = random_params(config, 7)
    model = vit.training_form(vit.build_model(config, 7), config, jax.devices()[:1])
    logits, out = jax.jit(lambda x: model.apply(params, x, gating="dense"))(images)
    chex.assert_type([logits, out["cls"][2], out["gate_logits"][2]["heads"]], jnp.float32)
    chex.assert_type(jax.tree.leaves(params), jnp.float32)
    full, _ = jax.jit(lambda x: vit.build_model(config, 7).apply(params, x, gating="dense"))(images)
    assert 0 < np.abs(logits - full).max() < 0.1 * np.abs(full).max()  # computed otherwise, but the same model


def test_dense_has_no_gradient_for_gates(images):
    config = tiny_config()
    params = random_params(config, 7)
    grads = jax.jit(jax.grad(lambda p: vit.build_model(config, 7).apply(p, images, gating="dense")[0].sum()))(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads["params"]["layers_2"]["decide"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["params"]["layers_1"]["mlp_out"]))


def test_sizes():
    config = tiny_config().model.of_size("S", patch=8)
    assert (config.depth, config.width, config.heads) == (12, 384, 6)
    shapes = jax.eval_shape(
        vit.build_model(tiny_config().model_copy(update={"model": config.model_copy(update={"patch": 4})}), 100).init,
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 1)),
    )
    backbone = sum(
        np.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "decide" not in str(path)
    )
    D, L = 384, 12
    block = 4 * (D * D + D) + 2 * 4 * D * D + 5 * D + 4 * D
    assert backbone == L * block + (16 * D + D) + D + 5 * D + 2 * D + (100 * D + 100)


@pytest.mark.parametrize("width", [96, 26])
def test_positions_start_as_sines_and_cosines_of_column_and_row(width):
    """big_vision's posemb_sincos_2d, entry by entry; CLS and what a quarter of the width leaves over are 0."""
    found = np.asarray(vit.sin_cos_positions(1 + 9, width))[0]
    assert not found[0].any()
    quarter = width // 4
    for row in range(3):
        for column in range(3):
            omega = [10_000 ** -(i / (quarter - 1)) for i in range(quarter)]
            waves = [wave(place * w) for place in (column, row) for wave in (np.sin, np.cos) for w in omega]
            np.testing.assert_allclose(found[1 + 3 * row + column, : 4 * quarter], waves, atol=1e-6)
    assert not found[:, 4 * quarter :].any()


def test_registers_are_tokens_without_positions(images):
    """CLS and patches keep their positions, and the registers are attended to."""
    config = with_model(tiny_config(), registers=2)
    model, params = vit.build_model(config, 7), random_params(config, 7)
    plain = {"params": {name: value for name, value in params["params"].items() if name != "registers"}}
    x, without = (
        jax.jit(lambda p, m=m: m.apply(p, images, method="embed"))(p)
        for m, p in ((model, params), (vit.build_model(with_model(config, registers=0), 7), plain))
    )
    assert x.shape == (5, 1 + 2 + 4, 24)
    chex.assert_trees_all_equal(x[:, [0, 3, 4, 5, 6]], without)
    chex.assert_trees_all_equal(x[:, 1:3], jnp.broadcast_to(params["params"]["registers"], (5, 2, 24)))
    run = jax.jit(lambda p: model.apply(p, images, gating="dense")[0])
    other = {"params": params["params"] | {"registers": np.asarray(params["params"]["registers"])[:, :, ::-1]}}
    assert np.abs(run(params) - run(other)).max() > 1e-3


def test_steer_residual_lets_the_block_compute_on_it(images):
    config = tiny_config()
    model, params = vit.build_model(config, 7), random_params(config, 7)
    other = jnp.asarray(np.random.default_rng(1).standard_normal((5, 24)), jnp.float32)
    change = Intervention(gate_input=lambda x: x + other, steer_residual=True)
    steered, _ = model.apply(params, images, interventions={1: change})
    x_BTD, _ = model.apply(params, images, method=lambda m, images: m.blocks(m.embed(images), 0, stop=1))
    x_BTD = x_BTD.at[:, 0].add(other)
    logits = model.apply(params, x_BTD, method=lambda m, x: m.classify(m.blocks(x, 1)[0][:, 0]))
    chex.assert_trees_all_close(steered, logits, rtol=1e-6)


@pytest.mark.parametrize(
    ("gating", "remat"),
    [
        ("sampled", True),
        ("thresholded", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("dense", False), ("dense", True), ("sampled", False), ("thresholded", True))
        ),
    ],
)
def test_scanned_and_rematerialised_layers_are_the_same(gating: str, remat: bool) -> None:
    """The same parameters and, to rounding, the same answers, gates, residuals and gradients."""
    config = tiny_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"depth": 5})})
    how = MachineConfig(scan_layers=True, remat=remat)
    plain, scanned = build_model(config, 7), build_model(config.model_copy(update={"machine": how}), 7)
    params = random_params(config, 7)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 8, 8, 1)).astype(np.float32)
    noise = {"heads": rng.logistic(size=(6, 4, 3)).astype(np.float32)} if gating == "sampled" else {}

    def total(model, params):
        logits, out = model.apply(params, images, gating=gating, noise=noise)
        return (logits * jnp.arange(7)).sum() + 3 * stack_gates(out["gates"]).mean(), (logits, out)

    (_, one), one_grad = jax.jit(jax.value_and_grad(lambda p: total(plain, p), has_aux=True))(params)
    (_, two), two_grad = jax.jit(jax.value_and_grad(lambda p: total(scanned, p), has_aux=True))(params)
    chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(one_grad, two_grad, rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_equal_shapes(params, jax.eval_shape(scanned.init, jax.random.key(0), images))
    text = jax.jit(lambda p: total(scanned, p)[0]).lower(params).as_text()
    assert text.count("stablehlo.while") >= 1  # there is a loop
    backward = str(jax.make_jaxpr(jax.grad(lambda p: total(scanned, p)[0]))(params))
    assert ("remat" in backward or "checkpoint" in backward) == remat


def test_a_scan_is_left_where_something_intervenes() -> None:
    config = tiny_config()
    model = build_model(config.model_copy(update={"machine": MachineConfig(scan_layers=True)}), 7)
    params, images = random_params(config, 7), np.random.default_rng(0).standard_normal((4, 8, 8, 1))
    closed = {1: Intervention(gates=jnp.zeros((4, 3)))}
    plain, scanned = (
        jax.jit(lambda p, m=m: m.apply(p, images, interventions=closed))(params)
        for m in (build_model(config, 7), model)
    )
    chex.assert_trees_all_equal(scanned, plain)
