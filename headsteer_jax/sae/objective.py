"""What training an autoencoder minimises: reconstruction, AuxK and the price of sparsity.

Axes: B, N residuals, D width, F latents, K places for active latents, M dead latents.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from headsteer_jax.config.schema import SAEConfig
from headsteer_jax.sae import sparse
from headsteer_jax.sae.autoencoder import SAEWeights, compute_pre_activations, keep_top_k, normalise_rows

BATCH_TOPK_ROOM = 4  # times k: active latents of one residual under BatchTopK, at most; room for them is set aside


def init_weights(key: jax.Array, u_ND: jax.Array, c: SAEConfig, F: int) -> SAEWeights:
    """The start of training; biases are 0, as the input is centred.

    tied: random unit decoder rows, and the encoder equal to them. data: rows are training residuals made unit,
    likewise. untied: encoder and decoder drawn apart.

    Args:
      u_ND: training residuals, of which `data` draws.
    """
    decoder_key, encoder_key = jax.random.split(key)
    D = u_ND.shape[1]
    if c.ablation.init == "data":
        rows = jax.random.choice(decoder_key, len(u_ND), (F,), replace=len(u_ND) < F)
        noise = jax.random.normal(encoder_key, (F, D), jnp.float32)  # parts rows that are drawn twice
        W_d = normalise_rows(u_ND[rows] + 1e-3 * noise)
    else:
        W_d = normalise_rows(jax.random.normal(decoder_key, (F, D), jnp.float32))
    W_e = normalise_rows(jax.random.normal(encoder_key, (F, D), jnp.float32)) if c.ablation.init == "untied" else W_d
    # JumpReLU begins with L0 = k, if pre-activations are standard normal
    theta = norm.ppf(1.0 - c.k / F) if c.activation == "jumprelu" and c.k < F else 0.0
    return SAEWeights(W_e, jnp.zeros(F), W_d, jnp.zeros(D), jnp.full(F, theta, jnp.float32))


def find_batch_threshold(a: jax.Array, count: jax.Array) -> jax.Array:
    """The `count`-th largest of activations >= 0 (BatchTopK keeps all from there on), by halving the range of floats.

    Floats >= 0 are in the order of their bits, so 31 comparisons with everything find it exactly, without a sort.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(a), jnp.int32)

    def halve(bit: jax.Array, low: jax.Array) -> jax.Array:
        middle = low | (1 << (30 - bit))
        return jnp.where(jnp.sum(bits >= middle) >= count, middle, low)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, jnp.int32(0)), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump_relu(a_BF: jax.Array, theta_F: jax.Array, bandwidth: float) -> tuple[jax.Array, jax.Array]:
    """JumpReLU, a 1[a > theta], and the step 1[a > theta] itself (arXiv:2407.14435, eq. 11, 12).

    Their gradients by theta are straight-through estimates with a rectangular kernel: -theta / bandwidth and
    -1 / bandwidth where |a - theta| < bandwidth / 2, else 0.
    """
    on_BF = (a_BF > theta_F).astype(a_BF.dtype)
    return a_BF * on_BF, on_BF


def _jump_relu_fwd(a_BF, theta_F, bandwidth):  # type: ignore[no-untyped-def]
    return jump_relu(a_BF, theta_F, bandwidth), (a_BF, theta_F)


def _jump_relu_bwd(bandwidth, kept, cotangents):  # type: ignore[no-untyped-def]
    a_BF, theta_F = kept
    g_z_BF, g_on_BF = cotangents
    near_BF = (a_BF > 0) & (jnp.abs(a_BF - theta_F) < bandwidth / 2)  # at 0 ReLU has cut off what lay below
    by_theta_BF = jnp.where(near_BF, -(theta_F * g_z_BF + g_on_BF) / bandwidth, 0.0)
    return jnp.where(a_BF > theta_F, g_z_BF, 0.0), by_theta_BF.sum(axis=0)


jump_relu.defvjp(_jump_relu_fwd, _jump_relu_bwd)


class StepMetrics(NamedTuple):
    """What a training step says beside its loss."""

    mse: jax.Array  # mean squared error per component of u
    fired: jax.Array  # [F] how many of the batch each latent fires on
    l0: jax.Array  # mean number of active latents
    threshold: jax.Array  # BatchTopK: the smallest activation that stayed


def aux_k_loss(sae: SAEWeights, u_BD: jax.Array, u_hat_BD: jax.Array, dead_F: jax.Array, k_aux: int) -> jax.Array:
    """AuxK [TopK, A.2]: the dead latents' top k_aux reconstruct what the living ones leave.

    The residual e = u - u_hat is detached, the reconstruction has no decoder bias, and the error is relative to e's
    variance in the batch. 0 where no latent is dead. Of more than 2 k_aux dead latents the first 2 k_aux have their
    turn, so that the work does not grow with F; the others follow as these revive.
    """
    e_BD = jax.lax.stop_gradient(u_BD - u_hat_BD)
    dead_M, index_M = jax.lax.top_k(dead_F.astype(jnp.float32), min(2 * k_aux, dead_F.shape[0]))
    a_BM = jax.nn.relu((u_BD - jax.lax.stop_gradient(sae.b_d)) @ sae.W_e[index_M].T + sae.b_e[index_M])
    e_hat_BD = keep_top_k(a_BM * dead_M, min(k_aux, len(index_M))) @ sae.W_d[index_M]
    variance = jnp.sum((e_BD - e_BD.mean(axis=0)) ** 2)
    return jnp.where(jnp.any(dead_F), jnp.sum((e_BD - e_hat_BD) ** 2) / jnp.maximum(variance, 1e-12), 0.0)


def prefix_lengths(c: SAEConfig, F: int) -> list[int]:
    """How many latents each Matryoshka prefix has, all of them last."""
    return sorted({max(1, round(share * F)) for share in c.prefixes} | {F})


def autoencoder_loss(
    sae: SAEWeights, u_BD: jax.Array, dead_F: jax.Array, k: jax.Array, c: SAEConfig, most: int, k_aux: int, fast: bool
) -> tuple[jax.Array, StepMetrics]:
    """Squared error relative to the batch's variance, the mean over prefixes; plus AuxK; plus the sparsity's price.

    The price is 0 for TopK and BatchTopK; l0_weight (L0 / k - 1)^2 for JumpReLU (arXiv:2407.19200's target);
    l1_weight times the mean of sum_j z_j |d_j| / sqrt(D) for ReLU.

    Args:
      dead_F: bool.
      k: int32 scalar, at most `most`.
      k_aux: of AuxK; 0: without it.
      fast: TopK and BatchTopK by `sparse`, which must be available: the same but for rounding.
    """
    price, threshold = jnp.zeros(()), jnp.zeros(())
    F = len(sae.b_e)
    if c.activation in ("topk", "batch_topk"):
        room = most if c.activation == "topk" else min(BATCH_TOPK_ROOM * most, F)
        asked = k if c.activation == "topk" else jnp.minimum(BATCH_TOPK_ROOM * k, F)
        if fast:
            z, latents_BK = sparse.encode_top_k(u_BD, sae.W_e, sae.b_e - sae.W_e @ sae.b_d, asked, room)
        else:
            z = keep_top_k(compute_pre_activations(sae, u_BD), asked, room)
        if c.activation == "batch_topk":
            z = jnp.where(z < find_batch_threshold(z, len(u_BD) * k), 0.0, z)  # NaN stays
            threshold = jnp.min(jnp.where(z > 0, z, jnp.inf))
    else:
        z, on_BF = jump_relu(compute_pre_activations(sae, u_BD), sae.threshold, c.bandwidth)
        if c.activation == "jumprelu":
            price = c.l0_weight * (jnp.sum(on_BF) / len(u_BD) / k - 1.0) ** 2
        else:
            length_F = jnp.linalg.norm(sae.W_d, axis=1)
            price = c.l1_weight * jnp.mean(z @ length_F) / u_BD.shape[1] ** 0.5
        fast = False

    error, u_hat_BD, begin = jnp.zeros(()), jnp.broadcast_to(sae.b_d, u_BD.shape), 0
    lengths = prefix_lengths(c, F)
    for end in lengths:
        if fast:
            inside = z if len(lengths) == 1 else jnp.where((latents_BK >= begin) & (latents_BK < end), z, 0.0)
            u_hat_BD = u_hat_BD + sparse.sum_weighted_rows(inside, latents_BK, sae.W_d)
        else:
            u_hat_BD = u_hat_BD + z[:, begin:end] @ sae.W_d[begin:end]
        last, begin = jnp.sum((u_BD - u_hat_BD) ** 2), end
        error += last / len(lengths)
    total = error / jnp.sum((u_BD - u_BD.mean(axis=0)) ** 2) + price
    if k_aux:
        total += c.aux_weight * aux_k_loss(sae, u_BD, u_hat_BD, dead_F, k_aux)
    fired_F = sparse.count_firings(z, latents_BK, F) if fast else jnp.sum(z > 0, axis=0, dtype=jnp.float32)
    return total, StepMetrics(last / u_BD.size, fired_F, fired_F.sum() / len(u_BD), threshold)


def remove_radial_gradient(grads: SAEWeights, sae: SAEWeights) -> SAEWeights:
    """The gradient less what would only change the decoder rows' norms [TopK, A.1]."""
    radial_F1 = jnp.sum(grads.W_d * sae.W_d, axis=-1, keepdims=True)
    return grads._replace(W_d=grads.W_d - radial_F1 * sae.W_d)
