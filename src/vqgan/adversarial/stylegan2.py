"""StyleGAN2's residual discriminator: one logit for a whole image.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv:1912.04958),
which MaskGIT's tokenizer (arXiv:2202.04200) trains against.

    x [b, h, w, c]  ->  1x1 convolution  ->  blocks that halve the sides, down to 4 x 4
      block(x) = (branch(x) + skip(x)) / sqrt(2)
      branch   = 3x3, LeakyReLU, 3x3, LeakyReLU, blur and halve       skip = blur and halve, 1x1
    -> a map of the batch's deviation  ->  3x3  ->  two linear layers  ->  logit [b, 1]

Learning rates are not equalised: kernels start at variance 2 / fan_in instead.
"""

import math
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

_he = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


@dataclass(frozen=True, kw_only=True)
class StyleGAN2Config:
    """Shape of the discriminator."""

    kind: Literal["stylegan2"] = "stylegan2"
    in_channels: int = 3
    resolution: int = 256
    """Of the images: 4 times a power of two. The last layers are tied to it."""
    base_channels: int = 64
    """Width at full resolution; it doubles with each halving."""
    max_channels: int = 512
    group_size: int = 4
    """Images over which the deviation is taken; smaller where it does not divide the batch."""
    dtype: str = "float32"

    def check(self) -> None:
        """Raises InputError where fields contradict one another."""
        halvings = self.resolution // 4
        if self.resolution % 4 or halvings < 2 or halvings & (halvings - 1):
            raise InputError(
                f"StyleGAN2's discriminator: resolution {self.resolution} is not 4 times a power "
                "of two"
            )


class _Block(nnx.Module):
    """A residual block that halves the sides."""

    def __init__(self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv_1 = conv(inputs, inputs, 3, dtype=dtype, kernel_init=_he, rngs=rngs)
        self.conv_2 = conv(inputs, outputs, 3, dtype=dtype, kernel_init=_he, rngs=rngs)
        self.skip = conv(inputs, outputs, 1, bias=False, dtype=dtype, kernel_init=_he, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.leaky_relu(self.conv_1(x), 0.2)
        y = jax.nn.leaky_relu(self.conv_2(y), 0.2)
        return (blur_pool(y) + self.skip(blur_pool(x))) / math.sqrt(2)


class StyleGAN2Discriminator(Pretrained):
    """The discriminator of the module's docstring."""

    config_class = StyleGAN2Config

    def __init__(self, config: StyleGAN2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        halvings, dtype = int(math.log2(config.resolution // 4)), config.dtype
        widths = [
            min(config.base_channels * 2**n, config.max_channels) for n in range(halvings + 1)
        ]
        last = widths[-1]
        self.conv_in = conv(
            config.in_channels, widths[0], 1, dtype=dtype, kernel_init=_he, rngs=rngs
        )
        self.blocks = nnx.List(
            _Block(widths[n], widths[n + 1], dtype=dtype, rngs=rngs) for n in range(halvings)
        )
        self.conv_out = conv(last + 1, last, 3, dtype=dtype, kernel_init=_he, rngs=rngs)
        self.hidden = nnx.Linear(16 * last, last, kernel_init=_he, rngs=rngs)
        self.logit = nnx.Linear(last, 1, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b 1"]:
        """Logits of `images` in [-1, 1], positive for real. `train` changes nothing.

        Raises:
          InputError: images of another size or number of channels than the config's.
        """
        expected = (self.config.resolution,) * 2 + (self.config.in_channels,)
        if images.shape[1:] != expected:
            raise InputError(
                f"StyleGAN2's discriminator: images are {images.shape[1:]} (height, width, "
                f"channels), it is configured for {expected}"
            )
        x = jax.nn.leaky_relu(self.conv_in(images), 0.2)
        for block in self.blocks:
            x = block(x)
        x = jnp.concatenate([x, batch_deviation(x, self.config.group_size)], axis=-1)
        x = jax.nn.leaky_relu(self.conv_out(x), 0.2).astype(jnp.float32)
        x = jax.nn.leaky_relu(self.hidden(x.reshape(len(x), -1)), 0.2)
        return self.logit(x)


def batch_deviation(x: Float[Array, "b h w c"], group_size: int) -> Float[Array, "b h w 1"]:
    """Mean deviation of features within groups of images, as a constant map for each image.

    Image i is in one group with i + b/g, i + 2b/g, ..., where g is the largest divisor of b that
    divides `group_size` (Karras et al. 2018, arXiv:1710.10196, section 3).
    """
    b, h, w, c = x.shape
    size = math.gcd(b, group_size)
    groups = x.astype(jnp.float32).reshape(size, b // size, h, w, c)
    deviation = jnp.sqrt(groups.var(axis=0) + 1e-8).mean((1, 2, 3))
    maps = jnp.tile(deviation, size)[:, None, None, None]
    return jnp.broadcast_to(maps, (b, h, w, 1)).astype(x.dtype)
