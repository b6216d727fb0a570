"""The command line from end to end on a tiny config, and how it answers mistakes."""

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
from helpers import CONFIG, GOLDENS, ROOT, environment, free_port, run

from headsteer_jax.analysis.sweep_file import read_sweep
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runs import load_run
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import read_arrays, write_arrays
from headsteer_jax.steer.tally import unpack_bits
from headsteer_jax.train.log import read_log


def refused(result: subprocess.CompletedProcess[str], *says: str) -> None:
    """Exit code 2 and one line."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    for text in says:
        assert text in errors[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config file and the workdir of its whole run."""
    directory = tmp_path_factory.mktemp("run")
    config = directory / "tiny.py"
    config.write_text(CONFIG)
    result = run(f"--config={config}", cwd=directory)
    assert result.returncode == 0, result.stderr
    workdir = directory / "runs" / "tiny"
    assert result.stdout.strip() == "runs/tiny/report.html"
    return config, workdir


def test_every_headline_number(finished):
    _, workdir = finished
    summary = json.loads((workdir / "summary.json").read_text())
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
    _, workdir = finished
    summary = json.loads((workdir / "summary.json").read_text())
    sweep = read_sweep(workdir / "sweep.nc")
    right = sweep.test_correct.sel(alpha=0).sum("class")
    assert (right == sweep.test_unsteered_correct.sum()).all()  # alpha 0 is the unsteered model
    assert summary["gated_accuracy"] == pytest.approx(right.values[0, 0, 0] / sweep.test_count.values.sum())
    labels = sweep.test_labels.values
    answers = unpack_bits(sweep.test_right.values, len(labels))
    gates = unpack_bits(sweep.test_gates.values, len(labels))
    was = unpack_bits(sweep.test_unsteered_right.values, len(labels))
    for label in range(100):
        own = labels == label
        assert (sweep.test_correct[..., label] == answers[..., own].sum(axis=-1)).all()
        assert (sweep.test_gained[..., label] == (answers & ~was)[..., own].sum(axis=-1)).all()
        assert (sweep.test_lost[..., label] == (~answers & was)[..., own].sum(axis=-1)).all()
        assert (sweep.test_heads_on[..., label, :] == gates[..., own].sum(axis=-1)).all()
    # the answers are the table's under the gates
    patterns = np.moveaxis(gates, -2, -1) @ (1 << np.arange(3))
    table = sweep.test_table.values
    assert ((table[np.arange(len(labels)), patterns] == labels) == answers).all()
    # one line: a class's curve
    curve = sweep.class_accuracy.sel({"strategy": "class", "named_by": "true", "class": "07"})
    assert curve.dims == ("alpha",)
    expected = answers[0, :, 0][..., labels == 7].mean(axis=(0, 2))
    np.testing.assert_allclose(curve, expected)


def test_a_finished_stage_is_not_done_again(finished):
    config, workdir = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    result = run(f"--config={config}", f"--workdir={workdir}")
    assert result.returncode == 0
    assert result.stderr.count("done before") == 5
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_a_changed_field_is_named_and_overwrite_redoes_what_depends_on_it(finished):
    config, workdir = finished
    command = (f"--config={config}", f"--workdir={workdir}", "--config.steer.latents=2")
    refused(run(*command), "config.steer.latents was 3, now 2", "--overwrite")
    done = {stage: (workdir / stage / "done.json").read_text() for stage in ("train", "sae", "steer", "report")}
    result = run(*command, "--overwrite")
    assert result.returncode == 0, result.stderr
    for stage, record in done.items():
        assert ((workdir / stage / "done.json").read_text() == record) == (stage in ("train", "sae"))
    assert run(f"--config={config}", f"--workdir={workdir}", "--overwrite").returncode == 0  # and back


def test_stages_one_by_one_equal_all_at_once(finished, tmp_path):
    """Same seed, same numbers, in another directory."""
    config, workdir = finished
    refused(run(f"--config={config}", f"--workdir={tmp_path}", "--stages=sae"), "sae needs train")
    for stage in ("train", "layers", "sae", "steer,report"):
        result = run(f"--config={config}", f"--workdir={tmp_path}", f"--stages={stage}")
        assert result.returncode == 0, result.stderr
    first, second = (json.loads((path / "summary.json").read_text()) for path in (workdir, tmp_path))
    for name in ("seconds", "peak_memory_bytes"):
        del first[name], second[name]
    assert first == second
    xarray.testing.assert_identical(read_sweep(workdir / "sweep.nc"), read_sweep(tmp_path / "sweep.nc"))


def test_damaged_checkpoint(finished, tmp_path):
    """What cannot be read is named; nothing else is touched."""
    config, workdir = finished
    shutil.copytree(workdir / "train", tmp_path / "train")
    largest = max((tmp_path / "train" / "gated" / "last" / "8").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    command = (f"--config={config}", f"--workdir={tmp_path}")
    refused(run(*command, "--stages=sae"), "gated/last/8", "damaged", "done.json", "--overwrite")
    shutil.rmtree(tmp_path / "train" / "gated" / "last" / "8")
    refused(run(*command, "--stages=sae"), "it ends at step 4 of 8", "done.json", "--overwrite")
    (tmp_path / "train" / "done.json").unlink()  # what the line says
    assert run(*command, "--overwrite", "--stages=train,sae").returncode == 0


def start(*arguments: object, log: Path, devices: int = 1) -> subprocess.Popen[bytes]:
    """run.py beside this process, with its lines in a file."""
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=log.open("wb"), stderr=subprocess.STDOUT
    )


def together(tmp_path: Path, *arguments: list[object], devices: int = 1) -> list[tuple[int, str]]:
    """Processes of one cluster, joined over loopback, each with its arguments: (exit code, lines) of each."""
    where, logs = f"127.0.0.1:{free_port()}", [tmp_path / f"{number}.log" for number in range(len(arguments))]
    processes = [
        start(*own, f"--distributed={where},{len(arguments)},{number}", log=logs[number], devices=devices)
        for number, own in enumerate(arguments)
    ]
    try:
        codes = [process.wait(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def check_together(finished, tmp_path, *stages):
    config, workdir = finished
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}", f"--stages={','.join(stages)}"]
    first, second = together(tmp_path, command, command)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert first[1].count("done in") == len(stages)
    assert "done in" not in second[1]  # one speaks, and writes
    one, two = (read_sweep(path / "sweep.nc") for path in (workdir, tmp_path / "w"))
    for name, values in one.data_vars.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(two[name], values, rtol=2e-3, atol=1e-5)
        else:
            xarray.testing.assert_equal(two[name], values)


def test_two_processes_equal_one(finished, tmp_path):
    """The sweep's counts are the same, and a lone process goes on with what two have made."""
    check_together(finished, tmp_path, "train", "sae", "steer")
    result = run(f"--config={finished[0]}", f"--workdir={tmp_path / 'w'}", "--stages=train,sae,steer,report")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("done before") == 3


@pytest.mark.slow
def test_two_processes_equal_one_in_every_stage(finished, tmp_path):
    check_together(finished, tmp_path, "train", "sae", "grid", "steer", "layers", "report")
    one, two = (json.loads((path / "summary.json").read_text()) for path in (finished[1], tmp_path / "w"))
    for name, result in one["steering"].items():
        assert two["steering"][name]["accuracy"] == result["accuracy"]
        assert two["steering"][name]["usage"] == pytest.approx(result["usage"], abs=1e-6)


def test_parameters_cut_over_processes(finished, tmp_path):
    """Training with each array's halves in two processes; a lone one reads what they saved."""
    config, workdir = finished
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}", "--config.machine.fsdp=2", "--stages=train"]
    for code, lines in together(tmp_path, command, command):
        assert code == 0, lines
    (one, _), (two, _) = (
        Checkpoints(path / "train" / "gated" / "best", writes=False).restore(load_run(workdir).params)
        for path in (workdir, tmp_path / "w")
    )
    for leaf, other in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=2e-3)  # the keys' biases are rounding alone
    rows = [read_log(path / "train" / "metrics.jsonl") for path in (workdir, tmp_path / "w")]
    losses = [[row["loss"] for row in some if "loss" in row] for some in rows]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_processes_that_differ_are_told_at_once(finished, tmp_path):
    config, _ = finished
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    for code, lines in together(tmp_path, command, [*command, "--config.sae.k=3"]):
        assert code == 2
        errors = [line for line in lines.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "config.sae.k of process 1 is not process 0's (3, not 4)" in errors[0]
    assert not (tmp_path / "w").exists()


def test_a_coordinator_that_is_not_there(tmp_path):
    result = run(f"--workdir={tmp_path / 'w'}", f"--distributed=127.0.0.1:{free_port()},2,1", "--distributed_timeout=3")
    refused(result, "not all processes met at 127.0.0.1:", "within 3 s")
    refused(
        run(f"--workdir={tmp_path / 'w'}", "--distributed=here"), "--distributed=here", "HOST:PORT,PROCESSES,PROCESS"
    )
    refused(run(f"--workdir={tmp_path / 'w'}", "--distributed=a:1,2,2"), "process 2 of 2")
    refused(run(f"--workdir={tmp_path / 'w'}", "--distributed=auto"), "no cluster could be joined")


def test_sigterm_saves_and_asks_to_be_resumed(finished, tmp_path):
    """In training; meanwhile another run is kept out of the directory."""
    config, _ = finished
    command, log = (f"--config={config}", f"--workdir={tmp_path / 'w'}", "--stages=train"), tmp_path / "log"
    long = (*command, "--config.train.dense.steps=20000")
    process = start(*long, log=log)
    try:
        checkpoints = tmp_path / "w" / "train" / "dense" / "last"
        while not any(path.name.isdigit() for path in (checkpoints.iterdir() if checkpoints.exists() else ())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        refused(run(*long), "another run is writing here", "--workdir")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75
    finally:
        process.kill()
    lines = log.read_text().splitlines()
    assert lines[-1] == "stopped by SIGTERM: the same command goes on where it was"
    saved = int(re.search(r"dense: step (\d+) is saved", log.read_text())[1])
    assert max(int(path.name) for path in checkpoints.iterdir()) == saved
    process = start(*long, log=log)
    try:
        while f"dense: going on from step {saved}" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages=train,bake"], ["there is no stage 'bake'", "train, sae, grid, steer, layers, report"]),
        (["--config.model.depht=3"], ["config.model.depht", "did you mean config.model.depth?"]),
        (["--config.model.depth=four"], ["config.model.depth = 'four'"]),
        (["--config.model.heads=5"], ["model.heads = 5", "a divisor of model.width"]),
        (["--config.sae.k=4000"], ["sae.k = 4000", "latents"]),
        (["--config.model.patch=7"], ["model.patch = 7", "a divisor of data.image_size"]),
        (["--config.gate.target=0"], ["config.gate.target = '0'"]),
        (["--config.gate.target=1.5"], ["config.gate.target = '1.5'"]),
        (["--config.steer.strategies=class,best"], ["'best'", "matched_random"]),
        (["--config.steer.classes=00,dog"], ["no class 'dog'"]),
        (["--config.steer.classes=00,00"], ["steer.classes", "no name twice"]),
        (["--config.data.related=tens=10|11|dog"], ["config.data.related: tens", "no class 'dog'"]),
        (["--config.data.train_per_class=4", "--config.data.eval_per_class=2"], ["too few to choose alpha on"]),
        (["--config.model.pretrained=nowhere.npz"], ["nowhere.npz: no such file"]),
        (
            ["--config.data.source=tfds", "--config.data.name=cifar100", "--config.data.path=/nowhere"],
            ["cifar100", "/nowhere"],
        ),
        (["--config.data.source=folder", "--config.data.path=/nowhere"], ["/nowhere"]),
        (["--config=nowhere.py"], ["nowhere.py", "no such file"]),
        (["--wrokdir=x"], ["--wrokdir=x"]),
    ],
)
def test_bad_input(arguments, says, tmp_path):
    refused(run(f"--workdir={tmp_path / 'w'}", *arguments), *says)


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(f"--workdir={tmp_path / 'file' / 'w'}"), str(tmp_path / "file"), "--workdir")


def test_help_lists_stages_and_fields():
    result = run("--help")
    assert result.returncode == 0
    for text in ("train", "sae", "steer", "report", "--config.gate.target", "Share of heads to keep."):
        assert text in result.stdout


def test_the_stage_layers_may_be_left_out(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "layers")
    (tmp_path / "w" / "report" / "done.json").unlink()
    result = run(f"--config={config}", f"--workdir={tmp_path / 'w'}", "--stages=report", "--overwrite")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["by_layer"] is None
    assert not (tmp_path / "w" / "figures" / "layers.png").exists()
    assert "the stage “layers” was not run" in (tmp_path / "w" / "report.html").read_text()


def test_export_is_the_trained_model_under_timms_names(finished, tmp_path):
    from safetensors.numpy import load_file

    config, workdir = finished
    file = tmp_path / "new" / "vit.safetensors"
    result = run(f"--config={config}", f"--workdir={workdir}", f"--export={file}")
    assert result.returncode == 0, result.stderr
    tensors = load_file(file)
    assert tensors["blocks.2.attn.qkv.weight"].shape == (72, 24)
    assert tensors["head.weight"].shape == (100, 24)
    assert not any("decide" in name for name in tensors)
    again = run(
        f"--config={config}", f"--workdir={tmp_path / 'w'}", "--stages=train", f"--config.model.pretrained={file}",
        "--config.model.pretrained_head=true",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert f"{file} (timm): loaded {len(tensors)} tensors; resampled none" in again.stderr
    refused(run(f"--config={config}", f"--workdir={workdir}", "--export=a.bin"), "--export=a.bin", ".safetensors")
    refused(
        run(f"--config={config}", f"--workdir={tmp_path / 'none'}", "--stages=sae", "--export=a.safetensors"), "sae"
    )


def test_autoencoders_go_out_and_come_back(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    command = (f"--config={config}", f"--workdir={tmp_path / 'w'}")
    files = {"saelens": "seed_1", "overcomplete": "seed_1.safetensors"}
    for library, file in files.items():
        target = f"{library}:{tmp_path / library}"
        result = run(*command, "--stages=sae", f"--export_sae={target}")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[0] == target
        path = tmp_path / library / file
        shutil.copytree(workdir, tmp_path / f"w_{library}")
        again = (f"--config={config}", f"--workdir={tmp_path / f'w_{library}'}", "--stages=sae", "--overwrite",
                 f"--config.sae.pretrained={library}:{path}")  # fmt: skip
        refused(run(*again), "config.sae.seeds = 2", "1, as sae.pretrained names one autoencoder")
        refused(run(*again, "--config.sae.seeds=1", "--config.sae.k=5"), "config.sae.k = 5", "has 4")
        result = run(*again, "--config.sae.seeds=1")
        assert result.returncode == 0, result.stderr
        before = json.loads((workdir / "sae" / "health.json").read_text())["seeds"][1]
        after = json.loads((tmp_path / f"w_{library}" / "sae" / "health.json").read_text())["seeds"][0]
        for name in ("mse_residual", "explained_variance", "l0", "dead_fraction", "accuracy_residual", "kl"):
            assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-6)
    refused(run(*command, "--export_sae=torch:x"), "--export_sae=torch:x", "saelens:DIR")
    refused(
        run(f"--config={config}", f"--workdir={tmp_path / 'none'}", "--stages=train", "--export_sae=saelens:x"),
        "--export_sae needs sae",
    )


def test_grid_and_patch_tokens_and_another_variant(finished, tmp_path):
    """The stages sae and grid on what the default does not touch, as far as the report."""
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w", ignore=shutil.ignore_patterns("layers"))
    result = run(
        f"--config={config}", f"--workdir={tmp_path / 'w'}", "--stages=sae,grid,steer,report", "--overwrite",
        "--config.sae.tokens=all", "--config.sae.activation=batch_topk", "--config.grid.k=2,5",
        "--config.grid.learning_rates=1e-3,4e-3", "--config.grid.epochs=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert len(summary["grid"]["rows"]) == 2 * 2 * 2
    for k, best in summary["grid"]["best"].items():
        own = [row for row in summary["grid"]["rows"] if row["k"] == int(k)]
        score = {rate: np.mean([r["validation_explained_variance"] for r in own if r["learning_rate"] == rate])
                 for rate in (1e-3, 4e-3)}  # fmt: skip
        assert best["learning_rate"] == pytest.approx(max(score, key=score.get))
    assert (tmp_path / "w" / "figures" / "grid.png").exists()
    stored = read_arrays(tmp_path / "w" / "sae" / "autoencoders.npz")
    assert (stored["sae_threshold"] > 0).all()
    assert read_arrays(tmp_path / "w" / "sae" / "inside.npz")["top_patches"].shape[2] == 17
    assert len(stored["x_train"]) == len(read_arrays(workdir / "sae" / "autoencoders.npz")["x_train"])


def test_results_page(finished, tmp_path):
    config, workdir = finished
    page = tmp_path / "docs" / "tiny.md"
    command = [sys.executable, "-m", "headsteer_jax.report.results", str(workdir), str(page), str(config)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    summary = json.loads((workdir / "summary.json").read_text())
    assert f"| {summary['overlap']['global_class']:.4f} |" in text
    for claim in summary["claims"]:
        assert claim["claim"] in text
    for name in re.findall(r"\]\(tiny/(\w+\.png)\)", text):
        assert (tmp_path / "docs" / "tiny" / name).stat().st_size > 1000
    assert len(re.findall(r"!\[", text)) == 9
    assert "| strategy | best alpha | usage | accuracy | alpha for usage 0.75 |" in text
    html = (workdir / "report.html").read_text()
    assert 'id="exact"' in html
    assert 'id="against-oracle"' in html
    command[3] = str(tmp_path)
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}: there is no summary.json")


def test_the_papers_experiment_on_a_cifar100_of_made_images(tmp_path):
    """configs/cifar100_vit_s.py through every stage: TFDS's own format, a pretrained backbone, a model of tiny size."""
    rng = np.random.default_rng(0)
    hue = rng.integers(0, 256, (100, 1, 1, 3))

    def made(per_class):
        labels = np.tile(np.arange(100), per_class)
        noise = rng.integers(-40, 40, (len(labels), 32, 32, 3))
        return np.clip(hue[labels] + noise, 0, 255).astype(np.uint8), labels.tolist()

    write_tfds(
        tmp_path, name="cifar100", coarse=tuple(np.arange(100) // 5), train=made(4), tested=made(2),
        names=tuple(f"thing {c}" for c in range(100)),
        features={
            "image": feature("image", dtype="uint8", encodingFormat="png", shape={"dimensions": ["32", "32", "3"]}),
            "label": feature("classLabel", numClasses="100"),
            "coarse_label": feature("classLabel", numClasses="20"),
        },
    )  # fmt: skip
    golden = GOLDENS / "timm_vit.safetensors"
    command = [
        "--config=configs/cifar100_vit_s.py", f"--workdir={tmp_path / 'w'}", f"--config.data.path={tmp_path}",
        "--config.data.validation_fraction=0.25", f"--config.model.pretrained={golden}", "--config.model.depth=2",
        "--config.model.width=12", "--config.model.heads=3", "--config.train.batch=50", "--config.train.dense.steps=4",
        "--config.train.gated.steps=4", "--config.train.steps_per_call=2", "--config.train.eval_every=4",
        "--config.train.eval_batch=100", "--config.sae.epochs=3", "--config.sae.batch=100", "--config.sae.k=4",
        "--config.steer.latents=3", "--config.steer.bootstrap=20", "--config.machine.sweep_chunk=100",
        "--config.steer.alphas=1,4", "--config.steer.least_validation=1", "--config.layers.epochs=1",
        "--config.layers.per_class=1", "--config.layers.alphas=2",
    ]  # fmt: skip
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "resampled 1 (pos_embed)" in result.stderr
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["config"]["data"]["name"] == "cifar100"
    assert {"related", "unrelated"} <= summary["overlap"].keys()  # from the coarse labels
    assert summary["overlap"]["heads"]["after"].keys() >= {"related", "unrelated"}
    assert (tmp_path / "w" / "report.html").stat().st_size > 100_000
    refused(
        run(*command[:1], f"--workdir={tmp_path / 'x'}", f"--config.data.path={tmp_path / 'none'}"), "cifar100", "none"
    )


def test_a_run_in_python(finished):
    """Loaded, swept with a user's own strategy, exact in alpha: the same numbers as the stages'."""
    _, workdir = finished
    loaded = load_run(workdir)

    def strongest(statistics, label):
        latents = np.argsort(-statistics.class_frequency[label] * statistics.strength)[:2]
        return latents, np.ones(2)

    named = {"class": "class", "mine": strongest, "first": "random", "second": "random"}
    sweep = loaded.sweep(named, alphas=[-1.0, 0.5, 2.0], bootstrap=20)
    whole = read_sweep(workdir / "sweep.nc")
    for name in ("test_right", "test_gates", "test_heads_on", "validation_correct"):
        xarray.testing.assert_equal(sweep[name].sel(strategy="class"), whole[name].sel(strategy="class"))
    assert sweep.alpha.values.tolist() == [-1, 0, 0.5, 2]
    assert not sweep.latents.sel(strategy="first").equals(sweep.latents.sel(strategy="second"))
    assert (sweep.latents.sel(strategy="mine")[..., 2] == -1).all()  # two latents, where the others have three
    curve = sweep.usage.sel(strategy="mine", named_by="true")
    heads = sweep.test_heads_on.sel(strategy="mine", named_by="true").sum(("seed", "class", "head"))
    np.testing.assert_allclose(curve, heads / (2 * sweep.test_count.sum() * 3))

    steps = loaded.exact("class")
    for alpha in (-1.0, 0.5, 2.0):
        at = whole.sel(strategy="class", named_by="true", alpha=alpha)
        assert steps.heads_on[steps.at(alpha)] == at.test_heads_on.sum()
        assert steps.correct[steps.at(alpha)] == at.test_correct.sum()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steering"]["class"]["exact"]["steps"] == len(steps.alpha)

    whole_residual = loaded.sweep(["class"], target="residual", bootstrap=20)
    assert whole_residual.test_correct.sel(alpha=0).equals(sweep.test_correct.sel(alpha=0, strategy=["class"]))


@pytest.mark.parametrize(
    ("strategies", "fields", "says"),
    [
        (["class"], {"alphas": [1.0, np.nan]}, r"config\.steer\.alphas\.1 = nan: input should be a finite number"),
        (["class"], {"alphas": [np.inf]}, r"config\.steer\.alphas\.0 = inf"),
        (["class"], {"alphas": []}, r"steer\.alphas = \(\): allowed is at least one number"),
        (["class"], {"alpha": [1.0]}, r"config\.steer\.alpha: there is no such field; did you mean"),
        (["best"], {}, "there is no 'best'"),
        ([], {}, "no strategy to sweep"),
        (
            {"mine": lambda stats, label: ([10_000], [1.0])},
            {},
            r"^strategy 'mine', class 0 \('00'\): there is no latent",
        ),
        (["class"], {"classes": ["dog"]}, "has no class 'dog'"),
    ],
)
def test_what_a_sweep_in_python_refuses(finished, strategies, fields, says):
    with pytest.raises(HeadSteerError, match=says):
        load_run(finished[1]).sweep(strategies, **fields)


def test_runs_that_cannot_be_loaded(finished, tmp_path):
    _, workdir = finished
    with pytest.raises(HeadSteerError, match=r"config\.json: there is none, so no run was started here"):
        load_run(tmp_path)
    shutil.copytree(workdir, tmp_path / "w")
    loaded = load_run(tmp_path / "w")
    with pytest.raises(HeadSteerError, match=r"^alpha is exact for steer\.mode = 'add'"):
        loaded.exact("class", mode="clamp")
    with pytest.raises(HeadSteerError, match=r"^there is no split 'train'"):
        loaded.exact("class", "train")
    assert loaded.sweep("class", bootstrap=20).strategy.values.tolist() == ["class"]
    (tmp_path / "w" / "sae" / "done.json").unlink()
    with pytest.raises(HeadSteerError, match="its stage sae is not done"):
        load_run(tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text("{")
    with pytest.raises(HeadSteerError, match=r"config\.json: damaged, or of another version"):
        load_run(tmp_path / "w")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": np.array(1)}, ["made for layer 1, not for 2"]),
        ({"model": np.array("another")}, ["made from another model's residuals"]),
        ({"layer": None}, ["it has no 'layer'", "older version"]),
    ],
)
def test_autoencoders_of_something_else(finished, tmp_path, change, says):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    path = tmp_path / "w" / "sae" / "autoencoders.npz"
    stored = {name: value for name, value in (read_arrays(path) | change).items() if value is not None}
    write_arrays(path, stored)
    (tmp_path / "w" / "steer" / "done.json").unlink()
    result = run(f"--config={config}", f"--workdir={tmp_path / 'w'}", "--stages=steer")
    refused(result, "autoencoders.npz", *says, "--overwrite")


def test_a_users_strategy_from_the_command_line(finished, tmp_path):
    """Its module is found where the command is given."""
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "mine.py").write_text(
        "def last(stats, label):\n    return range(5 + label % 2, 7 + label % 2), [1, 2]\n"
    )
    command = (f"--config={config}", f"--workdir={tmp_path / 'w'}", "--stages=steer,report", "--overwrite")
    result = run(*command, "--config.steer.strategies=class,mine:last", "--config.steer.alphas=0.5,2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "alpha 0, the unsteered model, is added" in result.stderr
    assert "exact in alpha" in result.stderr
    sweep = read_sweep(tmp_path / "w" / "sweep.nc")
    assert sweep.latents.sel(strategy="mine:last")[0, 1].values.tolist() == [6, 7, -1]
    assert "mine:last" in (tmp_path / "w" / "report.html").read_text()
    (tmp_path / "mine.py").write_text("def last(stats, label):\n    return [1, 1], [1, 2]\n")
    result = run(*command, "--config.steer.strategies=class,mine:last", "--config.steer.latents=2", cwd=tmp_path)
    refused(result, "strategy 'mine:last', class 0 ('00'): latent 1 twice")


def test_more_heads_than_a_table_holds(finished, tmp_path):
    """Thirteen: steering runs the suffix, the controls try a sample of the subsets, and the report is whole."""
    command = (
        f"--config={finished[0]}", f"--workdir={tmp_path}", "--config.model.heads=13", "--config.model.width=26",
        "--config.steer.strategies=class,random", "--config.steer.subsets=64", "--stages=train,sae,steer,report",
    )  # fmt: skip
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "the layers from 2 on run for every setting, as 13 heads are too many for a table" in result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["last_layer"]["by_size"]) == 14
    assert "exact" not in summary["steering"]["class"]
    sweep = read_sweep(tmp_path / "sweep.nc")
    assert sweep.sizes["subset"] >= 64
    assert (sweep.test_correct.sel(alpha=0).sum("class") == sweep.test_unsteered_correct.sum()).all()


def test_a_budget_too_small_is_one_line_and_may_be_raised_without_overwrite(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "w" / "steer" / "done.json").unlink()
    command = (f"--config={config}", f"--workdir={tmp_path / 'w'}", "--stages=steer")
    refused(run(*command, "--config.machine.sweep_memory=0"), "config.machine.sweep_memory = '0'")
    assert run(*command, "--config.machine.sweep_memory=2").returncode == 0
    xarray.testing.assert_identical(read_sweep(tmp_path / "w" / "sweep.nc"), read_sweep(workdir / "sweep.nc"))
