"""What one run of a compiled program does: operations, memory traffic, collectives.

Each computation is looked at once; what a loop's body does counts as often as the loop runs.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from t5x_lite.plan import collectives
from t5x_lite.plan.flops import matrix_product_flops
from t5x_lite.plan.hlo import Computation, Instruction, Module, parse_module


class Transfer(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of `collectives.KINDS`. An all-reduce of which a fusion keeps this device's part
        alone is the reduce-scatter that it is on a TPU.
      operand_bytes: what a device puts in.
      instruction: the instruction, with its groups and its origin.
    """

    kind: str
    operand_bytes: int
    instruction: Instruction


@dataclasses.dataclass
class Work:
    """Totals of one device.

    Attributes:
      flops: operations of matrix products.
      bytes_accessed: an estimate of what is read from and written to the main memory: the operands
        and results of all instructions that are in no fusion, of slices what is sliced, padding
        included, and nothing of what lies in a memory on the chip.
      transfers: how often each collective is executed.
      unknown_loops: loops whose trip count is unknown, counted once.
    """

    flops: int = 0
    bytes_accessed: int = 0
    transfers: Counter[Transfer] = dataclasses.field(default_factory=Counter)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Work", times: int = 1) -> None:
        """Adds what was done `times` times."""
        self.flops += times * other.flops
        self.bytes_accessed += times * other.bytes_accessed
        for transfer, count in other.transfers.items():
            self.transfers[transfer] += times * count
        self.unknown_loops += other.unknown_loops


def work_of(text: str | Iterable[str], *, only_partitioned: bool = False) -> Work:
    """The work of one execution of a program.

    Args:
      text: what `compiled.as_text()` gives, or its lines.
      only_partitioned: it is the program as XLA's partitioner left it, before anything else was
        done. It knows no reduce-scatter: an all-reduce of which each device only uses its slice is
        what compilers for accelerators make one of.
    """
    module = parse_module(text)
    return _Walk(module, only_partitioned).work(module.computations[module.entry])


# What takes no time at the memory: names for parts of other results, or work counted elsewhere.
_FREE = frozenset(
    {
        "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "iota",
        "optimization-barrier", "parameter", "partition-id", "replica-id", "tuple", "while",
    }
)  # fmt: skip
_FREE_CALLS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollective",
    "ConcatBitcast",
)
_SLICES = frozenset({"slice", "dynamic-slice", "gather"})
_VIEWS = frozenset({"bitcast", "reshape"})


class _Walk:
    """Looks at every computation of a module once."""

    def __init__(self, module: Module, only_partitioned: bool):
        self.module = module
        self._only_partitioned = only_partitioned
        self._done: dict[str, Work] = {}
        self._fused: dict[str, Work] = {}
        # XLA:TPU spreads a collective over several fusions, and over iterations of a loop, whose
        # copies of it share a channel. It counts where it is started.
        self._started = {
            instruction.attribute("channel_id")
            for computation in module.computations.values()
            if _starts(computation)
            for instruction in computation.instructions.values()
            if collectives.kind_of(instruction)
        } - {None}

    def work(self, computation: Computation) -> Work:
        """That of a computation whose instructions are executed one by one."""
        if computation.name in self._done:
            return self._done[computation.name]
        total = Work()
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                count = self.module.trip_count(computation, instruction)
                if count is None:
                    total.unknown_loops.append(instruction.name)
                    count = 1
                body = self.module.computations[instruction.attribute("body") or ""]
                total.add(self.work(body), count)
            elif instruction.opcode == "conditional":
                branches = [self.work(branch) for branch in self.module.branches(instruction)]
                total.add(max(branches, key=lambda w: (w.flops, w.bytes_accessed)))
            elif instruction.opcode in ("call", "async-start"):
                for called in self.module.called(instruction):
                    total.add(self.work(called))
            else:
                total.flops += matrix_product_flops(instruction, computation)
                total.transfers.update(self._transfers(instruction, computation))
                total.bytes_accessed += self._traffic(instruction, computation)
                for called in self.module.called(instruction):
                    total.add(self._work_fused(called))
        self._done[computation.name] = total
        return total

    def _work_fused(self, computation: Computation) -> Work:
        """Operations and collectives of a fusion's computation, and what those read and write.

        The rest of its traffic is counted where the fusion stands.
        """
        if computation.name in self._fused:
            return self._fused[computation.name]
        total = Work()
        is_start = _starts(computation)
        for instruction in computation.instructions.values():
            total.flops += matrix_product_flops(instruction, computation)
            if is_start or instruction.attribute("channel_id") not in self._started:
                transfers = self._transfers(instruction, computation, is_fused=True)
                total.transfers.update(transfers)
                if transfers:
                    total.bytes_accessed += _traffic_of_fused(computation, instruction)
            for called in self.module.called(instruction):
                total.add(self._work_fused(called))
        self._fused[computation.name] = total
        return total

    def _transfers(
        self, instruction: Instruction, computation: Computation, *, is_fused: bool = False
    ) -> list[Transfer]:
        """The collective that an instruction is, if it is one."""
        kind = collectives.kind_of(instruction)
        if kind is None:
            return []
        num_bytes = collectives.operand_bytes(instruction, computation)
        if kind == "all-reduce":
            root = computation.instructions[computation.root]
            keeps_part = is_fused and 0 < root.num_bytes < instruction.num_bytes
            uses = _uses(computation, instruction)
            is_sliced = bool(uses) and all(user.opcode == "dynamic-slice" for user in uses)
            if keeps_part or (self._only_partitioned and is_sliced):
                kind = "reduce-scatter"
        return [Transfer(kind, num_bytes, instruction)]

    def _traffic(self, instruction: Instruction, computation: Computation) -> int:
        """Bytes that an instruction that is in no fusion reads and writes in the main memory."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        operands = computation.operands(instruction)
        if opcode == "fusion":
            (fused,) = self.module.called(instruction)
            return sum(
                _least(operand, self._read_inside(fused, fused.parameters[number]))
                for number, operand in enumerate(operands)
            ) + _least(instruction, self._written_inside(fused))
        if opcode == "custom-call" and any(name in instruction.attributes for name in _FREE_CALLS):
            return 0
        if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # (to, from, ...) or ((from), to, ...): what is moved is the smaller of the two.
            ends = instruction.arrays[:2]
            moved = min(array.stored_bytes for array in ends)
            return moved * sum(array.memory_space == 0 for array in ends)
        if opcode in _SLICES:
            return 2 * _in_main_memory(instruction)
        if opcode == "dynamic-update-slice":
            return 2 * operands[1].stored_bytes if _in_main_memory(instruction) else 0
        if opcode == "scatter":
            return 3 * sum(o.stored_bytes for o in operands[len(operands) // 2 + 1 :])
        if opcode == "send":
            return sum(map(_in_main_memory, operands))
        results = instruction.arrays
        if opcode.endswith("-start") and opcode != "all-reduce-start":
            results = results[len(operands) :]  # (operands, results, ...)
        written = sum(array.stored_bytes for array in results if array.memory_space == 0)
        return written + sum(map(_in_main_memory, operands))

    def _read_inside(self, fused: Computation, value: Instruction) -> int:
        """Of a fusion's parameter, the bytes that its instructions read."""
        total = 0
        for user in fused.users[value.name]:
            first = user.operands[0] == value.name
            if user.opcode in _VIEWS:
                total += self._read_inside(fused, user)
            elif user.opcode == "fusion":
                (inner,) = self.module.called(user)
                for number, operand in enumerate(user.operands):
                    if operand == value.name:
                        total += self._read_inside(inner, inner.parameters[number])
            elif user.opcode in _SLICES and first:
                total += user.stored_bytes
            elif user.opcode == "dynamic-update-slice" and first:
                continue  # written in place
            elif _hands_on(user):
                continue  # the collective's bytes are counted where it is
            else:
                return value.stored_bytes
        return min(total, value.stored_bytes)

    def _written_inside(self, fused: Computation) -> int:
        """Of a fusion's result, the bytes that its instructions write."""
        root = fused.instructions[fused.root]
        results = fused.operands(root) if root.opcode == "tuple" else [root]
        total = 0
        for result in results:
            while result.opcode in _VIEWS:
                (result, *_) = fused.operands(result)
            if result.opcode == "dynamic-update-slice":
                total += fused.operands(result)[1].stored_bytes
            elif result.opcode == "fusion":
                (inner,) = self.module.called(result)
                total += self._written_inside(inner)
            elif result.opcode in ("parameter", "get-tuple-element", "custom-call"):
                continue
            elif collectives.kind_of(result):
                continue  # counted where the collective is
            else:
                total += result.stored_bytes
        return total


def _starts(computation: Computation) -> bool:
    """Whether it is the start of a collective that fusions after it go on with."""
    root = computation.instructions[computation.root]
    return root.opcode == "custom-call" and "AsyncCollectiveStart" in root.attributes


def _uses(
    computation: Computation, value: Instruction, same: Collection[str] = ("copy",)
) -> list[Instruction]:
    """What takes an instruction's result, or a copy of it (whatever opcodes make one)."""
    found = []
    for user in computation.users[value.name]:
        found += _uses(computation, user, same) if user.opcode in same else [user]
    return found


def _in_main_memory(instruction: Instruction) -> int:
    return sum(array.stored_bytes for array in instruction.arrays if array.memory_space == 0)


def _least(instruction: Instruction, inside: int) -> int:
    return min(_in_main_memory(instruction), inside)


def _traffic_of_fused(fused: Computation, collective: Instruction) -> int:
    """Bytes that a collective reads from a fusion's parameters and writes to its results."""
    total = 0
    for operand in fused.operands(collective):
        source = operand
        while source.opcode in _VIEWS:
            (source, *_) = fused.operands(source)
        if source.opcode == "parameter":
            total += _in_main_memory(operand)
    users = _uses(fused, collective, _VIEWS)
    if all(user.opcode == "tuple" or "AsyncColl" in user.attributes for user in users):
        total += _in_main_memory(collective)
    return total


def _hands_on(user: Instruction) -> bool:
    """Whether it is a tuple or a collective, which read nothing in the fusion itself."""
    is_collective = collectives.kind_of(user) or "AsyncColl" in user.attributes
    return user.opcode == "tuple" or bool(is_collective)
