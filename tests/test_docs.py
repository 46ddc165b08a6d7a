"""The commands of README.md and docs/ run as they are written, but for the number of steps."""

import contextlib
import json
import re
import shlex
import shutil
import sys

import pytest
import seqio

from t5x_lite import gin_utils
from t5x_lite.__main__ import main
from tasks import cache, python_docs, vocabularies


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m t5x_lite` in a page's shell blocks."""
    return calls("\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)))


def calls(script: str) -> list[list[str]]:
    """The arguments of every `python -m t5x_lite` in a shell script."""
    lines = script.replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if "-m t5x_lite " in line]
    return [line[line.index("t5x_lite") + 1 :] for line in words]


def named_files(text: str) -> dict[str, str]:
    """The files that a page shows: a block after a paragraph that ends in `name`:"""
    return dict(re.findall(r"`([\w.]+)`:\n\n```\w*\n(.*?)```", text, re.DOTALL))


def gin_files_are_there(repo, argv: list[str]) -> bool:
    files = [a.partition("=")[2] for a in argv if a.startswith("--gin_file=")]
    return all((repo / file).is_file() for file in files)


@pytest.fixture(scope="module")
def made(repo, tmp_path_factory):
    """A directory in which `make train` has run, but for the number of steps and of examples."""
    recipe = re.search(r"^train:.*\n((?:\t.*\n)+)", (repo / "Makefile").read_text(), re.MULTILINE)
    found = calls(recipe[1])
    assert len(found) == 2
    few = ("TRAIN_STEPS=2", "EVAL_STEPS=1", "EVAL_NUM_EXAMPLES=8", "NUM_SAMPLE_PREDICTIONS=1")
    path = tmp_path_factory.mktemp("made")
    with contextlib.chdir(path):
        for argv in found:
            assert gin_files_are_there(repo, argv)
            assert main([*argv, *(f"--gin.{binding}" for binding in few)]) == 0
    return path


def test_cache(repo, tmp_path, monkeypatch, capfd):
    """The page's two commands."""
    monkeypatch.chdir(tmp_path)
    found = commands((repo / "docs" / "cache.md").read_text())
    assert [argv[0] for argv in found] == ["cache", "train"]
    for argv in found:
        if argv[0] == "train":
            few = ("TRAIN_STEPS=2", "EVAL_STEPS=1", "NUM_SAMPLE_PREDICTIONS=1")
            argv = [*argv, *(f"--gin.{binding}" for binding in few)]
        assert main(argv) == 0, capfd.readouterr().err
    assert (tmp_path / "runs" / "cached" / "report.html").is_file()


def test_your_text(repo, tmp_path, monkeypatch, capfd):
    """A corpus with one document a line; then the page's three commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    lines = (" ".join(text.split()) for text in python_docs.documents("train"))
    (tmp_path / "corpus" / "docs.txt").write_text("\n".join(lines) + "\n")
    found = commands((repo / "docs" / "your_text.md").read_text())
    assert [argv[0] for argv in found] == ["vocab", "tasks", "train"]
    for argv in found:
        if argv[0] == "train":
            argv = [*argv, "--gin.TRAIN_STEPS=2", "--gin.NUM_SAMPLE_PREDICTIONS=1"]
        if argv[0] == "tasks":
            argv = [*argv, "--num_examples=20"]
        assert main(argv) == 0, capfd.readouterr().err
    assert (tmp_path / "corpus.model").is_file()
    assert (tmp_path / "runs" / "corpus" / "report.html").is_file()


@pytest.fixture
def tickets(repo, tmp_path, monkeypatch):
    """An empty directory with the files of register_a_task.md in it, and the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    page = (repo / "docs" / "register_a_task.md").read_text()
    files = named_files(page)
    assert {"tickets.py", "tickets.gin", "tickets_train.tsv", "new_tickets.txt"} < set(files)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    yield page
    forget_tickets()


def forget_tickets():
    sys.modules.pop("tickets", None)
    if "tickets" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("tickets")


def test_register_a_task(tickets, made, tmp_path, capfd):
    """The page from its first to its last command."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    printed = {}
    found = commands(tickets)
    assert [argv[0] for argv in found] == ["tasks", "train", "eval", "eval", "eval", "infer"]
    for argv in found:
        if argv[0] == "train":
            steps = ("TRAIN_STEPS=2", "EVAL_PERIOD=1", "CHECKPOINT_PERIOD=1")
            argv = [*argv, *(f"--gin.{binding}" for binding in steps)]
        capfd.readouterr()
        assert main(argv) == 0, capfd.readouterr().err
        printed[argv[0]] = capfd.readouterr().out
    gold = re.search(r"```\n(Gold against gold.*?)```", tickets, re.DOTALL)[1]
    assert gold in printed["tasks"]

    run = tmp_path / "runs" / "tickets"
    lines = (run / "metrics" / "tickets.jsonl").read_text().splitlines()
    accuracy = {line["step"]: line["accuracy"] for line in map(json.loads, lines)}
    assert set(accuracy) == {1, 2}
    for step, value in accuracy.items():
        written = (run / "inference" / f"tickets-{step}.jsonl").read_text().splitlines()
        right = [r["prediction"] == r["targets"] for r in map(json.loads, written)]
        assert value == pytest.approx(100 * sum(right) / len(right))
    assert (run / "metrics" / "tickets_train.jsonl").is_file()
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    messages = (tmp_path / "new_tickets.txt").read_text().splitlines()
    assert [json.loads(a)["inputs"] for a in answers] == [f"department: {m}" for m in messages]


def test_a_broken_post_processor_is_seen(tickets, tmp_path, capfd):
    """What register_a_task.md says that one sees."""
    path = tmp_path / "tickets.py"
    path.write_text(path.read_text().replace('("billing"', '("Billing"'))
    vocabulary = python_docs.VOCABULARY.resolve().sentencepiece_model_file
    argv = ["tasks", "inspect", "tickets", "--module=tickets", f"--vocabulary_file={vocabulary}"]
    assert main(argv) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    shown = re.findall(r"```\n(  .*?\n)```", tickets)
    assert len(shown) == 2
    for line in shown:
        assert line in out
    assert re.search(r"^  accuracy  100$", out, re.MULTILINE)


def test_gin_import_instead_of_the_macro(tickets, tmp_path):
    """As the page says; and the run's own config.gin still imports the module."""
    path = tmp_path / "tickets.gin"
    text = re.sub("^MIXTURE_OR_TASK_MODULE.*\n", "", path.read_text(), flags=re.MULTILINE)
    path.write_text("import tickets\n" + text)
    model = "gin_configs/models/t5_1_1/tiny.gin"
    config, operative = gin_utils.load_train_config([model, str(path)], [])
    assert config.data.mixture_or_task_module is None
    assert "tickets" in seqio.TaskRegistry.names()
    forget_tickets()
    (tmp_path / "config.gin").write_text(operative)
    assert gin_utils.read_saved(tmp_path / "config.gin") == config
    assert "tickets" in seqio.TaskRegistry.names()


def test_readme(repo, shared_data, made, tmp_path, monkeypatch, capfd):
    """Training runs dry here: the models are too large for a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("T5X_LITE_CACHE", str(cache.cache_dir()))
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(made / "runs", tmp_path / "runs")
    (tmp_path / "docstrings.txt").write_text("Return the sum of two numbers.\nA pair of numbers.\n")
    put_downloads(tmp_path, shared_data)
    found = commands((repo / "README.md").read_text())
    assert {argv[0] for argv in found} >= {"train", "tasks"}
    vocabulary = shared_data / "vocabs" / "t5_sentencepiece_32000.model"
    for argv in found:
        assert gin_files_are_there(repo, argv)
        if argv[0] == "train":
            argv = [
                *argv,
                f"--gin.VOCABULARY_FILE='{vocabulary}'",
                "--gin.BATCH_SIZE=4",
                "--dry_run",
            ]
        if argv[:2] == ["tasks", "inspect"]:
            argv = [*argv, "--num_examples=20"]
        if argv[0] == "plan":
            argv = [*argv, "--gin.T5Config.vocab_size=512", "--gin.BATCH_SIZE=32"]
            argv = [*argv, "--gin.NUM_MICROBATCHES=2"]
        assert main(argv) == 0, capfd.readouterr().err


def put_downloads(place, shared_data):
    """What the pages download, as far as a test needs it: small checkpoints, a vocabulary."""
    words = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "aeiou"]
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    model = vocabularies.train_sentencepiece(texts, vocab_size=190)
    hf, t5x = (shared_data / "checkpoints" / name for name in ("hf", "t5x"))
    shutil.copytree(hf / "t5_v11_sharded", place / "flan-t5-base")
    (place / "flan-t5-base" / "spiece.model").write_bytes(model)
    (place / "sentencepiece.model").write_bytes(model)
    checkpoint = t5x / "t5x_legacy_unscanned_v11" / "checkpoint_5"
    shutil.copytree(checkpoint, place / "t5_1_1_small" / "checkpoint_1000000")
    (place / "tensorflow_datasets").symlink_to(shared_data / "tfds")


def test_convert(repo, shared_data, tmp_path, monkeypatch, capfd):
    """The page from its first to its last command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    put_downloads(tmp_path, shared_data)
    found = commands((repo / "docs" / "convert.md").read_text())
    assert [argv[0] for argv in found] == [
        "convert", "convert", "train", "convert", "train"
    ]  # fmt: skip
    for argv in found:
        if argv[0] == "train":
            steps = 6 if "pretrain" in " ".join(argv) else 2
            argv = [*argv, f"--gin.TRAIN_STEPS={steps}", "--gin.BATCH_SIZE=4"]
            argv = [*argv, "--gin.EVAL_STEPS=1", "--gin.EVAL_NUM_EXAMPLES=4"]
            argv = [*argv, "--gin.NUM_SAMPLE_PREDICTIONS=1"]
        assert main(argv) == 0, capfd.readouterr().err
    assert (tmp_path / "my_task_hf" / "model.safetensors").is_file()
    assert "glue_sst2_v002" in (tmp_path / "my_task_hf" / "README.md").read_text()
    assert (tmp_path / "models" / "t5_1_1_small" / "checkpoints" / "6").is_dir()


def test_links_lead_somewhere(repo):
    for page in (repo / "README.md", *(repo / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
