"""Decides whether a pass over a split skips what the gates drop, by a cost model without a clock.

The same config, parameters and images on the same kind of machine always decide alike, so a pass repeats its bits.
"""

from typing import NamedTuple

import jax

from headsteer_jax.config.schema import Config
from headsteer_jax.model.macs import count_dense_macs

SAMPLE = 64  # images whose gates decide


class SkipCosts(NamedTuple):
    """Holds what the cost model knows of a kind of device."""

    macs_per_second: float  # of the dense model
    relative_time: float  # of a multiply-accumulate in the skipping pass, over one in the dense model
    compile_seconds: float  # of the skipping pass, more than of the masked one


COSTS = {
    # Two cores, ViT-S: the rate is that of benchmarks/train.py on a slow machine. With half of the tokens dropped,
    # benchmarks/skip.py took 1.09 to 1.2 times what the MACs allow at 65 tokens, 0.85 times at 197, and a trained model
    # at 17 tokens 1.16 times; compiling took 15 s on a machine twice as fast.
    "cpu": SkipCosts(3.3e10, 1.15, 40.0),
    # Estimates, not measurements: a fraction of the vendors' peaks, and large losses, as loops wait for the device.
    "gpu": SkipCosts(1e14, 1.5, 120.0),
    "tpu": SkipCosts(5e13, 1.5, 120.0),
}


def can_skip(config: Config, devices: int) -> bool:
    """Return whether a pass may skip: on one device, with gates of sublayers or tokens, unless machine.skip forbids."""
    skippable = {"sublayers", "tokens"} & set(config.gate.kinds)
    return bool(skippable) and config.machine.skip != "never" and devices == 1


class PassSeconds(NamedTuple):
    """Holds how long a pass over images is predicted to take."""

    masked: float  # all of it runs, and is multiplied by 0 where it is dropped
    skipping: float  # with a share of the time that compiling takes


def predict_seconds(config: Config, classes: int, images: int, share: float, passes: int = 1) -> PassSeconds:
    """Predict the seconds of a pass over images, beyond what both forms of it take.

    Args:
      share: the images' mean MACs, divided by the dense model's.
      passes: how many such passes share the time that compiling takes.
    """
    costs = COSTS.get(jax.default_backend(), COSTS["gpu"])
    masked = images * count_dense_macs(config, classes) / costs.macs_per_second
    return PassSeconds(masked, masked * costs.relative_time * share + costs.compile_seconds / passes)
