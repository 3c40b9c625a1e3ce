"""Held-out numbers of both stages."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vqgan.adversarial.lpips import LPIPS
from vqgan.eval.image import codebook_usage, perplexity, psnr, ssim
from vqgan.pictures import to_float
from vqgan.prior.transformer import Prior
from vqgan.tokenizer.model import Tokenizer

Batch = Mapping[str, np.ndarray]


def evaluate_tokenizer(
    tokenizer: Tokenizer, batches: Iterable[Batch], lpips: LPIPS | None
) -> dict[str, float]:
    """Means over images of `psnr` (dB), `ssim`, `l1` (range [-1, 1]) and `lpips`; the codebook's
    `usage` (share of codes that occur) and `perplexity` over all of them, means over the places of
    several ids a position.

    Args:
      batches: `image` uint8 `[b, h, w, c]`, and `valid` `[b]`, false for padding.
      lpips: None leaves `lpips` out.
    """
    sums: dict[str, float] = {}
    places = tokenizer.quantizer.places
    counts = np.zeros((places, tokenizer.codebook_size), np.int64)
    images = 0
    for batch in batches:
        values, ids = _reconstruct(tokenizer, batch["image"], lpips)
        valid = batch["valid"]
        images += int(valid.sum())
        rows = np.asarray(ids)[valid].reshape(-1, places)
        np.add.at(counts, (np.arange(places)[None], rows), 1)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(np.asarray(value)[valid].sum())
    means = {name: total / images for name, total in sums.items()}
    return means | {
        "usage": float(np.mean([codebook_usage(jnp.asarray(row)) for row in counts])),
        "perplexity": float(np.mean([perplexity(jnp.asarray(row)) for row in counts])),
    }


@jax.jit
def _reconstruct(
    tokenizer: Tokenizer, images: UInt8[Array, "b h w c"], lpips: LPIPS | None
) -> tuple[dict[str, Float[Array, "b"]], Any]:
    x = to_float(images)
    out = tokenizer(x)
    y = jnp.clip(out.reconstruction, -1.0, 1.0)
    values = {"psnr": psnr(x, y), "ssim": ssim(x, y), "l1": jnp.mean(jnp.abs(x - y), (1, 2, 3))}
    if lpips is not None:
        values["lpips"] = lpips(x, y)
    return values, out.ids


def evaluate_prior(prior: Prior, batches: Iterable[Batch]) -> dict[str, float]:
    """`bits_per_token` over all codes.

    Args:
      batches: `ids` int32 `[b, h, w]`, `label` `[b]`, and `valid` `[b]`, false for padding.
    """
    nats, tokens = 0.0, 0
    for batch in batches:
        ids, valid = batch["ids"], batch["valid"]
        condition = jnp.asarray(batch["label"]) if prior.config.num_classes else None
        nats -= float(np.asarray(prior.log_prob(jnp.asarray(ids), condition))[valid].sum())
        tokens += int(valid.sum()) * ids[0].size
    return {"bits_per_token": nats / tokens / float(np.log(2.0))}
