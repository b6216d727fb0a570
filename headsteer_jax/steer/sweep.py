"""The steering experiment: every strategy, seed and alpha on the validation and the test split, as counts and bits.

Latents are chosen on the training split. Alpha is not chosen here but by `analysis.summary`, on validation alone.
`choose_method` decides how a setting's gates and answers are found, and the log says so.

Axes: G strategies, S seeds, Y ways to name the class, A alphas, N images, R rows (an image with the class that steers
it), C classes, H gates of the steered layer (its heads, then attention and the MLP, as far as it gates them), F
latents.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import vstack

from headsteer_jax.config.schema import Config, SteerConfig
from headsteer_jax.data.dataset import Split, check_classes
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.gates import threshold_logit
from headsteer_jax.model.passes import Program
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae.autoencoder import Autoencoder, encode_chunks, encode_split, row_slices
from headsteer_jax.sae.latents import INSPECTED_IMAGES
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.flips import Flips, GateEffect, Rows, find_flips, gate_effect, is_affine_in_alpha
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.results import BY_LABEL, NAMED_BY, SplitResult, SweepResult
from headsteer_jax.steer.steering import GateProgram, Steering, replicate_once
from headsteer_jax.steer.strategies import (
    Choice,
    LatentStatistics,
    Strategy,
    find_strategy,
    gate_aligned_latents,
    latent_overlap,
    latent_statistics,
)
from headsteer_jax.steer.suffix import SuffixSetting, run_suffix
from headsteer_jax.steer.table import (
    Outcomes,
    Table,
    compile_table_program,
    fill_table,
    list_patterns,
)
from headsteer_jax.steer.tally import (
    StepFunction,
    TalliedFlips,
    Tally,
    class_counts,
    exact_step_function,
    pack_bits,
    place_on_grid,
    sum_class_macs,
    tally_flips,
    tally_gates,
)

logger = logging.getLogger(__name__)

Method = Literal["flips", "gates", "suffix"]
# the module of a block that decides each kind of gates that reads the CLS residual
DECIDED_BY = {"heads": "decide", "sublayers": "decide_sublayers"}


def choose_method(config: Config) -> Method:
    """Choose how settings are evaluated: by the cheapest method that is exact for this config.

    flips: the gates' flips in closed form, answers from the table; gates: the steered residual goes through the gate
    for every alpha, answers from the table; suffix: the layers from the steered one on run for every setting.
    """
    if config.steer.target == "residual" or not LayerGates(config, config.sae_layer).fits_table:
        return "suffix"
    return "flips" if is_affine_in_alpha(config.steer, config.gate.layer_norm) else "gates"


def describe_method(config: Config) -> str:
    """Describe the method that is used for a config, for the log."""
    gates, steer = LayerGates(config, config.sae_layer), config.steer
    if choose_method(config) == "suffix":
        too_many = f"{gates.heads} heads are too many for a table"
        reason = "steer.target is residual" if steer.target == "residual" else too_many
        return f"sweep: the layers from {config.sae_layer} on run for every setting, because {reason}"
    table = f"sweep: one pass, then look-ups among 2^{gates.count} = {2**gates.count} gate patterns"
    if choose_method(config) == "flips":
        return f"{table}; exact in alpha"
    reason = "the gate has a LayerNorm" if config.gate.layer_norm else f"{steer.mode} in {steer.form} form"
    return f"{table}; the gate is computed for every alpha ({reason})"


def make_alpha_grid(config: SteerConfig) -> np.ndarray:
    """Return the [A] float64 alphas, sorted, with 0: the unsteered model is part of every sweep."""
    return np.unique(np.array([0.0, *config.alphas]))


def check_strategies_and_classes(config: Config, class_names: tuple[str, ...]) -> None:
    """Check that every strategy and class exists, before anything is computed; raises HeadSteerError."""
    for name in config.steer.strategies:
        find_strategy(name)
    check_classes("config.steer.classes", config.steer.classes, class_names)


def select_classes(split: Split, config: Config, class_names: tuple[str, ...]) -> Split:
    """Keep the images of config.steer.classes, or all images if it is empty."""
    if not config.steer.classes:
        return split
    selected = np.isin(split.labels, [class_names.index(name) for name in config.steer.classes])
    return Split(split.images[np.flatnonzero(selected)], split.labels[selected])


def _top_images(z_NF: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the training images that activate each latent most, strongest first: [F, count], with the activations."""
    count = min(count, len(z_NF))
    blocks = np.array_split(z_NF, -(-z_NF.shape[1] // 128), axis=1)  # the indices of all at once would be large
    top_KF = np.concatenate([np.argpartition(-z_Nf, count - 1, axis=0)[:count] for z_Nf in blocks], axis=1)
    order = np.argsort(-np.take_along_axis(z_NF, top_KF, axis=0), axis=0, kind="stable")
    top_KF = np.take_along_axis(top_KF, order, axis=0)
    return top_KF.T.astype(np.int32), np.take_along_axis(z_NF, top_KF, axis=0).T


def _halve_each_class(labels: np.ndarray) -> np.ndarray:
    """Split every class's images into two halves by turns: [N] 0 or 1."""
    fold_N = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        fold_N[members] = np.arange(len(members)) % 2
    return fold_N


def _without_fold(stats: LatentStatistics, fold_N: np.ndarray, fold: int) -> LatentStatistics:
    """Leave one half of validation out of the statistics for a strategy that is scored on that half.

    So alpha is chosen on images that did not choose the latents.
    """
    if not stats.outcomes:
        return stats
    train, validation = stats.outcomes
    return stats._replace(outcomes=(train, Outcomes(*(field[fold_N != fold] for field in validation))))


def check_validation(split: Split, config: Config, class_names: tuple[str, ...]) -> None:
    """Check that every steered class has enough validation images for the choice of alpha; raises HeadSteerError."""
    counts = np.bincount(split.labels, minlength=len(class_names))
    for name in config.steer.classes or class_names:
        count, least = counts[class_names.index(name)], config.steer.least_validation
        if count < least:
            raise HeadSteerError(
                f"validation: {count} images of class {name!r} are too few to choose alpha on; raise "
                f"data.validation_fraction, or lower steer.least_validation = {least}"
            )


def _pattern_evidence(run: RunData, use_training: bool, program: Program, validation: Outcomes) -> tuple[Outcomes, ...]:
    """Collect what gate_aligned looks at: steer.evidence training images of each class, and the validation split.

    With more heads than a table holds there is nothing to look at.

    Args:
      use_training: whether any strategy needs the training images; otherwise there are none.
    """
    config, dataset = run.trained.config, run.dataset
    labels, gates = dataset.train.labels, LayerGates(config, config.sae_layer)
    if not gates.fits_table:
        return ()
    count = config.steer.evidence * use_training
    indices = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(dataset.class_names))])
    if not len(indices):
        none = np.zeros(0, np.int64)
        logits, right = np.zeros((0, gates.count), np.float32), np.zeros((0, 2**gates.count), bool)
        return Outcomes(labels[:0], logits, right, none), validation
    split = Split(dataset.train.images[indices], labels[indices])
    table = fill_table(program, run.trained.params, split, "train: every gate pattern")
    return table.outcomes(split.labels), validation


class SplitSweep(NamedTuple):
    """One split and everything that steers it."""

    name: str  # of the split
    split: Split
    table: Table
    rows: Rows  # each image by its label, then by its predicted class where that is another one
    used: tuple[np.ndarray, np.ndarray]  # [R] bool: the rows of each way to name the class, one for each image
    steered: list[list[Steering]]  # [S][G]

    def class_of(self, y: int) -> np.ndarray:
        """Return the row of the choices that steers each image, [N]."""
        used = np.flatnonzero(self.used[y])
        steered_by = np.empty(len(self.split.labels), np.int64)
        steered_by[self.rows.image[used]] = self.rows.steered_by[used]
        return steered_by

    @property
    def outcomes(self) -> Outcomes:
        """The outcome of every gate pattern on the split."""
        return self.table.outcomes(self.split.labels)

    @property
    def unsteered_right(self) -> np.ndarray:
        """[N] bool: is the unsteered model's answer right."""
        return self.table.prediction == self.split.labels


def make_split_sweep(
    name: str, split: Split, table: Table, steered: list[list[Steering]], offset: np.ndarray | int, size_NH: np.ndarray
) -> SplitSweep:
    """Prepare a split for the sweep.

    Args:
      name: of the split.
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
    """Find the row, latent and activation wherever a latent is active in one of the rows; rows ascend."""
    z_RF = vstack([z_BF for _, z_BF in encode_chunks(sae, row_slices(x_ND, 1000), 1000)], format="csr")[image]
    return np.repeat(np.arange(len(image)), np.diff(z_RF.indptr)), z_RF.indices, z_RF.data


class SettingTally(NamedTuple):
    """The tallies of one autoencoder and strategy."""

    seed: int
    strategy: int
    tallies: list[Tally]  # [Y], one for each way to name the class
    flips: Flips | None  # of the closed form


def sweep_by_flips(
    job: SplitSweep, alphas: np.ndarray, program: GateProgram, effects: Sequence[GateEffect], classes: int
) -> Iterator[SettingTally]:
    """Tally every setting by the closed form; the model itself decides what lies within float32's rounding."""
    outcomes = job.outcomes
    rows = [
        job.rows._replace(active=find_active_latents(by_strategy[0].sae, job.table.x, job.rows.image))
        for by_strategy in job.steered
    ]

    on_devices = replicate_once(job.steered)

    def tally_setting(setting: tuple[int, int]) -> SettingTally:
        s, g = setting
        steering = job.steered[s][g]
        flips = find_flips(rows[s], steering.choice, steering.strength, effects[s])
        grid = place_on_grid(flips, alphas)
        decided = program.patterns_at(
            on_devices[s][g], job.table.x[job.rows.image[grid.unsure_row]], job.rows.steered_by[grid.unsure_row],
            alphas[grid.unsure_place],
        )  # fmt: skip
        tallies = [tally_flips(grid, decided, rows[s], used, outcomes, alphas, classes) for used in job.used]
        return SettingTally(s, g, tallies, flips)

    settings = list(np.ndindex(len(job.steered), len(job.steered[0])))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(tally_setting, settings)


def sweep_by_gates(job: SplitSweep, alphas: np.ndarray, program: GateProgram, classes: int) -> Iterator[SettingTally]:
    """Tally every setting by the gate itself, and the table."""
    heads, labels, rows = job.rows.gate_logits.shape[1], job.split.labels, job.rows
    chunks, steered = program.place_rows(job.table.x[rows.image], rows.steered_by), replicate_once(job.steered)
    for s, g in np.ndindex(len(job.steered), len(job.steered[0])):
        pattern_AR = program.patterns_of_rows(steered[s][g], chunks, alphas)
        tallies = []
        for used_R in job.used:
            used = np.flatnonzero(used_R)
            used = used[np.argsort(rows.image[used])]
            right_AN = job.table.answers[rows.image[used], pattern_AR[:, used]] == labels
            gates_ANH = pattern_to_gates(pattern_AR[:, used], heads)
            tallies.append(tally_gates(gates_ANH, right_AN, job.unsteered_right, labels, classes))
        yield SettingTally(s, g, tallies, None)


def sweep_by_suffix(job: SplitSweep, alphas: np.ndarray, trained: TrainedModel, classes: int) -> Iterator[SettingTally]:
    """Tally every setting by the layers from the steered one on."""
    labels, ways, layer = job.split.labels, range(len(NAMED_BY)), trained.config.sae_layer
    by_class = [job.class_of(y) for y in ways]
    strategies = range(len(job.steered[0]))
    widths = {g: job.steered[0][g].choice.latents.shape[1] for g in strategies}
    for width in sorted(set(widths.values())):  # programs differ by the number of latents
        pairs = [(s, g) for s in range(len(job.steered)) for g in strategies if widths[g] == width]
        settings = [SuffixSetting({layer: job.steered[s][g]}, by_class[y]) for s, g in pairs for y in ways]
        result = run_suffix(trained, job.split, settings, alphas, f"{job.name}: every setting")
        gates = LayerGates(trained.config, layer).join(result.gates[layer])
        for number, (s, g) in enumerate(pairs):
            tallies = [
                tally_gates(gates[v], result.predictions[v] == labels, job.unsteered_right, labels, classes)
                for v in range(number * len(NAMED_BY), (number + 1) * len(NAMED_BY))
            ]
            yield SettingTally(s, g, tallies, None)


def take_unsteered_from_suffix(
    trained: TrainedModel, split: Split, table: Table, steering: Steering, alphas: int
) -> Table:
    """Replace a table's unsteered gates and answers by those of the suffix at alpha 0, if the suffix is the method.

    Steered answers are compared with them, and on an accelerator another program may round otherwise. With `clamp`, or
    with a replaced residual, alpha 0 is not the unsteered model, so that the table's stay.

    Args:
      alphas: how many the sweep has; as many are computed here, so that the program is the same.
    """
    config, layer = trained.config, trained.config.sae_layer
    if choose_method(config) != "suffix" or config.steer.form == "replace" or config.steer.mode == "clamp":
        return table
    setting = SuffixSetting({layer: steering}, np.zeros(len(split.labels), np.int64))
    result = run_suffix(trained, split, [setting], np.zeros(alphas), "alpha 0")
    gates_NG = LayerGates(config, layer).join({kind: g[0, 0] for kind, g in result.gates[layer].items()})
    pattern_N = (gates_NG @ (1 << np.arange(gates_NG.shape[1]))).astype(table.pattern.dtype)
    return table._replace(pattern=pattern_N, prediction=result.predictions[0, 0])


def _price_patterns(config: Config, table: Table) -> np.ndarray:
    """Compute what each pattern costs, [P] in shares: of the heads, or of the layer's MACs if it gates more than heads.

    Of patches it counts as many as the layer keeps on average. It is empty if there are too many patterns.
    """
    gates = LayerGates(config, config.sae_layer)
    if not gates.fits_table:
        return np.zeros(0)
    patterns = np.arange(2**gates.count)
    if gates.heads_only:
        return np.bitwise_count(patterns) / gates.count
    return gates.macs(patterns, round(float(table.kept_patches.mean()))) / gates.dense_macs


class ChosenLatents(NamedTuple):
    """The latents that every strategy changes in every seed's autoencoder, and what is shown of the latents."""

    steered: list[list[Steering]]  # [S][G]
    crossed: list[list[Steering]]  # [S][G] for validation: 2 C rows of choices, each made without one half of it
    effects: list[GateEffect]  # [S]
    frequency: np.ndarray  # [S, F]
    class_frequency: np.ndarray  # [C, F] of the first seed, as the next two
    top_images: np.ndarray  # [F, T]
    top_activations: np.ndarray  # [F, T]


def _choose_latents(
    run: RunData, strategies: Mapping[str, Strategy], evidence: tuple[Outcomes, ...], cost_P: np.ndarray,
    fold_N: np.ndarray,
) -> ChosenLatents:  # fmt: skip
    """Let every strategy choose latents of every seed's autoencoder.

    Args:
      evidence: what gate_aligned looks at.
      cost_P: what each pattern costs.
      fold_N: the half of validation to which each image belongs.
    """
    config, dataset, classes = run.trained.config, run.dataset, len(run.dataset.class_names)
    gate_DH = gate_jacobian(run.trained, run.x_train)
    steered: list[list[Steering]] = []
    crossed: list[list[Steering]] = []
    effects, frequencies = [], []
    for seed in range(config.sae.seeds):
        sae = run.autoencoders.member(seed)
        z_NF = encode_split(sae, run.x_train)
        stats = latent_statistics(
            z_NF, dataset.train.labels, classes, sae.decoder, gate_DH, evidence, dataset.class_names
        )._replace(cost=cost_P)
        if seed == 0:
            class_frequency = stats.class_frequency.astype(np.float32)
            top_images, top_activations = _top_images(z_NF, INSPECTED_IMAGES)
        versions = [stats, *(_without_fold(stats, fold_N, fold) for fold in (0, 1))]
        steered.append([])
        crossed.append([])
        for number, choose in enumerate(strategies.values()):
            rngs = (np.random.default_rng([config.seed, 3, seed, number]) for _ in versions)
            choice, *halves = (choose(version, config.steer, rng) for version, rng in zip(versions, rngs, strict=True))
            crossed_choice = Choice(*(np.concatenate(part) for part in zip(*halves, strict=True)))
            steered[-1].append(Steering(sae, stats.strength, choice))
            crossed[-1].append(Steering(sae, stats.strength, crossed_choice))
        width = max(steering.choice.latents.shape[1] for steering in steered[-1])
        effects.append(gate_effect(sae.decoder, gate_DH, width, jax.default_backend()))
        frequencies.append(stats.frequency)
    return ChosenLatents(steered, crossed, effects, np.stack(frequencies), class_frequency, top_images, top_activations)


def bound_logits(trained: TrainedModel, x_ND: np.ndarray) -> np.ndarray:
    """Compute |x| |W| + |b| of a layer's linear gates, [N, H]: it bounds the rounding of the gate logits."""
    config, layer = trained.config, trained.config.sae_layer
    block, bounds = trained.params["params"][f"layers_{layer}"], []
    for kind in LayerGates(config, layer).kinds:
        linear = jax.tree.map(np.asarray, block[DECIDED_BY[kind]]["linear"])
        offset = abs(threshold_logit(config.gate.settings(kind)))
        bounds.append(np.abs(x_ND) @ np.abs(linear["kernel"]) + (np.abs(linear["bias"]) + np.float32(offset)))
    return np.concatenate(bounds, axis=1)


def _make_evaluator(
    trained: TrainedModel, alphas: np.ndarray, effects: Sequence[GateEffect], classes: int
) -> Callable[[SplitSweep], Iterator[SettingTally]]:
    """Build the function that tallies every setting on a split, by the method that suits the config."""
    method = choose_method(trained.config)
    if method == "suffix":
        return lambda job: sweep_by_suffix(job, alphas, trained, classes)
    program = GateProgram(trained)
    if method == "gates":
        return lambda job: sweep_by_gates(job, alphas, program, classes)
    return lambda job: sweep_by_flips(job, alphas, program, effects, classes)


def _sweep_split(
    job: SplitSweep, evaluate: Callable[[SplitSweep], Iterator[SettingTally]], gates: LayerGates, alphas: int,
    classes: int,
) -> tuple[SplitResult, list[StepFunction]]:  # fmt: skip
    """Evaluate every setting on one split.

    Args:
      gates: those of the steered layer.
      alphas: how many there are.

    Returns:
      The split's result, and each strategy's exact step function, steered by the label; none if alpha is not exact.
    """
    seeds, strategies = len(job.steered), len(job.steered[0])
    shape = (strategies, seeds, len(NAMED_BY))
    arrays: dict[str, np.ndarray] = {}
    flips: dict[tuple[int, int], Flips] = {}
    with progress(strategies * seeds, f"{job.name}: sweep of {alphas} alphas", "setting") as bar:
        for setting in evaluate(job):
            for y, tally in enumerate(setting.tallies):
                for name, values in tally._asdict().items():
                    if name not in arrays:
                        arrays[name] = np.zeros((*shape, *values.shape), values.dtype)
                    arrays[name][setting.strategy, setting.seed, y] = values
            if setting.flips is not None:
                flips[setting.strategy, setting.seed] = setting.flips
            bar.update(1)
    steps = []
    if flips:
        outcomes, used = job.outcomes, job.used[BY_LABEL]
        for g in range(strategies):
            parts = [TalliedFlips(flips[g, s], job.rows, used, outcomes, job.table.kept_patches) for s in range(seeds)]
            steps.append(exact_step_function(parts, gates))
    labels, heads, patches_N = job.split.labels, gates.count, job.table.kept_patches
    correct = class_counts(job.unsteered_right, labels, classes)
    result = SplitResult(
        labels=labels.astype(np.int32),
        count=np.bincount(labels, minlength=classes),
        pattern=job.table.pattern,
        prediction=job.table.prediction,
        table=job.table.answers,
        unsteered_correct=correct,
        unsteered_heads_on=class_counts(pattern_to_gates(job.table.pattern, heads).T, labels, classes).T,
        unsteered_right=pack_bits(job.unsteered_right),
        lost=correct + arrays["gained"] - arrays["correct"],
        kept_patches=patches_N,
        unsteered_macs=class_counts(gates.macs(job.table.pattern, patches_N), labels, classes),
        macs=np.stack([sum_class_macs(bits, patches_N, labels, classes, gates) for bits in arrays["gates"]]),
        **arrays,
    )
    return result, steps


def run_sweep(run: RunData, strategies: Mapping[str, Strategy]) -> SweepResult:
    """Run the whole sweep.

    Args:
      strategies: by the names that they have in the result.
    """
    trained, dataset, config = run.trained, run.dataset, run.trained.config
    classes, alphas = len(dataset.class_names), make_alpha_grid(config.steer)
    logger.info(describe_method(config))
    if 0 not in config.steer.alphas:
        logger.info("sweep: alpha 0, the unsteered model, is added to config.steer.alphas")
    splits = {
        "validation": select_classes(dataset.validation, config, dataset.class_names),
        "test": select_classes(dataset.test, config, dataset.class_names),
    }
    program = compile_table_program(trained, splits["test"])
    tables = {
        name: fill_table(program, trained.params, split, f"{name}: every gate pattern")
        for name, split in splits.items()
    }
    aligned = any(strategy is gate_aligned_latents for strategy in strategies.values())
    validation = tables["validation"].outcomes(splits["validation"].labels)
    fold_N = _halve_each_class(splits["validation"].labels)
    cost_P = _price_patterns(config, tables["validation"])
    evidence = _pattern_evidence(run, aligned, program, validation)
    chosen = _choose_latents(run, strategies, evidence, cost_P, fold_N)

    gates = LayerGates(config, config.sae_layer)
    evaluate = _make_evaluator(trained, alphas, chosen.effects, classes)
    results: dict[str, SplitResult] = {}
    steps: dict[str, dict[str, StepFunction]] = {}
    for name, split in splits.items():
        table = take_unsteered_from_suffix(trained, split, tables[name], chosen.steered[0][0], len(alphas))
        steered, offset = (chosen.crossed, classes * fold_N) if name == "validation" else (chosen.steered, 0)
        linear = choose_method(config) == "flips"
        size_NH = bound_logits(trained, table.x) if linear else np.zeros_like(table.gate_logits)
        job = make_split_sweep(name, split, table, steered, offset, size_NH)
        results[name], by_strategy = _sweep_split(job, evaluate, gates, len(alphas), classes)
        if by_strategy:
            steps[name] = dict(zip(strategies, by_strategy, strict=True))
    latents = _stack_choices(chosen.steered, 0, fill=-1)
    by_name = dict(zip(strategies, latents, strict=True))
    return SweepResult(
        strategies=tuple(strategies),
        alphas=alphas,
        class_names=dataset.class_names,
        gates=gates.names if "sublayers" in gates.kinds else tuple(range(gates.count)),
        subset=list_patterns(config),
        related=dataset.related,
        latents=latents,
        weights=_stack_choices(chosen.steered, 1, fill=0),
        frequency=chosen.frequency,
        class_frequency=chosen.class_frequency,
        top_images=chosen.top_images,
        top_activations=chosen.top_activations,
        overlap_class_class=_overlap_of_classes(by_name),
        overlap_global_class=_overlap_with_global(by_name),
        validation=results["validation"],
        test=results["test"],
        steps=steps,
    )


def _overlap_of_classes(latents: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Compute how many of the latents of `class` two classes share, [S, C, C]; None without that strategy."""
    if "class" not in latents:
        return None
    return np.stack([latent_overlap(latents_CS, latents_CS) for latents_CS in latents["class"]])


def _overlap_with_global(latents: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Compute how many latents `global` and `class` share, [S, C]; None without one of them."""
    if "class" not in latents or "global" not in latents:
        return None
    pairs = zip(latents["global"], latents["class"], strict=True)
    return np.stack([latent_overlap(global_CS[:1], class_CS)[0] for global_CS, class_CS in pairs])


def gate_jacobian(trained: TrainedModel, x_ND: np.ndarray) -> np.ndarray:
    """Differentiate the gate logits at the mean residual: [D, H], the gate's weights unless it has a LayerNorm."""
    model, params = trained.model, trained.params
    gates = LayerGates(trained.config, trained.config.sae_layer)
    gate = jax.jacobian(lambda x_D: gates.logits(model, params, x_D[None])[0])
    return np.asarray(gate(jnp.asarray(x_ND.mean(axis=0, dtype=np.float64), jnp.float32))).T


def _stack_choices(steered: Sequence[Sequence[Steering]], part: int, fill: float) -> np.ndarray:
    """Stack one part of all choices, [G, S, C, L]; strategies that choose fewer latents are filled up.

    Args:
      part: 0 for the latents, 1 for the weights.
    """
    most = max(steering.choice.latents.shape[1] for steering in steered[0])

    def pad(values_CS: np.ndarray) -> np.ndarray:
        return np.pad(values_CS, ((0, 0), (0, most - values_CS.shape[1])), constant_values=fill)

    return np.stack(
        [np.stack([pad(steering.choice[part]) for steering in by_strategy]) for by_strategy in steered], axis=1
    )
