"""The command line: help, and bad input as one line that changes nothing."""

import re

import pytest
from small_run import content, train_argv

from t5x_lite import gin_utils, setup
from t5x_lite.__main__ import VERBS, main

TEXT = {"MIXTURE_OR_TASK_NAME": "text_files_prefix_lm", "VOCABULARY_FILE": "bytes"}


def one_line_of(capfd) -> str:
    """What was written to stderr, by Python or below it."""
    error = capfd.readouterr().err
    assert error.startswith("t5x_lite: ")
    assert error.count("\n") == 1 and error.endswith("\n")
    return error


# ---- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [(), *((verb,) for verb in VERBS)],
    ids=str,
)
def test_help_shows_an_example(capsys, verb):
    with pytest.raises(SystemExit) as exit:
        main([*verb, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr()
    assert f"example:\n  python -m t5x_lite {' '.join(verb)}" in shown.out
    assert not shown.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--help tells more"),
        (["trian"], "unknown verb 'trian'; did you mean 'train'"),
        (["train"], "give --gin_file"),
        (["train", "--gin_flie=x"], "unknown argument '--gin_flie'; did you mean '--gin_file'"),
        (["train", "--gin_file"], "--gin_file: expected one argument"),
        (["train", "--gin.TRAIN_STEPS", "5"], "write --gin.NAME=VALUE"),
        (["train", "--gin_file=nowhere.gin"], "gin file 'nowhere.gin' is not there"),
        (["report"], "model_dir"),
        (["report", "nowhere"], "'nowhere' is not a directory"),
    ],
)
def test_arguments_that_are_wrong(capfd, argv, expected):
    assert main(argv) == 2
    assert expected in one_line_of(capfd)


# ---- refused before anything is opened or compiled -----------------------------------------------


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        ({"BATCHSIZE": 4}, "BATCHSIZE matches nothing; did you mean 'BATCH_SIZE'"),
        ({"T5Config.d_modell": 4}, "did you mean 'd_model'"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE = 0: must be an integer of at least 1"),
        ({"BATCH_SIZE": 4, "NUM_MICROBATCHES": 3}, "3 microbatches; use a multiple of 3"),
        ({"MESH": {"data": 3}}, "MESH = {'data': 3} is 3 devices, but there are"),
        ({"MESH": {"dta": 1}}, "MESH has no axis 'dta'"),
        ({"DCN_MESH": {"data": 2}}, "DCN_MESH = {'data': 2} is 2 slices, but there are 1"),
        ({"SHARDING_RULES": {"embd": None}}, "no axis 'embd'; did you mean 'embed'"),
        ({"SHARDING_RULES": {"mlp": "modl"}}, "MESH has no axis 'modl'; did you mean 'model'"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 0, "targets": 9}}, "['inputs'] = 0: must be"),
        ({"TASK_FEATURE_LENGTHS": {}}, "TASK_FEATURE_LENGTHS = {}: give tokens"),
        ({"TRAIN_STEPS": -1}, "TRAIN_STEPS = -1: must be an integer of at least 1"),
        ({"PROFILE_STEPS": (5, 2)}, "PROFILE_STEPS = (5, 2): give the first and the last"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bindings_that_are_wrong(tmp_path, capfd, monkeypatch, bindings, expected):
    monkeypatch.setattr(setup, "make_programs", None)
    monkeypatch.setattr(setup, "open_input", None)
    assert main(train_argv(tmp_path / "run", bindings)) == 2
    assert expected in one_line_of(capfd)
    assert not (tmp_path / "run").exists()


def test_a_file_that_takes_a_required_macro_back(tmp_path, capfd):
    argv = [*train_argv(tmp_path / "run"), "--gin_file=gin_configs/runs/pretrain.gin"]
    assert main(argv) == 2
    line = one_line_of(capfd)
    assert "gin_configs/runs/pretrain.gin sets" in line and "back to %gin.REQUIRED" in line
    assert "gin_configs/runs/python_docs.gin" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [(), ("--dry_run",)], ids=["train", "dry run"])
def test_a_model_dir_that_cannot_be_written(tmp_path, capfd, monkeypatch, flags):
    monkeypatch.setattr(setup, "make_programs", None)
    monkeypatch.setattr(setup, "open_input", None)
    (tmp_path / "file").write_text("kept")
    assert main([*train_argv(tmp_path / "file" / "run"), *flags]) == 2
    line = one_line_of(capfd)
    assert f"MODEL_DIR = '{tmp_path}/file/run' cannot be written: {tmp_path}/file" in line
    assert (tmp_path / "file").read_text() == "kept"


def test_a_model_dir_with_another_runs_configuration(tmp_path, capfd, monkeypatch):
    """Steps, periods and logging may differ; what is computed may not."""
    argv = train_argv(tmp_path / "run")
    monkeypatch.setattr(setup, "make_programs", None)
    (tmp_path / "run").mkdir()
    files = [arg.removeprefix("--gin_file=") for arg in argv if arg.startswith("--gin_file=")]
    text = gin_utils.load_train_config(files, gin_utils.split_gin_flags(argv)[0])[1]
    (tmp_path / "run" / "config.gin").write_text(text)
    before = content(tmp_path / "run")
    changed = {"TRAIN_STEPS": 99, "LOG_PERIOD": 7, "DROPOUT_RATE": 0.2, "BATCH_SIZE": 8}

    assert main(train_argv(tmp_path / "run", changed)) == 2

    line = one_line_of(capfd)
    assert "holds a run with another configuration" in line
    assert "T5Config.dropout_rate: 0.1 -> 0.2" in line
    assert "DataConfig.batch_size: 4 -> 8" in line
    assert "train_steps:" not in line and "log_period:" not in line
    assert content(tmp_path / "run") == before


# ---- data that does not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        (
            {"MIXTURE_OR_TASK_NAME": "python_docs_span_coruption"},
            "is not registered; did you mean 'python_docs_span_corruption'",
        ),
        ({"MIXTURE_OR_TASK_MODULE": "no.such.module"}, "No module named 'no'"),
        ({"T5Config.vocab_size": 128}, "has 4096 ids, the model T5Config.vocab_size = 128"),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 32}},
            "TASK_FEATURE_LENGTHS = {'inputs': 32} has no length for 'targets'",
        ),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16, "choices": 8}},
            "python_docs_span_corruption has no feature 'choices'",
        ),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 3}},
            "span corruption of 32 inputs needs at least",
        ),
        (TEXT | {"TEXT_FILES_PATTERN": "none-*.txt"}, "'none-*.txt' matches no file"),
        (
            TEXT | {"TEXT_FILES_PATTERN": "{tmp}/few.txt", "TEXT_FILES_VALIDATION_SHARE": 0.5},
            "gives 1 rows of {'inputs': 32, 'targets': 16}, fewer than the 4 of one batch",
        ),
        (
            TEXT | {"TEXT_FILES_PATTERN": "{tmp}/bad.jsonl", "TEXT_FILES_FIELD": "text"},
            "{tmp}/bad.jsonl line 2: not valid JSON",
        ),
        (
            TEXT | {"TEXT_FILES_PATTERN": "{tmp}/few.txt", "VOCABULARY_FILE": "{tmp}/no.model"},
            "VOCABULARY_FILE '{tmp}/no.model' cannot be read: it does not exist",
        ),
        (
            TEXT
            | {"MIXTURE_OR_TASK_NAME": "c4_v310_prefix_lm", "DataConfig.tfds_data_dir": "{tmp}"},
            "data set c4/en:3.1.0 is not prepared: looked in {tmp}/c4/en/3.1.0",
        ),
        ({"INITIAL_CHECKPOINT_PATH": "{tmp}/other"}, "no checkpoint under {tmp}/other"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_data_that_does_not_fit(tmp_path, capfd, bindings, expected):
    (tmp_path / "few.txt").write_text("A document.\nAnother one.\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n{"text": "fine"}\nbad\n')
    given = {
        name: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
        for name, value in bindings.items()
    }
    assert main(train_argv(tmp_path / "run", given)) == 2
    line = one_line_of(capfd)
    assert expected.replace("{tmp}", str(tmp_path)) in line
    if "bad.jsonl" in expected:
        assert re.search(r"\b2 corrupt lines in all\b", line)
        assert "TEXT_FILES_SKIP_CORRUPT_LINES=True" in line
    assert not (tmp_path / "run").exists()


def test_corrupt_lines_are_left_out_if_asked_for(tmp_path, capsys):
    documents = [f'{{"text": "Document {i}, of which every line can be read."}}' for i in range(99)]
    (tmp_path / "bad.jsonl").write_text("\n".join([*documents, '{"text": ']))
    bindings = TEXT | {
        "TEXT_FILES_PATTERN": str(tmp_path / "bad.jsonl"),
        "TEXT_FILES_FIELD": "text",
        "TEXT_FILES_VALIDATION_SHARE": 0.2,
        "TEXT_FILES_SKIP_CORRUPT_LINES": True,
    }
    assert main([*train_argv(tmp_path / "run", bindings), "--dry_run"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
