"""Index backpropagation quantisation, IBQ (Shi et al. 2024, arXiv:2412.02692).

    logits = z · codebook        p = softmax(logits)        ids = argmax logits
    z_q = (onehot(ids) - stop_gradient(p) + p) @ codebook
    loss = |z_q - z|² + |stop_gradient(e_ids) - z|² + beta |e_ids - stop_gradient(z)|²
           + entropy_weight (H(p | z) - diversity H(p)),  both at softmax(logits / temperature)

Latents `[b, h, w, d]`, codebook `[k, d]`, ids `[b, h, w]`. The code is the one of the largest inner
product, not the nearest one. Every code gets a gradient at every step through its probability, so
that 2**18 codes of 256 channels stay in use (84 % of them, where plain VQ collapses). It pays with
several arrays of `bhw x min(k, chunk)` floats in training, and with twice the products where codes
are taken in chunks.

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
from vqgan.tokenizer.quantizers.chunked import (
    add_up,
    choose,
    normalised,
    scores,
    weighted_mean,
    with_slope,
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
    chunk: int = 8192
    """Codes compared at once; more are taken in turns, forwards and backwards."""

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_positive(self, "codebook_size", "dim", "entropy_temperature", "chunk")


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
        ids, mean, entropies = self._over_all_codes(z, codebook)
        codes, constant = codebook[ids], jax.lax.stop_gradient
        z_q = straight_through_choice(codes, mean)
        losses = {
            "propagation": jnp.mean(jnp.square(z_q - z)),
            "commitment": jnp.mean(jnp.square(constant(codes) - z)),
            "codebook": self.config.beta * jnp.mean(jnp.square(codes - constant(z))),
        }
        return QuantizerOutput(z_q=z_q, ids=ids, losses=losses | entropies)

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return self.codebook[...][ids]

    def _over_all_codes(
        self, z: Float[Array, "b h w d"], codebook: Float[Array, "k d"]
    ) -> tuple[Int[Array, "b h w"], Float[Array, "b h w d"], dict[str, Float[Array, ""]]]:
        """Ids, the mean of the codes by their probabilities, and the entropies."""
        config = self.config

        def views(ids: Array, rows: Array) -> list[Array]:
            logits = scores(z, rows)
            sharp = [logits / config.entropy_temperature] if config.entropy_weight else []
            return [logits, logits, *sharp]

        ids, totals = choose(views, z, [codebook], config.chunk)

        def parts(log_p: list[Array], rows: Array) -> dict[str, Array]:
            # The codebook is reached through the logits alone.
            p = jnp.exp(log_p[0])
            mean = weighted_mean(p, jax.lax.stop_gradient(rows))
            found = {"mean": mean, "mass": jnp.sum(p, axis=-1)}
            return found | _entropy_parts(log_p[1]) if config.entropy_weight else found

        sums = add_up(parts, views, totals, [codebook], config.chunk)
        mean = normalised(sums["mean"], sums["mean"], sums["mass"][..., None])
        if not config.entropy_weight:
            return ids, mean, {}
        sample = normalised(sums["sample"], sums["sample_slope"], sums["sharp_mass"])
        batch = sums["batch"] + jnp.sum(
            normalised(jnp.zeros_like(sample), sums["batch_slope"], sums["sharp_mass"])
        )
        weight = config.entropy_weight
        losses = {
            "sample_entropy": weight * jnp.mean(sample),
            "batch_entropy": -weight * config.diversity * batch,
        }
        return ids, mean, losses


def _entropy_parts(log_p: Float[Array, "b h w c"]) -> dict[str, Array]:
    """The share of some codes in both entropies."""
    sample, sample_slope = with_slope(_sample_entropy, log_p)
    batch, batch_slope = with_slope(_batch_entropy, log_p)
    return {
        "sample": sample,
        "sample_slope": sample_slope,
        "batch": batch,
        "batch_slope": batch_slope,
        "sharp_mass": jnp.sum(jnp.exp(log_p), axis=-1),
    }


def _sample_entropy(log_p: Float[Array, "b h w c"]) -> Float[Array, "b h w"]:
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _batch_entropy(log_p: Float[Array, "b h w c"]) -> Float[Array, ""]:
    return batch_entropy(jnp.exp(log_p))
