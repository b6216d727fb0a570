"""The functions whose speeds are compared compute what they are said to compute."""

import numpy as np
import pytest
from builders import tiny_config, trained_model
from helpers import note_layer_forms

from headsteer_jax.deploy.build import (
    make_deployed_function,
    make_skipping_function,
    make_vit_function,
    take_over_gates,
)
from headsteer_jax.deploy.convert import convert_model
from headsteer_jax.deploy.speed import measure_batches
from headsteer_jax.model import skip


def test_all_gated_functions_give_the_same_logits_and_have_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LENGTHS", "PARTS"):  # few sizes of pieces, because each takes time to compile
        monkeypatch.setattr(skip, name, 1)
    forms = note_layer_forms(monkeypatch)
    config, labels = tiny_config(kinds=("heads", "sublayers", "tokens")), np.array([1, 2, 5])
    trained = trained_model(config, seed=1)
    deployed = convert_model(trained, tuple("abcdefg"), labels, (8, 8, 1), dynamic=True)
    functions = {
        "masked": make_vit_function(trained, labels, "thresholded"),
        "skipping": make_skipping_function(trained, labels),
        "deployed": make_deployed_function(deployed),
    }
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    logits = {name: np.asarray(function(images)) for name, function in functions.items()}
    assert "kept" in forms
    assert np.abs(logits["masked"] - make_vit_function(trained, labels, "dense")(images)).max() > 0.01
    for name in ("skipping", "deployed"):
        np.testing.assert_allclose(logits[name], logits["masked"], atol=3e-5, rtol=3e-5)
    monkeypatch.undo()
    speeds = measure_batches(functions, images[:3], batches=(2, 5))
    assert {name: sorted(by_batch) for name, by_batch in speeds.items()} == {key: ["2", "5"] for key in functions}


def test_a_steered_model_skips_what_its_moved_gates_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headsteer_jax.model.skip.SMALLEST", 0)
    config, labels = tiny_config(kinds=("heads", "sublayers", "tokens")), np.array([1, 2, 5])
    trained = trained_model(config, seed=1)
    deployed = convert_model(trained, tuple("abcdefg"), labels, (8, 8, 1), dynamic=True)
    layers = [dict(layer) for layer in deployed.params["layers"]]
    gates = dict(layers[1]["gates"])
    gates["heads"] = gates["heads"] | {"bias": gates["heads"]["bias"] + np.float32([3, -3, 3])}
    layers[1]["gates"] = gates
    steered = deployed._replace(params=deployed.params | {"layers": layers})
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    skipping = make_skipping_function(take_over_gates(trained, steered), labels)(images)
    np.testing.assert_allclose(skipping, make_deployed_function(steered)(images), atol=3e-5, rtol=3e-5)
    assert np.abs(skipping - make_skipping_function(trained, labels)(images)).max() > 1e-3
