"""The decision networks that switch heads, sublayers and patches on and off, and the loss that limits them [AdaViT]."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from headsteer_jax.config.schema import GateConfig, GateSettings
from headsteer_jax.runtime.precision import EXACT

SUBLAYERS = ("attention", "mlp")  # in the order of the gates of a block's sublayers

Gates = Mapping[str, jax.Array]  # by kind: heads [B, H], sublayers [B, 2], tokens [B, N]; a missing kind is all open


class Gate(nn.Module):
    """A layer's decision network of one kind, `m = W x + b`, in float32 whatever the model computes in.

    With a threshold t the logit is counted from log(t / (1 - t)), so that `sigmoid(W x + b) > t` exactly where m > 0.
    Without LayerNorm the logit is affine in x. The initial bias opens the gates, and W starts small, so that they open
    for every image.
    """

    count: int  # the gates that read one vector: H, 2, or 1
    settings: GateSettings
    layer_norm: bool
    layer_norm_epsilon: float

    @nn.compact  # type: ignore[untyped-decorator]  # mypy reads flax as Any
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """Compute the gate logits m: [..., D] residuals -> [..., count] float32."""
        x_BD = x_BD.astype(jnp.float32)
        if self.layer_norm:
            x_BD = nn.LayerNorm(epsilon=self.layer_norm_epsilon, name="norm")(x_BD)
        m_BH = nn.Dense(
            self.count,
            kernel_init=nn.initializers.truncated_normal(0.02),
            bias_init=nn.initializers.constant(self.settings.bias),
            precision=EXACT,  # in training, too: a decision must not turn on an accelerator's rounding
            name="linear",
        )(x_BD)
        return m_BH - threshold_logit(self.settings) if self.settings.threshold != 0.5 else m_BH


def threshold_logit(settings: GateSettings) -> float:
    """Compute log(t / (1 - t)) of a threshold t, from which gate logits are counted; 0 for 1/2."""
    return math.log(settings.threshold / (1 - settings.threshold))


def threshold(m_BH: jax.Array) -> jax.Array:
    """Compute the deterministic gate of evaluation, `g = 1[m > 0]`, as float32 0 or 1."""
    return (m_BH > 0).astype(jnp.float32)


def mask_softmax(scores_BHQT: jax.Array, keep_BT: jax.Array) -> jax.Array:
    """Compute the softmax over the kept keys: exp of each score times its key's gate, divided by the sum of these.

    With every key kept it is `nn.softmax`, bit for bit. The gradient reaches the gates as that of this formula, in
    which a dropped key's score is cut to the largest score of the kept keys: unbounded, one dropped key could outweigh
    the whole gradient. At least one key must be kept.
    """
    keep_B11T = keep_BT[:, None, None, :]
    largest = jnp.max(jnp.where(keep_B11T > 0, scores_BHQT, -jnp.inf), axis=-1, keepdims=True)
    shifted = scores_BHQT - jax.lax.stop_gradient(largest)
    weights = keep_B11T * jnp.exp(jnp.where(keep_B11T > 0, shifted, jnp.minimum(shifted, 0.0)))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def logistic_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard logistic noise: the difference of two Gumbel variables, so that adding it samples the gate."""
    return jax.random.logistic(key, shape, jnp.float32)


def straight_through(m_BH: jax.Array, noise_BH: jax.Array, temperature: float) -> jax.Array:
    """Compute the Gumbel-sigmoid gate of training [AdaViT]: `g = 1[sigmoid((m + noise) / tau) > 1/2]`.

    Its value is 0 or 1, and its gradient is the sigmoid's (straight-through). With noise 0 the value equals
    `threshold`. [AdaViT]'s code compares sigmoid((m + noise) / tau) with its threshold in training and sigmoid(m) in
    evaluation; here m is counted from the threshold already (`Gate`), so that both ask the same.

    Args:
      m_BH: gate logits of any shape.
      noise_BH: logistic noise of the same shape, already scaled.
      temperature: tau.
    """
    soft_BH = jax.nn.sigmoid((m_BH + noise_BH) / temperature)
    hard_BH = threshold(m_BH + noise_BH)  # sigmoid(a / tau) > 1/2 exactly where a > 0
    return hard_BH + (soft_BH - jax.lax.stop_gradient(soft_BH))  # the bracket is exactly 0


def usage_loss(
    g_BAn: jax.Array, target: jax.Array | float, config: GateConfig, kind: str = "heads",
    counted_BA: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Compute the usage loss of one kind of gate, before its weight: |mean(g) - target| or its square.

    Args:
      g_BAn: [B, A, n] gates of the A layers that have this kind.
      target: the share of gates to keep open at this step.
      counted_BA: which blocks of each image count, 0 or 1; None: all.

    Returns:
      A scalar: the mean of the layers' terms (`scope="layer"`), or one term for the mean over all gates.
    """
    axes = (0, 2) if config.scope == "layer" else (0, 1, 2)
    if counted_BA is None:
        usage = jnp.mean(g_BAn, axis=axes)
    else:
        weights_BAn = jnp.broadcast_to(counted_BA[..., None], g_BAn.shape)
        usage = jnp.sum(g_BAn * weights_BAn, axis=axes) / (jnp.sum(weights_BAn, axis=axes) + 1e-6)  # as [AdaViT]'s code
    gap = usage - target
    form = config.tokens.loss if kind == "tokens" and config.tokens.loss else config.loss
    return jnp.mean(jnp.abs(gap) if form == "absolute" else gap**2)


def anneal_noise(config: GateConfig, progress: jax.Array | float) -> jax.Array:
    """Compute the noise scale at a share `progress` of the gated phase.

    In the first `config.anneal` of the phase it falls linearly to 0.
    """
    return config.noise * (1.0 - _annealed(config, progress))


def anneal_target(config: GateConfig, progress: jax.Array | float, target: float) -> jax.Array:
    """Compute the target at a share `progress` of the gated phase.

    In the first `config.anneal` of the phase it falls linearly from 1 to `target`.
    """
    return 1.0 + (target - 1.0) * _annealed(config, progress)


def _annealed(config: GateConfig, progress: jax.Array | float) -> jax.Array:
    """Compute the share of the annealing that is done."""
    return jnp.clip(progress / config.anneal, 0.0, 1.0) if config.anneal > 0 else jnp.ones(())
