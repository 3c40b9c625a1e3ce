"""What quantizers of signs share: options, bits to ids and back, and entropies over all 2**d codes.

No array of 2**d is made. The exponent 2 z · c / temperature of a code c is a sum over channels,
each with a sign of its own, so that the softmax over all codes is a product of one Bernoulli
distribution a channel.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vqgan.errors import InputError
from vqgan.tokenizer.quantizers.base import batch_entropy, check_positive


@dataclass(frozen=True, kw_only=True)
class SignConfig:
    """Options of a quantizer of signs."""

    kind: str
    dim: int = 18
    """Bits of an id, one a channel."""
    commitment_weight: float
    entropy_weight: float = 0.1
    """0 leaves both entropies out."""
    entropy_temperature: float
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
        if not 1 <= self.dim <= 24:  # more than ids hold well
            raise InputError(
                f"quantizer.dim {self.dim}: {self.kind} has from 1 to 24 bits, one a channel"
            )


def ids_of(bits: Bool[Array, "b h w d"]) -> Int[Array, "b h w"]:
    """The number that the bits make; channel 0 is the lowest."""
    places = (2 ** np.arange(bits.shape[-1], dtype=np.int32)).reshape(1, 1, 1, -1)
    return jnp.sum(bits * places, axis=-1, dtype=jnp.int32)


def signs(ids: Int[Array, "*n"], bits: int) -> Float[Array, "*n d"]:
    """Codes, of -1 and 1, of ids."""
    shifts = jnp.arange(bits, dtype=jnp.int32).reshape((1,) * ids.ndim + (-1,))
    return ((ids[..., None] >> shifts) & 1) * 2.0 - 1.0


def entropy_losses(z: Float[Array, "b h w d"], config: SignConfig) -> dict[str, Float[Array, ""]]:
    """Terms of `entropy_weight (H(c | z) - diversity H(c))`, none at a weight of 0.

    Both entropies are at `p(c | z) = softmax_c(2 z · c / temperature)`, over the 2**d codes c of -1
    and 1.
    """
    weight, temperature = config.entropy_weight, config.entropy_temperature
    if not weight:
        return {}
    flat = z.reshape(-1, z.shape[-1])
    batch = grouped_entropy(flat, temperature, config.entropy_group_bits)
    return {
        "sample_entropy": weight * sample_entropy(flat, temperature),
        "batch_entropy": -weight * config.diversity * batch,
    }


def sample_entropy(z: Float[Array, "n d"], temperature: float) -> Float[Array, ""]:
    """Mean entropy, in nats, of the codes of single positions: the sum of the channels'.

    A channel's two exponents differ by 4 z / temperature.
    """
    a = jnp.abs(z) * (4 / temperature)
    # H(sigmoid(a)), in the form that loses nothing to cancellation; it is even in a.
    entropy = jax.nn.softplus(-a) + a * jax.nn.sigmoid(-a)
    return jnp.mean(jnp.sum(entropy, axis=-1))


def grouped_entropy(
    z: Float[Array, "n d"], temperature: float, group_bits: int
) -> Float[Array, ""]:
    """Entropy, in nats, of the batch's mean distribution, added up over groups of channels."""
    bits = z.shape[-1]
    total = jnp.zeros(())
    for channels in np.array_split(np.arange(bits), math.ceil(bits / group_bits)):
        part = z[:, channels[0] : channels[-1] + 1] * (2 / temperature)
        codes = signs(jnp.arange(2 ** len(channels)), len(channels))
        logits = jnp.einsum("nd,kd->nk", part, codes, precision=jax.lax.Precision.HIGHEST)
        total = total + batch_entropy(jax.nn.softmax(logits, axis=-1))
    return total
