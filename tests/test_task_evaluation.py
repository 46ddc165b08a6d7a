"""Tasks measured by their own metrics: as seqio measures them, and every example once."""

import functools
import json
import logging
import pathlib

import jax
import numpy as np
import pytest
import seqio
import toy_tasks

from t5x_lite import data, task_evaluation
from t5x_lite.errors import UsageError
from t5x_lite.metrics import MetricWriter, read_metrics
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import make_partitioning
from t5x_lite.predict import Prediction, Predictor
from t5x_lite.run_config import EVAL_MODES, DataConfig
from t5x_lite.task_evaluation import EvalTask

LENGTHS = {"inputs": 32, "targets": 8}
TINY = T5Config(
    vocab_size=256,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    tie_embeddings=False,
)


@pytest.fixture(scope="module", autouse=True)
def vocabulary_file(tmp_path_factory, default_configuration) -> pathlib.Path:
    path = tmp_path_factory.mktemp("vocabulary") / "toy.model"
    path.write_bytes(toy_tasks.vocabulary_model())
    data.configure(DataConfig("toy_sentiment", LENGTHS, 4, vocabulary_file=str(path)))
    return path


def config_of(name: str) -> DataConfig:
    return DataConfig(name, LENGTHS, 4)


def open_task(name: str, split: str = "validation", num_examples: int | None = None) -> EvalTask:
    return EvalTask(config_of(name), seqio.TaskRegistry.get(name), split, num_examples)


def make_predictor(batch_size: int) -> Predictor:
    mesh = make_partitioning({"data": 1}, devices=jax.devices()[:1])
    return Predictor(TINY, mesh, batch_size=batch_size, input_length=32, target_length=8)


class Scripted:
    """A predictor whose answers are those given: text and likelihood as functions of the ids."""

    batch_size = 2

    def __init__(self, vocabulary, answers, likelihood=lambda inputs, targets: 0.0):
        self._vocabulary, self._answers, self._likelihood = vocabulary, answers, likelihood

    def ids(self, i: int) -> list[int]:
        return [*self._vocabulary.encode(self._answers[i]), 1, 0, 0]

    def generate(self, params, inputs, decode, *, seed=0, first_index=0):
        indices = range(first_index, first_index + len(inputs))
        return [Prediction(np.array([self.ids(i)]), np.array([-float(i)])) for i in indices]

    def score(self, params, inputs, targets):
        pairs = zip(inputs, targets, strict=True)
        return np.array([self._likelihood(i, t) for i, t in pairs], np.float32)


def likelihood(inputs, targets) -> float:
    return -float(np.sum(inputs) + 7 * np.sum(targets)) / 100


ANSWERS = {
    "toy_sentiment": ["positive", "negative", "negative", "", "positive", "neither", "negative"],
    "toy_last_word": ["good", "awful", "the", "", "awful", "poor", "film"],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_metrics_are_those_of_seqio(name, monkeypatch):
    """The same answers and likelihoods through seqio's Evaluator; ours in windows of two."""
    monkeypatch.setattr(task_evaluation, "_WINDOW_BATCHES", 1)
    eval_task = open_task(name)
    vocabulary = eval_task.task.output_features["targets"].vocabulary
    scripted = Scripted(vocabulary, ANSWERS[name], likelihood)
    found = task_evaluation.evaluate(eval_task, scripted, None)

    evaluator = seqio.Evaluator(
        name, seqio.EncDecFeatureConverter(pack=False), sequence_length=LENGTHS
    )

    def predict(dataset):
        width = max(len(scripted.ids(i)) for i in range(7))
        return [(int(i), np.pad(scripted.ids(int(i)), (0, width))[:width]) for i, _ in dataset]

    def score(dataset):
        return [
            (int(i), likelihood(e["encoder_input_tokens"], e["decoder_target_tokens"]))
            for i, e in dataset.as_numpy_iterator()
        ]

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=score)
    expected = {
        key: float(getattr(value, "value", value))
        for key, value in metrics.result()[name].items()
        if not isinstance(value, seqio.metrics.Text)
    }
    assert found.metrics == pytest.approx(expected, rel=1e-6)
    assert found.metrics["count"] == 7
    assert list(found.metrics) == eval_task.metric_names
    assert all(0 < expected[key] < 100 for key in ("accuracy", "same") if key in expected)


def test_records_say_what_was_asked_and_answered():
    eval_task = open_task("toy_last_word")
    vocabulary = eval_task.task.output_features["targets"].vocabulary
    scripted = Scripted(vocabulary, ANSWERS["toy_last_word"], likelihood)
    result = task_evaluation.evaluate(eval_task, scripted, None)
    assert result.task == "toy_last_word"
    for i, (record, (sentence, _)) in enumerate(
        zip(result.records, toy_tasks.rows("validation"), strict=True)
    ):
        assert record["idx"] == i
        assert record["inputs"] == f"last word: {sentence}"
        assert record["targets"] == sentence.split()[-1]
        assert record["prediction"] == ANSWERS["toy_last_word"][i]
        assert record["score"] == -i
        inputs, targets = ([*vocabulary.encode(record[f]), 1] for f in ("inputs", "targets"))
        expected = likelihood(inputs[: LENGTHS["inputs"]], targets)
        assert record["target_score"] == pytest.approx(expected, rel=1e-6)


def test_rank_takes_the_likeliest_class_and_the_first_of_equals():
    eval_task = open_task("toy_sentiment")
    vocabulary = eval_task.task.output_features["targets"].vocabulary
    positive = [*vocabulary.encode("positive"), 1]
    verdicts = [-1, 0, 1, 0, -1, 1, 1]
    verdict_of = dict(zip((tuple(e["inputs"]) for e in eval_task.examples), verdicts, strict=True))

    def prefers(inputs, targets) -> float:
        return -5.0 + verdict_of[tuple(inputs)] * (list(targets) == positive)

    result = task_evaluation.evaluate(eval_task, Scripted(vocabulary, [], prefers), None, "rank")
    expected = ["negative", "negative", "positive", "negative", "negative", "positive", "positive"]
    assert [record["prediction"] for record in result.records] == expected
    assert result.records[2]["scores"] == {"negative": -5.0, "positive": -4.0}
    assert result.records[2]["score"] == -4.0
    labels = [toy_tasks.CLASSES[label] for _, label in toy_tasks.rows("validation")]
    correct = sum(a == b for a, b in zip(expected, labels, strict=True))
    assert result.metrics == {"accuracy": pytest.approx(100 * correct / 7), "count": 7}


def test_rank_scores_are_the_models_log_likelihoods():
    """Against logits of the whole model, softmax in float64."""
    params = t5.init(TINY, jax.random.key(3))
    eval_task = open_task("toy_sentiment")
    found = task_evaluation.evaluate(eval_task, make_predictor(4), params, "rank")
    vocabulary = eval_task.task.output_features["targets"].vocabulary
    apply = jax.jit(functools.partial(t5.apply, TINY))
    for record, example in zip(found.records, eval_task.examples, strict=True):
        inputs = np.pad(example["inputs"], (0, 32 - len(example["inputs"])))
        expected = {}
        for name in toy_tasks.CLASSES:
            ids = np.array([*vocabulary.encode(name), 1])
            batch = {
                "encoder_input_tokens": inputs[None],
                "decoder_input_tokens": np.concatenate([[0], ids[:-1]])[None].astype(np.int32),
                "decoder_target_tokens": ids[None].astype(np.int32),
            }
            logits = np.asarray(apply(params, batch), np.float64)[0]
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            expected[name] = log_p[np.arange(len(ids)), ids].sum()
        assert record["scores"] == pytest.approx(expected, abs=1e-4)
        assert record["prediction"] == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_every_example_once_whatever_the_batch_size(mode, monkeypatch):
    """Also across the windows that are predicted together."""
    monkeypatch.setattr(task_evaluation, "_WINDOW_BATCHES", 2)
    params = t5.init(TINY, jax.random.key(5))
    eval_task = open_task("toy_sentiment")
    done: list[int] = []
    results = [
        task_evaluation.evaluate(
            eval_task, make_predictor(size), params, mode, on_progress=done.append
        )
        for size in (1, 3, 16)
    ]
    assert [record["idx"] for record in results[0].records] == list(range(7))
    assert results[0].metrics["count"] == 7
    for result in results[1:]:
        assert result.metrics == results[0].metrics
        for one, other in zip(result.records, results[0].records, strict=True):
            assert one["prediction"] == other["prediction"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    assert done.count(7) == len(results)


def test_what_is_written_replaces_what_was(tmp_path):
    eval_task = open_task("toy_sentiment", "test")
    vocabulary = eval_task.task.output_features["targets"].vocabulary
    for answers in (["positive"] * 3, ["negative"] * 3):
        writer = MetricWriter(tmp_path)
        result = task_evaluation.evaluate(eval_task, Scripted(vocabulary, answers), None)
        task_evaluation.write(tmp_path, writer, eval_task, 20, result)
        writer.close()
    (line,) = read_metrics(tmp_path / "metrics" / "toy_sentiment_test.jsonl")
    negatives = sum(label == 0 for _, label in toy_tasks.rows("test"))
    assert line["accuracy"] == pytest.approx(100 * negatives / 3)
    assert (line["step"], line["num_examples"], line["count"]) == (20, 3, 3)
    lines = (tmp_path / "inference" / "toy_sentiment_test-20.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in lines] == result.records


def test_members_leaves_out_what_cannot_be_measured_and_says_so(caplog):
    mixture = seqio.MixtureRegistry.get("toy_mixture")
    with caplog.at_level(logging.WARNING):
        assert [t.name for t in task_evaluation.members(mixture, "test")] == ["toy_sentiment"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "toy_last_word (no split 'test')" in line
    assert "toy_unmeasured (no metrics)" in line
    caplog.clear()
    names = [t.name for t in task_evaluation.members(mixture, "validation")]
    assert names == ["toy_last_word", "toy_sentiment"]
    caplog.clear()
    assert task_evaluation.members(seqio.TaskRegistry.get("toy_unmeasured"), "train") == []
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toy_sentiment/acuracy", "toy_sentiment has no metric 'acuracy'; did you mean 'accuracy'"),
        ("toy_sentimant/accuracy", "no series 'toy_sentimant'; did you mean 'toy_sentiment'"),
        ("validation/perplexity", "'loss'"),
        ("train/loss", "no series 'train'"),
    ],
)
def test_a_metric_that_nothing_gives_is_refused(name, said):
    opened = [open_task("toy_sentiment"), open_task("toy_last_word")]
    for known in ("toy_sentiment/accuracy", "toy_last_word/log_likelihood", "validation/text_loss"):
        task_evaluation.check_metric(known, opened, "validation")
    with pytest.raises(UsageError, match="BEST_METRIC") as error:
        task_evaluation.check_metric(name, opened, "validation")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_ranking_without_classes_is_refused():
    task = seqio.TaskRegistry.get("toy_last_word")
    with pytest.raises(UsageError, match=r"toy_last_word has no classes to rank: .*`classes`"):
        task_evaluation.open_tasks(config_of(task.name), task, "validation", None, "rank")


def test_members_without_classes_are_generated_where_others_are_ranked(caplog):
    """As STS-B among GLUE's classifications."""
    mixture = seqio.MixtureRegistry.get("toy_mixture")
    opened = task_evaluation.open_tasks(
        config_of("toy_mixture"), mixture, "validation", None, "rank"
    )
    assert "generated instead: toy_last_word" in caplog.text
    params = t5.init(TINY, jax.random.key(0))
    records = {
        t.series: task_evaluation.evaluate(t, make_predictor(4), params, "rank").records[0]
        for t in opened
    }
    assert set(records["toy_sentiment"]["scores"]) == set(toy_tasks.CLASSES)
    assert "prediction" in records["toy_last_word"] and "scores" not in records["toy_last_word"]


def test_classes_that_the_ids_cannot_hold_are_refused():
    short = DataConfig("toy_sentiment", {"inputs": 32, "targets": 1}, 4)
    task = seqio.TaskRegistry.get("toy_sentiment")
    with pytest.raises(UsageError, match=r"the class 'negative' has \d+ ids, .*= 1"):
        EvalTask(short, task, "validation").options()
    unknown = task.replace(postprocess_fn=toy_tasks.ClassLabel(("é", "ü")))
    with pytest.raises(UsageError, match="classes 'é' and 'ü' the same ids"):
        EvalTask(config_of("toy_sentiment"), unknown, "validation").options()


def test_a_split_without_examples_is_refused():
    with pytest.raises(UsageError, match="toy_sentiment: the split 'empty' has no example"):
        open_task("toy_sentiment", "empty")


def test_a_metric_that_is_no_number_is_refused():
    task = seqio.TaskRegistry.get("toy_sentiment").replace(
        metric_fns=[lambda targets, predictions: {"share": "most"}]
    )
    eval_task = EvalTask(config_of("toy_sentiment"), task, "validation")
    with pytest.raises(UsageError, match="toy_sentiment: metric 'share' is 'most'"):
        _ = eval_task.metric_names


def test_a_metric_given_twice_is_refused():
    task = seqio.TaskRegistry.get("toy_sentiment").replace(
        metric_fns=[toy_tasks.count, lambda targets, predictions: {"count": 1}]
    )
    with pytest.raises(UsageError, match="two metric functions give 'count'"):
        _ = EvalTask(config_of("toy_sentiment"), task, "validation").metric_names


def test_num_examples_takes_the_first():
    eval_task = open_task("toy_sentiment", num_examples=3)
    assert [e["idx"] for e in eval_task.examples] == [0, 1, 2]


def test_metrics_of_other_kinds_are_left_out_and_told_once(caplog):
    def with_aux(targets, predictions, aux_values):
        return {}

    task = seqio.TaskRegistry.get("toy_last_word")
    task = task.replace(metric_fns=[with_aux, toy_tasks.is_in_sentence])
    task_evaluation._tell_once.cache_clear()
    eval_task = EvalTask(config_of("toy_last_word"), task, "validation")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert task_evaluation.members(task, "validation") == [task]
            metrics = eval_task.measure(ANSWERS["toy_last_word"], None)
    assert list(metrics) == ["in_sentence", "same"]
    aux, text = [record.getMessage() for record in caplog.records]
    assert "toy_last_word: with_aux left out" in aux
    assert "toy_last_word: metric 'notes' is a Text, left out" in text
