"""The command line: `python -m t5x_lite VERB ...`. Parses, hands over, and turns errors into lines."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from t5x_lite.errors import UsageError

USAGE_ERROR, FAILURE = 2, 1
# What a process that SIGTERM ends exits with; a supervisor then starts the command again.
INTERRUPTED = 143

_TINY = "gin_configs/models/t5_1_1/tiny.gin"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    # TensorFlow's start-up notes on stderr are about itself.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        arguments = sys.argv[1:] if argv is None else list(argv)
        return _dispatch(arguments)
    except UsageError as e:
        print(f"t5x_lite: {e}", file=sys.stderr)
        return USAGE_ERROR
    except RuntimeError as e:
        if type(e).__module__.split(".")[0] != "t5x_lite":
            raise
        print(f"t5x_lite: {e}", file=sys.stderr)
        return INTERRUPTED if type(e).__name__ == "Interrupted" else FAILURE


def _dispatch(argv: list[str]) -> int:
    from_verb: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "report": _report,
    }
    parser = argparse.ArgumentParser(
        prog="t5x_lite", description="Text-to-text training in JAX and Flax."
    )
    parser.add_argument("verb", choices=from_verb, help="VERB --help tells more")
    arguments = parser.parse_args(argv[:1])
    return from_verb[arguments.verb](argv[1:])


def _parser(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"t5x_lite {verb}",
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
        f"train --gin_file={_TINY} --gin_file=gin_configs/runs/python_docs.gin",
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
        raise UsageError(f"give --gin_file, for example --gin_file={_TINY}")
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

    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("T5X_LITE_CACHE", "~/.cache/t5x_lite")
        jax.config.update("jax_compilation_cache_dir", f"{pathlib.Path(root).expanduser()}/xla")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# ---- tasks, vocab, report ------------------------------------------------------------------------


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
