"""PyTorch's `.bin` without PyTorch: files written by hand here, and by PyTorch where it is."""

import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import references
import safetensors.numpy
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.errors import UsageError
from t5x_lite.interop.hf_read import open_hf
from t5x_lite.interop.pickles import read_pickle

# A pickle's operations, written out as pickletools disassembles what torch.save writes.
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
_PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
_EMPTY_DICT = b"ccollections\nOrderedDict\n)R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def _integers(values) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _storage(kind: str, key: str, count: int) -> bytes:
    fields = _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text("cpu")
    return b"(" + fields + _integer(count) + b"tQ"


def _tensor(kind: str, key: str, count: int, offset: int, shape, strides) -> bytes:
    fields = _storage(kind, key, count) + _integer(offset) + _integers(shape) + _integers(strides)
    return _REBUILD + b"(" + fields + b"\x89" + _EMPTY_DICT + b"tR"


def _state(entries: dict[str, bytes]) -> bytes:
    items = b"".join(_text(name) + value for name, value in entries.items())
    attributes = b"}" + _text("_metadata") + _EMPTY_DICT + b"sb"
    return b"\x80\x02" + _EMPTY_DICT + b"(" + items + b"u" + attributes + b"."


def _write(
    path: pathlib.Path,
    program: bytes,
    storages: dict[str, bytes],
    *,
    compression: int = zipfile.ZIP_STORED,
    extra: dict[str, bytes] | None = None,
) -> epath.Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("pytorch_model/data.pkl", program)
        for name, content in (extra or {}).items():
            archive.writestr(f"pytorch_model/{name}", content)
        for key, data in storages.items():
            archive.writestr(f"pytorch_model/data/{key}", data)
        archive.writestr("pytorch_model/version", b"3\n")
    return epath.Path(path)


# What torch.save wrote before 1.6 around the pickle of the tensors: three pickles before it, and
# the list of storages after it.
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_VERSION = b"\x80\x02M\xe9\x03."
_MACHINE = (
    b"\x80\x02}q\x00(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq"
    b"\x02\x88X\n\x00\x00\x00type_sizesq\x03}q\x04(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00"
    b"\x00intq\x06K\x04X\x04\x00\x00\x00longq\x07K\x04uu."
)


def _keys(names) -> bytes:
    return b"\x80\x02](" + b"".join(map(_text, names)) + b"e."


def _old(program: bytes) -> bytes:
    """The program with storages as they were: with a fifth field, which says "no view"."""
    return program.replace(b"tQ", b"NtQ")


def _storage_bytes(storages: dict[str, bytes], itemsize: int) -> bytes:
    return b"".join(struct.pack("<q", len(data) // itemsize) + data for data in storages.values())


def _write_old(
    path: pathlib.Path, program: bytes, storages: dict[str, bytes], itemsize: int = 4
) -> epath.Path:
    pickles = (_MAGIC, _VERSION, _MACHINE, _old(program), _keys(storages))
    path.write_bytes(b"".join(pickles) + _storage_bytes(storages, itemsize))
    return epath.Path(path)


def _whole(tensor) -> np.ndarray:
    return np.concatenate([block for _, block in tensor.blocks(0, tensor.shape[0])])


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
    ],
)
def test_views_of_one_storage(tmp_path, kind, dtype, is_old):
    data = np.random.default_rng(0).normal(size=(8, 6)).astype(dtype)
    program = _state(
        {
            "whole": _tensor(kind, "0", 48, 0, (8, 6), (6, 1)),
            "rows": _tensor(kind, "0", 48, 12, (3, 6), (6, 1)),
            "columns": _tensor(kind, "0", 48, 2, (8, 3), (6, 1)),
            "transposed": _tensor(kind, "0", 48, 0, (6, 8), (1, 6)),
            "vector": _tensor(kind, "0", 48, 1, (8,), (6,)),
            "expanded": _tensor(kind, "0", 48, 0, (4, 6), (0, 1)),
            "parameter": _PARAMETER
            + b"("
            + _tensor(kind, "1", 4, 0, (4,), (1,))
            + b"\x88"
            + _EMPTY_DICT
            + b"tR",
        }
    )
    path = tmp_path / "pytorch_model.bin"
    storages = {"1": data[0, :4].tobytes(), "0": data.tobytes()}
    if is_old:
        _write_old(path, program, storages, data.itemsize)
    else:
        _write(path, program, storages)
    tensors = read_pickle(epath.Path(path))
    x = data.astype(np.float32)
    expected = {
        "whole": x,
        "rows": x[2:5],
        "columns": x[:, 2:5],
        "transposed": x.T,
        "vector": x[:, 1],
        "expanded": np.broadcast_to(x[0], (4, 6)),
        "parameter": x[0, :4],
    }
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].shape == value.shape
        np.testing.assert_array_equal(_whole(tensors[name]), value, err_msg=name)
        (only,) = [block for _, block in tensors[name].blocks(1, 3)]
        np.testing.assert_array_equal(only, value[1:3], err_msg=name)


@pytest.mark.parametrize("write", [_write, _write_old])
def test_a_checkpoint_equals_the_same_in_safetensors(shared_data, tmp_path, write):
    source = shared_data / "checkpoints" / "hf" / "t5_v10"
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    arrays = safetensors.numpy.load_file(source / "model.safetensors")
    storages, entries = {}, {}
    for index, (name, value) in enumerate(arrays.items()):
        strides = [step // value.itemsize for step in value.strides]
        entries[name] = _tensor("FloatStorage", str(index), value.size, 0, value.shape, strides)
        storages[str(index)] = value.tobytes()
    # As PyTorch saves a tied model: the embedding under all of its names.
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        entries[name] = entries["shared.weight"]
    write(tmp_path / "pytorch_model.bin", _state(entries), storages)
    config, params = references.load_hf(source)
    found = open_hf(tmp_path)
    assert found.model.tie_embeddings and config.tie_embeddings
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(leaves) == len(found.params)
    for path, value in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(found.params[name].read(0, len(value)), value)


def test_shards_of_bin_files(shared_data, tmp_path):
    source = shared_data / "checkpoints" / "hf" / "umt5"
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    arrays = safetensors.numpy.load_file(source / "model.safetensors")
    names = list(arrays)
    weight_map = {}
    for shard in range(2):
        file = f"pytorch_model-0000{shard + 1}-of-00002.bin"
        entries, storages = {}, {}
        for name in names[shard::2]:
            value = arrays[name]
            strides = [step // value.itemsize for step in value.strides]
            entries[name] = _tensor("FloatStorage", name, value.size, 0, value.shape, strides)
            storages[name] = value.tobytes()
            weight_map[name] = file
        _write(tmp_path / file, _state(entries), storages)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = open_hf(tmp_path)
    _, params = references.load_hf(source)
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(found.params[name].read(0, len(value)), value)


# Refusals.


class _Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, __import__, getattr, open])
def test_a_pickle_that_calls_is_refused_by_name(tmp_path, function, protocol):
    target = tmp_path / "made"
    program = pickle.dumps({"x": _Call(function, str(target))}, protocol)
    path = _write(tmp_path / "pytorch_model.bin", program, {})
    # The modules' own names: "posix" for "os"; Python 2's for the old protocols.
    name = f"(nt|posix|builtins|__builtin__|_?io).{function.__name__}"
    with pytest.raises(UsageError, match=f"wants to call '{name}': refused"):
        read_pickle(path)
    assert not target.exists()


_ONE = _tensor("FloatStorage", "0", 4, 0, (4,), (1,))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02(iposix\nsystem\n.", "wants to call 'posix.system': refused"),
        (b"\x80\x02(cposix\nsystem\nX\x01\x00\x00\x00xo.", "wants to call 'posix.system': refused"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "wants to call 'posix.system': refused"),
        (b"\x80\x02\x82\x05.", "wants the pickle extension 5: refused"),
        (b"\x80\x02ctorch._utils\n__builtins__\n.", "'torch._utils.__builtins__': refused"),
        (
            b"\x80\x04\x8c\x0ctorch._utils\x8c\x0bos.system.x\x93.",
            "'torch._utils.os.system.x': refused",
        ),
        (_state({"a": b"ctorch\nLoadStorage\n"}), "'torch.LoadStorage': refused"),
        # BUILD could give an object other attributes.
        (_state({"a": _ONE + b"}" + _text("offset") + b"K\x00sb"}), "change a StoredTensor"),
        (b"\x80\x02" + _REBUILD + b"}" + _text("path") + b"K\x00sb.", "change a _RebuildTensor"),
        (b"\x80\x02ccollections\nOrderedDict\n}" + _text("x") + b"K\x00sb.", "change a type"),
    ],
)
def test_a_pickle_that_does_more_than_hold_tensors(tmp_path, program, message):
    path = _write(tmp_path / "pytorch_model.bin", program, {"0": bytes(16)})
    with pytest.raises(UsageError, match=message):
        read_pickle(path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "data.pkl is damaged"),
        (b"\x80\x02.", "data.pkl is damaged"),
        (b"\x80\x02hello", "data.pkl is damaged"),
        (_state({"a": _ONE})[:-1], "data.pkl is damaged"),
        (b"\x80\x02K\x01.", "holds a int, not a dictionary"),
        (_state({"a": b"K\x01"}), "'a' is a int; a model's file holds tensors"),
        (_state({"model": _EMPTY_DICT}), "'model' is a OrderedDict"),
        (b"\x80\x02}K\x01K\x02s.", "1 is a int"),
        (b"\x80\x02(K\x01K\x02tQ.", "unknown kind of storage"),
        (_state({"a": _tensor("FloatStorage", "9", 4, 0, (4,), (1,))}), "data/9 is missing"),
        (_state({"a": _tensor("FloatStorage", "0", 5, 0, (4,), (1,))}), "data/0 has 16 bytes; 5"),
        (_state({"a": _tensor("FloatStorage", "0", -1, 0, (4,), (1,))}), "beyond"),
        (_state({"a": _tensor("FloatStorage", "0", 4, 1, (4,), (1,))}), "beyond its storage of 4"),
        (_state({"a": _tensor("FloatStorage", "0", 4, -1, (4,), (1,))}), "beyond its storage"),
        (_state({"a": _tensor("FloatStorage", "0", 4, 0, (2, 2), (3, 1))}), "beyond its storage"),
        (_state({"a": _tensor("FloatStorage", "0", 4, 3, (4,), (-1,))}), "beyond its storage"),
        (_state({"a": _tensor("FloatStorage", "0", 4, 0, (-4,), (1,))}), "beyond its storage"),
        (_state({"a": _tensor("FloatStorage", "0", 4, 0, (4, 1), (1,))}), "damaged: ValueError"),
        (_state({"a": _REBUILD + b"(K\x00K\x00))tR"}), "a tensor of no storage: 0"),
    ],
)
def test_a_damaged_or_foreign_pickle(tmp_path, program, message):
    path = _write(tmp_path / "pytorch_model.bin", program, {"0": bytes(16)})
    with pytest.raises(UsageError, match=message) as error:
        read_pickle(path)
    assert "\n" not in str(error.value)


def test_other_formats_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content, message in [
        (_state({"a": b"K\x01"}), "a pickle that torch.save has not written"),
        (b"", "no PyTorch file"),
        (b"PK\x03\x04 and no more", "no PyTorch file, or a damaged one"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_pickle(epath.Path(path))
    program = _state({"a": _ONE})
    script = {"constants.pkl": b"\x80\x02).", "code/__torch__.py": b""}
    with pytest.raises(UsageError, match=r"TorchScript program.*save it as safetensors"):
        read_pickle(_write(path, program, {"0": bytes(16)}, extra=script))
    with pytest.raises(UsageError, match="big-endian"):
        read_pickle(_write(path, program, {"0": bytes(16)}, extra={"byteorder": b"big"}))
    read_pickle(_write(path, program, {"0": bytes(16)}, extra={"byteorder": b"little"}))
    with pytest.raises(UsageError, match="data/0 is compressed"):
        read_pickle(_write(path, program, {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"")
    with pytest.raises(UsageError, match=r"no data.pkl"):
        read_pickle(epath.Path(path))


@pytest.mark.parametrize("place", range(5))
def test_every_pickle_of_the_old_format_is_guarded(tmp_path, place):
    target = tmp_path / "made"
    pickles = [_MAGIC, _VERSION, _MACHINE, _old(_state({"a": _ONE})), _keys(["0"])]
    pickles[place] = pickle.dumps(_Call(os.mkdir, str(target)), 2)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"".join(pickles) + _storage_bytes({"0": bytes(16)}, 4))
    with pytest.raises(UsageError, match=r"wants to call '(nt|posix).mkdir': refused"):
        read_pickle(epath.Path(path))
    assert not target.exists()


_HALF_OF_IT = _tensor("HalfStorage", "0", 4, 0, (4,), (1,))


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (0, b"\x80\x02K\x01.", "torch.save has not written"),
        (1, b"\x80\x02M\xea\x03.", "version 1002 of PyTorch's format is unknown"),
        (2, b"\x80\x02}" + _text("little_endian") + b"\x89s.", "big-endian"),
        (2, b"\x80\x02K\x01.", "big-endian"),
        (3, _old(_state({"a": b"K\x01"})), "list of storages is not that of its tensors"),
        (3, _state({"a": _ONE}), "unknown kind of storage"),
        (3, _state({"a": _ONE.replace(b"tQ", b"K\x00tQ")}), "unknown kind of storage"),
        (3, _old(_state({"a": _ONE, "b": _HALF_OF_IT})), "'0' is said to be of two kinds"),
        (3, _old(_state({"a": _ONE.replace(_integer(4), _integer(-4))})), "unknown kind"),
        (3, _old(_state({"a": _ONE.replace(_integer(4), _integer(3))})), "'0' has 4 .* 3 by its"),
        (3, _old(_state({"a": _ONE.replace(_integer(4), _integer(2**62))})), "cut short"),
        (4, _keys([]), "list of storages is not that of its tensors"),
        (4, _keys(["0", "0"]), "list of storages is not that of its tensors"),
        (4, _keys(["0", "1"]), "list of storages is not that of its tensors"),
        (4, b"\x80\x02K\x01.", "list of storages is a int"),
        (4, b"\x80\x02](K\x01e.", "list of storages is a list"),
        (5, struct.pack("<q", 3) + bytes(16), "'0' has 3 elements; 4 by its tensors"),
        (5, struct.pack("<q", -1) + bytes(16), "'0' has .* elements; 4 by its tensors"),
    ],
)
def test_the_old_format_damaged(tmp_path, place, content, message):
    parts = [_MAGIC, _VERSION, _MACHINE, _old(_state({"a": _ONE})), _keys(["0"])]
    parts.append(_storage_bytes({"0": bytes(16)}, 4))
    path = tmp_path / "pytorch_model.bin"
    parts[place] = content
    path.write_bytes(b"".join(parts))
    with pytest.raises(UsageError, match=message) as error:
        read_pickle(epath.Path(path))
    assert "\n" not in str(error.value)


def test_the_old_format_cut_anywhere(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    content = _write_old(path, _state({"a": _ONE}), {"0": bytes(16)}).read_bytes()
    assert read_pickle(epath.Path(path))["a"].offset == len(content) - 16
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UsageError, match=r"damaged|cut short|no PyTorch file|refused"):
            read_pickle(epath.Path(path))


def test_an_operation_that_claims_memory(tmp_path):
    """BYTEARRAY8 of a terabyte, which Python would fill with zeros before it reads."""
    program = b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."
    with pytest.raises(UsageError, match="damaged"):
        read_pickle(_write(tmp_path / "pytorch_model.bin", program, {}))
    (tmp_path / "old.bin").write_bytes(program)
    with pytest.raises(UsageError, match="damaged"):
        read_pickle(epath.Path(tmp_path / "old.bin"))


def test_a_dtype_beyond_float32_keeps_its_name(tmp_path):
    program = _state({"a": _tensor("DoubleStorage", "0", 2, 0, (2,), (1,))})
    path = _write(tmp_path / "pytorch_model.bin", program, {"0": bytes(16)})
    assert read_pickle(path)["a"].dtype == "float64"


@settings(max_examples=200, deadline=None)
@given(
    place=st.integers(0, 10_000),
    replacement=st.binary(min_size=1, max_size=6),
    cut=st.booleans(),
)
def test_a_changed_program_ends_in_tensors_or_in_one_error(
    tmp_path_factory, place, replacement, cut
):
    program = bytearray(_state({"a": _ONE, "b": _tensor("HalfStorage", "0", 8, 2, (2, 3), (3, 1))}))
    place %= len(program)
    program[place : place + (0 if cut else len(replacement))] = replacement
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    try:
        tensors = read_pickle(_write(path, bytes(program), {"0": bytes(16)}))
    except UsageError:
        return
    _assert_small(tensors)


def _assert_small(tensors) -> None:
    """What can be read of the tensors is no more than the files here have."""
    for tensor in tensors.values():
        if tensor.dtype in ("float32", "float16", "bfloat16") and tensor.shape:
            assert sum(block.nbytes for _, block in tensor.blocks(0, tensor.shape[0])) <= 64


@settings(max_examples=300, deadline=None)
@given(
    place=st.integers(0, 10_000),
    replacement=st.binary(min_size=1, max_size=6),
    cut=st.booleans(),
)
def test_a_changed_file_of_the_old_format_ends_in_tensors_or_in_one_error(
    tmp_path_factory, place, replacement, cut
):
    path = tmp_path_factory.getbasetemp() / "old_fuzzed.bin"
    program = _state({"a": _ONE, "b": _tensor("FloatStorage", "1", 4, 2, (2, 1), (1, 1))})
    content = bytearray(_write_old(path, program, {"0": bytes(16), "1": bytes(16)}).read_bytes())
    place %= len(content)
    content[place : place + (0 if cut else len(replacement))] = replacement
    path.write_bytes(content)
    try:
        tensors = read_pickle(epath.Path(path))
    except UsageError:
        return
    _assert_small(tensors)


# By PyTorch itself.


def test_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(5, 7)
    table = torch.randn(4, 6)
    state = dict(layer.state_dict()) | {
        "table": table,
        "transposed": table.T,
        "part": table[1:3, 2:],
        "parameter": torch.nn.Parameter(table[:, 3]),
        "bfloat16": table.bfloat16(),
        "float16": table.half(),
    }
    for is_zip in (True, False):
        options = {"_use_new_zipfile_serialization": is_zip}
        torch.save(state, tmp_path / "x.bin", **options)
        tensors = read_pickle(epath.Path(tmp_path / "x.bin"))
        assert tensors.keys() == state.keys()
        for name, value in state.items():
            np.testing.assert_array_equal(_whole(tensors[name]), value.detach().float().numpy())
        torch.save(layer, tmp_path / "module.bin", **options)
        with pytest.raises(
            UsageError, match=r"wants to call 'torch.nn.modules.linear.Linear': refused"
        ):
            read_pickle(epath.Path(tmp_path / "module.bin"))
    torch.jit.script(layer).save(tmp_path / "script.bin")
    with pytest.raises(UsageError, match="TorchScript"):
        read_pickle(epath.Path(tmp_path / "script.bin"))
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "model": state}, buffer)
    (tmp_path / "run.bin").write_bytes(buffer.getvalue())
    with pytest.raises(UsageError, match="'epoch' is a int"):
        read_pickle(epath.Path(tmp_path / "run.bin"))
