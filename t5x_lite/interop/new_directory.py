"""Directories that are there whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from t5x_lite.errors import Failure, UsageError
from t5x_lite.files import is_local
from t5x_lite.integrity import list_files


def check(given: str) -> None:
    """Raises UsageError if a directory cannot be made there, for what can be known at once."""
    if not is_local(given):
        with _failing(given):
            if next(iter(epath.Path(given).glob("*")), None) is not None:
                raise UsageError(f"{given!r} is there already; give a directory that is not")
        return
    directory = _resolve(given)
    if directory.is_symlink():
        raise UsageError(f"{given!r} is a symbolic link that leads back to itself")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{given!r} is there already; give a directory that is not, or is empty")
    if os.path.ismount(directory):  # nothing can be renamed to it
        raise UsageError(f"{given!r} is where a disk is mounted: give a directory below it")
    ancestor = _ancestor(directory)
    if not ancestor.is_dir():
        raise UsageError(f"{given!r} cannot be made: {ancestor} is not a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise UsageError(f"{given!r} cannot be made: no permission to write in {ancestor}")


@contextlib.contextmanager
def appearing(given: str, num_bytes: int, last: str) -> Iterator[epath.Path]:
    """A directory to fill, which has the name `given` when all is done; gone if anything fails.

    It is beside its place, or in the temporary directory (TMPDIR) if that is an object store, to
    which it is then copied.

    Args:
      given: the place; see `check`.
      num_bytes: of what will be written; refused at once if there is no room.
      last: a file in it, without which nobody takes it for whole: copied after the others.

    Raises:
      UsageError: as `check`, or there is no room.
      Failure: it cannot be written.
    """
    check(given)
    local = is_local(given)
    where = _ancestor(_resolve(given)) if local else pathlib.Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(where).free) < num_bytes:
        raise UsageError(
            f"{given!r} needs {num_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free in "
            f"{where}"
        )
    scratch = where / f".{pathlib.PurePath(given).name}.incomplete-{uuid.uuid4().hex[:8]}"
    try:
        with _failing(given):
            scratch.mkdir()
            yield epath.Path(scratch)
            if local:
                _resolve(given).parent.mkdir(parents=True, exist_ok=True)
                _rename(scratch, given)
            else:
                _upload(epath.Path(scratch), given, last)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rename(scratch: pathlib.Path, given: str) -> None:
    try:
        os.rename(scratch, _resolve(given))
    except OSError as e:
        if _resolve(given).is_dir() and any(_resolve(given).iterdir()):
            raise UsageError(f"{given!r} has been made by another process meanwhile") from e
        raise


def _upload(scratch: epath.Path, given: str, last: str) -> None:
    check(given)  # another process may have been faster
    target, copied = epath.Path(given), []
    try:
        for name in sorted(list_files(scratch), key=last.__eq__):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copied.append(target / name)
            (scratch / name).copy(target / name)
    except BaseException:
        for path in copied:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _failing(given: str) -> Iterator[None]:
    """What a disk and TensorStore raise as a Failure of one line; all that an object store does."""
    kinds = (OSError, ValueError, RuntimeError) if is_local(given) else (Exception,)
    try:
        yield
    except (UsageError, Failure):
        raise
    except kinds as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        line = " ".join((reason.splitlines() or [type(e).__name__])[0].split())
        raise Failure(f"{given!r} was not written: {line}") from e


def _resolve(given: str) -> pathlib.Path:
    return pathlib.Path(os.path.realpath(given))


def _ancestor(directory: pathlib.Path) -> pathlib.Path:
    return next(path for path in directory.parents if path.exists())
