"""Names and layouts: what a tensor of ours is called in a published file, and how it lies there.

A format is a table with an entry for every variable of a model. Reading and writing go by the same
table, and account for every tensor both ways: what is missing, what is left over and what has
another shape is reported together, in one error.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqgan.convert.containers import LazyTensor
from vqgan.errors import InputError
from vqgan.tokenizer.quantizers import CodebookStat

M = TypeVar("M", bound=nnx.Module)
Found = Mapping[str, LazyTensor]
"""What a file holds, by its own names."""
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]
"""Regular expressions, and what takes the place of what they match."""


@dataclass(frozen=True)
class Layout:
    """How one variable of ours is made of one or more tensors of theirs, and back."""

    to_ours: Callable[..., np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray] | None = None
    """None for what is only ever read."""


SAME = Layout(lambda x: x, lambda x: x)
# Kernels: PyTorch has outputs first, Flax last.
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
# A linear layer that is a 1x1 convolution here.
CONV_OF_LINEAR = Layout(lambda x: x.T[None, None], lambda x: x[0, 0].T)
# A 1x1 convolution that is a table here, a row an output.
TABLE_OF_CONV = Layout(lambda x: x[:, :, 0, 0], lambda x: x[:, :, None, None])
# PyTorch counts in 64 bits.
INDICES = Layout(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64))


def torch_layout(name: str, shape: Sequence[int]) -> Layout:
    """The layout in which PyTorch keeps the variable of this name and shape of ours."""
    if name.endswith("kernel"):
        return {4: CONV, 2: LINEAR}[len(shape)]
    return SAME


@dataclass(frozen=True)
class Entry:
    """Where a variable of ours lies in a published file."""

    theirs: tuple[str, ...]
    layout: Layout = SAME


Table = dict[str, Entry]


def shape_of(found: Found, name: str, rank: int, *, where: str) -> tuple[int, ...]:
    """The shape of a tensor that tells of an architecture.

    Raises:
      InputError: it is missing, or has another number of axes, or nothing in it.
    """
    if name not in found:
        raise InputError(f"{where}: {name} is missing")
    shape = found[name].shape
    if len(shape) != rank or not all(shape):
        raise InputError(f"{where}: {name} has shape {shape}, not one of {rank} numbers")
    return shape


def count(found: Found, pattern: str) -> int:
    """How many there are of what is numbered: one more than the largest number in any name.

    The expression has a group where the number stands.
    """
    matches = (re.match(pattern, name) for name in found)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def renamed(name: str, rules: Rules) -> str:
    """A name after all rules, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def torch_table(module: nnx.Module, rules: Rules) -> Table:
    """The table of a module whose PyTorch names follow from ours by the rules.

    What a quantizer counts while it trains has no entry: published formats do not have it.
    """
    entries: Table = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name = ".".join(map(str, path))
        if path[-1] == "used":
            entries[name] = Entry((renamed(name, rules),), INDICES)
        elif not isinstance(variable, CodebookStat):
            layout = torch_layout(name, variable.shape)
            entries[name] = Entry((renamed(name, rules),), layout)
    return entries


def read(
    abstract: M,
    table: Table,
    found: Found,
    *,
    where: str,
    ignore: Sequence[str] = (),
    defaults: Mapping[str, np.ndarray] | None = None,
) -> M:
    """A module made by `nnx.eval_shape`, filled from a file, one tensor in memory at a time.

    Args:
      table: by our names. A quantizer's counts may be absent, and start at zero; every other
        variable must be here or in `defaults`.
      ignore: regular expressions for whole names in the file that are not weights of this model.
      defaults: values of variables that the format does not have, by our names.

    Raises:
      InputError: naming every tensor that is missing, left over or of another shape.
    """
    graphdef, state = nnx.split(abstract)
    problems: list[str] = []
    filled = []
    used: set[str] = set()
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if defaults and name in defaults:
            value = defaults[name]
        elif name not in table and isinstance(variable, CodebookStat):
            value = np.zeros(variable.shape)
        else:
            entry = table[name]
            used.update(entry.theirs)
            value, problem = _value(entry, found, variable.shape)
            if problem:
                problems.append(problem)
                continue
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    problems = list(dict.fromkeys(problems))  # a fused tensor is asked for more than once
    problems += [f"{name} is unexpected" for name in left_over(found, used, ignore)]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def left_over(found: Mapping[str, Any], used: set[str], ignore: Sequence[str]) -> list[str]:
    """Names in a file that nothing used and no expression excuses, in order."""
    excused = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    return [name for name in sorted(found.keys() - used) if not excused.fullmatch(name)]


def _value(entry: Entry, found: Found, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """The value of a variable of ours, or nothing and what is wrong with it."""
    nothing = np.zeros(0)
    if missing := [name for name in entry.theirs if name not in found]:
        return nothing, "; ".join(f"{name} is missing" for name in missing)
    names = " and ".join(entry.theirs)
    seen = " and ".join(str(found[name].shape) for name in entry.theirs)
    expected = ""
    if entry.layout.to_theirs is not None and len(entry.theirs) == 1:
        # Known before anything is read: the shape of a stand-in that takes no memory.
        wanted = entry.layout.to_theirs(np.broadcast_to(np.float32(0), shape)).shape
        expected = f", not {wanted}"
        if found[entry.theirs[0]].shape != wanted:
            return nothing, f"{names} has shape {seen}{expected}"
    try:
        value = entry.layout.to_ours(*(found[name].read() for name in entry.theirs))
    except (ValueError, IndexError) as error:
        return nothing, f"{names} has shape {seen}, which does not fit ({error})"
    if value.shape != shape:
        return nothing, f"{names} has shape {seen}, which makes {value.shape} instead of {shape}"
    return value, ""


def write(module: nnx.Module, table: Table) -> dict[str, np.ndarray]:
    """The tensors of a published file, by its names, from a module of ours.

    Variables without an entry are left out: the format does not have them.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        entry = table.get(".".join(map(str, path)))
        if entry is not None:
            assert entry.layout.to_theirs is not None and len(entry.theirs) == 1
            value = entry.layout.to_theirs(np.asarray(variable[...]))
            tensors[entry.theirs[0]] = np.ascontiguousarray(value)
    return tensors
