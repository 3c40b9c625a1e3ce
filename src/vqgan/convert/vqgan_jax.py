"""vqgan-jax's `VQModel`, DALL-E mini's image tokenizer: `flax_model.msgpack` and `config.json`.

It is taming's VQModel in Flax, with taming's weights. The names are taming's, with the numbers of
lists joined to them, and Flax' own for what a layer holds:

    encoder.down_LEVEL.block_I  .attn_I  .downsample.conv       encoder.mid.{block_1,attn_1,block_2}
    decoder.up_LEVEL.block_I    .attn_I  .upsample.conv         decoder.mid.{block_1,attn_1,block_2}
    quant_conv  post_quant_conv  quantize.embedding.embedding   each with kernel, scale, bias

Kernels lie as they do here. Files from before Flax 0.3.6 have the scales and biases of norms as
`[1, 1, 1, c]`, which is why later code does not load them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vqgan.convert import table, taming
from vqgan.convert.containers import LazyTensor
from vqgan.convert.source import Imported, Source
from vqgan.convert.table import Entry, Found, Layout, Table
from vqgan.errors import InputError
from vqgan.serialization import from_json, to_json
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig

_CODEBOOK = "quantize.embedding.embedding"

# What transformers writes beside the model's own entries.
_IGNORED = (
    *("architectures", "model_type", "num_resolutions", "torch_dtype", "dtype"),
    *("transformers_version",),
)

_OLD_NORM = Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, 1, -1))


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The published `config.json`, with the values that absent entries stand for."""

    ch: int = 128
    out_ch: int = 3
    in_channels: int = 3
    num_res_blocks: int = 2
    resolution: int = 256
    z_channels: int = 256
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    attn_resolutions: tuple[int, ...] = (16,)
    n_embed: int = 1024
    embed_dim: int = 256
    dropout: float = 0.0
    double_z: bool = False
    resamp_with_conv: bool = True
    give_pre_end: bool = False


def recognise(source: Source) -> bool:
    """Whether the file holds a tokenizer of vqgan-jax's names."""
    return {"encoder.down_0.block_0.conv1.kernel", _CODEBOOK} <= _tensors(source).keys()


def load(source: Source) -> Imported:
    """The tokenizer.

    Raises:
      InputError: an option that this library does not have, or tensors that do not fit.
    """
    where, found, notes = str(source.path), _tensors(source), list[str]()
    if source.config is not None:
        config = _configured(source.config, where=f"{where}: its config")
    else:
        config = _inferred(found, where=where)
        notes.append(
            "no config: the architecture was taken from the tensors' shapes, and a resolution of "
            f"{config.autoencoder.resolution}"
        )
    empty = taming.abstract(config)
    tokenizer = table.read(empty, _table(empty, found), found, where=where)
    return Imported(format="vqgan-jax", model=tokenizer, notes=tuple(notes))


def _tensors(source: Source) -> dict[str, LazyTensor]:
    """Those of the model; their own files have no `params` around them, Flax' habit has."""
    return source.checkpoint.below("params") or source.tensors


def _configured(data: Mapping[str, object], *, where: str) -> TokenizerConfig:
    own = {
        name: value
        for name, value in data.items()
        if name not in _IGNORED and not name.startswith("_")
    }
    published = from_json(VQGANConfig, own, where=where)
    ddconfig = to_json(published)
    size, dim = ddconfig.pop("n_embed"), ddconfig.pop("embed_dim")
    autoencoder = taming.autoencoder_config(ddconfig, AutoencoderConfig(), where=where)
    return TokenizerConfig(autoencoder=autoencoder, quantizer=_quantizer(size, dim))


def _quantizer(size: int, dim: int) -> VQConfig:
    return VQConfig(
        codebook_size=size, dim=dim, beta_on="codebook", init_from_data=False, revive_after=0
    )


def _inferred(found: Found, *, where: str) -> TokenizerConfig:
    """The config as far as the names and shapes of the tensors tell it."""
    if _CODEBOOK not in found or len(found[_CODEBOOK].shape) != 2:
        raise InputError(f"{where}: {_CODEBOOK}, the codebook, is missing or no matrix")
    rules = [
        (r"^(encoder\.down|decoder\.up)_(\d+)\.", r"\1.\2."),
        (r"(\.\d+\.(?:block|attn))_(\d+)\.", r"\1.\2."),
        (r"\.(kernel|scale)$", ".weight"),
    ]
    turned = {table.renamed(name, rules): _turned(tensor) for name, tensor in found.items()}
    autoencoder = taming.infer_autoencoder(turned, where=where)
    size, dim = found[_CODEBOOK].shape
    return TokenizerConfig(autoencoder=autoencoder, quantizer=_quantizer(size, dim))


def _turned(tensor: LazyTensor) -> LazyTensor:
    """A tensor as PyTorch has it, in whose shapes the architecture is looked for."""
    if len(tensor.shape) != 4:
        return tensor
    axes = (3, 2, 0, 1)
    shape = tuple(tensor.shape[i] for i in axes)
    return LazyTensor(shape, tensor.dtype, lambda: tensor.read().transpose(axes))


def _table(tokenizer: Tokenizer, found: Found) -> Table:
    """Where each variable of a tokenizer lies, by taming's names, in this file."""

    def entry(ours: str, theirs: str) -> Entry:
        theirs = re.sub(r"\.(down|up|block|attn)\.(\d+)(?=\.)", r".\1_\2", theirs)
        kind = "embedding" if ours == "quantizer.codebook" else ours.rpartition(".")[2]
        theirs = re.sub(r"\.weight$", f".{kind}", theirs)
        old = ".norm" in theirs and theirs in found and len(found[theirs].shape) == 4
        return Entry((theirs,), _OLD_NORM if old else table.SAME)

    levels = len(tokenizer.config.autoencoder.channel_multipliers)
    entries = table.torch_table(tokenizer, taming.tokenizer_rules(levels))
    return {ours: entry(ours, *published.theirs) for ours, published in entries.items()}
