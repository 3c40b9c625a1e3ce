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

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.errors import InputError
from vqgan.tokenizer.quantizers.base import (
    Quantizer,
    QuantizerOutput,
    batch_entropy,
    check_positive,
    straight_through,
)


@dataclass(frozen=True, kw_only=True)
class LFQConfig:
    """Lookup-free quantizer. The defaults are those of Open-MAGVIT2."""

    kind: Literal["lfq"] = "lfq"
    dim: int = 18
    """Bits of an id, one a channel."""
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    """0 leaves both entropies out."""
    entropy_temperature: float = 0.01
    diversity: float = 1.0
    """Weight of the batch's entropy, which is to be high, against the positions', to be low."""
    entropy_group_bits: int = 9
    """At most so many channels in a group of which the batch's entropy is taken."""

    @property
    def codebook_size(self) -> int:
        """Number of different ids."""
        return 2**self.dim

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_positive(self, "entropy_temperature", "entropy_group_bits")
        if not 1 <= self.dim <= 24:
            raise InputError(f"quantizer.dim {self.dim}: lfq has from 1 to 24 bits, one a channel")


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
        z = z.astype(jnp.float32)
        bits = z > 0
        code = jnp.where(bits, 1.0, -1.0)
        weight, constant = self.config.commitment_weight, jax.lax.stop_gradient
        losses = {"commitment": weight * jnp.mean(jnp.square(constant(code) - z))}
        if self.config.entropy_weight:
            losses |= self._entropies(z.reshape(-1, self.config.dim))
        places = (2 ** np.arange(self.config.dim, dtype=np.int32)).reshape(1, 1, 1, -1)
        ids = jnp.sum(bits * places, axis=-1, dtype=jnp.int32)
        return QuantizerOutput(z_q=straight_through(z, code), ids=ids, losses=losses)

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return _signs(ids, self.config.dim)

    def _entropies(self, z: Float[Array, "n d"]) -> dict[str, Float[Array, ""]]:
        temperature, weight = self.config.entropy_temperature, self.config.entropy_weight
        return {
            "sample_entropy": weight * _sample_entropy(z, temperature),
            "batch_entropy": -weight * self.config.diversity * self._batch_entropy(z),
        }

    def _batch_entropy(self, z: Float[Array, "n d"]) -> Float[Array, ""]:
        groups = math.ceil(self.config.dim / self.config.entropy_group_bits)
        total = jnp.zeros(())
        for channels in np.array_split(np.arange(self.config.dim), groups):
            part = z[:, channels[0] : channels[-1] + 1] * (2 / self.config.entropy_temperature)
            codes = _signs(jnp.arange(2 ** len(channels)), len(channels))
            logits = jnp.einsum("nd,kd->nk", part, codes, precision=jax.lax.Precision.HIGHEST)
            total = total + batch_entropy(jax.nn.softmax(logits, axis=-1))
        return total


def _signs(ids: Int[Array, "*n"], bits: int) -> Float[Array, "*n d"]:
    """Codes, of -1 and 1, of ids."""
    shifts = jnp.arange(bits, dtype=jnp.int32).reshape((1,) * ids.ndim + (-1,))
    return ((ids[..., None] >> shifts) & 1) * 2.0 - 1.0


def _sample_entropy(z: Float[Array, "n d"], temperature: float) -> Float[Array, ""]:
    """Mean entropy, in nats, of the codes of single positions.

    The exponent 2 z · c / temperature is a sum over channels, each with a sign of its own, so that
    the softmax over all codes is a product of one Bernoulli distribution a channel, and its
    entropy the sum of theirs. A channel's two exponents differ by 4 z / temperature.
    """
    a = jnp.abs(z) * (4 / temperature)
    # H(sigmoid(a)), in the form that loses nothing to cancellation; it is even in a.
    entropy = jax.nn.softplus(-a) + a * jax.nn.sigmoid(-a)
    return jnp.mean(jnp.sum(entropy, axis=-1))
