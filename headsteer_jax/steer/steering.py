"""What changed latents do: the steered residual, the gates that follow from it, and the model from there on.

Under the *policy* target steering changes one layer's gates and nothing else: `GateProgram` gives them, and the table
(`table.py`) the answers. Under the *residual* target, with several steered layers or with more heads than a table can
hold, the layers from the first steered one on run for every setting: `run_suffix`.

Axes: B, N images, D width, F latents, S chosen latents, H heads, L steered layers, A alphas, C classes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.model.passes import (
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
    """One layer's autoencoder and what is changed in it."""

    sae: Autoencoder
    strength: np.ndarray  # [F] mean activation where a latent fires
    choice: Choice


def steer_latents(z_BS: jax.Array, s_BS: jax.Array, w_BS: jax.Array, alpha: jax.Array, mode: Mode) -> jax.Array:
    """Z' of the chosen latents [LH26]; alpha 0 changes nothing, but for clamp.

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
    """The model from `layer` on, with x' in its gate (policy) or in its block as well (residual).

    Returns:
      [B, C] logits and [B, H] that layer's gates.
    """

    def run(m: ViT) -> tuple[jax.Array, jax.Array]:
        last_BTD, out = m.blocks(
            x_BTD, layer, interventions={layer: Intervention(None, lambda _: steered_BD, target == "residual")}
        )
        return m.classify(last_BTD[:, 0]), out["gates"][layer]

    return model.apply(params, method=run)


class GateProgram:
    """The patterns that a layer's steered gates choose, as the model itself computes them; compiled once.

    The residual is made and the gate reads it, for any mode, form and gate. One alpha at a time, not as a vmap: with
    the shapes that the plain model has, so that a logit at 0 is rounded as it is there.
    """

    def __init__(self, trained: TrainedModel) -> None:
        config, model = trained.config, trained.model
        layer, steer = config.sae_layer, config.steer
        self._chunk = config.machine.sweep_chunk

        def pattern(params: Any, one: Steering, x_BD: jax.Array, class_B: jax.Array, alpha: jax.Array) -> jax.Array:
            steered_BD = apply_steering(one, x_BD, class_B, alpha, steer)
            return gates_to_pattern(model.apply(params, steered_BD, layer, method="gate_logits"))

        self._one_each = jax.jit(pattern)
        self._all = jax.jit(
            lambda params, one, x_BD, class_B, alphas_A: jax.lax.map(
                lambda alpha: pattern(params, one, x_BD, class_B, jnp.full(len(x_BD), alpha)), alphas_A
            )
        )
        self._params = trained.params

    def __call__(
        self, one: Steering, x_RD: np.ndarray, class_R: np.ndarray, alphas: np.ndarray, *, each: bool = False
    ) -> np.ndarray:
        """[A, R] int32 patterns of every row under every alpha; with `each`, [R]: row r under alphas[r]."""
        found, count, alphas = [], len(x_RD), np.asarray(alphas, np.float32)
        if not count:
            return np.zeros((0,) if each else (len(alphas), 0), np.int32)
        size = self._chunk  # always the same, so that there is one program
        for begin in range(0, count, size):
            rows = np.minimum(np.arange(begin, begin + size), count - 1)
            run, alpha = (self._one_each, alphas[rows]) if each else (self._all, alphas)
            found.append(np.asarray(run(self._params, one, x_RD[rows], class_R[rows], alpha)))
        return np.concatenate(found, axis=-1)[..., :count]


def run_suffix(
    trained: TrainedModel, split: Split, settings: Sequence[tuple[Mapping[int, Steering], np.ndarray]],
    alphas: np.ndarray, what: str,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Every setting and alpha by the layers from the first steered one on; those before it run once for an image.

    Alphas are a vmap, as many at once as fit config.machine.sweep_memory.

    Args:
      settings: the steered layers, the same ones in each, and the class [N] by which each image is steered.

    Returns:
      [V, A, N, L, H] bool gates of the steered layers, and [V, A, N] int32 predictions, of V settings.

    Raises:
      HeadSteerError: the memory budget is too small for one image under one alpha.
    """
    config, model = trained.config, trained.model
    layers, count = sorted(settings[0][0]), len(split.labels)
    tokens = model.positions_count + model.model.registers

    def before(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return (model.apply(params, preprocess(images, config.data), layers[0], method="before"),)

    def after(
        params: Any, steered: Mapping[int, Steering], alphas_A: jax.Array, x_BTD: jax.Array, class_B: jax.Array
    ) -> tuple[jax.Array, ...]:
        def at(alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
            def change(x_BD: jax.Array, one: Steering) -> jax.Array:
                return apply_steering(one, x_BD, class_B, alpha, config.steer)

            whole = config.steer.target == "residual"
            changes = {n: Intervention(None, functools.partial(change, one=one), whole) for n, one in steered.items()}

            def rest(m: ViT) -> tuple[jax.Array, Any]:
                last_BTD, out = m.blocks(x_BTD, layers[0], interventions=changes)
                return predict_class(m.classify(last_BTD[:, 0])), out["gates"]

            prediction_B, gates = model.apply(params, method=rest)
            return stack_gates({layer: gates[layer] for layer in layers}) > 0, prediction_B

        return jax.vmap(at, out_axes=1)(alphas_A)

    size, params = min(config.machine.sweep_chunk, count), replicate(trained.params)
    program = per_image_program(after, size, arrays=2, fixed=3).run
    while True:  # as many alphas at once as fit; where not even one does, fewer images
        images = size * jax.local_device_count()

        def compile_for(at_once: int, images: int = images) -> Any:
            x_BTD = jax.ShapeDtypeStruct(
                (images, tokens, config.model.width), jnp.float32, sharding=batch_sharding(local_mesh())
            )
            class_B = jax.ShapeDtypeStruct((images,), jnp.int32, sharding=batch_sharding(local_mesh()))
            return program.lower(
                params, replicate(settings[0][0]), replicate(np.zeros(at_once, np.float32)), x_BTD, class_B
            ).compile()

        found = compile_within_memory(compile_for, len(alphas), config.machine.sweep_memory)
        if found.size:
            break
        if size == 1:
            raise memory_error(found, config.machine.sweep_memory, "one image under one alpha")
        size = max(1, size // 2)
    prefix = per_image_program(before, size).run
    begin, end = (min(call * size, count) for call in hosts.process_share(-(-count // size)))
    shape = (len(settings), len(alphas), end - begin)
    gates = np.zeros((*shape, len(layers), config.model.heads), bool)
    predictions = np.zeros(shape, np.int32)
    steered_V = [replicate(steered) for steered, _ in settings]

    def own() -> None:
        with progress(len(settings) * (end - begin), what, "image") as bar:
            for indices in padded_chunks(begin, end, size, jax.local_device_count()):
                (x_BTD,) = prefix(params, gather_images(split.images, indices))
                kept = min(len(indices), end - indices[0])
                for v, (_, class_N) in enumerate(settings):
                    class_B = jax.device_put(class_N[indices].astype(np.int32), batch_sharding(local_mesh()))
                    for some in range(0, len(alphas), found.size):
                        which = np.minimum(np.arange(some, some + found.size), len(alphas) - 1)
                        alphas_A = replicate(np.asarray(alphas, np.float32)[which])
                        parts = jax.device_get(found.run(params, steered_V[v], alphas_A, x_BTD, class_B))
                        here = slice(indices[0] - begin, indices[0] - begin + kept)
                        gates[v, which, here] = np.moveaxis(parts[0][:kept], 1, 0)
                        predictions[v, which, here] = parts[1][:kept].T
                    bar.update(kept)

    hosts.on_every_process(own)
    return tuple(np.moveaxis(hosts.gather_rows(np.moveaxis(a, 2, 0)), 0, 2) for a in (gates, predictions))  # type: ignore[return-value]
