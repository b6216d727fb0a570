"""Views: augmented versions of a split's images, the same however they are read."""

import numpy as np
import pytest
from builders import blobs, tiny_config

from headsteer_jax.config import Config, DataConfig, SAEConfig
from headsteer_jax.data.dataset import image_keys
from headsteer_jax.data.views import make_views


def config(**data: object) -> Config:
    fields = {"crop_padding": 2, "flip": True} | data
    return Config.model_validate(tiny_config()).model_copy(update={"data": DataConfig(image_size=8, **fields)})


def test_the_first_view_is_the_split_itself_and_the_others_are_augmented() -> None:
    split = blobs(70, 0)
    views = make_views(split, config(), 3)
    images = views.images.gather(np.arange(210)).reshape(3, 70, 8, 8, 1)
    np.testing.assert_array_equal(images[0], split.images)
    np.testing.assert_array_equal(views.labels, np.tile(split.labels, 3))
    changed = (images[1:] != images[0]).any(axis=(2, 3, 4))
    assert changed.mean() > 0.9
    assert (images[1] != images[2]).any(axis=(1, 2, 3)).mean() > 0.9


def test_a_mirrored_view_is_the_image_or_its_mirror_image() -> None:
    split = blobs(40, 1)
    images = make_views(split, config(crop_padding=0), 2).images.gather(np.arange(40, 80))
    mirrored = split.images[:, :, ::-1]
    same, other = (np.all(images == candidate, axis=(1, 2, 3)) for candidate in (split.images, mirrored))
    assert np.all(same | other)
    assert 0 < same.mean() < 1


def test_a_view_does_not_depend_on_how_it_is_read() -> None:
    split, rng = blobs(90, 2), np.random.default_rng(0)
    views = make_views(split, config(), 4)
    whole = views.images.gather(np.arange(360))
    some = rng.choice(360, 133)
    np.testing.assert_array_equal(views.images.gather(some), whole[some])
    np.testing.assert_array_equal(views.images[some].gather(np.arange(133)), whole[some])
    assert np.any(make_views(split, config().model_copy(update={"seed": 1}), 4).images.gather(np.arange(360)) != whole)


def test_keys_tell_views_images_seeds_and_augmentations_apart() -> None:
    split = blobs(50, 3)
    variants = [config(), config(flip=False), config(crop_padding=1), config().model_copy(update={"seed": 1})]
    keys = [make_views(split, variant, 3).keys for variant in variants]
    assert len(np.unique(np.concatenate(keys))) == 4 * 150
    np.testing.assert_array_equal(keys[0], make_views(split, config(), 3).keys)
    assert len(np.unique(image_keys(split))) == 50


def test_views_need_an_augmentation() -> None:
    with pytest.raises(ValueError, match=r"sae.views = 2: must be 1, because the section data augments nothing"):
        Config(data=DataConfig(crop_padding=0), sae=SAEConfig(views=2))
    Config(data=DataConfig(crop_padding=1), sae=SAEConfig(views=2))
