"""Residual quantisation, RQ (Lee et al. 2022, arXiv:2203.01941; as in SoundStream,
arXiv:2107.03312).

    r_0 = z        e_i = code_i(r_i)        r_(i+1) = r_i - e_i        z_q = e_0 + ··· + e_(q-1)
    loss = the inner quantizer's, of each r_i with the e_j before it constant; their mean, or sum

Latents `[b, h, w, d]`, ids `[b, h, w, q]`, coarse to fine; each code refines what those before it
left over. q codes of k entries stand for k**q different latents at the cost of q searches in one
table of k: good at few positions of many bits each, as in RQ-VAE, 8x8x4 ids an image. With
`shared`, as there, one codebook serves all q; else every stage has its own, as in SoundStream. The
price is q ids a position for the prior. `codes` takes the first few of the q ids too, for a coarser
latent.

Any quantizer of one id may be inside. Those with codes of a fixed size (lfq, bsq, fsq, and vq with
`normalize`) fit residuals badly, which become smaller from stage to stage. The gradient of `z_q` is
that of its formula: where the inner quantizer's goes straight through, this one's does too. The
losses see earlier stages as constants, for which each stage after the first is applied twice;
compilers see one and the same product, except where codes are searched in chunks.
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
class ResidualConfig:
    """Residual quantizer over any quantizer of one id. Depth and sharing are RQ-VAE's."""

    kind: Literal["residual"] = "residual"
    inner: SingleConfig = field(default_factory=VQConfig)
    """The quantizer of each stage."""
    depth: int = 4
    """Stages, and ids a position."""
    shared: bool = True
    """One codebook for all stages."""
    losses: Literal["mean", "sum"] = "mean"
    """Over the stages: the sum is the paper's formula, the mean its code's."""

    @property
    def dim(self) -> int:
        """Channels of the latents."""
        return self.inner.dim

    @property
    def codebook_size(self) -> int:
        """Number of different ids at each of the places."""
        return self.inner.codebook_size

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_stages(self, "depth")


class ResidualQuantizer(Quantizer):
    """Quantizer in stages, each of what the one before left over."""

    def __init__(self, config: ResidualConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.places = config.depth
        count = 1 if config.shared else config.depth
        self.stages = nnx.List(make_stages(config.inner, count, rngs=rngs))
        self.codebook_size = self.stages[0].codebook_size

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        # Equal in value. One carries the gradient of the codes before, the other does not.
        rest = alone = z.astype(jnp.float32)
        z_q, ids, losses = jnp.zeros_like(rest), [], []
        for i in range(self.config.depth):
            stage, options = self._stage(i), {"key": fold(key, i), "step": step}
            out = stage(rest, **options)
            losses.append((stage(alone, **options) if i else out).losses)
            ids.append(out.ids)
            z_q = z_q + out.z_q
            rest, alone = rest - out.z_q, alone - jax.lax.stop_gradient(out.z_q)
        factor = 1 if self.config.losses == "mean" else self.config.depth
        return QuantizerOutput(
            z_q=z_q,
            ids=jnp.stack(ids, axis=-1),
            losses={name: factor * value for name, value in averaged(losses).items()},
        )

    def codes(self, ids: Int[Array, "b h w q"]) -> Float[Array, "b h w d"]:
        """The sum of the codes of ids, which may be the first of the `depth` only."""
        codes = [self._stage(i).codes(ids[..., i]) for i in range(ids.shape[-1])]
        return sum(codes, jnp.zeros_like(codes[0]))

    def maintain(
        self, z: Float[Array, "b h w d"], ids: Int[Array, "b h w q"], key: Key[Array, ""]
    ) -> None:
        rest, seen = jax.lax.stop_gradient(z.astype(jnp.float32)), []
        for i in range(self.config.depth):
            stage = self._stage(i)
            if self.config.shared:
                seen.append(rest)
                rest = rest - stage.codes(ids[..., i])
            else:  # each stage sees what the one before, as it is now, leaves over
                stage.maintain(rest, ids[..., i], jax.random.fold_in(key, i))
                rest = rest - stage(rest).z_q
        if self.config.shared:
            every = jnp.concatenate([ids[..., i] for i in range(self.config.depth)], axis=2)
            self._stage(0).maintain(jnp.concatenate(seen, axis=2), every, key)

    def _stage(self, i: int) -> Quantizer:
        return self.stages[0 if self.config.shared else i]
