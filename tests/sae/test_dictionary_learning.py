"""Autoencoders of dictionary_learning: imports against the library's own outputs and against NumPy."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GOLDENS
from safetensors.numpy import load_file, save_file

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.interchange.dictionary_learning import import_dictionary_learning
from headsteer_jax.sae.interchange.provenance import Provenance

# the library itself wrote GOLDENS/dictionary_learning_*: goldens/make_sae_goldens.py
D, F, K = 8, 24, 3
CASES = {
    "standard": ("relu", None),
    "new": ("relu", None),
    "gated": ("jumprelu", None),
    "topk": ("topk", K),
    "batchtopk": ("batch_topk", K),
    "matryoshka": ("batch_topk", K),
    "jumprelu": ("jumprelu", None),
}


def run_library(directory: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute what dictionary_learning's load_dictionary and encode and decode do. Float64."""
    name = json.loads((directory / "config.json").read_text())["trainer"]["dict_class"]
    t = {key: value.astype(np.float64) for key, value in load_file(directory / "ae.safetensors").items()}
    relu = lambda a: np.maximum(a, 0)  # noqa: E731
    if name == "AutoEncoder":
        norms = np.linalg.norm(t["decoder.weight"], axis=0)
        z = relu((x - t["bias"]) @ (t["encoder.weight"] * norms[:, None]).T + t["encoder.bias"] * norms)
        return z, z @ (t["decoder.weight"] / norms).T + t["bias"]
    if name == "AutoEncoderNew":
        z = relu(x @ t["encoder.weight"].T + t["encoder.bias"])
        return z, z @ t["decoder.weight"].T + t["decoder.bias"]
    if name == "GatedAutoEncoder":
        seen = (x - t["decoder_bias"]) @ t["encoder.weight"].T
        z = (seen + t["gate_bias"] > 0) * relu(np.exp(t["r_mag"]) * seen + t["mag_bias"])
        return z, z @ t["decoder.weight"].T + t["decoder_bias"]
    if name == "JumpReluAutoEncoder":
        a = x @ t["W_enc"] + t["b_enc"]
        z = relu(a * (a > t["threshold"]))
        return z, z @ t["W_dec"] + t["b_dec"]
    if name == "MatryoshkaBatchTopKSAE":
        a = relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
        z = a * (a > t["threshold"])
        return z, z @ t["W_dec"] + t["b_dec"]
    a = relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    z = a * (a > t["threshold"]) if name == "BatchTopKSAE" else a * (a >= np.sort(a, axis=1)[:, [-K]])
    return z, z @ t["decoder.weight"].T + t["b_dec"]


def assert_close(actual: tuple[np.ndarray, ...], desired: tuple[np.ndarray, ...]) -> None:
    for a, b in zip(actual, desired, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_an_import_computes_what_dictionary_learning_does(name: str) -> None:
    golden = np.load(GOLDENS / "dictionary_learning_outputs.npz")
    desired = golden[f"{name}_z"], golden[f"{name}_x_hat"]
    imported = import_dictionary_learning(GOLDENS / f"dictionary_learning_{name}", width=D)
    assert (imported.activation, imported.k) == CASES[name]
    assert 0 < np.count_nonzero(desired[0]) < desired[0].size
    z = imported.sae.encode(golden["x"])
    assert_close((np.asarray(z), np.asarray(imported.sae.decode(z))), desired)
    assert_close(run_library(GOLDENS / f"dictionary_learning_{name}", golden["x"]), desired)


def test_a_file_of_pytorch_is_read_without_safetensors(tmp_path: Path) -> None:
    path = copy(tmp_path, "topk")
    (path / "ae.safetensors").unlink()
    if importlib.util.find_spec("torch") is None:
        assert_refused(path, ["ae.pt", "pip install torch", "ae.safetensors"])
        return
    expected = import_dictionary_learning(GOLDENS / "dictionary_learning_topk")
    np.testing.assert_array_equal(import_dictionary_learning(path).sae.weights.W_e, expected.sae.weights.W_e)


def test_the_provenance_is_read() -> None:
    expected = Provenance("EleutherAI/pythia-70m-deduped", "resid_post_layer_4", 5, True)
    assert import_dictionary_learning(GOLDENS / "dictionary_learning_topk").provenance == expected


@pytest.mark.parametrize(
    ("notes", "hook", "layer", "is_residual"),
    [
        ({"submodule_name": "resid_post"}, "resid_post_layer_4", 5, True),
        ({"submodule_name": "resid_pre_layer_4"}, "resid_pre_layer_4", 4, True),
        ({"submodule_name": "mlp_out_layer_4"}, "mlp_out_layer_4", None, False),
        ({"submodule_name": None}, "layer 4", None, None),
        ({"submodule_name": None, "layer": None}, None, None, None),
    ],
)
def test_the_place_is_read_as_far_as_the_notes_tell(
    tmp_path: Path, notes: dict[str, Any], hook: str | None, layer: int | None, is_residual: bool | None
) -> None:
    read = import_dictionary_learning(change(copy(tmp_path, "topk"), notes)).provenance
    assert (read.hook, read.layer, read.is_residual) == (hook, layer, is_residual)


def copy(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(GOLDENS / f"dictionary_learning_{name}", tmp_path / "dictionary"))


def change(path: Path, notes: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """Change a directory's notes on the trainer, and its tensors (None: remove one)."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"trainer": config["trainer"] | notes}))
    changed = load_file(path / "ae.safetensors") | (tensors or {})
    save_file({key: value for key, value in changed.items() if value is not None}, path / "ae.safetensors")
    return path


def assert_refused(path: Path, parts: list[str], width: int | None = None) -> None:
    with pytest.raises(HeadSteerError) as error:
        import_dictionary_learning(path, width)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("notes", "tensors", "parts"),
    [
        ({"dict_class": "CrossCoder"}, {}, ["dict_class = 'CrossCoder'", "it must be AutoEncoder, AutoEncoderNew"]),
        ({"dict_class": None}, {}, ["dict_class = None"]),
        ({"dict_class": ["AutoEncoder"]}, {}, ["dict_class = ['AutoEncoder']"]),
        ({"dict_class": "AutoEncoder"}, {}, ["the class AutoEncoder has no tensor 'b_dec'"]),
        ({"k": None}, {}, ["config.json: k = None"]),
        ({"k": F + 1}, {}, ["k = 25", "1 to 24"]),
        ({"k": K + 1}, {}, ["ae.safetensors: k = 3", "has 4"]),
        ({}, {"encoder.weight": np.ones((F, D + 1), np.float32)}, ["'decoder.weight'", "[8, 24], not [9, 24]"]),
        ({}, {"encoder.weight": np.ones((2, F, D), np.float32)}, ["[2, 24, 8]", "a crosscoder"]),
        ({}, {"encoder.bias": None}, ["no tensor 'encoder.bias'"]),
        ({}, {"b_dec": np.full(D, np.nan, np.float32)}, ["'b_dec' holds NaN"]),
        ({"dict_class": "BatchTopKSAE"}, {"threshold": np.float32(-1)}, ["threshold = -1", "never set"]),
        ({}, {"blocks.0.attn.qkv.weight": np.ones(3, np.float32)}, ["holds a transformer", "config.model.pretrained"]),
    ],
)
def test_a_dictionary_that_is_not_supported(
    tmp_path: Path, notes: dict[str, Any], tensors: dict[str, Any], parts: list[str]
) -> None:
    assert_refused(
        change(copy(tmp_path, "topk"), notes, {k: v if v is None else np.asarray(v) for k, v in tensors.items()}), parts
    )


def test_files_that_are_missing_or_of_another_width(tmp_path: Path) -> None:
    path = copy(tmp_path, "gated")
    assert_refused(path, ["width 8", "384 wide"], width=384)
    (path / "ae.safetensors").unlink()
    assert_refused(path, ["ae.pt: no such .safetensors or .pt file"])
    (path / "config.json").unlink()
    assert_refused(path, ["config.json: no such file", "config.json and ae.pt"])


def test_a_gate_that_is_never_or_always_open(tmp_path: Path) -> None:
    """Where the gate's bias decides alone, the thresholds of the equivalent JumpReLU are far from the magnitudes."""
    path = copy(tmp_path, "gated")
    bias = np.where(np.arange(F) % 2, 50.0, -50.0).astype(np.float32)
    change(path, {}, {"gate_bias": bias})
    x = np.random.default_rng(0).standard_normal((6, D)).astype(np.float32)
    z = np.asarray(import_dictionary_learning(path).sae.encode(x))
    assert not z[:, ::2].any()
    assert z[:, 1::2].any()
    assert_close((z,), run_library(path, x)[:1])
