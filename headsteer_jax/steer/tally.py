"""The results of a split's images at every alpha: flips placed on a grid, counts and bits, and exact step functions.

Axes: N images, R rows (an image with the class that steers it), C classes, H gates of the steered layer (its heads,
then attention and the MLP, as far as it gates them), A alphas of a grid, E flips, M doubtful places, P gate patterns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headsteer_jax.steer.flips import Flips, Rows
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.table import Outcomes


class GridFlips(NamedTuple):
    """Flips placed on a grid of alphas: each takes effect at `place` and everywhere further out."""

    row: np.ndarray  # [E]
    head: np.ndarray  # [E]
    place: np.ndarray  # [E] index into alphas
    # where float32's rounding may decide either way
    unsure_row: np.ndarray  # [M]
    unsure_place: np.ndarray  # [M] index into alphas


def place_on_grid(flips: Flips, alphas: np.ndarray) -> GridFlips:
    """Find where on a sorted grid that holds 0 each flip takes effect, and leave out those beyond its ends."""
    zero = int(np.searchsorted(alphas, 0.0))
    rises = ~np.signbit(flips.alpha)
    index = np.searchsorted(alphas, flips.alpha)  # a flip exactly at an alpha is unsure, and is decided there
    index = np.where(rises, np.maximum(index, zero + 1), np.minimum(index, zero) - 1)
    inside = np.flatnonzero((index >= 0) & (index < len(alphas)))
    low, high = np.minimum(flips.unsure_from, flips.unsure_to), np.maximum(flips.unsure_from, flips.unsure_to)
    since = np.searchsorted(alphas, low)
    unsure = np.flatnonzero(np.append(alphas, np.inf)[since] <= high)
    unsure = unsure[since[unsure] < len(alphas)]
    lengths = np.searchsorted(alphas, high[unsure], side="right") - since[unsure]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.repeat(since[unsure], lengths) + within
    key = np.unique((np.repeat(flips.unsure_row[unsure], lengths) * len(alphas) + place)[place != zero])
    return GridFlips(flips.row[inside], flips.head[inside], index[inside], *np.divmod(key, len(alphas)))


class Tally(NamedTuple):
    """The outcome of one setting at every alpha of a grid: bits along the images, and their counts by class."""

    right: np.ndarray  # [A, N/8] uint8: is the answer right; bit n % 8 of byte n // 8 is image n
    gates: np.ndarray  # [A, H, N/8] uint8: is the gate open
    correct: np.ndarray  # [A, C] int32: right answers
    gained: np.ndarray  # [A, C] int32: right, and wrong without steering
    heads_on: np.ndarray  # [A, C, H] int32: images on which the gate is open


class FlipEffects(NamedTuple):
    """The effect of every flip, in the order in which the flips happen."""

    image: np.ndarray  # [E]
    after: np.ndarray  # [E] the pattern after the flip
    bit: np.ndarray  # [E] the bit that differs before the flip
    on: np.ndarray  # [E] bool: is the gate open after the flip
    right_before: np.ndarray  # [E] bool: is the image's answer right before the flip
    right_after: np.ndarray  # [E] bool


def _follow_flips(row: np.ndarray, head: np.ndarray, path: np.ndarray, rows: Rows, outcomes: Outcomes) -> FlipEffects:
    """Follow flips in order, path by path from alpha 0 outwards.

    Args:
      row, head: [E] in that order.
      path: [E] an integer that differs between paths: a row and a side of 0.
    """
    bit, image = np.left_shift(1, head), rows.image[row]
    toggled = np.bitwise_xor.accumulate(bit)
    begins = np.flatnonzero(np.diff(path, prepend=-1))
    earlier = np.concatenate([[0], toggled[:-1]])[begins]  # toggled by the paths before
    after = toggled ^ np.repeat(earlier, np.diff(np.append(begins, len(row)))) ^ outcomes.pattern[image]
    table, patterns = outcomes.right.ravel(), outcomes.right.shape[1]
    right_before, right_after = table[image * patterns + (after ^ bit)], table[image * patterns + after]
    return FlipEffects(image, after, bit, (after >> head) & 1 > 0, right_before, right_after)


def _accumulate_outwards(steps: np.ndarray, zero: int, operation: np.ufunc) -> None:
    """Accumulate [A, ...] steps in place from alpha 0 (index `zero`) outwards, on each side of it."""
    operation.accumulate(steps[zero:], axis=0, out=steps[zero:])
    operation.accumulate(steps[zero::-1], axis=0, out=steps[zero::-1])


def _toggle_bits(start: np.ndarray, place: np.ndarray, image: np.ndarray, alphas: int, zero: int) -> np.ndarray:
    """Set the bits of every alpha from the bits at alpha 0 and the places where they toggle.

    Args:
      start: [..., N] bool at alpha 0.
      place: [E] where an image's bit toggles: index into [A, ...], flattened.
      image: [E].

    Returns:
      [A, ..., N/8] uint8.
    """
    start_bits = pack_bits(start)
    bits = np.zeros((alphas, *start_bits.shape), np.uint8)
    mask = np.left_shift(1, image & 7).astype(np.uint8)
    np.bitwise_xor.at(bits.reshape(-1), place * bits.shape[-1] + (image >> 3), mask)
    words = bits.view(np.uint64)
    _accumulate_outwards(words, zero, np.bitwise_xor)
    words ^= start_bits.view(np.uint64)
    return bits


def _sum_steps(start: np.ndarray, place: np.ndarray, step: np.ndarray, alphas: int, zero: int) -> np.ndarray:
    """Sum steps of counts from alpha 0 outwards.

    Args:
      start: [K] counts at alpha 0.
      place: [E] where a count changes: index into [A, K], flattened.
      step: [E] by how much.

    Returns:
      [A, K] int32.
    """
    counts = np.bincount(place, step, alphas * len(start)).reshape(alphas, len(start))
    _accumulate_outwards(counts, zero, np.add)
    return (counts + start).astype(np.int32)


def tally_flips(
    grid: GridFlips,
    decided: np.ndarray,
    rows: Rows,
    used_R: np.ndarray,
    outcomes: Outcomes,
    alphas: np.ndarray,
    classes: int,
) -> Tally:
    """Tally the rows in use, one for each image, from where their gates flip.

    Args:
      decided: [M] the patterns where the grid is unsure, as the model itself computes them.
      used_R: [R] bool.
    """
    heads, zero, size = rows.gate_logits.shape[1], int(np.searchsorted(alphas, 0.0)), len(alphas)
    used = np.flatnonzero(used_R[grid.row])
    row, head, index = grid.row[used], grid.head[used], grid.place[used]
    path = row * 2 + (index > zero)
    order = np.argsort(path * len(alphas) + np.abs(index - zero))
    row, head, index, path = row[order], head[order], index[order], path[order]
    image, _, _, on, right_before, right_after = _follow_flips(row, head, path, rows, outcomes)

    labels, unsteered = outcomes.labels, outcomes.right_unsteered
    gates_HN = pattern_to_gates(outcomes.pattern, heads).T
    changed = np.flatnonzero(right_after != right_before)
    rise = np.where(right_after[changed], 1.0, -1.0)
    new = np.flatnonzero(~unsteered[image[changed]])
    label_place = index[changed] * classes + labels[image[changed]]
    head_place = (index * classes + labels[image]) * heads + head
    heads_on = class_counts(gates_HN, labels, classes).T.ravel()
    tally = Tally(
        right=_toggle_bits(unsteered, index[changed], image[changed], size, zero),
        gates=_toggle_bits(gates_HN, index * heads + head, image, size, zero),
        correct=_sum_steps(np.bincount(labels[unsteered], minlength=classes), label_place, rise, size, zero),
        gained=_sum_steps(np.zeros(classes), label_place[new], rise[new], size, zero),
        heads_on=_sum_steps(heads_on, head_place, np.where(on, 1.0, -1.0), size, zero).reshape(size, classes, heads),
    )
    _apply_decisions(tally, grid, decided, rows, used_R, outcomes)
    return tally


def pack_bits(values: np.ndarray) -> np.ndarray:
    """Pack [..., N] bool into [..., N/8] uint8: bit n % 8 of byte n // 8; padded to whole words of 8 bytes."""
    bits = np.packbits(values, axis=-1, bitorder="little")
    return np.ascontiguousarray(np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 8)]))


def unpack_bits(bits: np.ndarray, count: int) -> np.ndarray:
    """Unpack [..., N/8] uint8 into [..., N] bool; `count` is N."""
    return np.unpackbits(bits, axis=-1, count=count, bitorder="little").view(bool)


def tally_gates(
    gates_ANH: np.ndarray, right_AN: np.ndarray, unsteered_N: np.ndarray, labels: np.ndarray, classes: int
) -> Tally:
    """Tally every image's gates and answers themselves, where there are no flips to follow.

    Args:
      unsteered_N: bool, is the answer right without steering.
    """
    gates_AHN = np.moveaxis(gates_ANH, -1, -2)
    return Tally(
        pack_bits(right_AN), pack_bits(gates_AHN),
        class_counts(right_AN, labels, classes).astype(np.int32),
        class_counts(right_AN & ~unsteered_N, labels, classes).astype(np.int32),
        np.moveaxis(class_counts(gates_AHN, labels, classes), -1, -2).astype(np.int32),
    )  # fmt: skip


def _apply_decisions(
    tally: Tally, grid: GridFlips, decided: np.ndarray, rows: Rows, used_R: np.ndarray, outcomes: Outcomes
) -> None:
    """Correct a tally in place wherever the model's own arithmetic decides otherwise than the closed form.

    Args:
      decided: [M] the patterns where the grid is unsure, as the model itself computes them.
      used_R: [R] bool: the rows that were tallied.
    """
    heads, image = tally.gates.shape[1], rows.image[grid.unsure_row]
    byte, mask = image >> 3, np.left_shift(1, image & 7).astype(np.uint8)
    tallied_MH = (tally.gates[grid.unsure_place, :, byte] & mask[:, None]) > 0
    tallied = tallied_MH @ (1 << np.arange(heads))
    for m in np.flatnonzero(used_R[grid.unsure_row] & (tallied != decided)):
        n, a, label = image[m], grid.unsure_place[m], outcomes.labels[image[m]]
        gates_H = pattern_to_gates(decided[m], heads)
        change = int(outcomes.right[n, decided[m]]) - int(outcomes.right[n, tallied[m]])
        tally.gates[a, :, byte[m]] ^= np.where(gates_H != tallied_MH[m], mask[m], np.uint8(0))
        tally.right[a, byte[m]] ^= mask[m] * np.uint8(change != 0)
        tally.heads_on[a, label] += gates_H.astype(np.int32) - tallied_MH[m]
        tally.correct[a, label] += change
        tally.gained[a, label] += 0 if outcomes.right[n, outcomes.pattern[n]] else change


class StepFunction(NamedTuple):
    """Accuracy, usage and MACs as exact functions of alpha on the whole real line: constant between two steps.

    Counts are over all images, and over all autoencoder seeds.
    """

    alpha: np.ndarray  # [E] float64, ascending
    correct: np.ndarray  # [E + 1] right answers before, between and after the steps
    heads_on: np.ndarray  # [E + 1] gates that are open
    macs: np.ndarray  # [E + 1] float64, whole numbers: MACs of the layer
    images: int
    heads: int

    @property
    def accuracy(self) -> np.ndarray:
        """[E + 1] share of right answers."""
        return self.correct / self.images

    @property
    def usage(self) -> np.ndarray:
        """[E + 1] share of gates that are open."""
        return self.heads_on / (self.images * self.heads)

    def at(self, alpha: np.ndarray | float) -> np.ndarray:
        """Find the intervals in which alphas lie: indices into accuracy and usage. At a step, the one after it."""
        return np.searchsorted(self.alpha, alpha, side="right")


class TalliedFlips(NamedTuple):
    """One autoencoder's flips, with what is needed to count what they do."""

    flips: Flips
    rows: Rows
    used: np.ndarray  # [R] bool: which rows are in use, one for each image
    outcomes: Outcomes
    kept_patches: np.ndarray  # [N] patches that the layer keeps


def exact_step_function(parts: Sequence[TalliedFlips], gates: LayerGates) -> StepFunction:
    """Compute the steps of several autoencoders' flips together."""
    moves, correct, heads_on, macs = [], 0, 0, 0.0
    for flips, rows, used_R, outcomes, patches_N in parts:
        used = np.flatnonzero(used_R[flips.row])
        row, head, alpha = flips.row[used], flips.head[used], flips.alpha[used]
        path = row * 2 + ~np.signbit(alpha)
        order = np.lexsort((np.abs(alpha), path))
        row, head, alpha, path = row[order], head[order], alpha[order], path[order]
        effects = _follow_flips(row, head, path, rows, outcomes)
        gained = effects.right_after.astype(np.int8) - effects.right_before.astype(np.int8)
        patches_E = patches_N[effects.image]
        added = gates.macs(effects.after, patches_E) - gates.macs(effects.after ^ effects.bit, patches_E)
        moves.append((alpha, gained, np.where(effects.on, 1, -1).astype(np.int8), added))
        heads = rows.gate_logits.shape[1]
        correct += int(outcomes.right_unsteered.sum())
        heads_on += int(pattern_to_gates(outcomes.pattern, heads).sum())
        macs += float(gates.macs(outcomes.pattern, patches_N).sum())
    alpha, gained, opened, added = (np.concatenate(part) for part in zip(*moves, strict=True))
    order = np.argsort(alpha, kind="stable")
    alpha, falls = alpha[order], np.signbit(alpha[order])

    def sum_outwards(step: np.ndarray, start: float) -> np.ndarray:
        step = step[order]
        below = start + np.cumsum(step[falls][::-1])[::-1]
        return np.concatenate([below, [start], start + np.cumsum(step[~falls])])

    images = sum(len(part.outcomes.labels) for part in parts)
    counts = (sum_outwards(gained.astype(np.int64), correct), sum_outwards(opened.astype(np.int64), heads_on))
    return StepFunction(alpha, *counts, sum_outwards(added, macs), images, heads)


def smallest_alpha(steps: StepFunction, usage: float) -> float | None:
    """Find the smallest alpha >= 0 that brings usage down to a given one; None if no alpha does."""
    first = int(np.searchsorted(steps.alpha, 0.0))
    reached = np.flatnonzero(steps.usage[first:] <= usage)
    if not len(reached):
        return None
    return 0.0 if reached[0] == 0 else float(steps.alpha[first + reached[0] - 1])


def best_alpha(steps: StepFunction, floor: float, cost: np.ndarray) -> float:
    """Find the alpha > 0 of lowest cost that keeps the accuracy at `floor` or above; 0 if no alpha does.

    It is the middle of its interval; of an interval without an end, half as far again as its beginning.

    Args:
      cost: [E + 1], such as steps.heads_on or steps.macs.
    """
    first = int(np.searchsorted(steps.alpha, 0.0))
    allowed = steps.accuracy[first:] >= floor - 1e-9  # counts are exact, but their quotients are not
    if not allowed.any():
        return 0.0
    best = first + int(np.argmin(np.where(allowed, cost[first:], np.inf)))
    begin = float(steps.alpha[best - 1]) if best > first else 0.0
    if best < len(steps.alpha):
        return (begin + float(steps.alpha[best])) / 2
    return 1.5 * begin or 1.0


def sum_class_macs(
    bits: np.ndarray, kept_patches: np.ndarray, labels: np.ndarray, classes: int, gates: LayerGates
) -> np.ndarray:
    """Sum the layer's MACs over each class's images: [..., H, N/8] bits of the gates -> [..., C] float64.

    Args:
      kept_patches: [N] patches that the layer keeps.
    """
    return class_counts(gates.macs(patterns_of_bits(bits, len(labels)), kept_patches), labels, classes)


def patterns_of_bits(bits: np.ndarray, count: int) -> np.ndarray:
    """Convert the bits of gates to patterns: [..., H, N/8] uint8 -> [..., N] int32; `count` is N."""
    pattern = np.zeros((*bits.shape[:-2], count), np.int32)
    for gate in range(bits.shape[-2]):
        pattern |= unpack_bits(bits[..., gate, :], count).astype(np.int32) << gate
    return pattern


def class_counts(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Sum over each class's images: [..., N] -> [..., C] (int64 for bool and integers, float64 for floats)."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(classes))
    ended = np.concatenate([values[..., order], np.zeros_like(values[..., :1])], axis=-1)  # a class may start at N
    dtype = np.float64 if np.issubdtype(values.dtype, np.floating) else np.int64
    sums = np.add.reduceat(ended, starts, axis=-1, dtype=dtype)
    return np.where(np.bincount(labels, minlength=classes) > 0, sums, 0)
