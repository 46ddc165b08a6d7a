"""`tasks`: what is registered, and one task from the inside."""

from t5x_lite.errors import UsageError, nearest
from t5x_lite.verbs.flags import add_data_flags, data_config, parser_of


def run(argv: list[str]) -> int:
    """Reads the flags and does it; returns the exit code."""
    actions = {"list": _tasks_list, "inspect": _tasks_inspect}
    parser = parser_of(
        "tasks", "List tasks, or look into one.", "tasks inspect python_docs_span_corruption"
    )
    parser.add_argument("action", help="list, or inspect NAME; ACTION --help tells more")
    action = parser.parse_args(argv[:1]).action
    if action not in actions:
        raise UsageError(f"unknown action {action!r} of tasks; {nearest(action, actions)}")
    return actions[action](argv[1:])


def _tasks_list(argv: list[str]) -> int:
    parser = parser_of("tasks list", "List the tasks and mixtures.", "tasks list 'c4_*'")
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
    parser = parser_of(
        "tasks inspect",
        "Show real examples of a task at each stage, and what its lengths cost.",
        "tasks inspect python_docs_span_corruption --task_feature_lengths=inputs=128,targets=29",
    )
    parser.add_argument("name", help="a task or mixture")
    add_data_flags(parser)
    parser.add_argument("--num_examples", type=int, default=1000, help="examples to measure")
    parser.add_argument("--num_shown", type=int, default=1, help="examples to show")
    parser.add_argument("--no_pack", action="store_true", help="one example a row")
    arguments = parser.parse_args(argv)
    from t5x_lite import setup

    with setup.without_native_notes():
        from t5x_lite import inspect_tasks
    inspect_tasks.inspect_task(
        data_config(arguments, arguments.name, pack=not arguments.no_pack),
        num_examples=arguments.num_examples,
        num_shown=arguments.num_shown,
    )
    return 0
