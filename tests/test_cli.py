"""The command line on a tiny config: what a finished run holds, how commands behave, how mistakes are answered."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray
from dataset_files import feature, write_tfds
from helpers import GOLDENS, ROOT, environment, free_port, headsteer, run

from headsteer_jax import cli
from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runs import Run, load_run
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import read_arrays, write_arrays
from headsteer_jax.runtime.preemption import Preempted
from headsteer_jax.steer.tally import unpack_bits
from headsteer_jax.train.log import read_log


def refused(result: subprocess.CompletedProcess[str], *texts: str) -> None:
    """Check that a command ended with exit code 2 and one line that holds these texts."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in errors[0]


def succeeded(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Check that a command ended with exit code 0."""
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def loaded(finished) -> Run:
    return load_run(finished.workdir)


def test_summary_holds_every_headline_number(finished):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    for name in ("dense_accuracy", "gated_accuracy"):
        assert 0 <= summary[name] <= 1
    assert {"usage", "all_on", "all_off", "best_fixed", "oracle"} <= summary["last_layer"].keys()
    assert {"mse", "explained_variance", "dead_fraction", "gate_agreement", "accuracy"} <= summary["sae"].keys()
    assert {"global_class", "class_class"} <= summary["overlap"].keys()
    strategies = {"class", "global", "random", "matched_random", "gate_aligned"}
    assert summary["steering"].keys() == {"unsteered", *strategies}
    for result in summary["steering"].values():
        assert {"alpha", "usage", "accuracy", "usage_ci", "accuracy_ci", "classes_saved"} <= result.keys()
        assert result["usage_ci"][0] - 1e-9 <= result["usage"] <= result["usage_ci"][1] + 1e-9
    assert summary["seconds"].keys() == {"train", "sae", "steer", "layers"}
    assert [row["layer"] for row in summary["by_layer"]["layers"]] == [1, 2]
    for row in (*summary["by_layer"]["layers"], summary["by_layer"]["together"]):
        assert row["alphas"][0] == 0
        assert row["usage"][row["alphas"].index(row["alpha"])] == row["usage_after"]
    assert summary["peak_memory_bytes"] > 1e8
    assert summary["config"]["model"]["width"] == 24
    assert summary["versions"]["jax"]


def test_sweep_agrees_with_the_summary(finished):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    sweep = read_sweep(finished.workdir / "sweep.nc")
    right = sweep.test_correct.sel(alpha=0).sum("class")
    assert (right == sweep.test_unsteered_correct.sum()).all()  # alpha 0 is the unsteered model
    assert summary["gated_accuracy"] == pytest.approx(right.values[0, 0, 0] / sweep.test_count.values.sum())
    labels = sweep.test_labels.values
    answers = unpack_bits(sweep.test_right.values, len(labels))
    gates = unpack_bits(sweep.test_gates.values, len(labels))
    before = unpack_bits(sweep.test_unsteered_right.values, len(labels))
    for label in range(100):
        of_class = labels == label
        assert (sweep.test_correct[..., label] == answers[..., of_class].sum(axis=-1)).all()
        assert (sweep.test_gained[..., label] == (answers & ~before)[..., of_class].sum(axis=-1)).all()
        assert (sweep.test_lost[..., label] == (~answers & before)[..., of_class].sum(axis=-1)).all()
        assert (sweep.test_heads_on[..., label, :] == gates[..., of_class].sum(axis=-1)).all()
    # under its gates, an image's answer is that of the table
    patterns = np.moveaxis(gates, -2, -1) @ (1 << np.arange(3))
    table = sweep.test_table.values
    assert ((table[np.arange(len(labels)), patterns] == labels) == answers).all()
    # a class's curve takes one line
    curve = sweep.class_accuracy.sel({"strategy": "class", "named_by": "true", "class": "07"})
    assert curve.dims == ("alpha",)
    expected = answers[0, :, 0][..., labels == 7].mean(axis=(0, 2))
    np.testing.assert_allclose(curve, expected)


def test_a_finished_stage_is_not_done_again(finished, tmp_path):
    workdir = finished.copy(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    result = succeeded(headsteer("run", f"--config={finished.config}", f"--workdir={workdir}"))
    assert result.stderr.count("done before") == 5
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_a_changed_field_is_named_and_overwrite_redoes_what_depends_on_it(finished, tmp_path):
    workdir = finished.copy(tmp_path)
    command = ("run", f"--config={finished.config}", f"--workdir={workdir}", "--config.steer.latents=2")
    refused(headsteer(*command), "config.steer.latents was 3, now 2", "--overwrite")
    stages = ("train", "sae", "steer")
    before = {stage: (workdir / stage / "done.json").read_text() for stage in stages}
    succeeded(headsteer(*command, f"--stages={','.join(stages)}", "--overwrite"))
    for stage, record in before.items():
        assert ((workdir / stage / "done.json").read_text() == record) == (stage != "steer")
    result = succeeded(headsteer(*command, "--stages=report"))
    assert "report: leaves out layers, which is stale (config.steer.latents was 3, now 2)" in result.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["by_layer"] is None
    assert summary["left_out"] == {"layers": "config.steer.latents was 3, now 2"}
    assert "config.steer.latents was 3, now 2" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        (("--config.data.source=npz", "--config.data.path=nowhere.npz"), ["nowhere.npz"]),
        (("--config.model.pretrained=nowhere.safetensors",), ["nowhere.safetensors: no such file"]),
        (("--config.sae.pretrained=saelens:nowhere", "--config.sae.seeds=1"), ["nowhere", "no such file"]),
        (("--config.steer.strategies=clas",), ["'clas'"]),
        (("--config.train.batch=4000",), ["config.train.batch = 4000: must be at most the"]),
        (("--config.machine.data=64", "--seed=1"), ["config.machine.data: the mesh has 64 x 1 devices"]),
    ],
)
def test_a_refused_overwrite_leaves_everything_as_it_was(finished, tmp_path, fields, texts):
    workdir = finished.copy(tmp_path, "activations", "figures")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    command = ("run", f"--config={finished.config}", "--overwrite", *fields)
    refused(headsteer(*command, f"--workdir={workdir}", cwd=tmp_path), *texts)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    refused(headsteer(*command, f"--workdir={tmp_path / 'new' / 'run'}", cwd=tmp_path), *texts)
    assert not (tmp_path / "new").exists()


def test_a_stage_needs_those_that_it_reads(finished, tmp_path):
    refused(headsteer("run", f"--config={finished.config}", f"--workdir={tmp_path}", "--stages=sae"), "sae needs train")


@pytest.mark.slow
def test_stages_one_by_one_equal_all_at_once(finished, tmp_path):
    """The same seed gives the same numbers in another directory."""
    for stages in ("train", "layers", "sae", "steer,report"):
        succeeded(headsteer("run", f"--config={finished.config}", f"--workdir={tmp_path}", f"--stages={stages}"))
    first, second = (json.loads((path / "summary.json").read_text()) for path in (finished.workdir, tmp_path))
    for name in ("seconds", "peak_memory_bytes"):
        del first[name], second[name]
    assert first == second
    xarray.testing.assert_identical(read_sweep(finished.workdir / "sweep.nc"), read_sweep(tmp_path / "sweep.nc"))


def damage_checkpoint(workdir: Path) -> None:
    """Cut the largest file of the gated phase's last checkpoint in half."""
    files = (workdir / "train" / "gated" / "last" / "8").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's threads
def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    shutil.copytree(finished.workdir / "train", tmp_path / "train")
    damage_checkpoint(tmp_path)
    command = ("run", f"--config={finished.config}", f"--workdir={tmp_path}", "--stages=sae")
    refused(headsteer(*command), "gated/last/8", "damaged", "done.json", "--overwrite")
    shutil.rmtree(tmp_path / "train" / "gated" / "last" / "8")
    refused(headsteer(*command), "it ends at step 4 of 8", "done.json", "--overwrite")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_trained_again_as_the_line_says(finished, tmp_path):
    shutil.copytree(finished.workdir / "train", tmp_path / "train")
    damage_checkpoint(tmp_path)
    (tmp_path / "train" / "done.json").unlink()
    shutil.rmtree(tmp_path / "train" / "gated" / "last" / "8")
    command = ("run", f"--config={finished.config}", f"--workdir={tmp_path}", "--stages=train,sae", "--overwrite")
    succeeded(headsteer(*command))


def start(*arguments: object, log: Path, devices: int = 1) -> subprocess.Popen[bytes]:
    """Start run.py beside this process; its lines go to a file."""
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=log.open("wb"), stderr=subprocess.STDOUT
    )


def run_cluster(tmp_path: Path, *commands: list[object], devices: int = 1) -> list[tuple[int, str]]:
    """Run processes that join one cluster over loopback; returns the exit code and the lines of each."""
    coordinator, logs = f"127.0.0.1:{free_port()}", [tmp_path / f"{number}.log" for number in range(len(commands))]
    processes = [
        start(*command, f"--distributed={coordinator},{len(commands)},{number}", log=logs[number], devices=devices)
        for number, command in enumerate(commands)
    ]
    try:
        codes = [process.wait(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def check_two_processes(finished, tmp_path, *stages):
    """Check that two processes make the sweep of one."""
    command = [f"--config={finished.config}", f"--workdir={tmp_path / 'w'}", f"--stages={','.join(stages)}"]
    first, second = run_cluster(tmp_path, command, command)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert first[1].count("done in") == len(stages)
    assert "done in" not in second[1]  # only process 0 speaks and writes
    lone, pair = (read_sweep(path / "sweep.nc") for path in (finished.workdir, tmp_path / "w"))
    for name, values in lone.data_vars.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(pair[name], values, rtol=2e-3, atol=1e-5)
        else:
            xarray.testing.assert_equal(pair[name], values)


@pytest.mark.slow
def test_two_processes_equal_one(finished, tmp_path):
    """The sweep's counts are the same, and a lone process goes on with what two have made."""
    check_two_processes(finished, tmp_path, "train", "sae", "steer")
    command = (f"--config={finished.config}", f"--workdir={tmp_path / 'w'}", "--stages=train,sae,steer,report")
    assert succeeded(headsteer("run", *command)).stderr.count("done before") == 3


@pytest.mark.slow
def test_two_processes_equal_one_in_every_stage(finished, tmp_path):
    check_two_processes(finished, tmp_path, "train", "sae", "grid", "steer", "layers", "report")
    lone, pair = (json.loads((path / "summary.json").read_text()) for path in (finished.workdir, tmp_path / "w"))
    for name, result in lone["steering"].items():
        assert pair["steering"][name]["accuracy"] == result["accuracy"]
        assert pair["steering"][name]["usage"] == pytest.approx(result["usage"], abs=1e-6)


@pytest.mark.slow
def test_parameters_sharded_over_processes(finished, tmp_path):
    """Two processes train with half of each array, and a lone one reads what they saved."""
    workdirs = (finished.workdir, tmp_path / "w")
    command = [f"--config={finished.config}", f"--workdir={workdirs[1]}", "--config.machine.fsdp=2", "--stages=train"]
    for code, lines in run_cluster(tmp_path, command, command):
        assert code == 0, lines
    params = load_run(finished.workdir).trained.params
    (lone, _), (pair, _) = (
        Checkpoints(path / "train" / "gated" / "best", writes=False).restore(params) for path in workdirs
    )
    for expected, leaf in zip(jax.tree.leaves(lone), jax.tree.leaves(pair), strict=True):
        np.testing.assert_allclose(expected, leaf, rtol=1e-3, atol=2e-3)  # the keys' biases are rounding alone
    logs = [read_log(path / "train" / "metrics.jsonl") for path in workdirs]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in logs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_processes_with_different_configs_are_refused_at_once(finished, tmp_path):
    command = [f"--config={finished.config}", f"--workdir={tmp_path / 'w'}"]
    for code, lines in run_cluster(tmp_path, command, [*command, "--config.sae.k=3"]):
        assert code == 2
        errors = [line for line in lines.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "config.sae.k of process 1 differs from process 0's (3, not 4)" in errors[0]
    assert not (tmp_path / "w").exists()


def test_an_address_of_a_cluster_that_is_not_right(tmp_path):
    workdir = f"--workdir={tmp_path / 'w'}"
    refused(headsteer("run", workdir, "--distributed=here"), "--distributed=here", "HOST:PORT,PROCESSES,PROCESS")
    refused(headsteer("run", workdir, "--distributed=a:1,2,2"), "process 2 of 2")


@pytest.mark.slow
def test_a_cluster_that_does_not_come_together(tmp_path):
    workdir = f"--workdir={tmp_path / 'w'}"
    result = run(workdir, f"--distributed=127.0.0.1:{free_port()},2,1", "--distributed-timeout=3")
    refused(result, "not all processes met at 127.0.0.1:", "within 3 s")
    refused(run(workdir, "--distributed=auto"), "no cluster could be joined")


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_resumed(finished, tmp_path):
    """SIGTERM comes in training; until then another run is kept out of the directory."""
    command = (f"--config={finished.config}", f"--workdir={tmp_path / 'w'}", "--stages=train",
               "--config.train.dense.steps=20000")  # fmt: skip
    log = tmp_path / "log"
    process = start(*command, log=log)
    try:
        checkpoints = tmp_path / "w" / "train" / "dense" / "last"
        while not any(path.name.isdigit() for path in (checkpoints.iterdir() if checkpoints.exists() else ())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        refused(headsteer("run", *command), "another run is writing here", "--workdir")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75
    finally:
        process.kill()
    lines = log.read_text().splitlines()
    assert lines[-1] == "stopped by SIGTERM: the same command continues where it stopped"
    saved = int(re.search(r"dense: step (\d+) is saved", log.read_text())[1])
    assert max(int(path.name) for path in checkpoints.iterdir()) == saved
    process = start(*command, log=log)
    try:
        while f"dense: resuming from step {saved}" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--stages=train,bake"], ["there is no stage 'bake'", "train, sae, grid, steer, layers, front, report"]),
        (["--config.model.depht=3"], ["config.model.depht", "did you mean config.model.depth?"]),
        (["--config.model.depth=four"], ["config.model.depth = 'four'"]),
        (["--config.model.heads=5"], ["model.heads = 5", "a divisor of model.width"]),
        (["--config.sae.k=4000"], ["sae.k = 4000", "latents"]),
        (["--config.model.patch=7"], ["model.patch = 7", "a divisor of data.image_size"]),
        (["--config.gate.target=0"], ["config.gate.target = '0'"]),
        (["--config.gate.target=1.5"], ["config.gate.target = '1.5'"]),
        (["--config.steer.strategies=class,best"], ["'best'", "matched_random"]),
        (["--config.steer.classes=00,dog"], ["no class 'dog'"]),
        (["--config.steer.classes=00,00"], ["steer.classes", "distinct names"]),
        (["--config.data.related=tens=10|11|dog"], ["config.data.related: tens", "no class 'dog'"]),
        (["--config.data.train_per_class=4", "--config.data.eval_per_class=2"], ["too few to choose alpha on"]),
        (["--config.model.pretrained=nowhere.npz", "--config.model.depth=2"], ["nowhere.npz: no such file"]),
        (
            ["--config.data.source=tfds", "--config.data.name=cifar100", "--config.data.path=/nowhere"],
            ["cifar100", "/nowhere"],
        ),
        (["--config.data.source=folder", "--config.data.path=/nowhere"], ["/nowhere"]),
        (["--config=nowhere.py"], ["--config=nowhere.py: no such file", "cifar100_vit_s_32, double_digits"]),
        (["--wrokdir=x"], ["--wrokdir=x: no such flag", "--config.FIELD=VALUE"]),
        (["--config.model.depth", "3"], ["--config.model.depth: no such flag", "--config.FIELD=VALUE"]),
        (["--config.FIELD=3"], ["config.FIELD: there is no such field"]),
        (["--distributed-timeout=soon"], ["invalid int value: 'soon'", "headsteer run --help"]),
    ],
)
def test_mistakes_in_a_run(arguments, texts, tmp_path):
    refused(headsteer("run", f"--workdir={tmp_path / 'w'}", *arguments), *texts)


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file" / "w", tmp_path / "file"):
        refused(headsteer("run", f"--workdir={workdir}"), str(tmp_path / "file"), "--workdir")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["bake"], ["bake: no such command", "run, study, export, deploy, predict, page, push, config, compile"]),
        (["export"], ["RUN, TARGET", "headsteer export --help"]),
        (["export", "RUN", "torch:x"], ["torch:x: must be timm:FILE.safetensors, saelens:DIR or overcomplete:DIR"]),
        (["export", "RUN", "timm:model.bin"], ["timm:model.bin", "timm:FILE.safetensors"]),
        (["export", "RUN", "saelens"], ["saelens: must be", "saelens:DIR"]),
        (
            ["export", "nowhere", "saelens:x"],
            ["nowhere/config.json: no such file", "headsteer run --workdir=nowhere"],
        ),
        (["page"], ["RUN", "headsteer page --help"]),
        (["page", "nowhere"], ["nowhere/config.json: no such file, so no run was started here"]),
        (["config", "--config=nowhere"], ["--config=nowhere: no such file", "double_digits"]),
        (["config", "--explain=sae.kk"], ["config.sae.kk"]),
        (["config", "--explain=sae.k", "--check"], ["not allowed with", "headsteer config --help"]),
        (["config", "--check", "--config.steer.strategies=best"], ["'best'", "matched_random"]),
        (["config", "--check", "--config.data.source=folder"], ["config.data.path = ''", "data.source is 'folder'"]),
        (["config", "--check", "--config.data.source=disk"], ["config.data.source = 'disk': must be one of", "folder"]),
        (["config", "--reference=/dev/null/page.md"], ["/dev/null"]),
    ],
)
def test_mistakes_in_commands(arguments, texts, tmp_path):
    refused(headsteer(*arguments, cwd=tmp_path), *texts)


def test_help_and_version_need_no_command():
    for arguments in ([], ["--help"]):
        output = succeeded(headsteer(*arguments)).stdout
        for command in ("run", "export", "page", "config"):
            assert f"\n  {command} " in output
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", succeeded(headsteer("--version")).stdout)


def test_help_of_a_run_is_short_and_says_where_the_fields_are_explained():
    output = succeeded(headsteer("run", "--help")).stdout
    assert len(output.splitlines()) <= 24
    for text in (
        "train, sae, grid, steer, layers, front, report",
        "headsteer config --explain",
        "docs/reference/configuration.md",
    ):
        assert text in output
    for command in ("export", "page", "config"):
        assert f"usage: headsteer {command} " in succeeded(headsteer(command, "--help")).stdout


def test_config_shows_explains_and_checks(tmp_path):
    lines = succeeded(headsteer("config", "--config.sae.k=7")).stdout.splitlines()
    assert "sae.k = 7" in lines
    assert 'data.source = "double_digits"' in lines
    explanation = succeeded(headsteer("config", "--explain=gate.target")).stdout
    assert "The share of heads that the usage loss aims at, if gate.budget is 0." in explanation
    assert succeeded(headsteer("config", "--check")).stdout == "double_digits: valid\n"
    page = tmp_path / "new" / "fields.md"
    assert succeeded(headsteer("config", f"--reference={page}")).stdout == f"{page}\n"
    assert "gate.target" in page.read_text()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (HeadSteerError("two\n lines"), 2, "error: two lines\n"),
        (Preempted(), 75, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted: the same command continues"),
        (ValueError("a fault of the program"), 1, "Traceback"),
    ],
)
def test_exit_codes(monkeypatch, error, code, text):
    def fail(_):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "run", fail)
    result = headsteer("run")
    assert result.returncode == code
    assert text in result.stderr


def test_only_a_run_promises_to_continue(monkeypatch):
    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "deploy", fail)
    result = headsteer("deploy")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_main_ends_the_process_with_the_exit_code(monkeypatch):
    codes = []
    monkeypatch.setattr(cli, "run_command_line", lambda arguments: {"right": 0, "wrong": 2}[arguments[0]])
    monkeypatch.setattr(cli.os, "_exit", codes.append)
    cli.main(["right"])
    cli.main(["wrong"])
    assert codes == [2]


def test_the_stage_layers_may_be_left_out(finished, tmp_path):
    workdir = finished.copy(tmp_path, "layers")
    (workdir / "report" / "done.json").unlink()
    command = ("run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=report", "--overwrite")
    succeeded(headsteer(*command))
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["by_layer"] is None
    assert not (workdir / "figures" / "layers.png").exists()
    assert "the stage “layers” was not run" in (workdir / "report.html").read_text()


def test_export_writes_every_target(finished, tmp_path):
    names = ("timm:new/vit.safetensors", "saelens:saelens", "overcomplete:overcomplete")
    result = succeeded(headsteer("export", finished.workdir, *names, cwd=tmp_path))
    assert result.stdout.splitlines() == ["new/vit.safetensors", "saelens", "overcomplete"]
    assert (tmp_path / "new" / "vit.safetensors").exists()
    for seed in range(2):
        assert (tmp_path / "saelens" / f"seed_{seed}" / "cfg.json").exists()
        assert (tmp_path / "overcomplete" / f"seed_{seed}.safetensors").exists()


def test_export_needs_the_stages_that_it_reads(finished, tmp_path):
    workdir = finished.copy(tmp_path, "activations", "figures")
    (workdir / "sae" / "done.json").unlink()
    refused(headsteer("export", workdir, "saelens:x"), "headsteer export needs the stage sae", "--stages=sae")
    (workdir / "train" / "done.json").unlink()
    refused(headsteer("export", workdir, "timm:x.safetensors"), "headsteer export needs the stage train")


@pytest.mark.slow
def test_an_exported_backbone_is_trained_on(finished, tmp_path):
    file = tmp_path / "vit.safetensors"
    succeeded(headsteer("export", finished.workdir, f"timm:{file}"))
    result = succeeded(headsteer(
        "run", f"--config={finished.config}", f"--workdir={tmp_path / 'w'}", "--stages=train",
        f"--config.model.pretrained={file}", "--config.model.pretrained_head=true",
    ))  # fmt: skip
    assert re.search(rf"{file} \(timm\): loaded \d+ tensors; resampled none", result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "file"), [("saelens", "seed_1"), ("overcomplete", "seed_1.safetensors")])
def test_exported_autoencoders_come_back(finished, tmp_path, library, file):
    workdir = finished.copy(tmp_path)
    succeeded(headsteer("export", workdir, f"{library}:{tmp_path / library}"))
    command = ("run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=sae", "--overwrite",
               f"--config.sae.pretrained={library}:{tmp_path / library / file}")  # fmt: skip
    refused(headsteer(*command), "config.sae.seeds = 2", "1, because sae.pretrained names one autoencoder")
    refused(headsteer(*command, "--config.sae.seeds=1", "--config.sae.k=5"), "it has k = 4, not 5", "--config.sae.k=4")
    succeeded(headsteer(*command, "--config.sae.seeds=1"))
    before = json.loads((finished.workdir / "sae" / "health.json").read_text())["seeds"][1]
    after = json.loads((workdir / "sae" / "health.json").read_text())["seeds"][0]
    for name in ("mse_residual", "explained_variance", "l0", "dead_fraction", "accuracy_residual", "kl"):
        assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_grid_and_patch_tokens_and_another_variant(finished, tmp_path):
    """The stages sae and grid with fields that the default leaves alone, as far as the report."""
    workdir = finished.copy(tmp_path, "layers")
    succeeded(headsteer(
        "run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=sae,grid,steer,report", "--overwrite",
        "--config.sae.tokens=all", "--config.sae.activation=batch_topk", "--config.grid.k=2,5",
        "--config.grid.learning_rates=1e-3,4e-3", "--config.grid.epochs=2",
    ))  # fmt: skip
    summary = json.loads((workdir / "summary.json").read_text())
    assert len(summary["grid"]["rows"]) == 2 * 2 * 2
    for k, best in summary["grid"]["best"].items():
        rows = [row for row in summary["grid"]["rows"] if row["k"] == int(k)]
        score = {rate: np.mean([r["validation_explained_variance"] for r in rows if r["learning_rate"] == rate])
                 for rate in (1e-3, 4e-3)}  # fmt: skip
        assert best["learning_rate"] == pytest.approx(max(score, key=score.get))
    assert (workdir / "figures" / "grid.png").exists()
    stored = read_arrays(workdir / "sae" / "autoencoders.npz")
    assert (stored["sae_threshold"] > 0).all()
    assert read_arrays(workdir / "sae" / "inside.npz")["top_patches"].shape[2] == 17
    assert len(stored["x_train"]) == len(read_arrays(finished.workdir / "sae" / "autoencoders.npz")["x_train"])


def test_results_page(finished, tmp_path):
    page = tmp_path / "docs" / "tiny.md"
    command = ("page", finished.workdir, f"--results={page}", f"--config={finished.config}")
    assert succeeded(headsteer(*command)).stdout == f"{page}\n"
    text = page.read_text()
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert f"| {summary['overlap']['global_class']:.4f} |" in text
    for claim in summary["claims"]:
        assert claim["claim"] in text
    for name in re.findall(r"\]\(tiny/(\w+\.png)\)", text):
        assert (tmp_path / "docs" / "tiny" / name).stat().st_size > 1000
    assert len(re.findall(r"!\[", text)) == 9
    assert "| strategy | best alpha | usage | accuracy | alpha for usage 0.75 |" in text
    html = (finished.workdir / "report.html").read_text()
    assert 'id="exact"' in html
    assert 'id="against-oracle"' in html


def test_pages_written_again_are_the_same_bytes(finished, tmp_path):
    result = succeeded(headsteer("page", finished.workdir, f"--output={tmp_path / 'new'}"))
    assert result.stdout == f"{tmp_path / 'new' / 'report.html'}\n"
    for name in ("report.html", "latents.html", "explorer.html", "figures/front.png"):
        assert (tmp_path / "new" / name).read_bytes() == (finished.workdir / name).read_bytes()


def test_pages_need_a_finished_report_of_this_version(finished, tmp_path):
    workdir = finished.copy(tmp_path, "activations", "figures")
    record = workdir / "report" / "done.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 1}))
    refused(
        headsteer("page", workdir), "another version of HeadSteer made it", "its record has format 1", "headsteer run"
    )
    record.unlink()
    refused(headsteer("page", workdir), "headsteer page needs the stage report", "--stages=report")
    (workdir / "steer" / "done.json").unlink()
    refused(headsteer("page", workdir), "headsteer page needs the stage steer", "--stages=steer")


@pytest.mark.slow
def test_the_papers_experiment_on_a_cifar100_of_made_images(tmp_path):
    """The paper's experiment goes through every stage on a TFDS directory and a pretrained backbone of tiny size."""
    rng = np.random.default_rng(0)
    hue = rng.integers(0, 256, (100, 1, 1, 3))

    def images_and_labels(per_class):
        labels = np.tile(np.arange(100), per_class)
        noise = rng.integers(-40, 40, (len(labels), 32, 32, 3))
        return np.clip(hue[labels] + noise, 0, 255).astype(np.uint8), labels.tolist()

    write_tfds(
        tmp_path, name="cifar100", coarse=tuple(np.arange(100) // 5), train=images_and_labels(4),
        tested=images_and_labels(2), names=tuple(f"thing {c}" for c in range(100)),
        features={
            "image": feature("image", dtype="uint8", encodingFormat="png", shape={"dimensions": ["32", "32", "3"]}),
            "label": feature("classLabel", numClasses="100"),
            "coarse_label": feature("classLabel", numClasses="20"),
        },
    )  # fmt: skip
    golden = GOLDENS / "timm_vit.safetensors"
    command = [
        "--config=configs/cifar100_vit_s_32.py", f"--workdir={tmp_path / 'w'}", f"--config.data.path={tmp_path}",
        "--config.data.validation_fraction=0.25", f"--config.model.pretrained={golden}", "--config.model.depth=2",
        "--config.model.width=12", "--config.model.heads=3", "--config.train.batch=50", "--config.train.dense.steps=4",
        "--config.train.gated.steps=4", "--config.train.steps_per_call=2", "--config.train.eval_every=4",
        "--config.train.eval_batch=100", "--config.sae.epochs=3", "--config.sae.batch=100", "--config.sae.k=4",
        "--config.steer.latents=3", "--config.steer.bootstrap=20", "--config.machine.sweep_chunk=100",
        "--config.steer.alphas=1,4", "--config.steer.least_validation=1", "--config.layers.epochs=1",
        "--config.layers.per_class=1", "--config.layers.alphas=2",
    ]  # fmt: skip
    result = succeeded(headsteer("run", *command))
    assert "resampled 1 (pos_embed)" in result.stderr
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["config"]["data"]["name"] == "cifar100"
    assert {"related", "unrelated"} <= summary["overlap"].keys()  # from the coarse labels
    assert summary["overlap"]["heads"]["after"].keys() >= {"related", "unrelated"}
    assert (tmp_path / "w" / "report.html").stat().st_size > 100_000
    elsewhere = (f"--workdir={tmp_path / 'x'}", f"--config.data.path={tmp_path / 'none'}")
    refused(headsteer("run", *command[:1], *elsewhere), "cifar100", "none")


def test_a_run_in_python(finished, loaded):
    """A loaded run, swept with a user's own strategy and exactly in alpha, gives the numbers of the stage steer."""
    workdir = finished.workdir

    def strongest(statistics, label):
        latents = np.argsort(-statistics.class_frequency[label] * statistics.strength)[:2]
        return latents, np.ones(2)

    named = {"class": "class", "mine": strongest, "first": "random", "second": "random"}
    sweep = loaded.sweep(named, alphas=[-1.0, 0.5, 2.0], bootstrap=20)
    stored = read_sweep(workdir / "sweep.nc")
    for name in ("test_right", "test_gates", "test_heads_on", "validation_correct"):
        xarray.testing.assert_equal(sweep[name].sel(strategy="class"), stored[name].sel(strategy="class"))
    assert sweep.alpha.values.tolist() == [-1, 0, 0.5, 2]
    assert not sweep.latents.sel(strategy="first").equals(sweep.latents.sel(strategy="second"))
    assert (sweep.latents.sel(strategy="mine")[..., 2] == -1).all()  # two latents, where the others have three
    curve = sweep.usage.sel(strategy="mine", named_by="true")
    heads = sweep.test_heads_on.sel(strategy="mine", named_by="true").sum(("seed", "class", "head"))
    np.testing.assert_allclose(curve, heads / (2 * sweep.test_count.sum() * 3))

    steps = loaded.exact("class")
    for alpha in (-1.0, 0.5, 2.0):
        at = stored.sel(strategy="class", named_by="true", alpha=alpha)
        assert steps.heads_on[steps.at(alpha)] == at.test_heads_on.sum()
        assert steps.correct[steps.at(alpha)] == at.test_correct.sum()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steering"]["class"]["exact"]["steps"] == len(steps.alpha)

    whole_residual = loaded.sweep(["class"], target="residual", bootstrap=20)
    assert whole_residual.test_correct.sel(alpha=0).equals(sweep.test_correct.sel(alpha=0, strategy=["class"]))


def test_strategies_without_an_autoencoder_and_without_a_label(loaded):
    """They go through the same sweep: directions are stored, and what needs no label does not depend on it."""
    names = ["class", "mean_difference", "probe", "random_direction", "gate_bias", "random_bias", "global_bias"]
    by_image = ["image_latents", "image_random", "guessed_bias", "guessed_difference"]
    # this model hardly knows the classes: with all of them mixed, a guess of the class would hardly push
    sweep = loaded.sweep([*names, *by_image], alphas=[0.5, 2.0], bootstrap=20, guess_classes=1)
    for name in names[1:]:
        assert (sweep.latents.sel(strategy=name) == -1).all()
        assert (np.linalg.norm(sweep.directions.sel(strategy=name), axis=-1) > 0).any()
    for name in by_image:
        for counts in ("test_correct", "test_heads_on", "validation_correct"):
            labelled, guessed = (sweep[counts].sel(strategy=name, named_by=by) for by in ("true", "predicted"))
            xarray.testing.assert_equal(labelled.drop_vars("named_by"), guessed.drop_vars("named_by"))
        assert not (
            sweep.test_gates.sel(strategy=name, alpha=2.0) == sweep.test_gates.sel(strategy=name, alpha=0)
        ).all()
    unsteered = sweep.test_correct.sel(alpha=0)
    assert (unsteered == unsteered.isel(strategy=0)).all()
    bias = sweep.directions.sel(strategy="global_bias")
    assert (bias == bias.isel({"class": 0})).all()
    # the same direction by a user's own function gives the same counts
    own = bias.isel(seed=0).values
    again = loaded.sweep(
        {"class": "class", "own": lambda statistics, label: own[label]}, alphas=[0.5, 2.0], bootstrap=20
    )
    for counts in ("test_correct", "test_heads_on"):
        np.testing.assert_array_equal(again[counts].sel(strategy="own"), sweep[counts].sel(strategy="global_bias"))


@pytest.mark.parametrize(
    ("strategies", "fields", "text"),
    [
        (["class"], {"alphas": [1.0, np.nan]}, r"config\.steer\.alphas\.1 = nan: input should be a finite number"),
        (["class"], {"alphas": [np.inf]}, r"config\.steer\.alphas\.0 = inf"),
        (["class"], {"alphas": []}, r"steer\.alphas = \(\): must be at least one number"),
        (["class"], {"alpha": [1.0]}, r"config\.steer\.alpha: there is no such field; did you mean"),
        (["best"], {}, "there is no 'best'"),
        ([], {}, "there is no strategy to sweep"),
        (
            {"mine": lambda stats, label: ([10_000], [1.0])},
            {},
            r"^strategy 'mine', class 0 \('00'\): there is no latent",
        ),
        (["class"], {"classes": ["dog"]}, "has no class 'dog'"),
    ],
)
def test_what_a_sweep_in_python_refuses(loaded, strategies, fields, text):
    with pytest.raises(HeadSteerError, match=text):
        loaded.sweep(strategies, **fields)


def test_what_an_exact_sweep_refuses(loaded):
    with pytest.raises(HeadSteerError, match=r"^exact alphas need steer\.mode = 'add'"):
        loaded.exact("class", mode="clamp")
    with pytest.raises(HeadSteerError, match=r"^there is no split 'train'"):
        loaded.exact("class", "train")
    assert loaded.sweep("class", bootstrap=20).strategy.values.tolist() == ["class"]


def test_runs_that_cannot_be_loaded(finished, tmp_path):
    with pytest.raises(HeadSteerError, match=r"config\.json: no such file, so no run was started here"):
        load_run(tmp_path)
    workdir = finished.copy(tmp_path, "activations", "figures")
    (workdir / "sae" / "done.json").unlink()
    with pytest.raises(HeadSteerError, match="load_run needs the stage sae, which is not done"):
        load_run(workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(HeadSteerError, match=r"config\.json: damaged, or of another version"):
        load_run(workdir)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"layer": np.array(1)}, ["made for layer 1, not for 2"]),
        ({"model": np.array("another")}, ["made from another model's residuals"]),
        ({"layer": None}, ["it has no 'layer'", "older version"]),
    ],
)
def test_autoencoders_of_something_else(finished, tmp_path, change, texts):
    workdir = finished.copy(tmp_path)
    path = workdir / "sae" / "autoencoders.npz"
    stored = {name: value for name, value in (read_arrays(path) | change).items() if value is not None}
    write_arrays(path, stored)
    (workdir / "steer" / "done.json").unlink()
    result = headsteer("run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=steer")
    refused(result, "autoencoders.npz", *texts, "--overwrite")


def test_a_users_strategy_from_the_command_line(finished, tmp_path):
    """A strategy's module is found in the directory in which the command is given."""
    workdir = finished.copy(tmp_path)
    source = "def last(stats, label):\n    return range(5 + label % 2, 7 + label % 2), [1, 2]\n"
    (tmp_path / "users_strategy.py").write_text(source)
    command = ("run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=steer,report", "--overwrite")
    changes = ("--config.steer.strategies=class,users_strategy:last", "--config.steer.alphas=0.5,2")
    result = succeeded(headsteer(*command, *changes, cwd=tmp_path))
    assert "alpha 0, the unsteered model, is added" in result.stderr
    assert "exact in alpha" in result.stderr
    sweep = read_sweep(workdir / "sweep.nc")
    assert sweep.latents.sel(strategy="users_strategy:last")[0, 1].values.tolist() == [6, 7, -1]
    assert "users_strategy:last" in (workdir / "report.html").read_text()


def test_a_users_strategy_that_chooses_a_latent_twice(finished, tmp_path):
    workdir = finished.copy(tmp_path)
    (tmp_path / "wrong_strategy.py").write_text("def twice(stats, label):\n    return [1, 1], [1, 2]\n")
    command = ("run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=steer", "--overwrite")
    changes = ("--config.steer.strategies=class,wrong_strategy:twice", "--config.steer.latents=2")
    result = headsteer(*command, *changes, cwd=tmp_path)
    refused(result, "strategy 'wrong_strategy:twice', class 0 ('00'): latent 1 is chosen twice")


@pytest.mark.slow
def test_more_heads_than_a_table_holds(finished, tmp_path):
    """With thirteen heads, steering runs the last layers, and the controls try a sample of the subsets."""
    result = succeeded(headsteer(
        "run", f"--config={finished.config}", f"--workdir={tmp_path}", "--config.model.heads=13",
        "--config.model.width=26", "--config.steer.strategies=class,random", "--config.steer.subsets=64",
        "--stages=train,sae,steer,report",
    ))  # fmt: skip
    assert "the layers from 2 on run for every setting, because 13 heads are too many for a table" in result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["last_layer"]["by_size"]) == 14
    assert "exact" not in summary["steering"]["class"]
    sweep = read_sweep(tmp_path / "sweep.nc")
    assert sweep.sizes["subset"] >= 64
    assert (sweep.test_correct.sel(alpha=0).sum("class") == sweep.test_unsteered_correct.sum()).all()


def test_a_memory_limit_may_be_changed_without_overwrite(finished, tmp_path):
    workdir = finished.copy(tmp_path)
    (workdir / "steer" / "done.json").unlink()
    command = ("run", f"--config={finished.config}", f"--workdir={workdir}", "--stages=steer")
    refused(headsteer(*command, "--config.machine.sweep_memory=-1"), "config.machine.sweep_memory = '-1'")
    succeeded(headsteer(*command, "--config.machine.sweep_memory=2"))
    xarray.testing.assert_identical(read_sweep(workdir / "sweep.nc"), read_sweep(finished.workdir / "sweep.nc"))


def test_a_reader_that_ends_early_causes_no_traceback(capsys, monkeypatch):
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    monkeypatch.setattr(cli, "_silence_libraries", lambda: None)
    monkeypatch.setattr(cli.preemption, "install_handler", lambda: None)
    assert cli.run_command_line(["config"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""
