"""What the counts say: intervals, paired tests, choices on validation, and the controls.

Everything works on what each image got: `right` (was the answer correct) and `used` (how many heads ran).
Axes: G strategies, S seeds, Y ways to name the class, A alphas, N images, C classes, H heads, P = 2^H patterns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from headsteer_jax.steer.table import pattern_to_gates
from headsteer_jax.steer.tally import class_counts


def bootstrap_weights(labels: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[R, N] float32: how often each image is drawn when every class is resampled on its own (rows sum to N)."""
    weights = np.zeros((resamples, len(labels)), np.float32)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return weights


def bootstrap_means(values: Callable[[int], np.ndarray], seeds: int, weights: np.ndarray, rng: Any) -> np.ndarray:
    """Resampled means of per-image values, over images and over seeds.

    Each resampling draws images (the rows of `weights`, shared by all settings, so that differences are paired) and,
    with several seeds, draws the seeds again as well.

    Args:
      values: a seed's values [..., N]; asked for one seed at a time, as all of them may be large.
      seeds: how many there are.
      weights: [R, N] from `bootstrap_weights`.

    Returns:
      [R, ...].
    """
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(weights)) / seeds  # [R, S]
    means: Any = 0.0
    for seed in range(seeds):
        own = np.asarray(values(seed), np.float32)
        flat = weights @ own.reshape(-1, own.shape[-1]).T / own.shape[-1]  # [R, rest]
        means = means + drawn[:, seed, None] * flat
    return means.reshape(len(weights), *own.shape[:-1])


def percentile_interval(resampled: np.ndarray, confidence: float) -> np.ndarray:
    """Percentile interval: [R, ...] -> [2, ...]."""
    tail = (1 - confidence) / 2
    return np.quantile(resampled, [tail, 1 - tail], axis=0)


def mcnemar_p(gained: np.ndarray | int, lost: np.ndarray | int) -> np.ndarray:
    """Two-sided exact McNemar p-values: of gained + lost discordant pairs, is the split even? (Binomial(n, 1/2).)"""
    gained, lost = np.asarray(gained), np.asarray(lost)
    return np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))


def adjust_p_values(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for testing all of them (false discovery rate)."""
    return stats.false_discovery_control(p)


def choose_alpha(alphas: np.ndarray, usage: np.ndarray, accuracy: np.ndarray, floor: np.ndarray | float) -> np.ndarray:
    """Of the alphas > 0 that keep the accuracy at `floor` or above, the one of lowest usage; where none does, 0.

    Args:
      alphas: [A], holding 0.
      usage, accuracy: [A, ...] on validation.
      floor: [...].

    Returns:
      [...] indices into alphas.
    """
    allowed = (accuracy >= floor) & (alphas > 0).reshape(-1, *[1] * (usage.ndim - 1))
    best = np.argmin(np.where(allowed, usage, np.inf), axis=0)
    return np.where(allowed.any(axis=0), best, int(np.flatnonzero(alphas == 0)[0]))


def accuracy_at_usage(usage: np.ndarray, accuracy: np.ndarray, wanted: float) -> float | None:
    """Accuracy where a path of settings, in the order of alpha from 0 up, first comes down to a usage.

    Linear between neighbouring settings; None where the path never gets there.
    """
    for i in range(len(usage) - 1):
        high, low = usage[i], usage[i + 1]
        if high >= wanted >= low and high > low:
            share = (high - wanted) / (high - low)
            return float(accuracy[i] + share * (accuracy[i + 1] - accuracy[i]))
    return None


def accuracy_front(usage: np.ndarray, accuracy: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """[..., A] settings -> [..., L]: the best accuracy of a setting that uses at most so much; NaN where none does."""
    allowed = usage[..., None, :] <= levels[:, None] + 1e-9
    best = np.max(np.where(allowed, accuracy[..., None, :], -np.inf), axis=-1)
    return np.where(np.isfinite(best), best, np.nan)


def wilcoxon_fewer(before: np.ndarray, after: np.ndarray) -> float:
    """One-sided p-value that paired counts fell: Wilcoxon's signed-rank test (zeros after Pratt); 1 if none moved."""
    change = np.asarray(after, np.float64) - before
    return float(stats.wilcoxon(change, zero_method="pratt", alternative="less").pvalue) if change.any() else 1.0


def fixed_subset_controls(
    validation_table: np.ndarray, validation_labels: np.ndarray, test_table: np.ndarray, test_labels: np.ndarray,
    validation_gated: np.ndarray, patterns: np.ndarray, classes: int, heads: int, related: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What fixed head subsets reach in the steered layer: chosen on validation, scored on test.

    Args:
      validation_table, test_table: [N, P] predictions under each pattern.
      validation_gated: [N] predictions of the unsteered gated model.
      patterns: [P] ascending; with up to MOST_HEADS heads all there are.
      related: [C, C] bool; a class and those related to it are its superclass.

    Returns:
      `all_on`, `all_off`: accuracies. `by_size`, for each number of heads 0 to H: `fixed` (the subset best on
      validation), `random` (mean over all subsets of the size), `oracle` (the best subset of each class), `superclass`
      (the best subset of each superclass; None where nothing is related), `image` (the share of test images that some
      subset of the size gets right: nothing is chosen, so it is a bound).
      `best_fixed`: the best subset of any size. `oracle`: for each class the smallest subset that keeps the class's
      gated accuracy on validation; with `class_patterns`, [C]. `size_patterns`, [H + 1, C]: of `by_size`'s oracle.
    """
    size_P = pattern_to_gates(patterns, heads).sum(axis=1)
    tables = ((validation_table, validation_labels), (test_table, test_labels))
    right_VP, right_NP = (table == labels[:, None] for table, labels in tables)
    right = [
        class_counts(one.T, labels, classes) for one, (_, labels) in zip((right_VP, right_NP), tables, strict=True)
    ]
    counts = [np.bincount(labels, minlength=classes) for _, labels in tables]
    chosen_on, scored_on = (r / np.maximum(n, 1) for r, n in zip(right, counts, strict=True))  # [P, C]
    mean_validation, mean_test = (r.sum(axis=1) / n.sum() for r, n in zip(right, counts, strict=True))
    share = counts[1] / counts[1].sum()
    family_CC = np.eye(classes, dtype=np.int64) if related is None else np.eye(classes, dtype=np.int64) | related

    def heads_of(pattern: int) -> list[int]:
        return np.flatnonzero(pattern_to_gates(np.array(pattern), heads)).tolist()

    by_size, size_patterns = [], []
    for size in range(heads + 1):
        members = np.flatnonzero(size_P == size)
        fixed = int(members[np.argmax(mean_validation[members])])
        best_C = members[np.argmax(chosen_on[members], axis=0)]
        group_C = members[np.argmax(right[0][members] @ family_CC, axis=0)]
        size_patterns.append(patterns[best_C])
        by_size.append(
            {
                "usage": size / heads,
                "fixed": float(mean_test[fixed]),
                "heads": heads_of(patterns[fixed]),
                "random": float(mean_test[members].mean()),
                "oracle": float(np.sum(share * scored_on[best_C, np.arange(classes)])),
                "superclass": None
                if related is None
                else float(np.sum(share * scored_on[group_C, np.arange(classes)])),
                "image": float(right_NP[:, members].any(axis=1).mean()),
            }
        )
    gated_C = class_counts(validation_gated == validation_labels, validation_labels, classes) / np.maximum(counts[0], 1)
    # of the patterns that keep the class's accuracy the smallest, of those the most accurate
    rank_PC = np.where(chosen_on >= gated_C, size_P[:, None] - chosen_on / 2, np.inf)
    oracle_C = np.where(np.isfinite(rank_PC).any(axis=0), np.argmin(rank_PC, axis=0), len(patterns) - 1)
    best = int(np.argmax(mean_validation))
    return {
        "all_on": float(mean_test[-1]),
        "all_off": float(mean_test[0]),
        "best_fixed": {
            "usage": float(size_P[best] / heads),
            "accuracy": float(mean_test[best]),
            "heads": heads_of(patterns[best]),
        },
        "oracle": {
            "usage": float(np.sum(share * size_P[oracle_C]) / heads),
            "accuracy": float(np.sum(share * scored_on[oracle_C, np.arange(classes)])),
        },
        "by_size": by_size,
        "class_patterns": patterns[oracle_C],
        "size_patterns": np.stack(size_patterns),
    }


def to_float_list(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
