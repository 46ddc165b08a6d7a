"""The command line, `python -m t5x_lite VERB`: parses, hands over, and turns errors into lines."""

import argparse
import dataclasses
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from t5x_lite.errors import Failure, UsageError, nearest

if TYPE_CHECKING:
    from t5x_lite.decoding import DecodeConfig
    from t5x_lite.run_config import DataConfig

USAGE_ERROR, KEYBOARD_INTERRUPT = 2, 130

_TINY = "gin_configs/models/t5_1_1/tiny.gin"
_RUN = "gin_configs/runs/python_docs.gin"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    # TensorFlow's start-up notes on stderr are about itself.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(format="%(message)s")  # before a library makes its own of it
    try:
        arguments = sys.argv[1:] if argv is None else list(argv)
        return _dispatch(arguments)
    except UsageError as e:
        _print_error(e)
        return USAGE_ERROR
    except Failure as e:
        _print_error(e)
        return e.exit_code
    except KeyboardInterrupt:
        print("t5x_lite: stopped", file=sys.stderr)
        return KEYBOARD_INTERRUPT


def _print_error(error: Exception) -> None:
    print(f"t5x_lite: {' '.join(str(error).splitlines())}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    from_verb: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "infer": _infer,
        "tasks": _tasks,
        "vocab": _vocab,
        "report": _report,
    }
    parser = _parser(
        "", "Text-to-text training in JAX and Flax.", f"train --gin_file={_TINY} --gin_file={_RUN}"
    )
    known = ", ".join(from_verb)
    parser.add_argument("verb", help=f"one of {known}; VERB --help tells more")
    verb = parser.parse_args(argv[:1]).verb
    if verb not in from_verb:
        raise UsageError(f"unknown verb {verb!r}; {nearest(verb, from_verb)}")
    return from_verb[verb](argv[1:])


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error does."""

    def error(self, message: str) -> NoReturn:
        flags = sorted(set(re.findall(r"--[\w.]+", self.format_help())))
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        if unknown:
            flag = unknown[1].partition("=")[0]
            message = f"unknown argument {flag!r}; {nearest(flag, flags)}"
        raise UsageError(f"{message} (python -m {self.prog} --help tells more)")


def _parser(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    return _Parser(
        prog=f"t5x_lite {verb}".rstrip(),
        description=description,
        epilog=f"example:\n  python -m t5x_lite {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# ---- train ---------------------------------------------------------------------------------------


def _train(argv: list[str]) -> int:
    parser = _parser(
        "train",
        "Pre-train or fine-tune. The same command resumes a run that was interrupted.",
        f"train --gin_file={_TINY} --gin_file={_RUN}",
    )
    parser.add_argument(
        "--gin_file", action="append", default=[], help="repeatable; a later file wins"
    )
    parser.add_argument(
        "--gin.NAME",
        dest="unused",
        metavar="VALUE",
        help="--gin.NAME=VALUE binds a macro or parameter; repeatable, wins over files",
    )
    parser.add_argument("--gin_search_paths", default="", help="comma-separated directories")
    parser.add_argument("--tfds_data_dir", help="where TFDS finds prepared data sets")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="resolve everything, build one batch, print parameters and shardings; train nothing",
    )
    if any(flag in argv for flag in ("-h", "--help")):
        parser.parse_args(argv)
    from etils import epath

    from t5x_lite import gin_utils, train
    from t5x_lite.run_config import check_same_run

    bindings, rest = gin_utils.split_gin_flags(argv)
    arguments = parser.parse_args(rest)
    if not arguments.gin_file:
        raise UsageError(f"give --gin_file, for example --gin_file={_TINY} --gin_file={_RUN}")
    if arguments.tfds_data_dir:
        bindings.append(f"DataConfig.tfds_data_dir = {arguments.tfds_data_dir!r}")
    paths = [path for path in arguments.gin_search_paths.split(",") if path]
    config, text = gin_utils.load_train_config(arguments.gin_file, bindings, paths)

    saved = epath.Path(config.model_dir) / "config.gin"
    if saved.exists():
        check_same_run(gin_utils.read_saved(saved), config)
    _keep_compiled_programs()
    if arguments.dry_run:
        train.dry_run(config)
    else:
        train.train(config, text)
    return 0


def _keep_compiled_programs() -> None:
    """Compiled programs are kept between processes, unless JAX was told where to."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = os.environ.get("T5X_LITE_CACHE", "~/.cache/t5x_lite")
        jax.config.update("jax_compilation_cache_dir", f"{pathlib.Path(root).expanduser()}/xla")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# ---- eval ----------------------------------------------------------------------------------------


def _eval(argv: list[str]) -> int:
    parser = _parser(
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
    _add_decode_flags(parser)
    parser.add_argument(
        "--module",
        dest="mixture_or_task_module",
        metavar="MODULE",
        help="a module on PYTHONPATH to import first, instead of the run's",
    )
    parser.add_argument("--tfds_data_dir", help="where TFDS finds prepared data sets")
    arguments = parser.parse_args(argv)
    from etils import epath

    from t5x_lite import gin_utils, setup

    saved = epath.Path(arguments.model_dir) / "config.gin"
    if not saved.is_file():
        raise UsageError(f"MODEL_DIR {arguments.model_dir!r} is not a run: it has no config.gin")
    config = gin_utils.read_saved(saved)
    evaluation = dataclasses.replace(
        config.evaluation,
        **_given(arguments, ("mode", "num_examples", "batch_size")),
        decode=_decode_config(arguments, config.evaluation.decode),
    )
    trained_with = config.evaluation
    config = dataclasses.replace(
        config,
        model_dir=arguments.model_dir,
        data=dataclasses.replace(
            config.data, **_given(arguments, ("mixture_or_task_module", "tfds_data_dir"))
        ),
        evaluation=evaluation,
    )
    _keep_compiled_programs()
    with setup.without_native_notes():
        from t5x_lite import evaluate_run
    evaluate_run.evaluate_run(
        config,
        task=arguments.task,
        split=arguments.split,
        checkpoint=arguments.checkpoint,
        trained_with=trained_with,
    )
    return 0


# Which method a flag of decoding belongs to; --method itself belongs to all.
_DECODE_FLAGS = {
    "num_beams": "beam",
    "length_penalty": "beam",
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
}


def _add_decode_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", help="of decoding: greedy, beam or sample")
    parser.add_argument("--num_beams", type=int, help="of --method=beam")
    parser.add_argument("--length_penalty", type=float, help="of --method=beam: alpha, 0 for none")
    parser.add_argument("--temperature", type=float, help="of --method=sample")
    parser.add_argument("--top_k", type=int, help="of --method=sample: the K likeliest ids")
    parser.add_argument(
        "--top_p", type=float, help="of --method=sample: the ids that hold this probability"
    )


def _decode_config(arguments: argparse.Namespace, base: "DecodeConfig") -> "DecodeConfig":
    """`base` with the flags that were given.

    Raises:
      UsageError: a flag of another method than the one that is used.
    """
    decode = dataclasses.replace(base, **_given(arguments, ("method", *_DECODE_FLAGS)))
    for flag, method in _DECODE_FLAGS.items():
        if getattr(arguments, flag) is not None and decode.method != method:
            raise UsageError(
                f"--{flag} has no effect on {decode.method} decoding: add --method={method}"
            )
    return decode


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags that were given, by name."""
    return {name: v for name in names if (v := getattr(arguments, name)) is not None}


# ---- infer ---------------------------------------------------------------------------------------


def _infer(argv: list[str]) -> int:
    parser = _parser(
        "infer",
        "Feed lines of files, or a task's examples, to a run's model; write a JSON line for each. "
        "The same command goes on where it was interrupted.",
        "infer runs/sst2 --input=reviews.jsonl.gz --field=text --output=predictions.jsonl",
    )
    parser.add_argument("model_dir", help="what the run had as MODEL_DIR; nothing else is needed")
    parser.add_argument("--output", required=True, help="the JSONL file to write")
    parser.add_argument("--input", help="a file or a glob: text, TSV or JSONL, or gzip of these")
    parser.add_argument(
        "--format", dest="file_format", help="text, tsv or jsonl; by the suffix if not given"
    )
    parser.add_argument(
        "--field",
        help="with the text: of a JSON line, or a TSV header; a number counts columns from 0",
    )
    parser.add_argument("--prefix", help="put before each text, like 'summarize: '")
    parser.add_argument("--task", help="a task or mixture to take examples from, without --input")
    parser.add_argument("--split", help="of --task (default: validation)")
    parser.add_argument("--module", help="a module on PYTHONPATH to import first, for --task")
    parser.add_argument("--tfds_data_dir", help="where TFDS finds prepared data sets")
    parser.add_argument("--checkpoint", help="latest, best or a step (default: latest)")
    parser.add_argument("--batch_size", type=int, help="rows decoded at a time (default: 32)")
    parser.add_argument(
        "--input_length", type=int, help="tokens; longer inputs are cut. By default the run's"
    )
    parser.add_argument("--target_length", type=int, help="tokens at most; by default the run's")
    _add_decode_flags(parser)
    parser.add_argument("--num_outputs", type=int, help="of --method=beam or sample, best first")
    parser.add_argument("--seed", type=int, help="of --method=sample")
    parser.add_argument(
        "--score",
        metavar="FIELD",
        help="give the log likelihood of this field's text instead of generating",
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="the I-th of N parts, from 0; its number goes into the name"
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="like data=4,model=2; all along data by default"
    )
    arguments = parser.parse_args(argv)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import infer
    from t5x_lite.decoding import DecodeConfig

    given = _given(arguments, set(vars(arguments)) - {"method", "num_outputs", *_DECODE_FLAGS})
    decode = _decode_config(arguments, DecodeConfig())
    given["decode"] = dataclasses.replace(decode, **_given(arguments, ["num_outputs"]))
    if arguments.shard is not None:
        given["shard"] = infer.parse_shard(arguments.shard)
    if arguments.mesh is not None:
        given["mesh"] = infer.parse_mesh(arguments.mesh)
    _keep_compiled_programs()
    infer.infer(infer.InferConfig(**given))
    return 0


# ---- tasks, vocab, report ------------------------------------------------------------------------


def _tasks(argv: list[str]) -> int:
    actions = {"list": _tasks_list, "inspect": _tasks_inspect}
    parser = _parser(
        "tasks", "List tasks, or look into one.", "tasks inspect python_docs_span_corruption"
    )
    parser.add_argument("action", help="list, or inspect NAME; ACTION --help tells more")
    action = parser.parse_args(argv[:1]).action
    if action not in actions:
        raise UsageError(f"unknown action {action!r} of tasks; {nearest(action, actions)}")
    return actions[action](argv[1:])


def _tasks_list(argv: list[str]) -> int:
    parser = _parser("tasks list", "List the tasks and mixtures.", "tasks list 'c4_*'")
    parser.add_argument("pattern", nargs="?", help="wildcards, or a part of the name")
    parser.add_argument("--module", help="a module on PYTHONPATH to import first")
    arguments = parser.parse_args(argv)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import data, inspect_tasks
    data.import_module(arguments.module)
    inspect_tasks.list_tasks(arguments.pattern)
    return 0


def _tasks_inspect(argv: list[str]) -> int:
    parser = _parser(
        "tasks inspect",
        "Show real examples of a task at each stage, and what its lengths cost.",
        "tasks inspect python_docs_span_corruption --task_feature_lengths=inputs=128,targets=29",
    )
    parser.add_argument("name", help="a task or mixture")
    _add_data_flags(parser)
    parser.add_argument("--num_examples", type=int, default=1000, help="examples to measure")
    parser.add_argument("--num_shown", type=int, default=1, help="examples to show")
    parser.add_argument("--no_pack", action="store_true", help="one example a row")
    arguments = parser.parse_args(argv)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import inspect_tasks
    inspect_tasks.inspect_task(
        _data_config(arguments, arguments.name, pack=not arguments.no_pack),
        num_examples=arguments.num_examples,
        num_shown=arguments.num_shown,
    )
    return 0


def _vocab(argv: list[str]) -> int:
    parser = _parser(
        "vocab",
        "Train a SentencePiece vocabulary from a task's text.",
        "vocab --task=text_files_span_corruption --text_files_pattern='texts/*.txt' "
        "--vocab_size=32000 --output=my.model",
    )
    parser.add_argument("--task", required=True, help="whose text to train on")
    parser.add_argument("--output", required=True, help="the file to write; must not exist")
    parser.add_argument(
        "--vocab_size", type=int, default=32000, help="all ids: pieces, pad, eos, unk, sentinels"
    )
    parser.add_argument("--num_sentinels", type=int, default=100, help="ids for <extra_id_N>")
    parser.add_argument("--model_type", choices=["unigram", "bpe"], default="unigram")
    parser.add_argument(
        "--byte_fallback", action="store_true", help="spell characters without a piece as bytes"
    )
    parser.add_argument(
        "--max_examples", type=int, default=50_000, help="read at most so many, all into memory"
    )
    _add_data_flags(parser)
    arguments = parser.parse_args(argv)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import vocab
    vocab.train_vocabulary(
        _data_config(arguments, arguments.task),
        arguments.output,
        vocab_size=arguments.vocab_size,
        num_sentinels=arguments.num_sentinels,
        model_type=arguments.model_type,
        byte_fallback=arguments.byte_fallback,
        max_examples=arguments.max_examples,
    )
    return 0


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--task_feature_lengths",
        default="inputs=512,targets=114",
        metavar="FEATURE=N,...",
        help="tokens of each feature (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary_file", help="a SentencePiece model, or bytes; T5's by default"
    )
    parser.add_argument("--module", help="a module on PYTHONPATH to import first")
    parser.add_argument("--tfds_data_dir", help="where TFDS finds prepared data sets")
    parser.add_argument("--text_files_pattern", help="files for the tasks text_files_*")
    parser.add_argument("--text_files_field", help="the field of a JSON line that holds the text")
    parser.add_argument("--text_files_validation_pattern", help="files to validate on")
    parser.add_argument(
        "--text_files_validation_share",
        type=float,
        default=0.01,
        help="share of documents kept for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--text_files_skip_corrupt_lines",
        action="store_true",
        help="leave out lines that cannot be read, instead of stopping",
    )


def _data_config(arguments: argparse.Namespace, name: str, *, pack: bool = True) -> "DataConfig":
    from t5x_lite.run_config import DataConfig, parse_feature_lengths

    text_files = {k: v for k, v in vars(arguments).items() if k.startswith("text_files_")}
    return DataConfig(
        name,
        parse_feature_lengths(arguments.task_feature_lengths),
        batch_size=1,
        pack=pack,
        split=arguments.split,
        mixture_or_task_module=arguments.module,
        vocabulary_file=arguments.vocabulary_file,
        tfds_data_dir=arguments.tfds_data_dir,
        **text_files,
    )


def _report(argv: list[str]) -> int:
    parser = _parser(
        "report",
        "Write MODEL_DIR/report.html: curves, configuration and predictions of a run.",
        "report runs/python_docs",
    )
    parser.add_argument("model_dir", help="what the run had as MODEL_DIR")
    from t5x_lite import report

    print(report.write_report(parser.parse_args(argv).model_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
