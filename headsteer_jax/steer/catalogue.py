"""The strategies by name: the built-in ones, and users' functions by their import path.

Axes: C classes, S chosen latents, D width.
"""

import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np

from headsteer_jax.config.schema import SteerConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.steer.by_image import (
    ImageStrategy,
    guessed_bias_directions,
    guessed_difference_directions,
    image_latents,
    image_random_directions,
)
from headsteer_jax.steer.directions import (
    gate_bias_directions,
    global_bias_directions,
    mean_difference_directions,
    probe_directions,
    random_bias_directions,
    random_directions,
    wrap_directions,
)
from headsteer_jax.steer.strategies import (
    Choice,
    LatentStatistics,
    Strategy,
    class_frequent_latents,
    gate_aligned_latents,
    global_frequent_latents,
    matched_random_latents,
    matched_superclass_latents,
    random_latents,
    superclass_latents,
)

# what a user writes: -> [S] latents and [S] weights of one class, or its direction [D]
ClassStrategy = Callable[[LatentStatistics, int], Any]

STRATEGIES: dict[str, Strategy | ImageStrategy] = {
    "class": class_frequent_latents,
    "global": global_frequent_latents,
    "random": random_latents,
    "matched_random": matched_random_latents,
    "gate_aligned": gate_aligned_latents,
    "superclass": superclass_latents,
    "matched_superclass": matched_superclass_latents,
    "mean_difference": mean_difference_directions,
    "probe": probe_directions,
    "random_direction": random_directions,
    "gate_bias": gate_bias_directions,
    "random_bias": random_bias_directions,
    "global_bias": global_bias_directions,
    "image_latents": ImageStrategy(image_latents, reads_latents=True, by_autoencoder=True),
    "image_random": ImageStrategy(image_random_directions, reads_latents=True, by_autoencoder=True),
    "guessed_bias": ImageStrategy(guessed_bias_directions, reads_latents=False, by_autoencoder=False),
    "guessed_difference": ImageStrategy(guessed_difference_directions, reads_latents=False, by_autoencoder=True),
}

GUESSING_STRATEGIES = ("guessed_bias", "guessed_difference")  # a linear classifier guesses the class

# made to move the residual as far as other latents do in the mode add and delta form
MATCHED_STRATEGIES = (
    "matched_random", "matched_superclass", "mean_difference", "probe", "random_direction", "image_random",
)  # fmt: skip


# what a user's function may return, for errors
_BOTH_FORMS = "it must return two arrays, of latents (integers) and of weights (numbers), or one array, a direction"


def find_strategy(name: str) -> Strategy | ImageStrategy:
    """Find a strategy: one of ours by its name, or a user's by its import path, `module:function`.

    Raises:
      HeadSteerError: the name is not known, or the path leads to nothing that can be called.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        raise HeadSteerError(
            f"config.steer.strategies: there is no {name!r}; choose from {', '.join(STRATEGIES)}, or module:function"
        )
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise HeadSteerError(f"config.steer.strategies: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise HeadSteerError(f"config.steer.strategies: {name!r} is not a function")
    return per_class_strategy(function, name)


def per_class_strategy(function: ClassStrategy, name: str) -> Strategy:
    """Make a strategy that asks a user's function about every class.

    Its errors name the strategy, the class and what the function returned: latents that do not exist or occur twice,
    weights that are not finite, arrays that do not all have the same length, or a direction of another width.
    """

    def choose(stats: LatentStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
        parts: list[tuple[np.ndarray, ...]] = []
        for label in range(len(stats.class_frequency)):
            class_name = f" ({stats.class_names[label]!r})" if stats.class_names else ""
            source = f"strategy {name!r}, class {label}{class_name}"
            answer = function(stats, label)
            is_direction = not (isinstance(answer, tuple | list) and len(answer) == 2)
            part: tuple[np.ndarray, ...]
            if is_direction:
                part = (_read_direction(answer, stats.decoder.shape[1], source),)
            else:
                part = _read_pair(answer, source)
            if parts and len(part) != len(parts[0]):
                raise HeadSteerError(f"{source}: it must return the same for every class: latents, or a direction")
            if not is_direction:
                latents, weights = part[0], part[-1]
                length = len(parts[0][0]) if parts else latents.size
                _check_pair(latents, weights, length, len(stats.frequency), source)
            parts.append(part)
        if len(parts[0]) == 1:
            return wrap_directions(np.stack([direction for (direction,) in parts]))
        latents_CS, weights_CS = (np.stack(rows) for rows in zip(*parts, strict=True))
        return Choice(latents_CS.astype(np.int32), weights_CS)

    return choose


def _read_direction(answer: Any, width: int, source: str) -> np.ndarray:
    """Read the direction that a user's function returned, of whatever NumPy makes an array, as [D] float32.

    Raises:
      HeadSteerError: it has another shape, is zero or has numbers that are not finite; `source` names the function and
        the class.
    """
    try:
        direction = np.asarray(answer)
    except (TypeError, ValueError):  # lists of different lengths
        direction = np.zeros(())
    if direction.ndim == 0:
        raise HeadSteerError(f"{source}: {_BOTH_FORMS}")
    if direction.shape != (width,):
        raise HeadSteerError(
            f"{source}: a direction must have the shape ({width},), as the residual has; this array has "
            f"{direction.shape}. {_BOTH_FORMS}"
        )
    try:
        with np.errstate(over="ignore"):
            direction = direction.astype(np.float32)  # as it is used: what overflows is infinite
    except (TypeError, ValueError):
        raise HeadSteerError(f"{source}: a direction must be numbers, not {direction.dtype}") from None
    if not np.isfinite(direction).all():
        wrong = direction[~np.isfinite(direction)][0]
        raise HeadSteerError(f"{source}: the direction has a number {wrong}; all must be finite")
    if not direction.any():
        raise HeadSteerError(f"{source}: the direction is zero, so that it would move nothing")
    return direction


def _read_pair(pair: Any, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Read what a user's function returned as int64 latents and float32 weights.

    Raises:
      HeadSteerError: it is no pair, or not of integers and numbers; `source` names the function and the class.
    """
    try:
        latents, weights = (np.asarray(part) for part in pair)
        latents = latents.astype(np.int64, casting="same_kind" if latents.size else "unsafe")
        with np.errstate(over="ignore"):
            return latents, weights.astype(np.float32)  # as they are used: what overflows is infinite
    except (TypeError, ValueError):
        raise HeadSteerError(f"{source}: {_BOTH_FORMS}") from None


def _check_pair(latents: np.ndarray, weights: np.ndarray, length: int, count: int, source: str) -> None:
    """Check one class's latents and weights.

    Args:
      length: how many there must be, as for the first class.
      count: of latents that exist.
      source: names the strategy and the class in errors.

    Raises:
      HeadSteerError: they are not of that length, a latent does not exist or occurs twice, or a weight is not finite.
    """
    if latents.shape != (length,) or weights.shape != (length,) or not length:
        raise HeadSteerError(
            f"{source}: latents of shape {latents.shape} and weights of shape {weights.shape}; both must have "
            "the same length, at least 1 and the same for every class"
        )
    if latents.min() < 0 or latents.max() >= count:
        unknown = latents[(latents < 0) | (latents >= count)][0]
        raise HeadSteerError(f"{source}: there is no latent {unknown}; choose from 0 to {count - 1}")
    if len(np.unique(latents)) < length:
        twice = next(latent for latent in latents if (latents == latent).sum() > 1)
        raise HeadSteerError(f"{source}: latent {twice} is chosen twice; each may be chosen once")
    if not np.isfinite(weights).all():
        raise HeadSteerError(f"{source}: a weight is {weights[~np.isfinite(weights)][0]}; it must be a finite number")
