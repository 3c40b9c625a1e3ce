"""VQGAN in JAX and Flax: image tokenizers, priors over their codes, and pictures from both.

The names below are imported when they are first used, so that `import vqgan` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqgan.errors import InputError
    from vqgan.pipeline import Pipeline
    from vqgan.prior.conditions import CodePrefix
    from vqgan.prior.transformer import Prior, PriorConfig
    from vqgan.tokenizer.autoencoder import AutoencoderConfig
    from vqgan.tokenizer.model import Tokenizer, TokenizerConfig, TokenizerOutput
    from vqgan.tokenizer.quantizers import (
        BSQConfig,
        EMAConfig,
        FSQConfig,
        GumbelConfig,
        IBQConfig,
        LFQConfig,
        MultiScaleConfig,
        ProductConfig,
        ResidualConfig,
        SimVQConfig,
        VQConfig,
    )
    from vqgan.train.prior import train_prior
    from vqgan.train.tokenizer import train_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "AutoencoderConfig": "vqgan.tokenizer.autoencoder",
    "BSQConfig": "vqgan.tokenizer.quantizers",
    "CodePrefix": "vqgan.prior.conditions",
    "EMAConfig": "vqgan.tokenizer.quantizers",
    "FSQConfig": "vqgan.tokenizer.quantizers",
    "GumbelConfig": "vqgan.tokenizer.quantizers",
    "IBQConfig": "vqgan.tokenizer.quantizers",
    "InputError": "vqgan.errors",
    "LFQConfig": "vqgan.tokenizer.quantizers",
    "MultiScaleConfig": "vqgan.tokenizer.quantizers",
    "Pipeline": "vqgan.pipeline",
    "Prior": "vqgan.prior.transformer",
    "PriorConfig": "vqgan.prior.transformer",
    "ProductConfig": "vqgan.tokenizer.quantizers",
    "ResidualConfig": "vqgan.tokenizer.quantizers",
    "SimVQConfig": "vqgan.tokenizer.quantizers",
    "Tokenizer": "vqgan.tokenizer.model",
    "TokenizerConfig": "vqgan.tokenizer.model",
    "TokenizerOutput": "vqgan.tokenizer.model",
    "VQConfig": "vqgan.tokenizer.quantizers",
    "train_prior": "vqgan.train.prior",
    "train_tokenizer": "vqgan.train.tokenizer",
}

__all__ = [
    "AutoencoderConfig",
    "BSQConfig",
    "CodePrefix",
    "EMAConfig",
    "FSQConfig",
    "GumbelConfig",
    "IBQConfig",
    "InputError",
    "LFQConfig",
    "MultiScaleConfig",
    "Pipeline",
    "Prior",
    "PriorConfig",
    "ProductConfig",
    "ResidualConfig",
    "SimVQConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "VQConfig",
    "train_prior",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vqgan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
