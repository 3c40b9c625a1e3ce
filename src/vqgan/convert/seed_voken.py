"""SEED-Voken's image tokenizers: IBQ (arXiv:2412.02692) and Open-MAGVIT2 (arXiv:2409.04410).

Lightning checkpoints (`.ckpt`) with a YAML whose model is `class_path` and `init_args`, and moving
averages `model_ema.NAME` of all that was trained, which is what they are evaluated with.

IBQ has taming's names and network, and another quantizer: its codes are chosen by inner product,
and no tensor says so. Only the class in the YAML tells an IBQ file from one of taming's.

Open-MAGVIT2 has a network of its own, without attention and without `quant_conv`, and a quantizer
by sign that has no tensors:

    encoder.down.LEVEL.block.I  .downsample        encoder.mid_block.I  encoder.{norm,conv}_out
    decoder.up.LEVEL.block.I    .upsample.conv1    decoder.mid_block.I  decoder.adaptive.LEVEL

Their id of a token is the sum of 2**i over the channels i above zero, as it is here. With
`token_factorization` it is split in two, the lowest bits and the others.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from vqgan.convert import table, taming
from vqgan.convert.source import Imported, Source, averaged, fields
from vqgan.convert.table import Found, Table
from vqgan.errors import InputError
from vqgan.serialization import from_json
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import IBQConfig, LFQConfig

# Of their two models' `init_args`: what says what the tokenizer is, and how it was trained.
_MODEL = ("target", "ddconfig", "lossconfig", "n_embed", "embed_dim")
_ENTROPIES = ("sample_minimization_weight", "batch_maximization_weight")
_IBQ = (*_MODEL, *_ENTROPIES, "beta", "use_entropy_loss", "entropy_temperature", "remap")
_MAGVIT2 = (*_MODEL, *_ENTROPIES, "token_factorization", "factorized_bits")
# Without effect on the tokenizer; the last two are read by nothing in the published IBQ.
_IGNORED = (
    *("ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "stage", "use_ema"),
    *("learning_rate", "min_learning_rate", "resume_lr", "lr_drop_epoch", "lr_drop_rate"),
    *("lr_drop_iter", "warmup_epochs", "scheduler_type", "gradient_clip_val", "sane_index_shape"),
    *("wp", "wp0", "wpe", "wp_iter", "max_iter", "sche_type", "use_shared_epoch"),
    *("l2_normalize", "cosine_similarity"),
)


# IBQ.


def recognise_ibq(source: Source) -> bool:
    """Whether the file holds a tokenizer of IBQ's.

    Raises:
      InputError: it is either IBQ's or taming's, and nothing says which.
    """
    block = "encoder.down.0.block.{}.conv1.weight"
    if not source.has(block.format(0), "quantize.embedding.weight", "quant_conv.weight"):
        return False
    name = _class(source)
    if not name and source.has(block.format(3)) and not source.has(block.format(4)):
        raise InputError(
            f"{source.path}: may be of taming-transformers or of IBQ, whose ids differ, and no "
            "config says which; name it with --format taming or --format ibq"
        )
    return "ibqgan" in name


def load_ibq(source: Source) -> Imported:
    """The tokenizer, with its discriminator and its LPIPS where the file has them.

    Raises:
      InputError: the config is of another model or has an option that this library does not have,
        or tensors do not fit.
    """
    where = str(source.path)
    params = _params(source, _IBQ, "ibqgan", "IBQ")
    found = averaged(source.tensors, source.weights)
    if params.get("remap") or "quantize.used" in found:
        raise InputError(f"{where}: remap: an IBQ quantizer has no remapping here")
    notes: list[str] = []
    config = taming.tokenizer_config(found, params, where=where, notes=notes)
    quantizer = IBQConfig(
        codebook_size=config.quantizer.codebook_size,
        dim=config.quantizer.dim,
        **_ibq_training(params, where, notes),
    )
    config = dataclasses.replace(config, quantizer=quantizer)
    return _imported("ibq", found, config, taming.tokenizer_table(config), where, notes)


def _ibq_training(params: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """What a published IBQ says of its training."""
    if not params:
        return {}
    options = {"beta": _number(params, "beta", 0.25, where)}
    loss = _loss(params)
    if loss is not None and _number(loss, "quant_loss_weight", 1.0, where) != 1:
        notes.append("quant_loss_weight is left out: training that goes on here has 1")
    if not params.get("use_entropy_loss"):
        return options | {"entropy_weight": 0.0}
    options["entropy_temperature"] = _number(params, "entropy_temperature", 0.01, where)
    return options | _entropies(params, loss, "entropy_loss_weight", where)


# Open-MAGVIT2.


def recognise_magvit2(source: Source) -> bool:
    """Whether the file holds an image tokenizer of Open-MAGVIT2's."""
    return source.has(
        "encoder.down.0.block.0.conv1.weight",
        "decoder.adaptive.0.gamma.weight",
        "decoder.conv_in.weight",  # of videos: conv_in.conv_1
    )


def load_magvit2(source: Source) -> Imported:
    """The tokenizer, with its LPIPS where the file has it, and its discriminator if a PatchGAN.

    Raises:
      InputError: the config is of another model or has an option that this library does not have,
        or tensors do not fit.
    """
    where = str(source.path)
    params = _params(source, _MAGVIT2, "Open_MAGVIT2.models.lfqgan", "Open-MAGVIT2")
    found = averaged(source.tensors, source.weights)
    notes: list[str] = []
    if "ddconfig" not in params:
        notes.append("no config: the architecture was taken from the tensors' shapes")
    config = _with_true_resolution(_magvit2_config(found, params, where), source, notes)
    if params.get("token_factorization"):
        notes.append(_two_ids(params.get("factorized_bits", [9, 9]), config.quantizer.dim, where))
    return _imported("open-magvit2", found, config, _magvit2_table(config), where, notes)


_NETWORK = {
    "ch": "base_channels",
    "out_ch": "out_channels",
    "ch_mult": "channel_multipliers",
    "num_res_blocks": "num_res_blocks",
    "in_channels": "in_channels",
    "resolution": "resolution",
    "z_channels": "z_channels",
}


def _magvit2_config(found: Found, params: Mapping[str, Any], where: str) -> TokenizerConfig:
    network = taming.infer_autoencoder(found, where=where)
    if "ddconfig" in params:
        network = _network(params["ddconfig"], where)
    autoencoder = dataclasses.replace(
        network,
        attention_resolutions=(),
        middle_blocks=network.num_res_blocks,
        middle_attention=False,
        decoder_extra_blocks=0,
        block_bias=False,
        latent_kernel=1,
        downsample="conv_symmetric",
        upsample="depth_to_space",
        adaptive_norm=True,
    )
    dim = network.z_channels
    for name, expected in (("embed_dim", dim), ("n_embed", 2**dim)):
        if params.get(name, expected) != expected:
            raise InputError(
                f"{where}: {name} {params[name]}: {expected} is all that goes with z_channels {dim}"
            )
    quantizer = LFQConfig(dim=dim, **_magvit2_training(params, where))
    return TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer, projections=False)


def _network(ddconfig: Mapping[str, Any], where: str) -> AutoencoderConfig:
    """What an Open-MAGVIT2 `ddconfig` says, which leaves no other option."""
    where = f"{where}: ddconfig"
    # double_z is read by nothing in the published code.
    given = fields(ddconfig, tuple(_NETWORK), where=where, ignored=("double_z",))
    if missing := _NETWORK.keys() - given.keys():
        raise InputError(f"{where}: {', '.join(sorted(missing))}: missing")
    ours = {name: given[theirs] for theirs, name in _NETWORK.items()}
    return from_json(AutoencoderConfig, ours | {"attention_resolutions": []}, where=where)


def _with_true_resolution(
    config: TokenizerConfig, source: Source, notes: list[str]
) -> TokenizerConfig:
    """The config for images of the size that the model was trained on.

    Nothing in the published network depends on its `resolution`, and some YAMLs have a wrong one.
    """
    size: Any = source.config
    for name in ("data", "init_args", "train", "params", "config", "size"):
        size = size.get(name) if isinstance(size, dict) else None
    network = config.autoencoder
    if not isinstance(size, int) or size == network.resolution or size % network.factor:
        return config
    notes.append(f"resolution {size}, as of its data; its ddconfig says {network.resolution}")
    return dataclasses.replace(config, autoencoder=dataclasses.replace(network, resolution=size))


def _two_ids(bits: Any, dim: int, where: str) -> str:
    """A note on ids that the published code would split in two, which changes no weight."""
    if not isinstance(bits, list) or len(bits) != 2 or sum(bits) != dim:
        raise InputError(f"{where}: factorized_bits {bits!r}: not two numbers of {dim} bits in all")
    low = f"2**{bits[0]}"
    return f"token_factorization: an id is one integer here, theirs are id % {low} and id // {low}"


def _magvit2_training(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a published Open-MAGVIT2 says of its training."""
    loss = _loss(params)
    if loss is None:
        return {}
    options = {"commitment_weight": _number(loss, "commit_weight", 0.25, where)}
    return options | _entropies(params, loss, "codebook_weight", where)


def _magvit2_table(config: TokenizerConfig) -> Table:
    """Where each variable of a tokenizer lies in a file of Open-MAGVIT2's."""
    levels = len(config.autoencoder.channel_multipliers)

    def adaptive(match: re.Match) -> str:
        return f"decoder.adaptive.{levels - 1 - int(match[1])}."

    rules: list[tuple[str, str | Callable]] = [
        (r"\.middle\.blocks\.", ".mid_block."),
        (r"^decoder\.adaptive_norms\.(\d+)\.", adaptive),
        *taming.tokenizer_rules(levels),
        (r"\.downsample\.conv\.", ".downsample."),
        (r"\.upsample\.conv\.", ".upsample.conv1."),
    ]
    return table.torch_table(taming.abstract(config), rules)


# Both.


def _class(source: Source) -> str:
    """The tokenizer's class in the config; empty where there is none."""
    return "" if source.config is None else _model(source.config, str(source.path))["target"]


def _model(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tokenizer's class and arguments, also out of the config of a prior for it."""
    params = taming.model_params(config, where)
    if "first_stage_config" in params:
        params = taming.model_params({"model": params["first_stage_config"]}, where)
    return params


def _params(source: Source, known: tuple[str, ...], kind: str, title: str) -> dict[str, Any]:
    """The known arguments of the config's model, which is to be of this kind."""
    if source.config is None:
        return {}
    where = f"{source.path}: model"
    params = _model(source.config, str(source.path))
    # Their other classes: a plain VQ beside IBQ, priors, videos.
    name = params["target"]
    if name and (kind not in name or (kind == "ibqgan" and not name.endswith(".IBQ"))):
        raise InputError(
            f"{where}: its config is of {name}, which is no image tokenizer of {title}"
        )
    return fields(params, known, where=where, ignored=_IGNORED)


def _imported(
    name: str,
    found: Found,
    config: TokenizerConfig,
    entries: Table,
    where: str,
    notes: list[str],
) -> Imported:
    tokenizer = table.read(
        taming.abstract(config),
        entries,
        taming.below(found, "", but="loss."),
        where=where,
        ignore=taming.IGNORED,
    )
    loss = taming.below(found, "loss.")
    if "discriminator.block_in.0.weight" in loss:
        kept = taming.below(loss, "", but="discriminator.")
        notes.append(
            f"the discriminator is no PatchGAN but one that blurs, and is not carried; "
            f"{len(loss) - len(kept)} tensors left"
        )
        loss = kept
    parts, more = taming.loss_parts(loss, where=where)
    return Imported(format=name, model=tokenizer, parts=dict(parts), notes=(*notes, *more))


def _loss(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters of the loss that a published model was trained with, if the config says."""
    loss = params.get("lossconfig") or {}
    return (loss.get("params") or {}) if "VQLPIPS" in str(loss.get("target", "")) else None


def _entropies(
    params: Mapping[str, Any], loss: Mapping[str, Any] | None, name: str, where: str
) -> dict[str, float]:
    """Weights of both entropies: theirs are two and a factor, ours a weight and a ratio.

    Args:
      name: of the factor in the loss.
    """
    if loss is None:
        return {}
    sample, batch = (_number(params, weight, 1.0, where) for weight in _ENTROPIES)
    if sample == 0:
        raise InputError(f"{where}: {_ENTROPIES[0]} 0: here both entropies are there, or neither")
    weight = _number(loss, name, 1.0, where)
    return {"entropy_weight": weight * sample, "diversity": batch / sample}


def _number(given: Mapping[str, Any], name: str, default: float, where: str) -> float:
    """A number of a YAML, in which 1e-4 without a point is read as text."""
    try:
        return float(given.get(name, default))
    except (TypeError, ValueError):
        raise InputError(f"{where}: {name} {given[name]!r}: not a number") from None
