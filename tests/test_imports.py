"""Who may import whom: the model trains where TensorFlow is absent."""

import ast
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPO / "t5x_lite"

# Pure JAX: these also run on a bare GPU machine.
PURE = {"models", "losses", "step", "decoding", "optimizers", "partitioning"}
PURE_MAY_IMPORT = {"jax", "flax", "optax", "numpy"}
# The command line, the rooms that may load TensorFlow and seqio, and those that load these.
SEQIO_ROOMS = {
    *("data", "packing", "inspect_tasks", "gold_check", "task_stages", "vocab"),
    *("task_evaluation", "evaluate_run", "saved_run", "cache"),
}
EDGE = SEQIO_ROOMS | {
    *(
        "__main__",
        "verbs",
        "gin_utils",
        "wrap_up",
        "baselines",
        "infer",
        "infer_task",
        "loaded_model",
    ),
}
# Leaves that any room may use: they import nothing of t5x_lite themselves.
LEAVES = {"errors", "files"}
HEAVY = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "gin"}


def room(path: pathlib.Path) -> str:
    """The first name below t5x_lite: `models` for t5x_lite/models/t5.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: pathlib.Path) -> set[str]:
    """Every module a file imports anywhere in it, functions included, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


def our_rooms(path: pathlib.Path) -> set[str]:
    """The rooms of t5x_lite that a file imports."""
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("t5x_lite.")}


FILES = sorted(PACKAGE.rglob("*.py"))
PURE_FILES = [f for f in FILES if room(f) in PURE]
CORE_FILES = [f for f in FILES if room(f) not in EDGE]


def file_id(path: pathlib.Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("path", PURE_FILES, ids=file_id)
def test_pure_modules_import_jax_and_each_other(path):
    assert top_level(imported_names(path)) <= PURE_MAY_IMPORT | {"t5x_lite"}
    assert our_rooms(path) <= PURE | {"errors"}


@pytest.mark.parametrize("path", [f for f in FILES if room(f) == "models"], ids=file_id)
def test_models_know_nothing_of_the_rest(path):
    assert our_rooms(path) <= {"models", "errors"}


def test_who_imports_tensorflow_seqio_and_gin():
    importers = {
        library: {room(f) for f in FILES if library in top_level(imported_names(f))}
        for library in HEAVY
    }
    assert importers.pop("gin") <= {"gin_utils"}
    for library, rooms in importers.items():
        assert rooms <= SEQIO_ROOMS, library


@pytest.mark.parametrize("path", sorted((REPO / "tasks").rglob("*.py")), ids=file_id)
def test_tasks_import_leaves_alone(path):
    assert our_rooms(path) <= LEAVES


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_nothing_of_ours(leaf):
    assert not our_rooms(PACKAGE / f"{leaf}.py")


@pytest.mark.parametrize("path", CORE_FILES, ids=file_id)
def test_core_module_loads_no_tensorflow_seqio_or_gin(path):
    module = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    code = (
        f"import sys, importlib; importlib.import_module({module!r}); "
        f"loaded = sorted(set({sorted(HEAVY)!r}) & set(sys.modules)); "
        "sys.exit('loaded: ' + ', '.join(loaded) if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
