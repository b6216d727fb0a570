"""Training autoencoders: whole epochs inside one jitted call, several of them side by side.

`Members` says what they differ in: k, learning rate, initialisation, order of the data. A grid is one program: members
are a `vmap`, dealt out over the devices of all hosts; where there are more devices than members, each member's batch is
dealt out too. Axes: S members, B residuals in a step, G at once.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headsteer_jax.config.schema import Config, MachineConfig, SAEConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.mesh import members_mesh, place, replicated_sharding
from headsteer_jax.runtime.preemption import Preempted, defer_to_checkpoints
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae import sparse
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling, fit_scaling, normalise_rows, scale_input
from headsteer_jax.sae.objective import StepMetrics, autoencoder_loss, init_weights, remove_radial_gradient
from headsteer_jax.sae.residuals import Residuals

logger = logging.getLogger(__name__)

CURVES = ("mse", "l0", "dead")
MEMBER_FIELDS = ("sae", "optimizer", "silent")  # what of a state has a leading axis S


class Members(NamedTuple):
    """What the autoencoders trained together differ in, [S] each."""

    k: Any  # int32
    learning_rate: Any  # float32
    init: Any  # int32: equal numbers start from the same parameters
    order: Any  # int32: equal numbers see the data in the same order


class SAEState(NamedTuple):
    """Everything that training is; with a leading axis S on every leaf but the last two."""

    sae: SAEWeights
    optimizer: Any
    silent: jax.Array  # [S, F] int32, steps since the latent last fired
    step: Any  # int32, steps done
    epoch: Any  # int32, epochs done


def seed_members(c: SAEConfig) -> Members:
    """config.sae.seeds members; and the control, if asked for: the first one's start on another order."""
    count = c.seeds + c.control
    number = np.arange(count, dtype=np.int32)
    init = np.where(number < c.seeds, number, 0).astype(np.int32)
    return Members(np.full(count, c.k, np.int32), np.full(count, c.learning_rate, np.float32), init, number)


def rate_schedule(c: SAEConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate over its peak: linear warm-up, and linear decay to 0 over the last share of the steps."""
    warmup = round(c.warmup * steps)
    decay = min(round(c.decay * steps), steps - warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(1 / max(warmup, 1), 1.0, warmup),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, max(decay, 1)),
        ],
        [warmup, steps - decay],
    )


def member_shardings(mesh: Mesh) -> SAEState:
    """Where a state's arrays live: members dealt out, the counters everywhere."""
    own = NamedSharding(mesh, PartitionSpec("member"))
    return SAEState(own, own, own, replicated_sharding(mesh), replicated_sharding(mesh))  # type: ignore[arg-type]


def make_epoch_program(
    c: SAEConfig, members: Members, F: int, D: int, steps_per_epoch: int, seed: int, mesh: Mesh | None = None
) -> Callable[..., Any]:
    """`(state, u [G, D], part, epochs=n) -> (state, Curves [n, S])`: n epochs over these residuals, in one call.

    In every epoch each member draws an order of them by its own key, fold_in of (seed, order, epoch, part); what is
    left of the last batch waits for another epoch.

    Args:
      mesh: `members_mesh`, which is the default; as many members on each device along `member`.
    """
    mesh = mesh or members_mesh(len(members.k), MachineConfig())
    steps = c.epochs * steps_per_epoch
    tx, rate, window = (
        optax.scale_by_adam(),
        rate_schedule(c, steps),
        min(max(1, round(c.dead_window * steps_per_epoch)), 2**31 - 1),
    )
    k_aux = (c.aux_k or max(1, D // 2)) if c.aux_weight > 0 else 0
    most = max(int(members.k.max()), c.k_start)
    fast = sparse.is_available()

    def k_at(member: Members, step: jax.Array) -> jax.Array:
        if not c.k_start or c.activation not in ("topk", "batch_topk"):
            return member.k
        share = jnp.clip(step / max(c.k_anneal * steps, 1.0), 0.0, 1.0)
        return jnp.round(c.k_start + (member.k - c.k_start) * share).astype(jnp.int32)

    def one_step(one: SAEState, member: Members, u_BD: jax.Array, k_aux: int) -> tuple[SAEState, dict[str, jax.Array]]:
        dead_F = one.silent >= window
        k = k_at(member, one.step)
        grads, seen = jax.grad(autoencoder_loss, has_aux=True)(one.sae, u_BD, dead_F, k, c, most, k_aux, fast)
        grads = remove_radial_gradient(grads, one.sae) if c.ablation.decoder_norm == "unit" else grads
        if c.ablation.unit_gradient:
            length = optax.global_norm(grads)
            grads = jax.tree.map(lambda leaf: leaf / jnp.maximum(length, 1e-20), grads)
        updates, optimizer = tx.update(grads, one.optimizer)
        by = -member.learning_rate * rate(one.step)
        sae = jax.tree.map(lambda leaf, update: leaf + by * update, one.sae, updates)
        sae = sae._replace(threshold=_threshold(one.sae, sae, seen, c, max(0.01, 20 / steps)))
        sae = sae._replace(W_d=normalise_rows(sae.W_d)) if c.ablation.decoder_norm == "unit" else sae
        silent_F = jnp.where(seen.fired > 0, 0, one.silent + 1)
        curves = {"mse": seen.mse, "l0": seen.l0, "dead": jnp.mean(dead_F)}
        return one._replace(sae=sae, optimizer=optimizer, silent=silent_F), curves

    axes = SAEState(sae=0, optimizer=0, silent=0, step=None, epoch=None)  # type: ignore[arg-type]

    def all_members(state: SAEState, members: Members, u_SBD: jax.Array) -> tuple[SAEState, dict[str, jax.Array]]:
        with_aux, without = (
            jax.vmap(functools.partial(one_step, k_aux=k), in_axes=(axes, 0, 0), out_axes=(axes, 0)) for k in (k_aux, 0)
        )
        # AuxK is 0 where nothing is dead; outside of vmap the branch skips its work
        state, curves = jax.lax.cond(jnp.any(state.silent >= window), with_aux, without, state, members, u_SBD)
        return state._replace(step=state.step + 1), curves

    def one_epoch(
        state: SAEState, members: Members, u_GD: jax.Array, part: jax.Array
    ) -> tuple[SAEState, dict[str, jax.Array]]:
        def order(number: jax.Array) -> jax.Array:
            key = jax.random.key(seed)
            for fact in (101, number, state.epoch, part):
                key = jax.random.fold_in(key, fact)
            return jax.random.permutation(key, len(u_GD))[: len(u_GD) // c.batch * c.batch].reshape(-1, c.batch)

        order_SnB = jax.vmap(order)(members.order)

        def step(state: SAEState, rows_SB: jax.Array) -> tuple[SAEState, dict[str, jax.Array]]:
            # each device has all residuals and takes its part of the batch; gradients are summed where XLA finds it due
            u_SBD = jax.lax.with_sharding_constraint(u_GD[rows_SB], PartitionSpec(None, "data"))
            return all_members(state, members, u_SBD)

        state, curves = jax.lax.scan(step, state, jnp.moveaxis(order_SnB, 0, 1))
        return state._replace(epoch=state.epoch + 1), jax.tree.map(lambda rows: rows.mean(axis=0), curves)

    def run(state: SAEState, members: Members, u_GD: jax.Array, part: jax.Array, epochs: int) -> Any:
        return jax.lax.scan(lambda s, _: one_epoch(s, members, u_GD, part), state, None, length=epochs)

    live, own, whole = member_shardings(mesh), PartitionSpec("member"), PartitionSpec()
    specs = SAEState(own, own, own, whole, whole)  # type: ignore[arg-type]

    @functools.partial(
        jax.jit, static_argnames="epochs", donate_argnums=0,
        out_shardings=(live, NamedSharding(mesh, PartitionSpec(None, "member"))),
    )  # fmt: skip
    def program(state: SAEState, members: Members, u_GD: jax.Array, part: jax.Array, epochs: int) -> Any:
        return jax.shard_map(  # members by hand, the batch as XLA deals it out
            functools.partial(run, epochs=epochs), mesh=mesh, axis_names={"member"}, check_vma=False,
            in_specs=(specs, own, whole, whole), out_specs=(specs, PartitionSpec(None, "member")),
        )(state, members, u_GD, part)  # fmt: skip

    dealt_members = place(members, Members(*[NamedSharding(mesh, own)] * 4))

    def epochs_of(state: SAEState, u_GD: jax.Array, part: int = 0, epochs: int = 1) -> Any:
        with jax.set_mesh(mesh):
            return program(state, dealt_members, u_GD, place(np.int32(part), replicated_sharding(mesh)), epochs=epochs)

    return epochs_of


def _threshold(before: SAEWeights, after: SAEWeights, seen: StepMetrics, c: SAEConfig, rate: float) -> jax.Array:
    """JumpReLU's thresholds stay >= 0; BatchTopK's is a moving mean of the batches' smallest active values.

    Args:
      rate: of that mean: it reaches back a hundred steps, of few steps a twentieth.
    """
    if c.activation == "jumprelu":
        return jnp.maximum(after.threshold, 0.0)
    if c.activation == "batch_topk":
        moved = before.threshold + min(rate, 1.0) * (seen.threshold - before.threshold)
        moved = jnp.where(before.threshold > 0, moved, seen.threshold)
        return jnp.where(jnp.isfinite(seen.threshold), moved, before.threshold)  # nothing was active
    return before.threshold


def init_state(c: SAEConfig, members: Members, u_GD: jax.Array, F: int, seed: int) -> SAEState:
    """The start of all members; number n's key is fold_in(fold_in(key(seed), 100), n)."""
    key = jax.random.fold_in(jax.random.key(seed), 100)
    saes = jax.vmap(lambda number: init_weights(jax.random.fold_in(key, number), u_GD, c, F))(jnp.asarray(members.init))
    saes = jax.tree.map(jnp.copy, saes)  # tied weights are one buffer, which cannot be donated twice
    optimizer = jax.vmap(optax.scale_by_adam().init)(saes)
    return SAEState(saes, optimizer, jnp.zeros((len(members.k), F), jnp.int32), jnp.int32(0), jnp.int32(0))


def pad_members(members: Members, devices: int) -> Members:
    """Filled up by repeating the last, so that every device has as many."""
    missing = -len(members.k) % devices
    return Members(*(np.concatenate([column, np.repeat(column[-1:], missing)]) for column in members))


def state_to_checkpoint(state: SAEState, wanted: int) -> SAEState:
    """What a checkpoint holds: the members asked for, as NumPy arrays, which any number of devices can go on with.

    Copies: the next steps take the state's own memory.
    """
    state = hosts.to_numpy(state)
    return state._replace(
        **{name: jax.tree.map(lambda leaf: leaf[:wanted].copy(), getattr(state, name)) for name in MEMBER_FIELDS}
    )


def state_from_checkpoint(state: SAEState, members: int, mesh: Mesh) -> SAEState:
    """A checkpoint's state with members filled up as `pad_members` does, on the devices."""

    def fill(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], members - len(leaf), axis=0)])

    state = state._replace(**{name: jax.tree.map(fill, getattr(state, name)) for name in MEMBER_FIELDS})
    parts = zip(state, member_shardings(mesh), strict=True)
    return SAEState(*(place(part, jax.tree.map(lambda _, where=where: where, part)) for part, where in parts))


class TrainedMembers(NamedTuple):
    """What training gives: weights with a leading axis S, their scaling, and curves [epochs, S]."""

    weights: SAEWeights
    scaling: Scaling
    curves: dict[str, np.ndarray]

    def autoencoders(self, k: int | None) -> Autoencoder:
        """Join weights and scaling; `k` is TopK's, None if thresholds decide."""
        return Autoencoder(self.weights, self.scaling, k)


def train_members(
    config: Config, members: Members, source: Residuals, directory: Path, what: str = "sae"
) -> TrainedMembers:
    """Train autoencoders on the training split's residuals, resumed where it stopped.

    Residuals that fit config.sae.memory stay on the device, and an epoch is a scan. Of more, blocks come in a new
    random order each epoch, a third of that at once as the next are read meanwhile, and are shuffled within.

    Args:
      directory: for the checkpoints.
      what: names the work. Of a `grid` only the members that stay finite matter; elsewhere all must.

    Raises:
      HeadSteerError: a batch larger than the data, or that cannot be divided; residuals not finite or constant; the
        loss turned NaN.
      Preempted: after SIGTERM, once a checkpoint is saved.
    """
    c, (count, D), F = config.sae, source.shape, config.latents
    if c.batch > count:
        raise HeadSteerError(f"config.sae.batch = {c.batch}: allowed is at most the {count} training residuals")
    mesh = members_mesh(len(members.k), config.machine)
    if c.batch % mesh.shape["data"]:
        raise HeadSteerError(
            f"config.sae.batch = {c.batch}: allowed is a multiple of {mesh.shape['data']}, the devices of each "
            "autoencoder; config.machine.data says how many devices are used"
        )
    scaling = fit_scaling(source.chunks, c)
    wanted, members = len(members.k), pad_members(members, mesh.shape["member"])
    held = count * D * 4 <= c.memory * 2**20
    rows = count if held else max(c.batch, c.memory * 2**20 // (3 * 4 * D))

    def parts(epoch: int) -> Iterator[jax.Array]:
        """u, part by part; what does not fill a batch goes into the next part."""
        rest_RD = np.zeros((0, D), np.float32)
        for x_GD in source.groups(rows, np.random.default_rng([config.seed, 2, epoch])):
            joined_GD = np.concatenate([rest_RD, x_GD]) if len(rest_RD) else x_GD
            whole = len(joined_GD) if held else len(joined_GD) // c.batch * c.batch
            rest_RD = joined_GD[whole:]
            if whole:
                yield place(scale_input(scaling, joined_GD[:whole]), replicated_sharding(mesh))

    first_GD = next(parts(0))
    state = state_to_checkpoint(init_state(c, members, jnp.asarray(hosts.to_numpy(first_GD)), F, config.seed), wanted)
    u_GD = first_GD if held else None
    del first_GD
    curves = {name: np.zeros((c.epochs, wanted), np.float32) for name in CURVES}
    checkpoints = Checkpoints(directory / "checkpoints", keep=2)
    if checkpoints.latest() is not None:
        (state, curves), _ = checkpoints.restore((state, curves))
        curves = {name: np.array(values) for name, values in curves.items()}
        checkpoints.forget_after(int(state.epoch))
    start = int(state.epoch)
    state = state_from_checkpoint(state, len(members.k), mesh)
    if 0 < start < c.epochs:
        logger.info(f"{what}: going on from epoch {start}")
    run = make_epoch_program(c, members, F, D, count // c.batch, config.seed, mesh)
    every = max(1, c.epochs // 10)  # epochs between checkpoints
    at_once = max(n for n in range(1, max(1, c.epochs // 20) + 1) if c.epochs % n == 0) if held else 1
    with defer_to_checkpoints() as asked, progress(c.epochs, what, "epoch", initial=start) as bar:
        for number in range(start, c.epochs, at_once):
            done = number + at_once
            if u_GD is not None:
                state, found = run(state, u_GD, epochs=at_once)
            else:
                found, weight = dict.fromkeys(CURVES, 0.0), 0
                for part, u_PD in enumerate(parts(number)):
                    state = state._replace(epoch=place(np.int32(number), replicated_sharding(mesh)))
                    state, one = run(state, u_PD, part)
                    one = hosts.to_numpy(one)
                    found = {name: found[name] + one[name] * len(u_PD) for name in CURVES}
                    weight += len(u_PD)
                found = {name: values / weight for name, values in found.items()}
            found = hosts.to_numpy(found)
            for name in curves:
                curves[name][number:done] = found[name][:, :wanted]
            finite = np.isfinite(curves["mse"][number:done]).all(axis=0)
            stopping = asked()
            save = done // every > number // every or done == c.epochs or stopping
            if save:
                kept = state_to_checkpoint(state, wanted)
                finite &= np.all([np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in kept.sae], axis=0)
            if not (finite.any() if what == "grid" else finite.all()):
                field = "grid.learning_rates" if what == "grid" else "sae.learning_rate"
                raise HeadSteerError(
                    f"{what}: the loss turned NaN in epoch {number}; the last good checkpoint is in "
                    f"{checkpoints.directory}; lower config.{field}"
                )
            if save:
                about = {"layer": config.sae_layer, "k": c.k}
                checkpoints.save(done, (kept, jax.tree.map(np.copy, curves)), about)
            if stopping and done < c.epochs:
                checkpoints.close()
                logger.info(f"{what}: epoch {done} is saved")
                raise Preempted
            mse, dead = (curves[name][done - 1, finite].mean() for name in ("mse", "dead"))
            bar.update(at_once, f"mse {mse:.4f}, dead {dead:.2%}")
        checkpoints.close()
    return TrainedMembers(state_to_checkpoint(state, wanted).sae, scaling, curves)
