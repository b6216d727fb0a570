"""How much a sweep takes at once: the config's figures, or those of the kind of device."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from headsteer_jax.config import Config, DataConfig, MachineConfig, ModelConfig
from headsteer_jax.model.call_limits import CallLimits, choose_call_limits
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime.mesh import local_mesh


def attach(memory: int | None, platform: str = "gpu") -> Any:
    """Make a stand-in for a mesh of one accelerator, with so many bytes; None: it is described, not attached."""

    def memory_stats() -> dict[str, int]:
        if memory is None:
            raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices.")
        return {"bytes_limit": memory}

    device: Any = SimpleNamespace(platform=platform, memory_stats=memory_stats)
    return SimpleNamespace(devices=np.array([[device]]))


@pytest.mark.parametrize(
    ("width", "patch", "images"),
    [(384, 8, 100), (96, 8, 250), (384, 4, 26), (65_536, 1, 1)],  # 17 tokens, 17, 65 and 1,025
)
def test_a_cpus_images_follow_from_the_model(width: int, patch: int, images: int) -> None:
    data = DataConfig(source="npz", path="x", image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = build_model(Config(data=data, model=ModelConfig(width=width, patch=patch, heads=2, depth=2)), 2)
    assert choose_call_limits(model, MachineConfig(), local_mesh()) == CallLimits(images, 1024)
    assert images == 1 or images == 250 or images * width * model.positions_count <= 655_360
    stated = MachineConfig(sweep_chunk=7, sweep_memory=9)
    assert choose_call_limits(model, stated, local_mesh()) == CallLimits(7, 9)


@pytest.mark.parametrize(
    ("mesh", "limits"),
    [
        (attach(16 * 2**30, "tpu"), CallLimits(1000, 6144)),
        (attach(None, "tpu"), CallLimits(1000, 6144)),
        (attach(80 * 2**30), CallLimits(1000, 6144)),
        (attach(8 * 2**30), CallLimits(1000, 3072)),
    ],
)
def test_an_accelerator_takes_more(mesh: Any, limits: CallLimits) -> None:
    model = build_model(Config(), 2)
    assert choose_call_limits(model, MachineConfig(), mesh) == limits
    assert choose_call_limits(model, MachineConfig(sweep_chunk=7, sweep_memory=9), mesh) == CallLimits(7, 9)
