"""PatchGAN discriminator: a real-or-fake logit for every overlapping patch of an image.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks"
(arXiv:1611.07004), in the form that VQGAN trains against. With three strided layers a logit sees
70 x 70 pixels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vqgan.errors import InputError
from vqgan.nn import conv_general_dilated
from vqgan.serialization import Pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchGANConfig:
    """Shape of the discriminator.

    Attributes:
      in_channels: of the images.
      base_channels: width of the first layer; it doubles a layer up to eight times.
      num_layers: layers of stride 2. A logit sees 16, 34, 70 or 142 pixels for 1, 2, 3 or 4.
      dtype: of the computation; parameters, batch statistics and logits are float32.
    """

    in_channels: int = 3
    base_channels: int = 64
    num_layers: int = 3
    dtype: str = "float32"


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

    LeakyReLU(0.2) between them, batch normalisation after all but the first and the last.
    Convolution kernels start as N(0, 0.02), scales as N(1, 0.02), biases as zero.
    """

    config_class = PatchGANConfig

    def __init__(self, config: PatchGANConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        layers, base = config.num_layers, config.base_channels
        widths = [config.in_channels, *(base * min(2**n, 8) for n in range(layers + 1)), 1]
        strides = [2] * layers + [1, 1]
        self.convs = nnx.List(
            nnx.Conv(
                widths[i],
                widths[i + 1],
                (4, 4),
                strides=(stride, stride),
                padding=((1, 1), (1, 1)),
                use_bias=i in (0, layers + 1),  # elsewhere the norm would take it away
                dtype=jnp.dtype(config.dtype),
                kernel_init=nnx.initializers.normal(0.02),
                conv_general_dilated=conv_general_dilated,
                rngs=rngs,
            )
            for i, stride in enumerate(strides)
        )
        self.norms = nnx.List(BatchNorm(width, rngs=rngs) for width in widths[2:-1])

    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 1"]:
        """Logits of `images` in [-1, 1], positive for real.

        Args:
          train: normalise by the statistics of this batch and move the running ones (variables of
            kind `nnx.BatchStat`, changed in place) towards them; else use the running ones.

        Raises:
          InputError: an image side is below 3 * 2**num_layers, or the channels differ.
        """
        self._check(images.shape)
        x = jax.nn.leaky_relu(self.convs[0](images), 0.2)
        for convolution, norm in zip(list(self.convs)[1:-1], self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(convolution(x), train=train), 0.2)
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
