"""The devices as a mesh, and how arrays are sharded over it.

Training spans all devices of all hosts: the batch is sharded over the axes `data` and `fsdp`, parameters over `fsdp`.
Passes over a split need no communication: each host takes a share of the images, on a mesh of its own devices.

Every mesh of the program is made here. Each function takes the devices as an argument, so that those of a machine which
is not there can stand in for `jax.devices()` when programs are compiled for it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from headsteer_jax.config.schema import Config, MachineConfig
from headsteer_jax.errors import HeadSteerError

BATCH_AXES = ("data", "fsdp")  # the axes that a batch is sharded over
SMALLEST_SHARDED_ARRAY = 2**10  # arrays of fewer numbers are replicated


def _line_of_devices(devices: Any, names: tuple[str, ...], shape: tuple[int, ...]) -> Mesh:
    return Mesh(np.asarray(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def training_mesh(machine: MachineConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of training, with the axes data and fsdp.

    Args:
      machine: the section of the config.
      devices: of all hosts; None: `jax.devices()`.

    Raises:
      HeadSteerError: there are too few devices, or they cannot be divided in this way.
    """
    devices = jax.devices() if devices is None else devices
    count, fsdp = len(devices), machine.fsdp
    data = machine.data or max(1, count // fsdp)
    if data * fsdp > count:
        shape = f"{data} x {fsdp}" if machine.data else str(fsdp)
        raise HeadSteerError(
            f"config.machine.{'data' if machine.data else 'fsdp'}: the mesh has {shape} devices, but there are {count}"
        )
    if not machine.data and count % fsdp:
        raise HeadSteerError(f"config.machine.fsdp = {fsdp}: must be a divisor of the {count} devices")
    if len({device.process_index for device in devices}) > 1 and data * fsdp < count:
        raise HeadSteerError(
            f"config.machine.data = {data}: several hosts use all {count} devices; it must be {count} / fsdp, or 0"
        )
    if data * fsdp == count:
        return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    return _line_of_devices(devices[: data * fsdp], BATCH_AXES, (data, fsdp))


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


def describe_arrays(tree: Any, shardings: Any) -> Any:
    """Describe arrays, for which a program is compiled, by their shapes, dtypes and shardings.

    Args:
      shardings: one for all, or a pytree of the same structure.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=sharding), tree, shardings
    )


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


def local_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of one process's devices, with the axis data, for passes over its share of a split.

    Args:
      devices: of all hosts, of which those of the first one's host are taken; None: this process's.
    """
    local = (
        jax.local_devices() if devices is None else [d for d in devices if d.process_index == devices[0].process_index]
    )
    return _line_of_devices(local, ("data",), (len(local),))


def members_mesh(members: int, machine: MachineConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of the devices of `training_mesh` with the axes member and data.

    Independent members are divided among the devices first; devices that are left divide each member's batch.
    """
    mesh = training_mesh(machine, devices)
    side_by_side = max(n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and n <= members)
    return _line_of_devices(mesh.devices, ("member", "data"), (side_by_side, mesh.size // side_by_side))
