"""Layers that the discriminators share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Binomial, as in StyleGAN2; divided by its sum.
_TAPS = (1.0, 3.0, 3.0, 1.0)


def blur_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Every second pixel of each side after a low-pass filter (Zhang 2019, arXiv:1904.11486).

    The filter is [1, 3, 3, 1] / 8 along rows and columns; outside of the map are zeros.
    """
    return _halve(_halve(x, 1), 2)


def _halve(x: Float[Array, "b h w c"], axis: int) -> Float[Array, "b h2 w2 c"]:
    pads = [(1, 1) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(x, pads)
    last = 2 * ((padded.shape[axis] - len(_TAPS)) // 2) + 1
    terms = [
        tap / sum(_TAPS) * jax.lax.slice_in_dim(padded, i, i + last, stride=2, axis=axis)
        for i, tap in enumerate(_TAPS)
    ]
    return sum(terms[1:], terms[0])


class ActNorm(nnx.Module):
    """Normalises every channel by the statistics of the first batch, then scales and shifts it.

    Kingma, Dhariwal 2018 (arXiv:1807.03039). The first batch's mean and deviation are kept as
    statistics instead of being written into the parameters, so that the functions it can be are
    the published ones and a step's gradients never meet parameters that change under them.
    """

    epsilon = 1e-6

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.deviation = nnx.BatchStat(jnp.ones(channels))
        self.begun = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        x32 = x.astype(jnp.float32)
        if train:
            first = self.begun[...] == 0
            batch = jax.lax.stop_gradient(x32)
            self.mean[...] = jnp.where(first, batch.mean((0, 1, 2)), self.mean[...])
            self.deviation[...] = jnp.where(first, batch.std((0, 1, 2)), self.deviation[...])
            self.begun[...] = jnp.ones(())
        gain = self.scale[...] / (self.deviation[...] + self.epsilon)
        offset = self.bias[...] - self.mean[...] * gain
        return (x32 * gain[None, None, None] + offset[None, None, None]).astype(x.dtype)
