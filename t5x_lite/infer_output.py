"""What `infer` writes: a JSONL file that an interrupted command goes on with.

Beside OUTPUT lies OUTPUT.state.json, which says what command it is the output of. A local file is
appended to, a window of lines at a time. An object store cannot append: there every part of the
output is an object OUTPUT.parts/<number of its first line>, and they are joined at the end.
"""

import fcntl
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

from etils import epath

from t5x_lite import files
from t5x_lite.errors import Failure, UsageError

# An object store is written this often at most; a kill loses what came after.
_SECONDS_BETWEEN_PARTS = 30.0


class Kept(NamedTuple):
    """What an earlier start has left: whole lines from the first on.

    Attributes:
      num_lines: how many.
      num_truncated: how many of them say "truncated".
    """

    num_lines: int
    num_truncated: int


class Output(Protocol):
    """Lines in order. One process writes."""

    def keep(self, total: int, window: int) -> Kept:
        """Opens the output; of an unfinished one whole windows stay, the rest is cut off."""

    def append(self, lines: Sequence[bytes]) -> None:
        """Adds the lines of a window, each with its end."""

    def finish(self) -> None:
        """Makes the output complete under its name."""

    def close(self) -> None:
        """Gives up what is open, finished or not."""


def make_output(path: epath.PathLike) -> Output:
    """The way to write to this path. Nothing is touched yet."""
    return _LocalOutput(os.fspath(path)) if files.is_local(path) else _ObjectOutput(path)


# ---- whose output it is --------------------------------------------------------------------------


def state_path(path: epath.PathLike) -> epath.Path:
    """Where it stands what `path` is the output of."""
    return epath.Path(f"{os.fspath(path)}.state.json")


def read_settings(path: epath.PathLike) -> dict[str, Any] | None:
    """The settings that the output at `path` was begun with; None if there is no output.

    Raises:
      UsageError: there is an output, but it is not told of which command.
    """
    state = state_path(path)
    if state.exists():
        try:
            return dict(json.loads(state.read_bytes()))
        except ValueError as e:
            raise UsageError(f"{state} is not what infer has written: {e}") from e
    if epath.Path(path).exists():
        raise UsageError(
            f"--output={path}: it exists, and no {state.name} says that this command wrote it; "
            "remove it or give another file"
        )
    return None


def check_settings(
    path: epath.PathLike, old: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raises UsageError, naming what differs, if an output was begun with other settings."""
    names = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{n} {old.get(n)!r} -> {settings.get(n)!r}" for n in names[:3])
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(
            f"--output={os.fspath(path)} was begun with other settings: {changes}{more}; give "
            f"another file, or remove it and {state_path(path).name}"
        )


def claim(path: epath.PathLike, settings: Mapping[str, Any]) -> None:
    """Notes the settings beside an output that is to be begun; UsageError if that cannot be.

    On a local disk the first of two processes that begin together gets it.
    """
    state, text = state_path(path), json.dumps(settings, indent=2) + "\n"
    if not files.is_local(state):
        files.write_atomically(state, text.encode())
        return
    own = f"{os.fspath(state)}.{uuid.uuid4().hex}.tmp"
    try:
        files.write_atomically(own, text.encode())
        try:
            os.link(own, state)
        except FileExistsError as e:
            raise UsageError(f"--output={os.fspath(path)}: another process is writing it") from e
        finally:
            os.unlink(own)
    except OSError as e:
        raise _not_writable(path, e) from e


def _not_writable(path: epath.PathLike, error: OSError) -> UsageError:
    return UsageError(f"--output={os.fspath(path)} cannot be written: {error.strerror or error}")


def _is_truncated(line: bytes) -> bool | None:
    """Whether a line says so; None if it is no whole line."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record.get("truncated", False) is True if isinstance(record, dict) else None


# ---- a file system -------------------------------------------------------------------------------


class _LocalOutput:
    def __init__(self, path: str):
        self._path = path
        self._file: BinaryIO | None = None

    def keep(self, total: int, window: int) -> Kept:
        try:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - until `close`
        except OSError as e:
            raise _not_writable(self._path, e) from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UsageError(f"--output={self._path}: another process is writing it") from e
        except OSError:
            pass  # a file system without locks
        whole, end = Kept(0, 0), 0
        num_truncated = num_bytes = 0
        with open(self._path, "rb") as f:
            for num_lines, line in enumerate(f, 1):
                truncated = _is_truncated(line)
                if truncated is None:
                    break
                num_truncated += truncated
                num_bytes += len(line)
                if num_lines % window == 0 or num_lines == total:
                    whole, end = Kept(num_lines, num_truncated), num_bytes
        if end < os.path.getsize(self._path):
            self._file.truncate(end)
        return whole

    def append(self, lines: Sequence[bytes]) -> None:
        assert self._file is not None
        left = memoryview(b"".join(lines))
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as e:
            raise Failure(
                f"{self._path}: {e.strerror}; what is written stays, the same command goes on"
            ) from e

    def finish(self) -> None:
        """It is complete already."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# ---- an object store -----------------------------------------------------------------------------


class _ObjectOutput:
    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._parts = epath.Path(f"{os.fspath(path)}.parts")
        self._is_complete = False
        self._num_lines = 0
        self._pending: list[bytes] = []
        self._written_at = time.monotonic()

    def keep(self, total: int, window: int) -> Kept:
        del window  # a part ends where a window does
        if self._path.exists():
            kept = _count(self._path)
            self._is_complete = kept.num_lines == total
            if self._is_complete:
                return kept
        num_truncated = 0
        for part in self._sorted_parts():
            kept = _count(part)
            self._num_lines += kept.num_lines
            num_truncated += kept.num_truncated
        return Kept(self._num_lines, num_truncated)

    def append(self, lines: Sequence[bytes]) -> None:
        self._pending += lines
        if time.monotonic() - self._written_at > _SECONDS_BETWEEN_PARTS:
            self._put()

    def _put(self) -> None:
        if self._pending:
            files.write_atomically(self._parts / f"{self._num_lines:012d}", b"".join(self._pending))
            self._num_lines += len(self._pending)
            self._pending = []
        self._written_at = time.monotonic()

    def finish(self) -> None:
        if not self._is_complete:
            self._put()
            with self._path.open("wb") as f:  # an object is there when it is closed
                for part in self._sorted_parts():
                    f.write(part.read_bytes())
            self._is_complete = True
        for part in self._sorted_parts():
            part.unlink()

    def close(self) -> None:
        """Nothing is open; what is pending is lost, as in a kill."""

    def _sorted_parts(self) -> list[epath.Path]:
        return sorted(self._parts.glob("*"), key=lambda part: part.name)


def _count(path: epath.Path) -> Kept:
    num_lines = num_truncated = 0
    with path.open("rb") as f:
        for line in f:
            num_lines += 1
            num_truncated += bool(_is_truncated(line))
    return Kept(num_lines, num_truncated)
