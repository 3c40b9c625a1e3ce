"""Encoder and decoder of VQGAN (arXiv:2012.09841, table 7), fully convolutional.

Level 0 is the image's own resolution; every further level halves it. The encoder runs through the
levels downwards, the decoder upwards, with a middle of two residual blocks and one attention at the
lowest level of each. Options cover what later tokenizers changed about it: MaskGIT
(arXiv:2202.04200), Open-MAGVIT2 (arXiv:2409.04410) and latent diffusion (arXiv:2112.10752).
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vqgan.errors import InputError
from vqgan.nn import conv, fold
from vqgan.tokenizer.blocks import (
    AdaptiveNorm,
    AttentionBlock,
    AveragePool,
    DepthToSpace,
    Repeat,
    ResBlock,
    Upsample,
    downsample,
    group_norm,
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Architecture of the encoder and the decoder. The defaults are the paper's f16 network."""

    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    """Channels at level 0 ("ch" in the published configs)."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One entry a level; the downsampling factor is 2 to the number of entries less one."""
    num_res_blocks: int = 2
    """Residual blocks a level; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Side lengths, for images of `resolution`, at which every residual block is followed by
    attention."""
    resolution: int = 256
    """Side length, in pixels, of the images that the network is made for. Others work too."""
    z_channels: int = 256
    """Channels of the encoder's output."""
    dropout: float = 0.0
    norm_groups: int = 32
    middle_blocks: int = 2
    """Residual blocks in the middle of the encoder, and of the decoder."""
    middle_attention: bool = True
    """Attention after the first of them."""
    decoder_extra_blocks: int = 1
    """Residual blocks that the decoder has more than the encoder, at every level."""
    block_bias: bool = True
    """Biases of the convolutions in residual blocks, and of the encoder's first one."""
    shortcut_of: Literal["input", "output"] = "input"
    """What the shortcut convolution of a block that changes channels sees; MaskGIT's: "output"."""
    latent_kernel: Literal[1, 3] = 3
    """Side of the encoder's last convolution."""
    downsample: Literal["conv", "conv_symmetric", "average"] = "conv"
    """3x3 convolution of stride 2, padded at the far ends or all around, or 2x2 averages."""
    upsample: Literal["conv", "nearest", "depth_to_space"] = "conv"
    """Nearest neighbour with a 3x3 convolution after it or none, or depth to space."""
    adaptive_norm: bool = False
    """A GroupNorm by the latents before every level of the decoder, as in Open-MAGVIT2."""
    pixel_range: Literal["symmetric", "unit"] = "symmetric"
    """What the network itself sees: [-1, 1] or [0, 1]. Outside of it images are in [-1, 1]."""
    output: Literal["linear", "tanh"] = "linear"
    """After the last layer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What convolutions compute in; parameters are float32 always."""

    @property
    def factor(self) -> int:
        """Pixels a token, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def widths(self) -> list[int]:
        """Channels of every level."""
        return [self.base_channels * m for m in self.channel_multipliers]

    def attends(self, level: int) -> bool:
        """Whether the residual blocks of this level are followed by attention."""
        return self.resolution // 2**level in self.attention_resolutions

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        if self.resolution % self.factor:
            raise InputError(
                f"resolution {self.resolution} is not a multiple of {self.factor}, which is what "
                f"{len(self.channel_multipliers)} channel_multipliers downsample by"
            )
        reached = {self.resolution // 2**i for i in range(len(self.channel_multipliers))}
        if missed := set(self.attention_resolutions) - reached:
            raise InputError(
                f"attention_resolutions {sorted(missed)} are at no level: "
                f"resolution {self.resolution} passes through {sorted(reached, reverse=True)}"
            )
        if self.middle_blocks < 1:
            raise InputError(f"middle_blocks {self.middle_blocks}: at least one is needed")
        for width in (self.base_channels, *self.widths()):
            if width % self.norm_groups:
                raise InputError(f"{width} channels do not divide into {self.norm_groups} groups")


class Stage(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where `attend` is set."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        attend: bool,
        config: AutoencoderConfig,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            [_block(inputs if i == 0 else outputs, outputs, config, rngs) for i in range(blocks)]
        )
        self.attentions = nnx.List(
            [_attention(outputs, config, rngs) for _ in range(blocks if attend else 0)]
        )

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w d"]:
        for i, block in enumerate(self.blocks):
            x = block(x, fold(key, i))
            if self.attentions:
                x = self.attentions[i](x)
        return x


class Middle(nnx.Module):
    """Residual blocks at the lowest level, with attention after the first."""

    def __init__(self, channels: int, *, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            [_block(channels, channels, config, rngs) for _ in range(config.middle_blocks)]
        )
        self.attention = _attention(channels, config, rngs) if config.middle_attention else None

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w c"]:
        for i, block in enumerate(self.blocks):
            x = block(x, fold(key, i))
            if i == 0 and self.attention is not None:
                x = self.attention(x)
        return x


def _block(inputs: int, outputs: int, config: AutoencoderConfig, rngs: nnx.Rngs) -> ResBlock:
    return ResBlock(
        inputs,
        outputs,
        groups=config.norm_groups,
        dropout=config.dropout,
        bias=config.block_bias,
        shortcut_of=config.shortcut_of,
        dtype=config.dtype,
        rngs=rngs,
    )


def _attention(channels: int, config: AutoencoderConfig, rngs: nnx.Rngs) -> AttentionBlock:
    return AttentionBlock(channels, groups=config.norm_groups, dtype=config.dtype, rngs=rngs)


def _norm(channels: int, config: AutoencoderConfig, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return group_norm(channels, groups=config.norm_groups, dtype=config.dtype, rngs=rngs)


def _downsample(channels: int, config: AutoencoderConfig, rngs: nnx.Rngs) -> nnx.Module:
    if config.downsample == "average":
        return AveragePool()
    symmetric = config.downsample == "conv_symmetric"
    return downsample(channels, symmetric=symmetric, dtype=config.dtype, rngs=rngs)


def _upsample(channels: int, config: AutoencoderConfig, rngs: nnx.Rngs) -> nnx.Module:
    match config.upsample:
        case "conv":
            return Upsample(channels, dtype=config.dtype, rngs=rngs)
        case "nearest":
            return Repeat()
        case "depth_to_space":
            return DepthToSpace(channels, dtype=config.dtype, rngs=rngs)
        case _:
            assert_never(config.upsample)


class Encoder(nnx.Module):
    """Images to a feature map, `factor` times smaller along each side."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, dtype = config.widths(), config.dtype
        inputs = [config.base_channels, *widths[:-1]]
        self.pixel_range = config.pixel_range
        self.conv_in = conv(
            config.in_channels, inputs[0], 3, bias=config.block_bias, dtype=dtype, rngs=rngs
        )
        self.stages = nnx.List(
            [
                Stage(
                    inputs[level],
                    width,
                    config.num_res_blocks,
                    attend=config.attends(level),
                    config=config,
                    rngs=rngs,
                )
                for level, width in enumerate(widths)
            ]
        )
        self.downsamples = nnx.List([_downsample(width, config, rngs) for width in widths[:-1]])
        self.middle = Middle(widths[-1], config=config, rngs=rngs)
        self.norm_out = _norm(widths[-1], config, rngs)
        self.conv_out = conv(
            widths[-1], config.z_channels, config.latent_kernel, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, images: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h2 w2 z"]:
        x = self.conv_in((images + 1) / 2 if self.pixel_range == "unit" else images)
        for level, stage in enumerate(self.stages):
            x = stage(x, fold(key, level))
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
        x = self.middle(x, fold(key, len(self.stages)))
        return self.conv_out(nnx.swish(self.norm_out(x)))


class Decoder(nnx.Module):
    """A feature map back to images.

    It comes in parts, `features`, the last layer `conv_out` and `to_pixels`, because the adaptive
    weight of the adversarial loss compares gradients at that layer.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.widths()
        outputs = widths[::-1]  # in the order of execution: lowest resolution first
        inputs = [widths[-1], *outputs[:-1]]
        self.pixel_range, self.output = config.pixel_range, config.output
        self.conv_in = conv(config.z_channels, widths[-1], 3, dtype=config.dtype, rngs=rngs)
        self.middle = Middle(widths[-1], config=config, rngs=rngs)
        self.adaptive_norms = nnx.List(
            [
                AdaptiveNorm(
                    config.z_channels,
                    width,
                    groups=config.norm_groups,
                    dtype=config.dtype,
                    rngs=rngs,
                )
                for width in (inputs if config.adaptive_norm else [])
            ]
        )
        self.stages = nnx.List(
            [
                Stage(
                    inputs[i],
                    width,
                    config.num_res_blocks + config.decoder_extra_blocks,
                    attend=config.attends(len(widths) - 1 - i),
                    config=config,
                    rngs=rngs,
                )
                for i, width in enumerate(outputs)
            ]
        )
        self.upsamples = nnx.List([_upsample(width, config, rngs) for width in outputs[:-1]])
        self.norm_out = _norm(widths[0], config, rngs)
        self.conv_out = conv(widths[0], config.out_channels, 3, dtype=config.dtype, rngs=rngs)

    def features(
        self, z: Float[Array, "b h2 w2 z"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w d"]:
        """Everything before the last layer."""
        x = self.middle(self.conv_in(z), fold(key, len(self.stages)))
        for i, stage in enumerate(self.stages):
            if self.adaptive_norms:
                x = self.adaptive_norms[i](x, z)
            x = stage(x, fold(key, i))
            if i < len(self.upsamples):
                x = self.upsamples[i](x)
        return nnx.swish(self.norm_out(x))

    def __call__(
        self, z: Float[Array, "b h2 w2 z"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w c"]:
        return to_pixels(self.conv_out(self.features(z, key)), self.pixel_range, self.output)


def to_pixels(y: Float[Array, "b h w c"], pixel_range: str, output: str) -> Float[Array, "b h w c"]:
    """The last layer's output as float32 images in [-1, 1], for the options of these names."""
    y = y.astype(jnp.float32)
    if output == "tanh":
        y = jnp.tanh(y)
    return 2 * y - 1 if pixel_range == "unit" else y
