"""Vector quantisation with a codebook of moving averages (van den Oord et al. 2017,
arXiv:1711.00937, appendix A.1; Razavi et al. 2019, arXiv:1906.00446).

    ids = argmin_k |z - e_k|²        z_q = z + stop_gradient(e_ids - z)
    loss = beta |stop_gradient(e_ids) - z|²  (mean over entries)

After every update, with n_k the latents of the batch nearest to code k, and s_k their sum:

    N_k = decay N_k + (1 - decay) n_k        m_k = decay m_k + (1 - decay) s_k
    e_k = m_k / N'_k,        N'_k = (N_k + epsilon) / (N + K epsilon) · N,        N = sum_k N_k

Latents `[b, h, w, d]`, codebook and sums `[k, d]`, counts `[k]`, ids `[b, h, w]`. This is k-means
on a moving window: codes follow the latents at a pace of their own, whatever the optimiser and its
learning rate. It costs a second table, and one sum over the batch instead of a gradient. Neither
table nor counts are parameters: no optimiser moves them, and no average of the weights lags behind
them. Counts start at 1 and sums at the codes, so that nothing jumps at the first update. The
smoothing by epsilon draws a code that goes unused slowly to the origin; `revive_after` moves it
onto a latent, as in vq.py. Sums are over the batch of all devices.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.errors import InputError
from vqgan.tokenizer.quantizers.base import (
    CodebookStat,
    Quantizer,
    QuantizerOutput,
    check_positive,
    straight_through,
)
from vqgan.tokenizer.quantizers.care import chosen, counted, dead_codes
from vqgan.tokenizer.quantizers.chunked import nearest


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Vector quantizer with a codebook of moving averages."""

    kind: Literal["ema"] = "ema"
    codebook_size: int = 1024
    """Codes in the table."""
    dim: int = 256
    beta: float = 0.25
    """Weight of the loss, which moves latents to their codes."""
    decay: float = 0.99
    """Of counts and sums, a batch."""
    epsilon: float = 1e-5
    """Laplace smoothing of the counts."""
    init_from_data: bool = True
    """Start from latents of the first batch, not from U(-1/k, 1/k)."""
    revive_after: int = 100
    """Batches that a code may go unused before it is moved; 0 never moves any."""
    chunk: int = 8192
    """Codes compared at once; more are searched in turns, for a memory of `bhw x chunk` floats."""

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_positive(self, "codebook_size", "dim", "chunk", "epsilon")
        if not 0 <= self.decay < 1:
            raise InputError(f"quantizer.decay {self.decay}: must be at least 0 and below 1")


class EMAQuantizer(Quantizer):
    """Nearest-neighbour quantizer whose codes are means of latents. The gradient of `z_q` goes
    straight through to the latents."""

    def __init__(self, config: EMAConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size = k = config.codebook_size
        codes = jax.random.uniform(rngs.params(), (k, config.dim), minval=-1 / k, maxval=1 / k)
        self.codebook = CodebookStat(codes)
        self.sums = CodebookStat(codes)
        self.counts = CodebookStat(jnp.ones((k,)))
        self.batches_unused = CodebookStat(jnp.zeros((k,), jnp.int32))
        self.batches_seen = CodebookStat(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        z, codebook = z.astype(jnp.float32), jax.lax.stop_gradient(self.codebook[...])
        ids = nearest(z, codebook, self.config.chunk)
        codes = codebook[ids]
        loss = self.config.beta * jnp.mean(jnp.square(codes - z))
        return QuantizerOutput(z_q=straight_through(z, codes), ids=ids, losses={"commitment": loss})

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return self.codebook[...][ids]

    def maintain(
        self, z: Float[Array, "b h w d"], ids: Int[Array, "b h w"], key: Key[Array, ""]
    ) -> None:
        config, k = self.config, self.config.codebook_size
        latents = jax.lax.stop_gradient(z.astype(jnp.float32)).reshape(-1, config.dim)
        found = counted(ids, k)
        counts = config.decay * self.counts[...] + (1 - config.decay) * found
        sums = config.decay * self.sums[...]
        sums = sums.at[ids.ravel()].add((1 - config.decay) * latents)

        dead, self.batches_unused[...] = dead_codes(
            found > 0,
            self.batches_unused[...],
            self.batches_seen[...] == 0,
            init_from_data=config.init_from_data,
            revive_after=config.revive_after,
        )
        # A code that moves begins again, with the latent it moves onto as its only one.
        self.counts[...] = counts = jnp.where(dead, 1.0, counts)
        self.sums[...] = sums = jnp.where(dead[:, None], chosen(latents, k, key), sums)
        total = jnp.sum(counts)
        smooth = (counts + config.epsilon) / (total + k * config.epsilon) * total
        self.codebook[...] = jnp.where(dead[:, None], sums, sums / smooth[:, None])
        self.batches_seen[...] += 1
