"""Deployed directories: written completely or not at all, read back, and told apart from what is not ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_config, trained_model

from headsteer_jax.deploy.convert import KeptParts, convert_model, cut_model
from headsteer_jax.deploy.model import DeployedModel
from headsteer_jax.deploy.store import check_output, load_deployed, replace_directory, write_model
from headsteer_jax.errors import HeadSteerError

NAMES = tuple("abcdefg")


@pytest.fixture
def model() -> DeployedModel:
    whole = convert_model(trained_model(tiny_config()), NAMES, np.array([2, 3]), (8, 9, 1))
    kept = KeptParts((np.array([0]), np.array([], int), np.arange(3)), (np.arange(16), np.arange(3), np.array([], int)))
    return cut_model(whole, kept)


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_model_is_read_back_bit_for_bit(model: DeployedModel, tmp_path: Path) -> None:
    write_model(tmp_path, model)
    loaded = load_deployed(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 1), dtype=np.uint8)
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.apply(images), model.apply(images))
    assert json.loads((tmp_path / "classes.json").read_text()) == ["c", "d"]


def test_what_is_not_a_whole_deployed_model_is_refused(model: DeployedModel, tmp_path: Path) -> None:
    with pytest.raises(HeadSteerError, match="no such directory"):
        load_deployed(tmp_path / "missing")
    with pytest.raises(HeadSteerError, match=r"config\.json: no such file"):
        load_deployed(tmp_path)
    write_model(tmp_path, model)
    edit_config(tmp_path, version=99)
    with pytest.raises(HeadSteerError, match="version 99 of the format, but this HeadSteer reads version 1"):
        load_deployed(tmp_path)
    edit_config(tmp_path, version=1, heads=[1, 1, 3])  # layer 1 has none
    with pytest.raises(HeadSteerError, match=r"model\.safetensors: missing or damaged"):
        load_deployed(tmp_path)
    deeper = model.config.model.model_copy(update={"depth": 4}).model_dump()
    edit_config(tmp_path, heads=[1, 1, 1, 1], neurons=[1, 1, 1, 1], model=deeper)
    with pytest.raises(HeadSteerError, match=r"model\.safetensors: missing or damaged \(it has 3 layers, but"):
        load_deployed(tmp_path)
    edit_config(tmp_path, format="another")
    with pytest.raises(HeadSteerError, match="not of a deployed model"):
        load_deployed(tmp_path)
    write_model(tmp_path, model)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(HeadSteerError, match=r"model\.safetensors: missing or damaged"):
        load_deployed(tmp_path)


def test_only_our_own_directories_are_replaced(model: DeployedModel, tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deeper")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadSteerError, match="file: is not a directory"):
        check_output(tmp_path / "file" / "inside")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(HeadSteerError, match="theirs: exists, and HeadSteer did not write it"):
        check_output(tmp_path / "theirs")
    ours = tmp_path / "ours"
    replace_directory(ours, lambda directory: write_model(directory, model))
    check_output(ours)
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(HeadSteerError, match=r"notes\.txt: HeadSteer did not write it"):
        check_output(ours)


def test_directories_that_cannot_be_replaced_are_refused(
    model: DeployedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for output in (Path("."), inside, tmp_path):
        with pytest.raises(HeadSteerError, match="is the current directory or one of its parents"):
            check_output(output)
    for name in (".ours.new", ".ours.old"):
        (tmp_path / name).mkdir()
        check_output(tmp_path / "ours")  # empty, as a killed command may leave it
        (tmp_path / name / ".model.safetensors.part").write_text("half")  # or in the middle of a file
        check_output(tmp_path / "ours")
        (tmp_path / name / "thesis.txt").write_text("mine")
        with pytest.raises(HeadSteerError, match=rf"\{name}: HeadSteer did not write it"):
            check_output(tmp_path / "ours")
        (tmp_path / name / "thesis.txt").unlink()


def test_a_link_keeps_pointing_to_what_is_replaced(model: DeployedModel, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for classes in (("a", "b"), ("x", "y")):
        changed = model._replace(config=model.config.model_copy(update={"classes": classes}))
        check_output(tmp_path / "link")
        replace_directory(tmp_path / "link", lambda directory, changed=changed: write_model(directory, changed))
        assert load_deployed(tmp_path / "disk").config.classes == classes
    assert (tmp_path / "link").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "link"]


def test_a_file_that_comes_meanwhile_stays(model: DeployedModel, tmp_path: Path) -> None:
    ours = tmp_path / "ours"

    def write(directory: Path) -> None:
        write_model(directory, model)
        if ours.exists():
            (ours / "notes.txt").write_text("mine")

    for _ in range(2):
        replace_directory(ours, write)
    assert (ours / "notes.txt").read_text() == "mine"
    assert load_deployed(ours).config == model.config
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_what_cannot_be_moved_is_kept_beside(model: DeployedModel, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    replace_directory(ours, lambda directory: write_model(directory, model))

    def write(directory: Path) -> None:
        write_model(directory, model)
        (ours / "a.txt").write_text("mine")
        (ours / "classes.json").unlink()
        (ours / "classes.json").mkdir()  # a directory, where the new model has a file
        (ours / "classes.json" / "b.txt").write_text("mine")

    with pytest.raises(HeadSteerError):
        replace_directory(ours, write)
    assert sorted(path.read_text() for path in tmp_path.rglob("*.txt")) == ["mine", "mine"]
    assert load_deployed(ours).config == model.config


def test_an_interrupted_write_leaves_what_was_there(model: DeployedModel, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    replace_directory(ours, lambda directory: write_model(directory, model))

    def fail(directory: Path) -> None:
        (directory / "config.json").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_directory(ours, fail)
    assert load_deployed(ours).config == model.config
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]
    smaller = model._replace(config=model.config.model_copy(update={"classes": ("x", "y")}))
    replace_directory(ours, lambda directory: write_model(directory, smaller))
    assert load_deployed(ours).config.classes == ("x", "y")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]
