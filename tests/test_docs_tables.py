"""docs/tables.md runs as it is written, but for the number of steps."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import seqio
from test_docs import commands, named_files

from t5x_lite.__main__ import main


@pytest.fixture
def page(repo, tmp_path, monkeypatch):
    """The page, in a directory with its files and its tables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    page = (repo / "docs" / "tables.md").read_text()
    files = named_files(page)
    assert {"make_reviews.py", "reviews.py", "reviews.gin", "reviews_pandas.py"} < set(files)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert "\npython make_reviews.py\n" in page
    subprocess.run([sys.executable, "make_reviews.py"], check=True)
    yield page
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)
    if "reviews" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("reviews")


def test_from_a_parquet_file_to_a_model(page, tmp_path, capfd):
    found = commands(page)
    assert [argv[0] for argv in found] == ["tasks", "train", "eval"]
    for argv in found:
        if argv[0] == "train":
            steps = ("TRAIN_STEPS=2", "EVAL_PERIOD=2", "CHECKPOINT_PERIOD=2")
            argv = [*argv, *(f"--gin.{binding}" for binding in steps)]
        assert main(argv) == 0, capfd.readouterr().err
        out = capfd.readouterr().out
        if argv[0] == "tasks":
            assert re.search(r"```\n(Gold against gold.*?)```", page, re.DOTALL)[1] in out
            assert "review: The film is dull." in out  # the first row
    run = tmp_path / "runs" / "reviews"
    assert json.loads((run / "metrics" / "reviews.jsonl").read_text())["num_examples"] == 12
    lines = (run / "inference" / "reviews-2.jsonl").read_text().splitlines()
    # In the order of the table, and each with the column that says which row it is.
    assert [json.loads(line)["id"] for line in lines] == [f"concert-{i}" for i in range(6)] * 2


def test_module_that_is_missing_or_named_as_a_file(page, capfd):
    [inspect] = [argv for argv in commands(page) if argv[0] == "tasks"]
    without = [a for a in inspect if not a.startswith("--module")]
    assert main(without) == 2
    error = capfd.readouterr().err
    assert "'reviews' is not registered" in error
    assert error.endswith("; is MIXTURE_OR_TASK_MODULE (--module) missing?\n")
    assert main([*without, "--module=reviews.py"]) == 2
    error = capfd.readouterr().err
    assert "'reviews.py' is a file; did you mean the module 'reviews'?" in error
    assert main(["tasks", "inspect", "review", *inspect[3:]]) == 2
    error = capfd.readouterr().err
    assert "did you mean 'reviews'" in error and "missing?" not in error


@pytest.mark.parametrize("library", ["pandas", "datasets"])
def test_the_same_table_from_a_library(page, library):
    pytest.importorskip(library)
    source = importlib.import_module(f"reviews_{library}").source
    from_files = importlib.import_module("reviews")
    expected = seqio.TaskRegistry.get("reviews").source
    assert from_files.CLASSES == ("bad", "good")
    for split in ("train", "validation"):
        rows, wanted = (
            sorted(
                (row["id"], row["review"], row["label"])
                for row in s.get_dataset(split).as_numpy_iterator()
            )
            for s in (source, expected)
        )
        assert rows == wanted
        assert len(rows) == {"train": 60, "validation": 12}[split]
