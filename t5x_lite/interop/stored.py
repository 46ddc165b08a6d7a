"""Tensors inside a file, read a block at a time with plain reads; the safetensors format.

A mapping of the file would count as resident memory for as long as it lives, hence none.
The format: https://huggingface.co/docs/safetensors, "Format".
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from t5x_lite.errors import UsageError

# Large enough for a disk's full speed, small enough that a transposition stays in the cache.
_BLOCK_BYTES = 4 * 2**20
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LFS_POINTER = b"version https://git-lfs"


def _bfloat16_to_float32(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _to_float32(raw: np.ndarray) -> np.ndarray:
    return raw.astype(np.float32, copy=False)


# The dtypes that float32 holds exactly: how they lie in a file, and the way to float32.
_READERS: dict[str, tuple[np.dtype, Callable[[np.ndarray], np.ndarray]]] = {
    "float32": (np.dtype("<f4"), _to_float32),
    "float16": (np.dtype("<f2"), _to_float32),
    "bfloat16": (np.dtype("<u2"), _bfloat16_to_float32),
}
READABLE_DTYPES = tuple(_READERS)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
      path: the file.
      offset: byte of the first element.
      dtype: "float32", "float16" or "bfloat16"; another name is that of a dtype we do not read.
      shape: of the tensor.
      strides: in elements; None for contiguous rows.
    """

    path: epath.Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The rows [start, stop) in order: (number of the first row, rows as float32).

        A few MiB at a time; a tensor that is not contiguous comes in one block.
        """
        raw_dtype, convert = _READERS[self.dtype]
        row = self.shape[1:]
        with self.path.open("rb") as file:
            if self.strides is not None:
                yield start, convert(self._strided_rows(file, raw_dtype, start, stop))
                return
            row_size = math.prod(row)
            rows_per_block = max(1, _BLOCK_BYTES // (row_size * raw_dtype.itemsize))
            for first in range(start, stop, rows_per_block):
                count = min(rows_per_block, stop - first)
                raw = self._elements(file, raw_dtype, first * row_size, count * row_size)
                yield first, convert(raw.reshape(count, *row))

    def _strided_rows(
        self, file: BinaryIO, raw_dtype: np.dtype, start: int, stop: int
    ) -> np.ndarray:
        assert self.strides is not None
        shape = (stop - start, *self.shape[1:])
        last = sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        raw = self._elements(file, raw_dtype, start * self.strides[0], last + 1)
        strides = [stride * raw_dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(raw, shape, strides, writeable=False)

    def _elements(self, file: BinaryIO, raw_dtype: np.dtype, start: int, count: int) -> np.ndarray:
        num_bytes = count * raw_dtype.itemsize
        file.seek(self.offset + start * raw_dtype.itemsize)
        data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise UsageError(f"{self.path} has become shorter while it was read")
        return np.frombuffer(data, raw_dtype)

    def is_equal(self, other: "StoredTensor") -> bool:
        """True if both have the same values (and have any); stops at the first difference."""
        if self == other:
            return True
        if self.shape != other.shape or not self.shape or 0 in self.shape:
            return False
        rows = self.shape[0]
        for first, block in self.blocks(0, rows):
            for offset, there in other.blocks(first, first + len(block)):
                here = block[offset - first : offset - first + len(there)]
                if not np.array_equal(here.view(np.uint32), there.view(np.uint32)):
                    return False
        return True


def read_rows(name: str, tensor: StoredTensor, start: int, stop: int, out: np.ndarray) -> None:
    """Fills `out` [stop - start, ...] float32 with the rows [start, stop).

    Raises:
      UsageError: a value is not finite; names the tensor.
    """
    for first, block in tensor.blocks(start, stop):
        check_finite(tensor.path, name, block)
        out[first - start : first - start + len(block)] = block


def read_columns(name: str, tensor: StoredTensor, start: int, stop: int, out: np.ndarray) -> None:
    """Fills `out` [stop - start, rows] float32 with the columns [start, stop), transposed.

    Passes over the whole tensor, whatever the columns.

    Raises:
      UsageError: a value in these columns is not finite; names the tensor.
    """
    for first, block in tensor.blocks(0, tensor.shape[0]):
        check_finite(tensor.path, name, block[:, start:stop])
        out[:, first : first + len(block)] = block[:, start:stop].T


def check_finite(where: epath.Path, name: str, values: np.ndarray) -> None:
    """Raises UsageError if a value of the array is NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # The sum shows it without a copy. It may also be that of many large values.
        is_finite = np.isfinite(values.sum(dtype=np.float32)) or np.isfinite(values).all()
    if not is_finite:
        raise UsageError(f"{where}: the tensor {name!r} holds a value that is no finite number")


# Bytes per element of the format's dtypes.
_SAFETENSORS_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_safetensors(path: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; reads its header alone.

    Raises:
      UsageError: if the file is cut short, or its header is not as the format has it.
    """
    refuse_pointer(path)
    file_size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or length > file_size - 8 or length > _MAX_HEADER_BYTES:
            raise UsageError(
                f"{path}: no safetensors file, or one cut short: {file_size} bytes, of which its "
                f"header should take {length}"
            )
        header = _parse_header(path, file.read(length))
    header.pop("__metadata__", None)
    begin, tensors, end = 8 + length, {}, 0
    parsed = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
    for name, (dtype, shape, first, last) in sorted(parsed.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise UsageError(
                f"{path}: the tensor {name!r} begins at byte {first} of the data; the one before "
                f"it ends at {end}"
            )
        end = last
        tensors[name] = StoredTensor(path, begin + first, dtype, shape)
    if begin + end != file_size:
        problem = "is cut short" if begin + end > file_size else "goes on after its last tensor"
        raise UsageError(
            f"{path} {problem}: {file_size} bytes, and {begin + end} by its header; "
            "download it again"
        )
    return tensors


def _parse_header(path: epath.Path, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UsageError(f"{path}: the header of this safetensors file is no JSON object")
    return header


def _parse_entry(path: epath.Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of one tensor."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
    except (TypeError, KeyError, ValueError):
        numbers = [-1]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UsageError(
            f"{path}: the header's entry of {name!r} is not as safetensors has it: {entry!r:.100}"
        )
    size = _SAFETENSORS_SIZES.get(dtype) if isinstance(dtype, str) else None
    if size is not None and last - first != math.prod(shape) * size:
        raise UsageError(
            f"{path}: the tensor {name!r}, {dtype} {list(shape)}, takes "
            f"{math.prod(shape) * size} bytes; its header gives it {last - first}"
        )
    return _SAFETENSORS_DTYPES.get(dtype, str(dtype)), tuple(shape), first, last


def refuse_pointer(path: epath.Path) -> None:
    """Raises UsageError if Git LFS has left its note about the file instead of the file."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UsageError(
                f"{path} is Git LFS's pointer to the file, not the file: run `git lfs pull` there"
            )
