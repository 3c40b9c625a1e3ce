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
