"""`headsteer predict` with a run: its table, its JSON, standard input, and what it refuses."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import FinishedRun, headsteer
from PIL import Image

from headsteer_jax import load_run


@pytest.fixture
def pictures(finished: FinishedRun, tmp_path: Path) -> Path:
    """Write three test images, a large one in colour, and two files that are no images."""
    images = load_run(finished.workdir).dataset.test.images
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(images[i, ..., 0]).save(tmp_path / "pictures" / f"{i}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    (tmp_path / "broken.jpg").write_bytes(b"none")
    return tmp_path


def refusal(*arguments: object, cwd: Path) -> str:
    result = headsteer("predict", *arguments, cwd=cwd)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_json_lines_hold_what_run_predict_returns(finished: FinishedRun, pictures: Path) -> None:
    flags = ("--json", "--steer=class:42", "--alpha=2")
    result = headsteer("predict", finished.workdir, "pictures", "large.png", *flags, cwd=pictures)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == ["pictures/0.png", "pictures/1.png", "pictures/2.png", "large.png"]
    run = load_run(finished.workdir)
    names, layers = run.dataset.class_names, list(run.config.layers_with("heads"))
    predictions = run.predict(run.dataset.test.images[:3], steer="class:42", alpha=2.0)
    assert predictions.steered is not None
    for i, line in enumerate(lines):
        assert set(line) == {"path", "class", "probability", "layers", "latents", "steered"}
        assert set(line["steered"]) == {"steer", "alpha", "class", "probability", "layers"}
        assert (line["steered"]["steer"], line["steered"]["alpha"]) == ("class:42", 2.0)
        if i == 3:
            continue
        for record, answer in ((line, predictions), (line["steered"], predictions.steered)):
            assert record["class"] == names[answer.label[i]]
            assert record["probability"] == pytest.approx(answer.confidence[i], abs=1e-6)
            heads = [np.flatnonzero(answer.gates["heads"][i, a]).tolist() for a in range(len(layers))]
            assert record["layers"] == [{"layer": n, "heads": h} for n, h in zip(layers, heads, strict=True)]
        active = predictions.activations[i] > 0
        assert [row["latent"] for row in line["latents"]] == predictions.latents[i, active].tolist()
        for row in line["latents"]:
            assert row["activation"] > 0
            assert row["classes"] == [names[c] for c in run.latent_classes[row["latent"], :3] if c >= 0]


def test_the_table_has_a_row_for_each_answer(finished: FinishedRun, pictures: Path) -> None:
    run = load_run(finished.workdir)
    names, heads = run.dataset.class_names, run.config.model.heads
    plain = headsteer("predict", finished.workdir, "pictures", cwd=pictures)
    assert (plain.returncode, plain.stderr) == (0, "")
    head, *rows = plain.stdout.splitlines()
    titles = "image class prob. heads that ran, layers 1 to 2 strongest latents (their classes)"
    assert head.split() == titles.split()
    predictions = run.predict(run.dataset.test.images[:3], steer="global", alpha=2.0)
    for i, row in enumerate(rows):
        path, name, percent, *layers = row.split()[:5]
        assert (path, name) == (f"pictures/{i}.png", names[predictions.label[i]])
        assert percent == f"{predictions.confidence[i]:.1%}"
        for shown, g in zip(layers, predictions.gates["heads"][i], strict=True):
            assert shown == "".join(str(h) if g[h] else "." for h in range(heads))
        latent = predictions.latents[i, 0]
        named = ", ".join(names[c] for c in run.latent_classes[latent, :3] if c >= 0)
        assert f"  {latent} ({named})  " in row
    steered = headsteer("predict", finished.workdir, "pictures", "--steer=global", "--alpha=2", cwd=pictures)
    lines = steered.stdout.splitlines()
    assert [line.split() for line in lines[1::2]] == [line.split() for line in rows]
    assert all(line.startswith("  global, alpha 2 ") for line in lines[2::2])
    assert predictions.steered is not None
    assert [line.split()[3] for line in lines[2::2]] == [names[c] for c in predictions.steered.label]


def test_unreadable_files_are_named_and_the_others_answered(
    finished: FinishedRun, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of standard input may be missing, too."""
    listed = "pictures/1.png\nmissing.png\n\nbroken.jpg\r\npictures\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(listed))
    result = headsteer("predict", finished.workdir, "large.png", "-", "--json", cwd=pictures)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == ["large.png", "pictures/1.png", "missing.png", "broken.jpg",
                                                "pictures/0.png", "pictures/1.png", "pictures/2.png"]  # fmt: skip
    no_file = "missing.png: no such file; give image files, or directories of them"
    assert lines[2] == {"path": "missing.png", "error": no_file}
    assert "not an image that Pillow can read" in lines[3]["error"]
    assert lines[1] == lines[5]
    assert result.returncode == 2
    assert result.stderr == "error: 2 of 7 images could not be read; the others are answered above\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(listed))
    table = headsteer("predict", finished.workdir, "-", cwd=pictures)
    assert table.stderr.splitlines()[0] == f"warning: {no_file}"
    assert len(table.stdout.splitlines()) == 1 + 4
    argument = headsteer("predict", finished.workdir, "missing.png", "large.png", cwd=pictures)
    assert argument.stderr.startswith(f"warning: {no_file}\n")
    assert argument.stderr.endswith("\nerror: 1 of 2 images could not be read; the others are answered above\n")
    assert [line.split()[0] for line in argument.stdout.splitlines()] == ["image", "large.png"]
    assert "missing.png: no such file" in refusal(finished.workdir, "missing.png", cwd=pictures)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "-: standard input names no image" in refusal(finished.workdir, "-", cwd=pictures)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--steer=class:424", "--alpha=2"), "--steer: the dataset has no class '424'; did you mean '4"),
        (("--steer=klass:42", "--alpha=2"), "there is no strategy 'klass'; did you mean 'class'?"),
        (("--steer=class:42",), "--steer: needs --alpha as well"),
        (("--alpha=2",), "--alpha: needs --steer as well"),
        (("--steer=class", "--alpha=inf"), "--alpha=inf: must be a finite number"),
        (("--data=x",), "--data: leave it out; only --steer reads the run's data"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    finished: FinishedRun, pictures: Path, flags: tuple[str, ...], line: str
) -> None:
    assert line in refusal(finished.workdir, "large.png", *flags, cwd=pictures)


def test_a_run_without_autoencoders_answers_without_latents(finished: FinishedRun, pictures: Path) -> None:
    run = finished.copy(pictures / "copy", "sae", "steer", "sweep.nc", "layers")
    result = headsteer("predict", run, "large.png", "--json", cwd=pictures)
    assert result.returncode == 0
    whole = json.loads(headsteer("predict", finished.workdir, "large.png", "--json", cwd=pictures).stdout)
    assert json.loads(result.stdout) == {name: value for name, value in whole.items() if name != "latents"}
    assert result.stderr.startswith("note: latents are left out, because the stage sae is not done")
    assert result.stderr.count("\n") == 1
    line = refusal(run, "large.png", "--steer=class", "--alpha=1", cwd=pictures)
    assert "headsteer predict --steer needs the stage sae, which is not done" in line


def test_directories_that_are_neither_are_refused(finished: FinishedRun, pictures: Path) -> None:
    run = finished.copy(pictures / "copy")
    (run / "train" / "done.json").unlink()
    assert "headsteer predict needs the stage train, which is not done" in refusal(run, "large.png", cwd=pictures)
    line = refusal("pictures", "large.png", cwd=pictures)
    assert "pictures: holds neither a run nor a deployed model; give one that headsteer run or" in line
    assert "nowhere: no such directory" in refusal("nowhere", "large.png", cwd=pictures)
    (pictures / "pictures" / "config.json").write_text('{"architectures": ["ViT"]}')
    assert "holds neither" in refusal("pictures", "large.png", cwd=pictures)
