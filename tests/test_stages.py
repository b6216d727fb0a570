"""What stages start from: the residuals of several views, and the fields that make a stage stale."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import CLASSES, random_params, tiny_config

from headsteer_jax import stages
from headsteer_jax.books import stage_fields
from headsteer_jax.config import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset, Split
from headsteer_jax.data.views import make_view
from headsteer_jax.model.vit import TrainedModel, build_model
from headsteer_jax.sae.residuals import load_all
from headsteer_jax.stages import STAGES, load_residuals, load_training_residuals


def trained_for(views: int) -> TrainedModel:
    config = tiny_config()
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"views": views})})
    return TrainedModel(config, build_model(config, CLASSES), random_params(config, CLASSES))


def make_dataset(side: int) -> Dataset:
    """Make 40 training images of `side` pixels, which are resized to 8 if they have more."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, side, side, 1), dtype=np.uint8)
    split = Split(images, (np.arange(40) % CLASSES).astype(np.int32))
    return Dataset(split, split, split, tuple("abcdefg"))


def compute_residuals(trained: TrainedModel, images: np.ndarray) -> np.ndarray:
    """The model's CLS residuals, which enter its last layer, without a cache."""
    x_BTD = jax.jit(
        lambda pixels: trained.model.apply(trained.params, preprocess(pixels, trained.config.data), 2, method="before")
    )(images)
    return np.asarray(x_BTD[:, 0])


@pytest.mark.parametrize("side", [8, 13])
def test_the_first_view_is_the_split_itself_and_each_view_is_computed_once(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []

    def count(cache: Any, trained: TrainedModel, selection: Any, may_write: bool = True) -> Any:
        before = set(tmp_path.glob("*/*/*/meta.json"))
        result = original(cache, trained, selection, may_write=may_write)
        computed.extend(path.parts[-3] for path in set(tmp_path.glob("*/*/*/meta.json")) - before)
        return result

    original = stages.load_or_compute_residuals
    monkeypatch.setattr(stages, "load_or_compute_residuals", count)
    dataset, one = make_dataset(side), trained_for(1)
    plain = load_residuals(str(tmp_path), one, dataset, "train", "cls")
    np.testing.assert_array_equal(load_all(load_training_residuals(str(tmp_path), one, dataset, "cls", plain)),
                                  load_all(plain))  # fmt: skip
    for views in (2, 3, 3):
        trained = trained_for(views)
        joined = load_training_residuals(str(tmp_path), trained, dataset, "cls", plain)
        assert joined.shape == (40 * views, 24)
        own, *augmented = (load_all(part) for part in joined.parts)
        np.testing.assert_allclose(own, compute_residuals(trained, dataset.train.images), atol=2e-5)
        for number, x_ND in enumerate(augmented, start=1):
            images = make_view(dataset.train, trained.config, number).images[np.arange(40)]
            np.testing.assert_allclose(x_ND, compute_residuals(trained, images.gather(np.arange(40))), atol=2e-5)
            assert np.abs(x_ND - own).max() > 1e-2
    assert computed == ["train", "train_view_1", "train_view_2"]


@pytest.mark.parametrize("field", ["sae.weight_decay", "sae.views", "sae.view_padding", "sae.view_flip"])
def test_the_autoencoders_depend_on_how_they_are_trained(field: str) -> None:
    for name in ("sae", "grid", "steer", "layers"):
        assert field in stage_fields(Config(), STAGES[name])
    assert field not in stage_fields(Config(), STAGES["train"])
