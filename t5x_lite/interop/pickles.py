"""The tensors of a PyTorch `.bin` file, without PyTorch and without running what is in it.

`torch.save` (1.6 and later) writes a zip archive: `<name>/data.pkl`, a pickle of the state
dictionary, and `<name>/data/<key>`, the bytes of each storage, not compressed. Before 1.6 it wrote
five pickles one after the other (a magic number, the format's version, facts of the machine, the
state dictionary, the storages' keys) and then, in the order of the keys, the number of elements and
the bytes of each storage. A pickle is a program; this reader knows four functions, of its own
making, by their names there, and refuses a pickle that asks for any other.
"""

import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.interop.stored import StoredTensor, refuse_pointer

_SAVE_AGAIN = "load it with transformers and save it as safetensors (`model.save_pretrained(DIR)`)"
# The first two pickles of torch.save before 1.6.
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001
_MAX_PICKLE_BYTES = 64 * 2**20  # a state dictionary of 10,000 tensors takes 2 MiB

# PyTorch's storage classes: our name of the dtype, bytes per element.
_STORAGES = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


def read_pickle(path: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of a `pytorch_model.bin` by name; reads its pickles alone.

    Raises:
      UsageError: if the file is of another format, damaged, or asks for more than tensors.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        is_old = file.read(1) == pickle.PROTO
        file.seek(0)
        return _read_old(path, file) if is_old else _read_zip(path, file)


def _read_zip(path: epath.Path, file: BinaryIO) -> dict[str, StoredTensor]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            prefix = _find_prefix(path, entries)
            if entries[f"{prefix}data.pkl"].file_size > _MAX_PICKLE_BYTES:
                raise UsageError(f"{path}: data.pkl is too large for a dictionary of tensors")
            program = archive.read(f"{prefix}data.pkl")
            order = f"{prefix}byteorder"
            if order in entries and archive.read(order) != b"little":
                raise UsageError(f"{path} was written on a big-endian machine: {_SAVE_AGAIN}")
    # zipfile raises RuntimeError for encryption and NotImplementedError for what it lacks.
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise UsageError(f"{path}: no PyTorch file, or a damaged one: {error}") from None
    storages = _ZipStorages(path, file, prefix, entries)
    return _tensors(path, _unpickle(path, io.BytesIO(program), storages.find, "data.pkl"))


def _read_old(path: epath.Path, file: BinaryIO) -> dict[str, StoredTensor]:
    pickles, storages = _Pickles(file), _OldStorages(path)

    def load(what: str) -> Any:
        return _unpickle(path, pickles, storages.find, what)

    if load("first pickle") != _OLD_MAGIC:
        raise UsageError(f"{path}: a pickle that torch.save has not written")
    version = load("version")
    if version != _OLD_VERSION:
        raise UsageError(f"{path}: version {version!r:.100} of PyTorch's format is unknown")
    machine = load("pickle about its machine")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UsageError(f"{path} was written on a big-endian machine: {_SAVE_AGAIN}")
    begin = file.tell()
    # The pickle tells what storages there are; where they are depends on what comes after it.
    load("pickle of tensors")
    storages.locate(file, load("list of storages"))
    file.seek(begin)
    return _tensors(path, _unpickle(path, _Pickles(file), storages.find, "pickle of tensors"))


def _find_prefix(path: epath.Path, entries: Mapping[str, zipfile.ZipInfo]) -> str:
    """The archive's folder, "archive/", that holds `data.pkl`."""
    folders = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise UsageError(f"{path}: a zip archive that PyTorch has not written: no data.pkl in it")
    if f"{folders[0]}constants.pkl" in entries:
        raise UsageError(f"{path} is a TorchScript program: {_SAVE_AGAIN}")
    return folders[0]


@dataclasses.dataclass(frozen=True)
class _StorageType:
    """Stands for a storage class in the pickle; it can do nothing."""

    dtype: str
    itemsize: int


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage: where its bytes lie, and how many elements they are."""

    type: _StorageType
    offset: int
    num_elements: int


FindStorage = Callable[[Any], _Storage]


class _ZipStorages:
    """Finds storages in the archive, by what the pickle calls them."""

    def __init__(
        self,
        path: epath.Path,
        file: BinaryIO,
        prefix: str,
        entries: Mapping[str, zipfile.ZipInfo],
    ):
        self.path, self.file, self.prefix, self.entries = path, file, prefix, entries

    def find(self, storage_id: Any) -> _Storage:
        """The storage of a pickle's `("storage", class, key, device, number of elements)`."""
        match storage_id:
            case ("storage", _StorageType() as kind, str(key), _, int(count)):
                pass
            case _:
                raise UsageError(f"{self.path}: an unknown kind of storage: {storage_id!r:.100}")
        entry = self.entries.get(f"{self.prefix}data/{key}")
        if entry is None:
            raise UsageError(f"{self.path}: the storage data/{key} is missing in the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise UsageError(f"{self.path}: the storage data/{key} is compressed: {_SAVE_AGAIN}")
        if entry.file_size < count * kind.itemsize:
            raise UsageError(
                f"{self.path}: the storage data/{key} has {entry.file_size} bytes; "
                f"{count} elements of {kind.dtype} take {count * kind.itemsize}"
            )
        return _Storage(kind, self._data_offset(entry), count)

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        """Where the entry's bytes begin: after its own header, whose length only it tells."""
        self.file.seek(entry.header_offset)
        header = self.file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UsageError(f"{self.path} is damaged: no zip entry at byte {entry.header_offset}")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return entry.header_offset + 30 + name_length + extra_length


class _OldStorages:
    """The storages of a file from before 1.6, which lie one after the other."""

    def __init__(self, path: epath.Path):
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find(self, storage_id: Any) -> _Storage:
        """The storage of a pickle's id; its offset is 0 until `locate` was called."""
        match storage_id:
            case ("storage", _StorageType() as kind, str(key), _, int(count), None) if count >= 0:
                pass
            case _:
                raise UsageError(f"{self.path}: an unknown kind of storage: {storage_id!r:.100}")
        storage = self.storages.setdefault(key, _Storage(kind, 0, count))
        if (storage.type, storage.num_elements) != (kind, count):
            raise UsageError(f"{self.path}: the storage {key!r:.100} is said to be of two kinds")
        return storage

    def locate(self, file: BinaryIO, keys: Any) -> None:
        """Finds where each storage lies; the first is at the file's position.

        Args:
          file: the whole file.
          keys: of the storages in their order, as the file's last pickle has them.
        """
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UsageError(f"{self.path}: its list of storages is a {type(keys).__name__}")
        if len(set(keys)) != len(keys) or set(keys) != self.storages.keys():
            raise UsageError(f"{self.path}: its list of storages is not that of its tensors'")
        position = file.tell()
        file_size = file.seek(0, io.SEEK_END)
        for key in keys:
            storage = self.storages[key]
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            end = position + 8 + storage.num_elements * storage.type.itemsize
            if end > file_size:
                raise UsageError(
                    f"{self.path} is cut short: {file_size} bytes, and the storage {key!r:.100} "
                    f"ends at {end}; download it again"
                )
            if count != storage.num_elements:
                raise UsageError(
                    f"{self.path}: the storage {key!r:.100} has {count} elements; "
                    f"{storage.num_elements} by its tensors"
                )
            self.storages[key] = dataclasses.replace(storage, offset=position + 8)
            position = end


class _Pickles:
    """A file as `pickle` reads it, up to the most that pickles of tensors can take."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, _MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end of the file or the limit."""
        return self._count(self.file.read(min(size, self.left)))

    def readline(self) -> bytes:
        """A line, or what the limit leaves of it."""
        return self._count(self.file.readline(self.left))

    def _count(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


class _RebuildTensor:
    """`torch._utils._rebuild_tensor_v2`, as a description of the tensor."""

    __slots__ = ("path",)

    def __init__(self, path: epath.Path):
        self.path = path

    def __call__(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any
    ) -> StoredTensor:
        """Arguments as there; unused are requires_grad, backward_hooks and metadata."""
        if not isinstance(storage, _Storage):
            raise UsageError(f"{self.path}: a tensor of no storage: {storage!r:.100}")
        numbers = (offset, *shape, *strides)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        fits = all(type(n) is int and n >= 0 for n in numbers) and (
            last < storage.num_elements or 0 in shape
        )
        if not fits:
            raise UsageError(
                f"{self.path}: a tensor of shape {list(shape)} at element {offset} reaches beyond "
                f"its storage of {storage.num_elements}"
            )
        contiguous = all(
            n == 1 or step == math.prod(shape[axis + 1 :])
            for axis, (n, step) in enumerate(zip(shape, strides, strict=True))
        )
        first_byte = storage.offset + offset * storage.type.itemsize
        kept = None if contiguous else tuple(strides)
        return StoredTensor(self.path, first_byte, storage.type.dtype, tuple(shape), kept)


class _RebuildParameter:
    """`torch._utils._rebuild_parameter`: the tensor."""

    __slots__ = ()

    def __call__(self, tensor: Any, *unused: Any) -> Any:
        return tensor


class _Unpickler(pickle._Unpickler):
    """A pickle's interpreter that hands out the four functions and nothing else.

    The one written in Python: its memo is a dictionary, so that no index in a hostile file can
    claim memory.
    """

    stack: list[Any]  # of the base class, whose type information lacks it

    def __init__(self, path: epath.Path, program: Any, find_storage: FindStorage):
        super().__init__(program)
        self.path, self.find_storage = path, find_storage

    def find_class(self, module: str, name: str) -> Any:
        """Looks a name up among ours; never imports."""
        if module == "torch" and name in _STORAGES:
            return _StorageType(*_STORAGES[name])
        match (module, name):
            case ("collections", "OrderedDict"):
                return OrderedDict
            case ("torch._utils", "_rebuild_tensor_v2"):
                return _RebuildTensor(self.path)
            case ("torch._utils", "_rebuild_parameter"):
                return _RebuildParameter()
        function = f"{module}.{name}"
        raise UsageError(
            f"{self.path} wants to call {function!r:.100}: refused; only tensors are read from a "
            "PyTorch file"
        )

    def get_extension(self, code: int) -> None:
        """Python's registry of short names, which would go past `find_class`."""
        raise UsageError(f"{self.path} wants the pickle extension {code}: refused")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that the pickle names."""
        return self.find_storage(pid)

    def load_build(self) -> None:
        """Drops the attributes that PyTorch gives its dictionary; no object here has any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise UsageError(
                f"{self.path} wants to change a {type(self.stack[-1]).__name__}: refused"
            )

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]
    # It claims as much memory as the file says; a dictionary of tensors has no use for it.
    del dispatch[pickle.BYTEARRAY8[0]]


_FAILURES = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def _unpickle(
    path: epath.Path, program: io.BytesIO | _Pickles, find_storage: FindStorage, what: str
) -> Any:
    """The next pickle of `program`; `what` it is, for messages."""
    try:
        return _Unpickler(path, program, find_storage).load()
    except UsageError:
        raise
    # A damaged program may fail in any of its operations.
    except _FAILURES as error:
        raise UsageError(f"{path}: its {what} is damaged: {error!r:.100}") from None


def _tensors(path: epath.Path, state: Any) -> dict[str, StoredTensor]:
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise UsageError(
                f"{path}: {name!r:.100} is a {type(value).__name__}; a model's file holds tensors "
                "by their names and nothing else"
            )
    return dict(state)
