"""What a run has left, read back from MODEL_DIR alone."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from saved_runs import LENGTHS, TASK, TINY, make_params, make_run, save_step
from small_run import flip_a_bit

from t5x_lite import data, saved_run
from t5x_lite.checkpoints import CheckpointError
from t5x_lite.errors import UsageError
from t5x_lite.partitioning import make_partitioning
from tasks import python_docs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", (2, 10, 9))


@pytest.fixture
def copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "copy")


# ---- model.json and the vocabulary ---------------------------------------------------------------


def test_what_was_written_is_read(run_dir):
    run = saved_run.read(run_dir)
    assert (run.model, run.task, run.feature_lengths) == (TINY, TASK, LENGTHS)
    assert str(run.model_dir) == str(run_dir)
    own = python_docs.VOCABULARY.resolve()
    assert run.vocabulary.vocab_size == own.vocab_size == 4096
    text = "A list, and <extra_id_0> a file <extra_id_99>"
    ids = run.vocabulary.encode(text)
    assert ids == own.encode(text)
    assert {4095, 4095 - 99} < set(ids)
    assert run.vocabulary.eos_id == 1


def test_it_moves_without_its_task(run_dir, tmp_path, repo):
    """Another machine: no cache directory, and a task that nobody has registered."""
    moved = shutil.copytree(run_dir, tmp_path / "moved")
    path = moved / "model.json"
    path.write_text(path.read_text().replace(TASK, "somebodys_own_task"))
    code = (
        "import sys\n"
        "from t5x_lite import saved_run\n"
        "run = saved_run.read(sys.argv[1])\n"
        "assert run.task == 'somebodys_own_task' and run.vocabulary.vocab_size == 4096\n"
        "assert saved_run.checkpoint_steps(run, 'latest') == [10]\n"
    )
    command = [sys.executable, "-c", code, str(moved)]
    environment = {"T5X_LITE_CACHE": "/nowhere", "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=environment, timeout=100, cwd=repo)


def test_bytes(tmp_path):
    (tmp_path / "text.txt").write_text("A document.\n")
    model_dir = make_run(
        tmp_path / "run",
        (),
        task="text_files_span_corruption",
        vocabulary_file="bytes",
        text_files_pattern=str(tmp_path / "text.txt"),
    )
    assert not (model_dir / "vocabulary.model").exists()
    for size in (259, 359):  # 359: a run from before sentinels were bytes
        if size == 359:
            _edit(model_dir, vocabulary={"class": "ByteVocabulary", "size": 359})
        vocabulary = saved_run.read(model_dir).vocabulary
        assert vocabulary.vocab_size == size
        assert vocabulary.encode("aé") == [3 + b for b in "aé".encode()]


def _edit(run_dir, **changes):
    path = run_dir / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: shutil.rmtree(d), "is not a directory"),
        (lambda d: (d / "model.json").unlink(), "is not a run: it has no model.json"),
        (lambda d: (d / "model.json").write_text("{"), "is not what a run has written: Expecting"),
        (lambda d: (d / "model.json").write_text("{}"), "'architecture' is missing"),
        (lambda d: _edit(d, architecture={"family": "gpt"}), "'gpt'; known: 't5'"),
        (
            lambda d: _edit(d, architecture={"family": "t5", "dmodel": 1}),
            "unknown field 'dmodel'; did you mean 'd_model'",
        ),
        (lambda d: (d / "vocabulary.model").unlink(), "vocabulary.model is missing"),
        (lambda d: (d / "vocabulary.model").write_text("no"), "is not a SentencePiece model"),
        (
            lambda d: _edit(d, vocabulary={"class": "SentencePieceVocabulary", "size": 32100}),
            "has 4096 ids, but model.json says 32100",
        ),
        (
            lambda d: _edit(d, vocabulary={"class": "ByteVocabulary", "size": 256}),
            "has at least 259 ids, not 256",
        ),
        (
            lambda d: _edit(d, vocabulary={"class": "TokenizersVocabulary", "size": 9}),
            "is a TokenizersVocabulary, which MODEL_DIR",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_run(copy, damage, expected):
    damage(copy)
    with pytest.raises(UsageError) as error:
        saved_run.read(copy)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert str(copy) in str(error.value) or "model.json" in str(error.value)


def test_a_task_with_other_ids_is_refused(run_dir, tmp_path):
    run = saved_run.read(run_dir)
    saved_run.check_same_vocabulary(run, data.get_provider(TASK))
    data.configure(
        data.DataConfig(TASK, LENGTHS, batch_size=1, vocabulary_file=saved_run.vocabulary_file(run))
    )
    saved_run.check_same_vocabulary(run, data.get_provider("text_files_prefix_lm"))
    data.configure(data.DataConfig(TASK, LENGTHS, batch_size=1, vocabulary_file="bytes"))
    with pytest.raises(UsageError, match="text_files_prefix_lm has a vocabulary of its own"):
        saved_run.check_same_vocabulary(run, data.get_provider("text_files_prefix_lm"))


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "steps"), [("latest", [10]), ("all", [2, 9, 10]), ("9", [9]), ("10, 2", [2, 10])]
)
def test_steps(run_dir, which, steps):
    assert saved_run.checkpoint_steps(saved_run.read(run_dir), which) == steps


def test_the_best_step_is_what_training_says(copy):
    run = saved_run.read(copy)
    with pytest.raises(
        UsageError, match=r"best\.json is not there; a run trained with BEST_METRIC"
    ):
        saved_run.checkpoint_steps(run, "best")
    best = {"step": 9, "metric": "glue_sst2_v002/accuracy", "value": 81.2, "mode": "max"}
    (copy / "best.json").write_text(json.dumps(best))
    assert saved_run.checkpoint_steps(run, "best") == [9]
    (copy / "best.json").write_text(json.dumps(best | {"step": 7}))
    with pytest.raises(UsageError, match=r"no step 7 under .*there: 2, 9, 10"):
        saved_run.checkpoint_steps(run, "best")
    (copy / "best.json").write_text("[]")
    with pytest.raises(UsageError, match="it names no step"):
        saved_run.checkpoint_steps(run, "best")


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("lates", "did you mean 'latest'"),
        ("2,x", "give a step, or steps like 1000,2000"),
        ("-1", "give a step"),
        ("", "give a step"),
        ("2,3", "no step 3 under .*there: 2, 9, 10"),
    ],
)
def test_steps_that_are_not_there(run_dir, which, expected):
    with pytest.raises(UsageError, match=expected):
        saved_run.checkpoint_steps(saved_run.read(run_dir), which)


def test_damaged_steps_are_passed_over(copy, caplog):
    run = saved_run.read(copy)

    def damage(step):
        params = copy / "checkpoints" / str(step) / "params"
        flip_a_bit(
            max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        )

    damage(10)
    assert saved_run.checkpoint_steps(run, "latest") == [9]
    assert "step 10: params/" in caplog.text
    with pytest.raises(CheckpointError, match="10 is damaged: params/"):
        saved_run.load_params(run, 10, make_partitioning())
    damage(9)
    damage(2)
    with pytest.raises(CheckpointError, match=r"is intact: step 10: params/.*step 9: .*step 2: "):
        saved_run.checkpoint_steps(run, "latest")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UsageError, match="no checkpoint under"):
        saved_run.checkpoint_steps(run, "latest")


def test_parameters_are_those_that_were_saved(run_dir, monkeypatch):
    """From a relative MODEL_DIR, too."""
    monkeypatch.chdir(run_dir.parent)
    params = saved_run.load_params(saved_run.read("run"), 9, make_partitioning())
    expected = make_params(9)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for found, saved in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(saved))


def test_another_architecture_is_refused_by_name(copy):
    _edit(copy, architecture={"family": "t5", **TINY.to_dict(), "d_ff": 48})
    save_step(copy, 11)
    with pytest.raises(UsageError, match=r"wi_0/kernel' has shape \(1, 16, 32\), expected \(1, 16"):
        saved_run.load_params(saved_run.read(copy), 11, make_partitioning())
