"""DataFrames of pandas and data sets of `datasets` as a source, where these are installed."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from test_tasks_tables import LABELS, NUM_ROWS, TEXTS, _error, _made, _rows, _texts, _write

from t5x_lite.errors import UsageError
from tasks import tables
from tasks.tables import TableSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def pd():
    return pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """`datasets` without a network, and with a cache of this module's own."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        m.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("datasets")


# ---- pandas --------------------------------------------------------------------------------------


def test_frame_types(pd):
    frame = pd.DataFrame(
        {
            "text": ["a", "", "“ü”"],
            "kind": pd.Categorical(["no", "yes", "no"]),
            "n": np.array([1, 2, 3], np.int16),
            "size": [0.5, 1.5, -2.0],
            "is": [True, False, True],
            "words": [["a", "b"], [], ["c"]],
            "raw": [b"\xff", b"", b"x"],
            "when": pd.to_datetime(["2020-01-01"] * 3),
        },
        index=[7, 5, 5],
    )
    names = [name for name in frame.columns if name != "when"]

    def encoded(value):
        if isinstance(value, list):
            return [encoded(v) for v in value]
        return value.encode() if isinstance(value, str) else value

    expected = [
        {name: encoded(value) for name, value in row.items()}
        for row in frame[names].to_dict("records")
    ]
    assert _rows(TableSource({"train": frame}, names)) == expected
    message = "the DataFrame of split 'train': column 'when' is of type timestamp["
    assert _error(frame).startswith(message)


def test_frame_is_known_by_its_content(pd, cache):
    frame = pd.DataFrame({"text": TEXTS, "label": LABELS})
    assert _texts(frame) == TEXTS
    before = _made(cache)
    calls = []

    def load():
        calls.append(1)
        return pd.DataFrame({"text": TEXTS, "label": LABELS})

    source = TableSource({"train": load})
    assert not calls
    assert [row["label"] for row in _rows(source)] == LABELS
    assert source.num_input_examples("train") == NUM_ROWS
    assert len(calls) == 1
    assert _made(cache) == before
    frame.loc[700, "text"] = "another"
    assert _texts(frame)[700] == "another"
    assert len(_made(cache)) == 2 * len(before)


def test_frame_errors(pd):
    where = "the DataFrame of split 'train'"
    frame = pd.DataFrame({"text": ["a", None], "size": [1.0, float("nan")]})
    assert _error(frame).startswith(f"{where} row 1 (from 0): column 'text' has no value (null)")
    assert "row 1 (from 0): column 'size' has no value (null)" in _error(frame, ["size"])
    message = f"{where} has no column 'texts'; did you mean 'text'?"
    assert _error(frame, ["texts"]) == message
    mixed = pd.DataFrame({"n": [1, 2.5, 2.5], "x": ["a", 1, None]}, dtype=object)
    assert _error(mixed) == f"{where}: column 'x' holds str and int; make it one type"
    nested = pd.DataFrame({"n": [1, 2], "x": [["a"], [1]]})
    assert _error(nested).startswith(f"{where}: column 'x': ")
    assert f"{where}: column 'x': " in _error(pd.DataFrame({"x": [1, 2**70]}))
    with pytest.raises(UsageError, match=r"takes a dict of splits, .*; found DataFrame$"):
        TableSource(frame)
    assert _error(frame[:0]) == "split 'train' of the table has no rows"
    twice = pd.DataFrame([[1, 2]], columns=["x", "x"])
    assert _error(twice) == f"{where} has 2 columns of the name 'x'"


# ---- datasets ------------------------------------------------------------------------------------


def test_data_set(datasets, cache):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "scores": datasets.List(datasets.Value("float32")),
        }
    )
    columns = {"text": TEXTS, "label": LABELS, "scores": [[i / 2] * (i % 3) for i in LABELS]}
    whole = datasets.Dataset.from_dict(columns, features=features)
    rows = _rows(TableSource({"train": whole}))
    assert [row["text"].decode() for row in rows] == TEXTS
    assert [row["label"] for row in rows] == LABELS
    assert [row["scores"] for row in rows] == columns["scores"]

    before = _made(cache)
    part = whole.shuffle(seed=1).select(range(700))
    assert _texts(part, ["text"]) == part["text"][:]
    assert len(_made(cache)) == 2 * len(before)
    assert _texts(lambda: whole) == TEXTS
    assert len(_made(cache)) == 2 * len(before)
    message = "the data set of split 'train' has no column 'lable'; did you mean 'label'?"
    assert _error(whole, ["lable"]) == message
    with pytest.raises(UsageError, match=r"takes a dict of splits, .*; found Dataset$"):
        TableSource(whole)


def test_data_set_dict_is_a_mapping_of_splits(datasets, tmp_path):
    splits = {"train": TEXTS[:9], "test": TEXTS[9:12]}
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    )
    saved.save_to_disk(tmp_path / "saved")
    source = TableSource(datasets.load_from_disk(tmp_path / "saved"))
    assert source.splits == ("train", "test")
    for name, texts in splits.items():
        assert [row["text"].decode() for row in _rows(source, name)] == texts
    assert "split 'train' of the table is DatasetDict; it must be" in _error(lambda: saved)


def test_a_transform_is_not_lost(datasets):
    table = datasets.Dataset.from_dict({"text": ["a"]})
    upper = lambda batch: {"text": [text.upper() for text in batch["text"]]}
    assert "use .map(...) instead of .with_transform(...)" in _error(table.with_transform(upper))
    assert _texts(table.map(upper, batched=True)) == ["A"]


def test_images_are_named(datasets):
    columns = {"image": [{"bytes": b"x", "path": "a.png"}], "text": ["a"]}
    images = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    assert "column 'image' is of type struct<bytes: binary, path: string>" in _error(images)
    assert _texts(images, ["text"]) == ["a"]


def test_stream_is_consumed_once_and_known_by_what_it_held(datasets, cache, monkeypatch):
    monkeypatch.setattr(tables, "WINDOW_BYTES", 20_000)
    passes = []

    def generate(end):
        passes.append(end)
        for i in range(end):
            yield {"text": TEXTS[i], "label": LABELS[i]}

    def source(end):
        stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"end": end})
        return TableSource({"train": stream}, columns=["text"])

    first = source(NUM_ROWS)
    for _ in range(2):
        assert [row["text"].decode() for row in _rows(first)] == TEXTS
    assert passes.count(NUM_ROWS) == 1
    assert len(first.list_shards("train")) > 1
    before = _made(cache)
    assert source(NUM_ROWS).list_shards("train") == first.list_shards("train")
    assert set(_made(cache)) == set(before)
    assert source(900).list_shards("train")[-1] not in first.list_shards("train")


_LOAD = """
import sys, json, datasets
sys.path.insert(0, {root!r})
from tasks.tables import TableSource
def load():
    return datasets.load_dataset("parquet", data_files={files!r}, split="train")
print(json.dumps(TableSource({{"train": load}}).list_shards("train")))
"""


def test_another_process_finds_what_is_converted(datasets, tmp_path, repo, cache):
    """`datasets` gives the same fingerprint to the same files."""
    path = _write(tmp_path / "a.parquet")

    def shards():
        process = subprocess.run(
            [sys.executable, "-c", _LOAD.format(root=str(repo), files=path)],
            env=os.environ | {"PYTHONHASHSEED": "5", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr[-2000:]
        return json.loads(process.stdout.splitlines()[-1])

    first = shards()
    before = _made(cache)
    assert shards() == first
    assert _made(cache) == before
    parquet.write_table(pa.table({"text": ["other"], "label": [0]}), path)
    assert shards() != first
