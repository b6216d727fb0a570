"""Strategies that choose for each image by itself, from what the gate reads, so that they need no label.

Axes: N images, F latents, S chosen latents, D width, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.special import softmax

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.steer.directions import fit_probe, gate_bias_directions, residuals_of, wrap_directions
from headsteer_jax.steer.strategies import Choice, LatentStatistics


class ImageStrategy(NamedTuple):
    """A strategy whose choice has a row for each image of a split instead of one for each class."""

    # (images, the training split's statistics, config, rng) -> a choice of N rows
    choose: Callable[["ReadResiduals", LatentStatistics, SteerConfig, np.random.Generator], Choice]


class ReadResiduals(NamedTuple):
    """The residual of each image that the steered layer's gate reads, and the latents that are active in it."""

    x: np.ndarray  # [N, D]
    z: csr_array  # [N, F]


def image_latents(
    images: ReadResiduals, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Choose the image's own strongest latents, as visual sparse steering does (VS2, arXiv:2506.01247).

    Strength is relative to the latent's mean where it fires. Latents that fire on more than config.max_frequency of the
    training images, and those that fill up an image with few active latents, get weights of 0.
    """
    z_NF = images.z
    rare_F = (stats.frequency > 0) & (stats.frequency <= config.max_frequency)
    if len(rare_F) < config.latents:
        raise HeadSteerError(f"config.steer.latents = {config.latents}: the autoencoder has only {len(rare_F)} latents")
    relative_F = np.where(rare_F, 1 / np.maximum(stats.strength, 1e-12), 0.0)
    latents = np.empty((z_NF.shape[0], config.latents), np.int32)
    weights = np.empty(latents.shape, np.float32)
    for n, (begin, end) in enumerate(zip(z_NF.indptr, z_NF.indptr[1:], strict=False)):
        relative = z_NF.data[begin:end] * relative_F[z_NF.indices[begin:end]]
        strongest = np.argsort(-relative, kind="stable")[: config.latents]
        active = z_NF.indices[begin:end][strongest]
        filling = np.setdiff1d(np.arange(min(config.latents * 2, len(rare_F))), active)[: config.latents - len(active)]
        latents[n] = np.concatenate([active, filling])
        weights[n] = np.concatenate([relative[strongest] > 0, np.zeros(len(filling), bool)])
    return Choice(latents, weights)


def image_random_directions(
    images: ReadResiduals, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Draw a direction for each image that moves its residual as far as `image_latents` does: its control."""
    amplified = image_latents(images, stats, config, rng)
    length_N = np.array(
        [
            np.linalg.norm((stats.strength[latents] * weights) @ stats.decoder[latents])
            for latents, weights in zip(amplified.latents, amplified.weights, strict=True)
        ]
    )
    drawn_ND = rng.standard_normal((len(length_N), stats.decoder.shape[1])).astype(np.float32)
    drawn_ND *= (length_N / np.linalg.norm(drawn_ND, axis=1))[:, None].astype(np.float32)
    return Choice(amplified.latents[:, :0], amplified.weights[:, :0], drawn_ND)


def guessed_bias_directions(
    images: ReadResiduals, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Mix the classes' directions of `gate_bias` by a linear classifier's guess of the image's class.

    The classifier reads what the gate reads, so that it costs C x D multiply-accumulates and no second pass. An image
    that could be of several classes is pushed less where these disagree about a gate.
    """
    probe = fit_probe(residuals_of(stats))
    guess_NC = softmax(images.x.astype(np.float64) @ probe.coef_.T + probe.intercept_, axis=1)
    bias_CD = gate_bias_directions(stats, config, rng).directions
    return wrap_directions(guess_NC @ bias_CD)
