"""Statistics of the sweep: intervals, paired tests, choices on validation, and the controls.

Axes: R resamplings, S seeds, A alphas, L levels of usage, N images, C classes, H gates of the steered layer (its heads,
then attention and the MLP, as far as it gates them), P gate patterns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from headsteer_jax.steer.gates import pattern_to_gates
from headsteer_jax.steer.tally import class_counts

TINY = 1e-9  # counts are exact, but their quotients are not: what comes this near a bound keeps it


def bootstrap_weights(labels: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw how often each resampling takes each image, class by class: [R, N] float32, whose rows sum to N."""
    weights = np.zeros((resamples, len(labels)), np.float32)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return weights


def bootstrap_means(values: Callable[[int], np.ndarray], seeds: int, weights: np.ndarray, rng: Any) -> np.ndarray:
    """Compute resampled means of per-image values, over images and over seeds.

    Each resampling draws images (the rows of `weights`, shared by all settings, so that differences are paired) and,
    with several seeds, draws the seeds again as well.

    Args:
      values: seed -> its values [..., N]; called for one seed at a time, as all of them together may be large.
      seeds: how many there are.
      weights: [R, N] from `bootstrap_weights`.

    Returns:
      [R, ...].
    """
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(weights))  # [R, S]
    sums: Any = 0.0  # exact if the values are counts, so that equal settings have equal means
    for seed in range(seeds):
        seed_values = np.asarray(values(seed), np.float32)
        count = seed_values.shape[-1]
        flat = (weights @ seed_values.reshape(-1, count).T).astype(np.float64)  # [R, all settings]
        sums = sums + drawn[:, seed, None] * flat
    return (sums / (seeds * count)).reshape(len(weights), *seed_values.shape[:-1])


def percentile_interval(resampled: np.ndarray, confidence: float) -> np.ndarray:
    """Compute the percentile interval of resampled values: [R, ...] -> [2, ...]."""
    tail = (1 - confidence) / 2
    return np.quantile(resampled, [tail, 1 - tail], axis=0)


def mcnemar_p(gained: np.ndarray | int, lost: np.ndarray | int) -> np.ndarray:
    """Compute two-sided exact McNemar p-values that gained + lost discordant pairs split evenly: Binomial(n, 1/2)."""
    gained, lost = np.asarray(gained), np.asarray(lost)
    return np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))


def adjust_p_values(p: np.ndarray) -> np.ndarray:
    """Adjust p-values for testing all of them (Benjamini-Hochberg, false discovery rate)."""
    return stats.false_discovery_control(p)


def choose_alpha(alphas: np.ndarray, usage: np.ndarray, accuracy: np.ndarray, floor: np.ndarray | float) -> np.ndarray:
    """Choose the alpha of lowest usage among those > 0 that keep the accuracy at `floor` or above; 0 if none does.

    Args:
      alphas: [A], holding 0.
      usage, accuracy: [A, ...] on validation.
      floor: [...].

    Returns:
      [...] indices into alphas.
    """
    allowed = (accuracy >= floor - TINY) & (alphas > 0).reshape(-1, *[1] * (usage.ndim - 1))
    best = np.argmin(np.where(allowed, usage, np.inf), axis=0)
    return np.where(allowed.any(axis=0), best, int(np.flatnonzero(alphas == 0)[0]))


def accuracy_front(usage: np.ndarray, accuracy: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Find the best accuracy [..., L] of [..., A] settings that use at most each level; NaN where none does."""
    allowed = usage[..., None, :] <= levels[:, None] + TINY
    best = np.max(np.where(allowed, accuracy[..., None, :], -np.inf), axis=-1)
    return np.where(np.isfinite(best), best, np.nan)


def wilcoxon_fewer(before: np.ndarray, after: np.ndarray) -> float:
    """Test whether paired counts fell: one-sided p-value of Wilcoxon's signed-rank test (Pratt); 1 if none changed."""
    change = np.asarray(after, np.float64) - before
    return float(stats.wilcoxon(change, zero_method="pratt", alternative="less").pvalue) if change.any() else 1.0


class LabelledTable(NamedTuple):
    """A split's answers under every gate pattern."""

    predictions: np.ndarray  # [N, P]
    labels: np.ndarray  # [N]


class SubsetScores(NamedTuple):
    """The answers of one split under every fixed head subset, by class."""

    right: np.ndarray  # [N, P] bool
    correct: np.ndarray  # [P, C] right answers
    images: np.ndarray  # [C] how many there are

    @property
    def accuracy(self) -> np.ndarray:
        """[P, C] accuracy on each class; 0 for a class without images."""
        return self.correct / np.maximum(self.images, 1)

    @property
    def mean(self) -> np.ndarray:
        """[P] accuracy over all images."""
        return self.correct.sum(axis=1) / self.images.sum()


def _score_subsets(table: LabelledTable, classes: int) -> SubsetScores:
    """Count the right answers of every subset."""
    right_NP = table.predictions == table.labels[:, None]
    count_C = np.bincount(table.labels, minlength=classes)
    return SubsetScores(right_NP, class_counts(right_NP.T, table.labels, classes), count_C)


def _mean_of_choice(test: SubsetScores, choice_C: np.ndarray) -> float:
    """Compute the test accuracy if every class has a subset of its own."""
    share_C = test.images / test.images.sum()
    return float(np.sum(share_C * test.accuracy[choice_C, np.arange(len(choice_C))]))


def _score_superclasses(
    validation: SubsetScores, test: SubsetScores, members: np.ndarray, related: np.ndarray
) -> float:
    """Compute the test accuracy if every superclass has the subset, of some members, that is best on validation."""
    family_CC = np.eye(len(related), dtype=np.int64) | related
    return _mean_of_choice(test, members[np.argmax(validation.correct[members] @ family_CC, axis=0)])


def _list_heads(pattern: int, heads: int) -> list[int]:
    """List the heads that a pattern runs."""
    return np.flatnonzero(pattern_to_gates(np.array(pattern), heads)).tolist()


def fixed_subset_controls(
    validation_table: LabelledTable, test_table: LabelledTable, gated_N: np.ndarray, patterns: np.ndarray,
    classes: int, heads: int, related: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score fixed head subsets in the steered layer: they are chosen on validation and scored on test.

    Args:
      gated_N: validation predictions of the unsteered gated model.
      patterns: [P] ascending, those of the tables; with up to MOST_HEADS heads all there are.
      related: [C, C] bool; a class and those related to it are its superclass.

    Returns:
      `all_on`, `all_off`: accuracies. `by_size`, for each number of heads 0 to H: `fixed` (the subset best on
      validation), `random` (mean over all subsets of the size), `oracle` (the best subset of each class), `superclass`
      (the best subset of each superclass; None if no classes are related), `image` (the share of test images that some
      subset of the size gets right: nothing is chosen, so it is a bound).
      `best_fixed`: the best subset of any size. `oracle`: for each class the smallest subset that keeps the class's
      gated accuracy on validation; with `class_patterns`, [C]. `size_patterns`, [H + 1, C]: those of the oracles in
      `by_size`; `fixed_patterns`, [H + 1], and `best_patterns`, [1]: those of the fixed subsets.
    """
    size_P = pattern_to_gates(patterns, heads).sum(axis=1)
    validation, test = (_score_subsets(table, classes) for table in (validation_table, test_table))
    by_size, size_patterns, fixed_patterns = [], [], []
    for size in range(heads + 1):
        members = np.flatnonzero(size_P == size)
        fixed = int(members[np.argmax(validation.mean[members])])
        best_C = members[np.argmax(validation.accuracy[members], axis=0)]
        size_patterns.append(patterns[best_C])
        fixed_patterns.append(patterns[fixed])
        by_size.append(
            {
                "usage": size / heads,
                "fixed": float(test.mean[fixed]),
                "heads": _list_heads(patterns[fixed], heads),
                "random": float(test.mean[members].mean()),
                "oracle": _mean_of_choice(test, best_C),
                "superclass": None if related is None else _score_superclasses(validation, test, members, related),
                "image": float(test.right[:, members].any(axis=1).mean()),
            }
        )
    oracle_C = _smallest_sufficient(validation, validation_table.labels, gated_N, size_P)
    best = int(np.argmax(validation.mean))
    share_C = test.images / test.images.sum()
    return {
        "all_on": float(test.mean[-1]),
        "all_off": float(test.mean[0]),
        "best_fixed": {
            "usage": float(size_P[best] / heads),
            "accuracy": float(test.mean[best]),
            "heads": _list_heads(patterns[best], heads),
        },
        "oracle": {
            "usage": float(np.sum(share_C * size_P[oracle_C]) / heads),
            "accuracy": _mean_of_choice(test, oracle_C),
        },
        "by_size": by_size,
        "class_patterns": patterns[oracle_C],
        "size_patterns": np.stack(size_patterns),
        "fixed_patterns": np.array(fixed_patterns),
        "best_patterns": patterns[[best]],
    }


def _smallest_sufficient(
    validation: SubsetScores, labels: np.ndarray, gated_N: np.ndarray, size_P: np.ndarray
) -> np.ndarray:
    """Choose for each class the smallest subset that keeps its gated accuracy, of those the most accurate: [C].

    All heads are chosen for a class whose accuracy no subset keeps.
    """
    gated_C = class_counts(gated_N == labels, labels, len(validation.images)) / np.maximum(validation.images, 1)
    rank_PC = np.where(validation.accuracy >= gated_C, size_P[:, None] - validation.accuracy / 2, np.inf)
    return np.where(np.isfinite(rank_PC).any(axis=0), np.argmin(rank_PC, axis=0), len(size_P) - 1)


def to_float_list(values: np.ndarray) -> list[float]:
    """Convert an array to a list of Python floats, as JSON needs."""
    return [float(value) for value in values]
