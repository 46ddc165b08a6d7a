"""The tables of docs/plan.md: T5 1.1 of all sizes compiled for whole TPU slices.

    python benchmarks/plan_table.py [--only=xxl] [--again]

compiles each case in a process of its own and keeps what came out in benchmarks/plan_table.json, so
that an interrupted run goes on where it was; then it writes the tables into docs/plan.md. Needs
`pip install 't5x-lite[plan]'`. All cases together take hours on two cores, xxl minutes for each.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from t5x_lite.plan.units import binary_bytes, decimal_bytes, duration, three_digits

REPO = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "plan_table.json"
DOCS = REPO / "docs" / "plan.md"
TIMEOUT_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
      table: where it is shown.
      size: of T5 1.1.
      target: what it is compiled for.
      batch_size: rows of (512, 114).
      layout: gin bindings of mesh, microbatches and remat policy; empty: what the search finds
        best without compiling anything, or, if that does not fit, of four that it compiles.
    """

    table: str
    size: str
    target: str
    batch_size: int
    layout: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in RESULTS."""
        return " ".join([self.size, self.target, str(self.batch_size), *self.layout])

    def command(self, json_file: str, max_compiles: int) -> list[str]:
        """What a process runs."""
        bindings = (
            "TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 114}",
            "TRAIN_STEPS=524288",
            f"BATCH_SIZE={self.batch_size}",
            "DTYPE='bfloat16'",
            *self.layout,
        )
        return [
            *(sys.executable, "-m", "t5x_lite", "plan"),
            f"--gin_file=gin_configs/models/t5_1_1/{self.size}.gin",
            "--gin_file=gin_configs/runs/pretrain.gin",
            *(f"--gin.{binding}" for binding in bindings),
            f"--target={self.target}",
            f"--json={json_file}",
            *(() if self.layout else ("--search", f"--max_compiles={max_compiles}")),
        ]


SIZES = ("small", "base", "large", "xl", "xxl")
WEAK_SCALING = {"v5p:2x2x4": 16, "v5p:4x4x4": 64, "v5p:8x8x8": 512, "v5p:16x16x16": 4096}
CASES = [
    *(
        Case("sizes", size, target, 2048)
        for target in ("v5e:16x16", "v5p:8x8x8", "v4:4x4x4")
        for size in SIZES
    ),
    Case("sizes", "xl", "v5e:4x4", 2048),
    Case("pod", "xxl", "v5p:16x16x16", 16384),
    *(
        Case(
            "weak scaling",
            "base",
            target,
            8 * chips,
            (
                f"MESH={{'data': {chips // 16}, 'fsdp': 16}}",
                "NUM_MICROBATCHES=1",
                "T5Config.remat_policy='full'",
            ),
        )
        for target, chips in WEAK_SCALING.items()
    ),
]


def compile_case(case: Case, max_compiles: int = 1) -> dict[str, Any]:
    """The plan as `plan --json` writes it, or {"error": why there is none}."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        try:
            process = subprocess.run(
                case.command(file.name, max_compiles),
                cwd=REPO,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"longer than {TIMEOUT_SECONDS} s"}
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            return {"error": lines[-1]}
        plan = json.loads(pathlib.Path(file.name).read_text())
    if not plan["fits"] and not case.layout and max_compiles == 1:
        return compile_case(case, max_compiles=4)
    return {name: plan.get(name) for name in ("gin", "fits", "fit", "program", "bound", "at_bound")}


# ---- tables --------------------------------------------------------------------------------------

Results = dict[str, dict[str, Any]]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layout_words(gin: dict[str, Any]) -> str:
    """Mesh, microbatches and remat policy in one cell."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in gin["MESH"].items())
    return f"{mesh}; {gin['NUM_MICROBATCHES']}; {gin['T5Config.remat_policy']}"


def sent(program: dict[str, Any]) -> int:
    """Bytes that a chip sends in a step."""
    return sum(c["link_bytes"] for c in program["collectives"])


def program_row(case: Case, plan: dict[str, Any]) -> list[str]:
    """A program in a line."""
    program, fit = plan.get("program"), plan.get("fit")
    if program is None:
        why = plan.get("error") or fit["sentence"]
        return [case.size, case.target, why, *[""] * 11]
    memory, bound = program["memory"], plan["bound"]
    return [
        case.size,
        case.target,
        layout_words(plan["gin"]),
        binary_bytes(memory["parameters"]),
        binary_bytes(memory["optimizer"]),
        binary_bytes(memory["temporaries"]),
        f"{binary_bytes(memory['peak'])} of {binary_bytes(fit['usable_bytes'])}",
        f"{program['flops']['per_device'] / 1e12:,.1f}",
        decimal_bytes(program["bytes_accessed"]),
        decimal_bytes(sent(program)),
        duration(bound["seconds"]),
        bound["limited_by"],
        f"{plan['at_bound']['mfu']:.0%}",
        (
            f"{program['lower_seconds'] + program['compile_seconds']:,.0f} s, "
            f"{binary_bytes(program['host_bytes'])}"
        ),
    ]


PROGRAM_HEAD = [
    "model",
    "target",
    "mesh; microbatches; remat",
    "parameters",
    "optimizer",
    "temporaries",
    "peak of a chip",
    "TFLOP a chip",
    "memory traffic",
    "sent",
    "bound",
    "by",
    "MFU at it",
    "to compile",
]


def programs_table(table: str) -> Callable[[Results], str]:
    """A line for each program of a table."""

    def make(results: Results) -> str:
        cases = [case for case in CASES if case.table == table and case.key in results]
        return markdown(PROGRAM_HEAD, [program_row(case, results[case.key]) for case in cases])

    return make


def weak_scaling_table(results: Results) -> str:
    """Bytes of each kind of collective for a chip and a layer."""
    cases = [
        c for c in CASES if c.table == "weak scaling" and results.get(c.key, {}).get("program")
    ]
    num_layers = 24  # base: 12 and 12
    kinds = sorted(
        {c["kind"] for case in cases for c in results[case.key]["program"]["collectives"]}
    )
    rows = []
    for case in cases:
        collectives = results[case.key]["program"]["collectives"]
        cells = []
        for kind in kinds:
            total = sum(c["link_bytes"] for c in collectives if c["kind"] == kind)
            cells.append(three_digits(total / num_layers / 1e6))
        whole = sum(c["link_bytes"] for c in collectives) / num_layers / 1e6
        rows.append(
            [
                str(WEAK_SCALING[case.target]),
                case.target,
                str(case.batch_size),
                *cells,
                three_digits(whole),
            ]
        )
    return markdown(["chips", "target", "batch", *kinds, "MB a layer in all"], rows)


TABLES = {
    "sizes": programs_table("sizes"),
    "pod": programs_table("pod"),
    "weak scaling": weak_scaling_table,
}


def write_tables(results: Results) -> None:
    """Puts the tables between their markers in DOCS."""
    text = DOCS.read_text()
    for name, make in TABLES.items():
        marked = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        table = make(results)
        text, count = re.subn(
            marked, lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{DOCS} has {count} places for the table {name!r}")
    DOCS.write_text(text)


def main() -> None:
    """Compiles what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name matches this expression")
    parser.add_argument("--again", action="store_true", help="also those that are there already")
    arguments = parser.parse_args()
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in CASES:
        known = case.key in results and "error" not in results[case.key]
        if not re.search(arguments.only, case.key) or (known and not arguments.again):
            continue
        print(f"{case.key} ...", flush=True)
        results[case.key] = compile_case(case)
        print("  " + " | ".join(program_row(case, results[case.key])), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results)


if __name__ == "__main__":
    main()
