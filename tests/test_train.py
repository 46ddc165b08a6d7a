"""Runs through the command line: what they leave, and that they go on as if never interrupted."""

import json
import math
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import (
    SMALL,
    arrays,
    assert_same_state,
    content,
    flip_a_bit,
    largest_file,
    metric_lines,
    steps,
    train_argv,
)

from t5x_lite import evaluate, gin_utils, setup, train, wrap_up
from t5x_lite.__main__ import main
from t5x_lite.metrics import MetricWriter


@pytest.fixture(scope="module", autouse=True)
def few_unigrams():
    """The baseline of fewer examples: seconds less in each run."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(wrap_up, "_UNIGRAM_EXAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The MODEL_DIR of a run that nothing interrupted."""
    model_dir = tmp_path_factory.mktemp("whole") / "run"
    assert main(train_argv(model_dir)) == 0
    return model_dir


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_what_the_house_plan_says(whole):
    assert steps(whole) == [2, 4, 6]
    train_lines = [json.loads(x) for x in (whole / "metrics/train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in train_lines] == [1, 2, 3, 4, 5, 6]
    expected = {
        *("step", "loss", "z_loss", "accuracy", "learning_rate", "grad_norm", "num_tokens"),
        *("seconds_per_step", "target_tokens_per_second", "unix_time"),
    }
    assert all(set(line) == expected for line in train_lines)
    # An untrained model knows nothing: the loss of a uniform guess over 4096 ids.
    assert train_lines[0]["loss"] == pytest.approx(math.log(4096), rel=0.15)
    evaluations = metric_lines(whole, "validation")
    assert [line["step"] for line in evaluations] == [3, 6]
    assert {"loss", "text_loss", "accuracy", "num_tokens"} <= set(evaluations[0])
    assert len(list((whole / "tensorboard").glob("*/events*"))) == 2
    assert json.loads((whole / "metrics/baselines.json").read_text())["unigram_loss"] > 0
    predictions = whole / "inference/python_docs_span_corruption-6.jsonl"
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(lines) == 2
    assert all(set(line) == {"inputs", "targets", "prediction"} for line in lines)
    assert all("<extra_id_0>" in line["inputs"] and line["targets"] for line in lines)
    assert "<svg" in (whole / "report.html").read_text()


def test_model_json_describes_the_model(whole):
    described = json.loads((whole / "model.json").read_text())
    sizes = {k.partition(".")[2]: v for k, v in SMALL.items() if k.startswith("T5Config.")}
    assert sizes.items() <= described["architecture"].items()
    assert described["feature_lengths"] == SMALL["TASK_FEATURE_LENGTHS"]
    assert described["vocabulary"]["size"] == 4096
    saved = [np.frombuffer(data, dtype) for dtype, data in arrays(whole, 6, "params").values()]
    assert described["num_parameters"] == sum(array.size for array in saved)


def test_config_gin_resolves_to_the_same_run(whole):
    config, _ = gin_utils.load_train_config(
        [arg.partition("=")[2] for arg in train_argv(whole) if arg.startswith("--gin_file")],
        gin_utils.split_gin_flags(train_argv(whole))[0],
    )
    assert gin_utils.read_saved(whole / "config.gin") == config


# ---- interrupted and resumed ---------------------------------------------------------------------


class PowerCut(Exception):
    pass


def test_a_crashed_run_goes_on_as_if_nothing_had_happened(whole, tmp_path, monkeypatch):
    """Started from the config.gin of another run, it crashes in the evaluation after step 3."""
    bindings = {
        "MODEL_DIR": str(tmp_path / "run"),
        "CHECKPOINT_KEEP": 1,
        "CHECKPOINT_KEEP_EVERY": 4,
    }
    flags = [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    argv = ["train", f"--gin_file={whole / 'config.gin'}", *flags]
    with monkeypatch.context() as m:

        def crash(*unused):
            raise PowerCut

        m.setattr(evaluate, "evaluate_loss", crash)
        with pytest.raises(PowerCut):
            main(argv)
    assert steps(tmp_path / "run") == [2]
    logged = metric_lines(tmp_path / "run", "train")
    assert [line["step"] for line in logged] == [1, 2, 3]
    # A line that the resumed run must not keep.
    writer = MetricWriter(tmp_path / "run")
    writer.write("train", 3, {"loss": 123.0})
    writer.write("train", 5, {"loss": 123.0})

    assert main(argv) == 0

    assert_same_state(whole, tmp_path / "run", 6)
    for name in ("train", "validation"):
        assert metric_lines(tmp_path / "run", name) == metric_lines(whole, name)
    # Of 2, 4 and 6 the newest one is kept, and every fourth.
    assert steps(tmp_path / "run") == [4, 6]


def test_the_same_command_on_a_complete_run_changes_nothing(copy, capsys):
    before = content(copy)
    assert main(train_argv(copy)) == 0
    assert "the run is complete: step 6 of 6" in capsys.readouterr().out
    assert content(copy) == before


def test_a_run_killed_after_its_last_checkpoint_is_finished(whole, copy):
    """Its evaluation, its predictions and its report are made up for."""
    left = ["report.html", "inference/python_docs_span_corruption-6.jsonl"]
    for name in left:
        (copy / name).unlink()
    lines = (copy / "metrics/validation.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics/validation.jsonl").write_text("".join(lines[:-1]))

    assert main(train_argv(copy)) == 0

    assert (copy / left[0]).exists()
    assert (copy / left[1]).read_text() == (whole / left[1]).read_text()
    assert metric_lines(copy, "validation") == metric_lines(whole, "validation")
    assert steps(copy) == [2, 4, 6]


def test_a_flipped_bit_costs_one_checkpoint(whole, copy, caplog):
    damaged = largest_file(copy / "checkpoints/6/optimizer")
    flip_a_bit(damaged)
    harmed = damaged.read_bytes()

    assert main(train_argv(copy)) == 0

    [line] = [m for m in caplog.messages if "skipped" in m]
    assert "step 6" in line and damaged.name in line
    assert_same_state(whole, copy, 6)
    for name in ("train", "validation"):
        assert metric_lines(copy, name) == metric_lines(whole, name)
    # Nothing is deleted: the damaged step stands beside the one written again.
    aside = copy / "checkpoints/6.damaged-1"
    assert (aside / damaged.relative_to(copy / "checkpoints/6")).read_bytes() == harmed
    assert steps(copy) == [2, 4, 6]


def test_a_signal_while_a_step_is_saved_loses_nothing(tmp_path, monkeypatch, capsys, whole):
    """It arrives after the loop has decided about this step: the next one is saved."""
    save = train.Checkpoints.save

    def interrupted_save(self, step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        save(self, step, *rest)

    with monkeypatch.context() as m:
        m.setattr(train.Checkpoints, "save", interrupted_save)
        assert main(train_argv(tmp_path / "run")) == 143
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("t5x_lite: stopped after step 3 of 6")
    assert steps(tmp_path / "run") == [2, 3]
    # The evaluation of step 3 was left out, and is made up for.
    assert not (tmp_path / "run/metrics/validation.jsonl").exists()

    assert main(train_argv(tmp_path / "run")) == 0
    assert_same_state(whole, tmp_path / "run", 6)
    assert metric_lines(tmp_path / "run", "validation") == metric_lines(whole, "validation")


def test_another_vocabulary_under_the_same_name_is_refused(copy, capsys):
    """As after an upgrade of Python, whose documentation the vocabulary is made of."""
    kept = copy / "vocabulary.model"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert main(train_argv(copy, {"TRAIN_STEPS": 8})) == 2
    assert "no longer the one this run began with" in capsys.readouterr().err
    assert steps(copy) == [2, 4, 6]


def test_a_signal_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, capsys):
    make_programs = setup.make_programs

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return make_programs(*args)

    monkeypatch.setattr(setup, "make_programs", interrupted)
    assert main(train_argv(tmp_path / "run")) == 143
    assert capsys.readouterr().err.startswith("t5x_lite: stopped before the first step")
    assert not (tmp_path / "run").exists()


def test_what_may_change_between_starts(copy):
    """The number of steps, periods and logging; a profile from the middle of its steps on."""
    changed = {"TRAIN_STEPS": 7, "LOG_PERIOD": 100, "EVAL_PERIOD": 0, "PROFILE_STEPS": (5, 9)}
    assert main(train_argv(copy, changed)) == 0
    assert [line["step"] for line in metric_lines(copy, "train")] == [1, 2, 3, 4, 5, 6, 7]
    assert gin_utils.read_saved(copy / "config.gin").train_steps == 7
    assert list((copy / "tensorboard").rglob("*.xplane.pb"))


# ---- numbers that are none -----------------------------------------------------------------------


def nan_loss(state, scalars):
    return state, scalars | {"loss_sum": jnp.float32("nan")}


def infinite_parameter(state, scalars):
    """As after an update that overflows: the loss of that step is finite still."""
    leaves, tree = jax.tree.flatten(state.params)
    leaves[0] = leaves[0].at[0].set(jnp.inf)
    return state._replace(params=jax.tree.unflatten(tree, leaves)), scalars


@pytest.mark.parametrize(
    ("poison", "problem"),
    [
        (nan_loss, "loss_sum is nan"),
        (infinite_parameter, "the parameters are not finite after the update"),
    ],
)
def test_nothing_is_saved_after_a_number_that_is_none(copy, monkeypatch, capsys, poison, problem):
    def poisoned(programs):
        def train_step(state, batch, key):
            state, scalars = programs.train_step(state, batch, key)
            return poison(state, scalars) if int(state.step) == 8 else (state, scalars)

        return programs._replace(train_step=train_step)

    make_programs = setup.make_programs
    monkeypatch.setattr(setup, "make_programs", lambda *args: poisoned(make_programs(*args)))
    before = content(copy / "checkpoints")

    assert main(train_argv(copy, {"TRAIN_STEPS": 12})) == 1

    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"t5x_lite: step 8: {problem}; batch 8 of python_docs_span_corruption")
    assert content(copy / "checkpoints") == before
    assert np.load(copy / "non_finite_batch_8.npz")["decoder_target_tokens"].shape == (4, 16)
    assert all(np.isfinite(x["loss"]) for x in metric_lines(copy, "train"))


# ---- other ways to start -------------------------------------------------------------------------


class Started(Exception):
    """Carries the state that the first step was to be made from."""


def test_initial_checkpoint_gives_the_parameters_of_another_run(whole, tmp_path, monkeypatch):
    def started(state, batch, key):
        raise Started(state)

    make_programs = setup.make_programs
    monkeypatch.setattr(
        setup, "make_programs", lambda *args: make_programs(*args)._replace(train_step=started)
    )
    with pytest.raises(Started) as caught:
        main(train_argv(tmp_path / "run", {"INITIAL_CHECKPOINT_PATH": str(whole)}))
    [state] = caught.value.args
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    found = {jax.tree_util.keystr(path): (str(x.dtype), x.tobytes()) for path, x in leaves}
    assert found == arrays(whole, 6, "params")
    assert int(state.step) == 0


def test_microbatches_give_the_same_losses(tmp_path):
    """Dropout draws other masks for microbatches, so it is off."""
    shorter = {"DROPOUT_RATE": 0.0, "TRAIN_STEPS": 2, "EVAL_STEPS": 1, "NUM_SAMPLE_PREDICTIONS": 0}
    losses = {}
    for count in (1, 4):
        model_dir = tmp_path / str(count)
        assert main(train_argv(model_dir, shorter | {"NUM_MICROBATCHES": count})) == 0
        losses[count] = [line["loss"] for line in metric_lines(model_dir, "train")]
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_dry_run_shows_all_and_leaves_nothing(tmp_path, capsys, optimizer):
    argv = train_argv(tmp_path / "run", {"OptimizerConfig.name": optimizer})
    assert main([*argv, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    for text in ("embed", "4096x32", "vocab", "bytes per device", "decoder_target_tokens"):
        assert text in shown
    assert "int32 (4, 32)" in shown and "int32 (4, 16)" in shown
    assert f"mesh {{'data': {len(jax.devices())}, 'fsdp': 1, 'model': 1}}" in shown
    assert not (tmp_path / "run").exists()
