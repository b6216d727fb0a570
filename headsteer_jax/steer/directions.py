"""Directions: vectors, one for each class, that move the residual without an autoencoder.

Each is added alpha times to what the gate reads, so that it is a bias for each class on the gate's logits, as *add*
with latents is. They answer what finding that vector by an autoencoder is worth. `mean_difference` and `probe` move the
residual as far as the latents of `class` do at the same alpha, and so does their control, `random_direction`;
`random_bias` is the control of `gate_bias`. That they move as far is true of the mode *add* in *delta* form and for
alphas >= 0: another mode or form moves latents otherwise, but adds directions all the same.

Axes: C classes, S chosen latents, N training images, D width, H gates of the steered layer.
"""

import numpy as np
from scipy.linalg import orth

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.steer.guess import fit_probe
from headsteer_jax.steer.strategies import (
    Choice,
    LatentStatistics,
    Residuals,
    class_frequent_latents,
    shift_norm,
    wanted_push,
)


def mean_difference_directions(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose the mean residual of the class less that of the other classes' images, as activation addition does.

    Turner et al. 2023, arXiv:2308.10248, add such differences of means to language models.
    """
    x_ND, labels, _ = residuals_of(stats)
    members_CN = (labels == np.arange(len(stats.class_frequency))[:, None]).astype(np.float64)
    counts_C1 = members_CN.sum(axis=1, keepdims=True)
    sums_CD = members_CN @ x_ND.astype(np.float64)
    mean_of_others_CD = (sums_CD.sum(axis=0) - sums_CD) / np.maximum(len(labels) - counts_C1, 1)
    return _as_far_as_class(sums_CD / np.maximum(counts_C1, 1) - mean_of_others_CD, stats, config, rng)


def probe_directions(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose the direction in which a linear classifier of the residual sees more of the class than of the others.

    It is the classifier's row of weights for the class less the mean of all rows.
    """
    x_ND, labels, _ = residuals_of(stats)
    probe = fit_probe(x_ND, labels)
    return _as_far_as_class(probe.coef_ - probe.coef_.mean(axis=0), stats, config, rng)


def random_directions(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Draw a direction for each class uniformly: the control of `mean_difference` and `probe`."""
    return _as_far_as_class(
        rng.standard_normal((len(stats.class_frequency), stats.decoder.shape[1])), stats, config, rng
    )


def gate_bias_directions(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose the shortest direction that pushes the gate exactly as `gate_aligned` wants it pushed.

    It is a bias for each class on the gate's logits, fitted to the answers under every gate pattern: what
    `gate_aligned` would reach if every push were a sum of latents.
    """
    gate_DH = residuals_of(stats).gate.astype(np.float64)
    push_CH = np.stack(
        [wanted_push(stats.outcomes, label, config, stats.cost) for label in range(len(stats.class_frequency))]
    )
    return wrap_directions(np.linalg.lstsq(gate_DH.T, push_CH.T)[0].T)


def global_bias_directions(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose one direction for all images, fitted as that of `gate_bias` but to all classes at once.

    It needs no label: what it saves, a lower target of usage in training might have saved.
    """
    gate_DH = residuals_of(stats).gate.astype(np.float64)
    together = tuple(part._replace(labels=np.zeros_like(part.labels)) for part in stats.outcomes)
    push_H = wanted_push(together, 0, config, stats.cost)
    return wrap_directions(np.tile(np.linalg.lstsq(gate_DH.T, push_H)[0], (len(stats.class_frequency), 1)))


def random_bias_directions(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Draw a direction for each class as long as that of `gate_bias`, within what the gates see: its control.

    The direction of `gate_bias` lies wholly in the span of the gates' weights. A direction of all D dimensions would
    have about a share sqrt(H / D) of its length in that span, and hardly push the gates.
    """
    fitted_CD = gate_bias_directions(stats, config, rng).directions
    assert fitted_CD is not None
    length_C = np.linalg.norm(fitted_CD, axis=1)
    basis_DK = orth(residuals_of(stats).gate.astype(np.float64))
    drawn_CD = rng.standard_normal((len(length_C), basis_DK.shape[1])) @ basis_DK.T
    return wrap_directions(drawn_CD * (length_C / np.maximum(np.linalg.norm(drawn_CD, axis=1), 1e-12))[:, None])


def residuals_of(stats: LatentStatistics) -> Residuals:
    """Return the training images' residuals, which the sweep provides."""
    assert stats.residuals is not None, "directions are made from residuals"
    return stats.residuals


def _as_far_as_class(
    directions_CD: np.ndarray, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Scale directions so that they move the residual as far as the latents of `class` do at the same alpha."""
    norm_C = shift_norm(stats, class_frequent_latents(stats, config, rng).latents)
    length_C = np.maximum(np.linalg.norm(directions_CD, axis=1), 1e-12)
    return wrap_directions(directions_CD * (norm_C / length_C)[:, None])


def wrap_directions(directions_CD: np.ndarray) -> Choice:
    """Wrap directions as the choice of a strategy, without latents."""
    none = np.zeros((len(directions_CD), 0))
    return Choice(none.astype(np.int32), none.astype(np.float32), directions_CD.astype(np.float32))
