"""How a run uses its codebook: over the last N batches, and alike for every quantizer.

    last_k = the step whose batch chose code k last
    counts_k = (1 - 1/N) counts_k + how often the batch chose code k
    usage = share of the codes with step - last_k < N        dead codes = the number of all others
    perplexity = exp H(counts / sum of counts)

One batch says little: it has fewer positions than a large codebook has codes. At N = 1 these are
the numbers of the batch alone. Counts are sums over the batch of all devices, and part of the run's
state, so that a resumed run logs what it would have logged. They cost 8 bytes a code.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqgan.eval.image import perplexity
from vqgan.tokenizer.quantizers import Quantizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodeUse:
    """What a run remembers of its ids, at each of the q places of a position."""

    last_used: Any
    """Step whose batch chose a code last, -1 before any has; int32 `[q, k]`."""
    counts: Any
    """How often each was chosen, of which every batch forgets 1/N; float32 `[q, k]`."""


def new_code_use(quantizer: Quantizer) -> CodeUse:
    """Of a run that begins."""
    shape = (quantizer.places, quantizer.codebook_size)
    return CodeUse(last_used=jnp.full(shape, -1, jnp.int32), counts=jnp.zeros(shape))


def seen(use: CodeUse, counts: Float[Array, "q k"], step: Int[Array, ""], window: int) -> CodeUse:
    """With one more batch.

    Args:
      counts: how often the batch chose each code.
      step: the batch's, from 0 on.
      window: N.
    """
    return CodeUse(
        last_used=jnp.where(counts > 0, step, use.last_used),
        counts=use.counts * (1 - 1 / window) + counts,
    )


def code_metrics(use: CodeUse, step: Int[Array, ""], window: int) -> dict[str, Float[Array, ""]]:
    """`usage`, `dead_codes` and `perplexity` after the batch of `step`: means over the places.

    A run younger than N batches is looked at as a whole.
    """
    alive = (use.last_used >= 0) & (step - use.last_used < window)
    return {
        "usage": jnp.mean(alive),
        "dead_codes": jnp.mean(jnp.sum(~alive, axis=1).astype(jnp.float32)),
        "perplexity": jnp.mean(jax.vmap(perplexity)(use.counts)),
    }
