"""diffusers' `VQModel`: a directory of `config.json` and `diffusion_pytorch_model.safetensors`.

    encoder.down_blocks.LEVEL.resnets.I  .attentions.I  .downsamplers.0.conv   encoder.mid_block.*
    decoder.up_blocks.STEP.resnets.I     .attentions.I  .upsamplers.0.conv     decoder.mid_block.*
    quant_conv  post_quant_conv  quantize.embedding.weight

STEP counts from the lowest resolution, as the stages of our decoder do. Attention is made of linear
layers, `to_q`, `to_k`, `to_v` and `to_out.0`; in files from before diffusers 0.17 they are `query`,
`key`, `value` and `proj_attn`, in some of them as 1x1 convolutions. Where attention sits is said by
the type of each block, not by a resolution. The quantizer has beta, 0.25, on the codebook's term.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqgan import atomic
from vqgan.convert import table
from vqgan.convert.exporting import Exported, Sayable, check_sayable, write_weights
from vqgan.convert.source import Imported, Source
from vqgan.convert.table import Entry, Found, Table
from vqgan.convert.taming import abstract
from vqgan.errors import InputError
from vqgan.serialization import from_json, to_json
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_BETA = 0.25

# The types of blocks without attention and with it.
_DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


@dataclass(frozen=True, kw_only=True)
class VQModelConfig:
    """The published `config.json`, with the values that absent entries stand for."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = _DOWN[:1]
    up_block_types: tuple[str, ...] = _UP[:1]
    """From the lowest resolution upwards."""
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    """None is `latent_channels`."""
    scaling_factor: float = 0.18215
    """Of latents for a diffusion model; neither encoding nor decoding uses it."""
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False
    """Whether their `decode` takes ids where it does not quantise."""
    force_upcast: bool = False


def recognise(source: Source) -> bool:
    """Whether the file holds a `VQModel`."""
    return source.has("encoder.down_blocks.0.resnets.0.conv1.weight", "quantize.embedding.weight")


def load(source: Source) -> Imported:
    """The tokenizer.

    Raises:
      InputError: a config that this library has no model for, or tensors that do not fit.
    """
    where, notes = str(source.path), list[str]()
    published = _published(source, notes)
    _check(published, where=f"{where}: its config")
    empty = abstract(_tokenizer_config(published, notes))
    entries = _as_in(source.tensors, _table(empty))
    tokenizer = table.read(empty, entries, source.tensors, where=where)
    return Imported(format="diffusers", model=tokenizer, notes=tuple(notes))


def _published(source: Source, notes: list[str]) -> VQModelConfig:
    """The config beside the weights, or else what their shapes say."""
    where = str(source.path)
    if source.config is None:
        notes.append(
            "no config: the architecture was taken from the tensors' shapes, with norms of 32 "
            "groups and a resolution of 256"
        )
        return _inferred(source.tensors, where=where)
    kind = source.config.get("_class_name", "VQModel")
    if kind != "VQModel":
        raise InputError(f"{where}: its config is of a {kind}; only VQModel is read as diffusers")
    # What begins so is about the file, not the model: the version that wrote it, for example.
    data = {name: value for name, value in source.config.items() if not name.startswith("_")}
    found = from_json(VQModelConfig, data, where=f"{where}: its config")
    if found.scaling_factor != VQModelConfig().scaling_factor:
        notes.append(
            f"scaling_factor {found.scaling_factor} is for a diffusion model of the latents; "
            "encoding and decoding do not use it"
        )
    return found


def _inferred(found: Found, *, where: str) -> VQModelConfig:
    """The config as far as the names and shapes of the tensors tell it."""

    def shape(name: str, rank: int = 4) -> tuple[int, ...]:
        return table.shape_of(found, name, rank, where=where)

    def types(side: str, kinds: tuple[str, str]) -> tuple[str, ...]:
        attended = (f"{side}.{i}.attentions.0.group_norm.weight" in found for i in range(levels))
        return tuple(kinds[name] for name in attended)

    levels = max(table.count(found, r"encoder\.down_blocks\.(\d+)\."), 1)
    blocks = (f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels))
    codes, dim = shape("quantize.embedding.weight", 2)
    return VQModelConfig(
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
        down_block_types=types("encoder.down_blocks", _DOWN),
        up_block_types=types("decoder.up_blocks", _UP),
        block_out_channels=tuple(shape(name)[0] for name in blocks),
        layers_per_block=table.count(found, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=shape("encoder.conv_out.weight")[0],
        sample_size=256,
        num_vq_embeddings=codes,
        vq_embed_dim=dim,
        norm_type="spatial" if any(".conv_y." in name for name in found) else "group",
        mid_block_add_attention="encoder.mid_block.attentions.0.group_norm.weight" in found,
    )


_SIZES = (
    *("in_channels", "out_channels", "layers_per_block", "latent_channels", "sample_size"),
    *("num_vq_embeddings", "norm_num_groups", "vq_embed_dim"),
)


def _check(config: VQModelConfig, *, where: str) -> None:
    """Raises InputError naming all that this library has no model for."""
    values = [(name, getattr(config, name)) for name in _SIZES]
    problems = [f"{name} {n} (only from 1 on)" for name, n in values if n is not None and n < 1]
    if config.act_fn.lower() not in ("silu", "swish"):
        problems.append(f"act_fn {config.act_fn!r} (only 'silu')")
    if config.norm_type != "group":
        problems.append(
            f"norm_type {config.norm_type!r} (only 'group': MoVQ, whose norms see the latents, is "
            "not here)"
        )
    for side, kinds in (("down", _DOWN), ("up", _UP)):
        given = getattr(config, f"{side}_block_types")
        if unknown := sorted(set(given) - set(kinds)):
            problems.append(f"{side}_block_types {', '.join(unknown)} (only {', '.join(kinds)})")
    widths, down, up = config.block_out_channels, config.down_block_types, config.up_block_types
    if not len(widths) == len(down) == len(up) or not widths:
        problems.append("block_out_channels and the two lists of block types differ in length")
    elif [kind == _DOWN[1] for kind in down] != [kind == _UP[1] for kind in reversed(up)]:
        problems.append("attention at other levels of the decoder than of the encoder")
    if widths and (widths[0] < 1 or any(width % widths[0] for width in widths)):
        problems.append(f"block_out_channels {list(widths)} (only multiples of the first)")
    groups = config.norm_num_groups
    if groups > 0 and any(width % groups for width in widths):
        problems.append(f"norm_num_groups {groups}, which does not divide {list(widths)}")
    if problems:
        raise InputError(f"{where}: not here: {'; '.join(problems)}")


def _tokenizer_config(config: VQModelConfig, notes: list[str]) -> TokenizerConfig:
    widths = config.block_out_channels
    factor = 2 ** (len(widths) - 1)
    # Attention is bound to a resolution here: one that all levels halve without a remainder.
    resolution = -(-config.sample_size // factor) * factor
    attended = [i for i, kind in enumerate(config.down_block_types) if kind == _DOWN[1]]
    if resolution != config.sample_size:
        notes.append(
            f"sample_size {config.sample_size} is no multiple of {factor}: resolution {resolution}"
        )
    return TokenizerConfig(
        autoencoder=AutoencoderConfig(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            base_channels=widths[0],
            channel_multipliers=tuple(width // widths[0] for width in widths),
            num_res_blocks=config.layers_per_block,
            attention_resolutions=tuple(resolution // 2**i for i in attended),
            resolution=resolution,
            z_channels=config.latent_channels,
            norm_groups=config.norm_num_groups,
            middle_attention=config.mid_block_add_attention,
        ),
        quantizer=VQConfig(
            codebook_size=config.num_vq_embeddings,
            dim=config.latent_channels if config.vq_embed_dim is None else config.vq_embed_dim,
            beta=_BETA,
            beta_on="codebook",
            init_from_data=False,
            revive_after=0,
        ),
    )


_RULES = [
    (r"^encoder\.stages\.", "encoder.down_blocks."),
    (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^decoder\.stages\.", "decoder.up_blocks."),
    (r"^decoder\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.middle\.attention\.", ".mid_block.attentions.0."),
    (r"\.middle\.", ".mid_block."),
    (r"\.blocks\.", ".resnets."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"\.(kernel|scale)$", ".weight"),
]
_LINEAR = re.compile(r"\.attentions\.\d+\.to_.*\.weight$")
_OLD_NAMES = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), (r"to_out\.0", "proj_attn")]
_OLD_RULES = [(rf"(\.attentions\.\d+)\.{new}\.", rf"\1.{old}.") for new, old in _OLD_NAMES]


def _table(tokenizer: Tokenizer) -> Table:
    """Where each variable of a tokenizer lies in a file of today's diffusers."""
    entries = table.torch_table(tokenizer, _RULES)
    return {
        name: replace(entry, layout=table.CONV_OF_LINEAR)
        if _LINEAR.search(entry.theirs[0])
        else entry
        for name, entry in entries.items()
    }


def _as_in(found: Found, entries: Table) -> Table:
    """The table with the old names, and the convolutions, that a file has in its attention."""

    def as_found(entry: Entry) -> Entry:
        (name,) = entry.theirs
        old = table.renamed(name, _OLD_RULES)
        if name not in found and old in found:
            name = old
        convolution = entry.layout is table.CONV_OF_LINEAR and (
            name in found and len(found[name].shape) == 4
        )
        return Entry((name,), table.CONV if convolution else entry.layout)

    return {ours: as_found(entry) for ours, entry in entries.items()}


# The way back.

_SAYABLE: Sayable = {
    "autoencoder.middle_blocks": (2,),
    "autoencoder.decoder_extra_blocks": (1,),
    "autoencoder.block_bias": (True,),
    "autoencoder.shortcut_of": ("input",),
    "autoencoder.latent_kernel": (3,),
    "autoencoder.downsample": ("conv",),
    "autoencoder.upsample": ("conv",),
    "autoencoder.adaptive_norm": (False,),
    "autoencoder.pixel_range": ("symmetric",),
    "autoencoder.output": ("linear",),
    "projections": (True,),
    "quantizer.kind": ("vq",),
    "quantizer.normalize": (False,),
    "quantizer.used_codes": (0,),
}


def save(exported: Exported, path: Path) -> tuple[str, ...]:
    """Writes a directory that `diffusers.VQModel.from_pretrained` reads; one of its kind there is
    replaced.

    Raises:
      InputError: the architecture is none that this format can say, or something else is at `path`.
    """
    config = exported.tokenizer.config
    check_sayable(config, _SAYABLE, "diffusers")
    multipliers = config.autoencoder.channel_multipliers
    if multipliers[0] != 1:
        raise InputError(
            f"diffusers cannot say autoencoder.channel_multipliers {list(multipliers)}: its first "
            "convolution has the channels of level 0, so the first of them is 1"
        )
    if path.exists() and not (path.is_dir() and _replaceable(path)):
        raise InputError(f"{path}: is there and is no diffusers model; give another place")
    description: dict[str, Any] = {"_class_name": "VQModel", **to_json(_describe(config))}
    with atomic.new_directory(path) as new:
        write_weights(new / _WEIGHTS, table.write(exported.tokenizer, _table(exported.tokenizer)))
        atomic.write_json(description, new / "config.json")
    return _notes(exported)


def _replaceable(path: Path) -> bool:
    return (path / _WEIGHTS).is_file() or not any(path.iterdir())


def _describe(config: TokenizerConfig) -> VQModelConfig:
    """What the published config says of a tokenizer that it can say."""
    model, levels = config.autoencoder, range(len(config.autoencoder.channel_multipliers))
    return VQModelConfig(
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        down_block_types=tuple(_DOWN[model.attends(level)] for level in levels),
        up_block_types=tuple(_UP[model.attends(level)] for level in reversed(levels)),
        block_out_channels=tuple(model.widths()),
        layers_per_block=model.num_res_blocks,
        latent_channels=model.z_channels,
        sample_size=model.resolution,
        num_vq_embeddings=config.quantizer.codebook_size,
        norm_num_groups=model.norm_groups,
        vq_embed_dim=config.quantizer.dim,
        mid_block_add_attention=model.middle_attention,
    )


def _notes(exported: Exported) -> tuple[str, ...]:
    """What of the model the directory does not have."""
    config, notes = exported.tokenizer.config, []
    quantizer = config.quantizer
    assert isinstance(quantizer, VQConfig)
    if (quantizer.beta, quantizer.beta_on) != (_BETA, "codebook"):
        notes.append(f"training that goes on there has beta {_BETA} on the codebook's term")
    if config.autoencoder.dropout:
        notes.append(f"training that goes on there has no dropout ({config.autoencoder.dropout})")
    if exported.parts:
        notes.append(f"{', '.join(exported.parts)}: left out, there is no place for it")
    return tuple(notes)
