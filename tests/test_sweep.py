"""The sweep's own small parts; its whole is tested by running it (test_run) and by its pieces (test_steer)."""

import numpy as np
import pytest

from headsteer_jax.config import Config, HeadSteerError, SteerConfig
from headsteer_jax.sweep import _top_images, check_names


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
