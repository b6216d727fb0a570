"""Small configs, images, models, autoencoders and steerings that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config import (
    Config,
    DataConfig,
    GateConfig,
    LayersConfig,
    MachineConfig,
    ModelConfig,
    PhaseConfig,
    ReportConfig,
    SAEConfig,
    SteerConfig,
    TrainConfig,
)
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.vit import TrainedModel, build_model
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling
from headsteer_jax.steer.flips import gate_effect
from headsteer_jax.steer.steering import Steering
from headsteer_jax.steer.strategies import Choice
from headsteer_jax.steer.sweep import SplitSweep, bound_logits, gate_jacobian, make_split_sweep
from headsteer_jax.steer.table import compile_table_program, fill_table

CLASSES = 7


def tiny_config(**gate: object) -> Config:
    """Make a config of three layers of three heads on 8x8 images, with small numbers everywhere."""
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
        steer=SteerConfig(latents=3, alphas=(-1.0, 0.0, 0.5, 2.0), bootstrap=50),
        layers=LayersConfig(epochs=3, alphas=(2.0,), per_class=1),
        report=ReportConfig(top_classes=3, top_latents=2, top_images=3, dpi=60),
        machine=MachineConfig(sweep_chunk=64),
    )


def sae_config(**fields: object) -> Config:
    """Make tiny_config with these fields in its section `sae`."""
    config = tiny_config()
    return config.model_copy(update={"sae": config.sae.model_copy(update=fields)})


def steer_config(
    *, chunk: int = 64, memory: int | None = None, gate: dict[str, object] | None = None, **steer: object
) -> Config:
    """Make tiny_config with these fields in its section `steer`, and the sweep's chunk and memory in `machine`."""
    config = tiny_config(**(gate or {}))
    machine = {"sweep_chunk": chunk} | ({} if memory is None else {"sweep_memory": memory})
    return config.model_copy(
        update={
            "steer": config.steer.model_copy(update=steer),
            "machine": config.machine.model_copy(update=machine),
        }
    )


def random_params(config: Config, classes: int, seed: int = 0) -> object:
    """Make parameters that are nowhere 0, so that none drops out of a comparison."""
    side = config.data.image_size
    image = np.zeros((1, side, side, config.data.channels), np.float32)
    params = jax.jit(build_model(config, classes).init)(jax.random.key(seed), image)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)), params
    )


def blobs(count: int, seed: int) -> Split:
    """Make images of three classes, each of which has another bright quarter."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3).astype(np.int32)
    images = rng.integers(0, 120, (count, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 100
    return Split(images, labels)


def concepts(count: int, D: int, rng: np.random.Generator) -> np.ndarray:
    """Make residuals that are sparse sums of 12 directions."""
    directions = rng.standard_normal((12, D))
    active = rng.random((count, 12)) < 0.2
    return ((active * rng.uniform(1, 2, active.shape)) @ directions).astype(np.float32)


def random_sae(seed: int, D: int = 6, F: int = 10) -> SAEWeights:
    """An autoencoder of D -> F whose decoder has rows of length 1."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((F, D))
    parts = (
        rng.standard_normal((F, D)),
        rng.standard_normal(F) * 0.1,
        rows / np.linalg.norm(rows, axis=1, keepdims=True),
        rng.standard_normal(D) * 0.1,
        rng.uniform(0.0, 1.0, F),
    )
    return SAEWeights(*(jnp.asarray(part, jnp.float32) for part in parts))


def setting(seed: int = 0, weights: tuple[float, float] = (0.5, 2.0)) -> Steering:
    """An autoencoder of 24 -> 48 with k = 4, scaling, strengths, and a choice of three latents for each class."""
    rng = np.random.default_rng(seed)
    weights_24 = random_sae(seed, 24, 48)
    scaling = Scaling(rng.standard_normal(24).astype(np.float32), np.float32(0.7))
    strength = rng.uniform(0.5, 2, 48).astype(np.float32)
    latents = np.stack([rng.choice(48, 3, replace=False) for _ in range(CLASSES)]).astype(np.int32)
    choice = Choice(latents, rng.uniform(*weights, latents.shape).astype(np.float32))
    return Steering(Autoencoder(weights_24, scaling, 4), strength, choice)


def trained_model(config: Config, classes: int = CLASSES, seed: int = 0) -> TrainedModel:
    """A model with random parameters."""
    return TrainedModel(config, build_model(config, classes), random_params(config, classes, seed))


def split_sweep(config: Config, split: Split, weights: tuple[float, float]) -> tuple[SplitSweep, TrainedModel, list]:
    """Two autoencoders and four strategies, on a split of which some predictions are wrong.

    Two strategies choose latents, of different number; one has directions, and one chooses latents for each image.
    """
    trained = trained_model(config)
    table = fill_table(compile_table_program(trained, split), trained.params, split, "table")
    steered = []
    for seed in (0, 10):
        first, other = setting(seed, weights), setting(seed + 1, weights)
        second = Steering(first.sae, other.strength, Choice(other.choice.latents[:, :2], other.choice.weights[:, :2]))
        rng = np.random.default_rng(seed)
        classes, width = len(first.choice.latents), config.model.width
        none = np.zeros((classes, 0))
        directions = rng.standard_normal((classes, width)).astype(np.float32)
        third = first._replace(choice=Choice(none.astype(np.int32), none.astype(np.float32), directions))
        by_image = rng.permuted(np.arange(len(split.labels)) % classes)
        fourth = first._replace(choice=Choice(first.choice.latents[by_image], first.choice.weights[by_image]))
        steered.append([first, second, third, fourth])
    kernel = gate_jacobian(trained, table.x)
    effects = [gate_effect(row[0].sae.decoder, kernel, 3) for row in steered]
    size = bound_logits(trained, table.x)
    labels = np.where(np.arange(90) % 3, table.prediction, split.labels).astype(np.int32)  # some right, some wrong
    job = make_split_sweep("test", Split(split.images, labels), table, steered, 0, np.asarray(size), frozenset({3}))
    return job, trained, effects
