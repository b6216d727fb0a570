"""Gates of heads, sublayers and tokens: the block equals a float64 reference, forward and backward."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import tiny_config

from headsteer_jax.config import Config, MachineConfig, SublayerGateConfig, TokenGateConfig
from headsteer_jax.config.schema import GATE_KINDS, GateKind
from headsteer_jax.model.vit import Intervention, build_model, draw_noise, stack_gates, training_form

ALL = GATE_KINDS
SUBSETS: list[tuple[GateKind, ...]] = [kinds for size in (1, 2, 3) for kinds in itertools.combinations(ALL, size)]
CLASSES = 7
CASES = [
    pytest.param(
        kinds, dropped, registers,
        id="-".join((*kinds, dropped, str(registers))),
        marks=[] if (kinds, registers) == (ALL, 2) and dropped != "zero" else pytest.mark.slow,
    )
    for kinds in SUBSETS
    for dropped in ("zero", "identity", "slice")
    for registers in (0, 2)
    if "heads" in kinds or dropped == "zero"
]  # fmt: skip


def gated_config(kinds: tuple[GateKind, ...], dropped: str = "zero", registers: int = 0, **fields: Any) -> Config:
    """Make a small config whose gates start at 1/2 and whose kinds begin in different layers."""
    gate = {
        "threshold": 0.4,
        "sublayers": SublayerGateConfig(first_layer=1, bias=0.0, temperature=2.0),
        "tokens": TokenGateConfig(first_layer=0, bias=0.0, temperature=0.7, threshold=0.6),
    } | fields
    config = tiny_config(kinds=kinds, dropped=dropped, **gate)
    return config.model_copy(update={"model": config.model.model_copy(update={"registers": registers})})


def random_params(config: Config, classes: int) -> Any:
    """Make parameters that are nowhere 0, without compiling the model's initialisation."""
    rng, model = np.random.default_rng(0), build_model(config, classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

    def draw(path: Any, leaf: Any) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def perturb(tree: Any, name: str, size: float) -> tuple[Any, Any]:
    """Move one array of the model, or one submodule of a block, in a random direction -> (tree, direction)."""
    rng = np.random.default_rng(len(name))
    outer, _, inner = name.partition(".")

    def move(path: Any, leaf: np.ndarray) -> np.ndarray:
        keys = [key.key for key in path[1:3]]
        moves = keys == [outer, inner] if inner else keys[0] == outer
        return rng.standard_normal(leaf.shape) if moves else np.zeros(leaf.shape)

    direction = jax.tree_util.tree_map_with_path(move, tree)
    return jax.tree.map(lambda leaf, d: leaf + size * d, tree, direction), direction


def surrogate(params: Any, image: np.ndarray, config: Config, noise: dict[str, np.ndarray]) -> Any:
    """Make the function whose derivative at `params` is the straight-through gradient, as one of the parameters.

    Its gates are those at `params`, hard, plus the change of sigmoid((m + noise) / tau) from there.
    """
    base: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def settings(kind: str) -> Any:
        return config.gate if kind == "heads" else getattr(config.gate, kind)

    def decide(layer: int, kind: str, m: np.ndarray) -> np.ndarray:
        noisy = m + noise[kind][layer - settings(kind).first_layer]
        soft = 1 / (1 + np.exp(-noisy / settings(kind).temperature))
        hard, soft_before = base.setdefault((layer, kind), ((noisy > 0).astype(float), soft))
        return hard + soft - soft_before

    reference.vit(params, image, config, decide)  # records the gates at `params`
    return lambda moved: reference.vit(moved, image, config, decide)


@pytest.mark.parametrize(("kinds", "dropped", "registers"), CASES)
def test_forward_and_gradient_match_the_reference(kinds: tuple[GateKind, ...], dropped: str, registers: int) -> None:
    """The gradient is that of the surrogate, by central differences in float64, for each parameter's array."""
    config = gated_config(kinds, dropped, registers)
    model, params, images = build_model(config, CLASSES), random_params(config, CLASSES), normal(0, 3, 8, 8, 1)
    noise = {kind: np.asarray(value) for kind, value in draw_noise(jax.random.key(3), model, 3).items()}
    weights = normal(1, CLASSES)
    exact = reference.in_float64(params)

    def total(params: Any) -> Any:
        logits, out = model.apply(params, images, gating="sampled", noise=noise)
        return jnp.sum(logits @ weights), (logits, out)

    (_, (logits, out)), gradient = jax.value_and_grad(total, has_aux=True)(params)
    functions = []
    for i, image in enumerate(images.astype(np.float64)):
        functions.append(surrogate(exact, image, config, {kind: value[i] for kind, value in noise.items()}))
        answer, gates, gate_logits, _ = functions[-1](exact)
        chex.assert_trees_all_close(logits[i], answer, rtol=1e-4, atol=1e-4)
        for name, expected in (("gates", gates), ("gate_logits", gate_logits)):
            assert {layer: set(by_kind) for layer, by_kind in out[name].items()} == {
                layer: set(by_kind) for layer, by_kind in expected.items()
            }
            own = jax.tree.map(lambda leaf, i=i: leaf[i], out[name])
            chex.assert_trees_all_close(own, expected, rtol=1e-4, atol=1e-4)
    for kind in kinds:  # the comparison saw open and closed gates
        assert 0 < np.mean(stack_gates(out["gates"], kind)) < 1
    names = [name for name in exact["params"] if not name.startswith("layers_")]
    names += [f"layers_{layer}.{part}" for layer in range(3) for part in exact["params"][f"layers_{layer}"]]
    for name in names:
        after, direction = perturb(exact, name, 1e-5)
        before, _ = perturb(exact, name, -1e-5)
        expected = sum(weights @ (function(after)[0] - function(before)[0]) for function in functions) / 2e-5
        products = jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), gradient, direction)
        found = sum(jax.tree.leaves(products))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("normalise", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_thresholded_gates_match_the_reference(normalise: bool) -> None:
    tokens = TokenGateConfig(bias=0.0, threshold=0.6, normalise=normalise)
    config = gated_config(ALL, "slice", tokens=tokens, layer_norm=True)
    model, params, images = build_model(config, CLASSES), random_params(config, CLASSES), normal(0, 5, 8, 8, 1)
    logits, out = model.apply(params, images)
    for i, image in enumerate(images.astype(np.float64)):
        answer, gates, *_ = reference.vit(reference.in_float64(params), image, config, "thresholded")
        chex.assert_trees_all_close(logits[i], answer, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], float), out["gates"]), gates)


@pytest.mark.parametrize(
    ("dropped", "dtype"),
    [
        ("zero", "float32"),
        ("slice", "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("identity", "float32"), ("slice", "float32"), ("identity", "bfloat16"))
        ),
    ],
)
def test_open_gates_are_the_dense_model_bit_for_bit(dropped: str, dtype: str) -> None:
    """All kinds together, and each by itself, in every layer, whether or not the layer decides it."""
    config = gated_config(ALL, dropped, registers=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    model = training_form(build_model(config, CLASSES), config, jax.devices()[:1])
    params = random_params(config, CLASSES)
    images = normal(0, 4, 8, 8, 1)

    @jax.jit
    def run(params: Any, gates: Any) -> Any:
        forced = {layer: Intervention(gates=by_kind) for layer, by_kind in gates.items()}
        return model.apply(params, images, gating="dense", interventions=forced)[0]

    opened = {"heads": jnp.ones((4, 3)), "sublayers": jnp.ones((4, 2)), "tokens": jnp.ones((4, 4))}
    dense = run(params, {})
    alone = [{kind: opened[kind]} for kind in ALL] if (dropped, dtype) == ("zero", "float32") else []
    # with one kind alone, the XLA of JAX 0.7 fuses the model differently on a CPU
    atol = 0.0 if jax.__version_info__ >= (0, 8) else 2e-6
    for gates in [opened, *alone]:
        chex.assert_trees_all_close(run(params, dict.fromkeys(range(3), gates)), dense, rtol=0, atol=atol)


@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gating", ["sampled", pytest.param("thresholded", marks=pytest.mark.slow)])
def test_scanned_and_rematerialised_layers_are_the_same(gating: str, remat: bool) -> None:
    """Only the layers that have every kind are scanned, and each gets its own noise."""
    config = gated_config(ALL, "slice", registers=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"depth": 5})})
    how = MachineConfig(scan_layers=True, remat=remat)
    plain, scanned = (build_model(c, CLASSES) for c in (config, config.model_copy(update={"machine": how})))
    params, images = random_params(config, CLASSES), normal(0, 3, 8, 8, 1)
    noise = draw_noise(jax.random.key(1), plain, 3) if gating == "sampled" else {}

    def total(model: Any, params: Any) -> Any:
        logits, out = model.apply(params, images, gating=gating, noise=noise)
        return (logits * jnp.arange(7)).sum(), (logits, out)

    assert jax.jit(lambda p: total(scanned, p)[0]).lower(params).as_text().count("stablehlo.while") >= 1
    (_, one), one_gradient = jax.jit(jax.value_and_grad(lambda p: total(plain, p), has_aux=True))(params)
    (_, two), two_gradient = jax.jit(jax.value_and_grad(lambda p: total(scanned, p), has_aux=True))(params)
    chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(one_gradient, two_gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dropped", [pytest.param("zero", marks=pytest.mark.slow), "identity", "slice"])
def test_contributions_give_every_pattern_of_the_last_layer(dropped: str) -> None:
    """The sums of contributions are the model with the gates of heads and sublayers forced, which keeps its tokens."""
    config = gated_config(ALL, dropped)
    model, params, images = build_model(config, CLASSES), random_params(config, CLASSES), normal(0, 5, 8, 8, 1)
    patterns = np.array(list(itertools.product([0.0, 1.0], repeat=5)), np.float32)  # three heads, two sublayers

    def compare(m: Any) -> Any:
        x_BTD = m.before(images, 2)
        always, parts = m.last_contributions(x_BTD)

        def run(pattern: jax.Array) -> Any:
            gates = {"heads": pattern[None, :3], "sublayers": pattern[None, 3:]}
            added = always + jnp.einsum("H,BHD->BD", pattern[:3], parts, precision="highest")
            forced = {kind: jnp.broadcast_to(g, (5, g.shape[-1])) for kind, g in gates.items()}
            x, out = m.blocks(x_BTD, 2, interventions={2: Intervention(gates=forced)})
            return m.last_logits(x_BTD[:, 0], added, gates), m.classify(x[:, 0]), out["gates"][2]["tokens"]

        return jax.lax.map(run, patterns)

    summed, forced, tokens = jax.jit(lambda p: model.apply(p, method=compare))(params)
    assert 0 < np.mean(tokens) < 1
    assert summed.shape == (32, 5, CLASSES)
    chex.assert_trees_all_close(summed, forced, rtol=1e-4, atol=1e-4)
    assert len(np.unique(np.round(np.asarray(forced), 3), axis=0)) > 16


def test_a_dropped_patch_keeps_its_residual_and_returns() -> None:
    """It changes nothing, whatever it holds, even where its scores would be far above all others."""
    config = gated_config(("tokens",), registers=1)
    model, params = build_model(config, CLASSES), random_params(config, CLASSES)
    x, kept = normal(0, 2, 6, 24), jnp.array([[1.0, 0.0, 1.0, 1.0]] * 2)
    other = x.copy()
    other[:, 3] *= 1e4
    run = jax.jit(
        lambda x, stop, t: model.apply(
            params, x, 0, stop=stop, interventions={0: Intervention(gates={"tokens": t})}, method="blocks"
        )[0],
        static_argnums=1,
    )
    one, two = run(x, 1, kept), run(other, 1, kept)
    rest = [0, 1, 2, 4, 5]
    chex.assert_trees_all_equal(one[:, rest], two[:, rest])
    chex.assert_trees_all_equal(one[:, 3], jnp.asarray(x[:, 3]))
    without = model.apply(params, jnp.asarray(x[:, rest]), method=_run_first_block)
    chex.assert_trees_all_close(one[:, rest], without, rtol=1e-5, atol=1e-5)
    again = model.apply(params, one, 1, stop=2, gating="dense", method="blocks")[0]
    assert np.abs(again[:, 3] - one[:, 3]).max() > 0.1


def _run_first_block(model: Any, x_BTD: jax.Array) -> jax.Array:
    block = model.layers[0]
    return block.finish(x_BTD, *block.heads(x_BTD, None))


def test_tokens_are_steered_by_what_their_gates_read() -> None:
    config = gated_config(("heads", "tokens"), registers=1)
    model, params, images = build_model(config, CLASSES), random_params(config, CLASSES), normal(0, 4, 8, 8, 1)
    other = jnp.asarray(normal(1, 4, 4, 24))
    steered, out = model.apply(params, images, interventions={1: Intervention(token_input=lambda _: other)})
    _, plain = model.apply(params, images)
    expected = (model.apply(params, other, 1, "tokens", method="gate_logits") > 0).astype(jnp.float32)
    chex.assert_trees_all_equal(out["gates"][1]["tokens"], expected)
    chex.assert_trees_all_equal(out["gates"][1]["heads"], plain["gates"][1]["heads"])
    forced, _ = model.apply(params, images, interventions={1: Intervention(gates={"tokens": expected})})
    chex.assert_trees_all_close(steered, forced, rtol=1e-6)
    residual, out = model.apply(
        params, images, interventions={1: Intervention(token_input=lambda x: x * 0 + other, steer_residual=True)}
    )
    chex.assert_trees_all_equal(out["gates"][1]["tokens"], expected)
    assert np.abs(residual - steered).max() > 1e-3


def test_a_threshold_moves_the_bias() -> None:
    """sigmoid(W x + b) > t exactly where the logit is positive."""
    config = gated_config(ALL)
    model, params, images = build_model(config, CLASSES), random_params(config, CLASSES), normal(0, 6, 8, 8, 1)
    _, out = model.apply(params, images)
    linear = params["params"]["layers_1"]["decide"]["linear"]
    raw = out["cls"][1] @ linear["kernel"] + linear["bias"]
    chex.assert_trees_all_equal(np.asarray(out["gates"][1]["heads"]) > 0, np.asarray(jax.nn.sigmoid(raw)) > 0.4)


def test_parameters_of_the_default_kinds_are_as_ever() -> None:
    """More kinds of gates add parameters and change no other name; those of heads alone have no new ones."""
    names = {}
    for kinds in (("heads",), ALL):
        model = build_model(gated_config(kinds), CLASSES)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
        names[kinds] = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
    new = names[ALL].keys() - names[("heads",)].keys()
    assert names[("heads",)].items() <= names[ALL].items()
    assert new == {
        f"['layers_{layer}']['decide_{kind}']['linear']['{leaf}']"
        for kind, first in (("tokens", 0), ("sublayers", 1))
        for layer in range(first, 3)
        for leaf in ("kernel", "bias")
    }
