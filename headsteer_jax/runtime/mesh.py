"""The devices as a mesh, and where arrays live on it.

Training spans all devices of all hosts: axes `data` (the batch) and `fsdp` (the batch, and parameters cut into parts).
Passes over a split need no word between hosts: each takes a share of the images, on a mesh of its own devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from headsteer_jax.config.schema import Config, MachineConfig
from headsteer_jax.errors import HeadSteerError

BATCH_AXES = ("data", "fsdp")  # the axes that a batch is dealt out over
SMALLEST_CUT_ARRAY = 2**10  # arrays of fewer numbers are whole on every device


def _line_of_devices(devices: Any, names: tuple[str, ...], shape: tuple[int, ...]) -> Mesh:
    return Mesh(np.asarray(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def training_mesh(machine: MachineConfig) -> Mesh:
    """Axes data, fsdp.

    Raises:
      HeadSteerError: there are not as many devices, or they cannot be divided so.
    """
    there, fsdp = jax.device_count(), machine.fsdp
    data = machine.data or max(1, there // fsdp)
    if data * fsdp > there:
        wanted = f"{data} x {fsdp}" if machine.data else str(fsdp)
        raise HeadSteerError(
            f"config.machine.{'data' if machine.data else 'fsdp'}: a mesh of {wanted} devices, where there are {there}"
        )
    if not machine.data and there % fsdp:
        raise HeadSteerError(f"config.machine.fsdp = {fsdp}: allowed is a divisor of the {there} devices")
    if jax.process_count() > 1 and data * fsdp < there:
        raise HeadSteerError(
            f"config.machine.data = {data}: several hosts use all {there} devices; allowed is {there} / fsdp, or 0"
        )
    if data * fsdp == there:
        return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    return _line_of_devices(jax.devices()[: data * fsdp], BATCH_AXES, (data, fsdp))


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises HeadSteerError where a step's images cannot be dealt out evenly."""
    parts, t = mesh.size * config.train.accumulate, config.train
    if t.batch % parts:
        by = f"{mesh.size} devices" + (f" x train.accumulate = {t.accumulate}" if t.accumulate > 1 else "")
        raise HeadSteerError(
            f"config.train.batch = {t.batch}: allowed is a multiple of {parts} ({by}); "
            "config.machine.data says how many devices are used"
        )


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """An array whose axis number `axis` is B."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """For every array of a training state where it lives: cut over `fsdp` along its longest axis that allows it."""
    parts = mesh.shape["fsdp"]

    def one(leaf: Any) -> NamedSharding:
        axes = [axis for axis in np.argsort(leaf.shape, kind="stable")[::-1] if leaf.shape[axis] % parts == 0]
        if parts == 1 or leaf.size < SMALLEST_CUT_ARRAY or not axes:
            return replicated_sharding(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * int(axes[0]), "fsdp"))

    return jax.tree.map(one, state)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, put where they live; always copies, as steps donate their state."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.array(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """[n] which of `count` rows, dealt out over a batch's axis 0, this process's devices need, ascending."""
    slices = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in slices]))


def local_mesh() -> Mesh:
    """This process's devices in a row, for passes over its share of a split."""
    return _line_of_devices(jax.local_devices(), ("data",), (jax.local_device_count(),))


def members_mesh(members: int, machine: MachineConfig) -> Mesh:
    """Axes member, data, over the devices of `training_mesh`: independent members first, then each one's batch."""
    devices = training_mesh(machine).devices
    side_by_side = max(n for n in range(1, devices.size + 1) if devices.size % n == 0 and n <= members)
    return _line_of_devices(devices, ("member", "data"), (side_by_side, devices.size // side_by_side))
