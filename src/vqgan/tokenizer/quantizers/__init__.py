"""The quantizers: one file each, chosen by the type of its config.

A new one is a file, a member of `QuantizerConfig` and a line in `_classes`.
"""

from collections.abc import Callable

from flax import nnx

from vqgan.tokenizer.quantizers.base import CodebookStat, Quantizer, QuantizerOutput
from vqgan.tokenizer.quantizers.vq import VectorQuantizer, VQConfig

QuantizerConfig = VQConfig

_classes: dict[type, Callable[..., Quantizer]] = {VQConfig: VectorQuantizer}


def make_quantizer(config: QuantizerConfig, *, rngs: nnx.Rngs) -> Quantizer:
    """Builds the quantizer that the config describes."""
    return _classes[type(config)](config, rngs=rngs)


__all__ = [
    "CodebookStat",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "VQConfig",
    "VectorQuantizer",
    "make_quantizer",
]
