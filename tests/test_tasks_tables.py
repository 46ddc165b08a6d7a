"""Tables as a source: every type, what is kept, what is resumed, every way they can be wrong."""

import collections
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pyarrow as pa
import pytest
import seqio
import tensorflow as tf
from pyarrow import parquet

from t5x_lite import data
from t5x_lite.errors import UsageError
from t5x_lite.run_config import DataConfig
from tasks import tables
from tasks.tables import TableSource

NUM_ROWS = 1200  # more than a batch of the conversion
TEXTS = [f"Row {i} says “{i * i}”." for i in range(NUM_ROWS)]
LABELS = [i // (NUM_ROWS // 2) for i in range(NUM_ROWS)]  # sorted


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write(path, columns=None, **options) -> str:
    table = pa.table({"text": TEXTS, "label": LABELS} if columns is None else columns)
    parquet.write_table(table, path, **options)
    return str(path)


def _rows(source, split="train", **options) -> list[dict]:
    """As Python's values; unshuffled unless said otherwise."""
    dataset = source.get_dataset(split, **{"shuffle": False} | options)
    return [
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
        for row in dataset.as_numpy_iterator()
    ]


def _texts(table, columns=None, **options) -> list[str]:
    source = TableSource({"train": table}, columns)
    return [row["text"].decode() for row in _rows(source, **options)]


def _error(table, columns=None) -> str:
    with pytest.raises(UsageError) as error:
        TableSource({"train": table}, columns).get_dataset("train")
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- values --------------------------------------------------------------------------------------

VALUES = [
    (pa.string(), ["a", "", "“ü”"], tf.string),
    (pa.large_string(), ["a", "b", "c"], tf.string),
    (pa.string_view(), ["a", "b", "c"], tf.string),
    (pa.binary(), [b"\x00\xff", b"", b"x"], tf.string),
    (pa.large_binary(), [b"a", b"b", b"c"], tf.string),
    (pa.binary(2), [b"ab", b"cd", b"ef"], tf.string),
    (pa.dictionary(pa.int8(), pa.string()), ["yes", "no", "yes"], tf.string),
    (pa.int8(), [-128, 0, 127], tf.int64),
    (pa.int64(), [-(2**63), 0, 2**63 - 1], tf.int64),
    (pa.uint64(), [0, 1, 2**63 - 1], tf.int64),
    (pa.float16(), [0.5, -2.0, 0.0], tf.float32),
    (pa.float32(), [0.1, float("inf"), -1e38], tf.float32),
    (pa.float64(), [0.5, 1e-3, -3.25], tf.float32),
    (pa.bool_(), [True, False, True], tf.bool),
    (pa.list_(pa.string()), [["a", "b"], [], ["c"]], tf.string),
    (pa.large_list(pa.int32()), [[1], [2, 3], []], tf.int64),
    (pa.list_(pa.float32(), 2), [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], tf.float32),
    (pa.list_(pa.bool_()), [[True], [], [False, True]], tf.bool),
    (pa.list_(pa.dictionary(pa.int8(), pa.string())), [["x"], ["y", "x"], []], tf.string),
]


@pytest.mark.parametrize(("arrow_type", "values", "dtype"), VALUES, ids=lambda v: str(v)[:40])
def test_types(tmp_path, arrow_type, values, dtype):
    if pa.types.is_list(arrow_type) and pa.types.is_dictionary(arrow_type.value_type):
        flat = pa.array([v for row in values for v in row]).dictionary_encode()
        column = pa.ListArray.from_arrays(pa.array([0, 1, 3, 3], pa.int32()), flat)
    elif pa.types.is_dictionary(arrow_type):
        column = pa.array(values).dictionary_encode()
    else:
        column = pa.array(values, arrow_type)
    source = TableSource({"train": _write(tmp_path / "a.parquet", {"n": [1, 2, 3], "x": column})})
    is_list = isinstance(values[0], list)
    spec = source.get_dataset("train").element_spec
    assert list(spec) == ["n", "x"]
    assert spec["x"] == tf.TensorSpec([None] if is_list else [], dtype)

    def expected(value):
        if isinstance(value, str):
            return value.encode()
        return pytest.approx(value, rel=1e-7) if dtype == tf.float32 else value

    wanted = [[expected(v) for v in row] if is_list else expected(row) for row in values]
    assert [row["x"] for row in _rows(source)] == wanted


def test_columns_are_those_asked_for_in_their_order(tmp_path):
    """What is left out may hold anything."""
    columns = {"text": TEXTS[:3], "meta": [{"a": 1}] * 3, "none": [None] * 3, "label": [1, 2, 3]}
    path = _write(tmp_path / "a.parquet", columns)
    source = TableSource({"train": path}, columns=["label", "text"])
    expected = [{"label": i + 1, "text": TEXTS[i].encode()} for i in range(3)]
    assert _rows(source) == expected
    assert list(_rows(source)[0]) == ["label", "text"]


def test_row_groups_files_and_globs_in_order(tmp_path):
    for i in range(3):
        texts = TEXTS[i * 400 : (i + 1) * 400]
        _write(tmp_path / f"part-{i}.parquet", {"text": texts}, row_group_size=[70, 1000, 1][i])
    names = [tmp_path / f"part-{i}.parquet" for i in range(3)]
    assert _texts(str(tmp_path / "*.parquet")) == TEXTS
    assert _texts(names) == TEXTS
    assert _texts([str(tmp_path / "part-[12].parquet"), names[0]]) == TEXTS[400:] + TEXTS[:400]
    source = TableSource({"train": lambda: tmp_path / "*.parquet"})
    assert source.num_input_examples("train") == NUM_ROWS


def test_files_of_an_object_store():
    """`ram://` is TensorFlow's, which pyarrow does not know."""
    path = "ram://tables/a.parquet"
    with tf.io.gfile.GFile(path, "wb") as f:
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.table({"text": TEXTS}), sink)
        f.write(sink.getvalue().to_pybytes())
    assert _texts("ram://tables/*.parquet") == TEXTS
    assert "matches no file" in _error("ram://tables/*.csv")


# ---- order ---------------------------------------------------------------------------------------


@pytest.fixture
def many_shards(tmp_path, monkeypatch) -> TableSource:
    monkeypatch.setattr(tables, "WINDOW_BYTES", 2000)
    return TableSource({"train": _write(tmp_path / "a.parquet")})


def test_without_shuffling_the_order_of_the_table(many_shards):
    assert len(many_shards.list_shards("train")) > 20
    assert many_shards.num_input_examples("train") == NUM_ROWS
    assert [row["text"].decode() for row in _rows(many_shards)] == TEXTS


def test_the_seed_fixes_the_order_and_every_row_comes_once(many_shards):
    first, again, other = (
        [row["text"].decode() for row in _rows(many_shards, shuffle=True, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(TEXTS)


@pytest.mark.parametrize("window_bytes", [2000, tables.WINDOW_BYTES])
def test_a_table_sorted_by_its_label_is_mixed(tmp_path, monkeypatch, window_bytes):
    """Of each hundred rows 50 are of either label on average; in one shard, within 6 deviations."""
    monkeypatch.setattr(tables, "WINDOW_BYTES", window_bytes)
    rows = _rows(TableSource({"train": _write(tmp_path / "a.parquet")}), shuffle=True, seed=0)
    labels = [row["label"] for row in rows]
    ones = [sum(labels[i : i + 100]) for i in range(0, NUM_ROWS, 100)]
    assert all(abs(n - 50) <= 30 for n in ones), ones


def test_hosts_share_the_rows(many_shards):
    hosts = [
        _rows(many_shards, shuffle=True, seed=3, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)
    ]
    counts = collections.Counter(row["text"].decode() for rows in hosts for row in rows)
    assert counts == collections.Counter(TEXTS)
    assert all(len(rows) > NUM_ROWS / 6 for rows in hosts)


# ---- what is kept --------------------------------------------------------------------------------


def _made(cache) -> dict[pathlib.Path, int]:
    return {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}


def test_an_unchanged_file_is_converted_once(tmp_path, cache):
    _write(tmp_path / "a.parquet")
    assert _texts(str(tmp_path / "*.parquet")) == TEXTS
    before = _made(cache)
    _write(tmp_path / "b.parquet", {"text": ["one more"], "label": [0]})
    assert _texts(str(tmp_path / "*.parquet")) == [*TEXTS, "one more"]
    after = _made(cache)
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)
    _texts(str(tmp_path / "*.parquet"), columns=["text"])
    assert len(_made(cache)) == 2 * len(after)


def test_a_changed_file_is_converted_again(tmp_path):
    path = tmp_path / "a.parquet"
    _write(path, {"text": ["old"]})
    assert _texts(path) == ["old"]
    _write(path, {"text": ["new"]})  # of the same size
    os.utime(path, ns=(1, 1))
    assert _texts(path) == ["new"]


def test_a_run_knows_that_its_table_has_changed(tmp_path):
    """`source_shards` is what a resumed run compares; of two splits the one that is trained on."""
    path = _write(tmp_path / "table.parquet", {"text": ["one", "two"], "label": [0, 1]})

    def names() -> list[str]:  # as a process sees them that begins now
        return data.source_shards(types.SimpleNamespace(source=TableSource({"fit": path})), "fit")

    before = names()
    assert before and before == names()
    _write(path, {"text": ["one", "two", "three"], "label": [0, 1, 1]})
    assert names() != before
    _write(path, {"text": ["one", "two"], "label": [False, True]})
    assert names() != before


def test_the_same_table_elsewhere_is_the_same_to_a_run(tmp_path, monkeypatch, many_shards):
    """A copy with a time, a path and row groups of its own, converted by another host."""
    [path] = many_shards.prepare("train").shards[:1]
    expected = [pathlib.Path(shard).name for shard in many_shards.list_shards("train")]
    assert len(set(expected)) > 20 and pathlib.Path(path).name == expected[0]
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "other_cache"))
    copy = _write(tmp_path / "copy.parquet", row_group_size=100)
    os.utime(copy, ns=(1, 1))
    found = TableSource({"train": copy}).list_shards("train")
    assert [pathlib.Path(shard).name for shard in found] == expected
    assert all(str(tmp_path / "other_cache") in shard for shard in found)


def test_a_position_is_good_for_what_is_converted_again(tmp_path, cache, monkeypatch):
    """The file has a new time and the cache is gone; the batches are those that come next."""
    monkeypatch.setattr(tables, "WINDOW_BYTES", 2000)
    path = _write(tmp_path / "a.parquet")
    batches = train_batches(path)
    digests(batches, 3)
    position = batches.position()
    expected = digests(batches, 10)
    shutil.rmtree(cache)
    os.utime(path, ns=(1, 1))
    again = train_batches(path)
    again.restore(position)
    assert digests(again, 10) == expected


def test_shards_that_were_deleted_are_made_again(tmp_path, cache):
    path = _write(tmp_path / "a.parquet")
    _texts(path)
    next(cache.rglob("*.tfrecord")).unlink()
    assert _texts(path) == TEXTS


def test_an_interrupted_conversion_leaves_nothing_half_done(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(tables, "WINDOW_BYTES", 2000)
    path = _write(tmp_path / "a.parquet")
    write = tf.io.TFRecordWriter.write
    written = itertools.count()

    def interrupted(writer, record):
        if next(written) == 150:
            raise KeyboardInterrupt
        write(writer, record)

    with monkeypatch.context() as m:
        m.setattr(tf.io.TFRecordWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _texts(path)
    assert not [p for p in cache.rglob("*") if p.suffix in (".tmp", ".json")]
    assert _texts(path) == TEXTS


def test_nothing_is_read_before_it_is_used(tmp_path, cache):
    def fail():
        raise AssertionError("called")

    TableSource({"train": fail, "validation": str(tmp_path / "absent.parquet")})
    assert not cache.exists()


_FRESH_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_tasks_tables as here
libraries = ("pyarrow", "pandas", "datasets")
for name in libraries:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]
batches = here.train_batches(sys.argv[2])
started = here.digests(batches, 15)
with open(sys.argv[3], "rb") as f:
    batches.restore(f.read())
print(json.dumps([started, here.digests(batches, 15)]))
print(json.dumps([name for name in libraries if name in sys.modules]))
"""


def train_batches(pattern: str) -> data.TrainBatches:
    feature = seqio.Feature(seqio.ByteVocabulary(), dtype=tf.int32)

    def to_text(rows):
        return rows.map(
            lambda row: {"inputs": row["text"], "targets": tf.strings.as_string(row["label"])}
        )

    task = seqio.TaskRegistry.add(
        "tables_test",
        source=TableSource({"train": pattern}),
        preprocessors=[
            to_text,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[],
    )
    try:
        config = DataConfig("tables_test", {"inputs": 64, "targets": 8}, batch_size=32, pack=True)
        return data.train_batches(config, task, seed=3)
    finally:
        seqio.TaskRegistry.remove("tables_test")


def digests(batches: data.TrainBatches, count: int) -> list[str]:
    return [
        hashlib.sha256(b"".join(v.tobytes() for _, v in sorted(batch.items()))).hexdigest()
        for batch in itertools.islice(batches, count)
    ]


def test_another_process_goes_on_without_the_libraries(tmp_path, repo):
    """The same batches from the start and from a position, over the end of an epoch."""
    for i in range(3):
        texts, labels = TEXTS[i * 400 : (i + 1) * 400], LABELS[i * 400 : (i + 1) * 400]
        _write(tmp_path / f"{i}.parquet", {"text": texts, "label": labels})
    pattern = str(tmp_path / "*.parquet")
    batches = train_batches(pattern)
    started = digests(batches, 15)
    (tmp_path / "position").write_bytes(batches.position())
    expected = [started, digests(batches, 15)]
    assert len(set(itertools.chain(*expected))) == 30
    process = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS, str(repo / "tests"), pattern, tmp_path / "position"],
        cwd=repo,
        env=os.environ | {"PYTHONHASHSEED": "99"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    *_, found, loaded = process.stdout.splitlines()
    assert json.loads(found) == expected
    assert json.loads(loaded) == []


# ---- bad input -----------------------------------------------------------------------------------


def test_no_file(tmp_path):
    pattern = str(tmp_path / "*.parquet")
    assert _error(pattern) == f"split 'train' of the table: {pattern!r} matches no file"
    hint = f"'{tmp_path}' matches no file; of a directory, give '{tmp_path}/*.parquet'"
    assert hint in _error(str(tmp_path))


def test_what_is_not_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text("text,label\nfirst,1\n")
    assert f"{path} cannot be read as Parquet: " in _error(path)


def test_cut_file(tmp_path):
    path = tmp_path / "a.parquet"
    _write(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path} cannot be read as Parquet: " in _error(path)
    path.write_bytes(content[:500] + bytes(2000) + content[2500:])
    assert f"{path} cannot be read as Parquet: " in _error(path)


def test_unknown_column(tmp_path):
    path = _write(tmp_path / "a.parquet")
    message = f"{path} has no column 'lable'; did you mean 'label'?"
    assert _error(path, ["text", "lable"]) == message
    with pytest.raises(UsageError, match=r"columns is 'text'; give a list, \['text'\]"):
        TableSource({"train": path}, columns="text")
    assert _error(path, []) == f"{path} has no columns"


def test_two_columns_of_one_name(tmp_path):
    table = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert _error(tmp_path / "a.parquet").endswith("a.parquet has 2 columns of the name 'x'")


UNSUPPORTED = [
    (pa.struct([("bytes", pa.binary())]), {"bytes": b""}, "struct<bytes: binary>"),
    (pa.timestamp("ms"), 0, "timestamp[ms]"),
    (pa.date32(), 0, "date32[day]"),
    (pa.decimal128(5, 2), 1, "decimal128(5, 2)"),
    (pa.list_(pa.list_(pa.int32())), [[1]], "list<element: list<element: int32>>"),
]


@pytest.mark.parametrize(("arrow_type", "value", "name"), UNSUPPORTED, ids=lambda v: str(v)[:30])
def test_types_that_an_example_cannot_hold(tmp_path, arrow_type, value, name):
    path = _write(tmp_path / "a.parquet", {"when": pa.array([value], arrow_type), "text": ["x"]})
    message = _error(path)
    assert message.startswith(f"{path}: column 'when' is of type {name}; an example holds strings")
    assert "columns=[...] of TableSource chooses" in message
    assert _texts(path, ["text"]) == ["x"]


MISSING = [
    (["a"] * 700 + [None, "b"], "row 700 (from 0): column 'x' has no value (null)"),
    ([1, None], "row 1 (from 0): column 'x' has no value (null)"),
    ([1.5, None], "row 1 (from 0): column 'x' has no value (null)"),
    ([True, None], "row 1 (from 0): column 'x' has no value (null)"),
    ([["a"], None], "row 1 (from 0): column 'x' has no value (null)"),
    ([["a"], ["b", None]], "row 1 (from 0): column 'x' has a list without one of its values"),
    ([[1], [2, None]], "row 1 (from 0): column 'x' has a list without one of its values"),
    ([None, None], ": column 'x' has no values"),
]


@pytest.mark.parametrize(("values", "message"), MISSING, ids=lambda v: str(v)[-30:])
def test_missing_values(tmp_path, cache, values, message):
    path = _write(tmp_path / "a.parquet", {"x": values})
    assert f"{path}{' ' * message.startswith('row')}{message}" in _error(path)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_values_beyond_what_is_kept(tmp_path):
    path = _write(tmp_path / "a.parquet", {"x": pa.array([1, 2**63], pa.uint64())})
    assert "row 1 (from 0): column 'x' is 9223372036854775808, more than int64" in _error(path)
    path = _write(tmp_path / "a.parquet", {"x": [[1e38], [1e38, -1e39]]})
    assert "row 1 (from 0): column 'x' is -1e+39, more than float32 holds" in _error(path)


def test_strings_that_are_not_utf8(tmp_path):
    raw = pa.array([b"good", b"b\xe4d"])
    column = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    path = _write(tmp_path / "a.parquet", {"text": column})
    assert f"{path} row 1 (from 0): column 'text' is not valid UTF-8" in _error(path)


def test_no_rows(tmp_path):
    path = _write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    assert _error(path) == f"split 'train' of the table ({path}) has no rows"
    other = _write(tmp_path / "b.parquet", {"text": ["x"]})
    assert _texts([path, other]) == ["x"]


def test_files_that_differ(tmp_path):
    paths = [
        _write(tmp_path / "a.parquet", {"text": ["x"], "label": [1]}),
        _write(tmp_path / "b.parquet", {"text": ["x"], "label": ["1"]}),
        _write(tmp_path / "c.parquet", {"text": ["x"]}),
    ]
    message = "column 'label' differs: int in {} and string in {}".format(*paths)
    assert _error(paths[:2]) == message
    message = f"column 'label' differs: int in {paths[0]} and nothing in {paths[2]}"
    assert _error([paths[0], paths[2]]) == message


def test_what_is_no_table():
    for table, name in ((3, "int"), ([1], "list"), ([], "list"), (lambda: {"a": 1}, "dict")):
        message = _error(table)
        assert message.startswith(f"split 'train' of the table is {name}; it must be a Parquet")


@pytest.mark.parametrize(
    ("splits", "found"),
    [
        ("a.parquet", "str"),
        (None, "NoneType"),
        (pa.table({"a": [1]}), "Table"),
        ({}, "an empty one"),
    ],
)
def test_what_is_no_dict_of_splits(splits, found):
    message = f"TableSource takes a dict of splits, {{'train': TABLE, ...}}; found {found}"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        TableSource(splits)


def test_function_that_takes_arguments(tmp_path):
    path = _write(tmp_path / "a.parquet")

    def load(split):
        return path

    message = (
        "split 'train' of the table: load is called without arguments, but missing a required "
        "argument: 'split'; give `lambda: load('train')`, or a function that takes none"
    )
    assert _error(load) == message
    assert _texts(lambda: load("train")) == _texts(functools.partial(load, "train")) == TEXTS


def test_library_that_is_not_installed(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.parquet")

    def load():
        import datasets

        return datasets.load_from_disk("absent")

    for library in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, library, None)
    install = "pip install 't5x_lite[tables]'"
    assert _error(path) == f"reading Parquet needs pyarrow: {install}"
    assert _error(load) == f"reading split 'train' needs datasets: {install}"


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "file" / "cache"))
    assert "T5X_LITE_CACHE" in _error(_write(tmp_path / "a.parquet"))
