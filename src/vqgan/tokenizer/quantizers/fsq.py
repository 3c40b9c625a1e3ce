"""Finite scalar quantisation, FSQ (Mentzer et al. 2023, arXiv:2309.15505).

    channel i of L levels:  h = (L - 1) (1 - 0.001) / 2,   o = 1/2 where L is even, else 0
    y = h tanh(z + tan(o / h)) - o        n = round(y) in [-floor(L/2), floor((L-1)/2)]
    z_q = (y + stop_gradient(n - y)) / floor(L/2)
    id = sum_i (n_i + floor(L_i/2)) · L_1 ··· L_(i-1)            (channel 0 changes fastest)

Latents `[b, h, w, d]`, one channel a member of `levels`; ids `[b, h, w]` below the product of the
levels. There is no codebook, nothing to learn, to collapse or to look after, and no loss: what
keeps all codes in use is that the encoder has to spread its channels. Good where simplicity and
usage count; from some thousand codes on it reconstructs as well as a learned codebook. The paper
has 8,6,5 for 2**8 codes, 8,5,5,5 for 2**10, 7,5,5,5,5 for 2**12, 8,8,8,6,5 for 2**14 and
8,8,8,5,5,5 for 2**16. The cost: few channels for the decoder, and none below 5 levels that does
well, by the paper. Fewer levels can round the small latents of an untrained encoder to 0 all over,
and of a map of zeros the decoder's group norms make gradients without bound: the bias of the
tokenizer's projection after the quantizer, which does not start at 0, is what prevents that, so
that such levels should not go without `projections`.

With `symmetric` (Parker et al. 2024, arXiv:2411.19842) the levels of every channel, even ones
too, lie evenly from -1 to 1: z_q = 2 round((L - 1)(tanh(z) + 1) / 2) / (L - 1) - 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.errors import InputError
from vqgan.tokenizer.quantizers.base import Quantizer, QuantizerOutput, straight_through

_MARGIN = 1e-3  # so that rounding never reaches a level too many


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """Finite scalar quantizer. The default has about the codes of the paper's VQGAN."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Values that each channel may take; at least 2."""
    symmetric: bool = False
    """Levels lie evenly from -1 to 1; else even channels have one more below 0 than above."""

    @property
    def dim(self) -> int:
        """Channels of the latents."""
        return len(self.levels)

    @property
    def codebook_size(self) -> int:
        """Number of different ids."""
        return math.prod(self.levels)

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        if not self.levels or min(self.levels) < 2:
            raise InputError(f"quantizer.levels {self.levels}: each channel has at least 2")
        if self.codebook_size > 2**24:
            raise InputError(f"quantizer.levels {self.levels}: at most 2**24 codes in all")


class FiniteScalarQuantizer(Quantizer):
    """Quantizer by rounding. The gradient of `z_q` goes straight through the rounding, and by the
    slope of tanh to the latents."""

    def __init__(self, config: FSQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size = config.codebook_size

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        z = z.astype(jnp.float32)
        y, half = self._bounded(z), self._half()
        digits = jnp.floor(y + half + 0.5).astype(jnp.int32)
        return QuantizerOutput(
            z_q=straight_through(y / half, self._values(digits)),
            ids=jnp.sum(digits * self._places(), axis=-1, dtype=jnp.int32),
            losses={"quantizer": jnp.zeros(())},
        )

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return self._values(jnp.mod(ids[..., None] // self._places(), self._levels()))

    def _bounded(self, z: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Latents in units of a level, which lie at whole numbers away from the lowest, `-half`."""
        if self.config.symmetric:
            return jnp.tanh(z) * self._half()
        levels = self._levels()
        h = (levels - 1) * ((1 - _MARGIN) / 2)
        offset = (levels % 2 == 0) / 2
        shift = jnp.asarray(np.tan(offset / h), jnp.float32)
        return jnp.asarray(h, jnp.float32) * jnp.tanh(z + shift) - offset.astype(np.float32)

    def _values(self, digits: Int[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        return (digits - self._half()) / self._half()

    def _half(self) -> Float[np.ndarray, "1 1 1 d"]:
        levels = self._levels()
        return ((levels - 1) / 2 if self.config.symmetric else levels // 2).astype(np.float32)

    def _levels(self) -> Int[np.ndarray, "1 1 1 d"]:
        return np.array(self.config.levels, np.int32)[None, None, None]

    def _places(self) -> Int[np.ndarray, "1 1 1 d"]:
        """What a step of each channel adds to the id."""
        places = np.cumprod((1, *self.config.levels[:-1]))
        return places.astype(np.int32)[None, None, None]
