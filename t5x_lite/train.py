"""Training: `train` reads top to bottom, `_run_steps` is the loop.

What a run leaves in MODEL_DIR is described in docs/model_dir.md.
"""

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from t5x_lite import best, run_files, setup
from t5x_lite.checkpoints import Checkpoints, Restored, restore_params
from t5x_lite.distributed import AgreedStop, from_process_0, is_coordinator, tell, wait_for_all
from t5x_lite.errors import Failure, UsageError
from t5x_lite.evaluator import Evaluator
from t5x_lite.interop import recognise
from t5x_lite.metrics import MetricWriter, summarize
from t5x_lite.models import t5
from t5x_lite.partitioning import describe
from t5x_lite.progress import Progress
from t5x_lite.run_config import TrainConfig
from t5x_lite.step import TrainState

# Steps that may be under way on the device before the host looks at the oldest one's loss.
_STEPS_IN_FLIGHT = 2


class NonFiniteLossError(Failure):
    """The loss or its gradient is no number; nothing after the last checkpoint was saved."""


class Interrupted(Failure):
    """The run was asked to stop and has saved the step it stopped at."""

    # What a process that SIGTERM ends exits with; a supervisor then starts the command again.
    exit_code = 143


def train(config: TrainConfig, config_text: str) -> None:
    """Runs or resumes training until `config.train_steps`.

    Every process of a job calls it with the same configuration. What is decided by looking into
    MODEL_DIR, process 0 decides for all; it alone writes there what is not a checkpoint's.

    Args:
      config: the run.
      config_text: the gin text that makes it again, for MODEL_DIR/config.gin.

    Raises:
      UsageError: the data, the mesh or MODEL_DIR does not fit the configuration.
      NonFiniteLossError: naming step and batch.
      Interrupted: after SIGTERM or Ctrl-C, with the current step saved.
      CheckpointError: there are checkpoints, none of them intact.
    """
    model_dir = epath.Path(config.model_dir)
    run_files.check_writable(config.model_dir)
    partitioning = setup.partitioning_of(config)  # what can be refused at once is
    run_files.check_shared(config.model_dir)
    checkpoints = Checkpoints(
        model_dir / "checkpoints",
        keep=config.checkpoint_keep,
        keep_every=config.checkpoint_keep_every,
    )
    key = jax.random.key(config.random_seed)
    with _stop_on_signal() as stop:
        with setup.opening_input(config, partitioning.input_share()) as opened:
            programs = setup.make_programs(config, partitioning)
            state, restored = _first_state(config, programs, checkpoints, key)
            data = opened.result()
        from t5x_lite import wrap_up  # with TensorFlow, which is there only now

        start = 0
        if restored is not None:
            start = restored.step
            run_files.check_same_text(model_dir, config, data)
            converted = from_process_0(lambda: run_files.converted_step(model_dir))
            if restored.input_state is not None:
                data.train.restore(restored.input_state)
            elif start != converted:  # else: the data from its beginning
                raise UsageError(f"the checkpoint of step {start} has no input position")
            elif start >= config.train_steps:
                raise UsageError(
                    f"TRAIN_STEPS = {config.train_steps}: the converted checkpoint in "
                    f"{config.model_dir!r} is of step {start}, and they count from its first"
                )
            if from_process_0(lambda: wrap_up.is_finished(model_dir, config, start)):
                tell(f"the run is complete: step {start} of {config.train_steps}")
                wrap_up.tell_places(model_dir)
                return
            tell(f"resuming after step {start} of {config.train_steps}")
        elif config.initial_checkpoint_path is not None:
            run_files.check_initial_vocabulary(config.initial_checkpoint_path, data)
        if stop.is_set():
            raise Interrupted("stopped before the first step; nothing was written")

        run_files.write(model_dir, config, config_text, data)
        writer = MetricWriter(model_dir, enabled=is_coordinator())
        writer.drop_after(start)
        evaluator = Evaluator(config, data, programs, writer, stop.is_set)
        run = _Run(config, data, programs, checkpoints, writer, evaluator, stop)
        try:
            state = _run_steps(run, state, start, jax.random.fold_in(key, 1))
        finally:
            writer.close()
            checkpoints.close()
    wrap_up.finish(model_dir, config, data, state, evaluator.predictor)


def _first_state(
    config: TrainConfig, programs: setup.Programs, checkpoints: Checkpoints, key: jax.Array
) -> tuple[TrainState, Restored | None]:
    """Where the run starts, and the checkpoint if it is one of its own.

    Precedence: the newest intact checkpoint of this run, else the parameters of
    INITIAL_CHECKPOINT_PATH, else T5's initialisers.
    """
    try:
        restored = checkpoints.restore_latest(programs.abstract_state)
    except UsageError as e:
        if run_files.converted_step(epath.Path(config.model_dir)) is None:
            raise
        raise UsageError(f"{e}; {run_files.MODEL_GIN} beside it has what it was made with") from e
    if restored is not None:
        return restored.state, restored
    state = programs.init(jax.random.fold_in(key, 0))
    if config.initial_checkpoint_path is not None:
        state = state._replace(params=_initial_params(config.initial_checkpoint_path, programs))
    return state, None


def _initial_params(path: str, programs: setup.Programs) -> Any:
    try:
        return restore_params(path, programs.abstract_state.params).state
    except UsageError as e:
        hint = recognise.hint(path) if run_files.run_of(path) is None else ""
        raise UsageError(f"INITIAL_CHECKPOINT_PATH = {path!r}: {e}{hint}") from e


class _Run(NamedTuple):
    """What the loop works with and does not change."""

    config: TrainConfig
    data: setup.Input
    programs: setup.Programs
    checkpoints: Checkpoints
    writer: MetricWriter
    evaluator: Evaluator
    stop: threading.Event | AgreedStop


def _run_steps(run: _Run, state: TrainState, start: int, key: jax.Array) -> TrainState:
    """The loop: the device runs ahead by a few steps, the host follows with the log."""
    config, programs = run.config, run.programs
    first_profiled, last_profiled = (is_coordinator() and config.profile_steps) or (0, 0)
    with _progress(config, start) as progress:
        saved, profiling = start, False
        if start:
            _pin_best(run, start)
            if _is_evaluated_after(config, start) and not run.evaluator.has_evaluated(start):
                _evaluate(run, progress, start, state, saved)  # killed between the save and this
        follower = _Follower(run, progress)
        # Stopped already: that evaluation is to be made up for before the next step.
        ended = run.stop.is_set() or _is_exhausted(run)
        for step in range(start + 1, config.train_steps + 1):
            if ended:
                break
            if first_profiled <= step <= last_profiled and not profiling:
                jax.profiler.start_trace(str(epath.Path(config.model_dir) / "tensorboard"))
                profiling = True
            batch = next(run.data.train)
            rows = programs.partitioning.shard_batch(batch)
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
                saved = _save(run, step, state, batch)
            if not stopping and _is_evaluated_after(config, step):
                follower.catch_up()
                began = time.monotonic()
                saved = _evaluate(run, progress, step, state, saved, batch)
                follower.leave_out(time.monotonic() - began)
                stopping = run.stop.is_set()
                ended = _is_exhausted(run)
                if saved < step and (stopping or ended):
                    saved = _save(run, step, state, batch)
            if stopping:
                break
        run.checkpoints.wait()
        if run.stop.is_set():
            raise Interrupted(
                f"stopped after step {saved} of {config.train_steps}, which is saved; the same "
                "command goes on from there"
            )
    return state


def _save(run: _Run, step: int, state: TrainState, batch: Any) -> int:
    """Saves the step, in the background, and returns it."""
    if not _all_finite(state):
        problem = "the parameters are not finite after the update"
        raise NonFiniteLossError(_describe_batch(run, step, batch, problem))
    run.writer.flush()
    run.checkpoints.save(step, state, run.data.train.position())
    return step


def _evaluate(
    run: _Run, progress: Progress, step: int, state: TrainState, saved: int, batch: Any = None
) -> int:
    """Evaluates the step, and keeps it if it is the best; returns the step that was saved last.

    Nothing is written if the run is stopped meanwhile: the evaluation is made up for later.
    """
    lines = run.evaluator.evaluate(step, state.params)
    for line in lines:
        progress.message(line)
    # Of those that are there: what was best before BEST_METRIC was set may be gone.
    found = _find_best(run, {*run.checkpoints.steps(), step})
    if not lines or found is None or found.step != step:
        return saved
    if saved < step:
        saved = _save(run, step, state, batch)
    # best.json never names what is not there: the old one stays until the new one is whole.
    run.checkpoints.wait()
    _write_best(run, found)
    return saved


def _pin_best(run: _Run, start: int) -> None:
    """Keeps the best of the checkpoints that a resumed run has."""
    steps = [step for step in run.checkpoints.steps() if step <= start]
    found = _find_best(run, steps)
    if found is not None:
        _write_best(run, found)


def _find_best(run: _Run, steps: Collection[int]) -> best.Best | None:
    found = from_process_0(lambda: best.find(run.config.model_dir, run.config, steps))
    return None if found is None else best.Best(*found)


def _write_best(run: _Run, found: best.Best) -> None:
    if is_coordinator():
        best.write(run.config.model_dir, run.config, found)
    run.checkpoints.pin(found.step)


def _is_exhausted(run: _Run) -> bool:
    return from_process_0(lambda: best.is_exhausted(run.config.model_dir, run.config))


def _is_evaluated_after(config: TrainConfig, step: int) -> bool:
    period = config.eval_period
    return step >= config.train_steps or (period > 0 and step % period == 0)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


@contextmanager
def _progress(config: TrainConfig, start: int) -> Iterator[Progress]:
    """What process 0 shows; the others show it to nobody."""
    with (
        open(os.devnull, "w") as nowhere,
        Progress(config.train_steps, start, stream=None if is_coordinator() else nowhere) as bar,
    ):
        yield bar


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


def _describe_batch(run: _Run, step: int, batch: Any, problem: str) -> str:
    from t5x_lite import data

    task = run.config.data.mixture_or_task_name
    own = whose = ""
    if jax.process_count() > 1:  # each keeps its rows
        number = f"{jax.process_index()}_of_{jax.process_count()}"
        own, whose = f"_process_{number}", f"rows of process {number.replace('_', ' ')}, "
    path = epath.Path(run.config.model_dir) / f"non_finite_batch_{step}{own}.npz"
    with path.open("wb") as f:
        np.savez(f, **batch)
    wait_for_all("every process has kept its rows")
    vocabulary = data.target_vocabulary(run.data.provider)
    text = data.decode(vocabulary, batch["decoder_target_tokens"][0])[:60]
    kept = run.checkpoints.steps()
    return (
        f"step {step}: {problem}; batch {step} of {task} (seed "
        f"{run.config.random_seed}, {whose}first target {text!r}) is kept in {path}; "
        f"checkpoints end at step {kept[-1] if kept else 'none'}"
    )


# ---- before and after the loop -------------------------------------------------------------------


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event | AgreedStop]:
    """What SIGTERM (a preemption) or Ctrl-C sets; a second Ctrl-C stops at once.

    In a job of several processes a signal to one of them sets it in all, at the same step.
    """
    stop = threading.Event()
    several = jax.process_count() > 1

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # SIGTERM in a job is JAX's, which has a handler that Python does not know of.
    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    previous = {s: signal.signal(s, handle) for s in numbers}
    try:
        yield AgreedStop() if several else stop
    finally:
        if several:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def dry_run(config: TrainConfig) -> None:
    """Opens the data, draws one batch, and prints what a run would hold; trains nothing.

    Raises:
      UsageError: as `train` would.
    """
    run_files.check_writable(config.model_dir)
    partitioning = setup.partitioning_of(config)
    programs = setup.make_programs(config, partitioning, compile_train_step=False)
    data = setup.open_input(config, partitioning.input_share())
    if config.initial_checkpoint_path is not None:
        _initial_params(config.initial_checkpoint_path, programs)
        run_files.check_initial_vocabulary(config.initial_checkpoint_path, data)
    batch = next(data.train)
    table = describe(programs.abstract_state, programs.state_axes)
    tell("\n".join(table))
    tell(f"\none batch{', the rows of process 0' if jax.process_count() > 1 else ''}:")
    for name, array in batch.items():
        filled = 100 * np.count_nonzero(array) / array.size
        tell(f"  {name:24} {array.dtype} {array.shape}  {filled:5.1f}% not 0")
    total = t5.num_parameters(config.model)
    tell(f"\n{total:,} parameters; mesh {dict(partitioning.mesh.shape)}; nothing was trained")
