"""What the verbs' command lines share: the parser, and groups of flags."""

import argparse
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from t5x_lite.errors import UsageError, nearest

if TYPE_CHECKING:
    from t5x_lite.decoding import DecodeConfig
    from t5x_lite.distributed import Options
    from t5x_lite.run_config import DataConfig, TrainConfig


EXAMPLE_FILES = (
    "--gin_file=gin_configs/models/t5_1_1/tiny.gin --gin_file=gin_configs/runs/python_docs.gin"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error does."""

    def error(self, message: str) -> NoReturn:
        flags = sorted(set(re.findall(r"--[\w.]+", self.format_help())))
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        if unknown:
            flag = unknown[1].partition("=")[0]
            message = f"unknown argument {flag!r}; {nearest(flag, flags)}"
        raise UsageError(f"{message} (python -m {self.prog} --help tells more)")


def parser_of(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of a verb, "" for that of the verbs themselves; errors are `UsageError`."""
    return _Parser(
        prog=f"t5x_lite {verb}".rstrip(),
        description=description,
        epilog=f"example:\n  python -m t5x_lite {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags that were given, by name."""
    return {name: v for name in names if (v := getattr(arguments, name)) is not None}


def keep_compiled_programs() -> None:
    """Compiled programs are kept between processes, unless JAX was told where to."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = os.environ.get("T5X_LITE_CACHE", "~/.cache/t5x_lite")
        jax.config.update("jax_compilation_cache_dir", f"{pathlib.Path(root).expanduser()}/xla")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# ---- gin -----------------------------------------------------------------------------------------


def add_gin_flags(parser: argparse.ArgumentParser) -> None:
    """What a run is, as `gin_utils.split_gin_flags` and `run_of` read it."""
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


def run_of(
    arguments: argparse.Namespace, bindings: Iterable[str], example: str
) -> tuple["TrainConfig", str]:
    """The run that the flags of `add_gin_flags` describe, and its configuration in gin's words.

    Args:
      arguments: the flags.
      bindings: what `gin_utils.split_gin_flags` found.
      example: --gin_file=... for whoever has given none.

    Raises:
      UsageError: no file, or one that is wrong.
    """
    from t5x_lite import gin_utils

    if not arguments.gin_file:
        raise UsageError(f"give --gin_file, for example {example}")
    paths = [path for path in arguments.gin_search_paths.split(",") if path]
    return gin_utils.load_train_config(arguments.gin_file, list(bindings), paths)


# ---- several processes ---------------------------------------------------------------------------


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for `distributed.Options`: how the processes of a job find each other."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, which Cloud TPU, GKE, Slurm or Open MPI tells of; where "
        "they do, it is found out without this flag",
    )
    parser.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="of process 0, said explicitly"
    )
    parser.add_argument("--num_processes", type=int, help="how many; 1: whatever is found, alone")
    parser.add_argument("--process_id", type=int, help="which one this is, from 0")
    parser.add_argument(
        "--distributed_timeout",
        type=float,
        metavar="SECONDS",
        default=45.0,
        help="how long to wait for the other processes (default: %(default)g)",
    )


PROCESS_FLAGS = (
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
    "distributed_timeout",
)


def process_options(arguments: argparse.Namespace) -> "Options":
    """The flags of `add_process_flags`; UsageError if they cannot be."""
    from t5x_lite.distributed import Options

    return Options(
        arguments.distributed,
        arguments.coordinator_address,
        arguments.num_processes,
        arguments.process_id,
        arguments.distributed_timeout,
    )


def shared_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that every process must have been given alike."""
    return {f"--{k}": v for k, v in vars(arguments).items() if k not in PROCESS_FLAGS}


# ---- decoding ------------------------------------------------------------------------------------


def add_decode_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for every field of `DecodeConfig` but `num_outputs`."""
    parser.add_argument("--method", help="of decoding: greedy, beam or sample")
    parser.add_argument("--num_beams", type=int, help="of --method=beam")
    parser.add_argument("--length_penalty", type=float, help="of --method=beam: alpha, 0 for none")
    parser.add_argument("--temperature", type=float, help="of --method=sample")
    parser.add_argument("--top_k", type=int, help="of --method=sample: the K likeliest ids")
    parser.add_argument(
        "--top_p", type=float, help="of --method=sample: the ids that hold this probability"
    )


def decode_config(arguments: argparse.Namespace, base: "DecodeConfig") -> "DecodeConfig":
    """`base` with the flags that were given.

    Raises:
      UsageError: a flag of another method than the one that is used.
    """
    from t5x_lite.decoding import METHOD_OF

    flags = [name for name in METHOD_OF if hasattr(arguments, name)]
    decode = dataclasses.replace(base, **given(arguments, ["method", *flags]))
    for flag in given(arguments, flags):
        if decode.method != METHOD_OF[flag]:
            raise UsageError(
                f"--{flag} has no effect on {decode.method} decoding: add "
                f"--method={METHOD_OF[flag]}"
            )
    return decode


# ---- data ----------------------------------------------------------------------------------------


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which examples, for verbs without gin files; `data_config` reads them."""
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


def data_config(arguments: argparse.Namespace, name: str, *, pack: bool = True) -> "DataConfig":
    """The data that the flags describe, a row at a time."""
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
