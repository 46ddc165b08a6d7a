"""Where things that are made once and read again are kept."""

import os
import pathlib

from t5x_lite import files
from t5x_lite.errors import UsageError


def cache_dir() -> pathlib.Path:
    """`$T5X_LITE_CACHE`, else `~/.cache/t5x_lite`; it need not exist yet."""
    configured = os.environ.get("T5X_LITE_CACHE")
    if configured:
        return pathlib.Path(configured).absolute()
    return pathlib.Path.home() / ".cache" / "t5x_lite"


def write(path: pathlib.Path, data: bytes) -> None:
    """Writes a file of the cache; of two processes that write it at once, either may win.

    Raises:
      UsageError: the cache directory cannot be written.
    """
    try:
        files.write_atomically(path, data)
    except OSError as e:
        raise not_writable(e) from e


def not_writable(e: OSError) -> UsageError:
    """The error for a cache that cannot be written."""
    return UsageError(
        f"the cache directory {cache_dir()} cannot be written ({e.strerror}); set T5X_LITE_CACHE "
        "to one that can"
    )
