"""A plan as tables for a person, and as JSON."""

import dataclasses
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from t5x_lite.plan.chips import FLAGS, Chip
from t5x_lite.plan.cost import RATE_SOURCES, Bound, Fit, Plan, Rates, RunCost
from t5x_lite.plan.program import Collective, Memory
from t5x_lite.plan.search import Found, Tried
from t5x_lite.plan.targets import Target
from t5x_lite.plan.units import binary_bytes, decimal_bytes, duration, three_digits
from t5x_lite.run_config import TrainConfig

Row = Sequence[str]


def assumptions(chip: Chip, rates: Rates) -> list[dict[str, Any]]:
    """Every number that did not come out of the compiled program.

    Returns:
      One each: its flag, its value (None if unknown), its unit in words, and its source.
    """
    rows: list[dict[str, Any]] = []
    for name, flag in FLAGS.items():
        figure = getattr(chip, name)
        value = None if figure is None else figure.value / flag.unit
        source = "no list price was found" if figure is None else figure.source
        rows.append(
            {"flag": f"--{flag.name}", "value": value, "unit": flag.words, "source": source}
        )
    default = Rates()
    for name, words in (
        ("efficiency", "of the bound's speed reached by the estimate"),
        ("pue", "kWh of the data center for one of its computers"),
        ("co2_kg_per_kwh", "kg of CO2e for a kWh"),
    ):
        value = getattr(rates, name)
        source = RATE_SOURCES[name] if value == getattr(default, name) else "given"
        rows.append({"flag": f"--{name}", "value": value, "unit": words, "source": source})
    return rows


def gin_bindings(config: TrainConfig) -> dict[str, Any]:
    """What decides the layout of a run, as it is written in gin."""
    return {
        "MESH": None if config.mesh is None else {k: n for k, n in config.mesh.items() if n > 1},
        "NUM_MICROBATCHES": config.loss.num_microbatches,
        "T5Config.remat_policy": config.model.remat_policy,
    }


def gin_flags(config: TrainConfig) -> str:
    """The same for a command line."""
    flags = [f"--gin.{name}={value!r}" for name, value in gin_bindings(config).items()]
    return " ".join(f'"{flag}"' if any(c in flag for c in " '{") else flag for flag in flags)


# ---- tables --------------------------------------------------------------------------------------


def print_plan(plan: Plan, config: TrainConfig, target: Target, chip: Chip, rates: Rates) -> None:
    """Writes everything that is known of one program to stdout."""
    console = _console()
    program = plan.program
    _print(console, "program", [], _program_rows(plan, config, target))
    _print(console, _memory_title(target), ["", ""], memory_rows(program.memory))
    console.print(f"{plan.fit.sentence}\n")
    for warning in program.warnings:
        console.print(f"warning: {textwrap.shorten(warning, 200, placeholder=' ...')}")
    if program.warnings:
        console.print()
    flops = program.flops
    work = [
        ("FLOPs of the model", f"{flops.model:.4g}", f"{flops.model / target.num_chips:.4g}"),
        (
            "FLOPs of the program, with recomputation",
            f"{flops.program:.4g}",
            f"{flops.program / target.num_chips:.4g}",
        ),
    ]
    if not target.is_gpu:  # XLA:CPU's says nothing of a GPU's
        accessed = decimal_bytes(program.bytes_accessed * target.devices_per_chip)
        work.append(("from and to memory", "", accessed))
    _print(console, "work of a step", ["", "all chips", "a chip"], work)
    head = ["", "along", "group", "in the program", "executed", "put in", "sent", "over"]
    _print(console, "collectives of a step, a device", head, collective_rows(program.collectives))
    _print(console, "least time of a step", ["", ""], _bound_rows(plan.bound, target))
    columns = ["", "at the bound", f"at {rates.efficiency:.0%} of its speed"]
    steps = f"the run of {config.train_steps:,} steps"
    _print(console, steps, columns, _cost_rows(plan.at_bound, plan.estimate))
    print_assumptions(chip, rates)


def print_refused(memory: Memory, fit: Fit, config: TrainConfig, target: Target) -> None:
    """Writes what is known of a step that the compiler refused for want of memory."""
    console = _console()
    config = dataclasses.replace(config, mesh=config.mesh or {"data": target.num_devices})
    _print(console, "program", [], [_target_row(target), *_layout_rows(config, target)])
    _print(console, _memory_title(target), ["", ""], memory_rows(memory))
    console.print(f"{fit.sentence}\n")


def print_assumptions(chip: Chip, rates: Rates) -> None:
    """Writes what was assumed to stdout."""
    rows = [
        ("?" if a["value"] is None else f"{a['value']:,.6g}", a["unit"], a["flag"], a["source"])
        for a in assumptions(chip, rates)
    ]
    _print(_console(), f"assumed of {chip.kind}", ["", "", "flag", "source"], rows, left=True)


def print_search(found: Found) -> None:
    """Writes the ranking of a search to stdout."""
    console = _console()
    rows = [_tried_row(rank, t) for rank, t in enumerate(found.tried, 1)]
    title = (
        f"search: {len(found.tried)} compiled of {found.num_candidates:,} layouts that divide, of "
        f"which {found.num_too_large:,} were expected not to fit"
    )
    head = ["", "MESH", "microbatches", "remat", "fits", "memory", "bound", "limited by", "links"]
    _print(console, title, head, rows)
    for mesh, reason in found.refused[:3]:
        console.print(f"refused: {mesh_words(mesh)}: {reason}")
    if len(found.refused) > 3:
        console.print(f"refused: {len(found.refused) - 3} other meshes (--json has the reasons)")
    if found.refused:
        console.print()


def _tried_row(rank: int, tried: Tried) -> Row:
    c = tried.candidate
    layout = (str(rank), mesh_words(c.mesh), str(c.num_microbatches), c.remat_policy)
    if tried.fit is None:
        return (*layout, "refused", "", "", "", "")
    needed = binary_bytes(tried.fit.needed_bytes)
    if tried.plan is None:
        return (*layout, "no", needed, "", "", "")
    bound = tried.plan.bound
    return (
        *layout,
        "yes" if tried.fits else "no",
        needed,
        duration(bound.seconds),
        bound.limited_by,
        duration(bound.links + bound.dcn),
    )


def _program_rows(plan: Plan, config: TrainConfig, target: Target) -> list[Row]:
    program = plan.program
    config = dataclasses.replace(config, mesh=program.mesh)
    return [
        _target_row(target),
        ("compiled by", program.compiled_by),
        *_layout_rows(config, target),
        *_float32_rows(config, target),
        ("lowered in", f"{program.lower_seconds:.1f} s"),
        ("compiled in", f"{program.compile_seconds:.1f} s"),
        ("memory of this machine", binary_bytes(program.host_bytes)),
    ]


def chip_words(target: Target) -> str:
    """How many it has: "16 chips"."""
    return f"{target.num_chips} {'chip' if target.num_chips == 1 else 'chips'}"


def _target_row(target: Target) -> Row:
    return ("target", f"{target.name}: {chip_words(target)}")


def _memory_title(target: Target) -> str:
    return f"memory of a {'chip' if target.devices_per_chip == 1 else 'device, half a chip'}"


def _layout_rows(config: TrainConfig, target: Target) -> list[Row]:
    data = config.data
    lengths = ", ".join(f"{k} {v}" for k, v in data.task_feature_lengths.items())
    return [
        ("mesh", mesh_words(config.mesh or {})),
        *_slice_rows(config, target),
        ("batch", f"{data.batch_size} rows ({lengths})"),
        ("microbatches", str(config.loss.num_microbatches)),
        ("remat policy", config.model.remat_policy),
        ("computed in", config.model.dtype),
    ]


def _slice_rows(config: TrainConfig, target: Target) -> list[Row]:
    """What lies across the slices (GPUs: hosts), if there are several."""
    if target.num_slices == 1:
        return []
    across = config.dcn_mesh
    if across is None:  # as `partitioning.make_partitioning` lays it out
        data = math.gcd((config.mesh or {}).get("data", 1), target.num_slices)
        across = {"data": data, "fsdp": target.num_slices // data}
    return [(f"across {'hosts' if target.is_gpu else 'slices'}", mesh_words(across))]


def _float32_rows(config: TrainConfig, target: Target) -> list[Row]:
    """What bfloat16's peak means for a run in float32, at the precision that JAX takes by default.

    As `jax.lax.Precision` has it: TensorFloat-32 on GPUs, at half the rate of bfloat16.
    """
    if config.model.dtype != "float32":
        return []
    flag = "--gin.DTYPE=\"'bfloat16'\""
    words = (
        f"operations take at least twice as long as this; {flag}"
        if target.is_gpu
        else f"TPUs round what they multiply to it; activations are half the size with {flag}"
    )
    return [("", f"the peak is bfloat16's: {words}")]


def mesh_words(mesh: Mapping[str, int]) -> str:
    """A mesh as "data 2 x fsdp 8"; axes of one device are left out."""
    return " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"


def memory_rows(memory: Memory) -> list[Row]:
    """Each part and the whole."""
    parts = (
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("batch", memory.batch),
        ("padding, less what is not read", memory.padding),
        ("activations, gradients, workspace", memory.temporaries),
        ("program", memory.program),
        ("peak", memory.peak),
    )
    return [(name, binary_bytes(size)) for name, size in parts]


def collective_rows(collectives: Iterable[Collective]) -> list[Row]:
    """A line for each kind and group."""
    return [
        (
            c.kind,
            "+".join(c.mesh_axes),
            str(c.group_size),
            str(c.instructions),
            f"{c.count:,}",
            decimal_bytes(c.operand_bytes),
            decimal_bytes(c.link_bytes),
            "slices" if c.crosses_slices else "links",
        )
        for c in collectives
    ]


def _bound_rows(bound: Bound, target: Target) -> list[Row]:
    memory = "memory (state and batch alone)" if target.is_gpu else "memory"
    links = "links of a host" if target.is_gpu else "links of the slice"
    dcn = "network between hosts" if target.is_gpu else "network between slices"
    names = {"compute": "operations", "memory": memory, "links": links, "dcn": dcn}
    rows = [
        (words, duration(getattr(bound, name)))
        for name, words in names.items()
        if name != "dcn" or bound.dcn
    ]
    return [*rows, (f"bound: {names[bound.limited_by]}", duration(bound.seconds))]


def _cost_rows(*costs: RunCost) -> list[Row]:
    def row(words: str, field: str) -> Row:
        values = [getattr(cost, field) for cost in costs]
        return (words, *("?" if v is None else _three_significant(v) for v in values))

    return [
        ("a step", *(duration(cost.seconds_per_step) for cost in costs)),
        row("target tokens a second", "target_tokens_per_second"),
        row("input and target tokens a second", "tokens_per_second"),
        ("MFU", *(f"{cost.mfu:.1%}" for cost in costs)),
        row("hours", "hours"),
        row("chip-hours", "chip_hours"),
        row("dollars", "dollars"),
        row("kWh", "kwh"),
        row("kg of CO2e", "co2_kg"),
    ]


def _three_significant(value: float) -> str:
    """`three_digits`, and of less than 1 as many decimals as that takes: "0.000572"."""
    return three_digits(value) if abs(value) >= 1 else f"{value:#.3g}"


def _console() -> rich.console.Console:
    return rich.console.Console(
        width=None if sys.stdout.isatty() else 140, markup=False, highlight=False
    )


def _print(
    console: rich.console.Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Row],
    *,
    left: bool = False,
) -> None:
    rows = list(rows)
    if not rows:
        console.print(f"{title}: none\n")
        return
    table = rich.table.Table(
        title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(columns)
    )
    for i, name in enumerate(columns or ["", ""]):
        table.add_column(name, justify="left" if i == 0 or left or not columns else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
