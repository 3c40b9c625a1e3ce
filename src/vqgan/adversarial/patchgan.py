"""PatchGAN discriminator: a real-or-fake logit for every overlapping patch of an image.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks"
(arXiv:1611.07004), in the form that VQGAN trains against. With three strided layers a logit sees
70 x 70 pixels. With `norm="group"` and `blur` no image depends on the others of its batch, and
nothing aliases; the discriminator of VQGAN+ that is also of this kind is adversarial/vqgan_plus.py.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vqgan.adversarial.layers import ActNorm, blur_pool
from vqgan.errors import InputError
from vqgan.nn import conv_general_dilated
from vqgan.serialization import Pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchGANConfig:
    """Shape of the discriminator.

    Attributes:
      kind: others are "stylegan2", "features" and "vqgan-plus", each with options of its own.
      in_channels: of the images.
      base_channels: width of the first layer; it doubles a layer up to eight times.
      num_layers: layers of stride 2. A logit sees 16, 34, 70 or 142 pixels for 1, 2, 3 or 4.
      norm: after all convolutions but the first and the last; "batch" is the published one.
      norm_groups: of "group"; a divisor of all widths from the second on.
      blur: convolve at full size, then `blur_pool`, in place of each stride of 2; about four times
        the operations.
      dtype: of the computation; parameters, batch statistics and logits are float32.
    """

    kind: Literal["patchgan"] = "patchgan"
    in_channels: int = 3
    base_channels: int = 64
    num_layers: int = 3
    norm: Literal["batch", "group", "actnorm", "none"] = "batch"
    norm_groups: int = 32
    blur: bool = False
    dtype: str = "float32"

    def check(self) -> None:
        """Raises InputError where fields contradict one another."""
        if self.norm == "group" and 2 * self.base_channels % self.norm_groups:
            raise InputError(
                f"PatchGAN: norm_groups {self.norm_groups} does not divide the "
                f"{2 * self.base_channels} channels of the second layer"
            )


class BatchNorm(nnx.Module):
    """Batch normalisation with PyTorch's running statistics, so that imported ones continue.

    `nnx.BatchNorm` moves the running variance by the biased estimate, PyTorch by the unbiased one.
    """

    momentum = 0.1  # share of the new batch in the running statistics
    epsilon = 1e-5

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(1.0 + 0.02 * rngs.params.normal((channels,)))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        x32 = x.astype(jnp.float32)
        if train:
            mean, var = x32.mean((0, 1, 2)), x32.var((0, 1, 2))
            self._move(mean, var, count=x.size // x.shape[-1])
        else:
            mean, var = self.mean[...], self.var[...]
        gain = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        offset = self.bias[...] - mean * gain
        return (x32 * gain[None, None, None] + offset[None, None, None]).astype(x.dtype)

    def _move(self, mean: Float[Array, "c"], var: Float[Array, "c"], count: int) -> None:
        unbiased = var * (count / (count - 1))
        for running, batch in ((self.mean, mean), (self.var, unbiased)):
            step = self.momentum * (jax.lax.stop_gradient(batch) - running[...])
            running[...] = running[...] + step


class PatchGAN(Pretrained):
    """4 x 4 convolutions: `num_layers` of stride 2, one of stride 1, one to a single channel.

    LeakyReLU(0.2) between them, a norm after all but the first and the last.
    Convolution kernels start as N(0, 0.02), scales as N(1, 0.02), biases as zero.
    """

    config_class = PatchGANConfig

    def __init__(self, config: PatchGANConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        layers, base = config.num_layers, config.base_channels
        widths = [config.in_channels, *(base * min(2**n, 8) for n in range(layers + 1)), 1]
        strides = [2] * layers + [1, 1]
        ends = (0, layers + 1)
        blurred = config.blur  # convolutions then keep the size; the stride is the pooling's
        self.convs = nnx.List(
            nnx.Conv(
                widths[i],
                widths[i + 1],
                (4, 4),
                strides=(1, 1) if blurred else (stride, stride),
                padding=((1, 2), (1, 2)) if blurred and stride == 2 else ((1, 1), (1, 1)),
                # Batch norm would take it away.
                use_bias=i in ends or config.norm != "batch",
                dtype=jnp.dtype(config.dtype),
                kernel_init=nnx.initializers.normal(0.02),
                conv_general_dilated=conv_general_dilated,
                rngs=rngs,
            )
            for i, stride in enumerate(strides)
        )
        widths = widths[2:-1] if config.norm != "none" else []
        self.norms = nnx.List(_norm(config, width, rngs) for width in widths)

    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 1"]:
        """Logits of `images` in [-1, 1], positive for real.

        Args:
          train: for "batch", normalise by the statistics of this batch and move the running ones
            (variables of kind `nnx.BatchStat`, changed in place) towards them, else use the running
            ones; for "actnorm", take the statistics of the first batch.

        Raises:
          InputError: an image side is below 3 * 2**num_layers, or the channels differ.
        """
        self._check(images.shape)
        x = images
        for i, convolution in enumerate(list(self.convs)[:-1]):
            x = convolution(x)
            if i > 0 and self.config.norm != "none":
                norm = self.norms[i - 1]
                x = norm(x) if isinstance(norm, nnx.GroupNorm) else norm(x, train=train)
            x = jax.nn.leaky_relu(x, 0.2)
            if self.config.blur and i < self.config.num_layers:
                x = blur_pool(x)
        return self.convs[-1](x).astype(jnp.float32)

    def _check(self, shape: tuple[int, ...]) -> None:
        _, height, width, channels = shape
        if channels != self.config.in_channels:
            raise InputError(
                f"PatchGAN: images have {channels} channels, the discriminator is configured for "
                f"in_channels={self.config.in_channels}"
            )
        smallest = 3 * 2**self.config.num_layers
        if min(height, width) < smallest:
            raise InputError(
                f"PatchGAN: images of {height}x{width} are too small for num_layers="
                f"{self.config.num_layers}, which needs at least {smallest}x{smallest}; use larger "
                "images or fewer layers"
            )


def _norm(config: PatchGANConfig, width: int, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "group":
        dtype = jnp.dtype(config.dtype)
        return nnx.GroupNorm(width, num_groups=config.norm_groups, dtype=dtype, rngs=rngs)
    return (ActNorm if config.norm == "actnorm" else BatchNorm)(width, rngs=rngs)
