"""Exact in alpha: where a steered gate is piecewise affine in it, the alphas at which each head of each image flips.

With `add` in the `delta` form and no LayerNorm in the gate, steering moves image n's gate logits to

    m_h(alpha) = m_h + sum_j (max(z_j + alpha a_j, 0) - z_j) (d_j W)_h,    a_j = w_j s_j,

which is affine but for one kink for each active latent, where it reaches 0 and stays there. Its roots are in closed
form; between two of them nothing changes. So accuracy and usage are step functions of alpha on the whole real line,
and a grid of any length costs one sorted look-up for each flip.

Axes: N images, R rows (an image with the class that steers it), C classes, S chosen latents, F latents, H heads,
A alphas of a grid, E flips, P gate patterns.
"""

from typing import NamedTuple

import numpy as np

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.steer.strategies import Choice

UNIT_ROUNDOFF = 2.0**-24  # float32's unit roundoff


def is_affine_in_alpha(config: SteerConfig, gate_layer_norm: bool) -> bool:
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
    slack = np.sqrt(decoder_FD.shape[1] + latents) * UNIT_ROUNDOFF
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
        found.append(_flips_of_affine_rows(rows, np.flatnonzero(~kinked), rise_CH, reach_CH, effect.slack, sign))
        if len(falls):
            falling = row[falls], z[falls], np.abs(a[falls]), effect.logits[latent[falls]]
            found.append(
                _flips_of_kinked_rows(rows, np.flatnonzero(kinked), rise_CH, reach_CH, *falling, effect.slack, sign)
            )
    return Flips(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _uncertain_interval(
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


def _flips_of_affine_rows(
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
    low, high = _uncertain_interval(m, slope, slack * rows.size[which[at], head], slack * reach)
    # heads that do not flip, but begin near 0
    zero, idle = np.nonzero(np.abs(m_RH) <= slack * rows.size[which])
    moved = reach_CH[by_R[zero], idle] > 0
    zero, idle = zero[moved], idle[moved]
    bound, growth = slack * rows.size[which[zero], idle], slack * reach_CH[by_R[zero], idle]
    _, until = _uncertain_interval(m_RH[zero, idle], rise_RH[zero, idle], bound, growth)
    return Flips(
        which[at], head, sign * (-m / slope),
        np.concatenate([which[at], which[zero]]),
        sign * np.concatenate([low, np.zeros(len(zero))]),
        sign * np.concatenate([high, until]),
    )  # fmt: skip


def _flips_of_kinked_rows(
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
    low, high = _uncertain_interval(value, slope, bound_QK[q, segment], growth_Q[q])
    # places where the logit bends near 0: as far as it may stay there on either side
    p, bend = np.nonzero(np.abs(value_QK) <= bound_QK)
    back, on = np.maximum(bend - 1, 0), np.minimum(bend + 1, most)
    near = value_QK[p, bend], bound_QK[p, bend], growth_Q[p]
    _, before = _uncertain_interval(near[0], slope_QK[p, back], *near[1:])
    _, after = _uncertain_interval(near[0], slope_QK[p, bend], *near[1:])
    return Flips(
        which[at_Q[q]], head_Q[q], sign * (begin - value / slope),
        which[np.concatenate([at_Q[q], at_Q[p]])],
        sign * np.concatenate([begin + low, np.maximum(t_QK[p, bend] - before, t_QK[p, back])]),
        sign * np.concatenate(
            [begin + high, np.minimum(t_QK[p, bend] + after, np.where(bend < most, t_QK[p, on], np.inf))]
        ),
    )  # fmt: skip
