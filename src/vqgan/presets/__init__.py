"""Named training configs. `vqgan train-tokenizer NAME` and `vqgan train-prior NAME` start from one.

A file a story: small.py runs on a CPU, the others follow a published system each. Every preset's
text has the command, the published hardware, time and number, and what differs from the published
recipe; what has not been run here says so. rFID is a Fréchet distance of Inception features between
images and their reconstructions; FID is one between images and samples. A new preset is a function
and a line below; tests and the command line pick it up by themselves.
"""

from collections.abc import Callable

from vqgan.presets.fsq import fsq_1000_tokenizer, fsq_64000_tokenizer
from vqgan.presets.llamagen import (
    llamagen_b_prior,
    llamagen_l_prior,
    llamagen_vq8_tokenizer,
    llamagen_vq16_tokenizer,
)
from vqgan.presets.maskgit import maskgit_tokenizer, vqgan_plus_tokenizer
from vqgan.presets.seed_voken import ibq_tokenizer, open_magvit2_tokenizer
from vqgan.presets.small import (
    emoji_fsq_tokenizer,
    emoji_lfq_tokenizer,
    emoji_prior,
    emoji_tokenizer,
    small_prior,
    small_tokenizer,
)
from vqgan.presets.taming import (
    taming_depth_tokenizer,
    taming_f16_16384_tokenizer,
    taming_f16_tokenizer,
    taming_gumbel_f8_tokenizer,
    taming_imagenet_prior,
    taming_prior,
    taming_segmentation_tokenizer,
)
from vqgan.train.config import PriorTraining, TokenizerTraining

TOKENIZERS: dict[str, Callable[[], TokenizerTraining]] = {
    "emoji": emoji_tokenizer,
    "emoji-fsq": emoji_fsq_tokenizer,
    "emoji-lfq": emoji_lfq_tokenizer,
    "small": small_tokenizer,
    "taming-f16": taming_f16_tokenizer,
    "taming-f16-16384": taming_f16_16384_tokenizer,
    "taming-gumbel-f8": taming_gumbel_f8_tokenizer,
    "taming-segmentation": taming_segmentation_tokenizer,
    "taming-depth": taming_depth_tokenizer,
    "llamagen-vq16": llamagen_vq16_tokenizer,
    "llamagen-vq8": llamagen_vq8_tokenizer,
    "maskgit": maskgit_tokenizer,
    "vqgan-plus": vqgan_plus_tokenizer,
    "ibq": ibq_tokenizer,
    "open-magvit2": open_magvit2_tokenizer,
    "fsq-1000": fsq_1000_tokenizer,
    "fsq-64000": fsq_64000_tokenizer,
}
PRIORS: dict[str, Callable[[], PriorTraining]] = {
    "emoji": emoji_prior,
    "small": small_prior,
    "taming-gpt": taming_prior,
    "taming-gpt-imagenet": taming_imagenet_prior,
    "llamagen-b": llamagen_b_prior,
    "llamagen-l": llamagen_l_prior,
}
