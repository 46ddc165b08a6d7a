"""Where arrays lie: one table from logical axes to mesh axes, and what follows from it.

Arrays name their axes by meaning ("embed", "heads", "batch"); the mesh has axes of devices. Moving
to another mesh changes the table or the mesh, never the model or the step.

- `data` replicates the parameters and splits the batch.
- `fsdp` splits the batch too, and of every matrix the side "embed" (d_model), in the parameters and
  in the optimizer's state: a layer's matrices are gathered when they are used (fully sharded data
  parallelism, ZeRO; Rajbhandari et al. 2020).
- `model` splits vocabulary, heads and feed-forward units (Shoeybi et al. 2019).

With `fsdp` or `model` alone parameters are split in one dimension, with both in two.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UsageError, nearest
from t5x_lite.models import activations

MESH_AXES = ("data", "fsdp", "model")

# The mesh axis, or axes, over which a logical axis is split; None: it is not.
Rule: TypeAlias = str | tuple[str, ...] | None

LOGICAL_TO_MESH: dict[str, Rule] = {
    # of parameters and of the optimizer's state
    "layers": None,
    "vocab": "model",
    "embed": "fsdp",
    "heads": "model",
    "mlp": "model",
    "relpos_buckets": None,
    # of the batch and of what is computed from it
    "batch": ("data", "fsdp"),
    "lookup_batch": "data",  # while rows of the embedding are looked up, which "embed" splits
    "length": None,
    "activation_embed": None,
    "activation_heads": "model",
    "activation_mlp": "model",
    "activation_vocab": "model",
}

# What decides the size of a logical axis, for errors.
_SIZED_BY = {
    "layers": "T5Config.num_encoder_layers and num_decoder_layers",
    "vocab": "T5Config.vocab_size",
    "embed": "T5Config.d_model",
    "heads": "T5Config.num_heads (and d_kv)",
    "mlp": "T5Config.d_ff",
    "relpos_buckets": "T5Config.relative_attention_num_buckets",
    "batch": "BATCH_SIZE",
    "lookup_batch": "BATCH_SIZE",
    "length": "TASK_FEATURE_LENGTHS",
}


@dataclasses.dataclass(frozen=True)
class InputShare:
    """The rows of every global batch that a process feeds to its devices.

    Processes whose devices hold the same rows, because `model` goes across them, have the same
    share.

    Attributes:
      index: number of the share, from 0.
      count: number of different shares.
      shards: the parts of the batch that it consists of, ascending.
      num_shards: parts of the whole batch.
    """

    index: int = 0
    count: int = 1
    shards: tuple[int, ...] = (0,)
    num_shards: int = 1

    def rows(self, batch_size: int) -> np.ndarray:
        """The numbers of its rows in a batch of `batch_size`, int64 [batch_size / count]."""
        size = batch_size // self.num_shards
        return (np.asarray(self.shards)[:, None] * size + np.arange(size)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """A mesh and the table that maps logical axes to its axes; `make_partitioning` makes it.

    Attributes:
      mesh: the devices.
      rules: the items of the table.
    """

    mesh: Mesh | AbstractMesh
    rules: tuple[tuple[str, Rule], ...] = tuple(LOGICAL_TO_MESH.items())

    @functools.cached_property
    def _table(self) -> dict[str, Rule]:
        return dict(self.rules)

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes that split a logical axis.

        Raises:
          UsageError: the table does not have it.
        """
        if name not in self._table:
            raise UsageError(f"no mesh axis is known for {name!r}; {nearest(name, self._table)}")
        rule = self._table[name]
        return () if rule is None else (rule,) if isinstance(rule, str) else rule

    def num_parts(self, name: str) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(name))

    @property
    def num_batch_shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.num_parts("batch")

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The mesh axes of each logical axis of one array.

        Raises:
          UsageError: a name that the table lacks, or two axes of the array on one mesh axis.
        """
        used: list[str] = []
        entries: list[Rule] = []
        for name in axes:
            mesh_axes = () if name is None else self.mesh_axes(name)
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise UsageError(
                        f"{name!r} and another of the axes {axes} of one array both lie on the "
                        f"mesh axis {mesh_axis!r}: SHARDING_RULES may put one of them there"
                    )
                used.append(mesh_axis)
            entries.append(mesh_axes if len(mesh_axes) > 1 else next(iter(mesh_axes), None))
        return PartitionSpec(*entries)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """How an array with these logical axes lies."""
        return NamedSharding(self.mesh, self.spec(axes))

    def shardings(self, axes_tree: Any) -> Any:
        """A NamedSharding for each leaf of a tree of logical axis names."""
        return jax.tree.map(lambda axes: self.sharding(*axes), axes_tree, is_leaf=_is_axes)

    @property
    def batch(self) -> NamedSharding:
        """How every array [B, L] of a batch lies."""
        return self.sharding("batch", "length")

    @property
    def replicated(self) -> NamedSharding:
        """The same value on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """`x`, within a jitted function, lying as its logical axes say."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    @contextlib.contextmanager
    def of_activations(self) -> Iterator[None]:
        """While a model is traced: its activations lie as their logical axes say."""
        if self.mesh.size == 1:
            yield
            return
        with activations.laid_out_by(self.constrain):
            yield

    def input_share(self, process: int | None = None) -> InputShare:
        """The rows that a process, by default this one, feeds.

        Raises:
          UsageError: two processes have some rows in common and others not.
        """
        if process is None:
            return self._own_share
        batch_axes = self.mesh_axes("batch")
        sizes = [self.mesh.shape[axis] for axis in batch_axes]
        held: dict[int, set[int]] = {}
        for place, device in np.ndenumerate(self.mesh.devices):
            at = dict(zip(self.mesh.axis_names, place, strict=True))
            shard = 0
            for axis, size in zip(batch_axes, sizes, strict=True):
                shard = shard * size + at[axis]
            held.setdefault(device.process_index, set()).add(shard)
        shares = sorted({tuple(sorted(shards)) for shards in held.values()})
        num_shards = math.prod(sizes)
        if len({len(s) for s in shares}) > 1 or sum(map(len, shares)) > num_shards:
            raise UsageError(
                f"MESH = {_shown(self.mesh.shape)}: {len(held)} processes cannot share its "
                f"{num_shards} parts of a batch evenly; let data x fsdp be a multiple or a divisor "
                "of the number of processes"
            )
        own = tuple(sorted(held[process]))
        return InputShare(shares.index(own), len(shares), own, num_shards)

    @functools.cached_property
    def _own_share(self) -> InputShare:
        return self.input_share(jax.process_index())

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The rows of this process's share, of each array, as part of one global array [B, L]."""
        share, sharding = self.input_share(), self.batch
        first = {shard: i for i, shard in enumerate(share.shards)}

        def place(rows: np.ndarray) -> jax.Array:
            size = len(rows) // len(share.shards)

            def part(index: Any) -> np.ndarray:
                start = first[(index[0].start or 0) // size] * size
                return rows[start : start + size, *index[1:]]

            shape = (size * share.num_shards, *rows.shape[1:])
            return jax.make_array_from_callback(shape, sharding, part)

        return {name: place(rows) for name, rows in batch.items()}

    def check_divisible(self, shapes: Any, axes_tree: Any) -> None:
        """Looks whether every array can be split evenly.

        Args:
          shapes: a tree of arrays or `jax.ShapeDtypeStruct`.
          axes_tree: their logical axes.

        Raises:
          UsageError: naming the first array that cannot, and what could be changed.
        """
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        names = jax.tree.leaves(axes_tree, is_leaf=_is_axes)
        for (path, leaf), axes in zip(leaves, names, strict=True):
            self.spec(axes)
            for size, name in zip(leaf.shape, axes, strict=True):
                if name is not None and size % self.num_parts(name):
                    array = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise UsageError(f"{array}: {self._why_not(name, size)}")

    def _why_not(self, name: str, size: int) -> str:
        parts = self.num_parts(name)
        divisors = [str(n) for n in range(1, parts + 1) if size % n == 0]
        sized_by = _SIZED_BY[name.removeprefix("activation_")]
        return (
            f"axis {name!r} of size {size} does not divide over "
            f"{' x '.join(f'{axis} {self.mesh.shape[axis]}' for axis in self.mesh_axes(name))} of "
            f"MESH: let that be {' or '.join(divisors)}, or another divisor of {size}, or let "
            f"{sized_by} make it {-(-size // parts) * parts}"
        )


def make_partitioning(
    shape: Mapping[str, int] | None = None,
    *,
    over_slices: Mapping[str, int] | None = None,
    rules: Mapping[str, Rule] | None = None,
    devices: list | None = None,
) -> Partitioning:
    """A mesh over devices, neighbours on the network beside each other, with the table.

    Args:
      shape: devices along each axis, slices included; an axis left out has 1. None: all along
        `data`.
      over_slices: slices along each axis, where there are several, which only a data-centre network
        connects. None: along `data` as far as it goes, the rest along `fsdp`; never along `model`.
      rules: changes to LOGICAL_TO_MESH.
      devices: jax devices, all by default.

    Raises:
      UsageError: an unknown axis, or products that are not the numbers of devices and slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = {"data": len(devices)} if shape is None else dict(shape)
    sizes = _sizes("MESH", shape)
    if math.prod(sizes) != len(devices):
        raise UsageError(
            f"MESH = {_shown(shape)} is {math.prod(sizes)} devices, but there are {len(devices)}: "
            f"let the product be that, like {{'fsdp': {len(devices)}}}"
        )
    num_slices = len({getattr(d, "slice_index", None) for d in devices})
    across = _slices(shape, sizes, over_slices, num_slices)
    inside = tuple(size // n for size, n in zip(sizes, across, strict=True))
    if num_slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Partitioning(mesh, make_rules(rules or {}))


def _sizes(macro: str, shape: Mapping[str, int]) -> tuple[int, ...]:
    for axis in shape:
        if axis not in MESH_AXES:
            raise UsageError(f"{macro} has no axis {axis!r}; {nearest(axis, MESH_AXES)}")
    return tuple(shape.get(axis, 1) for axis in MESH_AXES)


def _slices(
    shape: Mapping[str, int],
    sizes: tuple[int, ...],
    over_slices: Mapping[str, int] | None,
    num_slices: int,
) -> tuple[int, ...]:
    """How many slices lie along each axis."""
    if over_slices is None:
        data, fsdp, _ = sizes
        data_slices = math.gcd(data, num_slices)
        fsdp_slices = num_slices // data_slices
        if fsdp % fsdp_slices == 0:
            return data_slices, fsdp_slices, 1
        raise UsageError(
            f"MESH = {_shown(shape)} does not divide over {num_slices} slices: let data, or data x "
            f"fsdp, be a multiple of {num_slices}, or say with DCN_MESH what lies across them"
        )
    across = list(_sizes("DCN_MESH", over_slices))
    if math.prod(across) != num_slices:
        raise UsageError(
            f"DCN_MESH = {_shown(over_slices)} is {math.prod(across)} slices, but there are "
            f"{num_slices}: let the product be that, or leave it out"
        )
    for axis, size, n in zip(MESH_AXES, sizes, across, strict=True):
        if size % n:
            raise UsageError(
                f"DCN_MESH = {_shown(over_slices)}: {axis} {size} of MESH does not divide over "
                f"{n} slices"
            )
    return tuple(across)


def make_rules(changes: Mapping[str, Rule]) -> tuple[tuple[str, Rule], ...]:
    """The items of LOGICAL_TO_MESH with the changes; UsageError if they name an unknown axis."""
    table = dict(LOGICAL_TO_MESH)
    for name, rule in changes.items():
        if name not in table:
            raise UsageError(f"SHARDING_RULES has no axis {name!r}; {nearest(name, table)}")
        for axis in () if rule is None else (rule,) if isinstance(rule, str) else rule:
            if axis not in MESH_AXES:
                raise UsageError(
                    f"SHARDING_RULES[{name!r}] = {rule!r}: MESH has no axis {axis!r}; "
                    f"{nearest(str(axis), MESH_AXES)}"
                )
        table[name] = rule if rule is None or isinstance(rule, str) else tuple(rule)
    return tuple(table.items())


def _shown(shape: Mapping[str, int]) -> str:
    return str(dict(shape))


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
                " ".join(_mesh_axes_shown(entry) for entry in leaf.sharding.spec) or "-",
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


def _mesh_axes_shown(entry: Rule) -> str:
    return entry if isinstance(entry, str) else "+".join(entry or ()) or "-"


def _is_axes(x: Any) -> bool:
    # Not a NamedTuple: an optimizer's state without arrays is an empty one.
    return type(x) is tuple and all(isinstance(e, str | None) for e in x)
