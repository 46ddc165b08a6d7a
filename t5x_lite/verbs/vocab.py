"""`vocab`: a SentencePiece model from a task's text."""

from t5x_lite.verbs.flags import add_data_flags, data_config, parser_of


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    parser = parser_of(
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
    add_data_flags(parser)
    arguments = parser.parse_args(argv)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import vocab
    vocab.train_vocabulary(
        data_config(arguments, arguments.task),
        arguments.output,
        vocab_size=arguments.vocab_size,
        num_sentinels=arguments.num_sentinels,
        model_type=arguments.model_type,
        byte_fallback=arguments.byte_fallback,
        max_examples=arguments.max_examples,
    )
    return 0
