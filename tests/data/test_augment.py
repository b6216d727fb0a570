"""headsteer_jax.data.augment against NumPy references."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from headsteer_jax.config import DataConfig
from headsteer_jax.data import augment as module
from headsteer_jax.data.augment import OPERATIONS, augment_and_normalise, preprocess

SIDE = 12
augment = jax.jit(module.augment, static_argnums=2)
operation = jax.jit(module.apply_operation, static_argnums=2)
mixup = jax.jit(module.mixup)


def config(channels: int = 3, **fields: Any) -> DataConfig:
    """All random changes off, unless `fields` switches one on."""
    defaults: dict[str, Any] = {
        "image_size": SIDE,
        "channels": channels,
        "mean": (0.4, 0.5, 0.6)[:channels],
        "std": (0.2, 0.25, 0.3)[:channels],
        "crop_padding": 0,
    }
    return DataConfig(**(defaults | fields))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def bilinear(image_hwC: np.ndarray, rows: np.ndarray, columns: np.ndarray, outside: str) -> np.ndarray:
    """The image at fractional places [...], float64; outside it is `black` or the `nearest` pixel."""
    height, width = image_hwC.shape[:2]
    total = np.zeros((*rows.shape, image_hwC.shape[2]))
    for r in (np.floor(rows), np.floor(rows) + 1):
        for c in (np.floor(columns), np.floor(columns) + 1):
            weight = np.maximum(0, 1 - np.abs(rows - r)) * np.maximum(0, 1 - np.abs(columns - c))
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width) | (outside == "nearest")
            pixel = image_hwC[np.clip(r, 0, height - 1).astype(int), np.clip(c, 0, width - 1).astype(int)]
            total += np.where(inside[..., None], weight[..., None] * pixel, 0)
    return total


def normalised(images: np.ndarray, cfg: DataConfig) -> np.ndarray:
    return (images - np.array(cfg.mean)) / np.array(cfg.std)


# preprocess


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocess_normalises(channels: int) -> None:
    images, cfg = pixels(5, SIDE, SIDE, channels), config(channels)
    result = preprocess(images, cfg)
    chex.assert_shape(result, (5, SIDE, SIDE, channels))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, normalised(images / 255, cfg), atol=2e-6)


def test_preprocess_crops_the_centre_and_enlarges() -> None:
    images, cfg = pixels(2, 6, 9, 3), config()
    places = (np.arange(SIDE) + 0.5) * 6 / SIDE - 0.5
    rows, columns = np.meshgrid(places, places, indexing="ij")
    expected = [bilinear(image[:, 1:7] / 255, rows, columns, "nearest") for image in images]
    np.testing.assert_allclose(preprocess(images, cfg), normalised(np.stack(expected), cfg), atol=1e-5)


def test_preprocess_shrinks_with_antialiasing() -> None:
    images, cfg = pixels(2, 3 * SIDE, 3 * SIDE + 5, 1), config(1)
    # a triangle of half width 3 about each new pixel's centre, its weights summing to 1
    distance = np.arange(3 * SIDE)[None] + 0.5 - (np.arange(SIDE)[:, None] + 0.5) * 3
    weights = np.maximum(0, 1 - np.abs(distance) / 3)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("is,bstc,jt->bijc", weights, images[:, :, 2 : 3 * SIDE + 2] / 255, weights)
    np.testing.assert_allclose(preprocess(images, cfg), normalised(expected, cfg), atol=1e-5)


# training_images


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("side", [SIDE, 17])
def test_with_everything_off_training_is_preprocess_bit_for_bit(jit: bool, side: int) -> None:
    images, cfg = pixels(4, side, side, 3), config()

    def train(key: jax.Array, x: np.ndarray) -> jax.Array:
        return augment_and_normalise(key, x, cfg)

    def evaluate(x: np.ndarray) -> jax.Array:
        return preprocess(x, cfg)

    if jit:
        train, evaluate = jax.jit(train), jax.jit(evaluate)
    np.testing.assert_array_equal(train(jax.random.key(0), images), evaluate(images))


EVERYTHING: dict[str, Any] = {"crop_padding": 2, "crop_scale": 0.5, "flip": True, "rand_augment_ops": 2}


def test_the_key_decides() -> None:
    images, cfg = pixels(4, SIDE, SIDE, 3), config(**EVERYTHING)
    train = jax.jit(lambda key: augment_and_normalise(key, images, cfg))
    np.testing.assert_array_equal(train(jax.random.key(1)), train(jax.random.key(1)))
    assert np.all(np.any(np.asarray(train(jax.random.key(1)) != train(jax.random.key(2))), axis=(1, 2, 3)))


def test_images_of_a_batch_change_independently() -> None:
    images = np.broadcast_to(pixels(SIDE, SIDE, 3) / np.float32(255), (8, SIDE, SIDE, 3))
    for field, value in EVERYTHING.items():
        result = np.asarray(augment(jax.random.key(0), images, config(**{field: value})))
        assert len(np.unique(result.reshape(8, -1), axis=0)) > 1, field


def test_black_comes_in_before_the_normalisation() -> None:
    cfg = config(crop_padding=3)
    white = np.full((16, SIDE, SIDE, 3), 255, np.uint8)
    result = jax.jit(augment_and_normalise, static_argnums=2)(jax.random.key(0), white, cfg)
    for channel in range(3):
        values = np.unique(result[..., channel])
        expected = [(v - cfg.mean[channel]) / cfg.std[channel] for v in (0, 1)]
        np.testing.assert_allclose(values, expected, rtol=1e-5)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
def test_augment_stays_in_range(seed: int, channels: int) -> None:
    images = pixels(8, SIDE, SIDE, channels, seed=seed) / np.float32(255)
    result = augment(jax.random.key(seed), images, config(channels, **EVERYTHING, rand_augment_magnitude=10.0))
    chex.assert_shape(result, images.shape)
    assert np.all((np.asarray(result) >= 0) & (np.asarray(result) <= 1 + 1e-6))


# crops and mirroring


@pytest.mark.parametrize("fill", ["black", "mirror"])
def test_shift_is_one_of_all_shifts_of_the_padded_image(fill: str) -> None:
    count, padding = 800, 2
    image = pixels(SIDE, SIDE, 3) / np.float32(255)
    cfg = config(crop_padding=padding, crop_fill=fill)
    result = augment(jax.random.key(0), jnp.broadcast_to(image, (count, *image.shape)), cfg)
    places = np.arange(-padding, SIDE + padding)
    padded = np.zeros((SIDE + 2 * padding, SIDE + 2 * padding, 3), np.float32)
    padded[padding:-padding, padding:-padding] = image
    if fill == "mirror":
        mirrored = np.where(places < 0, -1 - places, np.where(places >= SIDE, 2 * SIDE - 1 - places, places))
        padded = image[mirrored][:, mirrored]
    seen = {
        (i, j): int(np.sum(np.all(result == padded[i : i + SIDE, j : j + SIDE], axis=(1, 2, 3))))
        for i in range(2 * padding + 1)
        for j in range(2 * padding + 1)
    }
    assert sum(seen.values()) == count
    assert all(10 < times < 60 for times in seen.values()), seen  # 32 +- 5.5 expected


def test_flip_mirrors_half_of_the_images() -> None:
    images = pixels(400, SIDE, SIDE, 1) / np.float32(255)
    result = np.asarray(augment(jax.random.key(0), images, config(1, flip=True)))
    mirrored = np.all(result == images[:, :, ::-1], axis=(1, 2, 3))
    np.testing.assert_array_equal(result[~mirrored], images[~mirrored])
    assert 150 < mirrored.sum() < 250  # 200 +- 10 expected


def test_random_square_is_a_bilinear_crop() -> None:
    count, least = 200, 0.3
    row, column = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    content = np.random.default_rng(0).random((SIDE, SIDE))
    image = np.stack([row / (SIDE - 1), column / (SIDE - 1), content], axis=-1).astype(np.float32)
    cfg = config(crop_scale=least)
    result = np.asarray(augment(jax.random.key(0), np.broadcast_to(image, (count, *image.shape)), cfg), np.float64)
    shares, corners = [], []
    for crop in result:
        # Channels 0 and 1 are ramps, so their middles tell where the crop lies; channel 2 must follow from that.
        rows, columns = crop[:, 5, 0] * (SIDE - 1), crop[5, :, 1] * (SIDE - 1)
        step = rows[6] - rows[5]
        np.testing.assert_allclose(columns[6] - columns[5], step, atol=1e-4)
        top, left = rows[5] - 5 * step, columns[5] - 5 * step  # the first new pixel's centre
        first, last = -0.5 + step / 2, SIDE - 0.5 - step / 2
        assert first - 1e-4 <= min(top, left)
        assert max(top, left) + (SIDE - 1) * step <= last + 1e-4
        steps = step * np.arange(SIDE)
        from_row, from_column = np.meshgrid(top + steps, left + steps, indexing="ij")
        np.testing.assert_allclose(crop, bilinear(image, from_row, from_column, "nearest"), atol=1e-4)
        shares.append(step**2)
        corners.append([(top - first) / (SIDE * (1 - step)), (left - first) / (SIDE * (1 - step))])
    assert least - 1e-4 <= min(shares) < 0.35
    assert 0.95 < max(shares) <= 1 + 1e-4
    assert abs(np.mean(shares) - (1 + least) / 2) < 0.06  # 5 standard errors of a uniform's mean are 0.07
    assert abs(np.mean(corners) - 0.5) < 0.07
    assert np.std(corners) > 0.2
    together = np.corrcoef(np.column_stack([shares, corners]).T) - np.eye(3)
    assert np.abs(together).max() < 0.25  # size, row and column are drawn apart; standard error 0.07


# RandAugment


def run(name: str, image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    return np.asarray(operation(jnp.asarray(image), jnp.int32(OPERATIONS.index(name)), strength, jnp.float32(sign)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", OPERATIONS[:5])
def test_geometric_operations(name: str, strength: float, sign: int) -> None:
    image = pixels(SIDE, SIDE, 3) / np.float32(255)
    row, column = np.meshgrid(*[np.arange(SIDE) - (SIDE - 1) / 2] * 2, indexing="ij")
    amount = strength * sign
    angle = amount * np.pi / 6
    from_row, from_column = {
        "rotate": (np.cos(angle) * row - np.sin(angle) * column, np.sin(angle) * row + np.cos(angle) * column),
        "shear_x": (row, column + 0.3 * amount * row),
        "shear_y": (row + 0.3 * amount * column, column),
        "translate_x": (row, column + 0.45 * SIDE * amount),
        "translate_y": (row + 0.45 * SIDE * amount, column),
    }[name]
    expected = bilinear(image, from_row + (SIDE - 1) / 2, from_column + (SIDE - 1) / 2, "black")
    np.testing.assert_allclose(run(name, image, strength, sign), expected, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("name", OPERATIONS[5:])
def test_tonal_operations(name: str, strength: float, sign: int) -> None:
    raw = pixels(SIDE, SIDE, 3) // 2 + 40  # a range that auto_contrast stretches
    raw[0, 0] = (255, 0, 128)
    image = raw / np.float32(255)
    factor = 1 + 0.9 * strength * sign
    whole = raw.astype(np.float64)
    low, high = whole.min((0, 1)), whole.max((0, 1))
    bits_gone = round(4 * strength)
    expected = {
        "identity": whole,
        "auto_contrast": (whole - low) / (high - low) * 255,
        "solarize": np.where(whole < 256 * (1 - strength), whole, 255 - whole),
        "posterize": raw >> bits_gone << bits_gone,
        "contrast": whole.mean((0, 1)) + factor * (whole - whole.mean((0, 1))),
        "brightness": whole * factor,
        "sharpness": np.asarray(ImageEnhance.Sharpness(Image.fromarray(raw)).enhance(factor)),
        "colour": np.asarray(ImageEnhance.Color(Image.fromarray(raw)).enhance(factor)),
    }[name]
    tolerance = 2.0 if name in ("sharpness", "colour") else 1e-2  # Pillow rounds, twice
    result = run(name, image, strength, sign) * 255
    if name == "sharpness":  # Pillow leaves the outermost pixels alone
        result, expected = result[1:-1, 1:-1], expected[1:-1, 1:-1]
    np.testing.assert_allclose(result, np.clip(expected, 0, 255), atol=tolerance)


def test_identity_is_exact_and_flat_images_survive_auto_contrast() -> None:
    image = pixels(SIDE, SIDE, 1) / np.float32(255)
    np.testing.assert_array_equal(run("identity", image, 1.0, 1), image)
    flat = np.full((SIDE, SIDE, 3), 0.3, np.float32)
    np.testing.assert_array_equal(run("auto_contrast", flat, 1.0, 1), flat)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_draws_every_operation_equally_often_in_both_directions(channels: int) -> None:
    names = [name for name in OPERATIONS if channels == 3 or name != "colour"]
    count, image = 60 * len(names), pixels(SIDE, SIDE, channels) / np.float32(255)
    cfg = config(channels, rand_augment_ops=1, rand_augment_magnitude=7.0)
    result = np.asarray(augment(jax.random.key(0), np.broadcast_to(image, (count, *image.shape)), cfg))
    both = (*OPERATIONS[:5], "contrast", "brightness", "sharpness", "colour")
    found = 0
    for name in names:
        signs = (1, -1) if name in both else (1,)
        times = [int((np.abs(result - run(name, image, 0.7, s)).max((1, 2, 3)) < 1e-5).sum()) for s in signs]
        assert 30 < sum(times) < 95, (name, times)  # 60 +- 7.5 expected
        assert min(times) > 10, (name, times)
        found += sum(times)
    assert found == count


def test_rand_augment_composes_its_operations() -> None:
    image = pixels(SIDE, SIDE, 1) / np.float32(255)
    cfg = config(1, rand_augment_ops=2, rand_augment_magnitude=7.0)
    result = np.asarray(augment(jax.random.key(3), np.broadcast_to(image, (20, *image.shape)), cfg))
    once = [run(name, image, 0.7, sign) for name in OPERATIONS[:-1] for sign in (1, -1)]
    twice = np.stack([run(name, x, 0.7, sign) for x in once for name in OPERATIONS[:-1] for sign in (1, -1)])
    for changed in result:
        assert np.abs(twice - changed).max((1, 2, 3)).min() < 1e-4
    assert any(np.abs(np.stack(once) - changed).max((1, 2, 3)).min() > 0.01 for changed in result)


# mixup


def test_mixup_is_linear_in_images_and_targets_alike() -> None:
    count, classes = 9, 9
    images = np.random.default_rng(0).standard_normal((count, 4, 4, 3)).astype(np.float32)
    targets = np.eye(classes, dtype=np.float32)
    mixed, soft = mixup(jax.random.key(0), images, targets, 0.8)
    share = np.diag(soft).astype(np.float64)  # but for the middle image, which is its own partner
    for i in range(count):
        partner = count - 1 - i
        expected = images[i] if i == partner else share[i] * images[i] + (1 - share[i]) * images[partner]
        np.testing.assert_allclose(mixed[i], expected, atol=1e-5)
        np.testing.assert_allclose(soft[i, partner], 1 if i == partner else 1 - share[i], atol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    assert len(np.unique(share)) == count  # one lambda for each image


@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_mixup_shares_follow_beta(alpha: float) -> None:
    _, soft = mixup(jax.random.key(0), jnp.zeros((2000, 1, 1, 1)), jnp.eye(2000), alpha)
    share = np.diag(soft)
    assert np.all((share >= 0) & (share <= 1))
    assert abs(share.mean() - 0.5) < 0.05
    np.testing.assert_allclose(share.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.15)
