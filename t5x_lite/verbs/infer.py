"""`infer`: lines of files, or examples of a task, answered by a model."""

import dataclasses

from t5x_lite.verbs.flags import (
    PROCESS_FLAGS,
    add_decode_flags,
    add_process_flags,
    decode_config,
    given,
    keep_compiled_programs,
    parser_of,
    process_options,
    shared_flags,
)


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    parser = parser_of(
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
    add_decode_flags(parser)
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
    add_process_flags(parser)
    arguments = parser.parse_args(argv)
    processes = process_options(arguments)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import distributed, infer
    from t5x_lite.decoding import METHOD_OF, DecodeConfig

    others = {"method", "num_outputs", *METHOD_OF, *PROCESS_FLAGS}
    options = given(arguments, set(vars(arguments)) - others)
    decode = decode_config(arguments, DecodeConfig())
    options["decode"] = dataclasses.replace(decode, **given(arguments, ["num_outputs"]))
    if arguments.shard is not None:
        options["shard"] = infer.parse_shard(arguments.shard)
    if arguments.mesh is not None:
        options["mesh"] = infer.parse_mesh(arguments.mesh)
    config = infer.InferConfig(**options)
    keep_compiled_programs()
    with distributed.joined(processes, shared_flags(arguments)):
        infer.infer(config)
    return 0
