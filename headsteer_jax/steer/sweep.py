"""The steering experiment: every strategy, seed and alpha on the validation and the test split, as counts and bits.

Latents are chosen on the training split. Nothing is chosen here: `summary` does, on validation alone. How a setting's
gates and answers are found is decided by `choose_method`, and said.
Axes: G strategies, S seeds, Y ways to name the class, A alphas, N images, R rows (an image with the class that steers
it), C classes, H heads, F latents.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_array

from headsteer_jax.config.schema import MOST_HEADS, Config, SteerConfig
from headsteer_jax.data.dataset import Split, check_classes
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.passes import Program
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae.autoencoder import Autoencoder, encode_split
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.flips import Flips, GateEffect, Rows, find_flips, gate_effect, is_affine_in_alpha
from headsteer_jax.steer.steering import GateProgram, Steering, run_suffix
from headsteer_jax.steer.strategies import (
    Choice,
    LatentStatistics,
    Outcomes,
    Strategy,
    find_strategy,
    gate_aligned_latents,
    latent_overlap,
    latent_statistics,
)
from headsteer_jax.steer.table import Table, compile_table_program, fill_table, list_patterns, pattern_to_gates
from headsteer_jax.steer.tally import (
    Answers,
    StepFunction,
    Tally,
    class_counts,
    exact_step_function,
    pack_bits,
    place_on_grid,
    tally_flips,
    tally_gates,
)

logger = logging.getLogger(__name__)

NAMED_BY = ("true", "predicted")  # the class that steers an image: its label, or what the unsteered model says
Arrays = dict[str, np.ndarray]
Method = Literal["flips", "gates", "suffix"]


def choose_method(config: Config) -> Method:
    """How settings are evaluated: the cheapest way that is exact for this config.

    flips: the gates' flips in closed form, answers from the table; gates: the steered residual goes through the gate
    for every alpha, answers from the table; suffix: the layers from the steered one on run for every setting.
    """
    if config.steer.target == "residual" or config.model.heads > MOST_HEADS:
        return "suffix"
    return "flips" if is_affine_in_alpha(config.steer, config.gate.layer_norm) else "gates"


def describe_method(config: Config) -> str:
    """The way that was chosen, for the log."""
    heads, steer = config.model.heads, config.steer
    if choose_method(config) == "suffix":
        reason = "target is residual" if steer.target == "residual" else f"{heads} heads are too many for a table"
        return f"sweep: the layers from {config.sae_layer} on run for every setting, as {reason}"
    table = f"sweep: one pass, then look-ups among 2^{heads} = {2**heads} gate patterns"
    if choose_method(config) == "flips":
        return f"{table}; exact in alpha"
    reason = "the gate has a LayerNorm" if config.gate.layer_norm else f"{steer.mode} in {steer.form} form"
    return f"{table}; the gate is computed for every alpha ({reason})"


def make_alpha_grid(config: SteerConfig) -> np.ndarray:
    """[A] float64, sorted, with 0: the unsteered model is part of every sweep."""
    return np.unique(np.array([0.0, *config.alphas]))


def check_strategies_and_classes(config: Config, class_names: tuple[str, ...]) -> None:
    """Raises HeadSteerError for a strategy or a class that does not exist, before anything is computed."""
    for name in config.steer.strategies:
        find_strategy(name)
    check_classes("config.steer.classes", config.steer.classes, class_names)


def _select_classes(split: Split, config: Config, class_names: tuple[str, ...]) -> Split:
    """The images of config.steer.classes, or all."""
    if not config.steer.classes:
        return split
    wanted = np.isin(split.labels, [class_names.index(name) for name in config.steer.classes])
    return Split(split.images[np.flatnonzero(wanted)], split.labels[wanted])


def _top_images(z_NF: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[F, count] the training images that activate each latent most, strongest first, and the activations there."""
    count = min(count, len(z_NF))
    some = np.array_split(z_NF, -(-z_NF.shape[1] // 128), axis=1)  # the indices of all at once would be large
    top_KF = np.concatenate([np.argpartition(-z_Nf, count - 1, axis=0)[:count] for z_Nf in some], axis=1)
    order = np.argsort(-np.take_along_axis(z_NF, top_KF, axis=0), axis=0, kind="stable")
    top_KF = np.take_along_axis(top_KF, order, axis=0)
    return top_KF.T.astype(np.int32), np.take_along_axis(z_NF, top_KF, axis=0).T


def _unsteered(split: str, table: Table, labels: np.ndarray, classes: int, heads: int) -> Arrays:
    return {
        f"{split}_labels": labels.astype(np.int32),
        f"{split}_count": np.bincount(labels, minlength=classes),
        f"{split}_pattern": table.pattern,
        f"{split}_prediction": table.prediction,
        f"{split}_table": table.answers,
        f"{split}_unsteered_correct": class_counts(table.prediction == labels, labels, classes),
        f"{split}_unsteered_heads_on": class_counts(pattern_to_gates(table.pattern, heads).T, labels, classes).T,
    }


def _halve_each_class(labels: np.ndarray) -> np.ndarray:
    """[N] 0 or 1: every class's images in two halves, by turns."""
    fold_N = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        fold_N[members] = np.arange(len(members)) % 2
    return fold_N


def _without_fold(stats: LatentStatistics, fold_N: np.ndarray, fold: int) -> LatentStatistics:
    """What a strategy sees that is to be scored on one half of validation: that half is left out.

    So alpha is chosen on images that did not choose the latents.
    """
    if not stats.outcomes:
        return stats
    train, validation = stats.outcomes
    return stats._replace(outcomes=(train, Outcomes(*(field[fold_N != fold] for field in validation))))


def check_validation(split: Split, config: Config, class_names: tuple[str, ...]) -> None:
    """Raises HeadSteerError where a steered class has too few validation images for the choice of alpha."""
    wanted = config.steer.classes or class_names
    counts = np.bincount(split.labels, minlength=len(class_names))
    for name in wanted:
        count, least = counts[class_names.index(name)], config.steer.least_validation
        if count < least:
            raise HeadSteerError(
                f"validation: {count} images of class {name!r} are too few to choose alpha on; raise "
                f"data.validation_fraction, or lower steer.least_validation = {least}"
            )


def _pattern_evidence(
    run: RunData, wanted: bool, program: Program, table: Table, validation: Split
) -> tuple[Outcomes, ...]:
    """What gate_aligned looks at: steer.evidence training images of each class, and the validation split.

    The training images are looked at only where it is wanted; with more heads than a table holds there is nothing.
    """
    config, dataset = run.trained.config, run.dataset
    labels, heads = dataset.train.labels, config.model.heads
    if heads > MOST_HEADS:
        return ()
    count = config.steer.evidence * wanted
    some = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(dataset.class_names))])
    split = Split(dataset.train.images[some], labels[some])
    if len(some):
        seen = fill_table(program, run.trained.params, split, "train: every gate pattern")
        logits, right = seen.gate_logits, seen.answers == split.labels[:, None]
    else:
        logits, right = np.zeros((0, heads), np.float32), np.zeros((0, 2**heads), bool)
    return (
        Outcomes(split.labels, logits, right),
        Outcomes(validation.labels, table.gate_logits, table.answers == validation.labels[:, None]),
    )


class SplitSweep(NamedTuple):
    """One split and everything that steers it."""

    name: str  # of the split
    split: Split
    table: Table
    rows: Rows  # each image by its label, then by its predicted class where that is another one
    used: tuple[np.ndarray, np.ndarray]  # [R] bool: the rows of each way to name the class, one for each image
    steered: list[list[Steering]]  # [S][G]

    def class_of(self, y: int) -> np.ndarray:
        """[N] what steers each image, as a row of the choices."""
        used = np.flatnonzero(self.used[y])
        steered_by = np.empty(len(self.split.labels), np.int64)
        steered_by[self.rows.image[used]] = self.rows.steered_by[used]
        return steered_by

    @property
    def answers(self) -> Answers:
        labels = self.split.labels
        return Answers(labels, self.table.pattern.astype(np.int64), self.table.answers == labels[:, None])


def make_split_sweep(
    name: str, split: Split, table: Table, steered: list[list[Steering]], offset: np.ndarray | int, size_NH: np.ndarray
) -> SplitSweep:
    """Args:
    offset: added to each image's class: the row of the choices that steers it.
    size_NH: |x| |W| + |b|.
    """
    count, labels = len(split.labels), split.labels
    other = np.flatnonzero(table.prediction != labels)
    image = np.concatenate([np.arange(count), other])
    steered_by = np.concatenate([labels, table.prediction[other]]) + np.broadcast_to(offset, count)[image]
    true = np.arange(len(image)) < count
    predicted = ~true
    predicted[:count] = table.prediction == labels
    none = np.zeros(0, np.int64)
    rows = Rows(image, steered_by, table.gate_logits[image], size_NH[image], (none, none, none))
    return SplitSweep(name, split, table, rows, (true, predicted), steered)


def find_active_latents(
    sae: Autoencoder, x_ND: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, latent and activation wherever a latent is active in one of the rows; rows ascend."""
    z_RF = csr_array(encode_split(sae, x_ND, chunk=1000))[image]
    return np.repeat(np.arange(len(image)), np.diff(z_RF.indptr)), z_RF.indices, z_RF.data


SettingTallies = Iterator[
    tuple[int, int, list[Tally], Flips | None]
]  # seed, strategy, a tally for each way to name the class


def sweep_by_flips(
    job: SplitSweep, alphas: np.ndarray, program: GateProgram, effects: list[GateEffect], classes: int
) -> SettingTallies:
    """Every setting from the closed form; what lies within float32's rounding is decided by the model itself."""
    answers = job.answers
    rows = [
        job.rows._replace(active=find_active_latents(row[0].sae, job.table.x, job.rows.image)) for row in job.steered
    ]

    def one(place: tuple[int, int]) -> tuple[list[Tally], Flips]:
        s, g = place
        steering = job.steered[s][g]
        flips = find_flips(rows[s], steering.choice, steering.strength, effects[s])
        grid = place_on_grid(flips, alphas)
        decided = program(
            steering, job.table.x[job.rows.image[grid.unsure_row]], job.rows.steered_by[grid.unsure_row],
            alphas[grid.unsure_place], each=True,
        )  # fmt: skip
        return [tally_flips(grid, decided, rows[s], used, answers, alphas, classes) for used in job.used], flips

    places = list(np.ndindex(len(job.steered), len(job.steered[0])))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for (s, g), (tallies, flips) in zip(places, threads.map(one, places), strict=True):
            yield s, g, tallies, flips


def sweep_by_gates(job: SplitSweep, alphas: np.ndarray, program: GateProgram, classes: int) -> SettingTallies:
    """Every setting by the gate itself, and the table."""
    heads, labels, rows = job.rows.gate_logits.shape[1], job.split.labels, job.rows
    was = job.table.prediction == labels
    for s, row in enumerate(job.steered):
        for g, steering in enumerate(row):
            pattern_AR = program(steering, job.table.x[rows.image], rows.steered_by, alphas)
            tallies = []
            for used in job.used:
                own = np.flatnonzero(used)
                own = own[np.argsort(rows.image[own])]
                right_AN = job.table.answers[rows.image[own], pattern_AR[:, own]] == labels
                tallies.append(tally_gates(pattern_to_gates(pattern_AR[:, own], heads), right_AN, was, labels, classes))
            yield s, g, tallies, None


def sweep_by_suffix(job: SplitSweep, alphas: np.ndarray, trained: TrainedModel, classes: int) -> SettingTallies:
    """Every setting by the layers from the steered one on."""
    labels, was = job.split.labels, job.table.prediction == job.split.labels
    by_class = [job.class_of(y) for y in range(len(NAMED_BY))]
    strategies = range(len(job.steered[0]))
    widths = {g: job.steered[0][g].choice.latents.shape[1] for g in strategies}
    for width in sorted(set(widths.values())):  # programs differ by the number of latents
        own = [(s, g) for s in range(len(job.steered)) for g in strategies if widths[g] == width]
        settings = [
            ({trained.config.sae_layer: job.steered[s][g]}, by_class[y]) for s, g in own for y in range(len(NAMED_BY))
        ]
        gates, predictions = run_suffix(trained, job.split, settings, alphas, f"{job.name}: every setting")
        for number, (s, g) in enumerate(own):
            tallies = []
            for v in range(number * len(NAMED_BY), (number + 1) * len(NAMED_BY)):
                tallies.append(tally_gates(gates[v, :, :, 0], predictions[v] == labels, was, labels, classes))
            yield s, g, tallies, None


def run_sweep(run: RunData, strategies: Mapping[str, Strategy]) -> tuple[Arrays, dict[str, dict[str, StepFunction]]]:
    """Run the whole sweep.

    Args:
      strategies: by the names that they have in the result.

    Returns:
      The arrays of sweep.nc (docs/outputs.md names each), and, where alpha is exact, for each split and strategy
      accuracy and usage as functions of it, over all seeds, steered by the label.
    """
    trained, dataset, x_train, config = run.trained, run.dataset, run.x_train, run.trained.config
    steer, classes, heads, how = config.steer, len(dataset.class_names), config.model.heads, choose_method(config)
    alphas, names = make_alpha_grid(steer), tuple(strategies)
    logger.info(describe_method(config))
    if 0 not in steer.alphas:
        logger.info("sweep: alpha 0, the unsteered model, is added to config.steer.alphas")
    splits = {
        "validation": _select_classes(dataset.validation, config, dataset.class_names),
        "test": _select_classes(dataset.test, config, dataset.class_names),
    }
    arrays: Arrays = {
        "strategies": np.array(names), "named_by": np.array(NAMED_BY), "alphas": alphas,
        "class_names": np.array(dataset.class_names), "subset": list_patterns(config),
    }  # fmt: skip
    if dataset.related is not None:
        arrays["related"] = dataset.related
    program = compile_table_program(trained, splits["test"])
    tables = {
        name: fill_table(program, trained.params, split, f"{name}: every gate pattern")
        for name, split in splits.items()
    }
    for name, split in splits.items():
        arrays |= _unsteered(name, tables[name], split.labels, classes, heads)

    aligned = any(one is gate_aligned_latents for one in strategies.values())
    evidence = _pattern_evidence(run, aligned, program, tables["validation"], splits["validation"])
    gate_DH = gate_jacobian(trained, x_train)
    fold_N = _halve_each_class(splits["validation"].labels)
    chosen: list[list[Steering]] = []  # [S][G]
    crossed: list[list[Steering]] = []  # the same with 2 C rows of choices, for validation
    effects, frequencies = [], []
    for seed in range(config.sae.seeds):
        sae = run.autoencoders.member(seed)
        z_NF = encode_split(sae, x_train)
        stats = latent_statistics(
            z_NF, dataset.train.labels, classes, sae.decoder, gate_DH, evidence, dataset.class_names
        )
        seen = [stats, *(_without_fold(stats, fold_N, fold) for fold in (0, 1))]
        chosen.append([])
        crossed.append([])
        for number, choose in enumerate(strategies.values()):
            rngs = (np.random.default_rng([config.seed, 3, seed, number]) for _ in seen)
            choice, *halves = (choose(one, steer, rng) for one, rng in zip(seen, rngs, strict=True))
            both = Choice(*(np.concatenate(part) for part in zip(*halves, strict=True)))
            chosen[-1].append(Steering(sae, stats.strength, choice))
            crossed[-1].append(Steering(sae, stats.strength, both))
        effects.append(gate_effect(sae.decoder, gate_DH, max(one.choice.latents.shape[1] for one in chosen[-1])))
        frequencies.append(stats.frequency)
        if seed == 0:
            arrays["top_images"], arrays["top_activations"] = _top_images(z_NF, config.report.top_images)
            arrays["class_frequency"] = stats.class_frequency.astype(np.float32)
    arrays |= {"frequency": np.stack(frequencies)} | _stack_choices(chosen)

    gates = GateProgram(trained)
    steps: dict[str, dict[str, StepFunction]] = {}
    for name, split in splits.items():
        steered, offset = (crossed, classes * fold_N) if name == "validation" else (chosen, 0)
        size_NH = np.zeros_like(tables[name].gate_logits)
        if how == "flips":
            linear = jax.tree.map(
                np.asarray, trained.params["params"][f"layers_{config.sae_layer}"]["decide"]["linear"]
            )
            size_NH = np.abs(tables[name].x) @ np.abs(linear["kernel"]) + np.abs(linear["bias"])
        job = make_split_sweep(name, split, tables[name], steered, offset, size_NH)
        if how == "flips":
            swept = sweep_by_flips(job, alphas, gates, effects, classes)
        elif how == "gates":
            swept = sweep_by_gates(job, alphas, gates, classes)
        else:
            swept = sweep_by_suffix(job, alphas, trained, classes)
        shape = (len(names), config.sae.seeds, len(NAMED_BY))
        found: Arrays = {}
        flips: dict[tuple[int, int], Flips] = {}
        with progress(shape[0] * shape[1], f"{name}: sweep of {len(alphas)} alphas", "setting") as bar:
            for s, g, tallies, own in swept:
                for y, tally in enumerate(tallies):
                    for field, values in tally._asdict().items():
                        key = f"{name}_{field}"
                        if key not in found:
                            found[key] = np.zeros((*shape, *values.shape), values.dtype)
                        found[key][g, s, y] = values
                if own is not None:
                    flips[g, s] = own
                bar.update(1)
        before = pack_bits(tables[name].prediction == split.labels)
        lost = arrays[f"{name}_unsteered_correct"] + found[f"{name}_gained"] - found[f"{name}_correct"]
        arrays |= found | {f"{name}_lost": lost, f"{name}_unsteered_right": before}
        if flips:
            answers = job.answers
            steps[name] = {
                one: exact_step_function(
                    [(flips[g, s], job.rows, job.used[0], answers) for s in range(config.sae.seeds)]
                )
                for g, one in enumerate(names)
            }
    by_name = {one: arrays["latents"][g] for g, one in enumerate(names)}  # [S, C, K]
    if "class" in by_name:
        arrays["overlap_class_class"] = np.stack([latent_overlap(one, one) for one in by_name["class"]])
    if "class" in by_name and "global" in by_name:
        pairs = zip(by_name["global"], by_name["class"], strict=True)
        arrays["overlap_global_class"] = np.stack([latent_overlap(g[:1], c)[0] for g, c in pairs])
    return arrays, steps


def gate_jacobian(trained: TrainedModel, x_ND: np.ndarray) -> np.ndarray:
    """[D, H] derivative of the gate logits at the mean residual: the gate's weights, unless it has a LayerNorm."""
    model, params, layer = trained.model, trained.params, trained.config.sae_layer
    gate = jax.jacobian(lambda x_D: model.apply(params, x_D[None], layer, method="gate_logits")[0])
    return np.asarray(gate(jnp.asarray(x_ND.mean(axis=0, dtype=np.float64), jnp.float32))).T


def _stack_choices(chosen: list[list[Steering]]) -> Arrays:
    """Latents and weights [G, S, C, most]: strategies that choose fewer latents are filled with -1 and 0."""
    most = max(one.choice.latents.shape[1] for one in chosen[0])
    filled: Arrays = {}
    for part, (name, rest) in enumerate((("latents", -1), ("weights", 0))):
        rows = [[one.choice[part] for one in row] for row in chosen]
        filled[name] = np.stack(
            [
                np.stack([np.pad(a, ((0, 0), (0, most - a.shape[1])), constant_values=rest) for a in row])
                for row in rows
            ],
            axis=1,
        )
    return filled
