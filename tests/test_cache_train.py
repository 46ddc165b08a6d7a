"""A run on a cache: interrupted or not it is the same, and it refuses rows that are not its own."""

import json
import re
import shlex
import shutil

import pytest
from etils.epath import gpath
from small_run import assert_same_state, metric_lines, train_argv
from test_metrics import ObjectStore

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
            {"CACHE_DIR": f"nowhere/{TASK}/train"},
            f"CACHE_DIR = 'nowhere/{TASK}/train' has no split 'train' of {TASK}; make it",
        ),
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


def hint(error: str) -> list[str]:
    """The arguments of the command that a message tells to give."""
    words = shlex.split(re.search("make it with `(.*)`", error)[1])
    assert words[:3] == ["python", "-m", "t5x_lite"]
    return words[3:]


def test_the_hint_is_the_command_of_the_run(shared_data, tmp_path, capfd):
    """Given as it is said, it makes the cache that the run then takes."""
    bindings = {
        "CACHE_DIR": str(tmp_path / "my caches"),
        "MIXTURE_OR_TASK_NAME": "text_files_span_corruption",
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 20},
        "DataConfig.pack": False,
        "VOCABULARY_FILE": "bytes",
        "TEXT_FILES_PATTERN": str(tmp_path / "*.txt"),
        "TEXT_FILES_VALIDATION_SHARE": 0.1,
        "TEXT_FILES_SKIP_CORRUPT_LINES": True,
    }
    text = "".join(f"this is the line with the number {i} of them all\n" for i in range(200))
    (tmp_path / "corpus.txt").write_text(text)
    command = [*argv(tmp_path / "run", "", **bindings), "--dry_run"]
    assert main(command) == 2
    words = hint(capfd.readouterr().err)
    assert words == [
        *("cache", "text_files_span_corruption", f"--output_dir={tmp_path / 'my caches'}"),
        *("--task_feature_lengths=inputs=64,targets=20", "--vocabulary_file=bytes"),
        *(f"--text_files_pattern={tmp_path / '*.txt'}", "--text_files_validation_share=0.1"),
        *("--text_files_skip_corrupt_lines", "--no_pack"),
    ]
    assert main([*words, "--num_processes=1"]) == 0
    assert main(command) == 0, capfd.readouterr().err


def test_the_hint_leaves_out_a_vocabulary_that_is_not_used(tmp_path, capfd):
    bindings = {"CACHE_DIR": str(tmp_path), "VOCABULARY_FILE": "bytes"}
    assert main([*argv(tmp_path / "run", "", **bindings), "--dry_run"]) == 2
    words = hint(capfd.readouterr().err)
    assert words == [
        *("cache", TASK, f"--output_dir={tmp_path}", "--task_feature_lengths=inputs=32,targets=16")
    ]


@pytest.mark.parametrize("below", [TASK, f"{TASK}/train", f"{TASK}/train/"])
def test_a_directory_too_deep(cache_dir, tmp_path, capfd, below):
    assert main([*argv(tmp_path / "run", f"{cache_dir}/{below}"), "--dry_run"]) == 2
    error = capfd.readouterr().err
    assert f"did you mean CACHE_DIR = '{cache_dir}'?" in error and error.count("\n") == 1


def test_a_bucket_that_cannot_be_read(tmp_path, monkeypatch, capfd):
    class Refused(ObjectStore):
        def exists(self, path):
            raise RuntimeError("permission denied\non the second line")

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Refused())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    assert main([*argv(tmp_path / "run", "gs://bucket/caches"), "--dry_run"]) == 2
    error = capfd.readouterr().err
    assert "CACHE_DIR = 'gs://bucket/caches' cannot be read: permission denied\n" in error
    assert error.count("\n") == 1


def test_a_repair_is_the_command_that_made_it(cache_dir, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(cache_dir, copy)
    (copy / TASK / "train" / "rows-00001-of-00002.array_record").unlink()
    command = [*argv(tmp_path / "run", copy), "--dry_run"]
    assert main(command) == 1
    said = re.search("the command that made it, `(.*)`, repairs it", capfd.readouterr().err)[1]
    assert main([*shlex.split(said)[3:], "--num_processes=1"]) == 0
    assert main(command) == 0


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
