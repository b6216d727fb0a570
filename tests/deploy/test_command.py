"""The commands deploy and predict, from a finished run to answers for image files; and what they refuse."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers import FinishedRun, headsteer
from PIL import Image

from headsteer_jax import load_deployed
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.runs import read_config
from headsteer_jax.runtime.files import Workdir

CLASSES = "42,07,13"
FILES = ["card.json", "card.md", "classes.json", "config.json", "model.safetensors", "model.stablehlo", "speed.json",
         "speed.png"]  # fmt: skip


@pytest.fixture(scope="module")
def deployed(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deployed")
    flags = (f"--classes={CLASSES}", "--budget=0.5", "--distil=10")
    result = headsteer("deploy", finished.workdir, *flags, cwd=directory)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "deployed/tiny\n"
    return directory / "deployed" / "tiny"


def refusal(*arguments: object, cwd: Path) -> str:
    result = headsteer(*arguments, cwd=cwd)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_everything_is_written_and_measured(deployed: Path) -> None:
    written = {entry.name for entry in deployed.iterdir()}
    onnx = {"model.onnx", "model_batch1.onnx"} if find_spec("onnx") else set()
    assert written == set(FILES) | onnx
    assert [entry.name for entry in deployed.parent.iterdir()] == ["tiny"]
    model, card = load_deployed(deployed), json.loads((deployed / "card.json").read_text())
    assert list(model.config.classes) == ["07", "13", "42"] == json.loads((deployed / "classes.json").read_text())
    assert card["share_of_macs"] <= 0.5
    assert card["size"]["deployed"]["parameters"] < card["size"]["dense"]["parameters"]
    assert card["test"]["images"] == 6
    low, high = card["test"]["interval"]
    assert low <= card["test"]["accuracy"] <= high
    speed = json.loads((deployed / "speed.json").read_text())
    assert [row["what"] for row in speed["rows"]] == ["dense", "gated, masked", "specialised"]
    assert all(row["images_per_second"]["64"] > 0 for row in speed["rows"])
    assert (deployed / "speed.png").read_bytes().startswith(b"\x89PNG")
    page = (deployed / "card.md").read_text()
    assert "exact McNemar" in page
    assert "model.safetensors" in page


def test_other_deployed_models_are_measured_beside_a_new_one(
    deployed: Path, finished: FinishedRun, tmp_path: Path
) -> None:
    flags = (f"--classes={CLASSES}", "--steer=class", "--alpha=2", "--output=out", "--compare")
    result = headsteer("deploy", finished.workdir, *flags, deployed, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["dense", "gated, masked", "steered", "specialised (tiny)"]
    card = json.loads((deployed / "card.json").read_text())
    assert rows[3]["accuracy"] == card["test"]["accuracy"]
    assert rows[3]["share_of_macs"] == pytest.approx(card["share_of_macs"])
    assert card["proposals"] == ["gates", "sweep"]
    refuse = ("deploy", finished.workdir, "--classes=42,07", "--compare")
    assert "has other classes" in refusal(*refuse, deployed, cwd=tmp_path)
    assert "no such directory" in refusal(*refuse, "missing", cwd=tmp_path)
    refuse = ("deploy", finished.workdir, f"--classes={CLASSES}")
    line = refusal(*refuse, f"--compare={deployed}", f"--compare={deployed}", cwd=tmp_path)
    assert "two models are called 'tiny'" in line
    other = tmp_path / "other"
    shutil.copytree(deployed, other)
    (other / "card.json").write_text(json.dumps(card | {"data": "0" * 16}))
    assert "was made from other data" in refusal(*refuse, f"--compare={other}", cwd=tmp_path)
    (other / "card.json").write_text("{")
    assert "card.json: missing or damaged" in refusal(*refuse, f"--compare={other}", cwd=tmp_path)


def test_the_card_is_right_about_the_test_images(deployed: Path, finished: FinishedRun) -> None:
    config = read_config(Workdir(finished.workdir))
    test, names = load_dataset(config.data, config.seed, 1000).test, load_deployed(deployed).config.classes
    members = np.flatnonzero(np.isin(test.labels, [int(name) for name in names]))
    logits = np.asarray(load_deployed(deployed).apply(test.images[members]))
    right = np.array([int(names[i]) for i in logits.argmax(axis=1)]) == test.labels[members]
    assert json.loads((deployed / "card.json").read_text())["test"]["accuracy"] == pytest.approx(right.mean())


def test_predict_answers_files_and_directories(deployed: Path, tmp_path: Path) -> None:
    rng, model = np.random.default_rng(0), load_deployed(deployed)
    exact = rng.integers(0, 256, model.config.image, dtype=np.uint8)
    Image.fromarray(exact[..., 0]).save(tmp_path / "exact.png")
    (tmp_path / "more" / "deeper").mkdir(parents=True)
    pixels = rng.integers(0, 256, (50, 70, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "more" / "deeper" / "wide.png")
    (tmp_path / "more" / "broken.jpg").write_bytes(b"none")
    (tmp_path / "more" / "notes.txt").write_text("no image")
    result = headsteer("predict", deployed, "exact.png", "more", "--json", cwd=tmp_path)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == ["exact.png", "more/broken.jpg", "more/deeper/wide.png"]
    logits = np.asarray(model.apply(exact[None]), np.float64)[0]
    assert lines[0]["class"] == model.config.classes[logits.argmax()]
    expected = np.exp(logits.max()) / np.exp(logits).sum()
    assert lines[0]["probability"] == pytest.approx(expected, abs=1e-5)
    assert "more/broken.jpg: not an image that Pillow can read" in lines[1]["error"]
    assert lines[2]["class"] in model.config.classes
    assert result.returncode == 2
    assert result.stderr == "error: 1 of 3 images could not be read; the others are answered above\n"
    table = headsteer("predict", deployed, "exact.png", cwd=tmp_path)
    assert table.returncode == 0
    assert table.stdout.split() == ["exact.png", f"{expected:.1%}", lines[0]["class"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_valid_whatever_the_encoding_of_the_output(deployed: Path, tmp_path: Path, encoding: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(deployed, copy)
    config = json.loads((copy / "config.json").read_text())
    names = ["caf\u00e9", "\U0001f600", "plain"]
    (copy / "config.json").write_text(json.dumps(config | {"classes": names}))
    weights = safetensors.numpy.load_file(copy / "model.safetensors")
    file = tmp_path / "\u00e9\U0001f600.png"
    Image.fromarray(np.zeros(config["image"], np.uint8)[..., 0]).save(file)
    for place, name in enumerate(names):
        bias = np.where(np.arange(len(names)) == place, 1e6, 0).astype(np.float32)  # which decides the class
        safetensors.numpy.save_file(weights | {"head.bias": bias}, copy / "model.safetensors")
        result = headsteer("predict", copy, file, "--json", cwd=tmp_path, encoding=encoding)
        assert result.returncode == 0, result.stderr
        record = json.loads(result.stdout)
        assert (record["path"], record["class"]) == (str(file), name)
        assert (encoding == "utf-8") == (file.name in result.stdout)  # readable where it can be


def test_predict_refuses_what_it_cannot_answer(deployed: Path, tmp_path: Path) -> None:
    assert "no such file" in refusal("predict", deployed, "missing.png", cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "there is no image in it" in refusal("predict", deployed, "empty", cwd=tmp_path)
    assert "holds neither a run nor a deployed model" in refusal("predict", "empty", "x.png", cwd=tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(deployed, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"version": 2}))
    assert "version 2 of the format" in refusal("predict", copy, "x.png", cwd=tmp_path)
    line = refusal("predict", deployed, "x.png", "--steer=class", "--alpha=1", cwd=tmp_path)
    assert f"--steer: leave it out; {deployed} is a deployed model" in line


def test_a_steered_model_is_deployed_for_one_class(finished: FinishedRun, tmp_path: Path) -> None:
    flags = ("--steer=class", "--alpha=2", "--classes=42", "--output=out")
    result = headsteer("deploy", finished.workdir, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    model, card = load_deployed(tmp_path / "out"), json.loads((tmp_path / "out" / "card.json").read_text())
    assert len(model.config.classes) == 100
    assert (card["what"], card["strategy"], card["alpha"]) == ("steered", "class", 2.0)
    assert card["steered_towards"] == ["42"]
    assert "steered towards 42 by the strategy class" in (tmp_path / "out" / "card.md").read_text()
    assert model.config.gate is not None


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--classes=42,nine",), "--classes: the dataset has no class 'nine'"),
        (("--classes=42,07,42",), "'42' is named twice"),
        (("--classes=42",), "name at least two classes"),
        ((), "name at least two classes"),
        (('--classes=["42"',), "must be a JSON list"),
        (("--classes=42,07", "--budget=0.5", "--max-loss=0.1"), "--budget and --max-loss: give one of them"),
        (("--classes=42,07", "--budget=1.5"), "must be above 0 and at most 1"),
        (("--classes=42,07", "--max-loss=-1"), "must be from 0 to below 1"),
        (("--classes=42,07", "--budget=0.001"), "--budget=0.001: cannot be met; the least is 0."),
        (("--classes=42,07", "--distil=-5"), "must be a number of steps"),
        (("--classes=42,07", "--dynamic", "--distil=5"), "--distil: leave it out"),
        (("--classes=42,07", "--steer=class"), "--steer and --alpha: give both"),
        (("--classes=42,07", "--alpha=2"), "--steer and --alpha: give both"),
        (("--classes=42,07", "--steer=klass", "--alpha=2"), "has no such strategy; choose from class"),
        (("--classes=42,07", "--steer=class", "--alpha=-2"), "must not be negative"),
        (("--classes=42,07", "--output=theirs"), "theirs: exists, and HeadSteer did not write it"),
        (("--classes=42,07", "--output=file/x"), "file: is not a directory"),
        (("--classes=42,07", "--output=."), ".: is the current directory"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    finished: FinishedRun, tmp_path: Path, flags: tuple[str, ...], line: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("")
    (tmp_path / "file").write_text("")
    assert line in refusal("deploy", finished.workdir, *flags, cwd=tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"theirs", "file"}


def test_runs_that_lack_a_stage_are_refused(finished: FinishedRun, tmp_path: Path) -> None:
    for without, flags in (("train", ()), ("steer", ("--steer=class", "--alpha=1"))):
        run = finished.copy(tmp_path / without, without)
        line = refusal("deploy", run, "--classes=42,07", *flags, cwd=tmp_path)
        assert f"needs the stage {without}, which is not done" in line
    run = finished.copy(tmp_path / "replaced")
    config = json.loads((run / "config.json").read_text())
    assert "no such file, so no run was started here" in refusal("deploy", "nowhere", "--classes=1,2", cwd=tmp_path)
    config["steer"]["form"] = "replace"
    (run / "config.json").write_text(json.dumps(config))
    flags = ("--classes=42,07", "--steer=class", "--alpha=1")
    assert "does not belong to this run's config.json" in refusal("deploy", run, *flags, cwd=tmp_path)
