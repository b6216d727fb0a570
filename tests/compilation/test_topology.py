"""The names of topologies, what stands in the way of compiling for one, and the sizes of data that are not here."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_config
from helpers import headsteer

from headsteer_jax.compilation import topology
from headsteer_jax.compilation.sizes import find_sizes
from headsteer_jax.errors import HeadSteerError


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v9:2x2", "", "v5p:2x4", "h100", "h100:3", "a10:1"])
def test_an_unknown_topology_is_one_line_that_lists_those_that_exist(name: str) -> None:
    result = headsteer("compile", f"--topology={name}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --topology={name}: no such topology; those that exist are v5e:{{1x1,")
    assert "h100:{1,2,4,8}" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x4", "tpu"), ("h200:1", "cuda")])
def test_the_extra_is_named_if_the_compiler_is_missing(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    find, missing = importlib.util.find_spec, ("libtpu", *topology.CUDA_PLUGINS)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module in missing else find(module, *rest)
    )
    result = headsteer("compile", f"--topology={name}")
    assert result.returncode == 2
    assert f"pip install 'headsteer-jax[{extra}]'" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, topology.CUDA_PLUGINS)), reason="needs pip install 'headsteer-jax[cuda]'"
)
@pytest.mark.parametrize("name", topology.GPUS)
def test_every_gpu_is_described_and_compiles_a_step_without_one(name: str, tmp_path: Path) -> None:
    """In a process of its own, because XLA reads its flags once."""
    command = [
        *(sys.executable, "-m", "headsteer_jax", "compile", f"--topology={name}:2", f"--out={tmp_path / 'out.json'}"),
        *("--images=1000", "--classes=10", "--stages=train", "--config.model.depth=2"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"2 devices ({topology.GPUS[name].device_kind})" in result.stdout
    assert "all-reduce" in result.stdout


def make_bus(directory: Path, vendor: str, device: str) -> Path:
    (directory / "0000:00:04.0").mkdir(parents=True)
    (directory / "0000:00:04.0" / "vendor").write_text(vendor + "\n")
    (directory / "0000:00:04.0" / "device").write_text(device + "\n")
    return directory


def test_an_attached_tpu_is_found_and_a_network_card_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not topology.has_tpu(tmp_path / "none")
    assert not topology.has_tpu(make_bus(tmp_path / "network", "0x1ae0", "0x0042"))
    assert not topology.has_tpu(make_bus(tmp_path / "other", "0x10de", "0x0063"))
    assert topology.has_tpu(make_bus(tmp_path / "tpu", "0x1ae0", "0x0063"))
    monkeypatch.setattr(topology, "has_tpu", lambda: True)
    monkeypatch.setattr(topology, "check_topology", lambda name: None)
    monkeypatch.setattr(topology, "read_platforms", lambda: None)
    with pytest.raises(HeadSteerError, match="this machine has a TPU; leave out --topology"):
        topology.prepare_compiler("v5e:2x4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mfu=0"], "--mfu=0.0: must be above 0"),
        (["--images=100"], "--classes: missing"),
        (["--images=10", "--classes=20"], "--images=10: must be at least 3 for each of the 20 classes"),
        (["--stages=train,bake"], "there is no stage 'bake'"),
        (["--config.data.source=tfds", "--config.data.name=mine", "--config.data.path=/nowhere"], "pass --images=N"),
        (["--toplogy=v5e:2x4"], "--toplogy=v5e:2x4: no such flag"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str) -> None:
    result = headsteer("compile", *arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_published_sizes_stand_in_for_data_that_are_not_here(tmp_path: Path) -> None:
    config = tiny_config()
    fields: dict[str, Any] = {"source": "tfds", "name": "cifar100", "path": str(tmp_path), "train_per_class": 0}
    data = config.data.model_copy(update=fields | {"eval_per_class": 0, "channels": 3, "mean": (0.5,) * 3})
    dataset = find_sizes(config.model_copy(update={"data": data}), None, None)
    assert dataset.train.images.shape == (45_000, 32, 32, 3)
    assert [len(split.labels) for split in (dataset.validation, dataset.test)] == [5_000, 10_000]
    assert len(dataset.class_names) == 100
