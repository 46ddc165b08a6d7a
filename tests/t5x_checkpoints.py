"""T5X checkpoints read and written by the tests themselves."""

import re
import shutil

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import references
import tensorstore

from t5x_lite.interop.tensors import Tensor

STATISTICS = "state/param_states"


def by_name(tree, is_leaf=None) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def statistics_of(source) -> dict[str, Tensor]:
    """Adafactor's: {"v_row/encoder/layers/mlp/wo/kernel": tensor} and "count"."""
    return by_name(source.optimizer.state, is_leaf=lambda x: isinstance(x, Tensor))


def whole(tensor):
    array = tensor.read(0, tensor.shape[0] if tensor.shape else 1)
    assert array.shape == tensor.shape
    assert array.dtype == tensor.dtype
    assert array.flags.c_contiguous
    return array


def ours_of(name):
    """Our path of one of T5X's parameters, and the layer if its name says one."""
    if match := re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.*)", name):
        return f"{match[1]}/layers/{match[3]}", int(match[2])
    return re.sub(r"^(encoder|decoder)/\1/", r"\1/layers/", name), None


def read_all(directory) -> dict:
    """{"target/...": array, "state/...": array} of a legacy checkpoint, read by the test itself."""
    index = flax.serialization.msgpack_restore((directory / "checkpoint").read_bytes())
    flat = flax.traverse_util.flatten_dict(
        index["optimizer"], is_leaf=lambda _, x: "driver" in x, sep="/"
    )
    return {
        name: references.read_zarr(directory / name.replace("/", "."))
        if isinstance(leaf, dict)
        else np.asarray(leaf)
        for name, leaf in flat.items()
    }


def write_legacy(directory, arrays):
    """A legacy checkpoint with every array in its index, as T5X does with small ones."""
    directory.mkdir(parents=True)
    tree = flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
    index = {"version": 3, "optimizer": tree}
    (directory / "checkpoint").write_bytes(flax.serialization.to_bytes(index))
    return directory


def write_zarr(place, array, chunks=None):
    shutil.rmtree(place, ignore_errors=True)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(place)},
        "metadata": {"chunks": list(chunks or array.shape)},
    }
    store = tensorstore.open(spec, create=True, dtype=array.dtype.name, shape=array.shape).result()
    store.write(array).result()
