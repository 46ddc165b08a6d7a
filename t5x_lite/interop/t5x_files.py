"""The arrays that a T5X checkpoint holds, by T5X's own names, read a slice at a time.

T5X has written two layouts. Legacy: a msgpack file `checkpoint` with the tree, in which small
arrays are whole and large ones point to zarr directories beside it. Orbax: a directory `state`
with `_METADATA` (the tree) and the arrays in an OCDBT database or in zarr directories.
"""

import ast
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.serialization
import numpy as np
import tensorstore as ts
from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.files import absolute, is_local
from t5x_lite.interop import recognise
from t5x_lite.interop.stored import check_finite

# Those that T5X trains in; float32 holds every value of both.
CONVERTED_DTYPES = ("float32", "bfloat16")

_INDEX = "checkpoint"
_METADATA = "_METADATA"
# What Orbax calls a place in the tree that holds no array, as those of a stateless optimizer.
_EMPTY_NODES = ("None", "Dict", "List", "Tuple", "NamedTuple")
_STEP_DIR = re.compile(r"checkpoint_(\d+)")
_LOOKED_FOR = (
    "a file 'checkpoint' (legacy), a directory 'state' with '_METADATA' (Orbax), or directories "
    "checkpoint_<step> that hold one of them"
)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint, not yet read.

    Attributes:
      name: T5X's, "target/encoder/layers_0/mlp/wo/kernel".
      shape: as it is stored.
      dtype: "float32", "bfloat16", ...
      chunk: shape of the pieces in which it is stored.
      read: slices, one for each axis, -> that part, in the stored dtype.
      where: the checkpoint's directory, for messages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    read: Callable[..., np.ndarray]
    where: epath.Path

    def read_finite(self, *part: slice) -> np.ndarray:
        """As `read`; raises UsageError if a value is NaN or infinite."""
        values = self.read(*part)
        check_finite(self.where, self.name, values)
        return values


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """A T5X checkpoint on disk.

    Attributes:
      directory: of the step, also if a directory of several was given.
      layout: "legacy" or "orbax".
      arrays: by name: "target/..." are parameters, "state/..." the step and the optimizer.
    """

    directory: epath.Path
    layout: str
    arrays: Mapping[str, StoredArray]


def open_checkpoint(path: epath.PathLike) -> StoredCheckpoint:
    """Finds the checkpoint at `path` and lists its arrays; no array is read.

    Args:
      path: a checkpoint's directory, or one of several `checkpoint_<step>`, of which the newest
        that has its index is taken.

    Raises:
      UsageError: there is no T5X checkpoint, or it is damaged.
    """
    given = absolute(path)
    directory = _newest_step(given)
    if (directory / _INDEX).is_file():
        return StoredCheckpoint(directory, "legacy", _open_legacy(directory))
    if state_dir := _state_dir(directory):
        return StoredCheckpoint(directory, "orbax", _open_orbax(state_dir))
    if directory != given:
        raise UsageError(f"{directory} is incomplete, and so is any other checkpoint in {given}")
    raise UsageError(
        f"{given}: no T5X checkpoint here; looked for {_LOOKED_FOR}{recognise.hint(str(given))}"
    )


def _newest_step(directory: epath.Path) -> epath.Path:
    if not directory.is_dir():
        raise UsageError(
            f"{directory}: no such directory; give that of a T5X checkpoint"
            f"{recognise.hint(str(directory))}"
        )
    if (directory / _INDEX).exists() or (directory / _METADATA).exists():
        return directory
    steps = {
        int(match[1]): child
        for child in directory.iterdir()
        if (match := _STEP_DIR.fullmatch(child.name))
    }
    newest_first = [steps[step] for step in sorted(steps, reverse=True)]
    # A run that was killed, or a copy that was, leaves directories without an index.
    complete = (step for step in newest_first if (step / _INDEX).is_file() or _state_dir(step))
    return next(complete, newest_first[0] if steps else directory)


def _state_dir(directory: epath.Path) -> epath.Path | None:
    """Where Orbax's layout has its `_METADATA`; None if this is not its layout."""
    places = (directory / "state", directory)
    return next((place for place in places if (place / _METADATA).exists()), None)


def _open_legacy(directory: epath.Path) -> dict[str, StoredArray]:
    path = directory / _INDEX
    try:
        index = flax.serialization.msgpack_restore(path.read_bytes())
    except ValueError as e:
        raise UsageError(
            f"{path}: truncated or not the msgpack index of a T5X checkpoint ({_first_line(e)})"
        ) from e
    tree = index.get("optimizer") if isinstance(index, dict) else None
    if not isinstance(tree, dict) or not isinstance(tree.get("target"), dict):
        raise UsageError(
            f"{path}: not the index of a T5X checkpoint: it has no 'optimizer' with a 'target'"
        )
    arrays, elsewhere = {}, {}
    for names, leaf in _leaves(tree):
        name = "/".join(names)
        if isinstance(leaf, dict):  # a TensorStore spec; where the directory was then is no matter
            place = directory / ".".join(names)
            if not (place / ".zarray").exists():
                raise UsageError(f"{path} names {place.name}, but {place} is not a zarr directory")
            # T5X leaves out pieces that are zero throughout; no parameter's is.
            is_whole = names[0] == "target"
            elsewhere[name] = _spec("zarr", _kvstore(place), is_whole)
        elif leaf is not None:
            arrays[name] = _in_memory(name, np.asarray(leaf), directory)
    return arrays | _open_all(elsewhere, directory)


def _open_orbax(state_dir: epath.Path) -> dict[str, StoredArray]:
    path = state_dir / _METADATA
    try:
        metadata = json.loads(path.read_text())
        entries = {
            tuple(map(str, ast.literal_eval(key))): entry["value_metadata"]["value_type"]
            for key, entry in metadata["tree_metadata"].items()
        }
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        is_whole = bool(metadata.get("store_array_data_equal_to_fill_value"))
    except (ValueError, SyntaxError, KeyError, AttributeError, TypeError) as e:
        raise UsageError(f"{path}: truncated or not Orbax's metadata ({_first_line(e)})") from e
    if not any(key[0] == "target" for key in entries):
        raise UsageError(f"{path}: not the state of a T5X checkpoint: it has no 'target'")
    is_database = (state_dir / "manifest.ocdbt").exists()
    specs = {}
    for key, value_type in entries.items():
        if value_type in _EMPTY_NODES:
            continue
        place = ".".join(key)
        kvstore = _kvstore(state_dir / place)
        if is_database:
            kvstore = {"driver": "ocdbt", "base": _kvstore(state_dir), "path": f"{place}/"}
        specs["/".join(key)] = _spec(driver, kvstore, is_whole)
    return _open_all(specs, state_dir)


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Arrays and TensorStore specs of a msgpack tree."""
    if not isinstance(tree, dict) or "driver" in tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*path, key))


def _in_memory(name: str, array: np.ndarray, where: epath.Path) -> StoredArray:
    shape = array.shape
    return StoredArray(name, shape, str(array.dtype), shape, lambda *part: array[part], where)


def _kvstore(directory: epath.Path) -> Any:
    if is_local(directory):
        return {"driver": "file", "path": f"{os.fspath(directory)}/"}
    return f"{os.fspath(directory)}/"  # "gs://bucket/path/": TensorStore knows these itself


def _spec(driver: str, kvstore: Any, is_whole: bool) -> dict[str, Any]:
    """`is_whole`: what is missing is an error, where it would count as zeros otherwise."""
    return {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": not is_whole}


def _open_all(specs: Mapping[str, Any], where: epath.Path) -> dict[str, StoredArray]:
    context = ts.Context()  # one for all: the index of a database is read once
    opening = {name: ts.open(spec, open=True, context=context) for name, spec in specs.items()}
    arrays = {}
    for name, future in opening.items():
        with _readable(name, where):
            store = future.result()
        arrays[name] = _on_disk(name, store, where)
    return arrays


def _on_disk(name: str, store: ts.TensorStore, where: epath.Path) -> StoredArray:
    def read(*part: slice) -> np.ndarray:
        with _readable(name, where):
            return store[part].read().result()

    shape = tuple(store.shape)
    pieces = store.chunk_layout.read_chunk.shape or shape
    chunk = tuple(size or n for size, n in zip(pieces, shape, strict=True))
    return StoredArray(name, shape, store.dtype.name, chunk, read, where)


@contextlib.contextmanager
def _readable(name: str, where: epath.Path) -> Iterator[None]:
    try:
        yield
    except ValueError as e:  # TensorStore raises it for whatever is wrong with a file
        array = name.replace("/", ".")
        raise UsageError(f"{where}: {array} is missing or damaged ({_first_line(e)})") from e


def as_float32(part: np.ndarray) -> np.ndarray:
    """The same values in float32; bfloat16 has a subset of them."""
    return np.ascontiguousarray(part, np.float32)


def check_dtype(array: StoredArray, where: epath.Path) -> None:
    """Raises UsageError if the array's dtype is not one that is converted."""
    if array.dtype not in CONVERTED_DTYPES:
        raise UsageError(
            f"{where}: {array.name} is {array.dtype}; only float32 and bfloat16 are converted"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
