"""The multiply-accumulates (MACs) and the parameters of a deployed model.

Only matrix products count, as in `headsteer_jax.model.macs`. Of a dynamic model everything counts as running.
"""

import jax
import numpy as np

from headsteer_jax.deploy.model import DeployedConfig, Params


def count_attention_macs(config: DeployedConfig, layer: int, heads: int) -> int:
    """Count the MACs of a layer's attention with some heads."""
    width, tokens = config.model.width, count_tokens(config)
    queries = 1 if layer == config.depth - 1 else tokens
    used = heads * config.head_width
    return width * used * (queries + 2 * tokens) + 2 * queries * tokens * used + queries * used * width


def count_mlp_macs(config: DeployedConfig, layer: int, neurons: int) -> int:
    """Count the MACs of a layer's MLP with some neurons."""
    queries = 1 if layer == config.depth - 1 else count_tokens(config)
    return 2 * queries * config.model.width * neurons


def count_fixed_macs(config: DeployedConfig) -> int:
    """Count the MACs outside of the layers: of the patches' embedding and the classifier."""
    patch = config.model.patch**2 * config.data.channels
    return config.patches * patch * config.model.width + config.model.width * len(config.classes)


def count_macs(config: DeployedConfig) -> int:
    """Count the MACs of an image."""
    layers = enumerate(zip(config.heads, config.neurons, strict=True))
    return count_fixed_macs(config) + sum(
        count_attention_macs(config, layer, heads) + count_mlp_macs(config, layer, neurons)
        for layer, (heads, neurons) in layers
    )


def count_tokens(config: DeployedConfig) -> int:
    """Count the tokens of an image, T."""
    return config.patches + 1 + config.model.registers


def count_parameters(params: Params) -> int:
    """Count the numbers that a model holds."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
