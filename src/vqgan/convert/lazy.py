"""What all containers of weights share: byte ranges of files, arrays that stay there, flat names.

A file may say anything. Whatever its parsers raise becomes one line for the user, and what it
claims is bounded before memory is spent on it.
"""

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vqgan.errors import InputError

# Bounds of what a file without weights in it may cost, far above what published files need.
MAX_TEXT_BYTES = 2**26
MAX_ENTRIES = 10**6
MAX_DEPTH = 100
_MAX_NAME = 4000

_NUMBERS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64"
DTYPES = {name: np.dtype(name) for name in f"bool {_NUMBERS} complex128".split()} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays in its file until it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray] = field(repr=False, compare=False)

    def read(self) -> np.ndarray:
        """The values, of `shape` and `dtype`, C-contiguous, in memory of the caller's own.

        Raises:
          InputError: the file went away or changed since it was opened, or is damaged inside.
        """
        return self.load()


Contents = tuple[dict[str, LazyTensor], dict[str, Any]]
"""Tensors and plain values of a container, by flat names."""


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """What a damaged file makes its parsers raise, and they raise everything, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # not of a seek to nowhere
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        what = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"{path}: damaged or cut off ({what}); download it again") from error


def one_line(text: str) -> str:
    """Any text from a file as a short part of a message."""
    return ascii(text[:200])[1:-1]


# Bytes in files, and arrays of them.


@dataclass(frozen=True)
class ByteRange:
    """A run of bytes of a file or, if `entry` is named, of that compressed entry of a zip file."""

    path: Path
    start: int
    size: int
    entry: str | None = None

    def part(self, start: int, size: int) -> "ByteRange":
        """`size` of these bytes from `start` on; ValueError unless all of them are there."""
        if start < 0 or size < 0 or start + size > self.size:
            raise ValueError(f"{start + size} bytes are claimed where {max(self.size, 0)} are")
        return ByteRange(self.path, self.start + start, size, self.entry)

    def read(self) -> np.ndarray:
        """All of them, as an array of bytes; InputError if the file has changed."""
        found = np.empty(self.size, np.uint8)
        with refusing(self.path), contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(self.path.open("rb"))
            if self.entry is not None:
                archive = stack.enter_context(zipfile.ZipFile(file))
                file = stack.enter_context(archive.open(self.entry))
            file.seek(self.start)
            rest = found.data
            while rest:
                count = file.readinto(rest[: 2**20] if self.entry else rest)
                if not count:
                    raise ValueError(f"{len(rest)} bytes are missing")
                rest = rest[count:]
        return found


def tensor_in(
    where: ByteRange, shape: Any, dtype: np.dtype, strides: tuple[int, ...] = ()
) -> LazyTensor:
    """A tensor that spans all of `where`; strides count elements, none mean C order."""
    shape = sizes(shape)
    if not strides and math.prod(shape) * dtype.itemsize != where.size:
        raise ValueError(f"a tensor of shape {shape} and {dtype} does not have {where.size} bytes")

    def load() -> np.ndarray:
        raw = where.read()
        if dtype == np.bool_:  # a byte other than 0 and 1 is no bool that NumPy could trust
            raw = raw != 0
        steps = [stride * dtype.itemsize for stride in strides] or None
        return np.asarray(np.ndarray(shape, dtype, raw, strides=steps), order="C")

    return LazyTensor(shape, dtype, load)


def sizes(numbers: Any) -> tuple[int, ...]:
    """A shape, or other numbers of elements, whatever a file says."""
    numbers = tuple(numbers)
    if len(numbers) > 32 or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError("a shape that is none")
    if math.prod(n for n in numbers if n) >= 2**58:  # which NumPy refuses for empty arrays too
        raise ValueError("a shape too large for any file")
    return numbers


# Nested contents as flat names.


def flatten(root: Any, place: Callable[[Any], Any] = lambda node: node) -> Contents:
    """The tensors and the values of a nest of dicts, lists, tuples and objects.

    `place` says what a node is: a LazyTensor, a plain value, a nest, or anything else, which is
    left out. Objects may point at each other, so each is opened once, under the first of its
    names; lists and dicts may appear twice.
    """
    tensors: dict[str, LazyTensor] = {}
    values: dict[str, Any] = {}
    for name, found in _leaves(root, place):
        if isinstance(found, LazyTensor):
            if name in tensors:
                raise ValueError(f"{name}: two tensors of this name")
            tensors[name] = found
        elif found is None or type(found) in (str, int, float, bool):
            values[name] = found
    return tensors, values


def _leaves(root: Any, place: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    opened: set[int] = set()  # objects
    # Names, the nests above, node; last in, first out.
    left: list[tuple[tuple[str, ...], tuple[int, ...], Any]] = [((), (), root)]
    for _ in range(MAX_ENTRIES):
        if not left:
            return
        names, above, node = left.pop()
        name = ".".join(names)
        if len(names) > MAX_DEPTH or len(name) > _MAX_NAME:
            break
        try:
            found = place(node)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not isinstance(found, dict | list | tuple):
            yield name, found
        elif id(node) not in opened and id(node) not in above:
            if len(left) + len(found) > MAX_ENTRIES:
                break
            if found is not node:
                opened.add(id(node))
            items = found.items() if isinstance(found, dict) else enumerate(found)
            left += [((*names, _key_name(k)), (*above, id(node)), n) for k, n in items][::-1]
    raise ValueError("contents nested or repeated beyond all use")


def _key_name(key: Any) -> str:
    name = ".".join(map(_key_name, key)) if isinstance(key, tuple) else str(key)
    return name[: _MAX_NAME + 1]
