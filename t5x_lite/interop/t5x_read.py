"""Reads T5X checkpoints: parameters, step, and Adafactor's state."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.interop.t5x import (
    GIN_FIELDS,
    Shape,
    config_from_t5x,
    is_scanned,
    our_shapes,
    path_name,
    t5x_names,
)
from t5x_lite.interop.t5x_files import (
    CONVERTED_DTYPES,
    StoredArray,
    StoredCheckpoint,
    as_float32,
    check_dtype,
    open_checkpoint,
)
from t5x_lite.interop.t5x_gin import read_gin
from t5x_lite.interop.tensors import SavedOptimizer, Source, Tensor
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import EMBED, LAYERS, OptimizerConfig, make_optimizer

_SLOTS = ("v_row", "v_col", "v", "m")
_UNUSED = (1,)  # the shape of a slot of T5X's Adafactor that is not in use
# Where T5X's scanned layers are. Averaging over the first axis, as for v_col, moves them up.
_LAYERS_AXIS = {"v": 1, "v_row": 1, "v_col": 0}


def open_t5x(path: epath.PathLike) -> Source:
    """Describes a T5X checkpoint; legacy or Orbax, scanned or not, is seen from the files.

    Nothing but the tree, small arrays and the step is read until a `Tensor` is asked for rows.
    Rows of a stack that T5X scanned lie in many or all pieces of storage (64 MiB in the legacy
    layout, one device's share in Orbax's), and each is decoded whole: few large reads are better
    than many small ones.

    Args:
      path: `.../checkpoint_<step>`, or a directory of several, of which the newest that has its
        index is taken.

    Returns:
      The source. `optimizer` is None if Adafactor's state is not there or has no counterpart here;
      `origin["optimizer"]` says why.

    Raises:
      UsageError: not a T5X checkpoint, damaged, of another network, or of other dtypes.
    """
    checkpoint = open_checkpoint(path)
    where, arrays = checkpoint.directory, checkpoint.arrays
    params = _below("target/", arrays)
    for array in params.values():
        check_dtype(array, where)
    shapes = {name: array.shape for name, array in params.items()}
    gin_values = _gin_values(where)
    try:
        config = config_from_t5x(shapes, gin_values)
    except UsageError as e:
        raise UsageError(f"{where}: {e}") from e
    scanned = is_scanned(shapes)
    step = _step(checkpoint)
    optimizer, why_not = _optimizer(config, scanned, step, _below("state/param_states/", arrays))
    return Source(
        model=config,
        params={
            path: _tensor(
                path, shape, [params[n] for n in t5x_names(path, shape, scanned)], scanned
            )
            for path, shape in our_shapes(config).items()
        },
        step=step,
        optimizer=optimizer,
        origin={
            "format": "t5x",
            "layout": checkpoint.layout,
            "scanned": scanned,
            "path": str(where),
            "step": step,
            "dtype": ", ".join(sorted({array.dtype for array in params.values()})),
            "optimizer": why_not or "adafactor",
        },
    )


def _below(prefix: str, arrays: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _gin_values(directory: epath.Path) -> dict[str, Any]:
    """T5X's T5Config as the operative configuration beside or above the checkpoint has it."""
    for place in (directory, directory.parent):
        file = place / "config.gin"
        if not file.is_file():
            continue
        try:
            return read_gin(file.read_bytes().decode("utf-8-sig"), GIN_FIELDS)
        except UnicodeDecodeError as e:
            raise UsageError(f"{file} is no text in UTF-8: byte {e.start}") from None
        except UsageError as e:
            raise UsageError(f"{file}: {e}") from None
    return {}


def _step(checkpoint: StoredCheckpoint) -> int:
    stored = checkpoint.arrays.get("state/step")
    if stored is None:
        return 0
    value = stored.read()
    # A run with restored float32 statistics saves a float32 step.
    if value.size != 1 or not math.isfinite(value.item()) or value.item() != int(value.item()):
        raise UsageError(f"{checkpoint.directory}: state/step is {value!r}; it must be an integer")
    return int(value.item())


def _tensor(
    path: str, shape: Shape, stored: list[StoredArray], scanned: bool, layers_axis: int = 1
) -> Tensor:
    """Our tensor from T5X's arrays for it: one, or one a layer if T5X keeps layers apart."""
    if "/layers/" not in path:
        return _unstacked(stored[0], shape)
    return _stacked(stored[0], shape, layers_axis) if scanned else _layers_apart(stored, shape)


def _unstacked(stored: StoredArray, shape: Shape) -> Tensor:
    return Tensor(shape, lambda start, stop: as_float32(stored.read_finite(slice(start, stop))))


def _layers_apart(stored: list[StoredArray], shape: Shape) -> Tensor:
    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *shape[1:]), np.float32)
        for layer, array in zip(out, stored[start:stop], strict=True):
            layer[...] = array.read_finite().reshape(layer.shape)
        return out

    return Tensor(shape, read)


def _stacked(stored: StoredArray, shape: Shape, layers_axis: int) -> Tensor:
    """All layers in one array, on axis 0 or 1; it may keep apart the axes that we have as one."""
    sizes, chunk = list(stored.shape), list(stored.chunk)
    del sizes[layers_axis], chunk[layers_axis]
    # Piece by piece, so that no more than one of them is there beside the result.
    pieces = [
        [slice(i, min(i + step, size)) for i in range(0, size, step)]
        for size, step in zip(sizes, chunk, strict=True)
    ]

    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *sizes), np.float32)
        layers = slice(start, stop)
        for piece in itertools.product(*pieces):
            part = stored.read_finite(*piece[:layers_axis], layers, *piece[layers_axis:])
            out[:, *piece] = np.moveaxis(part, layers_axis, 0)
        return out.reshape(stop - start, *shape[1:])

    return Tensor(shape, read)


def _constant(value: int, dtype: type) -> Tensor:
    array: np.ndarray = np.asarray(value, dtype)
    return Tensor((), lambda start, stop: array, array.dtype)


class _OtherOptimizerError(Exception):
    """A state that our Adafactor cannot have; the message says what of it."""


def _optimizer(
    config: T5Config, scanned: bool, step: int, stored: Mapping[str, StoredArray]
) -> tuple[SavedOptimizer | None, str | None]:
    """Adafactor's state in our tree, or None and why there is none."""
    if not stored:
        return None, "the checkpoint has no state/param_states"
    optimizer = OptimizerConfig(factoring="t5x_scanned" if scanned else "both_sides")
    axes = t5.logical_axes(config)
    names = {path: t5x_names(path, shape, scanned) for path, shape in our_shapes(config).items()}

    def slot(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Tensor:
        field, parameter = path[0].name, path_name(path[1:])
        if field == "count":
            return _constant(step, np.int32)
        param_axes: Any = axes
        for key in path[1:]:
            param_axes = param_axes[key.key]
        place = _slot_in_t5x(field, our_shapes(config)[parameter], param_axes, scanned)
        arrays = [stored[f"{name}/{place}"] for name in names[parameter]]
        _check_slot(field, parameter, leaf.shape, arrays, scanned)
        if not leaf.shape:
            return _constant(0, np.float32)
        return _tensor(parameter, leaf.shape, arrays, scanned, _LAYERS_AXIS[field])

    try:
        _check_slots(stored, [name for some in names.values() for name in some])
        params = jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
        state = jax.eval_shape(make_optimizer(optimizer, axes).init, params)
        tree = jax.tree_util.tree_map_with_path(slot, state)
    except _OtherOptimizerError as e:
        return None, f"not taken over: {e}"
    return SavedOptimizer(optimizer, tree), None


def _check_slots(stored: Mapping[str, StoredArray], names: list[str]) -> None:
    """Whether it is the state of T5X's Adafactor without momentum, for these parameters."""
    expected = {f"{name}/{slot}" for name in names for slot in _SLOTS}
    for place in sorted(stored.keys() ^ expected):
        has = "has" if place in stored else "lacks"
        raise _OtherOptimizerError(f"state/param_states {has} {place}: not T5X's Adafactor")
    for place, array in stored.items():
        if place.endswith("/m") and array.shape != _UNUSED:
            raise _OtherOptimizerError(f"{place} has the shape {list(array.shape)}: momentum")
        if array.dtype not in CONVERTED_DTYPES:
            raise _OtherOptimizerError(f"{place} is {array.dtype}")


def _slot_in_t5x(field: str, shape: Shape, axes: tuple[str, ...], scanned: bool) -> str:
    """Which of T5X's slots our v_row, v_col or v of a parameter is.

    Our v_row belongs to the second last axis and v_col to the last. T5X's v_row is that of the
    shorter side, of two equal ones the first, and in scanned layers that of d_model.
    """
    if field == "v" or len(shape) < 2:
        return field
    by_name = scanned and axes[0] == LAYERS
    row_is_first = axes[-2] == EMBED if by_name else shape[-2] <= shape[-1]
    return field if row_is_first else {"v_row": "v_col", "v_col": "v_row"}[field]


def _check_slot(
    field: str, parameter: str, shape: Shape, arrays: list[StoredArray], scanned: bool
) -> None:
    """Raises _OtherOptimizerError if the arrays for one of our slots are not of its size."""
    expected = shape
    if "/layers/" in parameter and not scanned:
        expected = shape[1:]
    for array in arrays:
        fits = math.prod(array.shape) == math.prod(expected)
        if not shape:
            fits = array.shape == _UNUSED
        elif "/layers/" in parameter and scanned:
            axis = _LAYERS_AXIS[field]
            fits = fits and len(array.shape) > axis and array.shape[axis] == shape[0]
        if not fits:
            raise _OtherOptimizerError(
                f"{array.name} has the shape {list(array.shape)}: factored by another rule"
            )
