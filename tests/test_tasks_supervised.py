"""Supervised tasks end to end, from TFDS's files to ids, and the steps that golden files lack."""

import collections

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

import tasks  # noqa: F401  registers them
from tasks import coreference, question_answering, vocabularies

LENGTHS = {"inputs": 64, "targets": 8}


@pytest.fixture
def tfds_data(shared_data):
    seqio.set_tfds_data_dir_override(str(shared_data / "tfds"))
    vocabularies.set_default_file(str(shared_data / "vocabs" / "t5_sentencepiece_32000.model"))
    return shared_data / "tfds"


def _examples(name: str, **kwargs) -> list[dict]:
    task = seqio.TaskRegistry.get(name)
    options = {"sequence_length": LENGTHS, "shuffle": False} | kwargs
    return list(task.get_dataset(**options).as_numpy_iterator())


@pytest.mark.parametrize(
    ("benchmark", "classes"),
    [("sst2", ["negative", "positive"]), ("cola", ["unacceptable", "acceptable"])],
)
def test_glue_from_files_to_ids_and_back(tfds_data, benchmark, classes):
    name = f"glue_{benchmark}_v002"
    builder = tfds.builder(f"glue/{benchmark}:2.0.0", data_dir=str(tfds_data))
    records = list(builder.as_dataset(split="validation").as_numpy_iterator())
    examples = _examples(name, split="validation")
    assert len(examples) == len(records)
    vocabulary = vocabularies.DEFAULT.resolve()
    task = seqio.TaskRegistry.get(name)
    for record, example in zip(records, examples, strict=True):
        text = f"{benchmark} sentence: {record['sentence'].decode()}"
        assert example["inputs_pretokenized"].decode() == text
        assert example["targets_pretokenized"].decode() == classes[record["label"]]
        assert example["idx"] == record["idx"]
        assert example["inputs"].tolist() == [*vocabulary.encode(text)[: LENGTHS["inputs"] - 1], 1]
        assert example["inputs"].dtype == example["targets"].dtype == np.int32
        decoded = vocabulary.decode(example["targets"].tolist())
        assert task.postprocess_fn(decoded, example=example, is_target=False) == record["label"]


def test_targets_measured_against_themselves_are_perfect(tfds_data):
    for name, metric in (("glue_sst2_v002", "accuracy"), ("glue_cola_v002", "matthews_corrcoef")):
        task = seqio.TaskRegistry.get(name)
        labels = [
            task.postprocess_fn(e["targets_pretokenized"].decode(), example=e, is_target=True)
            for e in _examples(name, split="validation")
        ]
        assert set(labels) == {0, 1}
        (metric_fn,) = task.predict_metric_fns
        assert metric_fn(labels, labels) == {metric: 100.0}


def test_unlabelled_split(tfds_data):
    examples = _examples("glue_sst2_v002", split="test")
    assert {e["targets_pretokenized"] for e in examples} == {b"<unk>"}


def test_position_in_a_supervised_task_is_saved(tfds_data, tmp_path):
    def stream():
        task = seqio.TaskRegistry.get("glue_cola_v002")
        return task.get_dataset(LENGTHS, split="train", seed=3, num_epochs=None)

    iterator = iter(stream())
    for _ in range(100):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "iterator"))
    expected = [next(iterator)["idx"].numpy() for _ in range(200)]
    resumed = iter(stream())
    tf.train.Checkpoint(iterator=resumed).read(path).assert_consumed()
    assert [next(resumed)["idx"].numpy() for _ in range(200)] == expected


# ---- WSC -----------------------------------------------------------------------------------------


def test_texts_of_wsc_that_are_cast_by_hand():
    """The two texts of the data set whose span is wrong come out with the pronoun in its place."""
    texts = list(coreference._BY_HAND)
    records = {
        "text": texts,
        "span1_text": ["The pony", "the magic pebble"],
        "span2_text": ["him", "it"],
        "span2_index": [23, 31],
        "label": [0, 1],
        "idx": [0, 1],
    }
    dataset = tf.data.Dataset.from_tensor_slices(records)
    cast = coreference.wsc_simple(dataset, task="wsc", correct_referent_only=False)
    inputs = [example["inputs"].decode() for example in cast.as_numpy_iterator()]
    assert inputs[0].endswith('"Good for *him* ," he said.')
    assert "Some day they might want to use *it* , but really for now" in inputs[1]
    for text, found in zip(texts, inputs, strict=True):
        words = [found.removeprefix("wsc: ").replace("*", "").split(), text.split()]
        if text == texts[0]:  # "him," is taken apart
            words[1] = text.replace('him,"', 'him ,"').split()
        assert words[0] == words[1]


# ---- SQuAD and TriviaQA --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "answer", "expected"),
    [
        ("a b c d", "b c", "start: 1 end: 2"),
        ("b c a b c d", "b c", "start: 0 end: 1"),  # the first place
        ("a  b c", "b", "start: 2 end: 2"),  # an empty word between the spaces
        ("a b c", "c", ""),  # T5 does not try the last place
        ("a b", "b c d", ""),
        ("a", "a b c", ""),
        ("a b c", "x", ""),
    ],
)
def test_span_of_an_answer(context, answer, expected):
    found = question_answering._span(tf.constant(context), tf.constant(answer))
    assert found.numpy().decode() == expected


def _truncate(inputs: list[int], targets: list[int], length: int, times: int) -> list[list[int]]:
    """What becomes of the inputs, time after time."""
    example = {"inputs": tf.constant(inputs, tf.int32), "targets": tf.constant(targets, tf.int32)}
    dataset = tf.data.Dataset.from_tensors(example).repeat(times)
    with seqio.utils.map_seed_manager(1):
        cut = question_answering.truncate_around_answer(dataset, {"inputs": length})
    return [example["inputs"].tolist() for example in cut.as_numpy_iterator()]


def test_long_context_is_cut_around_its_answer():
    """Every window that has the whole answer comes up, about as often as any other."""
    inputs = list(range(100, 140))
    counts = collections.Counter(map(tuple, _truncate(inputs, [110, 111, 112], 11, times=800)))
    assert set(counts) == {tuple(inputs[start : start + 10]) for start in range(3, 11)}
    assert all(abs(count - 100) < 50 for count in counts.values())  # 5 standard deviations


def test_windows_at_the_ends_of_a_context():
    inputs = list(range(100, 120))
    first = _truncate(inputs, [100, 101], 11, times=20)
    last = _truncate(inputs, [118, 119], 11, times=20)
    assert first == [list(range(100, 110))] * 20
    assert last == [list(range(110, 120))] * 20


def test_short_context_is_whole_and_one_without_its_answer_left_out():
    assert _truncate([5, 6, 7], [9], 11, times=1) == [[5, 6, 7]]
    assert _truncate(list(range(100, 120)), [7], 11, times=1) == []
