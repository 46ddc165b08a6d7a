"""Writes our parameters as a Hugging Face checkpoint directory, a part of a tensor at a time.

A file in the safetensors format is eight bytes with the header's length, the header in JSON, and
then the tensors without gaps. As the shapes say where each tensor goes, our stacked tensors are
read one after the other, and every layer is written at its place.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

from t5x_lite.errors import UsageError, nearest
from t5x_lite.files import is_local
from t5x_lite.interop import hf, model_card, new_directory
from t5x_lite.interop.tensors import Tensor
from t5x_lite.models.config import T5Config

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
}
_FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# So much is read at a time, or one row: a source may have to decode all of a tensor for each read.
# Of a stacked one at most half, so that the two together are less than twice the tensor.
_READ_BYTES = 1 << 28
# So much is converted and written at a time.
_WRITE_BYTES = 1 << 25

_GENERATION = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A tensor of the checkpoint and its place in a file."""

    tensor: hf.HFTensor
    itemsize: int
    file: str = ""
    offset: int = 0  # behind the header

    @property
    def num_bytes(self) -> int:
        return math.prod(self.tensor.shape) * self.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


def output_scale(config: T5Config, model_class: str) -> float:
    """What to multiply the output matrix by, so that transformers' class gives our logits.

    Raises:
      UsageError: no factor helps, since the output matrix is also the embedding.
    """
    class_scales = hf.transformers_scales(config, model_class)
    if class_scales == config.scales_decoder_output:
        return 1.0
    if config.tie_embeddings:
        raise UsageError(
            f"{hf.MODEL_CLASSES[model_class]} {'always' if class_scales else 'never'} scales the "
            f"decoder's output; with scale_decoder_output = {config.scales_decoder_output} and "
            "tied embeddings this model cannot be one"
        )
    return math.sqrt(config.d_model) if class_scales else 1 / math.sqrt(config.d_model)


def write_hf(
    directory: str | os.PathLike[str],
    config: T5Config,
    params: Mapping[str, Tensor],
    *,
    model_class: str,
    dtype: str,
    max_shard_bytes: int,
    tokenizer_files: Mapping[str, bytes],
    card: model_card.ModelCard,
) -> None:
    """Writes what `from_pretrained` of transformers 4 and 5 reads: all of it, or nothing.

    UMT5 with an output matrix of its own is for transformers 5 alone: `hf` says why.

    Of `params` one tensor after the other is read, in ascending rows, at most 256 MiB of them at a
    time, or one row; of a stacked tensor, whose rows are layers, at most half.

    Args:
      directory: a local directory that is not there yet, or is empty.
      config: the architecture.
      params: every parameter by its path in our tree, in float32.
      model_class: "t5", "mt5" or "umt5".
      dtype: of the tensors, "float32", "bfloat16" or "float16"; rounded to nearest even.
      max_shard_bytes: of the tensors in one file; a tensor that is larger has a file of its own.
      tokenizer_files: the tokenizer's files by name; empty for none.
      card: what README.md tells.

    Raises:
      UsageError: the directory is there and not empty, is not local, or has no room; the class
        cannot express the model, or the dtype a value.
      Failure: writing failed.
    """
    if not is_local(directory):  # tensors are written at places in files
        raise UsageError(f"{directory} is not on a local disk: convert to one, and copy from there")
    _check_choice("model class", model_class, tuple(hf.MODEL_CLASSES))
    _check_choice("--dtype", dtype, tuple(DTYPES))
    values = hf.config_to_hf(config, model_class=model_class, dtype=dtype)
    scale = output_scale(config, model_class)
    _check_names(config, params)
    itemsize = DTYPES[dtype].itemsize
    slots = _place([_Slot(tensor, itemsize) for tensor in hf.tensors_of(config)], max_shard_bytes)
    texts = {
        "config.json": _json(values),
        "generation_config.json": _json({"_from_model_config": True, **_GENERATION}),
        "README.md": model_card.render(
            card,
            config=config,
            model_class=model_class,
            dtype=dtype,
            has_tokenizer=bool(tokenizer_files),
            output_scale=scale,
        ).encode(),
    }
    if len({slot.file for slot in slots}) > 1:
        texts["model.safetensors.index.json"] = _index(slots)
    num_bytes = sum(slot.num_bytes for slot in slots)
    with new_directory.appearing(os.fspath(directory), num_bytes, "config.json") as scratch:
        _write_tensors(pathlib.Path(scratch), slots, params, dtype, scale)
        for name, content in {**texts, **tokenizer_files}.items():
            (scratch / name).write_bytes(content)


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{what} {value!r}: {nearest(value, allowed)}")


def _check_names(config: T5Config, params: Mapping[str, Tensor]) -> None:
    shapes = hf.parameter_shapes(config)
    if shapes != {path: tensor.shape for path, tensor in params.items()}:
        raise ValueError(f"the parameters are not those of {config}")


def _place(slots: list[_Slot], max_shard_bytes: int) -> list[_Slot]:
    """Gives each tensor its file and its place there.

    Files are filled in the order of the tensors, as huggingface_hub does it; within a file
    the tensors are sorted by name, as the safetensors library does it.
    """
    shards: list[list[_Slot]] = []
    current: list[_Slot] = []
    for slot in slots:
        if slot.num_bytes > max_shard_bytes:
            shards.append([slot])
            continue
        if sum(s.num_bytes for s in current) + slot.num_bytes > max_shard_bytes:
            shards.append(current)
            current = []
        current.append(slot)
    if current:
        shards.append(current)
    placed = []
    for number, shard in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        offset = 0
        for slot in sorted(shard, key=lambda s: s.tensor.name):
            file = f"model{part}.safetensors"
            placed.append(dataclasses.replace(slot, file=file, offset=offset))
            offset += slot.num_bytes
    return placed


def _header(slots: list[_Slot], format_name: str) -> bytes:
    """The head of a file with these tensors, which are in its order."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for slot in slots:
        entries[slot.tensor.name] = {
            "dtype": format_name,
            "shape": slot.tensor.shape,
            "data_offsets": [slot.offset, slot.end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(slots: list[_Slot]) -> bytes:
    total = sum(slot.num_bytes for slot in slots)
    return _json(
        {
            "metadata": {
                "total_parameters": total // slots[0].itemsize,
                "total_size": total,
            },
            "weight_map": {slot.tensor.name: slot.file for slot in slots},
        }
    )


def _json(values: Mapping) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _write_tensors(
    directory: pathlib.Path,
    slots: list[_Slot],
    params: Mapping[str, Tensor],
    dtype: str,
    output_scale: float,
) -> None:
    data_starts = {}
    for file in {slot.file for slot in slots}:
        content = [slot for slot in slots if slot.file == file]
        header = _header(content, _FORMAT_NAMES[dtype])
        data_starts[file] = len(header)
        with open(directory / file, "xb") as f:
            f.write(header)
            f.truncate(len(header) + content[-1].end)

    def write_rows(x: np.ndarray, first: int, slot: _Slot) -> None:
        scale = output_scale if slot.tensor.path == "decoder/logits_dense/kernel" else 1.0
        with open(directory / slot.file, "r+b") as f:
            start = data_starts[slot.file] + slot.offset
            _TensorWriter(f, start, slot.tensor, DTYPES[dtype], scale).write(x, first)

    # A source may hold on to a tensor until another is read: each is read once, in its order.
    slots = sorted(slots, key=lambda s: (s.tensor.path, s.tensor.layer or 0))
    for path, group in itertools.groupby(slots, key=lambda s: s.tensor.path):
        own, ours = list(group), params[path]
        is_stacked = own[0].tensor.layer is not None
        limit = min(_READ_BYTES, ours.num_bytes // 2) if is_stacked else _READ_BYTES
        for first, last in _ranges(ours.shape[0], ours.num_bytes // ours.shape[0], limit):
            x = ours.read(first, last)
            if not is_stacked:
                write_rows(x, first, own[0])
            else:
                for layer, slot in enumerate(own[first:last]):
                    write_rows(x[layer], 0, slot)
            del x  # or it stays while the next is read
    for file in data_starts:
        with open(directory / file, "rb") as written:
            os.fsync(written.fileno())


@dataclasses.dataclass(frozen=True)
class _TensorWriter:
    """Writes one tensor of the checkpoint at its place in an open file."""

    file: BinaryIO
    start: int  # of the tensor, in bytes
    tensor: hf.HFTensor
    dtype: np.dtype
    scale: float

    def write(self, x: np.ndarray, first: int) -> None:
        """Writes `x`, rows of our parameter (or of a layer of it) from `first` on."""
        if not self.tensor.is_transposed:
            row_bytes = math.prod(x.shape[1:]) * self.dtype.itemsize
            for low, high in _ranges(len(x), row_bytes, _WRITE_BYTES):
                self._put(self._convert(x[low:high]), (first + low) * row_bytes)
            return
        # Our rows are columns of the file: if they are not all of them, the others there stay.
        num_columns = self.tensor.shape[1]
        row_bytes = num_columns * self.dtype.itemsize
        for low, high in _ranges(x.shape[1], row_bytes, _WRITE_BYTES):
            data = self._convert(x[:, low:high].T)
            if len(x) < num_columns:
                around = self._get(low * row_bytes, (high - low) * row_bytes)
                around = around.reshape(high - low, num_columns)
                around[:, first : first + len(x)] = data
                data = around
            self._put(data, low * row_bytes)

    def _convert(self, x: np.ndarray) -> np.ndarray:
        if self.scale != 1:
            x = (x.astype(np.float64) * self.scale).astype(np.float32)
        with np.errstate(over="ignore"):
            y = x.astype(self.dtype, order="C")
        if self.dtype != np.float32 and not np.isfinite(y).all():
            lost = np.isinf(y) & np.isfinite(x)
            if lost.any():
                raise UsageError(
                    f"--dtype={self.dtype}: {self.tensor.name} holds {x[lost].flat[0]:g}, beyond "
                    f"what {self.dtype} can express; use float32"
                )
        return y

    def _put(self, x: np.ndarray, offset: int) -> None:
        self.file.seek(self.start + offset)
        self.file.write(x.reshape(-1).view(np.uint8).data)

    def _get(self, offset: int, num_bytes: int) -> np.ndarray:
        self.file.seek(self.start + offset)
        return np.frombuffer(bytearray(self.file.read(num_bytes)), self.dtype)


def _ranges(count: int, size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Divides `count` rows of `size` bytes into runs of at most `limit` bytes, or of one row."""
    step = max(1, limit // size)
    for start in range(0, count, step):
        yield start, min(start + step, count)
