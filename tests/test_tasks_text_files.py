"""A user's own files: every format, every way they can be wrong."""

import collections
import gzip
import json
import logging
import os

import pytest
import seqio

from t5x_lite.errors import UsageError
from tasks import conversion, text_files
from tasks.text_files import TextFiles

DOCUMENTS = [f"Document {i} tells of {i * i} things and “nothing” else." for i in range(200)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write(path, documents, field=None) -> None:
    lines = documents if field is None else [json.dumps({field: d, "n": 1}) for d in documents]
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def _texts(files: TextFiles, split: str, **kwargs) -> list[str]:
    dataset = text_files.TextFilesSource(lambda: files).get_dataset(split, **kwargs)
    return [example["text"].decode() for example in dataset.as_numpy_iterator()]


def _error(files: TextFiles) -> str:
    with pytest.raises(UsageError) as error:
        text_files.prepare(files)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "field"),
    [("a.txt", None), ("a.txt.gz", None), ("a.jsonl", "body"), ("a.jsonl.gz", "body")],
)
def test_formats(tmp_path, name, field):
    _write(tmp_path / name, DOCUMENTS, field)
    files = TextFiles(str(tmp_path / "a.*"), field=field, validation_share=0.1)
    train, validation = (_texts(files, s, shuffle=False) for s in ("train", "validation"))
    assert sorted(train + validation) == sorted(DOCUMENTS)
    # In the order of the file, and about a tenth of it: 20 +- 4 standard deviations.
    assert [d for d in DOCUMENTS if d in set(train)] == train
    assert 3 <= len(validation) <= 37


def test_blank_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf first \r\n\r\n   \nsecond\nlast, no line end")
    files = TextFiles(str(tmp_path / "a.txt"), validation_share=0.0)
    assert _texts(files, "train", shuffle=False) == ["first", "second", "last, no line end"]


def test_split_follows_the_text_not_its_place(tmp_path):
    for name, documents in {"x": DOCUMENTS, "y": DOCUMENTS[::-1] + DOCUMENTS[:50]}.items():
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "a.txt", documents[: len(documents) // 2])
        _write(tmp_path / name / "b.txt", documents[len(documents) // 2 :])
    splits = {
        name: {
            split: set(_texts(TextFiles(f"{tmp_path}/{name}/*", validation_share=0.2), split))
            for split in ("train", "validation")
        }
        for name in ("x", "y")
    }
    assert splits["x"] == splits["y"]
    assert not splits["x"]["train"] & splits["x"]["validation"]


def test_separate_validation_files(tmp_path):
    _write(tmp_path / "train.txt", DOCUMENTS[:150])
    _write(tmp_path / "dev.txt", DOCUMENTS[150:])
    files = TextFiles(str(tmp_path / "train.txt"), validation_pattern=str(tmp_path / "dev.txt"))
    assert _texts(files, "train", shuffle=False) == DOCUMENTS[:150]
    assert _texts(files, "validation", shuffle=False) == DOCUMENTS[150:]
    both = TextFiles(str(tmp_path / "*.txt"), validation_pattern=str(tmp_path / "dev.txt"))
    assert "only be in one" in _error(both)


def test_unchanged_files_are_read_once(tmp_path, cache):
    _write(tmp_path / "a.txt", DOCUMENTS)
    files = TextFiles(str(tmp_path / "*.txt"))
    text_files.prepare(files)
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    _write(tmp_path / "b.txt", ["one more"])
    text_files.prepare.cache_clear()
    splits = text_files.prepare(files)
    after = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    assert before.items() <= after.items()
    assert sum(split.num_examples for split in splits.values()) == 201


def test_shards_that_were_deleted_are_made_again(tmp_path, cache):
    _write(tmp_path / "a.txt", DOCUMENTS)
    files = TextFiles(str(tmp_path / "a.txt"), validation_share=0.0)
    text_files.prepare(files)
    next(cache.rglob("*.tfrecord")).unlink()
    text_files.prepare.cache_clear()
    assert _texts(files, "train", shuffle=False) == DOCUMENTS


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    files = TextFiles(str(path), validation_share=0.0)
    _write(path, ["old text"])
    assert _texts(files, "train") == ["old text"]
    _write(path, ["new text"])  # of the same size
    os.utime(path, ns=(1, 1))
    text_files.prepare.cache_clear()
    assert _texts(files, "train") == ["new text"]


def test_shards_are_named_by_what_they_hold(tmp_path, monkeypatch):
    """A copy under another name and of another time has those of the original on any host."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", 1000)

    def names(path) -> list[str]:
        splits = text_files.prepare(TextFiles(str(path), validation_share=0.1))
        return [os.path.basename(s) for split in splits.values() for s in split.shards]

    _write(tmp_path / "a.txt", DOCUMENTS)
    expected = names(tmp_path / "a.txt")
    assert len(set(expected)) > 4
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "other_cache"))
    _write(tmp_path / "copy.txt.gz", DOCUMENTS)
    assert names(tmp_path / "copy.txt.gz") == expected
    _write(tmp_path / "moved.txt", [*DOCUMENTS[1:], DOCUMENTS[0]])
    assert names(tmp_path / "moved.txt") != expected


def test_long_files_become_several_shards_which_hosts_share(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 1000)
    _write(tmp_path / "a.txt", DOCUMENTS)
    files = TextFiles(str(tmp_path / "a.txt"), validation_share=0.0)
    source = text_files.TextFilesSource(lambda: files)
    assert len(source.list_shards("train")) > 4
    assert source.num_input_examples("train") == len(DOCUMENTS)
    hosts = [
        _texts(files, "train", seed=3, shard_info=seqio.ShardInfo(index=i, num_shards=2))
        for i in range(2)
    ]
    assert collections.Counter(hosts[0] + hosts[1]) == collections.Counter(DOCUMENTS)


def test_an_interrupted_conversion_leaves_nothing_half_done(tmp_path, cache, monkeypatch):
    _write(tmp_path / "a.txt", DOCUMENTS)
    files = TextFiles(str(tmp_path / "a.txt"), validation_share=0.0)

    def interrupted(text, share):
        if text == DOCUMENTS[100].encode():
            raise KeyboardInterrupt
        return "train"

    with monkeypatch.context() as m:
        m.setattr(conversion, "_split_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text_files.prepare(files)
    assert not [p for p in cache.rglob("*") if p.suffix in (".tmp", ".json")]
    assert _texts(files, "train", shuffle=False) == DOCUMENTS


# ---- bad input -----------------------------------------------------------------------------------

CORRUPT = {
    b'{"text": "cut o': "line 2: not valid JSON",
    b'{"body": "x"}': "line 2: no field 'text' .fields: 'body'",
    b'{"text": 5}': "line 2: field 'text' is not a string but int",
    b'{"text": null}': "line 2: field 'text' is not a string but NoneType",
    b"[1, 2]": "line 2: a JSON list, not an object",
    b'{"text": "\xff\xfe"}': "line 2: not valid UTF-8 .byte 10",
    b'{"text": "\\ud800"}': "line 2: field 'text' has half of a surrogate pair",
    b"[" * 100_000: "line 2: not",
}


@pytest.mark.parametrize("line", CORRUPT)
def test_corrupt_line(tmp_path, line, caplog):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good + line + b"\n" + good + line + b"\n")
    files = TextFiles(str(path), field="text", validation_share=0.0)
    with pytest.raises(UsageError, match=CORRUPT[line]) as error:
        text_files.prepare(files)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    assert "2 corrupt lines in all" in message and "TEXT_FILES_SKIP_CORRUPT_LINES" in message

    skipping = TextFiles(str(path), "text", validation_share=0.0, skip_corrupt_lines=True)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert _texts(skipping, "train") == ["good", "good"]
    assert "2 corrupt lines" in caplog.text


def test_plain_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xe4\n")
    assert "a.txt line 2: not valid UTF-8" in _error(TextFiles(str(tmp_path / "a.txt")))


def test_cut_gzip(tmp_path):
    _write(tmp_path / "a.txt.gz", DOCUMENTS)
    data = (tmp_path / "a.txt.gz").read_bytes()
    (tmp_path / "a.txt.gz").write_bytes(data[: len(data) // 2])
    assert "a.txt.gz cannot be read" in _error(TextFiles(str(tmp_path / "a.txt.gz")))


def test_pattern_without_files(tmp_path):
    (tmp_path / "directory.txt").mkdir()
    pattern = str(tmp_path / "*.txt")
    assert f"TEXT_FILES_PATTERN {pattern!r} matches no file" in _error(TextFiles(pattern))
    _write(tmp_path / "a.text", DOCUMENTS)
    files = TextFiles(str(tmp_path / "a.text"), validation_pattern=pattern)
    assert f"TEXT_FILES_VALIDATION_PATTERN {pattern!r} matches no file" in _error(files)


def test_files_without_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n \n")
    assert "no text to train on" in _error(TextFiles(str(tmp_path / "a.txt")))


def test_jsonl_without_field(tmp_path):
    _write(tmp_path / "a.jsonl", DOCUMENTS, "text")
    assert "TEXT_FILES_FIELD" in _error(TextFiles(str(tmp_path / "a.jsonl")))


def test_validation_share_out_of_range():
    with pytest.raises(UsageError, match=r"TEXT_FILES_VALIDATION_SHARE is 1.5"):
        TextFiles("x", validation_share=1.5)


def test_empty_validation_split(tmp_path):
    _write(tmp_path / "a.txt", DOCUMENTS)
    files = TextFiles(str(tmp_path / "a.txt"), validation_share=0.0)
    with pytest.raises(UsageError, match="no document fell into the validation split"):
        _texts(files, "validation")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    _write(tmp_path / "a.txt", DOCUMENTS)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "file" / "cache"))
    assert "T5X_LITE_CACHE" in _error(TextFiles(str(tmp_path / "a.txt")))
