"""The paper's experiment [LH26]: a pretrained ViT-S (12 layers, 6 heads, width 384) on CIFAR-100 through TFDS, 32x32.

The first run downloads CIFAR-100 (extra `prepare`, TensorFlow) and the backbone (extra `hub`); later ones need neither.
To train from scratch, pass --config.model.pretrained= ; to start from a local file, pass
--config.model.pretrained=vit_small.safetensors. With 4x4 patches there are 65 tokens, which need a GPU or a TPU. The
recipe is that of tiny_imagenet100_vit_s.py with more steps. It has not been run, because we had no network.
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
        sae=SAEConfig(
            expansion=8, k=32, epochs=100
        ),  # 384 -> 3072 and 100 epochs as in [LH26], which does not report k
        steer=SteerConfig(latents=16),
    )
