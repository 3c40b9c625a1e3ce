"""The reconstruction terms of stage 1: by pixels, by LPIPS and by a classifier.

Together they are the paper's negative log-likelihood: what the adaptive weight balances the
discriminator with, and what the guard watches.
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float

from vqgan.adversarial.classifier import Classifier, classifier_loss
from vqgan.adversarial.losses import pixel_loss
from vqgan.adversarial.lpips import LPIPS, load_lpips
from vqgan.adversarial.resnet import ResNet
from vqgan.errors import InputError
from vqgan.train.config import LossConfig

Metrics = dict[str, Float[Array, ""]]
Images = Float[Array, "b h w c"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """The networks that compare images, frozen; each None where the loss has no such term."""

    lpips: LPIPS | None = None
    classifier: Classifier | None = None


def perceptual_networks(
    loss: LossConfig, channels: int, classifier: Classifier | None = None
) -> Perceptual:
    """What the loss needs, as an argument of the compiled step.

    Args:
      channels: of the images.
      classifier: in place of the one that the config names.

    Raises:
      InputError: the config contradicts itself, or a network cannot be read.
    """
    _check(loss, channels, classifier)
    lpips = load_lpips(loss.perceptual) if loss.perceptual_weight else None
    if classifier is None and loss.classifier:
        classifier = ResNet.from_pretrained(loss.classifier)
    if not (classifier is None or isinstance(classifier, nnx.Module)):
        classifier = jax.tree_util.Partial(classifier)
    return Perceptual(lpips=lpips, classifier=classifier)


def _check(loss: LossConfig, channels: int, given: Classifier | None) -> None:
    weight = loss.classifier_weight
    if weight and given is None and not loss.classifier:
        raise InputError(
            f"loss.classifier_weight {weight}: of which classifier? Give the directory of one as "
            "loss.classifier"
        )
    if not weight and (loss.classifier or given is not None):
        named = loss.classifier or "given"
        raise InputError(
            f"loss.classifier {named}: loss.classifier_weight is 0; give it a weight, such as 0.1"
        )
    if weight and given is None and channels != 3:
        raise InputError(
            f"loss.classifier {loss.classifier}: sees images of 3 channels, and these have "
            f"{channels}; set loss.classifier_weight to 0"
        )


def reconstruction_terms(
    reconstruction: Images, images: Images, loss: LossConfig, perceptual: Perceptual
) -> tuple[Float[Array, ""], Metrics]:
    """Their weighted sum, and each by its name."""
    pixel = pixel_loss(loss.reconstruction, images, reconstruction, loss.class_weights)
    metrics: Metrics = {loss.reconstruction: pixel}
    total = loss.reconstruction_weight * pixel
    if perceptual.lpips is not None:
        metrics["lpips"] = perceptual.lpips(images, reconstruction).mean()
        total = total + loss.perceptual_weight * metrics["lpips"]
    if perceptual.classifier is not None:
        metrics["classifier"] = classifier_loss(
            perceptual.classifier, loss.classifier_term, images, reconstruction
        )
        total = total + loss.classifier_weight * metrics["classifier"]
    return total, metrics
