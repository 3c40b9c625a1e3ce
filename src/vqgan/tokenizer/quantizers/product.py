"""Product quantisation (Jégou et al. 2011, doi:10.1109/TPAMI.2010.57; for tokenizers, for example,
HiFi-Codec, arXiv:2305.02765).

    z = [z_0, ..., z_(q-1)]        e_i = code_i(z_i)        z_q = [e_0, ..., e_(q-1)]
    loss = the mean of the inner quantizer's over the groups

Latents `[b, h, w, q d]`, in q groups of the d channels that the inner quantizer has; ids `[b, h, w,
q]`. q tables of k codes stand for k**q different latents, each searched in d channels only: the
cheapest way to many bits a position. Groups are quantised on their own, so what they have in common
is stored several times, unlike in residual.py, and no id is more important than another. The price
is q ids a position for the prior. Any quantizer of one id may be inside, and its gradient is kept.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.nn import fold
from vqgan.tokenizer.quantizers.base import Quantizer, QuantizerOutput
from vqgan.tokenizer.quantizers.single import SingleConfig, averaged, check_stages, make_stages
from vqgan.tokenizer.quantizers.vq import VQConfig


@dataclass(frozen=True, kw_only=True)
class ProductConfig:
    """Product quantizer over any quantizer of one id."""

    kind: Literal["product"] = "product"
    inner: SingleConfig = field(default_factory=lambda: VQConfig(dim=64))
    """The quantizer of each group, with the channels of one group."""
    groups: int = 4
    """Groups of channels, and ids a position."""
    shared: bool = False
    """One codebook for all groups."""

    @property
    def dim(self) -> int:
        """Channels of the latents."""
        return self.groups * self.inner.dim

    @property
    def codebook_size(self) -> int:
        """Number of different ids at each of the places."""
        return self.inner.codebook_size

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_stages(self, "groups")


class ProductQuantizer(Quantizer):
    """Quantizer of groups of channels, each on its own."""

    def __init__(self, config: ProductConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.places = config.groups
        count = 1 if config.shared else config.groups
        self.stages = nnx.List(make_stages(config.inner, count, rngs=rngs))
        self.codebook_size = self.stages[0].codebook_size

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        outs = [
            self._stage(i)(part, key=fold(key, i), step=step)
            for i, part in enumerate(self._parts(z))
        ]
        return QuantizerOutput(
            z_q=jnp.concatenate([out.z_q for out in outs], axis=-1),
            ids=jnp.stack([out.ids for out in outs], axis=-1),
            losses=averaged([out.losses for out in outs]),
        )

    def codes(self, ids: Int[Array, "b h w q"]) -> Float[Array, "b h w d"]:
        parts = [self._stage(i).codes(ids[..., i]) for i in range(self.config.groups)]
        return jnp.concatenate(parts, axis=-1)

    def maintain(
        self, z: Float[Array, "b h w d"], ids: Int[Array, "b h w q"], key: Key[Array, ""]
    ) -> None:
        parts = self._parts(z)
        if self.config.shared:
            every = jnp.concatenate([ids[..., i] for i in range(self.config.groups)], axis=2)
            self._stage(0).maintain(jnp.concatenate(parts, axis=2), every, key)
            return
        for i, part in enumerate(parts):
            self._stage(i).maintain(part, ids[..., i], jax.random.fold_in(key, i))

    def _parts(self, z: Float[Array, "b h w d"]) -> list[Float[Array, "b h w e"]]:
        return jnp.split(z, self.config.groups, axis=-1)

    def _stage(self, i: int) -> Quantizer:
        return self.stages[0 if self.config.shared else i]
