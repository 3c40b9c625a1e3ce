"""What every quantizer is: one call, one return type, and an exact inverse of its ids."""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.errors import InputError

Ids = Int[Array, "b h w *q"] | Int[Array, "b l"]
"""One a position, or q; or a sequence, where ids are of several grids (multiscale.py)."""


class CodebookStat(nnx.Variable):
    """What a quantizer knows about its codes: saved with the model, never seen by an optimiser."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizerOutput:
    """Quantised latents, their ids, and the losses by name, each a scalar."""

    z_q: Float[Array, "b h w d"]
    """Equal to the codes in value; every quantizer says what its gradient is."""
    ids: Ids
    losses: dict[str, Float[Array, ""]]
    """Weighted by the config, so that their sum is the quantizer's share of the objective. Never
    empty: where there is nothing to lose, `quantizer` is 0."""


class Quantizer(nnx.Module):
    """Interface of all quantizers. Subclasses are final.

    Their configs have `kind`, `dim` (channels of the latents and of the codes), `codebook_size`
    and `check()`, which raises InputError where fields contradict one another.
    """

    codebook_size: int
    """Number of different ids, at each of the q places where there are several; fewer than the
    config's `codebook_size` where some are left out."""
    places: int = 1
    """Ids a position."""

    @abc.abstractmethod
    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        """Quantises latents.

        Args:
          z: latents of any float type; what is returned is float32.
          key: for quantizers that draw; without one (evaluation) they do not, and
            `codes(ids)` equals `z_q`.
          step: updates so far, for quantizers with a schedule; without one it is at its end.
        """

    @abc.abstractmethod
    def codes(self, ids: Ids) -> Float[Array, "b h w d"]:
        """The codes of ids: `codes(self(z).ids)` equals `self(z).z_q`."""

    def maintain(self, z: Float[Array, "b h w d"], ids: Ids, key: Key[Array, ""]) -> None:
        """Called in place after an optimiser's update, with what the update had quantised.

        Does nothing where a quantizer has no codes to look after.
        """

    def occurrences(self, ids: Ids) -> Float[Array, "q k"]:
        """How often each id occurs at each of the `places`."""
        rows = ids.reshape(-1, self.places)
        at = jnp.arange(self.places)[None]
        return jnp.zeros((self.places, self.codebook_size), jnp.float32).at[at, rows].add(1.0)

    def statistics(self, ids: Ids) -> dict[str, Float[Array, ""]]:
        """Scalars about ids: the fraction of all ids that occur, and their perplexity.

        Of q ids a position each place is counted by itself, and the mean returned.
        """
        counts = self.occurrences(ids)
        p = counts / jnp.sum(counts, axis=1, keepdims=True)
        entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=1)
        return {"usage": jnp.mean(counts > 0), "perplexity": jnp.mean(jnp.exp(entropy))}


def straight_through(
    z: Float[Array, "b h w d"], codes: Float[Array, "b h w d"]
) -> Float[Array, "b h w d"]:
    """`codes` in value, exactly, and the identity on `z` in gradient (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(codes) + (z - jax.lax.stop_gradient(z))


def rotated(z: Float[Array, "b h w d"], codes: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """`codes` in value, exactly; in gradient the rotation and scaling that maps z onto its code.

    The rotation trick (Fifty et al. 2024, arXiv:2410.06424): `z_q = stop_gradient(|e| / |z| R) z`
    with R the rotation in the plane of z and e that turns the one to the other,

        R z = z - 2 r (r · z) + 2 e' (z' · z),    z' = z / |z|,  e' = e / |e|,  r = (z' + e') / |..|

    so that no d x d matrix is made. Where z or its code is 0, and has no direction, the gradient
    goes straight through.
    """
    constant, tiny = jax.lax.stop_gradient, 1e-6
    at, codes = constant(z), constant(codes)
    length, target = _length(at), _length(codes)
    a, b = at / jnp.maximum(length, tiny), codes / jnp.maximum(target, tiny)
    middle = a + b
    r = middle / jnp.maximum(_length(middle), tiny)
    turned = z - 2 * r * _dot(r, z) + 2 * b * _dot(a, z)
    scaled = turned * (target / jnp.maximum(length, tiny))
    moved = jnp.where(jnp.minimum(length, target) > tiny, scaled, z)
    return codes + (moved - constant(moved))


def _dot(a: Float[Array, "b h w d"], b: Float[Array, "b h w d"]) -> Float[Array, "b h w 1"]:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _length(a: Float[Array, "b h w d"]) -> Float[Array, "b h w 1"]:
    return jnp.sqrt(_dot(a, a))


def straight_through_choice(
    codes: Float[Array, "b h w d"], mean: Float[Array, "b h w d"]
) -> Float[Array, "b h w d"]:
    """`codes` in value, exactly, with the gradient of their mean by the probabilities of all codes.

    Together with a mean over a constant codebook that is the gradient of `(onehot(ids) -
    stop_gradient(p) + p) @ codebook` in which the codebook itself is reached through the chosen
    codes only.
    """
    return codes + (mean - jax.lax.stop_gradient(mean))


def batch_entropy(p: Float[Array, "*n k"]) -> Float[Array, ""]:
    """Entropy, in nats, of the mean of n distributions over k codes, or the share of some codes.

    The constant keeps the logarithm finite; it is MAGVIT-2's, and lowers the result a little.
    """
    mean = jnp.mean(p.reshape(-1, p.shape[-1]), axis=0)
    return -jnp.sum(mean * jnp.log(mean + 1e-5))


@jax.jit
def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """`x / max(|x|, 1e-12)` along the last axis.

    Compiled as one and kept apart, so that it rounds alike within any program and by itself: the
    codes of ids are to equal z_q bit for bit.
    """
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return jax.lax.optimization_barrier(x / norm)


def check_positive(config: Any, *names: str) -> None:
    """Raises InputError where one of these fields of a quantizer's config is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise InputError(f"quantizer.{name} {getattr(config, name)}: must be more than 0")


def check_used_codes(used_codes: int, codebook_size: int) -> None:
    """Raises InputError where more codes are in use than there are."""
    if not 0 <= used_codes <= codebook_size:
        raise InputError(
            f"quantizer.used_codes {used_codes}: must be from 0 (all) to the {codebook_size} codes"
        )
