"""What steering costs, against counts written out by hand for the layer of a ViT-S on 17 tokens."""

import numpy as np
import pytest
from builders import steer_config, trained_model

from headsteer_jax.config import Config, DataConfig, ModelConfig, SAEConfig, SteerConfig
from headsteer_jax.data.dataset import Split
from headsteer_jax.steer.catalogue import STRATEGIES
from headsteer_jax.steer.cost import count_extra_macs, count_moving_macs
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.strategies import Choice
from headsteer_jax.steer.table import compile_table_program, fill_table

C, WIDTH = 100, 384
ENCODER = 3072 * 384  # 1,179,648
LATENTS = Choice(np.zeros((C, 16), np.int32), np.ones((C, 16), np.float32))
DIRECTIONS = Choice(np.zeros((C, 0), np.int32), np.zeros((C, 0), np.float32), np.ones((C, WIDTH), np.float32))


def vit_s(**steer: object) -> Config:
    return Config(
        data=DataConfig(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),
        model=ModelConfig(patch=16, depth=12, width=WIDTH, heads=6),
        sae=SAEConfig(expansion=8),
        steer=SteerConfig(**steer),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "choice", "steer", "macs"),
    [
        ("class", LATENTS, {}, 0),
        ("class", LATENTS._replace(weights=-LATENTS.weights), {}, ENCODER + 16 * 384),  # a latent may reach 0
        ("class", LATENTS, {"mode": "scale"}, ENCODER + 16 * 384),
        ("class", LATENTS, {"mode": "ablate"}, ENCODER + 16 * 384),
        ("class", LATENTS, {"form": "replace"}, 2 * ENCODER),
        ("gate_bias", DIRECTIONS, {"mode": "clamp", "form": "replace"}, 0),
        ("global_bias", DIRECTIONS, {}, 0),
        ("image_latents", LATENTS, {"latents": 16}, ENCODER + 16 * 384),
        ("image_random", DIRECTIONS, {"latents": 16}, ENCODER + 16 * 384),
        ("guessed_bias", DIRECTIONS, {}, 100 * 384 + 100 * 384),
        ("guessed_bias", DIRECTIONS, {"guess_classes": 3}, 100 * 384 + 3 * 384),
        ("guessed_difference", DIRECTIONS, {"guess_classes": 3}, 100 * 384 + 3 * 384),
    ],
)
def test_moving_the_residual(name: str, choice: Choice, steer: dict[str, object], macs: int) -> None:
    assert count_moving_macs(vit_s(**steer), C, STRATEGIES[name], choice) == macs


def test_the_encoder_costs_more_than_a_head_of_the_last_layer() -> None:
    """A head of 64 in the last layer: one query, 17 keys and values, both products, and its share of the output."""
    gates = LayerGates(vit_s(), 11)
    head = 384 * 64 * (1 + 2 * 17) + 2 * 17 * 64 + 64 * 384
    assert gates.macs(np.array(63)) - gates.macs(np.array(62)) == head
    assert 1.3 < ENCODER / head < 1.36


def test_naming_the_class_costs_an_unsteered_pass_unless_its_answer_stands() -> None:
    unsteered, steered = np.array([100.0, 200.0, 600.0]), np.array([True, False, True])
    found = count_extra_macs([0, 30, 7], np.array([True, True, False]), unsteered, steered)
    np.testing.assert_allclose(found, [[0, (100 + 600) / 3], [30, (130 + 630) / 3], [7, 7]])


@pytest.mark.parametrize("layer", [1, 2])
def test_the_unsteered_pass_is_counted_from_the_steered_layer_to_the_logits(split: Split, layer: int) -> None:
    """Three layers of width 24, three heads of 8, five tokens, seven classes, image by image from the model's gates."""
    config = steer_config()
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"layer": layer})})
    trained = trained_model(config)
    table = fill_table(compile_table_program(trained, split), trained.params, split, "table")
    logits, out = trained.model.apply(trained.params, split.images / np.float32(255))
    chance = np.exp(np.asarray(logits, np.float64))
    np.testing.assert_allclose(table.confidence, chance.max(axis=1) / chance.sum(axis=1), rtol=1e-4)
    heads = {
        number: pattern_to_gates(table.pattern, 3).sum(axis=1)
        if number == layer
        else (np.asarray(out["gates"][number]["heads"]) > 0).sum(axis=1)
        for number in range(layer, 3)
    }
    hidden, wanted = round(config.model.mlp_ratio * 24), np.full(90, 24.0 * 7)
    for number, open_N in heads.items():
        queries = 1 if number == 2 else 5
        each = 24 * 8 * (queries + 2 * 5) + 2 * queries * 5 * 8 + queries * 8 * 24
        wanted += open_N * each + queries * 2 * 24 * hidden + 24 * 3
    np.testing.assert_allclose(table.macs_from, wanted, rtol=1e-6)
    assert len(set(wanted)) > 1
