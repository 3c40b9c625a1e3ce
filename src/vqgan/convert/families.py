"""The published formats by name: which there are, and which one a file is of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vqgan.convert import (
    diffusers,
    llamagen,
    lpips,
    maskgit,
    net2net,
    resnet,
    seed_voken,
    taming,
    vqgan_jax,
)
from vqgan.convert.exporting import Exported
from vqgan.convert.refused import refuse
from vqgan.convert.source import Imported, Source
from vqgan.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published format.

    Attributes:
      example: a command line that imports one.
      recognise: whether a file is of this format, by the names of its tensors and its config.
      load: the import.
      save: writes a tokenizer in this format, where that is possible; returns notes.
    """

    name: str
    title: str
    example: str
    recognise: Callable[[Source], bool]
    load: Callable[[Source], Imported]
    save: Callable[[Exported, Path], tuple[str, ...]] | None = None


FAMILIES = (
    Family(
        name="net2net",
        title="taming-transformers' second stage with its tokenizers, into a pipeline",
        example="vqgan convert last.ckpt models/cin --config project.yaml --format net2net",
        recognise=net2net.recognise,
        load=net2net.load,
    ),
    # Before taming: some of its files have taming's names.
    Family(
        name="ibq",
        title="SEED-Voken's IBQ tokenizers",
        example="vqgan convert imagenet256_16384.ckpt models/ibq --config ibqgan_16384.yaml",
        recognise=seed_voken.recognise_ibq,
        load=seed_voken.load_ibq,
    ),
    Family(
        name="open-magvit2",
        title="SEED-Voken's Open-MAGVIT2 image tokenizers",
        example="vqgan convert imagenet_256_L.ckpt models/lfq --config imagenet_lfqgan_256_L.yaml",
        recognise=seed_voken.recognise_magvit2,
        load=seed_voken.load_magvit2,
    ),
    # Before MaskGIT: both have the middle of MaskGIT's port.
    Family(
        name="llamagen",
        title="LlamaGen's VQ tokenizers and class-conditional transformers",
        example="vqgan convert vq_ds16_c2i.pt models/vq16",
        recognise=llamagen.recognise,
        load=llamagen.load,
    ),
    # Before taming too: its port has taming's first names.
    Family(
        name="maskgit",
        title="MaskGIT's tokenizer, in Flax or as its PyTorch port",
        example="vqgan convert tokenizer_imagenet256_checkpoint models/maskgit",
        recognise=maskgit.recognise,
        load=maskgit.load,
    ),
    Family(
        name="taming",
        title="taming-transformers VQModel, GumbelVQ, VQSegmentationModel; latent diffusion VQ",
        example="vqgan convert last.ckpt models/f16 --config model.yaml",
        recognise=taming.recognise,
        load=taming.load,
        save=taming.save,
    ),
    Family(
        name="lpips",
        title="torchvision's VGG16 and AlexNet, and the heads of LPIPS v0.1",
        example="vqgan convert vgg16-397923af.pth models/lpips",
        recognise=lpips.recognise,
        load=lpips.load,
    ),
    Family(
        name="resnet",
        title="torchvision's ResNets, as classifiers for a perceptual term",
        example="vqgan convert resnet50-0676ba61.pth models/resnet50",
        recognise=resnet.recognise,
        load=resnet.load,
    ),
    Family(
        name="vqgan-jax",
        title="vqgan-jax VQModel, as in DALL-E mini",
        example="vqgan convert vqgan_imagenet_f16_16384 models/dalle-mini",
        recognise=vqgan_jax.recognise,
        load=vqgan_jax.load,
    ),
    Family(
        name="diffusers",
        title="diffusers VQModel, a directory or its weights",
        example="vqgan convert vqvae models/vqvae",
        recognise=diffusers.recognise,
        load=diffusers.load,
        save=diffusers.save,
    ),
)


def family_of(source: Source, name: str) -> Family:
    """The family of this name, or under `auto` the one that recognises the file.

    Raises:
      InputError: there is none of that name, or none that knows the file; where the file is of a
        system that is known but not here, it is named.
    """
    known = {family.name: family for family in FAMILIES}
    if name != "auto":
        if name not in known:
            raise InputError(f"format {name}: there is none; take auto, {', '.join(known)}")
        return known[name]
    refuse(source, alike=True)
    for family in FAMILIES:
        if family.recognise(source):
            return family
    refuse(source, alike=False)
    some = ", ".join(sorted(source.checkpoint.tensors)[:3]) or "none"
    raise InputError(
        f"{source.path}: no format known here has such tensors ({some}, ...); if it is one of "
        f"{', '.join(known)}, name it with --format"
    )


def exporters() -> dict[str, Family]:
    """The families that can be written."""
    return {family.name: family for family in FAMILIES if family.save is not None}


def describe() -> str:
    """The list of formats for `vqgan convert --help`, with an example each."""
    lines = ["formats (* can also be written, with --to):"]
    for family in FAMILIES:
        star = "*" if family.save is not None else " "
        lines += [f"{star} {family.name:<14} {family.title}", f"    {family.example}"]
    return "\n".join(lines) + "\n"
