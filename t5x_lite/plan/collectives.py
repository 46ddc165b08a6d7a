"""Collectives of a program: which devices take part, and how many bytes go over links."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from t5x_lite.plan.hlo import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# One part of an asynchronous collective stands for the whole.
_STARTS = {f"{kind}{suffix}": kind for kind in KINDS for suffix in ("", "-start")}

# Between slices XLA:TPU sends to a runtime on the host, which does these.
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_TRANSFER_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_ALL_OF_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x\{[\d:,]+\}"')
_SENT_TO = re.compile(r'_xla_megascale_target="?\{(\{[\d,{}>\s-]*\})\}')

_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}\s]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}\s]*\})\}")
_SUB_AXIS = re.compile(r"\((\d+)\)(\d+)")
_RESHAPED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Groups:
    """Devices that exchange something with each other, as places in the flattened mesh.

    Attributes:
      groups: int [number of groups, devices of each].
      is_pairs: each is a (source, target) of a collective-permute.
    """

    groups: np.ndarray
    is_pairs: bool = False

    def mesh_axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """The axes of the mesh along which the groups lie."""
        places = np.stack(np.unravel_index(self.groups, tuple(mesh.values())))
        differs = (places != places[:, :, :1]).any(axis=(1, 2))
        return tuple(axis for axis, d in zip(mesh, differs, strict=True) if d)

    def at(self, places: np.ndarray) -> "Groups":
        """The same groups of other devices: of `places[i]` instead of i."""
        return dataclasses.replace(self, groups=places[self.groups])

    def size(self, mesh: dict[str, int]) -> int:
        """Devices that take part together; of a permutation, those along its mesh axes."""
        if self.is_pairs:
            return math.prod(mesh[axis] for axis in self.mesh_axes(mesh))
        return self.groups.shape[1]

    def num_slices(self, slice_of: Sequence[int]) -> int:
        """Slices of which a group has devices; `slice_of` is the slice of each place."""
        return max(len(set(group)) for group in np.asarray(slice_of)[self.groups].tolist())


def kind_of(instruction: Instruction) -> str | None:
    """One of KINDS; None for what is none, and for the second half of an asynchronous one."""
    if instruction.opcode == "send":
        match = _TRANSFER_TYPE.search(instruction.attributes)
        return _BETWEEN_SLICES.get(match[1]) if match else None
    return _STARTS.get(instruction.opcode)


def operand_bytes(instruction: Instruction, computation: Computation) -> int:
    """What a device puts in."""
    return sum(operand.num_bytes for operand in computation.operands(instruction))


def result_bytes(kind: str, operand: int, group_size: int) -> int:
    """What a device gets out of a collective over `group_size` devices."""
    if kind == "all-gather":
        return operand * group_size
    return operand // group_size if kind == "reduce-scatter" else operand


def link_bytes(kind: str, operand: int, group_size: int) -> int:
    """What a device sends in a ring (Chan et al. 2007, "Collective communication").

    With n devices, all-gather and reduce-scatter send (n - 1) / n of the whole array, all-reduce,
    which is both, twice that, all-to-all (n - 1) / n of a device's part, and collective-permute
    all of it.
    """
    n = group_size
    if n == 1:
        return 0
    whole = operand * n if kind == "all-gather" else operand
    if kind == "collective-permute":
        return operand
    return (2 if kind == "all-reduce" else 1) * whole * (n - 1) // n


@functools.lru_cache(maxsize=1024)
def _groups(text: str, num_devices: int) -> Groups:
    if match := _PAIRS.search(text):
        return Groups(_nested(match[1]), is_pairs=True)
    if match := _LISTED.search(text):
        return Groups(_nested(match[1]))
    if match := _IOTA.search(text):
        return Groups(_reshaped(match[2]).reshape(_ints(match[1])))
    if match := _MESH.search(text):
        return Groups(_of_mesh(*match.groups()))
    # Nothing said: all of them.
    return Groups(np.arange(num_devices)[None])


def groups_of(instruction: Instruction, num_devices: int) -> Groups:
    """Who takes part, in any of the forms that XLA writes.

    `{{0,1},{2,3}}`; `[2,2]<=[4]`, with `T(1,0)` if the numbers are transposed first; and a mesh's
    axes, `mesh['x'=2,'y'=2] {'y'}`, where `'x':(2)4` is a part of an axis: 4 after the first 2.
    """
    # Only this part of the text, which many instructions share, decides.
    for name in ("replica_groups=", "source_target_pairs="):
        start = instruction.attributes.find(name)
        if start >= 0:
            end = re.compile(r", [a-z_]+=(?!\()").search(instruction.attributes, start)
            return _groups(instruction.attributes[start : end and end.start()], num_devices)
    return _groups("", num_devices)


def groups_between_slices(
    instruction: Instruction, device_ids: Sequence[int], slice_of: Sequence[int]
) -> Groups:
    """Who takes part in a `send` to other slices, of which each group has one device of each.

    `"{1,2}x{0:7}"`: every device of the first two slices with those at its place in the others;
    `{{100000,300000},...}` and `{{100000->300000},...}`: devices by JAX's ids.

    Args:
      instruction: the `send`.
      device_ids: the id of each place.
      slice_of: the slice of each place, from 0.

    Raises:
      ValueError: none of these forms.
    """
    if match := _ALL_OF_SLICES.search(instruction.attributes):
        slices = np.asarray(slice_of)
        return Groups(np.stack([np.flatnonzero(slices == n - 1) for n in _ints(match[1])], axis=1))
    if match := _SENT_TO.search(instruction.attributes):
        place_of = {device: place for place, device in enumerate(device_ids)}
        ids = _nested(match[1].replace("->", ","))
        return Groups(np.vectorize(place_of.__getitem__)(ids), is_pairs="->" in match[1])
    raise ValueError(f"no groups of a send between slices: {instruction.attributes[:300]}")


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n.strip()]


def _nested(text: str) -> np.ndarray:
    return np.array([_ints(group) for group in re.findall(r"\{([\d,\s]*)\}", text)])


def _reshaped(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0 to 7, reshaped, transposed; flattened."""
    match = _RESHAPED.fullmatch(text)
    if match is None:
        return np.array(_ints(text))
    dims = _ints(match[1])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers.transpose(_ints(match[2])) if match[2] else numbers).reshape(-1)


def _of_mesh(axes: str, device_ids: str | None, grouped: str) -> np.ndarray:
    sizes = {}
    for axis in axes.split(","):
        name, _, count = axis.rpartition("=")
        sizes[name.strip()] = int(count)
    wanted: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    order = []
    for part in filter(None, (p.strip() for p in grouped.split(","))):
        name, _, inside = part.partition(":")
        before, size = (
            (int(n) for n in _SUB_AXIS.findall(inside)[0]) if inside else (1, sizes[name])
        )
        wanted[name].append((before, size))
        order.append((name, before))
    # Every axis is cut where one of its parts begins or ends.
    dims: list[int] = []
    places: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        done = 1
        for before, length in sorted(wanted[name]):
            if before > done:
                dims.append(before // done)
            places[name, before] = len(dims)
            dims.append(length)
            done = before * length
        if size > done or not wanted[name]:
            dims.append(size // done)
    last = [places[key] for key in order]
    first = [i for i in range(len(dims)) if i not in last]
    numbers = np.arange(math.prod(dims)) if device_ids is None else _reshaped(device_ids)
    group_size = math.prod(dims[i] for i in last)
    return numbers.reshape(dims).transpose(first + last).reshape(-1, group_size)
