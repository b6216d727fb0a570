"""AdaViT with one budget on the default data: two handwritten digits on a canvas that is mostly empty, 100 classes.

The gates of patches, heads and sublayers share a budget of 39% of the dense model's multiply-accumulates, and the dense
phase's model teaches the gated one. Data and model are those of double_digits.py. The dense phase is half as long
again: after the shorter one the dense control still gained 2 points, and the gated models that we tried did not.

Measured with one seed, where the dense phase was 1200 steps and then 600 with a learning rate that began anew: 93.9% on
test at 38.3% of the multiply-accumulates, against 94.4% for the dense control. 36% of the patches are kept, from 51% in
the first layer to 23% in the last; 43% of the patches have any ink.
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


def get_config() -> Config:
    """Return the experiment's config."""
    return Config(
        data=DataConfig(
            source="double_digits",
            image_size=20,
            channels=1,
            mean=(0.1,),  # roughly that of the canvases' pixels
            std=(0.25,),
            train_per_class=800,
            crop_padding=0,  # canvases are placed at random already
        ),
        model=ModelConfig(patch=4, depth=5, width=96, heads=6, mlp_ratio=1),
        gate=GateConfig(
            kinds=("heads", "sublayers", "tokens"),
            budget=0.39,  # the share on test comes out 0.005 above it
            loss="squared",  # with this weight as accurate as the absolute form, and steadier
            weight=40.0,
            anneal=0.45,
            learning_rate_scale=4.0,
            teacher_logits=2.0,
            teacher_temperature=2.0,
        ),
        train=TrainConfig(
            batch=128,
            dense=PhaseConfig(steps=1800, learning_rate=2e-3),
            gated=PhaseConfig(steps=600, learning_rate=2e-3),
            eval_every=300,
            eval_batch=250,
        ),
        sae=SAEConfig(expansion=8, k=16, epochs=9, batch=1024, learning_rate=1e-3),
        steer=SteerConfig(
            latents=16,
            alphas=(-4, -2, -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16),
            tolerance=0.005,
        ),
    )
