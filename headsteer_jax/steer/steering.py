"""The effect of changed latents: the steered residual, the gates that follow from it, and the model from there on.

Under the *policy* target steering changes one layer's gates and nothing else: `GateProgram` gives the gates, and the
table (`table.py`) the answers. Under the *residual* target, with several steered layers, with steered patches or with
more heads than a table can hold, the layers from the first steered one on run for every setting: `run_suffix`.

Axes: B, N images, P patches, R rows (an image with the class that steers it), D width, F latents, S chosen latents, G
gates of a layer that read its CLS residual, V settings, A alphas, C classes.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import GateKind, SteerConfig
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
from headsteer_jax.model.vit import Intervention, TrainedModel, ViT, count_gates, predict_class
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.mesh import batch_sharding, local_mesh
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.steer.gates import LayerGates, gates_to_pattern
from headsteer_jax.steer.strategies import Choice

Mode = Literal["add", "scale", "clamp", "ablate"]


class Steering(NamedTuple):
    """One layer's autoencoder and the latents that are changed in it, or directions that need no autoencoder."""

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
    return base_BD + jnp.einsum("BS,BSD->BD", change_BS, rows_BSD, precision=jax.lax.Precision.HIGHEST)


def steer_patches(
    steering: Steering, x_BPD: jax.Array, class_B: jax.Array, alpha: jax.Array, config: SteerConfig
) -> jax.Array:
    """Change every patch's residual by itself, in the mode steer.patch_mode: [B, P, D] -> [B, P, D].

    Args:
      class_B: the class by which each image is steered.
      alpha: one for all images.
    """
    B, P, D = x_BPD.shape
    config = config.model_copy(update={"mode": config.patch_mode})
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


class GateProgram:
    """The gate patterns that a layer's steered residuals lead to, as the model itself computes them; compiled once.

    The residual is made and the gate reads it, for any mode, form and gate. The alphas run one by one, not as a vmap:
    with the shapes that the plain model has, so that a logit at 0 is rounded as it is there.
    """

    def __init__(self, trained: TrainedModel) -> None:
        config, model = trained.config, trained.model
        gates, steer = LayerGates(config, config.sae_layer), config.steer
        self._chunk = config.machine.sweep_chunk

        def pattern(
            params: Any, steering: Steering, x_BD: jax.Array, class_B: jax.Array, alpha: jax.Array
        ) -> jax.Array:
            steered_BD = apply_steering(steering, x_BD, class_B, alpha, steer)
            return gates_to_pattern(gates.logits(model, params, steered_BD))

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


class SuffixSetting(NamedTuple):
    """Steered layers: their CLS residual is changed, the residuals of their patches, or both."""

    steered: Mapping[int, Steering]  # by layer: of the CLS residual
    steered_by: np.ndarray  # [N] the class that steers each image
    patches: Mapping[int, Steering] = types.MappingProxyType({})  # by layer: of every patch's residual

    @property
    def steerings(self) -> tuple[dict[int, Steering], dict[int, Steering]]:
        """The steerings of the CLS residual and of the patches, as a pytree."""
        return dict(self.steered), dict(self.patches)

    @property
    def layers(self) -> list[int]:
        """The layers in which anything is steered, ascending."""
        return sorted({*self.steered, *self.patches})


class SuffixResult(NamedTuple):
    """The gates and the answers of every setting under every alpha."""

    gates: dict[int, dict[str, np.ndarray]]  # by layer and kind, [V, A, N, n] bool
    predictions: np.ndarray  # [V, A, N] int32


Observed = Mapping[int, Sequence[GateKind]]  # the kinds of gates that are returned, by layer


def _steered_suffix(trained: TrainedModel, layers: Sequence[int], observed: Observed) -> Callable[..., tuple[Any, ...]]:
    """Build the function that runs the layers from the first steered one on, under several alphas as a vmap.

    Args:
      layers: those that are steered, ascending.
      observed: the gates that it returns.
    """
    config, model = trained.config, trained.model

    def run_suffix_layers(
        params: Any,
        steerings: tuple[dict[int, Steering], ...],
        alphas_A: jax.Array,
        x_BTD: jax.Array,
        class_B: jax.Array,
    ) -> tuple[Any, ...]:
        def run_alpha(alpha: jax.Array) -> tuple[Any, jax.Array]:
            def read_steered(apply: Callable[..., jax.Array], by_layer: dict[int, Steering], layer: int) -> Any:
                if layer not in by_layer:
                    return None
                return lambda x: apply(by_layer[layer], x, class_B, alpha, config.steer)

            changes = {
                layer: Intervention(
                    gate_input=read_steered(apply_steering, steerings[0], layer),
                    token_input=read_steered(steer_patches, steerings[1], layer),
                    steer_residual=config.steer.target == "residual",
                )
                for layer in layers
            }

            def run_blocks(m: ViT) -> tuple[jax.Array, Any]:
                last_BTD, out = m.blocks(x_BTD, layers[0], interventions=changes)
                return predict_class(m.classify(last_BTD[:, 0])), out["gates"]

            prediction_B, gates = model.apply(params, method=run_blocks)
            outputs = {layer: {kind: gates[layer][kind] > 0 for kind in kinds} for layer, kinds in observed.items()}
            return outputs, prediction_B

        return jax.vmap(run_alpha, out_axes=1)(alphas_A)

    return run_suffix_layers


def _compile_suffix(
    trained: TrainedModel, params: Any, setting: SuffixSetting, alphas: int, images: int, observed: Observed
) -> tuple[CompiledFit, int]:
    """Compile the suffix for as many alphas at once as fit the memory budget, and fewer images if not one alpha fits.

    Args:
      params: the model's parameters on every device.
      setting: one of those that are to be run.
      alphas: how many there are.
      images: how many there are.
      observed: the gates that the program returns.

    Returns:
      The program for a number of alphas, and the number of images of a device in a call.

    Raises:
      HeadSteerError: the budget is too small for one image under one alpha.
    """
    config, model = trained.config, trained.model
    tokens, memory = model.positions_count + model.model.registers, config.machine.sweep_memory
    size = min(config.machine.sweep_chunk, images)
    program = per_image_program(_steered_suffix(trained, setting.layers, observed), size, arrays=2, fixed=3).run
    sharding = batch_sharding(local_mesh())
    while True:
        batch = size * jax.local_device_count()

        def compile_for(at_once: int, batch: int = batch) -> Any:
            x_BTD = jax.ShapeDtypeStruct((batch, tokens, config.model.width), jnp.float32, sharding=sharding)
            class_B = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding)
            alphas_A = replicate(np.zeros(at_once, np.float32))
            return program.lower(params, replicate(setting.steerings), alphas_A, x_BTD, class_B).compile()

        fit = compile_within_memory(compile_for, alphas, memory)
        if fit.size:
            return fit, size
        if size == 1:
            raise memory_error(fit, memory, "one image under one alpha")
        size = max(1, size // 2)


def run_suffix(
    trained: TrainedModel, split: Split, settings: Sequence[SuffixSetting], alphas: np.ndarray, description: str,
    kinds: Sequence[GateKind] = ("heads", "sublayers"), *, following: bool = False,
) -> SuffixResult:  # fmt: skip
    """Run the layers from the first steered one on for every setting and alpha; the layers before it run once.

    Alphas are a vmap, as many at once as fit config.machine.sweep_memory.

    Args:
      settings: the same layers are steered in each.
      description: names the work in the progress bar.
      kinds: of the gates that are returned, as far as a layer has them.
      following: return the gates of all layers from the first steered one on, and not of the steered ones alone.

    Raises:
      HeadSteerError: the memory budget is too small for one image under one alpha.
    """
    config, model, params = trained.config, trained.model, replicate(trained.params)
    layers, count = settings[0].layers, len(split.labels)

    def run_before(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return (model.apply(params, preprocess(images, config.data), layers[0], method="before"),)

    returned = range(layers[0], config.model.depth) if following else layers
    observed = {layer: [kind for kind in kinds if kind in config.gate.kinds_in(layer)] for layer in returned}
    suffix, size = _compile_suffix(trained, params, settings[0], len(alphas), count, observed)
    prefix = per_image_program(run_before, size).run
    begin, end = (min(call * size, count) for call in hosts.process_share(-(-count // size)))
    shape = (len(settings), len(alphas), end - begin)
    gates: dict[int, dict[str, np.ndarray]] = {
        layer: {kind: np.zeros((*shape, count_gates(model)[kind]), bool) for kind in layer_kinds}
        for layer, layer_kinds in observed.items()
    }
    predictions = np.zeros(shape, np.int32)
    steered_V = [replicate(setting.steerings) for setting in settings]

    def run_share() -> None:
        """Fill this host's share of the gates and predictions."""
        with progress(len(settings) * (end - begin), description, "image") as bar:
            for indices in padded_chunks(begin, end, size, jax.local_device_count()):
                (x_BTD,) = prefix(params, gather_images(split.images, indices))
                filled = min(len(indices), end - indices[0])  # the rest of the chunk is padding
                place = slice(indices[0] - begin, indices[0] - begin + filled)
                for v, setting in enumerate(settings):
                    class_B = jax.device_put(setting.steered_by[indices].astype(np.int32), batch_sharding(local_mesh()))
                    for first in range(0, len(alphas), suffix.size):
                        part_A = np.minimum(np.arange(first, first + suffix.size), len(alphas) - 1)
                        alphas_A = replicate(np.asarray(alphas, np.float32)[part_A])
                        outputs, answers = jax.device_get(suffix.run(params, steered_V[v], alphas_A, x_BTD, class_B))
                        for layer, by_kind in gates.items():
                            for kind, values in by_kind.items():
                                values[v, part_A, place] = np.moveaxis(outputs[layer][kind][:filled], 1, 0)
                        predictions[v, part_A, place] = answers[:filled].T
                    bar.update(filled)

    hosts.on_every_process(run_share)

    gathered = {layer: {kind: _gather_images(g) for kind, g in by_kind.items()} for layer, by_kind in gates.items()}
    return SuffixResult(gathered, _gather_images(predictions))


def _gather_images(values: np.ndarray) -> np.ndarray:
    """Gather every host's share of the images: [V, A, n, ...] -> [V, A, N, ...]."""
    return np.moveaxis(hosts.gather_rows(np.moveaxis(values, 2, 0)), 0, 2)
