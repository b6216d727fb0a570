"""The decision network that switches attention heads on and off, and the loss that limits their usage [AdaViT]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from headsteer_jax.config.schema import GateConfig


class Gate(nn.Module):
    """A layer's decision network, `m = W x_cls + b`, in float32 whatever the model computes in.

    Without LayerNorm the logit is affine in x. The initial bias opens the gates, and W starts small, so that they open
    for every image.
    """

    heads: int  # H
    config: GateConfig
    layer_norm_epsilon: float

    @nn.compact  # type: ignore[untyped-decorator]  # mypy reads flax as Any
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """Compute the gate logits m: [B, D] CLS residual -> [B, H] float32."""
        x_BD = x_BD.astype(jnp.float32)
        if self.config.layer_norm:
            x_BD = nn.LayerNorm(epsilon=self.layer_norm_epsilon, name="norm")(x_BD)
        return nn.Dense(
            self.heads,
            kernel_init=nn.initializers.truncated_normal(0.02),
            bias_init=nn.initializers.constant(self.config.bias),
            precision=jax.lax.Precision.HIGHEST,  # a decision must not turn on an accelerator's rounding
            name="linear",
        )(x_BD)


def threshold(m_BH: jax.Array) -> jax.Array:
    """Compute the deterministic gate of evaluation, `g = 1[m > 0]`, as float32 0 or 1."""
    return (m_BH > 0).astype(jnp.float32)


def logistic_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard logistic noise: the difference of two Gumbel variables, so that adding it samples the gate."""
    return jax.random.logistic(key, shape, jnp.float32)


def straight_through(m_BH: jax.Array, noise_BH: jax.Array, temperature: float) -> jax.Array:
    """Compute the Gumbel-sigmoid gate of training [AdaViT]: `g = 1[sigmoid((m + noise) / tau) > 1/2]`.

    Its value is 0 or 1, and its gradient is the sigmoid's (straight-through). With noise 0 the value equals
    `threshold`.

    Args:
      m_BH: [B, H] gate logits.
      noise_BH: [B, H] logistic noise, already scaled.
      temperature: tau.
    """
    soft_BH = jax.nn.sigmoid((m_BH + noise_BH) / temperature)
    hard_BH = threshold(m_BH + noise_BH)  # sigmoid(a / tau) > 1/2 exactly where a > 0
    return hard_BH + (soft_BH - jax.lax.stop_gradient(soft_BH))  # the bracket is exactly 0


def usage_loss(g_BAH: jax.Array, target: jax.Array | float, config: GateConfig) -> jax.Array:
    """Compute the usage loss, before its weight: |mean(g) - target| or its square.

    Args:
      g_BAH: [B, A, H] gates of the A gated layers.
      target: the share of heads to keep at this step.

    Returns:
      A scalar: the mean of the layers' terms (`scope="layer"`), or one term for the mean over all heads.
    """
    axes = (0, 2) if config.scope == "layer" else (0, 1, 2)
    gap = jnp.mean(g_BAH, axis=axes) - target
    return jnp.mean(jnp.abs(gap) if config.loss == "absolute" else gap**2)


def anneal(config: GateConfig, progress: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Compute the noise scale and the usage target at a share `progress` of the gated phase.

    In the first `config.anneal` of the phase both change linearly: the noise to 0, the target from 1 to its value.
    """
    done = jnp.clip(progress / config.anneal, 0.0, 1.0) if config.anneal > 0 else jnp.ones(())
    return config.noise * (1.0 - done), 1.0 + (config.target - 1.0) * done
