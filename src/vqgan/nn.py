"""Layers and initialisers that both stages share."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

# PyTorch's default for convolutions and linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), from
# which the published models of the field were trained.
torch_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
zeros = nnx.initializers.zeros_init()


def torch_bias(fan_in: int) -> nnx.Initializer:
    """PyTorch's default for biases, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); ours is 0."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv_general_dilated(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b h2 w2 d"]:
    """`jax.lax.conv_general_dilated` of NHWC maps, without dilation or groups.

    XLA computes a convolution whose kernel is larger than its input in plain loops on a CPU, about
    a hundred times slower than it could, and the gradient of a convolution has its output as input.
    In both cases this is one matrix product over gathered patches instead, with equal results.
    """
    pads = padding
    if isinstance(pads, str):
        pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], window_strides, pads)
    padded = [side + sum(pad) for side, pad in zip(x.shape[1:3], pads, strict=True)]
    sides = [
        (length - size) // stride + 1
        for length, size, stride in zip(padded, kernel.shape[:2], window_strides, strict=True)
    ]
    if min(*x.shape[1:3], *sides) >= max(kernel.shape[:2]):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    (height, width), (down, right) = sides, window_strides
    patches = [
        x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME",
    bias: bool = True,
    dtype: str = "float32",
    kernel_init=torch_init,
    bias_init=zeros,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square NHWC convolution with float32 parameters that computes in `dtype`."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=(stride, stride),
        padding=padding,
        use_bias=bias,
        dtype=jnp.dtype(dtype),
        kernel_init=kernel_init,
        bias_init=bias_init,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Inverted dropout; the identity without a key (evaluation) or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def fold(key: Key[Array, ""] | None, index: int) -> Key[Array, ""] | None:
    """The `index`-th key below `key`; no key below no key."""
    return None if key is None else jax.random.fold_in(key, index)


# Two-dimensional rotary positions (RoFormer, arXiv:2104.09864, over a grid as in LlamaGen).


def rotary_table(
    grid: tuple[int, int], head_dim: int, base: float = 1e4
) -> Float[Array, "t pairs 2"]:
    """Cosine and sine of every pair of channels at every position of a grid, in raster order.

    The first half of the pairs turns with the row, the second half with the column.

    Args:
      grid: rows and columns.
      head_dim: channels of an attention head; a multiple of 4.
    """
    frequencies = base ** (-jnp.arange(0, head_dim // 2, 2) / (head_dim // 2))
    rows, columns = jnp.indices(grid).reshape(2, -1, 1)
    angles = jnp.concatenate([rows * frequencies[None], columns * frequencies[None]], axis=-1)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x: Float[Array, "b n t d"], table: Float[Array, "t pairs 2"]) -> Float[Array, "b n t d"]:
    """Turns channels (0, 1), (2, 3), ... of each head by the angles of its position."""
    cos, sin = table[None, None, ..., 0], table[None, None, ..., 1]
    real, imaginary = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
