"""`train`: a training run from gin files."""

from t5x_lite.verbs.flags import (
    EXAMPLE_FILES,
    add_gin_flags,
    add_process_flags,
    keep_compiled_programs,
    parser_of,
    process_options,
    run_of,
)


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    parser = parser_of(
        "train",
        "Pre-train or fine-tune. The same command resumes a run that was interrupted.",
        f"train {EXAMPLE_FILES}",
    )
    add_gin_flags(parser)
    parser.add_argument("--tfds_data_dir", help="where TFDS finds prepared data sets")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="resolve everything, build one batch, print parameters and shardings; train nothing",
    )
    add_process_flags(parser)
    if any(flag in argv for flag in ("-h", "--help")):
        parser.parse_args(argv)
    from etils import epath

    from t5x_lite import distributed, gin_utils, train
    from t5x_lite.run_config import check_same_run, flatten

    bindings, rest = gin_utils.split_gin_flags(argv)
    arguments = parser.parse_args(rest)
    processes = process_options(arguments)
    if arguments.tfds_data_dir:
        bindings.append(f"DataConfig.tfds_data_dir = {arguments.tfds_data_dir!r}")
    config, text = run_of(arguments, bindings, EXAMPLE_FILES)

    def check_saved() -> None:
        saved = epath.Path(config.model_dir) / "config.gin"
        if saved.exists():
            check_same_run(gin_utils.read_saved(saved), config)

    keep_compiled_programs()
    with distributed.joined(processes, flatten(config), heeds_preemption=not arguments.dry_run):
        distributed.from_process_0(check_saved)
        if arguments.dry_run:
            train.dry_run(config)
        else:
            train.train(config, text)
    return 0
