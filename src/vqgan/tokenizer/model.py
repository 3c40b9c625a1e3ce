"""Stage 1: the tokenizer. Images to code ids and back.

    images -> encoder -> quant_conv -> z -> quantizer -> z_q, ids
    z_q -> post_quant_conv -> decoder -> images

`Tokenizer.encode`, `decode` and the call are compiled once for every shape and also work inside a
caller's own `jax.jit`. `latents` and `decoder_features` are the pieces from which
the training step (vqgan/train/tokenizer.py) is put together.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.errors import InputError
from vqgan.nn import conv, fold, torch_bias
from vqgan.serialization import Pretrained
from vqgan.tokenizer.autoencoder import AutoencoderConfig, Decoder, Encoder
from vqgan.tokenizer.quantizers import QuantizerConfig, VQConfig, make_quantizer

Content = Literal["images", "labels", "depth"]
Ids = Int[Array, "b h2 w2 *q"] | Int[Array, "b l"]
"""A grid, or a sequence of several grids: what the quantizer gives."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Autoencoder and quantizer. The defaults are the paper's f16 model with 1024 codes."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    quantizer: QuantizerConfig = field(default_factory=VQConfig)
    projections: bool = True
    """1x1 convolutions before and after the quantizer; without them its `dim` is `z_channels`."""
    content: Content = "images"
    """What the tokenizer is of: images; label maps, whose channels are the classes, one-hot in
    {0, 1} on the way in and logits on the way out; or depth maps, of one channel in [-1, 1]."""

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        self.autoencoder.check()
        self.quantizer.check()
        self._check_content()
        z, d = self.autoencoder.z_channels, self.quantizer.dim
        if not self.projections and z != d:
            raise InputError(
                f"quantizer.dim {d}: without projections it must be autoencoder.z_channels, {z}"
            )

    def _check_content(self) -> None:
        net = self.autoencoder
        channels = f"in_channels {net.in_channels} and out_channels {net.out_channels}"
        if self.content == "depth" and (net.in_channels, net.out_channels) != (1, 1):
            raise InputError(f"content depth: autoencoder.{channels} must both be 1")
        if self.content == "labels":
            if net.in_channels != net.out_channels:
                raise InputError(
                    f"content labels: autoencoder.{channels} must both be the number of classes"
                )
            if (net.pixel_range, net.output) != ("symmetric", "linear"):
                raise InputError(
                    "content labels: the output are logits, so autoencoder.pixel_range must be "
                    "symmetric and autoencoder.output linear"
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenizerOutput:
    """What a call of the tokenizer returns."""

    reconstruction: Float[Array, "b h w c"]
    """In [-1, 1] by training, not clipped; logits of a tokenizer of labels."""
    z: Float[Array, "b h2 w2 d"]
    """Latents before quantisation."""
    z_q: Float[Array, "b h2 w2 d"]
    """Latents after quantisation."""
    ids: Ids
    losses: dict[str, Float[Array, ""]]
    """The quantizer's loss terms by name."""


class Tokenizer(Pretrained):
    """VQGAN's first stage (arXiv:2012.09841).

    Images are float32 `[b, h, w, c]` in [-1, 1], of any size that `factor` divides; of one size
    only where the quantizer has several scales. Of label maps they are one-hot, and what comes back
    are logits (see `TokenizerConfig.content`).
    """

    config_class = TokenizerConfig

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs):
        config.check()
        super().__init__(config, rngs=rngs)
        z, d, dtype = (
            config.autoencoder.z_channels,
            config.quantizer.dim,
            config.autoencoder.dtype,
        )
        project = config.projections
        self.encoder = Encoder(config.autoencoder, rngs=rngs)
        self.quant_conv = conv(z, d, 1, dtype=dtype, rngs=rngs) if project else None
        self.quantizer = make_quantizer(config.quantizer, rngs=rngs)
        # Not 0: a quantizer of few codes can make every z_q of an untrained encoder 0 (FSQ does),
        # and of a map of zeros the decoder's norms make gradients without bound.
        bias = torch_bias(d)
        self.post_quant_conv = (
            conv(d, z, 1, bias_init=bias, dtype=dtype, rngs=rngs) if project else None
        )
        self.decoder = Decoder(config.autoencoder, rngs=rngs)

    @property
    def factor(self) -> int:
        """Pixels a token, along each side."""
        return self.config.autoencoder.factor

    @property
    def codebook_size(self) -> int:
        """Number of different ids."""
        return self.quantizer.codebook_size

    @jax.jit
    def encode(self, images: Float[Array, "b h w c"]) -> Ids:
        """Ids of images in [-1, 1]; `[b, h, w, q]` where the quantizer has q a position, and
        `[b, l]` where it has several scales.

        Raises:
          InputError: height or width is not a multiple of `factor`, channels do not fit, or a
            quantizer of several scales is for another size.
        """
        return self.quantizer(self.latents(images)).ids

    @jax.jit
    def decode(self, ids: Ids) -> Float[Array, "b h w c"]:
        """Images, not clipped, from ids in [0, codebook_size)."""
        return self.decoder(self._decoder_input(self.quantizer.codes(ids)))

    @jax.jit
    def __call__(self, images: Float[Array, "b h w c"]) -> TokenizerOutput:
        """Reconstruction, latents, ids and loss terms. Raises InputError as `encode` does."""
        z = self.latents(images)
        q = self.quantizer(z)
        return TokenizerOutput(
            reconstruction=self.decoder(self._decoder_input(q.z_q)),
            z=z,
            z_q=q.z_q,
            ids=q.ids,
            losses=q.losses,
        )

    def latents(
        self, images: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h2 w2 d"]:
        """Latents before quantisation; `key` turns dropout on."""
        _, h, w, c = images.shape
        if h % self.factor or w % self.factor or not h * w:
            raise InputError(
                f"images of {h}x{w} pixels: both sides must be multiples of {self.factor}"
            )
        channels = self.config.autoencoder.in_channels
        if c != channels:
            raise InputError(f"images of {c} channels: this tokenizer takes {channels}")
        z = self.encoder(images, fold(key, 0))
        return (z if self.quant_conv is None else self.quant_conv(z)).astype("float32")

    def decoder_features(
        self, z_q: Float[Array, "b h2 w2 d"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w e"]:
        """The decoder up to its last layer; `key` turns dropout on."""
        return self.decoder.features(self._decoder_input(z_q), fold(key, 1))

    def _decoder_input(self, z_q: Float[Array, "b h2 w2 d"]) -> Float[Array, "b h2 w2 z"]:
        return z_q if self.post_quant_conv is None else self.post_quant_conv(z_q)
