"""Training: `train` reads top to bottom, `_run_steps` is the loop.

What a run leaves in MODEL_DIR is described in docs/model_dir.md.
"""

import itertools
import json
import math
import os
import pathlib
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from t5x_lite import evaluate, files, partitioning, setup
from t5x_lite.checkpoints import Checkpoints, Restored, restore_params
from t5x_lite.errors import Failure, UsageError
from t5x_lite.metrics import MetricWriter, read_metrics, summarize
from t5x_lite.models import t5
from t5x_lite.progress import Progress
from t5x_lite.run_config import TrainConfig, eval_name
from t5x_lite.step import TrainState

# Steps that may be under way on the device before the host looks at the oldest one's loss.
_STEPS_IN_FLIGHT = 2


# A copy of the SentencePiece model in MODEL_DIR: the run can be read without the original.
VOCABULARY_FILE = "vocabulary.model"


class NonFiniteLossError(Failure):
    """The loss or its gradient is no number; nothing after the last checkpoint was saved."""


class Interrupted(Failure):
    """The run was asked to stop and has saved the step it stopped at."""

    # What a process that SIGTERM ends exits with; a supervisor then starts the command again.
    exit_code = 143


def train(config: TrainConfig, config_text: str) -> None:
    """Runs or resumes training until `config.train_steps`.

    Args:
      config: the run.
      config_text: the gin text that makes it again, for MODEL_DIR/config.gin.

    Raises:
      UsageError: the data, the mesh or MODEL_DIR does not fit the configuration.
      NonFiniteLossError: naming step and batch.
      Interrupted: after SIGTERM or Ctrl-C, with the current step saved.
      CheckpointError: there are checkpoints, none of them intact.
    """
    if jax.process_count() > 1:
        raise UsageError("training in several processes is not built yet: start one")
    model_dir = epath.Path(config.model_dir)
    _check_writable(config.model_dir)
    setup.make_mesh(config)  # what can be refused at once is
    checkpoints = Checkpoints(
        (model_dir / "checkpoints").resolve(),
        keep=config.checkpoint_keep,
        keep_every=config.checkpoint_keep_every,
    )
    key = jax.random.key(config.random_seed)
    with _stop_on_signal() as stop:
        with setup.opening_input(config) as opened:
            programs = setup.make_programs(config)
            state, restored = _first_state(config, programs, checkpoints, key)
            data = opened.result()
        from t5x_lite import wrap_up  # with TensorFlow, which is there only now

        start = 0
        if restored is not None:
            start = restored.step
            if restored.input_state is None:
                raise UsageError(f"the checkpoint of step {start} has no input position")
            _check_same_text(model_dir, data)
            data.train.restore(restored.input_state)
            if start >= config.train_steps and wrap_up.is_finished(model_dir, config, start):
                print(f"the run is complete: step {start} of {config.train_steps}")
                wrap_up.print_places(model_dir)
                return
            print(f"resuming after step {start} of {config.train_steps}", flush=True)
        if stop.is_set():
            raise Interrupted("stopped before the first step; nothing was written")

        _write_run_files(model_dir, config, config_text, data)
        writer = MetricWriter(model_dir)
        writer.drop_after(start)
        run = _Run(config, data, programs, checkpoints, writer, stop)
        try:
            state = _run_steps(run, state, start, jax.random.fold_in(key, 1))
        finally:
            writer.close()
            checkpoints.close()
    wrap_up.finish(model_dir, config, data, state)


def _first_state(
    config: TrainConfig, programs: setup.Programs, checkpoints: Checkpoints, key: jax.Array
) -> tuple[TrainState, Restored | None]:
    """Where the run starts, and the checkpoint if it is one of its own.

    Precedence: the newest intact checkpoint of this run, else the parameters of
    INITIAL_CHECKPOINT_PATH, else T5's initialisers.
    """
    restored = checkpoints.restore_latest(programs.abstract_state)
    if restored is not None:
        return restored.state, restored
    state = programs.init(jax.random.fold_in(key, 0))
    if config.initial_checkpoint_path is not None:
        initial = restore_params(config.initial_checkpoint_path, programs.abstract_state.params)
        state = state._replace(params=initial.state)
    return state, None


class _Run(NamedTuple):
    """What the loop works with and does not change."""

    config: TrainConfig
    data: setup.Input
    programs: setup.Programs
    checkpoints: Checkpoints
    writer: MetricWriter
    stop: threading.Event


def _run_steps(run: _Run, state: TrainState, start: int, key: jax.Array) -> TrainState:
    """The loop: the device runs ahead by a few steps, the host follows with the log."""
    config, programs = run.config, run.programs
    first_profiled, last_profiled = config.profile_steps or (0, 0)
    with Progress(config.train_steps, start) as progress:
        follower = _Follower(run, progress)
        if start and _is_evaluated_after(config, start) and not _has_evaluation(run, start):
            _evaluate(run, progress, start, state)  # killed between the checkpoint and this
        saved, profiling = start, False
        for step in range(start + 1, config.train_steps + 1):
            if first_profiled <= step <= last_profiled and not profiling:
                jax.profiler.start_trace(str(epath.Path(config.model_dir) / "tensorboard"))
                profiling = True
            batch = next(run.data.train)
            rows = partitioning.shard_batch(batch, programs.mesh)
            state, scalars = programs.train_step(state, rows, key)
            follower.add(step, batch, scalars)

            stopping = run.stop.is_set()  # asked once, or a signal could fall between
            last = stopping or step == config.train_steps
            if stopping:
                progress.message(f"stopping after step {step}; Ctrl-C again ends at once")
            if profiling and (last or step == last_profiled):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                profiling = False
            if last or step % config.checkpoint_period == 0:
                follower.catch_up()  # nothing is saved after a loss that is no number
                _save(run, step, state, batch)
                saved = step
            if not stopping and _is_evaluated_after(config, step):
                follower.catch_up()
                began = time.monotonic()
                _evaluate(run, progress, step, state)
                follower.leave_out(time.monotonic() - began)
                stopping = run.stop.is_set()
                if stopping and saved < step:
                    _save(run, step, state, batch)
                    saved = step
            if stopping:
                break
        run.checkpoints.wait()
        if run.stop.is_set():
            raise Interrupted(
                f"stopped after step {saved} of {config.train_steps}, which is saved; the same "
                "command goes on from there"
            )
    return state


def _save(run: _Run, step: int, state: TrainState, batch: Any) -> None:
    if not _all_finite(state):
        problem = "the parameters are not finite after the update"
        raise NonFiniteLossError(_describe_batch(run, step, batch, problem))
    run.writer.flush()
    run.checkpoints.save(step, state, run.data.train.position())


def _is_evaluated_after(config: TrainConfig, step: int) -> bool:
    period = config.eval_period
    return step >= config.train_steps or (period > 0 and step % period == 0)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


class _Follower:
    """Reads each step's sums a little after the device has them; checks and logs them."""

    def __init__(self, run: _Run, progress: Progress):
        self._run = run
        self._progress = progress
        self._behind: deque[tuple[int, Any, Any]] = deque()
        self._tokens = 0.0
        self._steps = 0
        self._since = time.monotonic()

    def add(self, step: int, batch: Any, scalars: Any) -> None:
        self._behind.append((step, batch, scalars))
        while len(self._behind) > _STEPS_IN_FLIGHT:
            self._read(*self._behind.popleft())

    def catch_up(self) -> None:
        while self._behind:
            self._read(*self._behind.popleft())

    def leave_out(self, seconds: float) -> None:
        """Time that the rates are not to contain."""
        self._since += seconds

    def _read(self, step: int, batch: Any, scalars: Any) -> None:
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        for name in ("loss_sum", "grad_norm"):
            if not math.isfinite(values[name]):
                problem = f"{name} is {values[name]}"
                raise NonFiniteLossError(_describe_batch(self._run, step, batch, problem))
        self._tokens += values["num_tokens"]
        self._steps += 1
        self._progress.update(step)
        config = self._run.config
        if step % config.log_period == 0 or step == config.train_steps or self._steps == step == 1:
            seconds = time.monotonic() - self._since
            line = summarize(values) | {
                "seconds_per_step": seconds / self._steps,
                "target_tokens_per_second": self._tokens / seconds,
            }
            self._run.writer.write("train", step, line)
            self._progress.log(step, line)
            self._tokens, self._steps, self._since = 0.0, 0, time.monotonic()


def _evaluate(run: _Run, progress: Progress, step: int, state: TrainState) -> None:
    """Writes a line of metrics, unless the run is stopped meanwhile: it is made up for later."""
    values = evaluate.evaluate_loss(
        run.programs.eval_step,
        state.params,
        itertools.takewhile(lambda _: not run.stop.is_set(), run.data.evaluation),
        run.data.text_ids_V,
        run.programs.mesh,
    )
    if run.stop.is_set():
        return
    split = eval_name(run.config)
    run.writer.write(split, step, values)
    progress.message(
        f"step {step}  {split} loss {values['loss']:.4f}  text {values['text_loss']:.4f}  "
        f"accuracy {values['accuracy']:.4f}"
    )


def _has_evaluation(run: _Run, step: int) -> bool:
    path = epath.Path(run.config.model_dir) / "metrics" / f"{eval_name(run.config)}.jsonl"
    return path.exists() and any(record["step"] == step for record in read_metrics(path))


def _describe_batch(run: _Run, step: int, batch: Any, problem: str) -> str:
    from t5x_lite import data

    task = run.config.data.mixture_or_task_name
    path = epath.Path(run.config.model_dir) / f"non_finite_batch_{step}.npz"
    with path.open("wb") as f:
        np.savez(f, **batch)
    vocabulary = data.target_vocabulary(run.data.provider)
    text = data.decode(vocabulary, batch["decoder_target_tokens"][0])[:60]
    kept = run.checkpoints.steps()
    return (
        f"step {step}: {problem}; batch {step} of {task} (seed "
        f"{run.config.random_seed}, first target {text!r}) is kept in {path}; "
        f"checkpoints end at step {kept[-1] if kept else 'none'}"
    )


# ---- before and after the loop -------------------------------------------------------------------


def _check_writable(model_dir: str) -> None:
    """Raises UsageError if MODEL_DIR cannot be written or made; writes nothing."""
    if not files.is_local(model_dir):
        return
    path = pathlib.Path(model_dir).absolute()
    while not path.exists():
        path = path.parent
    problem = None
    if not path.is_dir():
        problem = f"{path} is not a directory"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = f"no permission to write in {path}"
    if problem:
        raise UsageError(f"MODEL_DIR = {model_dir!r} cannot be written: {problem}")


def _check_same_text(model_dir: epath.Path, data: setup.Input) -> None:
    """Refuses to go on with other ids or other text than the run began with.

    The gin bindings name files; what is in them can change under the same name.
    """
    from t5x_lite.data import text_files_shards, vocabulary_content

    path = model_dir / VOCABULARY_FILE
    if path.exists() and path.read_bytes() != vocabulary_content(data.provider):
        raise UsageError(
            f"the vocabulary of {data.provider.name} is no longer the one this run began with, "
            f"which is kept in {path}: its ids mean something else"
        )
    path = model_dir / "model.json"
    saved = json.loads(path.read_text()).get("text_files_shards") if path.exists() else None
    if saved is not None and saved != text_files_shards(data.provider):
        raise UsageError(
            f"the files of TEXT_FILES_PATTERN are no longer those that {str(model_dir)!r} began "
            "with: put them back, or use another MODEL_DIR"
        )


def _write_run_files(
    model_dir: epath.Path, config: TrainConfig, config_text: str, data: setup.Input
) -> None:
    """Writes config.gin and model.json, before anything else of a run."""
    from t5x_lite.data import text_files_shards, vocabulary_content, vocabulary_description

    description = {
        "architecture": {"family": "t5", **config.model.to_dict()},
        "num_parameters": t5.num_parameters(config.model),
        "task": config.data.mixture_or_task_name,
        "feature_lengths": dict(config.data.task_feature_lengths),
        "vocabulary": vocabulary_description(data.provider),
        "text_files_shards": text_files_shards(data.provider),
    }
    content = vocabulary_content(data.provider)
    try:
        if content is not None:
            files.write_atomically(model_dir / VOCABULARY_FILE, content)
        files.write_atomically(model_dir / "config.gin", config_text.encode())
        text = json.dumps(description, indent=2) + "\n"
        files.write_atomically(model_dir / "model.json", text.encode())
    except OSError as e:
        raise UsageError(f"MODEL_DIR = {str(model_dir)!r} cannot be written: {e.strerror}") from e


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM (a preemption) or Ctrl-C sets; a second Ctrl-C stops at once."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def dry_run(config: TrainConfig) -> None:
    """Opens the data, draws one batch, and prints what a run would hold; trains nothing.

    Raises:
      UsageError: as `train` would.
    """
    _check_writable(config.model_dir)
    setup.make_mesh(config)
    programs = setup.make_programs(config, compile_train_step=False)
    data = setup.open_input(config)
    batch = next(data.train)
    table = partitioning.describe(programs.abstract_state, programs.state_axes)
    print("\n".join(table))
    print("\none batch:")
    for name, array in batch.items():
        filled = 100 * np.count_nonzero(array) / array.size
        print(f"  {name:24} {array.dtype} {array.shape}  {filled:5.1f}% not 0")
    total = t5.num_parameters(config.model)
    print(f"\n{total:,} parameters; mesh {dict(programs.mesh.shape)}; nothing was trained")
