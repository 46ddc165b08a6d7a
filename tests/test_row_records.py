"""Rows as records: what comes back is what the stream has, bit for bit."""

import struct

import numpy as np
import pytest
import tensorflow as tf

from t5x_lite import packing, row_records

LENGTHS = {"inputs": 9, "targets": 6}


def examples(count: int) -> list[dict[str, list[int]]]:
    """Of every length, with zeros in them and empty ones among them."""
    rng = np.random.default_rng(0)
    return [
        {name: rng.integers(0, 40, rng.integers(0, n + 1)).tolist() for name, n in LENGTHS.items()}
        for _ in range(count)
    ]


def streamed(found: list[dict[str, list[int]]], *, pack: bool) -> dict[str, np.ndarray]:
    """The rows that training without a cache would see."""
    spec = {name: tf.TensorSpec([None], tf.int32) for name in LENGTHS}
    dataset = tf.data.Dataset.from_generator(lambda: iter(found), output_signature=spec)
    rows = list(packing.model_features(dataset, LENGTHS, pack=pack).as_numpy_iterator())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "not packed"])
def test_rows_come_back_as_they_were(dtype, pack):
    expected = streamed(examples(300), pack=pack)
    assert len(expected["encoder_input_tokens"]) > 100
    records = row_records.encode(expected, dtype)
    rows = row_records.decode(records, LENGTHS, packed=pack, dtype=dtype)
    assert set(rows) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(rows[name], array, err_msg=name)
        assert rows[name].dtype == array.dtype == np.int32


def test_the_bytes_are_those_of_the_description():
    """Two examples in a row: how many, lengths of inputs and of targets, ids of both."""
    rows = streamed(
        [{"inputs": [7, 8, 9], "targets": [5]}, {"inputs": [300, 1], "targets": [4, 3]}], pack=True
    )
    numbers = (2, 3, 2, 1, 2, 7, 8, 9, 300, 1, 5, 4, 3)
    assert row_records.encode(rows, "uint16") == [struct.pack("<13H", *numbers)]
    assert row_records.encode(rows, "uint32") == [struct.pack("<13I", *numbers)]


def test_the_smallest_type_that_holds_ids_and_lengths():
    assert row_records.dtype_for(32_100, LENGTHS) == "uint16"
    assert row_records.dtype_for((1 << 16) - 1, LENGTHS) == "uint16"
    assert row_records.dtype_for(1 << 16, LENGTHS) == "uint32"
    assert row_records.dtype_for(384, {"inputs": 1 << 16, "targets": 8}) == "uint32"


@pytest.mark.parametrize(
    "record",
    [
        struct.pack("<5H", 1, 1, 1, 7, 5) + b"\0\0",  # more than it says
        struct.pack("<4H", 1, 2, 2, 7),  # less
        struct.pack("<15H", 1, 10, 2, *[3] * 12),  # longer than a row
        b"\1",
    ],
)
def test_a_record_of_another_form(record):
    with pytest.raises(ValueError):
        row_records.decode([record], LENGTHS, packed=True, dtype="uint16")
