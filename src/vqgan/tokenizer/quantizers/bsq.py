"""Binary spherical quantisation, BSQ (Zhao et al. 2024, arXiv:2406.07548).

    u = z / |z|        code_i = 1/√d where u_i > 0, else -1/√d
    z_q = u + stop_gradient(code - u)
    id = sum_i 2**i [u_i > 0]            (channel 0 is the lowest bit)
    loss = commitment_weight |code - u|² + entropy_weight (H(c | u) - diversity H(c)),
           p(c | u) = softmax_c(2 u · c / temperature) over the 2**d codes c

Latents `[b, h, w, d]`, ids `[b, h, w]` below 2**d; there is no table and there are no parameters.
Lookup-free quantisation (lfq.py) on the unit sphere, where its codes are as well: a latent is never
far from its code (|u - code|² <= 2 - 2/√d), so that gradients fit and the commitment term can be
left out, as it is by default. Good at large vocabularies, up to one bit a channel and 24 of them
here; the cost is in a decoder that sees few channels, without their lengths.

The entropies are those of lfq.py: H(c | u) is exact, H(c) is taken over groups of channels and
added up. The paper's own approximation is groups of one channel, `entropy_group_bits` 1. Its
softmax has exponents τ u · c; that is a temperature of 2 / τ here.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.tokenizer.quantizers.base import (
    Quantizer,
    QuantizerOutput,
    straight_through,
    unit,
)
from vqgan.tokenizer.quantizers.binary import SignConfig, entropy_losses, ids_of, signs


@dataclass(frozen=True, kw_only=True)
class BSQConfig(SignConfig):
    """Binary spherical quantizer."""

    kind: Literal["bsq"] = "bsq"
    commitment_weight: float = 0.0
    entropy_temperature: float = 0.02
    """2 / τ of the paper."""


class BinarySphericalQuantizer(Quantizer):
    """Quantizer by sign on the unit sphere. The gradient of `z_q` goes straight through to the
    latents of length 1."""

    def __init__(self, config: BSQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size = config.codebook_size

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        config, u = self.config, unit(z.astype(jnp.float32))
        ids = ids_of(u > 0)
        code = self.codes(ids)
        distance = jnp.mean(jnp.square(jax.lax.stop_gradient(code) - u))
        losses = {"commitment": config.commitment_weight * distance}
        losses |= entropy_losses(u / math.sqrt(config.dim), config)
        return QuantizerOutput(z_q=straight_through(u, code), ids=ids, losses=losses)

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return signs(ids, self.config.dim) * (1 / math.sqrt(self.config.dim))
