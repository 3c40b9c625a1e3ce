"""Index backpropagation quantisation, IBQ (Shi et al. 2024, arXiv:2412.02692).

    logits = z · codebook        p = softmax(logits)        ids = argmax logits
    z_q = (onehot(ids) - stop_gradient(p) + p) @ codebook
    loss = |z_q - z|² + |stop_gradient(e_ids) - z|² + beta |e_ids - stop_gradient(z)|²
           + entropy_weight (H(p | z) - diversity H(p)),  both at softmax(logits / temperature)

Latents `[b, h, w, d]`, codebook `[k, d]`, ids `[b, h, w]`. The code is the one of the largest inner
product, not the nearest one. Every code gets a gradient at every step through its probability, so
that 2**18 codes of 256 channels stay in use (84 % of them, where plain VQ collapses). It pays with
several arrays of `bhw x k` floats in training; encoding holds one, the logits.

As published, beta is on the term that moves the codes, with 1 on the one that moves the latents.
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
    batch_entropy,
    check_positive,
    straight_through_choice,
)


@dataclass(frozen=True, kw_only=True)
class IBQConfig:
    """Index backpropagation quantizer. The defaults are those of the published models."""

    kind: Literal["ibq"] = "ibq"
    codebook_size: int = 16384
    dim: int = 256
    beta: float = 0.25
    """Weight of the loss that moves the chosen codes to their latents."""
    entropy_weight: float = 0.05
    """0 leaves both entropies out, and their arrays."""
    entropy_temperature: float = 0.01
    """Divides the logits in the entropies."""
    diversity: float = 1.0
    """Weight of the batch's entropy, which is to be high, against the positions', to be low."""

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_positive(self, "codebook_size", "dim", "entropy_temperature")


class IBQuantizer(Quantizer):
    """Quantizer by inner products. The gradient of `z_q` passes through the probabilities of all
    codes to the latents and to the whole codebook."""

    def __init__(self, config: IBQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size = config.codebook_size
        shape = (config.codebook_size, config.dim)
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        z, codebook = z.astype(jnp.float32), self.codebook[...]
        logits = jnp.einsum("bhwd,kd->bhwk", z, codebook, precision=jax.lax.Precision.HIGHEST)
        ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        z_q = straight_through_choice(codebook, ids, jax.nn.softmax(logits, axis=-1))
        codes, constant = codebook[ids], jax.lax.stop_gradient
        losses = {
            "propagation": jnp.mean(jnp.square(z_q - z)),
            "commitment": jnp.mean(jnp.square(constant(codes) - z)),
            "codebook": self.config.beta * jnp.mean(jnp.square(codes - constant(z))),
        }
        if self.config.entropy_weight:
            losses |= self._entropies(logits.reshape(-1, self.codebook_size))
        return QuantizerOutput(z_q=z_q, ids=ids, losses=losses)

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return self.codebook[...][ids]

    def _entropies(self, logits: Float[Array, "n k"]) -> dict[str, Float[Array, ""]]:
        log_p = jax.nn.log_softmax(logits / self.config.entropy_temperature, axis=-1)
        p = jnp.exp(log_p)
        weight = self.config.entropy_weight
        return {
            "sample_entropy": -weight * jnp.mean(jnp.sum(p * log_p, axis=-1)),
            "batch_entropy": -weight * self.config.diversity * batch_entropy(p),
        }
