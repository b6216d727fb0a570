"""The deployed model's forward pass, against the model that it was made from."""

import jax
import numpy as np
import pytest
from builders import CLASSES, tiny_config, trained_model

from headsteer_jax.config import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.deploy.convert import KeptParts, convert_model, cut_model, keep_all
from headsteer_jax.deploy.cost import count_macs, count_parameters
from headsteer_jax.model.macs import count_dense_macs
from headsteer_jax.model.vit import TrainedModel

NAMES = tuple("abcdefg")
KINDS = ("heads", "sublayers", "tokens")


def make_images(config: Config, count: int = 6, side: int = 0) -> np.ndarray:
    side = side or config.data.image_size
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, side, side + 2, config.data.channels), dtype=np.uint8)


def run_vit(trained: TrainedModel, images: np.ndarray, gating: str) -> np.ndarray:
    return np.asarray(trained.model.apply(trained.params, preprocess(images, trained.config.data), gating=gating)[0])


def change_model(config: Config, **fields: object) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=fields)})


@pytest.mark.parametrize("fields", [{}, {"registers": 2, "gelu": "tanh", "layer_norm_epsilon": 1e-3}])
def test_a_model_from_which_nothing_is_cut_is_the_dense_model(fields: dict) -> None:
    config = change_model(tiny_config(), **fields)
    trained, images = trained_model(config), make_images(config, side=13)
    labels = np.array([5, 0, 3])
    model = convert_model(trained, NAMES, labels, images.shape[1:])
    np.testing.assert_allclose(model.apply(images), run_vit(trained, images, "dense")[:, labels], atol=2e-5, rtol=2e-5)
    assert model.config.classes == ("f", "a", "d")
    again = cut_model(model, keep_all(model.config))
    np.testing.assert_array_equal(again.apply(images), model.apply(images))
    assert again.config == model.config


@pytest.mark.parametrize(
    "gate",
    [
        {"kinds": KINDS, "threshold": 0.6},
        {"kinds": ("heads",), "layer_norm": True, "dropped": "identity"},
        {"kinds": KINDS, "dropped": "slice"},
    ],
)
def test_a_dynamic_model_is_the_gated_model(gate: dict) -> None:
    config = tiny_config(**gate)
    trained, images = trained_model(config, seed=1), make_images(config, 16)
    model = convert_model(trained, NAMES, np.arange(CLASSES), images.shape[1:], dynamic=True)
    logits = run_vit(trained, images, "thresholded")
    np.testing.assert_allclose(model.apply(images), logits, atol=3e-5, rtol=3e-5)
    assert np.abs(logits - run_vit(trained, images, "dense")).max() > 0.01  # some gate is closed


def test_cut_parts_are_as_if_their_outputs_were_zero() -> None:
    config = tiny_config()
    trained, images = trained_model(config), make_images(config)
    model = convert_model(trained, NAMES, np.arange(CLASSES), images.shape[1:])
    kept = KeptParts(
        tuple(map(np.array, ([0, 2], [], [1]))),
        tuple(map(np.array, ([], range(0, 96, 2), range(5)))),
    )
    kept = KeptParts(tuple(k.astype(int) for k in kept.heads), tuple(k.astype(int) for k in kept.neurons))
    cut = cut_model(model, kept)
    params = jax.tree.map(np.array, trained.params)
    for i in range(3):
        block, closed = params["params"][f"layers_{i}"], np.ones(24, bool)
        for head in kept.heads[i]:
            closed[8 * head : 8 * head + 8] = False
        block["out"]["kernel"][closed] = 0
        block["mlp_out"]["kernel"][np.setdiff1d(np.arange(96), kept.neurons[i])] = 0
    expected = run_vit(trained._replace(params=params), images, "dense")
    np.testing.assert_allclose(cut.apply(images), expected, atol=2e-5, rtol=2e-5)
    assert cut.config.heads == (2, 0, 1)
    assert cut.config.neurons == (0, 48, 5)
    assert count_parameters(cut.params) < count_parameters(model.params)
    assert count_macs(cut.config) < count_macs(model.config)


def test_macs_of_the_whole_model_are_the_dense_models() -> None:
    config = change_model(tiny_config(), registers=1)
    trained = trained_model(config)
    model = convert_model(trained, NAMES, np.arange(CLASSES), (8, 8, 1))
    assert count_macs(model.config) == count_dense_macs(config, CLASSES)
