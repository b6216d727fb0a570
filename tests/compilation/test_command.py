"""The table of a run's programs, on this machine's devices and, where its compiler is installed, for a TPU slice."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from builders import tiny_config
from helpers import CONFIG, ROOT, environment

from headsteer_jax.compilation.command import check_outcomes, compile_run
from headsteer_jax.compilation.listing import estimate_chip_hours, format_bytes, format_count, format_outcome
from headsteer_jax.compilation.outcome import Outcome, explain_failure
from headsteer_jax.compilation.planned import describe_experiment
from headsteer_jax.compilation.programs import list_programs
from headsteer_jax.compilation.sizes import imagine_dataset
from headsteer_jax.compilation.topology import Machine
from headsteer_jax.compilation.train_programs import list_evaluation_programs
from headsteer_jax.config import FrontConfig, TrainConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.macs import training_flops

KIB = 2**10


def test_every_training_program_is_compiled_once_and_what_does_not_fit_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config()
    control = config.train.gated.model_copy(update={"steps": 6, "learning_rate": 1e-3})
    config = config.model_copy(update={"train": config.train.model_copy(update={"gated": control})})
    dataset = imagine_dataset(config, 60, None, 3, 8)
    machine = Machine("a small machine", jax.devices()[:1], 64 * KIB)
    record, outcomes = compile_run(config, dataset, machine, ("train",), 0.4)
    names = {outcome.name: outcome for outcome in outcomes}
    assert list(names)[:3] == ["dense: 2 steps", "gated: 2 steps", "dense_control: 2 steps"]
    gated = names["gated: 2 steps"]
    assert gated.calls == 3
    assert gated.model_flops == 2 * 16 * training_flops(config, 3)
    assert gated.model_share == pytest.approx(1, abs=0.05)
    assert gated.collectives == {}
    assert "more than a device has; try config.machine.remat = true or a larger" in gated.problem
    assert names["dense_control: test"].same_as  # the same pass as the dense model's
    assert names["dense_control: 2 steps"].same_as == "train: dense: 2 steps"  # learning rates are arguments
    assert record["programs"][0]["collectives"] == {}
    json.dumps(record)
    shown = capsys.readouterr().out
    assert shown.count("train: ") >= len(outcomes)
    with pytest.raises(HeadSteerError, match=r"^train: dense: 2 steps: needs .* GiB more than a device has"):
        check_outcomes(outcomes)


def test_passes_that_skip_and_the_budgets_of_a_front_are_listed() -> None:
    config = tiny_config(kinds=("heads", "tokens"), budget=0.8)
    config = config.model_copy(update={"front": FrontConfig(budgets=(0.7, 0.9)), "train": TrainConfig(batch=16)})
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"width": 96}),
            "data": config.data.model_copy(update={"eval_per_class": 0}),
        }
    )
    experiment = describe_experiment(config, imagine_dataset(config, 4000, None, 3, 8), jax.devices()[:1])
    planned = {program.name: program for program in list_programs(experiment, ("train", "front"))}
    kept = planned["gated: test, skipping: layer 1 runs"]
    for program in (kept, planned["gated: test, skipping: layer 1 decides"]):
        assert program.calls == 0  # nobody knows yet what the gates will drop
        program.trace().lower()
    assert "stablehlo.while" in kept.trace().lower().as_text()  # pieces of a size, as many as are needed
    front = [program for program in planned.values() if program.stage == "front"]
    steps = [program for program in planned.values() if program.name.startswith("gated: ") and "step" in program.name]
    assert len({program.trace().lower().as_text() for program in steps}) == len(steps)  # the budget is a constant
    assert {program.name.rpartition(" ")[2] for program in front} == {"0.7", "0.9"}
    several = experiment._replace(devices=[*experiment.devices] * 2)
    assert not any("skipping" in program.name for program in list_evaluation_programs(several))


def test_views_are_passed_over_once_each_and_lengthen_an_epoch() -> None:
    plans = {}
    for views in (1, 3):
        config = tiny_config()
        config = config.model_copy(update={"sae": config.sae.model_copy(update={"views": views})})
        experiment = describe_experiment(config, imagine_dataset(config, 4000, None, 3, 20), jax.devices()[:1])
        plans[views] = {program.name: program for program in list_programs(experiment, ("sae",))}
    (added,) = plans[3].keys() - plans[1].keys()
    assert plans[3][added].calls == 2 * plans[3]["residuals of train, cls"].calls
    assert "8x8x1xui8" in plans[3][added].trace().lower().as_text()  # views have the model's size, images theirs
    epochs = {views: next(plan for name, plan in plans[views].items() if "epoch" in name) for views in plans}
    rows = [epochs[views].trace().jaxpr.in_avals[-2].shape for views in (1, 3)]
    assert rows == [(12, 24), (36, 24)]  # four images of each class


def test_a_compiler_that_gives_up_says_by_how_much() -> None:
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (65.59G) exceeds "
        "available HBM (15.75G)."
    )
    line, needed = explain_failure(message, ("a smaller batch",))
    assert line == "needs 65.59 GiB, 49.84 GiB more than a device has; try a smaller batch"
    assert needed == int(65.59 * 2**30)
    assert explain_failure("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.50G of 15.75G hbm.", ("x",))[
        0
    ].startswith("needs 20.50 GiB, 4.75 GiB more")
    assert explain_failure("INTERNAL: no\nsuch luck", ("x",)) == ("does not compile (INTERNAL: no such luck)", None)


def test_the_table_shows_what_was_found() -> None:
    found = Outcome(
        "train", "gated: 25 steps", 7, 61.2, argument_bytes=247 * 2**20, temporary_bytes=3 * 2**29,
        needed_bytes=2**31, hbm_bytes=2**34, flops=4e12, model_flops=3e12,
        collectives={"all-reduce": (25.0, 43e6)}, estimated_seconds=0.18,
    )  # fmt: skip
    line = format_outcome(found)
    for text in ("61 s", "247 MiB", "1.5 GiB", "12.5%", "4 T", "75%", "180 ms", "25 all-reduce of 41 MiB"):
        assert text in line
    assert found.total_flops == 7 * 3e12
    assert estimate_chip_hours(3.6e18, 100.0, 0.5) == pytest.approx(3.6e18 / 50e12 / 3600)
    assert [format_bytes(size) for size in (None, 12, 1023 * KIB)] == ["-", "12 B", "1023 KiB"]
    assert [format_count(count) for count in (None, 12, 1.5e15)] == ["-", "12", "1.5 P"]


SHARDED = """
import numpy as np, jax
from builders import tiny_config
from headsteer_jax.compilation.hlo import summarise_program
from headsteer_jax.compilation.planned import describe_experiment
from headsteer_jax.compilation.sizes import imagine_dataset
from headsteer_jax.compilation.train_programs import list_training_programs
config = tiny_config()
config = config.model_copy(update={"machine": config.machine.model_copy(update={"fsdp": FSDP}),
                                   "model": config.model.model_copy(update={"width": 96}),
                                   "train": config.train.model_copy(update={"accumulate": PARTS})})
experiment = describe_experiment(config, imagine_dataset(config, 60, None, 3, 8), jax.devices())
gated = [planned for planned in list_training_programs(experiment) if planned.name.startswith("gated")][0]
compiled = gated.trace().lower().compile()
found = summarise_program(compiled.as_text()).collectives
size = sum(leaf.size * 4 for leaf in jax.tree.leaves(experiment.trained.params))
shares = {kind: bytes / size / 2 for kind, (_, bytes) in found.items()}
print(shares, compiled.memory_analysis().argument_size_in_bytes / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "parts"), [(1, 1), (4, 1), (4, 2)])
def test_a_step_gathers_parameters_once_and_sums_the_gradients_of_each_part_once(fsdp: int, parts: int) -> None:
    program = SHARDED.replace("FSDP", str(fsdp)).replace("PARTS", str(parts))
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(8), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shares, arguments = result.stdout.rsplit("}", 1)
    found = dict(eval(shares + "}"))
    assert "all-to-all" not in found
    if fsdp == 1:
        assert set(found) == {"all-reduce"}
        assert found["all-reduce"] == pytest.approx(1, abs=0.01)  # of the gradients' bytes a step
    else:
        assert 0.9 < found["all-gather"] < 1.1
        assert found["all-reduce"] + found.get("reduce-scatter", 0) < (1.3 if parts == 1 else parts + 0.01)
        assert float(arguments) < 3 / 4 + 0.2  # a quarter of parameters and moments, and the batches


@pytest.mark.slow
def test_a_tiny_run_compiles_for_a_tpu_slice(tmp_path: Path) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs on any machine, is not installed (pip install 'jax[tpu]')")
    (tmp_path / "tiny.py").write_text(CONFIG)
    command = [
        sys.executable, "-m", "headsteer_jax", "compile", "--topology=v5e:2x2", f"--config={tmp_path / 'tiny.py'}",
        "--stages=train", "--images=60", "--classes=3", f"--out={tmp_path / 'found.json'}",
    ]  # fmt: skip
    variables = {name: value for name, value in environment().items() if name != "JAX_PLATFORMS"}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["device"] == "TPU v5 lite"
    assert record["chip_hours"] > 0
    for row in record["programs"]:
        assert row["problem"] == ""
        assert row["estimated_seconds"] > 0
        assert row["needed_bytes"] < 16 * 2**30
