"""The books of a run: when a stage runs, when it is done, and when its results are stale and refused or replaced."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from headsteer_jax.books import (
    FORMAT,
    PLACES,
    Inputs,
    Plan,
    Stage,
    begin_stage,
    explain_staleness,
    finish_stage,
    is_done,
    plan_stages,
    read_inputs,
    stage_fields,
    stage_workdir,
)
from headsteer_jax.config import Config, DataConfig, ModelConfig, ReportConfig, TrainConfig
from headsteer_jax.config.files import flatten
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import Workdir

MIX = Stage(
    "mix", "the first stage", lambda *_: None, fields=("seed", "model", "data", "train"), entries=("result",),
    file="model.pretrained",
)  # fmt: skip
BAKE = Stage(
    "bake", "reads the first", lambda *_: None, fields=("seed", "report.dpi"), entries=("result",), reads=("mix",),
    products=("cake",),
)  # fmt: skip
ICING = Stage("icing", "is optional", lambda *_: None, fields=("seed",), entries=(), reads=("mix",), optional=True)
TASTE = Stage(
    "taste", "reads all", lambda *_: None, fields=("report",), entries=(), reads=("mix", "bake", "icing")
)  # fmt: skip
LABEL = Stage(
    "label", "follows from the first", MIX.run, fields=("report",), reads=("mix",), derived=True,
    products=("label.html",),
)  # fmt: skip
TABLE = [MIX, BAKE, ICING, TASTE, LABEL]


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return Workdir(epath.Path(tmp_path))


def plan(now: Config | Inputs, workdir: Workdir, *chosen: Stage, overwrite: bool = False) -> list[Plan]:
    now = read_inputs(now, None) if isinstance(now, Config) else now
    return plan_stages(now, workdir, TABLE, chosen, overwrite)


def run(now: Config | Inputs, workdir: Workdir, *chosen: Stage, overwrite: bool = False) -> list[str]:
    """Plan the stages and make them as the loop over the stages does; return what was done with each."""
    plans = plan(now, workdir, *chosen, overwrite=overwrite)
    now = read_inputs(now, None) if isinstance(now, Config) else now
    for each in plans:
        if each.action != "nothing":
            record = begin_stage(now, workdir, each)
            content = f"of seed {now.config.seed} and depth {now.config.model.depth}"
            target = stage_workdir(workdir, each)
            for name in (*(f"{each.stage.name}/{entry}" for entry in each.stage.entries), *each.stage.products):
                target.write_text(name, content)
            finish_stage(record, workdir, each, now.config, 1.0)
    return [each.action for each in plans]


def refusal(now: Config | Inputs, workdir: Workdir, *chosen: Stage, overwrite: bool = False) -> str:
    before = everything(workdir)
    with pytest.raises(HeadSteerError) as error:
        plan(now, workdir, *chosen, overwrite=overwrite)
    assert everything(workdir) == before  # a refusal leaves no trace
    assert "\n" not in str(error.value)
    return str(error.value)


def everything(workdir: Workdir) -> dict[str, str]:
    """Read every file in a workdir."""
    path = Path(workdir.path)
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def with_depth(depth: int) -> Config:
    return Config(model=ModelConfig(depth=depth))


def change_record(workdir: Workdir, name: str, change: dict[str, Any], drop: str = "") -> None:
    path = workdir / name
    record = json.loads(path.read_text()) | change
    record.pop(drop, None)
    path.write_text(json.dumps(record))


def data(classes: tuple[str, ...] = ("cat", "dog"), images: int = 5) -> dict[str, Any]:
    """Describe made-up data as `describe_data` does."""
    split = {"images": [images] * len(classes), "hashes": [f"{name}{images}" for name in classes]}
    return {"classes": list(classes), "image": [8, 8, 3], "train": split, "validation": split, "test": split}


def test_a_stage_depends_on_whole_sections_and_on_single_fields() -> None:
    fields = stage_fields(Config(), BAKE)
    assert fields == {"seed": 0, "report.dpi": 110}
    expected = {path for path in flatten(Config()) if path.split(".")[0] in ("seed", "model", "data", "train")}
    assert set(stage_fields(Config(), MIX)) == expected - set(PLACES)


def test_a_stage_runs_once(workdir: Workdir) -> None:
    assert explain_staleness(read_inputs(Config(), None), workdir, MIX) == ""
    assert run(Config(), workdir, MIX) == ["make"]
    assert is_done(workdir, MIX)
    assert run(Config(), workdir, MIX) == ["nothing"]
    assert json.loads((workdir / "config.json").read_text()) == json.loads(Config().model_dump_json())


def test_an_interrupted_stage_goes_on(workdir: Workdir) -> None:
    now = read_inputs(Config(), None)
    begin_stage(now, workdir, plan(now, workdir, MIX)[0])
    (workdir / "mix" / "result").write_text("half")
    begin_stage(now, workdir, plan(now, workdir, MIX)[0])
    assert (workdir / "mix" / "result").read_text() == "half"


def test_the_record_tells_what_the_stage_was_made_from(workdir: Workdir) -> None:
    now = read_inputs(Config(), None)._replace(data=data())
    run(now, workdir, MIX, BAKE)
    mix, bake = (json.loads((workdir / name / "done.json").read_text()) for name in ("mix", "bake"))
    assert bake["format"] == FORMAT
    assert bake["config"] == stage_fields(Config(), BAKE)
    assert bake["inputs"] == {"mix": mix["finished"]}
    assert bake["data"] == mix["data"] == data()
    assert mix["file"] == {"path": "", "hash": ""}
    assert bake["seconds"] == 1.0
    assert bake["peak_memory_bytes"] > 0


def test_a_changed_field_is_named_and_made_again_with_overwrite(workdir: Workdir) -> None:
    run(with_depth(4), workdir, MIX)
    line = refusal(with_depth(5), workdir, MIX)
    assert line.startswith(f"{workdir / 'mix'}: it is stale (config.model.depth was 4, now 5)")
    assert "--overwrite" in line
    assert run(with_depth(5), workdir, MIX, overwrite=True) == ["replace"]
    assert (workdir / "mix" / "result").read_text() == "of seed 0 and depth 5"
    assert not [name for name in everything(workdir) if name.startswith(".")]


def test_a_field_that_the_stage_does_not_depend_on_may_change(workdir: Workdir) -> None:
    run(with_depth(4), workdir, MIX, BAKE)
    assert explain_staleness(read_inputs(with_depth(5), None), workdir, BAKE) == ""


def test_places_and_chunk_sizes_make_nothing_stale(workdir: Workdir) -> None:
    here, there = (
        Config(data=DataConfig(path=path), train=TrainConfig(eval_batch=batch)) for path, batch in (("a", 10), ("b", 7))
    )
    run(here, workdir, MIX)
    assert run(there, workdir, MIX) == ["nothing"]


def test_old_results_stay_until_the_new_ones_are_complete(workdir: Workdir) -> None:
    run(Config(), workdir, MIX, BAKE)
    before = everything(workdir)
    now = read_inputs(Config(seed=1), None)
    mix, bake = plan(now, workdir, MIX, BAKE, overwrite=True)
    assert (bake.action, bake.reason) == ("replace", "config.seed was 0, now 1")
    record = begin_stage(now, workdir, mix)
    stage_workdir(workdir, mix).write_text("mix/result", "half")
    after = everything(workdir)
    assert {name: after[name] for name in before} == before
    (workdir / "mix" / "notes.txt").write_text("the user's own")
    finish_stage(record, workdir, mix, now.config, 1.0)
    assert (workdir / "mix" / "result").read_text() == "half"
    assert (workdir / "mix" / "notes.txt").read_text() == "the user's own"
    assert (workdir / "cake").read_text() == "of seed 0 and depth 4"


def test_an_interrupted_replacement_goes_on_unless_its_inputs_have_changed(workdir: Workdir) -> None:
    run(Config(), workdir, MIX)
    for seed, kept in ((1, False), (1, True), (2, False)):
        now = read_inputs(Config(seed=seed), None)
        (again,) = plan(now, workdir, MIX, overwrite=True)
        begin_stage(now, workdir, again)
        half = stage_workdir(workdir, again) / "mix/result"
        assert half.exists() == kept
        half.write_text("half")


def test_a_stage_is_stale_after_one_that_it_reads_was_made_again(workdir: Workdir) -> None:
    run(Config(), workdir, MIX, BAKE)
    change_record(workdir, "mix/done.json", {"finished": "later"})
    now = read_inputs(Config(), None)
    assert explain_staleness(now, workdir, MIX) == ""
    assert explain_staleness(now, workdir, BAKE) == "a stage that it reads was computed again"


def test_a_stage_that_will_be_stale_is_refused_before_anything_runs(workdir: Workdir) -> None:
    run(Config(), workdir, MIX, BAKE)
    (workdir / "mix" / "done.json").unlink()
    line = refusal(Config(), workdir, MIX, BAKE)
    assert "bake: it is stale (" in line
    assert run(Config(), workdir, MIX, BAKE, overwrite=True) == ["make", "replace"]


@pytest.mark.parametrize("record", ["started.json", "done.json"])
def test_a_record_of_an_old_format_is_refused(workdir: Workdir, record: str) -> None:
    """Records of format 1 have no field `format`, and name fields of the config that lie elsewhere now."""
    run(Config(), workdir, MIX)
    if record == "started.json":
        (workdir / "mix" / "done.json").unlink()
    change_record(workdir, f"mix/{record}", {"config": {"data.memory_limit_mb": 4096}}, drop="format")
    line = refusal(Config(), workdir, MIX)
    assert line == (
        f"{workdir / 'mix'}: it is stale (another version of HeadSteer made it: its record has format 1, "
        f"not {FORMAT}); pass --overwrite or another --workdir"
    )
    assert run(Config(), workdir, MIX, overwrite=True) == ["replace"]
    assert run(Config(), workdir, MIX) == ["nothing"]


@pytest.mark.parametrize("more", [0, 1])
def test_a_field_that_an_older_version_did_not_have_counts_as_its_default(workdir: Workdir, more: int) -> None:
    now = Config(model=ModelConfig(depth=Config().model.depth + more))
    run(now, workdir, MIX)
    name = "mix/done.json"
    fields = json.loads((workdir / name).read_text())["config"]
    del fields["model.depth"]
    change_record(workdir, name, {"config": fields})
    assert bool(explain_staleness(read_inputs(now, None), workdir, MIX)) == (more > 0)


def test_a_record_of_a_newer_format_is_refused(workdir: Workdir) -> None:
    run(Config(), workdir, MIX)
    change_record(workdir, "mix/done.json", {"format": FORMAT + 1})
    assert f"its record has format {FORMAT + 1}, not {FORMAT}" in refusal(Config(), workdir, MIX)


def test_a_damaged_record_is_named(workdir: Workdir) -> None:
    run(Config(), workdir, MIX)
    (workdir / "mix" / "done.json").write_text("{")
    assert refusal(Config(), workdir, MIX).startswith(f"{workdir / 'mix' / 'done.json'}: missing or damaged")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"config": 3}, "config: input should be a valid dictionary"),
        ({"data": {}}, "data.classes: field required"),
        ({"data": data() | {"classes": ["cat"]}}, "data: its lists have not one element for each class"),
        ({"inputs": {"mix": 3}}, "inputs.mix: input should be a valid string"),
        ({"file": {"path": ""}}, "file.hash: field required"),
        ({"seconds": "long"}, "seconds: input should be a valid number"),
    ],
)
def test_a_record_that_was_edited_is_named(workdir: Workdir, change: dict[str, Any], fault: str) -> None:
    run(Config(), workdir, MIX)
    change_record(workdir, "mix/done.json", change)
    line = refusal(Config(), workdir, MIX, overwrite=True)
    assert line.startswith(f"{workdir / 'mix' / 'done.json'}: damaged ({fault}); delete it")
    (workdir / "mix" / "done.json").unlink()
    assert run(Config(), workdir, MIX, overwrite=True) == ["make"]  # as the line says


@pytest.mark.parametrize("field", ["config", "data", "inputs", "finished", "products"])
def test_a_record_that_lacks_something_is_named(workdir: Workdir, field: str) -> None:
    run(Config(), workdir, MIX)
    change_record(workdir, "mix/done.json", {}, drop=field)
    assert f"damaged ({field}: field required)" in refusal(Config(), workdir, MIX, BAKE, overwrite=True)


def test_a_record_without_its_file_is_stale(workdir: Workdir) -> None:
    run(Config(), workdir, MIX)
    change_record(workdir, "mix/done.json", {}, drop="file")
    assert "its record does not say which config.model.pretrained" in refusal(Config(), workdir, MIX)


def test_a_stage_that_is_not_chosen_must_be_done_and_current(workdir: Workdir) -> None:
    assert plan(Config(), workdir) == []  # nothing reads it
    line = refusal(Config(), workdir, BAKE)
    assert line == f"bake needs mix, which is not done in {workdir.path}: add it to --stages"
    run(with_depth(4), workdir, MIX)
    assert [each.action for each in plan(with_depth(4), workdir, BAKE)] == ["make"]
    line = refusal(with_depth(5), workdir, BAKE)
    assert line.startswith(f"bake needs mix, but {workdir / 'mix'} is stale (config.model.depth was 4, now 5)")
    change_record(workdir, "mix/done.json", {}, drop="format")
    assert f"its record has format 1, not {FORMAT}" in refusal(with_depth(4), workdir, BAKE)


def test_an_optional_stage_that_is_stale_is_left_out(workdir: Workdir) -> None:
    run(Config(), workdir, MIX, BAKE, ICING)
    change_record(workdir, "icing/done.json", {"config": {"seed": 7}})
    (taste,) = plan(Config(), workdir, TASTE)
    assert (taste.action, taste.left_out) == ("make", {"icing": "config.seed was 7, now 0"})
    run(Config(), workdir, TASTE)
    assert set(json.loads((workdir / "taste" / "done.json").read_text())["inputs"]) == {"mix", "bake"}
    assert run(Config(), workdir, TASTE) == ["nothing"]


def test_what_follows_from_other_stages_is_replaced_without_being_asked_for(workdir: Workdir) -> None:
    run(Config(), workdir, MIX, LABEL)
    changed = Config(report=ReportConfig(dpi=60))
    assert run(changed, workdir, MIX, LABEL) == ["nothing", "replace"]
    assert "label needs mix" in refusal(with_depth(5), workdir, LABEL)


def test_a_page_that_an_earlier_version_did_not_write_is_written(workdir: Workdir) -> None:
    run(Config(), workdir, MIX, LABEL)
    assert run(Config(), workdir, MIX, LABEL) == ["nothing", "nothing"]
    (workdir / "label.html").unlink()
    (label,) = plan(Config(), workdir, LABEL)
    assert (label.action, label.reason) == ("replace", "label.html is missing")
    run(Config(), workdir, LABEL)
    assert (workdir / "label.html").exists()


def test_a_stage_may_be_read_without_an_optional_one_that_was_never_made(workdir: Workdir) -> None:
    run(Config(), workdir, MIX, BAKE)
    assert run(Config(), workdir, TASTE) == ["make"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (data(("cat", "zebra")), "the data have changed: class 'dog' is now 'zebra'"),
        (data(images=6), "the data have changed: 2 images more in train (2 of 2 classes)"),
    ],
)
def test_data_that_have_changed_are_named(workdir: Workdir, change: dict[str, Any], text: str) -> None:
    now = read_inputs(Config(), None)._replace(data=data())
    run(now, workdir, MIX, BAKE)
    assert run(now, workdir, MIX, BAKE) == ["nothing", "nothing"]
    assert text in refusal(now._replace(data=change), workdir, MIX, BAKE)
    assert f"bake needs mix, but {workdir / 'mix'} is stale ({text}" in refusal(
        now._replace(data=change), workdir, BAKE
    )


def test_a_file_is_known_by_its_content_and_not_needed_once_it_was_read(tmp_path: Path, workdir: Workdir) -> None:
    workdir = Workdir(workdir.path / "run")
    file, moved = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    file.write_bytes(b"weights")

    def config(path: Path) -> Config:
        return Config(model=ModelConfig(pretrained=str(path)))

    run(config(file), workdir, MIX)
    expected = {"path": str(file), "hash": hashlib.sha256(b"weights").hexdigest()}
    assert json.loads((workdir / "mix" / "done.json").read_text())["file"] == expected
    file.rename(moved)
    assert run(config(file), workdir, MIX) == ["nothing"]
    assert run(config(moved), workdir, MIX) == ["nothing"]
    moved.write_bytes(b"others")
    line = refusal(config(moved), workdir, MIX)
    assert f"config.model.pretrained: the content of {moved} has changed" in line
    assert 'config.model.pretrained was "' in refusal(Config(), workdir, MIX)


def test_a_directory_that_is_not_ours_is_refused_even_with_overwrite(workdir: Workdir) -> None:
    (workdir / "mix" / "cat").mkdir(parents=True)
    line = refusal(Config(), workdir, MIX, overwrite=True)
    assert line == f"{workdir / 'mix'}: exists, and HeadSteer did not make it; choose another --workdir"
    (workdir / "mix" / "cat").rmdir()
    assert run(Config(), workdir, MIX) == ["make"]
