"""A perceptual term by a classifier: how differently it sees an image and its reconstruction.

In place of LPIPS, VQGAN+ (Weber et al. 2024, "MaskBit", arXiv:2409.16211) and, before it, MaskGIT
(arXiv:2202.04200) compare what a network trained on ImageNet makes of the whole of both.

A classifier is any callable of images `[b, h, w, c]` in [-1, 1], a module or a function, that
returns a list of arrays: feature maps, if it gives any, and its logits last. vqgan's own is
adversarial/resnet.py.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqgan.errors import InputError

Classifier = Callable[[Float[Array, "b h w c"]], list[Array]]
ClassifierTerm = Literal["logits", "features"]


def classifier_loss(
    classifier: Classifier,
    term: ClassifierTerm,
    images: Float[Array, "b h w c"],
    reconstructions: Float[Array, "b h w c"],
) -> Float[Array, ""]:
    """The squared difference of what the classifier returns, a mean over all entries:

        sum over f of mean((f(reconstructions) - f(images))²)

    where f is the logits alone, or everything, each array a term of weight 1. What it returns for
    `images` carries no gradient.

    Raises:
      InputError: the classifier returns no list of arrays.
    """
    real = jax.lax.stop_gradient(_seen(classifier, term, images))
    made = _seen(classifier, term, reconstructions)
    terms = [jnp.square(m - r).mean() for r, m in zip(real, made, strict=True)]
    return sum(terms[1:], terms[0])


def _seen(
    classifier: Classifier, term: ClassifierTerm, images: Float[Array, "b h w c"]
) -> list[Array]:
    found = classifier(images)
    if not isinstance(found, list | tuple) or not found:
        raise InputError(
            f"classifier: it returns {type(found).__name__}, not a list of arrays; return feature "
            "maps, if any, and the logits last"
        )
    return list(found[-1:] if term == "logits" else found)
