"""Steps of our own checkpoints, written and read a tensor at a time.

`checkpoints` saves a state that is on the devices. Here it never is: a checkpoint of any size goes
through the memory of one stacked tensor.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from t5x_lite import integrity
from t5x_lite.errors import Failure
from t5x_lite.files import absolute, is_local
from t5x_lite.interop.tensors import Tensor

# Tensors smaller than this go to Orbax together.
_GROUP_BYTES = 1 << 25
# Of a large one, so much is read and written at a time if its leading axis can be divided so.
_PART_BYTES = 1 << 27

_METADATA = "_CHECKPOINT_METADATA"


def write_step(step_dir: epath.Path, checkpointables: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes a step as `checkpoints.Checkpoints` would have, with its digests.

    In memory is at most one tensor, and of copies of it two parts, 128 MiB or a layer each. What
    divides a tensor into parts are virtual CPU devices (`jax_num_cpu_devices`): without them a part
    is all of it.

    Args:
      step_dir: a local directory that is not there yet.
      checkpointables: "params" and perhaps "optimizer": tensors by path, "encoder/layers/...".

    Raises:
      Failure: a tensor cannot be read.
      OSError, ValueError: it cannot be written. What was written is left.
    """
    for name, tensors in checkpointables.items():
        scratch = step_dir / f"{name}.incomplete"
        for group in _groups(tensors):
            arrays = {path: _place(path, tensor) for path, tensor in group.items()}
            with _saving_context(arrays):
                ocp.partial.save(scratch, _nest(arrays))
            del arrays
        ocp.partial.finalize(scratch)
        # Orbax calls what is saved in parts "state"; a step of ours has it under its own name.
        metadata = json.loads((scratch / _METADATA).read_text())
        os.rename(scratch / "state", step_dir / name)
        scratch.rmtree()
    handler = ocp.handlers.PyTreeHandler
    handlers = dict.fromkeys(checkpointables, f"{handler.__module__}.{handler.__qualname__}")
    (step_dir / _METADATA).write_text(json.dumps(metadata | {"item_handlers": handlers}))
    integrity.write_digests(step_dir)


def read_params(step_dir: epath.Path, shapes: Any) -> dict[str, Tensor]:
    """The parameters of a step by path; rows are read from the files when they are asked for.

    Args:
      step_dir: a step with intact parameters of these shapes.
      shapes: the parameters' tree with `jax.ShapeDtypeStruct` leaves.
    """
    base = absolute(step_dir / "params")
    metadata = json.loads((base / "_METADATA").read_text())
    driver = "zarr3" if metadata["use_zarr3"] else "zarr"
    # Not a URL for a local path, in which "%41" would be another directory.
    root = {"driver": "file", "path": f"{base}/"} if is_local(base) else f"{base}/"

    def read(path: str, start: int, stop: int) -> np.ndarray:
        place = {"driver": "ocdbt", "base": root, "path": path.replace("/", ".")}
        array = tensorstore.open({"driver": driver, "kvstore": place}, open=True).result()
        return array[start:stop].read().result()

    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {
        _name(path): Tensor(leaf.shape, functools.partial(read, _name(path)))
        for path, leaf in leaves
    }


def _saving_context(arrays: Mapping[str, jax.Array]) -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False  # as in `checkpoints`
    # One device's part of an array is encoded, which copies it, and written; then the next.
    parts = [shard.data.nbytes for x in arrays.values() for shard in x.addressable_shards]
    context.memory.write_concurrent_bytes = max(parts) + 1  # the limit itself is not allowed
    return context


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """All tensors, the small ones several at a time."""
    group: dict[str, Tensor] = {}
    for path, tensor in sorted(tensors.items(), key=lambda item: item[1].num_bytes):
        if group and sum(t.num_bytes for t in group.values()) + tensor.num_bytes > _GROUP_BYTES:
            yield group
            group = {}
        group[path] = tensor
    yield group


def _place(path: str, tensor: Tensor) -> jax.Array:
    """The tensor in the host's memory, divided along its leading axis over the CPU devices."""
    if not tensor.shape:
        return jax.device_put(_read(path, tensor, 0, 1), jax.devices("cpu")[0])
    devices = jax.devices("cpu")
    count = _num_parts(tensor, len(devices))
    size = tensor.shape[0] // count
    parts = []
    for i, device in enumerate(devices[:count]):
        part = jax.device_put(_read(path, tensor, i * size, (i + 1) * size), device)
        parts.append(part.block_until_ready())  # or the rows wait in memory for their copy
    sharding = NamedSharding(Mesh(np.array(devices[:count]), ("rows",)), PartitionSpec("rows"))
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, parts)


def _read(path: str, tensor: Tensor, start: int, stop: int) -> np.ndarray:
    try:
        return tensor.read(start, stop)
    except OSError as e:
        raise Failure(f"the source of {path} cannot be read: {e}") from e


def _num_parts(tensor: Tensor, most: int) -> int:
    """As few as keep a part small: a part may cost its reader a pass over the whole tensor."""
    divisors = [k for k in range(1, most + 1) if tensor.shape[0] % k == 0]
    small = (k for k in divisors if tensor.num_bytes // k <= _PART_BYTES)
    return next(small, divisors[-1])


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
