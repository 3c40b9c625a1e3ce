"""taming-transformers' tokenizers: VQModel, GumbelVQ, VQSegmentationModel; and latent diffusion's.

A Lightning checkpoint (`.ckpt`) with a `project.yaml` or `model.yaml`. The names, from which most
later formats descend:

    encoder.down.LEVEL.block.I  .attn.I  .downsample.conv      encoder.mid.{block_1,attn_1,block_2}
    decoder.up.LEVEL.block.I    .attn.I  .upsample.conv        decoder.mid.{block_1,attn_1,block_2}
    quant_conv  post_quant_conv  quantize.embedding (Gumbel: quantize.proj, quantize.embed)
    loss.discriminator.main.I    loss.perceptual_loss.{net.sliceS.I, linI.model.1, scaling_layer}

Level 0 is the image's own resolution in both; our decoder counts from the lowest one. The
published weights were trained with beta on the codebook's term instead of the commitment
(taming-transformers issue 46), which is `beta_on="codebook"` here. Latent diffusion's first stages
have the same names, below `first_stage_model.` inside a diffusion model.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flax import nnx

from vqgan import atomic
from vqgan.adversarial.lpips import LPIPS, SCALE, SHIFT, LPIPSConfig, published_weights
from vqgan.adversarial.patchgan import PatchGAN, PatchGANConfig
from vqgan.convert import table
from vqgan.convert.exporting import Exported, Sayable, check_sayable, write_weights
from vqgan.convert.source import Imported, Source, averaged, fields
from vqgan.convert.table import Entry, Found, Rules, Table
from vqgan.errors import InputError
from vqgan.serialization import Pretrained, flat_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Content, Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import GumbelConfig, VQConfig

_FIRST_STAGE = "first_stage_model."

# What stands in such files and is no weight of a tokenizer.
IGNORED = (r"colorize", r".*\.num_batches_tracked")


def recognise(source: Source) -> bool:
    """Whether the file holds a tokenizer of taming's names."""
    return any(
        source.has(f"{prefix}encoder.down.0.block.0.conv1.weight", f"{prefix}quantize.{name}")
        for prefix in ("", _FIRST_STAGE)
        for name in ("embedding.weight", "embed.weight")
    )


def load(source: Source) -> Imported:
    """The tokenizer, with its discriminator and its LPIPS where the file has them.

    Raises:
      InputError: an option that this library does not have, or tensors that do not fit.
    """
    where = str(source.path)
    found, params, notes = _first_stage(source)
    _check_class(params or {}, where)
    model = below(found, "", but="loss.")
    tokenizer = read_tokenizer(model, params, where=where, notes=notes)
    parts, more = loss_parts(below(found, "loss."), where=where)
    return Imported(format="taming", model=tokenizer, parts=parts, notes=(*notes, *more))


_CLASSES = ("VQModel", "VQModelInterface", "GumbelVQ", "VQSegmentationModel", "VQNoDiscModel")


def _check_class(params: Mapping[str, Any], where: str) -> None:
    """Raises InputError for another class, whose tensors of these names may mean other things."""
    target = params.get("target") or "taming.VQModel"
    if target.split(".")[0] not in ("taming", "ldm") or target.split(".")[-1] not in _CLASSES:
        raise InputError(
            f"{where}: its config is of {target}, which is not among {', '.join(_CLASSES)} of "
            "taming and ldm; leave --format out, or give another --config"
        )


def read_tokenizer(
    found: Found,
    params: Mapping[str, Any] | None,
    *,
    where: str,
    notes: list[str],
) -> Tokenizer:
    """The tokenizer of tensors without a loss. Arguments and errors as of `tokenizer_config`."""
    config = tokenizer_config(found, params, where=where, notes=notes)
    return table.read(abstract(config), tokenizer_table(config), found, where=where, ignore=IGNORED)


@functools.lru_cache(maxsize=8)
def abstract(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of shapes only, to be filled. Tracing one takes a second, so a few are kept."""
    return nnx.eval_shape(lambda: Tokenizer(config, rngs=nnx.Rngs(0)))


def below(found: Mapping[str, Any], prefix: str, *, but: str | None = None) -> dict[str, Any]:
    """What lies below a prefix, without it, and not below another."""
    return {
        name.removeprefix(prefix): value
        for name, value in found.items()
        if name.startswith(prefix) and not (but and name.startswith(but))
    }


def _first_stage(source: Source) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """The tokenizer's tensors and parameters, also out of a whole diffusion model."""
    params = None
    if source.config is not None:
        params = model_params(source.config, str(source.path))
    found = source.tensors
    inner = below(found, _FIRST_STAGE)
    if not inner:
        return averaged(found, source.weights), params, []
    if params is not None and "first_stage_config" in params:
        params = model_params({"model": params["first_stage_config"]}, str(source.path))
    rest = len(found) - len(inner)
    notes = [f"took the first stage of a larger model; its {rest} other tensors were left"]
    return averaged(inner, source.weights), params, notes if rest else []


def model_params(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters of the model in a published YAML, with its class as `target`."""
    model = config.get("model", config)
    if not isinstance(model, dict):
        raise InputError(f"{where}: its config has no model in it")
    target = model.get("target", model.get("class_path", ""))
    params = model.get("params", model.get("init_args", {}))
    if not isinstance(params, dict):
        raise InputError(f"{where}: the model in its config has no parameters")
    return {"target": str(target), **params}


def tokenizer_config(
    found: Found,
    params: Mapping[str, Any] | None,
    *,
    where: str,
    notes: list[str],
) -> TokenizerConfig:
    """The config of the tokenizer: from its YAML, or from the shapes of its tensors.

    Args:
      notes: gets a line for whatever had to be assumed.

    Raises:
      InputError: an option that this library does not have.
    """
    autoencoder = infer_autoencoder(found, where=where)
    if params is None or "ddconfig" not in params:
        notes.append(
            "no config: the architecture was taken from the tensors' shapes, and a resolution of "
            f"{autoencoder.resolution}"
        )
    else:
        autoencoder = autoencoder_config(params["ddconfig"], autoencoder, where=where)
    return TokenizerConfig(
        autoencoder=autoencoder,
        quantizer=_quantizer_config(found, params or {}, where=where),
        content=_content(found, params or {}),
    )


def _content(found: Found, params: Mapping[str, Any]) -> Content:
    """What the published tokenizer is of: label maps have a class and a buffer of their own."""
    target = params.get("target", "")
    if target.endswith(".VQSegmentationModel") or (not target and "colorize" in found):
        return "labels"
    return "depth" if params.get("image_key") == "depth" else "images"


_DDCONFIG = (
    *("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout"),
    *("resamp_with_conv", "in_channels", "resolution", "z_channels", "double_z"),
    *("give_pre_end", "use_linear_attn", "attn_type", "tanh_out"),
)

_NEEDED = (
    *("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions"),
    *("in_channels", "resolution", "z_channels"),
)


def autoencoder_config(
    ddconfig: Mapping[str, Any], inferred: AutoencoderConfig, *, where: str
) -> AutoencoderConfig:
    """The config that a published `ddconfig` stands for."""
    where = f"{where}: ddconfig"
    given = fields(ddconfig, _DDCONFIG, where=where, needed=_NEEDED)
    refused = {
        "double_z": "a quantizer takes one set of channels",
        "give_pre_end": "the decoder is used whole",
        "use_linear_attn": "linear attention is not here",
    }
    for name, why in refused.items():
        if given.get(name):
            raise InputError(f"{where}: {name} is set, but {why}")
    attention = given.get("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise InputError(f"{where}: attn_type {attention!r} is not here; there are vanilla, none")
    multipliers = tuple(given["ch_mult"])
    resolution = given["resolution"]
    reached = {resolution // 2**level for level in range(len(multipliers))}
    resolutions = given["attn_resolutions"] if attention == "vanilla" else ()
    with_conv = given.get("resamp_with_conv", True)
    return dataclasses.replace(
        inferred,
        in_channels=given["in_channels"],
        out_channels=given["out_ch"],
        base_channels=given["ch"],
        channel_multipliers=multipliers,
        num_res_blocks=given["num_res_blocks"],
        # Those at no level are without effect there, and an error here.
        attention_resolutions=tuple(r for r in resolutions if r in reached),
        resolution=resolution,
        z_channels=given["z_channels"],
        dropout=float(given.get("dropout", 0.0)),
        middle_attention=attention == "vanilla",
        downsample="conv" if with_conv else "average",
        upsample="conv" if with_conv else "nearest",
        output="tanh" if given.get("tanh_out") else "linear",
    )


def infer_autoencoder(found: Found, *, where: str, resolution: int = 256) -> AutoencoderConfig:
    """The architecture, as far as the shapes of tensors of taming's names tell it.

    All of it but the resolution that attention is bound to: that is given.
    """

    def shape(name: str) -> tuple[int, ...]:
        return table.shape_of(found, name, 4, where=where)

    base, channels = shape("encoder.conv_in.weight")[:2]
    levels = max(table.count(found, r"encoder\.down\.(\d+)\."), 1)
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    with_attention = (i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in found)
    return AutoencoderConfig(
        in_channels=channels,
        out_channels=shape("decoder.conv_out.weight")[0],
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=table.count(found, r"encoder\.down\.0\.block\.(\d+)\."),
        attention_resolutions=tuple(resolution // 2**i for i in with_attention),
        resolution=resolution,
        z_channels=shape("encoder.conv_out.weight")[0],
        middle_attention="encoder.mid.attn_1.q.weight" in found,
        downsample="conv" if "encoder.down.0.downsample.conv.weight" in found else "average",
        upsample="conv" if "decoder.up.1.upsample.conv.weight" in found else "nearest",
    )


def _quantizer_config(
    found: Found, params: Mapping[str, Any], *, where: str
) -> VQConfig | GumbelConfig:
    gumbel = "quantize.embed.weight" in found
    name = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    size, dim = table.shape_of(found, name, 2, where=where)
    size, dim = params.get("n_embed", size), params.get("embed_dim", dim)
    used = found["quantize.used"].shape[0] if "quantize.used" in found else 0
    if not gumbel:
        return VQConfig(
            codebook_size=size,
            dim=dim,
            beta_on="codebook",
            init_from_data=False,
            revive_after=0,
            used_codes=used,
        )
    training = _gumbel_training(params)
    return GumbelConfig(codebook_size=size, dim=dim, used_codes=used, **training)


def _gumbel_training(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a published GumbelVQ says of its training."""
    options: dict[str, Any] = {"kl_weight": float(params.get("kl_weight", 1e-8))}
    schedule = params.get("temperature_scheduler_config", {}).get("params", {})
    if schedule:
        options["temperature_start"] = float(schedule["lr_max"])
        options["temperature_end"] = float(schedule["lr_min"])
        options["temperature_steps"] = int(schedule["max_decay_steps"])
    return options


def tokenizer_rules(levels: int, *, gumbel: bool = False) -> Rules:
    """Our names of a tokenizer's variables to taming's."""

    def level(match: re.Match) -> str:
        return f"decoder.up.{levels - 1 - int(match[1])}."

    return [
        (r"^encoder\.stages\.", "encoder.down."),
        (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down.\1.downsample.conv."),
        (r"^decoder\.stages\.(\d+)\.", level),
        (r"^decoder\.upsamples\.(\d+)\.", lambda match: level(match) + "upsample."),
        (r"\.(down|up)\.(\d+)\.blocks\.", r".\1.\2.block."),
        (r"\.attentions\.", ".attn."),
        (r"\.middle\.blocks\.0\.", ".mid.block_1."),
        (r"\.middle\.blocks\.1\.", ".mid.block_2."),
        (r"\.middle\.attention\.", ".mid.attn_1."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"^quantizer\.codebook$", f"quantize.{'embed' if gumbel else 'embedding'}.weight"),
        (r"^quantizer\.proj_bias$", "quantize.proj.bias"),
        (r"^quantizer\.", "quantize."),
        (r"\.(kernel|scale)$", ".weight"),
    ]


def tokenizer_table(config: TokenizerConfig) -> Table:
    """Where each variable of a tokenizer lies in a file of taming's."""
    levels = len(config.autoencoder.channel_multipliers)
    gumbel = isinstance(config.quantizer, GumbelConfig)
    entries = table.torch_table(abstract(config), tokenizer_rules(levels, gumbel=gumbel))
    if gumbel:
        entries["quantizer.proj_weight"] = Entry(("quantize.proj.weight",), table.TABLE_OF_CONV)
    return entries


# The way back.

_SAYABLE: Sayable = {
    "autoencoder.norm_groups": (32,),
    "autoencoder.middle_blocks": (2,),
    "autoencoder.middle_attention": (True,),
    "autoencoder.decoder_extra_blocks": (1,),
    "autoencoder.block_bias": (True,),
    "autoencoder.shortcut_of": ("input",),
    "autoencoder.latent_kernel": (3,),
    "autoencoder.downsample": ("conv", "average"),
    "autoencoder.upsample": ("conv", "nearest"),
    "autoencoder.adaptive_norm": (False,),
    "autoencoder.pixel_range": ("symmetric",),
    "autoencoder.output": ("linear",),
    "projections": (True,),
    "quantizer.kind": ("vq", "gumbel"),
    "quantizer.normalize": (False,),
    "quantizer.unknown_id": (-1,),
    "quantizer.straight_through": (True,),
}


def save(exported: Exported, path: Path) -> tuple[str, ...]:
    """Writes a `.ckpt` (or `.safetensors`, by the suffix) with its YAML beside it.

    Raises:
      InputError: the architecture is none that this format can say.
    """
    config = exported.tokenizer.config
    check_sayable(config, _SAYABLE, "taming")
    model = config.autoencoder
    if (model.downsample, model.upsample) not in (("conv", "conv"), ("average", "nearest")):
        raise InputError(
            f"taming cannot say autoencoder.downsample {model.downsample!r} with upsample "
            f"{model.upsample!r}: it has convolutions at both or at neither"
        )
    if config.content == "labels" and config.quantizer.kind == "gumbel":
        raise InputError("taming cannot say content 'labels' with quantizer.kind 'gumbel'")
    tensors = table.write(exported.tokenizer, tokenizer_table(config))
    for name, module in exported.parts.items():
        tensors |= _loss_tensors(name, module)
    write_weights(path, tensors)
    used = path.with_name(f"{path.stem}.used.npy") if "quantize.used" in tensors else None
    if used is not None:
        with atomic.new_file(used) as new, new.open("wb") as file:
            np.save(file, tensors["quantize.used"])
    description = yaml.safe_dump({"model": _yaml(config, used)}, sort_keys=False)
    with atomic.new_file(path.with_suffix(".yaml")) as new:
        new.write_text(description)
    if getattr(config.quantizer, "beta_on", "codebook") == "codebook":
        return ()
    return ("training that goes on there has beta on the codebook's term, not the commitment",)


def _loss_tensors(name: str, module: Pretrained) -> dict[str, np.ndarray]:
    if isinstance(module, PatchGAN):
        config = module.config
        if config.norm != "batch" or config.blur:
            raise InputError(
                "taming cannot say discriminator: its PatchGAN has batch norm, no blur"
            )
        tensors = table.write(module, discriminator_table(config))
        return {f"loss.discriminator.{name}": value for name, value in tensors.items()}
    if isinstance(module, LPIPS) and module.config.net == "vgg16":
        tensors = table.write(module, lpips_table())
        tensors["scaling_layer.shift"] = SHIFT.reshape(1, 3, 1, 1)
        tensors["scaling_layer.scale"] = SCALE.reshape(1, 3, 1, 1)
        return {f"loss.perceptual_loss.{name}": value for name, value in tensors.items()}
    raise InputError(f"taming cannot say {name}: it has a PatchGAN, and LPIPS on VGG16")


def _yaml(config: TokenizerConfig, used: Path | None) -> dict[str, Any]:
    """The `model` of a taming YAML."""
    model, quantizer = config.autoencoder, config.quantizer
    ddconfig = {
        "double_z": False,
        "z_channels": model.z_channels,
        "resolution": model.resolution,
        "in_channels": model.in_channels,
        "out_ch": model.out_channels,
        "ch": model.base_channels,
        "ch_mult": list(model.channel_multipliers),
        "num_res_blocks": model.num_res_blocks,
        "attn_resolutions": list(model.attention_resolutions),
        "dropout": model.dropout,
        "resamp_with_conv": model.downsample == "conv",
    }
    keys: dict[Content, dict[str, Any]] = {
        "images": {},
        "labels": {"image_key": "segmentation", "n_labels": model.in_channels},
        "depth": {"image_key": "depth"},
    }
    params: dict[str, Any] = {
        "embed_dim": quantizer.dim,
        "n_embed": config.quantizer.codebook_size,
        "ddconfig": ddconfig,
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
        **keys[config.content],
    }
    if used is not None:
        params["remap"] = used.name
    if isinstance(quantizer, GumbelConfig):
        params["kl_weight"] = quantizer.kl_weight
        return {"target": "taming.models.vqgan.GumbelVQ", "params": params}
    name = "VQSegmentationModel" if config.content == "labels" else "VQModel"
    return {"target": f"taming.models.vqgan.{name}", "params": params}


# The loss, which in these files holds the discriminator and the perceptual network.


def loss_parts(found: Found, *, where: str) -> tuple[dict[str, Pretrained], list[str]]:
    """The discriminator and the LPIPS of a `loss`, by the folders they go to, and notes."""
    parts: dict[str, Pretrained] = {}
    notes: list[str] = []
    judge, perceptual = below(found, "discriminator."), below(found, "perceptual_loss.")
    if any(name.endswith(".initialized") for name in judge):
        notes.append(f"a discriminator with ActNorm is not carried; {len(judge)} tensors left")
        judge = {}
    if judge:
        parts["discriminator"] = read_discriminator(judge, where=f"{where}: loss.discriminator")
    if perceptual:
        parts["lpips"] = read_lpips(perceptual, where=f"{where}: loss.perceptual_loss")
        ours, known = flat_weights(parts["lpips"]), published_weights("vgg16")
        same = all(np.array_equal(ours[name], known[name]) for name in known)
        notes.append(f"LPIPS is {'the published one' if same else 'not the published one'}")
    rest = [n for n in found if not n.startswith(("discriminator.", "perceptual_loss."))]
    if rest:
        raise InputError(f"{where}: {'; '.join(f'loss.{n} is unexpected' for n in sorted(rest))}")
    return parts, notes


def read_discriminator(found: Found, *, where: str) -> PatchGAN:
    """The PatchGAN of `main.I.*`, its configuration by the shapes."""
    first = found.get("main.0.weight")
    if first is None or len(first.shape) != 4:
        raise InputError(f"{where}: main.0.weight is missing or no convolution")
    kernels = [n for n, t in found.items() if n.endswith(".weight") and len(t.shape) == 4]
    config = PatchGANConfig(
        in_channels=first.shape[1], base_channels=first.shape[0], num_layers=len(kernels) - 2
    )
    return table.read(
        nnx.eval_shape(lambda: PatchGAN(config, rngs=nnx.Rngs(0))),
        discriminator_table(config),
        found,
        where=where,
        ignore=IGNORED,
    )


def discriminator_table(config: PatchGANConfig) -> Table:
    """Convolution, norm and activation are numbered as one sequence; the first has no norm."""

    def conv(match: re.Match) -> str:
        return f"main.{max(3 * int(match[1]) - 1, 0)}."

    rules: Rules = [
        (r"^convs\.(\d+)\.", conv),
        (r"^norms\.(\d+)\.", lambda match: f"main.{3 * int(match[1]) + 3}."),
        (r"\.(mean|var)$", r".running_\1"),
        (r"\.(kernel|scale)$", ".weight"),
    ]
    return table.torch_table(
        nnx.eval_shape(lambda: PatchGAN(config, rngs=nnx.Rngs(0))),
        rules,
    )


# The convolutions of torchvision's VGG16, counted with the activations and poolings between them.
VGG16_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_SLICES = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5)
HEAD = table.Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1))


def read_lpips(found: Found, *, where: str) -> LPIPS:
    """LPIPS on VGG16 as it lies in the loss: trunk, heads, and the scaling, which is fixed."""
    return table.read(
        nnx.eval_shape(lambda: LPIPS(LPIPSConfig(net="vgg16"), rngs=nnx.Rngs(0))),
        lpips_table(),
        found,
        where=where,
        ignore=(r"scaling_layer\.(shift|scale)",),
    )


def lpips_table() -> Table:
    """The names below `loss.perceptual_loss.`."""
    entries: Table = {}
    for i, (part, feature) in enumerate(zip(_SLICES, VGG16_FEATURES, strict=True)):
        name = f"net.slice{part}.{feature}"
        entries[f"convs.{i}.kernel"] = Entry((f"{name}.weight",), table.CONV)
        entries[f"convs.{i}.bias"] = Entry((f"{name}.bias",))
    for i in range(5):
        entries[f"heads.{i}"] = Entry((f"lin{i}.model.1.weight",), HEAD)
    return entries
