"""Presets that finish on a CPU: the demo's, with other quantizers too, and one for a folder."""

import dataclasses

from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig
from vqgan.prior.transformer import PriorConfig
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import FSQConfig, LFQConfig, QuantizerConfig, VQConfig
from vqgan.train.config import LossConfig, OptimConfig, PriorTraining, RunConfig, TokenizerTraining


def emoji_tokenizer() -> TokenizerTraining:
    """The demo's stage 1: f4 at 32 pixels, 512 codes, 8x8 tokens, class by category.

    `vqgan train-tokenizer emoji --out runs/emoji`; 3.0 M parameters; some minutes on 2 CPU cores;
    expected numbers in docs/results.md.
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


def _with_quantizer(base: TokenizerTraining, quantizer: QuantizerConfig) -> TokenizerTraining:
    """The same run with another quantizer."""
    return dataclasses.replace(base, model=dataclasses.replace(base.model, quantizer=quantizer))


def emoji_fsq_tokenizer() -> TokenizerTraining:
    """`emoji` with FSQ, three levels of 8: as many codes, none of them learned.

    `vqgan train-tokenizer emoji-fsq --out runs/emoji-fsq`; 3.0 M parameters; some minutes on 2 CPU
    cores; its first 100 steps in docs/results.md.
    """
    return _with_quantizer(emoji_tokenizer(), FSQConfig(levels=(8, 8, 8)))


def emoji_lfq_tokenizer() -> TokenizerTraining:
    """`emoji` with LFQ, nine bits: as many codes, the signs of nine channels.

    `vqgan train-tokenizer emoji-lfq --out runs/emoji-lfq`; 3.0 M parameters; some minutes on 2 CPU
    cores; its first 100 steps in docs/results.md.
    """
    return _with_quantizer(emoji_tokenizer(), LFQConfig(dim=9))


def emoji_prior() -> PriorTraining:
    """The demo's stage 2: a small Llama-like transformer over 8x8 codes, class-conditional.

    `vqgan train-prior emoji --tokenizer runs/emoji/model --out runs/emoji-prior`; 3.5 M parameters;
    a few minutes on 2 CPU cores; expected numbers in docs/results.md.
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

    `vqgan train-tokenizer small --data FOLDER --out runs/mine`; 4.4 M parameters; about an hour on
    2 CPU cores. Not trained here to its end.
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

    `vqgan train-prior small --tokenizer runs/mine/model --data FOLDER --out runs/mine-prior`;
    3.5 M parameters; under half an hour on 2 CPU cores, by the speed of the demo. Not trained here.
    """
    base = emoji_prior()
    return dataclasses.replace(
        base,
        ema_decay=0.995,
        run=RunConfig(steps=3000, log_every=50, eval_every=500, image_every=500, save_every=500),
    )
