"""ViT-S on 100 classes of photographs, 32x32, from a prepared TFDS directory (array_record; nothing is downloaded).

8x8 patches make 17 tokens: about 84 images/s in training on two cores. Start from a pretrained backbone:
--config.data.path=DIR --config.model.pretrained=vit_small_patch14.safetensors
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

STEPS_PER_EPOCH = 45_000 // 128


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="tfds",
            name="tiny_imagenet100",
            path="../shared/data",
            image_size=32,
            channels=3,
            mean=(0.485, 0.456, 0.406),  # ImageNet's, which pretrained backbones expect
            std=(0.229, 0.224, 0.225),
            crop_padding=4,
            flip=True,
        ),
        model=ModelConfig.of_size("S", patch=8),
        gate=GateConfig(target=0.75),
        train=TrainConfig(
            batch=128,
            dense=PhaseConfig(steps=round(1.5 * STEPS_PER_EPOCH), learning_rate=1.5e-4),
            gated=PhaseConfig(steps=round(0.9 * STEPS_PER_EPOCH), learning_rate=1.5e-4),
            dense_control=False,  # it would take another third of the time
            steps_per_call=10,
            eval_every=100,
        ),
        sae=SAEConfig(expansion=8, k=32, epochs=100),
        steer=SteerConfig(latents=16),
    )
