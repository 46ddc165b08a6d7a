"""The real train step, compiled for a target, and what its program needs: memory, FLOPs, bytes."""

import dataclasses
import importlib.metadata
import math
import pathlib
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from t5x_lite import setup
from t5x_lite.errors import Failure
from t5x_lite.plan import collectives
from t5x_lite.plan.flops import model_flops
from t5x_lite.plan.targets import Target, captured_stderr
from t5x_lite.plan.work import Work, work_of
from t5x_lite.run_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      parameters: the parameters' shards.
      optimizer: the optimizer state's shards (and the step's number).
      batch: the shards of the batch.
      padding: what the program's inputs take beyond these because of the shapes that the device
        stores, less what of the batch the program never reads.
      temporaries: activations, gradients and the compiler's workspace, where they and the outputs
        that take no input's place are the most. The new state takes the old one's place.
      program: the compiled program itself.
      peak: what the device must hold: all of the above.
    """

    parameters: int
    optimizer: int
    batch: int
    padding: int
    temporaries: int
    program: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one step (a multiplication and an addition are two).

    Attributes:
      model: of the whole step on all devices, closed form: every matrix product forward, and twice
        that backward, without what is computed again. What MFU is measured by.
      program: of the whole step on all devices, as the program does them, recomputation included.
      per_device: the same on one device; `program` / the number of devices.
    """

    model: int
    program: int
    per_device: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one form, per device and step.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
        Permutes are mostly gathers and scatters that the compiler has cut into pieces, so that they
        overlap with matrix products.
      mesh_axes: the mesh axes along which the groups lie.
      group_size: devices that take part together.
      num_slices: slices (GPUs: hosts) that they lie on. XLA:TPU splits what spans several into a
        part inside each slice and one between them, of which a group has one device of each.
      instructions: how many of them the program has.
      count: how many are executed in a step: those in loops times their trip counts.
      operand_bytes: what a device puts in, summed over `count`.
      result_bytes: what a device gets out, summed over `count`.
      link_bytes: what a device sends over links in ring algorithms with n devices, summed over
        `count`: all-gather and reduce-scatter (n - 1) / n of the whole array, all-reduce twice
        that, all-to-all (n - 1) / n of its operand, collective-permute its operand.
      largest: what JAX calls the operation that the one with the most bytes comes from.
    """

    kind: str
    mesh_axes: tuple[str, ...]
    group_size: int
    num_slices: int
    instructions: int
    count: int
    operand_bytes: int
    result_bytes: int
    link_bytes: int
    largest: str

    @property
    def crosses_slices(self) -> bool:
        """Whether bytes go over the data-center network."""
        return self.num_slices > 1


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled train step needs.

    Attributes:
      target: its name, like "v5e:16x16".
      compiled_by: "libtpu ..." or "XLA:CPU, as many virtual devices".
      num_devices: devices of the mesh, `target.num_devices`.
      mesh: devices along each mesh axis.
      lower_seconds: tracing and lowering.
      compile_seconds: compilation proper.
      host_bytes: the largest resident memory of this process so far.
      memory: bytes on a device; for GPUs the temporaries are those of XLA:CPU, which computes in
        float32 what was to be in bfloat16, and so are an upper bound.
      flops: operations of a step.
      bytes_accessed: estimate of what a step reads from and writes to one device's memory: the
        operands and results of every instruction that is not inside a fusion, of slices what is
        sliced; on a TPU without what stays on the chip.
      collectives: by kind and groups, the most bytes over links first.
      warnings: what the partitioner complained of, and loops whose trip count is unknown.
    """

    target: str
    compiled_by: str
    num_devices: int
    mesh: dict[str, int]
    lower_seconds: float
    compile_seconds: float
    host_bytes: int
    memory: Memory
    flops: Flops
    bytes_accessed: int
    collectives: tuple[Collective, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        for entry, collective in zip(values["collectives"], self.collectives, strict=True):
            entry["crosses_slices"] = collective.crosses_slices
        return values


class DoesNotFit(Failure):
    """The compiler found that the program needs more memory than the chip has.

    Attributes:
      memory: bytes on each device as far as they are known then; `program` is 0, and `temporaries`
        is what the compiler says of them.
      available: bytes that the compiler found available.
      compile_seconds: how long it took to find out.
    """

    def __init__(self, message: str, memory: Memory, available: int, compile_seconds: float):
        super().__init__(message)
        self.memory = memory
        self.available = available
        self.compile_seconds = compile_seconds


def compile_step(config: TrainConfig, target: Target) -> Program:
    """Compiles the run's train step for `target` and analyses it; `targets.prepare` comes first.

    Raises:
      UsageError: the configuration does not fit the target's devices (the mesh's product, what
        does not divide), or the target cannot be compiled for here.
      DoesNotFit: the compiler refuses, since the chip has too little memory.
    """
    partitioning = target.partitioning_of(config)
    mesh = dict(partitioning.mesh.shape)
    start = time.monotonic()
    programs = setup.make_programs(config, partitioning, compile_train_step=False)
    batch = setup.batch_shapes(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = programs.abstract_state
    arguments = Memory(
        parameters=_shard_bytes(state.params),
        optimizer=_shard_bytes((state.step, state.opt_state)),
        batch=sum(
            math.prod(partitioning.batch.shard_shape(rows.shape)) * rows.dtype.itemsize
            for rows in batch.values()
        ),
        padding=0,
        temporaries=0,
        program=0,
        peak=0,
    )
    with captured_stderr() as notes:
        lowered: Any = programs.train_step.lower(state, batch, key)  # type: ignore[attr-defined]
        lower_seconds, start = time.monotonic() - start, time.monotonic()
        try:
            compiled, partitioned = _compile(lowered, target)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            seconds = time.monotonic() - start
            raise _does_not_fit(str(e), target, arguments, seconds) from e
    compile_seconds = time.monotonic() - start
    work = work_of(compiled.as_text())
    if partitioned:
        before = work_of(partitioned, only_partitioned=True)
        work = dataclasses.replace(work, flops=before.flops, transfers=before.transfers)
    lengths = config.data.task_feature_lengths
    return Program(
        target=target.name,
        compiled_by=_compiler(target),
        num_devices=target.num_devices,
        mesh=mesh,
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        host_bytes=_peak_resident_bytes(),
        memory=_memory(arguments, compiled.memory_analysis(), target),
        flops=Flops(
            model=model_flops(
                config.model, config.data.batch_size, lengths["inputs"], lengths["targets"]
            ),
            program=work.flops * target.num_devices,
            per_device=work.flops,
        ),
        bytes_accessed=work.bytes_accessed,
        collectives=_collectives(work, mesh, target, list(partitioning.mesh.devices.flat)),
        warnings=_warnings(notes, work),
    )


def _compile(lowered: Any, target: Target) -> tuple[Any, str]:
    """The compiled program and, for GPUs, its text as the partitioner left it.

    What comes after the partitioner, XLA:CPU does for CPUs: it sums bfloat16 in float32, and makes
    no reduce-scatter.
    """
    if not target.is_gpu:
        return lowered.compile(), ""
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = lowered.compile(compiler_options=options)
        (path,) = pathlib.Path(directory).glob("*.after_spmd-partitioning.*.txt")
        return compiled, path.read_text()


def _shard_bytes(tree: Any) -> int:
    """Bytes on one device of arrays that have shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(arguments: Memory, analysis: Any, target: Target) -> Memory:
    """Splits the compiler's figures.

    XLA:TPU's `temp_size_in_bytes` is no bound: programs compile, and so fit, for which it is above
    the chip's memory. `peak_memory_in_bytes`, of what is alive at the same time, inputs included,
    stays below. XLA:CPU's does not count all temporaries.
    """
    known = arguments.parameters + arguments.optimizer + arguments.batch
    inputs, alive = analysis.argument_size_in_bytes, analysis.peak_memory_in_bytes
    if target.is_gpu:
        new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        alive = inputs + new_outputs + analysis.temp_size_in_bytes
    program = analysis.generated_code_size_in_bytes
    return dataclasses.replace(
        arguments,
        padding=inputs - known,
        temporaries=alive - inputs,
        program=program,
        peak=alive + program,
    )


_SIZE = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _size(match: re.Match[str]) -> int:
    return int(float(match[1]) * _UNITS[match[2]])


def _does_not_fit(message: str, target: Target, arguments: Memory, seconds: float) -> DoesNotFit:
    """From XLA:TPU's words for it."""
    known = arguments.parameters + arguments.optimizer + arguments.batch
    available = re.search(rf"(?:available HBM \(| of ){_SIZE}", message)
    temporaries = re.search(rf"HLO temporaries \({_SIZE}\)", message)
    used = re.search(rf"Used {_SIZE}", message)
    if temporaries:
        num_temporaries = _size(temporaries)
    else:
        num_temporaries = max(_size(used) - known, 0) if used else 0
    memory = dataclasses.replace(
        arguments, temporaries=num_temporaries, peak=known + num_temporaries
    )
    first = " ".join(message.split("\n\n")[0].split())
    return DoesNotFit(
        f"{target.name}: the train step does not fit on the chip: {first}",
        memory,
        _size(available) if available else 0,
        seconds,
    )


def _collectives(
    work: Work, mesh: dict[str, int], target: Target, devices: list[Any]
) -> tuple[Collective, ...]:
    """The program's collectives by kind and groups."""
    slice_of = [target.slice_of(device) for device in devices]
    ids = [device.id for device in devices]
    found: dict[tuple, Collective] = {}
    largest: dict[tuple, int] = {}
    for transfer, count in work.transfers.items():
        kind, operand, instruction = transfer
        if instruction.opcode == "send":
            groups = collectives.groups_between_slices(instruction, ids, slice_of)
        elif target.is_gpu:
            groups = collectives.groups_of(instruction, len(devices))
        else:
            # What is not sent stays inside a slice, whose devices it counts from 0.
            inside = np.flatnonzero(np.asarray(slice_of) == slice_of[0])
            groups = collectives.groups_of(instruction, len(inside)).at(inside)
        size = groups.size(mesh)
        axes, num_slices = groups.mesh_axes(mesh), groups.num_slices(slice_of)
        key = (kind, axes, size, num_slices)
        sent = count * collectives.link_bytes(kind, operand, size)
        old = found.get(key, Collective(kind, axes, size, num_slices, 0, 0, 0, 0, 0, ""))
        is_largest = sent > largest.get(key, -1)
        largest[key] = max(sent, largest.get(key, -1))
        found[key] = dataclasses.replace(
            old,
            instructions=old.instructions + 1,
            count=old.count + count,
            operand_bytes=old.operand_bytes + count * operand,
            result_bytes=old.result_bytes + count * collectives.result_bytes(kind, operand, size),
            link_bytes=old.link_bytes + sent,
            largest=instruction.source if is_largest else old.largest,
        )
    return tuple(sorted(found.values(), key=lambda c: (-c.link_bytes, c.kind, c.mesh_axes)))


def _warnings(notes: Iterable[str], work: Work) -> tuple[str, ...]:
    # "W0921 12:00:00.000000 123 spmd_partitioner.cc:652] [SPMD] Involuntary full ..."
    told = [re.sub(r"^[WE]\d{4} .*?\] ", "", note) for note in notes if "[SPMD]" in note]
    told += [f"the trip count of {loop} is unknown: counted once" for loop in work.unknown_loops]
    return tuple(dict.fromkeys(told))


def _compiler(target: Target) -> str:
    if target.is_gpu:
        return f"XLA:CPU of jaxlib {importlib.metadata.version('jaxlib')}, as many virtual devices"
    return f"libtpu {importlib.metadata.version('libtpu')}"


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
