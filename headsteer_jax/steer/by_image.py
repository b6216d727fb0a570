"""Strategies that choose for each image by itself, from what the gate reads, so that they need no label.

Axes: N images, F latents, S chosen latents, D width, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.steer.directions import (
    gate_bias_directions,
    global_bias_directions,
    mean_difference_directions,
    wrap_directions,
)
from headsteer_jax.steer.guess import keep_most_probable
from headsteer_jax.steer.strategies import Choice, LatentStatistics, eligible_latents


class ImageStrategy(NamedTuple):
    """A strategy whose choice has a row for each image of a split instead of one for each class."""

    # (images, the training split's statistics, config, rng) -> a choice of N rows
    choose: Callable[["ReadResiduals", LatentStatistics, SteerConfig, np.random.Generator], Choice]
    reads_latents: bool  # otherwise it reads the residual alone, and needs no encoder
    by_autoencoder: bool  # otherwise it chooses the same for every autoencoder


class ReadResiduals(NamedTuple):
    """What a strategy reads of each image."""

    x: np.ndarray  # [N, D] CLS residual that enters the layer of the guess, config.guess_layer
    z: csr_array  # [N, F] latents that are active in the residual that enters the steered layer


class StrongestLatents(NamedTuple):
    """The latents of each image that are amplified."""

    latents: np.ndarray  # [N, S] int32
    activations: np.ndarray  # [N, S] float32; 0 for those that only fill up an image with few active latents


def find_strongest(images: ReadResiduals, stats: LatentStatistics, config: SteerConfig) -> StrongestLatents:
    """Find the latents that are active most strongly in each image, relative to their mean where they fire.

    Raises:
      HeadSteerError: fewer than config.latents fire on at most config.max_frequency of the training images.
    """
    z_NF, eligible = images.z, eligible_latents(stats, config)
    eligible_F = np.zeros(len(stats.frequency), bool)
    eligible_F[eligible] = True
    latents = np.empty((z_NF.shape[0], config.latents), np.int32)
    activations = np.zeros(latents.shape, np.float32)
    for n, (begin, end) in enumerate(zip(z_NF.indptr, z_NF.indptr[1:], strict=False)):
        active, z = z_NF.indices[begin:end], z_NF.data[begin:end]
        kept = eligible_F[active] & (z > 0)
        active, z = active[kept], z[kept]
        strongest = np.argsort(-z / stats.strength[active], kind="stable")[: config.latents]
        filling = np.setdiff1d(eligible, active)[: config.latents - len(strongest)]
        latents[n] = np.concatenate([active[strongest], filling])
        activations[n, : len(strongest)] = z[strongest]
    return StrongestLatents(latents, activations)


def image_latents(
    images: ReadResiduals, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Amplify the image's own strongest latents, as visual sparse steering does (VS2, arXiv:2506.01247).

    With *add* each of them becomes (1 + alpha) z, so that a latent is pushed as far as it is active: its weight is z
    over its mean where it fires. With *scale*, which multiplies z already, the weight is 1, and the result the same.
    Latents that fire on more than config.max_frequency of the training images are left out, and those that fill up an
    image with few active latents stay at 0.
    """
    latents, z_NS = find_strongest(images, stats, config)
    if config.mode == "scale":
        return Choice(latents, (z_NS > 0).astype(np.float32))
    return Choice(latents, z_NS / np.maximum(stats.strength[latents], np.float32(1e-12)))


def image_random_directions(
    images: ReadResiduals, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Draw a direction for each image that moves its residual as far as `image_latents` does: its control."""
    amplified = find_strongest(images, stats, config)
    length_N = np.array([np.linalg.norm(z @ stats.decoder[latents]) for latents, z in zip(*amplified, strict=True)])
    drawn_ND = rng.standard_normal((len(length_N), stats.decoder.shape[1]))
    return wrap_directions(drawn_ND * (length_N / np.linalg.norm(drawn_ND, axis=1))[:, None])


def guessed_bias_directions(
    images: ReadResiduals, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Mix the classes' directions of `gate_bias` by a linear classifier's guess of the image's class.

    The classifier reads the residual that enters config.guess_layer, so that no second pass is needed. Its temperature
    is fitted on validation. The directions of the config.guess_classes most probable classes are mixed; an image that
    could be of several classes is pushed less where these disagree about a gate. If the largest probability is below
    config.least_confidence, the direction is that of `global_bias`: it is what the same search finds best for an image
    of which nothing is known, and there is no unsteered answer yet that could stand.
    """
    assert stats.guess is not None, "the sweep fits the classifier"
    bias_CD = gate_bias_directions(stats, config, rng).directions
    probability_NC = stats.guess.probabilities(images.x)
    mixed_ND = keep_most_probable(probability_NC, config.guess_classes) @ bias_CD
    unsure_N = probability_NC.max(axis=1) < config.least_confidence
    if unsure_N.any():
        common_CD = global_bias_directions(stats, config, rng).directions
        assert common_CD is not None
        mixed_ND[unsure_N] = common_CD[0]
    return wrap_directions(mixed_ND)


def guessed_difference_directions(
    images: ReadResiduals, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Mix the classes' directions of `mean_difference` by the guess of `guessed_bias`.

    An image whose largest probability is below config.least_confidence is not pushed at all.
    """
    assert stats.guess is not None, "the sweep fits the classifier"
    difference_CD = mean_difference_directions(stats, config, rng).directions
    probability_NC = stats.guess.probabilities(images.x)
    mixed_ND = keep_most_probable(probability_NC, config.guess_classes) @ difference_CD
    mixed_ND[probability_NC.max(axis=1) < config.least_confidence] = 0
    return wrap_directions(mixed_ND)
