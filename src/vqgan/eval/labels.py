"""Numbers of reconstructed label maps: pixel accuracy and mean intersection over union.

Both are taken of sums over all maps, as is usual: neither is a mean over maps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real


def class_counts(
    labels: Float[Array, "b h w k"], logits: Float[Array, "b h w k"]
) -> Int[Array, "b 3 k"]:
    """Pixels of each map, by class: of it and found to be, of it, and found to be.

    Found is the class of the largest logit. Pixels of no class, whose labels are all 0, are left
    out.
    """
    known = labels.max(-1, keepdims=True) > 0
    true = labels > 0
    found = (jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]) > 0) & known
    return jnp.stack([(true & found).sum((1, 2)), true.sum((1, 2)), found.sum((1, 2))], axis=1)


def pixel_accuracy(counts: Real[np.ndarray, "3 k"]) -> float:
    """Share of the pixels whose class was found, of `class_counts` summed over maps."""
    hits, true, _ = counts
    return float(hits.sum() / max(true.sum(), 1))


def mean_iou(counts: Real[np.ndarray, "3 k"]) -> float:
    """Intersection over union, a mean over the classes that there are or that were found."""
    hits, true, found = counts
    union = true + found - hits
    return float((hits[union > 0] / union[union > 0]).mean()) if union.any() else 0.0
