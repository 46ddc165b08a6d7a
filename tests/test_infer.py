"""`infer`: files and task splits in, one JSON line for each line out, in order."""

import gzip
import json
import os
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from saved_runs import LENGTHS, TASK, TINY, infer_lines, make_params, make_run
from small_run import content
from test_docs import commands

from t5x_lite.__main__ import main
from t5x_lite.decoding import DecodeConfig
from t5x_lite.infer_inputs import FileInputs
from t5x_lite.infer_progress import LineProgress
from t5x_lite.models import t5
from tasks import python_docs, vocabularies

TEXTS = [
    "Return a list of names.",
    "",
    "  two leading spaces, a sentinel <extra_id_0> and an umlaut ü",
    "words " * 40,
    "x",
]
WORDS = ["the", "function", "returns", "a", "list", "of", "values", "in", "order", "names"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", (2, 4))


def ids_of(text: str, length: int = LENGTHS["inputs"]) -> np.ndarray:
    """As the task's own pipeline makes them, with TensorFlow's tokenizer."""
    ids = python_docs.VOCABULARY.resolve().encode_tf(text).numpy()
    return np.append(ids[: length - 1], 1)


@jax.jit
def _log_p(params, inputs, decoder_inputs):
    batch = {
        "encoder_input_tokens": inputs[None],
        "decoder_input_tokens": decoder_inputs[None],
        "decoder_target_tokens": jax.numpy.ones_like(decoder_inputs)[None],
    }
    return jax.nn.log_softmax(t5.apply(TINY, params, batch)[0])


def log_p_of(params, inputs: np.ndarray, decoder_inputs: np.ndarray) -> np.ndarray:
    """float32 [len(decoder_inputs), V]: one row alone, without cache or bucket."""
    padded = [
        np.pad(ids, (0, size - len(ids))).astype(np.int32)
        for ids, size in ((inputs, LENGTHS["inputs"]), (decoder_inputs, LENGTHS["targets"]))
    ]
    return np.asarray(_log_p(params, *padded))[: len(decoder_inputs)]


def log_likelihood(params, inputs: np.ndarray, targets: np.ndarray) -> float:
    log_p = log_p_of(params, inputs, np.append(0, targets[:-1]))
    return float(log_p[np.arange(len(targets)), targets].sum())


def greedy(params, text: str) -> tuple[str, float]:
    ids, score = [0], 0.0
    while len(ids) <= LENGTHS["targets"] and ids[-1] != 1:
        log_p = log_p_of(params, ids_of(text), np.asarray(ids))[-1]
        ids.append(int(log_p.argmax()))
        score += float(log_p.max())
    return python_docs.VOCABULARY.resolve().decode(ids[1:]), score


# ---- formats -------------------------------------------------------------------------------------


def write_inputs(folder: pathlib.Path) -> dict[str, dict]:
    """TEXTS in every format: the options of `infer` by name."""
    files = {
        "lines.txt": "\n".join(TEXTS),
        "crlf.txt": "\ufeff" + "\r\n".join(TEXTS) + "\r\n",
        "cells.tsv": "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)),
        "header.tsv": "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)),
        "records.jsonl": "".join(
            json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)
        ),
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "a-part").write_text("\n".join(TEXTS[:2]) + "\n")
    (folder / "b-part").write_text("\n".join(TEXTS[2:]) + "\n")
    return {
        "lines.txt": {},
        "crlf.txt": {},
        "cells.tsv": {"field": "1"},
        "header.tsv": {"field": "text"},
        "records.jsonl": {"field": "text"},
        "records.jsonl.gz": {"field": "text"},
        "lines.txt.gz": {},
        "?-part": {"file_format": "text"},
    }


def test_every_format_gives_the_same_predictions(run_dir, tmp_path):
    """Those of each text decoded alone; the input's own fields are kept."""
    params = make_params(4)
    expected = [greedy(params, text) for text in TEXTS]
    kept = {
        "cells.tsv": [{"column_0": str(i), "column_1": t} for i, t in enumerate(TEXTS)],
        "header.tsv": [{"id": str(i), "text": t} for i, t in enumerate(TEXTS)],
        "records.jsonl": [{"id": i, "text": t} for i, t in enumerate(TEXTS)],
    }
    for number, (name, options) in enumerate(write_inputs(tmp_path).items()):
        records = infer_lines(
            run_dir, tmp_path / f"out{number}.jsonl", input=str(tmp_path / name), **options
        )
        assert [r["inputs"] for r in records] == TEXTS, name
        assert [r.get("truncated") for r in records] == [None, None, None, True, None]
        for record, (text, score) in zip(records, expected, strict=True):
            assert record["prediction"].replace(" ", "") == text.replace(" ", "")
            assert record["score"] == pytest.approx(score, abs=1e-4)
        written = {"inputs", "prediction", "score", "truncated"}
        own = [{k: v for k, v in r.items() if k not in written} for r in records]
        assert own == kept.get(name.removesuffix(".gz"), [{}] * len(TEXTS)), name


def test_fields_with_names_that_infer_writes(run_dir, tmp_path):
    """The output of one `infer` is the input of another one."""
    (tmp_path / "in.jsonl").write_text(
        json.dumps(
            {
                "inputs": "a list",
                "prediction": "old",
                "input_prediction": "older",
                "score": -1.5,
                "targets": "gold",
                "odd": "\ud800",
                "deep": {"prediction": [1, None]},
            }
        )
        + "\n"
    )
    given = {"input": str(tmp_path / "in.jsonl"), "field": "inputs"}
    (record,) = infer_lines(run_dir, tmp_path / "out.jsonl", **given)
    assert record.pop("prediction") != "old"
    assert record.pop("score") < -1.5
    own = {
        "input_input_prediction": "old",
        "input_prediction": "older",
        "input_score": -1.5,
        "targets": "gold",
        "odd": "\ud800",
        "deep": {"prediction": [1, None]},
    }
    assert record == own | {"inputs": "a list"}
    (record,) = infer_lines(run_dir, tmp_path / "prefix.jsonl", prefix="sum: ", **given)
    assert (record["inputs"], record["input_inputs"]) == ("sum: a list", "a list")


def test_a_prefix_is_part_of_the_text(run_dir, tmp_path):
    (tmp_path / "a.txt").write_text("a list of names\n")
    (tmp_path / "b.txt").write_text("summarize: a list of names\n")
    (plain,) = infer_lines(run_dir, tmp_path / "b.jsonl", input=str(tmp_path / "b.txt"))
    (prefixed,) = infer_lines(
        run_dir, tmp_path / "a.jsonl", input=str(tmp_path / "a.txt"), prefix="summarize: "
    )
    assert prefixed == plain


# ---- decoding and scoring ------------------------------------------------------------------------


def test_several_outputs(run_dir, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    decode = DecodeConfig("beam", num_beams=3, num_outputs=2, length_penalty=0.0)
    given = {"input": str(tmp_path / "in.txt"), "decode": decode}
    for record in infer_lines(run_dir, tmp_path / "out.jsonl", **given):
        assert len(record["predictions"]) == len(record["scores"]) == 2
        assert (record["prediction"], record["score"]) == (
            record["predictions"][0],
            record["scores"][0],
        )
        assert record["scores"] == sorted(record["scores"], reverse=True)


def test_score_is_the_log_likelihood_of_the_field(run_dir, tmp_path):
    pairs = [("a list", "of names"), ("", "x"), ("a file", ""), ("b", "words " * 20)]
    lines = [json.dumps({"q": q, "a": a}) for q, a in pairs]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    records = infer_lines(
        run_dir, tmp_path / "out.jsonl", input=str(tmp_path / "in.jsonl"), field="q", score="a"
    )
    params = make_params(4)
    for (q, a), record in zip(pairs, records, strict=True):
        expected = log_likelihood(params, ids_of(q), ids_of(a, LENGTHS["targets"]))
        assert record.pop("score") == pytest.approx(expected, abs=1e-4)
        cut = {"targets_truncated": True} if len(a) > 50 else {}
        assert record == {"q": q, "a": a, "inputs": q} | cut


def test_another_checkpoint_and_other_lengths(run_dir, tmp_path):
    (tmp_path / "in.txt").write_text(TEXTS[3])
    given = {"input": str(tmp_path / "in.txt"), "checkpoint": "2"}
    (record,) = infer_lines(run_dir, tmp_path / "a.jsonl", **given)
    assert record["prediction"] == greedy(make_params(2), TEXTS[3])[0].strip()
    given |= {"input_length": 64, "target_length": 2}
    (record,) = infer_lines(run_dir, tmp_path / "b.jsonl", **given)
    assert "truncated" not in record
    assert len(python_docs.VOCABULARY.resolve().encode(record["prediction"])) <= 2


def test_bytes_vocabulary(tmp_path):
    (tmp_path / "text.txt").write_text("A document.\n")
    run = make_run(
        tmp_path / "run",
        (1,),
        task="text_files_span_corruption",
        vocabulary_file="bytes",
        text_files_pattern=str(tmp_path / "text.txt"),
    )
    records = infer_lines(run, tmp_path / "out.jsonl", input=str(tmp_path / "text.txt"))
    assert [r["inputs"] for r in records] == ["A document."]


# ---- examples of a task --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_task():
    """Three questions; its vocabulary is the one that the configuration names."""

    def rows(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices(
            {
                "inputs": ["who", "what is longer than the inputs may be " * 9, "where"],
                "targets": ["me", "that", "here, and much longer than may be written down"],
                "idx": [[7, 1], [8, 2], [9, 3]],
                "topic": ["a", "ü", "c"],
            }
        )

    seqio.TaskRegistry.add(
        "infer_test_questions",
        source=seqio.FunctionDataSource(rows, splits=["validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={
            name: seqio.Feature(vocabularies.DEFAULT, dtype=tf.int32) for name in LENGTHS
        },
    )
    yield "infer_test_questions"
    seqio.TaskRegistry.remove("infer_test_questions")


def test_a_tasks_split(run_dir, tmp_path, small_task):
    """Texts, ids and all other fields; what the task has cut is told, as with files."""
    records = infer_lines(run_dir, tmp_path / "out.jsonl", task=small_task)
    params = make_params(4)
    for record in records:
        assert record["prediction"] == greedy(params, record["inputs"])[0].strip()
    long = "what is longer than the inputs may be " * 9
    assert [r["inputs"] for r in records] == ["who", long, "where"]
    assert [r["targets"][:4] for r in records] == ["me", "that", "here"]
    assert [r["idx"] for r in records] == [[7, 1], [8, 2], [9, 3]]
    assert [r["topic"] for r in records] == ["a", "ü", "c"]
    assert [r.get("truncated") for r in records] == [None, True, None]
    assert "targets_truncated" not in records[2]

    scored = infer_lines(run_dir, tmp_path / "scored.jsonl", task=small_task, score="targets")
    for record in scored:
        targets = ids_of(record["targets"], LENGTHS["targets"])
        expected = log_likelihood(params, ids_of(record["inputs"]), targets)
        assert record["score"] == pytest.approx(expected, abs=1e-4)
        assert "prediction" not in record
    assert [r.get("targets_truncated") for r in scored] == [None, None, True]


# ---- shards --------------------------------------------------------------------------------------


def test_shards_put_together_are_the_whole(run_dir, tmp_path):
    lines = [f"{' '.join(WORDS[: i % 9])} {i}" for i in range(50)]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    decode = DecodeConfig("sample", num_outputs=2)
    given = {"input": str(tmp_path / "in.txt"), "decode": decode, "seed": 3, "batch_size": 1}
    whole = infer_lines(run_dir, tmp_path / "whole.jsonl", **given)
    parts = [infer_lines(run_dir, tmp_path / "out.jsonl", shard=(i, 3), **given) for i in range(3)]
    assert [len(part) for part in parts] == [16, 17, 17]
    names = [f"out-0000{i}-of-00003.jsonl" for i in range(3)]
    assert [p.name for p in sorted(tmp_path.glob("out-*.jsonl"))] == names
    joined = [record for part in parts for record in part]
    assert [r["predictions"] for r in joined] == [r["predictions"] for r in whole]
    assert len({r["prediction"] for r in whole}) > 40  # drawn anew for each line
    assert infer_lines(run_dir, tmp_path / "more.jsonl", shard=(0, 99), **given) == []


# ---- bad input -----------------------------------------------------------------------------------

BAD = {
    "empty.txt": b"",
    "bad.txt": b"good\nb\xffd\n",
    "bad.jsonl": b'{"text": "good"}\n{"text": \n',
    "blank.jsonl": b'{"text": "good"}\n\n',
    "list.jsonl": b"[1]\n",
    "nan.jsonl": b'{"text": "x", "y": NaN}\n',
    "field.jsonl": b'{"text": "good"}\n{"txt": "x"}\n',
    "number.jsonl": b'{"text": 3}\n',
    "half.jsonl": b'{"text": "\\ud800"}\n',
    "ragged.tsv": b"id\ttext\n1\ta\n2\n",
    "twice.tsv": b"text\ttext\n",
    "header.tsv": b"id\ttext\n",
    "some.csv": b"1,2\n",
    "cut.txt.gz": gzip.compress(os.urandom(999).hex().encode())[:-50],
}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--input={tmp}/empty.txt"], "{tmp}/empty.txt: empty, there is no line to read"),
        (["--input={tmp}/header.tsv", "--field=text"], "header.tsv: empty"),
        (["--input={tmp}/nowhere.txt"], "--input={tmp}/nowhere.txt: there is no such file"),
        (["--input={tmp}/bad.txt"], "{tmp}/bad.txt line 2: not valid UTF-8 (byte 1)"),
        (["--input={tmp}/cut.txt.gz"], "cut.txt.gz cannot be read after line"),
        (["--input={tmp}/some.csv"], "some.csv: its name does not tell its format; give --format="),
        (["--input={tmp}/bad.txt", "--format=jsn"], "--format=jsn: did you mean 'jsonl'"),
        (["--input={tmp}/bad.txt", "--field=x"], "--field=x: {tmp}/bad.txt is plain text"),
        (["--input={tmp}/bad.txt", "--score=x"], "--score=x: {tmp}/bad.txt is plain text"),
        (["--input={tmp}/bad.jsonl"], "bad.jsonl is jsonl: give --field, the field with the text"),
        (
            ["--input={tmp}/bad.jsonl", "--field=text"],
            "bad.jsonl line 2: not valid JSON (Expecting",
        ),
        (["--input={tmp}/blank.jsonl", "--field=text"], "blank.jsonl line 2: not valid JSON"),
        (["--input={tmp}/list.jsonl", "--field=text"], "line 1: a JSON list, not an object"),
        (["--input={tmp}/nan.jsonl", "--field=text"], "line 1: not readable JSON (NaN is not JSON"),
        (
            ["--input={tmp}/field.jsonl", "--field=text"],
            "field.jsonl line 2: no field 'text'; did you mean 'txt'",
        ),
        (["--input={tmp}/number.jsonl", "--field=text"], "'text' is not a string but int"),
        (["--input={tmp}/half.jsonl", "--field=text"], "'text' has half of a surrogate pair"),
        (
            ["--input={tmp}/ragged.tsv", "--field=text"],
            "ragged.tsv line 3: 1 columns, but the header has 2",
        ),
        (["--input={tmp}/ragged.tsv", "--field=1"], "ragged.tsv line 3: no column 1, there are 1"),
        (["--input={tmp}/ragged.tsv", "--field=txt"], "no column 'txt'; did you mean 'text'"),
        (["--input={tmp}/ragged.tsv", "--field=id", "--score=1"], "two names of a header, or two"),
        (["--input={tmp}/twice.tsv", "--field=text"], "the header has 'text' twice"),
        (["--input={tmp}/good.txt", "--output={tmp}/good.txt/o.jsonl"], "cannot be written: "),
        (["--input={tmp}/*.txt", "--output={tmp}/o.txt"], "is among the files of --input="),
        (
            ["--input={tmp}/*.json", "--field=text", "--output={tmp}/o.txt"],
            "o.txt.state.json is among the files",
        ),
        (["--input={tmp}/good.txt", "--seed=4294967296"], "must be less than 2^32"),
        (["--input={tmp}/good.txt", "--checkpoint=3"], "no step 3 under"),
        (["--input={tmp}/good.txt", "--checkpoint=all"], "--checkpoint=all: give one: latest"),
        (["--input={tmp}/good.txt", "--shard=4/4"], "--shard=4/4: give I/N with I from 0"),
        (["--input={tmp}/good.txt", "--mesh=data"], "--mesh=data: give devices for each axis"),
        (["--input={tmp}/good.txt", "--mesh=data=3"], "is 3 devices, but there are"),
        (["--input={tmp}/good.txt", "--batch_size=0"], "--batch_size=0: must be at least 1"),
        (["--input={tmp}/good.txt", "--num_outputs=2"], "greedy gives at most 1"),
        (["--input={tmp}/good.txt", "--method=beam", "--num_beams=5000"], "has 4096 ids"),
        (["--input={tmp}/good.txt", f"--task={TASK}"], "give either --input, files, or --task"),
        ([], "give either --input, files, or --task"),
        (["--task=python_docs_span_coruption"], "did you mean 'python_docs_span_corruption'"),
        ([f"--task={TASK}", "--split=test"], "--split=test: python_docs_span_corruption has no"),
        ([f"--task={TASK}", "--field=x"], "--field, --prefix and --format belong to --input"),
        ([f"--task={TASK}", "--score=inputs"], "only 'targets' can be scored"),
        (
            ["--input={tmp}/bad.jsonl", "--field=a", "--score=b", "--method=beam"],
            "--score generates nothing",
        ),
    ],
    ids=lambda value: " ".join(value).replace("{tmp}/", "") if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(run_dir, tmp_path, capfd, flags, expected):
    for name, data_ in BAD.items():
        (tmp_path / name).write_bytes(data_)
    (tmp_path / "good.txt").write_text("a line\n")
    (tmp_path / "a.json").write_text('{"text": "a line"}\n')
    before = content(tmp_path)
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    output = (
        [] if any(f.startswith("--output") for f in flags) else [f"--output={tmp_path}/o.jsonl"]
    )
    assert main(["infer", str(run_dir), *output, *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith("t5x_lite: ") and error.count("\n") == 1
    assert expected.replace("{tmp}", str(tmp_path)) in error
    assert content(tmp_path) == before


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_runs_as_it_is_written(run_dir, repo, tmp_path, monkeypatch, capfd):
    page = (repo / "docs" / "infer.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir, "runs/python_docs")
    pathlib.Path("parts").mkdir()
    rows = [("what", "it"), ("who", "I"), ("where", "here")]
    pathlib.Path("questions.txt").write_text("what\nwho\nwhere\n")
    pathlib.Path("table.tsv").write_text(
        "".join(f"{q}\t{a}\n" for q, a in [("question", "answer"), *rows])
    )
    lines = "".join(json.dumps({"question": q}) + "\n" for q, _ in rows)
    pathlib.Path("parts/a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = commands(page)
    assert len(found) == page.count("python -m t5x_lite infer") == 8
    for argv in found:
        if any(flag.startswith("--task") for flag in argv):
            argv = [*argv, "--shard=0/200"]  # some of it
        assert main(argv) == 0, capfd.readouterr().err
    for name in ("answers", "jsonl_answers", "tsv_answers", "beams", "samples", "scores"):
        assert len(pathlib.Path(f"{name}.jsonl").read_text().splitlines()) == 3
    assert len(json.loads(pathlib.Path("beams.jsonl").read_text().splitlines()[0])["scores"]) == 2
    assert pathlib.Path("parts-00000-of-00002.jsonl").exists()


# ---- many lines ----------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_input(tmp_path):
    with gzip.open(tmp_path / "many.txt.gz", "wb", compresslevel=1) as f:
        for i in range(100):
            f.write(b"a line of some words\n" * 1000 + f"{i}\n".encode())
    inputs = FileInputs(str(tmp_path / "many.txt.gz"))
    tracemalloc.start()
    assert inputs.scan()[0] == 100_100
    assert next(inputs.rows(100_099, 100_100)).text == "99"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_progress_tells_the_rate_and_the_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("t5x_lite.infer_progress.time.monotonic", lambda: now[0])
    with LineProgress(1000, 200) as progress:
        now[0] += 5
        progress.update(250)
        assert not capsys.readouterr().out
        now[0] += 5
        progress.update(400)
        assert capsys.readouterr().out == "400/1,000 lines  20.0 lines/s  30s left\n"
