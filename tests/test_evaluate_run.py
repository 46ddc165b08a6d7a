"""The verb `eval`: it measures again what training measured, and what else a run is asked."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
import toy_tasks
from small_run import content, flip_a_bit, largest_file, metric_lines, train_argv

from t5x_lite import wrap_up
from t5x_lite.__main__ import main

SERIES = ("validation", "toy_sentiment", "toy_last_word")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A run with the steps 2 and 4, moved since, whose VOCABULARY_FILE is gone."""
    folder = tmp_path_factory.mktemp("eval")
    vocabulary = folder / "toy.model"
    vocabulary.write_bytes(toy_tasks.vocabulary_model())
    bindings = {
        "MIXTURE_OR_TASK_MODULE": "toy_tasks",
        "MIXTURE_OR_TASK_NAME": "toy_mixture",
        "VOCABULARY_FILE": str(vocabulary),
        "T5Config.vocab_size": 160,
        "TRAIN_STEPS": 4,
        "EVAL_PERIOD": 2,
        "EVAL_STEPS": None,
        "BEST_METRIC": "validation/loss",
        "BEST_METRIC_MODE": "max",  # an untrained model's is the largest: step 2
    }
    with pytest.MonkeyPatch.context() as m:
        m.setattr(wrap_up, "_UNIGRAM_EXAMPLES", 100)
        assert main(train_argv(folder / "run", bindings)) == 0
    (folder / "run").rename(folder / "moved")
    vocabulary.unlink()
    return folder / "moved"


@pytest.fixture
def run(trained, tmp_path) -> pathlib.Path:
    """A copy that a test may change."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def evaluate(run: pathlib.Path, *flags: str) -> int:
    return main(["eval", str(run), *flags])


def records(run: pathlib.Path, name: str) -> list[dict]:
    lines = (run / "inference" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_all_checkpoints_give_what_training_measured(trained, run, capsys):
    """Losses, metrics and predictions, to the last bit; no line twice; each example once."""
    for name in SERIES:  # nothing can be left over from training
        (run / "metrics" / f"{name}.jsonl").unlink()
    shutil.rmtree(run / "inference")
    assert evaluate(run, "--checkpoint=all") == 0
    for name in SERIES:
        assert metric_lines(run, name) == metric_lines(trained, name)
        assert [line["step"] for line in metric_lines(run, name)] == [2, 4]
    sentences = [sentence for sentence, _ in toy_tasks.rows("validation")]
    for step in (2, 4):
        for name in ("toy_sentiment", "toy_last_word"):
            found = records(run, f"{name}-{step}")
            assert found == records(trained, f"{name}-{step}")
            assert [r["inputs"].partition(": ")[2] for r in found] == sentences
        right = sum(r["prediction"] == r["targets"] for r in records(run, f"toy_sentiment-{step}"))
        line = metric_lines(run, "toy_sentiment")[step // 2 - 1]
        assert line["accuracy"] == pytest.approx(100 * right / 7)
        assert line["count"] == line["num_examples"] == 7
    printed = capsys.readouterr().out.split()
    for line in (*metric_lines(run, "validation"), *metric_lines(run, "toy_last_word")):
        assert f"{next(v for k, v in line.items() if k in ('loss', 'first')):.4f}" in printed


def test_evaluating_again_replaces_the_line(trained, run):
    flags = ("--checkpoint=best", "--task=toy_sentiment")
    path = run / "metrics" / "toy_sentiment.jsonl"
    path.write_text(path.read_text().replace('"accuracy": ', '"accuracy": 1'))
    assert metric_lines(run, "toy_sentiment") != metric_lines(trained, "toy_sentiment")
    assert evaluate(run, *flags) == 0
    assert metric_lines(run, "toy_sentiment")[0] == metric_lines(trained, "toy_sentiment")[0]
    # The loss of another task than the run's own has a series of its own.
    assert [line["step"] for line in metric_lines(run, "validation_toy_sentiment")] == [2]
    assert metric_lines(run, "validation") == metric_lines(trained, "validation")


def test_other_ways_to_evaluate_leave_the_trainings_figures_alone(trained, run):
    """best.json and patience go by these."""
    assert evaluate(run, "--num_examples=3", "--checkpoint=best", "--task=toy_sentiment") == 0
    (line,) = metric_lines(run, "toy_sentiment_first_3")
    assert (line["step"], line["num_examples"], line["count"]) == (2, 3, 3)
    assert metric_lines(run, "toy_sentiment") == metric_lines(trained, "toy_sentiment")


def test_another_split_and_mode(trained, run):
    """Ranked: every prediction is a class, and its score is the best of them."""
    flags = ("--task=toy_sentiment", "--split=test", "--mode=rank", "--batch_size=3")
    assert evaluate(run, *flags) == 0
    (line,) = metric_lines(run, "toy_sentiment_test_rank")
    found = records(run, "toy_sentiment_test_rank-4")
    assert (line["step"], line["num_examples"], len(found)) == (4, 3, 3)
    for record, (sentence, label) in zip(found, toy_tasks.rows("test"), strict=True):
        assert record["inputs"] == f"sentiment: {sentence}"
        assert record["targets"] == toy_tasks.CLASSES[label]
        assert list(record["scores"]) == list(toy_tasks.CLASSES)
        assert record["scores"][record["prediction"]] == max(record["scores"].values())
    right = sum(record["prediction"] == record["targets"] for record in found)
    assert line["accuracy"] == pytest.approx(100 * right / 3)
    assert [line["step"] for line in metric_lines(run, "test_toy_sentiment")] == [4]
    before = content(trained)
    assert {name: value[1] for name, value in content(run).items() if name in before} == {
        name: value[1] for name, value in before.items()
    }


def test_beams(run):
    flags = ("--task=toy_sentiment", "--method=beam", "--num_beams=3", "--length_penalty=0")
    greedy = records(run, "toy_sentiment-4")
    assert evaluate(run, *flags) == 0
    found = records(run, "toy_sentiment_beam-4")
    assert [r["inputs"] for r in found] == [r["inputs"] for r in greedy]
    assert records(run, "toy_sentiment-4") == greedy


def test_a_task_without_metrics_is_measured_by_its_loss(run, capsys):
    assert evaluate(run, "--task=toy_unmeasured") == 0
    (line,) = metric_lines(run, "validation_toy_unmeasured")
    assert line["loss"] > 0
    assert "validation_toy_unmeasured" in capsys.readouterr().out


def test_glue_from_tfds(run, shared_data):
    """Ranked with the vocabulary of the run, though the task's own default is T5's."""
    flags = (f"--tfds_data_dir={shared_data / 'tfds'}", "--num_examples=20", "--mode=rank")
    assert evaluate(run, "--task=glue_sst2_v002", *flags) == 0
    found = records(run, "glue_sst2_v002_rank_first_20-4")
    assert len({record["idx"] for record in found}) == len(found) == 20
    assert {record["targets"] for record in found} == {"negative", "positive"}
    (line,) = metric_lines(run, "glue_sst2_v002_rank_first_20")
    right = sum(record["prediction"] == record["targets"] for record in found)
    assert line["accuracy"] == pytest.approx(100 * right / 20)
    assert 0 < right < 20


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--checkpoint=3"], "no step 3 "),
        (["--checkpoint=latst"], "latest"),
        (["--task=toy_sentimant"], "did you mean 'toy_sentiment'"),
        (["--split=validaton"], "did you mean 'validation'"),
        (["--task=toy_sentiment", "--split=empty"], "toy_sentiment: the split 'empty' gives no"),
        (["--task=toy_bytes"], "toy_bytes has a vocabulary of its own"),
        (["--task=toy_last_word", "--mode=rank"], "toy_last_word has no classes to rank"),
        (["--mode=guess"], "choose from"),
        (["--num_examples=0"], "EVAL_NUM_EXAMPLES = 0"),
        (["--num_beams=2"], "--num_beams has no effect on greedy decoding: add --method=beam"),
        (["--method=beam", "--num_beams=161"], "num_beams = 161: the vocabulary has 160"),
        (["--module=no_such_module"], "no_such_module"),
        (["--task=c4_v220_span_corruption", "--tfds_data_dir=none"], "is not prepared"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(trained, capsys, flags, said):
    before = content(trained)
    assert evaluate(trained, *flags) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert content(trained) == before


def test_a_directory_that_is_no_run(tmp_path, capsys):
    assert evaluate(tmp_path) == 2
    assert "is not a run: it has no model.json" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told_in_one_line(run, capsys):
    flip_a_bit(largest_file(run / "checkpoints" / "2" / "params"))
    assert evaluate(run, "--checkpoint=2") == 1
    error = capsys.readouterr().err
    assert str(pathlib.Path("checkpoints", "2")) in error
    assert "is damaged" in error
    assert error.count("\n") == 1
    assert evaluate(run, "--checkpoint=4", "--task=toy_sentiment") == 0


TWO_PROCESSES = """
import sys
port, rank, run, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
import jax
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from t5x_lite.__main__ import main
sys.exit(main(["eval", run]) or main(["eval", run, *flags]))
"""


def test_every_example_once_on_two_processes(trained, run):
    """4 rows a batch, of which each process has 2, and 7 examples; one process writes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name in (*SERIES, "toy_sentiment_test"):
        (run / "metrics" / f"{name}.jsonl").unlink(missing_ok=True)
    shutil.rmtree(run / "inference")
    here = pathlib.Path(__file__).resolve().parent
    flags = ("--task=toy_sentiment", "--split=test", "--mode=rank")
    arguments = (str(run), *flags)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(port), str(rank), *arguments],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here}:{here.parent}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    logs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    for name in SERIES:
        (line,) = metric_lines(run, name)
        assert line == pytest.approx(metric_lines(trained, name)[1], rel=1e-5)
    for name in ("toy_sentiment", "toy_last_word"):
        found = records(run, f"{name}-4")
        assert len(found) == 7
        for record, expected in zip(found, records(trained, f"{name}-4"), strict=True):
            assert record["idx"] == expected["idx"]
            assert record["prediction"] == expected["prediction"]
            assert record["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert [r["idx"] for r in records(run, "toy_sentiment_test_rank-4")] == [0, 1, 2]
    assert "accuracy" in logs[0]
    assert "accuracy" not in logs[1]
