"""What needs processes of its own: SIGTERM, kill -9 in a save, and a mesh of eight devices."""

import re
import signal

import numpy as np
import pytest
from small_run import assert_same_state, metric_lines, start, steps, train_argv

from t5x_lite import wrap_up
from t5x_lite.__main__ import main

BINDINGS = {"TRAIN_STEPS": 40, "EVAL_PERIOD": 0, "CHECKPOINT_PERIOD": 10}

FEW_UNIGRAMS = """
import sys
from t5x_lite import __main__, setup

with setup.without_native_notes():
    from t5x_lite import wrap_up
wrap_up._UNIGRAM_EXAMPLES = 100
sys.exit(__main__.main(sys.argv[1:]))
"""

# A tenth of a second for each step, in which the signal can come.
SLOWED = """
import sys, time
from t5x_lite import __main__, train

class Slowed(train.Progress):
    def update(self, step):
        super().update(step)
        time.sleep(0.1)

train.Progress = Slowed
sys.exit(__main__.main(sys.argv[1:]))
"""

# Killed when the arrays of step 20 are written and the step has not got its name.
KILLED = """
import os, signal, sys
from t5x_lite import __main__, checkpoints

write_digests = checkpoints.write_digests

def die(directory):
    if directory.name.startswith("20"):
        os.kill(os.getpid(), signal.SIGKILL)
    write_digests(directory)

checkpoints.write_digests = die
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def few_unigrams():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(wrap_up, "_UNIGRAM_EXAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The MODEL_DIR of a run that nothing interrupted."""
    model_dir = tmp_path_factory.mktemp("whole") / "run"
    assert main(train_argv(model_dir, BINDINGS)) == 0
    return model_dir


def test_sigterm_saves_the_current_step(whole, tmp_path):
    argv = train_argv(tmp_path / "run", BINDINGS)
    process = start("-c", SLOWED, *argv)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/40"):
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)

    assert process.returncode == 143, error
    # One line: neither a traceback nor what native libraries say of themselves.
    stopped = re.fullmatch(r"t5x_lite: stopped after step (\d+) of 40, which is saved; .*\n", error)
    assert stopped, error
    step = int(stopped[1])
    assert steps(tmp_path / "run") == [*range(10, step, 10), step]
    assert metric_lines(tmp_path / "run", "train") == metric_lines(whole, "train")[:step]

    assert main(argv) == 0
    assert_same_state(whole, tmp_path / "run", 40)
    for name in ("train", "validation"):
        assert metric_lines(tmp_path / "run", name) == metric_lines(whole, name)


def test_kill_9_during_a_save_costs_that_save(whole, tmp_path, caplog, capsys):
    argv = train_argv(tmp_path / "run", BINDINGS)
    process = start("-c", KILLED, *argv)
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error
    assert steps(tmp_path / "run") == [10]

    assert main(argv) == 0

    assert "resuming after step 10 of 40" in capsys.readouterr().out
    assert "step 20: its save was interrupted" in caplog.text
    assert_same_state(whole, tmp_path / "run", 40)
    assert metric_lines(tmp_path / "run", "train") == metric_lines(whole, "train")


def test_eight_devices_have_the_losses_of_one(whole, tmp_path):
    """Data-parallel over four, each model split over two; dropout on."""
    bindings = {"TRAIN_STEPS": 4, "MESH": {"data": 4, "model": 2}, "NUM_SAMPLE_PREDICTIONS": 0}
    argv = train_argv(tmp_path / "run", BINDINGS | bindings)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    process = start("-c", FEW_UNIGRAMS, *argv, **devices)
    _, error = process.communicate(timeout=180)
    assert (process.returncode, error) == (0, "")
    losses = [line["loss"] for line in metric_lines(tmp_path / "run", "train")]
    expected = [line["loss"] for line in metric_lines(whole, "train")[:4]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(losses) == 4
