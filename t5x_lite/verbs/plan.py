"""`plan`: a run compiled for hardware that is not there, and what it needs and costs there."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from t5x_lite.errors import UsageError
from t5x_lite.verbs.flags import add_gin_flags, given, parser_of, run_of

if TYPE_CHECKING:
    from t5x_lite.plan.chips import Chip
    from t5x_lite.plan.cost import Rates
    from t5x_lite.plan.search import Candidate, Found
    from t5x_lite.plan.targets import Target
    from t5x_lite.run_config import TrainConfig

EXAMPLE_FILES = (
    "--gin_file=gin_configs/models/t5_1_1/small.gin --gin_file=gin_configs/runs/pretrain.gin"
)
EXAMPLE = (
    f"{EXAMPLE_FILES} \\\n"
    "    --gin.TASK_FEATURE_LENGTHS=\"{'inputs': 512, 'targets': 114}\" "
    "--gin.TRAIN_STEPS=524288 \\\n"
    "    --gin.BATCH_SIZE=2048 --gin.DTYPE=\"'bfloat16'\" --target=v5e:4x4 --search"
)

# Programs that a search compiles, unless it is told how many.
MAX_COMPILES = 8

# Nothing is read and nothing written: a plan does without what says from and to where.
_NOT_NEEDED = (
    "TrainConfig.model_dir = 'plan'",
    "TrainConfig.initial_checkpoint_path = None",
    "DataConfig.mixture_or_task_name = 'plan'",
)


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code, 0 also for a run that does not fit."""
    parser = parser_of(
        "plan",
        "Compile a run's train step for TPUs or GPUs that are not there: memory, FLOPs, "
        "collectives,\na bound on the time of a step, and what the run costs.",
        f"plan {EXAMPLE}",
    )
    _add_flags(parser)
    if any(flag in argv for flag in ("-h", "--help")):
        parser.parse_args(argv)
    from t5x_lite import gin_utils
    from t5x_lite.plan import chips, cost, targets

    bindings, rest = gin_utils.split_gin_flags(argv)
    arguments = parser.parse_args(rest)
    _check_given(arguments)
    target = targets.parse_target(arguments.target)
    flags = {flag.name: name for name, flag in chips.FLAGS.items()}
    figures = {flags[flag]: value for flag, value in given(arguments, flags).items()}
    chip = chips.chip_of(target.kind, figures)
    names = [field.name for field in dataclasses.fields(cost.Rates)]
    rates = cost.Rates(**given(arguments, names))
    config, _ = run_of(arguments, [*bindings, *_NOT_NEEDED], EXAMPLE_FILES)
    if arguments.json:
        _check_writable(arguments.json)
    targets.prepare(target)
    if arguments.search:
        max_compiles = MAX_COMPILES if arguments.max_compiles is None else arguments.max_compiles
        values = _search(config, target, chip, rates, max_compiles)
    else:
        values = _plan(config, target, chip, rates)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(values, indent=1) + "\n")
    return 0


def _check_given(arguments: argparse.Namespace) -> None:
    """Raises UsageError on a flag that is missing, or that would do nothing."""
    if not arguments.target:
        raise UsageError(
            "--target is missing: a slice like v5e:4x4, 2xv5e:16x16, or GPUs like h100:8"
        )
    if arguments.max_compiles is not None and not arguments.search:
        raise UsageError(
            f"--max_compiles={arguments.max_compiles} has no effect on a single plan: add --search"
        )


def _check_writable(path: str) -> None:
    """Raises UsageError if --json cannot be written, before minutes of compiling."""
    file = pathlib.Path(path)
    existed = file.exists()
    try:
        file.open("a").close()
    except OSError as e:
        raise UsageError(f"--json={path}: cannot be written: {e.strerror}") from e
    if not existed:
        file.unlink()


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_gin_flags(parser)
    parser.add_argument(
        "--target", help="v5e:16x16, 2xv5p:8x8x8 (two slices), v4:4x4x4, v6e:4x4, h100:64, ..."
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="look for the mesh, microbatches and remat policy that fit and are fastest, in place "
        "of those given",
    )
    parser.add_argument(
        "--max_compiles", type=int, metavar="N", help=f"of --search (default: {MAX_COMPILES})"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    figures = parser.add_argument_group("figures in place of the published or assumed ones")
    for name, words in (
        ("peak_tflops", "of a chip, in bfloat16"),
        ("hbm_gib", "memory of a chip"),
        ("reserved_gib", "of it, what a program cannot have"),
        ("hbm_gb_per_s", "from and to memory"),
        ("link_gb_per_s", "over one link to a neighbour, one way (GPUs: all NVLinks)"),
        ("dcn_gb_per_s", "of a chip to other slices (GPUs: other hosts), one way"),
        ("watts_per_chip", "on average, with the chip's share of its host"),
        ("price_per_chip_hour", "dollars"),
        ("efficiency", "of the bound's speed, what the estimate supposes"),
        ("pue", "of the data center"),
        ("co2_kg_per_kwh", "of the grid"),
    ):
        figures.add_argument(f"--{name}", type=float, metavar="N", help=words)


def _plan(config: "TrainConfig", target: "Target", chip: "Chip", rates: "Rates") -> dict[str, Any]:
    """Compiles the run as it is, and prints and returns what follows."""
    from t5x_lite.plan import cost, program, show

    target.partitioning_of(config)  # what is wrong with the mesh is said before that it compiles
    print(
        f"compiling for {show.chip_words(target)} of {target.kind}: about a minute for small "
        "models, several for xxl",
        file=sys.stderr,
        flush=True,
    )
    try:
        compiled = program.compile_step(config, target)
    except program.DoesNotFit as e:
        fit = cost.fit(e.memory, config, target, chip, refused=e)
        show.print_refused(e.memory, fit, config, target)
        what = {"fits": False, "fit": dataclasses.asdict(fit), "program": None}
        what |= {"memory": dataclasses.asdict(e.memory), "compiler": str(e)}
    else:
        plan = cost.make_plan(compiled, config, target, chip, rates)
        show.print_plan(plan, config, target, chip, rates)
        what = plan.to_dict()
    return {
        "target": target.name,
        "gin": show.gin_bindings(config),
        **what,
        "assumptions": show.assumptions(chip, rates),
    }


def _search(
    config: "TrainConfig", target: "Target", chip: "Chip", rates: "Rates", max_compiles: int
) -> dict[str, Any]:
    """Compiles several layouts of the run; prints the ranking and the best one's plan."""
    from t5x_lite.plan import cost, program, search, show

    if max_compiles < 1:
        raise UsageError(f"--max_compiles={max_compiles}: must be at least 1")

    def plan(candidate: "TrainConfig") -> cost.Plan:
        compiled = program.compile_step(candidate, target)
        return cost.make_plan(compiled, candidate, target, chip, rates)

    def report(candidate: "Candidate") -> None:
        layout = show.gin_flags(candidate.apply(config))
        print(f"compiling {layout}", file=sys.stderr, flush=True)

    print(
        f"--search lays the run out anew, in place of {show.gin_flags(config)}",
        file=sys.stderr,
        flush=True,
    )
    found: Found = search.search(config, target, chip, plan, max_compiles, report)
    show.print_search(found)
    best = found.tried[0]
    if best.fit is None:
        raise UsageError(best.refusal)
    chosen = best.candidate.apply(config)
    what: dict[str, Any] = {"fits": False, "fit": dataclasses.asdict(best.fit), "program": None}
    if best.plan is not None:
        show.print_plan(best.plan, chosen, target, chip, rates)
        what = best.plan.to_dict()
    if best.fits:
        print(f"the best that fits: {show.gin_flags(chosen)}")
    else:
        print(f"none that was compiled fits; the smallest {best.fit.sentence}")
    return {
        "target": target.name,
        "gin": show.gin_bindings(chosen),
        **what,
        "assumptions": show.assumptions(chip, rates),
        "search": found.to_dict(),
    }
