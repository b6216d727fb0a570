"""Flips against the gate logits themselves in float64, alpha by alpha; counts and bits against loops over images."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headsteer_jax.config import Config, DataConfig, GateConfig, ModelConfig, SteerConfig
from headsteer_jax.steer.flips import Flips, GateEffect, Rows, find_flips, gate_effect, is_affine_in_alpha
from headsteer_jax.steer.gates import LayerGates, pattern_to_gates
from headsteer_jax.steer.strategies import Choice
from headsteer_jax.steer.table import Outcomes
from headsteer_jax.steer.tally import (
    TalliedFlips,
    best_alpha,
    exact_step_function,
    pack_bits,
    place_on_grid,
    smallest_alpha,
    tally_flips,
    tally_gates,
    unpack_bits,
)

CLASSES, LATENTS, CHOSEN = 4, 30, 5
# the last layer of a model with gates of every kind: three gates read the CLS residual
GATES = LayerGates(
    Config(
        data=DataConfig(image_size=16),
        model=ModelConfig(width=4, heads=1),
        gate=GateConfig(kinds=("heads", "sublayers", "tokens")),
    ),
    3,
)


class Case(NamedTuple):
    rows: Rows
    used: np.ndarray
    choice: Choice
    strength: np.ndarray
    effect: GateEffect
    outcomes: Outcomes
    z: np.ndarray  # [R, F] float64
    kept: np.ndarray  # [N] patches that the layer keeps


def made(seed: int, images: int = 23, heads: int = 3, sign: str = "both", active: int = 12) -> Case:
    """Images steered by their class, every second one by another class as well."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images)
    image = np.concatenate([np.arange(images), np.arange(0, images, 2)])
    steered_by = np.concatenate([labels, (labels[::2] + 1) % CLASSES])
    z_NF = np.zeros((images, LATENTS), np.float32)
    for n in range(images):
        z_NF[n, rng.choice(LATENTS, active, replace=False)] = rng.exponential(1.0, active)
    z = z_NF[image]
    gate_logits = rng.normal(0.5, 2.0, (images, heads)).astype(np.float32)
    weights = rng.uniform(0.2, 2.0, (CLASSES, CHOSEN)) * rng.choice([0, 1, 1, 1], (CLASSES, CHOSEN))
    weights *= {"up": 1, "down": -1, "both": rng.choice([-1, 1], weights.shape)}[sign]
    choice = Choice(
        np.stack([rng.choice(LATENTS, CHOSEN, replace=False) for _ in range(CLASSES)]).astype(np.int32),
        weights.astype(np.float32),
    )
    row, latent = np.nonzero(z)
    rows = Rows(image, steered_by, gate_logits[image], np.full((len(image), heads), 5.0), (row, latent, z[row, latent]))
    effect = gate_effect(rng.normal(0, 1, (LATENTS, 8)), rng.normal(0, 0.5, (8, heads)), CHOSEN)
    pattern = (gate_logits > 0) @ (1 << np.arange(heads))
    outcomes = Outcomes(labels, gate_logits, rng.random((images, 2**heads)) < 0.6, pattern)
    used = np.arange(len(image)) < images
    kept = rng.integers(0, 17, images)
    strength = rng.uniform(0.5, 2, LATENTS).astype(np.float32)
    return Case(rows, used, choice, strength, effect, outcomes, z.astype(float), kept)


def logits(case: Case, alpha: float) -> np.ndarray:
    """[R, H] by the definition: every chosen latent of every row, one by one."""
    found = case.rows.gate_logits.astype(np.float64).copy()
    for r, c in enumerate(case.rows.steered_by):
        for latent, weight in zip(case.choice.latents[c], case.choice.weights[c].astype(float), strict=True):
            z = case.z[r, latent]
            found[r] += (max(z + alpha * weight * float(case.strength[latent]), 0.0) - z) * case.effect.logits[latent]
    return found


def on(case: Case, flips: Flips, alpha: float) -> np.ndarray:
    """[R, H] gates that follow from the flips: parity of those between 0 and alpha."""
    gates = case.rows.gate_logits > 0
    between = (flips.alpha * np.sign(alpha) > 0) & (np.abs(flips.alpha) <= abs(alpha))
    for row, head in zip(flips.row[between], flips.head[between], strict=True):
        gates[row, head] ^= True
    return gates


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["up", "down", "both"]), st.sampled_from([0, 1, 12, 30]))
def test_flips_are_where_the_gate_logits_change_sign(seed: int, sign: str, active: int) -> None:
    case = made(seed, sign=sign, active=active)
    flips = find_flips(case.rows, case.choice, case.strength, case.effect)
    rng = np.random.default_rng(seed)
    alphas = np.concatenate([rng.normal(0, 1, 6), rng.normal(0, 30, 6), [1e5, -1e5, 1e-3, -1e-3]])
    for alpha in alphas:
        m = logits(case, alpha)
        clear = np.abs(m) > 1e-9 * (1 + abs(alpha))
        assert (on(case, flips, alpha) == (m > 0))[clear].all()
        assert clear.mean() > 0.9
    # and each is a root
    for row, head, alpha in list(zip(flips.row, flips.head, flips.alpha, strict=True))[:10]:
        assert logits(case, alpha)[row, head] == pytest.approx(0, abs=1e-6 * (1 + abs(alpha)))


def test_heads_flip_more_than_once_where_latents_run_out() -> None:
    """A latent that falls to 0 takes its push with it: the path of a logit bends, and may come back."""
    found = 0
    for seed in range(20):
        flips = find_flips(*made(seed)[:1], made(seed).choice, made(seed).strength, made(seed).effect)
        keys = list(zip(flips.row, flips.head, np.sign(flips.alpha), strict=True))
        found += len(keys) - len(set(keys))
    assert found > 3


def test_places_within_rounding_are_named() -> None:
    """At every alpha, a logit so near 0 that float32 may decide it either way lies in an interval of doubt."""
    seen = 0
    for seed in range(30):
        case = made(seed, images=40)
        flips = find_flips(case.rows, case.choice, case.strength, case.effect)
        grid = np.unique(np.concatenate([[0.0], flips.alpha[np.abs(flips.alpha) < 100][::3]]))
        placed = place_on_grid(flips, grid)
        doubt = set(zip(placed.unsure_row.tolist(), placed.unsure_place.tolist(), strict=True))
        assert len(doubt) < 0.2 * len(grid) * len(case.rows.image)
        for a, alpha in enumerate(grid):
            near = np.abs(logits(case, alpha)) <= case.effect.slack * case.rows.size
            for row in np.flatnonzero(near.any(axis=1)):
                if alpha != 0 and not np.array_equal(logits(case, alpha)[row], case.rows.gate_logits[row]):
                    assert (row, a) in doubt
                    seen += 1
    assert seen > 100


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 5), st.booleans())
def test_tally_counts_what_loops_count(seed: int, images: int, heads: int, other: bool) -> None:
    """Bits and counts at every alpha against the logits; also where each image is steered by another class."""
    case = made(seed, images, heads)
    used = ~case.used if other else case.used
    if other:  # the images that have a second row use it, the others their first
        used = used | (case.used & (np.arange(len(used)) % 2 == 1))
    alphas = np.unique(np.concatenate([[0.0], np.random.default_rng(seed).normal(0, 5, 7)]))
    flips = find_flips(case.rows, case.choice, case.strength, case.effect)
    grid = place_on_grid(flips, alphas)
    gates_ARH = np.stack([logits(case, alpha) > 0 for alpha in alphas])
    bit = 1 << np.arange(heads)
    decided = (gates_ARH @ bit)[grid.unsure_place, grid.unsure_row]
    found = tally_flips(grid, decided, case.rows, used, case.outcomes, alphas, CLASSES)
    own = np.flatnonzero(used)
    own = own[np.argsort(case.rows.image[own])]
    assert case.rows.image[own].tolist() == list(range(images))
    for a in range(len(alphas)):
        correct, gained, heads_on = np.zeros(CLASSES), np.zeros(CLASSES), np.zeros((CLASSES, heads))
        for n, row in enumerate(own):
            gates, label = gates_ARH[a, row], case.outcomes.labels[n]
            right = case.outcomes.right[n, gates @ bit]
            assert unpack_bits(found.right[a], images)[n] == right
            assert (unpack_bits(found.gates[a], images)[:, n] == gates).all()
            correct[label] += right
            gained[label] += right and not case.outcomes.right[n, case.outcomes.pattern[n]]
            heads_on[label] += gates
        np.testing.assert_array_equal(found.correct[a], correct)
        np.testing.assert_array_equal(found.gained[a], gained)
        np.testing.assert_array_equal(found.heads_on[a], heads_on)
    # the same from gates and answers themselves
    right = case.outcomes.right[np.arange(images), gates_ARH[:, own] @ bit]
    was = case.outcomes.right[np.arange(images), case.outcomes.pattern]
    for ours, theirs in zip(
        found, tally_gates(gates_ARH[:, own], right, was, case.outcomes.labels, CLASSES), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_where_the_grid_is_unsure_the_model_decides() -> None:
    """Whatever the closed form says there, bits and counts follow the decision, and only there."""
    case = made(1, images=50)
    flips = find_flips(case.rows, case.choice, case.strength, case.effect)
    alphas = np.unique(np.concatenate([[0.0, 3.0, -3.0], flips.alpha[::7]]))
    grid = place_on_grid(flips, alphas)
    assert len(grid.unsure_row) > 5
    rng = np.random.default_rng(0)
    decided = rng.integers(0, 8, len(grid.unsure_row))
    found = tally_flips(grid, decided, case.rows, case.used, case.outcomes, alphas, CLASSES)
    gates = np.moveaxis(unpack_bits(found.gates, 50), -2, -1)
    exact = np.stack([logits(case, alpha)[:50] > 0 for alpha in alphas])
    for row, place, pattern in zip(grid.unsure_row, grid.unsure_place, decided, strict=True):
        if row < 50:
            np.testing.assert_array_equal(gates[place, row], pattern_to_gates(np.array(pattern), 3))
            exact[place, row] = gates[place, row]
    np.testing.assert_array_equal(gates, exact)
    right = case.outcomes.right[np.arange(50), gates @ (1 << np.arange(3))]
    was = case.outcomes.right[np.arange(50), case.outcomes.pattern]
    for ours, theirs in zip(found, tally_gates(gates, right, was, case.outcomes.labels, CLASSES), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_steps_are_accuracy_and_usage_on_the_whole_line(seed: int) -> None:
    cases = [made(seed), made(seed + 1, images=17)]
    flips = [find_flips(c.rows, c.choice, c.strength, c.effect) for c in cases]
    parts = [TalliedFlips(f, c.rows, c.used, c.outcomes, c.kept) for f, c in zip(flips, cases, strict=True)]
    steps = exact_step_function(parts, GATES)
    assert (np.diff(steps.alpha) >= 0).all()
    rng = np.random.default_rng(seed)
    for alpha in (*rng.normal(0, 3, 10), 0.0, 1e6, -1e6):
        right = heads = macs = 0
        for c in cases:
            gates = (logits(c, alpha) > 0)[c.used]
            right += c.outcomes.right[np.arange(len(gates)), gates @ (1 << np.arange(3))].sum()
            heads += gates.sum()
            for (h, a, f), kept in zip(gates, c.kept, strict=True):  # one head, attention, MLP, of width 4
                macs += a * h * (4 * 4 + 2 * (1 + kept) * 4 * 4 + 2 * (1 + kept) * 4 + 4 * 4)
                macs += f * 2 * 4 * 16 + 4 * (1 + 2 + 16)  # and the gates themselves
        at = steps.at(alpha)
        assert (steps.correct[at], steps.heads_on[at], steps.macs[at]) == (right, heads, macs)
        assert steps.accuracy[at] == right / 40
        assert steps.usage[at] == heads / 120


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9))
def test_alphas_for_a_usage_and_for_an_accuracy(seed: int, share: float) -> None:
    """The smallest that reaches a usage, and the best at an accuracy, against every interval there is."""
    case = made(seed, sign="up")
    flips = find_flips(case.rows, case.choice, case.strength, case.effect)
    steps = exact_step_function([TalliedFlips(flips, case.rows, case.used, case.outcomes, case.kept)], GATES)
    ends = np.concatenate([[0.0], steps.alpha[steps.alpha > 0], [1e9]])
    inside = (ends[:-1] + ends[1:]) / 2  # an alpha of every interval from 0 up
    usage, accuracy = steps.usage[steps.at(inside)], steps.accuracy[steps.at(inside)]

    reached = np.flatnonzero(usage <= share)
    least = smallest_alpha(steps, share)
    assert (least is None) == (len(reached) == 0)
    if least is not None:
        assert least == ends[reached[0]]
        assert steps.usage[steps.at(least)] <= share

    allowed = np.flatnonzero(accuracy >= share)
    best = best_alpha(steps, share, steps.heads_on)
    if not len(allowed):
        assert best == 0
    else:
        at = steps.at(best)
        assert best > 0
        assert steps.accuracy[at] >= share
        assert steps.usage[at] == usage[allowed].min()
        at, macs = steps.at(best_alpha(steps, share, steps.macs)), steps.macs[steps.at(inside)]
        assert steps.accuracy[at] >= share
        assert steps.macs[at] == macs[allowed].min()


def test_bits_survive_the_round_trip() -> None:
    for count in (1, 7, 8, 63, 64, 65, 200):
        values = np.random.default_rng(count).random((2, 3, count)) < 0.5
        bits = pack_bits(values)
        assert bits.dtype == np.uint8
        assert bits.shape[-1] % 8 == 0
        np.testing.assert_array_equal(unpack_bits(bits, count), values)
        assert bits[0, 0, 0] & 1 == values[0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "layer_norm", "affine"),
    [({}, False, True), ({}, True, False), ({"mode": "scale"}, False, False), ({"form": "replace"}, False, False),
     ({"target": "residual"}, False, False)],
)  # fmt: skip
def test_when_the_closed_form_holds(fields: dict, layer_norm: bool, affine: bool) -> None:
    assert is_affine_in_alpha(SteerConfig(**fields), layer_norm) == affine
