"""Runs that are evaluated by their tasks' metrics: the best is kept, patience ends them."""

import json
import os
import signal

import numpy as np
import pytest
import toy_tasks
from small_run import assert_same_state, metric_lines, steps, train_argv

from t5x_lite import task_evaluation, train, wrap_up
from t5x_lite.__main__ import main

TOY = {
    "MIXTURE_OR_TASK_MODULE": "toy_tasks",
    "MIXTURE_OR_TASK_NAME": "toy_bytes",
    "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 10},
    "T5Config.vocab_size": 384,
    "EVAL_STEPS": None,
    "EVAL_PERIOD": 2,
    "CHECKPOINT_PERIOD": 4,
    "CHECKPOINT_KEEP": 1,
    "TRAIN_STEPS": 8,
    "OptimizerConfig.warmup_steps": 1,
}


@pytest.fixture(scope="module", autouse=True)
def few_unigrams():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(wrap_up, "_UNIGRAM_EXAMPLES", 100)
        yield


def run(model_dir, **bindings):
    return main(train_argv(model_dir, TOY | bindings))


@pytest.fixture
def scripted(monkeypatch):
    """The accuracy of each evaluation is the next of these numbers; what it writes stays real."""
    values = []
    evaluate = task_evaluation.evaluate

    def evaluate_as_told(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        return result._replace(metrics=result.metrics | {"accuracy": values.pop(0)})

    monkeypatch.setattr(task_evaluation, "evaluate", evaluate_as_told)
    return values


def best_json(model_dir):
    return json.loads((model_dir / "best.json").read_text())


def test_metrics_and_predictions_of_every_evaluation(tmp_path, capsys):
    assert run(tmp_path / "run") == 0
    lines = metric_lines(tmp_path / "run", "toy_bytes")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    expected = [
        (f"sentiment: {sentence}", toy_tasks.CLASSES[label])
        for sentence, label in toy_tasks.rows("validation")
    ]
    for line in lines:
        path = tmp_path / "run" / "inference" / f"toy_bytes-{line['step']}.jsonl"
        records = [json.loads(text) for text in path.read_text().splitlines()]
        # Seven examples in batches of four: each once, in the order of the split.
        assert [(r["inputs"], r["targets"]) for r in records] == expected
        right = [r["prediction"] == r["targets"] for r in records]
        assert line["accuracy"] == pytest.approx(100 * np.mean(right))
        assert line["num_examples"] == line["count"] == 7
    # The most frequent class of the training split, on the validation split.
    labels = [label for _, label in toy_tasks.rows("train")]
    majority = round(np.mean(labels))
    share = 100 * np.mean([label == majority for _, label in toy_tasks.rows("validation")])
    measured = json.loads((tmp_path / "run" / "metrics" / "baselines.json").read_text())
    assert measured["tasks"]["toy_bytes"]["metrics"]["accuracy"] == pytest.approx(share)
    name = toy_tasks.CLASSES[majority]
    assert f"; always {name!r} {share:.1f}" in capsys.readouterr().out


def test_ranking_answers_with_a_class_only(tmp_path):
    assert run(tmp_path / "run", TRAIN_STEPS=2, EVAL_MODE="rank") == 0
    path = tmp_path / "run" / "inference" / "toy_bytes-2.jsonl"
    for record in map(json.loads, path.read_text().splitlines()):
        assert set(record["scores"]) == set(toy_tasks.CLASSES)
        assert record["prediction"] == max(record["scores"], key=record["scores"].get)


def test_the_best_is_kept_and_patience_ends_the_run(tmp_path, scripted, capsys):
    scripted += [10.0, 50.0, 50.0, 40.0, 45.0]
    bindings = {"BEST_METRIC": "toy_bytes/accuracy", "TRAIN_STEPS": 40}
    assert run(tmp_path / "run", **bindings, EARLY_STOPPING_PATIENCE=3) == 0
    assert not scripted
    # Best at step 4; evaluations at 6, 8 and 10 are no better.
    expected = {"step": 4, "metric": "toy_bytes/accuracy", "value": 50.0, "mode": "max"}
    assert best_json(tmp_path / "run") == expected
    assert steps(tmp_path / "run") == [4, 10]
    out = capsys.readouterr().out
    assert "step 10 of 40, stopped early" in out
    assert "best toy_bytes/accuracy 50, at step 4, which is kept" in out

    assert run(tmp_path / "run", **bindings, EARLY_STOPPING_PATIENCE=3) == 0  # the same command
    assert "the run is complete: step 10 of 40" in capsys.readouterr().out

    scripted += [60.0, 1.0]  # with more patience it goes on
    bindings["TRAIN_STEPS"] = 14
    assert run(tmp_path / "run", **bindings, EARLY_STOPPING_PATIENCE=4) == 0
    assert best_json(tmp_path / "run")["step"] == 12
    assert steps(tmp_path / "run") == [12, 14]


def test_a_crash_between_evaluation_and_best_json(tmp_path, scripted, monkeypatch):
    """As if it had not happened: same best, same lines, same parameters."""
    bindings = {"BEST_METRIC": "toy_bytes/accuracy"}
    scripted += [10.0, 20.0, 30.0, 5.0]
    assert run(tmp_path / "whole", **bindings) == 0

    def crash(*args):
        raise RuntimeError("crash")

    with monkeypatch.context() as m:
        m.setattr(train.best, "write", crash)
        scripted += [10.0]
        with pytest.raises(RuntimeError, match="crash"):
            run(tmp_path / "run", **bindings)
    assert not (tmp_path / "run" / "best.json").exists()
    assert steps(tmp_path / "run") == [2]
    scripted += [20.0, 30.0, 5.0]
    assert run(tmp_path / "run", **bindings) == 0
    assert best_json(tmp_path / "run") == best_json(tmp_path / "whole")
    assert steps(tmp_path / "run") == steps(tmp_path / "whole") == [6, 8]
    for series in ("train", "validation", "toy_bytes"):
        assert metric_lines(tmp_path / "run", series) == metric_lines(tmp_path / "whole", series)
    assert_same_state(tmp_path / "run", tmp_path / "whole", 8)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "again while it is made up for"])
def test_an_evaluation_that_is_stopped_is_made_up_for(tmp_path, monkeypatch, times):
    """SIGTERM while examples are being decoded: nothing of that evaluation is written.

    No step is taken before the evaluation that is missing.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole) == 0
    evaluate = task_evaluation.evaluate

    def evaluate_and_be_stopped(*args, **kwargs):
        if (stopped / "inference" / "toy_bytes-2.jsonl").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(task_evaluation, "evaluate", evaluate_and_be_stopped)
        for _ in range(times):
            assert run(stopped) == 143
    assert steps(stopped) == [4]
    assert [line["step"] for line in metric_lines(stopped, "toy_bytes")] == [2]
    assert [line["step"] for line in metric_lines(stopped, "validation")] == [2]
    assert run(stopped) == 0
    for series in ("train", "validation", "toy_bytes"):
        assert metric_lines(stopped, series) == metric_lines(whole, series)


def test_best_metric_set_later_keeps_what_can_be_kept(tmp_path, scripted, capsys):
    """The best step of before is gone: the best of those that are there counts."""
    scripted += [10.0, 80.0, 20.0, 30.0]
    assert run(tmp_path / "run") == 0
    assert steps(tmp_path / "run") == [8]
    scripted += [70.0, 60.0]
    bindings = {"BEST_METRIC": "toy_bytes/accuracy", "TRAIN_STEPS": 12}
    assert run(tmp_path / "run", **bindings) == 0
    assert (best_json(tmp_path / "run")["step"], best_json(tmp_path / "run")["value"]) == (10, 70)
    assert steps(tmp_path / "run") == [10, 12]
    assert "best toy_bytes/accuracy 70, at step 10, which is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        ({"BEST_METRIC": "toy_bytes/acuracy"}, "did you mean 'accuracy'"),
        ({"BEST_METRIC": "toy_byte/accuracy"}, "toy_bytes"),
        (
            {
                "EVAL_MODE": "rank",
                "MIXTURE_OR_TASK_NAME": "toy_last_word",
                "VOCABULARY_FILE": "bytes",
            },
            "no classes",
        ),
        ({"INITIAL_CHECKPOINT_PATH": "nowhere"}, "INITIAL_CHECKPOINT_PATH = 'nowhere': no checkp"),
        ({"EVAL_MODE": "ranks"}, "allowed are generate, rank"),
        ({"DecodeConfig.method": "beam", "DecodeConfig.num_beams": 400}, "384"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_step_1(tmp_path, capsys, bindings, message):
    assert run(tmp_path / "run", **bindings) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
