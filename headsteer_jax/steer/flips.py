"""The alphas at which each head of each image flips, in closed form, for gates that are piecewise affine in alpha.

With `add` in the `delta` form and no LayerNorm in the gate, steering moves image n's gate logits to

    m_h(alpha) = m_h + sum_j (max(z_j + alpha a_j, 0) - z_j) (d_j W)_h,    a_j = w_j s_j,

which is affine but for one kink for each active latent, where the latent reaches 0 and stays there; a direction v moves
them by alpha v W on both sides of 0. The roots are in closed form, and nothing changes between two of them. So accuracy
and usage are step functions of alpha on the whole real line, and a grid of any length costs one sorted look-up for each
flip.

Axes: N images, R rows (an image with the class that steers it), C classes, S chosen latents, F latents, H heads,
E flips, M entries (an active latent of a row, or an interval of doubt), K kinks of a row, Q heads of rows that may
flip.
"""

from typing import NamedTuple

import numpy as np

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.steer.strategies import Choice

UNIT_ROUNDOFF = 2.0**-24  # float32's unit roundoff
# A TPU splits each operand into three bfloat16 parts of 8 bits, and of their nine products leaves out the three
# smallest: two of 2^-24 of the whole, one of 2^-32. CPUs and GPUs round the product once, which counts as a sum's.
EXACT_PRODUCT_ROUNDOFFS = {"tpu": 3}


def is_affine_in_alpha(config: SteerConfig, gate_layer_norm: bool) -> bool:
    """Tell whether the closed forms of this file hold."""
    return config.mode == "add" and config.form == "delta" and config.target == "policy" and not gate_layer_norm


class GateEffect(NamedTuple):
    """The effect of one unit of each latent on the gate logits."""

    logits: np.ndarray  # [F, H] float64, decoder row times gate weights
    size: np.ndarray  # [F, H] the same of absolute values: bounds the rounding of the product
    slack: float  # relative rounding error of a gate logit
    gate: np.ndarray  # [D, H] float64 the gate's weights

    def of_directions(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """Compute the effect of the classes' directions [C, H], and of absolute values; 0 without directions.

        An effect within rounding of 0 is 0: a direction that is fitted to leave a gate alone does not move it.
        """
        if choice.directions is None:
            none_CH = np.zeros((len(choice.latents), self.gate.shape[1]))
            return none_CH, none_CH
        v_CD = choice.directions.astype(np.float64)
        effect_CH, size_CH = v_CD @ self.gate, np.abs(v_CD) @ np.abs(self.gate)
        return np.where(np.abs(effect_CH) > self.slack * size_CH, effect_CH, 0.0), size_CH


def gate_effect(decoder_FD: np.ndarray, gate_DH: np.ndarray, latents: int, platform: str = "cpu") -> GateEffect:
    """Compute the effect of decoder rows, in the residual's units, if `latents` of them are changed at once.

    A float32 inner product of n terms is off by less than sqrt(n) roundings of its absolute terms, but for a tiny
    probability (Higham & Mary 2019, doi:10.1137/18M1226312). The worst of our models' gate logits was off by 2. The
    products themselves are exact on CPUs and GPUs; see EXACT_PRODUCT_ROUNDOFFS for TPUs.

    Args:
      platform: of the device that computes the gates, all of whose products are `EXACT`.
    """
    decoder_FD, gate_DH = np.asarray(decoder_FD, np.float64), np.asarray(gate_DH, np.float64)
    roundoffs = np.sqrt(decoder_FD.shape[1] + latents) + EXACT_PRODUCT_ROUNDOFFS.get(platform, 0)
    slack = roundoffs * UNIT_ROUNDOFF
    return GateEffect(decoder_FD @ gate_DH, np.abs(decoder_FD) @ np.abs(gate_DH), float(slack), gate_DH)


class Rows(NamedTuple):
    """Images with the class that steers each: a choice of latents is applied to them."""

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
    unsure_to: np.ndarray  # [M] the other end; may be infinite


class Ray(NamedTuple):
    """One side of alpha 0, and how fast each class's choice moves the gate logits there."""

    sign: float  # of alpha
    rise: np.ndarray  # [C, H] for a unit of |alpha|, where every latent that falls has reached 0
    reach: np.ndarray  # [C, H] the same of absolute values: bounds the rounding
    slack: float  # relative rounding error of a gate logit


class FallingLatents(NamedTuple):
    """The active latents that fall to 0 on a ray, by ascending row."""

    row: np.ndarray  # [M]
    z: np.ndarray  # [M] activation
    rate: np.ndarray  # [M] fall for a unit of |alpha|
    effect: np.ndarray  # [M, H] of one unit on the gate logits


def find_flips(rows: Rows, choice: Choice, strength_F: np.ndarray, effect: GateEffect) -> Flips:
    """Find all flips of all rows, over the whole real line."""
    a_CS = np.asarray(choice.weights, np.float64) * np.asarray(strength_F, np.float64)[choice.latents]
    effect_CSH = effect.logits[choice.latents]
    direction_CH, size_CH = effect.of_directions(choice)
    reach_CH = np.einsum("CS,CSH->CH", np.abs(a_CS), effect.size[choice.latents]) + size_CH
    place_CF = np.full((len(a_CS), len(effect.logits)), -1, np.int16)  # of a latent in its class's choice
    np.put_along_axis(place_CF, choice.latents, np.arange(a_CS.shape[1], dtype=np.int16)[None], axis=1)
    row, latent, z = rows.active
    place = place_CF[rows.steered_by[row], latent]
    chosen = np.flatnonzero(place >= 0)
    row, latent, z = row[chosen], latent[chosen], z[chosen].astype(np.float64)
    a = a_CS[rows.steered_by[row], place[chosen]]

    flips: list[Flips] = []
    for sign in (1.0, -1.0):
        rise_CH = np.einsum("CS,CSH->CH", np.maximum(sign * a_CS, 0), effect_CSH) + sign * direction_CH
        ray = Ray(sign, rise_CH, reach_CH, effect.slack)
        falls = np.flatnonzero(sign * a < 0)
        kinked = np.zeros(len(rows.image), bool)
        kinked[row[falls]] = True
        flips.append(_flips_of_affine_rows(rows, np.flatnonzero(~kinked), ray))
        if len(falls):
            falling = FallingLatents(row[falls], z[falls], np.abs(a[falls]), effect.logits[latent[falls]])
            flips.append(_flips_of_kinked_rows(rows, np.flatnonzero(kinked), falling, ray))
    return Flips(*(np.concatenate(parts) for parts in zip(*flips, strict=True)))


def _uncertain_interval(
    value: np.ndarray, slope: np.ndarray, bound: np.ndarray, growth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bound where a logit may be rounded to the other side of 0: |value + t slope| <= bound + t growth.

    Args:
      value, slope: of a logit that goes to 0, or is near it.
      bound, growth: how far off the logit may be at t = 0, and how much more for a unit of t.

    Returns:
      The smallest and the largest such t >= 0.
    """
    begin = np.maximum(np.abs(value) - bound, 0.0) / np.maximum(np.abs(slope) + growth, 1e-300)
    net_slope = np.abs(slope) - growth
    end = np.divide(np.abs(value) + bound, net_slope, out=np.full(np.shape(value), np.inf), where=net_slope > 0)
    return begin, end


def _flips_of_affine_rows(rows: Rows, selected: np.ndarray, ray: Ray) -> Flips:
    """Find the flips of the selected rows, whose logits are affine on a ray: at most one flip for each head."""
    sign, slack = ray.sign, ray.slack
    if not ray.rise.any():  # nothing moves
        none = np.zeros(0, np.int64)
        return Flips(none, none, np.zeros(0), none, np.zeros(0), np.zeros(0))
    m_RH, class_R = rows.gate_logits[selected], rows.steered_by[selected]
    rise_RH = ray.rise[class_R]
    at, head = np.nonzero(np.where(m_RH > 0, rise_RH < 0, rise_RH > 0))
    slope, reach = rise_RH[at, head], ray.reach[class_R[at], head]
    m = m_RH[at, head].astype(np.float64)
    low, high = _uncertain_interval(m, slope, slack * rows.size[selected[at], head], slack * reach)
    # heads that do not flip, but begin near 0
    zero, idle = np.nonzero(np.abs(m_RH) <= slack * rows.size[selected])
    moved = ray.reach[class_R[zero], idle] > 0
    zero, idle = zero[moved], idle[moved]
    bound, growth = slack * rows.size[selected[zero], idle], slack * ray.reach[class_R[zero], idle]
    _, until = _uncertain_interval(m_RH[zero, idle], rise_RH[zero, idle], bound, growth)
    return Flips(
        selected[at], head, sign * (-m / slope),
        np.concatenate([selected[at], selected[zero]]),
        sign * np.concatenate([low, np.zeros(len(zero))]),
        sign * np.concatenate([high, until]),
    )  # fmt: skip


class Kinks(NamedTuple):
    """The places where the logits of rows bend on a ray: each row's kinks by |alpha|, padded at the front."""

    alpha: np.ndarray  # [R, K] |alpha| where the latent reaches 0; of the padding 0, and it does nothing
    entry: np.ndarray  # [R, K] index into the falling latents; of the padding their number


def _order_kinks(row: np.ndarray, alpha: np.ndarray, first: np.ndarray) -> Kinks:
    """Order every row's kinks by |alpha|.

    Args:
      row: [M] ascending.
      alpha: [M] |alpha| of each kink.
      first: [R'] each row's first entry.
    """
    compact = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(row))))
    place = np.arange(len(row)) - first[compact]
    most = int(place.max()) + 1
    kink_RK = np.zeros((len(first), most))
    entry_RK = np.full((len(first), most), len(row))
    kink_RK[compact, place] = alpha
    entry_RK[compact, place] = np.arange(len(row))
    order = np.argsort(kink_RK, axis=1)
    return Kinks(np.take_along_axis(kink_RK, order, axis=1), np.take_along_axis(entry_RK, order, axis=1))


def _may_reach_zero(
    rows: Rows, selected: np.ndarray, falling: FallingLatents, first: np.ndarray, end_R: np.ndarray, ray: Ray
) -> np.ndarray:
    """Tell which heads of which selected rows may come to 0 somewhere on a ray, [R', H] bool; the others never flip.

    Args:
      first: [R'] each row's first falling latent.
      end_R: [R'] |alpha| of each row's last kink.
    """
    change_MH = -falling.z[:, None] * falling.effect  # of the logits, once the latent is at 0
    lowest_RH = np.add.reduceat(np.minimum(change_MH, 0), first, axis=0)
    highest_RH = np.add.reduceat(np.maximum(change_MH, 0), first, axis=0)
    m_RH, class_R = rows.gate_logits[selected].astype(np.float64), rows.steered_by[selected]
    rise_RH = ray.rise[class_R]
    margin_RH = 2 * ray.slack * (rows.size[selected] + end_R[:, None] * ray.reach[class_R])
    return np.where(
        m_RH > 0,
        (rise_RH < 0) | (m_RH + lowest_RH <= margin_RH),
        (rise_RH > 0) | (m_RH + highest_RH >= -margin_RH),
    )


class Segments(NamedTuple):
    """Logits of Q heads of rows on a ray, as K + 1 affine segments each; the last has no end."""

    begin: np.ndarray  # [Q, K + 1] |alpha|
    value: np.ndarray  # [Q, K + 1] of the logit where the segment begins
    slope: np.ndarray  # [Q, K + 1]


def _make_segments(m_Q: np.ndarray, rise_Q: np.ndarray, kink_QK: np.ndarray, fall_QK: np.ndarray) -> Segments:
    """Make the affine segments of logits that bend at each kink.

    Args:
      m_Q: unsteered logits.
      rise_Q: slopes beyond the last kink.
      kink_QK: |alpha| of the kinks, ascending.
      fall_QK: by how much each kink's latent lowers the slope before it is at 0.
    """
    most = kink_QK.shape[1]
    t_QK = np.pad(kink_QK, ((0, 0), (1, 0)))
    slope_QK = np.empty_like(t_QK)
    slope_QK[:, most] = rise_Q  # every latent is at 0 there
    slope_QK[:, :most] = rise_Q[:, None] - np.cumsum(fall_QK[:, ::-1], axis=1)[:, ::-1]
    value_QK = np.empty_like(t_QK)
    value_QK[:, 0] = m_Q
    value_QK[:, 1:] = slope_QK[:, :most] * np.diff(t_QK, axis=1)
    np.cumsum(value_QK, axis=1, out=value_QK)
    return Segments(t_QK, value_QK, slope_QK)


def _find_crossings(segments: Segments) -> tuple[np.ndarray, ...]:
    """Find the segments on which a logit crosses 0: indices of the head Q and of the segment."""
    on_QK, end_slope_Q = segments.value > 0, segments.slope[:, -1]
    crosses_QK = np.empty_like(on_QK)
    crosses_QK[:, :-1] = on_QK[:, :-1] != on_QK[:, 1:]
    crosses_QK[:, -1] = on_QK[:, -1] != np.where(end_slope_Q != 0, end_slope_Q > 0, on_QK[:, -1])
    return np.nonzero(crosses_QK)


def _find_doubtful_bends(
    segments: Segments, bound_QK: np.ndarray, growth_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the places where a logit bends near 0, and how far it may stay there on either side.

    Returns:
      The head Q of each, and both ends of its interval of |alpha|.
    """
    t_QK, value_QK, slope_QK = segments
    most = t_QK.shape[1] - 1
    q, bend = np.nonzero(np.abs(value_QK) <= bound_QK)
    previous, following = np.maximum(bend - 1, 0), np.minimum(bend + 1, most)
    value, bound, growth = value_QK[q, bend], bound_QK[q, bend], growth_Q[q]
    _, before = _uncertain_interval(value, slope_QK[q, previous], bound, growth)
    _, after = _uncertain_interval(value, slope_QK[q, bend], bound, growth)
    begin = np.maximum(t_QK[q, bend] - before, t_QK[q, previous])
    end = np.minimum(t_QK[q, bend] + after, np.where(bend < most, t_QK[q, following], np.inf))
    return q, begin, end


def _flips_of_kinked_rows(rows: Rows, selected: np.ndarray, falling: FallingLatents, ray: Ray) -> Flips:
    """Find the flips of the selected rows [R'], in which active latents fall to 0 on a ray: the logits bend there."""
    first = np.searchsorted(falling.row, selected)
    kinks = _order_kinks(falling.row, falling.z / falling.rate, first)
    may_RH = _may_reach_zero(rows, selected, falling, first, kinks.alpha[:, -1], ray)
    row_Q, head_Q = np.nonzero(may_RH)
    selected_Q, class_Q = selected[row_Q], rows.steered_by[selected[row_Q]]
    fall_MH = np.concatenate([falling.rate[:, None] * falling.effect, np.zeros((1, falling.effect.shape[1]))])
    segments = _make_segments(
        rows.gate_logits[selected_Q, head_Q].astype(np.float64), ray.rise[class_Q, head_Q],
        kinks.alpha[row_Q], fall_MH[kinks.entry[row_Q], head_Q[:, None]],
    )  # fmt: skip
    q, segment = _find_crossings(segments)
    begin, value, slope = (part[q, segment] for part in segments)
    growth_Q = ray.slack * ray.reach[class_Q, head_Q]
    bound_QK = ray.slack * rows.size[selected_Q, head_Q][:, None] + segments.begin * growth_Q[:, None]
    low, high = _uncertain_interval(value, slope, bound_QK[q, segment], growth_Q[q])
    p, bend_from, bend_to = _find_doubtful_bends(segments, bound_QK, growth_Q)
    return Flips(
        selected_Q[q], head_Q[q], ray.sign * (begin - value / slope),
        selected_Q[np.concatenate([q, p])],
        ray.sign * np.concatenate([begin + low, bend_from]),
        ray.sign * np.concatenate([begin + high, bend_to]),
    )  # fmt: skip
