"""What a run's sweep decides, one function for each claim: the value, its interval, and whether the claim holds.

Axes: G strategies, S seeds, Y ways to name the class, A alphas, L levels of usage, N images, P gate patterns, R
resamplings.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from headsteer_jax.analysis.scores import Scores
from headsteer_jax.analysis.stats import accuracy_front, bootstrap_means, to_float_list
from headsteer_jax.config.schema import Config, SteerConfig
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.results import BY_LABEL, SweepResult
from headsteer_jax.steer.tally import patterns_of_bits, unpack_bits

Claim = dict[str, Any]  # claim, about, value, interval, holds, conditions, and further figures of some claims
# what a claim is about: what [LH26] report; what an autoencoder adds to directions found without one; what steering
# adds to leaving out the same heads for every image; strategies that [LH26] do not have; or the layer's MACs
About = Literal["paper", "autoencoder", "pruning", "further", "compute"]

# (strategy, control): the control should be less accurate at equal usage
COMPARISONS: dict[tuple[str, str], About] = {
    ("class", "global"): "paper",
    ("class", "random"): "paper",
    ("class", "matched_random"): "paper",
    ("class", "random_direction"): "autoencoder",
    ("class", "mean_difference"): "autoencoder",
    ("class", "probe"): "autoencoder",
    ("gate_aligned", "gate_bias"): "autoencoder",
    ("mean_difference", "random_direction"): "autoencoder",
    ("probe", "random_direction"): "autoencoder",
    ("gate_bias", "random_bias"): "autoencoder",
    ("superclass", "matched_superclass"): "further",
    ("image_latents", "image_random"): "further",
    ("guessed_difference", "global_bias"): "further",
}
LEVELS = 21  # usages at which two strategies are compared


class Condition(NamedTuple):
    """A quantity that must lie above a bound if a claim is to hold; the first of a claim is its value."""

    value: float
    resampled: np.ndarray  # [R]; NaN where a resampling does not have it
    least: float = 0.0
    inclusive: bool = False  # the bound itself will do

    def allows(self, low: float) -> bool:
        """Say whether an interval that begins here lies on the claimed side."""
        return low >= self.least if self.inclusive else low > self.least


def judge_claims(summary: dict[str, Any], result: SweepResult, scores: Scores, config: Config) -> list[Claim]:
    """Judge every claim that the sweep can decide: what [LH26] report, and those of the other subjects.

    Args:
      summary: the numbers of summary.json that are there so far.

    Returns:
      The claims. Those that resampled images decide also have `conditions`, which a study of several runs needs.
    """
    names, usage = scores.names, summary["steering"]["unsteered"]["usage"]
    gates = LayerGates(config, config.sae_layer)
    aimed = [name for name in ("class", "gate_aligned") if name in names]
    claims: list[Claim | None] = [claim_saving(summary, scores, config.steer)]
    claims += [claim_control(*pair, scores, usage) for pair in COMPARISONS if set(pair) <= set(names)]
    claims.append(claim_random_subsets(summary, result, scores))
    pruned = [name for name in ("class", "gate_aligned", "guessed_difference") if name in names]
    claims += [claim_best_subsets(name, summary, result, scores, gates) for name in pruned]
    claims.append(claim_front(summary))
    claims.append(claim_suppression(summary, scores))
    claims.append(claim_related("latents", summary["overlap"]))
    claims.append(claim_related("heads", summary["overlap"].get("heads", {}).get("after", {})))
    if "sublayers" in gates.kinds and gates.fits_table:
        claims += [claim_compute(name, summary, result, scores, gates) for name in aimed]
    return [claim | {"about": find_subject(claim["claim"])} for claim in claims if claim is not None]


def word_comparison(method: str, control: str) -> str:
    """Word the claim that a control is less accurate than steering by another strategy."""
    return f"at equal usage, {control} is less accurate than {method} steering"


def find_subject(text: str) -> About:
    """Find what a claim is about by its text, which every file of results has."""
    for pair, about in COMPARISONS.items():
        if text == word_comparison(*pair):
            return about
    if "MACs" in text:
        return "compute"
    if "best fixed" in text:
        return "pruning"
    return "further" if "front" in text or "patch concepts" in text else "paper"


def claim_saving(summary: dict[str, Any], scores: Scores, steer: SteerConfig) -> Claim:
    """Judge whether class steering lowers usage at little cost of accuracy."""
    result, unsteered, g = summary["steering"]["class"], summary["steering"]["unsteered"], scores.names.index("class")
    steered_R = scores.resampled.select(slice(None), g, BY_LABEL, scores.chosen[g, BY_LABEL])
    before_R = scores.resampled_unsteered
    saving, change = unsteered["usage"] - result["usage"], result["accuracy"] - unsteered["accuracy"]
    return {
        "claim": f"class steering lowers usage by at least {steer.saving:g} within {steer.claimed_loss:g} of accuracy",
        "value": saving,
        "interval": sorted(-value for value in result["usage_change_ci"]),
        "accuracy_change": change,
        "holds": (
            -result["usage_change_ci"][1] >= steer.saving and result["accuracy_change_ci"][0] >= -steer.claimed_loss
        ),
        "conditions": (
            Condition(saving, before_R.usage - steered_R.usage, steer.saving, inclusive=True),
            Condition(change, steered_R.accuracy - before_R.accuracy, -steer.claimed_loss, inclusive=True),
        ),
    }


def claim_control(method: str, control: str, scores: Scores, unsteered: float) -> Claim:
    """Judge whether a control is less accurate than steering by another strategy, at the usages that both reach.

    The value is the mean lead of the strategy's front over the control's, at LEVELS usages from the lowest that both
    reach up to that of the unsteered model. A front is the best accuracy of any alpha >= 0 of the grid that uses at
    most as much. The strategy counts as reaching the usage of its chosen alpha, and the control its lowest. The claim
    is not judged if one of the two does not lower usage at all, or no resampling reaches a level.

    The levels are fixed, from all test images. A resampling that does not come down to the lowest levels has the mean
    over those that it reaches.

    Args:
      unsteered: usage of the unsteered model.
    """
    not_reached: Claim = {"claim": word_comparison(method, control), "value": None, "interval": None, "holds": None}
    rows, rising = (scores.names.index(method), scores.names.index(control)), scores.rising
    chosen = scores.test.usage[rows[0], BY_LABEL, scores.chosen[rows[0], BY_LABEL]]
    lowest = max(float(chosen), float(scores.test.usage[rows[1], BY_LABEL, rising].min()))
    if lowest > unsteered - 1e-9:
        return not_reached
    levels = np.linspace(lowest, unsteered, LEVELS)
    first, second = (accuracy_front(*scores.test.select(row, BY_LABEL, rising), levels) for row in rows)
    first_R, second_R = (
        accuracy_front(*scores.resampled.select(slice(None), row, BY_LABEL, rising), levels) for row in rows
    )
    lead_RL = np.ma.masked_invalid(first_R - second_R)
    lead, lead_R = float(np.mean(first - second)), lead_RL.mean(axis=1).filled(np.nan)
    if np.isnan(lead_R).all():
        return not_reached
    ci = to_float_list(scores.interval(lead_R[~np.isnan(lead_R)]))
    return {
        "claim": word_comparison(method, control),
        "usages": [lowest, unsteered],
        "value": lead,
        "interval": ci,
        "holds": ci[0] > 0,
        "conditions": (Condition(lead, lead_R),),
    }


def claim_random_subsets(summary: dict[str, Any], result: SweepResult, scores: Scores) -> Claim:
    """Judge whether random head subsets are less accurate than class steering at its usage."""
    right_NP, size_P = result.test.table == result.test.labels[:, None], np.bitwise_count(result.subset)
    sizes = range(result.test.heads + 1)
    right_NK = np.stack([right_NP[:, size_P == size].mean(axis=1) for size in sizes], axis=1)
    text = "at the usage of class steering, random head subsets are less accurate"
    return _compare_with_subsets(text, "class", right_NK, summary, scores)


def claim_best_subsets(
    method: str, summary: dict[str, Any], result: SweepResult, scores: Scores, gates: LayerGates
) -> Claim:
    """Judge whether the best fixed head subsets, the same for every image, are less accurate than steering.

    The best subset of each size is chosen on validation. It needs no label.
    """
    rows = summary["last_layer"]["by_size"]
    open_K = [{*(gates.names[head] for head in row["heads"]), *row.get("sublayers", ())} for row in rows]
    patterns_K = [sum(1 << bit for bit, name in enumerate(gates.names) if name in names) for names in open_K]
    columns_K = np.searchsorted(result.subset, patterns_K)
    right_NK = (result.test.table[:, columns_K] == result.test.labels[:, None]).astype(np.float64)  # exact sums
    text = f"at the usage of {method} steering, the best fixed head subsets are less accurate"
    return _compare_with_subsets(text, method, right_NK, summary, scores)


def _compare_with_subsets(
    text: str, method: str, right_NK: np.ndarray, summary: dict[str, Any], scores: Scores
) -> Claim:
    """Judge whether head subsets are less accurate than steering by a strategy at its usage.

    Between two sizes of subsets their accuracies are interpolated. A resampling takes the same images for the subsets
    as for steering, at the usage that steering has in it.

    Args:
      right_NK: [N, H + 1] the share of the subsets of each size that answer an image right.
    """
    row, g, (images, sizes) = summary["steering"][method], scores.names.index(method), right_NK.shape
    usage_K = np.arange(sizes) / (sizes - 1)
    lead = row["accuracy"] - float(np.interp(row["usage"], usage_K, right_NK.mean(axis=0)))
    steered_R = scores.resampled.select(slice(None), g, BY_LABEL, scores.chosen[g, BY_LABEL])
    subsets_RK = scores.weights @ right_NK / images
    subsets_R = [np.interp(usage, usage_K, row_K) for usage, row_K in zip(steered_R.usage, subsets_RK, strict=True)]
    lead_R = steered_R.accuracy - np.array(subsets_R)
    ci = to_float_list(scores.interval(lead_R))
    return {
        "claim": text,
        "value": lead,
        "interval": ci,
        "holds": ci[0] > 0,
        "conditions": (Condition(lead, lead_R),),
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
        "conditions": (Condition(lowest, summary["fronts"]["lowest_resampled"]),),
    }


def claim_compute(
    name: str, summary: dict[str, Any], result: SweepResult, scores: Scores, gates: LayerGates, least: float = 0.15
) -> Claim:
    """Judge whether a strategy lowers the layer's MACs by at least a share `least` of its dense MACs at no loss.

    No loss means that the interval of the accuracy's change stays above -steer.allowed_loss. There are two controls. In
    `random_pattern` every image has a random pattern with as many heads and the same sublayers as its steered one, so
    that the MACs are the same; the mean over all such patterns is taken. `fixed_pattern` is the pattern, the same for
    every image, that is the most accurate on validation among those that cost no more than steering does on average.
    The claim holds if steering is more accurate than the first as well.
    """
    row, unsteered, dense = summary["steering"][name], summary["steering"]["unsteered"], scores.macs.dense
    g, test = scores.names.index(name), result.test
    a = int(scores.chosen[g, BY_LABEL])
    right_NP = test.table == test.labels[:, None]
    pattern_SN = patterns_of_bits(test.gates[g, :, BY_LABEL, a], len(test.labels))
    steered_SN = unpack_bits(test.right[g, :, BY_LABEL, a], len(test.labels))
    random_SN = _average_alike(right_NP, pattern_SN, gates)
    lead_SN = steered_SN - random_SN
    lead_R = bootstrap_means(
        lambda s: lead_SN[s], len(lead_SN), scores.weights, np.random.default_rng(scores.members_seed)
    )
    lead_ci = to_float_list(scores.interval(lead_R))
    affordable = np.flatnonzero(gates.mean_macs(result.subset, test.kept_patches) <= row["macs"] + 0.5)
    right_on_validation = (result.validation.table[:, affordable] == result.validation.labels[:, None]).mean(axis=0)
    fixed = affordable[np.argmax(right_on_validation)] if len(affordable) else None
    saved_ci = sorted(-end / dense for end in row["macs_change_ci"])
    allowed, place = gates.config.steer.claimed_loss, (slice(None), g, BY_LABEL, a)
    saved_R = (scores.macs.resampled_unsteered - scores.macs.resampled[place]) / dense
    change_R = scores.resampled.accuracy[place] - scores.resampled_unsteered.accuracy
    saved, change = (unsteered["macs"] - row["macs"]) / dense, row["accuracy"] - unsteered["accuracy"]
    holds = saved_ci[0] >= least and row["accuracy_change_ci"][0] >= -allowed
    return {
        "claim": f"{name} steering lowers the layer's MACs by at least {least:.0%} of the dense layer's at no loss",
        "value": saved,
        "interval": saved_ci,
        "accuracy_change": change,
        "random_pattern": float(random_SN.mean()),
        "lead_over_random_ci": lead_ci,
        "fixed_pattern": None if fixed is None else float(right_NP[:, fixed].mean()),
        "holds": bool(holds and lead_ci[0] > 0),
        "conditions": (
            Condition(saved, saved_R, least, inclusive=True),
            Condition(change, change_R, -allowed, inclusive=True),
            Condition(float(lead_SN.mean()), lead_R),
        ),
    }


def _average_alike(right_NP: np.ndarray, pattern_SN: np.ndarray, gates: LayerGates) -> np.ndarray:
    """Average right answers over all patterns with as many heads and the same sublayers as each image's own: [S, N].

    Args:
      right_NP: is the answer right, for all 2^G patterns.
      pattern_SN: the images' own patterns, for each seed.
    """
    patterns = np.arange(right_NP.shape[1])
    heads_P = np.bitwise_count(patterns & (2**gates.heads - 1)).astype(np.int64)
    kind_P = heads_P * 4 + (patterns >> gates.heads)
    members = np.zeros((len(patterns), kind_P.max() + 1))
    members[patterns, kind_P] = 1
    share_NK = (right_NP @ members) / np.maximum(members.sum(axis=0), 1)
    return np.take_along_axis(share_NK, kind_P[pattern_SN].T, axis=1).T


def claim_suppression(summary: dict[str, Any], scores: Scores) -> Claim | None:
    """Judge whether a negative alpha raises usage; None if the sweep has none."""
    alphas, g = scores.alphas, scores.names.index("class")
    if not (alphas < 0).any():
        return None
    a = int(np.argmax(np.where(alphas < 0, scores.validation.usage[g, BY_LABEL], -1.0)))
    change_R = scores.resampled.usage[:, g, BY_LABEL, a] - scores.resampled_unsteered.usage
    ci = to_float_list(scores.interval(change_R))
    change = float(scores.test.usage[g, BY_LABEL, a] - summary["steering"]["unsteered"]["usage"])
    return {
        "claim": f"suppression (alpha {alphas[a]:g}, of those below 0 the highest on validation) raises usage",
        "value": change,
        "interval": ci,
        "holds": ci[0] > 0,
        "conditions": (Condition(change, change_R),),
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
