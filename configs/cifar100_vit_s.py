"""The paper's experiment [LH26]: ViT-S (12 layers, 6 heads, width 384) on CIFAR-100 through TFDS, 32x32, 4x4 patches.

The first run downloads and prepares CIFAR-100, which needs the extra `prepare` (TensorFlow); later ones need none.
For the paper's ImageNet-pretrained start, name a timm checkpoint: --config.model.pretrained=vit_small.safetensors
Wants a GPU or a TPU: about 65 tokens, 60 epochs.
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

STEPS_PER_EPOCH = 45_000 // 256  # after a tenth of train is cut off for validation


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="tfds",
            name="cifar100",
            image_size=32,
            channels=3,
            mean=(0.507, 0.487, 0.441),  # CIFAR-100's training pixels
            std=(0.267, 0.256, 0.276),
            crop_padding=4,
            flip=True,
        ),
        model=ModelConfig.of_size("S", patch=4, dtype="bfloat16"),
        gate=GateConfig(target=0.8),  # [LH26] starts from usages of 0.7 to 0.9
        train=TrainConfig(
            batch=256,
            dense=PhaseConfig(steps=40 * STEPS_PER_EPOCH, learning_rate=3e-4),
            gated=PhaseConfig(steps=20 * STEPS_PER_EPOCH, learning_rate=1e-4),
            mixup=0.2,
            eval_every=500,
        ),
        sae=SAEConfig(expansion=8, k=32, epochs=100),  # 384 -> 3072 and 100 epochs as in [LH26]; k is not known
        steer=SteerConfig(latents=16),
    )
