"""Encoder and decoder of VQGAN (arXiv:2012.09841, table 7), fully convolutional.

Level 0 is the image's own resolution; every further level halves it. The encoder runs through the
levels downwards, the decoder upwards, with a middle block of two residual blocks and one attention
at the lowest level of each.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vqgan.errors import InputError
from vqgan.nn import conv, fold
from vqgan.tokenizer.blocks import AttentionBlock, ResBlock, Upsample, downsample, group_norm


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
        for width in self.widths():
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
        groups, dtype = config.norm_groups, config.dtype
        self.blocks = nnx.List(
            [
                ResBlock(
                    inputs if i == 0 else outputs,
                    outputs,
                    groups=groups,
                    dropout=config.dropout,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(blocks)
            ]
        )
        self.attentions = nnx.List(
            [
                AttentionBlock(outputs, groups=groups, dtype=dtype, rngs=rngs)
                for _ in range(blocks if attend else 0)
            ]
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
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, config: AutoencoderConfig, rngs: nnx.Rngs):
        groups, dtype = config.norm_groups, config.dtype
        first, second = (
            ResBlock(
                channels, channels, groups=groups, dropout=config.dropout, dtype=dtype, rngs=rngs
            )
            for _ in range(2)
        )
        self.block_1, self.block_2 = first, second
        self.attention = AttentionBlock(channels, groups=groups, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w c"]:
        x = self.attention(self.block_1(x, fold(key, 0)))
        return self.block_2(x, fold(key, 1))


class Encoder(nnx.Module):
    """Images to a feature map, `factor` times smaller along each side."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.widths()
        inputs = [widths[0], *widths[:-1]]
        self.conv_in = conv(config.in_channels, widths[0], 3, dtype=config.dtype, rngs=rngs)
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
        self.downsamples = nnx.List(
            [downsample(width, dtype=config.dtype, rngs=rngs) for width in widths[:-1]]
        )
        self.middle = Middle(widths[-1], config=config, rngs=rngs)
        self.norm_out = group_norm(
            widths[-1], groups=config.norm_groups, dtype=config.dtype, rngs=rngs
        )
        self.conv_out = conv(widths[-1], config.z_channels, 3, dtype=config.dtype, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h2 w2 z"]:
        x = self.conv_in(images)
        for level, stage in enumerate(self.stages):
            x = stage(x, fold(key, level))
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
        x = self.middle(x, fold(key, len(self.stages)))
        return self.conv_out(nnx.swish(self.norm_out(x)))


class Decoder(nnx.Module):
    """A feature map back to images.

    It comes in two parts, `features` and the last layer `conv_out`, because the adaptive weight of
    the adversarial loss compares gradients at that layer.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.widths()
        outputs = widths[::-1]  # in the order of execution: lowest resolution first
        inputs = [widths[-1], *outputs[:-1]]
        self.conv_in = conv(config.z_channels, widths[-1], 3, dtype=config.dtype, rngs=rngs)
        self.middle = Middle(widths[-1], config=config, rngs=rngs)
        self.stages = nnx.List(
            [
                Stage(
                    inputs[i],
                    width,
                    config.num_res_blocks + 1,
                    attend=config.attends(len(widths) - 1 - i),
                    config=config,
                    rngs=rngs,
                )
                for i, width in enumerate(outputs)
            ]
        )
        self.upsamples = nnx.List(
            [Upsample(width, dtype=config.dtype, rngs=rngs) for width in outputs[:-1]]
        )
        self.norm_out = group_norm(
            widths[0], groups=config.norm_groups, dtype=config.dtype, rngs=rngs
        )
        self.conv_out = conv(widths[0], config.out_channels, 3, dtype=config.dtype, rngs=rngs)

    def features(
        self, z: Float[Array, "b h2 w2 z"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w d"]:
        """Everything before the last layer."""
        x = self.middle(self.conv_in(z), fold(key, len(self.stages)))
        for i, stage in enumerate(self.stages):
            x = stage(x, fold(key, i))
            if i < len(self.upsamples):
                x = self.upsamples[i](x)
        return nnx.swish(self.norm_out(x))

    def __call__(
        self, z: Float[Array, "b h2 w2 z"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w c"]:
        return self.conv_out(self.features(z, key)).astype(jnp.float32)
