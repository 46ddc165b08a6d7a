"""Training, evaluation and inference in two processes with two devices each."""

import json
import pathlib
import re
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
import toy_tasks
from orbax.checkpoint import v1 as ocp
from small_run import metric_lines, start, steps, train_argv
from test_distributed import free_port

from t5x_lite import data, gin_utils, setup, wrap_up
from t5x_lite.__main__ import main
from t5x_lite.partitioning import InputShare, make_partitioning
from t5x_lite.run_config import TrainConfig
from t5x_lite.verbs.flags import keep_compiled_programs

TOY = {
    "MIXTURE_OR_TASK_MODULE": "toy_tasks",
    "MIXTURE_OR_TASK_NAME": "toy_bytes",
    "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 10},
    "T5Config.vocab_size": 384,
    "MESH": {"data": 2, "fsdp": 2},
    "BEST_METRIC": "validation/loss",
    "OptimizerConfig.warmup_steps": 1,
    "OptimizerConfig.learning_rate": 0.03,
    "TRAIN_STEPS": 12,
    "EVAL_PERIOD": 6,
    "EVAL_STEPS": None,
    "CHECKPOINT_PERIOD": 5,
    "CHECKPOINT_KEEP": 1,
}

FEW_UNIGRAMS = """
import sys, time
from t5x_lite import __main__, distributed, setup, train
with setup.without_native_notes():
    from t5x_lite import wrap_up
wrap_up._UNIGRAM_EXAMPLES = 100
"""
RUN = """
sys.exit(__main__.main(sys.argv[1:]))
"""
# Time for a signal to come between two steps.
SLOWED = """
class Slowed(train.Progress):
    def update(self, step):
        super().update(step)
        time.sleep(0.4)

train.Progress = Slowed
"""


# Several commands, one after the other, in one job.
RUN_ALL = """
import json
address, process_id, *commands = sys.argv[1:]
options = distributed.Options(False, address, 2, int(process_id))
with distributed.joined(options, {}, heeds_preemption=True):
    codes = [__main__.main(json.loads(command)) for command in commands]
sys.exit(max(codes))
"""


def start_both(code: str, *argv: str, all_at_once: bool = False) -> list[Any]:
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            *("-c", code),
            *([address, str(i), *argv] if all_at_once else [*argv, *process_flags(address, i)]),
            JAX_PLATFORMS="cpu",
            JAX_NUM_CPU_DEVICES="2",
            XLA_FLAGS="--xla_backend_optimization_level=0",  # compiled twice as fast
            PYTHONPATH=str(pathlib.Path(__file__).resolve().parent),
        )
        for i in range(2)
    ]


def process_flags(address: str, i: int) -> list[str]:
    return [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={i}"]


def finish(processes: list[Any], exit_code: int = 0) -> list[tuple[str, str]]:
    """(stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [exit_code] * 2, outputs
    return outputs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """The MODEL_DIR of a run of two processes that nothing interrupted."""
    model_dir = tmp_path_factory.mktemp("whole") / "run"
    outputs = finish(start_both(FEW_UNIGRAMS + RUN, *train_argv(model_dir, TOY)))
    assert "the run is complete: step 12 of 12" in outputs[0][0]
    assert not re.search("step|run", outputs[1][0])  # Gloo alone says something there
    return model_dir


def test_one_process_writes_what_one_process_would(whole):
    assert steps(whole) == [6, 12]  # the best so far stays until there is a better one
    assert [line["step"] for line in metric_lines(whole, "train")] == list(range(1, 13))
    (first, last) = metric_lines(whole, "validation")
    assert (first["step"], last["step"]) == (6, 12)
    assert last["num_tokens"] == sum(len(w) + 1 for w in answers("validation"))
    assert [line["num_examples"] for line in metric_lines(whole, "toy_bytes")] == [7, 7]
    assert len(list((whole / "tensorboard").rglob("*tfevents*"))) == 3
    positions = sorted((whole / "checkpoints" / "12" / "input_position").iterdir())
    assert [p.name for p in positions] == ["process_0_of_2", "process_1_of_2"]
    assert positions[0].read_bytes() != positions[1].read_bytes()
    assert not list(whole.glob(".*"))
    baselines = json.loads((whole / "metrics" / "baselines.json").read_text())
    assert baselines["unigram_loss"] == pytest.approx(unigram_loss())


def answers(split: str) -> list[str]:
    return [toy_tasks.CLASSES[label] for _, label in toy_tasks.rows(split)]


def unigram_loss() -> float:
    """Of the bytes of the validation's targets, by those of the inputs and targets of training."""
    counts = np.ones(246)  # ids that are text: not the pad, the end and some sentinels
    for sentence, label in toy_tasks.rows("train"):
        for byte in f"sentiment: {sentence}{toy_tasks.CLASSES[label]}".encode():
            counts[byte] += 1
    losses = -np.log(counts / counts.sum())
    return float(np.mean([losses[b] for answer in answers("validation") for b in answer.encode()]))


@pytest.fixture(scope="module")
def one_device(whole) -> tuple[TrainConfig, setup.Programs]:
    """The run on the device that there is here."""
    config, _ = gin_utils.load_train_config([str(whole / "config.gin")], ["MESH = None"], [])
    keep_compiled_programs()  # for the last test here
    return config, setup.make_programs(config, make_partitioning())


def test_losses_are_those_of_one_device(whole, one_device):
    """The rows of both processes as one batch."""
    config, programs = one_device
    state = programs.init(jax.random.fold_in(jax.random.key(config.random_seed), 0))
    key = jax.random.fold_in(jax.random.key(config.random_seed), 1)
    data.configure(config.data)
    provider = data.check(config.data, config.model.vocab_size)
    shares = [InputShare(i, 2, (2 * i, 2 * i + 1), 4) for i in range(2)]
    halves = [data.train_batches(config.data, provider, config.random_seed, s) for s in shares]
    losses = []
    for _ in range(config.train_steps):
        parts = [next(half) for half in halves]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        state, scalars = programs.train_step(state, programs.partitioning.shard_batch(batch), key)
        losses.append(float(scalars["loss_sum"]) / float(scalars["num_tokens"]))
    expected = [line["loss"] for line in metric_lines(whole, "train")]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


INFER = ["--task=toy_bytes", "--split=validation", "--module=toy_tasks", "--batch_size=4"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[pathlib.Path, int]:
    """The MODEL_DIR of a run of which one process got SIGTERM, and its last step."""
    model_dir = tmp_path_factory.mktemp("stopped") / "run"
    processes = start_both(FEW_UNIGRAMS + SLOWED + RUN, *train_argv(model_dir, TOY))
    for line in processes[0].stdout:
        if line.startswith("step 2/12"):
            break
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, exit_code=143)
    found = [re.search(r"stopped after step (\d+) of 12, which is saved", e) for _, e in outputs]
    assert found[0] and found[1], outputs
    assert found[0][1] == found[1][1]
    return model_dir, int(found[0][1])


def cached_argv(folder: pathlib.Path, model_dir: str, train_steps: int, mesh: Any) -> list[str]:
    bindings = {
        "CACHE_DIR": str(folder / "caches"),
        "TRAIN_STEPS": train_steps,
        "MESH": mesh,
        "EVAL_PERIOD": 0,
        "EVAL_STEPS": 1,
        "BEST_METRIC": None,
    }
    return train_argv(folder / model_dir, TOY | bindings)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> pathlib.Path:
    """A cache, a run on it of one process that got to step 4, and one that got to step 10."""
    folder = tmp_path_factory.mktemp("cached")
    flags = ["--module=toy_tasks", "--task_feature_lengths=inputs=64,targets=10", "--num_shards=2"]
    command = ["cache", "toy_bytes", f"--output_dir={folder}/caches", *flags]
    assert main([*command, "--num_processes=1"]) == 0
    with pytest.MonkeyPatch.context() as m:
        m.setattr(wrap_up, "_UNIGRAM_EXAMPLES", 100)
        assert main(cached_argv(folder, "alone", 10, None)) == 0
        assert main(cached_argv(folder, "run", 4, None)) == 0
    return folder


@pytest.fixture(scope="module")
def afterwards(whole, stopped, cached, tmp_path_factory) -> pathlib.Path:
    """Where two new processes resumed that run, and evaluated and asked a copy of the whole one.

    They also went on with the run on a cache, from step 4 to step 8.
    """
    folder = tmp_path_factory.mktemp("afterwards")
    model_dir, step = stopped
    shutil.copytree(model_dir, folder / "resumed")
    without_evaluations(whole, folder / "two")
    commands = [
        train_argv(folder / "resumed", TOY),
        cached_argv(cached, "run", 8, TOY["MESH"]),
        ["eval", str(folder / "two")],
        ["infer", str(whole), *INFER, f"--output={folder}/two.jsonl"],
    ]
    argv = [json.dumps(command) for command in commands]
    outputs = finish(start_both(FEW_UNIGRAMS + RUN_ALL, *argv, all_at_once=True))
    assert f"resuming after step {step} of 12" in outputs[0][0]
    assert "complete: 7 lines" in outputs[0][0]
    assert not re.search("step|lines|accuracy", outputs[1][0])
    return folder


def without_evaluations(run: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("inference", *EVALUATIONS))
    return to


EVALUATIONS = ("validation.jsonl", "toy_bytes.jsonl")


def test_sigterm_to_one_process_stops_both_at_one_step(stopped):
    model_dir, step = stopped
    assert 2 < step < 12
    assert steps(model_dir)[-1] == step
    assert metric_lines(model_dir, "train")[-1]["step"] == step


def test_two_new_processes_go_on_as_if_nothing_had_happened(whole, afterwards, one_device):
    abstract = one_device[1].abstract_state
    expected, found = (
        ocp.load_checkpointables(
            run / "checkpoints" / "12",
            {
                "params": abstract.params,
                "optimizer": {"step": abstract.step, "opt_state": abstract.opt_state},
            },
        )
        for run in (whole, afterwards / "resumed")
    )
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert len(jax.tree.leaves(expected)) > 20
    for name in ("train", "validation", "toy_bytes"):
        assert metric_lines(afterwards / "resumed", name) == metric_lines(whole, name)


def test_evaluation_in_two_processes_and_in_one(whole, afterwards, tmp_path):
    one, two = without_evaluations(whole, tmp_path / "one"), afterwards / "two"
    assert main(["eval", str(one)]) == 0
    for name in ("validation", "toy_bytes"):
        (line,), (other,) = metric_lines(one, name), metric_lines(two, name)
        assert line == pytest.approx(other, rel=1e-5)
        assert line == pytest.approx(metric_lines(whole, name)[-1], rel=1e-5)
    answers = "inference/toy_bytes-12.jsonl"
    assert predictions(one / answers) == predictions(two / answers) == predictions(whole / answers)


def test_inference_in_two_processes_and_in_one(whole, afterwards, tmp_path):
    assert main(["infer", str(whole), *INFER, f"--output={tmp_path}/one.jsonl"]) == 0
    assert predictions(tmp_path / "one.jsonl") == predictions(afterwards / "two.jsonl")
    assert len(predictions(tmp_path / "one.jsonl")) == 7


def predictions(path: pathlib.Path) -> list[tuple[str, str]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["inputs"], record["prediction"]) for record in records]


def test_a_run_on_a_cache_goes_from_one_process_to_two_and_back(cached, afterwards, monkeypatch):
    monkeypatch.setattr(wrap_up, "_UNIGRAM_EXAMPLES", 100)
    assert main(cached_argv(cached, "run", 10, None)) == 0
    assert steps(cached / "run") == [10]
    found, expected = (metric_lines(cached / name, "train") for name in ("run", "alone"))
    assert [line["step"] for line in found] == list(range(1, 11))
    losses = [line["loss"] for line in found]
    np.testing.assert_allclose(losses, [line["loss"] for line in expected], rtol=1e-5)


def test_a_stream_is_not_divided_otherwise(whole, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "copy")
    argv = train_argv(copy, TOY | {"TRAIN_STEPS": 14, "MESH": None})
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "input positions of 2 processes, which 1 cannot take over" in error
    assert steps(copy) == [6, 12]
