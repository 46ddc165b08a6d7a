"""The commands of README.md and docs/ run as they are written, but for the number of steps."""

import re
import shlex

import pytest

from t5x_lite.__main__ import main
from tasks import cache, python_docs


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m t5x_lite` in a page's shell blocks."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "t5x_lite" in words:
                found.append(words[words.index("t5x_lite") + 1 :])
    return found


def gin_files_are_there(repo, argv: list[str]) -> bool:
    files = [a.partition("=")[2] for a in argv if a.startswith("--gin_file=")]
    return all((repo / file).is_file() for file in files)


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


def test_readme(repo, shared_data, tmp_path, monkeypatch, capfd):
    """Training runs dry here: the model is too large for a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("T5X_LITE_CACHE", str(cache.cache_dir()))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tensorflow_datasets").symlink_to(shared_data / "tfds")
    found = commands((repo / "README.md").read_text())
    assert {argv[0] for argv in found} == {"train", "tasks"}
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
        assert main(argv) == 0, capfd.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/your_text.md", "docs/model_dir.md"])
def test_links_lead_somewhere(repo, page):
    text = (repo / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((repo / page).parent / target).exists(), target
