"""The containers of published weights, read lazily and without the frameworks that wrote them.

Torch files (zip archives and the form before torch 1.6), safetensors (single or in shards) and
flax msgpack. A container is known by its first bytes; opening it reads names, shapes and places,
and checks that every byte a tensor claims is there. A tensor's bytes are read when asked for, and
nothing in a file is ever run.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from vqgan.convert import lazy
from vqgan.convert.lazy import DTYPES, ByteRange, Contents, LazyTensor, one_line
from vqgan.convert.msgpack_files import open_msgpack
from vqgan.convert.torch_files import open_legacy, open_zip, write_torch
from vqgan.errors import InputError

__all__ = ["Checkpoint", "Container", "LazyTensor", "open_checkpoint", "write_torch"]

Container = Literal["torch", "safetensors", "msgpack"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened container, its nested contents flattened to names joined with dots."""

    path: Path
    container: Container
    tensors: dict[str, LazyTensor]
    """Also arrays of NumPy; list entries by their index, `optimizer.param_groups.0.lr`."""
    values: dict[str, Any]
    """Leaves that are str, int, float, bool or None; the metadata of safetensors below
    `__metadata__`, attributes of unknown objects (`args.lr` of an argparse.Namespace) alike."""

    def below(self, prefix: str) -> dict[str, LazyTensor]:
        """The tensors whose names start with `prefix` and a dot, without both; all for ""."""
        if not prefix:
            return dict(self.tensors)
        start = f"{prefix}."
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a container of weights, or the JSON index of one that lies beside it in shards.

    Raises:
      InputError: the file is missing, damaged, cut off, of another kind, or its pickle asks for
        something that weights have no use for.
    """
    return _open_by_content(Path(path), may_be_index=True)


def _open_by_content(path: Path, *, may_be_index: bool) -> Checkpoint:
    with lazy.refusing(path):
        head = _first_bytes(path)
        size = path.stat().st_size
        # First, since any other's magic can be the length of the header of safetensors too.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
            return Checkpoint(path, "safetensors", *_open_safetensors(path, size))
        if head[:1] == b"{" and may_be_index:
            return _open_index(path)
        for found, meaning in _REFUSED.items():
            if re.match(found, head, re.DOTALL | re.IGNORECASE):
                raise InputError(f"{path}: {meaning}")
        if head[:2] == b"PK":
            return Checkpoint(path, "torch", *open_zip(path, size))
        if head[:1] == b"\x80" and head[1:2] <= b"\x05" and size > 1:
            return Checkpoint(path, "torch", *open_legacy(path, size))
        if 0x80 <= head[0] <= 0x8F or head[:1] in (b"\xde", b"\xdf"):
            return Checkpoint(path, "msgpack", *open_msgpack(path, size))
    raise InputError(
        f"{path}: neither a torch file nor safetensors nor flax msgpack; download it again, or "
        "convert it to one of these"
    )


# First bytes of files that are met in place of weights, and what to do about each.
_REFUSED = {
    rb"version https://git-lfs": "a git-lfs pointer, not the weights; run `git lfs pull`",
    rb"\s*<(!doctype|html|\?xml|!--)": "a web page, not weights; download it again",
    rb"\x1f\x8b": "compressed with gzip; unpack it and name the file of weights in it",
    rb".{257}ustar": "a tar file (torch's of before 0.2, if one at all); unpack it, or save it "
    "again with a newer torch",
    rb"\x89HDF": "an HDF5 file, which is not read; save the weights as safetensors",
}


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: a directory; name the file of weights in it")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise InputError(f"{path}: 0 bytes; download it again")
    return head


# Safetensors.

_SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
}


def _open_safetensors(path: Path, size: int) -> Contents:
    with safe_open(path, framework="np") as checked:  # of ranges, sizes and the whole file's length
        metadata = checked.metadata() or {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise InputError(f"{path}: {one_line(name)} is of {entry['dtype']}, which is not read")
        start, end = entry["data_offsets"]
        where = ByteRange(path, 0, size).part(8 + length + start, end - start)
        dtype = DTYPES[_SAFETENSORS_DTYPES[entry["dtype"]]]
        tensors[name] = lazy.tensor_in(where, entry["shape"], dtype)
    return tensors, {f"__metadata__.{name}": value for name, value in metadata.items()}


def _open_index(path: Path) -> Checkpoint:
    """Shards beside their index: {"weight_map": {tensor: file name}, "metadata": {...}}."""
    if path.stat().st_size > lazy.MAX_TEXT_BYTES:
        raise InputError(f"{path}: a JSON file of this size is no index of weights")
    index = json.loads(path.read_bytes())
    if not isinstance(index.get("weight_map"), dict):
        raise InputError(f"{path}: JSON without a weight_map; name the file of weights beside it")
    shards: dict[str, Checkpoint] = {}
    tensors = {}
    for name, shard in index["weight_map"].items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{path}: {one_line(str(shard))} is no name of a file beside it")
        if shard not in shards:
            shards[shard] = _open_by_content(path.with_name(shard), may_be_index=False)
        if name not in shards[shard].tensors:
            raise InputError(f"{path}: {one_line(name)} is not in {shard}; download both again")
        tensors[name] = shards[shard].tensors[name]
    containers = {shard.container for shard in shards.values()}
    if len(containers) != 1:
        raise InputError(f"{path}: its shards are {len(containers)} kinds of files; one is needed")
    values = {key: value for shard in shards.values() for key, value in shard.values.items()}
    _, metadata = lazy.flatten({"__metadata__": index.get("metadata")})
    return Checkpoint(path, containers.pop(), tensors, values | metadata)
