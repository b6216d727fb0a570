"""Exact in alpha: where a steered gate is piecewise affine in it, the alphas at which each head of each image flips.

With `add` in the `delta` form and no LayerNorm in the gate, steering moves image n's gate logits to

    m_h(alpha) = m_h + sum_j (max(z_j + alpha a_j, 0) - z_j) (d_j W)_h,    a_j = w_j s_j,

which is affine but for one kink for each active latent, where it reaches 0 and stays there. Its roots are in closed
form; between two of them nothing changes. So accuracy and usage are step functions of alpha on the whole real line,
and a grid of any length costs one sorted look-up for each flip.

Axes: N images, R rows (an image with the class that steers it), C classes, S chosen latents, F latents, H heads,
A alphas of a grid, E flips, P gate patterns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headsteer_jax.config import SteerConfig
from headsteer_jax.latents import Choice
from headsteer_jax.stats import class_counts
from headsteer_jax.table import gates_of

ROUNDING = 2.0**-24  # float32's unit roundoff


def is_affine(config: SteerConfig, gate_layer_norm: bool) -> bool:
    """Do the closed forms of this file hold?"""
    return config.mode == "add" and config.form == "delta" and config.target == "policy" and not gate_layer_norm


class GateEffect(NamedTuple):
    """What a unit of each latent does to the gate logits."""

    logits: np.ndarray  # [F, H] float64, decoder row times gate weights
    size: np.ndarray  # [F, H] the same of absolute values: bounds the rounding of the product
    slack: float  # relative rounding error of a gate logit


def gate_effect(decoder_FD: np.ndarray, gate_DH: np.ndarray, latents: int) -> GateEffect:
    """For decoder rows in the residual's units, and `latents` of them changed at once.

    A float32 inner product of n terms is off by less than sqrt(n) roundings of its absolute terms, but for a tiny
    probability (Higham & Mary 2019, doi:10.1137/18M1226312). Of our models' gate logits the worst was off by 2.
    """
    decoder_FD, gate_DH = np.asarray(decoder_FD, np.float64), np.asarray(gate_DH, np.float64)
    slack = np.sqrt(decoder_FD.shape[1] + latents) * ROUNDING
    return GateEffect(decoder_FD @ gate_DH, np.abs(decoder_FD) @ np.abs(gate_DH), float(slack))


class Rows(NamedTuple):
    """Images with the class that steers each: what one choice of latents is applied to."""

    image: np.ndarray  # [R] index into the split
    steered_by: np.ndarray  # [R] row of the choice
    gate_logits: np.ndarray  # [R, H] unsteered
    size: np.ndarray  # [R, H] |x| |W| + |b|: bounds the logits' rounding
    active: tuple[np.ndarray, np.ndarray, np.ndarray]  # row, latent and activation wherever a latent is active


class Flips(NamedTuple):
    """Every change of a gate on the way from alpha 0 outwards, in no order."""

    row: np.ndarray  # [E]
    head: np.ndarray  # [E]
    alpha: np.ndarray  # [E] float64, of either sign
    # where float32's rounding may decide a gate either way, as open intervals of alpha on one side of 0
    unsure_row: np.ndarray  # [M]
    unsure_from: np.ndarray  # [M] the end nearer to 0
    unsure_to: np.ndarray  # [M] the other; may be infinite


def find_flips(rows: Rows, choice: Choice, strength_F: np.ndarray, effect: GateEffect) -> Flips:
    """All flips of all rows, over the whole real line."""
    a_CS = np.asarray(choice.weights, np.float64) * np.asarray(strength_F, np.float64)[choice.latents]
    effect_CSH = effect.logits[choice.latents]
    reach_CH = np.einsum("CS,CSH->CH", np.abs(a_CS), effect.size[choice.latents])
    place_CF = np.full((len(a_CS), len(effect.logits)), -1, np.int16)  # of a latent in its class's choice
    np.put_along_axis(place_CF, choice.latents, np.arange(a_CS.shape[1], dtype=np.int16)[None], axis=1)
    row, latent, z = rows.active
    place = place_CF[rows.steered_by[row], latent]
    chosen = np.flatnonzero(place >= 0)
    row, latent, z = row[chosen], latent[chosen], z[chosen].astype(np.float64)
    a = a_CS[rows.steered_by[row], place[chosen]]

    found: list[Flips] = []
    for sign in (1.0, -1.0):
        rise_CH = np.einsum("CS,CSH->CH", np.maximum(sign * a_CS, 0), effect_CSH)
        falls = np.flatnonzero(sign * a < 0)  # active latents that go to 0 on this ray
        kinked = np.zeros(len(rows.image), bool)
        kinked[row[falls]] = True
        found.append(_straight(rows, np.flatnonzero(~kinked), rise_CH, reach_CH, effect.slack, sign))
        if len(falls):
            falling = row[falls], z[falls], np.abs(a[falls]), effect.logits[latent[falls]]
            found.append(_kinked(rows, np.flatnonzero(kinked), rise_CH, reach_CH, *falling, effect.slack, sign))
    return Flips(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _doubt(
    value: np.ndarray, slope: np.ndarray, bound: np.ndarray, growth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """From and to how far on a logit may be rounded to the other side of 0: |value + t slope| <= bound + t growth.

    Args:
      value, slope: of a logit that goes to 0, or is near it.
      bound, growth: how far off it may be at t = 0, and how much more for a unit of t.
    """
    begin = np.maximum(np.abs(value) - bound, 0.0) / np.maximum(np.abs(slope) + growth, 1e-300)
    left = np.abs(slope) - growth
    end = np.divide(np.abs(value) + bound, left, out=np.full(np.shape(value), np.inf), where=left > 0)
    return begin, end


def _straight(
    rows: Rows, which: np.ndarray, rise_CH: np.ndarray, reach_CH: np.ndarray, slack: float, sign: float
) -> Flips:
    """Flips of rows whose logits are affine on a ray: at most one for each head."""
    if not rise_CH.any():  # nothing moves
        none = np.zeros(0, np.int64)
        return Flips(none, none, np.zeros(0), none, np.zeros(0), np.zeros(0))
    m_RH, by_R = rows.gate_logits[which], rows.steered_by[which]
    rise_RH = rise_CH[by_R]
    at, head = np.nonzero(np.where(m_RH > 0, rise_RH < 0, rise_RH > 0))
    slope, reach = rise_RH[at, head], reach_CH[by_R[at], head]
    m = m_RH[at, head].astype(np.float64)
    low, high = _doubt(m, slope, slack * rows.size[which[at], head], slack * reach)
    # heads that do not flip, but begin near 0
    zero, idle = np.nonzero(np.abs(m_RH) <= slack * rows.size[which])
    moved = reach_CH[by_R[zero], idle] > 0
    zero, idle = zero[moved], idle[moved]
    bound, growth = slack * rows.size[which[zero], idle], slack * reach_CH[by_R[zero], idle]
    _, until = _doubt(m_RH[zero, idle], rise_RH[zero, idle], bound, growth)
    return Flips(
        which[at], head, sign * (-m / slope),
        np.concatenate([which[at], which[zero]]),
        sign * np.concatenate([low, np.zeros(len(zero))]),
        sign * np.concatenate([high, until]),
    )  # fmt: skip


def _kinked(
    rows: Rows, which: np.ndarray, rise_CH: np.ndarray, reach_CH: np.ndarray, row: np.ndarray, z: np.ndarray,
    rate: np.ndarray, effect: np.ndarray, slack: float, sign: float,
) -> Flips:  # fmt: skip
    """Flips of rows in which active latents fall to 0 on a ray: the logits bend where they do.

    Args:
      which: [R'] the rows.
      row, z, rate, effect: [M], [M], [M], [M, H] the falling latents: their row (ascending), activation, fall for a
        unit of |alpha|, and a unit's effect on the gate.
    """
    first = np.searchsorted(row, which)
    compact = np.repeat(np.arange(len(which)), np.diff(np.append(first, len(row))))
    place = np.arange(len(row)) - first[compact]
    most = int(place.max()) + 1
    kink_RK = np.zeros((len(which), most))  # |alpha| where the latent reaches 0; the padding's are at 0 and do nothing
    entry_RK = np.full((len(which), most), len(row))
    kink_RK[compact, place] = z / rate
    entry_RK[compact, place] = np.arange(len(row))
    order = np.argsort(kink_RK, axis=1)
    kink_RK = np.take_along_axis(kink_RK, order, axis=1)
    entry_RK = np.take_along_axis(entry_RK, order, axis=1)

    # only heads that may come to 0 somewhere on the ray are followed
    change_MH = -z[:, None] * effect  # of the logits, once the latent is at 0
    lowest_RH = np.add.reduceat(np.minimum(change_MH, 0), first, axis=0)
    highest_RH = np.add.reduceat(np.maximum(change_MH, 0), first, axis=0)
    m_RH, by_R = rows.gate_logits[which].astype(np.float64), rows.steered_by[which]
    rise_RH = rise_CH[by_R]
    margin_RH = 2 * slack * (rows.size[which] + kink_RK[:, -1:] * reach_CH[by_R])
    may_RH = np.where(
        m_RH > 0,
        (rise_RH < 0) | (m_RH + lowest_RH <= margin_RH),
        (rise_RH > 0) | (m_RH + highest_RH >= -margin_RH),
    )
    at_Q, head_Q = np.nonzero(may_RH)
    fall_MH = np.concatenate([rate[:, None] * effect, np.zeros((1, effect.shape[1]))])
    fall_QK = fall_MH[entry_RK[at_Q], head_Q[:, None]]
    t_QK = np.pad(kink_RK[at_Q], ((0, 0), (1, 0)))  # where the K + 1 segments begin
    rise_Q = rise_RH[at_Q, head_Q]
    slope_QK = np.empty_like(t_QK)
    slope_QK[:, most] = rise_Q  # every latent is at 0 there
    slope_QK[:, :most] = rise_Q[:, None] - np.cumsum(fall_QK[:, ::-1], axis=1)[:, ::-1]
    value_QK = np.empty_like(t_QK)
    value_QK[:, 0] = m_RH[at_Q, head_Q]
    value_QK[:, 1:] = slope_QK[:, :most] * np.diff(t_QK, axis=1)
    np.cumsum(value_QK, axis=1, out=value_QK)

    on_QK = value_QK > 0
    crosses_QK = np.empty_like(on_QK)
    crosses_QK[:, :most] = on_QK[:, :most] != on_QK[:, 1:]
    crosses_QK[:, most] = on_QK[:, most] != np.where(rise_Q != 0, rise_Q > 0, on_QK[:, most])
    q, segment = np.nonzero(crosses_QK)
    slope = slope_QK[q, segment]
    begin, value = t_QK[q, segment], value_QK[q, segment]
    growth_Q = slack * reach_CH[by_R[at_Q], head_Q]
    bound_QK = slack * rows.size[which[at_Q], head_Q][:, None] + t_QK * growth_Q[:, None]
    low, high = _doubt(value, slope, bound_QK[q, segment], growth_Q[q])
    # places where the logit bends near 0: as far as it may stay there on either side
    p, bend = np.nonzero(np.abs(value_QK) <= bound_QK)
    back, on = np.maximum(bend - 1, 0), np.minimum(bend + 1, most)
    near = value_QK[p, bend], bound_QK[p, bend], growth_Q[p]
    _, before = _doubt(near[0], slope_QK[p, back], *near[1:])
    _, after = _doubt(near[0], slope_QK[p, bend], *near[1:])
    return Flips(
        which[at_Q[q]], head_Q[q], sign * (begin - value / slope),
        which[np.concatenate([at_Q[q], at_Q[p]])],
        sign * np.concatenate([begin + low, np.maximum(t_QK[p, bend] - before, t_QK[p, back])]),
        sign * np.concatenate(
            [begin + high, np.minimum(t_QK[p, bend] + after, np.where(bend < most, t_QK[p, on], np.inf))]
        ),
    )  # fmt: skip


class Grid(NamedTuple):
    """Flips placed on a grid of alphas: each takes effect at `place` and everywhere further out."""

    row: np.ndarray  # [E]
    head: np.ndarray  # [E]
    place: np.ndarray  # [E] index into alphas
    # where float32's rounding may decide either way
    unsure_row: np.ndarray  # [M]
    unsure_place: np.ndarray  # [M] index into alphas


def on_grid(flips: Flips, alphas: np.ndarray) -> Grid:
    """Where on a sorted grid that holds 0 each flip takes effect; those beyond its ends are left out."""
    zero = int(np.searchsorted(alphas, 0.0))
    rises = ~np.signbit(flips.alpha)
    index = np.searchsorted(alphas, flips.alpha)  # exactly at an alpha: it is unsure, and decided there
    index = np.where(rises, np.maximum(index, zero + 1), np.minimum(index, zero) - 1)
    inside = np.flatnonzero((index >= 0) & (index < len(alphas)))
    low, high = np.minimum(flips.unsure_from, flips.unsure_to), np.maximum(flips.unsure_from, flips.unsure_to)
    since = np.searchsorted(alphas, low)
    some = np.flatnonzero(np.append(alphas, np.inf)[since] <= high)
    some = some[since[some] < len(alphas)]
    lengths = np.searchsorted(alphas, high[some], side="right") - since[some]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.repeat(since[some], lengths) + within
    key = np.unique((np.repeat(flips.unsure_row[some], lengths) * len(alphas) + place)[place != zero])
    return Grid(flips.row[inside], flips.head[inside], index[inside], *np.divmod(key, len(alphas)))


class Tally(NamedTuple):
    """What a split's images get at every alpha of a grid: bits along the images, and their counts by class."""

    right: np.ndarray  # [A, N/8] uint8: is the answer right; bit n % 8 of byte n // 8 is image n
    gates: np.ndarray  # [A, H, N/8] uint8: does the head run
    correct: np.ndarray  # [A, C] int32: right answers
    gained: np.ndarray  # [A, C] int32: right, and wrong without steering
    heads_on: np.ndarray  # [A, C, H] int32: images on which the head runs


class Answers(NamedTuple):
    """What every gate pattern leads to."""

    labels: np.ndarray  # [N]
    pattern: np.ndarray  # [N] unsteered
    right: np.ndarray  # [N, P] bool


def _walk(
    row: np.ndarray, head: np.ndarray, outward: np.ndarray, rows: Rows, answers: Answers
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The images of flips in order, path by path from alpha 0 outwards, and what each flip does.

    Args:
      row, head: [E] in that order.
      outward: [E] an integer that differs between paths: a row and a side of 0.

    Returns:
      [E] images, patterns after the flip, and whether the answer is right before and after it.
    """
    bit, image = np.left_shift(1, head), rows.image[row]
    toggled = np.bitwise_xor.accumulate(bit)
    begins = np.flatnonzero(np.diff(outward, prepend=-1))
    earlier = np.concatenate([[0], toggled[:-1]])[begins]  # toggled by the paths before
    after = toggled ^ np.repeat(earlier, np.diff(np.append(begins, len(row)))) ^ answers.pattern[image]
    table, patterns = answers.right.ravel(), answers.right.shape[1]
    return image, after, table[image * patterns + (after ^ bit)], table[image * patterns + after]


def look_up(
    grid: Grid, decided: np.ndarray, rows: Rows, used_R: np.ndarray, answers: Answers, alphas: np.ndarray, classes: int
) -> Tally:
    """The tally of the rows in use, one for each image, from where their gates flip.

    Args:
      decided: [M] the patterns where the grid is unsure, as the model itself computes them.
      used_R: [R] bool.
    """
    count, heads, zero = len(answers.labels), rows.gate_logits.shape[1], int(np.searchsorted(alphas, 0.0))
    kept = np.flatnonzero(used_R[grid.row])
    row, head, index = grid.row[kept], grid.head[kept], grid.place[kept]
    path = row * 2 + (index > zero)
    order = np.argsort(path * len(alphas) + np.abs(index - zero))
    row, head, index, path = row[order], head[order], index[order], path[order]
    image, after, right_before, right_after = _walk(row, head, path, rows, answers)

    size = -(-count // 64) * 8
    right, gates = np.zeros((len(alphas), size), np.uint8), np.zeros((len(alphas), heads, size), np.uint8)
    byte, mask = image >> 3, np.left_shift(1, image & 7).astype(np.uint8)
    changed = np.flatnonzero(right_after != right_before)
    np.bitwise_xor.at(right.reshape(-1), index[changed] * size + byte[changed], mask[changed])
    np.bitwise_xor.at(gates.reshape(-1), (index * heads + head) * size + byte, mask)
    was = answers.right[np.arange(count), answers.pattern]
    base = gates_of(answers.pattern, heads)
    for bits, start in ((right, was), (gates, base.T)):
        wide = bits.view(np.uint64)
        np.bitwise_xor.accumulate(wide[zero:], axis=0, out=wide[zero:])
        np.bitwise_xor.accumulate(wide[zero::-1], axis=0, out=wide[zero::-1])
        wide ^= packed(start).view(np.uint64)

    label = answers.labels[image]

    def counted(which: np.ndarray, step: np.ndarray, start: np.ndarray, own: np.ndarray, width: int) -> np.ndarray:
        """[A, width] sums of steps over everything up to each alpha, on its side of 0."""
        moved = np.bincount(index[which] * width + own, step, len(alphas) * width).reshape(len(alphas), width)
        moved[zero:] = np.cumsum(moved[zero:], axis=0)
        moved[zero::-1] = np.cumsum(moved[zero::-1], axis=0)
        return (moved + start).astype(np.int32)

    rise = np.where(right_after[changed], 1.0, -1.0)
    new = np.flatnonzero(~was[image[changed]])
    outcomes = Tally(
        right, gates,
        counted(changed, rise, np.bincount(answers.labels[was], minlength=classes), label[changed], classes),
        counted(changed[new], rise[new], np.zeros(classes), label[changed[new]], classes),
        counted(
            np.arange(len(index)), np.where((after >> head) & 1, 1.0, -1.0),
            class_counts(base.T, answers.labels, classes).T.ravel(), label * heads + head, classes * heads,
        ).reshape(len(alphas), classes, heads),
    )  # fmt: skip
    _correct(outcomes, grid, decided, rows, used_R, answers)
    return outcomes


def packed(values: np.ndarray) -> np.ndarray:
    """[..., N] bool -> [..., N/8] uint8: bit n % 8 of byte n // 8; padded to whole words of 8 bytes."""
    bits = np.packbits(values, axis=-1, bitorder="little")
    return np.ascontiguousarray(np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 8)]))


def unpacked(bits: np.ndarray, count: int) -> np.ndarray:
    """[..., N/8] uint8 -> [..., N] bool."""
    return np.unpackbits(bits, axis=-1, count=count, bitorder="little").view(bool)


def tally_of(gates_ANH: np.ndarray, right_AN: np.ndarray, was_N: np.ndarray, labels: np.ndarray, classes: int) -> Tally:
    """The tally of every image's gates and answers themselves, where there are no flips to follow."""
    gates_AHN = np.moveaxis(gates_ANH, -1, -2)
    return Tally(
        packed(right_AN), packed(gates_AHN),
        class_counts(right_AN, labels, classes).astype(np.int32),
        class_counts(right_AN & ~was_N, labels, classes).astype(np.int32),
        np.moveaxis(class_counts(gates_AHN, labels, classes), -1, -2).astype(np.int32),
    )  # fmt: skip


def _correct(
    outcomes: Tally, grid: Grid, decided: np.ndarray, rows: Rows, used_R: np.ndarray, answers: Answers
) -> None:
    """Where the model's own arithmetic decides otherwise than the closed form, the model is right: in place."""
    heads, image = outcomes.gates.shape[1], rows.image[grid.unsure_row]
    byte, mask = image >> 3, np.left_shift(1, image & 7).astype(np.uint8)
    have_MH = (outcomes.gates[grid.unsure_place, :, byte] & mask[:, None]) > 0
    have = have_MH @ (1 << np.arange(heads))
    for m in np.flatnonzero(used_R[grid.unsure_row] & (have != decided)):
        n, a, label = image[m], grid.unsure_place[m], answers.labels[image[m]]
        gates_H = gates_of(decided[m], heads)
        change = int(answers.right[n, decided[m]]) - int(answers.right[n, have[m]])
        outcomes.gates[a, :, byte[m]] ^= np.where(gates_H != have_MH[m], mask[m], np.uint8(0))
        outcomes.right[a, byte[m]] ^= mask[m] * np.uint8(change != 0)
        outcomes.heads_on[a, label] += gates_H.astype(np.int32) - have_MH[m]
        outcomes.correct[a, label] += change
        outcomes.gained[a, label] += 0 if answers.right[n, answers.pattern[n]] else change


class Steps(NamedTuple):
    """Accuracy and usage as exact functions of alpha on the whole real line: constant between two steps.

    Counts are over all images, and over all autoencoder seeds.
    """

    alpha: np.ndarray  # [E] float64, ascending
    correct: np.ndarray  # [E + 1] right answers before, between and after the steps
    heads_on: np.ndarray  # [E + 1] heads that run
    images: int
    heads: int

    @property
    def accuracy(self) -> np.ndarray:
        """[E + 1]"""
        return self.correct / self.images

    @property
    def usage(self) -> np.ndarray:
        """[E + 1]"""
        return self.heads_on / (self.images * self.heads)

    def at(self, alpha: np.ndarray | float) -> np.ndarray:
        """Where these alphas lie: indices into accuracy and usage. At a step itself: after it."""
        return np.searchsorted(self.alpha, alpha, side="right")


def exact_steps(parts: Sequence[tuple[Flips, Rows, np.ndarray, Answers]]) -> Steps:
    """Steps of several autoencoders' flips together.

    Args:
      parts: flips, their rows, [R] bool which rows are in use, one for each image, and the table.
    """
    moves, correct, heads_on = [], 0, 0
    for flips, rows, used_R, answers in parts:
        kept = np.flatnonzero(used_R[flips.row])
        row, head, alpha = flips.row[kept], flips.head[kept], flips.alpha[kept]
        path = row * 2 + ~np.signbit(alpha)
        order = np.lexsort((np.abs(alpha), path))
        row, head, alpha, path = row[order], head[order], alpha[order], path[order]
        _, after, right_before, right_after = _walk(row, head, path, rows, answers)
        gained = right_after.astype(np.int8) - right_before.astype(np.int8)
        moves.append((alpha, gained, np.where((after >> head) & 1, 1, -1).astype(np.int8)))
        heads = rows.gate_logits.shape[1]
        correct += int(answers.right[np.arange(len(answers.labels)), answers.pattern].sum())
        heads_on += int(gates_of(answers.pattern, heads).sum())
    alpha, gained, opened = (np.concatenate(part) for part in zip(*moves, strict=True))
    order = np.argsort(alpha, kind="stable")
    alpha, falls = alpha[order], np.signbit(alpha[order])

    def path_of(step: np.ndarray, start: int) -> np.ndarray:
        step = step[order].astype(np.int64)
        left = start + np.cumsum(step[falls][::-1])[::-1]
        return np.concatenate([left, [start], start + np.cumsum(step[~falls])])

    images = sum(len(answers.labels) for *_, answers in parts)
    return Steps(alpha, path_of(gained, correct), path_of(opened, heads_on), images, heads)


def least_alpha(steps: Steps, usage: float) -> float | None:
    """The smallest alpha >= 0 that brings usage down to a wanted one; None where none does."""
    first = int(np.searchsorted(steps.alpha, 0.0))
    reached = np.flatnonzero(steps.usage[first:] <= usage)
    if not len(reached):
        return None
    return 0.0 if reached[0] == 0 else float(steps.alpha[first + reached[0] - 1])


def best_alpha(steps: Steps, floor: float) -> float:
    """The alpha > 0 of lowest usage that keeps the accuracy at `floor` or above, of all alphas; 0 where none does.

    It is the middle of its interval; of an interval without an end, half as far again as its beginning.
    """
    first = int(np.searchsorted(steps.alpha, 0.0))
    allowed = steps.accuracy[first:] >= floor
    if not allowed.any():
        return 0.0
    best = first + int(np.argmin(np.where(allowed, steps.heads_on[first:], np.inf)))
    begin = float(steps.alpha[best - 1]) if best > first else 0.0
    if best < len(steps.alpha):
        return (begin + float(steps.alpha[best])) / 2
    return 1.5 * begin or 1.0
