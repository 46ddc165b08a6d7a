"""Reads the text of a compiled program (optimized HLO, https://openxla.org/xla).

A program is a list of computations; an instruction of one may run another: a loop its body and its
condition, a fusion what was fused. How often a loop runs, XLA:CPU writes beside it and XLA:TPU does
not: there it follows from where the loop's counter starts, what is added to it, and what it is
compared with.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

# Bytes of an element; what is not here (tokens, opaque values) has none.
_ITEM_SIZES = {
    "pred": 1.0,
    **{f"{kind}4": 0.5 for kind in "su"},
    **{f"{kind}{8 * size}": float(size) for kind in "sufc" for size in (1, 2, 4, 8, 16)},
    "bf16": 2.0,
}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r"([\d,]+):T\(([\d,]+)\)")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s")
_INSTRUCTION = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')


class Array(NamedTuple):
    """One array of a shape.

    Attributes:
      dtype: XLA's name of it.
      dims: sizes.
      memory_space: 0 for the device's main memory; TPUs have others on the chip.
      stored_dims: sizes with the padding to whole tiles (https://openxla.org/xla/tiled_layout).
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int
    stored_dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes without padding."""
        return math.ceil(math.prod(self.dims) * self._item_size)

    @property
    def stored_bytes(self) -> int:
        """Bytes with padding."""
        return math.ceil(math.prod(self.stored_dims) * self._item_size)

    @property
    def _item_size(self) -> float:
        return _ITEM_SIZES.get(self.dtype, 1.0 if self.dtype.startswith("f8") else 0.0)


def _read_array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n)
    space = _MEMORY_SPACE.search(layout)
    stored = list(sizes)
    if tiled := _TILE.match(layout):
        minor_to_major, tile = ([int(n) for n in numbers.split(",")] for numbers in tiled.groups())
        for dim, size in zip(minor_to_major, reversed(tile), strict=False):
            stored[dim] = -(-stored[dim] // size) * size
    return Array(dtype, sizes, int(space[1]) if space else 0, tuple(stored))


@functools.lru_cache(maxsize=65536)
def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text: one, or all that a tuple holds, nested ones too."""
    return tuple(_read_array(*found) for found in _ARRAY.findall(shape))


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique within its computation.
      shape: text of the result's shape.
      opcode: "dot", "fusion", "all-gather-start", ...
      operands: names of other instructions of the computation.
      arguments: the text between the parentheses: the operands, a constant's value, a parameter's
        number.
      attributes: the text after them.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Those of the result."""
        return arrays_of(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the result, without padding."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the result, with padding."""
        return sum(array.stored_bytes for array in self.arrays)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is one word: `channel_id`, `calls`, `body`, ..."""
        match = re.search(rf"(?:^|[\s,]){name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The value of an attribute that is a list of numbers; empty if it is not there."""
        match = re.search(rf"(?:^|[\s,]){name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in match[1].split(",") if n) if match else ()

    @property
    def source(self) -> str:
        """What JAX calls the operation it comes from; empty if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order of the text, and the one whose result is the result."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have an instruction among their operands."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that an instruction takes its input from."""
        return [self.instructions[o] for o in instruction.operands if o in self.instructions]


class Linear(NamedTuple):
    """A number: `offset`, plus an element of the loop's tuple at the iteration's start if given."""

    element: int | None
    offset: int


@dataclasses.dataclass
class Module:
    """A program.

    Attributes:
      computations: by name.
      entry: the name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def _loop_of(self) -> dict[str, tuple[Computation, Instruction]]:
        """For each loop's body, the loop and the computation that it stands in."""
        return {
            body: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while" and (body := instruction.attribute("body"))
        }

    def called(self, instruction: Instruction) -> list[Computation]:
        """The computations that an instruction runs once each; not loops, branches, reductions."""
        if instruction.opcode not in ("fusion", "call", "async-start", "custom-call"):
            return []
        names = [instruction.attribute("calls")]
        if instruction.opcode == "call":
            names.append(instruction.attribute("to_apply"))
        return [self.computations[name] for name in names if name in self.computations]

    def branches(self, instruction: Instruction) -> list[Computation]:
        """Those of a conditional, of which one is run."""
        match = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = _OPERAND.findall(match[1]) if match else []
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
        return [self.computations[name] for name in names]

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often the body of a loop that stands in `computation` runs; None if it is unknown."""
        if match := _TRIP_COUNT.search(loop.attributes):
            return int(match[1])
        body = self.computations[loop.attribute("body") or ""]
        condition = self.computations[loop.attribute("condition") or ""]
        found = self._comparison(condition)
        if found is None:
            return None
        counter, limit, direction = found
        if counter.element is None:
            mirrored = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}
            counter, limit, direction = limit, counter, mirrored.get(direction, direction)
        if counter.element is None:
            return None
        step = self._element(body, self.computations[body.name].root, counter.element)
        start = self._initial(computation, loop, counter.element)
        end = limit.offset
        if limit.element is not None:
            if not self._is_invariant(body, limit.element):
                return None
            initial = self._initial(computation, loop, limit.element)
            if initial is None:
                return None
            end += initial
        if step is None or step.element != counter.element or not step.offset or start is None:
            return None
        distance = end - start - counter.offset
        distance += {"LE": 1, "GE": -1}.get(direction, 0)
        return max(0, math.ceil(distance / step.offset))

    def _comparison(self, condition: Computation) -> tuple[Linear, Linear, str] | None:
        """What a loop's condition compares."""
        computation, parameters = condition, list[Value]([_LOOP_TUPLE])
        root = computation.instructions[computation.root]
        while root.opcode in ("fusion", "copy", "bitcast"):
            if root.opcode == "fusion":
                parameters = [self._value(computation, o, parameters) for o in root.operands]
                (computation,) = self.called(root)
                root = computation.instructions[computation.root]
            else:
                root = computation.instructions[root.operands[0]]
        direction = root.attribute("direction")
        if root.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE", "NE"):
            return None
        left, right = (self._value(computation, o, parameters) for o in root.operands)
        if not isinstance(left, Linear) or not isinstance(right, Linear):
            return None
        return left, right, direction

    def _element(self, body: Computation, name: str, index: int) -> Linear | None:
        """An element of a tuple that a loop's body makes."""
        instruction = body.instructions[name]
        if instruction.opcode == "tuple":
            value = self._value(body, instruction.operands[index], [_LOOP_TUPLE])
            return value if isinstance(value, Linear) else None
        value = self._value(body, name, [_LOOP_TUPLE])
        if isinstance(value, tuple) and not isinstance(value, Linear):
            value = value[index]
        return value if isinstance(value, Linear) else None

    def _is_invariant(self, body: Computation, index: int) -> bool:
        return self._element(body, body.root, index) == Linear(index, 0)

    def _initial(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        """An element of the tuple with which a loop starts."""
        start = computation.instructions[loop.operands[0]]
        while start.opcode in ("copy", "bitcast", "optimization-barrier"):
            start = computation.instructions[start.operands[0]]
        if start.opcode == "tuple":
            value = self._value(computation, start.operands[index], [_LOOP_TUPLE])
        else:
            value = self._value(computation, start.name, [_LOOP_TUPLE])
            if isinstance(value, tuple) and not isinstance(value, Linear):
                value = value[index]
        if not isinstance(value, Linear):
            return None
        if value.element is None:
            return value.offset
        # It comes from the tuple of the loop around this one, where it must stay the same.
        around = self._loop_of.get(computation.name)
        if around is None or not self._is_invariant(computation, value.element):
            return None
        outer = self._initial(*around, value.element)
        return None if outer is None else outer + value.offset

    def _value(self, computation: Computation, name: str, parameters: list) -> "Value":
        """What can be said of an instruction's result, given the computation's parameters."""
        instruction = computation.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            literal = instruction.arguments
            return Linear(None, int(literal)) if re.fullmatch(r"-?\d+", literal) else None
        if opcode == "parameter":
            number = int(instruction.arguments)
            return parameters[number] if number < len(parameters) else None
        if opcode == "tuple":
            return tuple(self._value(computation, o, parameters) for o in operands)
        if opcode == "get-tuple-element":
            base, index = (
                self._value(computation, operands[0], parameters),
                instruction.attribute("index"),
            )
            if base == _LOOP_TUPLE:
                return Linear(int(index or 0), 0)
            if isinstance(base, tuple) and not isinstance(base, Linear):
                return base[int(index or 0)]
            return None
        if opcode in _SAME_VALUE:
            return self._value(computation, operands[0], parameters)
        if opcode in ("add", "subtract"):
            left, right = (self._value(computation, o, parameters) for o in operands)
            return _sum(left, right, 1 if opcode == "add" else -1)
        if opcode in ("fusion", "call"):
            inner = [self._value(computation, o, parameters) for o in operands]
            (callee,) = self.called(instruction)
            return self._value(callee, callee.root, inner)
        return None


# The parameter of a loop's body or condition, whole.
_LOOP_TUPLE = "loop tuple"
Value = Linear | tuple | str | None
_SAME_VALUE = frozenset(
    {"bitcast", "convert", "copy", "copy-done", "copy-start", "optimization-barrier", "reshape"}
)


def _sum(left: Value, right: Value, sign: int) -> Linear | None:
    if not isinstance(left, Linear) or not isinstance(right, Linear):
        return None
    if right.element is not None and (left.element is not None or sign < 0):
        return None
    element = left.element if right.element is None else right.element
    return Linear(element, left.offset + sign * right.offset)


def parse_module(text: str | Iterable[str]) -> Module:
    """Reads a program, in time linear in its length.

    Args:
      text: what `compiled.as_text()` gives, or its lines.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines() if isinstance(text, str) else text:
        if current is None:
            if not line.endswith("{") or line.startswith((" ", "HloModule")):
                continue
            if match := _COMPUTATION.match(line):
                current = computations[match[2]] = Computation(match[2])
                entry = current.name if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _read_instruction(match[2], line, match.end())
            current.instructions[instruction.name] = instruction
            if match[1]:
                current.root = instruction.name
    if not entry:
        raise ValueError("this text has no ENTRY computation: it is no HLO module")
    return Module(computations, entry)


def _read_instruction(name: str, line: str, start: int) -> Instruction:
    """`line` from `start` on: shape, opcode(arguments), attributes."""
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    match = _OPCODE.match(line, end)
    if match is None:
        raise ValueError(f"no instruction of an HLO module: {line.strip()[:200]}")
    close = _closing(line, match.end() - 1)
    arguments = line[match.end() : close - 1]
    operands = tuple(_OPERAND.findall(arguments)) if match[1] != "constant" else ()
    return Instruction(name, line[start:end], match[1], operands, arguments, line[close:])


_PARENTHESIS = re.compile(r"[()]")


def _closing(line: str, start: int) -> int:
    """The end of what the parenthesis at `start` opens."""
    depth = 0
    for match in _PARENTHESIS.finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"a parenthesis is not closed: {line.strip()[:200]}")
