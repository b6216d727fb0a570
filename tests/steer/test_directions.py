"""Directions and choices for each image, against loops in plain Python and planted answers."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_array

from headsteer_jax.config import SteerConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.steer.by_image import (
    ReadResiduals,
    guessed_bias_directions,
    guessed_difference_directions,
    image_latents,
    image_random_directions,
)
from headsteer_jax.steer.catalogue import STRATEGIES, per_class_strategy
from headsteer_jax.steer.directions import wrap_directions
from headsteer_jax.steer.flips import Rows, find_flips, gate_effect
from headsteer_jax.steer.guess import Guess, fit_guess, fit_probe
from headsteer_jax.steer.strategies import (
    Choice,
    LatentStatistics,
    Residuals,
    class_frequent_latents,
    latent_statistics,
    wanted_push,
)
from headsteer_jax.steer.table import Outcomes

N, F, C, D, H = 120, 20, 4, 6, 3
CONFIG = SteerConfig(latents=4)


def made(seed: int = 0) -> LatentStatistics:
    """Statistics with residuals whose classes lie around random centres, and outcomes under every pattern."""
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.standard_normal((N, F)), 0).astype(np.float32)
    labels = rng.permutation(np.arange(N) % C)
    x = (rng.standard_normal((C, D))[labels] + rng.normal(0, 0.3, (N, D))).astype(np.float32)
    gate = rng.standard_normal((D, H)).astype(np.float32)
    logits = rng.normal(1, 1, (N, H)).astype(np.float32)
    outcomes = Outcomes(labels, logits, rng.random((N, 2**H)) < 0.7, (logits > 0) @ (1 << np.arange(H)))
    stats = latent_statistics(z, labels, C, rng.standard_normal((F, D)).astype(np.float32), gate, (outcomes, outcomes))
    return stats._replace(residuals=Residuals(x, labels, gate), guess=fit_guess((x, labels), (x, labels)))


def direction(name: str, stats: LatentStatistics, seed: int = 0) -> np.ndarray:
    choice = STRATEGIES[name](stats, CONFIG, np.random.default_rng(seed))
    assert choice.latents.shape == choice.weights.shape == (C, 0)
    assert choice.directions.dtype == np.float32
    return choice.directions.astype(np.float64)


def class_shift(stats: LatentStatistics, label: int) -> float:
    """How far the latents of `class` move the residual at alpha 1."""
    own = class_frequent_latents(stats, CONFIG, np.random.default_rng(0)).latents[label]
    return float(np.linalg.norm(sum(stats.strength[j] * stats.decoder[j] for j in own)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_mean_difference_is_the_class_mean_less_the_others() -> None:
    stats = made()
    x, labels, _ = stats.residuals
    found = direction("mean_difference", stats)
    for label in range(C):
        wanted = x[labels == label].mean(axis=0) - x[labels != label].mean(axis=0)
        assert cosine(found[label], wanted) == pytest.approx(1, abs=1e-6)


def test_probe_finds_the_planted_direction() -> None:
    """Two classes that differ along one axis, with much more noise along another one."""
    rng, labels = np.random.default_rng(0), np.arange(N) % 2
    x = rng.normal(0, 0.2, (N, D))
    x[:, 0] += 2.0 * labels
    x[:, 1] = rng.normal(0, 10, N)
    probe = fit_probe(x.astype(np.float32), labels)
    assert probe.coef_.shape == (2, D)
    assert cosine(probe.coef_[1] - probe.coef_[0], np.eye(D)[0]) > 0.9
    logits = x @ probe.coef_.T + probe.intercept_
    assert (logits.argmax(axis=1) == labels).mean() > 0.98


@pytest.mark.parametrize("name", ["mean_difference", "probe", "random_direction"])
def test_directions_move_as_far_as_the_latents_of_class(name: str) -> None:
    stats = made(1)
    found = direction(name, stats)
    for label in range(C):
        assert np.linalg.norm(found[label]) == pytest.approx(class_shift(stats, label), rel=1e-5)


def test_gate_bias_pushes_the_gate_exactly_and_is_the_shortest_that_does() -> None:
    stats = made(2)
    found, gate = direction("gate_bias", stats), stats.residuals.gate.astype(np.float64)
    pushes = np.stack([wanted_push(stats.outcomes, label, CONFIG) for label in range(C)])
    assert np.abs(pushes).max() > 0.1
    np.testing.assert_allclose(found @ gate, pushes, atol=1e-5)
    null_DK = np.linalg.svd(gate.T)[2][H:].T  # what the gate does not see
    np.testing.assert_allclose(found @ null_DK, 0, atol=1e-5)


def test_a_gate_that_a_direction_is_fitted_to_leave_alone_is_not_pushed() -> None:
    """In float32 its push is about 1e-9, of either sign, which would decide the gate at a large alpha."""
    rng = np.random.default_rng(4)
    gate_DH, wanted_CH = rng.standard_normal((96, 6)), rng.standard_normal((50, 6)) * (rng.random((50, 6)) < 0.5)
    choice = wrap_directions(np.linalg.lstsq(gate_DH.T, wanted_CH.T)[0].T)
    assert (np.abs(choice.directions.astype(np.float64) @ gate_DH)[wanted_CH == 0] > 0).any()
    push_CH, size_CH = gate_effect(rng.standard_normal((3, 96)), gate_DH, 0).of_directions(choice)
    np.testing.assert_array_equal(push_CH == 0, wanted_CH == 0)
    np.testing.assert_allclose(push_CH, wanted_CH, atol=1e-5)
    assert (size_CH[wanted_CH.any(axis=1)] > 0).all()


def test_random_bias_is_as_long_as_gate_bias_and_follows_the_generator() -> None:
    stats = made(3)
    found, fitted = direction("random_bias", stats), direction("gate_bias", stats)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(fitted, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found, direction("random_bias", stats))
    assert not np.allclose(found, direction("random_bias", stats, seed=1))
    assert max(abs(cosine(a, b)) for a, b in zip(found, fitted, strict=True)) < 0.999


def test_random_bias_pushes_the_gates_about_as_far_as_gate_bias() -> None:
    """It lies in what the gates see: of a direction of all 384 dimensions, they would see an eighth.

    Two gates have the same weights, so that the span has a dimension less than there are gates.
    """
    stats, rng, width = made(3), np.random.default_rng(3), 384
    gate = rng.standard_normal((width, H)).astype(np.float32)
    gate[:, 2] = gate[:, 0]
    wide = stats._replace(
        decoder=rng.standard_normal((F, width)).astype(np.float32),
        residuals=Residuals(rng.standard_normal((N, width)).astype(np.float32), stats.residuals.labels, gate),
    )
    unseen = np.linalg.svd(gate[:, :2].astype(np.float64).T)[2][2:].T
    found, fitted = direction("random_bias", wide), direction("gate_bias", wide)
    np.testing.assert_allclose(found @ unseen, 0, atol=1e-5 * np.abs(found).max())
    pushed, wanted = (np.linalg.norm(v @ gate, axis=1) for v in (found, fitted))
    assert (pushed > 0.5 * wanted).all()
    assert (pushed < 2 * wanted).all()


def test_image_latents_are_its_own_strongest() -> None:
    stats, rng = made(4), np.random.default_rng(4)
    z = np.where(rng.random((9, F)) < 0.3, rng.exponential(1, (9, F)), 0)
    z[0] = 0
    highest = SteerConfig(latents=4, max_frequency=float(np.sort(stats.frequency)[-3]))
    found = image_latents(ReadResiduals(np.zeros((9, D)), csr_array(z)), stats, highest, rng)
    for n in range(9):
        allowed = [j for j in range(F) if z[n, j] > 0 and 0 < stats.frequency[j] <= highest.max_frequency]
        wanted = sorted(allowed, key=lambda j: -z[n, j] / stats.strength[j])[:4]
        amplified = found.latents[n][found.weights[n] > 0]
        assert amplified.tolist() == wanted
        assert len(set(found.latents[n].tolist())) == 4
        pushed = found.weights[n] * stats.strength[found.latents[n]]  # by *add* at alpha 1
        np.testing.assert_allclose(pushed[: len(wanted)], z[n, wanted], rtol=1e-6)
        assert not z[n, found.latents[n][len(wanted) :]].any()
    assert not found.weights[0].any()
    scaled = image_latents(
        ReadResiduals(np.zeros((9, D)), csr_array(z)), stats, highest.model_copy(update={"mode": "scale"}), rng
    )
    np.testing.assert_array_equal(scaled.weights, found.weights > 0)


def test_too_few_rare_latents_are_named() -> None:
    stats, rare = made(4), SteerConfig(latents=4, max_frequency=0.01)
    images = ReadResiduals(np.zeros((9, D)), csr_array(np.ones((9, F))))
    with pytest.raises(
        HeadSteerError, match=r"steer\.latents = 4: only 0 latents fire .* steer\.max_frequency = 0\.01"
    ):
        image_latents(images, stats, rare, np.random.default_rng(0))


def test_random_directions_of_images_move_as_far_as_their_latents() -> None:
    stats, rng = made(5), np.random.default_rng(5)
    z = csr_array(np.where(rng.random((9, F)) < 0.5, rng.exponential(1, (9, F)), 0))
    images = ReadResiduals(np.zeros((9, D)), z)
    own = image_latents(images, stats, CONFIG, rng)
    for mode in ("add", "scale"):
        control = image_random_directions(images, stats, SteerConfig(latents=4, mode=mode), rng)
        for n in range(9):
            moved = sum(
                z[[n], [j]] * stats.decoder[j] for j, w in zip(own.latents[n], own.weights[n], strict=True) if w
            )
            assert np.linalg.norm(control.directions[n]) == pytest.approx(np.linalg.norm(moved), rel=1e-5)


def test_a_guess_mixes_the_biases_of_classes() -> None:
    """Where the guess is certain it is one class's bias; halfway between two class means, it is their mean."""
    stats = made(8)
    x, labels, _ = stats.residuals
    means = np.stack([x[labels == label].mean(axis=0) for label in range(C)])
    middle = (means[0] + means[1]) / 2
    images = ReadResiduals(np.stack([*means, middle]), csr_array(np.zeros((C + 1, F))))
    found = guessed_bias_directions(images, stats, CONFIG, np.random.default_rng(0)).directions
    biases = direction("gate_bias", stats)
    np.testing.assert_allclose(found[:C], biases, atol=0.05 * np.abs(biases).max())
    np.testing.assert_allclose(found[C], (biases[0] + biases[1]) / 2, atol=0.05 * np.abs(biases).max())


def test_a_guess_mixes_the_most_probable_classes_and_falls_back_to_the_bias_of_all() -> None:
    """A planted classifier whose logits are the first residuals, with a temperature of 2."""
    stats, rng = made(8), np.random.default_rng(8)
    logits = rng.normal(0, 3, (4000, C))
    chance = np.exp(logits / 2) / np.exp(logits / 2).sum(axis=1, keepdims=True)
    labels = (chance.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    stats = stats._replace(guess=Guess(np.eye(C, D), np.zeros(C), logits, labels))
    x = rng.normal(0, 3, (50, D)).astype(np.float32)
    images, biases = ReadResiduals(x, csr_array(np.zeros((50, F)))), direction("gate_bias", stats)
    common = direction("global_bias", stats)[0]
    config = SteerConfig(latents=4, guess_classes=2, least_confidence=0.5)
    found = guessed_bias_directions(images, stats, config, rng).directions
    probability = np.exp(x[:, :C].astype(float) / 2)
    probability /= probability.sum(axis=1, keepdims=True)
    unsure = 0
    for n in range(50):
        first, second = np.argsort(-probability[n])[:2]
        p, q = probability[n, [first, second]]
        if abs(p - 0.5) < 0.05:  # the fitted temperature may decide either way
            continue
        mixed = (p * biases[first] + q * biases[second]) / (p + q)
        np.testing.assert_allclose(found[n], mixed if p > 0.5 else common, atol=0.05 * np.abs(biases).max())
        unsure += p < 0.5
    assert 5 < unsure < 45


@pytest.mark.parametrize("guess_classes", [0, 2])
def test_a_guess_mixes_the_mean_differences_and_leaves_unsure_images_alone(guess_classes: int) -> None:
    """A planted classifier, whose logits are the first residuals and rarely right by chance."""
    stats, rng = made(8), np.random.default_rng(8)
    logits = rng.normal(0, 3, (4000, C))
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (chance.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    stats = stats._replace(guess=Guess(np.eye(C, D), np.zeros(C), logits, labels))
    x = rng.normal(0, 1.5, (60, D)).astype(np.float32)
    images, means = ReadResiduals(x, csr_array(np.zeros((60, F)))), direction("mean_difference", stats)
    config = SteerConfig(latents=4, guess_classes=guess_classes, least_confidence=0.5)
    found, unsure = guessed_difference_directions(images, stats, config, rng).directions, 0
    for n in range(60):
        probability = np.exp(x[n, :C].astype(float)) / np.exp(x[n, :C].astype(float)).sum()
        kept = np.argsort(-probability)[: guess_classes or C]
        if abs(probability.max() - 0.5) < 0.05:  # the fitted temperature may decide either way
            continue
        mixed = sum(probability[c] * means[c] for c in kept) / probability[kept].sum()
        sure = probability.max() > 0.5
        np.testing.assert_allclose(found[n], mixed if sure else 0, atol=0.05 * np.abs(means).max())
        assert sure or not found[n].any()
        unsure += not sure
    assert 5 < unsure < 55


def test_a_global_bias_is_the_same_for_all_classes_and_fits_them_together() -> None:
    stats = made(9)
    found = direction("global_bias", stats)
    assert (found == found[0]).all()
    together = tuple(part._replace(labels=np.zeros(N, int)) for part in stats.outcomes)
    np.testing.assert_allclose(found[0] @ stats.residuals.gate, wanted_push(together, 0, CONFIG), atol=1e-5)


def test_flips_along_a_direction_are_where_the_gate_logits_change_sign() -> None:
    rng = np.random.default_rng(6)
    x, gate, v = rng.standard_normal((30, D)), rng.standard_normal((D, H)), rng.standard_normal((C, D))
    labels = rng.integers(0, C, 30)
    rows = Rows(np.arange(30), labels, x @ gate, np.abs(x) @ np.abs(gate), (np.zeros(0, int),) * 2 + (np.zeros(0),))
    none = np.zeros((C, 0))
    choice = Choice(none.astype(np.int32), none.astype(np.float32), v.astype(np.float32))
    flips = find_flips(rows, choice, np.ones(F), gate_effect(rng.standard_normal((F, D)), gate, 4))
    assert len(flips.alpha) > 60
    for alpha in (-7.0, -1.0, -0.1, 0.1, 1.0, 7.0):
        on = x @ gate > 0
        passed = (flips.alpha * np.sign(alpha) > 0) & (np.abs(flips.alpha) <= abs(alpha))
        on[flips.row[passed], flips.head[passed]] ^= True
        np.testing.assert_array_equal(on, (x + alpha * v.astype(np.float32)[labels]) @ gate > 0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (np.ones(D + 1), ["direction must have the shape (6,)", "(7,)"]),
        (np.ones((1, D)), ["direction must have the shape (6,)", "(1, 6)"]),
        ([np.ones(2), np.ones(3), 1], ["a direction"]),
        (np.zeros(D), ["zero"]),
        (np.full(D, np.nan), ["nan", "finite"]),
        (np.full(D, 1e300), ["inf"]),
        (np.array(["a"] * D), ["must be numbers"]),
    ],
)
def test_a_direction_that_cannot_be_used_is_named(answer: np.ndarray, words: list[str]) -> None:
    with pytest.raises(HeadSteerError) as caught:
        per_class_strategy(lambda stats, label: answer, "mine")(made(), CONFIG, np.random.default_rng(0))
    for word in ("'mine'", "class 0", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("form", [jnp.asarray, list, tuple])
def test_a_direction_may_be_anything_that_makes_an_array(form: Callable[[np.ndarray], object]) -> None:
    mine = per_class_strategy(lambda stats, label: form(np.eye(D)[label]), "mine")
    np.testing.assert_array_equal(mine(made(), CONFIG, np.random.default_rng(0)).directions, np.eye(D)[:C])


def test_a_user_may_give_directions_but_not_both() -> None:
    stats = made()
    choice = per_class_strategy(lambda stats, label: np.eye(D)[label], "mine")(stats, CONFIG, np.random.default_rng(0))
    np.testing.assert_array_equal(choice.directions, np.eye(D)[:C])
    for first in (0, 1):
        mixed = per_class_strategy(lambda stats, label, n=first: np.eye(D)[0] if label == n else ([1], [1.0]), "mine")
        with pytest.raises(HeadSteerError, match="class 1: it must return the same for every class"):
            mixed(stats, CONFIG, np.random.default_rng(0))


def test_superclasses_share_their_latents() -> None:
    stats = made(7)
    with pytest.raises(HeadSteerError, match="superclasses"):
        STRATEGIES["superclass"](stats, CONFIG, np.random.default_rng(0))
    related = np.eye(C, dtype=bool)
    related[0, 1] = related[1, 0] = True
    found = STRATEGIES["superclass"](stats._replace(related=related), CONFIG, np.random.default_rng(0)).latents
    joint = (stats.class_frequency[0] + stats.class_frequency[1]) / 2
    for label in (0, 1):
        assert found[label].tolist() == sorted(range(F), key=lambda j: (-joint[j], j))[:4]
    own = class_frequent_latents(stats, CONFIG, np.random.default_rng(0)).latents
    np.testing.assert_array_equal(found[2:], own[2:])


def test_the_control_of_superclass_shares_no_latent_with_it_and_moves_as_far() -> None:
    stats = made(7)
    with pytest.raises(HeadSteerError, match="need superclasses"):
        STRATEGIES["matched_superclass"](stats, CONFIG, np.random.default_rng(0))
    related = np.zeros((C, C), bool)
    related[0, 1] = related[1, 0] = True
    stats = stats._replace(related=related)
    own, control = (
        STRATEGIES[name](stats, CONFIG, np.random.default_rng(0)) for name in ("superclass", "matched_superclass")
    )

    def shift(choice: Choice, label: int) -> float:
        parts = zip(choice.latents[label], choice.weights[label], strict=True)
        return float(np.linalg.norm(sum(w * stats.strength[j] * stats.decoder[j] for j, w in parts)))

    for label in range(C):
        assert not set(own.latents[label]) & set(control.latents[label])
        assert shift(control, label) == pytest.approx(shift(own, label), rel=1e-5)
