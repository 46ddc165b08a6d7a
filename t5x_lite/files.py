"""Whole-file writes that are never seen half done, and what tells that a file is as it was."""

import hashlib
import os
import uuid

from etils import epath

_READ_BYTES = 1 << 22


def is_local(path: epath.PathLike) -> bool:
    """True if `path` is on a mounted file system, where rename is atomic."""
    return "://" not in os.fspath(path)


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` to `path` so that a reader sees the old content or the new, nothing between.

    A local file is written beside its place and renamed over it. An object store has no rename,
    but a put there is atomic by itself.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)
        return
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def absolute(path: epath.PathLike) -> epath.Path:
    """The path as Orbax wants it: absolute on a local disk, as it is on an object store.

    `epath.Path.resolve` would put the working directory before "gs://".
    """
    path = epath.Path(path)
    return path.resolve() if is_local(path) else path


def sha256(path: epath.Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()  # hashlib.file_digest needs readinto, which not all of epath's have
    with path.open("rb") as f:
        while part := f.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
