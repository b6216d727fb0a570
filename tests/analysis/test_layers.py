"""Steering any layer, and several at once: each image again in float64, gate by gate."""

import itertools

import jax
import numpy as np
import pytest
import reference
from builders import CLASSES, setting, steer_config, trained_model
from helpers import ROOT

from headsteer_jax.analysis import layers
from headsteer_jax.config import Config, SublayerGateConfig
from headsteer_jax.config.files import load_config
from headsteer_jax.data.dataset import Split
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.sae.autoencoder import SAEWeights
from headsteer_jax.steer.steering import Steering
from headsteer_jax.steer.suffix import SuffixSetting, run_suffix, run_suffix_from_unsteered


def config_of(**steer: object) -> Config:
    config = steer_config(chunk=4, **steer)
    return config.model_copy(
        update={"layers": config.layers.model_copy(update={"alphas": (8.0, -20.0), "per_class": 0})}
    )


def by_hand(
    params: object, image: np.ndarray, label: int, steered: dict[int, Steering], alpha: float, config: Config
) -> tuple[dict[int, np.ndarray], int]:
    """The model layer by layer: every steered gate reads its own steered residual."""
    p, m = params["params"], config.model
    embedded = reference.vit(params, image, config, "dense")[3][0]  # CLS; the rest is embedded again below
    side = m.patch
    tokens = [
        np.einsum("hwc,hwcD->D", image[r : r + side, c : c + side], p["patches"]["kernel"]) + p["patches"]["bias"]
        for r in range(0, image.shape[0], side)
        for c in range(0, image.shape[1], side)
    ]
    x = np.concatenate([p["cls"][0], np.array(tokens)]) + p["positions"][0]
    np.testing.assert_allclose(x[0], embedded)
    gates = {}
    for layer in range(m.depth):
        own, g = p[f"layers_{layer}"], None
        if layer >= config.gate.first_layer:
            reads = x[0]
            if layer in steered:
                sae, strength, choice = steered[layer]
                exact = SAEWeights(*(np.asarray(a, np.float64) for a in sae.weights))
                reads = reference.steered(
                    exact, sae.scaling.mean.astype(np.float64), float(sae.scaling.scale), reads, strength,
                    (choice.latents[label], choice.weights[label]), alpha, sae.k, "add", "delta",
                )  # fmt: skip
                if config.steer.target == "residual":
                    x = np.concatenate([reads[None], x[1:]])
            g = (reference.gate_logits(reads, own, config.gate, m.layer_norm_epsilon) > 0).astype(float)
            gates[layer] = g
        x = reference.block(x, own, m, g, config.gate.dropped)
    answer = reference.dense(reference.layer_norm(x[0], p["norm"], m.layer_norm_epsilon), p["head"])
    return gates, int(np.argmax(answer))


def steered_at(trained: TrainedModel, split: Split, steered: dict[int, Steering]) -> tuple[np.ndarray, np.ndarray]:
    """Gates and predictions at alpha 0, 8 and -20, by the labels."""
    alphas = np.array([0.0, 8.0, -20.0])
    found = run_suffix(trained, split, [SuffixSetting(steered, split.labels)], alphas, "test")
    return np.stack([found.gates[layer]["heads"][0] for layer in sorted(steered)], axis=2), found.predictions[0]


@pytest.mark.parametrize("target", ["policy", "residual"])
@pytest.mark.parametrize("which", [(1,), (2,), (1, 2)], ids=str)
def test_steered_layers_match_reference(which: tuple[int, ...], target: str) -> None:
    config = config_of(target=target)
    trained = trained_model(config)
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    labels = np.random.default_rng(2).integers(0, CLASSES, 6).astype(np.int32)
    steered = {layer: setting(layer) for layer in which}
    gates, predictions = steered_at(trained, Split(images, labels), steered)
    assert gates.shape == (3, 6, len(which), 3)
    exact = reference.in_float64(jax.device_get(trained.params))
    differs = 0
    for a, alpha in enumerate((0.0, 8.0, -20.0)):
        for i in range(6):
            wanted, answer = by_hand(exact, images[i] / 255.0, int(labels[i]), steered, alpha, config)
            for place, layer in enumerate(which):
                np.testing.assert_array_equal(gates[a, i, place], wanted[layer])
            assert predictions[a, i] == answer
            differs += not np.array_equal(gates[a, i], gates[0, i])
    assert differs > 2  # steering does change gates


def test_alpha_0_is_the_unsteered_model() -> None:
    config = config_of()
    trained = trained_model(config)
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    split = Split(images, np.zeros(6, np.int32))
    gates, predictions = steered_at(trained, split, {1: setting(0), 2: setting(1)})
    logits, out = trained.model.apply(trained.params, images.astype(np.float32) / 255)
    np.testing.assert_array_equal(predictions[0], np.argmax(logits, axis=1))
    for place, layer in enumerate((1, 2)):
        np.testing.assert_array_equal(gates[0, :, place], out["gates"][layer]["heads"] > 0)


@pytest.mark.parametrize("steer", [{"form": "replace"}, {"mode": "clamp"}, {}], ids=str)
def test_before_steering_is_the_unsteered_model_in_every_form_and_mode(steer: dict[str, object]) -> None:
    trained = trained_model(config_of(**steer))
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    split, alphas = Split(images, np.zeros(6, np.int32)), np.array([-2.0, 0.0, 8.0])
    settings = [SuffixSetting({1: setting(seed), 2: setting(seed + 1)}, split.labels) for seed in (0, 2)]
    found = run_suffix_from_unsteered(trained, split, settings, alphas, "test", ["heads"])
    as_is = run_suffix(trained, split, settings, alphas, "test", ["heads"])
    logits, out = trained.model.apply(trained.params, images.astype(np.float32) / 255)
    changed = 0
    for v, layer in itertools.product(range(2), (1, 2)):
        heads = found.gates[layer]["heads"][v]
        np.testing.assert_array_equal(heads[1], out["gates"][layer]["heads"] > 0)
        np.testing.assert_array_equal(heads[[0, 2]], as_is.gates[layer]["heads"][v, [0, 2]])
        changed += (heads[1] != as_is.gates[layer]["heads"][v, 1]).sum()
    np.testing.assert_array_equal(found.predictions[:, 1], np.tile(np.argmax(logits, axis=1), (2, 1)))
    assert (changed > 0) == bool(steer)


def test_all_off_drops_every_head_of_one_layer() -> None:
    config = config_of()
    trained = trained_model(config)
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    exact = reference.in_float64(jax.device_get(trained.params))
    answers = [
        int(np.argmax(reference.vit(exact, image / 255.0, config, "thresholded", {1: np.zeros(3)})[0]))
        for image in images
    ]
    split = Split(images, np.array(answers, np.int32))
    split.labels[:5] = (split.labels[:5] + 1) % CLASSES
    assert layers.accuracy_all_off(trained, split, 1) == 0.75


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", r"config.layers.layers = \(0,\): must be distinct gated layers: 1 to"),
        ("1,1", "distinct gated layers"),
        ("1,-4", "distinct gated layers"),
        ("99", "must be distinct gated layers"),
    ],
)
def test_layers_that_cannot_be_steered(text: str, says: str) -> None:
    config = ROOT / "configs" / "double_digits.py"
    with pytest.raises(HeadSteerError, match=says):
        load_config(config, {"layers.layers": text})


def test_usage_and_macs_of_several_layers_and_kinds() -> None:
    """Two layers with different kinds of gates, against loops."""
    sublayers = SublayerGateConfig(first_layer=2)
    config = config_of(gate={"kinds": ("heads", "sublayers", "tokens"), "sublayers": sublayers})
    rng = np.random.default_rng(0)
    sizes = {1: {"heads": 3, "tokens": 4}, 2: {"heads": 3, "sublayers": 2, "tokens": 4}}
    gates = {
        layer: {kind: rng.random((2, 5, count)) < 0.5 for kind, count in by_kind.items()}
        for layer, by_kind in sizes.items()
    }
    steered = layers.SteeredSplit(config, gates, np.zeros((2, 5), np.int32), np.zeros(5, np.int32))
    for a, n in np.ndindex(2, 5):
        macs = used = 0
        for layer, by_kind in gates.items():
            heads, tokens = by_kind["heads"][a, n].sum(), by_kind["tokens"][a, n].sum()
            attention, mlp = by_kind["sublayers"][a, n] if layer == 2 else (1, 1)
            used += heads + (int(attention) + int(mlp) if layer == 2 else 0)
            keys, queries, width = 1 + tokens, 1 if layer == 2 else 1 + tokens, 8 * heads
            macs += attention * (width * 24 * (queries + 2 * keys) + 2 * queries * keys * width + queries * width * 24)
            macs += mlp * queries * 2 * 24 * 96 + 24 * sum(sizes[layer].values())
        dense = sum(24 * 24 * (2 * q + 2 * 5) + 2 * q * 5 * 24 + q * 2 * 24 * 96 for q in (5, 1))
        assert steered.macs[a, n] == pytest.approx(macs / dense)
        assert steered.used[a, n] == pytest.approx(used / 8)
