"""Tasks over tables: Parquet files, pandas DataFrames, data sets of Hugging Face's `datasets`.

A table is converted to TFRecord shards on first use and kept in the cache directory. Training
reads those with tf.data alone, whose iterator can be saved and which hosts can share; of a Parquet
file that is unchanged, the library that wrote or reads it is not even loaded again.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from t5x_lite.errors import UsageError
from tasks import cache, columns, conversion, shards

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW_BYTES = 64 << 20  # of examples that are shuffled in memory and then make a shard
_BATCH_ROWS = 500
_NUM_PLACES = 64  # of a shuffled table that are read at a time
_FORMAT_VERSION = 2  # to be raised with any change to a shard or its name
_EXTRA = ("datasets", "pandas", "pyarrow")
_NO_SPLITS = "TableSource takes a dict of splits, {{'train': TABLE, ...}}; found {}"


class TableSource(shards.ShardSource):
    """Examples {column: value} from tables.

    A value is a scalar or, of a column of lists, [n]: strings and bytes are `tf.string`, integers
    int64, floats float32, bools bool. Categories are the strings (or numbers) they stand for;
    a `ClassLabel` of `datasets` is its integer. With `shuffle`, rows come in random order however
    the table is sorted (one of over 4 GB: from 64 places at a time); without, in the table's.
    """

    def __init__(self, splits: Mapping[str, Any], columns: Sequence[str] | None = None) -> None:
        """Nothing is read before it is used.

        Args:
          splits: the table of each split: a Parquet file, a glob or a list of these; a pandas
            DataFrame; a `datasets.Dataset` or `datasets.IterableDataset`; or a function without
            arguments that returns one of these, which is called once in each process. A
            `datasets.DatasetDict` is such a mapping.
          columns: those to read; None is all. A column that is left out may hold anything.

        Using it raises UsageError if a file is missing or cannot be read, a column is unknown or of
        a type that an example cannot hold, a value is missing, or the table has no rows.

        Raises:
          UsageError: `splits` is not a dict or is empty, or `columns` is one string.
        """
        if not isinstance(splits, Mapping):
            raise UsageError(_NO_SPLITS.format(type(splits).__name__))
        if not splits:
            raise UsageError(_NO_SPLITS.format("an empty one"))
        if isinstance(columns, str):
            raise UsageError(f"TableSource: columns is {columns!r}; give a list, [{columns!r}]")
        super().__init__(splits=splits)
        self._tables = dict(splits)
        self._columns = None if columns is None else list(columns)
        self._converted: dict[str, _Converted] = {}

    def prepare(self, split: str) -> shards.Split:
        converted = self._convert(split)
        return shards.Split(tuple(converted.shards), converted.num_rows)

    def read(self, files: tf.data.Dataset, split: str, shuffle: bool) -> tf.data.Dataset:
        if shuffle:
            records = shards.interleave(files, _NUM_PLACES, block_length=1)
        else:
            records = files.flat_map(columns.in_order)
        return columns.parse(records, self._convert(split).fields)

    def _convert(self, split: str) -> "_Converted":
        if split not in self._converted:
            self._converted[split] = _convert(split, self._tables[split], self._columns)
        return self._converted[split]


# ---- a split -------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A file of a table, or a table that is one whole.

    Attributes:
      where: what it is, for messages.
      key: what its content is known by; None: only reading all of it tells.
      batches: its rows, the chosen columns of them in their order.
    """

    where: str
    key: tuple[object, ...] | None
    batches: Callable[[], Iterator["pa.RecordBatch | pa.Table"]]


@dataclasses.dataclass
class _Converted:
    """What became of a table, or of a part; of a part, kept beside its shards."""

    fields: dict[str, columns.Field]  # empty if there are no rows
    shards: list[str]
    num_rows: int


def _convert(split: str, table: Any, names: list[str] | None) -> _Converted:
    """Converts the parts of a table that are not converted yet."""
    whole = _Converted({}, [], 0)
    first = ""
    for part in _parts(split, table, names):
        converted = _convert_once(part, names)
        if converted.num_rows and not whole.num_rows:
            whole.fields, first = converted.fields, part.where
        elif converted.num_rows:
            _check_same(whole.fields, first, converted.fields, part.where)
        whole.shards += converted.shards
        whole.num_rows += converted.num_rows
    if not whole.num_rows:
        given = f" ({table})" if _is_path(table) else ""
        raise UsageError(f"split {split!r} of the table{given} has no rows")
    return whole


def _check_same(
    fields: Mapping[str, columns.Field],
    where: str,
    others: Mapping[str, columns.Field],
    elsewhere: str,
) -> None:
    for name in {**fields, **others}:
        one, other = fields.get(name, "nothing"), others.get(name, "nothing")
        if one != other:
            raise UsageError(
                f"column {name!r} differs: {one} in {where} and {other} in {elsewhere}"
            )


# ---- what is given -------------------------------------------------------------------------------


def _parts(split: str, table: Any, names: list[str] | None) -> Iterator[_Part]:
    if callable(table):
        _check_no_arguments(split, table)
        with _needs_extra(f"split {split!r}"):
            table = table()
    if _is_path(table):
        table = [table]
    if isinstance(table, list | tuple) and table and all(map(_is_path, table)):
        for pattern in table:
            for file in _match(split, os.fspath(pattern)):
                yield _parquet_part(file, names)
    elif _is(table, "pandas", "DataFrame"):
        yield _frame_part(table, names, f"the DataFrame of split {split!r}")
    elif _is(table, "datasets", "Dataset", "IterableDataset"):
        yield _dataset_part(table, names, f"the data set of split {split!r}")
    else:
        raise UsageError(
            f"split {split!r} of the table is {type(table).__name__}; it must be a Parquet file, a "
            "glob or a list of these, a pandas DataFrame, a Dataset or IterableDataset of "
            "`datasets`, or a function that returns one"
        )


def _check_no_arguments(split: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a C function
        return
    try:
        signature.bind()
    except TypeError as e:
        name = getattr(function, "__name__", "load")
        raise UsageError(
            f"split {split!r} of the table: {name} is called without arguments, but {e}; "
            f"give `lambda: {name}({split!r})`, or a function that takes none"
        ) from e


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _is(value: Any, library: str, *names: str) -> bool:
    """isinstance, without importing the library."""
    classes = type(value).__mro__
    return any(c.__module__.partition(".")[0] == library and c.__name__ in names for c in classes)


@contextlib.contextmanager
def _needs_extra(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        library = (e.name or "").partition(".")[0]
        if library not in _EXTRA:
            raise
        raise UsageError(f"reading {what} needs {library}: pip install 't5x_lite[tables]'") from e


def _match(split: str, pattern: str) -> list[str]:
    matched = conversion.match_files(pattern)
    if not matched:
        is_directory = tf.io.gfile.isdir(os.path.expanduser(pattern))
        hint = f"; of a directory, give '{pattern.rstrip('/')}/*.parquet'" if is_directory else ""
        raise UsageError(f"split {split!r} of the table: {pattern!r} matches no file{hint}")
    return matched


def _parquet_part(file: str, names: list[str] | None) -> _Part:
    try:
        stat = tf.io.gfile.stat(file)
    except tf.errors.OpError as e:
        raise UsageError(f"{file} cannot be read: {e.message}") from e
    where = file if "://" in file else os.path.abspath(file)
    key = ("parquet", where, stat.length, stat.mtime_nsec)

    def batches() -> Iterator["pa.RecordBatch"]:
        with _needs_extra("Parquet"):
            import pyarrow as pa
            from pyarrow import parquet
        try:
            source = _RemoteFile(file) if "://" in file else file
            # A row group can be any size: its pages are read as they are needed.
            with parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20) as opened:
                selected = columns.select(opened.schema_arrow.names, names, file)
                for batch in opened.iter_batches(_BATCH_ROWS, columns=selected):
                    yield batch.select(selected)
        except (pa.ArrowException, OSError, tf.errors.OpError) as e:
            reason = str(e).splitlines()[0]
            raise UsageError(f"{file} cannot be read as Parquet: {reason}") from e

    return _Part(file, key, batches)


class _RemoteFile(io.RawIOBase):
    """A file of an object store, as TensorFlow reaches it, with the methods of Python's files."""

    def __init__(self, path: str) -> None:
        self._file = tf.io.gfile.GFile(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _frame_part(frame: Any, names: list[str] | None, where: str) -> _Part:
    with _needs_extra("a DataFrame"):
        import pyarrow as pa
    chosen = frame[columns.select(list(frame.columns), names, where)]
    try:
        table = pa.Table.from_pandas(chosen, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as e:
        raise UsageError(f"{where}: {_frame_problem(chosen) or e.args[0]}") from e
    digest = _Digest()
    with pa.ipc.new_stream(pa.PythonFile(digest, "w"), table.schema) as stream:
        stream.write_table(table)
    key = ("pandas", digest.hexdigest())
    return _Part(where, key, lambda: iter(table.to_batches(_BATCH_ROWS)))


def _frame_problem(frame: Any) -> str | None:
    """The first column that Arrow cannot hold, and why."""
    import pyarrow as pa

    for name in frame.columns:
        try:
            pa.array(frame[name], from_pandas=True)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as e:
            kinds = dict.fromkeys(type(value).__name__ for value in frame[name].dropna())
            if len(kinds) > 1:
                return f"column {name!r} holds {' and '.join(kinds)}; make it one type"
            return f"column {name!r}: {e.args[0]}"
    return None


def _dataset_part(dataset: Any, names: list[str] | None, where: str) -> _Part:
    fingerprint = getattr(dataset, "_fingerprint", None)  # a stream has none
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise UsageError(
            f"{where} has a transform that is applied when a row is read, which is not done here: "
            "use .map(...) instead of .with_transform(...)"
        )

    def batches() -> Iterator["pa.Table"]:
        for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
            yield table.select(columns.select(table.column_names, names, where))

    return _Part(where, fingerprint and ("datasets", fingerprint), batches)


class _Digest:
    """A file that keeps the digest of what is written to it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.closed = False

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


# ---- a part --------------------------------------------------------------------------------------


def _convert_once(part: _Part, names: list[str] | None) -> _Converted:
    """Converts a part, unless that is done: the summary, written last, says so."""
    directory = cache.cache_dir() / "tables"
    summary = None if part.key is None else directory / f"{_digest(part.key, names)}.json"
    kept = _kept(summary)
    if kept is not None:
        return kept
    logging.info("Converting %s", part.where)
    writer = shards.ShardWriter(directory)
    try:
        fields = _write(part, writer)
        converted = _Converted(fields, writer.finish(), writer.num_records)
    finally:
        writer.discard()
    if summary is not None:
        cache.write(summary, json.dumps(dataclasses.asdict(converted)).encode())
    return converted


def _digest(key: tuple[object, ...], names: list[str] | None) -> str:
    settings = (_FORMAT_VERSION, key, names)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def _kept(summary: pathlib.Path | None) -> _Converted | None:
    if summary is None or not summary.exists():
        return None
    kept = json.loads(summary.read_bytes())
    if not all(map(os.path.exists, kept["shards"])):
        return None
    fields = {name: columns.Field(**field) for name, field in kept.pop("fields").items()}
    return _Converted(fields, **kept)


def _write(part: _Part, writer: shards.ShardWriter) -> dict[str, columns.Field]:
    """Writes all rows; returns what the columns hold."""
    fields: dict[str, columns.Field] = {}
    window: list[bytes] = []
    window_bytes = num_rows = 0

    def end_window() -> None:
        for i in np.random.default_rng(0).permutation(len(window)).tolist():
            writer.write(window[i])
        writer.end_shard(repr(fields))
        window.clear()

    for batch in part.batches():
        if not batch.num_rows:
            continue
        found = columns.fields_of(batch.schema, part.where)
        fields = fields or found
        _check_same(fields, f"the first rows of {part.where}", found, f"row {num_rows}")
        for example in columns.to_examples(batch, fields, num_rows, part.where):
            columns.set_row(example, len(window))
            window.append(example.SerializeToString(deterministic=True))
            window_bytes += len(window[-1])
            if window_bytes >= WINDOW_BYTES:
                end_window()
                window_bytes = 0
        num_rows += batch.num_rows
    end_window()
    return fields
