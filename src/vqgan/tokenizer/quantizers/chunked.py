"""Sums and searches over a codebook a chunk at a time: memory is bounded by the chunk, not by the
number of codes.

Up to `chunk` codes everything is one matrix product, as if this file did not exist. More are taken
in turn by a scan, which holds `bhw x chunk` floats, and which the backward pass runs again instead
of keeping what it held. Results differ by rounding alone.

Sums over the probabilities of all codes take two passes: `choose` finds the normaliser of each
position, a constant to `add_up`. The gradient through it is the sum's slope there times the
gradient of the probabilities' mass, 1 in value, which are added up too, and `normalised` puts it
back. So no pass goes backwards but the second, and the gradient of a table is held once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T", bound=Array)

# Of codes that only fill up the last chunk. Finite: 0 · -inf is not a number.
_HIDDEN = -1e30


def scores(z: Float[Array, "b h w d"], rows: Float[Array, "k d"]) -> Float[Array, "b h w k"]:
    """Inner products in the full precision of float32, which the choice of a code needs."""
    return jnp.einsum("bhwd,kd->bhwk", z, rows, precision=jax.lax.Precision.HIGHEST)


def weighted_mean(p: Float[Array, "b h w k"], rows: Float[Array, "k d"]) -> Float[Array, "b h w d"]:
    """Sum of the rows by their probabilities: their share of the mean of all."""
    return jnp.einsum("bhwk,kd->bhwd", p, rows, precision=jax.lax.Precision.HIGHEST)


def nearest(
    z: Float[Array, "b h w d"], table: Float[Array, "k d"], chunk: int
) -> Int[Array, "b h w"]:
    """Rows of the table that are nearest; the first among equals. Without a gradient."""
    z, table = jax.lax.stop_gradient((z, table))

    def body(best: Any, ids: Array, valid: Array | None, rows: Array) -> Any:
        # |z|² is the same for all codes and left out.
        norms = jnp.sum(jnp.square(rows), axis=-1)[None, None, None]
        return _better(best, ids, hide(2 * scores(z, rows) - norms, valid))

    return fold(body, _no_choice(z), [table], chunk)[1]


def choose(
    views: Callable[..., Sequence[Float[Array, "b h w c"]]],
    like: Float[Array, "b h w d"],
    tables: Sequence[Float[Array, "k ..."]],
    chunk: int,
) -> tuple[Int[Array, "b h w"], list[Float[Array, "b h w"]]]:
    """The code of the largest logit, and logarithms of sums of exponentials over all codes.

    Without a gradient: see `normalised`.

    Args:
      views: of (ids of a chunk, its rows of each table), several logits of these codes: the first
        for the choice, each of the others for a sum.
      like: any array over the positions.
    """
    like, *tables = jax.lax.stop_gradient((like, *tables))
    zero = like[..., 0] * 0.0
    first = jnp.arange(min(chunk, len(tables[0])))
    count = len(jax.eval_shape(views, first, *(table[: len(first)] for table in tables))) - 1

    def body(carry: Any, ids: Array, valid: Array | None, *rows: Array) -> Any:
        best, totals = carry
        choice, *others = (hide(view, valid) for view in views(ids, *rows))
        parts = (jax.nn.logsumexp(view, axis=-1) for view in others)
        totals = [jnp.logaddexp(a, b) for a, b in zip(totals, parts, strict=True)]
        return _better(best, ids, choice), totals

    start = (_no_choice(like), [zero + _HIDDEN] * count)
    (_, ids), totals = jax.lax.stop_gradient(fold(body, start, tables, chunk))
    return ids, totals


def add_up(
    parts: Callable[..., dict[str, Array]],
    views: Callable[..., Sequence[Float[Array, "b h w c"]]],
    totals: Sequence[Float[Array, "b h w"]],
    tables: Sequence[Float[Array, "k ..."]],
    chunk: int,
) -> dict[str, Array]:
    """Sums over all codes, by name.

    Args:
      parts: of (the logarithms of some codes' probabilities, an array a total; their rows of each
        table), the sums over these codes.
      views: as of `choose`, but of rows of these tables.
      totals: what `choose` found. Constants here: see `normalised`.
    """

    def found(ids: Array, valid: Array | None, *rows: Array) -> dict[str, Array]:
        _, *logits = views(ids, *rows)
        log_p = [hide(x, valid) - t[..., None] for x, t in zip(logits, totals, strict=True)]
        return parts(log_p, *rows)

    def body(sums: dict[str, Array], *of_chunk: Any) -> dict[str, Array]:
        return jax.tree.map(jnp.add, sums, found(*of_chunk))

    first = jnp.arange(min(chunk, len(tables[0])))
    like = jax.eval_shape(found, first, None, *(table[: len(first)] for table in tables))
    return fold(body, jax.tree.map(jnp.zeros_like, like), tables, chunk)


def with_slope(
    term: Callable[[Float[Array, "b h w c"]], T], log_p: Float[Array, "b h w c"]
) -> tuple[T, Float[Array, "b h w"]]:
    """A sum over some codes, by position or over all, and its slope: its derivative by position
    where the logarithms of all probabilities there grow alike. A mean of rows is its own slope."""
    total, pullback = jax.vjp(term, log_p)
    return total, jnp.sum(pullback(jnp.ones_like(total))[0], axis=-1)


def normalised(
    total: Float[Array, "b h w *d"],
    slope: Float[Array, "b h w *d"],
    mass: Float[Array, "b h w *#d"],
) -> Float[Array, "b h w *d"]:
    """`total` in value, with the gradient through the normaliser of the probabilities in it.

    Args:
      total: a sum over all codes, in whose `log_p` the totals of `choose` were constants.
      slope: of that sum.
      mass: sum of the probabilities over all codes, with its gradient.
    """
    return total - jax.lax.stop_gradient(slope) * (mass - jax.lax.stop_gradient(mass))


def fold(
    body: Callable[..., Any],
    start: Any,
    tables: Sequence[Float[Array, "k ..."]],
    chunk: int,
) -> Any:
    """`carry = body(carry, ids, valid, *rows)` over chunks of equally long tables.

    `ids` are the numbers of the rows. `valid` says which of them exist, and is None where all do.
    """
    k = len(tables[0])
    chunks = math.ceil(k / chunk)
    if chunks == 1:
        return body(start, jnp.arange(k, dtype=jnp.int32), None, *tables)
    size = math.ceil(k / chunks)
    fill = chunks * size - k
    ids = jnp.arange(chunks * size, dtype=jnp.int32).reshape(chunks, size)
    parts = []
    for table in tables:
        if fill:
            table = jnp.pad(table, [(0, fill)] + [(0, 0)] * (table.ndim - 1))
        parts.append(table.reshape(chunks, size, *table.shape[1:]))

    def step(carry: Any, part: Any) -> tuple[Any, None]:
        ids, *rows = part
        return body(carry, ids, ids < k if fill else None, *rows), None

    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, (ids, *parts))[0]


def hide(view: Float[Array, "b h w c"], valid: Bool[Array, " c"] | None) -> Float[Array, "b h w c"]:
    """Logits in which codes that do not exist have no share."""
    return view if valid is None else jnp.where(valid[None, None, None], view, _HIDDEN)


def _no_choice(z: Float[Array, "b h w d"]) -> tuple[Float[Array, "b h w"], Int[Array, "b h w"]]:
    return jnp.full(z.shape[:3], -jnp.inf), jnp.zeros(z.shape[:3], jnp.int32)


def _better(best: Any, ids: Int[Array, " c"], view: Float[Array, "b h w c"]) -> Any:
    """The best so far and its id; what came first stays among equals."""
    top, at = jnp.max(view, axis=-1), ids[jnp.argmax(view, axis=-1)]
    return jnp.maximum(best[0], top), jnp.where(top > best[0], at, best[1])
