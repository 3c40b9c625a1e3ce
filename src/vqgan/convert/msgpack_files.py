"""Flax: msgpack with extension types for arrays, as `flax.serialization` writes it.

A walker steps over the arrays, so that they stay in the file; msgpack's own reader would hold them
all in memory.
"""

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqgan.convert import lazy
from vqgan.convert.lazy import ByteRange, Contents, LazyTensor


def open_msgpack(path: Path, size: int) -> Contents:
    """A nest of dicts and lists by their names; any exception where it is damaged."""
    with path.open("rb") as file:
        root = _Walker(ByteRange(path, 0, size), file).item()
        if file.tell() != size:
            raise ValueError("something follows the weights")
    return lazy.flatten(root)


@dataclass
class _Walker:
    """Reads a file up to the end of `whole`, and steps over the arrays in it."""

    whole: ByteRange
    file: io.BufferedIOBase
    depth: int = 0
    entries: int = 0

    def item(self) -> Any:
        """A dict, list, plain value or LazyTensor; for other binaries, where they lie."""
        self.entries += 1
        if self.entries > lazy.MAX_ENTRIES or self.depth > lazy.MAX_DEPTH:
            raise ValueError("contents nested or many beyond all use")
        code = self.number(">B")
        if code < 0x80:
            return code
        if code < 0x90:
            return self.mapping(code & 0xF)
        if code < 0xA0:
            return self.sequence(code & 0xF)
        if code < 0xC0:
            return self.text(code & 0x1F)
        if code >= 0xE0:
            return code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code in _FIXED_EXTENSIONS:
            return self.extension(_FIXED_EXTENSIONS[code])
        method, form = _SIZED[code]
        return method(self, self.number(form))

    def take(self, count: int) -> bytes:
        if count > min(self.whole.size - self.file.tell(), lazy.MAX_TEXT_BYTES):
            raise ValueError(f"{count} bytes are claimed, which are not there")
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, size: int) -> str:
        return self.take(size).decode()

    def binary(self, size: int) -> ByteRange:
        found = self.whole.part(self.file.tell(), size)
        self.file.seek(size, io.SEEK_CUR)
        return found

    def sequence(self, count: int) -> list[Any]:
        self.depth += 1
        found = [self.item() for _ in range(count)]
        self.depth -= 1
        return found

    def mapping(self, count: int) -> Any:
        flat = self.sequence(2 * count)
        if not all(isinstance(key, str | int) for key in flat[::2]):
            raise ValueError("a key that is no name")
        found = dict(zip(flat[::2], flat[1::2], strict=True))
        return _joined(found) if "__msgpack_chunked_array__" in found else found

    def extension(self, size: int) -> Any:
        kind = self.number(">b")
        payload = self.binary(size)
        if kind not in (1, 3):  # an array, a scalar of NumPy
            return payload
        after = self.file.tell()
        self.file.seek(payload.start)
        shape, name, data = self.item()
        if self.file.tell() != after:
            raise ValueError("an array of another form than flax writes")
        if not isinstance(data, ByteRange) or not isinstance(name, str) or name not in lazy.DTYPES:
            raise ValueError("an array without data, or of an unknown dtype")
        tensor = lazy.tensor_in(data, shape, lazy.DTYPES[name])
        return tensor if kind == 1 else tensor.read().reshape(-1)[0].item()


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCA: ">f", 0xCB: ">d"} | {
    code: f">{letter}"
    for first, letters in ((0xCC, "BHIQ"), (0xD0, "bhiq"))
    for code, letter in enumerate(letters, first)
}
_FIXED_EXTENSIONS = {0xD4 + power: 2**power for power in range(5)}
_SIZED: dict[int, tuple[Callable[[_Walker, int], Any], str]] = {
    code: (method, f">{letter}")
    for first, method, letters in (
        (0xC4, _Walker.binary, "BHI"),
        (0xC7, _Walker.extension, "BHI"),
        (0xD9, _Walker.text, "BHI"),
        (0xDC, _Walker.sequence, "HI"),
        (0xDE, _Walker.mapping, "HI"),
    )
    for code, letter in enumerate(letters, first)
}


def _joined(found: dict[Any, Any]) -> LazyTensor:
    """An array that flax cut into flat chunks, for msgpack's bound of 4 GiB a leaf."""
    shape, chunks = (
        tuple(found[name][str(index)] for index in range(len(found[name])))
        for name in ("shape", "chunks")
    )
    if not chunks or not all(isinstance(chunk, LazyTensor) for chunk in chunks):
        raise ValueError("an array in chunks that are none")
    shape, dtype = lazy.sizes(shape), chunks[0].dtype
    ends = np.cumsum([math.prod(chunk.shape) for chunk in chunks])
    if ends[-1] != math.prod(shape) or any(chunk.dtype != dtype for chunk in chunks):
        raise ValueError(f"chunks that do not fill an array of shape {shape}")

    def load() -> np.ndarray:
        array = np.empty(math.prod(shape), dtype)
        for chunk, end in zip(chunks, ends, strict=True):
            array[end - math.prod(chunk.shape) : end] = chunk.read().reshape(-1)
        return array.reshape(shape)

    return LazyTensor(shape, dtype, load)
