"""A convolution that stays fast on maps smaller than its kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
