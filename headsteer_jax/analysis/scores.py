"""The scores of every setting: alphas are chosen on validation, and everything is scored and resampled on test.

Usage is the share of the steered layer's gates that are open, of those that read its CLS residual. Where a model gates
more than its heads, the layer's MACs take the place of usage in the choice of alpha.

Axes: G strategies, S seeds, Y ways to name the class, A alphas, N images, C classes, R resamplings.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from headsteer_jax.analysis.stats import bootstrap_means, bootstrap_weights, choose_alpha, percentile_interval
from headsteer_jax.config.schema import Config
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.results import BY_LABEL, NAMED_BY, SplitResult, SweepResult
from headsteer_jax.steer.steering import is_unsteered_at_zero
from headsteer_jax.steer.tally import class_counts, patterns_of_bits, unpack_bits


class Curves(NamedTuple):
    """Usage and accuracy of the same settings, of the same shape."""

    usage: np.ndarray
    accuracy: np.ndarray

    def select(self, *index: Any) -> "Curves":
        """Index both arrays."""
        return Curves(self.usage[index], self.accuracy[index])


def setting_curves(split: SplitResult) -> Curves:
    """Compute the curves of each setting over all images of a split and all seeds, [G, Y, A]."""
    count = split.count.sum()
    usage = split.heads_on.sum(axis=(-2, -1)) / (count * split.heads)
    return Curves(usage.mean(axis=1), (split.correct.sum(axis=-1) / count).mean(axis=1))


def class_curves(split: SplitResult) -> Curves:
    """Compute the curves of each class over all seeds, [G, Y, A, C]; a class without images counts as 0."""
    count = np.maximum(split.count, 1) * split.seeds
    usage = split.heads_on.sum(axis=(1, -1)) / (count * split.heads)
    return Curves(usage, split.correct.sum(axis=1) / count)


def unsteered_by_class(split: SplitResult) -> Curves:
    """Compute usage and accuracy of each class without steering, [C]."""
    count = np.maximum(split.count, 1)
    usage = split.unsteered_heads_on.sum(axis=-1) / (count * split.heads)
    return Curves(usage, split.unsteered_correct / count)


def naming_class(split: SplitResult, y: int) -> np.ndarray:
    """Return the class that steers each image, [N]: its label, or the unsteered model's prediction."""
    return split.labels if y == BY_LABEL else split.prediction


class GroupSums(NamedTuple):
    """Sums over all seeds and over the images that one class steers."""

    images: np.ndarray  # [C]
    correct: np.ndarray  # [G, A, C] right answers
    gates_on: np.ndarray  # [G, A, C] gates that are open
    macs: np.ndarray  # [G, A, C] of the layer


def sum_groups(split: SplitResult, y: int, gates: LayerGates) -> GroupSums:
    """Sum every setting over the images that each class steers, from what the sweep keeps of each image."""
    named_N, classes, images = naming_class(split, y), len(split.count), len(split.labels)
    strategies, seeds, _, alphas, _ = split.right.shape
    sums = GroupSums(np.bincount(named_N, minlength=classes), *np.zeros((3, strategies, alphas, classes)))
    for g, s in np.ndindex(strategies, seeds):
        pattern_AN = patterns_of_bits(split.gates[g, s, y], images)
        values = unpack_bits(split.right[g, s, y], images), np.bitwise_count(pattern_AN)
        for total, values_AN in zip(sums[1:], (*values, gates.macs(pattern_AN, split.kept_patches)), strict=True):
            total[g] += class_counts(values_AN, named_N, classes)
    return sums


def choose_class_alphas(result: SweepResult, gates: LayerGates, chosen_GY: np.ndarray, fewest: int) -> np.ndarray:
    """Choose an alpha for each class that names images, on the validation images that it names.

    With the label these are the class's images. With the prediction they are the images that the unsteered model takes
    for the class, as nothing else is known without a label. A class that names fewer than `fewest`
    validation images has the alpha that all classes have together.

    Args:
      chosen_GY: index of the common alpha.

    Returns:
      [G, Y, C] indices of alphas.
    """
    split = result.validation
    right_N = split.prediction == split.labels
    by_way = []
    for y in range(len(NAMED_BY)):
        sums = sum_groups(split, y, gates)
        floor_C = class_counts(right_N, naming_class(split, y), len(split.count)) * split.seeds
        cost = sums.gates_on if gates.heads_only else sums.macs
        chosen_GC = choose_alpha(result.alphas, np.moveaxis(cost, 1, 0), np.moveaxis(sums.correct, 1, 0), floor_C)
        by_way.append(np.where(sums.images >= fewest, chosen_GC, chosen_GY[:, y, None]))
    return np.stack(by_way, axis=1)


def score_class_alphas(
    split: SplitResult, gates: LayerGates, setting: tuple[int, int], chosen_C: np.ndarray
) -> tuple[Curves, np.ndarray]:
    """Score a strategy with an alpha for each class that names images, all seeds together.

    Args:
      setting: g and y, the strategy and the way to name the class.
      chosen_C: index of the alpha of the images that each class names.

    Returns:
      Curves and MACs by the images' labels, whoever named them: [C] each; a class without images counts as 0.
    """
    (g, y), images, classes = setting, len(split.labels), len(split.count)
    place_N = chosen_C[naming_class(split, y)], np.arange(images)
    right_C, on_C, macs_C = np.zeros((3, classes))
    for s in range(split.seeds):
        pattern_N = patterns_of_bits(split.gates[g, s, y], images)[place_N]
        right_C += class_counts(unpack_bits(split.right[g, s, y], images)[place_N], split.labels, classes)
        on_C += class_counts(np.bitwise_count(pattern_N), split.labels, classes)
        macs_C += class_counts(gates.macs(pattern_N, split.kept_patches), split.labels, classes)
    count_C = np.maximum(split.count, 1) * split.seeds
    return Curves(on_C / (count_C * split.heads), right_C / count_C), macs_C / count_C


class LayerMacs(NamedTuple):
    """The MACs of the steered layer on test: means over images and seeds."""

    dense: int  # of the layer in the dense model
    settings: np.ndarray  # [G, Y, A]
    by_class: np.ndarray  # [G, Y, A, C]
    unsteered: np.ndarray  # [C]
    resampled: np.ndarray  # [R, G, Y, A]
    resampled_unsteered: np.ndarray  # [R]


def setting_macs(split: SplitResult) -> np.ndarray:
    """Compute the layer's MACs in each setting, the mean over all images of a split and all seeds, [G, Y, A]."""
    return split.macs.sum(axis=-1).mean(axis=1) / split.count.sum()


def _score_macs(split: SplitResult, gates: LayerGates, weights: np.ndarray, seed: int) -> LayerMacs:
    """Compute the layer's MACs of every setting, and resample them over images and seeds; see `_resample`."""
    count, dense, patches_N = np.maximum(split.count, 1), gates.dense_macs, split.kept_patches

    def share_per_image(s: int) -> np.ndarray:
        shares = (gates.macs(patterns_of_bits(bits, len(patches_N)), patches_N) / dense for bits in split.gates[:, s])
        return np.stack([share.astype(np.float32) for share in shares])

    unsteered_N = gates.macs(split.pattern, patches_N)
    return LayerMacs(
        dense=dense,
        settings=setting_macs(split),
        by_class=split.macs.sum(axis=1) / (count * split.seeds),
        unsteered=split.unsteered_macs / count,
        resampled=dense * bootstrap_means(share_per_image, split.seeds, weights, np.random.default_rng(seed)),
        resampled_unsteered=(weights @ unsteered_N) / len(patches_N),
    )


@dataclass(frozen=True)
class Scores:
    """Every setting's scores on test, with the alphas that were chosen on validation."""

    names: tuple[str, ...]  # of the G strategies
    alphas: np.ndarray  # [A]
    confidence: float  # of every interval
    floor: float  # validation accuracy that a chosen alpha keeps
    validation: Curves  # [G, Y, A]
    chosen: np.ndarray  # [G, Y] index of the alpha
    class_chosen: np.ndarray  # [G, Y, C] index of the alpha of the images that each class names
    test: Curves  # [G, Y, A]
    by_class: Curves  # [G, Y, A, C]
    unsteered: Curves  # [C]
    weights: np.ndarray  # [R, N] float32: how often each resampling draws each image
    members_seed: int  # of the generator that draws each resampling's autoencoder seeds
    resampled: Curves  # [R, G, Y, A]
    resampled_unsteered: Curves  # [R]
    macs: LayerMacs
    plain_zero: bool  # alpha 0 is the unsteered model

    @property
    def zero(self) -> int:
        """Index of alpha 0."""
        return int(np.flatnonzero(self.alphas == 0)[0])

    @property
    def rising(self) -> np.ndarray:
        """Indices of the alphas from 0 up."""
        return np.arange(self.zero, len(self.alphas))

    def interval(self, resampled: np.ndarray) -> np.ndarray:
        """Compute the interval of resampled values: [R, ...] -> [2, ...]."""
        return percentile_interval(resampled, self.confidence)


def _resample(split: SplitResult, weights: np.ndarray, seed: int) -> tuple[Curves, Curves]:
    """Resample every setting and the unsteered model over images and seeds.

    Args:
      weights: [R, N].
      seed: of the generator; usage and accuracy draw the same autoencoder seeds.

    Returns:
      Curves of the settings [R, G, Y, A], and of the unsteered model [R].
    """
    count, heads = len(split.labels), split.heads
    usage_R, accuracy_R = (
        bootstrap_means(values, split.seeds, weights, np.random.default_rng(seed))
        for values in (
            lambda s: unpack_bits(split.gates[:, s], count).sum(axis=-2, dtype=np.uint8),
            lambda s: unpack_bits(split.right[:, s], count),
        )
    )
    right_N = split.prediction == split.labels
    used_N = pattern_to_gates(split.pattern, heads).sum(axis=1)
    unsteered_usage_R, unsteered_accuracy_R = (
        (weights @ values_N.astype(np.float32)).astype(np.float64) / count for values_N in (used_N, right_N)
    )
    return Curves(usage_R / heads, accuracy_R), Curves(unsteered_usage_R / heads, unsteered_accuracy_R)


def score_settings(
    result: SweepResult, config: Config, rng: np.random.Generator, members_rng: np.random.Generator | None = None
) -> Scores:
    """Choose alphas on validation, and score every setting on test with resamplings of its images and seeds.

    Args:
      rng: draws the images.
      members_rng: draws the autoencoder seeds; None: `rng` does, after the images.
    """
    alphas, validation, test = result.alphas, result.validation, result.test
    curves = setting_curves(validation)
    floor = validation.unsteered_correct.sum() / validation.count.sum() - config.steer.tolerance
    gates = LayerGates(config, config.sae_layer)
    cost = curves.usage if gates.heads_only else setting_macs(validation)
    chosen = choose_alpha(alphas, np.moveaxis(cost, -1, 0), np.moveaxis(curves.accuracy, -1, 0), floor)
    weights = bootstrap_weights(test.labels, config.steer.bootstrap, rng)
    seed = int((members_rng or rng).integers(2**32))
    resampled, resampled_unsteered = _resample(test, weights, seed)
    return Scores(
        names=result.strategies,
        alphas=alphas,
        confidence=config.steer.confidence,
        floor=floor,
        validation=curves,
        chosen=chosen,
        class_chosen=choose_class_alphas(result, gates, chosen, config.steer.least_validation),
        test=setting_curves(test),
        by_class=class_curves(test),
        unsteered=unsteered_by_class(test),
        weights=weights,
        members_seed=seed,
        resampled=resampled,
        resampled_unsteered=resampled_unsteered,
        macs=_score_macs(test, gates, weights, seed),
        plain_zero=is_unsteered_at_zero(config.steer),
    )
