"""The devices as a mesh, and how arrays are sharded over it.

Training spans all devices of all hosts: the batch is sharded over the axes `data` and `fsdp`, parameters over `fsdp`.
Passes over a split need no communication: each host takes a share of the images, on a mesh of its own devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from headsteer_jax.config.schema import Config, MachineConfig
from headsteer_jax.errors import HeadSteerError

BATCH_AXES = ("data", "fsdp")  # the axes that a batch is sharded over
SMALLEST_SHARDED_ARRAY = 2**10  # arrays of fewer numbers are replicated


def _line_of_devices(devices: Any, names: tuple[str, ...], shape: tuple[int, ...]) -> Mesh:
    return Mesh(np.asarray(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def training_mesh(machine: MachineConfig) -> Mesh:
    """Make the mesh of training, with the axes data and fsdp.

    Raises:
      HeadSteerError: there are too few devices, or they cannot be divided in this way.
    """
    count, fsdp = jax.device_count(), machine.fsdp
    data = machine.data or max(1, count // fsdp)
    if data * fsdp > count:
        shape = f"{data} x {fsdp}" if machine.data else str(fsdp)
        raise HeadSteerError(
            f"config.machine.{'data' if machine.data else 'fsdp'}: the mesh has {shape} devices, but there are {count}"
        )
    if not machine.data and count % fsdp:
        raise HeadSteerError(f"config.machine.fsdp = {fsdp}: must be a divisor of the {count} devices")
    if jax.process_count() > 1 and data * fsdp < count:
        raise HeadSteerError(
            f"config.machine.data = {data}: several hosts use all {count} devices; it must be {count} / fsdp, or 0"
        )
    if data * fsdp == count:
        return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    return _line_of_devices(jax.devices()[: data * fsdp], BATCH_AXES, (data, fsdp))


def check_batch(config: Config, mesh: Mesh) -> None:
    """Check that a step's images can be divided evenly among the devices.

    Raises:
      HeadSteerError: they cannot.
    """
    parts, t = mesh.size * config.train.accumulate, config.train
    if t.batch % parts:
        factors = f"{mesh.size} devices" + (f" x train.accumulate = {t.accumulate}" if t.accumulate > 1 else "")
        raise HeadSteerError(
            f"config.train.batch = {t.batch}: must be a multiple of {parts} ({factors}); "
            "config.machine.data says how many devices are used"
        )


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose axis number `axis` is B, over all axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Choose how each array of a training state is sharded: over `fsdp`, along its longest axis that divides evenly."""
    parts = mesh.shape["fsdp"]

    def leaf_sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis in np.argsort(leaf.shape, kind="stable")[::-1] if leaf.shape[axis] % parts == 0]
        if parts == 1 or leaf.size < SMALLEST_SHARDED_ARRAY or not axes:
            return replicated_sharding(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * int(axes[0]), "fsdp"))

    return jax.tree.map(leaf_sharding, state)


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays that every process has completely onto the devices, as copies, because steps donate their state."""

    def place_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        array = np.array(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place_leaf, tree, shardings)


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """Return the indices [n], ascending, of those of `count` rows that this process's devices hold."""
    slices = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in slices]))


def local_mesh() -> Mesh:
    """Make the mesh of this process's devices, with the axis data, for passes over its share of a split."""
    return _line_of_devices(jax.local_devices(), ("data",), (jax.local_device_count(),))


def members_mesh(members: int, machine: MachineConfig) -> Mesh:
    """Make a mesh of the devices of `training_mesh` with the axes member and data.

    Independent members are divided among the devices first; devices that are left divide each member's batch.
    """
    devices = training_mesh(machine).devices
    side_by_side = max(n for n in range(1, devices.size + 1) if devices.size % n == 0 and n <= members)
    return _line_of_devices(devices, ("member", "data"), (side_by_side, devices.size // side_by_side))
