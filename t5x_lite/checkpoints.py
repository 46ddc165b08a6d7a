"""Saves and restores a training run with Orbax, so that nothing damaged is ever loaded.

What is on disk:

    <directory>/<step>/
        params/  optimizer/                    Orbax checkpointables; params can be read alone
        input_position/process_<i>_of_<n>      where process i of n stood in its input
        SHA256SUMS                             a digest of every other file, and of itself
    <directory>/<step>.incomplete...           a save that was interrupted; never read
    <directory>/<step>.damaged-<k>             a damaged step set aside when it was saved again

A step exists once its directory has its plain name. On a mounted file system it is given that name
by a rename after the digests are written, so a process killed at any moment leaves either the
whole step or none. An object store has no rename: there Orbax's commit file marks the end of its
writes, SHA256SUMS is written last, and a step without it is not restored.

See integrity.py for the digests.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from t5x_lite import input_position
from t5x_lite.distributed import from_process_0
from t5x_lite.errors import Failure, UsageError, nearest
from t5x_lite.files import absolute, is_local
from t5x_lite.integrity import (
    STEP_NAME,
    delete,
    find_damage,
    is_being_deleted,
    is_committed,
    scan,
    set_aside,
    write_digests,
)

PyTree = Any

_log = logging.getLogger(__name__)


class CheckpointError(Failure):
    """A checkpoint that cannot be written, or that cannot be read because it is damaged."""


class Restored(NamedTuple):
    """What was read back.

    Attributes:
      step: the number of the step that was restored.
      state: shaped, typed and placed like the abstract tree it was asked for.
      input_state: this process's input position as it was saved; None if none was.
      skipped: one line for each newer step that was passed over: which, and why.
    """

    step: int
    state: PyTree
    input_state: bytes | None
    skipped: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, one directory per step.

    Every process of the run calls every method, in the same order. Deciding what is intact, writing
    digests and deleting is done by process 0 alone; the others are told.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep: int | None = None, keep_every: int | None = None
    ):
        """Nothing is read or written before the first call.

        Args:
          directory: where the steps are, MODEL_DIR/checkpoints of a run.
          keep: how many of the newest intact steps to keep; None keeps all.
          keep_every: steps divisible by this are kept for ever.

        Raises:
          UsageError: if `keep` or `keep_every` is less than 1.
        """
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise UsageError(f"checkpoints: {name} is {value}; allowed: None or at least 1")
        self._directory = absolute(directory)
        self._keep = keep
        self._keep_every = keep_every
        self._pinned: int | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: tuple[int, Future[None]] | None = None
        self._intact: dict[int, bool] = {}  # what process 0 has written or checked so far

    def steps(self) -> list[int]:
        """The committed steps, ascending. They have digests, which are not checked here."""
        return from_process_0(
            lambda: [s for s in scan(self._directory).steps if is_committed(self._path(s))]
        )

    def save(self, step: int, state: PyTree, input_state: bytes | None) -> None:
        """Copies the state to the host and writes it in the background.

        When this returns, the arrays of `state` may be donated. A save still running is waited for
        first. Nothing happens if the step is being saved or is there intact; if it is there
        damaged, that directory is set aside as `<step>.damaged-<k>`.

        Args:
          step: the step's number, at least 0.
          state: a NamedTuple with the fields `step`, `params` and `opt_state`, trees of global
            jax arrays or numpy arrays.
          input_state: this process's position in its input pipeline, given by all processes or by
            none.

        Raises:
          CheckpointError: if the save before this one failed, or the directory cannot be made.
        """
        if self._pending is not None and self._pending[0] == step:
            return
        self.wait()
        if from_process_0(lambda: self._is_saved(step)):
            return
        checkpointables = _checkpointables(_copy_if_on_cpu(state))
        if input_state is not None:
            checkpointables["input_position"] = _InputPosition(input_state)
        path = self._path(step)
        local = is_local(path)
        target = path.with_name(f"{step}.incomplete") if local else path
        context = ocp.Context()
        # Compression takes 8% off float32 weights, and six times as long on two cores.
        context.array.saving.use_compression = False
        # In the background a directory that cannot be made is noticed after 300 s.
        context.asynchronous.create_directories_asynchronously = False
        if not local:
            context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        try:
            with context:
                response = ocp.save_checkpointables_async(target, checkpointables, overwrite=local)
        except OSError as error:
            raise _save_failed(path, error) from error
        self._pending = (step, self._executor.submit(self._commit, response, step, target))

    def pin(self, step: int | None) -> None:
        """Keeps this step, whatever its age, until another one is pinned.

        A save that is under way may still go by the pin before: `wait` for it first.
        """
        self._pinned = step

    def wait(self) -> None:
        """Returns when everything that was saved is committed and its digests are written.

        Call it before the process ends: Python stops background work at exit.

        Raises:
          CheckpointError: if the save failed, on process 0 or here.
        """
        error = self._wait_here()

        def report() -> None:
            if error:
                raise error

        from_process_0(report)
        report()

    def close(self) -> None:
        """Waits for this process's writes and gives its thread back.

        Unlike `wait` it asks nothing of the other processes, so it is safe while an error is on
        its way out.

        Raises:
          CheckpointError: if the save failed here.
        """
        error = self._wait_here()
        self._executor.shutdown()
        if error:
            raise error

    def restore_latest(self, abstract_state: PyTree) -> Restored | None:
        """Restores the newest intact step, passing over damaged ones with one log line for each.

        Args:
          abstract_state: the state's tree with `jax.ShapeDtypeStruct` leaves that carry shardings,
            on any mesh.

        Returns:
          None if no step was ever committed.

        Raises:
          CheckpointError: if there are steps, but none is intact.
          UsageError: if the step does not fit `abstract_state`, or if it was saved by another
            number of processes and holds the positions of their streams.
        """
        self.wait()
        step, skipped = from_process_0(self._newest_intact)
        if step is None:
            return None
        return _load(self._path(step), step, abstract_state, tuple(skipped))

    def restore(self, step: int, abstract_state: PyTree) -> Restored:
        """Restores one step. See `restore_latest` for the argument.

        Raises:
          UsageError: if the step is not there or does not fit `abstract_state`.
          CheckpointError: if it is damaged.
        """
        self.wait()
        from_process_0(lambda: require_intact(self._path(step)))
        return _load(self._path(step), step, abstract_state, ())

    def _path(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def _newest_intact(self) -> tuple[int | None, list[str]]:
        step, skipped = _newest_intact(self._directory)
        self._intact = {} if step is None else {step: True}
        return step, skipped

    def _wait_here(self) -> CheckpointError | None:
        if self._pending is None:
            return None
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is None:
            return None
        failure = _save_failed(self._path(step), error)
        failure.__cause__ = error
        return failure

    def _is_saved(self, step: int) -> bool:
        """True if the step is there intact; whatever else has its name is set aside."""
        path = self._path(step)
        if not path.exists():
            return False
        if self._is_intact(step):
            return True
        aside = set_aside(path)
        _log.warning("checkpoint %s is damaged: set aside as %s", path, aside.name)
        self._intact.pop(step, None)
        return False

    def _is_intact(self, step: int) -> bool:
        if step not in self._intact:
            self._intact[step] = find_damage(self._path(step)) is None
        return self._intact[step]

    def _commit(self, response: Any, step: int, target: epath.Path) -> None:
        """Runs in the background. Orbax's result means that all processes have written."""
        response.result()
        if jax.process_index() != 0:
            return
        write_digests(target)
        if target != self._path(step):
            os.rename(target, self._path(step))
        self._intact[step] = True
        if self._keep is not None:
            self._delete_old(self._keep, step)

    def _delete_old(self, keep: int, saved: int) -> None:
        """Deletes intact steps that are not among the newest `keep`, nor multiples, nor pinned.

        Steps left by earlier processes are checked before they count or go, once per process.
        Damaged ones do neither.
        """
        num_newest, stays = 0, (saved, self._pinned)
        for step in reversed(scan(self._directory).steps):
            path = self._path(step)
            try:
                if is_being_deleted(path):
                    delete(path)
                elif num_newest < keep:
                    num_newest += self._is_intact(step)
                elif step in stays or (self._keep_every and step % self._keep_every == 0):
                    continue
                elif self._is_intact(step):
                    delete(path)
            except OSError as error:  # no reason to stop a run
                _log.warning("cannot delete checkpoint %s: %s", path, _one_line(error))


def restore_params(path: epath.PathLike, abstract_params: PyTree) -> Restored:
    """Restores the parameters alone, on every process.

    Only the files they are read from are checked, so a step whose optimizer was taken away can
    still be used.

    Args:
      path: a step's directory, or a MODEL_DIR or its checkpoints directory, of which the newest
        step with intact parameters is taken.
      abstract_params: nested dict with `jax.ShapeDtypeStruct` leaves that carry shardings. Another
        dtype than the saved one casts.

    Returns:
      The parameters as `state`; `input_state` is None.

    Raises:
      UsageError: if there is no checkpoint, or its parameters differ in names or shapes.
      CheckpointError: if the step is damaged, or all are.
    """
    path = absolute(path)
    skipped: list[str] = []
    if STEP_NAME.fullmatch(path.name) and not (path / "checkpoints").exists():
        from_process_0(lambda: require_intact(path, "params/"))
        step, step_dir = int(path.name.partition(".")[0]), path
    else:
        directory = path / "checkpoints" if (path / "checkpoints").exists() else path
        step, skipped = from_process_0(lambda: _newest_intact(directory, "params/"))
        if step is None:
            raise UsageError(f"no checkpoint under {directory}")
        step_dir = directory / str(step)
    _check_fits(step_dir, {"params": abstract_params}, casts=True)
    restored = ocp.load_checkpointables(step_dir, {"params": abstract_params})
    return Restored(step, restored["params"], None, tuple(skipped))


def _checkpointables(state: PyTree) -> dict[str, PyTree]:
    return {
        "params": state.params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }


def _load(step_dir: epath.Path, step: int, abstract: PyTree, skipped: tuple[str, ...]) -> Restored:
    """Reads a step whose digests were checked."""
    if not (step_dir / "optimizer").exists():
        raise UsageError(
            f"checkpoint {step_dir} has no optimizer to go on with: give it as "
            "INITIAL_CHECKPOINT_PATH to a run with a MODEL_DIR of its own"
        )
    input_state = _read_input_position(step_dir)
    wanted = _checkpointables(abstract)
    _check_fits(step_dir, wanted, casts=False)
    found = ocp.load_checkpointables(step_dir, wanted)
    state = abstract._replace(params=found["params"], **found["optimizer"])
    return Restored(step, state, input_state, skipped)


def _copy_if_on_cpu(state: PyTree) -> PyTree:
    """On CPU Orbax reads the arrays in place, and a step they are donated to would wait for it."""
    if jax.default_backend() != "cpu":
        return state
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, state)


class _InputPosition:
    """Opaque bytes, one file per process, written by Orbax together with the rest of a step."""

    def __init__(self, data: bytes):
        self._data = data

    @staticmethod
    def file_name() -> str:
        return f"process_{jax.process_index()}_of_{jax.process_count()}"

    async def save(self, directory: Any) -> Awaitable[None]:
        async def write() -> None:
            path = await directory.await_creation()
            await asyncio.to_thread((path / self.file_name()).write_bytes, self._data)

        return write()

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        raise NotImplementedError  # Orbax asks that it exists; the file is read without Orbax


def _read_input_position(step_dir: epath.Path) -> bytes | None:
    directory = step_dir / "input_position"
    if not directory.exists():
        return None
    path = directory / _InputPosition.file_name()
    if path.exists():
        return path.read_bytes()
    other = next(directory.iterdir())
    position = other.read_bytes()
    if not input_position.fits_any_processes(position):
        raise UsageError(
            f"{step_dir} holds the input positions of {other.name.rpartition('_')[2]} processes, "
            f"which {jax.process_count()} cannot take over: start as many processes as saved it; a "
            "run on a cache (CACHE_DIR) goes on with any number"
        )
    return position


def _check_fits(step_dir: epath.Path, wanted: dict[str, PyTree], *, casts: bool) -> None:
    """Raises UsageError unless names and shapes, and dtypes if nothing casts, are those saved."""
    differences = []
    for part, tree in wanted.items():
        expected = _named_arrays(tree)
        found = _named_arrays(ocp.metadata(step_dir, part).metadata)
        for name, array in expected.items():
            if getattr(array, "sharding", None) is None:
                raise ValueError(f"{part} {name!r} is to be restored, but has no sharding")
            if name not in found:
                only = set(found) - set(expected)
                hint = f" ({nearest(name, only)})" if only else ""
                differences.append(f"{part} {name!r} is not in the checkpoint{hint}")
            elif found[name].shape != array.shape:
                differences.append(
                    f"{part} {name!r} has shape {found[name].shape}, expected {array.shape}"
                )
            elif not casts and found[name].dtype != array.dtype:
                differences.append(
                    f"{part} {name!r} is {found[name].dtype}, expected {array.dtype}"
                )
        differences += [
            f"{part} {name!r} is in the checkpoint only" for name in found if name not in expected
        ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UsageError(
            f"checkpoint {step_dir} does not fit the model: {'; '.join(differences[:3])}{more}"
        )


def _named_arrays(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _newest_intact(directory: epath.Path, part: str = "") -> tuple[int | None, list[str]]:
    """The newest step whose files have their digests, and a line for each newer one.

    Raises:
      CheckpointError: if there are steps, but none is intact.
    """
    found = scan(directory)
    damaged: list[tuple[int, str]] = []
    newest = None
    for step in reversed(found.steps):
        problem = find_damage(directory / str(step), part)
        if problem is None:
            newest = step
            break
        damaged.append((step, f"step {step}: {problem}"))
    if newest is None and damaged:
        raise CheckpointError(
            f"no checkpoint under {directory} is intact; move them away to start anew: "
            + "; ".join(line for _, line in damaged)
        )
    interrupted = [
        (step, f"step {step}: its save was interrupted ({name})")
        for step, name in found.interrupted
        if newest is None or step > newest
    ]
    skipped = [line for _, line in sorted(damaged + interrupted, reverse=True)]
    for line in skipped:
        _log.warning("checkpoint skipped under %s: %s", directory, line)
    return newest, skipped


def require_intact(step_dir: epath.Path, part: str = "") -> None:
    """Raises UsageError if the step is not there, CheckpointError if it, or `part`, is damaged."""
    if not step_dir.is_dir():
        steps = ", ".join(map(str, scan(step_dir.parent).steps)) or "none"
        raise UsageError(f"no checkpoint {step_dir}; steps that are there: {steps}")
    problem = find_damage(step_dir, part)
    if problem is not None:
        raise CheckpointError(f"checkpoint {step_dir} is damaged: {problem}")


def _save_failed(path: epath.Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"saving checkpoint {path} failed: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
