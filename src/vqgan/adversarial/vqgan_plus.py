"""The discriminator of VQGAN+: no image depends on the others of its batch, and nothing aliases.

Weber et al. 2024, "MaskBit" (arXiv:2409.16211).

    images [b, h, w, c]  ->  5x5 convolution, LeakyReLU
    -> stages of 3x3 convolution, blur and halve, GroupNorm, LeakyReLU
    -> maxima over a grid of `grid` x `grid`  ->  1x1, LeakyReLU, 5x5  ->  logits [b, grid, grid, 1]

LeakyReLU's slope is 0.1. The network sees images in [0, 1], so that the zeros around them are
black. Kernels start as N(0, 0.02).
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vqgan.adversarial.layers import blur_pool
from vqgan.errors import InputError
from vqgan.nn import conv
from vqgan.serialization import Pretrained


@dataclass(frozen=True, kw_only=True)
class VQGANPlusConfig:
    """Shape of the discriminator. The defaults are the published ones."""

    kind: Literal["vqgan-plus"] = "vqgan-plus"
    in_channels: int = 3
    base_channels: int = 128
    """Of the first layer and the first stage; they double with every further stage."""
    num_stages: int = 4
    norm_groups: int = 32
    grid: int = 16
    """Logits along each side. 256 pixels and four stages make as many, and no maxima are taken;
    of smaller maps, positions are repeated."""
    dtype: str = "float32"

    def check(self) -> None:
        """Raises InputError where fields contradict one another."""
        if self.num_stages < 1 or self.grid < 1:
            raise InputError(
                f"VQGAN+'s discriminator: num_stages {self.num_stages} and grid {self.grid} must "
                "be at least 1"
            )
        if self.base_channels % self.norm_groups:
            raise InputError(
                f"VQGAN+'s discriminator: norm_groups {self.norm_groups} does not divide "
                f"base_channels {self.base_channels}"
            )


class _Stage(nnx.Module):
    """Halves the sides."""

    def __init__(self, inputs: int, outputs: int, config: VQGANPlusConfig, *, rngs: nnx.Rngs):
        dtype = config.dtype
        self.conv = conv(inputs, outputs, 3, dtype=dtype, kernel_init=_init, rngs=rngs)
        self.norm = nnx.GroupNorm(
            outputs,
            num_groups=config.norm_groups,
            epsilon=1e-5,
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = self.conv(x)
        # Of an odd side, the half that is rounded up.
        x = jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)])
        return _activation(self.norm(blur_pool(x)))


class VQGANPlusDiscriminator(Pretrained):
    """The discriminator of the module's docstring."""

    config_class = VQGANPlusConfig

    def __init__(self, config: VQGANPlusConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        layer = functools.partial(conv, dtype=config.dtype, kernel_init=_init, rngs=rngs)
        base = config.base_channels
        widths = [base, *(base * 2**n for n in range(config.num_stages))]
        self.conv_in = layer(config.in_channels, base, 5)
        self.stages = nnx.List(
            _Stage(widths[n], widths[n + 1], config, rngs=rngs) for n in range(config.num_stages)
        )
        self.conv_out = layer(widths[-1], widths[-1], 1)
        self.logit = layer(widths[-1], 1, 5)

    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b grid grid 1"]:
        """Logits of `images` in [-1, 1], positive for real. `train` changes nothing.

        Raises:
          InputError: images of another number of channels than the config's.
        """
        if images.shape[-1] != self.config.in_channels:
            raise InputError(
                f"VQGAN+'s discriminator: images have {images.shape[-1]} channels, it is "
                f"configured for in_channels={self.config.in_channels}"
            )
        x = _activation(self.conv_in((images + 1) / 2))
        for stage in self.stages:
            x = stage(x)
        for axis in (1, 2):
            x = _maxima(x, self.config.grid, axis)
        return self.logit(_activation(self.conv_out(x))).astype(jnp.float32)


_init = nnx.initializers.normal(0.02)


def _activation(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return jax.nn.leaky_relu(x, 0.1)


def _maxima(x: Float[Array, "b h w c"], count: int, axis: int) -> Float[Array, "b h2 w2 c"]:
    """Maxima along an axis of `count` windows that cover it, as equal as they can be.

    Window i is from i n / count, rounded down, to (i + 1) n / count, rounded up, as PyTorch has it.
    """
    n = x.shape[axis]
    if n == count:
        return x
    windows = [
        jax.lax.slice_in_dim(x, i * n // count, -(-(i + 1) * n // count), axis=axis)
        for i in range(count)
    ]
    return jnp.concatenate([w.max(axis, keepdims=True) for w in windows], axis)
