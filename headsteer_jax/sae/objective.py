"""The objective of training an autoencoder: reconstruction error, AuxK and a penalty for density.

Axes: B, N residuals, D width, F latents, K places for active latents, M dead latents.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from headsteer_jax.config.schema import SAEConfig
from headsteer_jax.runtime.precision import EXACT
from headsteer_jax.sae import sparse
from headsteer_jax.sae.autoencoder import SAEWeights, find_top_values, keep_from, keep_top_k, normalise_rows

# BatchTopK: one residual can have at most so many times k active latents, as room for them is set aside
BATCH_TOPK_ROOM = 4


def init_weights(key: jax.Array, u_ND: jax.Array, c: SAEConfig, F: int) -> SAEWeights:
    """Draw the initial weights; biases are 0, as the input is centred.

    Decoder rows have unit norm. `tied`: they are random, and the encoder is equal to them. `data`: they are training
    residuals, and the encoder is equal to them. `untied`: encoder and decoder are drawn independently.

    Args:
      key: of this autoencoder.
      u_ND: scaled training residuals; only `data` draws from them.
      c: the section `sae`.
      F: number of latents.
    """
    decoder_key, encoder_key = jax.random.split(key)
    D = u_ND.shape[1]
    if c.ablation.init == "data":
        rows = jax.random.choice(decoder_key, len(u_ND), (F,), replace=len(u_ND) < F)
        noise = jax.random.normal(encoder_key, (F, D), jnp.float32)  # separates rows that are drawn twice
        W_d = normalise_rows(u_ND[rows] + 1e-3 * noise)
    else:
        W_d = normalise_rows(jax.random.normal(decoder_key, (F, D), jnp.float32))
    W_e = normalise_rows(jax.random.normal(encoder_key, (F, D), jnp.float32)) if c.ablation.init == "untied" else W_d
    # JumpReLU begins with L0 = k, if pre-activations are standard normal
    theta = norm.ppf(1.0 - c.k / F) if c.activation == "jumprelu" and c.k < F else 0.0
    return SAEWeights(W_e, jnp.zeros(F), W_d, jnp.zeros(D), jnp.full(F, theta, jnp.float32))


def find_batch_threshold(a: jax.Array, count: jax.Array) -> jax.Array:
    """Find the `count`-th largest of activations >= 0, from which on BatchTopK keeps all, by bisection.

    Floats >= 0 have the order of their bits, so 31 comparisons with every activation find it exactly, without a sort.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(a), jnp.int32)

    def halve(bit: jax.Array, low: jax.Array) -> jax.Array:
        middle = low | (1 << (30 - bit))
        return jnp.where(jnp.sum(bits >= middle) >= count, middle, low)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, jnp.int32(0)), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump_relu(a_BF: jax.Array, theta_F: jax.Array, bandwidth: float) -> tuple[jax.Array, jax.Array]:
    """Compute JumpReLU, a 1[a > theta], and the step 1[a > theta] itself (arXiv:2407.14435, eq. 11, 12).

    Their gradients with respect to theta are straight-through estimates with a rectangular kernel: -theta / bandwidth
    and -1 / bandwidth where |a - theta| < bandwidth / 2, else 0.
    """
    on_BF = (a_BF > theta_F).astype(a_BF.dtype)
    return a_BF * on_BF, on_BF


def _jump_relu_fwd(a_BF, theta_F, bandwidth):  # type: ignore[no-untyped-def]
    return jump_relu(a_BF, theta_F, bandwidth), (a_BF, theta_F)


def _jump_relu_bwd(bandwidth, saved, cotangents):  # type: ignore[no-untyped-def]
    a_BF, theta_F = saved
    grad_z_BF, grad_on_BF = cotangents
    near_BF = (a_BF > 0) & (jnp.abs(a_BF - theta_F) < bandwidth / 2)  # at 0 ReLU has cut off whatever lay below
    grad_theta_BF = jnp.where(near_BF, -(theta_F * grad_z_BF + grad_on_BF) / bandwidth, 0.0)
    return jnp.where(a_BF > theta_F, grad_z_BF, 0.0), grad_theta_BF.sum(axis=0)


jump_relu.defvjp(_jump_relu_fwd, _jump_relu_bwd)


class StepMetrics(NamedTuple):
    """Measurements of a training step beside its loss."""

    mse: jax.Array  # mean squared error per component of u
    fired: jax.Array  # [F] on how many residuals of the batch each latent fires
    l0: jax.Array  # mean number of active latents
    threshold: jax.Array  # BatchTopK: the smallest activation that stayed


def take_turns(dead_F: jax.Array, room: int, turn: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Choose `room` latents for AuxK: the dead ones, in turn if there are more -> (1 if dead, the latent), [M] each.

    Turn t begins at latent t * room modulo F, so that all dead latents have their turn, and those that do not revive do
    not keep the others from it. With room for all, the turn has no effect.
    """
    F = len(dead_F)
    place_F = (jnp.arange(F) - turn * room) % F
    many = jnp.sum(dead_F) > room
    urgency_F = dead_F.astype(jnp.float32) * jnp.where(many, 2.0 - place_F / F, 1.0)
    urgency_M, latent_M = jax.lax.top_k(urgency_F, room)
    return (urgency_M > 0).astype(jnp.float32), latent_M


def aux_k_loss(
    sae: SAEWeights, u_BD: jax.Array, u_hat_BD: jax.Array, dead_F: jax.Array, k_aux: int, precision: Any = EXACT,
    turn: jax.Array | int = 0,
) -> jax.Array:  # fmt: skip
    """Compute AuxK [TopK, A.2]: the top k_aux of the dead latents reconstruct the error of the living ones.

    The error e = u - u_hat is detached, its reconstruction has no decoder bias, and the loss is relative to e's
    variance in the batch; it is 0 if no latent is dead. If more than 2 k_aux latents are dead, 2 k_aux of them take
    part at a time, by turns, so that the work does not grow with F.

    Args:
      turn: the number of the training step.
    """
    e_BD = jax.lax.stop_gradient(u_BD - u_hat_BD)
    dead_M, index_M = take_turns(dead_F, min(2 * k_aux, dead_F.shape[0]), turn)
    u_centred_BD = u_BD - jax.lax.stop_gradient(sae.b_d)
    a_BM = jax.nn.relu(jnp.matmul(u_centred_BD, sae.W_e[index_M].T, precision=precision) + sae.b_e[index_M])
    z_BM = keep_top_k(a_BM * dead_M, min(k_aux, len(index_M)))
    e_hat_BD = jnp.matmul(z_BM, sae.W_d[index_M], precision=precision)
    variance = jnp.sum((e_BD - e_BD.mean(axis=0)) ** 2)
    return jnp.where(jnp.any(dead_F), jnp.sum((e_BD - e_hat_BD) ** 2) / jnp.maximum(variance, 1e-12), 0.0)


def prefix_lengths(c: SAEConfig, F: int) -> list[int]:
    """Return the number of latents of each Matryoshka prefix, in rising order; the last is F."""
    return sorted({max(1, round(share * F)) for share in c.prefixes} | {F})


class Objective(NamedTuple):
    """The static settings of the loss."""

    c: SAEConfig
    max_k: int  # the largest k that a training step can have
    k_aux: int  # latents of AuxK; 0: without it
    use_sparse: bool  # TopK and BatchTopK by `sparse`, which must be available: the same but for rounding
    precision: Any = EXACT  # of the products


class Codes(NamedTuple):
    """The latents of a batch of residuals: dense, or only those that are active."""

    z: jax.Array  # [B, F], or [B, K] beside `latents`
    latents: jax.Array | None  # [B, K] int32, the latents that have the values z; None: z is dense
    penalty: jax.Array  # what the loss adds for density
    threshold: jax.Array  # BatchTopK: the smallest activation that stayed, else 0


def _fold_bias(sae: SAEWeights, precision: Any) -> jax.Array:
    """Fold the decoder's bias into the encoder's, [F]: W_e (u - b_d) + b_e = W_e u + (b_e - W_e b_d).

    So its gradient is a product of a vector and not of the whole batch, which is one of six dense products of a step.
    """
    return sae.b_e - jnp.matmul(sae.W_e, sae.b_d, precision=precision)


def _compute_pre_activations(sae: SAEWeights, u_BD: jax.Array, precision: Any) -> jax.Array:
    """Compute a = ReLU(W_e (u - b_d) + b_e), [B, F], for training."""
    return jax.nn.relu(jnp.matmul(u_BD, sae.W_e.T, precision=precision) + _fold_bias(sae, precision))


def _encode_top_k(sae: SAEWeights, u_BD: jax.Array, k: jax.Array, objective: Objective) -> Codes:
    """Encode a batch by TopK or BatchTopK, neither of which needs a penalty."""
    c, max_k, _, use_sparse, precision = objective
    F, latents_BK, threshold = len(sae.b_e), None, jnp.zeros(())
    batch_top_k = c.activation == "batch_topk"
    places = min(BATCH_TOPK_ROOM * max_k, F) if batch_top_k else max_k
    row_k = jnp.minimum(BATCH_TOPK_ROOM * k, F) if batch_top_k else k
    if use_sparse:
        z, latents_BK = sparse.encode_top_k(u_BD, sae.W_e, _fold_bias(sae, precision), row_k, places)
        best = z
    else:
        a_BF = _compute_pre_activations(sae, u_BD, precision)
        best = find_top_values(a_BF, places)
        z = keep_from(a_BF, best, row_k)
        best = jnp.where(jnp.arange(best.shape[-1]) < row_k, best, 0.0)
    if batch_top_k:  # the threshold is searched for among the rows' largest values, which are few
        z = jnp.where(z < find_batch_threshold(best, len(u_BD) * k), 0.0, z)  # NaN stays
        threshold = jnp.min(jnp.where(z > 0, z, jnp.inf))
    return Codes(z, latents_BK, jnp.zeros(()), threshold)


def _encode_above_threshold(sae: SAEWeights, u_BD: jax.Array, k: jax.Array, objective: Objective) -> Codes:
    """Encode a batch by JumpReLU or ReLU, whose penalty keeps the latents sparse."""
    c, precision = objective.c, objective.precision
    z_BF, on_BF = jump_relu(_compute_pre_activations(sae, u_BD, precision), sae.threshold, c.bandwidth)
    if c.activation == "jumprelu":
        penalty = c.l0_weight * (jnp.sum(on_BF) / len(u_BD) / k - 1.0) ** 2
    else:
        length_F = jnp.linalg.norm(sae.W_d, axis=1)
        penalty = c.l1_weight * jnp.mean(jnp.matmul(z_BF, length_F, precision=precision)) / u_BD.shape[1] ** 0.5
    return Codes(z_BF, None, penalty, jnp.zeros(()))


def autoencoder_loss(
    sae: SAEWeights, u_BD: jax.Array, dead_F: jax.Array, k: jax.Array, objective: Objective, turn: jax.Array | int = 0
) -> tuple[jax.Array, StepMetrics]:
    """Compute the loss: squared error relative to the batch's variance, plus AuxK, plus a penalty for density.

    With Matryoshka prefixes the error is their mean. The penalty is 0 for TopK and BatchTopK;
    l0_weight (L0 / k - 1)^2 for JumpReLU (arXiv:2407.19200's target); and l1_weight times the mean of
    sum_j z_j |d_j| / sqrt(D) for ReLU.

    Args:
      sae: the weights of one autoencoder.
      u_BD: the scaled input.
      dead_F: bool, the latents that AuxK revives.
      k: int32 scalar, at most objective.max_k.
      objective: everything else that the loss depends on.
      turn: the number of the training step, by which dead latents take turns in AuxK.
    """
    c, F = objective.c, len(sae.b_e)
    if c.activation in ("topk", "batch_topk"):
        z, latents_BK, penalty, threshold = _encode_top_k(sae, u_BD, k, objective)
    else:
        z, latents_BK, penalty, threshold = _encode_above_threshold(sae, u_BD, k, objective)

    error, u_hat_BD, begin = jnp.zeros(()), jnp.broadcast_to(sae.b_d, u_BD.shape), 0
    lengths = prefix_lengths(c, F)
    for end in lengths:
        if latents_BK is not None:
            inside = z if len(lengths) == 1 else jnp.where((latents_BK >= begin) & (latents_BK < end), z, 0.0)
            u_hat_BD = u_hat_BD + sparse.sum_weighted_rows(inside, latents_BK, sae.W_d)
        else:
            part_BD = jnp.matmul(z[:, begin:end], sae.W_d[begin:end], precision=objective.precision)
            u_hat_BD = u_hat_BD + part_BD
        last, begin = jnp.sum((u_BD - u_hat_BD) ** 2), end
        error += last / len(lengths)
    total = error / jnp.sum((u_BD - u_BD.mean(axis=0)) ** 2) + penalty
    if objective.k_aux:
        total += c.aux_weight * aux_k_loss(sae, u_BD, u_hat_BD, dead_F, objective.k_aux, objective.precision, turn)
    if latents_BK is None:
        fired_F = jnp.sum(z > 0, axis=0, dtype=jnp.float32)
    else:
        fired_F = sparse.count_firings(z, latents_BK, F)
    return total, StepMetrics(last / u_BD.size, fired_F, fired_F.sum() / len(u_BD), threshold)


def remove_radial_gradient(grads: SAEWeights, sae: SAEWeights) -> SAEWeights:
    """Remove the part of the gradient that would only change the norms of the decoder rows [TopK, A.1]."""
    radial_F1 = jnp.sum(grads.W_d * sae.W_d, axis=-1, keepdims=True)
    return grads._replace(W_d=grads.W_d - radial_F1 * sae.W_d)
