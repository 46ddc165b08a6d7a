"""Python's own documentation as a corpus: it is on every machine, and it is real English prose.

A document is the docstrings of one module of the standard library, in the order of the source, or
one topic of `pydoc_data.topics`; about 2 MB together.
"""

import ast
import functools
import hashlib
import inspect
import json
import os
import pathlib
import sys
import sysconfig
from collections.abc import Sequence

import sentencepiece
import seqio

from t5x_lite.errors import UsageError
from tasks import cache, registration, sources, vocabularies

VOCAB_SIZE = 4096  # with pad, eos, unk and 100 sentinels
VALIDATION_PERCENT = 5
MIN_DOCUMENT_LENGTH = 200  # characters
MIN_NUM_DOCUMENTS = 200  # fewer means that the sources of the library are not installed

# Tests and programs that come with the library, not part of its documentation.
_SKIPPED_DIRECTORIES = {
    *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "turtledemo"),
}
_EXTRACTION_VERSION = 1  # to be raised with any change to what the documents are


@functools.cache
def documents(split: str) -> tuple[str, ...]:
    """The documents of "train" or "validation", ordered by name.

    Reading the library takes some seconds, so the result is kept in the cache directory.

    Raises:
      UsageError: this Python comes without the sources of its standard library.
    """
    wanted = split == "validation"
    return tuple(text for name, text in _all_documents() if _in_validation(name) == wanted)


def _in_validation(name: str) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < VALIDATION_PERCENT


def _all_documents() -> Sequence[tuple[str, str]]:
    """(name, text) of every document."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    key = f"{_EXTRACTION_VERSION} {sys.version} {library}".encode()
    path = cache.cache_dir() / f"python_docs-{hashlib.sha256(key).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_bytes())
    found = extract(library)
    if len(found) < MIN_NUM_DOCUMENTS:
        raise UsageError(
            f"python_docs: only {len(found)} documents found under {library}; this Python comes "
            "without the sources of its standard library, use another one or text files"
        )
    cache.write(path, json.dumps(found).encode())
    return found


def extract(library: pathlib.Path) -> list[tuple[str, str]]:
    """(name, text) of the modules under `library` and of the topics, ordered by name.

    Modules are parsed, not imported. Of equal docstrings, which occur in alternative
    implementations of one module, the first is taken, so that none is in both splits.
    """
    from pydoc_data.topics import topics  # 0.5 MB that only this needs

    found = [(f"topic:{name}", inspect.cleandoc(text)) for name, text in sorted(topics.items())]
    seen: set[str] = set()
    for directory, subdirectories, files in os.walk(library):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
        for file in sorted(f for f in files if f.endswith(".py")):
            path = pathlib.Path(directory, file)
            fresh = [text for text in _docstrings(path) if text not in seen]
            seen.update(fresh)
            name = ".".join(path.relative_to(library).with_suffix("").parts)
            found.append((f"module:{name}", "\n\n".join(fresh)))
    return sorted((name, text) for name, text in found if len(text) >= MIN_DOCUMENT_LENGTH)


def _docstrings(path: pathlib.Path) -> list[str]:
    """The docstrings of a source file, each once, in the order of the source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file for another Python
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = (ast.get_docstring(node) for node in nodes)
    return list(dict.fromkeys(text.strip() for text in texts if text))


class PythonDocsVocabulary(vocabularies.LazyVocabulary):
    """A unigram vocabulary of 4096 ids, trained from the train split on first use and kept."""

    def resolve(self) -> seqio.Vocabulary:
        return vocabularies.load(_vocabulary_file(cache.cache_dir()))


@functools.cache
def _vocabulary_file(directory: pathlib.Path) -> str:
    texts = documents("train")
    digest = hashlib.sha256(f"{VOCAB_SIZE} {sentencepiece.__version__}".encode())
    for text in texts:
        digest.update(text.encode())
    path = directory / f"python_docs-{digest.hexdigest()[:16]}.model"
    if not path.exists():
        model = vocabularies.train_sentencepiece(
            texts, vocab_size=VOCAB_SIZE, character_coverage=1.0
        )
        cache.write(path, model)
    return str(path)


VOCABULARY = PythonDocsVocabulary()


def register() -> None:
    """Registers `python_docs_span_corruption` and its siblings."""
    source = sources.DocumentsSource(["train", "validation"], documents)
    registration.register_objectives("python_docs", source, VOCABULARY)
