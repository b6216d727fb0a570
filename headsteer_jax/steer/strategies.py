"""Strategies: which latents are changed. A strategy chooses some for each class, from how they fire on the train split.

A strategy is a function `(statistics, config, rng) -> Choice`. `catalogue.py` lists them by name, `directions.py` has
those that need no autoencoder.

Axes: C classes, E eligible latents, F latents, S chosen latents, D width, H gates of the steered layer (its heads, then
attention and the MLP, as far as it gates them), N images, P = 2^H gate patterns (bit h is gate h).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.steer.guess import Guess
from headsteer_jax.steer.table import Outcomes

NO_COST = np.zeros(0)
SUPERCLASS_STRATEGIES = ("superclass", "matched_superclass")


class LatentStatistics(NamedTuple):
    """How one autoencoder's latents behave on the training split, and what they do to the gate that they steer."""

    class_frequency: np.ndarray  # [C, F] share of the class's images on which the latent fires
    frequency: np.ndarray  # [F] the same over all images
    strength: np.ndarray  # [F] s_j: mean activation over the images on which it fires; 0 for a dead latent
    decoder: np.ndarray  # [F, D] in units of the residual stream
    gate: np.ndarray = np.zeros((0, 0))  # [F, H] effect of one unit of a latent on the gate logits
    outcomes: tuple[Outcomes, ...] = ()  # of training images (steer.evidence of each class), and of validation
    class_names: tuple[str, ...] = ()
    cost: np.ndarray = NO_COST  # [P] what each pattern costs, as a share; empty: the share of gates that are open
    related: np.ndarray | None = None  # [C, C] bool: do two classes share a superclass; None: the dataset has none
    residuals: "Residuals | None" = None  # of the training images, for directions
    guess: Guess | None = None  # of the class, for the strategies that guess


class Residuals(NamedTuple):
    """The training images' residuals, from which directions are made, and the gate that reads them."""

    x: np.ndarray  # [N, D]
    labels: np.ndarray  # [N]
    gate: np.ndarray  # [D, H] its weights; with a LayerNorm before them, its derivative at the mean residual


class Choice(NamedTuple):
    """The latents that a strategy changes in images of each class, and how strongly each; or directions instead."""

    latents: np.ndarray  # [C, S] int32
    weights: np.ndarray  # [C, S] float32; alpha is multiplied by it
    # [C, D] float32 in the residual's units, added to it alpha times, whatever steer.mode and steer.form are; there are
    # no latents then. None: latents are changed
    directions: np.ndarray | None = None


Strategy = Callable[[LatentStatistics, SteerConfig, np.random.Generator], Choice]


def differs_by_class(choice: Choice) -> bool:
    """Tell whether the class that steers an image makes a difference: two rows of the choice differ."""
    return any(bool((part != part[:1]).any()) for part in choice if part is not None)


def concatenate_choices(choices: Sequence[Choice]) -> Choice:
    """Put the rows of several choices of one strategy behind each other."""
    latents, weights, directions = zip(*choices, strict=True)
    rows = None if directions[0] is None else np.concatenate(directions)
    return Choice(np.concatenate(latents), np.concatenate(weights), rows)


def merge_choices(choices: Sequence[Choice], number_N: np.ndarray) -> Choice:
    """Take row n from the choice number_N[n], for every n."""
    latents, weights, directions = zip(*choices, strict=True)
    rows = np.arange(len(number_N))
    merged = None if directions[0] is None else np.stack(directions)[number_N, rows]
    return Choice(np.stack(latents)[number_N, rows], np.stack(weights)[number_N, rows], merged)


def latent_statistics(
    z_NF: np.ndarray, labels: np.ndarray, classes: int, decoder_FD: np.ndarray, gate_DH: np.ndarray | None = None,
    outcomes: tuple[Outcomes, ...] = (), class_names: tuple[str, ...] = (),
) -> LatentStatistics:  # fmt: skip
    """Compute the statistics of the training split's latents.

    Args:
      z_NF: latents >= 0.
      labels: [N] classes.
      decoder_FD: decoder rows over the autoencoder's scale.
      gate_DH: the gate's weights; with a LayerNorm before them, its derivative at the mean residual. It may be None,
        and outcomes empty, for strategies that do not look at the gate.
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
        gate=decoder_FD @ (np.zeros((decoder_FD.shape[1], 0)) if gate_DH is None else gate_DH),
        outcomes=outcomes,
        class_names=class_names,
    )


def eligible_latents(stats: LatentStatistics, config: SteerConfig) -> np.ndarray:
    """Return the [E] latents that fire, but on at most config.max_frequency of the images.

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
    """Pick the `count` eligible latents of highest frequency in each row, [C, S]; ties go to the lower index."""
    order = np.argsort(-frequency_CF[:, eligible], axis=1, kind="stable")[:, :count]
    return eligible[order].astype(np.int32)


def class_frequent_latents(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose the latents that fire most often on the class's training images: [LH26], per-class."""
    latents = _most_frequent(stats.class_frequency, eligible_latents(stats, config), config.latents)
    return Choice(latents, np.ones(latents.shape, np.float32))


def superclass_latents(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose the latents that fire most often on training images of the class and of the classes related to it.

    Each class counts as much as the others. A class without relatives gets what `class_frequent_latents` gives it.

    Raises:
      HeadSteerError: the dataset has no superclasses.
    """
    related_CC = require_superclasses(stats.related)
    member_CC = related_CC | np.eye(len(related_CC), dtype=bool)
    frequency_CF = member_CC @ stats.class_frequency / member_CC.sum(axis=1, keepdims=True)
    latents = _most_frequent(frequency_CF, eligible_latents(stats, config), config.latents)
    return Choice(latents, np.ones(latents.shape, np.float32))


def require_superclasses(related_CC: np.ndarray | None) -> np.ndarray:
    """Return which classes share a superclass; raises HeadSteerError if the dataset has none."""
    if related_CC is None:
        names = " and ".join(map(repr, SUPERCLASS_STRATEGIES))
        raise HeadSteerError(
            f"config.steer.strategies: {names} need superclasses; name them in data.related, or leave them out"
        )
    return related_CC


def global_frequent_latents(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose the latents that fire most often on all training images, the same for every class: [LH26], global."""
    latents = _most_frequent(stats.frequency[None], eligible_latents(stats, config), config.latents)
    latents = np.repeat(latents, len(stats.class_frequency), axis=0)
    return Choice(latents, np.ones(latents.shape, np.float32))


def random_latents(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Draw latents for each class uniformly from those that fire: [LH26], random."""
    eligible = eligible_latents(stats, config)
    latents = np.stack([rng.choice(eligible, config.latents, replace=False) for _ in stats.class_frequency])
    return Choice(latents.astype(np.int32), np.ones(latents.shape, np.float32))


def matched_random_latents(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose random latents that fire as often as those of `class_frequent_latents` and move the residual as far."""
    return _match_latents(class_frequent_latents(stats, config, rng).latents, stats, config, rng)


def matched_superclass_latents(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose random latents that fire as often as those of `superclass_latents` and move the residual as far.

    Raises:
      HeadSteerError: the dataset has no superclasses.
    """
    return _match_latents(superclass_latents(stats, config, rng).latents, stats, config, rng)


def _match_latents(
    matched_CS: np.ndarray, stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator
) -> Choice:
    """Choose random latents in place of those of another strategy.

    Each is replaced by one drawn from the ten others closest to it in overall frequency; then one weight for all of
    them makes |sum_j w s_j d_j|, the shift of *add* at alpha 1, as large as with the matched latents.

    Raises:
      HeadSteerError: too few other latents are left.
    """
    eligible = eligible_latents(stats, config)
    latents = np.empty_like(matched_CS)
    for row, matched_S in zip(latents, matched_CS, strict=True):
        free = np.setdiff1d(eligible, matched_S)
        for position, latent in enumerate(matched_S):
            if not len(free):
                raise HeadSteerError(
                    f"config.steer.latents = {config.latents}: too many for matched random latents, which need as many "
                    "others"
                )
            closest = np.argsort(np.abs(stats.frequency[free] - stats.frequency[latent]), kind="stable")[:10]
            pick = rng.choice(closest)
            row[position] = free[pick]
            free = np.delete(free, pick)
    ratio = shift_norm(stats, matched_CS) / np.maximum(shift_norm(stats, latents), 1e-12)
    return Choice(latents, np.repeat(ratio[:, None], config.latents, axis=1).astype(np.float32))


def shift_norm(stats: LatentStatistics, latents_CS: np.ndarray) -> np.ndarray:
    """Compute how far *add* at alpha 1 moves the residual of each class's images: [C] |sum_j s_j d_j|."""
    return np.linalg.norm(np.einsum("CS,CSD->CD", stats.strength[latents_CS], stats.decoder[latents_CS]), axis=1)


def gate_aligned_latents(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose latents of the class whose decoders push the gate where the class keeps its accuracy with fewer heads.

    This strategy is ours. `wanted_heads` decides for each class which gates to close, open or leave alone as alpha
    grows, from the answers under every gate pattern. The push that does this is then written as a sum of latents of the
    class: the S most useful of the `steer.pool` most frequent ones, with weights >= 0 (least squares, as small as
    possible). It is made for *add*; if no sum of S latents gives the push exactly, the nearest is taken.
    """
    pool = _most_frequent(stats.class_frequency, eligible_latents(stats, config), max(config.pool, config.latents))
    effect_FH = stats.strength[:, None] * stats.gate  # of *add* at alpha 1
    latents = np.empty((len(pool), config.latents), np.int32)
    weights = np.empty(latents.shape, np.float32)
    for label, candidates in enumerate(pool):
        push_H = wanted_push(stats.outcomes, label, config, stats.cost)
        first = _smallest_weights(effect_FH[candidates], push_H)
        best = np.argsort(-first * np.linalg.norm(effect_FH[candidates], axis=1), kind="stable")[: config.latents]
        latents[label] = candidates[best]
        weights[label] = _smallest_weights(effect_FH[candidates[best]], push_H)
    return Choice(latents, weights)


def _smallest_weights(effect_SH: np.ndarray, push_H: np.ndarray, ridge: float = 1e-2) -> np.ndarray:
    """Find small weights [S] w >= 0 whose sum of effects is closest to a push: min |E^T w - p|^2 + ridge^2 |w|^2."""
    count = len(effect_SH)
    return nnls(
        np.concatenate([effect_SH.T, ridge * np.eye(count)]), np.concatenate([push_H, np.zeros(count)]),
        maxiter=100 * count,
    )[0]  # fmt: skip


def wanted_push(
    outcomes: tuple[Outcomes, ...], label: int, config: SteerConfig, cost_P: np.ndarray = NO_COST
) -> np.ndarray:
    """Compute the [H] shift of the gate logits at alpha 1 that closes, opens or leaves each gate, the cheapest first.

    At strength alpha, `alpha * steer.price` of the class's accuracy may be paid for the whole layer's usage. A gate
    that is worth closing from some alpha of the grid on is pushed so far that it is closed there on every image of the
    outcomes; one that is worth opening at the first alpha is opened likewise.

    Args:
      cost_P: what each pattern costs; empty: the share of gates that are open.
    """
    alphas = np.unique([alpha for alpha in config.alphas if alpha > 0])
    heads = outcomes[0].gate_logits.shape[1]
    if not len(alphas):
        return np.zeros(heads)
    path = np.zeros((len(alphas), heads), np.int8)
    measure = measure_wishes(outcomes, label, cost_P)
    for a, alpha in enumerate(alphas):
        path[a] = wanted_heads(measure, alpha * config.price, path[max(a - 1, 0)])
    logits = np.concatenate([part.gate_logits[part.labels == label] for part in outcomes])
    margin = 0.05 * np.abs(logits).mean() if len(logits) else 0.0
    push = np.zeros(heads)
    for head in range(heads):
        closed = path[:, head] < 0
        if closed[-1]:
            since = alphas[len(alphas) - int(np.argmin(closed[::-1]))] if not closed.all() else alphas[0]
            push[head] = -(max(logits[:, head].max(), 0.0) + margin) / since
        elif path[0, head] > 0:
            push[head] = (max(-logits[:, head].min(), 0.0) + margin) / alphas[0]
    return push


def measure_wishes(
    outcomes: tuple[Outcomes, ...], label: int, cost_P: np.ndarray = NO_COST
) -> Callable[[int, int], tuple[float, float]]:
    """Return a function that measures what opening and closing gates does to a class's images.

    It is called with the gates that are opened and those that are closed, as bits, and returns accuracy and cost, each
    the mean of its values on training and on validation images of the class. It remembers what it has measured.

    Args:
      cost_P: what each pattern costs; empty: the share of gates that are open.
    """
    class_outcomes = [(part.pattern[part.labels == label], part.right[part.labels == label]) for part in outcomes]
    class_outcomes = [(pattern, right) for pattern, right in class_outcomes if len(pattern)]
    gates = outcomes[0].gate_logits.shape[1]
    used_P = cost_P if len(cost_P) else np.bitwise_count(np.arange(2**gates)) / gates

    @functools.cache
    def measure(opened: int, closed: int) -> tuple[float, float]:
        accuracy = cost = 0.0
        for pattern_N, right_NP in class_outcomes:
            pattern_N = (pattern_N | opened) & ~closed
            accuracy += np.mean(right_NP[np.arange(len(pattern_N)), pattern_N]) / len(class_outcomes)
            cost += np.mean(used_P[pattern_N]) / len(class_outcomes)
        return accuracy, cost

    return measure


def wanted_heads(measure: Callable[[int, int], tuple[float, float]], price: float, start: np.ndarray) -> np.ndarray:
    """Decide for each gate what is best for a class at a price of usage: [H] -1 close, 0 leave to the gate, 1 open.

    Accuracy - price * cost is maximised, one gate at a time from `start` until no change of one gate helps. That finds
    a near optimum, not always the optimum; which is as well, since the best of all 3^H on so few images is best by
    chance.

    Args:
      measure: as `measure_wishes` returns it.
    """
    bits = 1 << np.arange(len(start))

    def worth(wish: np.ndarray) -> float:
        accuracy, cost = measure(int((wish > 0) @ bits), int((wish < 0) @ bits))
        return accuracy - price * cost

    best, value = start.copy(), worth(start)
    while True:
        before = value
        for head in range(len(start)):
            for state in (-1, 0, 1):
                wish = best.copy()
                wish[head] = state
                if (other := worth(wish)) > value + 1e-12:
                    best, value = wish, other
        if value == before:
            return best


def latent_overlap(a_CS: np.ndarray, b_CS: np.ndarray) -> np.ndarray:
    """Compute [LH26]'s overlap of every pair of rows: [C, C'] |A & B| / S, the share of latents in common."""
    return np.array([[len(np.intersect1d(a, b)) for b in b_CS] for a in a_CS]) / a_CS.shape[1]
