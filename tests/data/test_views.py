"""Views: augmented versions of a split's images, the same however they are read."""

import numpy as np
import pytest
from builders import blobs, tiny_config

from headsteer_jax.config import Config, DataConfig, SAEConfig
from headsteer_jax.data.dataset import image_keys
from headsteer_jax.data.views import make_view


def config(seed: int = 0, sae: dict[str, object] | None = None, **data: object) -> Config:
    fields = {"crop_padding": 2, "flip": True} | data
    section = tiny_config().sae.model_copy(update=sae or {})
    return tiny_config().model_copy(update={"data": DataConfig(image_size=8, **fields), "sae": section, "seed": seed})


def test_views_are_augmented_differently_and_keep_their_labels() -> None:
    split = blobs(70, 0)
    views = [make_view(split, config(), number) for number in (1, 2)]
    first, second = (view.images.gather(np.arange(70)) for view in views)
    assert (first != split.images).any(axis=(1, 2, 3)).mean() > 0.9
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.9
    for view in views:
        np.testing.assert_array_equal(view.labels, split.labels)


def test_a_mirrored_view_is_the_image_or_its_mirror_image() -> None:
    split = blobs(40, 1)
    images = make_view(split, config(crop_padding=0), 1).images.gather(np.arange(40))
    mirrored = split.images[:, :, ::-1]
    same, other = (np.all(images == candidate, axis=(1, 2, 3)) for candidate in (split.images, mirrored))
    assert np.all(same | other)
    assert 0 < same.mean() < 1


def test_views_may_be_shifted_otherwise_than_training_images() -> None:
    """Each is the image behind a margin of black, from some corner: all shifts up to view_padding, and no mirroring."""
    split, padding = blobs(200, 2), 3
    own = config(crop_padding=0, flip=True, sae={"view_padding": padding, "view_flip": "off"})
    images = make_view(split, own, 1).images.gather(np.arange(200))
    padded = np.pad(split.images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    seen = set()
    for number, image in enumerate(images):
        corners = [(r, c) for r in range(7) for c in range(7) if (padded[number, r : r + 8, c : c + 8] == image).all()]
        assert len(corners) == 1
        seen.add(corners[0])
    assert len(seen) > 40  # of 49; the chance that a given one is never drawn is 2%
    mirrored = make_view(split, config(crop_padding=3, flip=False, sae={"view_padding": 0, "view_flip": "on"}), 1)
    flipped = np.all(mirrored.images.gather(np.arange(200)) == split.images[:, :, ::-1], axis=(1, 2, 3))
    assert 0.3 < flipped.mean() < 0.7


def test_a_view_does_not_depend_on_how_it_is_read() -> None:
    split, rng = blobs(90, 2), np.random.default_rng(0)
    view = make_view(split, config(), 3)
    whole = view.images.gather(np.arange(90))
    some = rng.choice(90, 67)
    np.testing.assert_array_equal(view.images.gather(some), whole[some])
    np.testing.assert_array_equal(view.images[some].gather(np.arange(67)), whole[some])
    assert np.any(make_view(split, config(seed=1), 3).images.gather(np.arange(90)) != whole)


def test_keys_tell_views_images_seeds_and_augmentations_apart() -> None:
    split = blobs(50, 3)
    variants = [
        config(), config(flip=False), config(crop_padding=1), config(seed=1), config(sae={"view_padding": 3}),
    ]  # fmt: skip
    keys = [image_keys(make_view(split, variant, number)) for variant in variants for number in (1, 2)]
    assert len(np.unique(np.concatenate([*keys, image_keys(split)]))) == 11 * 50
    np.testing.assert_array_equal(keys[0], image_keys(make_view(split, config(), 1)))
    same = config(crop_padding=1, flip=False, sae={"view_padding": 2, "view_flip": "on"})  # as the first
    np.testing.assert_array_equal(keys[0], image_keys(make_view(split, same, 1)))


def test_views_need_an_augmentation() -> None:
    says = r"sae\.views = 2: must be 1, because all views would be alike: .*; set sae\.view_padding or sae\.view_flip"
    with pytest.raises(ValueError, match=says):
        Config(data=DataConfig(crop_padding=0), sae=SAEConfig(views=2))
    with pytest.raises(ValueError, match="all views would be alike"):
        Config(data=DataConfig(crop_padding=4, flip=True), sae=SAEConfig(views=2, view_padding=0, view_flip="off"))
    Config(data=DataConfig(crop_padding=1), sae=SAEConfig(views=2))
    Config(data=DataConfig(crop_padding=0), sae=SAEConfig(views=2, view_padding=1))
    Config(data=DataConfig(crop_padding=0), sae=SAEConfig(views=2, view_flip="on"))
    Config(data=DataConfig(crop_padding=0, crop_scale=0.5), sae=SAEConfig(views=2))
