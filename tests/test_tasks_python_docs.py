"""The embedded corpus: real, split for good, with a vocabulary of its own."""

import collections
import difflib
import inspect
import json
import os
import subprocess
import sys

import pytest
import seqio

from t5x_lite.errors import UsageError
from tasks import python_docs, vocabularies


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An empty cache of this module's own."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("T5X_LITE_CACHE", str(path))
        _forget()
        yield path
    _forget()


def _forget():
    python_docs.documents.cache_clear()
    python_docs.docstrings.cache_clear()


def test_documents_are_pythons_documentation():
    train = python_docs.documents("train")
    validation = python_docs.documents("validation")
    assert not set(train) & set(validation)
    text = "\n".join(train + validation)
    assert 1.5e6 < len(text) < 4e6
    # Docstrings that `inspect` finds by importing, where we parse.
    for documented in (difflib.SequenceMatcher, difflib.unified_diff, inspect.getdoc, os.path.join):
        assert inspect.getdoc(documented) in text
    assert "The import system" in text or "import statement" in text  # from the topics
    share = sum(map(len, validation)) / len(text)
    assert 0.02 < share < 0.1


def test_no_docstring_is_in_both_splits():
    train, validation = (
        {p for d in python_docs.documents(s) for p in d.split("\n\n") if len(p) > 200}
        for s in ("train", "validation")
    )
    assert len(train & validation) <= 0.02 * len(validation)


def test_split_does_not_depend_on_the_hash_seed(tmp_path):
    """Another process, with another hash seed and an empty cache, gives the same documents."""
    code = """
import json, sys
from tasks import python_docs
json.dump([python_docs.documents(split) for split in ("train", "validation")], sys.stdout)
"""
    environment = {"PYTHONHASHSEED": "12345", "T5X_LITE_CACHE": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=os.path.dirname(os.path.dirname(python_docs.__file__)),
        capture_output=True,
        text=True,
        check=True,
    )
    there = [tuple(documents) for documents in json.loads(process.stdout)]
    assert there == [python_docs.documents(split) for split in ("train", "validation")]


def test_vocabulary_is_made_once_and_kept(cache):
    vocabulary = python_docs.VOCABULARY
    assert vocabulary.vocab_size == 4096
    (file,) = cache.glob("*.model")
    made = file.stat().st_mtime_ns
    python_docs._vocabulary_file.cache_clear()
    assert python_docs.VOCABULARY.vocab_size == 4096
    assert file.stat().st_mtime_ns == made
    text = "Return the number of items in a container."
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert len(vocabulary.encode(text)) < len(text) / 3
    assert vocabularies.sentinel_id(vocabulary, 0) == 4095


def test_vocabulary_is_its_own_whatever_the_default_is():
    before = vocabularies.DEFAULT.file
    vocabularies.set_default_file("bytes")
    try:
        assert python_docs.VOCABULARY.vocab_size == 4096
        assert python_docs.VOCABULARY != vocabularies.DEFAULT
    finally:
        vocabularies.set_default_file(before)


# ---- supervised tasks ----------------------------------------------------------------------------


def test_kinds_are_those_of_the_objects():
    """Objects that `inspect` knows the kind of, where we only parse."""
    kinds = {
        record["docstring"]: record["kind"]
        for split in ("train", "validation")
        for record in python_docs.kind_records(split)
    }
    for module in (difflib, inspect, collections, json):
        assert kinds[inspect.getdoc(module).strip()] == "module"
        for _, member in inspect.getmembers(module):
            if not (inspect.isclass(member) or inspect.isfunction(member)):
                continue
            text = inspect.cleandoc(member.__doc__) if isinstance(member.__doc__, str) else ""
            if text in kinds and member.__module__ == module.__name__:
                assert kinds[text] == ("class" if inspect.isclass(member) else "function"), member
    assert kinds[inspect.getdoc(difflib.SequenceMatcher.ratio)] == "function"
    assert set(kinds.values()) == set(python_docs.KINDS)


def test_summary_and_body_make_the_docstring():
    records = {r["summary"]: r["body"] for r in python_docs.summary_records("train")}
    expected = inspect.getdoc(difflib.unified_diff)
    summary = "Compare two sequences of lines; generate the delta as a unified diff."
    assert " ".join(expected.split()) == " ".join(f"{summary} {records[summary]}".split())
    assert len(records) > 1000
    for summary in records:
        assert len(summary.split()) > 1
        assert "->" not in summary and "\n" not in summary


@pytest.mark.parametrize("load", [python_docs.kind_records, python_docs.summary_records])
def test_validation_shares_no_record_with_training(load):
    train, validation = (
        {tuple(record.values()) for record in load(split)} for split in ("train", "validation")
    )
    assert len(validation) > 50
    assert not train & validation
    first = next(iter(load("train")[0]))
    assert not {r[first] for r in load("train")} & {r[first] for r in load("validation")}


def _texts(task, **options):
    dataset = seqio.get_mixture_or_task(task).get_dataset(
        {"inputs": 1024, "targets": 64}, split="validation", num_epochs=1, **options
    )
    return [
        (e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode(), e)
        for e in dataset.as_numpy_iterator()
    ]


def test_examples_are_a_prefix_and_the_fields():
    vocabulary = python_docs.VOCABULARY
    records = python_docs.kind_records("validation")
    for record, (inputs, targets, example) in zip(
        records, _texts("python_docs_kind", shuffle=False), strict=True
    ):
        assert inputs == f"kind: {record['docstring']}"
        assert targets == record["kind"]
        assert vocabulary.decode(example["targets"].tolist()) == targets
        assert example["targets"][-1] == example["inputs"][-1] == vocabulary.eos_id
    records = python_docs.summary_records("validation")
    for record, (inputs, targets, _) in zip(
        records, _texts("python_docs_summary", shuffle=False), strict=True
    ):
        assert (inputs, targets) == (f"summarize: {record['body']}", record["summary"])


def test_hosts_share_the_examples_in_any_number():
    whole = [text for text, *_ in _texts("python_docs_kind", shuffle=True, seed=3)]
    assert whole != [text for text, *_ in _texts("python_docs_kind", shuffle=False)]
    parts = [
        [t for t, *_ in _texts("python_docs_kind", seed=3, shard_info=seqio.ShardInfo(i, 3))]
        for i in range(3)
    ]
    assert sorted(text for part in parts for text in part) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_library_without_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    _forget()
    with pytest.raises(UsageError, match="without the sources of its standard library"):
        python_docs.documents("train")
    assert not (tmp_path / "cache").exists()
