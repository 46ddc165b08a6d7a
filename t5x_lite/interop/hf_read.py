"""Reads the checkpoints of Hugging Face's T5 family: safetensors or PyTorch's `.bin`, in shards."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.errors import UsageError, nearest
from t5x_lite.interop import hf, recognise
from t5x_lite.interop.json_files import read_object
from t5x_lite.interop.pickles import read_pickle
from t5x_lite.interop.stored import (
    READABLE_DTYPES,
    StoredTensor,
    read_columns,
    read_rows,
    read_safetensors,
)
from t5x_lite.interop.tensors import Source, Tensor
from t5x_lite.models.config import T5Config

Stored = dict[str, StoredTensor]

# The names under which transformers saves weights, in the order in which they are looked for.
_WEIGHTS: dict[str, Callable[[epath.Path], Stored]] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_pickle,
}


def open_hf(directory: epath.PathLike) -> Source:
    """Describes a checkpoint of `T5ForConditionalGeneration`, its MT5 or its UMT5 sibling.

    Everything is checked here, from the files' headers: names, shapes against config.json, dtypes.
    (An embedding that is there twice is compared, too.) `Tensor.read` then reads what it is asked
    for and holds no more than that and a few MiB; the output matrix is transposed, so that any of
    its rows take a pass over the whole.

    Args:
      directory: holds config.json and model.safetensors or pytorch_model.bin, or the parts of
        either with their index. safetensors are preferred.

    Raises:
      UsageError: on anything that is missing, of another architecture, damaged or contradictory.
    """
    directory = epath.Path(directory)
    try:
        return _open(directory)
    except OSError as error:
        place = error.filename or directory
        raise UsageError(f"{place} cannot be read: {error.strerror or error}") from None


def _open(directory: epath.Path) -> Source:
    values = _read_config(directory)
    stored = _drop_copies(_read_weights(directory), values, directory)
    config = hf.config_from_hf(values, stored, where=str(directory / "config.json"))
    _check_names(stored, config, directory)
    for tensor in hf.tensors_of(config):
        _check_tensor(stored[tensor.name], tensor)
    dtypes = {tensor.dtype for tensor in stored.values()}
    return Source(
        model=config,
        params=_parameters(config, stored),
        step=0,
        optimizer=None,
        origin={
            "format": "hf",
            "path": str(directory),
            "model_type": values["model_type"],
            "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
            "tie_word_embeddings": values.get("tie_word_embeddings"),
        },
    )


def _read_config(directory: epath.Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UsageError(f"no directory {str(directory)!r}{recognise.hint(str(directory))}")
    path = directory / "config.json"
    if not path.exists():
        snapshots = [str(snapshot) for snapshot in directory.glob("snapshots/*")]
        hint = f"; did you mean {snapshots[0]!r}?" if snapshots else ""
        raise UsageError(
            f"no config.json in {str(directory)!r}{hint or recognise.hint(str(directory))}"
        )
    return read_object(path)


def _read_weights(directory: epath.Path) -> Stored:
    """The tensors of a directory's weights by name, whatever the format."""
    for name, read in _WEIGHTS.items():
        if (directory / name).exists():
            return read(directory / name)
        index = directory / f"{name}.index.json"
        if index.exists():
            return _read_shards(index, read)
    known = ", ".join(f"{name} or {name}.index.json" for name in _WEIGHTS)
    hint = recognise.unreadable(directory)
    if recognise.kind_of(directory) != "hf":
        hint = recognise.hint(str(directory))
    raise UsageError(f"no weights in {str(directory)!r}: looked for {known}{hint}")


def _read_shards(index: epath.Path, read: Callable[[epath.Path], Stored]) -> Stored:
    shard_of = read_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UsageError(f"{index}: no 'weight_map' from tensors to files in it")
    for name, shard in shard_of.items():
        # A name with a folder in it could lead out of the directory.
        if not isinstance(shard, str) or epath.Path(shard).name != shard:
            raise UsageError(f"{index}: the tensor {name!r} is in {shard!r}, which is no file name")
    shards = sorted(set(shard_of.values()))
    # Without this an index that has lost the output matrix's shard would describe a tied model.
    for pattern in {re.sub(r"-\d+-of-", "-*-of-", shard) for shard in shards}:
        for path in index.parent.glob(pattern):
            if path.name not in shards:
                raise UsageError(f"{index} names no tensor of {path.name!r}, which is beside it")
    tensors: Stored = {}
    for shard in shards:
        path = index.parent / shard
        if not path.exists():
            raise UsageError(f"the shard {shard!r} that {index} names is missing")
        found = read(path)
        named = {name for name, file in shard_of.items() if file == shard}
        for name in sorted(named - found.keys()):
            raise UsageError(
                f"{index} says that {name!r} is in {shard!r}, where it is not; "
                f"{nearest(name, found)}"
            )
        for name in sorted(found.keys() - named):
            place = f"in {shard_of[name]!r}" if name in shard_of else "nowhere"
            raise UsageError(f"{path} has the tensor {name!r}; by {index.name} it is {place}")
        tensors |= found
    return tensors


def _drop_copies(stored: Stored, values: Mapping[str, Any], directory: epath.Path) -> Stored:
    """Leaves out what repeats the embedding, and what no model uses.

    `.bin` files have the embedding under all of its names. An output matrix equal to it is the
    tied one, as transformers 5 sees it, unless the configuration says that they are two.
    """
    stored = {name: tensor for name, tensor in stored.items() if name not in hf.UNUSED}
    for name in hf.EMBEDDING_COPIES:
        copy = stored.pop(name, None)
        if copy is None:
            continue
        embedding = stored.setdefault("shared.weight", copy)
        if not _is_equal(copy, embedding):
            raise UsageError(
                f"{str(directory)!r}: the tensors {name!r} {list(copy.shape)} and 'shared.weight' "
                f"{list(embedding.shape)} differ; T5 has one embedding"
            )
    if {"shared.weight", "lm_head.weight"} <= stored.keys():
        says_untied = values.get("tie_word_embeddings") is False
        if not says_untied and _is_equal(stored["shared.weight"], stored["lm_head.weight"]):
            del stored["lm_head.weight"]
    return stored


def _is_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """True if the values are the same; what cannot be read is refused later, by name."""
    if a.dtype not in READABLE_DTYPES or b.dtype not in READABLE_DTYPES:
        return a == b
    return a.is_equal(b)


def _check_names(stored: Collection[str], config: T5Config, directory: epath.Path) -> None:
    by_config = (
        f"by config.json (num_layers = {config.num_encoder_layers}, num_decoder_layers = "
        f"{config.num_decoder_layers}, mlp_activations = {'-'.join(config.mlp_activations)})"
    )
    # First, since the names of as many layers as a file may claim do not fit into memory.
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for stack, count in counts.items():
        pattern = re.compile(rf"{stack}\.block\.(\d+)\.")
        found = len({match[1] for name in stored if (match := pattern.match(name))})
        if found < count:
            raise UsageError(
                f"{str(directory)!r}: the tensors are those of {found} layers of the {stack}, "
                f"so that some are missing {by_config}"
            )
    wanted = dict.fromkeys(tensor.name for tensor in hf.tensors_of(config))
    for name in stored:
        if name not in wanted:
            raise UsageError(
                f"{str(directory)!r}: unexpected tensor {name!r} {by_config}; "
                f"{nearest(name, wanted)}"
            )
    for name in wanted:
        if name not in stored:
            raise UsageError(f"{str(directory)!r}: the tensor {name!r} is missing {by_config}")


def _check_tensor(found: StoredTensor, wanted: hf.HFTensor) -> None:
    if found.shape != wanted.shape:
        sizes = ", ".join(
            f"{axis} = {size}" for axis, size in zip(wanted.axes, wanted.shape, strict=True)
        )
        raise UsageError(
            f"{found.path}: the tensor {wanted.name!r} has shape {list(found.shape)}; by "
            f"config.json it is {list(wanted.shape)} ({sizes})"
        )
    if found.dtype not in READABLE_DTYPES:
        raise UsageError(
            f"{found.path}: the tensor {wanted.name!r} has dtype {found.dtype}, which float32 "
            f"cannot represent; allowed: {', '.join(READABLE_DTYPES)}"
        )


def _parameters(config: T5Config, stored: Stored) -> dict[str, Tensor]:
    """Each parameter of our tree, as a `Tensor` over the tensors it is made of."""
    parts: dict[str, list[hf.HFTensor]] = {}
    for tensor in hf.tensors_of(config):
        parts.setdefault(tensor.path, []).append(tensor)
    params = {}
    for path, shape in hf.parameter_shapes(config).items():
        tensors = {part.name: stored[part.name] for part in parts[path]}
        first = parts[path][0]
        if first.layer is None:
            read = functools.partial(
                _read_whole, first.name, stored[first.name], first.is_transposed
            )
        else:
            read = functools.partial(_read_layers, tensors, first.is_transposed)
        params[path] = Tensor(shape, read)
    return params


def _read_layers(layers: Stored, is_transposed: bool, start: int, stop: int) -> np.ndarray:
    """The layers [start, stop), stacked."""
    wanted = list(layers.items())[start:stop]
    shape = wanted[0][1].shape
    out = np.empty((stop - start, *(shape[::-1] if is_transposed else shape)), np.float32)
    for (name, tensor), layer in zip(wanted, out, strict=True):
        (read_columns if is_transposed else read_rows)(name, tensor, 0, len(layer), layer)
    return out


def _read_whole(
    name: str, tensor: StoredTensor, is_transposed: bool, start: int, stop: int
) -> np.ndarray:
    """Rows [start, stop) of a parameter that one tensor holds."""
    row = tensor.shape[:1] if is_transposed else tensor.shape[1:]
    out = np.empty((stop - start, *row), np.float32)
    (read_columns if is_transposed else read_rows)(name, tensor, start, stop, out)
    return out
