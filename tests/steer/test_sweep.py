"""The sweep's own small parts; its whole is tested by running it (test_cli) and by its pieces (test_steering)."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from builders import CLASSES, setting, split_sweep, steer_config, trained_model
from helpers import environment, watch_progress

from headsteer_jax.config import Config, SteerConfig, SublayerGateConfig
from headsteer_jax.data.dataset import Dataset, Split
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.catalogue import STRATEGIES
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.guess import Guess, fit_temperature
from headsteer_jax.steer.results import BY_LABEL
from headsteer_jax.steer.steering import GateProgram
from headsteer_jax.steer.strategies import LatentStatistics
from headsteer_jax.steer.sweep import (
    Evidence,
    SplitSweep,
    _choose_latents,
    _halve_each_class,
    _prepare_split,
    _sweep_split,
    _top_images,
    _without_fold,
    check_strategies_and_classes,
    check_validation,
    choose_method,
    describe_method,
    describe_unmatched,
    gate_jacobian,
    make_alpha_grid,
    make_split_sweep,
    sweep_by_flips,
    sweep_by_gates,
    sweep_by_suffix,
)
from headsteer_jax.steer.table import Outcomes, Table
from headsteer_jax.steer.tally import Tally, unpack_bits


@pytest.mark.parametrize(("images", "latents", "count"), [(50, 300, 4), (3, 5, 8), (7, 128, 7)])
def test_top_images_are_the_strongest_in_order(images: int, latents: int, count: int) -> None:
    z = np.maximum(np.random.default_rng(0).standard_normal((images, latents)), 0).astype(np.float32)
    found, activations = _top_images(z, count)
    assert found.shape == activations.shape == (latents, min(count, images))
    for latent in range(latents):
        wanted = sorted(z[:, latent].tolist(), reverse=True)[:count]
        assert activations[latent].tolist() == wanted
        assert z[found[latent], latent].tolist() == wanted
        assert len(set(found[latent].tolist())) == min(count, images)


def test_names_are_checked_before_anything_is_computed() -> None:
    none = Split(np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int32))
    dataset = Dataset(none, none, none, ("a", "b"))
    check_strategies_and_classes(Config(steer=SteerConfig(classes=("a",), guess_classes=2)), dataset)
    with pytest.raises(HeadSteerError, match=r"guess_classes = 3: the dataset has only 2 classes"):
        check_strategies_and_classes(Config(steer=SteerConfig(guess_classes=3)), dataset)
    with pytest.raises(HeadSteerError, match=r"config\.steer\.classes: the dataset has no class 'c'; it has a, b$"):
        check_strategies_and_classes(Config(steer=SteerConfig(classes=("a", "c"))), dataset)
    with pytest.raises(HeadSteerError, match=r"config\.steer\.strategies: there is no 'best'"):
        check_strategies_and_classes(Config(steer=SteerConfig(strategies=("best",))), dataset)
    for name in ("superclass", "matched_superclass"):
        superclass = Config(steer=SteerConfig(strategies=(name,)))
        with pytest.raises(HeadSteerError, match=r"'matched_superclass' need superclasses; name them in data\.related"):
            check_strategies_and_classes(superclass, dataset)
        check_strategies_and_classes(superclass, Dataset(none, none, none, ("a", "b"), np.eye(2, dtype=bool)))


def test_what_is_matched_in_another_mode_or_form_is_named() -> None:
    chosen = {name: STRATEGIES[name] for name in ("class", "probe", "gate_bias", "image_random")}
    chosen["mine"] = STRATEGIES["mean_difference"]  # in Python a strategy may have any name
    assert describe_unmatched(chosen, SteerConfig()) is None
    for fields in ({"mode": "scale"}, {"form": "replace"}):
        line = describe_unmatched(chosen, SteerConfig(**fields))
        assert line is not None
        assert line.startswith("sweep: probe, image_random, mine: ")
        assert next(iter(fields.values())) in line
    assert describe_unmatched({"class": STRATEGIES["class"]}, SteerConfig(mode="clamp")) is None


def test_a_class_with_too_few_validation_images_is_named() -> None:
    few = Split(np.zeros((7, 1, 1, 1), np.uint8), np.array([0, 0, 0, 1, 1, 2, 2], np.int32))
    check_validation(few, Config(steer=SteerConfig(least_validation=2)), ("a", "b", "c"))
    check_validation(few, Config(steer=SteerConfig(least_validation=3, classes=("a",))), ("a", "b", "c"))
    with pytest.raises(
        HeadSteerError, match=r"validation: 2 images of class 'b' are too few .*data\.validation_fraction"
    ):
        check_validation(few, Config(steer=SteerConfig(least_validation=3)), ("a", "b", "c"))


def test_the_half_that_scores_alpha_did_not_choose_the_latents() -> None:
    labels = np.array([0, 1, 0, 1, 0, 0, 1])
    folds = _halve_each_class(labels)
    for label in (0, 1):
        assert abs(int((folds[labels == label] == 0).sum()) - int((folds[labels == label] == 1).sum())) <= 1
    train = Outcomes(np.zeros(2), np.zeros((2, 3)), np.zeros((2, 8), bool), np.zeros(2, int))
    validation = Outcomes(labels, np.arange(21).reshape(7, 3), np.zeros((7, 8), bool), np.zeros(7, int))
    stats = LatentStatistics(*np.zeros((4, 1)), outcomes=(train, validation))
    for fold in (0, 1):
        seen = _without_fold(stats, folds, fold).outcomes
        assert seen[0] is train
        assert set(seen[1].gate_logits[:, 0] // 3) == set(np.flatnonzero(folds != fold))


KINDS = ("heads", "sublayers", "tokens")


@pytest.mark.parametrize(
    ("mode", "weights", "kinds"),
    [
        *(
            (mode, weights, ("heads",))
            for mode in ("add", "scale", "clamp", "ablate")
            for weights in ((0.5, 2.0), (-2.0, 2.0))
        ),
        ("add", (-2.0, 2.0), KINDS),
        ("scale", (0.5, 2.0), KINDS),
        ("add", (0.5, 2.0), ("sublayers",)),
    ],
)
def test_every_method_gives_the_same_tallies(split, mode, weights, kinds):
    """In closed form, by the gate itself, and by the layers from the steered one on: bit for bit, count for count."""
    sublayers = SublayerGateConfig(bias=0.0, threshold=0.45)
    config = steer_config(mode=mode, gate={"kinds": kinds, "sublayers": sublayers})
    job, trained, effects = split_sweep(config, split, weights)
    gates = GateProgram(trained)
    alphas = np.unique(np.concatenate([np.linspace(-6, 6, 13), [0.25, -0.25]]))
    found = [
        list(sweep_by_gates(job, alphas, gates, CLASSES)),
        list(sweep_by_suffix(job, alphas, trained, CLASSES)),
    ]
    if mode == "add":
        found.append(list(sweep_by_flips(job, alphas, gates, effects, CLASSES)))
    wanted = {(s, g): tallies for s, g, tallies, _ in found[0]}
    assert sorted(wanted) == list(np.ndindex(2, 4))
    for swept in found[1:]:
        assert sorted((s, g) for s, g, *_ in swept) == sorted(wanted)
        for s, g, tallies, _ in swept:
            for ours, theirs in zip(tallies, wanted[s, g], strict=True):
                for field, values in ours._asdict().items():
                    np.testing.assert_array_equal(values, getattr(theirs, field), field)
    by_label, by_prediction = wanted[0, 0]
    assert not np.array_equal(by_label.gates, by_prediction.gates)
    assert len({row.tobytes() for row in by_label.gates}) > 2


@pytest.mark.parametrize("method", ["flips", "gates", "suffix"])
def test_an_unsure_image_is_steered_by_its_label_only(split: Split, method: str) -> None:
    """By predicted class it keeps its unsteered gates and answer; a strategy that needs no class never does."""
    job, trained, effects = split_sweep(steer_config(), split, (0.5, 2.0))
    least = float(np.median(job.table.confidence))
    sure, alphas, program = job.table.confidence >= least, np.array([0.0, 1.0, 4.0]), GateProgram(trained)
    rows = (job.split, job.table, job.steered, 0, job.rows.size[:90])
    limited = make_split_sweep("test", *rows, frozenset({3}), frozenset({1}), least)

    def sweep(job: SplitSweep) -> dict[tuple[int, int], list[Tally]]:
        swept = {
            "flips": lambda: sweep_by_flips(job, alphas, program, effects, CLASSES),
            "gates": lambda: sweep_by_gates(job, alphas, program, CLASSES),
            "suffix": lambda: sweep_by_suffix(job, alphas, trained, CLASSES),
        }[method]()
        return {(s, g): tallies for s, g, tallies, _ in swept}

    before, after, changed = sweep(job), sweep(limited), 0
    unsteered = pattern_to_gates(job.table.pattern, 3).T
    for (s, g), tallies in after.items():
        by_label, by_prediction = before[s, g]
        np.testing.assert_array_equal(tallies[0].gates, by_label.gates)
        if g in (1, 3):
            np.testing.assert_array_equal(tallies[1].gates, by_label.gates)
            continue
        found, always = (unpack_bits(tally.gates, 90) for tally in (tallies[1], by_prediction))
        np.testing.assert_array_equal(found, np.where(sure, always, unsteered))
        right, right_always = (unpack_bits(tally.right, 90) for tally in (tallies[1], by_prediction))
        np.testing.assert_array_equal(right, np.where(sure, right_always, job.unsteered_right))
        assert tallies[1].correct.sum() == right.sum()
        changed += (always != unsteered)[..., ~sure].sum()
    assert changed


def test_no_image_of_validation_steers_itself() -> None:
    """Only images of the first half can do without head 0, and only those of the second half without head 1.

    So a choice that was made with the first half pushes head 0 down, and it may steer images of the second half alone.
    The same with a temperature: the first half's guesses are all right, the second half's are all wrong.
    """
    labels = np.repeat([0, 1], 20).astype(np.int32)
    fold = _halve_each_class(labels)
    right = np.zeros((40, 8), bool)
    right[:, 7] = True
    right[fold == 0, 6] = True  # without head 0
    right[fold == 1, 5] = True
    validation = Outcomes(labels, np.ones((40, 3)), right, np.full(40, 7))
    nothing = Outcomes(*(field[:0] for field in validation))
    config = steer_config(alphas=(1.0,), price=0.5)
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"seeds": 1})})
    x = np.zeros((40, 24), np.float32)
    x[:, 5] = 2.0 * labels - 1
    signs = np.stack([-np.eye(24)[5], np.eye(24)[5]])
    guess = Guess(signs, np.zeros(2), x @ signs.T, np.where(fold == 0, labels, 1 - labels))
    split = Split(np.zeros((40, 8, 8, 1), np.uint8), labels)
    trained, sae = trained_model(config, 2), setting().sae
    several = Autoencoder(jax.tree.map(lambda leaf: leaf[None], sae.weights), sae.scaling, sae.k)
    run = RunData(trained, Dataset(split, split, split, ("a", "b")), several, x)
    strategies = {name: STRATEGIES[name] for name in ("gate_bias", "guessed_bias")}
    chosen = _choose_latents(run, strategies, Evidence((nothing, validation), guess=guess), fold)
    table = Table(
        x, np.ones((40, 3), np.float32), np.full(40, 7), 1 - labels, np.zeros((40, 8), int), np.full(40, 4),
        np.ones(40), np.zeros(40),
    )  # fmt: skip
    job = _prepare_split(trained, ("validation", split, table), x, chosen, strategies, fold)
    gate, closed = gate_jacobian(trained, x), -1.0  # gate logits are 1
    for y, g in np.ndindex(2, 2):
        push_N3 = job.steered[0][g].choice.directions[job.class_of(y, g)] @ gate
        assert (push_N3[fold == 0, 1] < closed).all()  # chosen with the second half
        assert (push_N3[fold == 1, 0] < closed).all()
        np.testing.assert_allclose(push_N3[fold == 0, 0], 0, atol=1e-5)
        np.testing.assert_allclose(push_N3[fold == 1, 1], 0, atol=1e-5)
    on_test = _prepare_split(trained, ("test", split, table), x, chosen, strategies, fold)
    for g in (0, 1):
        push_N3 = on_test.steered[0][g].choice.directions[on_test.class_of(BY_LABEL, g)] @ gate
        assert len(np.unique(push_N3.round(4), axis=0)) == 1  # chosen with all of validation


def test_the_temperature_of_a_guess_was_not_fitted_on_the_images_that_it_is_scored_on() -> None:
    labels = np.repeat([0, 1], 20)
    fold = _halve_each_class(labels)
    logits = np.stack([1.0 - 2 * labels, 2.0 * labels - 1], axis=1)
    outcomes = Outcomes(labels, np.ones((40, 3)), np.ones((40, 8), bool), np.full(40, 7))
    guess = Guess(np.zeros((2, 24)), np.zeros(2), logits, np.where(fold == 0, labels, 1 - labels))
    stats = LatentStatistics(*np.zeros((4, 1)), outcomes=(outcomes, outcomes), guess=guess)
    right, wrong = (_without_fold(stats, fold, left_out).guess for left_out in (1, 0))
    assert fit_temperature(right.logits, right.labels) < 1  # the first half is guessed right
    assert fit_temperature(wrong.logits, wrong.labels) > 100


def test_the_model_decides_at_the_flips_themselves(split):
    """On a grid made of flips, rounded to float32, the closed form knows nothing; the result is still the gate's."""
    config = steer_config()
    job, trained, effects = split_sweep(config, split, (-2.0, 2.0))
    gates = GateProgram(trained)
    *_, flips = next(sweep_by_flips(job, np.array([0.0, 1.0]), gates, effects, CLASSES))
    alphas = np.unique(np.concatenate([[0.0], np.float32(flips.alpha[np.abs(flips.alpha) < 50][:150])]).astype(float))
    assert len(alphas) > 100
    s, g, tallies, _ = next(sweep_by_flips(job, alphas, gates, effects, CLASSES))
    s_, g_, wanted, _ = next(sweep_by_gates(job, alphas, gates, CLASSES))
    assert (s, g) == (s_, g_)
    for ours, theirs in zip(tallies, wanted, strict=True):
        for field, values in ours._asdict().items():
            np.testing.assert_array_equal(values, getattr(theirs, field), field)


def test_the_method_is_chosen_and_described() -> None:
    assert choose_method(steer_config()) == "flips"
    assert describe_method(steer_config()).endswith("look-ups among 2^3 = 8 gate patterns; exact in alpha")
    assert "among 2^5 = 32 gate patterns" in describe_method(steer_config(gate={"kinds": ("heads", "sublayers")}))
    assert choose_method(steer_config(mode="clamp")) == "gates"
    assert "the gate is computed for every alpha (clamp in delta form)" in describe_method(steer_config(mode="clamp"))
    assert choose_method(steer_config(target="residual")) == "suffix"
    assert "the layers from 2 on run for every setting, because steer.target is residual" in describe_method(
        steer_config(target="residual")
    )
    many = steer_config()
    many = many.model_copy(update={"model": many.model.model_copy(update={"heads": 13, "width": 26})})
    assert choose_method(many) == "suffix"
    assert "13 heads are too many for a table" in describe_method(many)
    normed = steer_config()
    normed = normed.model_copy(update={"gate": normed.gate.model_copy(update={"layer_norm": True})})
    assert choose_method(normed) == "gates"
    assert "the gate has a LayerNorm" in describe_method(normed)


def test_zero_is_added_to_the_grid() -> None:
    np.testing.assert_array_equal(make_alpha_grid(steer_config(alphas=(3.0, -1.0)).steer), [-1, 0, 3])


DIGEST = """
import hashlib, sys
import jax, numpy as np
from builders import CLASSES, split_sweep, steer_config
from headsteer_jax.data.dataset import Split
from headsteer_jax.steer.steering import GateProgram
from headsteer_jax.steer.sweep import sweep_by_flips, sweep_by_suffix

assert jax.device_count() == int(sys.argv[1])
rng = np.random.default_rng(3)
labels = (np.arange(90) % CLASSES).astype(np.int32)
split = Split(rng.integers(0, 256, (90, 8, 8, 1), dtype=np.uint8), labels)
config = steer_config(chunk=16)
job, trained, effects = split_sweep(config, split, (-2.0, 2.0))
alphas, digest = np.linspace(-6, 6, 13), hashlib.sha256(job.table.x.tobytes() + job.table.answers.tobytes())
gates = GateProgram(trained)
methods = [sweep_by_flips(job, alphas, gates, effects, CLASSES)]
methods.append(sweep_by_suffix(job, alphas, trained, CLASSES))
for swept in methods:
    for _, _, tallies, _ in swept:
        for tally in tallies:
            for values in tally:
                digest.update(values.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_devices() -> None:
    """One and three simulated devices, the last chunk not full: the same bits."""
    found = []
    for devices in (1, 3):
        command = [sys.executable, "-c", DIGEST, str(devices)]
        result = subprocess.run(command, env=environment(devices), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        found.append(result.stdout)
    assert found[0] == found[1]


def test_the_progress_shows_the_accuracy_and_the_usage_at_the_last_alpha(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, config, alphas = watch_progress(monkeypatch), steer_config(), np.array([-1.0, 0.0, 4.0], np.float32)
    job, trained, _ = split_sweep(config, split, (0.5, 2.0))
    program, gates = GateProgram(trained), LayerGates(config, config.sae_layer)
    del notes[:]  # of the table
    result, _ = _sweep_split(job, lambda job: sweep_by_gates(job, alphas, program, CLASSES), gates, 3, CLASSES)
    order = [(s.strategy, s.seed) for s in sweep_by_gates(job, alphas, program, CLASSES)]
    assert len(notes) == len(order) > 0
    for note, (strategy, seed) in zip(notes, order, strict=True):
        accuracy = result.correct[strategy, seed, BY_LABEL, -1].sum() / len(split.labels)
        usage = result.heads_on[strategy, seed, BY_LABEL, -1].sum() / len(split.labels) / gates.count
        assert note == f"last alpha: accuracy {accuracy:.1%}, usage {usage:.2f}"
