"""`convert`: checkpoints of Hugging Face and T5X in, of Hugging Face out."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator

from t5x_lite.errors import UsageError
from t5x_lite.verbs.flags import given, parser_of

# So many CPU devices, each of which holds a part of an array: they are written one by one. More
# than any model has layers, so that a number of layers that is prime is divided as well.
_NUM_DEVICES = 128

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    parser = parser_of(
        "convert",
        "Make a MODEL_DIR of a Hugging Face or T5X checkpoint; or write one for transformers.\n"
        "  --from=hf DIRECTORY --to=MODEL_DIR\n"
        "  --from=t5x CHECKPOINT --to=MODEL_DIR --vocabulary=FILE\n"
        "  MODEL_DIR --to=hf DIRECTORY\n"
        "DIRECTORY is as save_pretrained or `hf download NAME --local-dir DIRECTORY` leaves it, "
        "CHECKPOINT a\ncheckpoint_<step> of T5X or the directory above it, of which the newest is "
        "taken.",
        "convert --from=hf flan-t5-base --to=models/flan_t5_base\n"
        "  python -m t5x_lite convert --from=t5x t5_small/checkpoint_1000000 --to=models/t5_small "
        "--vocabulary=cc_all.model\n"
        "  python -m t5x_lite convert runs/sst2 --to=hf sst2_hf",
    )
    parser.add_argument("paths", nargs="+", help="what to read; with --to=hf then where to write")
    parser.add_argument(
        "--from", dest="from_", metavar="FORMAT", help="hf or t5x; a MODEL_DIR if not given"
    )
    parser.add_argument("--to", required=True, metavar="PLACE", help="a new MODEL_DIR, or hf")
    parser.add_argument(
        "--vocabulary",
        help="a SentencePiece model, a directory with a tokenizer, or bytes (as ByT5 has them); "
        "by default the source's own, which T5X's have not",
    )
    parser.add_argument("--checkpoint", help="with --to=hf: latest, best or a step")
    parser.add_argument(
        "--max_shard_size",
        help="with --to=hf: at most this much in each file of weights (default: 5GB)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="with --to=hf: float32 by default; of a model that was only converted, its source's",
    )
    arguments = parser.parse_intermixed_args(argv)  # MODEL_DIR --to=hf DIRECTORY
    outward = given(arguments, ("checkpoint", "max_shard_size", "dtype"))
    # After `--to=` a shell leaves "~" as it is.
    paths = [os.path.expanduser(path) for path in arguments.paths]
    model_dir = os.path.expanduser(arguments.to)
    vocabulary = arguments.vocabulary and os.path.expanduser(arguments.vocabulary)
    if arguments.to == "hf":
        if arguments.from_ is not None or arguments.vocabulary is not None:
            raise UsageError(
                "--to=hf writes a MODEL_DIR's checkpoint, with its vocabulary: convert to a "
                "MODEL_DIR first, and leave out --from and --vocabulary"
            )
        _check_num_paths(paths, "MODEL_DIR --to=hf DIRECTORY", 2)
        outward["max_shard_bytes"] = _parse_size(outward.pop("max_shard_size", "5GB"))
    else:
        if arguments.from_ not in ("hf", "t5x"):
            found = "" if arguments.from_ is None else f"--from={arguments.from_}: "
            raise UsageError(
                f"{found}give --from=hf or --from=t5x, what {paths[0]!r} is; or --to=hf to write "
                "it for transformers"
            )
        if outward:
            raise UsageError(f"--{next(iter(outward))} belongs to --to=hf")
        _check_num_paths(paths, f"--from={arguments.from_} PATH --to=MODEL_DIR", 1)
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator, which may be in use, does nothing
    with contextlib.suppress(RuntimeError):  # JAX has begun with the devices it found
        jax.config.update("jax_num_cpu_devices", _NUM_DEVICES)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import convert
    with _interrupted_by_sigterm():
        if arguments.to == "hf":
            convert.export_checkpoint(*paths, **outward)
        else:
            convert.import_checkpoint(arguments.from_, paths[0], model_dir, vocabulary=vocabulary)
    return 0


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C, so that what is half written goes."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_num_paths(paths: list[str], form: str, count: int) -> None:
    if len(paths) != count:
        raise UsageError(f"give convert {form}; found {' '.join(paths)}")


def _parse_size(text: str) -> int:
    """`"5GB"` in bytes; UsageError if it is no size."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if not match or not int(match[1]):
        raise UsageError(f"--max_shard_size={text}: give a size like 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2]]
