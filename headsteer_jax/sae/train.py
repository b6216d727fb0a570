"""Training autoencoders: whole epochs inside one jitted call, several autoencoders side by side.

The members of a training differ in k, learning rate, initialisation and order of the data (`Members`). A grid is one
program: members are a `vmap`, sharded over the devices of all hosts; if there are more devices than members, the batch
of each member is sharded as well. Axes: S members, D width, F latents, B residuals in a step, G on the devices at once,
n steps of an epoch.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
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
from headsteer_jax.runtime.precision import training_precision
from headsteer_jax.runtime.preemption import Preempted, defer_to_checkpoints
from headsteer_jax.runtime.progress import progress
from headsteer_jax.sae import sparse
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling, fit_scaling, normalise_rows, scale_input
from headsteer_jax.sae.objective import (
    Objective,
    StepMetrics,
    autoencoder_loss,
    init_weights,
    remove_radial_gradient,
)
from headsteer_jax.sae.residuals import Residuals

logger = logging.getLogger(__name__)

Curves = dict[str, Any]

CURVES = ("mse", "l0", "dead")
MEMBER_FIELDS = ("sae", "optimizer", "silent")  # fields of a state whose arrays have a leading axis S


class Members(NamedTuple):
    """The settings in which autoencoders that are trained together differ, [S] each."""

    k: Any  # int32
    learning_rate: Any  # float32
    init: Any  # int32: equal numbers start from the same parameters
    order: Any  # int32: equal numbers see the data in the same order


class SAEState(NamedTuple):
    """The state of a training; every leaf but the last two has a leading axis S."""

    sae: SAEWeights
    optimizer: Any
    silent: jax.Array  # [S, F] int32, steps since the latent last fired
    step: Any  # int32, steps done
    epoch: Any  # int32, epochs done


def seed_members(c: SAEConfig) -> Members:
    """Return a member for each of c.seeds, and the control, if it is on: the first one's start, another order."""
    count = c.seeds + c.control
    number = np.arange(count, dtype=np.int32)
    init = np.where(number < c.seeds, number, 0).astype(np.int32)
    return Members(np.full(count, c.k, np.int32), np.full(count, c.learning_rate, np.float32), init, number)


def rate_schedule(c: SAEConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Make the schedule of learning rate over peak: linear warm-up, then linear decay to 0 in the last steps."""
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
    """Return the sharding of each part of a state: members sharded, the counters replicated."""
    sharded = NamedSharding(mesh, PartitionSpec("member"))
    replicated = replicated_sharding(mesh)
    return SAEState(sharded, sharded, sharded, replicated, replicated)  # type: ignore[arg-type]


class TrainingPlan(NamedTuple):
    """The static settings of a training."""

    c: SAEConfig
    steps: int  # of the whole training
    dead_window: int  # steps without firing after which a latent counts as dead
    objective: Objective
    seed: int  # of the orders of the data


def _make_plan(c: SAEConfig, members: Members, D: int, steps_per_epoch: int, seed: int, platform: str) -> TrainingPlan:
    max_k = max(int(members.k.max()), c.k_start)
    k_aux = (c.aux_k or max(1, D // 2)) if c.aux_weight > 0 else 0
    dead_window = min(max(1, round(c.dead_window * steps_per_epoch / c.views)), 2**31 - 1)
    use_sparse = platform == "cpu" and sparse.is_available()
    c = c.model_copy(update={"layer": 0})  # the program does not depend on it
    objective = Objective(c, max_k, k_aux, use_sparse, training_precision())
    return TrainingPlan(c, c.epochs * steps_per_epoch, dead_window, objective, seed)


def _anneal_k(plan: TrainingPlan, member: Members, step: jax.Array) -> jax.Array:
    """Return a member's k at a step: TopK and BatchTopK may start with another k."""
    c = plan.c
    if not c.k_start or c.activation not in ("topk", "batch_topk"):
        return member.k
    share = jnp.clip(step / max(c.k_anneal * plan.steps, 1.0), 0.0, 1.0)
    return jnp.round(c.k_start + (member.k - c.k_start) * share).astype(jnp.int32)


def _update_member(state: SAEState, member: Members, u_BD: jax.Array, plan: TrainingPlan) -> tuple[SAEState, Curves]:
    """Train one member on one batch, without counting the step."""
    c, rate = plan.c, rate_schedule(plan.c, plan.steps)
    dead_F = state.silent >= plan.dead_window
    k = _anneal_k(plan, member, state.step)
    gradient = jax.grad(autoencoder_loss, has_aux=True)
    grads, metrics = gradient(state.sae, u_BD, dead_F, k, plan.objective, state.step)
    grads = remove_radial_gradient(grads, state.sae) if c.ablation.decoder_norm == "unit" else grads
    if c.ablation.unit_gradient:
        length = optax.global_norm(grads)
        grads = jax.tree.map(lambda leaf: leaf / jnp.maximum(length, 1e-20), grads)
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer)
    if c.weight_decay:  # AdamW's; of the encoder alone
        updates = updates._replace(W_e=updates.W_e + c.weight_decay * state.sae.W_e)
    step_size = -member.learning_rate * rate(state.step)
    sae = jax.tree.map(lambda leaf, update: leaf + step_size * update, state.sae, updates)
    sae = sae._replace(threshold=_update_threshold(state.sae, sae, metrics, plan))
    sae = sae._replace(W_d=normalise_rows(sae.W_d)) if c.ablation.decoder_norm == "unit" else sae
    silent_F = jnp.where(metrics.fired > 0, 0, state.silent + 1)
    curves = {"mse": metrics.mse, "l0": metrics.l0, "dead": jnp.mean(dead_F)}
    return state._replace(sae=sae, optimizer=optimizer, silent=silent_F), curves


def _update_members(state: SAEState, members: Members, u_SBD: jax.Array, plan: TrainingPlan) -> tuple[SAEState, Curves]:
    """Train every member on its batch."""
    axes = SAEState(sae=0, optimizer=0, silent=0, step=None, epoch=None)  # type: ignore[arg-type]
    without_aux = plan._replace(objective=plan.objective._replace(k_aux=0))
    branches = (
        jax.vmap(functools.partial(_update_member, plan=variant), in_axes=(axes, 0, 0), out_axes=(axes, 0))
        for variant in (plan, without_aux)
    )
    # AuxK is 0 if nothing is dead; outside of vmap the branch skips its work
    any_dead = jnp.any(state.silent >= plan.dead_window)
    state, curves = jax.lax.cond(any_dead, *branches, state, members, u_SBD)
    return state._replace(step=state.step + 1), curves


def _train_epoch(
    state: SAEState, members: Members, u_GD: jax.Array, part: jax.Array, plan: TrainingPlan
) -> tuple[SAEState, Curves]:
    """Train every member on all residuals, in an order of its own; curves are means over the steps."""
    count, batch = len(u_GD), plan.c.batch

    def draw_order(number: jax.Array) -> jax.Array:
        key = jax.random.key(plan.seed)
        for value in (101, number, state.epoch, part):
            key = jax.random.fold_in(key, value)
        return jax.random.permutation(key, count)[: count // batch * batch].reshape(-1, batch)

    order_SnB = jax.vmap(draw_order)(members.order)

    def train_step(state: SAEState, rows_SB: jax.Array) -> tuple[SAEState, Curves]:
        # each device has all residuals and takes its part of the batch; XLA sums the gradients where that is needed
        u_SBD = jax.lax.with_sharding_constraint(u_GD[rows_SB], PartitionSpec(None, "data"))
        return _update_members(state, members, u_SBD, plan)

    state, curves = jax.lax.scan(train_step, state, jnp.moveaxis(order_SnB, 0, 1))
    return state._replace(epoch=state.epoch + 1), jax.tree.map(lambda values: values.mean(axis=0), curves)


def jit_epochs(
    c: SAEConfig, members: Members, D: int, steps_per_epoch: int, seed: int, mesh: Mesh, platform: str = ""
) -> Any:
    """Make the jitted `(state, members, u [G, D], part, epochs=n) -> (state, curves [n, S])`, which donates the state.

    In every epoch each member draws an order of the residuals from its key, fold_in of (seed, order, epoch, part).
    Residuals that do not fill a batch are left out of that epoch.

    Args:
      c: the section `sae`.
      members: as many for each device along the mesh's axis `member`.
      D: width.
      steps_per_epoch: of all parts together.
      seed: of the orders.
      mesh: `members_mesh`, perhaps of devices that this machine does not have.
      platform: for which the program is lowered, if it is not the mesh's.
    """
    plan = _make_plan(c, members, D, steps_per_epoch, seed, platform or mesh.devices.flat[0].platform)
    return _jit_plan(plan, mesh)


@functools.lru_cache(maxsize=16)
def _jit_plan(plan: TrainingPlan, mesh: Mesh) -> Any:
    """Make the jitted program of a plan, once, so that the autoencoders of all layers share it."""

    def run(state: SAEState, members: Members, u_GD: jax.Array, part: jax.Array, epochs: int) -> Any:
        return jax.lax.scan(lambda state, _: _train_epoch(state, members, u_GD, part, plan), state, None, length=epochs)

    sharded, replicated, curve_spec = PartitionSpec("member"), PartitionSpec(), PartitionSpec(None, "member")
    specs = SAEState(sharded, sharded, sharded, replicated, replicated)  # type: ignore[arg-type]

    @functools.partial(
        jax.jit, static_argnames="epochs", donate_argnums=0,
        out_shardings=(member_shardings(mesh), NamedSharding(mesh, curve_spec)),
    )  # fmt: skip
    def program(state: SAEState, members: Members, u_GD: jax.Array, part: jax.Array, epochs: int) -> Any:
        return jax.shard_map(  # members are sharded by hand, the batch by XLA
            functools.partial(run, epochs=epochs), mesh=mesh, axis_names={"member"}, check_vma=False,
            in_specs=(specs, sharded, replicated, replicated), out_specs=(specs, curve_spec),
        )(state, members, u_GD, part)  # fmt: skip

    return program


def make_epoch_program(
    c: SAEConfig, members: Members, D: int, steps_per_epoch: int, seed: int, mesh: Mesh | None = None
) -> Callable[..., Any]:
    """Make `(state, u [G, D], part, epochs=n) -> (state, curves [n, S])`: n epochs over these residuals in one call.

    The arguments are those of `jit_epochs`; the mesh is by default that of all devices.
    """
    mesh = mesh or members_mesh(len(members.k), MachineConfig())
    program = jit_epochs(c, members, D, steps_per_epoch, seed, mesh)
    placed_members = place(members, Members(*[NamedSharding(mesh, PartitionSpec("member"))] * 4))

    def run_epochs(state: SAEState, u_GD: jax.Array, part: int = 0, epochs: int = 1) -> Any:
        with jax.set_mesh(mesh):
            part_number = place(np.int32(part), replicated_sharding(mesh))
            return program(state, placed_members, u_GD, part_number, epochs=epochs)

    return run_epochs


def _update_threshold(before: SAEWeights, after: SAEWeights, metrics: StepMetrics, plan: TrainingPlan) -> jax.Array:
    """Update the threshold: JumpReLU's stays >= 0; BatchTopK's is a moving mean of the smallest active values.

    That mean reaches back a hundred steps, or a twentieth of them if there are few.
    """
    if plan.c.activation == "jumprelu":
        return jnp.maximum(after.threshold, 0.0)
    if plan.c.activation == "batch_topk":
        rate = max(0.01, 20 / plan.steps)
        moved = before.threshold + min(rate, 1.0) * (metrics.threshold - before.threshold)
        moved = jnp.where(before.threshold > 0, moved, metrics.threshold)
        return jnp.where(jnp.isfinite(metrics.threshold), moved, before.threshold)  # nothing was active
    return before.threshold


def init_state(c: SAEConfig, members: Members, u_GD: jax.Array, F: int, seed: int) -> SAEState:
    """Initialise all members; the key of initialisation number n is fold_in(fold_in(key(seed), 100), n)."""
    key = jax.random.fold_in(jax.random.key(seed), 100)
    saes = jax.vmap(lambda number: init_weights(jax.random.fold_in(key, number), u_GD, c, F))(jnp.asarray(members.init))
    saes = jax.tree.map(jnp.copy, saes)  # tied weights are one buffer, which cannot be donated twice
    optimizer = jax.vmap(optax.scale_by_adam().init)(saes)
    return SAEState(saes, optimizer, jnp.zeros((len(members.k), F), jnp.int32), jnp.int32(0), jnp.int32(0))


def pad_members(members: Members, devices: int) -> Members:
    """Repeat the last member until every device has the same number of members."""
    missing = -len(members.k) % devices
    return Members(*(np.concatenate([column, np.repeat(column[-1:], missing)]) for column in members))


def state_to_checkpoint(state: SAEState, count: int) -> SAEState:
    """Make the content of a checkpoint: the first `count` members, as NumPy arrays, for any number of devices.

    The arrays are copies, as the next steps donate the state's memory.
    """
    state = hosts.to_numpy(state)
    return state._replace(
        **{name: jax.tree.map(lambda leaf: leaf[:count].copy(), getattr(state, name)) for name in MEMBER_FIELDS}
    )


def state_from_checkpoint(state: SAEState, members: int, mesh: Mesh) -> SAEState:
    """Place a checkpoint's state on the devices, with its members padded as by `pad_members`."""

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], members - len(leaf), axis=0)])

    def place_part(part: Any, sharding: NamedSharding) -> Any:
        return place(part, jax.tree.map(lambda _: sharding, part))

    state = state._replace(**{name: jax.tree.map(pad, getattr(state, name)) for name in MEMBER_FIELDS})
    return SAEState(*map(place_part, state, member_shardings(mesh)))


class TrainedMembers(NamedTuple):
    """The result of a training: weights with a leading axis S, their scaling, and curves [epochs, S]."""

    weights: SAEWeights
    scaling: Scaling
    curves: Curves

    def autoencoders(self, k: int | None) -> Autoencoder:
        """Join weights and scaling; `k` is TopK's, None if thresholds decide."""
        return Autoencoder(self.weights, self.scaling, k)


class Feed(NamedTuple):
    """How residuals come onto the devices: all at once, to stay there, or part by part in every epoch."""

    source: Residuals
    scaling: Scaling
    sharding: NamedSharding
    batch: int
    rows: int  # of a part
    resident: bool  # one part holds all of them and stays on the devices
    seed: int

    def parts(self, epoch: int) -> Iterator[jax.Array]:
        """Yield the scaled residuals of an epoch part by part; rows that do not fill a batch go into the next part."""
        remainder_RD = np.zeros((0, self.source.shape[1]), np.float32)
        for x_GD in self.source.groups(self.rows, np.random.default_rng([self.seed, 2, epoch])):
            pending_GD = np.concatenate([remainder_RD, x_GD]) if len(remainder_RD) else x_GD
            count = len(pending_GD) if self.resident else len(pending_GD) // self.batch * self.batch
            remainder_RD = pending_GD[count:]
            if count:
                yield place(scale_input(self.scaling, pending_GD[:count]), self.sharding)


def choose_rows(c: SAEConfig, shape: tuple[int, int]) -> tuple[int, bool]:
    """Choose how many residuals [N, D] are on the devices at once, and whether these are all and stay there."""
    count, D = shape
    resident = count * D * 4 <= c.memory * 2**20
    return count if resident else max(c.batch, c.memory * 2**20 // (3 * 4 * D)), resident


def choose_epochs(c: SAEConfig, resident: bool) -> int:
    """Choose the epochs of a call: a twentieth of all, or fewer; 1 if the residuals come part by part."""
    return max(n for n in range(1, max(1, c.epochs // 20) + 1) if c.epochs % n == 0) if resident else 1


def _make_feed(source: Residuals, config: Config, mesh: Mesh) -> Feed:
    """Choose how residuals come onto the devices: within config.sae.memory.

    If they do not fit, a part takes a third of that at most, as the next ones are read meanwhile.
    """
    c = config.sae
    rows, resident = choose_rows(c, source.shape)
    scaling = fit_scaling(source.chunks, c)
    return Feed(source, scaling, replicated_sharding(mesh), c.batch, rows, resident, config.seed)


def _check_batch(c: SAEConfig, mesh: Mesh) -> None:
    """Raise HeadSteerError if the batch cannot be divided among the devices of each autoencoder."""
    if c.batch % mesh.shape["data"]:
        raise HeadSteerError(
            f"config.sae.batch = {c.batch}: must be a multiple of {mesh.shape['data']}, the number of devices "
            "for each autoencoder; config.machine.data says how many devices are used"
        )


def _run_parts(run: Callable[..., Any], state: SAEState, feed: Feed, epoch: int) -> tuple[SAEState, Curves]:
    """Run one epoch part by part; curves [1, S] are means weighted by the parts' rows."""
    sums, rows = dict.fromkeys(CURVES, 0.0), 0
    for part, u_GD in enumerate(feed.parts(epoch)):
        state = state._replace(epoch=place(np.int32(epoch), feed.sharding))
        state, curves = run(state, u_GD, part)
        curves = hosts.to_numpy(curves)
        sums = {name: sums[name] + curves[name] * len(u_GD) for name in CURVES}
        rows += len(u_GD)
    return state, {name: values / rows for name, values in sums.items()}


def _check_finite(finite: np.ndarray, label: str, epoch: int, directory: Path) -> None:
    """Raise HeadSteerError if a member is not finite any more; in a grid, if none is."""
    is_grid = label == "grid"
    if not (finite.any() if is_grid else finite.all()):
        field = "grid.learning_rates" if is_grid else "sae.learning_rate"
        raise HeadSteerError(
            f"{label}: the loss turned NaN in epoch {epoch}; the last good checkpoint is in {directory}; lower "
            f"config.{field}"
        )


def _train_epochs(
    run_epochs: Callable[[SAEState, int], tuple[SAEState, Curves]], state: SAEState, curves: Curves, epochs: range,
    checkpoints: Checkpoints, metadata: Mapping[str, Any], label: str,
) -> SAEState:  # fmt: skip
    """Train through `epochs`, with progress and checkpoints; fill `curves` [epochs, S] in place.

    Args:
      run_epochs: (state, epoch) -> state after the next `epochs.step` epochs, and their curves.
      state: on the devices.
      curves: without the members that only pad.
      epochs: those that are left, to config.sae.epochs.
      checkpoints: about ten are saved in a training.
      metadata: of the checkpoints.
      label: see `train_members`.
    """
    member_count, total = curves["mse"].shape[1], epochs.stop
    interval = max(1, total // 10)  # epochs between checkpoints
    with defer_to_checkpoints() as is_stopping, progress(total, label, "epoch", initial=epochs.start) as bar:
        for epoch in epochs:
            done = epoch + epochs.step
            state, new_curves = run_epochs(state, epoch)
            for name, values in hosts.to_numpy(new_curves).items():
                curves[name][epoch:done] = values[:, :member_count]
            finite = np.isfinite(curves["mse"][epoch:done]).all(axis=0)
            stopping = is_stopping()
            save = done // interval > epoch // interval or done == total or stopping
            if save:
                saved = state_to_checkpoint(state, member_count)
                finite &= np.all([np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in saved.sae], axis=0)
            _check_finite(finite, label, epoch, checkpoints.directory)
            if save:
                checkpoints.save(done, (saved, jax.tree.map(np.copy, curves)), metadata)
            if stopping and done < total:
                checkpoints.close()
                logger.info(f"{label}: epoch {done} is saved")
                raise Preempted
            mse, dead = (curves[name][done - 1, finite].mean() for name in ("mse", "dead"))
            bar.update(epochs.step, f"mse {mse:.4f}, dead {dead:.2%}")
        checkpoints.close()
    return state


def train_members(
    config: Config, members: Members, source: Residuals, directory: Path, label: str = "sae", data: str = ""
) -> TrainedMembers:
    """Train autoencoders on the training split's residuals; a training that was interrupted is continued.

    Residuals that fit config.sae.memory stay on the device, and an epoch is a scan. Otherwise blocks come in a new
    random order in each epoch, a third of that memory at once, and are shuffled within.

    Args:
      config: of the run.
      members: to train.
      source: the residuals.
      directory: for the checkpoints.
      label: names the work. Members of a `grid` may turn NaN as long as one stays finite; elsewhere none may.
      data: a hash of the dataset (`hash_data`), which is kept in the checkpoints and must stay the same.

    Raises:
      HeadSteerError: the batch is larger than the data, or cannot be divided; the data have changed since the last
        checkpoint; residuals are not finite or constant; the loss turned NaN.
      Preempted: after SIGTERM, once a checkpoint is saved.
    """
    c, (count, D), member_count = config.sae, source.shape, len(members.k)
    if c.batch > count:
        raise HeadSteerError(f"config.sae.batch = {c.batch}: must be at most the {count} training residuals")
    mesh = members_mesh(member_count, config.machine)
    _check_batch(c, mesh)
    feed, members = _make_feed(source, config, mesh), pad_members(members, mesh.shape["member"])
    first_GD = next(feed.parts(0))
    state = init_state(c, members, jnp.asarray(hosts.to_numpy(first_GD)), config.latents, config.seed)
    state = state_to_checkpoint(state, member_count)
    u_GD = first_GD if feed.resident else None
    del first_GD
    curves: Curves = {name: np.zeros((c.epochs, member_count), np.float32) for name in CURVES}
    checkpoints = Checkpoints(directory / "checkpoints", keep=2)
    if checkpoints.latest() is not None:
        (state, curves), metadata = checkpoints.restore((state, curves))
        if metadata["data"] != data:
            raise HeadSteerError(
                f"{checkpoints.directory}: the data have changed since this checkpoint; use the data that it was made "
                "with, or pass --overwrite"
            )
        curves = {name: np.array(values) for name, values in curves.items()}
        checkpoints.forget_after(int(state.epoch))
    start = int(state.epoch)
    state = state_from_checkpoint(state, len(members.k), mesh)
    if 0 < start < c.epochs:
        logger.info(f"{label}: resuming from epoch {start}")
    run = make_epoch_program(c, members, D, count // c.batch, config.seed, mesh)
    at_once = choose_epochs(c, feed.resident)

    def run_epochs(state: SAEState, epoch: int) -> tuple[SAEState, Curves]:
        return _run_parts(run, state, feed, epoch) if u_GD is None else run(state, u_GD, epochs=at_once)

    metadata = {"layer": config.sae_layer, "k": c.k, "data": data}
    state = _train_epochs(run_epochs, state, curves, range(start, c.epochs, at_once), checkpoints, metadata, label)
    return TrainedMembers(state_to_checkpoint(state, member_count).sae, feed.scaling, curves)
