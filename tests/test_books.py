"""The books of a run: when a stage runs, when it is done, and when its results are refused as stale."""

import json
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from headsteer_jax.books import FORMAT, Stage, explain_staleness, finish_record, is_done, prepare_stage, stage_fields
from headsteer_jax.config import Config, ModelConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import Workdir

MIX = Stage("mix", "the first stage", lambda *_: None, fields=("seed", "model"))
BAKE = Stage("bake", "reads the first", lambda *_: None, fields=("seed", "report.dpi"), reads=("mix",))
TASTE = Stage("taste", "reads an optional one", lambda *_: None, fields=("seed",), reads=("mix", "bake"))


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return Workdir(epath.Path(tmp_path))


def run_stage(config: Config, workdir: Workdir, stage: Stage, overwrite: bool = False) -> bool:
    """Prepare and finish a stage as the loop over the stages does; False if there was nothing to do."""
    record = prepare_stage(config, workdir, stage, [stage], overwrite)
    if record is not None:
        workdir.write_json(f"{stage.name}/done.json", finish_record(record, 1.0))
    return record is not None


def with_depth(depth: int) -> Config:
    return Config(model=ModelConfig(depth=depth))


def change_record(workdir: Workdir, name: str, change: dict[str, Any], drop: str = "") -> None:
    path = workdir / name
    record = json.loads(path.read_text()) | change
    record.pop(drop, None)
    path.write_text(json.dumps(record))


def refusal(config: Config, workdir: Workdir, stage: Stage, *chosen: Stage) -> str:
    with pytest.raises(HeadSteerError) as error:
        prepare_stage(config, workdir, stage, chosen or (stage,), False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_stage_depends_on_whole_sections_and_on_single_fields() -> None:
    fields = stage_fields(Config(), BAKE)
    assert fields == {"seed": 0, "report.dpi": 110}
    assert set(stage_fields(Config(), MIX)) == {"seed", *(f"model.{name}" for name in ModelConfig.model_fields)}


def test_a_stage_runs_once(workdir: Workdir) -> None:
    assert explain_staleness(Config(), workdir, MIX) == ""
    assert run_stage(Config(), workdir, MIX)
    assert is_done(workdir, MIX)
    assert not run_stage(Config(), workdir, MIX)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(Config().model_dump_json())


def test_an_interrupted_stage_goes_on(workdir: Workdir) -> None:
    assert prepare_stage(Config(), workdir, MIX, [MIX], False) is not None
    (workdir / "mix" / "checkpoint").write_text("half")
    assert prepare_stage(Config(), workdir, MIX, [MIX], False) is not None
    assert (workdir / "mix" / "checkpoint").exists()


def test_the_record_tells_what_the_stage_was_made_from(workdir: Workdir) -> None:
    run_stage(Config(), workdir, MIX)
    run_stage(Config(), workdir, BAKE)
    mix, bake = (json.loads((workdir / name / "done.json").read_text()) for name in ("mix", "bake"))
    assert bake["format"] == FORMAT
    assert bake["config"] == stage_fields(Config(), BAKE)
    assert bake["inputs"] == {"mix": mix["finished"]}
    assert bake["seconds"] == 1.0
    assert bake["peak_memory_bytes"] > 0


def test_a_changed_field_is_named_and_made_again_with_overwrite(workdir: Workdir) -> None:
    run_stage(with_depth(4), workdir, MIX)
    line = refusal(with_depth(5), workdir, MIX)
    assert line.startswith(f"{workdir / 'mix'}: it is stale (config.model.depth was 4, now 5)")
    assert "--overwrite" in line
    (workdir / "mix" / "result").write_text("old")
    assert run_stage(with_depth(5), workdir, MIX, overwrite=True)
    assert not (workdir / "mix" / "result").exists()


def test_a_field_that_the_stage_does_not_depend_on_may_change(workdir: Workdir) -> None:
    run_stage(with_depth(4), workdir, MIX)
    run_stage(with_depth(4), workdir, BAKE)
    assert explain_staleness(with_depth(5), workdir, BAKE) == ""


def test_a_stage_is_stale_after_one_that_it_reads_was_made_again(workdir: Workdir) -> None:
    run_stage(Config(), workdir, MIX)
    run_stage(Config(), workdir, BAKE)
    change_record(workdir, "mix/done.json", {"finished": "later"})
    assert explain_staleness(Config(), workdir, MIX) == ""
    assert explain_staleness(Config(), workdir, BAKE) == "a stage that it reads was computed again"


@pytest.mark.parametrize("record", ["started.json", "done.json"])
def test_a_record_of_an_old_format_is_refused(workdir: Workdir, record: str) -> None:
    """Records of format 1 have no field `format`, and name fields of the config that lie elsewhere now."""
    run_stage(Config(), workdir, MIX)
    if record == "started.json":
        (workdir / "mix" / "done.json").unlink()
    change_record(workdir, f"mix/{record}", {"config": {"data.memory_limit_mb": 4096}}, drop="format")
    line = refusal(Config(), workdir, MIX)
    assert line == (
        f"{workdir / 'mix'}: it is stale (another version of HeadSteer made it: its record has format 1, "
        f"not {FORMAT}); pass --overwrite or another --workdir"
    )
    assert run_stage(Config(), workdir, MIX, overwrite=True)
    assert not run_stage(Config(), workdir, MIX)


def test_a_record_of_a_newer_format_is_refused(workdir: Workdir) -> None:
    run_stage(Config(), workdir, MIX)
    change_record(workdir, "mix/done.json", {"format": FORMAT + 1})
    assert f"its record has format {FORMAT + 1}, not {FORMAT}" in refusal(Config(), workdir, MIX)


def test_a_damaged_record_is_named(workdir: Workdir) -> None:
    run_stage(Config(), workdir, MIX)
    (workdir / "mix" / "done.json").write_text("{")
    assert refusal(Config(), workdir, MIX).startswith(f"{workdir / 'mix' / 'done.json'}: missing or damaged")


def test_a_stage_that_is_not_chosen_must_be_done_and_current(workdir: Workdir) -> None:
    assert prepare_stage(Config(), workdir, MIX, [], False) is None  # nothing reads it
    line = refusal(Config(), workdir, MIX, BAKE)
    assert line == f"bake needs mix, which is not done in {workdir.path}: add it to --stages"
    run_stage(with_depth(4), workdir, MIX)
    assert prepare_stage(with_depth(4), workdir, MIX, [BAKE], False) is None
    line = refusal(with_depth(5), workdir, MIX, BAKE)
    assert line.startswith(f"bake needs mix, but {workdir / 'mix'} is stale (config.model.depth was 4, now 5)")
    change_record(workdir, "mix/done.json", {}, drop="format")
    assert f"its record has format 1, not {FORMAT}" in refusal(with_depth(4), workdir, MIX, BAKE)


def test_an_optional_stage_may_be_missing_but_not_stale(workdir: Workdir) -> None:
    optional = Stage("bake", "optional", BAKE.run, fields=("seed",), optional=True)
    assert prepare_stage(Config(), workdir, optional, [TASTE], False) is None
    run_stage(Config(), workdir, optional)
    assert "config.seed was 0, now 1" in refusal(Config(seed=1), workdir, optional, TASTE)
