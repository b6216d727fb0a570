"""The public face: what `import headsteer_jax` offers, how soon, and the ways to start the command line."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, FinishedRun, environment, headsteer

import headsteer_jax
from headsteer_jax import HeadSteerError, load_run


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def test_import_and_help_do_not_wait_for_jax() -> None:
    program = """
import sys
from pathlib import Path
import headsteer_jax
assert "pydantic" not in sys.modules
from headsteer_jax.cli import run_command_line
try:
    run_command_line(["run", "--help"])
except SystemExit as end:
    assert not end.code
assert not {"jax", "numpy", "matplotlib", "tensorflow_datasets"} & sys.modules.keys()
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: headsteer run ")


def test_every_public_name_can_be_imported() -> None:
    for name in headsteer_jax.__all__:
        assert getattr(headsteer_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'headsteer_jax' has no attribute 'load_runs'"):
        headsteer_jax.load_runs  # noqa: B018


def test_an_autoencoder_of_a_loaded_run_encodes_and_decodes(finished: FinishedRun) -> None:
    """The equations of a TopK autoencoder, in float64."""
    run = load_run(finished.workdir)
    for seed in range(run.config.sae.seeds):
        sae, x = run.autoencoder(seed), run.x_train[:64]
        weights = {name: np.asarray(values, np.float64) for name, values in sae.weights._asdict().items()}
        mean, scale = (np.asarray(part, np.float64) for part in sae.scaling)
        activations = np.maximum(((x - mean) * scale - weights["b_d"]) @ weights["W_e"].T + weights["b_e"], 0)
        smallest = np.sort(activations, axis=1)[:, -run.config.sae.k, None]
        codes = np.where(activations >= smallest, activations, 0)
        np.testing.assert_allclose(sae.encode(x), codes, rtol=1e-4, atol=1e-4)
        expected = (codes @ weights["W_d"] + weights["b_d"]) / scale + mean
        np.testing.assert_allclose(sae.decode(sae.encode(x)), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(sae.reconstruct(x), sae.decode(sae.encode(x)))
    with pytest.raises(HeadSteerError, match="there is no autoencoder 2; choose from 0 to 1"):
        run.autoencoder(2)


def test_python_m_is_the_command_headsteer(tmp_path: Path) -> None:
    """It ends with the command's exit code, in any directory."""
    result = python("-m", "headsteer_jax", "config", "--config=tiny", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --config=tiny: no such file; the shipped configs are ")


@pytest.mark.parametrize("name", ["double_digits", "double_digits.py", "configs/double_digits.py", "cifar100_vit_s"])
def test_a_shipped_config_is_found_by_its_name_from_another_directory(tmp_path: Path, name: str) -> None:
    result = headsteer("config", f"--config={name}", "--config.seed=7", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed = 7" in result.stdout.splitlines()


def test_a_file_goes_before_a_shipped_config_of_the_same_name(tmp_path: Path) -> None:
    source = "from headsteer_jax import Config\n\ndef get_config():\n    return Config(seed=5)\n"
    (tmp_path / "double_digits").write_text(source)
    assert "seed = 5" in headsteer("config", cwd=tmp_path).stdout.splitlines()


def test_the_wheel_has_every_folder_of_the_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for file in (ROOT / "headsteer_jax").rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(packages) == expected | {"headsteer_jax.configs", "headsteer_jax.report.templates"}
