"""Autoencoders of EleutherAI's sparsify: imports against the library's own outputs and against NumPy."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GOLDENS
from safetensors.numpy import load_file, save_file

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.interchange.provenance import Provenance
from headsteer_jax.sae.interchange.sparsify import import_sparsify

# the library itself wrote GOLDENS/sparsify_*: goldens/make_sae_goldens.py
D, K = 8, 3


@pytest.mark.parametrize(("name", "latents"), [("layers.5", 24), ("free", 19)])
def test_an_import_computes_what_sparsify_does(name: str, latents: int) -> None:
    golden, path = np.load(GOLDENS / "sparsify_outputs.npz"), GOLDENS / f"sparsify_{name}"
    x, z_expected, x_hat_expected = golden["x"], golden[f"{name}_z"], golden[f"{name}_x_hat"]
    imported = import_sparsify(path, width=D)
    assert (imported.activation, imported.k, len(imported.sae.weights.b_e)) == ("topk", K, latents)
    z = imported.sae.encode(x)
    t = {key: value.astype(np.float64) for key, value in load_file(path / "sae.safetensors").items()}
    a = np.maximum((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 0)
    by_hand = a * (a >= np.sort(a, axis=1)[:, [-K]])
    for actual, desired in (
        (z, z_expected), (by_hand, z_expected),
        (imported.sae.decode(z), x_hat_expected), (by_hand @ t["W_dec"] + t["b_dec"], x_hat_expected),
    ):  # fmt: skip
        assert np.abs(np.asarray(actual) - desired).max() <= 1e-6 * np.abs(desired).max()
    assert 0 < np.count_nonzero(z_expected) <= K * len(x)


def copy(tmp_path: Path, name: str = "layers.5") -> Path:
    return Path(shutil.copytree(GOLDENS / "sparsify_layers.5", tmp_path / "run" / name))


@pytest.mark.parametrize(
    ("name", "hook", "layer", "is_residual"),
    [
        ("layers.5", "layers.5", 6, True),
        ("h.0", "h.0", 1, True),
        ("encoder.layer.3", "encoder.layer.3", 4, True),
        ("layers.5.mlp", "layers.5.mlp", None, False),
        ("downloaded", None, None, None),
    ],
)
def test_the_directory_names_the_module(
    tmp_path: Path, name: str, hook: str | None, layer: int | None, is_residual: bool | None
) -> None:
    path = copy(tmp_path, name)
    assert import_sparsify(path).provenance == Provenance(None, hook, layer, is_residual)
    (path.parent / "config.json").write_text("[]")  # something else's
    assert import_sparsify(path).provenance.model is None
    (path.parent / "config.json").write_text(json.dumps({"model": "facebook/dinov2-small", "dataset": "imagenet-1k"}))
    assert import_sparsify(path).provenance == Provenance(
        "facebook/dinov2-small", hook, layer, is_residual, dataset="imagenet-1k"
    )


@pytest.mark.parametrize(
    ("change", "tensor", "parts"),
    [
        ({"transcode": True}, None, ["cfg.json: transcode = True", "a transcoder, which predicts the output"]),
        ({"skip_connection": True}, None, ["skip_connection = True", "a transcoder with a skip connection"]),
        ({"signed": True}, None, ["signed = True", "may be negative"]),
        ({"activation": "groupmax"}, None, ["activation = 'groupmax'", "compete within groups"]),
        ({"k": 25}, None, ["k = 25", "1 to 24"]),
        ({"d_in": None}, None, ["d_in = None"]),
        ({"num_latents": 23}, None, ["'encoder.weight'", "[24, 8], not [23, 8]"]),
        ({"num_latents": 0, "expansion_factor": 2.5}, None, ["expansion_factor = 2.5"]),
        ({}, ("W_skip", np.zeros((D, D), np.float32)), ["'W_skip'", "a skip connection"]),
        ({}, ("W_up", np.zeros(2, np.float32)), ["no place for the tensor 'W_up'"]),
        ({}, ("W_dec", np.full((24, D), np.inf, np.float32)), ["'W_dec' holds NaN or infinity"]),
    ],
)  # fmt: skip
def test_a_sparse_coder_that_is_not_supported(
    tmp_path: Path, change: dict[str, Any], tensor: tuple[str, np.ndarray] | None, parts: list[str]
) -> None:
    path = copy(tmp_path)
    config = json.loads((path / "cfg.json").read_text()) | change
    (path / "cfg.json").write_text(json.dumps(config))
    if tensor:
        save_file(load_file(path / "sae.safetensors") | dict([tensor]), path / "sae.safetensors")
    with pytest.raises(HeadSteerError) as error:
        import_sparsify(path)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_settings_of_the_training_change_nothing(tmp_path: Path) -> None:
    path = copy(tmp_path)
    config = json.loads((path / "cfg.json").read_text())
    for name in ("activation", "normalize_decoder", "multi_topk", "transcode", "skip_connection", "num_latents"):
        config.pop(name)  # as older versions wrote it
    (path / "cfg.json").write_text(json.dumps(config | {"multi_topk": True}))
    expected = import_sparsify(GOLDENS / "sparsify_layers.5").sae.weights
    np.testing.assert_array_equal(import_sparsify(path).sae.weights.W_e, expected.W_e)
