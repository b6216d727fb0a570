"""The effect of changed latents: the steered residual, the gates that follow from it, and the model from there on.

Under the *policy* target steering changes one layer's gates and nothing else: `GateProgram` gives the gates, and the
table (`table.py`) the answers. Under the *residual* target, with several steered layers or with more heads than a table
can hold, the layers from the first steered one on run for every setting: `run_suffix`.

Axes: B, N images, R rows (an image with the class that steers it), D width, F latents, S chosen latents, H heads, L
steered layers, V settings, A alphas, C classes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.model.passes import (
    CompiledFit,
    compile_within_memory,
    memory_error,
    padded_chunks,
    per_image_program,
    replicate,
)
from headsteer_jax.model.vit import Intervention, TrainedModel, ViT, predict_class, stack_gates
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.mesh import batch_sharding, local_mesh
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.steer.strategies import Choice
from headsteer_jax.steer.table import gates_to_pattern

Mode = Literal["add", "scale", "clamp", "ablate"]


class Steering(NamedTuple):
    """One layer's autoencoder and the latents that are changed in it."""

    sae: Autoencoder
    strength: np.ndarray  # [F] mean activation where a latent fires
    choice: Choice


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
    """Change a residual through the chosen latents: [B, D] -> x' [B, D].

    delta: x' = x + decode(z') - decode(z), so that alpha 0 gives x bit for bit; replace: x' = decode(z').

    Args:
      class_B: the class by which each image is steered.
      alpha: one for all images, or [B].
    """
    sae, choice = steering.sae, steering.choice
    z_BF = sae.encode(x_BD)
    latents_BS, w_BS = jnp.asarray(choice.latents)[class_B], jnp.asarray(choice.weights)[class_B]
    z_BS = jnp.take_along_axis(z_BF, latents_BS, axis=1)
    rows_BSD = sae.weights.W_d[latents_BS] / sae.scaling.scale
    base_BD = x_BD if config.form == "delta" else sae.decode(z_BF)
    s_BS = jnp.asarray(steering.strength)[latents_BS]
    change_BS = steer_latents(z_BS, s_BS, w_BS, jnp.reshape(alpha, (-1, 1)), config.mode) - z_BS
    return base_BD + jnp.einsum("BS,BSD->BD", change_BS, rows_BSD, precision=jax.lax.Precision.HIGHEST)


def run_from_layer(
    model: ViT, params: Any, x_BTD: jax.Array, steered_BD: jax.Array, layer: int, target: Literal["policy", "residual"]
) -> tuple[jax.Array, jax.Array]:
    """Run the model from `layer` on, with x' in its gate (policy) or in its block as well (residual).

    Returns:
      [B, C] logits and [B, H] gates of that layer.
    """

    def run(m: ViT) -> tuple[jax.Array, jax.Array]:
        last_BTD, out = m.blocks(
            x_BTD, layer, interventions={layer: Intervention(None, lambda _: steered_BD, target == "residual")}
        )
        return m.classify(last_BTD[:, 0]), out["gates"][layer]["heads"]

    return model.apply(params, method=run)


class GateProgram:
    """The gate patterns that a layer's steered residuals lead to, as the model itself computes them; compiled once.

    The residual is made and the gate reads it, for any mode, form and gate. The alphas run one by one, not as a vmap:
    with the shapes that the plain model has, so that a logit at 0 is rounded as it is there.
    """

    def __init__(self, trained: TrainedModel) -> None:
        config, model = trained.config, trained.model
        layer, steer = config.sae_layer, config.steer
        self._chunk = config.machine.sweep_chunk

        def pattern(
            params: Any, steering: Steering, x_BD: jax.Array, class_B: jax.Array, alpha: jax.Array
        ) -> jax.Array:
            steered_BD = apply_steering(steering, x_BD, class_B, alpha, steer)
            return gates_to_pattern(model.apply(params, steered_BD, layer, method="gate_logits"))

        self._run_rows = jax.jit(pattern)
        self._run_grid = jax.jit(
            lambda params, steering, x_BD, class_B, alphas_A: jax.lax.map(
                lambda alpha: pattern(params, steering, x_BD, class_B, jnp.full(len(x_BD), alpha)), alphas_A
            )
        )
        self._params = trained.params

    def patterns_on_grid(
        self, steering: Steering, x_RD: np.ndarray, class_R: np.ndarray, alphas_A: np.ndarray
    ) -> np.ndarray:
        """Compute the [A, R] int32 patterns of every row under every alpha."""
        alphas_A = np.asarray(alphas_A, np.float32)
        if not len(x_RD):
            return np.zeros((len(alphas_A), 0), np.int32)
        parts = [
            np.asarray(self._run_grid(self._params, steering, x_RD[rows], class_R[rows], alphas_A))
            for rows in self._chunks(len(x_RD))
        ]
        return np.concatenate(parts, axis=-1)[:, : len(x_RD)]

    def patterns_at(self, steering: Steering, x_RD: np.ndarray, class_R: np.ndarray, alpha_R: np.ndarray) -> np.ndarray:
        """Compute the [R] int32 patterns of rows that each have an alpha of their own."""
        alpha_R = np.asarray(alpha_R, np.float32)
        if not len(x_RD):
            return np.zeros(0, np.int32)
        parts = [
            np.asarray(self._run_rows(self._params, steering, x_RD[rows], class_R[rows], alpha_R[rows]))
            for rows in self._chunks(len(x_RD))
        ]
        return np.concatenate(parts)[: len(x_RD)]

    def _chunks(self, count: int) -> list[np.ndarray]:
        """Cut `count` rows into chunks of one size, so that there is one program; the last row fills the last chunk."""
        size = self._chunk
        return [np.minimum(np.arange(begin, begin + size), count - 1) for begin in range(0, count, size)]


SuffixSetting = tuple[Mapping[int, Steering], np.ndarray]  # layer -> steering, and the class [N] that steers each image


def _steered_suffix(trained: TrainedModel, layers: Sequence[int]) -> Callable[..., tuple[jax.Array, ...]]:
    """Build the function that runs the layers from the first steered one on, under several alphas as a vmap."""
    config, model = trained.config, trained.model

    def run_suffix_layers(
        params: Any, steered: Mapping[int, Steering], alphas_A: jax.Array, x_BTD: jax.Array, class_B: jax.Array
    ) -> tuple[jax.Array, ...]:
        def run_alpha(alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
            def change(x_BD: jax.Array, steering: Steering) -> jax.Array:
                return apply_steering(steering, x_BD, class_B, alpha, config.steer)

            steer_residual = config.steer.target == "residual"
            changes = {
                layer: Intervention(None, functools.partial(change, steering=steering), steer_residual)
                for layer, steering in steered.items()
            }

            def run_blocks(m: ViT) -> tuple[jax.Array, Any]:
                last_BTD, out = m.blocks(x_BTD, layers[0], interventions=changes)
                return predict_class(m.classify(last_BTD[:, 0])), out["gates"]

            prediction_B, gates = model.apply(params, method=run_blocks)
            return stack_gates({layer: gates[layer] for layer in layers}) > 0, prediction_B

        return jax.vmap(run_alpha, out_axes=1)(alphas_A)

    return run_suffix_layers


def _compile_suffix(
    trained: TrainedModel, params: Any, steered: Mapping[int, Steering], alphas: int, images: int
) -> tuple[CompiledFit, int]:
    """Compile the suffix for as many alphas at once as fit the memory budget, and fewer images if not one alpha fits.

    Args:
      params: the model's parameters on every device.
      alphas: how many there are.
      images: how many there are.

    Returns:
      The program for a number of alphas, and the number of images of a device in a call.

    Raises:
      HeadSteerError: the budget is too small for one image under one alpha.
    """
    config, model = trained.config, trained.model
    tokens, memory = model.positions_count + model.model.registers, config.machine.sweep_memory
    size = min(config.machine.sweep_chunk, images)
    program = per_image_program(_steered_suffix(trained, sorted(steered)), size, arrays=2, fixed=3).run
    sharding = batch_sharding(local_mesh())
    while True:
        batch = size * jax.local_device_count()

        def compile_for(at_once: int, batch: int = batch) -> Any:
            x_BTD = jax.ShapeDtypeStruct((batch, tokens, config.model.width), jnp.float32, sharding=sharding)
            class_B = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding)
            alphas_A = replicate(np.zeros(at_once, np.float32))
            return program.lower(params, replicate(steered), alphas_A, x_BTD, class_B).compile()

        fit = compile_within_memory(compile_for, alphas, memory)
        if fit.size:
            return fit, size
        if size == 1:
            raise memory_error(fit, memory, "one image under one alpha")
        size = max(1, size // 2)


def run_suffix(
    trained: TrainedModel, split: Split, settings: Sequence[SuffixSetting], alphas: np.ndarray, description: str
) -> tuple[np.ndarray, np.ndarray]:
    """Run the layers from the first steered one on for every setting and alpha; the layers before it run once.

    Alphas are a vmap, as many at once as fit config.machine.sweep_memory.

    Args:
      settings: the same layers are steered in each.
      description: names the work in the progress bar.

    Returns:
      [V, A, N, L, H] bool gates of the steered layers, and [V, A, N] int32 predictions, of V settings.

    Raises:
      HeadSteerError: the memory budget is too small for one image under one alpha.
    """
    config, model, params = trained.config, trained.model, replicate(trained.params)
    layers, count = sorted(settings[0][0]), len(split.labels)

    def run_before(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return (model.apply(params, preprocess(images, config.data), layers[0], method="before"),)

    suffix, size = _compile_suffix(trained, params, settings[0][0], len(alphas), count)
    prefix = per_image_program(run_before, size).run
    begin, end = (min(call * size, count) for call in hosts.process_share(-(-count // size)))
    shape = (len(settings), len(alphas), end - begin)
    gates = np.zeros((*shape, len(layers), config.model.heads), bool)
    predictions = np.zeros(shape, np.int32)
    steered_V = [replicate(steered) for steered, _ in settings]

    def run_share() -> None:
        """Fill this host's share of the gates and predictions."""
        with progress(len(settings) * (end - begin), description, "image") as bar:
            for indices in padded_chunks(begin, end, size, jax.local_device_count()):
                (x_BTD,) = prefix(params, gather_images(split.images, indices))
                filled = min(len(indices), end - indices[0])  # the rest of the chunk is padding
                place = slice(indices[0] - begin, indices[0] - begin + filled)
                for v, (_, class_N) in enumerate(settings):
                    class_B = jax.device_put(class_N[indices].astype(np.int32), batch_sharding(local_mesh()))
                    for first in range(0, len(alphas), suffix.size):
                        part_A = np.minimum(np.arange(first, first + suffix.size), len(alphas) - 1)
                        alphas_A = replicate(np.asarray(alphas, np.float32)[part_A])
                        parts = jax.device_get(suffix.run(params, steered_V[v], alphas_A, x_BTD, class_B))
                        gates[v, part_A, place] = np.moveaxis(parts[0][:filled], 1, 0)
                        predictions[v, part_A, place] = parts[1][:filled].T
                    bar.update(filled)

    hosts.on_every_process(run_share)
    return tuple(np.moveaxis(hosts.gather_rows(np.moveaxis(a, 2, 0)), 0, 2) for a in (gates, predictions))  # type: ignore[return-value]
