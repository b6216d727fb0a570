"""The skipping forward pass: the masked model's logits, gates and residuals, whatever the gates drop."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import tiny_config
from helpers import note_layer_forms

from headsteer_jax.config import Config, ModelConfig, SublayerGateConfig, TokenGateConfig
from headsteer_jax.config.schema import GATE_KINDS, GateKind
from headsteer_jax.model import skip
from headsteer_jax.model.skip import (
    is_worthwhile,
    list_rows,
    make_skipping_forward,
    make_skipping_program,
    plan_pieces,
    run_loops,
)
from headsteer_jax.model.vit import build_model, stack_gates

CLASSES = 7


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small layers into several pieces, of few sizes, because each takes time to compile."""
    for name, value in (("VALUES", 16 * 4 * tiny_config().model.width), ("LENGTHS", 3), ("PARTS", 2), ("SMALLEST", 0)):
        monkeypatch.setattr(skip, name, value)


def gated_config(kinds: tuple[GateKind, ...], dropped: str = "zero", patch: int = 2, **model: Any) -> Config:
    """Make a small config of three layers whose kinds of gates begin in different layers."""
    gate = {"sublayers": SublayerGateConfig(bias=0.0), "tokens": TokenGateConfig(bias=0.0)}
    config = tiny_config(kinds=kinds, dropped=dropped, **gate)
    return config.model_copy(update={"model": config.model.model_copy(update={"patch": patch} | model)})


def draw_params(config: Config, gate_bias: float = 0.0) -> Any:
    """Make random parameters, of which the gates have a bias of this much."""
    rng, model = np.random.default_rng(0), build_model(config, CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

    def draw(path: Any, leaf: Any) -> jax.Array:
        names = [key.key for key in path]
        mean = 1.0 if names[-1] == "scale" else 0.0
        if any(name.startswith("decide") for name in names) and names[-1] == "bias":
            mean = gate_bias
        return jnp.asarray(mean + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_images(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 8, 8, 1)).astype(np.float32)


def assert_same(
    config: Config, params: Any, images: np.ndarray, *, one_program: bool = False, **tolerance: float
) -> dict[str, Any]:
    """Compare a form of the skipping pass with the masked model; returns the masked model's `out`."""
    model = build_model(config, CLASSES)
    expected, out = jax.jit(lambda params, x: model.apply(params, x, gating="thresholded"))(params, images)
    forward = jax.jit(make_skipping_program(model)) if one_program else make_skipping_forward(model)
    logits, found = forward(params, images)
    chex.assert_trees_all_close((logits, found), (expected, out), **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))
    chex.assert_trees_all_equal(found["gates"], out["gates"])
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), np.argmax(expected, axis=-1))
    return out


@pytest.mark.parametrize(
    ("kinds", "dropped", "registers"),
    [
        pytest.param(GATE_KINDS, "zero", 0, marks=pytest.mark.slow),
        (GATE_KINDS, "slice", 2),
        pytest.param(GATE_KINDS, "identity", 2, marks=pytest.mark.slow),
        pytest.param(("tokens",), "zero", 0, marks=pytest.mark.slow),
        pytest.param(("sublayers",), "zero", 1, marks=pytest.mark.slow),
        pytest.param(("heads", "sublayers"), "zero", 0, marks=pytest.mark.slow),
        pytest.param(("heads", "tokens"), "identity", 0, marks=pytest.mark.slow),
    ],
)
def test_it_equals_the_masked_model(kinds: tuple[GateKind, ...], dropped: str, registers: int) -> None:
    config = gated_config(kinds, dropped, registers=registers)
    out = assert_same(config, draw_params(config), draw_images(9))
    for kind in kinds:  # the comparison saw open and closed gates
        assert 0 < np.mean(stack_gates(out["gates"], kind)) < 1
    if kinds == GATE_KINDS:  # and an image whose attention runs without any head
        assert any(
            np.any((gates["sublayers"][:, 0] > 0) & ~np.any(gates["heads"] > 0, axis=1))
            for gates in out["gates"].values()
            if "heads" in gates
        )


@pytest.mark.slow
def test_one_program_equals_the_masked_model() -> None:
    config = gated_config(GATE_KINDS)
    config = config.model_copy(update={"model": config.model.model_copy(update={"depth": 4})})  # two layers are a loop
    assert_same(config, draw_params(config), draw_images(5), one_program=True)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [50.0, -50.0])
def test_gates_that_are_all_open_or_all_closed(bias: float) -> None:
    config = gated_config(GATE_KINDS)
    out = assert_same(config, draw_params(config, bias), draw_images(5))
    assert {float(stack_gates(out["gates"], kind).mean()) for kind in GATE_KINDS} == {float(bias > 0)}


@pytest.mark.slow
def test_one_image_and_bfloat16() -> None:
    config = gated_config(GATE_KINDS)
    assert_same(config, draw_params(config), draw_images(1))
    config = gated_config(GATE_KINDS, dtype="bfloat16")
    assert_same(config, draw_params(config), draw_images(6), rtol=0.05, atol=0.05)


def test_a_batch_of_too_little_work_runs_the_masked_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not is_worthwhile(ModelConfig(), 1, 26)
    assert is_worthwhile(ModelConfig(), 250, 26)
    assert not is_worthwhile(ModelConfig.of_size("S"), 1, 65)
    assert is_worthwhile(ModelConfig.of_size("S"), 2, 65)
    config = gated_config(GATE_KINDS)
    assert_same(config, draw_params(config), draw_images(2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bias", "masked_share", "form"),
    [(50.0, 0.8, "dense"), (-50.0, 0.8, "kept"), (0.0, 0.8, "kept"), (0.0, 0.0, "masked")],
)
def test_layers_of_small_batches_run_as_a_whole_where_little_is_dropped(
    bias: float, masked_share: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skip, "MASKED_SHARE", masked_share)
    chosen = note_layer_forms(monkeypatch)
    config = gated_config(GATE_KINDS)
    out = assert_same(config, draw_params(config, bias), draw_images(5))
    assert chosen == [form] * config.model.depth
    for gates in out["gates"].values():
        assert (form == "dense") == all(bool(np.all(g > 0)) for g in gates.values())
    monkeypatch.setattr(skip, "SMALL_ROWS", 0)
    assert_same(config, draw_params(config, bias), draw_images(5))
    assert len(chosen) == config.model.depth


@pytest.mark.parametrize("small", [True, False])
def test_pieces_hold_every_image_and_every_row(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.undo()
    for model in (ModelConfig(), ModelConfig.of_size("S", registers=2)):
        for batch, tokens in ((1, 5), (3, 17), (64, 65), (256, 197)):
            pieces = plan_pieces(model, batch, tokens)
            lengths = [t for t, _ in pieces.attention]
            assert lengths[0] == tokens
            assert lengths[-1] >= 1 + model.registers
            for sizes in (lengths, pieces.mlp, *(images for _, images in pieces.attention)):
                assert list(sizes) == sorted(set(sizes), reverse=True)
            assert all(1 <= b <= batch for _, images in pieces.attention for b in images)
            assert 1 <= pieces.mlp[-1] <= pieces.mlp[0] <= batch * tokens


def test_rows_of_kept_tokens_are_listed_image_by_image() -> None:
    keep_BT = np.random.default_rng(0).random((6, 9)) < 0.5
    kept_rows = list_rows(jnp.asarray(keep_BT))
    expected = np.flatnonzero(keep_BT)
    assert np.asarray(kept_rows.numbers).tolist() == [*expected, *[54] * (54 + 9 - len(expected))]
    counts = keep_BT.sum(axis=1).tolist()
    assert np.asarray(kept_rows.counts).tolist() == [*counts, 0]
    assert np.asarray(kept_rows.begin).tolist() == [0, *np.cumsum(counts)]


def test_loops_do_everything_with_as_few_pieces_as_hold_it() -> None:
    sizes, done = (8, 4, 2), []

    def run(size: int, state: Any) -> Any:
        return state[0] + size, state[1].at[sizes.index(size)].add(1)

    for total in range(20):
        begin, counts = run_loops(run, sizes, jnp.int32(total), jnp.int32(total), (jnp.int32(0), jnp.zeros(3, int)))
        done.append((int(begin), counts.tolist()))
    assert done[0] == (0, [0, 0, 0])
    assert done[1] == (2, [0, 0, 1])
    assert done[5] == (8, [1, 0, 0])
    assert done[11] == (12, [1, 1, 0])
    assert all(total <= begin < total + 4 for total, (begin, _) in enumerate(done))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_program_lowers_for_accelerators(platform: str) -> None:
    config = gated_config(GATE_KINDS)
    traced = jax.jit(make_skipping_program(build_model(config, CLASSES))).trace(draw_params(config), draw_images(4))
    assert "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_program_can_be_exported() -> None:
    config = gated_config(GATE_KINDS)
    model, params, images = build_model(config, CLASSES), draw_params(config), draw_images(4)
    program = make_skipping_program(model)
    exported = jax.export.export(jax.jit(lambda images: program(params, images)[0]))(images)
    found = jax.export.deserialize(exported.serialize()).call(images)
    np.testing.assert_allclose(found, model.apply(params, images, gating="thresholded")[0], rtol=1e-5, atol=1e-5)
