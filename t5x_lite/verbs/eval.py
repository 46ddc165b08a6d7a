"""`eval`: checkpoints of a run, measured."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from t5x_lite import setup
from t5x_lite.errors import UsageError
from t5x_lite.verbs.flags import (
    add_decode_flags,
    add_process_flags,
    decode_config,
    given,
    keep_compiled_programs,
    parser_of,
    process_options,
    shared_flags,
)

if TYPE_CHECKING:
    from t5x_lite.run_config import TrainConfig


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    parser = parser_of(
        "eval",
        "Measure checkpoints of a run on a task or mixture, by loss and by the tasks' metrics.",
        "eval runs/sst2 --checkpoint=all --mode=rank",
    )
    parser.add_argument("model_dir", help="what the run had as MODEL_DIR; not while it trains")
    parser.add_argument("--task", help="a task or mixture; the run's own by default")
    parser.add_argument("--split", help="the one that the run evaluates on by default")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        help="latest, best, all, or steps like 1000,2000 (default: %(default)s)",
    )
    parser.add_argument(
        "--mode",
        choices=["generate", "rank"],
        help="generate: what the model writes; rank: the likeliest of the task's classes",
    )
    parser.add_argument("--num_examples", type=int, help="the first N of each task; all by default")
    parser.add_argument("--batch_size", type=int, help="rows decoded at a time")
    add_decode_flags(parser)
    parser.add_argument(
        "--module",
        dest="mixture_or_task_module",
        metavar="MODULE",
        help="a module on PYTHONPATH to import first, instead of the run's",
    )
    parser.add_argument("--tfds_data_dir", help="where TFDS finds prepared data sets")
    parser.add_argument(
        "--task_feature_lengths",
        metavar="FEATURE=N,...",
        help="of a converted checkpoint: tokens of each feature; those of model.json by default",
    )
    add_process_flags(parser)
    arguments = parser.parse_args(argv)
    processes = process_options(arguments)
    with setup.without_native_notes():
        from t5x_lite import distributed, evaluate_run
    from t5x_lite.run_config import flatten

    config = _run_config(arguments)
    evaluation = dataclasses.replace(
        config.evaluation,
        **given(arguments, ("mode", "num_examples", "batch_size")),
        decode=decode_config(arguments, config.evaluation.decode),
    )
    trained_with = config.evaluation
    config = dataclasses.replace(
        config,
        model_dir=arguments.model_dir,
        data=dataclasses.replace(
            config.data, **given(arguments, ("mixture_or_task_module", "tfds_data_dir"))
        ),
        evaluation=evaluation,
    )
    keep_compiled_programs()
    with distributed.joined(processes, shared_flags(arguments) | flatten(config)):
        evaluate_run.evaluate_run(
            config,
            task=arguments.task,
            split=arguments.split,
            checkpoint=arguments.checkpoint,
            trained_with=trained_with,
        )
    return 0


def _run_config(arguments: argparse.Namespace) -> "TrainConfig":
    """The run as it was trained; of a converted checkpoint, which was not, what is known."""
    from etils import epath

    from t5x_lite import gin_utils, saved_run
    from t5x_lite.optimizers import OptimizerConfig
    from t5x_lite.run_config import DataConfig, TrainConfig, parse_feature_lengths
    from t5x_lite.step import LossConfig

    lengths, model_dir = arguments.task_feature_lengths, arguments.model_dir
    saved = epath.Path(model_dir) / "config.gin"
    if saved.is_file():
        if lengths is not None:
            raise UsageError(f"--task_feature_lengths={lengths}: a run is evaluated with its own")
        return gin_utils.read_saved(saved)
    run = saved_run.read(model_dir)
    if arguments.task is None:
        raise UsageError(
            f"MODEL_DIR {model_dir!r} was converted and has no task of its own: give --task "
            "(`python -m t5x_lite tasks list` shows them)"
        )
    feature_lengths = parse_feature_lengths(lengths) if lengths else run.feature_lengths
    data = DataConfig("", feature_lengths, arguments.batch_size or 32, pack=False)
    return TrainConfig(
        model_dir, run.model, OptimizerConfig(), LossConfig(), data, 1, eval_steps=None
    )
