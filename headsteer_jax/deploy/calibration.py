"""What the layers of a model compute on the images of some classes: second moments, and least-squares refits from them.

A sublayer's output projection reads features f (the outputs of its heads, or its neurons) and should add t to the
residual. The second moments of f and t are enough to order the features, and to fit the projection of any subset.

Axes: n images of a chunk, T tokens, Q tokens that are queries, R rows (all Q of all images), D width, F features.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.data.augment import preprocess
from headsteer_jax.deploy.cost import count_tokens
from headsteer_jax.deploy.model import (
    DeployedConfig,
    DeployedModel,
    activate,
    attend,
    embed_images,
    multiply,
    project,
)

Chunk = jax.Array
SUBLAYER_PARAMS = ("out", "mlp_out")  # by sublayer: attention, MLP
CHUNK_ROWS = 8192  # tokens in a call


class Moments(NamedTuple):
    """Second moments of a sublayer's features and of what it should add, in float64."""

    ff: np.ndarray  # [F + 1, F + 1]; the last feature is 1, for the bias
    ft: np.ndarray  # [F + 1, D]
    rows: int

    def covariance(self) -> np.ndarray:
        """Compute the features' covariance [F, F]."""
        mean_F = self.ff[-1, :-1] / self.rows
        return self.ff[:-1, :-1] / self.rows - np.outer(mean_F, mean_F)


@functools.partial(jax.jit, static_argnums=0)
def embed_chunk(config: DeployedConfig, params: Any, images: jax.Array) -> Chunk:
    """Compute the residuals that enter layer 0, of uint8 images."""
    return embed_images(config, params, preprocess(images, config.data))


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def compute_features(config: DeployedConfig, params: Any, sublayer: int, x_BTD: Chunk, queries: int | None) -> Chunk:
    """Compute a sublayer's features: of attention from the residual that enters it, of the MLP likewise."""
    return activate(config, params, x_BTD[:, :queries], {}) if sublayer else attend(config, params, x_BTD, queries, {})


@functools.partial(jax.jit, static_argnums=2)
def add_projection(dense: Any, f_BQF: Chunk, queries: int | None, x_BTD: Chunk) -> Chunk:
    """Add a sublayer's projection of its features to the residual of the first tokens."""
    return x_BTD[:, :queries] + project(dense, f_BQF)


@jax.jit
def _sum_products(f_BQF: Chunk, t_BQD: Chunk) -> tuple[jax.Array, jax.Array]:
    f_RF, t_RD = f_BQF.reshape(-1, f_BQF.shape[-1]), t_BQD.reshape(-1, t_BQD.shape[-1])
    f_RF = jnp.concatenate([f_RF, jnp.ones((len(f_RF), 1))], axis=1)
    return multiply(f_RF.T, f_RF), multiply(f_RF.T, t_RD)


def count_queries(config: DeployedConfig, layer: int) -> int | None:
    """Count the tokens that a layer computes: None means all."""
    return 1 if layer == config.depth - 1 else None


def cut_into_chunks(config: DeployedConfig, images: np.ndarray) -> list[np.ndarray]:
    """Cut images into chunks of one size, so that there is one program; a last part that is shorter is left out.

    With fewer images than a chunk has, all of them are one chunk.
    """
    size = min(len(images), max(1, CHUNK_ROWS // count_tokens(config)))
    return [images[begin : begin + size] for begin in range(0, len(images) - size + 1, size)]


def sum_moments(features: Sequence[Chunk], targets: Sequence[Chunk]) -> Moments:
    """Compute the second moments of a sublayer from the chunks of its features and of what it should add."""
    ff: Any = 0.0
    ft: Any = 0.0
    for f_BQF, t_BQD in zip(features, targets, strict=True):
        part_ff, part_ft = _sum_products(f_BQF, t_BQD)
        ff, ft = ff + np.asarray(part_ff, np.float64), ft + np.asarray(part_ft, np.float64)
    return Moments(np.asarray(ff), np.asarray(ft), sum(f.shape[0] * f.shape[1] for f in features))


def walk_sublayers(model: DeployedModel, images: np.ndarray) -> Iterator[tuple[int, int, list[Chunk], list[Chunk]]]:
    """Yield every sublayer (layer, 0 or 1) with its features and the residuals that it is added to, in order."""
    config, params = model
    x = [embed_chunk(config, params, chunk) for chunk in cut_into_chunks(config, images)]
    for layer, layer_params in enumerate(params["layers"]):
        queries = count_queries(config, layer)
        for sublayer in (0, 1):
            features = [compute_features(config, layer_params, sublayer, chunk, queries) for chunk in x]
            x = [chunk[:, :queries] for chunk in x] if sublayer else x
            yield layer, sublayer, features, x
            dense = layer_params[SUBLAYER_PARAMS[sublayer]]
            x = [add_projection(dense, f, queries, chunk) for f, chunk in zip(features, x, strict=True)]


def fit_projection(moments: Moments, stay: np.ndarray, dense: Any, damping: float) -> dict[str, np.ndarray]:
    """Fit the projection of the features that stay, by least squares, damped towards the weights that they have.

    Args:
      stay: the features that stay, ascending.
      dense: `kernel` [F, D] and `bias` [D] of all features.
      damping: the penalty of a feature's weights, as a share of the features' mean variance.

    Returns:
      `kernel` [F, D], in which the rows of the others are 0, and `bias` [D].
    """
    places = np.append(stay, len(moments.ff) - 1)
    old = np.concatenate([np.asarray(dense["kernel"], np.float64)[stay], np.asarray(dense["bias"], np.float64)[None]])
    ff, ft = moments.ff[np.ix_(places, places)], moments.ft[places]
    penalty = np.full(
        len(places), damping * moments.rows * max(np.trace(moments.covariance()), 1e-12) / len(moments.ff)
    )
    penalty[-1] = 1e-9 * moments.rows
    new = old + np.linalg.solve(ff + np.diag(penalty), ft - ff @ old)
    kernel = np.zeros((len(moments.ff) - 1, new.shape[1]))
    kernel[stay] = new[:-1]
    return {"kernel": kernel.astype(np.float32), "bias": new[-1].astype(np.float32)}
