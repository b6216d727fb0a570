"""A steered model is the same by plain passes, by the table and by the suffix where products are rounded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import CLASSES, setting, split_sweep, steer_config
from reduced_precision import rounded_products

from headsteer_jax.config import Config
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.vit import Intervention, TrainedModel, build_model, training_form
from headsteer_jax.steer.flips import UNIT_ROUNDOFF
from headsteer_jax.steer.results import BY_LABEL
from headsteer_jax.steer.steering import GateProgram, Steering, apply_steering
from headsteer_jax.steer.suffix import SuffixSetting, run_suffix
from headsteer_jax.steer.sweep import sweep_by_flips
from headsteer_jax.steer.tally import unpack_bits

ALPHAS = np.unique(np.append(np.linspace(-3.0, 5.0, 51), 0.0))


def plain_passes(
    trained: TrainedModel, split: Split, steering: Steering, steered_by: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The whole model for each alpha, in batches of another size than the other methods have: gates and answers."""
    config, layer = trained.config, trained.config.sae_layer

    @jax.jit
    def run(params: Any, images: jax.Array, class_B: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        def read(x: jax.Array) -> jax.Array:
            return apply_steering(steering, x, class_B, alpha, config.steer)

        changes = {layer: Intervention(gate_input=read)}
        logits, out = trained.model.apply(params, images / jnp.float32(255), interventions=changes)
        return out["gates"][layer]["heads"] > 0, jnp.argmax(logits, axis=-1)

    parts = [slice(begin, begin + 30) for begin in range(0, len(split.labels), 30)]
    found = [
        [jax.device_get(run(trained.params, split.images[part], steered_by[part], alpha)) for part in parts]
        for alpha in ALPHAS.astype(np.float32)
    ]
    return tuple(np.stack([np.concatenate([part[i] for part in row]) for row in found]) for i in (0, 1))  # type: ignore[return-value]


def compare(config: Config, split: Split) -> int:
    """Count the gates and answers that differ between the three methods, over every strategy and autoencoder."""
    job, trained, effects = split_sweep(config, split, (0.5, 2.0))
    tallies = {(t.seed, t.strategy): t for t in sweep_by_flips(job, ALPHAS, GateProgram(trained), effects, CLASSES)}
    differing, seen = 0, set()
    for s, by_strategy in enumerate(job.steered):
        for g, steering in enumerate(by_strategy):
            tally, labels = tallies[s, g].tallies[0], job.split.labels
            gates = np.moveaxis(unpack_bits(tally.gates, len(labels)), 1, 2)
            right = unpack_bits(tally.right, len(labels))
            steered_by = job.class_of(BY_LABEL, g)
            found, answers = plain_passes(trained, job.split, steering, steered_by)
            suffix = run_suffix(trained, job.split, [SuffixSetting({2: steering}, steered_by)], ALPHAS, "test")
            differing += int((found != gates).sum() + ((answers == labels) != right).sum())
            differing += int((found != suffix.gates[2]["heads"][0]).sum() + (answers != suffix.predictions[0]).sum())
            seen |= {row.tobytes() for row in gates}
            zero = int(np.searchsorted(ALPHAS, 0.0))  # alpha 0 is the model without steering
            differing += int((answers[zero] != job.table.prediction).sum())
    assert len(seen) > 50
    return differing


@pytest.mark.parametrize("kind", ["bfloat16", "tf32"])
def test_every_method_gives_the_same_under_rounded_products(split: Split, kind: str) -> None:
    """Over 416 settings: 52 alphas of four strategies and two autoencoders. No product that decides may be rounded."""
    with jax.default_matmul_precision(None), rounded_products(kind) as rounded:
        assert compare(steer_config(chunk=64), split) == 0
        assert not rounded


def test_products_without_a_precision_are_rounded(split: Split) -> None:
    """The emulation works: it reaches into scans and gradients, and rounds the products of training alone."""
    config = steer_config()
    exact, steering = build_model(config, CLASSES), setting()
    params = jax.jit(exact.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    images = split.images / np.float32(255)

    def logits(model: Any) -> np.ndarray:
        return np.asarray(jax.jit(lambda p: model.apply(p, images)[0])(params))

    plain, x = logits(exact), np.asarray(steering.sae.weights.W_d[:9])
    with jax.default_matmul_precision(None), rounded_products("tf32") as rounded:
        assert np.array_equal(logits(exact), plain)
        trained_so = logits(training_form(exact, config, jax.devices()[:1]))
        assert 0 < np.abs(trained_so - plain).max() < 0.05 * np.abs(plain).max()
        assert len(rounded) > 10

        def loss(x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda total, row: (total + (row @ x.T).sum() ** 2, None), 0.0, x)[0]

        count = len(rounded)
        gradient = jax.jit(jax.grad(loss))(x)
        assert len(rounded) - count >= 2
    exact_gradient = np.asarray(jax.jit(jax.grad(loss))(x))
    error = np.abs(gradient - exact_gradient).max() / np.abs(exact_gradient).max()
    assert 10 * UNIT_ROUNDOFF < error < 2.0**-9
