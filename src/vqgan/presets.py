"""Named training configs. `vqgan train-tokenizer NAME` and `vqgan train-prior NAME` start from one.

Every preset's text says what it is for, on which hardware, for how long, and what to expect; what
has not been run here says so.
"""

import dataclasses

from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig
from vqgan.prior.transformer import PriorConfig
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig
from vqgan.train.config import LossConfig, OptimConfig, PriorTraining, RunConfig, TokenizerTraining


def emoji_tokenizer() -> TokenizerTraining:
    """The demo's stage 1: f4 at 32 pixels, 512 codes, 8x8 tokens, class by category.

    `vqgan train-tokenizer emoji --out runs/emoji`; some minutes on 2 CPU cores; expected numbers in
    docs/results.md.
    """
    return TokenizerTraining(
        model=TokenizerConfig(
            autoencoder=AutoencoderConfig(
                base_channels=32,
                channel_multipliers=(1, 2, 4),
                num_res_blocks=1,
                attention_resolutions=(),
                resolution=32,
                z_channels=128,
                # 32 groups of 32 channels would be instance norm, which forgets an image's colours.
                norm_groups=8,
            ),
            quantizer=VQConfig(codebook_size=512, dim=32, revive_after=20),
        ),
        discriminator=PatchGANConfig(base_channels=32, num_layers=2),
        loss=LossConfig(
            perceptual_weight=0.5, adversarial_weight=0.2, disc_start=550, disc_warmup=100
        ),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), warmup_steps=30, schedule="cosine"),
        disc_optim=OptimConfig(lr=3e-4, betas=(0.5, 0.9)),
        ema_decay=0.98,
        data=DataConfig(source="emoji", image_size=32, batch_size=16),
        run=RunConfig(
            steps=800, log_every=25, eval_every=200, image_every=200, save_every=200, keep=1
        ),
    )


def emoji_prior() -> PriorTraining:
    """The demo's stage 2: a small Llama-like transformer over 8x8 codes, class-conditional.

    `vqgan train-prior emoji --tokenizer runs/emoji/model --out runs/emoji-prior`; a few minutes on
    2 CPU cores; expected numbers in docs/results.md.
    """
    return PriorTraining(
        model=PriorConfig(
            codebook_size=512,
            grid=(8, 8),
            depth=4,
            heads=4,
            width=256,
            dropout=0.1,
        ),
        optim=OptimConfig(
            lr=1e-3,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            warmup_steps=30,
            schedule="cosine",
            clip_norm=1.0,
        ),
        ema_decay=0.98,
        data=DataConfig(source="emoji", image_size=32, batch_size=32),
        run=RunConfig(
            steps=450, log_every=25, eval_every=150, image_every=150, save_every=150, keep=1
        ),
    )


def small_tokenizer() -> TokenizerTraining:
    """A CPU-sized f8 tokenizer for a folder of your own: 64 pixels, 1024 codes, 8x8 tokens.

    `vqgan train-tokenizer small --data FOLDER --out runs/mine`; about an hour on 2 CPU cores, not
    run to its end here.
    """
    base = emoji_tokenizer()
    return dataclasses.replace(
        base,
        model=TokenizerConfig(
            autoencoder=AutoencoderConfig(
                base_channels=32,
                channel_multipliers=(1, 2, 4, 4),
                num_res_blocks=1,
                attention_resolutions=(8,),
                resolution=64,
                z_channels=128,
                # 32 groups of 32 channels would be instance norm, which forgets an image's colours.
                norm_groups=8,
            ),
            quantizer=VQConfig(codebook_size=1024, dim=32, revive_after=50),
        ),
        loss=dataclasses.replace(base.loss, disc_start=3000, disc_warmup=500),
        ema_decay=0.995,
        data=DataConfig(image_size=64, batch_size=16),
        run=RunConfig(steps=5000, log_every=50, eval_every=1000, image_every=500, save_every=500),
    )


def small_prior() -> PriorTraining:
    """A prior for `small` tokenizers, or any other with up to some hundred tokens an image.

    `vqgan train-prior small --tokenizer runs/mine/model --data FOLDER --out runs/mine-prior`.
    """
    base = emoji_prior()
    return dataclasses.replace(
        base,
        ema_decay=0.995,
        run=RunConfig(steps=3000, log_every=50, eval_every=500, image_every=500, save_every=500),
    )


def taming_f16_tokenizer() -> TokenizerTraining:
    """The paper's ImageNet tokenizer: f16, 1024 codes of 256 dimensions (imagenet_vqgan).

    Batch 12 at 256 pixels on one 40 GB GPU, learning rate 12 x 4.5e-6. Published: reconstruction
    FID 7.94. Differs from it by the commitment weight on the commitment term, and by initialising
    and reviving codes. Not trained here.
    """
    return TokenizerTraining(
        optim=OptimConfig(lr=5.4e-5),
        disc_optim=OptimConfig(lr=5.4e-5),
        data=DataConfig(image_size=256, batch_size=12),
        run=RunConfig(steps=500_000),
    )


def taming_prior() -> PriorTraining:
    """The paper's minGPT as for FacesHQ: 24 layers, 16 heads, width 1024, no dropout.

    Learning rate 2 x 4.5e-6 for its batch of 2. Not trained here.
    """
    return PriorTraining(
        model=PriorConfig(
            codebook_size=1024,
            grid=(16, 16),
            depth=24,
            heads=16,
            width=1024,
            position="learned",
            norm="layernorm",
            mlp="gelu",
            bias=True,
            dropout=0.0,
        ),
        optim=OptimConfig(lr=9e-6, betas=(0.9, 0.95), weight_decay=0.01),
        data=DataConfig(batch_size=2),
        run=RunConfig(steps=500_000),
    )


TOKENIZERS = {
    "emoji": emoji_tokenizer,
    "small": small_tokenizer,
    "taming-f16": taming_f16_tokenizer,
}
PRIORS = {"emoji": emoji_prior, "small": small_prior, "taming-gpt": taming_prior}
