"""LlamaGen (arXiv:2406.06525): its VQ tokenizers and its class-conditional transformers.

A PyTorch file (`.pt`) with the weights under `model`, `module` (DeepSpeed) or `state_dict`, or at
the top (FSDP); or a safetensors file with a `config.json`. Training files also hold `ema`, `args`,
optimizer states and the tokenizer's `discriminator`. The names:

    encoder.conv_blocks.LEVEL.{res.I, attn.I, downsample.conv}   encoder.mid.{0,1,2}
    decoder.conv_blocks.I.{res.J, attn.J, upsample.conv}         decoder.mid.{0,1,2}
    quant_conv  post_quant_conv  quantize.embedding  quantize.codebook_used

    cls_embedding.embedding_table  tok_embeddings  layers.I.{attention_norm, ffn_norm}
    layers.I.attention.{wqkv, wo}  layers.I.feed_forward.{w1, w2, w3}  norm  output

Block 0 of the decoder is the lowest resolution. Codes have length 1, at the search and at the
look-up. The rotary table is zero where the class stands, so that its query and key vanish.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from vqgan.convert import table
from vqgan.convert.containers import LazyTensor
from vqgan.convert.source import Imported, Source
from vqgan.convert.table import Entry, Found, Layout, Table
from vqgan.convert.taming import abstract, read_discriminator
from vqgan.errors import InputError
from vqgan.prior.transformer import Prior, PriorConfig
from vqgan.serialization import Pretrained, from_json
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig

_CONTAINERS = ("model", "module", "state_dict", "")

# What stands in such files and is no weight: optimizers, the buffer that counts recent codes, the
# rotary table of older code, and what sampling keeps.
_IGNORED = (
    r"(optimizer|optimizer_disc|lr_scheduler)\..*",
    r"quantize\.codebook_used",
    r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\.[kv]_cache",
)

# Layers, width and heads; files have the first two alone.
_SIZES = {
    "GPT-B": (12, 768, 12),
    "GPT-L": (24, 1024, 16),
    "GPT-XL": (36, 1280, 20),
    "GPT-XXL": (48, 1536, 24),
    "GPT-XXXL": (48, 2560, 40),
    "GPT-1B": (22, 2048, 32),
    "GPT-3B": (24, 3200, 32),
    "GPT-7B": (32, 4096, 32),
}


def recognise(source: Source) -> bool:
    """Whether the file holds a tokenizer or a transformer of LlamaGen's names."""
    return bool(_weights(source)[1])


def load(source: Source) -> Imported:
    """The tokenizer, with its discriminator where the file has a PatchGAN, or the prior.

    Raises:
      InputError: an option that this library does not have, or tensors that do not fit.
    """
    container, found = _weights(source)
    if not found:
        raise InputError(
            f"{source.path}: holds neither a tokenizer nor a transformer of LlamaGen's"
        )
    notes = []
    if container == "ema":
        notes.append("took the averaged weights; `raw` takes the others")
    found |= _around(source, container)
    if _is_prior(found):
        prior = _prior(source, found, notes)
        return Imported(format="llamagen", model=prior, notes=tuple(notes))
    parts = _discriminator(source, found, notes)
    tokenizer = _tokenizer(source, found, notes)
    return Imported(format="llamagen", model=tokenizer, parts=parts, notes=tuple(notes))


def _is_tokenizer(found: Mapping[str, Any]) -> bool:
    return "encoder.conv_blocks.0.res.0.conv1.weight" in found and any(
        name.startswith("quantize.") for name in found
    )


def _is_prior(found: Mapping[str, Any]) -> bool:
    return "layers.0.attention.wqkv.weight" in found and any(
        name.startswith("cls_embedding.") for name in found
    )


def _weights(source: Source) -> tuple[str, dict[str, LazyTensor]]:
    """The entry of the file that holds the weights, "" for its top, and them; or nothing."""
    averaged_first = ("ema", *_CONTAINERS)
    for name in averaged_first if source.weights == "ema" else (*_CONTAINERS, "ema"):
        found = source.checkpoint.below(name)
        if _is_tokenizer(found) or _is_prior(found):
            return name, found
    return "", {}


def _around(source: Source, container: str) -> dict[str, LazyTensor]:
    """What the file holds beside the weights, but for the weights' other version."""
    if not container:
        return {}
    versions = tuple(f"{name}." for name in ("ema", *_CONTAINERS) if name)
    tensors = source.checkpoint.tensors
    return {name: value for name, value in tensors.items() if not name.startswith(versions)}


def _discriminator(
    source: Source, found: dict[str, LazyTensor], notes: list[str]
) -> dict[str, Pretrained]:
    """The PatchGAN of a training file, taken out of what was found."""
    judge = source.checkpoint.below("discriminator")
    for name in judge:
        found.pop(f"discriminator.{name}", None)
    if not judge:
        return {}
    if "main.0.weight" not in judge or any(name.endswith(".initialized") for name in judge):
        notes.append(f"the discriminator is no PatchGAN with batch norm; {len(judge)} tensors left")
        return {}
    return {"discriminator": read_discriminator(judge, where=f"{source.path}: discriminator")}


def _told(source: Source, args: Mapping[str, str]) -> dict[str, Any]:
    """Options by the names of the published model: of the training's `args`, then of the config.

    Args:
      args: the options of the training that the model was built with, and their names there.
    """
    values = source.checkpoint.values
    found = {
        ours: values[f"args.{name}"] for name, ours in args.items() if f"args.{name}" in values
    }
    return found | (source.config or {})


def _check_shapes_agree(told: Mapping[str, Any], shapes: Mapping[str, Any], where: str) -> None:
    """Raises InputError naming every option that says other than the tensors."""
    problems = [
        f"{name} is {told[name]}, but {value} by the tensors"
        for name, value in shapes.items()
        if told.get(name) is not None and told[name] != value
    ]
    if problems:
        raise InputError(f"{where}: its config does not fit: {'; '.join(problems)}")


# The tokenizer.


@dataclass(frozen=True, kw_only=True)
class _TokenizerArgs:
    """The published model's options with its defaults; None is by the shapes of its tensors."""

    codebook_size: int | None = None
    codebook_embed_dim: int | None = None
    codebook_l2_norm: bool = True
    codebook_show_usage: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    encoder_ch_mult: tuple[int, ...] | None = None
    decoder_ch_mult: tuple[int, ...] | None = None
    z_channels: int | None = None
    dropout_p: float = 0.0
    image_size: int = 256
    """Of the training; the model itself does not know it."""


# codebook_l2_norm is among the training's arguments, but never reaches the model.
_TOKENIZER_TRAINING = (
    *("codebook_size", "codebook_embed_dim", "commit_loss_beta", "entropy_loss_ratio"),
    *("dropout_p", "image_size"),
)


def _tokenizer(source: Source, found: Found, notes: list[str]) -> Tokenizer:
    config = _tokenizer_config(source, found, notes)
    return table.read(
        abstract(config), tokenizer_table(config), found, where=str(source.path), ignore=_IGNORED
    )


def _tokenizer_config(source: Source, found: Found, notes: list[str]) -> TokenizerConfig:
    where = str(source.path)
    told = _told(source, {name: name for name in _TOKENIZER_TRAINING})
    args = from_json(_TokenizerArgs, told, where=f"{where}: config")
    if args.entropy_loss_ratio:
        notes.append(
            f"trained with entropy_loss_ratio {args.entropy_loss_ratio}, which is not here"
        )
    autoencoder = _autoencoder_config(found, args, where)
    codes, dim = table.shape_of(found, "quantize.embedding.weight", 2, where=where)
    multipliers = list(autoencoder.channel_multipliers)
    shapes = {
        "codebook_size": codes,
        "codebook_embed_dim": dim,
        "encoder_ch_mult": multipliers,
        "decoder_ch_mult": multipliers,
        "z_channels": autoencoder.z_channels,
    }
    _check_shapes_agree(told, shapes, where)
    quantizer = VQConfig(
        codebook_size=codes,
        dim=dim,
        beta=args.commit_loss_beta,
        normalize=args.codebook_l2_norm,
        init_from_data=False,
        revive_after=0,
    )
    return TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)


def _autoencoder_config(found: Found, args: _TokenizerArgs, where: str) -> AutoencoderConfig:
    base, channels = table.shape_of(found, "encoder.conv_in.weight", 4, where=where)[:2]
    level = range(table.count(found, r"encoder\.conv_blocks\.(\d+)\."))
    blocks = [f"encoder.conv_blocks.{i}" for i in level]
    widths = [
        table.shape_of(found, f"{block}.res.0.conv1.weight", 4, where=where)[0] for block in blocks
    ]
    attends = [f"{block}.attn.0.q.weight" in found for block in blocks]
    return AutoencoderConfig(
        in_channels=channels,
        out_channels=table.shape_of(found, "decoder.conv_out.weight", 4, where=where)[0],
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=table.count(found, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        attention_resolutions=tuple(args.image_size // 2**i for i in level if attends[i]),
        resolution=args.image_size,
        z_channels=table.shape_of(found, "encoder.conv_out.weight", 4, where=where)[0],
        dropout=args.dropout_p,
    )


def tokenizer_table(config: TokenizerConfig) -> Table:
    """Where each variable of a tokenizer lies in a file of LlamaGen's."""
    rules = [
        (r"^encoder\.downsamples\.(\d+)\.", r"encoder.conv_blocks.\1.downsample.conv."),
        (r"^decoder\.upsamples\.(\d+)\.", r"decoder.conv_blocks.\1.upsample."),
        (r"\.middle\.blocks\.0\.", ".mid.0."),
        (r"\.middle\.attention\.", ".mid.1."),
        (r"\.middle\.blocks\.1\.", ".mid.2."),
        (r"\.stages\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
        (r"\.stages\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"^quantizer\.codebook$", "quantize.embedding.weight"),
        (r"\.(kernel|scale)$", ".weight"),
    ]
    return table.torch_table(abstract(config), rules)


# The prior.


@dataclass(frozen=True, kw_only=True)
class _PriorArgs:
    """The published model's options with its defaults; None is by the shapes of its tensors."""

    dim: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 1e4
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0
    num_classes: int | None = None
    caption_dim: int = 2048
    class_dropout_prob: float = 0.1
    model_type: str = "c2i"
    vocab_size: int | None = None
    cls_token_num: int = 1
    block_size: int | None = None
    """Codes of an image."""
    max_batch_size: int = 32
    max_seq_len: int = 2048
    # The training's options, from which the published code derives some of these.
    gpt_model: str | None = None
    image_size: int | None = None
    downsample_size: int = 16


# Of the training's arguments, those that the model was built with, and their names there.
_PRIOR_TRAINING = {
    name: name
    for name in (
        *("gpt_model", "vocab_size", "num_classes", "cls_token_num", "image_size"),
        *("downsample_size", "token_dropout_p", "drop_path_rate"),
    )
} | {"gpt_type": "model_type", "dropout_p": "resid_dropout_p"}


def _prior(source: Source, found: Found, notes: list[str]) -> Prior:
    config = prior_config(source, found, notes)
    return table.read(
        nnx.eval_shape(lambda: Prior(config, rngs=nnx.Rngs(0))),
        prior_table(config),
        found,
        where=str(source.path),
        ignore=_IGNORED,
    )


def prior_config(source: Source, found: Found, notes: list[str]) -> PriorConfig:
    """The config of the prior: from the options in the file or its config, and from the shapes.

    Args:
      notes: gets a line for whatever had to be assumed or is not here.

    Raises:
      InputError: an option that this library does not have, or that the tensors contradict.
    """
    where = str(source.path)
    if any(name.startswith(("cls_embedding.cap_proj.", "cls_embedding.uncond")) for name in found):
        raise InputError(
            f"{where}: a text-conditional model, as cls_embedding.cap_proj shows; only the "
            "class-conditional ones (c2i) can be imported"
        )
    told = _told(source, _PRIOR_TRAINING)
    _derive_dropout(told)
    args = from_json(_PriorArgs, told, where=f"{where}: config")
    _check_prior_args(args, where)
    codes, width = table.shape_of(found, "tok_embeddings.weight", 2, where=where)
    depth = table.count(found, r"layers\.(\d+)\.")
    classes, null_class = _classes(found, args, where)
    shapes = {"dim": width, "n_layer": depth, "vocab_size": codes, "num_classes": classes}
    _check_shapes_agree(told, shapes, where)
    _check_own_keys(found, width, where)
    config = PriorConfig(
        codebook_size=codes,
        grid=_grid(source, found, args, notes),
        num_classes=classes,
        null_class=null_class,
        depth=depth,
        heads=_heads(found, args, depth, width, where),
        width=width,
        class_slot_rotation="zero",
        mlp_multiple=args.multiple_of,
        dropout=args.resid_dropout_p,
        attention_dropout=args.attn_dropout_p,
        label_dropout=args.class_dropout_prob if null_class else 0.0,
    )
    config.check()
    _check_mlp(found, config, where)
    _note_training(args, notes)
    return config


def _derive_dropout(told: dict[str, Any]) -> None:
    """As the training script does: one rate for both branches, none beside stochastic depth."""
    if "resid_dropout_p" in told:
        if told.get("drop_path_rate"):
            told["resid_dropout_p"] = 0.0
        told.setdefault("ffn_dropout_p", told["resid_dropout_p"])


def _check_prior_args(args: _PriorArgs, where: str) -> None:
    """Raises InputError naming every option that changes the outputs and cannot be had here."""
    fixed = {
        "model_type": "c2i",
        "cls_token_num": 1,
        "rope_base": 1e4,
        "norm_eps": 1e-5,
        "ffn_dim_multiplier": None,
    }
    problems = [
        f"{name} {getattr(args, name)} (only {value})"
        for name, value in fixed.items()
        if getattr(args, name) != value
    ]
    for name in ("block_size", "image_size", "downsample_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            problems.append(f"{name} {value} (only from 1 on)")
    if args.n_kv_head not in (None, args.n_head):
        problems.append(f"n_kv_head {args.n_kv_head} (only as many as n_head)")
    if args.gpt_model is not None and args.gpt_model not in _SIZES:
        problems.append(f"gpt_model {args.gpt_model} (only {', '.join(_SIZES)})")
    if problems:
        raise InputError(f"{where}: its config asks for what is not here: {'; '.join(problems)}")


def _classes(found: Found, args: _PriorArgs, where: str) -> tuple[int, bool]:
    """The number of classes, and whether the embedding's last row stands for none of them."""
    rows = table.shape_of(found, "cls_embedding.embedding_table.weight", 2, where=where)[0]
    null_class = args.class_dropout_prob > 0 and args.num_classes != rows
    return rows - int(null_class), null_class


def _check_own_keys(found: Found, width: int, where: str) -> None:
    """Raises InputError where heads share their keys and values."""
    name = "layers.0.attention.wqkv.weight"
    rows = table.shape_of(found, name, 2, where=where)[0]
    if rows != 3 * width:
        raise InputError(
            f"{where}: {name} has {rows} rows, not {3 * width}: keys and values that heads share "
            "(n_kv_head) are not here"
        )


def _check_mlp(found: Found, config: PriorConfig, where: str) -> None:
    """Raises InputError where the MLP is of another width than ours would be."""
    name = "layers.0.feed_forward.w1.weight"
    rows = table.shape_of(found, name, 2, where=where)[0]
    if rows != config.mlp_width:
        raise InputError(
            f"{where}: {name} has {rows} rows, where multiple_of {config.mlp_multiple} makes "
            f"{config.mlp_width}; give a config with multiple_of"
        )


def _note_training(args: _PriorArgs, notes: list[str]) -> None:
    """Notes what the published training has that ours does not; outputs are the same."""
    if {args.token_dropout_p, args.ffn_dropout_p} != {args.resid_dropout_p}:
        notes.append(
            f"trained with dropout {args.token_dropout_p} on embeddings and {args.ffn_dropout_p} "
            f"after the MLP; here it is {args.resid_dropout_p} everywhere"
        )
    if args.drop_path_rate:
        notes.append(f"trained with drop_path_rate {args.drop_path_rate}, which is not here")


def _heads(found: Found, args: _PriorArgs, depth: int, width: int, where: str) -> int:
    """The number of heads, which the fused projection does not show."""
    if args.n_head is not None:
        return args.n_head
    if "freqs_cis" in found:
        return width // (2 * table.shape_of(found, "freqs_cis", 3, where=where)[1])
    sizes = _SIZES.values() if args.gpt_model is None else [_SIZES[args.gpt_model]]
    for size in sizes:
        if size[:2] == (depth, width):
            return size[2]
    raise InputError(
        f"{where}: {depth} layers of width {width} are no published size, so that the number of "
        "heads is unknown; give a config (JSON or YAML) with n_head"
    )


def _grid(source: Source, found: Found, args: _PriorArgs, notes: list[str]) -> tuple[int, int]:
    """Rows and columns of the codes: by an option, the old rotary table or the file's name."""
    where = str(source.path)
    named = re.search(r"c2i_\w+_(\d+)$", source.path.stem)
    if args.block_size is not None:
        side = math.isqrt(args.block_size)
        if side * side != args.block_size:
            raise InputError(f"{where}: its config says block_size {args.block_size}, no square")
    elif args.image_size is not None:
        side = args.image_size // args.downsample_size
    elif "freqs_cis" in found:
        side = math.isqrt(table.shape_of(found, "freqs_cis", 3, where=where)[0] - 1)
    elif named:
        side = int(named[1]) // args.downsample_size
        notes.append(f"a grid of {side} by {side} codes, by the file's name")
    else:
        side = 256 // args.downsample_size
        notes.append(
            f"assumed a grid of {side} by {side} codes, that of 256 pixels; a config with "
            "image_size says another one"
        )
    return side, side


def prior_table(config: PriorConfig) -> Table:
    """Where each variable of a prior lies in a file of LlamaGen's."""
    entries = {
        "condition.embedding": Entry(("cls_embedding.embedding_table.weight",)),
        "tokens.embedding": Entry(("tok_embeddings.weight",)),
        "norm.scale": Entry(("norm.weight",)),
        "head.kernel": Entry(("output.weight",), table.LINEAR),
    }
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"layers.{i}"
        for j, name in enumerate(("query", "key", "value")):
            part = _third(j, config.width)
            entries[f"{ours}.attention.{name}.kernel"] = Entry(
                (f"{theirs}.attention.wqkv.weight",), part
            )
        mlp = f"{theirs}.feed_forward"
        entries |= {
            f"{ours}.norm1.scale": Entry((f"{theirs}.attention_norm.weight",)),
            f"{ours}.norm2.scale": Entry((f"{theirs}.ffn_norm.weight",)),
            f"{ours}.attention.proj.kernel": Entry(
                (f"{theirs}.attention.wo.weight",), table.LINEAR
            ),
            f"{ours}.mlp.gate_up.kernel": Entry((f"{mlp}.w1.weight", f"{mlp}.w3.weight"), _GATE_UP),
            f"{ours}.mlp.down.kernel": Entry((f"{mlp}.w2.weight",), table.LINEAR),
        }
    return entries


_GATE_UP = Layout(lambda gate, up: np.stack([gate.T, up.T], axis=1))


def _third(index: int, width: int) -> Layout:
    """The query, the key or the value out of their fused projection."""

    def to_ours(fused: np.ndarray) -> np.ndarray:
        if fused.shape != (3 * width, width):
            raise ValueError(f"expected {(3 * width, width)}")
        return fused[index * width : (index + 1) * width].T

    return Layout(to_ours)
