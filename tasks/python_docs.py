"""Python's own documentation as a corpus: it is on every machine, and it is real English prose.

A document is the docstrings of one module of the standard library, in the order of the source, or
one topic of `pydoc_data.topics`; about 2 MB together. The docstrings one by one make supervised
tasks: what kind of object one documents, and its summary line from the rest of it.
"""

import ast
import functools
import hashlib
import inspect
import json
import os
import pathlib
import re
import sys
import sysconfig
from collections.abc import Sequence
from typing import NamedTuple

import sentencepiece
import seqio
import tensorflow as tf

from t5x_lite.errors import UsageError
from tasks import cache, metrics, postprocessors, registration, sources, vocabularies

VOCAB_SIZE = 4096  # with pad, eos, unk and 100 sentinels
VALIDATION_PERCENT = 5
MIN_DOCUMENT_LENGTH = 200  # characters
MIN_NUM_DOCUMENTS = 200  # fewer means that the sources of the library are not installed

# Tests and programs that come with the library, not part of its documentation.
_SKIPPED_DIRECTORIES = {
    *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "turtledemo"),
}
_EXTRACTION_VERSION = 2  # to be raised with any change to what the documents are


# ---- the corpus ----------------------------------------------------------------------------------


class Part(NamedTuple):
    """A docstring, or a topic.

    Attributes:
      kind: "module", "class", "function" (methods too) or "topic".
      text: with line ends as in the source, less its indentation.
    """

    kind: str
    text: str


@functools.cache
def documents(split: str) -> tuple[str, ...]:
    """The documents of "train" or "validation", ordered by name.

    Reading the library takes some seconds, so the result is kept in the cache directory.

    Raises:
      UsageError: this Python comes without the sources of its standard library.
    """
    return tuple(_join(parts) for parts in _documents(split))


@functools.cache
def docstrings(split: str) -> tuple[Part, ...]:
    """The docstrings of which those documents are made, without the topics; no text twice.

    Raises:
      UsageError: as `documents`.
    """
    return tuple(part for parts in _documents(split) for part in parts if part.kind != "topic")


def _documents(split: str) -> list[list[Part]]:
    wanted = split == "validation"
    return [parts for name, parts in _all_documents() if _in_validation(name) == wanted]


def _join(parts: Sequence[Part]) -> str:
    return "\n\n".join(part.text for part in parts)


def _in_validation(name: str) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < VALIDATION_PERCENT


def _all_documents() -> list[tuple[str, list[Part]]]:
    """(name, parts) of every document."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    key = f"{_EXTRACTION_VERSION} {sys.version} {library}".encode()
    path = cache.cache_dir() / f"python_docs-{hashlib.sha256(key).hexdigest()[:16]}.json"
    if path.exists():
        kept = json.loads(path.read_bytes())
        return [(name, [Part(*part) for part in parts]) for name, parts in kept]
    found = extract(library)
    if len(found) < MIN_NUM_DOCUMENTS:
        raise UsageError(
            f"python_docs: only {len(found)} documents found under {library}; this Python comes "
            "without the sources of its standard library, use another one or text files"
        )
    cache.write(path, json.dumps(found).encode())
    return found


def extract(library: pathlib.Path) -> list[tuple[str, list[Part]]]:
    """(name, parts) of the modules under `library` and of the topics, ordered by name.

    Modules are parsed, not imported. Of equal docstrings, which occur in alternative
    implementations of one module, the first is taken, so that none is in both splits.
    """
    from pydoc_data.topics import topics  # 0.5 MB that only this needs

    found = [(f"topic:{name}", [Part("topic", inspect.cleandoc(t))]) for name, t in topics.items()]
    seen: set[str] = set()
    for directory, subdirectories, files in os.walk(library):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
        for file in sorted(f for f in files if f.endswith(".py")):
            path = pathlib.Path(directory, file)
            fresh = [part for part in _docstrings(path) if part.text not in seen]
            seen.update(part.text for part in fresh)
            name = ".".join(path.relative_to(library).with_suffix("").parts)
            found.append((f"module:{name}", fresh))
    return sorted((name, ps) for name, ps in found if len(_join(ps)) >= MIN_DOCUMENT_LENGTH)


def _docstrings(path: pathlib.Path) -> list[Part]:
    """The docstrings of a source file, each text once, in the order of the source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file for another Python
        return []
    kinds = {ast.Module: "module", ast.ClassDef: "class"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found: dict[str, Part] = {}
    for node in nodes:
        text = (ast.get_docstring(node) or "").strip()
        if text and text not in found:
            found[text] = Part(kinds.get(type(node), "function"), text)
    return list(found.values())


# ---- its vocabulary ------------------------------------------------------------------------------


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


# ---- supervised tasks ----------------------------------------------------------------------------

KINDS = ("class", "function", "module")


def kind_records(split: str) -> list[dict[str, str]]:
    """{"docstring", "kind"} of every docstring; `kind` is one of `KINDS`, methods are functions.

    The name of the object is not part of it: what its text says has to do.
    """
    return [{"docstring": part.text, "kind": part.kind} for part in docstrings(split)]


def summary_records(split: str) -> list[dict[str, str]]:
    """{"body", "summary"} of the docstrings that have both, as PEP 257 wants them.

    The summary is a first line with an empty line after it. Those that are a signature, as
    `join(a, *p) -> string`, or less than two words are left out.
    """
    records = []
    for part in docstrings(split):
        summary, _, body = part.text.partition("\n\n")
        is_signature = re.match(r"[\w.]+\(|.*->", summary)
        if body and " " in summary and "\n" not in summary and not is_signature:
            records.append({"body": inspect.cleandoc(body), "summary": summary})
    return records


def _cast(prefix: str, inputs: str, targets: str) -> registration.Preprocessor:
    """The field `inputs` after a prefix, as T5 has it, and the field `targets`."""

    def cast(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(
            lambda record: {"inputs": prefix + record[inputs], "targets": record[targets]},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    return cast


def _register_supervised() -> None:
    splits = ["train", "validation"]
    registration.register_supervised(
        "python_docs_kind",
        sources.RecordsSource(splits, kind_records, ["docstring", "kind"]),
        VOCABULARY,
        casts=[_cast("kind: ", "docstring", "kind")],
        metric_fns=[metrics.accuracy, metrics.mean_multiclass_f1(num_classes=len(KINDS))],
        postprocess_fn=postprocessors.ClassLabel(KINDS),
    )
    registration.register_supervised(
        "python_docs_summary",
        sources.RecordsSource(splits, summary_records, ["body", "summary"]),
        VOCABULARY,
        casts=[_cast("summarize: ", "body", "summary")],
        metric_fns=[metrics.rouge_mean],
    )
    seqio.MixtureRegistry.add(
        "python_docs_supervised", ["python_docs_kind", "python_docs_summary"], default_rate=1.0
    )


def register() -> None:
    """Registers `python_docs_span_corruption` and its siblings, and the supervised tasks."""
    source = sources.RecordsSource(
        ["train", "validation"],
        lambda split: [{"text": document} for document in documents(split)],
        ["text"],
    )
    registration.register_objectives("python_docs", source, VOCABULARY)
    _register_supervised()
