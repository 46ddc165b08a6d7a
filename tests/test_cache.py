"""The verb `cache`: the task's own rows, in the same files whoever makes them, killed or not."""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import re
import shlex
import signal
import time

import numpy as np
import pytest
import seqio
import tensorflow as tf
import toy_tasks
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from etils.epath import gpath, stat_utils
from small_run import flip_a_bit, start
from test_metrics import ObjectStore

from t5x_lite import cache, cache_files, row_records
from t5x_lite.__main__ import main
from t5x_lite.cache_files import Manifest

TESTS = pathlib.Path(__file__).resolve().parent
LENGTHS = {"inputs": 24, "targets": 8}
SPLIT = "toy_last_word/train"
C4_SPLIT = "c4_v310_span_corruption/train"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "toy.model"
    path.write_bytes(toy_tasks.vocabulary_model())
    return path


@pytest.fixture
def toy(vocabulary, monkeypatch):
    """The arguments of a cache of toy_last_word."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))

    def argv(output_dir, task="toy_last_word", **flags):
        flags = {
            "module": "toy_tasks",
            "vocabulary_file": vocabulary,
            "task_feature_lengths": "inputs=24,targets=8",
            "num_shards": 3,
            "num_processes": 1,
            "output_dir": output_dir,
        } | flags
        given = (f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items())
        return ["cache", task, *given]

    return argv


def c4_argv(shared_data, output_dir, **flags) -> list[str]:
    flags = {
        "vocabulary_file": shared_data / "vocabs" / "t5_sentencepiece_32000.model",
        "tfds_data_dir": shared_data / "tfds",
        "task_feature_lengths": "inputs=128,targets=32",
        "num_shards": 3,
        "num_processes": 1,
        "output_dir": output_dir,
    } | flags
    return ["cache", "c4_v310_span_corruption", *(f"--{k}={v}" for k, v in flags.items())]


def files_in(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def opened(output_dir, split=SPLIT) -> Manifest:
    manifest = cache_files.read_manifest(epath.Path(output_dir / split))
    assert manifest is not None
    return manifest


def rows_of(output_dir, split=SPLIT) -> list[dict[str, np.ndarray]]:
    """The rows of each file, in its order."""
    settings = opened(output_dir, split).settings
    found = []
    for path in sorted((output_dir / split).glob("*.array_record")):
        records = ArrayRecordReader(str(path)).read_all()
        found.append(
            row_records.decode(
                records, settings.feature_lengths, packed=settings.packed, dtype=settings.dtype
            )
        )
    return found


def examples_of(rows: dict[str, np.ndarray]) -> list[dict[str, list[int]]]:
    """The examples of packed rows, in their order."""
    found = []
    for row in range(len(rows["encoder_input_tokens"])):
        for number in range(1, rows["encoder_segment_ids"][row].max() + 1):
            example = {}
            for name, side, tokens in (
                ("inputs", "encoder", "encoder_input_tokens"),
                ("targets", "decoder", "decoder_target_tokens"),
            ):
                mask = rows[f"{side}_segment_ids"][row] == number
                example[name] = rows[tokens][row][mask].tolist()
            found.append(example)
    return found


def counted(examples) -> collections.Counter:
    return collections.Counter((tuple(e["inputs"]), tuple(e["targets"])) for e in examples)


def seqios_examples(task: str) -> list[dict[str, list[int]]]:
    dataset = seqio.get_mixture_or_task(task).get_dataset(LENGTHS, "train", shuffle=False)
    return [
        {name: example[name].tolist() for name in LENGTHS}
        for example in dataset.as_numpy_iterator()
    ]


# ---- what is in it -------------------------------------------------------------------------------


def test_the_rows_are_seqios(toy, tmp_path, capsys):
    """Its examples, each once in each pass; and packed as its converter packs them."""
    assert main(toy(tmp_path, num_passes=2)) == 0
    files = rows_of(tmp_path)
    assert len(files) == 3
    examples = [examples_of(rows) for rows in files]
    expected = counted(seqios_examples("toy_last_word"))
    assert counted(itertools.chain(*examples)) == expected + expected
    for rows, found in zip(files, examples, strict=True):
        # The last row of the first pass is closed although more would fit: pack half by half.
        half = len(found) // 2
        assert counted(found[:half]) == counted(found[half:])
        converted = [row for part in (found[:half], found[half:]) for row in convert(part)]
        for name, array in rows.items():
            np.testing.assert_array_equal(array, [row[name] for row in converted], err_msg=name)
    out = capsys.readouterr().out
    manifest = opened(tmp_path)
    assert f"{manifest.num_rows} rows in 3 files" in out
    assert sum(s.num_examples for s in manifest.shards) == 2 * len(seqios_examples("toy_last_word"))
    filled = np.concatenate([rows["encoder_input_tokens"] for rows in files]) > 0
    assert f"inputs {filled.mean():.1%}" in out
    assert sum(s.num_tokens["inputs"] for s in manifest.shards) == filled.sum()


def convert(examples) -> list[dict[str, np.ndarray]]:
    """What seqio's own converter makes of examples."""
    spec = {name: tf.TensorSpec([None], tf.int32) for name in LENGTHS}
    dataset = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)
    converter = seqio.EncDecFeatureConverter(pack=True)
    return list(converter(dataset, LENGTHS).as_numpy_iterator())


def test_one_example_a_row(toy, tmp_path):
    assert main(toy(tmp_path, no_pack=True)) == 0
    (tokens,) = ([rows["encoder_input_tokens"] for rows in rows_of(tmp_path)],)
    found = [tuple(t[t > 0].tolist()) for t in np.concatenate(tokens)]
    assert sorted(found) == sorted(tuple(e["inputs"]) for e in seqios_examples("toy_last_word"))
    assert "encoder_segment_ids" not in rows_of(tmp_path)[0]


@pytest.fixture(scope="module")
def c4(shared_data, tmp_path_factory):
    """A cache of C4 that one process made."""
    path = tmp_path_factory.mktemp("c4")
    assert main(c4_argv(shared_data, path)) == 0
    return path


def test_each_pass_and_file_has_noise_of_its_own(shared_data, c4, tmp_path):
    """The same text, other spans; and no two files share the mask of their n-th row."""
    assert main(c4_argv(shared_data, tmp_path, num_passes=2)) == 0
    one, two = rows_of(c4, C4_SPLIT), rows_of(tmp_path, C4_SPLIT)
    sentinels = []
    for first, both in zip(one, two, strict=True):
        count = len(first["encoder_input_tokens"])
        for name, array in first.items():
            np.testing.assert_array_equal(array, both[name][:count])
        second = both["encoder_input_tokens"][count:]
        assert abs(len(second) - count) <= 1
        n = min(count, len(second))
        same = (first["encoder_input_tokens"][:n] == second[:n]).all(axis=1)
        assert same.sum() == 0
        sentinels.append(first["encoder_input_tokens"] >= 32_000)
    n = min(map(len, sentinels))
    assert not (sentinels[0][:n] == sentinels[1][:n]).all(axis=1).any()


# ---- who makes it, and how often interrupted -----------------------------------------------------


def test_several_processes_killed_and_started_again(shared_data, c4, tmp_path, capfd):
    """The files are those of one process that nothing interrupted; nothing else is left."""
    process = start("-m", "t5x_lite", *c4_argv(shared_data, tmp_path, num_processes=2))
    directory = tmp_path / C4_SPLIT
    wait_for(lambda: list(directory.glob("*.json")))
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(map(is_alive, workers)))  # they do not go on alone
    assert len(workers) >= 2
    assert not (directory / "manifest.json").exists()
    whole = [note.with_suffix(".array_record") for note in directory.glob("*.json")]
    changed_at = {path: path.stat().st_mtime_ns for path in whole}
    assert 0 < len(whole) < 3

    assert main(c4_argv(shared_data, tmp_path)) == 0
    assert f"{len(whole)} of 3 files are there already" in capfd.readouterr().out
    assert files_in(directory) == files_in(c4 / C4_SPLIT)
    for path in whole:
        assert path.stat().st_mtime_ns == changed_at[path]


def wait_for(condition, seconds: float = 60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("no /proc/PID/task/PID/children")
    return [int(child) for child in path.read_text().split()]


def is_alive(pid: int) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_is_damaged_is_made_anew(toy, tmp_path, capsys):
    assert main(toy(tmp_path)) == 0
    expected = files_in(tmp_path / SPLIT)
    directory = tmp_path / SPLIT
    capsys.readouterr()
    assert main(toy(tmp_path)) == 0
    assert "It is complete" in capsys.readouterr().out
    flip_a_bit(directory / "rows-00001-of-00003.array_record")
    (directory / "rows-00002-of-00003.array_record").unlink()
    assert main(toy(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "rows-00001-of-00003.array_record is damaged: it is made anew" in out
    assert "rows-00002-of-00003.array_record is missing: it is made anew" in out
    assert "differs" not in out
    assert files_in(directory) == expected


class SizedStore(ObjectStore):
    """An object store that tells sizes, too."""

    def stat(self, path):
        size = len(self.objects[path])
        return stat_utils.StatResult(False, size, 0, "", "", 0)


def test_an_object_store(toy, tmp_path, monkeypatch):
    """Neither rename nor append: every file is put there whole, and a killed command goes on."""
    store = SizedStore()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    assert main(toy(tmp_path)) == 0
    write_note, left = cache_files.write_note, [2]

    def killed(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write_note(*arguments)

    monkeypatch.setattr(cache_files, "write_note", killed)
    assert main(toy("gs://bucket/caches")) == 130
    assert f"gs://bucket/caches/{SPLIT}/manifest.json" not in store.objects
    left[0] = 1
    assert main(toy("gs://bucket/caches")) == 0
    found = {key.rpartition("/")[2]: value for key, value in store.objects.items()}
    assert found == files_in(tmp_path / SPLIT)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "flags", "expected"),
    [
        ("toy_mixture", {}, "toy_mixture is a mixture: rows that hold the examples of one task"),
        ("toy_last_wrd", {}, "did you mean 'toy_last_word'"),
        ("toy_last_word", {"split": "trian"}, "--split=trian: toy_last_word has train, validation"),
        ("toy_sentiment", {"split": "empty"}, "one pass over 'empty' gives no row of {'inputs'"),
        ("toy_last_word", {"num_passes": 0}, "--num_passes=0: must be at least 1"),
        ("toy_last_word", {"num_shards": -1}, "--num_shards=-1: must be at least 1"),
        ("toy_last_word", {"num_processes": 0}, "--num_processes=0: must be at least 1"),
        ("toy_last_word", {"beam_options": "--runner=X"}, "Apache Beam is not installed (No mo"),
        ("toy_last_word", {"seed": -1}, "--seed=-1: must be at least 0"),
        ("toy_last_word", {"task_feature_lengths": "inputs=8"}, "has no length for 'targets'"),
        ("toy_bytes", {}, "--vocabulary_file has no effect on toy_bytes, which has its own vocab"),
    ],
)
def test_what_cannot_be_cached(toy, tmp_path, capfd, task, flags, expected):
    assert main(toy(tmp_path, task, **flags)) == 2
    error = capfd.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_place_that_cannot_be_written(toy, tmp_path, capfd):
    (tmp_path / "file").write_text("kept")
    assert main(toy(tmp_path / "file")) == 2
    assert f"{SPLIT} cannot be written: Not a directory" in capfd.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk(toy, tmp_path, monkeypatch, capfd):
    """What is whole stays; no half file does."""
    writer_of, left = cache.ArrayRecordWriter, [1]

    def on_a_full_disk(path, options):
        left[0] -= 1
        return writer_of(path if left[0] >= 0 else "/dev/full", options)

    monkeypatch.setattr(cache, "ArrayRecordWriter", on_a_full_disk)
    assert main(toy(tmp_path)) == 1
    error = capfd.readouterr().err
    assert "No space left on device" in error and "the same command goes on" in error
    assert set(files_in(tmp_path / SPLIT)) == {
        "rows-00000-of-00003.array_record",
        "rows-00000-of-00003.json",
    }


def test_other_settings_than_it_was_made_with(toy, tmp_path, capfd):
    assert main(toy(tmp_path)) == 0
    before = files_in(tmp_path / SPLIT)
    assert main(toy(tmp_path, num_passes=2, seed=5)) == 2
    error = capfd.readouterr().err
    assert "holds rows with other settings: num_passes: 1 -> 2; seed: 0 -> 5. Give ano" in error
    assert files_in(tmp_path / SPLIT) == before
    # The same while it is not complete.
    directory = epath.Path(tmp_path / SPLIT)
    manifest = opened(tmp_path)
    cache_files.write_note(directory, manifest.settings, 1, manifest.shards[1])
    (directory / "manifest.json").unlink()
    assert main(toy(tmp_path, no_pack=True)) == 2
    assert "other settings: packed: True -> False" in capfd.readouterr().err


def test_differences_are_readable(toy, tmp_path, capfd):
    """Vocabularies by kind, digest and size; digests of a source not at all."""
    assert main(toy(tmp_path)) == 0
    assert main(toy(tmp_path, vocabulary_file="bytes")) == 2
    content = (tmp_path / SPLIT / "vocabulary.model").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    error = capfd.readouterr().err
    assert f"vocabulary: SentencePiece {digest} (140 ids) -> bytes (259 ids). Give" in error
    made = opened(tmp_path).settings
    old, new = (dataclasses.replace(made, source=c * 64) for c in "ab")
    assert cache_files.differences(old, new) == [
        "the source's files have changed since it was made"
    ]
    old, new = (dataclasses.replace(made, source=f"c4/en:3.{i}.0") for i in (0, 1))
    assert cache_files.differences(old, new) == ["source: 'c4/en:3.0.0' -> 'c4/en:3.1.0'"]
    inputs = made.vocabularies["inputs"]
    new = dataclasses.replace(
        made, vocabularies={**made.vocabularies, "inputs": inputs | {"size": 9}}
    )
    assert cache_files.differences(made, new) == [
        f"vocabulary of inputs: SentencePiece {digest} (140 ids) -> SentencePiece {digest} (9 ids)"
    ]


def test_it_says_how_to_train(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(toy("caches")) == 0
    assert capfd.readouterr().out.endswith("""\ntrain with --gin.CACHE_DIR="'caches'"\n""")
    assert main(toy("my caches", no_pack=True)) == 0
    (said,) = re.findall("train with (.*)\n", capfd.readouterr().out)
    assert shlex.split(said) == ["--gin.CACHE_DIR='my caches'", "--gin.DataConfig.pack=False"]


def test_two_commands_at_once(toy, tmp_path, capfd):
    directory = epath.Path(tmp_path / SPLIT)
    directory.mkdir(parents=True)
    with cache._locked(directory):
        assert main(toy(tmp_path)) == 2
    assert "another process is writing it" in capfd.readouterr().err
