"""Model FLOPs against XLA's own count, and the share of a peak."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from builders import tiny_config

from headsteer_jax.config import Config, DataConfig, MachineConfig, ModelConfig
from headsteer_jax.model.macs import PEAKS, count_open_macs, peak_tflops, training_flops, training_speed
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime.mesh import training_mesh


def config(patch: int, **fields: object) -> Config:
    data = DataConfig(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Config(data=data, model=ModelConfig(depth=3, width=192, heads=3, patch=patch, **fields))  # type: ignore[arg-type]


def count_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """Let XLA's compiler for CPUs count: on a GPU it counted 0.815 of `training_flops`."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("patch", "registers"), [(8, 0), (4, 0), (8, 4)])
def test_forward_flops_are_xlas(patch: int, registers: int) -> None:
    """XLA counts the element-wise work as well: a few per cent."""
    c = config(patch, registers=registers)
    model = build_model(c, 100)
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    counted = count_flops(lambda p, x: model.apply(p, x)[0], params, images) / 8
    assert 1.0 < counted / (2 * count_open_macs(c, 100)) < 1.06


def test_training_flops_are_xlas() -> None:
    c = config(8)
    model = build_model(c, 100)
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    counted = count_flops(jax.grad(lambda p, x: model.apply(p, x)[0].sum()), params, images) / 8
    # three times the forward pass, but for the first layer's: no gradient by the image is needed
    assert 0.95 < counted / training_flops(c, 100) < 1.06


def test_by_hand() -> None:
    """ViT-S at 17 tokens, layer by layer."""
    c = Config(data=DataConfig(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),
               model=ModelConfig.of_size("S", patch=8))  # fmt: skip
    T, D = 17, 384
    whole = 2 * (4 * T * D * D + 2 * T * T * D + 8 * T * D * D)
    last = 2 * (2 * D * D + 2 * T * D * D + 2 * T * D + 8 * D * D)
    assert 2 * count_open_macs(c, 100) == 11 * whole + last + 2 * (16 * 192 * D + 11 * 6 * D + 100 * D)


def test_speed() -> None:
    c = tiny_config()
    found, tflops = training_speed(c, 100, 1000.0, training_mesh(c.machine)), 1000 * training_flops(c, 100) / 1e12
    peak = peak_tflops(c, jax.devices()[0])  # None on a CPU
    assert found == {"images_per_second": 1000.0, "tflops_per_device": pytest.approx(tflops)} | (
        {"mfu": pytest.approx(tflops / peak)} if peak else {}
    )
    c = c.model_copy(update={"machine": MachineConfig(peak_tflops=0.5)})
    assert training_speed(c, 100, 1000.0, training_mesh(c.machine))["mfu"] == pytest.approx(
        found["tflops_per_device"] / 0.5
    )


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "peak"),
    [
        ("TPU v5 lite", "tpu", "float32", 197),
        ("TPU v5p", "tpu", "bfloat16", 459),
        ("TPU v6 lite", "tpu", "bfloat16", 918),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "gpu", "bfloat16", 756),
        ("NVIDIA A100-SXM4-40GB", "gpu", "float32", 156),
        ("cpu", "cpu", "float32", None),
    ],
)
def test_peaks(kind: str, platform: str, dtype: str, peak: float | None) -> None:
    class Device:
        device_kind = kind

    Device.platform = platform  # type: ignore[attr-defined]
    c = Config(model=ModelConfig(dtype=dtype))  # type: ignore[arg-type]
    assert peak_tflops(c, Device()) == peak  # type: ignore[arg-type]
    assert len(PEAKS) == len(set(PEAKS))
