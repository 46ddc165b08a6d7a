"""Which steps a run has on disk, and whether every byte of one is as it was written.

`sha256sum -c SHA256SUMS` in a step's directory checks it without this program. The last line, a
comment for that tool, holds the digest of the file itself. Files that SHA256SUMS does not list are
ignored.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from etils import epath

from t5x_lite.files import is_local, sha256, write_atomically

STEP_NAME = re.compile(r"(0|[1-9][0-9]*)(\..+)?")  # the step, and a suffix if it is not one to read

_DIGESTS = "SHA256SUMS"
_LAST_LINE = b"# sha256 of everything before this digest: "
_DELETING = "DELETING"
_ORBAX_COMMIT = "commit_success.txt"

_T = TypeVar("_T")


class Found(NamedTuple):
    """What `scan` saw."""

    steps: list[int]  # ascending, damaged ones included
    interrupted: list[tuple[int, str]]  # step and directory name of saves that did not finish


def scan(directory: epath.Path) -> Found:
    """Lists the steps of a run, an empty list each if `directory` is not there."""
    found = Found([], [])
    for path in directory.iterdir() if directory.exists() else ():
        match = STEP_NAME.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        step, suffix = int(match[1]), match[2] or ""
        if suffix.startswith(".damaged-"):
            continue
        finished = is_local(path) or any(
            (path / name).exists() for name in (_ORBAX_COMMIT, _DIGESTS)
        )
        if suffix or not finished:
            found.interrupted.append((step, path.name))
        else:
            found.steps.append(step)
    found.steps.sort()
    found.interrupted.sort()
    return found


def set_aside(path: epath.Path) -> epath.Path:
    """Gives a step's directory the first free name `<step>.damaged-<k>`."""
    k = 1
    while (aside := path.with_name(f"{path.name}.damaged-{k}")).exists():
        k += 1
    if is_local(path):
        os.rename(path, aside)
        return aside
    for name in list_files(path):
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).copy(aside / name)
    path.rmtree()
    return aside


def is_being_deleted(step_dir: epath.Path) -> bool:
    """True if `delete` began on the step and did not end."""
    return (step_dir / _DELETING).exists()


def delete(step_dir: epath.Path) -> None:
    """Deletes a step so that one whose deletion was interrupted is known as such."""
    (step_dir / _DELETING).write_bytes(b"")
    for path in step_dir.iterdir():
        if path.is_dir():
            path.rmtree()
        elif path.name != _DELETING:
            path.unlink()
    step_dir.rmtree()


def is_committed(step_dir: epath.Path) -> bool:
    """True if the step has digests, which are not checked here, and is not being deleted."""
    return (step_dir / _DIGESTS).exists() and not is_being_deleted(step_dir)


def write_digests(directory: epath.Path) -> None:
    """Writes SHA256SUMS for every file under `directory`, in one atomic step."""
    names = sorted(list_files(directory))
    digests = _in_parallel(lambda name: sha256(directory / name), names)
    lines = "".join(f"{digest}  {name}\n" for name, digest in zip(names, digests, strict=True))
    body = lines.encode() + _LAST_LINE
    write_atomically(directory / _DIGESTS, body + _hex_line(body))


def find_damage(directory: epath.Path, part: str = "") -> str | None:
    """Says what is wrong with a directory that `write_digests` was called on.

    Args:
      directory: must exist.
      part: "params/" checks the files of that subdirectory and those beside it only.

    Returns:
      The first damaged file and what happened to it; None if every file is as it was.
    """
    if not any(directory.iterdir()):
        return "the directory is empty"
    if is_being_deleted(directory):
        return "its deletion was interrupted"
    try:
        digests = _read_digests(directory)
    except FileNotFoundError:
        return f"{_DIGESTS} is missing"
    except (OSError, ValueError) as error:
        return f"{_DIGESTS} {error}"
    names = [name for name in digests if name.startswith(part) or "/" not in name]
    if not any(name.startswith(part) for name in names):
        return f"{part} is missing"

    def check(name: str) -> str | None:
        try:
            same = sha256(directory / name) == digests[name]
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return None if same else f"{name} has changed since it was written"

    problems = [problem for problem in _in_parallel(check, names) if problem]
    more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def list_files(directory: epath.Path, prefix: str = "") -> list[str]:
    """The paths of all files under `directory`, relative to it, in no particular order."""
    names: list[str] = []
    for path in directory.iterdir():
        name = prefix + path.name
        names += list_files(path, name + "/") if path.is_dir() else [name]
    return names


def _read_digests(directory: epath.Path) -> dict[str, str]:
    """Digests by file name. Raises ValueError if SHA256SUMS was altered or cut."""
    data = (directory / _DIGESTS).read_bytes()
    body, own = data[:-65], data[-65:]
    if own != _hex_line(body) or not body.endswith(_LAST_LINE):
        raise ValueError("has changed since it was written")
    lines = body.decode().splitlines()[:-1]
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def _hex_line(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode() + b"\n"


def _in_parallel(function: Callable[[str], _T], names: Iterable[str]) -> list[_T]:
    # Hashing and reading release the interpreter's lock.
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, names))
