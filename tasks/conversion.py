"""Turns text and JSONL files into TFRecord shards of checked documents, once."""

import codecs
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence

import tensorflow as tf
from absl import logging

from t5x_lite.errors import UsageError
from tasks import cache, shards

SPLITS = ("train", "validation")
SHARD_BYTES = 64 << 20  # of text; many shards so that they can be shuffled and shared by hosts
_FORMAT_VERSION = 2  # to be raised with any change to a shard or its name
_JSON_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


@dataclasses.dataclass
class _Converted:
    """What became of one input file; written beside its shards when they are complete."""

    shards: dict[str, list[str]]
    num_documents: dict[str, int]
    num_corrupt: int = 0
    first_corrupt: str = ""  # "FILE line N: reason"


def match_files(pattern: str) -> list[str]:
    """The files that match a glob, sorted; directories are left out."""
    if "://" in pattern:
        matched = tf.io.gfile.glob(pattern)
        return sorted(file for file in matched if not tf.io.gfile.isdir(file))
    matched = glob.glob(os.path.expanduser(pattern), recursive=True)
    return sorted(file for file in matched if os.path.isfile(file))


def convert(
    inputs: Sequence[tuple[str, float]], field: str | None, skip_corrupt_lines: bool
) -> dict[str, shards.Split]:
    """Converts the files that are not converted yet.

    Args:
      inputs: (file, share of its documents that goes to validation).
      field: the field of a JSONL line that holds the text; None for plain text.
      skip_corrupt_lines: count and log corrupt lines instead of raising.

    Raises:
      UsageError: there are corrupt lines, with the first of them and their number, or a file
        cannot be read, or it is JSONL and `field` is None.
    """
    converted = [_convert_once(file, field, share) for file, share in inputs]
    corrupt = [c for c in converted if c.num_corrupt]
    num_corrupt = sum(c.num_corrupt for c in corrupt)
    if num_corrupt:
        count = f"{num_corrupt} corrupt line{'s' if num_corrupt > 1 else ''} in all"
        message = f"{corrupt[0].first_corrupt} ({count})"
        if not skip_corrupt_lines:
            raise UsageError(f"{message}; TEXT_FILES_SKIP_CORRUPT_LINES=True leaves them out")
        logging.warning("Left out: %s", message)
    return {
        split: shards.Split(
            shards=tuple(shard for c in converted for shard in c.shards[split]),
            num_examples=sum(c.num_documents[split] for c in converted),
        )
        for split in SPLITS
    }


# ---- one file ------------------------------------------------------------------------------------


def _convert_once(file: str, field: str | None, validation_share: float) -> _Converted:
    """Converts a file, unless that is done: the summary, written last, says so."""
    if field is None and file.lower().endswith(_JSON_SUFFIXES):
        raise UsageError(
            f"{file} is JSON lines by its name: TEXT_FILES_FIELD must name the field with the text"
        )
    try:
        stat = tf.io.gfile.stat(file)
    except tf.errors.OpError as e:
        raise UsageError(f"{file} cannot be read: {e.message}") from e
    where = file if "://" in file else os.path.abspath(file)
    settings = (_FORMAT_VERSION, where, stat.length, stat.mtime_nsec, field, validation_share)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    directory = cache.cache_dir() / "text_files"
    summary = directory / f"{key}.json"
    if summary.exists():
        kept = _Converted(**json.loads(summary.read_bytes()))
        if all(os.path.exists(shard) for paths in kept.shards.values() for shard in paths):
            return kept
    logging.info("Reading %s", file)
    writers = {split: shards.ShardWriter(directory) for split in SPLITS}
    converted = _Converted(shards={}, num_documents={})
    try:
        for number, line in _lines(file):
            text, problem = _parse(line, field)
            if problem:
                converted.num_corrupt += 1
                converted.first_corrupt = (
                    converted.first_corrupt or f"{file} line {number}: {problem}"
                )
            elif text:
                writer = writers[_split_of(text, validation_share)]
                writer.write(text)
                if writer.shard_bytes >= SHARD_BYTES:
                    writer.end_shard()
        for split, writer in writers.items():
            converted.shards[split] = writer.finish()
            converted.num_documents[split] = writer.num_records
    finally:
        for writer in writers.values():
            writer.discard()
    cache.write(summary, json.dumps(dataclasses.asdict(converted)).encode())
    return converted


def _split_of(text: bytes, validation_share: float) -> str:
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < validation_share * 2**64]


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of a file, unpacked if it is gzip."""
    try:
        with tf.io.gfile.GFile(file, "rb") as f:
            is_gzip = f.read(2) == b"\x1f\x8b"
        with tf.io.gfile.GFile(file, "rb") as f:
            stream: Iterable[bytes] = f
            if is_gzip:
                stream = io.BufferedReader(gzip.GzipFile(fileobj=f))
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error, tf.errors.OpError) as e:
        raise UsageError(f"{file} cannot be read: {str(e).splitlines()[0]}") from e


def _parse(line: bytes, field: str | None) -> tuple[bytes, str]:
    """(text, "") of a line, or (b"", what is wrong with it). A blank line is an empty text."""
    try:
        decoded = line.decode()
    except UnicodeDecodeError as e:
        return b"", f"not valid UTF-8 (byte {e.start})"
    if field is None or not decoded.strip():
        return decoded.strip().encode(), ""
    try:
        record = json.loads(decoded)
    except ValueError as e:
        return b"", f"not valid JSON ({e})"
    except RecursionError:
        return b"", "not readable JSON (nested too deeply)"
    if not isinstance(record, dict):
        return b"", f"a JSON {type(record).__name__}, not an object"
    if field not in record:
        return b"", f"no field {field!r} (fields: {', '.join(map(repr, record)) or 'none'})"
    if not isinstance(record[field], str):
        return b"", f"field {field!r} is not a string but {type(record[field]).__name__}"
    try:
        return record[field].strip().encode(), ""
    except UnicodeEncodeError:
        return b"", f"field {field!r} has half of a surrogate pair"
