"""Patterns of a layer's gates, and the layer's multiply-accumulates under each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import tiny_config, trained_model

from headsteer_jax.config import Config, TokenGateConfig
from headsteer_jax.model.macs import count_layer_macs
from headsteer_jax.steer.gates import LayerGates, gates_to_pattern, pattern_to_gates

KINDS = [("heads",), ("sublayers",), ("heads", "sublayers"), ("heads", "tokens"), ("heads", "sublayers", "tokens")]


def test_a_pattern_has_a_bit_for_each_gate() -> None:
    gates = np.array([[1, 0, 1, 1], [0, 1, 0, 0]], np.float32)
    np.testing.assert_array_equal(gates_to_pattern(jnp.asarray(gates)), [13, 2])
    np.testing.assert_array_equal(pattern_to_gates(np.array([13, 2]), 4), gates > 0)


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("dropped", ["zero", "identity", "slice"])
@pytest.mark.parametrize("layer", [1, 2])
def test_macs_of_a_pattern_are_those_of_its_gates(kinds, dropped, layer) -> None:
    """Against the count that training uses, gate by gate, for every pattern and number of kept patches."""
    config = tiny_config(kinds=kinds, dropped=dropped)
    gates = LayerGates(config, layer)
    assert gates.count == 3 * ("heads" in kinds) + 2 * ("sublayers" in kinds)
    assert len(gates.names) == gates.count
    patterns, kept = (np.array(part) for part in zip(*itertools.product(range(2**gates.count), range(5)), strict=True))
    by_kind = gates.split(pattern_to_gates(patterns, gates.count).astype(np.float32))
    if "tokens" in kinds:
        by_kind["tokens"] = (np.arange(4) < kept[:, None]).astype(np.float32)
    counted = np.asarray(count_layer_macs(config, {layer: by_kind}))[:, layer].sum(axis=-1)
    found = gates.macs(patterns, kept if "tokens" in kinds else None)
    np.testing.assert_array_equal(found, counted)
    assert found.dtype == np.float64
    open_everything = gates.macs(np.array(2**gates.count - 1))
    decisions = 24 * (gates.count + 4 * ("tokens" in kinds))
    assert open_everything == gates.dense_macs + decisions == found.max()


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_logits_and_gates_are_joined_in_one_order(kinds) -> None:
    trained = trained_model(tiny_config(kinds=kinds))
    images = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    _, out = trained.model.apply(trained.params, images)
    gates = LayerGates(trained.config, 2)
    logits = gates.logits(trained.model, trained.params, out["cls"][2])
    joined = gates.join(out["gates"][2])
    np.testing.assert_array_equal(joined, logits > 0)
    for kind, part in gates.split(jax.device_get(joined)).items():
        np.testing.assert_array_equal(part, out["gates"][2][kind])


def test_a_layer_without_gates_of_the_cls_residual() -> None:
    config = Config.model_validate(tiny_config(kinds=("heads", "tokens"), tokens=TokenGateConfig()).model_dump())
    assert LayerGates(config, 0).count == 0
    assert config.steerable_layers == range(1, 3)
    assert config.gated_layers == range(3)
