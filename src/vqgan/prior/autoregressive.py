"""Training loss of the prior, and its likelihood in the units papers report."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vqgan.nn import fold
from vqgan.prior.conditions import Condition
from vqgan.prior.transformer import Prior, token_log_prob


def corrupt(
    ids: Int[Array, "b h w"], codebook_size: int, pkeep: float, key: Key[Array, ""]
) -> Int[Array, "b h w"]:
    """Each id kept with probability `pkeep`, else any code at random (taming's regulariser)."""
    keep_key, code_key = jax.random.split(key)
    keep = jax.random.bernoulli(keep_key, pkeep, ids.shape)
    return jnp.where(keep, ids, jax.random.randint(code_key, ids.shape, 0, codebook_size))


def loss(
    prior: Prior,
    ids: Int[Array, "b h w"],
    condition: Condition | None = None,
    *,
    pkeep: float = 1.0,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean negative log-likelihood of a code, in nats, and metrics.

    Args:
      pkeep: see `corrupt`; the inputs are corrupted, the targets are not.
      key: turns corruption and dropout on; None is evaluation.

    Returns:
      The loss, and `nll_bits_per_token` and `accuracy` (of the likeliest code).
    """
    inputs = ids
    if key is not None and pkeep < 1.0:
        inputs = corrupt(ids, prior.config.codebook_size, pkeep, jax.random.fold_in(key, 0))
    logits = prior(inputs, condition, key=fold(key, 1))
    nats = -token_log_prob(logits, ids).mean()
    accuracy = (jnp.argmax(logits, axis=-1) == ids).mean()
    return nats, {"nll_bits_per_token": nats / math.log(2), "accuracy": accuracy}


def bits_per_token(log_prob: Float[Array, "b"], tokens: int) -> Float[Array, "b"]:
    """Bits a code from the natural-log likelihood of images of `tokens` codes."""
    return -log_prob / (tokens * math.log(2))


def bits_per_dim(
    log_prob: Float[Array, "b"], height: int, width: int, channels: int
) -> Float[Array, "b"]:
    """Bits a pixel and channel that the codes of an image cost.

    That is the code length of the quantised image, not a likelihood of the pixels: what the
    tokenizer lost is not counted.
    """
    return bits_per_token(log_prob, height * width * channels)
