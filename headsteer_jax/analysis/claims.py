"""The paper's claims, one function each: the value measured here, its interval, and whether the claim holds.

Axes: G strategies, Y ways to name the class, A alphas, R resamplings.
"""

from typing import Any

import numpy as np

from headsteer_jax.analysis.scores import Curves, Scores
from headsteer_jax.analysis.stats import accuracy_at_usage, to_float_list
from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.steer.results import BY_LABEL

Claim = dict[str, Any]  # claim, value, interval, holds, and further figures of some claims


def judge_claims(summary: dict[str, Any], scores: Scores, steer: SteerConfig) -> list[Claim]:
    """Judge every claim of [LH26] that the sweep can decide, for the strategy `class`.

    Args:
      summary: the numbers of summary.json that are there so far.
    """
    claims: list[Claim | None] = [claim_saving(summary, steer)]
    claims += [claim_control(name, scores) for name in scores.names if name in ("global", "random", "matched_random")]
    claims.append(claim_subsets(summary, scores))
    claims.append(claim_front(summary))
    claims.append(claim_suppression(summary, scores))
    claims.append(claim_related("latents", summary["overlap"]))
    claims.append(claim_related("heads", summary["overlap"].get("heads", {}).get("after", {})))
    return [claim for claim in claims if claim is not None]


def claim_saving(summary: dict[str, Any], steer: SteerConfig) -> Claim:
    """Judge whether class steering lowers usage at little cost of accuracy."""
    result, unsteered = summary["steering"]["class"], summary["steering"]["unsteered"]
    return {
        "claim": f"class steering lowers usage by at least {steer.saving:g} within {steer.tolerance:g} of accuracy",
        "value": unsteered["usage"] - result["usage"],
        "interval": sorted(-value for value in result["usage_change_ci"]),
        "accuracy_change": result["accuracy"] - unsteered["accuracy"],
        "holds": -result["usage_change_ci"][1] >= steer.saving and result["accuracy_change_ci"][0] >= -steer.tolerance,
    }


def _gap_at_equal_usage(first: Curves, second: Curves) -> tuple[float, float] | None:
    """Find the lowest usage that two paths from unsteered both reach, and how much more accurate the first is there.

    Returns:
      The usage and the gap; None if one of the paths does not come down at all.
    """
    level = max(first.usage.min(), second.usage.min())
    accuracies = [accuracy_at_usage(path.usage, path.accuracy, level) for path in (first, second)]
    if accuracies[0] is None or accuracies[1] is None:
        return None
    return float(level), accuracies[0] - accuracies[1]


def claim_control(control: str, scores: Scores) -> Claim:
    """Judge whether a control strategy is less accurate than class steering at equal usage.

    It is not judged if one of the two does not lower usage at all.
    """
    text = f"at equal usage, {control} is less accurate than class steering"
    g, other, rising = scores.names.index("class"), scores.names.index(control), scores.rising
    up_to_chosen = rising[: scores.chosen[g, BY_LABEL] - scores.zero + 1]
    gap = _gap_at_equal_usage(
        scores.test.select(g, BY_LABEL, up_to_chosen),
        scores.test.select(other, BY_LABEL, rising),
    )
    if gap is None:
        return {"claim": text, "value": None, "interval": None, "holds": None}
    class_R = zip(*scores.resampled.select(slice(None), g, BY_LABEL, up_to_chosen), strict=True)
    control_R = zip(*scores.resampled.select(slice(None), other, BY_LABEL, rising), strict=True)
    gaps = [
        _gap_at_equal_usage(Curves(*class_path), Curves(*control_path))
        for class_path, control_path in zip(class_R, control_R, strict=True)
    ]
    ci = to_float_list(scores.interval(np.array([gap[1] for gap in gaps if gap is not None])))
    return {"claim": text, "usage": gap[0], "value": gap[1], "interval": ci, "holds": ci[0] > 0}


def claim_subsets(summary: dict[str, Any], scores: Scores) -> Claim:
    """Judge whether random head subsets are less accurate than class steering at its usage."""
    result, sizes, g = summary["steering"]["class"], summary["last_layer"]["by_size"], scores.names.index("class")
    subset = float(np.interp(result["usage"], [row["usage"] for row in sizes], [row["random"] for row in sizes]))
    ci = to_float_list(scores.interval(scores.resampled.accuracy[:, g, BY_LABEL, scores.chosen[g, BY_LABEL]] - subset))
    return {
        "claim": "at the usage of class steering, random head subsets are less accurate",
        "value": result["accuracy"] - subset,
        "interval": ci,
        "holds": ci[0] > 0,
    }


def claim_front(summary: dict[str, Any]) -> Claim | None:
    """Judge whether the front of gate_aligned lies above that of class steering; None if there are no fronts."""
    if "fronts" not in summary:
        return None
    lowest, ci = summary["fronts"]["lowest_difference"], summary["fronts"]["lowest_difference_ci"]
    return {
        "claim": "gate_aligned's front lies above class steering's at every usage that both reach (least lead)",
        "value": lowest,
        "interval": ci,
        "holds": ci[0] > 0,
    }


def claim_suppression(summary: dict[str, Any], scores: Scores) -> Claim | None:
    """Judge whether a negative alpha raises usage; None if the sweep has none."""
    alphas, g = scores.alphas, scores.names.index("class")
    if not (alphas < 0).any():
        return None
    a = int(np.argmax(np.where(alphas < 0, scores.validation.usage[g, BY_LABEL], -1.0)))
    change_R = scores.resampled.usage[:, g, BY_LABEL, a] - scores.resampled_unsteered.usage
    ci = to_float_list(scores.interval(change_R))
    return {
        "claim": f"suppression (alpha {alphas[a]:g}, of those below 0 the highest on validation) raises usage",
        "value": float(scores.test.usage[g, BY_LABEL, a] - summary["steering"]["unsteered"]["usage"]),
        "interval": ci,
        "holds": ci[0] > 0,
    }


def claim_related(shared: str, overlap: dict[str, Any]) -> Claim | None:
    """Judge whether related classes share more latents or heads than unrelated ones; None if none are related."""
    if "related" not in overlap:
        return None
    ci = overlap["related_minus_unrelated_ci"]
    return {
        "claim": f"related classes share more {shared} than unrelated ones",
        "value": overlap["related"] - overlap["unrelated"],
        "interval": ci,
        "holds": ci[0] > 0,
    }
