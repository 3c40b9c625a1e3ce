"""Drawing codes from logits: temperature, top-k, top-p, guidance, and the loop over positions.

The filters search their threshold by halving, without a sort: on a CPU that is ten times faster,
and `k` and `p` stay ordinary traced numbers, so that other values do not compile anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from vqgan.errors import InputError

Cache = TypeVar("Cache")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are drawn. None leaves a filter, or guidance, out of the program."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    guidance: Float[Array, ""] | None

    @classmethod
    def of(cls, *, temperature: Any, top_k: Any, top_p: Any, guidance: Any) -> "Sampling":
        """Numbers as traced scalars. Guidance by exactly the Python number 1 is left out.

        Raises:
          InputError: a number known now is out of its range.
        """
        if is_known(temperature) and not temperature >= 0:
            raise InputError(f"temperature {temperature}: must be 0 (greedy) or more")
        if top_k is not None and is_known(top_k) and not top_k >= 1:
            raise InputError(f"top_k {top_k}: must be at least 1, or None for all codes")
        if top_p is not None and is_known(top_p) and not 0 < top_p <= 1:
            raise InputError(f"top_p {top_p}: must be in (0, 1], or None for all codes")
        plain = isinstance(guidance, int | float) and guidance == 1
        return cls(
            temperature=jnp.asarray(temperature, jnp.float32),
            top_k=None if top_k is None else jnp.asarray(top_k, jnp.int32),
            top_p=None if top_p is None else jnp.asarray(top_p, jnp.float32),
            guidance=None if plain else jnp.asarray(guidance, jnp.float32),
        )


def is_known(value: Any) -> bool:
    """Whether a value can be looked at now, rather than being traced by a caller's jit."""
    return not isinstance(value, jax.core.Tracer)


def autoregressive(
    step: Callable[[Float[Array, "n d"], Int[Array, ""], Cache], tuple[Array, Cache]],
    embed: Callable[[Int[Array, "n"]], Float[Array, "n d"]],
    start: Float[Array, "n d"],
    cache: Cache,
    *,
    length: int,
    sampling: Sampling,
    rng: Key[Array, ""],
) -> Int[Array, "b {length}"]:
    """Draws `length` codes one after the other, as one compiled loop.

    Args:
      step: the input of a position, the position and the cache to logits and the cache.
      embed: a code to the input of the next position.
      start: input of position 0; under guidance a batch of twice the size, the conditional half
        first.
      rng: position i draws with `fold_in(rng, i)`.
    """

    def body(carry, position):
        logits, cache = step(carry[0], position, carry[1])
        if sampling.guidance is not None:
            logits = guide(logits, sampling.guidance)
        ids = draw(logits, sampling, jax.random.fold_in(rng, position))
        fed = ids if sampling.guidance is None else jnp.concatenate([ids, ids])
        return (embed(fed), cache), ids

    _, ids = jax.lax.scan(body, (start, cache), jnp.arange(length))
    return ids.T


def guide(logits: Float[Array, "b2 k"], scale: Float[Array, ""]) -> Float[Array, "b k"]:
    """Classifier-free guidance (arXiv:2207.12598): unconditional + scale * difference.

    Args:
      logits: of the conditional half, then of the unconditional half of a doubled batch.
      scale: 1 is plain conditional, 0 unconditional sampling; usually 1.5 to 4.
    """
    conditional, unconditional = jnp.split(logits, 2)
    return unconditional + scale * (conditional - unconditional)


def draw(logits: Float[Array, "b k"], sampling: Sampling, key: Key[Array, ""]) -> Int[Array, "b"]:
    """One code a row: temperature first, then top-k, then top-p of what is left."""
    positive = sampling.temperature > 0
    filtered = logits / jnp.where(positive, sampling.temperature, 1.0)
    if sampling.top_k is not None:
        filtered = keep_top_k(filtered, sampling.top_k)
    if sampling.top_p is not None:
        filtered = keep_top_p(filtered, sampling.top_p)
    return jnp.where(positive, categorical(filtered, key), jnp.argmax(logits, axis=-1))


def keep_top_k(logits: Float[Array, "b k"], count: Int[Array, ""]) -> Float[Array, "b k"]:
    """The `count` largest logits of each row and all ties with the last of them; -inf elsewhere."""
    kept = _heaviest(logits, jnp.ones_like(logits), count.astype(logits.dtype))
    return jnp.where(kept, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "b k"], mass: Float[Array, ""]) -> Float[Array, "b k"]:
    """The smallest set of largest logits, ties included, of at least `mass` probability.

    Nucleus sampling (arXiv:1904.09751). The largest logit is always kept.
    """
    # In float32 part of the codes can already weigh 1, which still means all of them.
    kept = _heaviest(logits, jax.nn.softmax(logits), mass) | (mass >= 1)
    return jnp.where(kept, logits, -jnp.inf)


def _heaviest(
    values: Float[Array, "b k"], weights: Float[Array, "b k"], target: Float[Array, ""]
) -> Bool[Array, "b k"]:
    """Marks values at or above the highest threshold that leaves a total weight of `target`.

    Finds the threshold exactly, bit by bit from the highest; marks all where the total falls short.
    """
    codes = _ordered_bits(values)

    def set_bit(bit, threshold):
        trial = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(codes >= trial[:, None], weights, 0.0), axis=-1)
        return jnp.where(weight >= target, trial, threshold)

    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(len(values), jnp.uint32))
    return codes >= threshold[:, None]


def _ordered_bits(values: Float[Array, "b k"]) -> UInt32[Array, "b k"]:
    """Integers in the order of the floats: IEEE bits, all flipped below zero, the sign above."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def categorical(logits: Float[Array, "b k"], key: Key[Array, ""]) -> Int[Array, "b"]:
    """A draw a row from softmax(logits), by inverting the cumulative distribution.

    One random number a row, where Gumbel noise needs one a logit. A parallel cumulative sum may
    fall by a rounding error where the probability is 0, so that those are excluded by name.
    """
    probabilities = jax.nn.softmax(logits)
    possible = probabilities > 0
    cumulative = jnp.cumsum(probabilities, axis=-1)
    total = jnp.max(jnp.where(possible, cumulative, 0.0), axis=-1, keepdims=True)
    point = total * jax.random.uniform(key, (len(logits), 1))
    return jnp.argmax((cumulative > point) & possible, axis=-1).astype(jnp.int32)
