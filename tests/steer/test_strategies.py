"""Which latents are chosen: each strategy against a brute-force version in plain Python."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headsteer_jax.config import SteerConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.steer.catalogue import STRATEGIES, find_strategy, per_class_strategy
from headsteer_jax.steer.strategies import (
    LatentStatistics,
    latent_overlap,
    latent_statistics,
    measure_wishes,
    random_latents,
    shift_norm,
    wanted_heads,
    wanted_push,
)
from headsteer_jax.steer.table import Outcomes

N, F, C, D = 60, 20, 4, 5


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray, LatentStatistics]:
    """Latents, labels and their statistics; latent 0 is dead, latent 1 always fires."""
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.standard_normal((N, F)), 0).astype(np.float32)
    z[:, 0], z[:, 1] = 0, 1 + z[:, 1]
    labels = rng.permutation(np.arange(N) % C)
    return z, labels, latent_statistics(z, labels, C, rng.standard_normal((F, D)).astype(np.float32))


def test_statistics_are_what_they_are_called() -> None:
    z, labels, stats = made()
    for j in range(F):
        fired = [value for value in z[:, j] if value > 0]
        assert stats.frequency[j] == len(fired) / N
        assert stats.strength[j] == pytest.approx(sum(map(float, fired)) / len(fired) if fired else 0, rel=1e-6)
        for c in range(C):
            own = z[labels == c, j]
            assert stats.class_frequency[c, j] == sum(own > 0) / len(own)


def by_hand(frequency: np.ndarray, allowed: list[int], count: int) -> list[int]:
    return sorted(allowed, key=lambda j: (-frequency[j], j))[:count]


@pytest.mark.parametrize("highest", [1.0, 0.9])
def test_frequent_latents(highest: float) -> None:
    _, _, stats = made()
    config = SteerConfig(latents=4, max_frequency=highest)
    allowed = [j for j in range(F) if 0 < stats.frequency[j] <= highest]
    assert (1 in allowed) == (highest == 1)
    rng = np.random.default_rng(0)
    for c in range(C):
        own = STRATEGIES["class"](stats, config, rng)
        assert own.latents[c].tolist() == by_hand(stats.class_frequency[c], allowed, 4)
        everywhere = STRATEGIES["global"](stats, config, rng)
        assert everywhere.latents[c].tolist() == by_hand(stats.frequency, allowed, 4)
        assert (own.weights == 1).all()
        assert (everywhere.weights == 1).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from(["random", "matched_random"]))
def test_random_latents_are_distinct_alive_and_follow_the_generator(seed: int, count: int, name: str) -> None:
    _, _, stats = made(1)
    config = SteerConfig(latents=count)
    one, again = (find_strategy(name)(stats, config, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(one.latents, again.latents)
    for row in one.latents:
        assert len(set(row.tolist())) == count
        assert (stats.frequency[row] > 0).all()


def test_random_draws_every_latent_equally_often() -> None:
    _, _, stats = made()
    config, rng = SteerConfig(latents=3), np.random.default_rng(0)
    draws = 2000
    seen = np.bincount(
        np.concatenate([random_latents(stats, config, rng).latents.ravel() for _ in range(draws)]), minlength=F
    )
    share = 3 / (F - 1)
    spread = np.sqrt(draws * C * share * (1 - share))
    assert seen[0] == 0
    np.testing.assert_allclose(seen[1:], draws * C * share, atol=5 * spread)


def test_matched_random_is_matched_and_shares_nothing() -> None:
    _, _, stats = made()
    config = SteerConfig(latents=5)
    own = STRATEGIES["class"](stats, config, np.random.default_rng(0))
    control = STRATEGIES["matched_random"](stats, config, np.random.default_rng(0))
    for c in range(C):
        assert not set(own.latents[c]) & set(control.latents[c])
        wanted = np.linalg.norm(sum(stats.strength[j] * stats.decoder[j] for j in own.latents[c]))
        moved = sum(
            w * stats.strength[j] * stats.decoder[j]
            for j, w in zip(control.latents[c], control.weights[c], strict=True)
        )
        assert np.linalg.norm(moved) == pytest.approx(wanted, rel=1e-5)
        assert len(set(control.weights[c].tolist())) == 1


def test_matched_random_fires_about_as_often() -> None:
    """With many latents to choose from, the control's frequencies are near its model's, one by one."""
    rng = np.random.default_rng(3)
    frequency = np.linspace(0.01, 0.9, 400)
    stats = LatentStatistics(
        np.stack([rng.permutation(frequency) for _ in range(C)]), frequency, np.ones(400, np.float32),
        rng.standard_normal((400, D)).astype(np.float32),
    )  # fmt: skip
    config = SteerConfig(latents=6)
    own = STRATEGIES["class"](stats, config, np.random.default_rng(0)).latents
    control = STRATEGIES["matched_random"](stats, config, np.random.default_rng(0)).latents
    step = frequency[1] - frequency[0]
    assert np.abs(stats.frequency[own] - stats.frequency[control]).max() < 12 * step


def test_shift_norm() -> None:
    _, _, stats = made()
    latents = np.array([[1, 2], [3, 1]])
    for row, norm in zip(latents, shift_norm(stats, latents), strict=True):
        assert norm == pytest.approx(np.linalg.norm(sum(stats.strength[j] * stats.decoder[j] for j in row)), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_overlap_counts_what_two_sets_share(data: st.DataObject) -> None:
    rows = st.lists(st.sets(st.integers(0, 30), min_size=5, max_size=5), min_size=1, max_size=4)
    a, b = data.draw(rows), data.draw(rows)
    found = latent_overlap(np.array([sorted(row) for row in a]), np.array([sorted(row) for row in b]))
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            assert found[i, j] == len(one & other) / 5


def test_too_few_latents() -> None:
    _, _, stats = made()
    with pytest.raises(HeadSteerError, match=r"config\.steer\.latents = 20: only 19 latents fire"):
        STRATEGIES["class"](stats, SteerConfig(latents=20), np.random.default_rng(0))
    with pytest.raises(HeadSteerError, match=r"config\.steer\.latents = 15: too many for matched random latents"):
        STRATEGIES["matched_random"](stats, SteerConfig(latents=15), np.random.default_rng(0))


def test_unknown_strategy() -> None:
    with pytest.raises(HeadSteerError, match=r"config\.steer\.strategies: there is no 'klass'; choose from class, "):
        find_strategy("klass")


def outcomes(seed: int, heads: int = 3, count: int = 40) -> Outcomes:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % C
    logits = rng.standard_normal((count, heads)) + 0.7
    return Outcomes(labels, logits, rng.random((count, 2**heads)) < 0.6, (logits > 0) @ (1 << np.arange(heads)))


def worth(seen: tuple[Outcomes, ...], label: int, wish: tuple[int, ...], price: float) -> float:
    """accuracy - price * usage of a wish, image by image, the mean over the splits of their means."""
    total = 0.0
    for one in seen:
        values = []
        for i in np.flatnonzero(one.labels == label):
            gates = [(m > 0) if w == 0 else (w > 0) for m, w in zip(one.gate_logits[i], wish, strict=True)]
            pattern = sum(1 << head for head, on in enumerate(gates) if on)
            values.append(one.right[i, pattern] - price * np.mean(gates))
        total += float(np.mean(values))
    return total / len(seen)


@given(st.integers(0, 500), st.sampled_from([0.0, 0.02, 0.3, 2.0]))
@settings(max_examples=25, deadline=None)
def test_wanted_heads_cannot_be_bettered_by_changing_one(seed: int, price: float) -> None:
    seen, label = (outcomes(seed), outcomes(seed + 1000)), seed % C
    wish = wanted_heads(measure_wishes(seen, label), price, np.zeros(3, np.int8))
    own = worth(seen, label, tuple(wish), price)
    assert own >= worth(seen, label, (0, 0, 0), price) - 1e-9
    for head, state in itertools.product(range(3), (-1, 0, 1)):
        other = tuple(state if h == head else w for h, w in enumerate(wish))
        assert own >= worth(seen, label, other, price) - 1e-9
    if price == 2.0:  # no accuracy is worth a head
        assert (wish == -1).all()


def test_the_push_flips_the_wanted_heads_on_every_image_seen() -> None:
    """From the alpha on at which a head is to be closed, it is closed on all of the class's images."""
    seen = (outcomes(0), outcomes(1))
    config = SteerConfig(alphas=(0.5, 1.0, 2.0, 4.0), price=0.1)
    moved = 0
    for label in range(C):
        push = wanted_push(seen, label, config)
        start = np.zeros(3, np.int8)
        path = []
        for alpha in config.alphas:
            start = wanted_heads(measure_wishes(seen, label), alpha * config.price, start)
            path.append(start)
        logits = np.concatenate([one.gate_logits[one.labels == label] for one in seen])
        for head in range(3):
            closed = [bool(wish[head] < 0) for wish in path]
            if closed[-1]:
                since = config.alphas[max((i + 1 for i, c in enumerate(closed) if not c), default=0)]
                assert (logits[:, head] + since * push[head] < 0).all()
                assert push[head] < 0
                moved += 1
            elif path[0][head] > 0:
                assert (logits[:, head] + config.alphas[0] * push[head] > 0).all()
            else:
                assert push[head] == 0
    assert moved > 3


def test_gate_aligned_realises_the_push() -> None:
    """sum_j w_j s_j (d_j W) is the wanted push; the latents are the class's own, the weights >= 0."""
    rng = np.random.default_rng(5)
    frequency = rng.uniform(0.05, 0.9, 400)
    gate = rng.standard_normal((400, 3))
    stats = LatentStatistics(
        np.stack([rng.permutation(frequency) for _ in range(C)]), frequency, rng.uniform(0.5, 2, 400),
        rng.standard_normal((400, D)), gate, (outcomes(0), outcomes(1)),
    )  # fmt: skip
    config = SteerConfig(latents=16, pool=64, price=0.1, alphas=(0.5, 1.0, 2.0))
    choice = STRATEGIES["gate_aligned"](stats, config, rng)
    assert choice.latents.shape == choice.weights.shape == (C, 16)
    assert (choice.weights >= 0).all()
    for label in range(C):
        own, weights = choice.latents[label], choice.weights[label]
        most = np.argsort(-stats.class_frequency[label], kind="stable")[:64]
        assert len(set(own.tolist())) == 16
        assert set(own.tolist()) <= set(most.tolist())
        push = wanted_push(stats.outcomes, label, config)
        reached = (weights * stats.strength[own]) @ gate[own]
        np.testing.assert_allclose(reached, push, atol=2e-3 * max(np.abs(push).max(), 1))


def strongest(stats: LatentStatistics, label: int) -> tuple[np.ndarray, np.ndarray]:
    """A user's strategy: found by its import path."""
    latents = np.argsort(-stats.class_frequency[label] * stats.strength)[:3]
    return latents, stats.strength[latents]


def test_a_users_strategy_by_its_import_path() -> None:
    _, _, stats = made()
    choice = find_strategy(f"{__name__}:strongest")(stats, SteerConfig(), np.random.default_rng(0))
    for label in range(C):
        worth = (stats.class_frequency[label] * stats.strength).tolist()
        wanted = sorted(range(F), key=lambda j: -worth[j])[:3]
        assert choice.latents[label].tolist() == wanted
        assert choice.weights[label] == pytest.approx(stats.strength[wanted])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("best", r"there is no 'best'; choose from class, .*, or module:function$"),
        ("nowhere.at_all:f", "'nowhere.at_all:f' cannot be imported: No module named 'nowhere'"),
        (f"{__name__}:missing", f"'{__name__}:missing' cannot be imported"),
        (f"{__name__}:C", f"'{__name__}:C' is not a function"),
    ],
)
def test_strategies_that_do_not_exist(name: str, says: str) -> None:
    with pytest.raises(HeadSteerError, match=rf"^config\.steer\.strategies: {says}"):
        find_strategy(name)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (([0, F], [1, 1]), rf"there is no latent {F}; choose from 0 to {F - 1}"),
        (([0, -1], [1, 1]), "there is no latent -1"),
        (([3, 4, 3], [1, 1, 1]), "latent 3 is chosen twice"),
        (([1, 2], [1, np.nan]), "a weight is nan"),
        (([1, 2], [1, np.inf]), "a weight is inf"),
        (([1, 2], [1, 1e39]), "a weight is inf"),
        (([1, 2], [1]), r"latents of shape \(2,\) and weights of shape \(1,\)"),
        (([[1, 2]], [[1, 1]]), r"latents of shape \(1, 2\)"),
        (([], []), r"latents of shape \(0,\)"),
        (([1.5], [1]), "it must return two arrays"),
        (([1], ["a"]), "it must return two arrays"),
        (7, "it must return two arrays"),
        ((1, 2), r"latents of shape \(\)"),
    ],
)
def test_what_a_users_strategy_may_not_return(returned: object, says: str) -> None:
    _, _, stats = made()
    stats = stats._replace(class_names=("ant", "bee", "cat", "dog"))
    length = len(returned[0]) if isinstance(returned, tuple) and np.ndim(returned[0]) == 1 else 1

    def function(_: LatentStatistics, label: int) -> object:
        return returned if label == 2 else (range(max(length, 1)), np.ones(max(length, 1)))

    with pytest.raises(HeadSteerError, match=rf"^strategy 'mine', class 2 \('cat'\): {says}"):
        per_class_strategy(function, "mine")(stats, SteerConfig(), np.random.default_rng(0))
