"""MaskGIT's tokenizer (arXiv:2202.04200): as published in Flax, and its PyTorch port.

    Flax: a msgpack of `flax.serialization`        the port: a state dict
    params.encoder.Conv_0  ResBlock_I              encoder.conv_in  .down.LEVEL.block.I  .mid.I
           .GroupNorm_0  .Conv_1                           .norm_out  .conv_out
    params.decoder.Conv_0  ResBlock_I              decoder.conv_in  .mid.I  .up.LEVEL.block.I
           .Conv_1 and on  .GroupNorm_0                    .up.LEVEL.upsample_conv  .norm_out ...
    params.quantizer.codebook                      quantize.embedding.weight

Flax numbers its layers in the order of execution, across levels: the encoder's middle has its last
residual blocks, the decoder's its first. The net has no attention and no projections around the
quantizer, averages where it downsamples, and sees images in [0, 1]. Its shortcut convolution takes
the residual branch's output, which is a slip in the published code that the weights were trained
with. Which activation it has cannot be told from a file; published ones have swish.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vqgan.convert import table
from vqgan.convert.containers import LazyTensor
from vqgan.convert.source import Imported, Source
from vqgan.convert.table import Entry, Found, Table
from vqgan.convert.taming import abstract
from vqgan.errors import InputError
from vqgan.serialization import from_json
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig

Rules = list[tuple[str, str | Callable[[re.Match], str]]]

# Fields of open-muse's config.json that say nothing of this model.
_IDLE = ("_class_name", "_version", "_name_or_path", "attn_resolutions", "resample_with_conv")


@dataclass(frozen=True, kw_only=True)
class _Published:
    """The others; None is by the tensors' shapes."""

    resolution: int = 256
    dropout: float = 0.0
    commitment_cost: float = 0.25
    num_channels: int | None = None
    hidden_channels: int | None = None
    channel_mult: tuple[int, ...] | None = None
    num_res_blocks: int | None = None
    z_channels: int | None = None
    num_embeddings: int | None = None
    quantized_embed_dim: int | None = None


def recognise(source: Source) -> bool:
    """Whether the file holds MaskGIT's tokenizer, in either form."""
    return _is_flax(_tensors(source)) or source.has(
        "encoder.mid.0.conv1.weight", "quantize.embedding.weight"
    )


def load(source: Source) -> Imported:
    """The tokenizer; all of its architecture is in the tensors' shapes.

    Raises:
      InputError: a variant that is not here, a config that the tensors contradict, or tensors that
        do not fit.
    """
    where, found = str(source.path), _tensors(source)
    layers = _Layers(found, where=where)
    told = _told(source)
    config = layers.config(told or _Published())
    tokenizer = table.read(abstract(config), layers.table(config), found, where=where)
    notes = ("no config: a resolution of 256 was assumed, others work too",) if not told else ()
    return Imported(format="maskgit", model=tokenizer, notes=notes)


def _told(source: Source) -> _Published | None:
    """What open-muse's config says; other configs are left, as the shapes do without."""
    config = source.config or {}
    if config.get("_class_name") != "MaskGitVQGAN":
        return None
    known = {name: value for name, value in config.items() if name not in _IDLE}
    return from_json(_Published, known, where=f"{source.path}: config")


def _tensors(source: Source) -> dict[str, LazyTensor]:
    """By their names below `params`, where Flax has that; what is beside it keeps its name."""
    return {name.removeprefix("params."): value for name, value in source.tensors.items()}


def _is_flax(found: Found) -> bool:
    return {"encoder.ResBlock_0.Conv_0.kernel", "quantizer.codebook"} <= found.keys()


class _Layers:
    """What the layers of one file are called, and what their shapes say.

    Attributes:
      levels: resolutions that the net passes through.
      blocks: residual blocks a level, and in each middle.
    """

    def __init__(self, found: Found, *, where: str):
        self.found, self.where, self.flax = found, where, _is_flax(found)
        if not self.flax:
            self.levels = table.count(found, r"encoder\.down\.(\d+)\.")
            self.blocks = table.count(found, r"encoder\.down\.0\.block\.(\d+)\.")
            if not self.blocks:
                raise InputError(f"{where}: encoder.down.0.block.0 is missing")
            return
        # Of the decoder: one at the start, one after each upsampling, one at the end.
        self.levels = table.count(found, r"decoder\.Conv_(\d+)\.") - 1
        total = table.count(found, r"encoder\.ResBlock_(\d+)\.")
        self.blocks = total // (self.levels + 1) if self.levels > 0 else 0
        self._check_flax(total)

    def _check_flax(self, total: int) -> None:
        """Raises InputError for what the published code can be configured to and this cannot."""
        if table.count(self.found, r"encoder\.Conv_(\d+)\.") > 2:
            problem = "encoder.Conv_2: downsampling by 4x4 convolutions is not here"
        elif "encoder.GroupNorm_0.scale" not in self.found:
            problem = "encoder.GroupNorm_0.scale is missing; other norms are not here"
        elif not self.blocks or total % (self.levels + 1):
            problem = (
                f"{total} residual blocks in the encoder do not divide into {self.levels} levels, "
                "as many as the decoder's convolutions say, and a middle"
            )
        else:
            return
        raise InputError(f"{self.where}: {problem}")

    def rules(self) -> Rules:
        """Our names to theirs."""
        return _flax_rules(self.levels, self.blocks) if self.flax else _port_rules(self.levels)

    def table(self, config: TokenizerConfig) -> Table:
        """Where each variable of ours lies."""
        entries = table.torch_table(abstract(config), self.rules())
        if not self.flax:
            return entries
        return {name: Entry(entry.theirs) for name, entry in entries.items()}  # laid out as ours

    def config(self, told: _Published) -> TokenizerConfig:
        """What the shapes say and, where no shape can, the config.

        Raises:
          InputError: they contradict each other.
        """
        inputs, base = self._channels("encoder.conv_in.kernel")
        level = range(self.levels)
        widths = [self._channels(f"encoder.stages.{i}.blocks.0.conv2.kernel")[1] for i in level]
        autoencoder = AutoencoderConfig(
            in_channels=inputs,
            out_channels=self._channels("decoder.conv_out.kernel")[1],
            base_channels=base,
            channel_multipliers=tuple(max(width // base, 1) for width in widths),
            num_res_blocks=self.blocks,
            attention_resolutions=(),
            resolution=told.resolution,
            z_channels=self._channels("encoder.conv_out.kernel")[1],
            dropout=told.dropout,
            middle_blocks=self.blocks,
            middle_attention=False,
            decoder_extra_blocks=0,
            block_bias=False,
            shortcut_of="output",
            latent_kernel=1,
            downsample="average",
            upsample="conv",
            pixel_range="unit",
        )
        # Published training had beta on the commitment, and an entropy term that is not here.
        quantizer = VQConfig(
            codebook_size=self._shape("quantizer.codebook", 2)[0],
            dim=autoencoder.z_channels,
            beta=told.commitment_cost,
            init_from_data=False,
            revive_after=0,
        )
        self._check_told(told, autoencoder, quantizer)
        return TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer, projections=False)

    def _check_told(
        self, told: _Published, autoencoder: AutoencoderConfig, quantizer: VQConfig
    ) -> None:
        seen = {
            "num_channels": autoencoder.in_channels,
            "hidden_channels": autoencoder.base_channels,
            "channel_mult": autoencoder.channel_multipliers,
            "num_res_blocks": autoencoder.num_res_blocks,
            "z_channels": autoencoder.z_channels,
            "num_embeddings": quantizer.codebook_size,
            "quantized_embed_dim": quantizer.dim,
        }
        said = {name: getattr(told, name) for name in seen}
        differ = [
            f"{name} {said[name]}, not {seen[name]}"
            for name in seen
            if said[name] not in (None, seen[name])
        ]
        if differ:
            raise InputError(
                f"{self.where}: its config contradicts its tensors: {'; '.join(differ)}"
            )

    def _channels(self, ours: str) -> tuple[int, int]:
        """Inputs and outputs of a convolution, by our name of its kernel."""
        shape = self._shape(ours, 4)
        return (shape[2], shape[3]) if self.flax else (shape[1], shape[0])

    def _shape(self, ours: str, rank: int) -> tuple[int, ...]:
        name = table.renamed(ours, self.rules())
        return table.shape_of(self.found, name, rank, where=self.where)


def _flax_rules(levels: int, blocks: int) -> Rules:
    def block(part: str, before: int) -> Callable[[re.Match], str]:
        """Residual blocks of a stage, `before` times `blocks` of which come before its first."""
        return lambda m: f"{part}.ResBlock_{(before + int(m[1])) * blocks + int(m[2])}."

    return [
        # A middle becomes one more stage: the encoder's last, the decoder's first.
        (r"^encoder\.middle\.", f"encoder.stages.{levels}."),
        (r"^decoder\.middle\.", "decoder.stages.-1."),
        (r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.", block("encoder", 0)),
        (r"^decoder\.stages\.(-?\d+)\.blocks\.(\d+)\.", block("decoder", 1)),
        (r"^decoder\.upsamples\.(\d+)\.conv\.", lambda m: f"decoder.Conv_{int(m[1]) + 1}."),
        (r"\.conv_in\.", ".Conv_0."),
        (r"^encoder\.conv_out\.", "encoder.Conv_1."),
        (r"^decoder\.conv_out\.", f"decoder.Conv_{levels}."),
        (r"\.norm_out\.", ".GroupNorm_0."),
        (r"\.norm([12])\.", lambda m: f".GroupNorm_{int(m[1]) - 1}."),
        (r"\.conv([12])\.", lambda m: f".Conv_{int(m[1]) - 1}."),
        (r"\.shortcut\.", ".Conv_2."),
    ]


def _port_rules(levels: int) -> Rules:
    def level(match: re.Match) -> str:
        return f"decoder.up.{levels - 1 - int(match[1])}."

    return [
        (r"\.middle\.blocks\.", ".mid."),
        (r"^encoder\.stages\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
        (r"^decoder\.stages\.(\d+)\.blocks\.", lambda match: level(match) + "block."),
        (r"^decoder\.upsamples\.(\d+)\.conv\.", lambda match: level(match) + "upsample_conv."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"^quantizer\.codebook$", "quantize.embedding.weight"),
        (r"\.(kernel|scale)$", ".weight"),
    ]
