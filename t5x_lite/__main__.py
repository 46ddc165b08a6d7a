"""The command line, `python -m t5x_lite VERB`: finds the verb, and turns errors into lines."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from t5x_lite.errors import Failure, UsageError, nearest
from t5x_lite.verbs.flags import EXAMPLE_FILES, parser_of

USAGE_ERROR, KEYBOARD_INTERRUPT = 2, 130

# Each is a module of `verbs` with a function `run(arguments) -> exit code`.
VERBS = ("train", "eval", "infer", "convert", "tasks", "vocab", "cache", "plan", "report")


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
    parser = parser_of("", "Text-to-text training in JAX and Flax.", f"train {EXAMPLE_FILES}")
    parser.add_argument("verb", help=f"one of {', '.join(VERBS)}; VERB --help tells more")
    verb = parser.parse_args(argv[:1]).verb
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}; {nearest(verb, VERBS)}")
    run = importlib.import_module(f"t5x_lite.verbs.{verb}").run
    return run(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
