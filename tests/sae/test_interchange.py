"""Autoencoders of SAELens and overcomplete: imports against their own outputs, exports run by NumPy and by them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling, fold_scaling
from headsteer_jax.sae.interchange.files import Imported
from headsteer_jax.sae.interchange.overcomplete import CONSTANT_VALUE, export_overcomplete, import_overcomplete
from headsteer_jax.sae.interchange.saelens import export_saelens, import_saelens

# the libraries themselves wrote GOLDENS: goldens/make_sae_goldens.py
D, F, K = 8, 24, 3
KINDS = ["topk", "batch_topk", "jumprelu", "relu"]
# HEADSTEER_SAELENS=/tmp/saelens/bin/python: an interpreter that has the library, if this one has not
PEERS = {"saelens": "sae_lens", "overcomplete": "overcomplete"}


def ours(kind: str, d: int = D, f: int = F) -> Autoencoder:
    """An autoencoder in which every parameter and the scaling matter."""
    rng = np.random.default_rng(1)
    normal = [rng.standard_normal(shape).astype(np.float32) for shape in ((f, d), (f,), (f, d), (d,), (f,), (d,))]
    W_e, b_e, W_d, b_d, spread, mean = normal
    threshold = {"batch_topk": np.full(f, 1.25), "jumprelu": np.abs(1 + spread / 2)}.get(kind, np.zeros(f))
    weights = SAEWeights(*(jnp.asarray(value, jnp.float32) for value in (W_e, b_e / 2, W_d / 2, b_d / 2, threshold)))
    return Autoencoder(weights, Scaling(3 * mean, np.asarray(0.375, np.float32)), K if kind == "topk" else None)


def residuals(scaling: Scaling, rows: int = 40) -> np.ndarray:
    noise = np.random.default_rng(2).standard_normal((rows, len(scaling.mean)))
    return (scaling.mean + noise / scaling.scale).astype(np.float32)


def run_ours(imported: Imported, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = imported.sae.encode(x)
    return np.asarray(z), np.asarray(imported.sae.decode(z))


def expected(kind: str, sae: Autoencoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs that an export must have: our latents over the scale, and our reconstruction of x. Float64."""
    W_e, b_e, W_d, b_d, threshold = (np.asarray(leaf, np.float64) for leaf in sae.weights)
    mean, scale = (np.asarray(value, np.float64) for value in sae.scaling)
    z = np.maximum(((x - mean) * scale - b_d) @ W_e.T + b_e, 0)
    z = top_k(z, K) if kind == "topk" else z * (z > threshold)
    return z / scale, (z @ W_d + b_d) / scale + mean


def top_k(a: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, one by one."""
    out = np.zeros_like(a)
    for row, new in zip(a, out, strict=True):
        for i in np.argsort(-row)[:k]:
            new[i] = row[i]
    return out


def run_saelens(directory: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute what SAELens does with a file of today's layout for inference. Float64."""
    c = json.loads((directory / "cfg.json").read_text())
    t = {name: value.astype(np.float64) for name, value in load_file(directory / "sae_weights.safetensors").items()}
    assert int(c["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert c["normalize_activations"] == c["reshape_activations"] == "none"
    seen = x - t["b_dec"] * c["apply_b_dec_to_input"]
    if c["architecture"] == "gated":
        gate, magnitude = seen @ t["W_enc"] + t["b_gate"], seen @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"]
        z = np.maximum(magnitude, 0) * (gate > 0)
        return z, z @ t["W_dec"] + t["b_dec"]
    pre = seen @ t["W_enc"] + t["b_enc"]
    length = np.linalg.norm(t["W_dec"], axis=1) if c.get("rescale_acts_by_decoder_norm") else 1.0
    z = np.maximum(pre * length, 0)
    if c["architecture"] == "topk":
        z = top_k(z, c["k"])
    elif c["architecture"] == "jumprelu":
        z = z * (pre > t["threshold"])
    else:
        assert c["architecture"] == "standard"
    return z, z / length @ t["W_dec"] + t["b_dec"]


def run_overcomplete(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute what overcomplete does with a linear SAE's state_dict whose dictionary is not normalised. Float64."""
    t = {name: value.astype(np.float64) for name, value in load_file(path).items()}
    with safe_open(path, framework="np") as file:
        m = json.loads(file.metadata()["overcomplete"])
    assert m["arguments"]["dictionary_params"]["normalization"] == "identity"
    z = np.maximum(x @ t["encoder.final_block.0.weight"].T + t["encoder.final_block.0.bias"], 0)
    if m["class"] == "TopKSAE":
        z = top_k(z, m["arguments"]["top_k"])
    elif m["class"] == "BatchTopKSAE":
        z = z * (z >= m["running_threshold"])
    elif m["class"] == "JumpSAE":
        z = z * (z >= np.exp(t["thresholds"]))
    return z, z @ t["dictionary._weights"] * np.exp(t["dictionary.multiplier"])


def assert_close(actual: tuple[np.ndarray, ...], desired: tuple[np.ndarray, ...], rounding: float = 1e-6) -> None:
    for a, b in zip(actual, desired, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= rounding * np.abs(b).max()


@pytest.mark.parametrize(
    ("name", "activation", "k"),
    [
        ("standard", "relu", None),
        ("uncentred", "relu", None),
        ("gated", "jumprelu", None),
        ("topk", "topk", K),
        ("topk_rescaled", "topk", K),
        ("jumprelu", "jumprelu", None),
        ("bfloat16", "jumprelu", None),
        ("batchtopk", "batch_topk", K),
        ("batchtopk_training", "batch_topk", K),
        ("batchtopk_raw", "batch_topk", K),
        ("batchtopk_raw_training", "batch_topk", K),
        ("matryoshka", "batch_topk", K),
        ("matryoshka_training", "batch_topk", K),
        ("old_standard", "relu", None),
        ("old_topk", "topk", K),
    ],
)
def test_an_import_computes_what_saelens_does(name: str, activation: str, k: int | None) -> None:
    golden = np.load(GOLDENS / "saelens_outputs.npz")
    desired = tuple(golden[f"{name.removesuffix('_training')}_{part}"] for part in ("z", "x_hat"))
    imported = import_saelens(GOLDENS / f"saelens_{name}", width=D)
    assert (imported.activation, imported.k) == (activation, k)
    assert 0 < np.count_nonzero(desired[0]) < desired[0].size
    assert_close(run_ours(imported, golden["x"]), desired)
    if not name.endswith("_training") and not name.startswith(("old_", "bfloat16")):
        assert_close(run_saelens(GOLDENS / f"saelens_{name}", golden["x"]), desired)


@pytest.mark.parametrize(
    ("name", "activation", "k"),
    [
        ("topk", "topk", K),
        ("multiplied", "topk", K),
        ("max_l2", "topk", K),
        ("l1", "topk", K),
        ("max_l1", "topk", K),
        ("identity", "topk", K),
        ("batchtopk", "batch_topk", None),
        ("jump", "jumprelu", None),
        ("relu", "relu", None),
        ("untied", "topk", K),
        ("tied", "topk", K),
        ("tied_bias", "topk", K),
    ],
)
def test_an_import_computes_what_overcomplete_does(name: str, activation: str, k: int | None) -> None:
    golden = np.load(GOLDENS / "overcomplete_outputs.npz")
    desired = golden[f"{name}_z"], golden[f"{name}_x_hat"]
    path = GOLDENS / f"overcomplete_{name}.safetensors"
    imported = import_overcomplete(path, width=D)
    assert (imported.activation, imported.k) == (activation, k)
    assert 0 < np.count_nonzero(desired[0]) < desired[0].size
    assert_close(run_ours(imported, golden["x"]), desired)
    if name == "identity":
        assert_close(run_overcomplete(path, golden["x"]), desired)


def export(peer: str, kind: str, path: Path, d: int = D, f: int = F, k: int = K) -> Autoencoder:
    sae = ours(kind, d, f)
    write: Callable[..., None] = export_saelens if peer == "saelens" else export_overcomplete
    write(sae, kind, k, path, {"model_name": "vit", "hook_name": "layers.2"})
    return sae


def without_constant(z: np.ndarray) -> np.ndarray:
    """Our latents of an export to overcomplete: its last concept is always on."""
    assert (z[:, -1] == CONSTANT_VALUE).all()
    return z[:, :-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peer", PEERS)
def test_an_export_computes_what_ours_does_and_can_be_imported(tmp_path: Path, peer: str, kind: str) -> None:
    path = tmp_path / "a" / "b.safetensors"
    sae = export(peer, kind, path)
    x = residuals(sae.scaling)
    desired = expected(kind, sae, x)
    if peer == "saelens":
        back, (z, x_hat) = import_saelens(path, D), run_saelens(path, x)
    else:
        back, (z, x_hat) = import_overcomplete(path, D), run_overcomplete(path, x)
        z = without_constant(z)
    assert_close((z, x_hat), desired)
    assert (back.activation, back.k) == (kind, None if kind == "relu" else K)
    assert_close(run_ours(back, x), desired, 2e-6)
    raw = fold_scaling(sae)
    for name, value in raw._asdict().items():
        np.testing.assert_allclose(getattr(back.sae.weights, name), value, rtol=1e-6, atol=1e-5, err_msg=name)
    if kind == "batch_topk":  # ours is on above it, theirs at it and above: the same set of floats
        np.testing.assert_array_equal(back.sae.weights.threshold, raw.threshold)


def peer_python(peer: str) -> str:
    python = os.environ.get(f"HEADSTEER_{peer.upper()}", "")
    if not python and importlib.util.find_spec(PEERS[peer]) is None:
        pytest.skip(f"{PEERS[peer]} is not installed, and HEADSTEER_{peer.upper()} names no interpreter that has it")
    return python or sys.executable


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peer", PEERS)
def test_an_export_runs_in_its_library(tmp_path: Path, peer: str, kind: str) -> None:
    python, path = peer_python(peer), tmp_path / "b.safetensors"
    sae = export(peer, kind, path)
    x = residuals(sae.scaling)
    np.savez(tmp_path / "arrays.npz", x=x)
    script = GOLDENS / "make_sae_goldens.py"
    subprocess.run([python, script, peer, path, tmp_path / "arrays.npz"], check=True)
    arrays = np.load(tmp_path / "arrays.npz")
    z = arrays["z"] if peer == "saelens" else without_constant(arrays["z"])
    assert_close((z, arrays["x_hat"]), expected(kind, sae, x), 2e-6)


def test_k_may_be_as_large_as_the_number_of_latents(tmp_path: Path) -> None:
    sae = ours("topk")
    export_saelens(sae, "topk", F + 5, tmp_path)
    assert import_saelens(tmp_path).k == F
    export_overcomplete(sae, "topk", F + 5, tmp_path / "a.safetensors")
    assert import_overcomplete(tmp_path / "a.safetensors").k == F


def assert_refused(read: Callable[[Path], object], path: Path, parts: list[str]) -> None:
    with pytest.raises(HeadSteerError) as error:
        read(path)
    assert "\n" not in str(error.value)
    for part in [path.name, *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"architecture": "matching_pursuit"},
         ["'matching_pursuit'", "a matching pursuit", "must be standard, gated, topk, jumprelu, batchtopk, matryo"]),
        ({"architecture": "transcoder"}, ["'transcoder'; a transcoder, which predicts one place of a model from"]),
        ({"architecture": "skip_transcoder"}, ["'skip_transcoder'; a transcoder with a skip connection"]),
        ({"d_out": D + 1}, ["d_out", "a transcoder"]),
        ({"metadata": {"hook_name_out": "blocks.1.hook_mlp_out"}}, ["hook_name_out", "a transcoder"]),
        ({"architecture": "temporal"}, ["architecture = 'temporal'"]),
        ({"architecture": "jumprelu_transcoder"}, ["architecture = 'jumprelu_transcoder'"]),
        ({"architecture": ["topk"]}, ["architecture = ['topk']"]),
        ({"normalize_activations": "layer_norm"}, ["normalize_activations = 'layer_norm'", "must be none", "fold"]),
        ({"normalize_activations": True}, ["normalize_activations = True"]),
        ({"reshape_activations": "hook_z"}, ["reshape_activations = 'hook_z'"]),
        ({"activation_fn_str": "tanh-relu"}, ["activation_fn = 'tanh-relu'", "must be relu, topk"]),
        ({"activation_fn_str": "topk"}, ["k = None"]),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": 3}, ["k = None"]),
        ({"finetuning_scaling_factor": True}, ["finetuning_scaling_factor = True"]),
        ({"apply_b_dec_to_input": "no"}, ["apply_b_dec_to_input = 'no'"]),
        ({"k": None}, ["k = None", "1 to 24"]),
        ({"k": F + 1}, ["k = 25", "1 to 24"]),
        ({"k": 2.5}, ["k = 2.5"]),
        ({"d_in": "wide"}, ["d_in = 'wide'"]),
        ({"d_in": D + 1}, ["'W_enc'", "[8, 24]", "[9, 24]"]),
        ({"d_sae": 0}, ["d_sae = 0"]),
    ],
)  # fmt: skip
def test_a_config_that_is_not_supported(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    path = tmp_path / "sae"
    shutil.copytree(GOLDENS / "saelens_topk", path)
    config = json.loads((path / "cfg.json").read_text()) | change
    (path / "cfg.json").write_text(json.dumps(config))
    assert_refused(import_saelens, path, ["cfg.json" if "'W_enc'" not in parts else "sae_weights.safetensors", *parts])


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("cfg.json", None, ["no such file", "cfg.json and sae_weights.safetensors"]),
        ("cfg.json", b"{", ["cfg.json: damaged"]),
        ("cfg.json", b"\xff\xfe", ["cfg.json: damaged"]),
        ("cfg.json", b"[1]", ["no JSON object"]),
        ("sae_weights.safetensors", None, ["no such .safetensors file"]),
        ("sae_weights.safetensors", b"PK no tensors", ["truncated or not a .safetensors file"]),
        ("sae_weights.safetensors", 1500, ["truncated or not a .safetensors file"]),
    ],
)
def test_files_of_saelens_that_are_missing_or_damaged(
    tmp_path: Path, name: str, content: bytes | int | None, parts: list[str]
) -> None:
    path = tmp_path / "sae"
    shutil.copytree(GOLDENS / "saelens_topk", path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:content] if isinstance(content, int) else content)
    assert_refused(import_saelens, path, parts)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("W_dec", None, ["no tensor 'W_dec'"]),
        ("threshold", None, ["no tensor 'threshold'"]),
        ("b_enc", np.zeros(F + 1, np.float32), ["'b_enc'", "[25], not [24]"]),
        ("W_enc", np.full((D, F), np.nan, np.float32), ["'W_enc' holds NaN"]),
        ("W_gate", np.zeros((D, F), np.float32), ["no place for the tensor 'W_gate'"]),
        ("scaling_factor", np.full(F, 2, np.float32), ["no place for the tensor 'scaling_factor'"]),
    ],
)
def test_tensors_of_saelens_that_do_not_fit(tmp_path: Path, name: str, value: Any, parts: list[str]) -> None:
    path = tmp_path / "sae"
    shutil.copytree(GOLDENS / "saelens_jumprelu", path)
    replace_tensor(path / "sae_weights.safetensors", name, value)
    assert_refused(import_saelens, path, ["sae_weights.safetensors", *parts])


def test_notes_on_training_are_only_notes(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    shutil.copytree(GOLDENS / "saelens_batchtopk", path)
    config = json.loads((path / "cfg.json").read_text())
    for note in ("x", {"training_architecture_details": 3}, {"training_architecture_details": {"k": np.nan}}):
        (path / "cfg.json").write_text(json.dumps(config | {"metadata": note}))
        imported = import_saelens(path)
        assert (imported.activation, imported.k) == ("jumprelu", None)


def test_a_scaling_factor_of_ones_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    shutil.copytree(GOLDENS / "saelens_jumprelu", path)
    replace_tensor(path / "sae_weights.safetensors", "scaling_factor", np.ones(F, np.float32))
    np.testing.assert_array_equal(
        import_saelens(path).sae.weights.W_e, import_saelens(GOLDENS / "saelens_jumprelu").sae.weights.W_e
    )


def replace_tensor(path: Path, name: str, value: Any, metadata: dict[str, str] | None = None) -> None:
    """Rewrite a file with another tensor, or without one (None), of this name, and with these metadata."""
    tensors = load_file(path)
    tensors.pop(name, None)
    path.unlink()
    save_file(tensors if value is None else tensors | {name: value}, path, metadata)


@pytest.mark.parametrize(
    ("name", "value", "change", "parts"),
    [
        ("", None, {"class": None}, ["class = None", "SAE, TopKSAE, BatchTopKSAE, JumpSAE", "metadata={'overcompl"]),
        ("", None, {"class": ["SAE"]}, ["class = ['SAE']"]),
        ("", None, {"class": "MpSAE"}, ["class = 'MpSAE'", "a matching pursuit"]),
        ("", None, {"class": "RATopKSAE"}, ["class = 'RATopKSAE'", "an archetypal SAE"]),
        ("", None, {"arguments": 1}, ["metadata are not {'class': ..., 'arguments': ...}"]),
        ("", None, {"arguments": {}}, ["top_k = None", "1 to 24"]),
        ("", None, {"arguments": {"top_k": "x"}}, ["top_k = 'x'"]),
        ("", None, {"arguments": {"top_k": 25}}, ["top_k = 25"]),
        ("", None, {"arguments": {"dictionary_params": {"normalization": "l3"}}},
         ["normalization = 'l3'", "l2, max_l2, l1, max_l1 or identity"]),
        ("", None, {"class": "BatchTopKSAE"}, ["running_threshold = None"]),
        ("", None, {"class": "BatchTopKSAE", "running_threshold": [1]}, ["running_threshold = [1]"]),
        ("", None, {"class": "BatchTopKSAE", "running_threshold": np.nan}, ["running_threshold = nan"]),
        ("", None, {"class": "JumpSAE"}, ["no tensor 'thresholds'"]),
        ("", None, {"constant_concept": 23}, ["concept 23 is not constant"]),
        ("encoder.final_block.1.weight", np.ones(F, np.float32), {},
         ["'encoder.final_block.1.weight'", "encoder_module='linear'"]),
        ("dictionary.Relax", np.ones((F, D), np.float32), {},
         ["'dictionary.Relax'", "an archetypal SAE", "DictionaryLayer"]),
        ("encoder.final_block.0.weight", None, {}, ["no tensor 'encoder.final_block.0.weight'"]),
        ("encoder.final_block.0.bias", None, {}, ["no tensor 'encoder.final_block.0.bias'"]),
        ("encoder.final_block.0.weight", np.ones((F, D + 1), np.float32), {}, ["[24, 9], not [24, 8]"]),
        ("dictionary._weights", np.ones(F, np.float32), {}, ["'dictionary._weights'", "[24], not [any, any]"]),
        ("dictionary._weights", np.full((F, D), np.inf, np.float32), {}, ["'dictionary._weights' holds NaN or inf"]),
    ],
)  # fmt: skip
def test_files_of_overcomplete_that_do_not_fit(
    tmp_path: Path, name: str, value: Any, change: dict[str, Any], parts: list[str]
) -> None:
    path = tmp_path / "a.safetensors"
    shutil.copy(GOLDENS / "overcomplete_topk.safetensors", path)
    metadata = {"class": "TopKSAE", "arguments": {"top_k": K}, **change}
    replace_tensor(path, name, value, {"overcomplete": json.dumps(metadata)})
    assert_refused(import_overcomplete, path, parts)


def test_a_file_of_overcomplete_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shutil.copy(GOLDENS / "overcomplete_topk.safetensors", path)
    replace_tensor(path, "", None)
    assert_refused(import_overcomplete, path, ["class = None"])
    replace_tensor(path, "", None, {"overcomplete": "{"})
    assert_refused(import_overcomplete, path, ["metadata are not {'class'"])


@pytest.mark.parametrize("peer", PEERS)
def test_an_export_is_the_same_bytes_each_time(tmp_path: Path, peer: str) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        export(peer, "topk", tmp_path / name)
    first, second = (tmp_path / name for name in ("a.safetensors", "b.safetensors"))
    for path in first.iterdir() if first.is_dir() else [first]:
        assert path.read_bytes() == (second / path.name if second.is_dir() else second).read_bytes()


def test_files_of_overcomplete_that_are_missing_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert_refused(import_overcomplete, path, ["no such .safetensors file"])
    path.write_bytes((GOLDENS / "overcomplete_topk.safetensors").read_bytes()[:900])
    assert_refused(import_overcomplete, path, ["truncated or not a .safetensors file"])
    assert_refused(import_overcomplete, path.rename(tmp_path / "a.pt"), ["no such .safetensors file"])


def test_another_width_is_named(tmp_path: Path) -> None:
    path = GOLDENS / "saelens_topk"
    assert_refused(lambda _: import_saelens(path, width=384), path, ["width 8", "384 wide"])
    path = GOLDENS / "overcomplete_topk.safetensors"
    assert_refused(lambda _: import_overcomplete(path, width=384), path, ["width 8", "384 wide"])


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sae = ours("topk")
    assert_refused(lambda path: export_saelens(sae, "topk", K, path), tmp_path / "file" / "a", ["not writable"])
