"""From the sweep's counts to headline numbers: alphas are chosen on validation, everything is scored on test.

Axes: G strategies, S seeds, Y ways to name the class, A alphas, N images, C classes, R resamplings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headsteer_jax.analysis.claims import _claims
from headsteer_jax.analysis.stats import (
    accuracy_front,
    adjust_p_values,
    bootstrap_means,
    bootstrap_weights,
    choose_alpha,
    fixed_subset_controls,
    mcnemar_p,
    percentile_interval,
    to_float_list,
    wilcoxon_fewer,
)
from headsteer_jax.config.schema import Config
from headsteer_jax.steer.table import pattern_to_gates
from headsteer_jax.steer.tally import StepFunction, best_alpha, smallest_alpha, unpack_bits

Arrays = dict[str, np.ndarray]


def _curves(arrays: Arrays, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Usage and accuracy of each setting, [G, S, Y, A], over all images of a split."""
    heads = arrays[f"{split}_heads_on"].shape[-1]
    count = arrays[f"{split}_count"].sum()
    usage = arrays[f"{split}_heads_on"].sum(axis=(-2, -1)) / (count * heads)
    return usage, arrays[f"{split}_correct"].sum(axis=-1) / count


def _class_curves(arrays: Arrays, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Usage and accuracy of each class, [G, Y, A, C], over all seeds; a class without images counts as 0."""
    heads, seeds = arrays[f"{split}_heads_on"].shape[-1], arrays[f"{split}_correct"].shape[1]
    count = np.maximum(arrays[f"{split}_count"], 1) * seeds
    usage = arrays[f"{split}_heads_on"].sum(axis=(1, -1)) / (count * heads)
    return usage, arrays[f"{split}_correct"].sum(axis=1) / count


def _unsteered(arrays: Arrays, split: str) -> tuple[np.ndarray, np.ndarray]:
    """[C] usage and accuracy of each class without steering."""
    count = np.maximum(arrays[f"{split}_count"], 1)
    heads = arrays[f"{split}_unsteered_heads_on"].shape[-1]
    usage = arrays[f"{split}_unsteered_heads_on"].sum(axis=-1) / (count * heads)
    return usage, arrays[f"{split}_unsteered_correct"] / count


def saved_classes(
    usage_C: np.ndarray,
    accuracy_C: np.ndarray,
    before: tuple[np.ndarray, np.ndarray],
    count_C: np.ndarray,
    saving: float,
) -> np.ndarray:
    """[C] bool: the class's usage fell by at least `saving` and its accuracy did not fall."""
    tiny = 1e-9  # counts are exact, their quotients are not
    return (before[0] - usage_C >= saving - tiny) & (accuracy_C >= before[1] - tiny) & (count_C > 0)


def summarise(
    arrays: Arrays, config: Config, steps: Mapping[str, Mapping[str, StepFunction]] | None = None
) -> tuple[dict[str, Any], Arrays]:
    """Headline numbers of the sweep.

    Args:
      steps: split -> strategy -> accuracy and usage as exact functions of alpha; None or empty where they are not.

    Returns:
      `last_layer`, `overlap`, `steering`, `classes` and `claims` of summary.json, and further arrays for sweep.nc:
      `chosen` [G, Y] and `class_chosen` [G, Y, C], the indices of the alphas chosen on validation; on test `usage`,
      `accuracy` [G, Y, A], their intervals [2, G, Y, A], `class_usage`, `class_accuracy` [G, Y, A, C].
    """
    steer = config.steer
    names, alphas = [str(name) for name in arrays["strategies"]], arrays["alphas"]
    labels, count_C = arrays["test_labels"], arrays["test_count"]
    classes, heads = len(count_C), arrays["test_heads_on"].shape[-1]
    zero = int(np.flatnonzero(alphas == 0)[0])
    rng = np.random.default_rng([config.seed, 4])

    # chosen on validation
    validation_usage, accuracy = (curve.mean(axis=1) for curve in _curves(arrays, "validation"))  # [G, Y, A]
    floor = arrays["validation_unsteered_correct"].sum() / arrays["validation_count"].sum() - steer.tolerance
    chosen = choose_alpha(alphas, np.moveaxis(validation_usage, -1, 0), np.moveaxis(accuracy, -1, 0), floor)  # [G, Y]
    class_usage, class_accuracy = _class_curves(arrays, "validation")
    class_chosen = choose_alpha(
        alphas, np.moveaxis(class_usage, 2, 0), np.moveaxis(class_accuracy, 2, 0), _unsteered(arrays, "validation")[1]
    )  # [G, Y, C]

    # scored on test
    before_right = arrays["test_prediction"] == labels
    before_used = pattern_to_gates(arrays["test_pattern"], heads).sum(axis=1)
    weights = bootstrap_weights(labels, steer.bootstrap, rng)
    seeds, seeds_rng = arrays["test_right"].shape[1], rng.integers(2**32)  # usage and accuracy draw the same seeds
    usage_R, accuracy_R = (
        bootstrap_means(values, seeds, weights, np.random.default_rng(seeds_rng))  # [R, G, Y, A]
        for values in (
            lambda seed: unpack_bits(arrays["test_gates"][:, seed], len(labels)).sum(axis=-2, dtype=np.uint8),
            lambda seed: unpack_bits(arrays["test_right"][:, seed], len(labels)),
        )
    )
    usage_R = usage_R / heads
    before_usage_R = (weights @ before_used.astype(np.float32)) / (len(labels) * heads)
    before_accuracy_R = (weights @ before_right.astype(np.float32)) / len(labels)
    usage, accuracy = (curve.mean(axis=1) for curve in _curves(arrays, "test"))
    usage_ci, accuracy_ci = (
        percentile_interval(usage_R, steer.confidence),
        percentile_interval(accuracy_R, steer.confidence),
    )
    class_usage, class_accuracy = _class_curves(arrays, "test")
    before_C = _unsteered(arrays, "test")
    share_C = count_C / count_C.sum()

    def at(g: int, y: int) -> dict[str, Any]:
        """A strategy at its chosen alpha."""
        a = int(chosen[g, y])
        saved = saved_classes(class_usage[g, y, a], class_accuracy[g, y, a], before_C, count_C, steer.saving)
        each = class_chosen[g, y], np.arange(classes)
        each_usage, each_accuracy = class_usage[g, y][each], class_accuracy[g, y][each]
        gained, lost = (arrays[f"test_{name}"][g, 0, y, a].sum() for name in ("gained", "lost"))
        return {
            "alpha": float(alphas[a]),
            "usage": float(usage[g, y, a]),
            "usage_ci": to_float_list(usage_ci[:, g, y, a]),
            "usage_change_ci": to_float_list(
                percentile_interval(usage_R[:, g, y, a] - before_usage_R, steer.confidence)
            ),
            "accuracy": float(accuracy[g, y, a]),
            "accuracy_ci": to_float_list(accuracy_ci[:, g, y, a]),
            "accuracy_change_ci": to_float_list(
                percentile_interval(accuracy_R[:, g, y, a] - before_accuracy_R, steer.confidence)
            ),
            "mcnemar_p": float(mcnemar_p(gained, lost)),
            "classes_saved": int(saved.sum()),
            "alpha_per_class": {
                "usage": float(np.sum(share_C * each_usage)),
                "accuracy": float(np.sum(share_C * each_accuracy)),
                "classes_saved": int(saved_classes(each_usage, each_accuracy, before_C, count_C, steer.saving).sum()),
            },
        }

    control = fixed_subset_controls(
        arrays["validation_table"],
        arrays["validation_labels"],
        arrays["test_table"],
        labels,
        arrays["validation_prediction"],
        arrays["subset"],
        classes,
        heads,
        arrays.get("related"),
    )
    steering: dict[str, Any] = {
        "unsteered": {
            "alpha": 0.0,
            "usage": float(np.sum(share_C * before_C[0])),
            "usage_ci": to_float_list(percentile_interval(before_usage_R, steer.confidence)),
            "accuracy": float(np.sum(share_C * before_C[1])),
            "accuracy_ci": to_float_list(percentile_interval(before_accuracy_R, steer.confidence)),
            "classes_saved": 0,
        }
    }
    for g, name in enumerate(names):
        steering[name] = at(g, 0) | {
            "by_predicted_class": at(g, 1),
            "curve": {
                "alpha": to_float_list(alphas),
                "usage": to_float_list(usage[g, 0]),
                "usage_ci": usage_ci[:, g, 0].T.tolist(),
                "accuracy": to_float_list(accuracy[g, 0]),
                "accuracy_ci": accuracy_ci[:, g, 0].T.tolist(),
            },
        }
    summary: dict[str, Any] = {
        "gated_accuracy": steering["unsteered"]["accuracy"],
        "last_layer": {"usage": steering["unsteered"]["usage"], "layer": config.sae_layer}
        | {name: value for name, value in control.items() if not name.endswith("patterns")},
        "steering": steering,
        "overlap": _overlaps(arrays, config, rng),
    }
    if "class" in names:
        g = names.index("class")
        for name, key in (("class", "classes"), ("gate_aligned", "classes_gate_aligned")):
            if name in names:
                row = names.index(name)
                summary[key] = _class_table(
                    arrays, row, int(chosen[row, 0]), before_C, class_usage, class_accuracy, config
                )
                steering[name]["group"] = _group(arrays, row, int(chosen[row, 0]), summary[key], config)
        if "related" in arrays:
            summary["overlap"]["heads"] = _related_heads(arrays, g, int(chosen[g, 0]), config, rng)
        if "gate_aligned" in names:
            fronts = _fronts(names, alphas, usage, accuracy, usage_R, accuracy_R, config)
            summary |= {"fronts": fronts} if fronts else {}
        summary["claims"] = _claims(
            summary, names, alphas, zero, usage, accuracy, usage_R, accuracy_R, before_usage_R, chosen,
            validation_usage, config,
        )  # fmt: skip
    _against_oracle(
        steering, names, arrays, alphas, control["size_patterns"], usage, accuracy, usage_R, accuracy_R, weights, config
    )
    extra = {
        "chosen": chosen, "class_chosen": class_chosen, "usage": usage, "accuracy": accuracy,
        "usage_ci": usage_ci, "accuracy_ci": accuracy_ci, "oracle_patterns": control["class_patterns"],
        "class_usage": class_usage, "class_accuracy": class_accuracy,
    }  # fmt: skip
    if steps:
        for name in names:
            steering[name]["exact"] = _exact(steps["validation"][name], steps["test"][name], floor, config)
        extra |= _exact_curves(alphas, [steps["test"][name] for name in names])
    return summary, extra


def _exact(validation: StepFunction, test: StepFunction, floor: float, config: Config) -> dict[str, Any]:
    """Alphas chosen on validation among all there are, scored on test: the best one, and those for wanted usages.

    Args:
      floor: validation accuracy that the best alpha keeps.
    """

    def scored(alpha: float | None) -> dict[str, Any]:
        if alpha is None:
            return {"alpha": None, "usage": None, "accuracy": None}
        at = test.at(alpha)
        return {"alpha": alpha, "usage": float(test.usage[at]), "accuracy": float(test.accuracy[at])}

    return scored(best_alpha(validation, floor)) | {
        "steps": len(test.alpha),
        "for_usage": [{"wanted": u} | scored(smallest_alpha(validation, u)) for u in config.steer.wanted_usage],
    }


def _exact_curves(alphas: np.ndarray, steps: Sequence[StepFunction], points: int = 501) -> Arrays:
    """The exact functions at many alphas over the grid's range, dense around 0: for plots."""
    unit = np.abs(alphas[alphas != 0]).min() if len(alphas) > 1 else 1.0
    dense = unit * np.sinh(np.linspace(np.arcsinh(alphas[0] / unit), np.arcsinh(alphas[-1] / unit), points))
    return {
        "exact_alphas": dense,
        "exact_usage": np.stack([one.usage[one.at(dense)] for one in steps]),
        "exact_accuracy": np.stack([one.accuracy[one.at(dense)] for one in steps]),
    }


def _against_oracle(
    steering: dict[str, Any], names: list[str], arrays: Arrays, alphas: np.ndarray, patterns_KC: np.ndarray,
    usage: np.ndarray, accuracy: np.ndarray, usage_R: np.ndarray, accuracy_R: np.ndarray, weights: np.ndarray,
    config: Config,
) -> None:  # fmt: skip
    """Every strategy's front against the best subset of each class, at each number of heads: `oracle` of its entry.

    Args:
      patterns_KC: the oracle's subsets of each size and class, chosen on validation.
    """
    labels, rising = arrays["test_labels"], alphas >= 0
    place_KN = np.searchsorted(arrays["subset"], patterns_KC[:, labels])
    right_KN = np.take_along_axis(arrays["test_table"].T, place_KN, axis=0) == labels
    oracle_R = (weights @ right_KN.T.astype(np.float32)) / len(labels)
    levels = np.arange(len(patterns_KC)) / (len(patterns_KC) - 1)
    for g, name in enumerate(names):
        reached = accuracy_front(usage[g, 0, rising], accuracy[g, 0, rising], levels)
        difference_R = accuracy_front(usage_R[:, g, 0, rising], accuracy_R[:, g, 0, rising], levels) - oracle_R
        tail = (1 - config.steer.confidence) / 2
        steering[name]["against_oracle"] = [
            {
                "usage": float(levels[k]), "front": float(reached[k]), "oracle": float(right_KN[k].mean()),
                "difference_ci": to_float_list(np.nanquantile(difference_R[:, k], [tail, 1 - tail])),
            }
            for k in np.flatnonzero(np.isfinite(reached))
        ]  # fmt: skip


def _by_relation(pairs: np.ndarray, related: np.ndarray, config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Mean of a [C, C] measure over related and over other pairs of classes, with the interval of their difference.

    Classes are resampled, not pairs: pairs of one class are not independent. Empty where one kind has no pair.
    """
    apart = ~np.eye(len(pairs), dtype=bool) & ~related
    if not related.any() or not apart.any():
        return {}
    differences = []
    for _ in range(config.steer.bootstrap):
        weight = np.bincount(rng.integers(0, len(pairs), len(pairs)), minlength=len(pairs))
        weight = np.outer(weight, weight)
        if (weight * related).any() and (weight * apart).any():
            differences.append(np.average(pairs, weights=weight * related) - np.average(pairs, weights=weight * apart))
    return {
        "related": float(pairs[related].mean()),
        "unrelated": float(pairs[apart].mean()),
        "related_minus_unrelated_ci": to_float_list(
            percentile_interval(np.array(differences), config.steer.confidence)
        ),
    }


def _overlaps(arrays: Arrays, config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Mean shares of latents in common: global against class ([LH26]: 0.1641), and between two classes."""
    result: dict[str, Any] = {"global_class": None, "class_class": None}
    if "overlap_global_class" in arrays:
        result["global_class"] = float(arrays["overlap_global_class"].mean())
    if "overlap_class_class" in arrays:
        pairs = arrays["overlap_class_class"].mean(axis=0)  # [C, C]
        result["class_class"] = float(pairs[~np.eye(len(pairs), dtype=bool)].mean())
        if "related" in arrays:
            result |= _by_relation(pairs, arrays["related"], config, rng)
    return result


def _heads_after(arrays: Arrays, g: int, a: int) -> np.ndarray:
    """[C, H] share of the class's images, over all seeds, on which each head runs under a setting, steered by label."""
    seeds = arrays["test_heads_on"].shape[1]
    return arrays["test_heads_on"][g, :, 0, a].sum(axis=0) / np.maximum(arrays["test_count"] * seeds, 1)[:, None]


def _related_heads(arrays: Arrays, g: int, a: int, config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Do related classes run the same heads? Jaccard index of the heads on for most images, before and after steering.

    Two classes without any such head count as equal.
    """
    before = arrays["test_unsteered_heads_on"] / np.maximum(arrays["test_count"], 1)[:, None]
    result = {}
    for name, on in (("before", before > 0.5), ("after", _heads_after(arrays, g, a) > 0.5)):
        shared = (on[:, None] & on).sum(axis=-1)
        either = (on[:, None] | on).sum(axis=-1)
        result[name] = _by_relation(
            np.where(either > 0, shared / np.maximum(either, 1), 1.0), arrays["related"], config, rng
        )
    return result


def _group(arrays: Arrays, g: int, a: int, table: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """The saved classes together, and the classes that validation alone promised to be saved, all scored on test.

    `saved_significantly`: saved classes whose fall in usage is significant (Wilcoxon, Benjamini-Hochberg over all
    classes). `promised`: chosen without a look at test, so that their test figures are not the best of many; their
    accuracy is compared by one exact McNemar test over all their images (first seed).
    """
    usage, accuracy = (values[g, 0, a] for values in _class_curves(arrays, "validation"))
    promised_C = saved_classes(
        usage, accuracy, _unsteered(arrays, "validation"), arrays["validation_count"], config.steer.saving
    )
    names = set(arrays["class_names"][promised_C].tolist())
    rows = [row for row in table if row["name"] in names]
    gained, lost = (int(arrays[f"test_{name}"][g, 0, 0, a][promised_C].sum()) for name in ("gained", "lost"))
    images = np.array([row["images"] for row in rows], float)

    def change(what: str) -> float | None:
        differences = [row[f"{what}_after"] - row[f"{what}_before"] for row in rows]
        return float(np.average(differences, weights=images)) if rows else None

    return {
        "saved_significantly": sum(row["saved"] and row["p_usage_adjusted"] < 0.05 for row in table),
        "promised": {
            "classes": len(rows), "saved": sum(row["saved"] for row in rows),
            "usage_change": change("usage"), "accuracy_change": change("accuracy"),
            "gained": gained, "lost": lost, "mcnemar_p": float(mcnemar_p(gained, lost)),
        },
    }  # fmt: skip


def _fronts(
    names: list[str], alphas: np.ndarray, usage: np.ndarray, accuracy: np.ndarray, usage_R: np.ndarray,
    accuracy_R: np.ndarray, config: Config, points: int = 21,
) -> dict[str, Any] | None:  # fmt: skip
    """The best accuracy at or below each usage that both reach: `gate_aligned` against [LH26]'s `class`, alphas >= 0.

    `lowest_difference`: where gate_aligned is least ahead, with its interval. None where they have no usage in common.
    """
    rising = alphas >= 0
    rows = [names.index("class"), names.index("gate_aligned")]
    reached = max(usage[row, 0, rising].min() for row in rows)
    levels = np.linspace(reached, usage[rows[0], 0, np.flatnonzero(alphas == 0)[0]], points)
    own, ours = (accuracy_front(usage[row, 0, rising], accuracy[row, 0, rising], levels) for row in rows)
    own_R, ours_R = (accuracy_front(usage_R[:, row, 0, rising], accuracy_R[:, row, 0, rising], levels) for row in rows)
    difference_R = ours_R - own_R
    reached_L = np.isfinite(difference_R).any(axis=0)  # a resampling may use more, and not come down to a level
    levels, own, ours, difference_R = levels[reached_L], own[reached_L], ours[reached_L], difference_R[:, reached_L]
    inner_R = difference_R[:, 1:][np.isfinite(difference_R[:, 1:]).any(axis=1)]  # the lowest level is an edge
    if not len(inner_R):
        return None
    below = np.nanmin(inner_R, axis=1)
    return {
        "usage": to_float_list(levels),
        "class": to_float_list(own),
        "gate_aligned": to_float_list(ours),
        "difference_ci": np.nanquantile(
            difference_R, [(1 - config.steer.confidence) / 2, (1 + config.steer.confidence) / 2], axis=0
        ).T.tolist(),
        "lowest_difference": float(np.min(ours - own)),
        "lowest_difference_ci": to_float_list(percentile_interval(below, config.steer.confidence)),
    }


def _class_table(
    arrays: Arrays, g: int, a: int, before: tuple[np.ndarray, np.ndarray], usage: np.ndarray, accuracy: np.ndarray,
    config: Config,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each class under a strategy at the common alpha, by saving.

    `p`: accuracy, the first seed's exact McNemar test; `p_usage`: heads in use fell, Wilcoxon's test over the class's
    images, on means over seeds. Both with Benjamini-Hochberg over classes.
    """
    gained, lost = (arrays[f"test_{name}"][g, 0, 0, a] for name in ("gained", "lost"))
    p = mcnemar_p(gained, lost)
    count = arrays["test_count"]
    adjusted = np.ones(len(p))
    adjusted[count > 0] = adjust_p_values(p[count > 0])
    saved = saved_classes(usage[g, 0, a], accuracy[g, 0, a], before, count, config.steer.saving)
    heads = arrays["test_heads_on"].shape[-1]
    labels = arrays["test_labels"]
    heads_before = pattern_to_gates(arrays["test_pattern"], heads).sum(axis=1)
    heads_after = unpack_bits(arrays["test_gates"][g, :, 0, a], len(labels)).sum(axis=1).mean(axis=0)
    p_usage = np.array([wilcoxon_fewer(heads_before[labels == c], heads_after[labels == c]) for c in range(len(count))])
    adjusted_usage = np.ones(len(p))
    adjusted_usage[count > 0] = adjust_p_values(p_usage[count > 0])
    on_before = arrays["test_unsteered_heads_on"] / np.maximum(count, 1)[:, None]
    on_after = _heads_after(arrays, g, a)
    rows = [
        {
            "name": str(arrays["class_names"][c]),
            "images": int(count[c]),
            "usage_before": float(before[0][c]),
            "usage_after": float(usage[g, 0, a, c]),
            "accuracy_before": float(before[1][c]),
            "accuracy_after": float(accuracy[g, 0, a, c]),
            "heads_before": np.flatnonzero(on_before[c] > 0.5).tolist(),
            "heads_after": np.flatnonzero(on_after[c] > 0.5).tolist(),
            "saved": bool(saved[c]),
            "p": float(p[c]),
            "p_adjusted": float(adjusted[c]),
            "p_usage": float(p_usage[c]),
            "p_usage_adjusted": float(adjusted_usage[c]),
        }
        for c in range(len(count))
        if count[c]
    ]
    return sorted(rows, key=lambda row: (not row["saved"], row["usage_after"] - row["usage_before"]))
