"""Torch files: the zip archives of torch 1.6 and later, the form before, and writing the former.

Both hold a pickle that refers to storages, runs of elements beside it, and views of these that are
its tensors.
"""

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vqgan import atomic
from vqgan.convert import lazy, pickles
from vqgan.convert.lazy import DTYPES, ByteRange, Contents
from vqgan.convert.pickles import Makers, Record, Symbol, apply, read_pickle
from vqgan.errors import InputError

# Elements of a view that repeats what is stored (`expand`), beyond which it is taken for damage.
_MAX_REPEATED = 2**22

_STORAGES = {
    "BoolStorage": "bool",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# Bytes, whose dtype the tensor names.
_UNTYPED = dict.fromkeys(("UntypedStorage", "_UntypedStorage"), "uint8")


# What pickles of torch hold.


@dataclass(frozen=True, eq=False)
class _Storage:
    """Elements in a torch file: `size` of them, from `start` of the storage named `key` on."""

    key: str
    dtype: np.dtype
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class _View:
    """A tensor on a storage; offset and strides count elements of `dtype`."""

    storage: _Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    strides: Any


def _stored(reference: Any) -> Any:
    """The storage that a persistent id names; a record where its elements are unknown here."""
    if not isinstance(reference, tuple) or not reference:
        raise ValueError("a reference that torch does not write")
    if reference[0] == "module":  # a class with its source, in files of whole models
        return reference[1]
    tag, kind, key, _, size, *view = reference
    if tag != "storage" or not isinstance(kind, Symbol):
        raise ValueError("a reference that torch does not write")
    name = (_STORAGES | _UNTYPED).get(kind.name)
    if name is None:
        return Record(str(kind))
    start = 0
    if view and view[0] is not None:
        _, start, size = view[0]
    lazy.sizes((start, size))
    return _Storage(str(key), DTYPES[name], start, size)


def _make_view(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: Any = None
) -> Any:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`: rest = requires_grad, hooks, metadata."""
    bits = rest[2] if len(rest) > 2 else None
    if not isinstance(storage, _Storage) or (bits and any(bits.values())):  # conj, neg
        return Record("torch.Tensor")
    return _View(storage, storage.dtype if dtype is None else dtype, offset, shape, strides)


def _make_view_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    """The form for dtypes without a storage class: rest = requires_grad, hooks, dtype, ..."""
    dtype = DTYPES.get(rest[2].name)
    if dtype is None:
        return Record("torch.Tensor")
    return _make_view(storage, offset, shape, strides, *rest[:2], *rest[3:], dtype=dtype)


def _make_subclass(make: Any, _kind: Any, arguments: Any, _state: Any = None) -> Any:
    """A tensor of a subclass is that tensor."""
    return apply(make, arguments)


_MAKERS: Makers = {
    "torch._utils._rebuild_tensor": _make_view,
    "torch._utils._rebuild_tensor_v2": _make_view,
    "torch._utils._rebuild_tensor_v3": _make_view_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type": _make_subclass,
    "torch._tensor._rebuild_from_type_v2": _make_subclass,
    "torch.Size": lambda sizes=(): tuple(sizes),
}


def _placed(node: Any, storages: dict[str, ByteRange]) -> Any:
    """A node of a torch file as a LazyTensor, if it is a tensor of any kind."""
    if isinstance(node, _Storage):
        node = _View(node, node.dtype, 0, (node.size,), (1,))
    if not isinstance(node, _View):
        return pickles.opened(node)
    storage, item, shape = node.storage, node.dtype.itemsize, lazy.sizes(node.shape)
    strides, (offset,) = tuple(node.strides), lazy.sizes((node.offset,))
    if len(strides) != len(shape) or not all(type(n) is int and 0 <= n < 2**58 for n in strides):
        raise ValueError("strides that are none")
    count = math.prod(shape)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if count else 0
    if count > max(span, _MAX_REPEATED):
        raise ValueError(f"{count} elements are claimed where {span} are")
    base = storages[storage.key].part(
        storage.start * storage.dtype.itemsize, storage.size * storage.dtype.itemsize
    )
    where = base.part(offset * item if count else 0, span * item)
    return lazy.tensor_in(where, shape, node.dtype, strides if count else ())


def _contents(root: Any, storages: dict[str, ByteRange]) -> Contents:
    return lazy.flatten(root, partial(_placed, storages=storages))


def _only_little_endian(path: Path, is_little: bool) -> None:
    if not is_little:
        raise InputError(
            f"{path}: written on a big-endian machine, which is not read; save it again on another"
        )


# Zip archives.


def open_zip(path: Path, size: int) -> Contents:
    """A file of torch 1.6 and later: TOP/data.pkl, and TOP/data/KEY for every storage."""
    storages: dict[str, ByteRange] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        top = _top_folder(path, archive)
        entries = {info.filename: info for info in archive.infolist()}
        if f"{top}byteorder" in entries:
            _only_little_endian(path, archive.open(f"{top}byteorder").read(16) == b"little")

        def persistent(reference: Any) -> Any:
            found = _stored(reference)
            if isinstance(found, _Storage) and found.key not in storages:
                info = entries[f"{top}data/{found.key}"]
                storages[found.key] = _place_of(info, file, ByteRange(path, 0, size))
            return found

        info = entries[f"{top}data.pkl"]
        if info.file_size > pickles.MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl claims {info.file_size} bytes")
        _place_of(info, file, ByteRange(path, 0, size))
        root = read_pickle(path, archive.read(info), _MAKERS, persistent)
    return _contents(root, storages)


def _top_folder(path: Path, archive: zipfile.ZipFile) -> str:
    """The folder in the archive that all is in, with its slash; its name differs by writer."""
    names = archive.namelist()
    if any(re.search(r"(^|/)(constants\.pkl|model\.json|code/.*)$", name) for name in names):
        raise InputError(
            f"{path}: a TorchScript archive, which holds a program and is refused; save its "
            "state_dict with torch.save instead"
        )
    found = [name for name in names if name.rsplit("/", 1)[-1] == "data.pkl"]
    if not found:
        raise InputError(f"{path}: a zip file without data.pkl, so torch.save did not write it")
    return min(found, key=len).removesuffix("data.pkl")


def _place_of(info: zipfile.ZipInfo, file: io.BufferedIOBase, whole: ByteRange) -> ByteRange:
    """Where the bytes of an entry lie: in the file itself unless they are compressed."""
    if info.flag_bits & 1:
        raise ValueError(f"{info.filename} is encrypted")
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is not where the archive says")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    packed = whole.part(start, info.compress_size)
    if info.compress_type == zipfile.ZIP_STORED:
        return packed.part(0, min(info.file_size, packed.size))
    if info.file_size > 1100 * info.compress_size + 100:  # more than deflate can do
        raise ValueError(f"{info.filename} claims {info.file_size} bytes")
    return ByteRange(whole.path, 0, info.file_size, info.filename)


# The form before.


def open_legacy(path: Path, size: int) -> Contents:
    """Before torch 1.6: five pickles (magic number, protocol, system, object, keys), then storages
    in the order of the keys, each an int64 count and its elements."""
    used: dict[str, _Storage] = {}

    def persistent(reference: Any) -> Any:
        found = _stored(reference)
        if isinstance(found, _Storage):
            used.setdefault(found.key, found)
        return found

    storages = {}
    with path.open("rb") as file:
        stream = _Stream(file, min(size, pickles.MAX_PICKLE_BYTES))
        read_next = partial(read_pickle, path, stream, _MAKERS, persistent)
        magic = read_next()
        if type(magic) is not int or magic != 0x1950A86A20F9469CFC6C:
            raise InputError(
                f"{path}: a pickle, but not one of torch.save; save the weights as safetensors"
            )
        if read_next() != 1001:
            raise ValueError("another protocol than torch's 1001")
        _only_little_endian(path, read_next()["little_endian"] is True)
        root = read_next()
        for key in map(str, read_next()):
            (count,) = struct.unpack("<q", file.read(8))
            where = ByteRange(path, 0, size).part(file.tell(), count * used[key].dtype.itemsize)
            storages[key] = where
            file.seek(where.start + where.size)
    return _contents(root, storages)


@dataclass
class _Stream:
    """The bytes of pickles: no read can claim more than is there, nor than a pickle may have."""

    file: io.BufferedIOBase
    left: int

    def read(self, count: int) -> bytes:
        return self._counted(self.file.read, count) if count <= self.left else b""

    def readline(self) -> bytes:
        return self._counted(self.file.readline, min(self.left, lazy.MAX_TEXT_BYTES))

    def _counted(self, read: Callable[[int], bytes], count: int) -> bytes:
        found = read(count)
        self.left -= len(found)
        return found


# Writing.


def write_torch(path: Path | str, tree: dict[str, Any]) -> None:
    """Writes nested dicts, lists and tuples of arrays and plain values as torch.save would.

    `torch.load(path, weights_only=True)` reads it. Arrays become tensors of their dtype.

    Raises:
      InputError: an array is of a dtype that torch has no storage for, or a leaf is something else.
    """
    arrays: list[np.ndarray] = []
    try:
        pickled = b"\x80\x02" + _pickled(tree, arrays) + b"."
    except TypeError as error:
        raise InputError(f"{path}: {error}") from None
    with (
        atomic.new_file(path) as new,
        new.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        _write_entry(file, archive, "data.pkl", pickled)
        _write_entry(file, archive, "byteorder", b"little")
        for index, array in enumerate(arrays):
            flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
            _write_entry(file, archive, f"data/{index}", flat.view(np.uint8).data)
        _write_entry(file, archive, "version", b"3\n")


def _pickled(node: Any, arrays: list[np.ndarray]) -> bytes:
    """Pickle opcodes (protocol 2) that leave `node` on the stack; its arrays join `arrays`."""
    if isinstance(node, np.ndarray):
        arrays.append(node)
        return _pickled_tensor(node, len(arrays) - 1)
    if isinstance(node, dict):
        return b"}(" + b"".join(_pickled(n, arrays) for n in chain(*node.items())) + b"u"
    if isinstance(node, list):
        return b"](" + b"".join(_pickled(item, arrays) for item in node) + b"e"
    if isinstance(node, tuple):
        return b"(" + b"".join(_pickled(item, arrays) for item in node) + b"t"
    if node is None or type(node) in (str, int, float, bool):
        return _pickled_plainly(node)
    raise TypeError(f"{type(node)} cannot be written; arrays and plain values can")


def _pickled_plainly(*values: Any) -> bytes:
    # Each without its start and its stop.
    return b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in values)


def _pickled_tensor(array: np.ndarray, key: int) -> bytes:
    """The call that rebuilds a tensor in C order on all of the storage `key`."""
    kind = _STORAGE_OF.get(array.dtype.newbyteorder("="))
    if kind is None:
        raise TypeError(f"torch has no storage for {array.dtype}; cast it first")
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    plain = _pickled_plainly
    storage = b"(" + plain("storage") + b"ctorch\n" + kind.encode() + b"\n"
    storage += plain(str(key), "cpu", array.size) + b"tQ"
    needs_gradient_and_hooks = plain(False) + b"ccollections\nOrderedDict\n)R"
    arguments = storage + plain(0, array.shape, strides) + needs_gradient_and_hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


_STORAGE_OF = {DTYPES[name]: kind for kind, name in _STORAGES.items()}


def _write_entry(file: io.BufferedIOBase, archive: zipfile.ZipFile, name: str, data: Any) -> None:
    """An uncompressed entry whose bytes start at a multiple of 64, for `torch.load(mmap=True)`."""
    info = zipfile.ZipInfo(f"archive/{name}")
    is_large = len(data) >= 2**31
    start = file.tell() + 30 + len(info.filename) + 4 + (20 if is_large else 0)
    padding = -start % 64
    info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)  # the field that torch uses
    with archive.open(info, "w", force_zip64=is_large) as entry:
        entry.write(data)
