"""The paper's experiment [LH26] at CIFAR-100's own size, 32x32: a pretrained ViT-S through TFDS.

It is cifar100_vit_s.py with 65 tokens instead of 197, a third of the work: 4x4 patches, for which the backbone's patch
embedding and positions are resampled. k is 32, and steering is *delta*, as in the other configs. The recipe is that of
tiny_imagenet100_vit_s.py with more steps. It has not been run, because we had no network.
"""

from headsteer_jax.config import (
    Config,
    DataConfig,
    GateConfig,
    ModelConfig,
    PhaseConfig,
    SAEConfig,
    SteerConfig,
    TrainConfig,
)

STEPS_PER_EPOCH = 45_000 // 256  # a tenth of train is the validation split


def get_config() -> Config:
    """Return the experiment's config."""
    return Config(
        data=DataConfig(
            source="tfds",
            name="cifar100",
            image_size=32,
            channels=3,
            mean=(0.5, 0.5, 0.5),  # the AugReg backbones expect these
            std=(0.5, 0.5, 0.5),
            crop_padding=4,
            flip=True,
        ),
        model=ModelConfig.of_size(
            "S", patch=4, dtype="bfloat16", pretrained="hf://timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
        ),
        # [LH26] starts from usages of 0.7 to 0.9
        gate=GateConfig(target=0.8, noise=0.3, loss="squared", weight=10.0, anneal=0.5, learning_rate_scale=5.0),
        train=TrainConfig(
            batch=256,
            dense=PhaseConfig(steps=20 * STEPS_PER_EPOCH, learning_rate=1e-4),
            gated=PhaseConfig(steps=10 * STEPS_PER_EPOCH, learning_rate=1e-4),
            eval_every=500,
        ),
        sae=SAEConfig(expansion=8, k=32, epochs=100),  # 384 -> 3072 latents and 100 epochs as in [LH26]
        steer=SteerConfig(latents=16),
    )
