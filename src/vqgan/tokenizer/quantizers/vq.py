"""Vector quantisation with a learned codebook (van den Oord et al. 2017, arXiv:1711.00937).

    ids = argmin_k |z - e_k|²        z_q = z + stop_gradient(e_ids - z)
    loss = |e_ids - stop_gradient(z)|² + beta |stop_gradient(e_ids) - z|²  (means over entries)

Latents `[b, h, w, d]`, codebook `[k, d]`, ids `[b, h, w]`. The search costs one `[bhw, d] x [d,
k]` product and holds `bhw x k` floats. Its known weakness is that codes which no latent is
nearest to get no gradient and stay unused. Two remedies are built in: the codebook starts from
latents of the first batch, and a code that was the nearest for none of the last `revive_after`
batches is moved onto a latent of the current one (random restarts, as in Jukebox,
arXiv:2005.00341).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.tokenizer.quantizers.base import CodebookStat, Quantizer, QuantizerOutput


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Vector quantizer. The defaults are the paper's."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = 1024
    dim: int = 256
    beta: float = 0.25
    """Weight of the term that `beta_on` names; the other one has weight 1."""
    beta_on: Literal["commitment", "codebook"] = "commitment"
    """"codebook" is the swapped form that all published taming weights were trained with."""
    init_from_data: bool = True
    """Start from latents of the first batch, not from U(-1/k, 1/k)."""
    revive_after: int = 100
    """Batches that a code may go unused before it is moved; 0 never moves any."""


class VectorQuantizer(Quantizer):
    """Nearest-neighbour quantizer."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size = k = config.codebook_size
        self.codebook = nnx.Param(
            jax.random.uniform(rngs.params(), (k, config.dim), minval=-1 / k, maxval=1 / k)
        )
        self.batches_unused = CodebookStat(jnp.zeros((k,), jnp.int32))
        self.batches_seen = CodebookStat(jnp.zeros((), jnp.int32))

    def __call__(self, z: Float[Array, "b h w d"]) -> QuantizerOutput:
        z = z.astype(jnp.float32)
        ids = self.nearest(jax.lax.stop_gradient(z))
        codes = self.codes(ids)
        commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z))
        codebook = jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z)))
        if self.config.beta_on == "commitment":
            commitment = self.config.beta * commitment
        else:
            codebook = self.config.beta * codebook
        return QuantizerOutput(
            z_q=_straight_through(z, codes),
            ids=ids,
            losses={"commitment": commitment, "codebook": codebook},
        )

    def nearest(self, z: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """Ids of the nearest codes; the lowest id among equals."""
        codebook = jax.lax.stop_gradient(self.codebook[...])
        # |z|² is the same for all codes and left out.
        products = jnp.einsum("bhwd,kd->bhwk", z, codebook, precision=jax.lax.Precision.HIGHEST)
        norms = jnp.sum(jnp.square(codebook), axis=-1).reshape(1, 1, 1, -1)
        return jnp.argmin(norms - 2 * products, axis=-1).astype(jnp.int32)

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return self.codebook[...][ids]

    def maintain(
        self, z: Float[Array, "b h w d"], ids: Int[Array, "b h w"], key: Key[Array, ""]
    ) -> None:
        k = self.codebook_size
        used = jnp.zeros((k,), bool).at[ids.ravel()].set(True)
        unused = jnp.where(used, 0, self.batches_unused[...] + 1)
        dead = jnp.zeros((k,), bool)
        if self.config.revive_after > 0:
            dead = unused >= self.config.revive_after
        if self.config.init_from_data:
            dead = dead | (self.batches_seen[...] == 0)
        latents = z.astype(jnp.float32).reshape(-1, z.shape[-1])
        chosen = jax.random.permutation(key, len(latents))[jnp.arange(k) % len(latents)]
        moved = jnp.where(dead[:, None], latents[chosen], self.codebook[...])
        self.codebook[...] = jax.lax.stop_gradient(moved)
        self.batches_unused[...] = jnp.where(dead, 0, unused)
        self.batches_seen[...] += 1

    def statistics(self, ids: Int[Array, "b h w"]) -> dict[str, Float[Array, ""]]:
        counts = jnp.zeros((self.codebook_size,), jnp.float32).at[ids.ravel()].add(1.0)
        p = counts / jnp.sum(counts)
        entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)))
        return {"usage": jnp.mean(counts > 0), "perplexity": jnp.exp(entropy)}


def _straight_through(z: Array, codes: Array) -> Array:
    """`codes` in value, exactly, and the identity on `z` in gradient (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(codes) + (z - jax.lax.stop_gradient(z))
