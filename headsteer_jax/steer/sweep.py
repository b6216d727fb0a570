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
from scipy.sparse import csr_array, vstack

from headsteer_jax.config.schema import TABLE_STRATEGIES, Config, SteerConfig
from headsteer_jax.data.dataset import Dataset, Split, check_classes
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.gates import threshold_logit
from headsteer_jax.model.passes import Program
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae.autoencoder import Autoencoder, encode_chunks, encode_split, row_slices
from headsteer_jax.sae.latents import INSPECTED_IMAGES
from headsteer_jax.sae.residuals import ResidualSelection, load_all, load_or_compute_residuals
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.by_image import ImageStrategy, ReadResiduals
from headsteer_jax.steer.catalogue import GUESSING_STRATEGIES, MATCHED_STRATEGIES, STRATEGIES, find_strategy
from headsteer_jax.steer.cost import count_extra_macs, count_moving_macs
from headsteer_jax.steer.flips import Flips, GateEffect, Rows, find_flips, gate_effect, is_affine_in_alpha
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.guess import Guess, fit_guess
from headsteer_jax.steer.results import BY_LABEL, NAMED_BY, SplitResult, SweepResult
from headsteer_jax.steer.steering import GateProgram, Steering, is_unsteered_at_zero, replicate_once
from headsteer_jax.steer.strategies import (
    NO_COST,
    SUPERCLASS_STRATEGIES,
    Choice,
    LatentStatistics,
    Residuals,
    Strategy,
    concatenate_choices,
    differs_by_class,
    latent_overlap,
    latent_statistics,
    merge_choices,
    require_superclasses,
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
Strategies = Mapping[str, Strategy | ImageStrategy]
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


def describe_unmatched(strategies: Strategies, config: SteerConfig) -> str | None:
    """Describe for the log which strategies do not move the residual as far as those that they are matched to.

    Returns:
      One line; None if there are none, as with the mode add in delta form.
    """
    if (config.mode, config.form) == ("add", "delta"):
        return None
    matched = [STRATEGIES[name] for name in MATCHED_STRATEGIES]
    names = [name for name, strategy in strategies.items() if strategy in matched]
    if not names:
        return None
    return (
        f"sweep: {', '.join(names)}: matched in how far they move the residual for the mode add in delta form only; in "
        f"{config.mode} mode and {config.form} form, the same alpha moves it by another distance than latents do"
    )


def make_alpha_grid(config: SteerConfig) -> np.ndarray:
    """Return the [A] float64 alphas, sorted, with 0, in most forms the unsteered model; see `is_unsteered_at_zero`."""
    return np.unique(np.array([0.0, *config.alphas]))


def check_strategies_and_classes(config: Config, dataset: Dataset) -> None:
    """Check that all strategies and classes exist, before anything is computed; raises HeadSteerError."""
    for name in config.steer.strategies:
        find_strategy(name)
    if set(SUPERCLASS_STRATEGIES) & set(config.steer.strategies):
        require_superclasses(dataset.related)
    check_classes("config.steer.classes", config.steer.classes, dataset.class_names)
    guessed, classes = config.steer.guess_classes, len(dataset.class_names)
    if guessed > classes:
        raise HeadSteerError(
            f"config.steer.guess_classes = {guessed}: the dataset has only {classes} classes; 0 mixes all of them"
        )


def find_selected(labels: np.ndarray, config: Config, class_names: tuple[str, ...]) -> np.ndarray:
    """Find which images are of config.steer.classes: [N] bool, all of them if it is empty."""
    if not config.steer.classes:
        return np.ones(len(labels), bool)
    return np.isin(labels, [class_names.index(name) for name in config.steer.classes])


def select_classes(split: Split, config: Config, class_names: tuple[str, ...]) -> Split:
    """Keep the images of config.steer.classes, or all images if it is empty."""
    if not config.steer.classes:
        return split
    selected = find_selected(split.labels, config, class_names)
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

    So alpha is chosen on images that did not choose the latents, nor the temperature of a guess.
    """
    if not stats.outcomes:
        return stats
    train, validation = stats.outcomes
    guess = stats.guess and stats.guess.without(fold_N == fold)
    return stats._replace(outcomes=(train, Outcomes(*(field[fold_N != fold] for field in validation))), guess=guess)


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

    Raises:
      HeadSteerError: one needs them, and there are more heads than a table holds.
    """
    config, dataset = run.trained.config, run.dataset
    labels, gates = dataset.train.labels, LayerGates(config, config.sae_layer)
    if not gates.fits_table:
        if use_training:
            raise HeadSteerError(
                f"a layer of {gates.count} gates has too many patterns for strategies that look at all of them: leave "
                f"out {', '.join(TABLE_STRATEGIES)}"
            )
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
    # [R] bool: the rows of each way to name the class, at most one for each image; an image without one is not steered
    used: tuple[np.ndarray, np.ndarray]
    steered: list[list[Steering]]  # [S][G]
    by_image: frozenset[int]  # the strategies G whose choices have a row for each image
    unnamed: frozenset[int]  # the strategies G that need no class, and these: for them nothing is predicted

    def rows_of(self, g: int) -> Rows:
        """Return the rows with the row of the strategy's choices that steers each."""
        return self.rows._replace(steered_by=self.rows.image) if g in self.by_image else self.rows

    def class_of(self, y: int, g: int) -> np.ndarray:
        """Return the row of the strategy's choices that steers each image, [N]; any row for one that is not steered."""
        if g in self.by_image:
            return np.arange(len(self.split.labels))
        used = np.flatnonzero(self.used_rows(y, g))
        steered_by = np.zeros(len(self.split.labels), np.int64)
        steered_by[self.rows.image[used]] = self.rows.steered_by[used]
        return steered_by

    def used_rows(self, y: int, g: int) -> np.ndarray:
        """Return which rows a strategy uses, [R] bool, if the class is named in this way."""
        return self.used[BY_LABEL if g in self.unnamed else y]

    def is_steered(self, y: int, g: int) -> np.ndarray:
        """Return which images are steered, [N] bool."""
        steered_N = np.zeros(len(self.split.labels), bool)
        steered_N[self.rows.image[self.used_rows(y, g)]] = True
        return steered_N

    @property
    def outcomes(self) -> Outcomes:
        """The outcome of every gate pattern on the split."""
        return self.table.outcomes(self.split.labels)

    @property
    def unsteered_right(self) -> np.ndarray:
        """[N] bool: is the unsteered model's answer right."""
        return self.table.prediction == self.split.labels


def make_split_sweep(
    name: str, split: Split, table: Table, steered: list[list[Steering]], offset: np.ndarray | int, size_NH: np.ndarray,
    by_image: frozenset[int] = frozenset(), unnamed: frozenset[int] = frozenset(), least_confidence: float = 0.0,
) -> SplitSweep:  # fmt: skip
    """Prepare a split for the sweep.

    Args:
      name: of the split.
      offset: added to each image's class: the row of the choices that steers it.
      size_NH: |x| |W| + |b|.
      by_image: the strategies whose choices have a row for each image.
      unnamed: further strategies that need no class.
      least_confidence: an image whose prediction is less confident is not steered by predicted class.
    """
    count, labels = len(split.labels), split.labels
    other = np.flatnonzero(table.prediction != labels)
    image = np.concatenate([np.arange(count), other])
    steered_by = np.concatenate([labels, table.prediction[other]]) + np.broadcast_to(offset, count)[image]
    true = np.arange(len(image)) < count
    predicted = ~true
    predicted[:count] = table.prediction == labels
    predicted &= (table.confidence >= least_confidence)[image]
    none = np.zeros(0, np.int64)
    rows = Rows(image, steered_by, table.gate_logits[image], size_NH[image], (none, none, none))
    return SplitSweep(name, split, table, rows, (true, predicted), steered, by_image, by_image | unnamed)


def encode_sparse(sae: Autoencoder, x_ND: np.ndarray) -> csr_array:
    """Encode residuals [N, D] as latents [N, F] of which few are not 0."""
    return vstack([z_BF for _, z_BF in encode_chunks(sae, row_slices(x_ND, 1000), 1000)], format="csr")


def find_active_latents(
    sae: Autoencoder, x_ND: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the row, latent and activation wherever a latent is active in one of the rows; rows ascend."""
    z_RF = encode_sparse(sae, x_ND)[image]
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
    active = [find_active_latents(by_strategy[0].sae, job.table.x, job.rows.image) for by_strategy in job.steered]

    on_devices = replicate_once(job.steered)

    def tally_setting(setting: tuple[int, int]) -> SettingTally:
        s, g = setting
        steering, rows = job.steered[s][g], job.rows_of(g)._replace(active=active[s])
        flips = find_flips(rows, steering.choice, steering.strength, effects[s])
        grid = place_on_grid(flips, alphas)
        decided = program.patterns_at(
            on_devices[s][g], job.table.x[rows.image[grid.unsure_row]], rows.steered_by[grid.unsure_row],
            alphas[grid.unsure_place],
        )  # fmt: skip
        tallies = [
            tally_flips(grid, decided, rows, job.used_rows(y, g), outcomes, alphas, classes)
            for y in range(len(job.used))
        ]
        return SettingTally(s, g, tallies, flips)

    settings = list(np.ndindex(len(job.steered), len(job.steered[0])))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(tally_setting, settings)


def sweep_by_gates(job: SplitSweep, alphas: np.ndarray, program: GateProgram, classes: int) -> Iterator[SettingTally]:
    """Tally every setting by the gate itself, and the table."""
    heads, labels = job.rows.gate_logits.shape[1], job.split.labels
    x_RD, steered = job.table.x[job.rows.image], replicate_once(job.steered)
    chunks = [program.place_rows(x_RD, steered_by) for steered_by in (job.rows.steered_by, job.rows.image)]
    for s, g in np.ndindex(len(job.steered), len(job.steered[0])):
        rows = job.rows_of(g)
        pattern_AR = program.patterns_of_rows(steered[s][g], chunks[g in job.by_image], alphas)
        tallies = []
        for y in range(len(job.used)):
            used = np.flatnonzero(job.used_rows(y, g))
            pattern_AN = np.tile(job.table.pattern, (len(alphas), 1))
            pattern_AN[:, rows.image[used]] = pattern_AR[:, used]
            right_AN = job.table.answers[np.arange(len(labels)), pattern_AN] == labels
            gates_ANH = pattern_to_gates(pattern_AN, heads)
            tallies.append(tally_gates(gates_ANH, right_AN, job.unsteered_right, labels, classes))
        yield SettingTally(s, g, tallies, None)


def sweep_by_suffix(job: SplitSweep, alphas: np.ndarray, trained: TrainedModel, classes: int) -> Iterator[SettingTally]:
    """Tally every setting by the layers from the steered one on."""
    labels, ways, layer = job.split.labels, range(len(NAMED_BY)), trained.config.sae_layer
    # programs differ by the shapes of the choices
    shapes = {g: jax.tree.map(np.shape, job.steered[0][g].choice) for g in range(len(job.steered[0]))}
    for shape in dict.fromkeys(shapes.values()):
        pairs = [(s, g) for s in range(len(job.steered)) for g in shapes if shapes[g] == shape]
        settings = [SuffixSetting({layer: job.steered[s][g]}, job.class_of(y, g)) for s, g in pairs for y in ways]
        result = run_suffix(trained, job.split, settings, alphas, f"{job.name}: every setting")
        gates = LayerGates(trained.config, layer).join(result.gates[layer])
        unsteered_NG = pattern_to_gates(job.table.pattern, gates.shape[-1])
        for number, (s, g) in enumerate(pairs):
            tallies = []
            for y in ways:
                v, steered_N = number * len(NAMED_BY) + y, job.is_steered(y, g)
                gates_ANG = np.where(steered_N[:, None], gates[v], unsteered_NG)
                prediction_AN = np.where(steered_N, result.predictions[v], job.table.prediction)
                right_AN = prediction_AN == labels
                tallies.append(tally_gates(gates_ANG, right_AN, job.unsteered_right, labels, classes))
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
    if choose_method(config) != "suffix" or not is_unsteered_at_zero(config.steer):
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
    statistics: list[LatentStatistics]  # [S]
    effects: list[GateEffect]  # [S]
    frequency: np.ndarray  # [S, F]
    class_frequency: np.ndarray  # [C, F] of the first seed, as the next two
    top_images: np.ndarray  # [F, T]
    top_activations: np.ndarray  # [F, T]

    @property
    def class_matters(self) -> np.ndarray:
        """[G] bool: does it make a difference, in any seed, which class steers an image."""
        return np.any([[differs_by_class(one.choice) for one in by_strategy] for by_strategy in self.steered], axis=0)


def strategy_rng(config: Config, seed: int, number: int) -> np.random.Generator:
    """Make the random generator of a strategy: that of its number among the strategies, for one autoencoder."""
    return np.random.default_rng([config.seed, 3, seed, number])


class Evidence(NamedTuple):
    """What strategies may look at besides an autoencoder's latents, the same for every autoencoder."""

    outcomes: tuple[Outcomes, ...] = ()  # of training images, and of validation
    cost: np.ndarray = NO_COST  # [P] what each pattern costs
    guess: Guess | None = None  # None: no strategy guesses


def read_guess_residuals(trained: TrainedModel, split: Split, name: str, x_ND: np.ndarray) -> np.ndarray:
    """Read what a class is guessed from: the CLS residuals of a split that enter config.guess_layer, [N, D].

    Args:
      name: of the split.
      x_ND: the residuals that enter the steered layer; another layer's take a pass up to there.
    """
    layer = trained.config.guess_layer
    if layer == trained.config.sae_layer:
        return x_ND
    return load_all(load_or_compute_residuals(None, trained, ResidualSelection(split, name, (layer,), "cls"))[layer])


def _fit_guess(run: RunData, x_MD: np.ndarray, labels: np.ndarray) -> Guess:
    """Fit the classifier that guesses a class.

    Args:
      x_MD: what it reads of the validation images, from `read_guess_residuals`.
      labels: [M] theirs.
    """
    train = run.dataset.train
    return fit_guess((read_guess_residuals(run.trained, train, "train", run.x_train), train.labels), (x_MD, labels))


def _measure_latents(
    run: RunData, sae: Autoencoder, z_NF: np.ndarray, gate_DH: np.ndarray, evidence: Evidence
) -> LatentStatistics:
    """Measure one autoencoder's latents z on the training split: everything that a strategy may look at."""
    dataset = run.dataset
    labels, names = dataset.train.labels, dataset.class_names
    stats = latent_statistics(z_NF, labels, len(names), sae.decoder, gate_DH, evidence.outcomes, names)
    residuals = Residuals(run.x_train, labels, gate_DH)
    return stats._replace(cost=evidence.cost, related=dataset.related, residuals=residuals, guess=evidence.guess)


def measure_for_strategy(run: RunData, name: str) -> LatentStatistics:
    """Measure what one strategy looks at to choose from the first autoencoder, as the sweep does.

    The tables of gate patterns, a pass over training and validation images, are filled only if it may look at them.

    Args:
      name: of the strategy; it exists.
    """
    trained, dataset, config = run.trained, run.dataset, run.trained.config
    evidence = Evidence()
    if name in (*TABLE_STRATEGIES, *GUESSING_STRATEGIES) or name not in STRATEGIES:
        test, validation = (
            select_classes(split, config, dataset.class_names) for split in (dataset.test, dataset.validation)
        )
        program = compile_table_program(trained, test)  # of the sweep's size, for the same bits
        table = fill_table(program, trained.params, validation, "validation: every gate pattern")
        outcomes = _pattern_evidence(run, name in TABLE_STRATEGIES, program, table.outcomes(validation.labels))
        guess = None
        if name in GUESSING_STRATEGIES:
            x_MD = read_guess_residuals(trained, validation, "validation", table.x)
            guess = _fit_guess(run, x_MD, validation.labels)
        evidence = Evidence(outcomes, _price_patterns(config, table), guess)
    sae, gate_DH = run.autoencoders.member(0), gate_jacobian(trained, run.x_train)
    return _measure_latents(run, sae, encode_split(sae, run.x_train), gate_DH, evidence)


def _choose_latents(run: RunData, strategies: Strategies, evidence: Evidence, fold_N: np.ndarray) -> ChosenLatents:
    """Let every strategy choose latents of every seed's autoencoder, except those that choose for each image.

    Args:
      evidence: what they look at besides the latents.
      fold_N: the half of validation to which each image belongs.
    """
    config, classes = run.trained.config, len(run.dataset.class_names)
    gate_DH = gate_jacobian(run.trained, run.x_train)
    no_choice = Choice(np.zeros((classes, 0), np.int32), np.zeros((classes, 0), np.float32))
    steered: list[list[Steering]] = []
    crossed: list[list[Steering]] = []
    effects, frequencies, statistics = [], [], []
    for seed in range(config.sae.seeds):
        sae = run.autoencoders.member(seed)
        z_NF = encode_split(sae, run.x_train)
        stats = _measure_latents(run, sae, z_NF, gate_DH, evidence)
        if seed == 0:
            class_frequency = stats.class_frequency.astype(np.float32)
            top_images, top_activations = _top_images(z_NF, INSPECTED_IMAGES)
        versions = [stats, *(_without_fold(stats, fold_N, fold) for fold in (0, 1))]
        steered.append([])
        crossed.append([])
        statistics.append(stats)
        for number, choose in enumerate(strategies.values()):
            if isinstance(choose, ImageStrategy):
                steered[-1].append(Steering(sae, stats.strength, no_choice))
                crossed[-1].append(Steering(sae, stats.strength, no_choice))
                continue
            rngs = (strategy_rng(config, seed, number) for _ in versions)
            choice, *halves = (choose(version, config.steer, rng) for version, rng in zip(versions, rngs, strict=True))
            crossed_choice = concatenate_choices(halves)
            steered[-1].append(Steering(sae, stats.strength, choice))
            crossed[-1].append(Steering(sae, stats.strength, crossed_choice))
        width = max(steering.choice.latents.shape[1] for steering in steered[-1])
        effects.append(gate_effect(sae.decoder, gate_DH, width, jax.default_backend()))
        frequencies.append(stats.frequency)
    return ChosenLatents(
        steered, crossed, statistics, effects, np.stack(frequencies), class_frequency, top_images, top_activations
    )


def _choose_by_image(
    steered: list[list[Steering]], strategies: Strategies, statistics: Sequence[LatentStatistics], x_ND: np.ndarray,
    guess_ND: np.ndarray, config: Config, fold_N: np.ndarray | None = None,
) -> list[list[Steering]]:  # fmt: skip
    """Let the strategies that choose for each image do so on one split; the other choices stay as they are.

    Args:
      x_ND: CLS residuals that enter the steered layer.
      guess_ND: those from which the class is guessed.
      fold_N: of validation, the half to which each image belongs; its choice is made without that half.
    """
    steered = [list(by_strategy) for by_strategy in steered]
    chosen = {g: choose for g, choose in enumerate(strategies.values()) if isinstance(choose, ImageStrategy)}
    for s, stats in enumerate(statistics if chosen else ()):
        images = ReadResiduals(guess_ND, encode_sparse(steered[s][0].sae, x_ND))
        versions = [stats] if fold_N is None else [_without_fold(stats, fold_N, fold) for fold in (0, 1)]
        for g, choose in chosen.items():
            if s > 0 and not choose.by_autoencoder:
                steered[s][g] = steered[s][g]._replace(choice=steered[0][g].choice)
                continue
            rngs = (strategy_rng(config, s, g) for _ in versions)
            parts = [
                choose.choose(images, version, config.steer, rng) for version, rng in zip(versions, rngs, strict=True)
            ]
            choice = parts[0] if fold_N is None else merge_choices(parts, fold_N)
            steered[s][g] = steered[s][g]._replace(choice=choice)
    return steered


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


def _describe_last_alpha(tally: Tally, images: int) -> str:
    """Describe what a setting leads to at the last alpha: its accuracy, and the share of gates that it opens."""
    accuracy, usage = tally.correct[-1].sum() / images, tally.heads_on[-1].sum(axis=0).mean() / images
    return f"last alpha: accuracy {accuracy:.1%}, usage {usage:.2f}"


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
            bar.update(1, _describe_last_alpha(setting.tallies[BY_LABEL], len(job.split.labels)))
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


def _prepare_split(
    trained: TrainedModel, named_split: tuple[str, Split, Table], guess_ND: np.ndarray, chosen: ChosenLatents,
    strategies: Strategies, fold_N: np.ndarray,
) -> SplitSweep:  # fmt: skip
    """Bring together a split, its table and everything that steers it.

    Args:
      guess_ND: the CLS residuals from which the class is guessed.
      fold_N: the half of validation to which each image belongs: it is steered by what was chosen without that half.
    """
    name, split, table = named_split
    on_validation, classes = name == "validation", chosen.class_frequency.shape[0]
    steered, offset = (chosen.crossed, classes * fold_N) if on_validation else (chosen.steered, 0)
    steered = _choose_by_image(
        steered, strategies, chosen.statistics, table.x, guess_ND, trained.config, fold_N if on_validation else None
    )
    linear = choose_method(trained.config) == "flips"
    size_NH = bound_logits(trained, table.x) if linear else np.zeros_like(table.gate_logits)
    by_image = frozenset(g for g, choose in enumerate(strategies.values()) if isinstance(choose, ImageStrategy))
    unnamed = frozenset(np.flatnonzero(~chosen.class_matters).tolist())
    least = trained.config.steer.least_confidence
    return make_split_sweep(name, split, table, steered, offset, size_NH, by_image, unnamed, least)


def run_sweep(run: RunData, strategies: Strategies) -> SweepResult:
    """Run the whole sweep.

    Args:
      strategies: by the names that they have in the result.
    """
    trained, dataset, config = run.trained, run.dataset, run.trained.config
    classes, alphas = len(dataset.class_names), make_alpha_grid(config.steer)
    logger.info(describe_method(config))
    if warning := describe_unmatched(strategies, config.steer):
        logger.warning(warning)
    if 0 not in config.steer.alphas:
        meaning = "the unsteered model" if is_unsteered_at_zero(config.steer) else "for which no latent is amplified"
        logger.info(f"sweep: alpha 0, {meaning}, is added to config.steer.alphas")
    splits = {
        "validation": select_classes(dataset.validation, config, dataset.class_names),
        "test": select_classes(dataset.test, config, dataset.class_names),
    }
    program = compile_table_program(trained, splits["test"])
    tables = {
        name: fill_table(program, trained.params, split, f"{name}: every gate pattern")
        for name, split in splits.items()
    }
    table_strategies = [STRATEGIES[name] for name in TABLE_STRATEGIES]
    aligned = any(strategy in table_strategies for strategy in strategies.values())
    validation = tables["validation"].outcomes(splits["validation"].labels)
    fold_N = _halve_each_class(splits["validation"].labels)
    guessing = any(STRATEGIES[name] in strategies.values() for name in GUESSING_STRATEGIES)
    guess_x, guess = dict[str, np.ndarray](), None
    for name, split in splits.items():
        x_ND = tables[name].x
        guess_x[name] = read_guess_residuals(trained, split, name, x_ND) if guessing else x_ND
    if guessing:
        guess = _fit_guess(run, guess_x["validation"], splits["validation"].labels)
    outcomes = _pattern_evidence(run, aligned, program, validation)
    evidence = Evidence(outcomes, _price_patterns(config, tables["validation"]), guess)
    chosen = _choose_latents(run, strategies, evidence, fold_N)
    gates = LayerGates(config, config.sae_layer)
    evaluate = _make_evaluator(trained, alphas, chosen.effects, classes)
    results, steps = dict[str, SplitResult](), dict[str, dict[str, StepFunction]]()
    for name, split in splits.items():
        table = take_unsteered_from_suffix(trained, split, tables[name], chosen.steered[0][0], len(alphas))
        job = _prepare_split(trained, (name, split, table), guess_x[name], chosen, strategies, fold_N)
        results[name], by_strategy = _sweep_split(job, evaluate, gates, len(alphas), classes)
        if by_strategy:
            steps[name] = dict(zip(strategies, by_strategy, strict=True))
    by_name = {
        name: [by_strategy[g].choice.latents for by_strategy in chosen.steered] for g, name in enumerate(strategies)
    }
    return SweepResult(
        strategies=tuple(strategies),
        alphas=alphas,
        class_names=dataset.class_names,
        gates=gates.names if "sublayers" in gates.kinds else tuple(range(gates.count)),
        subset=list_patterns(config),
        related=dataset.related,
        latents=_stack_choices(chosen.steered, "latents", fill=-1),
        weights=_stack_choices(chosen.steered, "weights", fill=0),
        class_matters=chosen.class_matters,
        extra_macs=_count_extra_macs(config, classes, strategies, chosen, tables["test"]),
        directions=_stack_directions(chosen.steered),
        push=_stack_pushes(chosen, strategies) if choose_method(config) == "flips" else None,
        gate_logits=_average_by_class(run) if choose_method(config) == "flips" else None,
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


def _count_extra_macs(
    config: Config, classes: int, strategies: Strategies, chosen: ChosenLatents, table: Table
) -> np.ndarray:
    """Count the MACs that each strategy adds to the steered pass of a test image: [G, Y]; see `count_extra_macs`."""
    choices = [steering.choice for steering in chosen.steered[0]]
    moving_G = [
        count_moving_macs(config, classes, strategy, choice)
        for strategy, choice in zip(strategies.values(), choices, strict=True)
    ]
    steered_N = table.confidence >= config.steer.least_confidence
    return count_extra_macs(moving_G, chosen.class_matters, table.macs_from, steered_N)


def _stack_pushes(chosen: ChosenLatents, strategies: Strategies) -> np.ndarray:
    """Stack what alpha 1 adds to the gate logits of the images of a class, [G, S, C, H].

    It is the same for all alphas above 0, as latents stay >= 0 then. It is NaN for a strategy with negative weights,
    whose latents end at 0, and for one that chooses for each image.
    """
    pushes: list[list[np.ndarray]] = []
    for by_strategy, effect in zip(chosen.steered, chosen.effects, strict=True):
        pushes.append([])
        for steering, choose in zip(by_strategy, strategies.values(), strict=True):
            latents_CS, weights_CS = steering.choice.latents, steering.choice.weights
            shift_CS = weights_CS * steering.strength[latents_CS]
            of_latents_CH = np.einsum("CS,CSH->CH", shift_CS, effect.logits[latents_CS])
            unknown = np.nan if isinstance(choose, ImageStrategy) or (weights_CS < 0).any() else 0.0
            pushes[-1].append(of_latents_CH + effect.of_directions(steering.choice)[0] + unknown)
    return np.array(pushes).swapaxes(0, 1)


def _average_by_class(run: RunData) -> np.ndarray:
    """Average the gate logits, which are affine in the residual, over each class's training images: [C, H].

    They are NaN for a class without images.
    """
    trained, labels = run.trained, run.dataset.train.labels
    mean_CD = np.full((len(run.dataset.class_names), run.x_train.shape[1]), np.nan, np.float32)
    for label in np.unique(labels):
        mean_CD[label] = run.x_train[labels == label].mean(axis=0, dtype=np.float64)
    gates = LayerGates(trained.config, trained.config.sae_layer)
    return np.asarray(gates.logits(trained.model, trained.params, jnp.asarray(mean_CD)), np.float64)


def _overlap_of_classes(latents: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray | None:
    """Compute how many of the latents of `class` two classes share, [S, C, C]; None without that strategy."""
    if "class" not in latents:
        return None
    return np.stack([latent_overlap(latents_CS, latents_CS) for latents_CS in latents["class"]])


def _overlap_with_global(latents: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray | None:
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


def _stack_directions(steered: Sequence[Sequence[Steering]]) -> np.ndarray | None:
    """Stack the directions of all choices, [G, S, C, D], 0 where latents are changed; None if all change latents."""
    directions_SG = [steering.choice.directions for by_strategy in steered for steering in by_strategy]
    shape = next((np.shape(directions) for directions in directions_SG if directions is not None), None)
    if shape is None:
        return None
    filled = [np.zeros(shape, np.float32) if directions is None else directions for directions in directions_SG]
    return np.stack(filled).reshape(len(steered), -1, *shape).swapaxes(0, 1)


def _stack_choices(
    steered: Sequence[Sequence[Steering]], part: Literal["latents", "weights"], fill: float
) -> np.ndarray:
    """Stack one part of all choices, [G, S, C, L]; strategies that choose fewer latents are filled up."""
    parts = [[getattr(steering.choice, part) for steering in by_strategy] for by_strategy in steered]
    most = max(values_CS.shape[1] for values_CS in parts[0])
    padded = [
        [np.pad(values_CS, ((0, 0), (0, most - values_CS.shape[1])), constant_values=fill) for values_CS in by_strategy]
        for by_strategy in parts
    ]
    return np.array(padded).swapaxes(0, 1)
