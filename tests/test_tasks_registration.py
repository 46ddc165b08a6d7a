"""The registered tasks, through seqio as training uses them."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

import tasks
from t5x_lite.errors import UsageError
from tasks import sources, text_files, vocabularies

LENGTHS = {"inputs": 512, "targets": 114}
OBJECTIVES = ("span_corruption", "prefix_lm", "iid_denoising", "full_lm")
C4_VERSIONS = ("220", "221", "230", "231", "301", "310")


@pytest.fixture(autouse=True)
def configuration(tmp_path_factory):
    """What a test sets, it sets for itself alone."""
    vocabulary_file = vocabularies.DEFAULT.file
    yield
    vocabularies.set_default_file(vocabulary_file)
    seqio.set_tfds_data_dir_override(None)
    text_files._configured = None


@pytest.fixture
def c4(shared_data):
    """The stand-in for C4 with T5's vocabulary."""
    seqio.set_tfds_data_dir_override(str(shared_data / "tfds"))
    vocabularies.set_default_file(str(shared_data / "vocabs" / "t5_sentencepiece_32000.model"))
    return shared_data


def _get(name: str, **kwargs) -> tf.data.Dataset:
    return seqio.get_mixture_or_task(name).get_dataset(**{"sequence_length": LENGTHS} | kwargs)


def _examples(dataset: tf.data.Dataset) -> list[dict[str, list]]:
    return [{k: v.tolist() for k, v in e.items()} for e in dataset.as_numpy_iterator()]


def test_names():
    corpora = [*(f"c4_v{version}" for version in C4_VERSIONS), "python_docs", "text_files"]
    expected = {f"{corpus}_{objective}" for corpus in corpora for objective in OBJECTIVES}
    assert expected <= set(seqio.TaskRegistry.names())


def test_features():
    for corpus in ("c4_v310", "python_docs", "text_files"):
        for objective in OBJECTIVES:
            features = seqio.get_mixture_or_task(f"{corpus}_{objective}").output_features
            expected = {"targets"} if objective == "full_lm" else {"inputs", "targets"}
            assert set(features) == expected
            assert all(f.add_eos and f.dtype == tf.int32 for f in features.values())


def test_import_reads_nothing(tmp_path):
    """Python opens no file but modules, and neither data, vocabulary nor cache is touched."""
    code = """
import sys, seqio, sentencepiece
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import tasks
from tasks import vocabularies
assert not [f for f in opened if not f.endswith((".py", ".pyc"))], opened
assert vocabularies._load.cache_info().misses == 0
assert not seqio.LazyTfdsLoader._MEMOIZED_BUILDERS
print(len(seqio.TaskRegistry.names()))
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"T5X_LITE_CACHE": str(tmp_path / "cache")},
        cwd=os.path.dirname(os.path.dirname(tasks.__file__)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= 32
    assert not (tmp_path / "cache").exists()


def test_c4_segments_are_exactly_full(c4):
    examples = _examples(_get("c4_v310_span_corruption", shuffle=False, seed=1))
    lengths = [(len(e["inputs"]), len(e["targets"])) for e in examples]
    # Only the last segment of 128 joined documents may be short: 436 documents, 4 groups.
    assert len(lengths) > 100
    assert sum(length != (512, 114) for length in lengths) <= 4
    for example in examples:
        assert example["inputs"][-1] == example["targets"][-1] == 1
        assert example["targets"][0] == 32099
        assert max(example["inputs"]) <= 32099


def test_c4_text_comes_through(c4):
    """Sentinels put back, the stream is the tokenised text of the data set, in its order."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("c4/en:3.1.0", data_dir=str(c4 / "tfds"))
    vocabulary = vocabularies.DEFAULT.resolve()
    expected = [
        token
        for example in builder.as_dataset(split="validation").as_numpy_iterator()
        for token in vocabulary.encode(example["text"].decode())
    ]
    merged: list[int] = []
    dataset = _get("c4_v310_span_corruption", split="validation", shuffle=False, seed=5)
    for example in _examples(dataset):
        spans: dict[int, list[int]] = {}
        for token in example["targets"][:-1]:
            if token >= 32000:
                sentinel = token
            spans.setdefault(sentinel, []).append(token)
        for token in example["inputs"][:-1]:
            merged += spans[token][1:] if token >= 32000 else [token]
    assert merged == expected


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_over_c4(c4, objective):
    """What each objective promises about its lengths and its end marks."""
    lengths = {"inputs": 256, "targets": 256}
    dataset = _get(f"c4_v310_{objective}", sequence_length=lengths, shuffle=False, seed=1)
    examples = _examples(dataset.take(50))
    assert len(examples) == 50
    for example in examples:
        assert all(len(ids) <= 256 for ids in example.values())
        if objective == "full_lm":
            assert len(example["targets"]) == 256
        else:
            assert example["inputs"][-1] == example["targets"][-1] == 1
        if objective == "prefix_lm":
            assert len(example["inputs"]) + len(example["targets"]) - 2 <= 255
    if objective == "full_lm":
        # One EOS for each document of the first 50 segments, some of it inside.
        assert 10 < sum(e["targets"].count(1) for e in examples) < 100


@pytest.mark.parametrize("version", ["220", "301", "310"])
def test_data_set_that_is_not_prepared(tmp_path, version):
    seqio.set_tfds_data_dir_override(str(tmp_path))
    with pytest.raises(UsageError) as error:
        _get(f"c4_v{version}_span_corruption")
    message = str(error.value)
    dotted = ".".join(version)
    assert "\n" not in message
    assert f"c4/en:{dotted} is not prepared: looked in {tmp_path}/c4/en/{dotted}" in message
    command = "tfds build c4/en:3.1.0 --data_dir=" if version == "310" else "cp -r "
    assert command in message


def test_version_that_tfds_does_not_know_is_read_from_disk(c4, tmp_path):
    """3.0.1 is in no release of TFDS's code; people have it on disk."""
    target = tmp_path / "c4" / "en" / "3.0.1"
    target.mkdir(parents=True)
    for file in (c4 / "tfds" / "c4" / "en" / "3.1.0").iterdir():
        content = file.read_bytes()
        if file.name == "dataset_info.json":
            content = content.replace(b'"version": "3.1.0"', b'"version": "3.0.1"')
        (target / file.name).write_bytes(content)
    expected = _examples(_get("c4_v310_full_lm", shuffle=False, split="validation"))
    seqio.set_tfds_data_dir_override(str(tmp_path))
    assert _examples(_get("c4_v301_full_lm", shuffle=False, split="validation")) == expected


def test_text_files_without_configuration():
    with pytest.raises(UsageError, match="TEXT_FILES_PATTERN"):
        _get("text_files_span_corruption")


def test_missing_vocabulary_is_one_line(c4, tmp_path):
    vocabularies.set_default_file(str(tmp_path / "absent.model"))
    with pytest.raises(UsageError, match="VOCABULARY_FILE") as error:
        _get("c4_v310_span_corruption")
    assert "\n" not in str(error.value)


# ---- seeds, hosts, resuming ----------------------------------------------------------------------


@pytest.fixture
def any_task(c4, tmp_path, monkeypatch):
    """Each corpus, ready for use."""
    path = tmp_path / "documents.txt"
    path.write_text("".join(f"Document {i} is about the number {i}.\n" for i in range(3000)))
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    text_files.configure(text_files.TextFiles(str(path), validation_share=0.1))


# The vocabulary of python_docs takes seconds to train: its source is tested without its tokens.
RESUMED = (
    "c4_v310_span_corruption",
    "c4_v310_prefix_lm",
    "c4_v310_iid_denoising",
    "c4_v310_full_lm",
    "text_files_span_corruption",
)


def _training_stream(name: str, seed: int, index: int = 0, hosts: int = 1) -> tf.data.Dataset:
    return _get(
        name,
        seed=seed,
        num_epochs=None,
        shuffle_buffer_size=20,
        shard_info=seqio.ShardInfo(index, hosts) if hosts > 1 else None,
    )


@pytest.mark.parametrize("name", RESUMED)
def test_seed_fixes_the_stream(any_task, name):
    def stream(seed):
        return _examples(_training_stream(name, seed).take(30))

    assert stream(3) == stream(3)
    assert stream(3) != stream(4)


@pytest.mark.parametrize("name", RESUMED)
def test_saved_iterator_goes_on_where_it_was(any_task, name, tmp_path):
    iterator = iter(_training_stream(name, seed=3))
    for _ in range(25):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "iterator"))
    expected = [next(iterator) for _ in range(200)]  # into the next epoch

    resumed = iter(_training_stream(name, seed=3))
    tf.train.Checkpoint(iterator=resumed).read(path).assert_consumed()
    for example in expected:
        for key, value in next(resumed).items():
            np.testing.assert_array_equal(value, example[key])


def test_hosts_have_no_segment_in_common(any_task):
    hosts = [
        {
            tuple(e["targets"])
            for e in _examples(
                _get("c4_v310_full_lm", shuffle=False, shard_info=seqio.ShardInfo(i, 4))
            )
        }
        for i in range(4)
    ]
    assert all(hosts)
    assert sum(map(len, hosts)) == len(set.union(*hosts))


def test_records_source_is_shuffled_shared_and_resumable(tmp_path):
    texts = [f"text {i}" for i in range(100)]
    source = sources.RecordsSource(
        ["train"], lambda split: [{"text": text} for text in texts], ["text"]
    )
    assert source.num_input_examples("train") == 100

    def read(**kwargs) -> list[str]:
        return [
            e["text"].decode() for e in source.get_dataset("train", **kwargs).as_numpy_iterator()
        ]

    assert read(shuffle=False) == texts
    shuffled = read(seed=1)
    assert sorted(shuffled) == sorted(texts) != shuffled
    assert read(seed=1) == shuffled != read(seed=2)
    hosts = [read(seed=1, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]
    assert sorted(itertools.chain(*hosts)) == sorted(texts)

    iterator = iter(source.get_dataset("train", seed=1))
    for _ in range(40):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "iterator"))
    resumed = iter(source.get_dataset("train", seed=1))
    tf.train.Checkpoint(iterator=resumed).read(path)
    assert [e["text"].numpy().decode() for e in resumed] == shuffled[40:]
