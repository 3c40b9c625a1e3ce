"""Lookup-free quantisation, LFQ (MAGVIT-2, Yu et al. 2023, arXiv:2310.05737; as in Open-MAGVIT2,
arXiv:2409.04410).

    code = 1 where z > 0, else -1        z_q = z + stop_gradient(code - z)
    id = sum_i 2**i [z_i > 0]            (channel 0 is the lowest bit)
    loss = commitment_weight |code - z|² + entropy_weight (H(c | z) - diversity H(c)),
           p(c | z) = softmax_c(2 z · c / temperature) over the 2**d codes c

Latents `[b, h, w, d]`, ids `[b, h, w]` below 2**d; there is no table and there are no parameters.
Good at very large vocabularies: 18 channels make 262,144 codes, and neither the search nor the
memory grows with them; the entropies keep them in use. Its cost is in what follows: a decoder that
sees so few channels, and a prior over so many ids.

Nothing of size 2**d is made. H(c | z) is exact without it; H(c), the entropy of the batch's mean
distribution, is taken over groups of `entropy_group_bits` channels and added up, which holds
`bhw x 2**entropy_group_bits` floats. The sum is an upper bound of the entropy over all channels,
and equal to it where the groups are independent or there is one only.
"""

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
)
from vqgan.tokenizer.quantizers.binary import SignConfig, entropy_losses, ids_of, signs


@dataclass(frozen=True, kw_only=True)
class LFQConfig(SignConfig):
    """Lookup-free quantizer. The defaults are those of Open-MAGVIT2."""

    kind: Literal["lfq"] = "lfq"
    commitment_weight: float = 0.25
    entropy_temperature: float = 0.01


class LookupFreeQuantizer(Quantizer):
    """Quantizer by sign. The gradient of `z_q` goes straight through to the latents."""

    def __init__(self, config: LFQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size = config.codebook_size

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        z, config = z.astype(jnp.float32), self.config
        ids = ids_of(z > 0)
        code = self.codes(ids)
        distance = jnp.mean(jnp.square(jax.lax.stop_gradient(code) - z))
        losses = {"commitment": config.commitment_weight * distance}
        losses |= entropy_losses(z, config)
        return QuantizerOutput(z_q=straight_through(z, code), ids=ids, losses=losses)

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return signs(ids, self.config.dim)
