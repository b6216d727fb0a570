"""The effect on the model of an autoencoder's reconstruction in place of the CLS residual.

Axes: B, N images, T tokens, D width, H heads, C classes, S autoencoders.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.passes import Program, per_image_program, run_over_split
from headsteer_jax.model.vit import TrainedModel, predict_class
from headsteer_jax.sae.autoencoder import (
    Autoencoder,
    SAEWeights,
    Scaling,
    decode_scaled,
    encode_scaled,
    scale_input,
    unscale_output,
)
from headsteer_jax.steer.steering import run_from_layer


class ReplacementEffect(NamedTuple):
    """The effect of each autoencoder's reconstruction in place of the CLS residual, [S] each."""

    gate_agreement: np.ndarray  # the gate alone reads it: share of gate decisions that stay
    accuracy: np.ndarray  # the gate alone reads it
    usage: np.ndarray  # the gate alone reads it: share of its gates that are open
    usage_change: np.ndarray  # that usage less the unchanged model's
    accuracy_change: np.ndarray  # `accuracy` less the unchanged model's
    accuracy_residual: np.ndarray  # the whole block computes on it
    kl: np.ndarray  # the whole block: mean KL divergence from the unchanged model's predictions, in nats


def make_replacement_program(
    trained: TrainedModel, scaling: Scaling, k: int | None, mesh: Mesh | None = None
) -> Program:
    """Make a program of the parameters with the weights of S autoencoders, and images.

    Args:
      scaling: of all the autoencoders.
      k: TopK's; None: thresholds decide.
      mesh: see `per_image_program`.
    """
    config, model, layer = trained.config, trained.model, trained.config.sae_layer

    def run(inputs: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        params, weights_S = inputs
        x_BTD = model.apply(params, preprocess(images, config.data), layer, method="before")
        x_BD = x_BTD[:, 0]
        original_BC, original_BH = run_from_layer(model, params, x_BTD, x_BD, layer, "policy")
        original_BC = jax.nn.log_softmax(original_BC)

        def replace_by(weights: SAEWeights) -> tuple[jax.Array, ...]:
            # with the scaling as a constant, not as an argument: XLA then folds it, and the bits stay those of a run
            x_hat_BD = unscale_output(
                scaling, decode_scaled(weights, encode_scaled(weights, scale_input(scaling, x_BD), k))
            )
            gated_BC, gates_BH = run_from_layer(model, params, x_BTD, x_hat_BD, layer, "policy")
            block_BC = jax.nn.log_softmax(run_from_layer(model, params, x_BTD, x_hat_BD, layer, "residual")[0])
            kl_B = jnp.sum(jnp.exp(original_BC) * (original_BC - block_BC), axis=1)
            agreement_B = jnp.mean((gates_BH > 0) == (original_BH > 0), axis=1)
            usage_B = jnp.mean(gates_BH > 0, axis=1)
            return agreement_B, predict_class(gated_BC), usage_B, predict_class(block_BC), kl_B

        before = (predict_class(original_BC), jnp.mean(original_BH > 0, axis=1))
        return *before, *(values_SB.T for values_SB in jax.lax.map(replace_by, weights_S))

    return per_image_program(run, config.train.eval_batch, mesh=mesh)


def measure_replacement(trained: TrainedModel, autoencoders: Autoencoder, split: Split) -> ReplacementEffect:
    """Run the model from the autoencoders' layer on with reconstructed residuals, and compare.

    Args:
      autoencoders: S autoencoders, the leading axis of the weights.
    """
    program = make_replacement_program(trained, autoencoders.scaling, autoencoders.k)
    inputs = (trained.params, autoencoders.weights)
    results = run_over_split(program, inputs, split, "test: reconstructed residuals", predicted=0)
    answer_N, open_N, agreement_NS, gated_NS, open_NS, block_NS, kl_NS = results
    usage_S, accuracy_S = _average(open_NS), _average(gated_NS == split.labels[:, None])
    return ReplacementEffect(
        gate_agreement=_average(agreement_NS),
        accuracy=accuracy_S,
        usage=usage_S,
        usage_change=usage_S - _average(open_N),
        accuracy_change=accuracy_S - _average(answer_N == split.labels),
        accuracy_residual=_average(block_NS == split.labels[:, None]),
        kl=_average(kl_NS),
    )


def _average(values_N: np.ndarray) -> np.ndarray:
    """Average over images."""
    return np.asarray(np.mean(values_N, axis=0, dtype=np.float64))
