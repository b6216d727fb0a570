"""The benchmarks still fit the package; their figures are not tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, FinishedRun, environment

from headsteer_jax.config import ModelConfig
from headsteer_jax.model.skip import is_worthwhile

BENCHMARKS = ROOT / "benchmarks"


def test_they_find_what_they_import() -> None:
    names = {file.stem for file in BENCHMARKS.glob("*.py")} - {"peers"}  # which runs in an environment with PyTorch
    assert len(names) >= 6
    program = "import sys; sys.path[:0] = sys.argv[1:2]; [__import__(name) for name in sys.argv[2:]]"
    command = [sys.executable, "-c", program, BENCHMARKS, *sorted(names)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["1", "2", "3,4", "5"])
def test_every_part_of_the_visit_to_an_accelerator_runs(parts: str, finished: FinishedRun, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "accelerator.py", "--small", f"--parts={parts}", f"--out={tmp_path}"]
    command.append(f"--run={finished.workdir}")
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert sorted(found["parts"]) == parts.split(",")
    assert "error" not in json.dumps(found), found


@pytest.mark.slow
def test_the_benchmark_of_skipping_runs() -> None:
    command = [sys.executable, BENCHMARKS / "skip.py", "--tokens=17", "--batch=32", "--kinds=all", "--repeats=1"]
    assert is_worthwhile(ModelConfig.of_size("Ti"), 32, 17)  # otherwise the masked model would run
    result = subprocess.run([*command, "--size=Ti"], env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert row["what"] == "all"
    assert row["differing"] == row["gates_beyond_rounding"] == 0
    assert 0 < row["logit_error"] < 1e-5  # rounding, by which the masked model would not differ from itself
    assert row["ceiling"] > 1


@pytest.mark.slow
def test_the_benchmark_of_what_generalises_trains_each_setting_once(finished: FinishedRun, tmp_path: Path) -> None:
    run, results = finished.copy(tmp_path, "sae", "steer", "layers", "activations"), tmp_path / "results.jsonl"
    command = [sys.executable, BENCHMARKS / "sae.py", "generalise", run, results, "--config.sae.batch=50"]

    def measure(*options: str) -> dict[str, Any]:
        call = [*command, "--epochs=8", *options]
        result = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "| setting | steps | train |" in result.stdout
        return json.loads(result.stdout.splitlines()[-1])

    def read_settings() -> list[tuple[dict[str, Any], int]]:
        return [(row["setting"], row["seed"]) for row in map(json.loads, results.read_text().splitlines())]

    figures = measure("--axes=views,weight_decay")
    settings = [{}, {"views": 2}, {"views": 4}, *({"weight_decay": decay} for decay in (0.1, 0.3, 1.0))]
    assert [row["setting"] for row in figures["table"]] == settings
    assert read_settings() == [(setting, 0) for setting in settings]
    assert {row["steps"] for row in figures["table"]} == {48}  # eight passes over 300 images
    assert all(0 < row["gate_agreement"] <= 1 and 0 <= row["dead"] < 1 for row in figures["table"])
    assert len({row["test"] for row in figures["table"]}) == 6
    assert figures["table"][0]["train"] > figures["table"][0]["test"]
    assert measure("--axes=views,weight_decay") == figures
    measure("--axes=weight_decay", "--seeds=2")
    assert len(read_settings()) == 6 + 4  # the second seed of four settings
    measure("--axes=", "--config.sae.weight_decay=0.3")  # which is there already
    assert len(read_settings()) == 10
    (own,) = measure("--axes=", "--config.sae.views=4", "--config.sae.weight_decay=0.3")["table"]
    assert own["steps"] == 48
    assert read_settings()[10:] == [({}, 0)]
    refused = subprocess.run([*command, "--config.data.flip=True"], env=environment(), capture_output=True, text=True)
    assert "unknown: --config.data.flip=True" in refused.stderr


@pytest.mark.slow
def test_the_benchmark_of_the_explorer_times_a_made_page() -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("there is no /usr/bin/chromium (apt-get install chromium)")
    command = [sys.executable, BENCHMARKS / "explorer.py", "--made=300"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (figures["images"], figures["of"], figures["console_errors"]) == (300, 300, 0)
    assert min(figures[name] for name in ("first_ms", "step_ms", "draw_ms", "bytes")) > 0
