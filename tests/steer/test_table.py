"""The table of all gate patterns against the model, in float64, pattern by pattern."""

import chex
import jax
import numpy as np
import pytest
import reference
from builders import steer_config, trained_model
from helpers import watch_progress

from headsteer_jax.config import Config
from headsteer_jax.data.dataset import Split
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model import vit
from headsteer_jax.steer import table
from headsteer_jax.steer.gates import LayerGates, gates_to_pattern, pattern_to_gates
from headsteer_jax.steer.sweep import choose_method


def config_of(layer: int = -1, dropped: str = "zero", dtype: str = "float32", **steer: object) -> Config:
    config = steer_config(**steer)
    return config.model_copy(
        update={
            "sae": config.sae.model_copy(update={"layer": layer}),
            "gate": config.gate.model_copy(update={"dropped": dropped}),
            "model": config.model.model_copy(update={"dtype": dtype}),
        }
    )


def with_kinds(config: Config, *kinds: str, **gate: object) -> Config:
    """Gate these kinds, so that some gates of every kind are open and some are closed."""
    tokens = config.gate.tokens.model_copy(update={"bias": 0.0, "threshold": 0.5, "normalise": False})
    sublayers = config.gate.sublayers.model_copy(update={"bias": 0.0, "threshold": 0.45})
    update = {"kinds": kinds, "tokens": tokens, "sublayers": sublayers} | gate
    return config.model_copy(update={"gate": config.gate.model_copy(update=update)})


def filled(config: Config, split: Split) -> tuple[vit.ViT, object, table.Table]:
    trained = trained_model(config)
    program = table.compile_table_program(trained, split)
    return trained.model, trained.params, table.fill_table(program, trained.params, split, "table")


def test_the_progress_shows_the_accuracy(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = watch_progress(monkeypatch)
    found = filled(config_of(), split)[2]
    assert notes[-1] == f"accuracy {np.mean(found.prediction == split.labels):.1%}"


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("dropped", ["zero", "identity"])
def test_table_is_the_model_under_every_pattern(split, layer, dropped):
    """Also for a layer before the last, where later gates react to what the earlier one changed."""
    config = config_of(layer, dropped)
    model, params, found = filled(config, split)
    exact = reference.in_float64(params)
    rng = np.random.default_rng(0)
    for i, pattern in zip(rng.integers(0, 90, 24), np.arange(24) % 8, strict=True):
        forced = {config.sae_layer: pattern_to_gates(np.array(pattern), 3).astype(float)}
        logits, *_ = reference.vit(exact, split.images[i] / 255.0, config, "thresholded", forced)
        assert found.answers[i, pattern] == np.argmax(logits)
    logits, out = jax.jit(lambda images: model.apply(params, images))(split.images / np.float32(255))
    chex.assert_trees_all_equal(found.pattern, np.asarray(gates_to_pattern(out["gates"][config.sae_layer]["heads"])))
    chex.assert_trees_all_equal(found.prediction, np.argmax(logits, axis=1).astype(np.int32))
    chex.assert_trees_all_equal(found.prediction, found.answers[np.arange(90), found.pattern])
    assert len(np.unique(found.answers)) > 2


@pytest.mark.parametrize(
    ("kinds", "layer", "dropped"),
    [
        (("heads", "sublayers"), -1, "zero"),
        (("heads", "sublayers", "tokens"), -1, "slice"),
        (("heads", "sublayers", "tokens"), -1, "identity"),
        (("heads", "tokens"), -1, "zero"),
        (("sublayers",), -1, "zero"),
        (("heads", "sublayers", "tokens"), -2, "slice"),
    ],
)
def test_table_is_the_model_under_every_pattern_of_several_kinds(split, kinds, layer, dropped):
    """Every pattern of some images, pattern by pattern in float64; the patches' gates decide as they do themselves."""
    config = with_kinds(config_of(layer, dropped), *kinds)
    gates = LayerGates(config, config.sae_layer)
    few = Split(split.images[:12], split.labels[:12])
    _, params, found = filled(config, few)
    exact, own = reference.in_float64(params), []
    for i, image in enumerate(few.images / 255.0):
        _, by_layer, logits, _ = reference.vit(exact, image, config, "thresholded")
        own.append(by_layer[config.sae_layer])
        joined = np.concatenate([logits[config.sae_layer][kind] for kind in gates.kinds])
        np.testing.assert_allclose(found.gate_logits[i], joined, atol=1e-4)
        assert found.pattern[i] == sum(1 << g for g, m in enumerate(joined) if m > 0)
        assert found.kept_patches[i] == own[-1].get("tokens", np.ones(4)).sum()
        for pattern in range(2**gates.count):
            g = pattern_to_gates(np.array(pattern), gates.count).astype(float)
            forced = {config.sae_layer: gates.split(g)}
            answer = np.argmax(reference.vit(exact, image, config, "thresholded", forced)[0])
            assert found.answers[i, pattern] == answer
        assert found.prediction[i] == found.answers[i, found.pattern[i]]
    assert len(np.unique(found.answers)) > 2
    assert len(np.unique(found.pattern)) > 1
    assert len(kinds) < 3 or len(np.unique(found.kept_patches)) > 1


def test_a_model_that_trains_in_bfloat16_is_steered_in_float32(split):
    """With bfloat16, answers would depend on the program that computes them."""
    (_, _, trained_so), (_, _, plain) = filled(config_of(dtype="bfloat16"), split), filled(config_of(), split)
    chex.assert_trees_all_equal(trained_so, plain)


@pytest.mark.parametrize("memory", [1, 2])
def test_a_smaller_budget_changes_nothing(split, memory):
    _, _, whole = filled(config_of(), split)
    program = table.compile_table_program(trained_model(config_of(memory=memory)), split)
    assert program.size <= 64
    _, _, found = filled(config_of(memory=memory, chunk=7), split)
    chex.assert_trees_all_equal(found.answers, whole.answers)
    chex.assert_trees_all_equal(found.pattern, whole.pattern)


def test_more_heads_than_a_table_holds(split):
    """Above 12 heads a sample of the subsets: its answers are the model's, and the unsteered one is its own pass."""
    config = config_of(subsets=64)
    config = config.model_copy(update={"model": config.model.model_copy(update={"width": 26, "heads": 13})})
    listed = table.list_patterns(config)
    assert len(listed) >= 64
    sizes = pattern_to_gates(listed, 13).sum(axis=1)
    assert (np.bincount(sizes) > 0).all()
    assert {0, 2**13 - 1, *(1 << h for h in range(13)), *(2**13 - 1 - (1 << h) for h in range(13))} <= set(listed)
    assert (np.diff(listed) > 0).all()
    model, params, found = filled(config, split)
    images = split.images / np.float32(255)
    forward = jax.jit(lambda gates: model.apply(params, images, interventions={2: vit.Intervention(gates)})[0])
    for place in (0, 3, 40, len(listed) - 1):
        gates = np.broadcast_to(pattern_to_gates(listed[place], 13), (90, 13)).astype(np.float32)
        chex.assert_trees_all_equal(found.answers[:, place], np.argmax(forward(gates), axis=1).astype(np.int32))
    logits, _ = jax.jit(lambda images: model.apply(params, images))(images)
    chex.assert_trees_all_equal(found.prediction, np.argmax(logits, axis=1).astype(np.int32))


def test_a_sample_of_the_patterns_of_heads_and_sublayers():
    """13 heads with attention and the MLP: 2^15 patterns are too many, and 12 heads have 2^14, which a table holds."""
    config = with_kinds(config_of(subsets=64), "heads", "sublayers")
    sized = {
        heads: config.model_copy(update={"model": config.model.model_copy(update={"heads": heads, "width": heads})})
        for heads in (12, 13)
    }
    np.testing.assert_array_equal(table.list_patterns(sized[12]), np.arange(2**14))
    listed = table.list_patterns(sized[13])
    assert 64 <= len(listed) < 200
    assert {0, 2**15 - 1, 1 << 13, 1 << 14} <= set(listed)
    assert choose_method(sized[12]) == "flips"
    assert choose_method(sized[13]) == "suffix"


def test_a_budget_that_one_image_does_not_fit_is_one_line(split):
    split = Split(split.images[:2], split.labels[:2])  # of more images, more sizes would be compiled
    config = config_of(memory=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"mlp_ratio": 5000.0})})
    with pytest.raises(
        HeadSteerError, match=r"^config\.machine\.sweep_memory = 1: too small, because one image needs \d+ MiB$"
    ):
        filled(config, split)
