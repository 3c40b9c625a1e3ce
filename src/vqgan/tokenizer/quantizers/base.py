"""What every quantizer is: one call, one return type, and an exact inverse of its ids."""

import abc
from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key


class CodebookStat(nnx.Variable):
    """What a quantizer counts about its codes: saved with the model, never seen by an optimiser."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizerOutput:
    """Quantised latents, their ids, and the loss terms by name, each a scalar."""

    z_q: Float[Array, "b h w d"]
    """Equal to the codes in value; its gradient goes straight through to the latents."""
    ids: Int[Array, "b h w"]
    losses: dict[str, Float[Array, ""]]


class Quantizer(nnx.Module):
    """Interface of all quantizers. Subclasses are final."""

    codebook_size: int

    @abc.abstractmethod
    def __call__(self, z: Float[Array, "b h w d"]) -> QuantizerOutput:
        """Quantises latents."""

    @abc.abstractmethod
    def codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        """The codes of ids: `codes(self(z).ids)` equals `self(z).z_q`."""

    @abc.abstractmethod
    def maintain(
        self, z: Float[Array, "b h w d"], ids: Int[Array, "b h w"], key: Key[Array, ""]
    ) -> None:
        """Called in place after an optimiser's update, with what the update had quantised."""

    @abc.abstractmethod
    def statistics(self, ids: Int[Array, "b h w"]) -> dict[str, Float[Array, ""]]:
        """Scalars to log about the codes: `usage` and `perplexity` at least."""
