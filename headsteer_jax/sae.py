"""The top-k sparse autoencoder of the CLS residual [TopK], several seeds trained side by side by vmap.

    u = (x - mean) * scale;  z = TopK_k(ReLU((u - b_d) W_e + b_e));  u_hat = z W_d + b_d

with unit-norm decoder rows. Axes: N, B residuals, D width, F latents, S seeds.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headsteer_jax.checkpoint import Checkpoints
from headsteer_jax.config import Config, HeadSteerError, SAEConfig
from headsteer_jax.progress import progress, say


class SAE(NamedTuple):
    """One autoencoder's parameters, or with a leading axis S those of several seeds."""

    W_e: jax.Array  # [D, F] encoder
    b_e: jax.Array  # [F]
    W_d: jax.Array  # [F, D] decoder, rows of norm 1
    b_d: jax.Array  # [D]


class Scaling(NamedTuple):
    """How residuals become the autoencoder's input: saved with it."""

    mean: np.ndarray  # [D] float32, over the training split
    scale: np.ndarray  # [] float32: the mean norm of (x - mean) * scale is sqrt(D)


def fit_scaling(x_ND: np.ndarray) -> Scaling:
    """Centre and scale from the training split, accumulated in float64.

    Raises:
      HeadSteerError: the residuals are not finite, or all the same.
    """
    x_ND = np.asarray(x_ND, np.float64)
    if not np.isfinite(x_ND).all():
        raise HeadSteerError("the residuals hold NaN or infinity: the model's training went wrong; train it again")
    mean = x_ND.mean(axis=0)
    norm = np.linalg.norm(x_ND - mean, axis=1).mean()
    if norm < 1e-6 * (1.0 + np.linalg.norm(mean)):
        raise HeadSteerError("the residuals are the same for every image: there is nothing to decompose at this layer")
    return Scaling(mean.astype(np.float32), np.asarray(np.sqrt(x_ND.shape[1]) / norm, np.float32))


def centre(scaling: Scaling, x_BD: jax.Array | np.ndarray) -> jax.Array:
    """u = (x - mean) * scale."""
    return (jnp.asarray(x_BD) - scaling.mean) * scaling.scale


def uncentre(scaling: Scaling, u_BD: jax.Array) -> jax.Array:
    """x = u / scale + mean."""
    return u_BD / scaling.scale + scaling.mean


def init(key: jax.Array, width: int, latents: int) -> SAE:
    """Tied start: random unit decoder rows, the encoder their transpose, no biases (the input is centred)."""
    W_d = _unit_rows(jax.random.normal(key, (latents, width), jnp.float32))
    return SAE(W_d.T, jnp.zeros(latents), W_d, jnp.zeros(width))


def top_k(a_BF: jax.Array, k: int) -> jax.Array:
    """TopK_k: the k largest of each row stay, the rest become 0.

    Of values that tie with the k-th, all stay: among float32 activations that are not 0 this does not happen in
    practice, and it spares a scatter.
    """
    if k >= a_BF.shape[-1]:
        return a_BF
    # the least of the k, not their last: XLA's CPU compiler would turn the slice into a sort of the whole row
    kth_B1 = jnp.min(jax.lax.top_k(jax.lax.stop_gradient(a_BF), k)[0], axis=-1, keepdims=True)
    return jnp.where(a_BF >= kth_B1, a_BF, 0.0)


def encode(sae: SAE, u_BD: jax.Array, k: int) -> jax.Array:
    """z = TopK_k(ReLU((u - b_d) W_e + b_e)), [B, F] >= 0 [TopK, eq. 3]."""
    return top_k(jax.nn.relu((u_BD - sae.b_d) @ sae.W_e + sae.b_e), k)


def decode(sae: SAE, z_BF: jax.Array) -> jax.Array:
    """u_hat = z W_d + b_d, [B, D]."""
    return z_BF @ sae.W_d + sae.b_d


def aux_k_loss(sae: SAE, u_BD: jax.Array, u_hat_BD: jax.Array, dead_F: jax.Array, k_aux: int) -> jax.Array:
    """AuxK [TopK, A.2]: the dead latents' top k_aux reconstruct what the living ones leave.

    The residual e = u - u_hat is detached, the reconstruction has no decoder bias, and the error is relative to e's
    variance in the batch. 0 where no latent is dead. Of more than 2 k_aux dead latents the first 2 k_aux have their
    turn, so that the work does not grow with F; the others follow as these revive.
    """
    e_BD = jax.lax.stop_gradient(u_BD - u_hat_BD)
    dead_M, index_M = jax.lax.top_k(dead_F.astype(jnp.float32), min(2 * k_aux, dead_F.shape[0]))
    a_BM = jax.nn.relu((u_BD - jax.lax.stop_gradient(sae.b_d)) @ sae.W_e[:, index_M] + sae.b_e[index_M])
    e_hat_BD = top_k(a_BM * dead_M, k_aux) @ sae.W_d[index_M]
    variance = jnp.sum((e_BD - e_BD.mean(axis=0)) ** 2)
    return jnp.where(jnp.any(dead_F), jnp.sum((e_BD - e_hat_BD) ** 2) / jnp.maximum(variance, 1e-12), 0.0)


def loss(
    sae: SAE, u_BD: jax.Array, dead_F: jax.Array, k: int, k_aux: int, aux_weight: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Squared error relative to the batch's variance, plus AuxK.

    Returns:
      The loss, and (mean squared error per component of u, [F] how many of the batch each latent fires on).
    """
    z_BF = encode(sae, u_BD, k)
    u_hat_BD = decode(sae, z_BF)
    error = jnp.sum((u_BD - u_hat_BD) ** 2)
    total = error / jnp.sum((u_BD - u_BD.mean(axis=0)) ** 2)
    if aux_weight > 0:
        total += aux_weight * aux_k_loss(sae, u_BD, u_hat_BD, dead_F, k_aux)
    return total, (error / u_BD.size, jnp.sum(z_BF > 0, axis=0))


def _unit_rows(W_FD: jax.Array) -> jax.Array:
    return W_FD / jnp.linalg.norm(W_FD, axis=-1, keepdims=True)


def without_radial(grads: SAE, sae: SAE) -> SAE:
    """The gradient less what would only change the decoder rows' norms [TopK, A.1]."""
    radial_F1 = jnp.sum(grads.W_d * sae.W_d, axis=-1, keepdims=True)
    return grads._replace(W_d=grads.W_d - radial_F1 * sae.W_d)


class SAEState(NamedTuple):
    """Everything that an autoencoder's training is; with a leading axis S on every leaf but `epoch`."""

    sae: SAE
    optimizer: Any
    silent: jax.Array  # [F] int32, steps since the latent last fired
    epoch: jax.Array  # int32, epochs done


def _optimizer(config: SAEConfig, steps: int) -> optax.GradientTransformation:
    """Adam with linear warm-up, and linear decay over the last share of the steps."""
    warmup, decay = round(config.warmup * steps), round(config.decay * steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(config.learning_rate / max(warmup, 1), config.learning_rate, warmup),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, max(decay, 1)),
        ],
        [warmup, steps - decay],
    )
    return optax.adam(schedule)


def make_epoch(config: Config, steps_per_epoch: int) -> Callable[..., Any]:
    """`(state, u [N, D], order [steps, B]) -> (state, metrics [steps, S])`: one epoch of all seeds in one call."""
    c = config.sae
    tx = _optimizer(c, c.epochs * steps_per_epoch)
    k_aux = c.aux_k or config.model.width // 2
    window = c.dead_window * steps_per_epoch

    def step(one: SAEState, u_BD: jax.Array, aux_weight: float) -> tuple[SAEState, dict[str, jax.Array]]:
        dead_F = one.silent >= window
        grads, (mse, fired_F) = jax.grad(loss, has_aux=True)(one.sae, u_BD, dead_F, c.k, k_aux, aux_weight)
        updates, opt = tx.update(without_radial(grads, one.sae), one.optimizer, one.sae)
        sae = optax.apply_updates(one.sae, updates)
        sae = sae._replace(W_d=_unit_rows(sae.W_d))
        silent_F = jnp.where(fired_F > 0, 0, one.silent + 1)
        return one._replace(sae=sae, optimizer=opt, silent=silent_F), {"mse": mse, "dead": jnp.mean(dead_F)}

    axes = SAEState(sae=0, optimizer=0, silent=0, epoch=None)  # type: ignore[arg-type]

    def all_seeds(state: SAEState, u_BD: jax.Array) -> tuple[SAEState, dict[str, jax.Array]]:
        with_aux, without = (
            jax.vmap(functools.partial(step, aux_weight=weight), in_axes=(axes, None), out_axes=(axes, 0))
            for weight in (c.aux_weight, 0.0)
        )
        # AuxK is 0 where nothing is dead; outside of vmap the branch skips its work
        return jax.lax.cond(jnp.any(state.silent >= window), with_aux, without, state, u_BD)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state: SAEState, u_ND: jax.Array, order: jax.Array) -> tuple[SAEState, dict[str, jax.Array]]:
        state, metrics = jax.lax.scan(lambda s, indices: all_seeds(s, u_ND[indices]), state, order)
        return state._replace(epoch=state.epoch + 1), metrics

    return epoch


def initial_state(config: Config, steps_per_epoch: int) -> SAEState:
    """The start of all seeds; seed s's key is fold_in(fold_in(key(config.seed), 100), s)."""
    c = config.sae
    key = jax.random.fold_in(jax.random.key(config.seed), 100)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(c.seeds))
    saes = jax.vmap(lambda k: init(k, config.model.width, config.latents))(keys)
    opt = jax.vmap(_optimizer(c, c.epochs * steps_per_epoch).init)(saes)
    return SAEState(saes, opt, jnp.zeros((c.seeds, config.latents), jnp.int32), jnp.int32(0))


def train_sae(config: Config, x_ND: np.ndarray, directory: Path) -> tuple[SAE, Scaling, dict[str, np.ndarray]]:
    """Train all seeds on the training split's residuals, resumed where it stopped.

    Args:
      x_ND: float32 residuals of the training split.
      directory: for the checkpoints.

    Returns:
      The autoencoders (leading axis S), the scaling, and the curves: `mse` and `dead`, [epochs, S] epoch means.

    Raises:
      HeadSteerError: a batch larger than the data; residuals not finite or constant; the loss turned NaN.
    """
    c = config.sae
    if c.batch > len(x_ND):
        raise HeadSteerError(f"config.sae.batch = {c.batch}: allowed is at most the {len(x_ND)} training images")
    scaling = fit_scaling(x_ND)
    u_ND = centre(scaling, x_ND)
    steps = len(x_ND) // c.batch
    state = initial_state(config, steps)
    curves = {name: np.zeros((c.epochs, c.seeds), np.float32) for name in ("mse", "dead")}
    checkpoints = Checkpoints(directory / "checkpoints", keep=2)
    if checkpoints.latest() is not None:
        (state, curves), _ = checkpoints.restore((state, curves))
        curves = {name: np.array(values) for name, values in curves.items()}
    start = int(state.epoch)
    if 0 < start < c.epochs:
        say(f"sae: going on from epoch {start}")
    epoch = make_epoch(config, steps)
    every = max(1, c.epochs // 10)  # epochs between checkpoints
    with progress(c.epochs, "sae", "epoch", initial=start) as bar:
        for number in range(start, c.epochs):
            order = np.random.default_rng([config.seed, 2, number]).permutation(len(x_ND))
            state, metrics = epoch(state, u_ND, order[: steps * c.batch].reshape(steps, c.batch))
            for name in curves:
                curves[name][number] = np.asarray(metrics[name]).mean(axis=0)
            if not np.isfinite(curves["mse"][number]).all():
                raise HeadSteerError(
                    f"sae: the loss turned NaN in epoch {number}; the last good checkpoint is in "
                    f"{checkpoints.directory}; lower config.sae.learning_rate"
                )
            if (number + 1) % every == 0 or number + 1 == c.epochs:
                checkpoints.save(number + 1, (state, curves), {"layer": config.sae_layer, "k": c.k})
            bar.update(1, f"mse {curves['mse'][number].mean():.4f}, dead {curves['dead'][number].mean():.2%}")
    return state.sae, scaling, curves


class Health(NamedTuple):
    """How well one autoencoder describes a split, accumulated in float64 over the whole of it."""

    mse: float  # mean squared error per component of u, [LH26]'s measure in the scaled units
    explained_variance: float  # 1 - sum |u - u_hat|^2 / sum |u - mean(u)|^2, against the split's vector mean
    l0: float  # mean number of active latents
    frequency: np.ndarray  # [F], share of the split on which each latent fires

    @property
    def dead_fraction(self) -> float:
        """Share of latents that never fire on the split."""
        return float(np.mean(self.frequency == 0))


def explained_variance(u_ND: np.ndarray, u_hat_ND: np.ndarray) -> float:
    """1 - residual over total variance, in float64, against the vector mean: predicting the mean scores 0."""
    u_ND = np.asarray(u_ND, np.float64)
    return float(1.0 - np.sum((u_ND - u_hat_ND) ** 2) / np.sum((u_ND - u_ND.mean(axis=0)) ** 2))


def encode_all(sae: SAE, scaling: Scaling, x_ND: np.ndarray, k: int, chunk: int = 4096) -> np.ndarray:
    """[N, F] float32 latents of one autoencoder for a whole split, in chunks."""
    parts = (x_ND[i : i + chunk] for i in range(0, len(x_ND), chunk))
    return np.concatenate([np.asarray(_encode_residuals(sae, scaling, x_BD, k)) for x_BD in parts])


@functools.partial(jax.jit, static_argnames="k")
def _encode_residuals(sae: SAE, scaling: Scaling, x_BD: jax.Array, k: int) -> jax.Array:
    return encode(sae, centre(scaling, x_BD), k)


def health(sae: SAE, scaling: Scaling, x_ND: np.ndarray, z_NF: np.ndarray) -> Health:
    """The measures of one autoencoder on one split whose latents are z_NF."""
    u_ND = np.asarray(centre(scaling, x_ND), np.float64)
    u_hat_ND = np.asarray(z_NF, np.float64) @ np.asarray(sae.W_d, np.float64) + np.asarray(sae.b_d, np.float64)
    return Health(
        mse=float(np.mean((u_ND - u_hat_ND) ** 2)),
        explained_variance=explained_variance(u_ND, u_hat_ND),
        l0=float(np.mean(np.sum(z_NF > 0, axis=1))),
        frequency=np.mean(z_NF > 0, axis=0),
    )
