"""What `infer` reads: lines of text, TSV or JSONL files, as they are or gzip, and their ids."""

import codecs
import glob
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from etils import epath

from t5x_lite.errors import UsageError, nearest

FORMATS = ("text", "tsv", "jsonl")

_FORMAT_OF_SUFFIX = {
    ".txt": "text",
    ".text": "text",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
}
_GZIP = b"\x1f\x8b"
_CHUNK = 1024  # rows that are spelled at a time

# What infer writes; an input's own field of such a name is kept as `input_<name>`.
_WRITTEN = frozenset(
    {"inputs", "prediction", "predictions", "score", "scores", "truncated", "targets_truncated"}
)


class Row(NamedTuple):
    """One line.

    Attributes:
      fields: what the line has, by name; empty for plain text.
      text: what the model is to read.
      target: what it is to score; None if it generates.
    """

    fields: dict[str, Any]
    text: str
    target: str | None


class FileInputs:
    """The lines of one file or several, in the order of the files' names."""

    def __init__(
        self,
        pattern: str,
        *,
        file_format: str | None = None,
        field: str | None = None,
        target_field: str | None = None,
    ):
        """Lists the files; reads nothing.

        Args:
          pattern: a file or a glob, local (`**` for any depth) or of an object store.
          file_format: one of FORMATS; None goes by each file's suffix, `.gz` left aside.
          field: JSONL: the field with the text. TSV: a column's name, the first line of each file
            being the header; or its number from 0, where no file has a header.
          target_field: the same for the text to score; None if there is none.

        Raises:
          UsageError: no file matches, a format is not known, or a field is missing or too much.
        """
        if file_format is not None and file_format not in FORMATS:
            raise UsageError(f"--format={file_format}: {nearest(file_format, FORMATS)}")
        self._field, self._target_field = field, target_field
        self._files = [(file, file_format or _format_of(file)) for file in _match_files(pattern)]
        for file, found in self._files:
            if found == "text" and (field is not None or target_field is not None):
                flag = f"--field={field}" if field is not None else f"--score={target_field}"
                raise UsageError(f"{flag}: {file} is plain text, which has no fields")
            if found != "text" and field is None:
                what = "field" if found == "jsonl" else "column"
                raise UsageError(f"{file} is {found}: give --field, the {what} with the text")
            is_number = [name.isdecimal() for name in (field, target_field) if name is not None]
            if found == "tsv" and any(is_number) and not all(is_number):
                raise UsageError(
                    f"--field={field} --score={target_field}: give two names of a header, or two "
                    "numbers"
                )

    @property
    def files(self) -> list[str]:
        """The files, in their order."""
        return [file for file, _ in self._files]

    def scan(self) -> tuple[int, str]:
        """Reads and checks every line.

        Returns:
          The number of rows (a header is none), and a digest of all lines and their formats.

        Raises:
          UsageError: a file cannot be read, or a line is not what it should be: file and line; or
            there is none.
        """
        digest = hashlib.sha256()
        count = sum(1 for _ in self._walk(0, None, digest))
        if not count:
            more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
            raise UsageError(f"--input: {self.files[0]}{more}: empty, there is no line to read")
        return count, digest.hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows `start` <= i < `stop`; raises UsageError as `scan` does."""
        return self._walk(start, stop, None)

    def _walk(self, start: int, stop: int | None, digest: Any) -> Iterator[Row]:
        index = 0
        for file, found in self._files:
            parser = self._parser(file, found)
            if digest:
                digest.update(f"{found}\n".encode())
            for number, line in _lines(file):
                if digest:
                    digest.update(line + b"\n")
                if number == 1 and parser.takes_header(line):
                    continue
                if stop is not None and index >= stop:
                    return
                if index >= start:
                    yield parser.parse(number, line)
                index += 1

    def _parser(self, file: str, found: str) -> "_Parser":
        if found == "text":
            return _TextParser(file)
        assert self._field is not None
        if found == "tsv":
            return _TsvParser(file, self._field, self._target_field)
        return _JsonParser(file, self._field, self._target_field)


# ---- files ---------------------------------------------------------------------------------------


def _format_of(file: str) -> str:
    path = pathlib.PurePosixPath(file.lower().removesuffix(".gz"))
    found = _FORMAT_OF_SUFFIX.get(path.suffix)
    if found is None:
        raise UsageError(
            f"{file}: its name does not tell its format; give --format={', '.join(FORMATS[:-1])} "
            f"or {FORMATS[-1]}"
        )
    return found


def _match_files(pattern: str) -> list[str]:
    if "://" in pattern:
        if "**" in pattern:
            raise UsageError(f"--input={pattern}: `**` is not looked for in an object store")
        root, *rest = epath.Path(pattern).parts
        head = list(_until_wildcard(rest))
        base, tail = epath.Path(root).joinpath(*head), rest[len(head) :]
        found = base.glob("/".join(tail)) if tail else [base] if base.is_file() else []
        matched = sorted(os.fspath(path) for path in found if not path.is_dir())
    else:
        pattern = os.path.expanduser(pattern)
        names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        matched = sorted(name for name in names if os.path.isfile(name))
    if not matched:
        raise UsageError(f"--input={pattern}: there is no such file")
    return matched


def _until_wildcard(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of a file, unpacked if it is gzip."""
    number = 0
    try:
        with epath.Path(file).open("rb") as f:
            is_gzip = f.read(2) == _GZIP
            f.seek(0)
            stream: Iterable[bytes] = gzip.GzipFile(fileobj=f) if is_gzip else f
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.removesuffix(b"\n").removesuffix(b"\r")
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise UsageError(f"{file} cannot be read after line {number}: {reason}") from e


# ---- lines ---------------------------------------------------------------------------------------


class _Parser(Protocol):
    """Makes rows of the lines of one file; raises UsageError naming file and line."""

    def takes_header(self, line: bytes) -> bool:
        """True if the file's first line is a header, which is then kept."""

    def parse(self, number: int, line: bytes) -> Row:
        """The row of a line."""


class _TextParser:
    def __init__(self, file: str):
        self._file = file

    def takes_header(self, line: bytes) -> bool:
        return False

    def parse(self, number: int, line: bytes) -> Row:
        return Row({}, _decode(self._file, number, line), None)


class _TsvParser:
    """Cells between tabs; there are no quotes."""

    def __init__(self, file: str, field: str, target_field: str | None):
        self._file = file
        self._wanted = (field, target_field)
        self._header: list[str] | None = None
        self._columns = (-1, -1)

    def takes_header(self, line: bytes) -> bool:
        field, target_field = self._wanted
        if field.isdecimal():
            self._columns = (int(field), int(target_field) if target_field else -1)
            return False
        header = _decode(self._file, 1, line).split("\t")
        for name in self._wanted:
            if name is not None and name not in header:
                raise UsageError(
                    f"{self._file} line 1: the header has no column {name!r}; "
                    f"{nearest(name, header)} (a number counts columns of a file without header)"
                )
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UsageError(f"{self._file} line 1: the header has {twice!r} twice")
        self._columns = (header.index(field), header.index(target_field) if target_field else -1)
        self._header = header
        return True

    def parse(self, number: int, line: bytes) -> Row:
        cells = _decode(self._file, number, line).split("\t")
        column, target_column = self._columns
        if self._header is not None and len(cells) != len(self._header):
            raise UsageError(
                f"{self._file} line {number}: {len(cells)} columns, but the header has "
                f"{len(self._header)}"
            )
        if max(self._columns) >= len(cells):
            raise UsageError(
                f"{self._file} line {number}: no column {max(self._columns)}, there are "
                f"{len(cells)}, counted from 0"
            )
        names = self._header or [f"column_{i}" for i in range(len(cells))]
        target = cells[target_column] if target_column >= 0 else None
        return Row(dict(zip(names, cells, strict=True)), cells[column], target)


class _JsonParser:
    def __init__(self, file: str, field: str, target_field: str | None):
        self._file = file
        self._field, self._target_field = field, target_field

    def takes_header(self, line: bytes) -> bool:
        return False

    def parse(self, number: int, line: bytes) -> Row:
        where = f"{self._file} line {number}"
        text = _decode(self._file, number, line)
        try:
            record = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as e:
            raise UsageError(f"{where}: not valid JSON ({e.msg}, column {e.colno})") from e
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{where}: not readable JSON ({e})") from e
        if not isinstance(record, dict):
            raise UsageError(f"{where}: a JSON {type(record).__name__}, not an object")
        target = self._target_field and self._string(where, record, self._target_field)
        return Row(record, self._string(where, record, self._field), target)

    def _string(self, where: str, record: dict[str, Any], field: str) -> str:
        if field not in record:
            raise UsageError(f"{where}: no field {field!r}; {nearest(field, record)}")
        value = record[field]
        if not isinstance(value, str):
            raise UsageError(f"{where}: field {field!r} is not a string but {type(value).__name__}")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UsageError(f"{where}: field {field!r} has half of a surrogate pair")
        return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _decode(file: str, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        raise UsageError(f"{file} line {number}: not valid UTF-8 (byte {e.start})") from e


# ---- ids -----------------------------------------------------------------------------------------


class Example(NamedTuple):
    """An input as the model takes it.

    Attributes:
      record: what its output line begins with.
      inputs: int32 ids, end mark included.
      targets: the same of what is to be scored; None if nothing is.
    """

    record: dict[str, Any]
    inputs: np.ndarray
    targets: np.ndarray | None


class Source(Protocol):
    """Examples in an order that is the same each time."""

    def scan(self) -> tuple[int, str]:
        """Goes through all: their number and a digest; raises UsageError for what is wrong."""

    def examples(self, start: int, stop: int) -> Iterator[Example]:
        """Those from `start` to before `stop`."""


class FileSource:
    """Rows of files, as a vocabulary spells them."""

    def __init__(
        self, inputs: FileInputs, vocabulary: Any, lengths: tuple[int, int], prefix: str = ""
    ):
        """
        Args:
          inputs: the rows.
          vocabulary: a `seqio.Vocabulary`.
          lengths: ids of inputs and of targets at most, end mark included; longer ones are cut.
          prefix: put before each text.
        """
        self._inputs, self._vocabulary = inputs, vocabulary
        self._lengths, self._prefix = lengths, prefix

    def scan(self) -> tuple[int, str]:
        return self._inputs.scan()

    def examples(self, start: int, stop: int) -> Iterator[Example]:
        rows = self._inputs.rows(start, stop)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            texts = [self._prefix + row.text for row in chunk]
            inputs = encode(self._vocabulary, texts, self._lengths[0])
            wanted = [row.target for row in chunk if row.target is not None]
            targets: Sequence[Any] = encode(self._vocabulary, wanted, self._lengths[1])
            if not wanted:
                targets = [(None, False)] * len(chunk)
            for row, text, (ids, is_cut), (target_ids, target_is_cut) in zip(
                chunk, texts, inputs, targets, strict=True
            ):
                record = own_fields(row.fields, text) | {"inputs": text}
                if is_cut:
                    record["truncated"] = True
                if target_is_cut:
                    record["targets_truncated"] = True
                yield Example(record, ids, target_ids)


def encode(vocabulary: Any, texts: Sequence[str], length: int) -> list[tuple[np.ndarray, bool]]:
    """Ids of each text with the end mark, at most `length`, and whether it was cut for that."""
    pieces = getattr(vocabulary, "tokenizer", None)  # SentencePiece; bytes have none
    encoder: Callable[[Any], Any] = pieces.EncodeAsIds if pieces else _one_by_one(vocabulary)
    return [
        (np.asarray([*ids[: length - 1], vocabulary.eos_id], np.int32), len(ids) >= length)
        for ids in encoder(list(texts))
    ]


def _one_by_one(vocabulary: Any) -> Callable[[Sequence[str]], list[Sequence[int]]]:
    return lambda texts: [vocabulary.encode(text) for text in texts]


def own_fields(fields: Mapping[str, Any], text: str) -> dict[str, Any]:
    """An input's fields, those with a name that infer writes as `input_<name>`.

    Its "inputs" are left out if they are the very text that infer writes as "inputs".
    """
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "inputs" and value == text:
            continue
        own = name
        while own in _WRITTEN or (own != name and own in fields):
            own = f"input_{own}"
        kept[own] = value
    return kept
