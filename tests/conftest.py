"""A small model and its data, made once for all tests that need one."""

import atexit
import os
import shutil
import tempfile

# Programs that several tests (or the processes they start) run are compiled once: set before JAX is imported.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the worker processes share their parent's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="headsteer-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest

from headsteer_jax.config import (
    Config,
    DataConfig,
    GateConfig,
    LayersConfig,
    ModelConfig,
    PhaseConfig,
    ReportConfig,
    SAEConfig,
    SteerConfig,
    TrainConfig,
)
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.vit import build_model


def tiny_config(**gate: object) -> Config:
    """Three layers of three heads on 8x8 images; every number small."""
    return Config(
        data=DataConfig(image_size=8, crop_padding=1, train_per_class=4, eval_per_class=2),
        model=ModelConfig(patch=4, depth=3, width=24, heads=3),
        gate=GateConfig(bias=0.0, **gate),  # type: ignore[arg-type]
        train=TrainConfig(
            batch=16,
            dense=PhaseConfig(steps=8),
            gated=PhaseConfig(steps=8),
            steps_per_call=2,
            eval_every=4,
            eval_batch=50,
        ),
        sae=SAEConfig(expansion=2, k=4, seeds=2, epochs=4, batch=64, dead_window=1),
        steer=SteerConfig(latents=3, alphas=(-1.0, 0.0, 0.5, 2.0), bootstrap=50, chunk=64),
        layers=LayersConfig(epochs=3, alphas=(2.0,), per_class=1),
        report=ReportConfig(top_classes=3, top_latents=2, top_images=3, dpi=60),
    )


CLASSES = 7


@pytest.fixture(scope="session")
def split() -> Split:
    """90 images of 8x8 in CLASSES classes."""
    rng = np.random.default_rng(3)
    return Split(rng.integers(0, 256, (90, 8, 8, 1), dtype=np.uint8), (np.arange(90) % CLASSES).astype(np.int32))


def random_params(config: Config, classes: int, seed: int = 0) -> object:
    """Parameters that are nowhere 0, so that nothing drops out of a comparison."""
    side = config.data.image_size
    params = build_model(config, classes).init(
        jax.random.key(seed), np.zeros((1, side, side, config.data.channels), np.float32)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), params)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """[5, 8, 8, 1] normalised images."""
    return np.random.default_rng(7).standard_normal((5, 8, 8, 1)).astype(np.float32)
