"""What steering the gates of the patches does: which patches stay, chosen on validation and scored on test.

`kept` is the share of an image's patches that the steered layer keeps. Where it is known which patches show the image's
class (the strokes of double_digits), `own` is the share kept of these and `other` the share kept of the others.

Axes: G strategies, S seeds, A alphas, N images, R resamplings.
"""

from typing import Any

import numpy as np

from headsteer_jax.analysis.claims import Claim, find_subject
from headsteer_jax.analysis.stats import (
    bootstrap_means,
    bootstrap_weights,
    choose_alpha,
    percentile_interval,
    to_float_list,
)
from headsteer_jax.config.schema import Config
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.patches import PatchSplit, PatchSweep

Measures = dict[str, np.ndarray]


def measure_split(split: PatchSplit, patches: int) -> Measures:
    """Measure every image under every setting: [G, S, A, N] each of kept, accuracy, macs and, if known, own, other.

    An image without patches of its own, or with nothing else, counts as having kept all of these.
    """
    measures = {"kept": split.kept_patches / patches, "accuracy": split.right.astype(np.float64), "macs": split.macs}
    of_class, kept_of_class = split.class_patches, split.kept_class_patches
    if of_class is not None and kept_of_class is not None:
        other, kept_other = patches - of_class, split.kept_patches - kept_of_class
        measures["own"] = np.where(of_class > 0, kept_of_class / np.maximum(of_class, 1), 1.0)
        measures["other"] = np.where(other > 0, kept_other / np.maximum(other, 1), 1.0)
    return measures


def summarise_patches(sweep: PatchSweep, class_names: tuple[str, ...], config: Config) -> dict[str, Any]:
    """Summarise the sweep of steered patches: `patches` of summary.json, without its claim.

    The alpha of a strategy is the one above 0 of fewest MACs that keeps validation's accuracy within steer.tolerance.

    Returns:
      `layer`, `patches`, `dense_macs`, `images`; `unsteered`: the measures of `measure_split`; by strategy in
      `steering`: `alpha`, the measures with intervals of their changes, and `curve`; `classes`: rows for `class`.
    """
    alphas, gates = sweep.alphas, LayerGates(config, config.sae_layer)
    validation, test = (measure_split(split, sweep.patches) for split in (sweep.validation, sweep.test))
    zero = int(np.flatnonzero(alphas == 0)[0])
    weights = bootstrap_weights(sweep.test.labels, config.steer.bootstrap, np.random.default_rng([config.seed, 8]))
    resampled = {name: _resample(values, weights, config.seed) for name, values in test.items()}
    steering: dict[str, Any] = {}
    for g, strategy in enumerate(sweep.strategies):
        curves = {name: values[g].mean(axis=(0, 2)) for name, values in validation.items()}
        floor = curves["accuracy"][zero] - config.steer.tolerance
        a = int(choose_alpha(alphas, curves["macs"], curves["accuracy"], floor))
        row: dict[str, Any] = {"alpha": float(alphas[a])}
        for name, values in test.items():
            row[name] = float(values[g, :, a].mean())
            change_R = resampled[name][:, g, a] - resampled[name][:, g, zero]
            row[f"{name}_change_ci"] = to_float_list(percentile_interval(change_R, config.steer.confidence))
        row["curve"] = {"alpha": to_float_list(alphas)}
        row["curve"] |= {name: to_float_list(values[g].mean(axis=(0, 2))) for name, values in test.items()}
        steering[strategy] = row
    a = int(np.flatnonzero(alphas == steering["class"]["alpha"])[0])
    return {
        "layer": gates.layer,
        "patches": sweep.patches,
        "images": len(sweep.test.labels),
        "dense_macs": gates.dense_macs,
        "mode": config.steer.patch_mode,
        "unsteered": {name: float(values[0, 0, zero].mean()) for name, values in test.items()},
        "steering": steering,
        "classes": [
            {"name": class_names[c]} | _summarise_class(test, sweep.test.labels == c, zero, a)
            for c in np.unique(sweep.test.labels)
        ],
    }


def _summarise_class(test: Measures, members_N: np.ndarray, zero: int, a: int) -> dict[str, Any]:
    """Summarise one class's images under `class`, before and after steering."""
    row: dict[str, Any] = {"images": int(members_N.sum())}
    for name, values in test.items():
        row[f"{name}_before"] = float(values[0, :, zero][:, members_N].mean())
        row[f"{name}_after"] = float(values[0, :, a][:, members_N].mean())
    return row


def _resample(values: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Resample a measure [G, S, A, N] over images and seeds, for each measure alike: [R, G, A]."""
    rng = np.random.default_rng([seed, 9])
    return bootstrap_means(lambda s: values[:, s], values.shape[1], weights, rng)


def claim_own_patches(sweep: PatchSweep, config: Config) -> Claim | None:
    """Judge whether class steering keeps more of the patches that show the class than matched random latents do.

    Both are compared at the same alpha; the random latents move the class's patches as far. `value` is the difference
    of the shares of own patches that are kept, in short the lead. As keeping every patch would raise that share too,
    the lead must also be larger than that in the other patches (`over_other`). Of the alphas above 0 at which `class`
    keeps validation's accuracy within steer.tolerance, the one is taken at which the smaller of both is largest there.
    It is not judged if no alpha keeps the accuracy.

    Returns:
      The claim; None if it is not known which patches show the class.
    """
    if sweep.test.class_patches is None:
        return None
    validation, test = (measure_split(split, sweep.patches) for split in (sweep.validation, sweep.test))
    accuracy_A = validation["accuracy"][sweep.strategies.index("class")].mean(axis=(0, 2))
    floor = accuracy_A[sweep.alphas == 0] - config.steer.tolerance
    allowed = np.flatnonzero((sweep.alphas > 0) & (accuracy_A >= floor))
    text = "class steering of patch concepts keeps more of the class's own patches than matched random latents"
    if not len(allowed):
        return {"claim": text, "about": find_subject(text), "value": None, "interval": None, "holds": None}
    lead_A, over_A = (leads.mean(axis=(0, 2)) for leads in _lead_of_class(validation, sweep))
    a = allowed[np.argmax(np.minimum(lead_A, over_A)[allowed])]
    leads = [lead[:, a] for lead in _lead_of_class(test, sweep)]
    weights = bootstrap_weights(sweep.test.labels, config.steer.bootstrap, np.random.default_rng([config.seed, 8]))
    resampled = _resample(np.stack(leads)[:, :, None], weights, config.seed)[:, :, 0]
    ci, over_ci = (to_float_list(ends) for ends in percentile_interval(resampled, config.steer.confidence).T)
    return {
        "claim": text,
        "about": find_subject(text),
        "value": float(leads[0].mean()),
        "interval": ci,
        "over_other": float(leads[1].mean()),
        "over_other_ci": over_ci,
        "alpha": float(sweep.alphas[a]),
        "holds": ci[0] > 0 and over_ci[0] > 0,
    }


def _lead_of_class(measures: Measures, sweep: PatchSweep) -> tuple[np.ndarray, np.ndarray]:
    """Compute the lead of `class` over its control in own patches, and by how much it is larger there: [S, A, N]."""
    g, control = sweep.strategies.index("class"), sweep.strategies.index("matched_random")
    own_lead, other_lead = (measures[name][g] - measures[name][control] for name in ("own", "other"))
    return own_lead, own_lead - other_lead
