"""The building blocks of the convolutional autoencoder: residual, attention, down- and upsampling.

They are those of "Taming Transformers" (Esser, Rombach, Ommer 2021, arXiv:2012.09841), which took
them from denoising diffusion (Ho et al. 2020), without its time embedding. All maps are `[b, h,
w, c]`.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vqgan.nn import conv, conv_general_dilated, dropout


def group_norm(channels: int, *, groups: int, dtype: str, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm with the paper's epsilon of 1e-6."""
    return nnx.GroupNorm(
        channels, num_groups=groups, epsilon=1e-6, dtype=jnp.dtype(dtype), rngs=rngs
    )


class ResBlock(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution on x where channels change.

    With `shortcut_of="output"` that convolution is on the branch's output instead, and x is not
    added at all, as MaskGIT's published tokenizer has it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        groups: int,
        dropout: float,
        bias: bool = True,
        shortcut_of: Literal["input", "output"] = "input",
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.shortcut_of = shortcut_of
        self.norm1 = group_norm(inputs, groups=groups, dtype=dtype, rngs=rngs)
        self.conv1 = conv(inputs, outputs, 3, bias=bias, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(outputs, groups=groups, dtype=dtype, rngs=rngs)
        self.conv2 = conv(outputs, outputs, 3, bias=bias, dtype=dtype, rngs=rngs)
        seen = inputs if shortcut_of == "input" else outputs
        self.shortcut = (
            conv(seen, outputs, 1, bias=bias, dtype=dtype, rngs=rngs) if inputs != outputs else None
        )

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w d"]:
        y = self.conv1(nnx.swish(self.norm1(x)))
        y = dropout(nnx.swish(self.norm2(y)), self.dropout, key)
        y = self.conv2(y)
        if self.shortcut is None:
            return x + y
        return self.shortcut(x if self.shortcut_of == "input" else y) + y


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all positions of the map, with a residual connection."""

    def __init__(self, channels: int, *, groups: int, dtype: str, rngs: nnx.Rngs):
        self.norm = group_norm(channels, groups=groups, dtype=dtype, rngs=rngs)
        self.q = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.k = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.v = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.proj_out = conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).reshape(b, h * w, 1, c) for layer in (self.q, self.k, self.v))
        y = jax.nn.dot_product_attention(q, k, v)
        return x + self.proj_out(y.reshape(b, h, w, c))


def downsample(inputs: int, *, symmetric: bool = False, dtype: str, rngs: nnx.Rngs) -> nnx.Conv:
    """Halves height and width: 3x3, stride 2, zeros around.

    One row and column of zeros at the far ends, or on all four sides where `symmetric` is set.
    """
    pad = (1, 1) if symmetric else (0, 1)
    return conv(inputs, inputs, 3, stride=2, padding=(pad, pad), dtype=dtype, rngs=rngs)


class AveragePool(nnx.Module):
    """Halves height and width, which must be even: the mean of each 2x2 pixels."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class Repeat(nnx.Module):
    """Doubles height and width: each pixel four times."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        return x.repeat(2, axis=1).repeat(2, axis=2)


class DepthToSpace(nnx.Module):
    """Doubles height and width: a 3x3 convolution to four times the channels, a quarter a pixel."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = conv(channels, 4 * channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        b, h, w, c = x.shape
        y = self.conv(x).reshape(b, h, w, 2, 2, c)
        return y.swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c)


class AdaptiveNorm(nnx.Module):
    """GroupNorm whose scale and bias come from the latents (Open-MAGVIT2, arXiv:2409.04410).

    The scale is a linear map of the latents' deviation over positions, the bias one of their mean.
    """

    epsilon = 1e-6

    def __init__(self, latents: int, channels: int, *, groups: int, dtype: str, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(
            channels,
            num_groups=groups,
            epsilon=self.epsilon,
            use_bias=False,
            use_scale=False,
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )
        linear = partial(nnx.Linear, latents, channels, dtype=jnp.dtype(dtype), rngs=rngs)
        self.gamma, self.beta = linear(), linear()

    def __call__(
        self, x: Float[Array, "b h w c"], z: Float[Array, "b h2 w2 z"]
    ) -> Float[Array, "b h w c"]:
        # The published variance divides by one less than the positions, which one position lacks.
        positions = z.shape[1] * z.shape[2]
        variance = z.var((1, 2)) * (positions / max(positions - 1, 1))
        scale = self.gamma(jnp.sqrt(variance + self.epsilon))
        return self.norm(x) * scale[:, None, None] + self.beta(z.mean((1, 2)))[:, None, None]


class Upsample(nnx.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution.

    Computed as four 2x2 convolutions of the small map, one for each parity of the output's row and
    column, whose kernels are sums of the 3x3 kernel's taps: repeated pixels share their taps. This
    is exact up to rounding and needs 16 instead of 36 multiplications an input pixel.
    """

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        assert self.conv.bias is not None
        kernel, bias = self.conv.kernel[...], self.conv.bias[...]
        x, kernel, bias = self.conv.promote_dtype((x, kernel, bias), dtype=self.conv.dtype)
        b, h, w, c = x.shape
        rows = [[self._quarter(x, kernel, row, column) for column in (0, 1)] for row in (0, 1)]
        y = jnp.stack([jnp.stack(r, axis=3) for r in rows], axis=2)  # b h 2 w 2 c
        return y.reshape(b, 2 * h, 2 * w, c) + bias.reshape(1, 1, 1, c)

    @staticmethod
    def _quarter(x: Array, kernel: Array, row: int, column: int) -> Array:
        kernel = _fold_taps(_fold_taps(kernel, 0, row), 1, column)
        padding = ((1 - row, row), (1 - column, column))
        return conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def _fold_taps(kernel: Array, axis: int, parity: int) -> Array:
    """Three taps on a doubled axis as two on the original one, for even or odd outputs."""
    a, b, c = (jax.lax.index_in_dim(kernel, i, axis) for i in range(3))
    pair = (a, b + c) if parity == 0 else (a + b, c)
    return jnp.concatenate(pair, axis=axis)
