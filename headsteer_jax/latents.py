"""Which latents to change: a strategy looks at how latents fire on the training split and names some for each class.

A strategy is a function `(statistics, config, rng) -> Choice`; STRATEGIES names those that the command line knows.
Axes: C classes, F latents, S chosen latents, D width, H heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from headsteer_jax.config import HeadSteerError, SteerConfig


class LatentStatistics(NamedTuple):
    """How one autoencoder's latents behave on the training split."""

    class_frequency: np.ndarray  # [C, F] share of the class's images on which the latent fires
    frequency: np.ndarray  # [F] the same over all images
    strength: np.ndarray  # [F] s_j: mean activation over the images on which it fires; 0 for a dead latent
    decoder: np.ndarray  # [F, D] in units of the residual stream


class Choice(NamedTuple):
    """The latents that a strategy changes in images of each class, and how strongly next to each other."""

    latents: np.ndarray  # [C, S] int32
    weights: np.ndarray  # [C, S] float32; alpha is multiplied by it


Strategy = Callable[[LatentStatistics, SteerConfig, np.random.Generator], Choice]


def statistics(z_NF: np.ndarray, labels: np.ndarray, classes: int, decoder_FD: np.ndarray) -> LatentStatistics:
    """Statistics of the training split's latents.

    Args:
      z_NF: latents >= 0.
      labels: [N] classes.
      decoder_FD: decoder rows over the autoencoder's scale.
    """
    fires_NF = z_NF > 0
    counts_C = np.bincount(labels, minlength=classes)
    fired_CF = np.stack([fires_NF[labels == label].sum(axis=0) for label in range(classes)])
    fired_F = fired_CF.sum(axis=0)
    return LatentStatistics(
        class_frequency=fired_CF / counts_C[:, None],
        frequency=fired_F / len(labels),
        strength=(z_NF.sum(axis=0, dtype=np.float64) / np.maximum(fired_F, 1)).astype(np.float32),
        decoder=decoder_FD,
    )


def _eligible(stats: LatentStatistics, config: SteerConfig) -> np.ndarray:
    """[E] latents that fire, but not on more than config.max_frequency of the images.

    Raises:
      HeadSteerError: fewer than config.latents are left.
    """
    eligible = np.flatnonzero((stats.frequency > 0) & (stats.frequency <= config.max_frequency))
    if len(eligible) < config.latents:
        raise HeadSteerError(
            f"config.steer.latents = {config.latents}: only {len(eligible)} latents fire on the training split at most "
            f"steer.max_frequency = {config.max_frequency} of the time; choose fewer, or raise it"
        )
    return eligible


def _most_frequent(frequency_CF: np.ndarray, eligible: np.ndarray, count: int) -> np.ndarray:
    """[C, S] the `count` eligible latents of highest frequency in each row; ties go to the lower index."""
    order = np.argsort(-frequency_CF[:, eligible], axis=1, kind="stable")[:, :count]
    return eligible[order].astype(np.int32)


def class_frequent(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """[LH26] per-class: the latents that fire most often on the class's training images."""
    latents = _most_frequent(stats.class_frequency, _eligible(stats, config), config.latents)
    return Choice(latents, np.ones(latents.shape, np.float32))


def global_frequent(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """[LH26] global: the latents that fire most often on all training images, the same for every class."""
    latents = _most_frequent(stats.frequency[None], _eligible(stats, config), config.latents)
    latents = np.repeat(latents, len(stats.class_frequency), axis=0)
    return Choice(latents, np.ones(latents.shape, np.float32))


def random(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """[LH26] random: for each class, latents drawn evenly from those that fire."""
    eligible = _eligible(stats, config)
    latents = np.stack([rng.choice(eligible, config.latents, replace=False) for _ in stats.class_frequency])
    return Choice(latents.astype(np.int32), np.ones(latents.shape, np.float32))


def matched_random(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """A control for `class_frequent`: random latents that fire as often as its own and move the residual as far.

    Each of the class's latents is replaced by one drawn from the ten others closest to it in overall frequency; then
    one weight for all makes |sum_j w s_j d_j|, the shift of *add* at alpha 1, equal to the class's own.
    """
    chosen = class_frequent(stats, config, rng)
    eligible = _eligible(stats, config)
    latents = np.empty_like(chosen.latents)
    for row, own in zip(latents, chosen.latents, strict=True):
        free = np.setdiff1d(eligible, own)
        for position, latent in enumerate(own):
            if not len(free):
                raise HeadSteerError(
                    f"config.steer.latents = {config.latents}: too many for matched_random, which needs as many others"
                )
            closest = np.argsort(np.abs(stats.frequency[free] - stats.frequency[latent]), kind="stable")[:10]
            pick = rng.choice(closest)
            row[position] = free[pick]
            free = np.delete(free, pick)
    ratio = shift_norm(stats, chosen.latents) / np.maximum(shift_norm(stats, latents), 1e-12)
    return Choice(latents, np.repeat(ratio[:, None], config.latents, axis=1).astype(np.float32))


def shift_norm(stats: LatentStatistics, latents_CS: np.ndarray) -> np.ndarray:
    """[C] |sum_j s_j d_j|: how far *add* at alpha 1 moves the residual of each class's images."""
    return np.linalg.norm(np.einsum("CS,CSD->CD", stats.strength[latents_CS], stats.decoder[latents_CS]), axis=1)


STRATEGIES: dict[str, Strategy] = {
    "class": class_frequent,
    "global": global_frequent,
    "random": random,
    "matched_random": matched_random,
}


def strategy(name: str) -> Strategy:
    """Raises HeadSteerError for a name that is not known."""
    if name not in STRATEGIES:
        raise HeadSteerError(f"config.steer.strategies: there is no {name!r}; allowed are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def overlap(a_CS: np.ndarray, b_CS: np.ndarray) -> np.ndarray:
    """[C, C'] shared latents over S, of every pair of rows: |A & B| / S, [LH26]'s overlap."""
    return np.array([[len(np.intersect1d(a, b)) for b in b_CS] for a in a_CS]) / a_CS.shape[1]
