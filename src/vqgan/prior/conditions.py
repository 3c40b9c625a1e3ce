"""What a prior is told before the first code, as rows of its `condition` embedding.

A class is one row, that of its number. The codes of another tokenizer, say of a depth map, are one
row each, in raster order. The null class, which stands for no condition, is the row after the last
class.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from vqgan.errors import InputError
from vqgan.prior.sampling import is_known

# A class an image, or a grid of codes an image.
Condition = Int[Array, "b"] | Int[Array, "b y x"]


@dataclass(frozen=True, kw_only=True)
class CodePrefix:
    """Codes of another tokenizer as the condition."""

    codebook_size: int
    grid: tuple[int, int]
    """Rows and columns of its code grid."""

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    def check(self) -> None:
        """Raises InputError for a size that is not positive."""
        sizes = (self.codebook_size, *self.grid)
        if min(sizes) < 1:
            raise InputError(f"prior: every size of the prefix must be positive, not {sizes}")


def prefix_rows(condition: Array | None, batch: int, prefix: CodePrefix) -> Int[Array, "b p"]:
    """Rows of a batch of code grids. Raises InputError where one is missing or does not fit."""
    rows, columns = prefix.grid
    if condition is None:
        raise InputError(f"no condition: this prior needs a {rows} by {columns} grid of codes")
    _check_shape(condition, (batch, rows, columns), "a grid of codes an image")
    check_range("condition code", condition, prefix.codebook_size)
    return jnp.asarray(condition, jnp.int32).reshape(batch, -1)


def class_rows(
    condition: Array | None, batch: int, num_classes: int, null_class: bool
) -> Int[Array, "b 1"]:
    """Rows of a batch of classes, or of none. Raises InputError where there is no such row."""
    if condition is None:
        if not null_class:
            raise InputError("no condition: this prior has no null class, give a class an image")
        return jnp.full((batch, 1), num_classes, jnp.int32)
    if num_classes == 0:
        raise InputError("a condition: this prior is unconditional, leave it out")
    _check_shape(condition, (batch,), "a class an image")
    check_range("class", condition, num_classes)
    return jnp.asarray(condition, jnp.int32)[:, None]


def drop_classes(
    rows: Int[Array, "b 1"], null: int, rate: float, key: Key[Array, ""]
) -> Int[Array, "b 1"]:
    """Rows of classes, at this rate replaced by the null class."""
    return jnp.where(jax.random.bernoulli(key, rate, rows.shape), null, rows)


def check_range(name: str, values: Any, limit: int) -> None:
    """Raises InputError for a value outside [0, limit), where this process holds the values now."""
    if not is_known(values) or not getattr(values, "is_fully_addressable", True):
        return
    values = np.asarray(values)
    wrong = values[(values < 0) | (values >= limit)]
    if wrong.size:
        raise InputError(f"{name} {wrong[0]}: this prior has {limit}, 0 to {limit - 1}")


def _check_shape(condition: Array, expected: tuple[int, ...], meaning: str) -> None:
    if condition.shape != expected:
        raise InputError(f"condition of shape {condition.shape}: {expected}, {meaning}, is needed")
