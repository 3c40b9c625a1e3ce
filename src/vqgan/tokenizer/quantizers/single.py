"""The quantizers of one id a position, and what the quantizers of several ids make of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vqgan.errors import InputError
from vqgan.tokenizer.quantizers.base import Quantizer, check_positive
from vqgan.tokenizer.quantizers.bsq import BinarySphericalQuantizer, BSQConfig
from vqgan.tokenizer.quantizers.ema import EMAConfig, EMAQuantizer
from vqgan.tokenizer.quantizers.fsq import FiniteScalarQuantizer, FSQConfig
from vqgan.tokenizer.quantizers.gumbel import GumbelConfig, GumbelQuantizer
from vqgan.tokenizer.quantizers.ibq import IBQConfig, IBQuantizer
from vqgan.tokenizer.quantizers.lfq import LFQConfig, LookupFreeQuantizer
from vqgan.tokenizer.quantizers.simvq import SimVectorQuantizer, SimVQConfig
from vqgan.tokenizer.quantizers.vq import VectorQuantizer, VQConfig

# In JSON and on the command line they are told apart by `kind`.
SingleConfig = (
    VQConfig
    | GumbelConfig
    | IBQConfig
    | LFQConfig
    | BSQConfig
    | FSQConfig
    | EMAConfig
    | SimVQConfig
)

single_classes: dict[type, Callable[..., Quantizer]] = {
    VQConfig: VectorQuantizer,
    GumbelConfig: GumbelQuantizer,
    IBQConfig: IBQuantizer,
    LFQConfig: LookupFreeQuantizer,
    BSQConfig: BinarySphericalQuantizer,
    FSQConfig: FiniteScalarQuantizer,
    EMAConfig: EMAQuantizer,
    SimVQConfig: SimVectorQuantizer,
}


def make_stages(inner: SingleConfig, count: int, *, rngs: nnx.Rngs) -> list[Quantizer]:
    """`count` quantizers of one config, each with weights of its own."""
    return [single_classes[type(inner)](inner, rngs=rngs) for _ in range(count)]


def check_stages(config: Any, count: str) -> None:
    """Raises InputError where the field of the name `count`, or the inner config, is amiss."""
    check_positive(config, count)
    try:
        config.inner.check()
    except InputError as error:
        raise InputError(str(error).replace("quantizer.", "quantizer.inner.")) from error


def averaged(losses: Sequence[dict[str, Array]]) -> dict[str, Float[Array, ""]]:
    """The mean of each loss term over the stages."""
    return {name: jnp.mean(jnp.stack([each[name] for each in losses])) for name in losses[0]}
