"""`report`: a run on one page."""

from t5x_lite.verbs.flags import parser_of


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    parser = parser_of(
        "report",
        "Write MODEL_DIR/report.html: curves, configuration and predictions of a run.",
        "report runs/python_docs",
    )
    parser.add_argument("model_dir", help="what the run had as MODEL_DIR")
    from t5x_lite import report

    print(report.write_report(parser.parse_args(argv).model_dir))
    return 0
