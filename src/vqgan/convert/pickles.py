"""Pickles, read as data.

A pickle is a program, so it is not given to Python's unpickler but to a small machine that has
data and no calls: a name that a pickle imports is only a symbol here, and what it builds of symbols
is either one of a few constructors of data, re-made below, or an inert record of what was asked
for. Nothing is imported and nothing of the file is run.
"""

import math
import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vqgan.convert.lazy import DTYPES, LazyTensor, one_line, sizes
from vqgan.errors import InputError

MAX_PICKLE_BYTES = 2**29
_MAX_STEPS = 10**7

Makers = dict[str, Callable[..., Any]]
"""Constructors of data by the name that pickles import."""


def read_pickle(
    path: Path, pickled: Any, makers: Makers, persistent: Callable[[Any], Any] = lambda name: name
) -> Any:
    """What a pickle of any protocol holds: dicts, lists, plain values, symbols, records, arrays.

    Args:
      path: the file that messages name.
      pickled: its bytes, or a stream, which is left behind its end.
      makers: constructors of data beside those of the standard library and of NumPy.
      persistent: what an object is that the pickle only refers to.

    Raises:
      InputError: it asks for a name of the standard library that makes no data.
      Exception: any other, where it is damaged.
    """
    return _Machine(path, _MAKERS | makers, persistent).run(pickled)


def opened(node: Any) -> Any:
    """What a record holds, as a dict or a LazyTensor; any other node as it is."""
    if not isinstance(node, Record):
        return node
    return node.state if isinstance(node.state, LazyTensor) else node.contents()


# What the machine's stack holds besides plain data.


@dataclass(frozen=True)
class Symbol:
    """A name that a pickle imports."""

    module: str
    name: str
    make: Callable[..., Any] | None = field(default=None, compare=False)
    """What a call of it makes here; None for a record of the call."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An instance of a class unknown here: never made, only what the pickle says of it."""

    kind: str
    arguments: tuple = ()
    state: Any = None
    entries: dict = field(default_factory=dict)
    items: list = field(default_factory=list)

    def __str__(self) -> str:
        return self.kind

    def contents(self) -> dict[Any, Any]:
        """Its attributes and contents; omegaconf's containers and nodes are what they hold."""
        if self.kind == "numpy.dtype":  # whose state describes fields
            return {}
        parts = self.state if isinstance(self.state, tuple) else (self.state,)  # dict and slots
        attributes = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}
        if self.kind.startswith("omegaconf.") and "_content" in attributes:
            held = attributes["_content"]
            held = dict(enumerate(held)) if isinstance(held, list) else held
            held = held if isinstance(held, dict) else {}  # where a value is missing
            return {key: _omegaconf_leaf(value) for key, value in held.items()}
        # Dicts with attributes hold the same under both.
        return attributes | self.entries | dict(enumerate(self.items))


def _omegaconf_leaf(node: Any) -> Any:
    if isinstance(node, Record) and isinstance(node.state, dict):
        return node.state.get("_val", node)
    return node


# Constructors of data.


def apply(callee: Any, arguments: Any) -> Any:
    """What a pickle would get by calling a symbol: data, or a record of the wish."""
    if not isinstance(callee, Symbol | Record) or not isinstance(arguments, tuple):
        raise ValueError("a pickle that calls what is no name")
    if isinstance(callee, Symbol) and callee.make:
        return callee.make(*arguments)
    return Record(str(callee), arguments)


def _raw_bytes(data: Any = b"", _encoding: Any = None) -> bytes:
    if isinstance(data, str):  # of Python 2
        return data.encode("latin-1")
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array without data")
    return bytes(data)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """`_codecs.encode`, with which pickle protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError("text in an encoding that pickles do not use")
    return text.encode(encoding)


def _make_dict(contents: Any = ()) -> dict:
    pairs = contents.items() if isinstance(contents, dict) else contents
    return {_key(key): value for key, value in pairs}


def _key(key: Any) -> Any:
    """A key for a dict; nested tuples, whose hash recurses without bounds, become records."""
    atoms = (str, int, float, bytes, type(None), Symbol, Record)
    if all(isinstance(k, atoms) for k in (key if isinstance(key, tuple) else (key,))):
        return key
    return Record(type(key).__name__)


def _make_old_object(kind: Any, base: Any, state: Any) -> Any:
    """`copyreg._reconstructor`: an instance by pickle protocols 0 and 1."""
    made = apply(kind, ())
    if isinstance(made, Record) and isinstance(state, dict):
        made.entries = state
    elif isinstance(made, Record) and isinstance(state, list):
        made.items = state
    return made


def _dtype(record: Any) -> np.dtype | None:
    """Of the record of a NumPy dtype; None for what is not of numbers: strings, objects, fields."""
    if not isinstance(record, Record) or record.kind != "numpy.dtype":
        return None
    kind = record.arguments[0]
    dtype = _NUMPY_DTYPES.get(kind.name if isinstance(kind, Symbol) else kind)
    if dtype is None or dtype.kind == "V" or not record.state or record.state[1] != ">":
        return dtype
    return dtype.newbyteorder(">")


_NUMPY_DTYPES = {d.str[1:]: d for d in DTYPES.values() if d.kind != "V"} | DTYPES


def _make_scalar(dtype: Any, data: Any = b"") -> Any:
    of_numbers = _dtype(dtype)
    if of_numbers is None:
        return Record("numpy.generic")
    return np.frombuffer(_raw_bytes(data), of_numbers, count=1).astype(object)[0]


def _array(_version: Any, shape: Any, kind: Any, is_fortran: Any, data: Any) -> LazyTensor | None:
    """Of the state that pickles give to a NumPy array; None if it is not of numbers."""
    dtype = _dtype(kind)
    if dtype is None:
        return None
    shape, data = sizes(shape), _raw_bytes(data)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and {dtype} has {len(data)} bytes")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    native = dtype.newbyteorder("=")
    return LazyTensor(shape, native, partial(np.array, array, native, order="C"))


_MAKERS: Makers = {
    "collections.OrderedDict": _make_dict,
    "collections.defaultdict": lambda _factory=None, contents=(): _make_dict(contents),
    "collections.Counter": _make_dict,
    "collections.deque": lambda items=(), *_: list(items),
    "builtins.dict": _make_dict,
    "builtins.list": lambda items=(): list(items),
    "builtins.set": lambda items=(): list(items),
    "builtins.frozenset": lambda items=(): list(items),
    "builtins.tuple": lambda items=(): tuple(items),
    "builtins.bytes": _raw_bytes,
    "builtins.bytearray": _raw_bytes,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _make_old_object,
    "copyreg.__newobj__": lambda kind, *arguments: apply(kind, arguments),
    "numpy.core.multiarray._reconstruct": lambda *_: Record("numpy.ndarray"),
    "numpy.core.multiarray.scalar": _make_scalar,
    "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order, *_: Record(
        "numpy.ndarray", state=_array(1, shape, dtype, order == "F", data)
    ),
    **{
        f"{module}.{pure}{system}Path": lambda *parts: str(PurePosixPath(*parts))
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for system in ("", "Posix", "Windows")
    },
}
# Names of the standard library that stay symbols, and that left-overs of training mention.
_HARMLESS = {
    *(f"builtins.{kind.__name__}" for kind in (int, float, complex, bool, str, object, slice)),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"typing.{name}" for name in ("Any", "Union", "Optional", "List", "Dict", "Tuple", "Set")),
    "_operator.getitem",  # of typing.Dict[str, int]
    "argparse.Namespace",
    "types.SimpleNamespace",
    "uuid.UUID",
}


# The machine.


class _Machine:
    """Interprets one pickle."""

    def __init__(self, path: Path, makers: Makers, persistent: Callable[[Any], Any]):
        self.path = path
        self.makers = makers
        self.persistent = persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.left = MAX_PICKLE_BYTES  # what may be copied, for a pickle can repeat itself
        self.memo: dict[int, Any] = {}

    def run(self, pickled: Any) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
            if step > _MAX_STEPS:
                raise ValueError("a pickle without end")
            if opcode.name not in _OPERATIONS:
                raise self.refusal(f"has {opcode.name}")
            _OPERATIONS[opcode.name](self, argument)
        return self.stack.pop()

    def refusal(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: its pickle {what}, which is refused; the file is not only weights, get "
            "another copy"
        )

    # The stack and the memo.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self, _: Any = None) -> list[Any]:
        found, self.stack = self.stack, self.outer.pop()
        return found

    def pop(self, _: Any) -> Any:
        return self.stack.pop() if self.stack else self.since_mark()

    def put(self, index: Any) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    # Nests.

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack):
            raise ValueError("a tuple of more than there is")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Record) else target
        if not isinstance(target, list):
            raise ValueError("a pickle that appends to what is no list")
        target.extend(items)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        target = target.entries if isinstance(target, Record) else target
        if not isinstance(target, dict):
            raise ValueError("a pickle that sets entries of what is no dict")
        target.update(_pairs(flat))

    # Symbols, and what is asked of them.

    def symbol(self, module: Any, name: Any) -> Symbol:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("an import without a name")
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)  # of Python 2
        full = f"{module}.{name}"
        make = self.makers.get(full.replace("numpy._core.", "numpy.core."))
        is_standard = module.split(".")[0] in sys.stdlib_module_names
        if is_standard and make is None and full not in _HARMLESS:
            raise self.refusal(f"asks for {one_line(full)}")
        return Symbol(module, name, make)

    def call(self, callee: Any, arguments: Any) -> None:
        self.spend(arguments)
        self.push(apply(callee, arguments))

    def spend(self, parts: Any) -> None:
        """Counts what may be copied of the parts of a tuple."""
        for part in parts if isinstance(parts, tuple) else ():
            if isinstance(part, str | bytes | bytearray | list | dict | tuple):
                self.left -= len(part) * (1 if isinstance(part, str | bytes | bytearray) else 8)
        if self.left < 0:
            raise ValueError("a pickle that repeats itself beyond all use")

    def new_with_keywords(self, _: Any) -> None:
        self.stack.pop()  # nothing known here takes any
        self.call(self.stack.pop(-2), self.stack.pop())

    def object_of_mark(self, _: Any) -> None:
        callee, *arguments = self.since_mark()
        self.call(callee, tuple(arguments))

    def build(self, _: Any) -> None:
        """State is kept by records; attributes of dicts and tensors are not."""
        state, target = self.stack.pop(), self.stack[-1]
        self.spend(state)
        if isinstance(target, Record):
            target.state = _array(*state) if target.kind == "numpy.ndarray" else state


def _pairs(flat: list[Any]) -> dict:
    return {_key(k): v for k, v in zip(flat[::2], flat[1::2], strict=True)}


_PUSHES_ARGUMENT = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_PUSHES_ARGUMENT, _Machine.push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.push([])),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.since_mark,
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "BINPERSID": lambda m, _: m.push(m.persistent(m.stack.pop())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "DICT": lambda m, _: m.push(_pairs(m.since_mark())),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda m, _: m.push(m.since_mark())),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.append(m.since_mark())),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, names: m.push(m.symbol(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(m.symbol(m.stack.pop(-2), m.stack.pop())),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call(m.stack.pop(-2), m.stack.pop())),
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "INST": lambda m, names: m.call(m.symbol(*names.split(" ", 1)), tuple(m.since_mark())),
    "OBJ": _Machine.object_of_mark,
    "BUILD": _Machine.build,
}
