"""Keys and values of past positions, kept while codes are sampled one by one.

The arrays have their final length from the start, so that every step has the same shapes and one
compiled loop updates them in place. Positions are the last but one axis: on a CPU, XLA's batched
products over `b n s d` are several times faster than over `b s n d`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """The cache of one attention layer."""

    keys: Float[Array, "b n s d"]
    values: Float[Array, "b n s d"]

    @classmethod
    def init(cls, shape: tuple[int, int, int, int], dtype: str) -> "KVCache":
        """An empty cache for `(batch, heads, positions, head_dim)`."""
        zeros = jnp.zeros(shape, jnp.dtype(dtype))
        return cls(keys=zeros, values=zeros)

    def write(
        self,
        keys: Float[Array, "b n m d"],
        values: Float[Array, "b n m d"],
        position: Int[Array, ""],
    ) -> "KVCache":
        """This cache with the keys and values of `m` positions put in, the first at `position`."""
        start = (0, 0, position, 0)
        return KVCache(
            keys=jax.lax.dynamic_update_slice(self.keys, keys, start),
            values=jax.lax.dynamic_update_slice(self.values, values, start),
        )

    def mask(self, position: Int[Array, ""], queries: int) -> Bool[Array, "{queries} s"]:
        """Which slots each of the queries from `position` on sees: those up to and with its own."""
        own = position + jnp.arange(queries)[:, None]
        return jnp.arange(self.keys.shape[2])[None] <= own
