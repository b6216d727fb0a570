"""The default experiment: two handwritten digits on a canvas, 100 classes. It takes some minutes on two CPU cores.

The mean over training seeds 0 to 4: the gated model's accuracy on test is 86.3%, and 0.881 of the last layer's heads
run; with all of them off, accuracy is 78.6%. Class steering lowers the usage to 0.617 at 85.9%, gate-aligned steering
to 0.275 at 86.2%. The nine claims of the paper and on further strategies hold on four of these seeds (on seed 2, four
of them do); the recipe was chosen on seeds 5 to 9. Another CPU rounds differently and trains a different model.
"""

from headsteer_jax.config import (
    Config,
    DataConfig,
    GateConfig,
    LayersConfig,
    ModelConfig,
    PhaseConfig,
    SAEConfig,
    SteerConfig,
    TrainConfig,
)

# [LH26]'s and its controls, ours, and the same two found without an autoencoder
STRATEGIES = (
    "class", "global", "random", "matched_random", "gate_aligned", "mean_difference", "gate_bias",
)  # fmt: skip


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
        # With four blocks, accuracy depends so much on the last block's heads that none can be spared; with wider MLPs
        # the last block does not matter. Therefore there are five thin blocks.
        model=ModelConfig(patch=4, depth=5, width=96, heads=6, mlp_ratio=1),
        gate=GateConfig(target=0.88),  # class steering tends to a usage of about 0.55, wherever it starts
        train=TrainConfig(
            batch=128,
            # With 1e-3 or 5e-3 a model of this size learns several times more slowly. With 1200 and 600 steps its
            # accuracy is 94%, but then strategies differ too little for 10,000 test images to tell.
            dense=PhaseConfig(steps=750, learning_rate=2e-3),
            gated=PhaseConfig(steps=400, learning_rate=2e-3),
            eval_every=400,  # to save time
            eval_batch=250,  # on a CPU twice as fast as 1000: the activations stay in its cache
        ),
        # 16 active latents separate the classes better than more do. Five seeds: with three, the worst of them is drawn
        # three times in 4% of the resamplings, and an interval of 95% is as wide as all seeds.
        sae=SAEConfig(expansion=8, k=16, epochs=9, batch=1024, learning_rate=1e-3, seeds=5),
        steer=SteerConfig(
            strategies=STRATEGIES,
            latents=8,  # at equal usage, 16 cost more accuracy
            alphas=(-4, -2, -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16),
            evidence=100,  # of each class; there are as many validation images
            tolerance=0.005,  # on validation
            allowed_loss=0.01,  # on test, with its interval
        ),
        layers=LayersConfig(epochs=4, alphas=(1, 2, 4, 8), per_class=10),
    )
