"""The embedded corpus: real, split for good, with a vocabulary of its own."""

import difflib
import inspect
import json
import os
import subprocess
import sys

import pytest

from t5x_lite.errors import UsageError
from tasks import python_docs, vocabularies


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An empty cache of this module's own."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("T5X_LITE_CACHE", str(path))
        python_docs.documents.cache_clear()
        yield path
    python_docs.documents.cache_clear()


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


def test_library_without_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    python_docs.documents.cache_clear()
    with pytest.raises(UsageError, match="without the sources of its standard library"):
        python_docs.documents("train")
    assert not (tmp_path / "cache").exists()
