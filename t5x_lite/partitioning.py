"""One table from logical axes to mesh axes, and what follows from it.

Arrays name their axes by meaning ("embed", "heads", "batch"); the mesh has axes of devices. Moving
to another mesh changes the table, never the model or the step.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UsageError, nearest

# The axes of the mesh: `data` splits the batch, `model` splits matrices.
MESH_AXES = ("data", "model")

LOGICAL_TO_MESH: dict[str, str | None] = {
    "batch": "data",
    "length": None,
    "layers": None,
    "vocab": "model",
    "embed": None,
    "heads": "model",
    "mlp": "model",
    "relpos_buckets": None,
}


def make_mesh(shape: Mapping[str, int] | None = None, devices: list | None = None) -> Mesh:
    """A mesh with MESH_AXES over `devices` (all of them by default).

    Args:
      shape: devices along each axis; an axis left out has 1. None: all devices along `data`.
      devices: jax devices.

    Raises:
      UsageError: an unknown axis, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = {"data": len(devices)} if shape is None else dict(shape)
    for axis in shape:
        if axis not in MESH_AXES:
            raise UsageError(f"MESH has no axis {axis!r}; {nearest(axis, MESH_AXES)}")
    sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
    if math.prod(sizes) != len(devices):
        given = " x ".join(f"{axis} {n}" for axis, n in zip(MESH_AXES, sizes, strict=True))
        raise UsageError(
            f"MESH = {given} is {math.prod(sizes)} devices, but there are {len(devices)}"
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(
    axes: tuple[str | None, ...], table: Mapping[str, str | None] = LOGICAL_TO_MESH
) -> PartitionSpec:
    """The mesh axis of each logical axis of one array.

    Raises:
      UsageError: a name that the table lacks, or two axes of the array on one mesh axis.
    """
    mesh_axes: list[str | None] = []
    for name in axes:
        if name is not None and name not in table:
            raise UsageError(f"no mesh axis is known for {name!r}; {nearest(name, table)}")
        mesh_axis = None if name is None else table[name]
        if mesh_axis is not None and mesh_axis in mesh_axes:
            raise UsageError(
                f"the axes {axes} of one array both lie on the mesh axis {mesh_axis!r}"
            )
        mesh_axes.append(mesh_axis)
    return PartitionSpec(*mesh_axes)


def shardings(mesh: Mesh, axes_tree: Any) -> Any:
    """A NamedSharding for each leaf of a tree of logical axis names."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes)), axes_tree, is_leaf=_is_axes
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every array [B, L] of a batch lies: rows over `data`."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of each array as its share of one global array."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def check_divisible(shapes: Any, axes_tree: Any, mesh: Mesh) -> None:
    """Raises UsageError if a parameter's axis cannot be split evenly over its mesh axis."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes_tree, is_leaf=_is_axes)
    for (path, leaf), axes in zip(leaves, names, strict=True):
        for size, name, mesh_axis in zip(leaf.shape, axes, partition_spec(axes), strict=True):
            devices = 1 if mesh_axis is None else mesh.shape[mesh_axis]
            if size % devices:
                raise UsageError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}: axis {name!r} of "
                    f"size {size} does not divide over {devices} devices of the mesh axis "
                    f"{mesh_axis!r}; use a divisor of {size}"
                )


def describe(abstract_state: Any, axes_tree: Any) -> list[str]:
    """A table of every array: name, shape, logical axes, mesh axes, bytes on each device.

    Args:
      abstract_state: `jax.ShapeDtypeStruct` leaves with shardings.
      axes_tree: its logical axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
    names = jax.tree.leaves(axes_tree, is_leaf=_is_axes)
    rows = [("array", "shape", "logical axes", "mesh axes", "bytes per device")]
    total = 0
    for (path, leaf), axes in zip(leaves, names, strict=True):
        shard = leaf.sharding.shard_shape(leaf.shape)
        num_bytes = math.prod(shard) * leaf.dtype.itemsize
        total += num_bytes
        rows.append(
            (
                jax.tree_util.keystr(path, simple=True, separator="/"),
                "x".join(map(str, leaf.shape)) or "scalar",
                " ".join(axes),
                " ".join(axis or "-" for axis in leaf.sharding.spec) or "-",
                f"{num_bytes:,}",
            )
        )
    rows.append(("all", "", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        + f"  {row[4]:>16}"
        for row in rows
    ]


def _is_axes(x: Any) -> bool:
    # Not a NamedTuple: an optimizer's state without arrays is an empty one.
    return type(x) is tuple and all(isinstance(e, str | None) for e in x)
