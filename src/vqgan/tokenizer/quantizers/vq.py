"""Vector quantisation with a learned codebook (van den Oord et al. 2017, arXiv:1711.00937).

    ids = argmin_k |z - e_k|²        z_q = z + stop_gradient(e_ids - z)
    loss = |e_ids - stop_gradient(z)|² + beta |stop_gradient(e_ids) - z|²  (means over entries)

Latents `[b, h, w, d]`, codebook `[k, d]`, ids `[b, h, w]`. The search costs one `[bhw, d] x [d, k]`
product and holds `bhw x min(k, chunk)` floats. Its known weakness is that codes which no latent is
nearest to get no gradient and stay unused. Two remedies are built in: the codebook starts from
latents of the first batch (or their k-means), and a code that was the nearest for none of the last
`revive_after` batches is moved onto a latent of the current one (random restarts, as in Jukebox,
arXiv:2005.00341). A third is `normalize`, the cosine codebook of ViT-VQGAN (arXiv:2110.04627) and
LlamaGen (arXiv:2406.06525), which with few channels (8 to 32) keeps large codebooks in use: latents
and codes are scaled to length 1 before all of the above, and `z_q` is such a unit code.

Straight through, all latents of a code get the same gradient, wherever they are around it. With
`rotation` each gets it turned and scaled as the code is turned and scaled from that latent (the
rotation trick, arXiv:2410.06424), at the cost of a few inner products.

Codes of few channels need nothing else: `dim` is theirs, and the tokenizer's 1x1 convolutions
before and after the quantizer project to it and back.

`used_codes` is for published codebooks of which training left only some codes alive: ids then
count these alone, so that a prior has fewer to choose from (the remapping of taming-transformers).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.errors import InputError
from vqgan.tokenizer.quantizers.base import (
    CodebookStat,
    Quantizer,
    QuantizerOutput,
    check_positive,
    check_used_codes,
    rotated,
    straight_through,
    unit,
)
from vqgan.tokenizer.quantizers.care import chosen, counted, dead_codes, k_means
from vqgan.tokenizer.quantizers.chunked import nearest


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Vector quantizer. The defaults are the paper's."""

    kind: Literal["vq"] = "vq"
    """Others are "gumbel", "ibq", "lfq", "bsq", "fsq", "ema" and "simvq", each with options of its
    own, "residual" and "product" over one of these, `inner`, and "multiscale"."""
    codebook_size: int = 1024
    """Codes in the table."""
    dim: int = 256
    beta: float = 0.25
    """Weight of the term that `beta_on` names; the other one has weight 1."""
    beta_on: Literal["commitment", "codebook"] = "commitment"
    """"codebook" is the swapped form that all published taming weights were trained with."""
    normalize: bool = False
    """Search among directions: latents and codes have length 1."""
    rotation: bool = False
    """Turn and scale the gradient of `z_q` as the code is turned and scaled from its latent, in
    place of straight through."""
    init_from_data: bool = True
    """Start from latents of the first batch, not from U(-1/k, 1/k)."""
    k_means: int = 0
    """Lloyd iterations on the first batch, with such latents to start from; 0 takes these."""
    revive_after: int = 100
    """Batches that a code may go unused before it is moved; 0 never moves any."""
    used_codes: int = 0
    """Codes that ids count, those in the buffer `used`; 0 counts all and has no buffer."""
    unknown_id: int = -1
    """-1 searches the used codes only. Else, as published: all codes are searched, and what is not
    in use gets this id, or `used_codes` for an id of its own; such ids do not give z_q back."""
    chunk: int = 8192
    """Codes compared at once; more are searched in turns, for a memory of `bhw x chunk` floats."""

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_positive(self, "codebook_size", "dim", "chunk")
        if self.k_means < 0 or (self.k_means and not self.init_from_data):
            raise InputError(
                f"quantizer.k_means {self.k_means}: must be at least 0, and needs init_from_data"
            )
        check_used_codes(self.used_codes, self.codebook_size)
        if self.used_codes and (self.init_from_data or self.revive_after):
            raise InputError(
                f"quantizer.used_codes {self.used_codes}: the codes of a model are settled, so it "
                "needs init_from_data false and revive_after 0"
            )
        if not -1 <= self.unknown_id <= (self.used_codes or -1):
            raise InputError(
                f"quantizer.unknown_id {self.unknown_id}: must be -1, or from 0 to used_codes, "
                f"which is {self.used_codes}, where that is set"
            )


class VectorQuantizer(Quantizer):
    """Nearest-neighbour quantizer. The gradient of `z_q` goes straight through to the latents, or
    to the latents of length 1, or turned by `rotation`."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        self.config = config
        k, used = config.codebook_size, config.used_codes
        self.codebook_size = (used or k) + (config.unknown_id == used > 0)
        uniform = jax.random.uniform(rngs.params(), (k, config.dim), minval=-1 / k, maxval=1 / k)
        self.codebook = nnx.Param(self._scaled(uniform))
        self.batches_unused = CodebookStat(jnp.zeros((k,), jnp.int32))
        self.batches_seen = CodebookStat(jnp.zeros((), jnp.int32))
        self.used = CodebookStat(jnp.arange(used, dtype=jnp.int32)) if used else None

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        z = self._scaled(z.astype(jnp.float32))
        table = self._scaled(self.codebook[...])
        rows = self._nearest(z, table)
        codes = table[rows]
        commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z))
        codebook = jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z)))
        if self.config.beta_on == "commitment":
            commitment = self.config.beta * commitment
        else:
            codebook = self.config.beta * codebook
        return QuantizerOutput(
            z_q=(rotated if self.config.rotation else straight_through)(z, codes),
            ids=self._ids(rows),
            losses={"commitment": commitment, "codebook": codebook},
        )

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        if self.used is not None:
            # The id of all unknown codes, where it is one of its own, stands for the first code.
            ids = self.used[...][jnp.where(ids < self.config.used_codes, ids, 0)]
        return self._scaled(self.codebook[...])[ids]

    def maintain(
        self, z: Float[Array, "b h w d"], ids: Int[Array, "b h w"], key: Key[Array, ""]
    ) -> None:
        if self.used is not None:
            return
        config, k = self.config, self.config.codebook_size
        dead, self.batches_unused[...] = dead_codes(
            counted(ids, k) > 0,
            self.batches_unused[...],
            self.batches_seen[...] == 0,
            init_from_data=config.init_from_data,
            revive_after=config.revive_after,
        )
        latents = self._scaled(z.astype(jnp.float32)).reshape(-1, z.shape[-1])
        places = chosen(latents, k, key)
        if config.k_means:
            places = jax.lax.cond(
                self.batches_seen[...] == 0,
                lambda x: self._scaled(k_means(latents, x, config.k_means, config.chunk)),
                lambda x: x,
                places,
            )
        moved = jnp.where(dead[:, None], places, self.codebook[...])
        self.codebook[...] = jax.lax.stop_gradient(moved)
        self.batches_seen[...] += 1

    def _scaled(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return unit(x) if self.config.normalize else x

    def _nearest(
        self, z: Float[Array, "b h w d"], table: Float[Array, "k d"]
    ) -> Int[Array, "b h w"]:
        """Rows of the table that are nearest; the first among equals."""
        among = None
        if self.used is not None and self.config.unknown_id == -1:
            among = self.used[...]
            table = table[among]
        rows = nearest(z, table, self.config.chunk)
        return rows if among is None else among[rows]

    def _ids(self, rows: Int[Array, "b h w"]) -> Int[Array, "b h w"]:
        """Ids of rows of the table: their first place among the used codes, or `unknown_id`."""
        if self.used is None:
            return rows
        n, k = self.config.used_codes, self.config.codebook_size
        places = jnp.full((k,), n, jnp.int32).at[self.used[...]].min(jnp.arange(n, dtype=jnp.int32))
        ids = places[rows]
        return jnp.where(ids < n, ids, self.config.unknown_id)
