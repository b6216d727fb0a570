"""What changed latents do to a layer's gates and to the answer: the sweep.

Under the *policy* target steering changes one layer's gates and nothing else, so an image's answer depends only on
which of the 2^H gate patterns it gets: `pattern_table` computes all of them once and every setting is a look-up.
Under the *residual* target the block itself computes on the steered residual, so the suffix runs for every setting.

Axes: B, N images, D width, F latents, S chosen latents, H heads, P = 2^H gate patterns, A alphas, C classes.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.activations import over_split, padded_chunks
from headsteer_jax.augment import preprocess
from headsteer_jax.config import Config, SteerConfig
from headsteer_jax.data import Split, gather
from headsteer_jax.latents import Choice
from headsteer_jax.sae import SAE, Scaling, centre, decode, encode, uncentre
from headsteer_jax.vit import ViT

Mode = Literal["add", "scale", "clamp", "ablate"]


def pattern_of(g_BH: jax.Array) -> jax.Array:
    """[..., H] gates -> [...] int32 pattern, whose bit h is head h."""
    return jnp.sum((g_BH > 0) << jnp.arange(g_BH.shape[-1]), axis=-1, dtype=jnp.int32)


def gates_of(pattern: np.ndarray, heads: int) -> np.ndarray:
    """[...] patterns -> [..., H] bool gates."""
    return (np.asarray(pattern)[..., None] >> np.arange(heads)) & 1 > 0


def steered_latents(z_BS: jax.Array, s_BS: jax.Array, w_BS: jax.Array, alpha: jax.Array, mode: Mode) -> jax.Array:
    """z' of the chosen latents [LH26]; alpha 0 changes nothing, but for clamp.

    add: z + alpha w s;  scale: (1 + alpha w) z;  clamp: alpha w s;  ablate: (1 - alpha) z with alpha cut to [0, 1].

    Args:
      z_BS: their activations.
      s_BS: their mean activations where they fire.
      w_BS: the strategy's weights.

    Returns:
      [B, S] activations, never below 0.
    """
    if mode == "add":
        z_BS = z_BS + alpha * w_BS * s_BS
    elif mode == "scale":
        z_BS = (1.0 + alpha * w_BS) * z_BS
    elif mode == "clamp":
        z_BS = alpha * w_BS * s_BS
    else:
        z_BS = (1.0 - jnp.clip(alpha, 0.0, 1.0)) * z_BS
    return jnp.maximum(z_BS, 0.0)


def steered_residuals(
    sae: SAE, scaling: Scaling, s_F: jax.Array, choice: Choice, x_BD: jax.Array, class_B: jax.Array,
    alphas_A: jax.Array, k: int, config: SteerConfig,
) -> jax.Array:  # fmt: skip
    """x' for every alpha, [A, B, D].

    delta: x' = x + decode(z') - decode(z), so that alpha 0 gives x bit for bit; replace: x' = decode(z').

    Args:
      s_F: each latent's mean activation where it fires.
      choice: the latents and weights of each class.
      class_B: the class by which each image is steered.
    """
    z_BF = encode(sae, centre(scaling, x_BD), k)
    latents_BS, w_BS = jnp.asarray(choice.latents)[class_B], jnp.asarray(choice.weights)[class_B]
    z_BS = jnp.take_along_axis(z_BF, latents_BS, axis=1)
    rows_BSD = sae.W_d[latents_BS] / scaling.scale
    base_BD = x_BD if config.form == "delta" else uncentre(scaling, decode(sae, z_BF))

    def at(alpha: jax.Array) -> jax.Array:
        change_BS = steered_latents(z_BS, jnp.asarray(s_F)[latents_BS], w_BS, alpha, config.mode) - z_BS
        return base_BD + jnp.einsum("BS,BSD->BD", change_BS, rows_BSD, precision=jax.lax.Precision.HIGHEST)

    return jax.vmap(at)(alphas_A)


def suffix(
    model: ViT, params: Any, x_BTD: jax.Array, steered_BD: jax.Array, layer: int, target: Literal["policy", "residual"]
) -> tuple[jax.Array, jax.Array]:
    """The model from `layer` on, with x' in its gate (policy) or in its block as well (residual).

    Returns:
      [B, C] logits and [B, H] that layer's gates.
    """

    def run(m: ViT) -> tuple[jax.Array, jax.Array]:
        last_BTD, out = m.blocks(
            x_BTD, layer, gate_input={layer: lambda _: steered_BD}, steer_residual=target == "residual"
        )
        return m.classify(last_BTD[:, 0]), out["gates"][layer]

    return model.apply(params, method=run)


def pattern_logits(model: ViT, params: Any, x_BTD: jax.Array, layer: int, patterns_P: jax.Array) -> jax.Array:
    """[P, B, C] logits that follow when `layer` runs each pattern's heads, whatever its gate says.

    In the last layer only the CLS query is needed, and attention does not depend on the gates: the heads are computed
    once, and each pattern costs a projection and an MLP of one token.
    """
    count, heads, last = x_BTD.shape[0], model.model.heads, layer == model.model.depth - 1

    def run(m: ViT) -> jax.Array:
        parts = m.last_heads(x_BTD) if last else None

        def logits(pattern: jax.Array) -> jax.Array:
            g_BH = jnp.broadcast_to((pattern >> jnp.arange(heads)) & 1, (count, heads)).astype(jnp.float32)
            if parts is not None:
                return m.last_finish(x_BTD[:, :1], *parts, g_BH)
            return m.classify(m.blocks(x_BTD, layer, gates={layer: g_BH})[0][:, 0])

        return jax.lax.map(logits, patterns_P)

    return model.apply(params, method=run)


class Prefix(NamedTuple):
    """A split up to the steered layer, and all that its gates can lead to."""

    x: np.ndarray  # [N, D] float32 CLS residual that enters the layer
    gate_logits: np.ndarray  # [N, H] float32, unsteered
    pattern: np.ndarray  # [N] int32, the unsteered gates
    table: np.ndarray  # [N, P] int32, the prediction under each pattern

    @property
    def prediction(self) -> np.ndarray:
        """[N] the unsteered model's."""
        return np.take_along_axis(self.table, self.pattern[:, None], axis=1)[:, 0]


def pattern_table(model: ViT, params: Any, split: Split, config: Config, what: str) -> Prefix:
    """One pass over a split: the residual at the steered layer, its gates, and the answer under all 2^H patterns."""
    layer, patterns_P = config.sae_layer, jnp.arange(2**config.model.heads)

    @jax.jit
    def run(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        x_BTD, _ = model.apply(
            params, preprocess(images, config.data),
            method=lambda m, images: m.blocks(m.embed(images), 0, stop=layer),
        )  # fmt: skip
        m_BH = model.apply(params, x_BTD[:, 0], layer, method="gate_logits")
        predictions_PB = jnp.argmax(pattern_logits(model, params, x_BTD, layer, patterns_P), axis=-1)
        return x_BTD[:, 0], m_BH, pattern_of(m_BH > 0), predictions_PB.T.astype(jnp.int32)

    return Prefix(*over_split(functools.partial(run, params), split, config.steer.chunk, what))


class Sweep:
    """Steering of one split: compiled once, then called for every seed, strategy and way to name the class."""

    def __init__(self, model: ViT, params: Any, split: Split, prefix: Prefix, config: Config) -> None:
        self._params, self._split, self._prefix, self._config = params, split, prefix, config
        layer, steer = config.sae_layer, config.steer
        self._chunks = padded_chunks(len(split.labels), steer.chunk)
        self._alphas = jnp.asarray(alpha_grid(steer), jnp.float32)

        def steered(sae: SAE, scaling: Scaling, s_F: Any, choice: Choice, x_BD: Any, class_B: Any) -> jax.Array:
            return steered_residuals(sae, scaling, s_F, choice, x_BD, class_B, self._alphas, config.sae.k, steer)

        @jax.jit
        def policy(params: Any, *args: Any) -> jax.Array:
            steered_ABD = steered(*args)
            gate = jax.vmap(lambda x_BD: model.apply(params, x_BD, layer, method="gate_logits"))
            return pattern_of(gate(steered_ABD) > 0)

        @jax.jit
        def residual(params: Any, images: jax.Array, *args: Any) -> tuple[jax.Array, jax.Array]:
            x_BTD, _ = model.apply(
                params, preprocess(images, config.data),
                method=lambda m, images: m.blocks(m.embed(images), 0, stop=layer),
            )  # fmt: skip

            def one(steered_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
                logits_BC, gates_BH = suffix(model, params, x_BTD, steered_BD, layer, "residual")
                return pattern_of(gates_BH), jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)

            return jax.lax.map(one, steered(*args))

        self._policy, self._residual = policy, residual

    def __call__(
        self, sae: SAE, scaling: Scaling, strength_F: np.ndarray, choice: Choice, class_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every alpha for one choice of latents.

        Args:
          class_N: the class by which each image is steered.

        Returns:
          [A, N] uint16 gate patterns and [A, N] int32 predictions.
        """
        patterns, predictions = [], []
        for indices in self._chunks:
            x_BD, class_B = self._prefix.x[indices], class_N[indices]
            if self._config.steer.target == "policy":
                pattern_AB = np.asarray(self._policy(self._params, sae, scaling, strength_F, choice, x_BD, class_B))
                prediction_AB = self._prefix.table[indices[None, :], pattern_AB]
            else:
                images = gather(self._split.images, indices)
                pattern_AB, prediction_AB = jax.device_get(
                    self._residual(self._params, images, sae, scaling, strength_F, choice, x_BD, class_B)
                )
            patterns.append(pattern_AB.astype(np.uint16))
            predictions.append(prediction_AB)
        count = len(class_N)
        return np.concatenate(patterns, axis=1)[:, :count], np.concatenate(predictions, axis=1)[:, :count]


def alpha_grid(config: SteerConfig) -> np.ndarray:
    """[A] float64, sorted, with 0: the unsteered model is part of every sweep."""
    return np.unique(np.array([0.0, *config.alphas]))
