"""Layers and initialisers that both stages share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

# PyTorch's default for convolutions and linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), from
# which the published models of the field were trained.
torch_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


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
