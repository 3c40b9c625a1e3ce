"""Vector quantisation with a codebook that a linear layer makes, SimVQ (Zhu et al. 2024,
arXiv:2411.02038).

    E = C W,  C fixed, C_ij ~ N(0, 1/d)        ids = argmin_k |z - E_k|²
    z_q = z + stop_gradient(E_ids - z)
    loss = |E_ids - stop_gradient(z)|² + beta |stop_gradient(E_ids) - z|²  (means over entries)

Latents `[b, h, w, d]`, fixed table C `[k, d]`, layer W `[d, d]`, ids `[b, h, w]`. Only W learns,
and with it all codes move at once, chosen or not: none falls behind and dies, with codebooks of
65,536 and more, and without any care for dead codes. In exchange the codes are a random cloud up to
a linear map. It costs one `[k, d] x [d, d]` product a call, and another table in memory.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.tokenizer.quantizers.base import (
    CodebookStat,
    Quantizer,
    QuantizerOutput,
    check_positive,
    rotated,
    straight_through,
)
from vqgan.tokenizer.quantizers.chunked import nearest


@dataclass(frozen=True, kw_only=True)
class SimVQConfig:
    """Vector quantizer with a linear layer before a fixed random table."""

    kind: Literal["simvq"] = "simvq"
    codebook_size: int = 65536
    """Codes in the table."""
    dim: int = 128
    beta: float = 0.25
    """Weight of the loss that moves latents to their codes; the one that moves the layer has 1."""
    rotation: bool = False
    """Turn the gradient of `z_q` as the code is turned from its latent (see vq.py)."""
    chunk: int = 8192
    """Codes compared at once; more are searched in turns, for a memory of `bhw x chunk` floats."""

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_positive(self, "codebook_size", "dim", "chunk")


class SimVectorQuantizer(Quantizer):
    """Nearest-neighbour quantizer among linear images of fixed codes. The gradient of `z_q` goes
    straight through to the latents, or turned by `rotation`."""

    def __init__(self, config: SimVQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size, d = config.codebook_size, config.dim
        table = jax.random.normal(rngs.params(), (self.codebook_size, d)) / math.sqrt(d)
        self.table = CodebookStat(table)
        bound = 1 / math.sqrt(d)
        self.layer = nnx.Param(
            jax.random.uniform(rngs.params(), (d, d), minval=-bound, maxval=bound)
        )

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        z, codebook = z.astype(jnp.float32), self._codebook()
        ids = nearest(z, codebook, self.config.chunk)
        codes, constant = codebook[ids], jax.lax.stop_gradient
        commitment = self.config.beta * jnp.mean(jnp.square(constant(codes) - z))
        return QuantizerOutput(
            z_q=(rotated if self.config.rotation else straight_through)(z, codes),
            ids=ids,
            losses={
                "commitment": commitment,
                "codebook": jnp.mean(jnp.square(codes - constant(z))),
            },
        )

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return self._codebook()[ids]

    def _codebook(self) -> Float[Array, "k d"]:
        return _product(jax.lax.stop_gradient(self.table[...]), self.layer[...])


@jax.jit
def _product(table: Float[Array, "k d"], layer: Float[Array, "d e"]) -> Float[Array, "k e"]:
    """Kept apart, so that it rounds alike in any program: codes of ids equal z_q bit for bit."""
    product = jnp.einsum("kd,de->ke", table, layer, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.optimization_barrier(product)
