"""The effect of changed latents: the steered residual, the gates that follow from it, and the model from there on.

Under the *policy* target steering changes one layer's gates and nothing else: `GateProgram` gives the gates, and the
table (`table.py`) the answers. Under the *residual* target, with several steered layers, with steered patches or with
more heads than a table can hold, the layers from the first steered one on run for every setting (`suffix.py`).

Axes: B, N images, P patches, R rows (an image with the class that steers it), D width, F latents, S chosen latents, G
gates of a layer that read its CLS residual, A alphas, C classes.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.model.call_limits import choose_call_limits
from headsteer_jax.model.passes import replicate
from headsteer_jax.model.vit import Intervention, TrainedModel, ViT
from headsteer_jax.runtime.mesh import batch_sharding, local_mesh
from headsteer_jax.runtime.precision import EXACT
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.steer.gates import LayerGates, gates_to_pattern
from headsteer_jax.steer.strategies import Choice

ACCELERATOR_ROWS = 4096  # of a call on each device; on a CPU as many as the images of a call
Mode = Literal["add", "scale", "clamp", "ablate"]


class Steering(NamedTuple):
    """One layer's autoencoder and the latents that are changed in it, or directions that need no autoencoder."""

    sae: Autoencoder
    strength: np.ndarray  # [F] mean activation where a latent fires
    choice: Choice


def is_unsteered_at_zero(config: SteerConfig, *, patches: bool = False) -> bool:
    """Tell whether alpha 0 is the unsteered model: neither a reconstruction nor with latents clamped to 0.

    Args:
      patches: are the residuals of patches steered, in steer.patch_mode.
    """
    return config.form == "delta" and (config.patch_mode if patches else config.mode) != "clamp"


def steer_latents(z_BS: jax.Array, s_BS: jax.Array, w_BS: jax.Array, alpha: jax.Array, mode: Mode) -> jax.Array:
    """Change the activations of chosen latents as in [LH26]; alpha 0 changes nothing, except with clamp.

    add: z + alpha w s;  scale: (1 + alpha w) z;  clamp: alpha w s;  ablate: (1 - alpha) z with alpha cut to [0, 1].

    Args:
      z_BS: their activations.
      s_BS: their mean activations where they fire.
      w_BS: the strategy's weights.
      alpha: a scalar, or [B, 1].

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


def apply_steering(
    steering: Steering, x_BD: jax.Array, class_B: jax.Array, alpha: jax.Array, config: SteerConfig
) -> jax.Array:
    """Change a residual through the chosen latents, or along a direction: [B, D] -> x' [B, D].

    delta: x' = x + decode(z') - decode(z), so that alpha 0 gives x bit for bit; replace: x' = decode(z'). A direction v
    needs no autoencoder: x' = x + alpha v.

    Args:
      class_B: the class by which each image is steered.
      alpha: one for all images, or [B].
    """
    sae, choice = steering.sae, steering.choice
    if choice.directions is not None:
        return x_BD + jnp.reshape(alpha, (-1, 1)) * jnp.asarray(choice.directions)[class_B]
    z_BF = sae.encode(x_BD)
    latents_BS, w_BS = jnp.asarray(choice.latents)[class_B], jnp.asarray(choice.weights)[class_B]
    z_BS = jnp.take_along_axis(z_BF, latents_BS, axis=1)
    rows_BSD = sae.weights.W_d[latents_BS] / sae.scaling.scale
    base_BD = x_BD if config.form == "delta" else sae.decode(z_BF)
    s_BS = jnp.asarray(steering.strength)[latents_BS]
    change_BS = steer_latents(z_BS, s_BS, w_BS, jnp.reshape(alpha, (-1, 1)), config.mode) - z_BS
    return base_BD + jnp.einsum("BS,BSD->BD", change_BS, rows_BSD, precision=EXACT)


def steer_patches(
    steering: Steering, x_BPD: jax.Array, class_B: jax.Array, alpha: jax.Array, config: SteerConfig
) -> jax.Array:
    """Change every patch's residual by itself, in the mode steer.patch_mode: [B, P, D] -> [B, P, D].

    Args:
      class_B: the class by which each image is steered.
      alpha: one for all images, or [B].
    """
    B, P, D = x_BPD.shape
    config = config.model_copy(update={"mode": config.patch_mode})
    alpha = jnp.repeat(alpha, P) if jnp.ndim(alpha) else alpha
    return apply_steering(steering, x_BPD.reshape(B * P, D), jnp.repeat(class_B, P), alpha, config).reshape(B, P, D)


def run_from_layer(
    model: ViT, params: Any, x_BTD: jax.Array, steered_BD: jax.Array, layer: int, target: Literal["policy", "residual"]
) -> tuple[jax.Array, jax.Array]:
    """Run the model from `layer` on, with x' in its gates (policy) or in its block as well (residual).

    Returns:
      [B, C] logits, and [B, G] the gates of that layer that read the CLS residual.
    """

    def run(m: ViT) -> tuple[jax.Array, jax.Array]:
        last_BTD, out = m.blocks(
            x_BTD, layer, interventions={layer: Intervention(None, lambda _: steered_BD, target == "residual")}
        )
        gates = [g for kind, g in out["gates"][layer].items() if kind != "tokens"]
        return m.classify(last_BTD[:, 0]), gates[0] if len(gates) == 1 else jnp.concatenate(gates, axis=-1)

    return model.apply(params, method=run)


T = TypeVar("T")


def replicate_once(trees: T) -> T:
    """Copy a pytree of steerings to each of this host's devices; those that share an autoencoder share its copy."""
    leaves, structure = jax.tree.flatten(trees)
    distinct = {id(leaf): leaf for leaf in leaves}
    copies = dict(zip(distinct, replicate(list(distinct.values())), strict=True))
    shared: T = jax.tree.unflatten(structure, [copies[id(leaf)] for leaf in leaves])
    return shared


class GateProgram:
    """The gate patterns that a layer's steered residuals lead to, as the model itself computes them; compiled once.

    The residual is made and the gate reads it, for any mode, form and gate. The alphas run one by one, not as a vmap:
    with the shapes that the plain model has, so that a logit at 0 is rounded as it is there.
    """

    def __init__(self, trained: TrainedModel) -> None:
        config, model = trained.config, trained.model
        gates, steer, self._mesh = LayerGates(config, config.sae_layer), config.steer, local_mesh()
        is_cpu = self._mesh.devices.flat[0].platform == "cpu"
        images = choose_call_limits(model, config.machine, self._mesh).images if is_cpu else ACCELERATOR_ROWS
        self._chunk = self._mesh.size * images

        def pattern(
            params: Any, steering: Steering, x_BD: jax.Array, class_B: jax.Array, alpha: jax.Array
        ) -> jax.Array:
            steered_BD = apply_steering(steering, x_BD, class_B, alpha, steer)
            return gates_to_pattern(gates.logits(model, params, steered_BD))

        def grid(
            params: Any, steering: Steering, x_BD: jax.Array, class_B: jax.Array, alphas_A: jax.Array
        ) -> jax.Array:
            return jax.lax.map(
                lambda alpha: pattern(params, steering, x_BD, class_B, jnp.full(len(x_BD), alpha)), alphas_A
            )

        everywhere, rows = PartitionSpec(), PartitionSpec("data")

        def divide_rows(function: Any, of_alphas: PartitionSpec, result: PartitionSpec) -> Any:
            specs = everywhere, everywhere, rows, rows, of_alphas
            return jax.jit(jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=result, check_vma=False))

        self.run_rows = divide_rows(pattern, rows, rows)
        self.run_grid = divide_rows(grid, everywhere, PartitionSpec(None, "data"))
        self._params = replicate(trained.params)

    def patterns_on_grid(
        self, steering: Steering, x_RD: np.ndarray, class_R: np.ndarray, alphas_A: np.ndarray
    ) -> np.ndarray:
        """Compute the [A, R] int32 patterns of every row under every alpha."""
        alphas_A = np.asarray(alphas_A, np.float32)
        if not len(x_RD):
            return np.zeros((len(alphas_A), 0), np.int32)
        chunks = self.place_rows(x_RD, class_R)
        return self.patterns_of_rows(steering, chunks, alphas_A)[:, : len(x_RD)]

    def patterns_at(self, steering: Steering, x_RD: np.ndarray, class_R: np.ndarray, alpha_R: np.ndarray) -> np.ndarray:
        """Compute the [R] int32 patterns of rows that each have an alpha of their own."""
        alpha_R = np.asarray(alpha_R, np.float32)
        if not len(x_RD):
            return np.zeros(0, np.int32)
        steering = replicate(steering)
        calls = [
            self.run_rows(self._params, steering, *self._place((x_RD[rows], class_R[rows], alpha_R[rows])))
            for rows in self._chunks(len(x_RD))
        ]
        return np.concatenate(jax.device_get(calls))[: len(x_RD)]

    def place_rows(self, x_RD: np.ndarray, class_R: np.ndarray) -> list[tuple[jax.Array, jax.Array]]:
        """Put rows onto the devices, chunk by chunk, for several calls of `patterns_of_rows`."""
        return [self._place((x_RD[rows], class_R[rows])) for rows in self._chunks(len(x_RD))]

    def patterns_of_rows(
        self, steering: Steering, chunks: Sequence[tuple[jax.Array, jax.Array]], alphas_A: np.ndarray
    ) -> np.ndarray:
        """Compute the [A, R'] int32 patterns of placed rows under every alpha; the last row fills the last chunk."""
        steering, alphas_A = replicate((steering, np.asarray(alphas_A, np.float32)))
        calls = [self.run_grid(self._params, steering, x_RD, class_R, alphas_A) for x_RD, class_R in chunks]
        return np.concatenate(jax.device_get(calls), axis=-1)

    def _place(self, arrays: tuple[np.ndarray, ...]) -> Any:
        return jax.device_put(arrays, batch_sharding(self._mesh))

    def _chunks(self, count: int) -> list[np.ndarray]:
        """Cut `count` rows into chunks of one size, so that there is one program; the last row fills the last chunk."""
        size = self._chunk
        return [np.minimum(np.arange(begin, begin + size), count - 1) for begin in range(0, count, size)]
