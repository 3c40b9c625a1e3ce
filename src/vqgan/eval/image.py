"""Numbers of reconstructions and codebooks: PSNR, SSIM, and how the codes are used.

Images are in [-1, 1], so the range between black and white is 2.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from vqgan.errors import InputError

_RANGE = 2.0  # from black to white
_WINDOW, _SIGMA = 11, 1.5  # side in pixels and deviation of SSIM's Gaussian window


def psnr(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Peak signal-to-noise ratio of each pair in decibels, with a peak of 2.0.

    The mean squared error is over pixels and channels. Equal images give infinity; images are not
    clipped.
    """
    return 10.0 * jnp.log10(_RANGE**2 / jnp.square(a - b).mean((1, 2, 3)))


def ssim(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Structural similarity of each pair, at most 1 (equal images).

    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity":
    Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, mean over the positions at
    which the window fits, and over channels. Equals scikit-image's `structural_similarity` with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2.0`.

    Raises:
      InputError: images smaller than the window.
    """
    if min(a.shape[1:3]) < _WINDOW:
        raise InputError(
            f"SSIM: images of {a.shape[1]}x{a.shape[2]} are smaller than its window of "
            f"{_WINDOW}x{_WINDOW}"
        )
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a**2
    var_b = _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((1, 2, 3))


def _window_mean(x: Float[Array, "b h w c"]) -> Float[Array, "b h-10 w-10 c"]:
    """Gaussian mean around every position at which the window fits, one axis after the other."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights /= weights.sum()
    rows, columns = x.shape[1] - _WINDOW + 1, x.shape[2] - _WINDOW + 1
    x = sum((float(w) * x[:, i : i + rows] for i, w in enumerate(weights)), jnp.zeros(()))
    return sum((float(w) * x[:, :, i : i + columns] for i, w in enumerate(weights)), jnp.zeros(()))


def codebook_usage(counts: Real[Array, "k"]) -> Float[Array, ""]:
    """Share of the codes that occur at least once, from how often each does."""
    return (counts > 0).mean()


def entropy_bits(counts: Real[Array, "k"]) -> Float[Array, ""]:
    """Entropy in bits of the distribution of codes: log2 k where all are equally frequent."""
    counts = counts.astype(jnp.float32)
    share = counts / jnp.maximum(counts.sum(), 1.0)
    return -jnp.sum(share * jnp.log2(jnp.where(share > 0, share, 1.0)))


def perplexity(counts: Real[Array, "k"]) -> Float[Array, ""]:
    """Exponential of the entropy: the number of equally frequent codes that would have it."""
    return jnp.exp2(entropy_bits(counts))
