"""One pass over a split: the same as the model on all images at once, whatever the chunks."""

import jax
import numpy as np
import pytest
from builders import random_params, tiny_config
from helpers import note_layer_forms, watch_progress
from hypothesis import given, settings
from hypothesis import strategies as st

from headsteer_jax.config import Config, GateConfig, MachineConfig, ModelConfig, SublayerGateConfig, TokenGateConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import LazyImages, Split
from headsteer_jax.model.passes import make_observer, padded_chunks
from headsteer_jax.model.skip_choice import PassSeconds, can_skip, predict_seconds
from headsteer_jax.model.vit import build_model


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.integers(1, 30))
def test_chunks_cover_every_image_once_in_one_size(count: int, size: int) -> None:
    chunks = padded_chunks(0, count, size)
    assert {len(chunk) for chunk in chunks} == {size}
    flat = np.concatenate(chunks)
    assert flat[:count].tolist() == list(range(count))
    assert len(flat) - count < size
    assert np.array_equal(np.concatenate(padded_chunks(0, count, size, devices=3))[:count], np.arange(count))
    assert {len(chunk) for chunk in padded_chunks(0, count, size, devices=3)} == {3 * size}
    assert not flat[count:].any()


@pytest.mark.parametrize("gating", ["dense", "thresholded"])
@pytest.mark.parametrize("lazy", [False, True])
def test_observed_is_what_the_model_says(gating: str, lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = watch_progress(monkeypatch)
    config = tiny_config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"eval_batch": 16})})
    model, params = build_model(config, 7), random_params(config, 7)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (37, 8, 8, 1), dtype=np.uint8), rng.integers(0, 7, 37)
    held = LazyImages(lambda places: images[places], np.arange(37), (8, 8, 1)) if lazy else images
    seen = make_observer(model, config, gating, 1)(params, Split(held, labels), "test")
    logits, out = model.apply(params, preprocess(images, config.data), gating=gating)
    np.testing.assert_array_equal(seen.prediction, np.argmax(logits, axis=-1))
    assert list(seen.gates) == ["heads"]
    gates = seen.gates["heads"]
    np.testing.assert_array_equal(gates, np.stack([out["gates"][1]["heads"], out["gates"][2]["heads"]], axis=1))
    np.testing.assert_allclose(seen.x, out["cls"][1], atol=1e-5)
    assert seen.accuracy(labels) == sum(np.argmax(np.asarray(logits), axis=-1) == labels) / 37
    assert gates.all() == (gating == "dense")
    right = np.cumsum(seen.prediction == labels)
    ends = sorted({*range(16 * jax.local_device_count(), 37, 16 * jax.local_device_count()), 37})
    assert notes == [f"accuracy {right[end - 1] / end:.1%}" for end in ends]


@pytest.mark.slow
def test_a_pass_that_skips_observes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device; several devices use the masked model."""
    forms = note_layer_forms(monkeypatch)
    gate = {"sublayers": SublayerGateConfig(bias=0.0), "tokens": TokenGateConfig(bias=0.0)}
    config = tiny_config(kinds=("heads", "sublayers", "tokens"), **gate)
    model, params = build_model(config, 7), random_params(config, 7)
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8), rng.integers(0, 7, 20))
    seen = {}
    for when in ("never", "always"):
        own = config.model_copy(update={"machine": MachineConfig(skip=when)})
        assert can_skip(own, 1) == (when == "always")
        assert not can_skip(own, 2)
        seen[when] = make_observer(model, own, "thresholded", 1)(params, split, "test")
        assert ("kept" in forms) == (when == "always" and jax.device_count() == 1)
    np.testing.assert_array_equal(seen["always"].prediction, seen["never"].prediction)
    np.testing.assert_allclose(seen["always"].x, seen["never"].x, rtol=1e-5, atol=1e-5)
    for kind, gates in seen["never"].gates.items():
        np.testing.assert_array_equal(seen["always"].gates[kind], gates)
        assert 0 < gates.mean() < 1


def test_small_passes_and_gates_of_heads_alone_never_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_skip(Config(), 1)
    gated = Config(gate=GateConfig(kinds=("heads", "tokens")))
    digits = predict_seconds(gated, 10, 10_000, 0.0)
    assert digits.skipping > digits.masked  # compiling takes longer than the whole pass
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # whose costs the following are
    large = gated.model_copy(update={"model": ModelConfig.of_size("S")})
    for images, share, passes, faster in (
        (10**7, 0.5, 1, True),
        (10**7, 0.9, 1, False),
        (64, 0.1, 1, False),
        (10**4, 0.7, 1, False),
        (10**4, 0.7, 10, True),  # ten passes share the time that compiling takes
    ):
        seconds = predict_seconds(large, 100, images, share, passes)
        assert (seconds.skipping < seconds.masked) == faster
        more = predict_seconds(large, 100, 2 * images, share, passes)
        assert more.masked == 2 * seconds.masked  # as there is nothing to compile


@pytest.mark.parametrize(("faster", "words"), [(True, "leaves out what the gates drop"), (False, "runs everything")])
def test_the_log_says_once_why_a_pass_skips_or_not(
    faster: bool, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(kinds=("heads", "tokens"))
    shares = iter([PassSeconds(9.0, 1.0), PassSeconds(9.0, 2.0 if faster else 12.0)] * 2)  # at best, and as sampled
    monkeypatch.setattr("headsteer_jax.model.passes.predict_seconds", lambda *_: next(shares))
    monkeypatch.setattr("headsteer_jax.model.passes.can_skip", lambda *_: True)  # whatever the number of devices
    monkeypatch.setattr("headsteer_jax.model.skip.SMALLEST", 0)
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8), rng.integers(0, 7, 3))
    observe = make_observer(build_model(config, 7), config, "thresholded", 1)
    with caplog.at_level("INFO"):
        for _ in range(2):
            observe(random_params(config, 7), split, "validation")
    lines = [record.message for record in caplog.records if words in record.message]
    assert lines == [f"validation: {words} (predicted {2 if faster else 12} s with skipping, 9 s without)"]
