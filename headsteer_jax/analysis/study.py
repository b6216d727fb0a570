"""Statistics of runs that differ in their training seed only: metrics and claims, pooled with intervals.

The bootstrap is hierarchical: every resampling draws training seeds, within them autoencoder seeds, and test images.
All runs are tested on the same images, so a resampling takes the same images for all of them. What they have in common
is then not averaged out as if every run had images of its own. Each run has autoencoders of its own, and their draw is
its own too.

Percentiles of few seeds give intervals that are too narrow: those of 95% held the true mean in 79% of simulations with
three seeds, and in 87% with five. They are therefore widened by the standard error and Student's t: see `pool_seeds`.

Axes: T training seeds, S autoencoder seeds, R resamplings.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from headsteer_jax.analysis.claims import Claim, Condition, judge_claims
from headsteer_jax.analysis.scores import Scores, score_settings
from headsteer_jax.analysis.stats import percentile_interval, to_float_list
from headsteer_jax.analysis.summary import compare_fronts
from headsteer_jax.analysis.sweep_file import to_result
from headsteer_jax.config.schema import Config
from headsteer_jax.steer.results import BY_LABEL, BY_PREDICTION, SplitResult, SweepResult

SHARES = ("usage", "accuracy", "dead_fraction", "gate_agreement")  # metrics from 0 to 1 end so
AUTOENCODER_FIGURES = ("explained_variance", "dead_fraction", "gate_agreement")  # of summary.json's `sae`
TINY = 1e-12  # a standard deviation below this is rounding

# what an interval is over
SEEDS = "seeds"
AUTOENCODERS = "seeds and autoencoders"
IMAGES = "seeds, autoencoders and images"


class Measure(NamedTuple):
    """A run's value of a metric."""

    value: float
    resampled: np.ndarray | None = None  # [R] over what `over` names beside seeds; None if it is one number only
    over: str = SEEDS  # what the interval of several runs is over


class RunMeasures(NamedTuple):
    """The part of one run that a study takes."""

    seed: int
    metrics: dict[str, Measure]
    claims: list[Claim]  # those of summary.json, with `conditions`


class Pooled(NamedTuple):
    """The mean over training seeds with its interval; None if one number cannot have any."""

    mean: float
    interval: list[float] | None


def measure_run(
    config: Config, test: Mapping[str, Any], summary: Mapping[str, Any] | None, sweep: Mapping[str, np.ndarray] | None
) -> RunMeasures:
    """Measure a run from its files.

    Args:
      config: the run's.
      test: the content of train/test.json.
      summary: that of summary.json; None if the run has none.
      sweep: the arrays of sweep.nc; None as for `summary`.
    """
    metrics = _measure_training(test)
    if summary is None or sweep is None:
        return RunMeasures(config.seed, metrics, [])
    result = to_result(sweep)
    # images are drawn alike for every run; autoencoder number s of one run has nothing in common with that of another
    images_rng = np.random.default_rng([config.data_seed, 12])
    members_rng = np.random.default_rng([config.data_seed, 14, config.seed])
    scores = score_settings(result, config, images_rng, members_rng)
    metrics |= _measure_autoencoders(summary["sae"], config.steer.bootstrap, members_rng)
    metrics |= _measure_layer(result.test, scores) | _measure_steering(scores, summary)
    return RunMeasures(config.seed, metrics, _find_conditions(summary, result, scores, config))


def _measure_training(test: Mapping[str, Any]) -> dict[str, Measure]:
    """Read the accuracies of the trained models, and what the gated one computes."""
    phases = ("dense", "gated", "dense_control")
    metrics = {f"{name}_accuracy": Measure(test[name]) for name in phases if name in test}
    if "dense_control" in test:
        metrics["gated_minus_dense_control"] = Measure(test["gated"] - test["dense_control"])
    if test.get("compute"):
        metrics["macs_share"] = Measure(test["compute"]["share"])
    return metrics


def _measure_autoencoders(sae: Mapping[str, Any], resamplings: int, rng: np.random.Generator) -> dict[str, Measure]:
    """Measure the autoencoders, resampled over their seeds; a single one is a number only.

    Args:
      sae: `sae` of summary.json, whose `seeds` has a row for each autoencoder.
    """
    rows = sae["seeds"]
    if len(rows) == 1:
        return {name: Measure(sae[name]) for name in AUTOENCODER_FIGURES}
    drawn_RS = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamplings) / len(rows)
    return {
        name: Measure(sae[name], drawn_RS @ np.array([row[name] for row in rows], np.float64), AUTOENCODERS)
        for name in AUTOENCODER_FIGURES
    }


def _measure_layer(test: SplitResult, scores: Scores) -> dict[str, Measure]:
    """Measure the accuracy with all gates of the steered layer open, `all_on`, or closed, `all_off`."""
    right_N2 = test.table[:, [-1, 0]] == test.labels[:, None]
    resampled_R2 = scores.weights @ right_N2 / len(test.labels)
    return {
        f"{name}.accuracy": Measure(float(right_N.mean()), resampled_R, IMAGES)
        for name, right_N, resampled_R in zip(("all_on", "all_off"), right_N2.T, resampled_R2.T, strict=True)
    }


def _measure_steering(scores: Scores, summary: Mapping[str, Any]) -> dict[str, Measure]:
    """Measure usage and accuracy without steering, and under every strategy at its chosen alpha."""
    before, before_R = summary["steering"]["unsteered"], scores.resampled_unsteered
    metrics = {
        "unsteered.usage": Measure(before["usage"], before_R.usage, IMAGES),
        "unsteered.accuracy": Measure(before["accuracy"], before_R.accuracy, IMAGES),
    }
    for g, strategy in enumerate(scores.names):
        row = summary["steering"][strategy]
        for y, name, values in (
            (BY_LABEL, strategy, row),
            (BY_PREDICTION, f"{strategy}.by_predicted_class", row["by_predicted_class"]),
        ):
            place = (slice(None), g, y, scores.chosen[g, y])
            for quantity in ("usage", "accuracy"):
                after_R = getattr(scores.resampled, quantity)[place]
                change, change_R = values[quantity] - before[quantity], after_R - getattr(before_R, quantity)
                metrics[f"{name}.{quantity}"] = Measure(values[quantity], after_R, IMAGES)
                metrics[f"{name}.{quantity}_change"] = Measure(change, change_R, IMAGES)
            if "total_macs_share" in values:  # older runs do not have it
                metrics[f"{name}.total_macs_share"] = Measure(values["total_macs_share"])
        metrics[f"{strategy}.classes_saved"] = Measure(float(row["classes_saved"]))
    return metrics


def _find_conditions(summary: Mapping[str, Any], result: SweepResult, scores: Scores, config: Config) -> list[Claim]:
    """Give a run's claims their conditions, resampled with these scores; those without any keep their interval only."""
    if "claims" not in summary:
        return []
    again = {name: value for name, value in summary.items() if name != "fronts"}
    if "fronts" in summary and (fronts := compare_fronts(scores, summary["steering"]["unsteered"]["usage"])):
        again["fronts"] = fronts
    judged = judge_claims(again, result, scores, config) if "class" in scores.names else []
    conditions = {claim["claim"]: claim.get("conditions", ()) for claim in judged}
    return [claim | {"conditions": conditions.get(claim["claim"], ())} for claim in summary["claims"]]


def pool_seeds(
    values_T: Sequence[float], resampled_TR: np.ndarray | None, confidence: float, rng: np.random.Generator
) -> Pooled:
    """Average a quantity over training seeds, with its interval by a hierarchical bootstrap.

    From three seeds on, the percentiles of the resampled means keep their shape, and their distances from the centre
    are scaled so that the interval of a normal quantity is Student's: by (t / z) (standard error / spread of the
    resampled means). Of two seeds, or if there are only the values, the interval is Student's itself. One seed has no
    standard error: its interval covers autoencoder seeds and images only.

    Args:
      values_T: the value of each training seed.
      resampled_TR: [T, R] the same, each resampled over autoencoder seeds and over images, which are those of the other
        rows; NaN where a resampling has no value. None: there are only the values.
    """
    values, seeds = np.asarray(values_T, np.float64), len(values_T)
    mean = float(values.mean())
    if resampled_TR is None:
        if seeds == 1:
            return Pooled(mean, None)
        error = float(values.std(ddof=1)) / math.sqrt(seeds)
        return Pooled(mean, student_interval(mean, error, seeds - 1, confidence))
    resampled = np.asarray(resampled_TR, np.float64)
    resampled = resampled[:, ~np.isnan(resampled).any(axis=0)]
    if resampled.shape[1] < 2:
        return Pooled(mean, None)
    if seeds == 1:
        return Pooled(mean, to_float_list(percentile_interval(resampled[0], confidence)))
    error, freedom = estimate_error(values, resampled)
    # Two drawn seeds have only three means; their ends lie 1.41 standard deviations from the centre, not 1.96.
    # Each figure is the share of 6,000 simulations, in percent, in which an interval of 95% held the true mean:
    #                                               scaled percentiles           Student's
    #                                              T = 2   T = 3   T = 5     T = 2   T = 3   T = 5
    # normal values of seeds, no images             93.1    95.4    94.3      94.9    95.8    94.8
    # the same, and a normal effect of images       95.0    94.3    94.9      95.0    94.7    95.1
    # 100 images, 3% of them wrong in all runs      95.7    94.2    92.4      94.7    91.4    89.6
    # From three seeds on, the shape that percentiles keep helps where few images decide, and costs little elsewhere.
    if seeds == 2:
        return Pooled(mean, student_interval(float(resampled.mean()), error, freedom, confidence))
    drawn_RT = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resampled.shape[1]) / seeds
    means_R = np.einsum("RT,TR->R", drawn_RT, resampled)
    centre, spread = float(means_R.mean()), float(means_R.std(ddof=1))
    if spread < TINY:
        return Pooled(mean, [mean, mean])
    low, high = student_interval(0.0, error, freedom, confidence)
    scale = (high - low) / (2 * float(stats.norm.ppf((1 + confidence) / 2)) * spread)
    return Pooled(mean, to_float_list(centre + scale * (percentile_interval(means_R, confidence) - centre)))


def student_interval(centre: float, error: float, freedom: float, confidence: float) -> list[float]:
    """Compute Student's interval: the centre plus and minus t times a standard error.

    Args:
      freedom: degrees of freedom; infinite: the interval is the normal one.
    """
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error if error > TINY else 0.0
    return [centre - half, centre + half]


def estimate_error(values_T: np.ndarray, resampled_TR: np.ndarray) -> tuple[float, float]:
    """Estimate the standard error of the mean over training seeds, with its degrees of freedom (Welch-Satterthwaite).

    The variance between seeds has T - 1 degrees of freedom. It holds what the autoencoder seeds and images of a run add
    by themselves, so it is taken to be at least that. What the images do to all runs alike, the mean covariance of two
    rows, does not fall with the number of seeds and is added.
    """
    seeds = len(values_T)
    covariance_TT = np.cov(resampled_TR)
    apart = ~np.eye(seeds, dtype=bool)
    shared = max(0.0, float(covariance_TT[apart].mean()))
    alone = float(covariance_TT[~apart].mean()) - shared
    between = max(float(values_T.var(ddof=1)), alone) / seeds
    variance = between + shared
    freedom = (seeds - 1) * (variance / between) ** 2 if between > TINY**2 else np.inf
    return float(np.sqrt(variance)), float(freedom)


def summarise_seeds(runs: Sequence[RunMeasures], config: Config) -> dict[str, Any]:
    """Summarise the runs of one setting: rows of `claims` and `metrics` of study.json.

    Args:
      runs: at least one, of different seeds.
      config: that of one of them.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    texts = list(dict.fromkeys(name_claim(claim) for run in runs for claim in run.claims))
    return {
        "claims": [_pool_claim(text, runs, config) for text in texts],
        "metrics": [_pool_metric(name, runs, config) for name in names],
    }


def _study_rng(config: Config) -> np.random.Generator:
    """Make the generator that draws training seeds: the same for every quantity, so that all of them are paired."""
    return np.random.default_rng([config.data_seed, 13])


def _pool_metric(name: str, runs: Sequence[RunMeasures], config: Config) -> dict[str, Any]:
    """Pool one metric over the runs that have it."""
    measured = {run.seed: run.metrics[name] for run in runs if name in run.metrics}
    rows = [measure.resampled for measure in measured.values()]
    resampled = None if any(row is None for row in rows) else np.stack([row for row in rows if row is not None])
    values = [measure.value for measure in measured.values()]
    pooled = pool_seeds(values, resampled, config.steer.confidence, _study_rng(config))
    if pooled.interval and name.endswith(SHARES):
        pooled = pooled._replace(interval=to_float_list(np.clip(pooled.interval, 0, 1)))
    return {
        "metric": name,
        "mean": pooled.mean,
        "interval": pooled.interval,
        "over": SEEDS if resampled is None else next(iter(measured.values())).over,
        "seeds": len(values),
        "by_seed": [{"seed": seed, "value": float(measure.value)} for seed, measure in measured.items()],
    }


def name_claim(claim: Claim) -> str:
    """Name a claim alike in every run: some texts give the alpha that the run chose."""
    return re.sub(r" \(alpha [^)]*\)", "", claim["claim"])


def _pool_claim(text: str, runs: Sequence[RunMeasures], config: Config) -> dict[str, Any]:
    """Pool one claim over the runs, and count those that hold it.

    Returns:
      `holds`: the number of seeds that hold it, of `seeds`; `judged`: of how many it could be judged. `value` and
      `interval`, pooled over the latter, and `least`, the bound that they must reach; `pooled_holds`: does the claim
      hold for them. None: it has no value, or no conditions that resampled images could decide.
    """
    by_seed = [
        {"seed": run.seed} | {name: claim[name] for name in ("value", "interval", "holds")}
        for run in runs
        for claim in run.claims
        if name_claim(claim) == text
    ]
    judged = [claim for run in runs for claim in run.claims if name_claim(claim) == text and claim["value"] is not None]
    row: dict[str, Any] = {"claim": text, "holds": sum(bool(entry["holds"]) for entry in by_seed), "seeds": len(runs)}
    row |= {"judged": len(judged), "value": None, "interval": None, "least": 0.0, "pooled_holds": None}
    if judged and all(claim["conditions"] for claim in judged):
        pooled = [
            _pool_condition([claim["conditions"][place] for claim in judged], config)
            for place in range(len(judged[0]["conditions"]))
        ]
        row |= {"value": pooled[0].mean, "interval": pooled[0].interval, "least": judged[0]["conditions"][0].least}
        rules = zip(pooled, judged[0]["conditions"], strict=True)
        row["pooled_holds"] = all(pool.interval is not None and rule.allows(pool.interval[0]) for pool, rule in rules)
    elif judged:
        row |= _pool_intervals(judged, config.steer.confidence)
    return row | {"by_seed": by_seed}


def _pool_condition(conditions: Sequence[Condition], config: Config) -> Pooled:
    """Pool one condition of a claim over the runs."""
    resampled = np.stack([condition.resampled for condition in conditions])
    values = [condition.value for condition in conditions]
    return pool_seeds(values, resampled, config.steer.confidence, _study_rng(config))


def _pool_intervals(judged: Sequence[Claim], confidence: float) -> dict[str, Any]:
    """Pool a claim of which there are only each run's value and interval.

    How much the runs' intervals have in common is not known. They are taken to be wholly in common, which gives the
    widest interval.
    """
    values = np.array([claim["value"] for claim in judged], np.float64)
    ends = np.array([claim["interval"] for claim in judged], np.float64)
    if len(values) == 1:
        return {"value": float(values[0]), "interval": to_float_list(ends[0])}
    within = float(np.mean((np.diff(ends, axis=1) / (2 * stats.norm.ppf((1 + confidence) / 2))) ** 2))
    between = float(values.var(ddof=1)) / len(values)
    freedom = (len(values) - 1) * ((between + within) / between) ** 2 if between > TINY**2 else np.inf
    mean = float(values.mean())
    return {"value": mean, "interval": student_interval(mean, math.sqrt(between + within), freedom, confidence)}
