"""A run on a cache: interrupted or not it is the same, and it refuses rows that are not its own."""

import json
import shutil

import pytest
from small_run import assert_same_state, metric_lines, train_argv

from t5x_lite import wrap_up
from t5x_lite.__main__ import main

TASK = "python_docs_span_corruption"


@pytest.fixture(scope="module", autouse=True)
def few_unigrams():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(wrap_up, "_UNIGRAM_EXAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches")
    lengths = "--task_feature_lengths=inputs=32,targets=16"
    few = ("--num_shards=2", "--num_processes=1")
    assert main(["cache", TASK, f"--output_dir={path}", lengths, *few]) == 0
    return path


def argv(model_dir, cache_dir, **bindings) -> list[str]:
    bindings = {"CACHE_DIR": str(cache_dir), "NUM_SAMPLE_PREDICTIONS": 0} | bindings
    return train_argv(model_dir, {"EVAL_PERIOD": 0, "EVAL_STEPS": 1} | bindings)


@pytest.fixture(scope="module")
def whole(cache_dir, tmp_path_factory):
    """A run of six steps."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert main(argv(path, cache_dir)) == 0
    return path


@pytest.fixture(scope="module")
def begun(cache_dir, tmp_path_factory):
    """A run that has stopped after its second step."""
    path = tmp_path_factory.mktemp("begun") / "run"
    assert main(argv(path, cache_dir, TRAIN_STEPS=2)) == 0
    return path


def test_a_resumed_run_is_the_whole_one(whole, begun, cache_dir, tmp_path, capsys):
    """Also where the cache has been moved to in the meantime."""
    moved = tmp_path / "elsewhere"
    moved.symlink_to(cache_dir)
    assert main(argv(begun, moved)) == 0
    assert "resuming after step 2 of 6" in capsys.readouterr().out
    assert_same_state(whole, begun, 6)
    assert metric_lines(begun, "train") == metric_lines(whole, "train")
    (position,) = (begun / "checkpoints" / "6" / "input_position").iterdir()
    assert json.loads(position.read_bytes())["step"] == 6


def test_the_dry_run_reads_the_cache(cache_dir, tmp_path, capsys):
    assert main([*argv(tmp_path / "run", cache_dir), "--dry_run"]) == 0
    assert "encoder_segment_ids      int32 (4, 32)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 14}},
            "(cache -> run): feature_lengths: {'inputs': 32, 'targets': 16} -> {'inputs': 32, 't",
        ),
        ({"DataConfig.pack": False}, "(cache -> run): packed: True -> False. Cache the task"),
        (
            {"MIXTURE_OR_TASK_NAME": "python_docs_iid_denoising"},
            "has no split 'train' of python_docs_iid_denoising (did you mean",
        ),
        ({"BATCH_SIZE": 2**20}, "BATCH_SIZE = 1048576 needs at least as many"),
        ({"CACHE_DIR": "nowhere"}, "CACHE_DIR = 'nowhere' has no split 'train' of python_docs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_that_the_cache_does_not_fit(cache_dir, tmp_path, capfd, bindings, expected):
    assert main([*argv(tmp_path / "run", cache_dir, **bindings), "--dry_run"]) == 2
    error = capfd.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_change_between_cache_and_stream(begun, capfd):
    assert main(argv(begun, "", CACHE_DIR=None, TRAIN_STEPS=8)) == 2
    assert "that of a cache: give the run its CACHE_DIR" in capfd.readouterr().err


def test_a_run_does_not_go_on_with_another_cache(whole, cache_dir, tmp_path, capfd):
    shutil.copytree(cache_dir, tmp_path / "other")
    path = tmp_path / "other" / TASK / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["seed"] = 1  # as if it had other noise
    path.write_text(json.dumps(manifest))
    assert main(argv(whole, tmp_path / "other", TRAIN_STEPS=8)) == 2
    assert "does not hold the rows that the run began with" in capfd.readouterr().err
