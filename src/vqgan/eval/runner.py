"""Held-out numbers of both stages."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from vqgan.adversarial.losses import label_loss
from vqgan.adversarial.lpips import LPIPS
from vqgan.eval.image import codebook_usage, perplexity, psnr, ssim
from vqgan.eval.labels import class_counts, mean_iou, pixel_accuracy
from vqgan.pictures import to_model
from vqgan.prior.transformer import Prior
from vqgan.tokenizer.model import Tokenizer

Batch = Mapping[str, np.ndarray]


def evaluate_tokenizer(
    tokenizer: Tokenizer, batches: Iterable[Batch], lpips: LPIPS | None
) -> dict[str, float]:
    """Means over images of `psnr` (dB), `ssim`, `l1` (range [-1, 1]) and `lpips`; the codebook's
    `usage` (share of codes that occur) and `perplexity` over all of them, means over the places of
    several ids a position.

    Of label maps, `bce` (without weights of classes) in place of the former, and `accuracy` and
    `mean_iou` over all pixels.

    Args:
      batches: `image` `[b, h, w, c]`, of the type that the tokenizer's content asks for, and
        `valid` `[b]`, false for padding.
      lpips: None leaves `lpips` out.
    """
    sums: dict[str, Any] = {}
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
            sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)[valid].sum(axis=0)
    classes = sums.pop("classes", None)
    means = {name: float(total / images) for name, total in sums.items()}
    if classes is not None:
        means |= {"accuracy": pixel_accuracy(classes), "mean_iou": mean_iou(classes)}
    return means | {
        "usage": float(np.mean([codebook_usage(jnp.asarray(row)) for row in counts])),
        "perplexity": float(np.mean([perplexity(jnp.asarray(row)) for row in counts])),
    }


@jax.jit
def _reconstruct(
    tokenizer: Tokenizer, images: Real[Array, "b h w c"], lpips: LPIPS | None
) -> tuple[dict[str, Real[Array, "b ..."]], Any]:
    x = to_model(images, tokenizer.config.autoencoder.in_channels)
    out = tokenizer(x)
    if tokenizer.config.content == "labels":
        bce = jax.vmap(lambda y, logits: label_loss(y[None], logits[None]))(x, out.reconstruction)
        return {"bce": bce, "classes": class_counts(x, out.reconstruction)}, out.ids
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
