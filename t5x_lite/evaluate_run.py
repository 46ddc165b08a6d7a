"""The `eval` verb: checkpoints of a run, measured on a task or mixture."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table

from t5x_lite import data, evaluate, saved_run, setup, task_evaluation
from t5x_lite.distributed import from_process_0, is_coordinator
from t5x_lite.errors import UsageError, nearest
from t5x_lite.metrics import MetricWriter
from t5x_lite.partitioning import InputShare, Partitioning, make_partitioning
from t5x_lite.run_config import EvalConfig, TrainConfig, eval_name
from t5x_lite.task_evaluation import EvalTask

# Series -> step -> metrics.
Results = dict[str, dict[int, dict[str, float]]]


class _Opened(NamedTuple):
    """What the checkpoints are measured on.

    Attributes:
      loss_series: the name of the losses' metrics.
      batches: this host's rows, for the loss.
      text_ids_V: bool, the ids that are text.
      eval_tasks: the members with metrics.
    """

    loss_series: str
    batches: data.EvalBatches
    text_ids_V: np.ndarray
    eval_tasks: list[EvalTask]


def evaluate_run(
    config: TrainConfig,
    *,
    task: str | None = None,
    split: str | None = None,
    checkpoint: str = "latest",
    trained_with: EvalConfig | None = None,
) -> Results:
    """Measures checkpoints, writes metrics and predictions into MODEL_DIR and prints a table.

    The loss is that of training: over EVAL_STEPS batches, in the series of the split, with the
    task's name if it is not the run's own. Metrics are those of each task that has some, in
    `metrics/<task>.jsonl`, or `metrics/<task>_<split>.jsonl` for another split than the run's, and
    with what `evaluation` differs in from the training's after that: best.json and patience go by
    the training's own figures. A step that was evaluated before gets its line replaced.

    Args:
      config: the run as it was trained, with `evaluation` as it is wanted now.
      task: a task or mixture; the run's own by default.
      split: the run's own by default.
      checkpoint: "latest", "best", "all" or steps like "1000,2000".
      trained_with: how the training evaluates; None is the same.

    Returns:
      The metrics of each series and step.

    Raises:
      UsageError: there is no run, no such step, task or split, its data is missing, its vocabulary
        is not the run's, or it cannot be evaluated in this mode.
      CheckpointError: a step is damaged.
    """
    run = saved_run.read(config.model_dir)
    steps = from_process_0(lambda: saved_run.checkpoint_steps(run, checkpoint))
    evaluation = config.evaluation
    evaluation.decode.check(config.model.vocab_size)
    config, partitioning = _fit_devices(config)
    shards = partitioning.num_batch_shards
    padded_size = -(-config.data.batch_size // shards) * shards
    opened = _open(config, run, task, split, padded_size, partitioning.input_share())
    for eval_task in opened.eval_tasks:
        eval_task.series += _suffix(evaluation, trained_with or evaluation)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=padded_size)
    )
    programs = setup.make_programs(config, partitioning, compile_train_step=False)
    predictor = setup.make_predictor(config, partitioning)
    # Metrics are computed on every process, and written by one.
    writes = is_coordinator()
    writer = MetricWriter(config.model_dir, enabled=writes)
    results: Results = {}
    with _Bar(enabled=writes) as bar:
        for step in steps:
            params = saved_run.load_params(run, step, partitioning)
            with bar.part(f"step {step}  loss", None):
                losses = evaluate.evaluate_loss(
                    programs.eval_step, params, opened.batches, opened.text_ids_V, partitioning
                )
            results.setdefault(opened.loss_series, {})[step] = losses
            for eval_task in opened.eval_tasks:
                total = len(eval_task.examples)
                with bar.part(f"step {step}  {eval_task.series}", total) as on_progress:
                    result = task_evaluation.evaluate(
                        eval_task,
                        predictor,
                        params,
                        evaluation.mode,
                        evaluation.decode,
                        on_progress=on_progress,
                    )
                results.setdefault(eval_task.series, {})[step] = result.metrics
                if writes:
                    task_evaluation.write(config.model_dir, writer, eval_task, step, result)
            writer.write(opened.loss_series, step, losses)  # last, as in training
            writer.flush()
    if writes:
        _print_tables(results)
    return results


def _suffix(evaluation: EvalConfig, trained_with: EvalConfig) -> str:
    """What tells these figures from those of the training, which it goes by: "_rank"."""
    parts = []
    if evaluation.mode != trained_with.mode:
        parts.append(evaluation.mode)
    if evaluation.mode == "generate" and evaluation.decode != trained_with.decode:
        parts.append(evaluation.decode.method)
    if evaluation.num_examples != trained_with.num_examples:
        parts.append(f"first_{evaluation.num_examples}")
    return "".join(f"_{part}" for part in parts)


def _open(
    config: TrainConfig,
    run: saved_run.SavedRun,
    task: str | None,
    split: str | None,
    padded_size: int,
    share: InputShare,
) -> _Opened:
    """Opens the data; raises UsageError for whatever is wrong with it."""
    own = config.data.mixture_or_task_name
    run_data = dataclasses.replace(
        config.data,
        mixture_or_task_name=own if task is None else task,
        vocabulary_file=saved_run.vocabulary_file(run),
    )
    data.configure(run_data)
    provider = data.get_provider(run_data.mixture_or_task_name)
    split = run_data.eval_split if split is None else split
    if provider.splits and split not in provider.splits:
        raise UsageError(
            f"--split={split}: {provider.name} has no such split; {nearest(split, provider.splits)}"
        )
    at_split = dataclasses.replace(run_data, split=split, eval_split=split)
    saved_run.check_same_vocabulary(run, provider)
    data.check(at_split, config.model.vocab_size)
    batches = data.EvalBatches(
        at_split,
        provider,
        config.eval_steps,
        share,
        padded_size,
    )
    if next(iter(batches), None) is None:
        raise UsageError(f"{provider.name}: the split {split!r} gives no example to evaluate on")
    evaluation = config.evaluation
    loss_series = eval_name(dataclasses.replace(config, data=at_split))
    return _Opened(
        loss_series if provider.name == own else f"{loss_series}_{provider.name}",
        batches,
        data.text_ids(provider, config.model.vocab_size),
        task_evaluation.open_tasks(
            run_data, provider, split, evaluation.num_examples, evaluation.mode
        ),
    )


def _fit_devices(config: TrainConfig) -> tuple[TrainConfig, Partitioning]:
    """The run on the devices that there are, its batches in one piece.

    Its own mesh where the devices are as many. Else parameters that were split stay so, over what
    divides them: they may not fit on one device.
    """
    count, mesh = len(jax.devices()), config.mesh
    fits = mesh is not None and math.prod(mesh.values()) == count
    if mesh is not None and not fits:
        model = math.gcd(count, mesh.get("model", 1))
        fsdp = math.gcd(count // model, config.model.d_model) if mesh.get("fsdp", 1) > 1 else 1
        mesh = {"data": count // model // fsdp, "fsdp": fsdp, "model": model}
    partitioning = make_partitioning(
        mesh, over_slices=config.dcn_mesh if fits else None, rules=config.sharding_rules
    )
    one_piece = dataclasses.replace(config.loss, num_microbatches=1)
    return dataclasses.replace(config, loss=one_piece), partitioning


# ---- what a person sees --------------------------------------------------------------------------


class _Bar:
    """A live line on a terminal for what is being measured; elsewhere nothing."""

    def __init__(self, *, enabled: bool):
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(),
            transient=True,
            disable=not enabled or not sys.stdout.isatty(),
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    @contextmanager
    def part(self, name: str, total: int | None) -> Iterator[Any]:
        """Shows one part; gives the function to call with the number of examples done."""
        bar = self._progress.add_task(name, total=total)
        yield lambda done: self._progress.update(bar, completed=done)
        self._progress.remove_task(bar)


def _print_tables(results: Results) -> None:
    """One table a series: a row a step, a column a metric."""
    console = rich.console.Console(
        width=None if sys.stdout.isatty() else 120, markup=False, highlight=False
    )
    for series, by_step in results.items():
        names = list(dict.fromkeys(name for values in by_step.values() for name in values))
        table = rich.table.Table(title=series, title_justify="left", box=None, pad_edge=False)
        for name in ("step", *names):
            table.add_column(name, justify="right")
        for step, values in by_step.items():
            cells = [_format(values.get(name, math.nan)) for name in names]
            table.add_row(str(step), *cells)
        console.print(table)
        console.print()


def _format(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4f}"
