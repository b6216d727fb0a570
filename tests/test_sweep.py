"""The sweep's own small parts; its whole is tested by running it (test_run) and by its pieces (test_steer)."""

import numpy as np
import pytest

from headsteer_jax.config import Config, HeadSteerError, SteerConfig
from headsteer_jax.data import Split
from headsteer_jax.latents import LatentStatistics, Outcomes
from headsteer_jax.sweep import _folds, _top_images, _without_fold, check_names, check_validation


@pytest.mark.parametrize(("images", "latents", "count"), [(50, 300, 4), (3, 5, 8), (7, 128, 7)])
def test_top_images_are_the_strongest_in_order(images: int, latents: int, count: int) -> None:
    z = np.maximum(np.random.default_rng(0).standard_normal((images, latents)), 0).astype(np.float32)
    found, activations = _top_images(z, count)
    assert found.shape == activations.shape == (latents, min(count, images))
    for latent in range(latents):
        wanted = sorted(z[:, latent].tolist(), reverse=True)[:count]
        assert activations[latent].tolist() == wanted
        assert z[found[latent], latent].tolist() == wanted
        assert len(set(found[latent].tolist())) == min(count, images)


def test_names_are_checked_before_anything_is_computed() -> None:
    check_names(Config(steer=SteerConfig(classes=("a",))), ("a", "b"))
    with pytest.raises(HeadSteerError, match=r"config\.steer\.classes: the dataset has no class 'c'; it has a, b$"):
        check_names(Config(steer=SteerConfig(classes=("a", "c"))), ("a", "b"))
    with pytest.raises(HeadSteerError, match=r"config\.steer\.strategies: there is no 'best'"):
        check_names(Config(steer=SteerConfig(strategies=("best",))), ("a",))


def test_a_class_with_too_few_validation_images_is_named() -> None:
    split = Split(np.zeros((7, 1, 1, 1), np.uint8), np.array([0, 0, 0, 1, 1, 2, 2], np.int32))
    check_validation(split, Config(steer=SteerConfig(least_validation=2)), ("a", "b", "c"))
    check_validation(split, Config(steer=SteerConfig(least_validation=3, classes=("a",))), ("a", "b", "c"))
    with pytest.raises(
        HeadSteerError, match=r"validation: 2 images of class 'b' are too few .*data\.validation_fraction"
    ):
        check_validation(split, Config(steer=SteerConfig(least_validation=3)), ("a", "b", "c"))


def test_the_half_that_scores_alpha_did_not_choose_the_latents() -> None:
    labels = np.array([0, 1, 0, 1, 0, 0, 1])
    folds = _folds(labels)
    for label in (0, 1):
        assert abs(int((folds[labels == label] == 0).sum()) - int((folds[labels == label] == 1).sum())) <= 1
    train = Outcomes(np.zeros(2), np.zeros((2, 3)), np.zeros((2, 8), bool))
    validation = Outcomes(labels, np.arange(21).reshape(7, 3), np.zeros((7, 8), bool))
    stats = LatentStatistics(*np.zeros((4, 1)), outcomes=(train, validation))
    for fold in (0, 1):
        seen = _without_fold(stats, folds, fold).outcomes
        assert seen[0] is train
        assert set(seen[1].gate_logits[:, 0] // 3) == set(np.flatnonzero(folds != fold))
