"""Published systems that have no model here, so that their files are refused by name.

Each is known by a few of its tensors' names. Programs (TorchScript, as of Cosmos tokenizers), plain
pickles (LWM) and NumPy archives (UViM) do not get as far: `containers.py` refuses those.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vqgan.convert.source import Source
from vqgan.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A published system by what its files hold.

    Attributes:
      name: what its users call it.
      why: what is said of it; the mend, where there is one.
      marks: expressions for the last components of a tensor's name; tensors of all must be there.
      but: an expression for a whole name, of which no tensor may be there.
      alike: it also has all that a format of ours is recognised by, so it must be looked for first.
    """

    name: str
    why: str = "which has no model here yet; `vqgan convert --help` lists what can be imported"
    marks: tuple[str, ...]
    but: str = r"(?!)"
    alike: bool = False

    def is_in(self, names: Iterable[str]) -> bool:
        """Whether a file with tensors of these names is of this system."""
        names = list(names)
        ends = [re.compile(rf"(?:^|\.)(?:{mark})$") for mark in self.marks]
        if not all(any(end.search(name) for name in names) for end in ends):
            return False
        return not any(re.fullmatch(self.but, name) for name in names)


# The first that fits is named: what is more particular comes before what is less.
REFUSED = (
    Refused(
        name="VAR's multi-scale tokenizer",
        marks=(r"quantize\.ema_vocab_hit_SV",),
        alike=True,
    ),
    Refused(
        name="MoVQ, with norms modulated by the codes",
        marks=(r"decoder\.mid\.block_1\.norm1\.conv_y\.weight",),
        alike=True,
    ),
    Refused(
        name="MaskGIT's transformer",
        marks=(r"Embed_0\.word_embeddings\.embedding", r"MlmLayer_0\.mlm_dense\.kernel"),
    ),
    Refused(
        name="Infinity's transformer",
        marks=(r"text_proj_for_sos\.ca\.mat_kv\.weight",),
    ),
    Refused(
        name="Infinity's BSQ tokenizer",
        marks=(r"encoder\.down\.0\.block\.0\.conv1\.conv\.weight", r"quantizer\.lfq\.mask"),
    ),
    Refused(
        name="VAR's transformer",
        marks=(r"blocks\.0\.attn\.mat_qkv\.weight", r"lvl_embed\.weight", r"pos_1LC"),
    ),
    Refused(
        name="RAR's transformer",
        marks=(r"target_aware_pos_embed", r"adaln_before_head\.adaLN_modulation\.1\.weight"),
    ),
    Refused(
        name="TA-TiTok, a 1D tokenizer",
        marks=(r"latent_tokens", r"decoder\.text_guidance_proj\.weight"),
    ),
    Refused(
        name="TiTok, a 1D tokenizer",
        marks=(r"latent_tokens", r"encoder\.latent_token_positional_embedding"),
    ),
    Refused(
        name="TiTok's masked transformer (U-ViT)",
        marks=(r"in_blocks\.0\.attn\.qkv\.weight", r"out_blocks\.0\.skip_linear\.weight"),
    ),
    Refused(
        name="TiTok's masked transformer (BERT)",
        marks=(
            r"model\.embeddings\.word_embeddings\.weight",
            r"model\.encoder\.layer\.0\.attention\.self\.query\.weight",
            r"model\.lm_head\.weight",
        ),
    ),
    Refused(
        name="MaskGen's transformer (of codes)",
        marks=(r"text_embed_proj\.weight", r"cond_pooled_proj\.weight", r"pos_embed"),
    ),
    Refused(
        name="MaskGen's transformer (of latents)",
        marks=(r"text_pooled_emb\.weight", r"diffusion_pos_embed_learned"),
    ),
    Refused(
        name="MaskBit's tokenizer (VQGAN+)",
        marks=(r"encoder\.mid\.res_blocks\.0\.conv1\.weight",),
    ),
    Refused(
        name="MaskBit's transformer",
        marks=(r"class_emb\.weight", r"transformer\.layers\.0\.0\.mha\.in_proj_weight"),
    ),
    Refused(
        name="LWM's VQGAN",
        marks=(r"encoder\.DownsamplingBlock_0\.ResnetBlock_0\.Conv_0\.kernel",),
    ),
    Refused(
        name="LWM's language model",
        marks=(r"transformer\.vte\.embedding", r"vision_head\.kernel"),
    ),
    Refused(
        name="UViM",
        marks=(r"bottleneck_downsample", r"encoder_head\.kernel"),
    ),
    Refused(
        name="RQ-VAE",
        marks=(r"encoder\.conv_in\.weight", r"quantizer\.codebooks\.0\.weight"),
    ),
    Refused(
        name="RQ-Transformer",
        marks=(
            r"body_transformer\.blocks\.0\.attn\.key\.weight",
            r"head_transformer\.blocks\.0\.attn\.key\.weight",
        ),
    ),
    Refused(
        name="the second stage of enhancing-transformers",
        marks=(r"tok_emb_code\.weight", r"pos_emb_code"),
    ),
    Refused(
        name="ViT-VQGAN of enhancing-transformers",
        marks=(r"encoder\.to_patch_embedding\.0\.weight", r"pre_quant\.weight"),
    ),
    Refused(
        name="BSQ-ViT",
        marks=(r"encoder\.transformer\.resblocks\.0\.attn\.in_proj_weight", r"quant_embed\.weight"),
    ),
    Refused(
        name="Paella's VQ tokenizer",
        marks=(r"vquantizer\.codebook\.weight",),
    ),
    Refused(
        name="the DALL-E dVAE",
        marks=(
            r"group_1\.(_modules\.)?block_1\.(_modules\.)?res_path\.(_modules\.)?conv_1\."
            r"(_parameters\.)?w",
        ),
    ),
    Refused(
        name="IBQ's transformer",
        marks=(r"blocks\.0\.attention\.wqkv\.weight", r"head_nm\.ada_lin\.1\.weight"),
        alike=True,  # its tokenizer lies where taming's and latent diffusion's do
    ),
    Refused(
        name="Open-MAGVIT2's transformer",
        marks=(
            r"spatial_blocks\.0\.attention\.wqkv\.weight",
            r"factorized_blocks\.0\.attention\.wqkv\.weight",
        ),
    ),
    Refused(
        name="Open-MAGVIT2's video tokenizer",
        marks=(r"encoder\.conv_in\.conv_1\.weight", r"decoder\.adaptive\.0\.gamma\.weight"),
    ),
    Refused(
        name="Muse's or aMUSEd's transformer",
        marks=(r"transformer_layers\.0\.(attn1\.to_q|attention\.query)\.weight",),
    ),
    Refused(
        name="a diffusion UNet of latent diffusion",
        marks=(r"diffusion_model\.input_blocks\.0\.0\.weight",),
    ),
    Refused(
        name="a diffusion UNet of diffusers",
        marks=(r"time_embedding\.linear_1\.weight", r"down_blocks\.0\.resnets\.0\.conv1\.weight"),
    ),
    Refused(
        name="a transformer of diffusers",
        marks=(r"transformer_blocks\.0\.attn1?\.to_q\.weight",),
    ),
    Refused(
        name="an autoencoder of diffusers without a codebook, as AutoencoderKL",
        marks=(r"encoder\.down_blocks\.0\.resnets\.0\.conv1\.weight",),
        but=r"(.*\.)?quantize.*",
    ),
    Refused(
        name="an autoencoder of taming's names without a codebook, as latent diffusion's "
        "AutoencoderKL",
        marks=(r"encoder\.down\.0\.block\.0\.conv1\.weight", r"quant_conv\.weight"),
        but=r"(.*\.)?quantize.*",
    ),
    Refused(
        name="the state of an optimizer",
        why="not a model; name the file of weights that belongs to it",
        marks=(r"state\.\d+\.(exp_avg|momentum_buffer)",),
        but=r"(?!(.*\.)?state\.\d+\.).*",
    ),
    Refused(
        name="a pickled module",
        why="not its weights alone; save its state_dict with torch.save instead",
        marks=(r"_modules\..*\._parameters\.\w+",),
    ),
)


def refuse(source: Source, *, alike: bool) -> None:
    """Raises InputError naming the system that the file is of, if it is one of these.

    Args:
      alike: those that a format of ours would be taken for, or the others.
    """
    for system in REFUSED:
        if system.alike == alike and system.is_in(source.checkpoint.tensors):
            raise InputError(f"{source.path}: this is {system.name}, {system.why}")
