"""What the paper claims, claim by claim: the value here, its interval, and whether it holds.

Axes: G strategies, Y ways to name the class, A alphas, R resamplings.
"""

from typing import Any

import numpy as np

from headsteer_jax.analysis.stats import accuracy_at_usage, percentile_interval, to_float_list
from headsteer_jax.config.schema import Config


def _gap_at_equal_usage(
    own_usage: np.ndarray, own_accuracy: np.ndarray, usage: np.ndarray, accuracy: np.ndarray
) -> tuple[float, float] | None:
    """The lowest usage that two paths from unsteered both reach, and how much more accurate the first is there.

    None where one of them does not come down at all.
    """
    wanted = max(own_usage.min(), usage.min())
    own, other = accuracy_at_usage(own_usage, own_accuracy, wanted), accuracy_at_usage(usage, accuracy, wanted)
    return None if own is None or other is None else (float(wanted), own - other)


def _claims(
    summary: dict[str, Any], names: list[str], alphas: np.ndarray, zero: int, usage: np.ndarray, accuracy: np.ndarray,
    usage_R: np.ndarray, accuracy_R: np.ndarray, before_usage_R: np.ndarray, chosen: np.ndarray,
    validation_usage: np.ndarray, config: Config,
) -> list[dict[str, Any]]:  # fmt: skip
    """[LH26]'s pattern, claim by claim, each with what was seen and whether its interval bears it out."""
    steer, g = config.steer, names.index("class")
    result, before = summary["steering"]["class"], summary["steering"]["unsteered"]
    claims = [
        {
            "claim": f"class steering lowers usage by at least {steer.saving:g} within {steer.tolerance:g} of accuracy",
            "value": before["usage"] - result["usage"],
            "interval": sorted(-value for value in result["usage_change_ci"]),
            "accuracy_change": result["accuracy"] - before["accuracy"],
            "holds": -result["usage_change_ci"][1] >= steer.saving
            and result["accuracy_change_ci"][0] >= -steer.tolerance,
        }
    ]
    rising = np.arange(zero, len(alphas))  # from unsteered up
    own = rising[: chosen[g, 0] - zero + 1]
    for other, name in enumerate(names):
        if name not in ("global", "random", "matched_random"):
            continue
        claim: dict[str, Any] = {"claim": f"at equal usage, {name} is less accurate than class steering"}
        found = _gap_at_equal_usage(
            usage[g, 0, own], accuracy[g, 0, own], usage[other, 0, rising], accuracy[other, 0, rising]
        )
        if found is None:
            claims.append(claim | {"value": None, "interval": None, "holds": None})
            continue
        resampled = [
            _gap_at_equal_usage(*paths)
            for paths in zip(
                usage_R[:, g, 0, own], accuracy_R[:, g, 0, own],
                usage_R[:, other, 0, rising], accuracy_R[:, other, 0, rising], strict=True,
            )
        ]  # fmt: skip
        ci = to_float_list(
            percentile_interval(np.array([one[1] for one in resampled if one is not None]), steer.confidence)
        )
        claims.append(claim | {"usage": found[0], "value": found[1], "interval": ci, "holds": ci[0] > 0})
    sizes = summary["last_layer"]["by_size"]
    subset = float(np.interp(result["usage"], [row["usage"] for row in sizes], [row["random"] for row in sizes]))
    ci = to_float_list(percentile_interval(accuracy_R[:, g, 0, chosen[g, 0]] - subset, steer.confidence))
    claims.append(
        {
            "claim": "at the usage of class steering, random head subsets are less accurate",
            "value": result["accuracy"] - subset,
            "interval": ci,
            "holds": ci[0] > 0,
        }
    )
    if "fronts" in summary:
        lowest, ci = summary["fronts"]["lowest_difference"], summary["fronts"]["lowest_difference_ci"]
        claims.append(
            {
                "claim": "gate_aligned's front lies above class steering's at every usage that both reach (least lead)",
                "value": lowest,
                "interval": ci,
                "holds": ci[0] > 0,
            }
        )
    if (alphas < 0).any():
        a = int(np.argmax(np.where(alphas < 0, validation_usage[g, 0], -1.0)))
        ci = to_float_list(percentile_interval(usage_R[:, g, 0, a] - before_usage_R, steer.confidence))
        claims.append(
            {
                "claim": f"suppression (alpha {alphas[a]:g}, of those below 0 the highest on validation) raises usage",
                "value": float(usage[g, 0, a] - before["usage"]),
                "interval": ci,
                "holds": ci[0] > 0,
            }
        )
    overlaps = {"latents": summary["overlap"], "heads": summary["overlap"].get("heads", {}).get("after", {})}
    for what, o in overlaps.items():
        if "related" in o:
            claims.append(
                {
                    "claim": f"related classes share more {what} than unrelated ones",
                    "value": o["related"] - o["unrelated"],
                    "interval": o["related_minus_unrelated_ci"],
                    "holds": o["related_minus_unrelated_ci"][0] > 0,
                }
            )
    return claims
