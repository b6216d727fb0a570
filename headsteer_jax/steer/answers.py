"""The model's answers for images, the gates and the latents behind them, and its answers when it is steered.

Images pass three programs: the layers before the steered one; steering, which changes what that layer reads; and the
layers from there on. The last is the same program with and without steering, so that answers differ by the steering
alone, and with alpha 0 in delta form not at all.

Axes: B images of a call, N images, T tokens, D width, C classes, A gated layers of one kind, n gates of one kind in a
layer, F latents, K strongest latents.
"""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config, DataConfig, GateKind, SteerConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import check_classes
from headsteer_jax.data.names import normalise_name
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.call_limits import choose_call_limits
from headsteer_jax.model.passes import per_image_program, replicate
from headsteer_jax.model.vit import Intervention, TrainedModel, ViT, predict_class
from headsteer_jax.runtime.mesh import batch_sharding, local_mesh
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.by_image import ImageStrategy, ReadResiduals
from headsteer_jax.steer.catalogue import STRATEGIES, find_strategy
from headsteer_jax.steer.steering import Steering, apply_steering
from headsteer_jax.steer.strategies import Choice, differs_by_class
from headsteer_jax.steer.sweep import encode_sparse, measure_for_strategy, strategy_rng

IMAGES_AT_ONCE = 64  # of a call on each device, however few images there are: every image's bits are of one program


class Answers(NamedTuple):
    """The model's answers for N images, and which of its parts ran."""

    label: np.ndarray  # [N] int32, the class of the largest logit
    confidence: np.ndarray  # [N] float32, that class's probability (softmax)
    # by kind, [N, A, n] bool: of the layers that have it, ascending, which heads, sublayers (attention, MLP) or patches
    # (tokens) ran
    gates: dict[str, np.ndarray]


class Predictions(NamedTuple):
    """The model's answers for N images, their strongest latents, and the steered answers."""

    label: np.ndarray  # [N] int32, the class of the largest logit
    confidence: np.ndarray  # [N] float32, that class's probability (softmax)
    gates: dict[str, np.ndarray]  # as in `Answers`
    latents: np.ndarray  # [N, K] int32 of the first autoencoder, in the CLS residual, the strongest first
    activations: np.ndarray  # [N, K] float32, theirs; 0: fewer than K latents are active
    steered: Answers | None  # None: nothing is steered


class SteeringRule(NamedTuple):
    """What is changed in which image: a strategy's choices, and the row of them that steers each image."""

    sae: Autoencoder
    strength: np.ndarray  # [F] mean activation where a latent fires
    # (images, the unsteered model's classes [B]) -> choices, and a row for each image
    choose: Callable[["ReadImages", np.ndarray], tuple[Choice, np.ndarray]]
    least_confidence: float = 0.0  # an image whose unsteered answer is less confident is not steered


class ReadImages(NamedTuple):
    """The CLS residuals of images."""

    x: np.ndarray  # [B, D] that enter the steered layer
    guess: np.ndarray  # [B, D] that enter the layer from whose input a class is guessed


Predict = Callable[[np.ndarray], Predictions]


def parse_steering(text: str, class_names: tuple[str, ...], flag: str) -> tuple[str, int | None]:
    """Parse `STRATEGY` or `STRATEGY:CLASS`, where a strategy may be a user's `module:function`.

    Args:
      text: what is parsed; a class may have colons in its name.
      flag: where it was given, for errors.

    Returns:
      The name of the strategy, and the class; None: there is none.

    Raises:
      HeadSteerError: there is no such strategy or class, or the strategy chooses for each image by itself.
    """
    name, colon, class_name = text.partition(":")
    if colon and name not in STRATEGIES:
        function, colon, class_name = class_name.partition(":")
        name = f"{name}:{function}"
    try:
        strategy = find_strategy(name)
    except HeadSteerError as error:
        unknown, cause = text.partition(":")[0], error.__cause__
        is_missing = isinstance(cause, ModuleNotFoundError) and f"{unknown}.".startswith(f"{cause.name}.")
        if re.fullmatch(r"[\w.]+:[^\W\d][\w.]*", name) and not is_missing:  # a user's module, which has a fault
            raise
        close = difflib.get_close_matches(unknown, STRATEGIES, n=1)
        advice = f"did you mean {close[0]!r}? There are" if close else "choose from"
        raise HeadSteerError(
            f"{flag}={text}: there is no strategy {unknown!r}; {advice} {', '.join(STRATEGIES)}, and module:function"
        ) from None
    if not colon:
        return name, None
    if isinstance(strategy, ImageStrategy):
        raise HeadSteerError(f"{flag}={text}: chooses for each image by itself; leave out the class: {flag}={name}")
    class_name = normalise_name(class_name)
    check_classes(flag, (class_name,), class_names)
    return name, class_names.index(class_name)


def find_steering_rule(run: RunData, name: str, label: int | None) -> SteeringRule:
    """Let a strategy choose from the first autoencoder as the sweep lets it.

    Args:
      name: of the strategy; a random one draws what the sweep draws for it, if it is one of config.steer.strategies.
      label: the class that steers every image; None: the class that the unsteered model predicts, if it is confident
        enough (config.steer.least_confidence).

    Raises:
      HeadSteerError: the strategy cannot choose from these latents or data.
    """
    config, sae, strategy = run.trained.config, run.autoencoders.member(0), find_strategy(name)
    stats = measure_for_strategy(run, name)
    names = config.steer.strategies
    number = names.index(name) if name in names else len(names)
    if isinstance(strategy, ImageStrategy):

        def choose_by_image(images: ReadImages, _: np.ndarray) -> tuple[Choice, np.ndarray]:
            read = ReadResiduals(images.guess, encode_sparse(sae, images.x))
            choice = strategy.choose(read, stats, config.steer, strategy_rng(config, 0, number))
            return choice, np.arange(len(images.x), dtype=np.int32)

        return SteeringRule(sae, stats.strength, choose_by_image)
    choice = strategy(stats, config.steer, strategy_rng(config, 0, number))

    def choose_by_class(_: ReadImages, label_B: np.ndarray) -> tuple[Choice, np.ndarray]:
        return choice, label_B if label is None else np.full_like(label_B, label)

    least = config.steer.least_confidence if label is None and differs_by_class(choice) else 0.0
    return SteeringRule(sae, stats.strength, choose_by_class, least)


class _Programs(NamedTuple):
    """The three programs that images pass, on all devices of this host."""

    # ((params, sae), images) -> x [B, T, D], what a class is guessed from [B, D], gates by layer and kind, latents
    # [B, K], activations [B, K]
    read: Any
    steer: Any  # (steering, alpha, x [B, T, D], row [B]) -> x' [B, D]
    answer: Any  # (params, x [B, T, D], x' [B, D]) -> class [B], confidence [B], gates by layer and kind


@functools.lru_cache(maxsize=16)
def _make_programs(
    model: ViT, data: DataConfig, steer: SteerConfig, layers: tuple[int, int], latents: int, size: int, mesh: Mesh
) -> _Programs:
    """Make the programs for one layer that is read and steered, and for `size` images on each device.

    Args:
      layers: the steered layer, and the one from whose input a class is guessed.
      latents: K.
    """
    layer, guess_layer = layers

    def read(inputs: Any, images: jax.Array) -> Any:
        params, sae = inputs
        x_BTD, out = model.apply(
            params, preprocess(images, data), method=lambda m, x: m.blocks(m.embed(x), 0, stop=layer)
        )
        gates = jax.tree.map(lambda g: g > 0, out["gates"])
        guess_BD = x_BTD[:, 0] if guess_layer == layer else out["cls"][guess_layer]
        if sae is None:
            return x_BTD, guess_BD, gates, jnp.zeros((len(x_BTD), 0), jnp.int32), jnp.zeros((len(x_BTD), 0))
        strongest_BK, latents_BK = jax.lax.top_k(sae.encode(x_BTD[:, 0]), latents)
        return x_BTD, guess_BD, gates, latents_BK, strongest_BK

    def steer_rows(steering: Steering, alpha: jax.Array, x_BTD: jax.Array, row_B: jax.Array) -> tuple[jax.Array]:
        return (apply_steering(steering, x_BTD[:, 0], row_B, alpha, steer),)

    def answer(params: Any, x_BTD: jax.Array, steered_BD: jax.Array) -> Any:
        change = Intervention(None, lambda _: steered_BD, steer.target == "residual")

        def run(m: ViT) -> tuple[jax.Array, Any]:
            last_BTD, out = m.blocks(x_BTD, layer, interventions={layer: change})
            return m.classify(last_BTD[:, 0]), out["gates"]

        logits_BC, gates = model.apply(params, method=run)
        confidence_B = jnp.max(jax.nn.softmax(logits_BC), axis=-1)
        return predict_class(logits_BC), confidence_B, jax.tree.map(lambda g: g > 0, gates)

    return _Programs(
        per_image_program(read, size, mesh=mesh).run,
        per_image_program(steer_rows, size, fixed=2, arrays=2, mesh=mesh).run,
        per_image_program(answer, size, arrays=2, mesh=mesh).run,
    )


def make_predict(
    trained: TrainedModel,
    sae: Autoencoder | None = None,
    latents: int = 0,
    rule: SteeringRule | None = None,
    alpha: float = 0.0,
) -> Predict:
    """Make the function `images -> Predictions`, which is compiled once and may be called often.

    It takes [N, height, width, channels] uint8 images as they are stored, for any N, and IMAGES_AT_ONCE of them on each
    device at a time. What it computes of an image does not depend on N, but for strategies that draw at random for each
    image.

    Args:
      sae: whose latents are returned; None: none are.
      latents: K.
      rule: what is steered; None: nothing.
      alpha: how strongly.
    """
    config, mesh = trained.config, local_mesh()
    size = min(IMAGES_AT_ONCE, choose_call_limits(trained.model, config.machine, mesh).images)
    layers = config.sae_layer, config.guess_layer
    programs = _make_programs(trained.model, config.data, config.steer, layers, latents, size, mesh)
    params, sae = replicate((trained.params, sae))
    steered_sae: Any = replicate(rule.sae) if rule else None

    def place(rows: np.ndarray) -> Any:
        return jax.device_put(rows, batch_sharding(mesh))

    def answer(x_BTD: jax.Array, read_BD: jax.Array, before: Any) -> Answers:
        label_B, confidence_B, after = jax.device_get(programs.answer(params, x_BTD, read_BD))
        return Answers(label_B, confidence_B, _stack_by_kind(before | after, config))

    def run_call(images: np.ndarray) -> Predictions:
        """Predict exactly as many images as a call takes."""
        x_BTD, guess_BD, before, latents_BK, strongest_BK = programs.read((params, sae), place(images))
        before, latents_BK, strongest_BK = jax.device_get((before, latents_BK, strongest_BK))
        unsteered, steered = answer(x_BTD, x_BTD[:, 0], before), None
        if rule:
            x_BD, guess_BD = jax.device_get((x_BTD[:, 0], guess_BD))
            choice, row_B = rule.choose(ReadImages(x_BD, guess_BD), unsteered.label)
            steering = Steering(steered_sae, rule.strength, choice)
            (steered_BD,) = programs.steer(steering, np.float32(alpha), x_BTD, place(row_B))
            sure_B = unsteered.confidence >= rule.least_confidence
            steered = jax.tree.map(
                lambda after, as_before: np.where(sure_B.reshape(-1, *[1] * (after.ndim - 1)), after, as_before),
                answer(x_BTD, steered_BD, before), unsteered,
            )  # fmt: skip
        return Predictions(*unsteered, latents_BK, strongest_BK, steered)

    def predict(images: np.ndarray) -> Predictions:
        calls, count = [], size * mesh.size
        for begin in range(0, max(1, len(images)), count):  # even without images one call, which knows the shapes
            part = images[begin : begin + count]
            calls.append(run_call(np.pad(part, ((0, count - len(part)), *[(0, 0)] * 3))))
        predictions: Predictions = jax.tree.map(lambda *rows: np.concatenate(rows)[: len(images)], *calls)
        return predictions

    return predict


def _stack_by_kind(by_layer: Mapping[int, Mapping[GateKind, np.ndarray]], config: Config) -> dict[str, np.ndarray]:
    """Stack the gates of all layers: {layer: {kind: [B, n]}} -> by kind, [B, A, n]."""
    return {
        kind: np.stack([by_layer[layer][kind] for layer in config.layers_with(kind)], axis=1)
        for kind in config.gate.kinds
    }


def check_images(images: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Check that images are [N, *shape] uint8; raises HeadSteerError if they are not."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != shape:
        given = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise HeadSteerError(
            f"images: {given}, but they must be a uint8 array of shape (N, {', '.join(map(str, shape))}), as the run's "
            "dataset has them"
        )
