"""Columns of a table as tf.train.Examples, and back as tensors.

Reading back needs TensorFlow alone: pyarrow is imported only where a table is written.
"""

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from t5x_lite.errors import UsageError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

_ROW = "\0row"  # the place of a row among those of its shard; no column has such a name
_WHOLE = 2**31  # more records than a shard has
_DTYPES = {"string": tf.string, "int": tf.int64, "float": tf.float32, "bool": tf.int64}
_MAX_INT64 = 2**63 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Field:
    """What a column holds.

    Attributes:
      kind: "string" (bytes too), "int", "float" or "bool".
      is_list: whether each row has any number of them.
    """

    kind: str
    is_list: bool

    def __str__(self) -> str:
        return f"list of {self.kind}" if self.is_list else self.kind


def select(names: Sequence[str], columns: Sequence[str] | None, where: str) -> list[str]:
    """The names of the columns to read: `columns` in their order, or all of them.

    Args:
      names: of the table's columns.
      columns: those asked for; None is all.
      where: what the table is, for messages.

    Raises:
      UsageError: the table has no such column, or two of one name, or none at all.
    """
    for name in columns if columns is not None else ():
        if name not in names:
            raise UsageError(f"{where} has no column {name!r}; {nearest(name, map(str, names))}")
    selected = list(names if columns is None else columns)
    if not selected:
        raise UsageError(f"{where} has no columns")
    for name in selected:
        if names.count(name) > 1:
            raise UsageError(f"{where} has {names.count(name)} columns of the name {name!r}")
    return selected


def fields_of(schema: "pa.Schema", where: str) -> dict[str, Field]:
    """What the columns hold.

    Raises:
      UsageError: a column is of a type that an example cannot hold.
    """
    import pyarrow as pa

    found = {}
    for column in schema:
        if pa.types.is_null(column.type):
            raise UsageError(f"{where}: column {column.name!r} has no values")
        field = _field_of(column.type)
        if field is None:
            raise UsageError(
                f"{where}: column {column.name!r} is of type {column.type}; an example holds "
                "strings, bytes, integers, floats, bools, or lists of one of these "
                "(columns=[...] of TableSource chooses the columns to read)"
            )
        found[column.name] = field
    return found


def _field_of(arrow_type: "pa.DataType") -> Field | None:
    from pyarrow import types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    is_list = any(is_kind(arrow_type) for is_kind in lists)
    if is_list:
        arrow_type = arrow_type.value_type
    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    kinds = {
        "string": (
            *(types.is_string, types.is_large_string, types.is_string_view),
            *(types.is_binary, types.is_large_binary, types.is_binary_view),
            types.is_fixed_size_binary,
        ),
        "int": (types.is_integer,),
        "float": (types.is_floating,),
        "bool": (types.is_boolean,),
    }
    for kind, tests in kinds.items():
        if any(is_kind(arrow_type) for is_kind in tests):
            return Field(kind, is_list)
    return None


# ---- writing -------------------------------------------------------------------------------------


def to_examples(
    batch: "pa.RecordBatch | pa.Table", fields: Mapping[str, Field], first_row: int, where: str
) -> Iterator[tf.train.Example]:
    """The rows of a batch, each a feature per column; a scalar is a feature of one value.

    Args:
      batch: with the columns of `fields`.
      fields: from `fields_of`.
      first_row: the number of the batch's first row, from 0, for messages.
      where: what the table is, for messages.

    Raises:
      UsageError: a value is missing, is not valid UTF-8, or is beyond int64 or float32.
    """
    columns = []
    for name, field in fields.items():
        try:
            columns.append((name, field, batch.column(name).to_pylist()))
        except UnicodeDecodeError as e:
            row = first_row + _first_undecodable(batch.column(name))
            raise UsageError(
                f"{where} row {row} (from 0): column {name!r} is not valid UTF-8"
            ) from e
    for i in range(batch.num_rows):
        example = tf.train.Example()
        for name, field, rows in columns:
            try:
                values = rows[i] if field.is_list else (rows[i],)
                _ADD[field.kind](example.features.feature[name], values)
            except (AttributeError, OverflowError, TypeError, ValueError, struct.error) as e:
                raise UsageError(
                    f"{where} row {first_row + i} (from 0): column {name!r} "
                    + _problem(rows[i], field.is_list)
                ) from e
        yield example


def _add_strings(feature: tf.train.Feature, values: Sequence[str | bytes]) -> None:
    encoded = [v if isinstance(v, bytes) else v.encode() for v in values]
    feature.bytes_list.value.extend(encoded)


def _add_integers(feature: tf.train.Feature, values: Sequence[int]) -> None:
    feature.int64_list.value.extend(values)


def _add_floats(feature: tf.train.Feature, values: Sequence[float]) -> None:
    struct.pack(f"<{len(values)}f", *values)  # raises where protobuf would make it infinite
    feature.float_list.value.extend(values)


_ADD: Mapping[str, Callable[[tf.train.Feature, Any], None]] = {
    "string": _add_strings,
    "int": _add_integers,
    "float": _add_floats,
    "bool": lambda feature, values: _add_integers(feature, [int(v) for v in values]),
}


def _problem(value: Any, is_list: bool) -> str:
    """Why a value could not be added."""
    if value is None or (is_list and None in value):
        part = "has no value" if value is None else "has a list without one of its values"
        return f"{part} (null); fill it or leave the row out before it is read here"
    values = value if is_list else [value]
    if isinstance(values[0], int):
        return f"is {next(v for v in values if v > _MAX_INT64)}, more than int64 holds"
    return f"is {next(v for v in values if abs(v) > _MAX_FLOAT32)}, more than float32 holds"


def _first_undecodable(column: "pa.Array | pa.ChunkedArray") -> int:
    for i, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return i
    raise AssertionError("all of the column is valid UTF-8")


# ---- reading -------------------------------------------------------------------------------------


def set_row(example: tf.train.Example, row: int) -> None:
    """Numbers an example of a shard, so that `in_order` can put it in its place."""
    example.features.feature[_ROW].int64_list.value[:] = [row]


def in_order(shard: tf.Tensor) -> tf.data.Dataset:
    """The records (string []) of a shard (path, string []) by the numbers of `set_row`."""

    def sort(records: tf.Tensor) -> tf.Tensor:
        row = {_ROW: tf.io.FixedLenFeature([], tf.int64)}
        return tf.gather(records, tf.argsort(tf.io.parse_example(records, row)[_ROW]))

    return tf.data.TFRecordDataset(shard).batch(_WHOLE).map(_without_autograph(sort)).unbatch()


def parse(records: tf.data.Dataset, fields: Mapping[str, Field]) -> tf.data.Dataset:
    """Serialised examples (string []) -> {column: string, int64, float32 or bool, [] or [n]}."""
    features = {
        name: tf.io.RaggedFeature(_DTYPES[field.kind])
        if field.is_list
        else tf.io.FixedLenFeature([], _DTYPES[field.kind])
        for name, field in fields.items()
    }

    def parse_many(serialised: tf.Tensor) -> dict[str, tf.Tensor]:
        parsed = tf.io.parse_example(serialised, features)
        for name, field in fields.items():
            if field.kind == "bool":
                parsed[name] = tf.cast(parsed[name], tf.bool)
        return {name: parsed[name] for name in fields}

    # Many at once: five times as fast as one by one.
    examples = records.batch(64).map(
        _without_autograph(parse_many), num_parallel_calls=tf.data.AUTOTUNE
    )
    examples = examples.unbatch()
    if any(field.is_list for field in fields.values()):
        # A row of a ragged tensor is a plain tensor again.
        examples = examples.map(_without_autograph(lambda example: example))
    return examples


_without_autograph = tf.autograph.experimental.do_not_convert
