"""Training: the schedule, bit-for-bit resuming, the metrics, and the error for a loss that is not finite."""

import json
import os
import shutil
import signal
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import blobs, tiny_config

from headsteer_jax.config import Config, MachineConfig, PhaseConfig
from headsteer_jax.data import batches
from headsteer_jax.data.dataset import Dataset, LazyImages, Split
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime import mesh, preemption
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.train import loop, step
from headsteer_jax.train.log import TrainingLog, open_log, read_log


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset(blobs(96, 0), blobs(30, 1), blobs(30, 2), ("a", "b", "c"))


EVERYTHING = {"kinds": ("heads", "sublayers", "tokens"), "budget": 0.5, "teacher_logits": 1.0, "teacher_hidden": 0.5}


def with_train(gate: dict[str, object] | None = None, **fields: object) -> Config:
    """Make tiny_config with two layers, which compile sooner than three, and these fields in its section `train`."""
    config = tiny_config(**(gate or {}))
    config = config.model_copy(update={"model": config.model.model_copy(update={"depth": 2})})
    return config.model_copy(update={"train": config.train.model_copy(update=fields)})


@pytest.fixture(scope="module")
def finished_training(dataset, tmp_path_factory):
    """The directory of a whole training under with_train(). Tests must not change it."""
    directory = tmp_path_factory.mktemp("whole")
    loop.train_model(with_train(), dataset, directory)
    return directory


def final_states(config, dataset, directory):
    states = {}
    for phase in ("dense", "gated", "dense_control")[: 2 + config.train.dense_control]:
        checkpoints = Checkpoints(directory / phase / "last", 2)
        model = build_model(config, 3)
        params = loop.init_params(model, config, config.seed)
        like = step.State(
            params,
            params if config.train.ema else None,
            step.init_optimizer(config, params),
            jnp.zeros(2, jnp.uint32),
            jnp.int32(0),
        )
        states[phase] = checkpoints.restore(like)
    return states


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate": EVERYTHING, "dense_control": False},
        pytest.param({"ema": 0.9, "mixup": 0.2}, marks=pytest.mark.slow),
    ],
)
def test_resume_equals_uninterrupted_bit_for_bit(dataset, finished_training, tmp_path, monkeypatch, fields):
    """Stopped in the middle of the dense and of the gated phase, each time after a checkpoint that is not the last."""
    config, uninterrupted = with_train(**fields), finished_training
    if fields:
        uninterrupted = tmp_path / "whole"
        loop.train_model(config, dataset, uninterrupted)
    real = Checkpoints.save
    for phase in ("dense", "gated"):

        def save(self, step, tree, about, phase=phase):
            real(self, step, tree, about)
            if about["phase"] == phase and step == 4 and self.directory.name == "last":
                self.wait()
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            loop.train_model(config, dataset, tmp_path / "parts")
    monkeypatch.setattr(Checkpoints, "save", real)
    loop.train_model(config, dataset, tmp_path / "parts")
    whole, parts = (final_states(config, dataset, path) for path in (uninterrupted, tmp_path / "parts"))
    chex.assert_trees_all_equal(whole, parts)
    assert whole["gated"][0].step == 8
    assert whole["gated"][1]["position"] == (8 + 8) * 16
    assert whole["gated"][1]["config"]["seed"] == 0
    assert np.any(whole["gated"][0].params["params"]["cls"] != whole["dense"][0].params["params"]["cls"])
    rows = [read_log(path / "metrics.jsonl") for path in (uninterrupted, tmp_path / "parts")]
    assert rows[0] == rows[1]
    if "gate" in fields:
        check_rows_of_all_kinds([row for row in rows[0] if row["phase"] == "gated"])


def check_rows_of_all_kinds(rows):
    """Two layers, of which the second gates everything and the first its four tokens."""
    trained, validated = rows[0], next(row for row in rows if "validation_accuracy" in row)
    for name in ("usage_sampled", "usage_thresholded"):
        shapes = [np.shape(trained[name + suffix]) for suffix in ("", "_sublayers", "_tokens")]
        assert shapes == [(1,), (1, 2), (2,)]
    assert {"macs_target", "macs_sampled", "macs_thresholded", "teacher_logits", "teacher_hidden"} <= trained.keys()
    assert np.shape(validated["validation_usage_sublayers"]) == (1, 2)
    assert np.shape(validated["validation_usage_tokens"]) == (2,)
    assert 0 < validated["validation_macs"] < 1.1


def test_metrics_show_sampled_and_thresholded_usage(finished_training):
    config = with_train()
    rows = read_log(finished_training / "metrics.jsonl")
    gated = [row for row in rows if row["phase"] == "gated" and "usage_sampled" in row]
    assert [row["step"] for row in gated] == [2, 4, 6, 8]
    layers = config.model.depth - 1  # the first has no gate
    assert all(len(row["usage_sampled"]) == len(row["usage_thresholded"]) == layers for row in gated)
    assert gated[0]["gate_noise"] > 0 == gated[-1]["gate_noise"]
    assert gated[-1]["usage_sampled"] == gated[-1]["usage_thresholded"]  # no noise is left
    assert gated[-1]["usage_target"] == pytest.approx(config.gate.target)
    assert [row["step"] for row in rows if row["phase"] == "dense" and "validation_accuracy" in row] == [4, 8]
    assert list((finished_training / "tensorboard").iterdir())


def test_training_learns(dataset, tmp_path):
    config = with_train(dense=PhaseConfig(steps=60, learning_rate=3e-3), eval_every=30)
    model = build_model(config, 3)
    with open_log(tmp_path, config) as log:
        loop.train_phase(model, loop.init_params(model, config, 0), "dense", dataset, config, tmp_path, log)
    accuracy = [
        row["validation_accuracy"] for row in read_log(tmp_path / "metrics.jsonl") if "validation_accuracy" in row
    ]
    assert accuracy[1] >= 0.9  # chance: 1/3


def test_same_seed_same_bits_other_seed_other_bits(dataset, tmp_path):
    first, again, other = (loop.init_params(build_model(tiny_config(), 3), tiny_config(), seed) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.any(first["params"]["cls"] != other["params"]["cls"])


def test_schedule_and_decay_mask():
    """Warm-up to the peak, a cosine to its end; biases and norms are not decayed."""
    plan = PhaseConfig(steps=100, learning_rate=1e-2, warmup=0.1, final=0.1)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    config = with_train(weight_decay=0.5)
    tx = step.make_optimizer(config, step.make_learning_rate(plan))
    update, state, zero = jax.jit(tx.update), tx.init(params), jax.tree.map(np.zeros_like, params)
    decays = []
    for _ in range(100):
        updates, state = update(zero, state, params)
        decays.append(-float(np.asarray(updates["kernel"])[0, 0]) / 0.5)
        assert not np.any(updates["bias"])
        assert not np.any(updates["scale"])
    expected = [1e-2 * i / 10 if i < 10 else 1e-3 + 9e-3 * (1 + np.cos(np.pi * (i - 10) / 90)) / 2 for i in range(100)]
    np.testing.assert_allclose(decays, expected, rtol=1e-4, atol=1e-9)
    schedule = step.make_schedule(plan).cut(5, 15)
    np.testing.assert_allclose(schedule.learning_rate, expected[5:15], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(schedule.progress, np.arange(5, 15) / 100, rtol=1e-6)
    constant = step.make_schedule(PhaseConfig(steps=3, learning_rate=1e-2, warmup=0.0, final=1.0))
    np.testing.assert_allclose(constant.learning_rate, [1e-2] * 3, rtol=1e-6)


def test_loss_by_hand():
    """Cross-entropy of smoothed labels plus the weighted usage loss, in float64."""
    config = tiny_config()
    model = build_model(config, 3)
    params = loop.init_params(model, config, 0)
    images = np.random.default_rng(0).standard_normal((6, 8, 8, 1)).astype(np.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(np.arange(6) % 3, 3), 0.1)

    @jax.jit
    def compute(params):
        noise = {"heads": jnp.zeros((6, 2, 3))}
        batch = step.Batch(images, targets, noise)
        losses = step.loss_and_metrics(model, params, batch, jnp.float32(1), None, config)
        return losses, model.apply(params, images)

    (loss, metrics), (logits, out) = compute(params)
    log_p = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=1, keepdims=True))
    cross_entropy = -(np.asarray(targets) * log_p).sum(axis=1).mean()
    usage = [np.asarray(out["gates"][layer]["heads"]).mean() for layer in (1, 2)]
    pressure = config.gate.weight * np.mean([abs(u - config.gate.target) for u in usage])
    np.testing.assert_allclose(loss, cross_entropy + pressure, rtol=1e-5)
    np.testing.assert_allclose(metrics["usage_thresholded"], usage, rtol=1e-6)


def test_nan_names_the_step_and_the_last_good_checkpoint(dataset, tmp_path, monkeypatch):
    config = with_train(dense=PhaseConfig(steps=12))
    real = step.augment_and_normalise

    def bad(key, images, config):
        return real(key, images, config) * jnp.nan

    monkeypatch.setattr(step, "augment_and_normalise", bad)
    with pytest.raises(HeadSteerError, match=r"dense: the loss is nan at step 1; there is no checkpoint yet"):
        loop.train_model(config, dataset, tmp_path / "early")
    monkeypatch.setattr(step, "augment_and_normalise", real)
    params = loop.init_params(build_model(config, 3), config, 0)
    with open_log(tmp_path, config) as log:
        loop.train_phase(
            build_model(config, 3), params, "dense", dataset, with_train(dense=PhaseConfig(steps=4)), tmp_path, log
        )
        monkeypatch.setattr(step, "augment_and_normalise", bad)
        with pytest.raises(HeadSteerError, match=rf"at step 5; the last good checkpoint is {tmp_path}/dense/last/4;"):
            loop.train_phase(build_model(config, 3), params, "dense", dataset, config, tmp_path, log)
    assert Checkpoints(tmp_path / "dense" / "last", 2).latest() == 4


def test_batch_larger_than_the_data(dataset, tmp_path):
    with pytest.raises(HeadSteerError, match=r"config\.train\.batch = 512: must be at most the 96"):
        loop.train_model(with_train(batch=512), dataset, tmp_path)


def test_the_trained_model_tells_what_it_costs(finished):
    """train/test.json: heads save something, and the usage is the mean of the layers'."""
    test = json.loads((finished.workdir / "train" / "test.json").read_text())
    compute = test["compute"]
    assert compute["usage"] == {"heads": pytest.approx(np.mean(test["usage"]))}
    assert compute["share"] == pytest.approx(compute["macs"] / compute["dense_macs"])
    assert 0.5 < compute["share"] < 1.01
    rows = read_log(finished.workdir / "train" / "metrics.jsonl")
    validated = [row for row in rows if "validation_usage" in row]
    assert all(row["phase"] == "gated" and 0.5 < row["validation_macs"] < 1.01 for row in validated)
    assert validated


def test_a_cut_off_last_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"phase": "dense", "step": 1}) + '\n{"phase": "den')
    assert read_log(path) == [{"phase": "dense", "step": 1}]


def test_missing_checkpoint(dataset, finished_training, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(finished_training, directory)
    shutil.rmtree(directory / "gated" / "last")
    with pytest.raises(HeadSteerError, match="no checkpoint"):
        loop.load_trained(with_train(), len(dataset.class_names), directory)


def test_a_model_of_heads_has_no_other_gates(dataset, finished_training):
    """A config with more kinds of gates than its checkpoint is refused in one line that names what is missing."""
    config = with_train()
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"kinds": ("heads", "sublayers")})})
    with pytest.raises(HeadSteerError) as error:
        loop.load_trained(config, len(dataset.class_names), finished_training)
    text = str(error.value)
    assert "another model: it has no array" in text
    assert "layers_1.decide_sublayers, unlike this config's model; use its own config" in text
    assert "\n" not in text


def test_a_checkpoint_knows_its_data(dataset, finished_training, tmp_path):
    directory = shutil.copytree(finished_training, tmp_path / "copy")
    names = ("zebra", *dataset.class_names[1:])
    text = rf"dense/last: the data have changed since this checkpoint: class '{dataset.class_names[0]}' is now 'zebra'"
    with pytest.raises(HeadSteerError, match=text):
        loop.train_model(with_train(), replace(dataset, class_names=names), directory)
    fewer = Split(dataset.train.images[1:], dataset.train.labels[1:])
    with pytest.raises(HeadSteerError, match=r"since this checkpoint: 1 image fewer in train \(class "):
        loop.train_model(with_train(), replace(dataset, train=fewer), directory)


def test_training_that_has_begun_needs_no_backbone(dataset, finished_training, tmp_path):
    directory = shutil.copytree(finished_training, tmp_path / "copy")
    config = with_train()
    gone = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": "gone.safetensors"})})
    loop.train_model(gone, dataset, directory)
    with pytest.raises(HeadSteerError, match=r"gone\.safetensors: no such file"):
        loop.train_model(gone, dataset, tmp_path / "new")


def test_gates_have_a_learning_rate_of_their_own():
    updates = {"params": {"layers_1": {"decide": {"linear": {"kernel": jnp.ones(2)}}, "out": {"kernel": jnp.ones(2)}}}}
    scaled = step.scale_gates(updates, 5.0)["params"]["layers_1"]
    assert scaled["decide"]["linear"]["kernel"].tolist() == [5, 5]
    assert scaled["out"]["kernel"].tolist() == [1, 1]
    assert step.scale_gates(updates, 1.0) is updates


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accumulated_gradients_are_the_batchs(gated):
    """They are equal to rounding without the usage loss, which is not a mean over images."""
    config = with_train()
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"weight": 0.0})})
    images = blobs(32, 0)
    batch = images.images.reshape(2, 16, 8, 8, 1), images.labels.reshape(2, 16)
    found = []
    for parts in (1, 4):
        train = config.train.model_copy(update={"accumulate": parts, "mixup": 0.2})
        one = config.model_copy(update={"train": train})
        model = build_model(one, 3)
        state = loop.init_state(loop.init_params(model, one, 0), "gated", one)
        schedule = step.make_schedule(one.train.gated).cut(0, 2)
        state, metrics = step.make_training_steps(model, one, gated)(state, schedule, *batch)
        names = ("loss", "train_accuracy", "gradient_norm")
        found.append((state.optimizer[1][0].mu, {name: metrics[name] for name in names}))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)


def test_batches_are_the_same_in_the_middle_and_for_any_images_in_memory_or_not(dataset):
    config = tiny_config()
    devices = mesh.training_mesh(config.machine)
    calls = [(0, 2), (2, 4), (4, 5), (5, 8)]
    whole = list(batches.device_batches(dataset.train, config, devices, calls, 3))
    assert [images.shape for images, _ in whole] == [(n, 16, 8, 8, 1) for n in (2, 2, 1, 3)]
    chex.assert_trees_all_equal(list(batches.device_batches(dataset.train, config, devices, calls[2:], 3)), whole[2:])
    lazy = LazyImages(lambda places: (dataset.train.images[i] for i in places), np.arange(96), (8, 8, 1))
    chex.assert_trees_all_equal(
        list(batches.device_batches(Split(lazy, dataset.train.labels), config, devices, calls, 3)), whole
    )
    for (first, end), (_, labels) in zip(calls, whole, strict=True):
        for number, row in zip(range(first, end), labels, strict=True):
            assert np.array_equal(row, dataset.train.labels[batches.batch_indices(96, 16, 0, 3 + number)])


def test_the_log_tells_the_speed_and_a_flag_writes_a_trace(dataset, tmp_path):
    config = with_train(dense_control=False)
    config = config.model_copy(update={"machine": MachineConfig(profile=True, peak_tflops=1.0)})
    loop.train_model(config, dataset, tmp_path)
    rows = read_log(tmp_path / "speed.jsonl")
    assert [row["step"] for row in rows if row["phase"] == "gated"] == [2, 4, 6, 8]
    assert all(row["mfu"] == pytest.approx(row["tflops_per_device"]) and row["images_per_second"] > 0 for row in rows)
    for phase in ("dense", "gated"):
        assert list((tmp_path / "profile" / phase).rglob("*.xplane.pb"))


@pytest.mark.slow
def test_sigterm_in_training_resumes_bit_for_bit(dataset, finished_training, tmp_path, monkeypatch):
    """SIGTERM comes in the third call: that call's last step is saved, and the end equals an uninterrupted run's."""
    config = with_train()
    real, calls = TrainingLog.write, []

    def terminated(self, phase, step, values, name="metrics"):
        calls.append((phase, step))
        if (phase, step) == ("gated", 4) and name == "speed":
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, phase, step, values, name)

    before = signal.getsignal(signal.SIGTERM)
    preemption.install_handler()
    try:
        monkeypatch.setattr(TrainingLog, "write", terminated)
        with pytest.raises(preemption.Preempted):
            loop.train_model(config, dataset, tmp_path / "parts")
        assert Checkpoints(tmp_path / "parts" / "gated" / "last", 2).latest() == 6
        preemption.install_handler()
        monkeypatch.setattr(TrainingLog, "write", real)
        loop.train_model(config, dataset, tmp_path / "parts")
    finally:
        signal.signal(signal.SIGTERM, before)
    whole, parts = (final_states(config, dataset, path) for path in (finished_training, tmp_path / "parts"))
    chex.assert_trees_all_equal(whole, parts)
    assert read_log(finished_training / "metrics.jsonl") == read_log(tmp_path / "parts" / "metrics.jsonl")
