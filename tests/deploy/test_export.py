"""Exports of a run: the files that other libraries read hold the run's model and autoencoders."""

from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from helpers import FinishedRun
from safetensors.numpy import load_file

from headsteer_jax.deploy.export import (
    check_directories,
    check_target,
    export_autoencoders,
    export_timm,
    parse_target,
)
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import load_backbone
from headsteer_jax.runs import Run, load_run
from headsteer_jax.sae.interchange.overcomplete import import_overcomplete
from headsteer_jax.sae.interchange.saelens import import_saelens


@pytest.fixture(scope="module")
def run(finished: FinishedRun) -> Run:
    return load_run(finished.workdir)


@pytest.mark.parametrize(
    ("target", "library", "path"),
    [
        ("timm:a/vit.safetensors", "timm", "a/vit.safetensors"),
        ("saelens:a", "saelens", "a"),
        ("overcomplete:gs://bucket/a", "overcomplete", "gs://bucket/a"),
    ],
)
def test_a_target_is_a_library_and_a_path(target: str, library: str, path: str) -> None:
    assert parse_target(target) == (library, epath.Path(path))


@pytest.mark.parametrize("target", ["torch:x", "timm:model.bin", "saelens", "saelens:", "", ":x"])
def test_a_target_that_is_not_right(target: str) -> None:
    with pytest.raises(HeadSteerError, match=r"must be timm:FILE\.safetensors, saelens:DIR or overcomplete:DIR"):
        parse_target(target)


def test_timms_file_holds_the_model_without_its_gates(run: Run, tmp_path: Path) -> None:
    file = epath.Path(tmp_path) / "new" / "vit.safetensors"
    export_timm(run.trained, file)
    tensors = load_file(file)
    assert tensors["blocks.2.attn.qkv.weight"].shape == (72, 24)
    assert tensors["head.weight"].shape == (100, 24)
    assert not any("decide" in name for name in tensors)

    model = run.config.model.model_copy(update={"pretrained": str(file), "pretrained_head": True})
    zeros = jax.tree.map(np.zeros_like, jax.device_get(run.trained.params))
    params, loaded = load_backbone(zeros, run.config.model_copy(update={"model": model}))
    assert len(loaded.loaded) == len(tensors)
    expected = jax.tree_util.tree_leaves_with_path(run.trained.params)
    for (path, leaf), restored in zip(expected, jax.tree.leaves(params), strict=True):
        gate = "decide" in jax.tree_util.keystr(path)
        np.testing.assert_array_equal(restored, np.zeros_like(leaf) if gate else leaf)


@pytest.mark.parametrize("library", ["saelens", "overcomplete"])
def test_every_autoencoder_comes_back_and_answers_as_before(run: Run, tmp_path: Path, library: str) -> None:
    export_autoencoders(run.trained, run.autoencoders, library, epath.Path(tmp_path) / "new", "tiny")
    x = run.x_train[:50]
    for seed in range(run.config.sae.seeds):
        if library == "saelens":
            imported = import_saelens(tmp_path / "new" / f"seed_{seed}", width=24)
        else:
            imported = import_overcomplete(tmp_path / "new" / f"seed_{seed}.safetensors", width=24)
        assert (imported.activation, imported.k) == ("topk", run.config.sae.k)
        sae = run.autoencoder(seed)
        np.testing.assert_allclose(imported.sae.reconstruct(x), sae.reconstruct(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "file", "refused"),
    [
        ("timm:a.safetensors", "a.safetensors", True),
        ("saelens:a", "a/seed_0/cfg.json", True),
        ("saelens:a", "a/seed_1/sae_weights.safetensors", True),  # without a cfg.json that says whose it is
        ("saelens:a", "a/seed_0/notes.txt", False),
        ("overcomplete:a", "a/seed_0.safetensors", True),
        ("overcomplete:a", "a/other.safetensors", False),
    ],
)
def test_an_export_replaces_no_file_of_another_program(tmp_path: Path, target: str, file: str, refused: bool) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("the user's")
    library, path = target.split(":")
    if not refused:
        check_target(library, epath.Path(tmp_path / path))
        return
    with pytest.raises(HeadSteerError, match=rf"{file}: exists, and HeadSteer did not write it; choose another path"):
        check_target(library, epath.Path(tmp_path / path))


@pytest.mark.parametrize("target", ["timm:a/b.safetensors", "saelens:a", "overcomplete:a/b/c"])
def test_an_export_needs_a_directory(tmp_path: Path, target: str) -> None:
    library, path = target.split(":")
    check_directories(library, epath.Path(tmp_path / path))
    (tmp_path / "a").write_text("the user's")
    with pytest.raises(HeadSteerError, match="a: is a file, but the export needs a directory there"):
        check_directories(library, epath.Path(tmp_path / path))
