"""Autoencoders of several k and learning rates, trained together as one program."""

import numpy as np

from headsteer_jax.config.schema import SAEConfig
from headsteer_jax.sae.train import Members


def grid_members(c: SAEConfig, ks: tuple[int, ...], rates: tuple[float, ...], count: int) -> Members:
    """Every k with every learning rate, `count` seeds each; seed s begins alike in all of them."""
    k, rate, seed = (axis.ravel() for axis in np.meshgrid(ks, rates or (c.learning_rate,), range(count), indexing="ij"))
    number = seed.astype(np.int32)
    return Members(k.astype(np.int32), rate.astype(np.float32), number, number)
