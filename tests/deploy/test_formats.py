"""StableHLO and ONNX files of deployed models, run without this package and in onnxruntime."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import CLASSES, tiny_config, trained_model
from helpers import environment

from headsteer_jax.config import Config
from headsteer_jax.deploy.convert import KeptParts, convert_model, cut_model
from headsteer_jax.deploy.formats import export_stablehlo, write_formats
from headsteer_jax.deploy.model import DeployedModel
from headsteer_jax.deploy.onnx_file import export_onnx

NAMES = tuple("abcdefg")
KINDS = ("heads", "sublayers", "tokens")
WITHOUT_PACKAGE = """
import sys
import numpy as np
from jax import export
program = export.deserialize(open(sys.argv[1], "rb").read())
images = np.load(sys.argv[2])
np.savez(sys.argv[3], all=program.call(images), one=program.call(images[:1]), platforms=program.platforms)
assert not any(name.startswith("headsteer_jax") for name in sys.modules)
"""


def make_images(shape: tuple[int, int, int], count: int = 5) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, *shape), dtype=np.uint8)


def cut_some() -> DeployedModel:
    """Cut a model so that one layer has no heads and another no neurons; the images are cropped and resized."""
    config = tiny_config()
    data = config.data.model_copy(update={"channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)})
    model = config.model.model_copy(update={"registers": 1})
    config = config.model_copy(update={"data": data, "model": model})
    whole = convert_model(trained_model(config), NAMES, np.array([1, 4, 6]), (13, 16, 3))
    heads = (np.array([0, 2]), np.zeros(0, int), np.array([1]))
    return cut_model(whole, KeptParts(heads, (np.arange(0, 96, 2), np.arange(8), np.zeros(0, int))))


def make_dynamic(**gate: object) -> DeployedModel:
    config: Config = tiny_config(**gate)
    return convert_model(trained_model(config, seed=1), NAMES, np.arange(CLASSES), (8, 8, 1), dynamic=True)


MODELS = {
    "cut": cut_some,
    "all gates": lambda: make_dynamic(kinds=KINDS, threshold=0.6),
    "identity": lambda: make_dynamic(kinds=("heads",), layer_norm=True, dropped="identity"),
    "slice": lambda: make_dynamic(kinds=KINDS, dropped="slice"),
}


def test_stablehlo_runs_in_a_process_without_this_package(tmp_path: Path) -> None:
    for name in ("cut", "all gates"):
        model = MODELS[name]()
        images = make_images(model.config.image)
        (tmp_path / "model.stablehlo").write_bytes(export_stablehlo(model))
        np.save(tmp_path / "images.npy", images)
        (tmp_path / "alone.py").write_text(WITHOUT_PACKAGE)
        variables = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
        command = [sys.executable, "alone.py", "model.stablehlo", "images.npy", "logits.npz"]
        subprocess.run(command, cwd=tmp_path, env=variables, check=True)
        logits, expected = np.load(tmp_path / "logits.npz"), np.asarray(model.apply(images))
        np.testing.assert_allclose(logits["all"], expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(logits["one"], expected[:1], atol=1e-5, rtol=1e-5)
        assert logits["platforms"].tolist() == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("name", MODELS)
def test_onnx_gives_the_same_logits_in_onnxruntime(name: str) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = MODELS[name]()
    images = make_images(model.config.image)
    expected = np.asarray(model.apply(images))
    anything = runtime.InferenceSession(export_onnx(model), providers=["CPUExecutionProvider"])
    for count in (5, 2):
        (logits,) = anything.run(["logits"], {"images": images[:count]})
        np.testing.assert_allclose(logits, expected[:count], atol=1e-5, rtol=1e-5)
    assert anything.get_modelmeta().custom_metadata_map["classes"].split("\n") == list(model.config.classes)
    one = runtime.InferenceSession(export_onnx(model, batch=1), providers=["CPUExecutionProvider"])
    assert one.get_inputs()[0].shape == [1, *model.config.image]
    np.testing.assert_allclose(one.run(None, {"images": images[:1]})[0], expected[:1], atol=1e-5, rtol=1e-5)


def test_without_the_extra_onnx_its_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    caplog.set_level("INFO", "headsteer_jax")
    write_formats(cut_some(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.stablehlo"]
    assert "pip install 'headsteer-jax[onnx]'" in caplog.text
