"""The supervised tasks against what the `t5` library gives: texts, post-processing, metrics."""

import json
import math

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

import tasks  # noqa: F401  registers them
from tasks import casts, metrics, postprocessors, qa_metrics, vocabularies

TOLERANCE = 1e-6  # as the golden file states

# Functions of t5's that no task of ours has a use for.
NOT_OURS = {
    "auc": "T5 has no task that reports it",
    "coqa_f1": "for CoQA, which is not among the tasks",
    "edit_distance": "T5 has no task that reports it",
    "rank_classification": "takes one example per class; here it is a mode of evaluation",
    "lower_text": "T5 has no task that calls it",
}
METRICS = {
    "accuracy": metrics.accuracy,
    "all_match": metrics.all_match,
    "bleu": metrics.bleu,
    "deduplicate_metric(accuracy)": metrics.deduplicate_metric(metrics.accuracy),
    "f1_score_with_invalid": metrics.f1_score_with_invalid,
    "mean_group_metric(all_match)": metrics.mean_group_metric(metrics.all_match),
    "multirc_f1_over_all_answers": metrics.multirc_f1_over_all_answers,
    "pearson_corrcoef": metrics.pearson_corrcoef,
    "rouge": metrics.rouge,
    "rouge_mean": metrics.rouge_mean,
    "sequence_accuracy": metrics.sequence_accuracy,
    "sklearn_metrics_wrapper(matthews_corrcoef, times 100)": metrics.matthews_corrcoef,
    "spearman_corrcoef": metrics.spearman_corrcoef,
    "squad": qa_metrics.squad,
    "trivia_qa": qa_metrics.trivia_qa,
}


@pytest.fixture(scope="module")
def text_casting(shared_data):
    return json.loads((shared_data / "golden" / "text_casting.json").read_text())


@pytest.fixture(scope="module")
def postprocess_metrics(shared_data):
    return json.loads((shared_data / "golden" / "postprocess_metrics.json").read_text())


@pytest.fixture(autouse=True)
def t5_vocabulary(shared_data):
    vocabularies.set_default_file(str(shared_data / "vocabs" / "t5_sentencepiece_32000.model"))


# ---- casting -------------------------------------------------------------------------------------


def _spec(value, key: str):
    """The tensor that TFDS gives for a value of a record."""
    if isinstance(value, dict):
        return {k: _spec(v, k) for k, v in value.items()}
    if isinstance(value, list):
        dtype = tf.int32 if key in ("answer_start", "rank") else tf.string
        return tf.TensorSpec([None], dtype)
    dtypes = {str: tf.string, float: tf.float32, int: tf.int64 if key == "label" else tf.int32}
    return tf.TensorSpec([], dtypes[type(value)])


def _cast(name: str, records: list[dict]) -> list[dict]:
    """Everything that the task makes of the records before it is cached, less the ids."""
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(records), output_signature=_spec(records[0], "")
    )
    found = []
    for example in seqio.TaskRegistry.get(name).preprocess_precache(dataset).as_numpy_iterator():
        del example["inputs"], example["targets"]
        found.append({k.removesuffix("_pretokenized"): _plain(v) for k, v in example.items()})
    return found


def _plain(value):
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    return value.decode() if isinstance(value, bytes) else value.item()


def test_every_record_is_cast_as_t5_does(text_casting):
    assert len(text_casting["tasks"]) >= 36
    num_records = 0
    for task in text_casting["tasks"]:
        good = [item for item in task["items"] if item["outputs"] is not None]
        expected = [output for item in good for output in item["outputs"]]
        assert _cast(task["task"], [item["record"] for item in good]) == expected, task["task"]
        num_records += len(good)
    assert num_records >= 165


def test_records_that_t5_refuses_are_refused_in_one_line(text_casting):
    num_refused = 0
    for task in text_casting["tasks"]:
        for item in task["items"]:
            if item["outputs"] is None:
                with pytest.raises(tf.errors.InvalidArgumentError) as error:
                    _cast(task["task"], [item["record"]])
                message = casts.problem(error.value)
                assert task["task"] in message
                assert f"'{item['record']['span2_text']}' is not word" in message
                assert message.endswith("(word 0)")
                num_refused += 1
    assert num_refused >= 4


def test_splits_are_t5s(text_casting):
    for task in text_casting["tasks"]:
        if task["registered_splits"] is not None:
            assert sorted(seqio.TaskRegistry.get(task["task"]).splits) == task["registered_splits"]


# ---- post-processing and metrics -----------------------------------------------------------------


def _is_close(found, expected) -> bool:
    """Equal, floats up to the tolerance; the golden file's way to write nan and inf is understood.

    Groups may be tuples where JSON has lists.
    """
    if isinstance(expected, dict) and set(expected) == {"nonfinite"}:
        expected = float(expected["nonfinite"])
        return math.isnan(found) if math.isnan(expected) else found == expected
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(
            _is_close(found[k], v) for k, v in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_is_close, found, expected))
    if isinstance(expected, float):
        return abs(found - expected) <= TOLERANCE
    return type(found) is type(expected) and found == expected


def _as_read(example: dict) -> dict:
    """An example as it comes out of tf.data: strings are bytes, numbers numpy's."""
    read = {}
    for key, value in example.items():
        if isinstance(value, list):
            read[key] = np.array([v.encode() for v in value], object)
        else:
            read[key] = value.encode() if isinstance(value, str) else np.int32(value)
    return read | {"targets_pretokenized": read["targets"]}


def test_outputs_are_postprocessed_and_measured_as_t5_does(postprocess_metrics):
    num_cases = 0
    for case in postprocess_metrics["tasks"]:
        task = seqio.TaskRegistry.get(case["task"])
        targets, predictions = [], []
        for item in case["items"]:
            example = _as_read(item["example"])
            text = item["example"]["targets"]
            target = task.postprocess_fn(text, example=example, is_target=True)
            prediction = task.postprocess_fn(item["output"], example=example, is_target=False)
            where = (case["task"], case["case"], item)
            assert _is_close(target, item["postprocessed_target"]), where
            assert _is_close(prediction, item["postprocessed_output"]), where
            targets.append(target)
            predictions.append(prediction)
        found, num_raised = {}, 0
        for metric_fn in task.predict_metric_fns:
            try:
                found |= metric_fn(targets, predictions)
            except ValueError as e:
                assert "this split has" in str(e)
                num_raised += 1
        assert _is_close(found, case["metrics"]), (case["task"], case["case"], found)
        assert num_raised == len(case.get("raises", ()))
        assert all(type(value) is float for value in found.values())
        num_cases += 1
    assert num_cases >= 63


def _metric(call: dict):
    """The function and the keyword arguments of a golden call."""
    kwargs = dict(call["kwargs"])
    kwargs.pop("verbose", None)  # only says what is logged
    name = call["function"]
    if name == "mean_multiclass_f1":
        return metrics.mean_multiclass_f1(kwargs.pop("num_classes")), kwargs
    if name == "rouge":
        kwargs["seed"] = call["numpy_global_seed"]
    return METRICS[name], kwargs


def test_metric_functions_give_what_t5s_give(postprocess_metrics):
    num_calls = 0
    for call in postprocess_metrics["metric_calls"]:
        if call["function"] in NOT_OURS or call["kwargs"].get("return_subgroup_scores"):
            continue  # no task of T5's reports the scores of each group
        metric_fn, kwargs = _metric(call)
        found = metric_fn(call["targets"], call["predictions"], **kwargs)
        assert _is_close(found, call["result"]), (call["function"], kwargs, found)
        num_calls += 1
    assert num_calls >= 38


def test_rouge_leaves_numpys_state_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    metrics.rouge(["a cat sat ."], ["a cat ."])
    assert np.random.random() == expected


def test_postprocessors_give_what_t5s_give(postprocess_metrics):
    ours = {
        "string_to_float": lambda text: postprocessors.number(text),
        "string_label_to_class_id": lambda text, label_classes: postprocessors.ClassLabel(
            tuple(label_classes)
        )(text),
        "wsc_simple": postprocessors.is_referent,
    }
    num_calls = 0
    for call in postprocess_metrics["postprocessor_calls"]:
        if call["function"] in NOT_OURS or "default" in call["kwargs"]:
            continue  # what cannot be read is -1 in all of T5's tasks
        found = ours[call["function"]](call["input"], **call["kwargs"])
        assert _is_close(found, call["result"]), call
        num_calls += 1
    assert num_calls >= 32


# ---- what other rooms ask of the tasks -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "benchmark", "config"),
    [
        *((f"glue_{config}_v002", "glue", config) for config in ("cola", "sst2", "mrpc", "qqp")),
        *((f"glue_{config}_v002", "glue", config) for config in ("qnli", "rte", "wnli", "ax")),
        *((f"glue_{c}_v002", "glue", c) for c in ("mnli", "mnli_matched", "mnli_mismatched")),
        *((f"super_glue_{c}_v102", "super_glue", c) for c in ("boolq", "cb", "copa", "multirc")),
        *((f"super_glue_{c}_v102", "super_glue", c) for c in ("rte", "wic", "axb", "axg")),
    ],
)
def test_classes_are_tfds_labels_in_their_order(name, benchmark, config):
    classes = tuple(tfds.builder_cls(benchmark).builder_configs[config].label_classes)
    assert seqio.TaskRegistry.get(name).postprocessor.classes == classes


@pytest.mark.parametrize(
    "name", ["glue_stsb_v002", "squad_v010_allanswers", "super_glue_wsc_v102_simple_eval"]
)
def test_other_tasks_have_no_classes(name):
    assert not hasattr(seqio.TaskRegistry.get(name).postprocessor, "classes")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("glue_sst2_v002", {"sentence": "so so", "label": 7, "idx": 1}),
        ("imdb_reviews_v100", {"text": "so so", "label": -2}),
    ],
)
def test_label_outside_the_classes(name, record):
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        _cast(name, [record])
    assert casts.problem(error.value) == (
        f"{name}: label {record['label']} is not 0 'negative', 1 'positive', or -1 (unlabelled)"
    )


def test_label_that_is_no_candidate():
    record = {"sentence": "A saw B .", "pronoun": "it", "candidates": ["A", "B"], "label": 2}
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        _cast("dpr_v001_simple", [record])
    message = "dpr_v001_simple: label 2 is not one of its 2 candidates, counted from 0"
    assert casts.problem(error.value) == message


def test_problem_in_a_python_step_and_its_accents():
    record = {"sentence1": "Zoë ran.", "sentence2": "Ran.", "label": 1, "idx": 0}
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        _cast("glue_wnli_v002_simple_eval", [record])
    message = "glue_wnli_v002_simple_eval: no pronoun in 'Zoë ran.'"
    assert casts.problem(error.value) == message


def test_problem_shows_accents_of_an_assertion():
    record = {
        "text": "Zoë saw Él .",
        "span1_text": "Zoë",
        "span2_text": "Él",
        "span2_index": 1,
        "label": 1,
        "idx": 0,
    }
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        _cast("super_glue_wsc_v102_simple_eval", [record])
    assert "the pronoun 'Él' is not word 1 of 'Zoë saw Él .'" in casts.problem(error.value)


def test_other_errors_are_no_problem_of_a_record():
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        tf.debugging.assert_equal(1, 2)
    assert casts.problem(error.value) is None
