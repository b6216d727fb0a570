"""What a split's images get at every alpha: flips placed on a grid, counts and bits, and exact step functions.

Axes: N images, R rows (an image with the class that steers it), C classes, H heads, A alphas of a grid, E flips, P
gate patterns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headsteer_jax.steer.flips import Flips, Rows
from headsteer_jax.steer.table import pattern_to_gates


class GridFlips(NamedTuple):
    """Flips placed on a grid of alphas: each takes effect at `place` and everywhere further out."""

    row: np.ndarray  # [E]
    head: np.ndarray  # [E]
    place: np.ndarray  # [E] index into alphas
    # where float32's rounding may decide either way
    unsure_row: np.ndarray  # [M]
    unsure_place: np.ndarray  # [M] index into alphas


def place_on_grid(flips: Flips, alphas: np.ndarray) -> GridFlips:
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
    return GridFlips(flips.row[inside], flips.head[inside], index[inside], *np.divmod(key, len(alphas)))


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


def _follow_flips(
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


def tally_flips(
    grid: GridFlips,
    decided: np.ndarray,
    rows: Rows,
    used_R: np.ndarray,
    answers: Answers,
    alphas: np.ndarray,
    classes: int,
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
    image, after, right_before, right_after = _follow_flips(row, head, path, rows, answers)

    size = -(-count // 64) * 8
    right, gates = np.zeros((len(alphas), size), np.uint8), np.zeros((len(alphas), heads, size), np.uint8)
    byte, mask = image >> 3, np.left_shift(1, image & 7).astype(np.uint8)
    changed = np.flatnonzero(right_after != right_before)
    np.bitwise_xor.at(right.reshape(-1), index[changed] * size + byte[changed], mask[changed])
    np.bitwise_xor.at(gates.reshape(-1), (index * heads + head) * size + byte, mask)
    was = answers.right[np.arange(count), answers.pattern]
    base = pattern_to_gates(answers.pattern, heads)
    for bits, start in ((right, was), (gates, base.T)):
        wide = bits.view(np.uint64)
        np.bitwise_xor.accumulate(wide[zero:], axis=0, out=wide[zero:])
        np.bitwise_xor.accumulate(wide[zero::-1], axis=0, out=wide[zero::-1])
        wide ^= pack_bits(start).view(np.uint64)

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


def pack_bits(values: np.ndarray) -> np.ndarray:
    """[..., N] bool -> [..., N/8] uint8: bit n % 8 of byte n // 8; padded to whole words of 8 bytes."""
    bits = np.packbits(values, axis=-1, bitorder="little")
    return np.ascontiguousarray(np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 8)]))


def unpack_bits(bits: np.ndarray, count: int) -> np.ndarray:
    """[..., N/8] uint8 -> [..., N] bool."""
    return np.unpackbits(bits, axis=-1, count=count, bitorder="little").view(bool)


def tally_gates(
    gates_ANH: np.ndarray, right_AN: np.ndarray, was_N: np.ndarray, labels: np.ndarray, classes: int
) -> Tally:
    """The tally of every image's gates and answers themselves, where there are no flips to follow."""
    gates_AHN = np.moveaxis(gates_ANH, -1, -2)
    return Tally(
        pack_bits(right_AN), pack_bits(gates_AHN),
        class_counts(right_AN, labels, classes).astype(np.int32),
        class_counts(right_AN & ~was_N, labels, classes).astype(np.int32),
        np.moveaxis(class_counts(gates_AHN, labels, classes), -1, -2).astype(np.int32),
    )  # fmt: skip


def _correct(
    outcomes: Tally, grid: GridFlips, decided: np.ndarray, rows: Rows, used_R: np.ndarray, answers: Answers
) -> None:
    """Where the model's own arithmetic decides otherwise than the closed form, the model is right: in place."""
    heads, image = outcomes.gates.shape[1], rows.image[grid.unsure_row]
    byte, mask = image >> 3, np.left_shift(1, image & 7).astype(np.uint8)
    have_MH = (outcomes.gates[grid.unsure_place, :, byte] & mask[:, None]) > 0
    have = have_MH @ (1 << np.arange(heads))
    for m in np.flatnonzero(used_R[grid.unsure_row] & (have != decided)):
        n, a, label = image[m], grid.unsure_place[m], answers.labels[image[m]]
        gates_H = pattern_to_gates(decided[m], heads)
        change = int(answers.right[n, decided[m]]) - int(answers.right[n, have[m]])
        outcomes.gates[a, :, byte[m]] ^= np.where(gates_H != have_MH[m], mask[m], np.uint8(0))
        outcomes.right[a, byte[m]] ^= mask[m] * np.uint8(change != 0)
        outcomes.heads_on[a, label] += gates_H.astype(np.int32) - have_MH[m]
        outcomes.correct[a, label] += change
        outcomes.gained[a, label] += 0 if answers.right[n, answers.pattern[n]] else change


class StepFunction(NamedTuple):
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


def exact_step_function(parts: Sequence[tuple[Flips, Rows, np.ndarray, Answers]]) -> StepFunction:
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
        _, after, right_before, right_after = _follow_flips(row, head, path, rows, answers)
        gained = right_after.astype(np.int8) - right_before.astype(np.int8)
        moves.append((alpha, gained, np.where((after >> head) & 1, 1, -1).astype(np.int8)))
        heads = rows.gate_logits.shape[1]
        correct += int(answers.right[np.arange(len(answers.labels)), answers.pattern].sum())
        heads_on += int(pattern_to_gates(answers.pattern, heads).sum())
    alpha, gained, opened = (np.concatenate(part) for part in zip(*moves, strict=True))
    order = np.argsort(alpha, kind="stable")
    alpha, falls = alpha[order], np.signbit(alpha[order])

    def path_of(step: np.ndarray, start: int) -> np.ndarray:
        step = step[order].astype(np.int64)
        left = start + np.cumsum(step[falls][::-1])[::-1]
        return np.concatenate([left, [start], start + np.cumsum(step[~falls])])

    images = sum(len(answers.labels) for *_, answers in parts)
    return StepFunction(alpha, path_of(gained, correct), path_of(opened, heads_on), images, heads)


def smallest_alpha(steps: StepFunction, usage: float) -> float | None:
    """The smallest alpha >= 0 that brings usage down to a wanted one; None where none does."""
    first = int(np.searchsorted(steps.alpha, 0.0))
    reached = np.flatnonzero(steps.usage[first:] <= usage)
    if not len(reached):
        return None
    return 0.0 if reached[0] == 0 else float(steps.alpha[first + reached[0] - 1])


def best_alpha(steps: StepFunction, floor: float) -> float:
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


def class_counts(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Sum over each class's images: [..., N] -> [..., C] (int64 for bool and integers)."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(classes))
    ended = np.concatenate([values[..., order], np.zeros_like(values[..., :1])], axis=-1)  # a class may start at N
    sums = np.add.reduceat(ended, starts, axis=-1, dtype=np.int64)
    return np.where(np.bincount(labels, minlength=classes) > 0, sums, 0)
