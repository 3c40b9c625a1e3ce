"""The losses of stage 1 as pure functions, each reduced to a scalar.

Esser, Rombach, Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis"
(arXiv:2012.09841), equations 5 to 7. Logits are those of a discriminator that calls real positive.
"""

from collections.abc import Callable, Sequence
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GanLoss = Literal["hinge", "vanilla", "non_saturating"]
PixelLoss = Literal["l1", "l2", "bce"]


def discriminator_loss(
    kind: GanLoss, real_logits: Float[Array, "*r"], fake_logits: Float[Array, "*f"]
) -> Float[Array, ""]:
    """What the discriminator minimises.

    `hinge` and `vanilla` are the mean of the real and the fake term, as in taming-transformers;
    `non_saturating` is their sum, the two-sided cross-entropy of Goodfellow et al. 2014.
    """
    match kind:
        case "hinge":
            real, fake = jax.nn.relu(1.0 - real_logits), jax.nn.relu(1.0 + fake_logits)
            return 0.5 * (real.mean() + fake.mean())
        case "vanilla":
            return 0.5 * _cross_entropy(real_logits, fake_logits)
        case "non_saturating":
            return _cross_entropy(real_logits, fake_logits)
        case _:
            assert_never(kind)


def _cross_entropy(
    real_logits: Float[Array, "*r"], fake_logits: Float[Array, "*f"]
) -> Float[Array, ""]:
    return jax.nn.softplus(-real_logits).mean() + jax.nn.softplus(fake_logits).mean()


def generator_loss(kind: GanLoss, fake_logits: Float[Array, "*f"]) -> Float[Array, ""]:
    """What the generator minimises against the discriminator of the same kind.

    `hinge` and `vanilla` raise the mean logit; `non_saturating` is -log sigmoid of it.
    """
    match kind:
        case "hinge" | "vanilla":
            return -fake_logits.mean()
        case "non_saturating":
            return jax.nn.softplus(-fake_logits).mean()
        case _:
            assert_never(kind)


def lecam_loss(
    real_logits: Float[Array, "*r"], fake_logits: Float[Array, "*f"], averages: Float[Array, "2"]
) -> Float[Array, ""]:
    """LeCam regulariser of the discriminator (Tseng et al. 2021, arXiv:2104.03310), as published
    code has it: real logits do not rise above what fake ones have been, nor fake ones fall below
    what real ones have been, which bounds how far the two are driven apart.

    Args:
      averages: moving averages of the mean real and the mean fake logit.
    """
    real, fake = averages
    above = jax.nn.relu(real_logits - fake)
    below = jax.nn.relu(real - fake_logits)
    return jnp.square(above).mean() + jnp.square(below).mean()


def r1_penalty(
    judge: Callable[[Float[Array, "b h w c"]], Float[Array, "b ..."]],
    images: Float[Array, "b h w c"],
) -> Float[Array, ""]:
    """Half of the squared gradient of an image's logit at real images, a mean over images.

    Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?"
    (arXiv:1801.04406), equation 9 with gamma 1; an image's logits are averaged, so that the weight
    means the same for one logit and for many.
    """

    def total(x: Float[Array, "b h w c"]) -> Float[Array, ""]:
        logits = judge(x)
        return logits.reshape(len(logits), -1).mean(1).sum()

    gradient = jax.grad(total)(images)
    return 0.5 * jnp.square(gradient).sum((1, 2, 3)).mean()


def pixel_loss(
    kind: PixelLoss,
    images: Float[Array, "b h w c"],
    reconstructions: Float[Array, "b h w c"],
    class_weights: Sequence[float] = (),
) -> Float[Array, ""]:
    """Mean absolute (`l1`) or squared (`l2`) difference over images, pixels and channels, or the
    cross-entropy (`bce`) of logits to one-hot label maps, see `label_loss`.

    With the perceptual distance of weight w the paper's reconstruction term is
    `pixel_loss + w * distance.mean()`.
    """
    match kind:
        case "l1":
            return jnp.abs(images - reconstructions).mean()
        case "l2":
            return jnp.square(images - reconstructions).mean()
        case "bce":
            return label_loss(images, reconstructions, class_weights)
        case _:
            assert_never(kind)


def label_loss(
    labels: Float[Array, "b h w c"],
    logits: Float[Array, "b h w c"],
    class_weights: Sequence[float] = (),
) -> Float[Array, ""]:
    """Binary cross-entropy of every class at every pixel, each class a question of its own.

    `mean of w_c * (softplus(x) - y * x)` over pixels and classes, for logits x and labels y in
    {0, 1}; without weights the `BCELossWithQuant` of taming-transformers, which is a mean over all
    as well. Pixels of no class, whose labels are all 0, do not count.

    Args:
      class_weights: w, one a class; empty means ones. They are not normalised.
    """
    entropy = jax.nn.softplus(logits) - labels * logits
    if class_weights:
        entropy = entropy * jnp.asarray(class_weights, jnp.float32)[None, None, None]
    known = labels.sum(-1) > 0
    pixels = jnp.where(known, entropy.mean(-1), 0.0)
    return pixels.sum() / jnp.maximum(known.sum(), 1)


def adaptive_weight(
    grad_nll: Float[Array, "*s"],
    grad_gan: Float[Array, "*s"],
    maximum: float = 1e4,
    eps: float = 1e-4,
) -> Float[Array, ""]:
    """Weight of the adversarial term that balances its gradient with the reconstruction's.

    Args:
      grad_nll: gradient of the reconstruction terms (pixel and perceptual) with respect to the last
        layer of the decoder, a kernel of any shape.
      grad_gan: gradient of the generator loss with respect to the same.

    Returns:
      `|grad_nll| / (|grad_gan| + eps)`, clipped to [0, maximum]; no gradient flows through it.
    """
    ratio = _norm(grad_nll) / (_norm(grad_gan) + eps)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def _norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(jnp.square(x)))
