"""Headline numbers of the sweep: alphas are chosen on validation, and everything is scored on test.

Usage is the share of the steered layer's gates that are open: of its heads, and of attention and the MLP if it gates
these. MACs are those of the steered layer, means over images.

Axes: G strategies, S seeds, Y ways to name the class, A alphas, N images, C classes, H gates of the steered layer, K
subset sizes, R resamplings.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from headsteer_jax.analysis.claims import judge_claims
from headsteer_jax.analysis.push import explain_usage
from headsteer_jax.analysis.scores import (
    Curves,
    Scores,
    class_curves,
    score_class_alphas,
    score_settings,
    unsteered_by_class,
)
from headsteer_jax.analysis.stats import (
    TINY,
    LabelledTable,
    accuracy_front,
    adjust_p_values,
    fixed_subset_controls,
    mcnemar_p,
    percentile_interval,
    to_float_list,
    wilcoxon_fewer,
)
from headsteer_jax.config.schema import Config, SteerConfig
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.results import BY_LABEL, BY_PREDICTION, SplitResult, SweepResult
from headsteer_jax.steer.tally import StepFunction, best_alpha, smallest_alpha, unpack_bits

Arrays = dict[str, np.ndarray]


def saved_classes(steered: Curves, unsteered: Curves, count_C: np.ndarray, saving: float) -> np.ndarray:
    """Tell for each class whether its usage fell by at least `saving` while its accuracy did not fall: [C] bool.

    Args:
      steered, unsteered: [C] each.
      count_C: images; a class without images is not saved.
    """
    fell = unsteered.usage - steered.usage >= saving - TINY
    return fell & (steered.accuracy >= unsteered.accuracy - TINY) & (count_C > 0)


def summarise(result: SweepResult, config: Config) -> tuple[dict[str, Any], Arrays]:
    """Compute the headline numbers of a sweep.

    Returns:
      `last_layer`, `overlap`, `steering`, `classes` and `claims` of summary.json, and further arrays for sweep.nc:
      `chosen` [G, Y] and `class_chosen` [G, Y, C], the indices of the alphas chosen on validation; on test `usage`,
      `accuracy`, `macs` [G, Y, A], their intervals [2, G, Y, A], `class_usage`, `class_accuracy`, `class_macs`
      [G, Y, A, C].
    """
    steer, names, rng = config.steer, result.strategies, np.random.default_rng([config.seed, 4])
    scores = score_settings(result, config, rng)
    usage_ci, accuracy_ci, macs_ci = (scores.interval(values) for values in (*scores.resampled, scores.macs.resampled))
    gates = LayerGates(config, config.sae_layer)
    controls = _score_controls(result, gates)
    steering: dict[str, Any] = {"unsteered": _unsteered_row(result.test, scores)}
    for g, name in enumerate(names):
        by_label, by_prediction = (
            _chosen_row(result, scores, gates, (g, y), steer.saving) for y in (BY_LABEL, BY_PREDICTION)
        )
        steering[name] = by_label | {
            "by_predicted_class": by_prediction,
            "curve": {
                "alpha": to_float_list(scores.alphas),
                "usage": to_float_list(scores.test.usage[g, BY_LABEL]),
                "usage_ci": usage_ci[:, g, BY_LABEL].T.tolist(),
                "accuracy": to_float_list(scores.test.accuracy[g, BY_LABEL]),
                "accuracy_ci": accuracy_ci[:, g, BY_LABEL].T.tolist(),
                "macs": to_float_list(scores.macs.settings[g, BY_LABEL]),
                "macs_ci": macs_ci[:, g, BY_LABEL].T.tolist(),
            },
        }
    summary: dict[str, Any] = {
        "gated_accuracy": steering["unsteered"]["accuracy"],
        "last_layer": {"usage": steering["unsteered"]["usage"], "layer": config.sae_layer, "gates": list(gates.names)}
        | {"macs": steering["unsteered"]["macs"], "dense_macs": scores.macs.dense}
        | {name: value for name, value in controls.items() if not name.endswith("patterns")},
        "steering": steering,
        "overlap": _summarise_overlaps(result, steer, rng),
    }
    for name, explained in explain_usage(result).items():
        steering[name]["push"] = explained
    if "class" in names:
        _judge_class_steering(summary, result, scores, config, rng)
    for name, rows in zip(names, _compare_with_oracle(result, scores, controls["size_patterns"]), strict=True):
        steering[name]["against_oracle"] = rows
    arrays = {
        "chosen": scores.chosen, "class_chosen": scores.class_chosen,
        "usage": scores.test.usage, "accuracy": scores.test.accuracy,
        "usage_ci": usage_ci, "accuracy_ci": accuracy_ci, "oracle_patterns": controls["class_patterns"],
        "class_usage": scores.by_class.usage, "class_accuracy": scores.by_class.accuracy,
        "macs": scores.macs.settings, "macs_ci": macs_ci, "class_macs": scores.macs.by_class,
    }  # fmt: skip
    if result.steps:
        validation, test = result.steps["validation"], result.steps["test"]
        for name in names:
            cost = validation[name].heads_on if gates.heads_only else validation[name].macs
            alpha = best_alpha(validation[name], scores.floor, cost)
            steering[name]["exact"] = _score_exact(alpha, validation[name], test[name], steer)
        arrays |= _exact_curves(scores.alphas, [test[name] for name in names])
    return summary, arrays


def _score_controls(result: SweepResult, gates: LayerGates) -> dict[str, Any]:
    """Score the fixed subsets of the gates on the sweep's tables, with the layer's MACs under each."""
    validation, test = result.validation, result.test
    controls = fixed_subset_controls(
        LabelledTable(validation.table, validation.labels), LabelledTable(test.table, test.labels),
        validation.prediction, result.subset, len(test.count), test.heads, result.related,
    )  # fmt: skip
    macs_P = gates.mean_macs(result.subset, test.kept_patches)
    for row, pattern in zip(controls["by_size"], controls["fixed_patterns"], strict=True):
        members = np.bitwise_count(result.subset) == round(row["usage"] * gates.count)
        row["macs"] = float(macs_P[np.searchsorted(result.subset, pattern)])
        row["random_macs"] = float(macs_P[members].mean())
    best, oracle = controls["best_fixed"], controls["oracle"]
    best["macs"] = float(macs_P[np.searchsorted(result.subset, controls["best_patterns"][0])])
    oracle["macs"] = float(gates.macs(controls["class_patterns"][test.labels], test.kept_patches).mean())
    for row in (best, *controls["by_size"]) if "sublayers" in gates.kinds else ():
        row["sublayers"] = [gates.names[gate] for gate in row["heads"] if gate >= gates.heads]
        row["heads"] = [gate for gate in row["heads"] if gate < gates.heads]
    return controls


def _unsteered_row(test: SplitResult, scores: Scores) -> dict[str, Any]:
    """Summarise the unsteered model."""
    share_C = test.count / test.count.sum()
    return {
        "alpha": 0.0,
        "usage": float(np.sum(share_C * scores.unsteered.usage)),
        "usage_ci": to_float_list(scores.interval(scores.resampled_unsteered.usage)),
        "accuracy": float(np.sum(share_C * scores.unsteered.accuracy)),
        "accuracy_ci": to_float_list(scores.interval(scores.resampled_unsteered.accuracy)),
        "classes_saved": 0,
        "macs": (macs := float(test.unsteered_macs.sum() / test.count.sum())),
        "macs_share": macs / scores.macs.dense,
        "macs_ci": to_float_list(scores.interval(scores.macs.resampled_unsteered)),
        "extra_macs": 0.0,
        "total_macs_share": macs / scores.macs.dense,
    }


def _chosen_row(
    result: SweepResult, scores: Scores, gates: LayerGates, setting: tuple[int, int], saving: float
) -> dict[str, Any]:
    """Summarise a strategy at its chosen alpha, and with an alpha chosen for each class.

    Args:
      setting: g and y, the strategy and the way to name the class.
    """
    (g, y), test = setting, result.test
    a, share_C = int(scores.chosen[g, y]), test.count / test.count.sum()
    gained, lost = (counts[g, 0, y, a].sum() for counts in (test.gained, test.lost))
    without_latents = (result.latents[g] < 0).all()  # a direction times 0 is nothing in every form and mode
    unsteered_here = a == scores.zero and (scores.plain_zero or without_latents)

    def change_ci(resampled: np.ndarray, unsteered_R: np.ndarray) -> list[float]:
        return to_float_list(scores.interval(resampled[:, g, y, a] - unsteered_R))

    def count_saved(curves: Curves) -> int:
        return int(saved_classes(curves, scores.unsteered, test.count, saving).sum())

    common = scores.by_class.select(g, y, a)

    def score_per_class() -> dict[str, Any]:
        per_class, macs_C = score_class_alphas(test, gates, setting, scores.class_chosen[g, y])
        return {
            "usage": float(np.sum(share_C * per_class.usage)),
            "accuracy": float(np.sum(share_C * per_class.accuracy)),
            "classes_saved": count_saved(per_class),
            "macs": float(np.sum(share_C * macs_C)),
        }

    return {
        "alpha": float(scores.alphas[a]),
        "usage": float(scores.test.usage[g, y, a]),
        "usage_ci": to_float_list(scores.interval(scores.resampled.usage[:, g, y, a])),
        "usage_change_ci": change_ci(scores.resampled.usage, scores.resampled_unsteered.usage),
        "accuracy": float(scores.test.accuracy[g, y, a]),
        "accuracy_ci": to_float_list(scores.interval(scores.resampled.accuracy[:, g, y, a])),
        "accuracy_change_ci": change_ci(scores.resampled.accuracy, scores.resampled_unsteered.accuracy),
        "mcnemar_p": float(mcnemar_p(gained, lost)),
        "classes_saved": count_saved(common),
        "macs": (macs := float(scores.macs.settings[g, y, a])),
        "macs_share": macs / scores.macs.dense,
        "macs_ci": to_float_list(scores.interval(scores.macs.resampled[:, g, y, a])),
        "macs_change_ci": change_ci(scores.macs.resampled, scores.macs.resampled_unsteered),
        "extra_macs": (extra := 0.0 if unsteered_here else float(result.extra_macs[setting])),
        "total_macs_share": (macs + extra) / scores.macs.dense,
        "alpha_per_class": score_per_class() if result.class_matters[g] else None,
    }


def _judge_class_steering(
    summary: dict[str, Any], result: SweepResult, scores: Scores, config: Config, rng: np.random.Generator
) -> None:
    """Add to a summary what follows from class steering: tables of classes, groups, shared heads, fronts and claims."""
    names, steer = result.strategies, config.steer
    for name, key in (("class", "classes"), ("gate_aligned", "classes_gate_aligned")):
        if name in names:
            g = names.index(name)
            summary[key] = _tabulate_classes(result, scores, g, steer.saving)
            a = int(scores.chosen[g, BY_LABEL])
            summary["steering"][name]["group"] = _summarise_group(result, g, a, summary[key], steer.saving)
    if result.related is not None:
        g = names.index("class")
        a = int(scores.chosen[g, BY_LABEL])
        summary["overlap"]["heads"] = _related_heads(result.test, g, a, result.related, steer, rng)
    if "gate_aligned" in names and (fronts := compare_fronts(scores, summary["steering"]["unsteered"]["usage"])):
        summary["fronts"] = fronts
    summary["claims"] = judge_claims(summary, result, scores, config)
    for claim in summary["claims"]:
        claim.pop("conditions", None)
    summary.get("fronts", {}).pop("lowest_resampled", None)


def _score_exact(best: float, validation: StepFunction, test: StepFunction, steer: SteerConfig) -> dict[str, Any]:
    """Score alphas on test that are chosen on validation among all there are: the best, and one for each usage.

    Args:
      best: the alpha of lowest usage, or of fewest MACs, that keeps the accuracy on validation.
    """

    def score(alpha: float | None) -> dict[str, Any]:
        if alpha is None:
            return {"alpha": None, "usage": None, "accuracy": None, "macs": None}
        at = test.at(alpha)
        scores = {"usage": test.usage[at], "accuracy": test.accuracy[at], "macs": test.macs[at] / test.images}
        return {"alpha": alpha} | {name: float(value) for name, value in scores.items()}

    return score(best) | {
        "steps": len(test.alpha),
        "for_usage": [{"wanted": usage} | score(smallest_alpha(validation, usage)) for usage in steer.wanted_usage],
    }


def _exact_curves(alphas: np.ndarray, steps: Sequence[StepFunction], points: int = 501) -> Arrays:
    """Evaluate exact functions at many alphas over the grid's range, dense around 0: for plots."""
    unit = np.abs(alphas[alphas != 0]).min() if len(alphas) > 1 else 1.0
    dense = unit * np.sinh(np.linspace(np.arcsinh(alphas[0] / unit), np.arcsinh(alphas[-1] / unit), points))
    return {
        "exact_alphas": dense,
        "exact_usage": np.stack([function.usage[function.at(dense)] for function in steps]),
        "exact_accuracy": np.stack([function.accuracy[function.at(dense)] for function in steps]),
        "exact_macs": np.stack([function.macs[function.at(dense)] / function.images for function in steps]),
    }


def _compare_with_oracle(result: SweepResult, scores: Scores, patterns_KC: np.ndarray) -> list[list[dict[str, Any]]]:
    """Compare every strategy with the best subset of each class, at each number of heads.

    Like the subsets, a strategy's alpha is chosen on validation: the most accurate alpha >= 0 whose usage there is at
    most that of the subsets.

    Args:
      patterns_KC: the oracle's subsets of each size and class, chosen on validation.

    Returns:
      A list of rows for each strategy, one for each number of heads that it reaches on validation.
    """
    labels, rising = result.test.labels, scores.rising
    place_KN = np.searchsorted(result.subset, patterns_KC[:, labels])
    right_KN = np.take_along_axis(result.test.table.T, place_KN, axis=0) == labels
    oracle_R = (scores.weights @ right_KN.T.astype(np.float32)).astype(np.float64) / len(labels)
    levels = np.arange(len(patterns_KC)) / (len(patterns_KC) - 1)
    comparisons = []
    for g in range(len(result.strategies)):
        usage_A, accuracy_A = scores.validation.select(g, BY_LABEL, rising)
        rows = []
        for k in np.flatnonzero(levels >= usage_A.min() - TINY):
            a = rising[np.argmax(np.where(usage_A <= levels[k] + TINY, accuracy_A, -np.inf))]
            difference_R = scores.resampled.accuracy[:, g, BY_LABEL, a] - oracle_R[:, k]
            rows.append({
                "usage": float(levels[k]), "front": float(scores.test.accuracy[g, BY_LABEL, a]),
                "oracle": float(right_KN[k].mean()), "difference_ci": to_float_list(scores.interval(difference_R)),
            })  # fmt: skip
        comparisons.append(rows)
    return comparisons


def _compare_related(
    pairs_CC: np.ndarray, related_CC: np.ndarray, steer: SteerConfig, rng: np.random.Generator
) -> dict[str, Any]:
    """Compare a measure's mean over related pairs of classes and over others, with the interval of their difference.

    Classes are resampled, not pairs: pairs with a class in common are not independent. Empty if there is no related
    pair, or no other.
    """
    apart_CC = ~np.eye(len(pairs_CC), dtype=bool) & ~related_CC
    if not related_CC.any() or not apart_CC.any():
        return {}
    differences = []
    for _ in range(steer.bootstrap):
        weight = np.bincount(rng.integers(0, len(pairs_CC), len(pairs_CC)), minlength=len(pairs_CC))
        weight = np.outer(weight, weight)
        if (weight * related_CC).any() and (weight * apart_CC).any():
            differences.append(
                np.average(pairs_CC, weights=weight * related_CC) - np.average(pairs_CC, weights=weight * apart_CC)
            )
    return {
        "related": float(pairs_CC[related_CC].mean()),
        "unrelated": float(pairs_CC[apart_CC].mean()),
        "related_minus_unrelated_ci": to_float_list(percentile_interval(np.array(differences), steer.confidence)),
    }


def _summarise_overlaps(result: SweepResult, steer: SteerConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Average the shares of latents in common: global against class ([LH26]: 0.1641), and between two classes."""
    overlaps: dict[str, Any] = {"global_class": None, "class_class": None}
    if result.overlap_global_class is not None:
        overlaps["global_class"] = float(result.overlap_global_class.mean())
    if result.overlap_class_class is not None:
        pairs_CC = result.overlap_class_class.mean(axis=0)
        overlaps["class_class"] = float(pairs_CC[~np.eye(len(pairs_CC), dtype=bool)].mean())
        if result.related is not None:
            overlaps |= _compare_related(pairs_CC, result.related, steer, rng)
    return overlaps


def _heads_after(split: SplitResult, g: int, a: int) -> np.ndarray:
    """Compute on what share of a class's images each head runs if they are steered by label, over all seeds: [C, H]."""
    return split.heads_on[g, :, BY_LABEL, a].sum(axis=0) / np.maximum(split.count * split.seeds, 1)[:, None]


def _heads_before(split: SplitResult) -> np.ndarray:
    """Compute on what share of a class's images each head runs without steering: [C, H]."""
    return split.unsteered_heads_on / np.maximum(split.count, 1)[:, None]


def _related_heads(
    split: SplitResult, g: int, a: int, related: np.ndarray, steer: SteerConfig, rng: np.random.Generator
) -> dict[str, Any]:
    """Compare the heads that related classes run: Jaccard index of the heads on for most images, before and after.

    Classes without steered images are left out. Two classes without any head that is on for most images count as equal.
    """
    comparisons, steered = dict[str, Any](), np.flatnonzero(split.count)
    related = related[np.ix_(steered, steered)]
    for name, share_CH in (("before", _heads_before(split)), ("after", _heads_after(split, g, a))):
        on_CH = share_CH[steered] > 0.5
        shared_CC = (on_CH[:, None] & on_CH).sum(axis=-1)
        either_CC = (on_CH[:, None] | on_CH).sum(axis=-1)
        jaccard_CC = np.where(either_CC > 0, shared_CC / np.maximum(either_CC, 1), 1.0)
        comparisons[name] = _compare_related(jaccard_CC, related, steer, rng)
    return comparisons


def _summarise_group(result: SweepResult, g: int, a: int, table: list[dict[str, Any]], saving: float) -> dict[str, Any]:
    """Summarise the saved classes together, and those that validation alone promised to be saved, scored on test.

    Args:
      table: the rows of all classes.

    Returns:
      `saved_significantly`: saved classes whose fall in usage is significant (Wilcoxon, Benjamini-Hochberg over all
      classes). `promised`: chosen without a look at test, so that their test figures are not the best of many; their
      accuracy is compared by one exact McNemar test over all their images (first seed).
    """
    validation, test = result.validation, result.test
    steered = class_curves(validation).select(g, BY_LABEL, a)
    promised_C = saved_classes(steered, unsteered_by_class(validation), validation.count, saving)
    names = {name for name, promised in zip(result.class_names, promised_C, strict=True) if promised}
    rows = [row for row in table if row["name"] in names]
    gained, lost = (int(counts[g, 0, BY_LABEL, a][promised_C].sum()) for counts in (test.gained, test.lost))
    images = np.array([row["images"] for row in rows], float)

    def mean_change(quantity: str) -> float | None:
        differences = [row[f"{quantity}_after"] - row[f"{quantity}_before"] for row in rows]
        return float(np.average(differences, weights=images)) if rows else None

    return {
        "saved_significantly": sum(row["saved"] and row["p_usage_adjusted"] < 0.05 for row in table),
        "promised": {
            "classes": len(rows), "saved": sum(row["saved"] for row in rows),
            "usage_change": mean_change("usage"), "accuracy_change": mean_change("accuracy"),
            "gained": gained, "lost": lost, "mcnemar_p": float(mcnemar_p(gained, lost)),
        },
    }  # fmt: skip


def compare_fronts(scores: Scores, unsteered: float, points: int = 21) -> dict[str, Any] | None:
    """Compare the fronts of `gate_aligned` and of [LH26]'s `class` at each usage that both reach, for alphas >= 0.

    Args:
      unsteered: usage of the unsteered model.
      points: the number of usages.

    Returns:
      The best accuracies at or below each usage. `lowest_difference`: where gate_aligned is least ahead, apart from the
      lowest usage, with its interval and `lowest_resampled`, [R] with NaN where a resampling has no usage in common.
      None if the fronts have no usage in common.
    """
    rising, usage, confidence = scores.rising, scores.test.usage[:, BY_LABEL], scores.confidence
    rows = [scores.names.index("class"), scores.names.index("gate_aligned")]
    reached = max(usage[row, rising].min() for row in rows)
    levels = np.linspace(reached, unsteered, points)
    by_class, aligned = (accuracy_front(*scores.test.select(row, BY_LABEL, rising), levels) for row in rows)
    by_class_R, aligned_R = (
        accuracy_front(*scores.resampled.select(slice(None), row, BY_LABEL, rising), levels) for row in rows
    )
    difference_R = aligned_R - by_class_R
    reached_L = np.isfinite(difference_R).any(axis=0)  # a resampling may use more, and not come down to a level
    levels, by_class, aligned = levels[reached_L], by_class[reached_L], aligned[reached_L]
    difference_R = difference_R[:, reached_L]
    # The least lead leaves out the lowest usage, in the value as in the resamplings: the front that ends there reaches
    # it with its last setting only, and in about half of the resamplings not at all.
    above, above_R = (aligned - by_class)[1:], difference_R[:, 1:]
    compared_R = np.isfinite(above_R).any(axis=1)
    if not compared_R.any():
        return None
    lowest_R = np.full(len(difference_R), np.nan)
    lowest_R[compared_R] = np.nanmin(above_R[compared_R], axis=1)
    return {
        "usage": to_float_list(levels),
        "class": to_float_list(by_class),
        "gate_aligned": to_float_list(aligned),
        "difference_ci": np.nanquantile(difference_R, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).T.tolist(),
        "lowest_difference": float(np.min(above)),
        "lowest_difference_ci": to_float_list(scores.interval(lowest_R[compared_R])),
        "lowest_resampled": lowest_R,
    }


def _adjust_over_classes(p_C: np.ndarray, count_C: np.ndarray) -> np.ndarray:
    """Adjust p-values over the classes that have images: [C]; 1 for the others."""
    adjusted_C = np.ones(len(p_C))
    adjusted_C[count_C > 0] = adjust_p_values(p_C[count_C > 0])
    return adjusted_C


def _tabulate_classes(result: SweepResult, scores: Scores, g: int, saving: float) -> list[dict[str, Any]]:
    """Tabulate each class under a strategy at its common alpha: the saved ones first, then by saving.

    `p`: accuracy, the first seed's exact McNemar test; `p_usage`: heads in use fell, Wilcoxon's test over the class's
    images, on means over seeds. Both with Benjamini-Hochberg over classes.
    """
    test, a = result.test, int(scores.chosen[g, BY_LABEL])
    labels, count, unsteered = test.labels, test.count, scores.unsteered
    steered = scores.by_class.select(g, BY_LABEL, a)
    saved = saved_classes(steered, unsteered, count, saving)
    p = mcnemar_p(test.gained[g, 0, BY_LABEL, a], test.lost[g, 0, BY_LABEL, a])
    heads_before_N = pattern_to_gates(test.pattern, test.heads).sum(axis=1)
    heads_after_N = unpack_bits(test.gates[g, :, BY_LABEL, a], len(labels)).sum(axis=1).mean(axis=0)
    p_usage = np.array(
        [wilcoxon_fewer(heads_before_N[labels == c], heads_after_N[labels == c]) for c in range(len(count))]
    )
    adjusted, adjusted_usage = _adjust_over_classes(p, count), _adjust_over_classes(p_usage, count)
    before_CH, after_CH = _heads_before(test), _heads_after(test, g, a)
    rows = [
        {
            "name": str(result.class_names[c]),
            "images": int(count[c]),
            "usage_before": float(unsteered.usage[c]),
            "usage_after": float(steered.usage[c]),
            "accuracy_before": float(unsteered.accuracy[c]),
            "accuracy_after": float(steered.accuracy[c]),
            "heads_before": np.flatnonzero(before_CH[c] > 0.5).tolist(),
            "heads_after": np.flatnonzero(after_CH[c] > 0.5).tolist(),
            "macs_before": float(scores.macs.unsteered[c]),
            "macs_after": float(scores.macs.by_class[g, BY_LABEL, a, c]),
            "saved": bool(saved[c]),
            "p": float(p[c]),
            "p_adjusted": float(adjusted[c]),
            "p_usage": float(p_usage[c]),
            "p_usage_adjusted": float(adjusted_usage[c]),
        }
        for c in np.flatnonzero(count)
    ]
    return sorted(rows, key=lambda row: (not row["saved"], row["usage_after"] - row["usage_before"]))
