"""Looking after a table of codes: onto data at the first batch, and back to life when unused."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vqgan.tokenizer.quantizers.chunked import nearest


def counted(ids: Int[Array, "b h w"], k: int) -> Float[Array, " k"]:
    """How often each of k ids occurs; over all devices, as any sum of the program."""
    return jnp.zeros((k,), jnp.float32).at[ids.ravel()].add(1.0)


def chosen(latents: Float[Array, "n d"], k: int, key: Key[Array, ""]) -> Float[Array, "k d"]:
    """k of the latents in random order, each once before any comes again."""
    order = jax.random.permutation(key, len(latents))
    return latents[order[jnp.arange(k) % len(latents)]]


def dead_codes(
    used: Bool[Array, " k"],
    unused_before: Int[Array, " k"],
    first: Bool[Array, ""],
    *,
    init_from_data: bool,
    revive_after: int,
) -> tuple[Bool[Array, " k"], Int[Array, " k"]]:
    """Which codes are to move, and for how many batches each has gone unused then.

    All of them move at the first batch where `init_from_data`, and those that none of the last
    `revive_after` batches used, where that is above 0.
    """
    unused = jnp.where(used, 0, unused_before + 1)
    dead = jnp.zeros_like(used)
    if revive_after > 0:
        dead = unused >= revive_after
    if init_from_data:
        dead = dead | first
    return dead, jnp.where(dead, 0, unused)


def k_means(
    latents: Float[Array, "n d"], centres: Float[Array, "k d"], iterations: int, chunk: int
) -> Float[Array, "k d"]:
    """Lloyd's iterations: each centre moves to the mean of the latents it is nearest to.

    A centre that is nearest to none stays.
    """

    def improve(_: Array, centres: Array) -> Array:
        ids = nearest(latents[None, None], centres, chunk).ravel()
        counts = counted(ids[None, None], len(centres))[:, None]
        sums = jnp.zeros_like(centres).at[ids].add(latents)
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), centres)

    return jax.lax.fori_loop(0, iterations, improve, centres)
