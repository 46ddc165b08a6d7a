"""`cache`: a task's rows, made once, to train on by index."""

from t5x_lite.verbs.flags import add_data_flags, data_config, given, parser_of


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    parser = parser_of(
        "cache",
        "Preprocess a task once, into rows that a run with CACHE_DIR reads in an order which is a "
        "function of its seed and the step alone. The same command goes on where it was "
        "interrupted, and repairs what is damaged.",
        "cache python_docs_span_corruption --output_dir=caches --num_passes=4",
    )
    parser.add_argument("task", help="a task, not a mixture")
    parser.add_argument(
        "--output_dir", required=True, help="for caches: the rows go to OUTPUT_DIR/TASK/SPLIT"
    )
    add_data_flags(parser)
    parser.add_argument("--no_pack", action="store_true", help="one example a row")
    parser.add_argument(
        "--num_passes",
        type=int,
        default=1,
        help="over the split, each with noise of its own (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--num_processes", type=int, help="on this machine; half of its cores by default"
    )
    parser.add_argument("--num_shards", type=int, help="files; as the source has by default")
    parser.add_argument(
        "--beam_options",
        metavar="'--runner=...'",
        help="let a pipeline of Apache Beam with these options make the files",
    )
    arguments = parser.parse_args(argv)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import cache
    names = ("num_passes", "seed", "num_processes", "num_shards", "beam_options")
    cache.cache_task(
        data_config(arguments, arguments.task, pack=not arguments.no_pack),
        arguments.output_dir,
        **given(arguments, names),
    )
    return 0
