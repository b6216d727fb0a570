"""Steering of the patches' gates against float64, patch by patch; the choice of latents against loops."""

import jax
import numpy as np
import pytest
import reference
from builders import CLASSES, setting, steer_config, trained_model
from helpers import watch_progress

from headsteer_jax.config import SteerConfig, TokenGateConfig
from headsteer_jax.data.dataset import Split
from headsteer_jax.data.digits import find_strokes
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.compute import ImageGates, count_image_macs
from headsteer_jax.model.passes import make_observer
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.patches import (
    PatchStatistics,
    class_concepts,
    count_patch_gates,
    matched_concepts,
    measure_patches,
    observe_steered_patches,
    steers_patches,
)
from headsteer_jax.steer.suffix import SuffixResult, SuffixSetting, predict_without_gates, run_suffix

KINDS = ("heads", "sublayers", "tokens")


def by_hand(params, image, label, steered, alpha, config):
    """Gates by layer and kind and the answer of the last layers with steered patches, in float64."""
    p, m = params["params"], config.model
    x = reference.embed(p, image, m)
    gates = {}
    for layer in range(m.depth):
        own, n = p[f"layers_{layer}"], 1 + m.registers
        reads = {"cls": x[0], "patches": x[n:]}
        if layer in steered:
            sae, strength, choice = steered[layer]
            exact = SAEWeights(*(np.asarray(a, np.float64) for a in sae.weights))
            row = (choice.latents[label], choice.weights[label])
            arguments = (row, alpha, sae.k, config.steer.patch_mode, "delta")
            scaling = (sae.scaling.mean.astype(np.float64), float(sae.scaling.scale))
            reads["patches"] = np.stack(
                [reference.steered(exact, *scaling, patch, strength, *arguments) for patch in x[n:]]
            )
            if config.steer.target == "residual":
                x = np.concatenate([x[:n], reads["patches"]])
        gates[layer] = {
            kind: reference.gate_logits(
                reads["patches" if kind == "tokens" else "cls"], own, config.gate, m.layer_norm_epsilon, kind
            )
            > 0
            for kind in config.gate.kinds_in(layer)
        }
        x = reference.block(x, own, m, {kind: g.astype(float) for kind, g in gates[layer].items()}, config.gate.dropped)
    answer = reference.dense(reference.layer_norm(x[0], p["norm"], m.layer_norm_epsilon), p["head"])
    return gates, int(np.argmax(answer))


@pytest.mark.parametrize(("mode", "target", "which"), [("scale", "policy", (1,)), ("add", "residual", (1, 2))])
def test_steered_patches_match_reference(mode: str, target: str, which: tuple[int, ...]) -> None:
    gate = {"kinds": KINDS, "tokens": TokenGateConfig(bias=0.0)}
    config = steer_config(gate=gate, patch_mode=mode, target=target)
    trained, rng = trained_model(config), np.random.default_rng(1)
    split = Split(rng.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8), rng.integers(0, CLASSES, 6).astype(np.int32))
    steered, alphas = {layer: setting(layer) for layer in which}, np.array([0.0, 3.0, 12.0])
    result = run_suffix(trained, split, [SuffixSetting({}, split.labels, steered)], alphas, "test", KINDS)
    exact, differs = reference.in_float64(jax.device_get(trained.params)), 0
    for a, alpha in enumerate(alphas):
        for i in range(6):
            gates, answer = by_hand(exact, split.images[i] / 255.0, split.labels[i], steered, alpha, config)
            for layer in which:
                for kind in KINDS:
                    np.testing.assert_array_equal(result.gates[layer][kind][0, a, i], gates[layer][kind])
            assert result.predictions[0, a, i] == answer
            tokens = result.gates[which[0]]["tokens"][0]
            differs += not np.array_equal(tokens[a, i], tokens[0, i])
    assert differs > 1  # steering does change which patches stay


def test_the_progress_shows_the_accuracy_at_the_last_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    config, rng, size = steer_config(), np.random.default_rng(1), 2 * jax.local_device_count()
    config = config.model_copy(update={"machine": config.machine.model_copy(update={"sweep_chunk": 2})})
    trained, notes = trained_model(config), watch_progress(monkeypatch)
    split = Split(rng.integers(0, 256, (9, 8, 8, 1), dtype=np.uint8), rng.integers(0, CLASSES, 9).astype(np.int32))
    settings = [SuffixSetting({2: setting(seed)}, split.labels) for seed in (2, 3)]
    result = run_suffix(trained, split, settings, np.array([0.0, 12.0]), "test")
    right = (result.predictions[:, 1] == split.labels).cumsum(axis=1)
    first = min(size, 9)
    assert notes[0] == f"accuracy {right[0, first - 1] / first:.1%} at alpha 12"
    assert notes[-1] == f"accuracy {right[:, -1].sum() / 18:.1%} at alpha 12"
    del notes[:]
    right = (predict_without_gates(trained, split, 2, "off") == split.labels).cumsum()
    ready = range(size, 9 - size, size)  # results are read two calls later
    assert notes[2:] == [f"accuracy {right[end - 1] / end:.1%}" for end in ready]


def test_all_gates_are_observed_with_steered_patches() -> None:
    config = steer_config(gate={"kinds": KINDS, "tokens": TokenGateConfig(bias=0.0)})
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"layer": 1})})
    trained, rng, steering = trained_model(config), np.random.default_rng(2), setting(1)
    split = Split(rng.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8), rng.integers(0, CLASSES, 5).astype(np.int32))
    observe = make_observer(trained.model, config, "thresholded", 1)
    before = observe(trained.params, split, "test")
    unsteered = ImageGates(before.gates, count_image_macs(config, CLASSES, before.gates), before.prediction)
    exact = reference.in_float64(jax.device_get(trained.params))
    for alpha in (0.0, 12.0):
        found = observe_steered_patches(trained, split, steering, alpha, unsteered)
        for i in range(5):
            gates, answer = by_hand(exact, split.images[i] / 255.0, split.labels[i], {1: steering}, alpha, config)
            for layer, by_kind in gates.items():
                for kind, g in by_kind.items():
                    row = layer - config.gate.settings(kind).first_layer
                    np.testing.assert_array_equal(found.gates[kind][i, row], g)
            assert found.prediction[i] == answer
        np.testing.assert_array_equal(found.macs, count_image_macs(config, CLASSES, found.gates))
        same = all(np.array_equal(found.gates[kind], unsteered.gates[kind]) for kind in KINDS)
        assert same == (alpha == 0)


class MadeResiduals:
    """Residuals of images in memory, as `StoredResiduals` gives them."""

    def __init__(self, x_NPD: np.ndarray) -> None:
        self.x, self.tokens = x_NPD, x_NPD.shape[1]

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self.x[indices]


@pytest.mark.parametrize("tokens", ["patches", "all"])
def test_latents_are_measured_on_the_patches_of_each_class(tokens: str) -> None:
    rng = np.random.default_rng(0)
    labels, sae = rng.permutation(np.arange(40) % 4), setting().sae
    x = rng.standard_normal((40, 5, 24)).astype(np.float32)
    stats = measure_patches(sae, MadeResiduals(x), tokens, labels, 4, evidence=6)  # type: ignore[arg-type]
    first, z_all = (1 if tokens == "all" else 0), []
    for label in range(4):
        members = np.flatnonzero(labels == label)[:6]
        z = np.asarray(sae.encode(x[members][:, first:].reshape(-1, 24)))
        np.testing.assert_allclose(stats.class_frequency[label], (z > 0).mean(axis=0))
        z_all.append(z)
    z = np.concatenate(z_all)
    np.testing.assert_allclose(stats.frequency, (z > 0).mean(axis=0))
    fired = z.sum(axis=0) / np.maximum((z > 0).sum(axis=0), 1)
    np.testing.assert_allclose(stats.strength, fired, rtol=1e-5)


def made_statistics(seed: int = 0) -> tuple[PatchStatistics, Autoencoder]:
    rng = np.random.default_rng(seed)
    x, sae = rng.standard_normal((90, 4, 24)).astype(np.float32), setting().sae
    labels = np.arange(90) % 3
    x += labels[:, None, None] * rng.standard_normal(24).astype(np.float32)
    return measure_patches(sae, MadeResiduals(x), "patches", labels, 3, 100), sae  # type: ignore[arg-type]


def test_a_class_has_the_latents_that_fire_more_often_on_it() -> None:
    stats, _ = made_statistics()
    config = SteerConfig(latents=3, max_frequency=0.6)
    choice = class_concepts(stats, config, np.random.default_rng(0))
    for label, latents in enumerate(choice.latents):
        lead = stats.class_frequency[label] - stats.frequency
        allowed = np.flatnonzero((stats.frequency > 0) & (stats.frequency <= 0.6))
        assert sorted(lead[latents]) == sorted(sorted(lead[allowed])[-3:])
    with pytest.raises(HeadSteerError, match=r"config\.steer\.latents = 40: only \d+ latents fire on patches"):
        class_concepts(stats, SteerConfig(latents=40), np.random.default_rng(0))


@pytest.mark.parametrize("mode", ["scale", "add"])
def test_the_control_is_matched_in_frequency_and_norm(mode: str) -> None:
    stats, _ = made_statistics()
    config = SteerConfig(latents=3, patch_mode=mode)
    chosen, control = (choose(stats, config, np.random.default_rng(0)) for choose in (class_concepts, matched_concepts))
    for label in range(3):
        assert not set(chosen.latents[label]) & set(control.latents[label])
        assert len(set(control.latents[label])) == 3
        sizes = []
        for latents, weights in ((part.latents[label], part.weights[label]) for part in (chosen, control)):
            z = stats.codes[label].toarray()[:, latents]
            change = weights * (z if mode == "scale" else np.broadcast_to(stats.strength[latents], z.shape))
            sizes.append(np.sqrt(((change @ stats.decoder[latents]) ** 2).sum(axis=1).mean()))
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)
        assert sizes[0] > 0


def test_kept_patches_are_counted_as_loops_count_them() -> None:
    config = steer_config(gate={"kinds": KINDS})
    rng, gates = np.random.default_rng(3), LayerGates(config, 2)
    labels, own = rng.integers(0, 3, 9), rng.random((9, 4)) < 0.5
    drawn = {kind: rng.random((6, 5, 9, n)) < 0.5 for kind, n in (("heads", 3), ("sublayers", 2), ("tokens", 4))}
    predictions = rng.integers(0, 3, (6, 5, 9))
    counted = count_patch_gates(SuffixResult({2: drawn}, predictions), Split(np.zeros(9), labels), own, gates, (2, 3))
    for v, (g, s) in enumerate(np.ndindex(2, 3)):
        for a, n in np.ndindex(5, 9):
            tokens = drawn["tokens"][v, a, n]
            assert counted.kept_patches[g, s, a, n] == tokens.sum()
            assert counted.kept_class_patches[g, s, a, n] == sum(t and o for t, o in zip(tokens, own[n], strict=True))
            assert counted.right[g, s, a, n] == (predictions[v, a, n] == labels[n])
            (attention, mlp), heads = drawn["sublayers"][v, a, n], drawn["heads"][v, a, n].sum()
            keys, used = 1 + tokens.sum(), heads * 8
            macs = attention * (used * 24 * (1 + 2 * keys) + 2 * keys * used + used * 24) + mlp * 2 * 24 * 96
            assert counted.macs[g, s, a, n] == macs + 24 * (3 + 2 + 4)
    np.testing.assert_array_equal(counted.class_patches, own.sum(axis=1))


def test_strokes_are_patches_with_a_bright_pixel() -> None:
    images = np.zeros((2, 8, 8, 1), np.uint8)
    images[0, 1, 6], images[0, 4, 0], images[1, 7, 7] = 128, 127, 255
    np.testing.assert_array_equal(find_strokes(images, 4), [[False, True, False, False], [False, False, False, True]])


@pytest.mark.parametrize(
    ("kinds", "tokens", "steered"),
    [(("heads",), "patches", False), (KINDS, "cls", False), (KINDS, "patches", True), (KINDS, "all", True)],
)
def test_when_patches_are_steered(kinds: tuple[str, ...], tokens: str, steered: bool) -> None:
    config = steer_config(gate={"kinds": kinds})
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"tokens": tokens})})
    assert steers_patches(config) == steered
