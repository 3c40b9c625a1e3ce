"""The quantizers: one file each, chosen by the type of its config.

A new one is a file, a member of `SingleConfig` and a line in `single_classes`, both in single.py;
where it gives several ids a position or a sequence, of `QuantizerConfig` and in `_classes` below.
"""

from collections.abc import Callable

from flax import nnx

from vqgan.tokenizer.quantizers.base import CodebookStat, Quantizer, QuantizerOutput
from vqgan.tokenizer.quantizers.bsq import BinarySphericalQuantizer, BSQConfig
from vqgan.tokenizer.quantizers.ema import EMAConfig, EMAQuantizer
from vqgan.tokenizer.quantizers.fsq import FiniteScalarQuantizer, FSQConfig
from vqgan.tokenizer.quantizers.gumbel import GumbelConfig, GumbelQuantizer
from vqgan.tokenizer.quantizers.ibq import IBQConfig, IBQuantizer
from vqgan.tokenizer.quantizers.lfq import LFQConfig, LookupFreeQuantizer
from vqgan.tokenizer.quantizers.multiscale import MultiScaleConfig, MultiScaleQuantizer
from vqgan.tokenizer.quantizers.product import ProductConfig, ProductQuantizer
from vqgan.tokenizer.quantizers.residual import ResidualConfig, ResidualQuantizer
from vqgan.tokenizer.quantizers.simvq import SimVectorQuantizer, SimVQConfig
from vqgan.tokenizer.quantizers.single import SingleConfig, single_classes
from vqgan.tokenizer.quantizers.vq import VectorQuantizer, VQConfig

# In JSON and on the command line they are told apart by `kind`.
QuantizerConfig = SingleConfig | ResidualConfig | ProductConfig | MultiScaleConfig

_classes: dict[type, Callable[..., Quantizer]] = {
    **single_classes,
    ResidualConfig: ResidualQuantizer,
    ProductConfig: ProductQuantizer,
    MultiScaleConfig: MultiScaleQuantizer,
}


def make_quantizer(config: QuantizerConfig, *, rngs: nnx.Rngs) -> Quantizer:
    """Builds the quantizer that the config describes. Raises InputError as its `check` does."""
    config.check()
    return _classes[type(config)](config, rngs=rngs)


__all__ = [
    "BSQConfig",
    "BinarySphericalQuantizer",
    "CodebookStat",
    "EMAConfig",
    "EMAQuantizer",
    "FSQConfig",
    "FiniteScalarQuantizer",
    "GumbelConfig",
    "GumbelQuantizer",
    "IBQConfig",
    "IBQuantizer",
    "LFQConfig",
    "LookupFreeQuantizer",
    "MultiScaleConfig",
    "MultiScaleQuantizer",
    "ProductConfig",
    "ProductQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "ResidualConfig",
    "ResidualQuantizer",
    "SimVQConfig",
    "SimVectorQuantizer",
    "SingleConfig",
    "VQConfig",
    "VectorQuantizer",
    "make_quantizer",
]
