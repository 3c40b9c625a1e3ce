"""A discriminator on frozen features: small heads over the maps of a network that is not trained.

Sauer et al. 2021, "Projected GANs Converge Faster" (arXiv:2111.01007); with DINO's features it is
StyleGAN-T's (arXiv:2301.09515) and that of VAR's tokenizer (arXiv:2404.02905). The features come
from outside, so any extractor will do. Each map `[b, h, w, c]` has a head of its own:

    1x1 convolution to `width`, then y + norm(3x3 convolution of y), then 1x1 to a logit a position

with LeakyReLU(0.2) between. Norms are over groups of channels of one image, where the published
heads have batch and spectral norms. As published, the logits of all maps lie side by side, so in a
mean over them larger maps count for more.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vqgan.errors import InputError
from vqgan.nn import conv
from vqgan.serialization import Pretrained


@dataclass(frozen=True, kw_only=True)
class FeatureHeadsConfig:
    """Shape of the heads."""

    kind: Literal["features"] = "features"
    in_channels: int = 3
    """Of the images."""
    map_channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Of the feature maps; these are VGG16's, the extractor that comes with LPIPS."""
    width: int = 64
    norm_groups: int = 8

    def check(self) -> None:
        """Raises InputError where fields contradict one another."""
        if not self.map_channels:
            raise InputError("feature heads: map_channels is empty; name the maps to judge")
        if self.width % self.norm_groups:
            raise InputError(
                f"feature heads: norm_groups {self.norm_groups} does not divide width {self.width}"
            )


class _Head(nnx.Module):
    def __init__(self, inputs: int, width: int, groups: int, *, rngs: nnx.Rngs):
        self.conv_in = conv(inputs, width, 1, rngs=rngs)
        self.conv = conv(width, width, 3, rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=groups, rngs=rngs)
        self.logit = conv(width, 1, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        x = jax.nn.leaky_relu(self.conv_in(x), 0.2)
        x = jax.nn.leaky_relu(x + self.norm(self.conv(x)), 0.2)
        return self.logit(x)


class FeatureHeads(Pretrained):
    """The heads of the module's docstring."""

    config_class = FeatureHeadsConfig

    def __init__(self, config: FeatureHeadsConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.heads = nnx.List(
            _Head(c, config.width, config.norm_groups, rngs=rngs) for c in config.map_channels
        )

    def __call__(self, maps: list[Float[Array, "b _ _ _"]], *, train: bool) -> Float[Array, "b n"]:
        """Logits of images by their feature maps, positive for real. `train` changes nothing.

        Returns:
          The logits of all positions of all maps.

        Raises:
          InputError: other maps than the config's.
        """
        found = tuple(m.shape[-1] for m in maps)
        if found != self.config.map_channels:
            raise InputError(
                f"feature heads: the maps have {found} channels, the heads are configured for "
                f"map_channels={self.config.map_channels}"
            )
        return jnp.concatenate(
            [head(m).reshape(len(m), -1) for head, m in zip(self.heads, maps, strict=True)], axis=1
        )
