"""Gumbel-softmax quantisation (Jang et al. 2016, arXiv:1611.01144; as in DALL-E, arXiv:2102.12092,
and taming-transformers).

    logits = W z + b        p = softmax((logits + g) / temperature),  g ~ Gumbel(0, 1)
    ids = argmax p          z_q = (onehot(ids) - stop_gradient(p) + p) @ codebook
    loss = kl_weight * KL(softmax(logits) || uniform)

Latents `[b, h, w, d]`, a 1x1 convolution W `[k, d]` and b `[k]`, codebook `[k, d]`, ids `[b, h,
w]`. Codes are drawn, not looked up: every code gets a gradient in proportion to its probability,
which keeps codebooks in use without any care for dead codes. The price is noise in training, a
temperature to anneal, `d x k` more parameters, and some arrays of `bhw x min(k, chunk)` floats.

Without a key nothing is drawn (g = 0): ids are the most probable codes. Published code draws in
evaluation too; its ids are then random.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.tokenizer.quantizers.base import (
    CodebookStat,
    Quantizer,
    QuantizerOutput,
    check_positive,
    check_used_codes,
    straight_through_choice,
)
from vqgan.tokenizer.quantizers.chunked import (
    add_up,
    choose,
    normalised,
    scores,
    weighted_mean,
    with_slope,
)


@dataclass(frozen=True, kw_only=True)
class GumbelConfig:
    """Gumbel-softmax quantizer. The schedule is DALL-E's, all else taming's."""

    kind: Literal["gumbel"] = "gumbel"
    codebook_size: int = 8192
    """Codes in the table."""
    dim: int = 256
    kl_weight: float = 5e-4
    """Of the divergence from using all codes alike; the published f8 model has 1e-8."""
    temperature_start: float = 1.0
    temperature_end: float = 1 / 16
    temperature_steps: int = 150_000
    """Updates in which the temperature falls from start to end, as half a cosine."""
    straight_through: bool = True
    """Whether training decodes the one code drawn, or the mean of all by their probabilities."""
    used_codes: int = 0
    """Codes that may be chosen and that ids count, those in the buffer `used`; 0 is all of them."""
    chunk: int = 8192
    """Codes drawn from at once; more are taken in turns, with other noise from the same key."""

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        check_positive(self, "codebook_size", "dim", "temperature_start", "temperature_end")
        check_positive(self, "temperature_steps", "chunk")
        check_used_codes(self.used_codes, self.codebook_size)


class GumbelQuantizer(Quantizer):
    """Quantizer that draws its codes. The gradient of `z_q` passes through the probabilities of
    all codes, at the temperature of the step."""

    def __init__(self, config: GumbelConfig, *, rngs: nnx.Rngs):
        self.config = config
        k, used = config.codebook_size, config.used_codes
        self.codebook_size = used or k
        # A 1x1 convolution by its transpose: a row a code, as the chunks of both tables need it.
        rows = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
        self.proj_weight = nnx.Param(rows(rngs.params(), (k, config.dim), jnp.float32))
        self.proj_bias = nnx.Param(jnp.zeros((k,)))
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (k, config.dim)))
        self.used = CodebookStat(jnp.arange(used, dtype=jnp.int32)) if used else None

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        z, config = z.astype(jnp.float32), self.config
        temperature, table, constant = self.temperature(step), self._table(), jax.lax.stop_gradient
        weights, bias = self.proj_weight[...], self.proj_bias[...]
        if self.used is not None:
            weights, bias = weights[self.used[...]], bias[self.used[...]]

        def views(ids: Array, weights: Array, bias: Array, *_: Array) -> list[Array]:
            logits = scores(z, weights) + bias[None, None, None]
            noisy = logits
            if key is not None:
                draw = key if len(ids) == len(table) else jax.random.fold_in(key, ids[0])
                noisy = logits + jax.random.gumbel(draw, logits.shape)
            return [noisy, noisy / temperature, logits]

        ids, totals = choose(views, z, [weights, bias], config.chunk)

        hard = config.straight_through or key is None

        def parts(log_p: list[Array], *rows: Array) -> dict[str, Array]:
            drawn, codes = jnp.exp(log_p[0]), rows[-1]
            kl, slope = with_slope(self._divergence, log_p[1])
            return {
                "mean": weighted_mean(drawn, constant(codes) if hard else codes),
                "mean_mass": jnp.sum(drawn, axis=-1),
                "kl": kl,
                "kl_slope": slope,
                "kl_mass": jnp.sum(jnp.exp(log_p[1]), axis=-1),
            }

        sums = add_up(parts, views, totals, [weights, bias, table], config.chunk)
        mean = normalised(sums["mean"], sums["mean"], sums["mean_mass"][..., None])
        kl = normalised(sums["kl"], sums["kl_slope"], sums["kl_mass"])
        z_q = straight_through_choice(table[ids], mean) if hard else mean
        return QuantizerOutput(z_q=z_q, ids=ids, losses={"kl": config.kl_weight * jnp.mean(kl)})

    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        return self._table()[ids]

    def temperature(self, step: Int[Array, ""] | None) -> Float[Array, ""]:
        """At a step; at the end of the schedule without one."""
        start, end = self.config.temperature_start, self.config.temperature_end
        if step is None:
            return jnp.asarray(end, jnp.float32)
        progress = jnp.minimum(step / self.config.temperature_steps, 1.0)
        return end + (start - end) * (1 + jnp.cos(jnp.pi * progress)) / 2

    def _table(self) -> Float[Array, "n d"]:
        codebook = self.codebook[...]
        return codebook if self.used is None else codebook[self.used[...]]

    def _divergence(self, log_p: Float[Array, "b h w n"]) -> Float[Array, "b h w"]:
        """Share of some codes in the divergence from the uniform distribution over the whole
        table, whatever part of it is in use."""
        p = jnp.exp(log_p)
        return jnp.sum(p * jnp.log(p * self.config.codebook_size + 1e-10), axis=-1)
