"""The discriminators: one file each, chosen by the type of its config.

A new one is a file, a member of `DiscriminatorConfig` and a line in `_classes`. Its config has
`kind`, `in_channels` and `check()`; called with images in [-1, 1] (or, for "features", with their
feature maps) and `train`, it returns float32 logits of any shape `[b, ...]`, positive for real.
"""

from pathlib import Path

from flax import nnx

from vqgan.adversarial.feature_heads import FeatureHeads, FeatureHeadsConfig
from vqgan.adversarial.patchgan import PatchGAN, PatchGANConfig
from vqgan.adversarial.stylegan2 import StyleGAN2Config, StyleGAN2Discriminator
from vqgan.adversarial.vqgan_plus import VQGANPlusConfig, VQGANPlusDiscriminator
from vqgan.errors import InputError
from vqgan.serialization import Pretrained, read_json

# In JSON and on the command line they are told apart by `kind`.
DiscriminatorConfig = PatchGANConfig | StyleGAN2Config | FeatureHeadsConfig | VQGANPlusConfig
Discriminator = Pretrained

_classes: dict[type, type[Pretrained]] = {
    PatchGANConfig: PatchGAN,
    StyleGAN2Config: StyleGAN2Discriminator,
    FeatureHeadsConfig: FeatureHeads,
    VQGANPlusConfig: VQGANPlusDiscriminator,
}


def make_discriminator(config: DiscriminatorConfig, *, rngs: nnx.Rngs) -> Discriminator:
    """Builds the discriminator that the config describes. Raises InputError as its `check` does."""
    config.check()
    return _classes[type(config)](config, rngs=rngs)


def load_discriminator(directory: Path) -> Discriminator:
    """Reads a discriminator of any kind. Raises InputError where the directory holds none."""
    by_name = {cls.__name__: cls for cls in _classes.values()}
    description = read_json(directory / "config.json")
    name = description.get("model_type") if isinstance(description, dict) else None
    if name not in by_name:
        raise InputError(f"{directory}: holds {name}, not one of {', '.join(by_name)}")
    return by_name[name].from_pretrained(directory)
