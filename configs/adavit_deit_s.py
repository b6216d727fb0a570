"""[AdaViT]'s setting, Ada-DeiT-S: the published DeiT-S on ImageNet through TFDS, 224 pixels, with gates of all kinds.

Each kind has its own target, 1/2, and everything about the gates is as in the released code: they start at 1/2 and are
not annealed, patches are kept above 0.6, and a closed head's share of the MLP's input goes with it. The recipe of the
optimizer is ours. To train on one budget with a teacher instead, pass --config.gate.budget=0.5
--config.train.dense.steps=50000 --config.gate.teacher_logits=1.

ImageNet must be in TFDS (imagenet2012), which cannot download it by itself, and 197 tokens need a GPU or a TPU. The
first run downloads the backbone (extra `hub`). [AdaViT] reports 77.3% at half the MACs of DeiT-S, which has 79.8%. This
config has not been run, because we had neither the data nor the time.
"""

from headsteer_jax.config import (
    Config,
    DataConfig,
    GateConfig,
    ModelConfig,
    PhaseConfig,
    SAEConfig,
    SteerConfig,
    SublayerGateConfig,
    TokenGateConfig,
    TrainConfig,
)

STEPS_PER_EPOCH = 1_281_167 // 1024


def get_config() -> Config:
    """Return the experiment's config."""
    return Config(
        data=DataConfig(
            source="tfds",
            name="imagenet2012",
            splits=("train", "validation"),  # the test split has no labels: validation is cut from train
            validation_fraction=0.02,
            image_size=224,
            channels=3,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop_padding=0,
            crop_scale=0.25,
            flip=True,
            rand_augment_ops=2,
        ),
        model=ModelConfig.of_size(
            "S", patch=16, dtype="bfloat16", pretrained="hf://timm/deit_small_patch16_224.fb_in1k", pretrained_head=True
        ),
        gate=GateConfig(
            kinds=("heads", "sublayers", "tokens"),
            dropped="slice",
            bias=0.0,
            temperature=5.0,
            target=0.5,
            scope="mean",
            running_only=True,
            weight=2.0,
            anneal=0.0,
            noise=1.0,
            sublayers=SublayerGateConfig(bias=0.0, temperature=5.0, target=0.5),
            tokens=TokenGateConfig(bias=0.0, temperature=5.0, threshold=0.6, target=0.5, loss="squared"),
        ),
        train=TrainConfig(
            batch=1024,
            dense=PhaseConfig(steps=0, learning_rate=1e-4),  # the backbone is trained already
            gated=PhaseConfig(steps=30 * STEPS_PER_EPOCH, learning_rate=1e-4),
            dense_control=False,
            mixup=0.2,
            eval_every=1250,
        ),
        sae=SAEConfig(expansion=8, k=32, epochs=10),
        steer=SteerConfig(latents=16),
    )
