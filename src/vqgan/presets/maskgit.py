"""MaskGIT's tokenizer (Chang et al. 2022, arXiv:2202.04200), and VQGAN+, which began with it.

MaskGIT's training code was never published: weights are of its config, and how they are applied is
of MAGVIT's trainer, by the same group, which has the same options. Networks and losses there see
images in [0, 1], so squares of differences are a quarter of ours, and squares of gradients by the
image four times ours.
"""

from vqgan.adversarial.stylegan2 import StyleGAN2Config
from vqgan.adversarial.vqgan_plus import VQGANPlusConfig
from vqgan.data.pipeline import DataConfig
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig
from vqgan.train.config import LossConfig, OptimConfig, RunConfig, TokenizerTraining


def maskgit_tokenizer() -> TokenizerTraining:
    """MaskGIT's tokenizer: f16, 1024 codes, no attention, against StyleGAN's discriminator.

    `vqgan train-tokenizer maskgit --data imagenet/ --out runs/maskgit`; 55 M parameters.
    Published: hardware and time not; rFID 2.28 on the ImageNet validation split at 256 pixels.
    Differs in the perceptual term, LPIPS for features of a ResNet; in that there is no entropy term
    (0.1), for which codes are revived; and in the discriminator, which here sees the deviation
    within the batch too. How images are cropped is not published. Not trained here.
    """
    optim = OptimConfig(lr=1e-4, betas=(0.0, 0.99))
    return TokenizerTraining(
        model=TokenizerConfig(
            autoencoder=AutoencoderConfig(
                attention_resolutions=(),
                middle_attention=False,
                decoder_extra_blocks=0,
                block_bias=False,
                shortcut_of="output",
                latent_kernel=1,
                downsample="average",
                pixel_range="unit",
            ),
            quantizer=VQConfig(codebook_size=1024, dim=256),
            projections=False,
        ),
        discriminator=StyleGAN2Config(resolution=256),
        loss=LossConfig(
            reconstruction="l2",
            reconstruction_weight=0.25,  # 1 / 2**2
            perceptual_weight=0.1,
            adversarial="non_saturating",
            adversarial_weight=0.1,
            adaptive=False,
            disc_start=0,
            r1_weight=80.0,  # 10 x 2 (of the half in ours) x 2**2
            r1_every=1,
        ),
        optim=optim,
        disc_optim=optim,
        ema_decay=0.999,
        data=DataConfig(image_size=256, batch_size=256),
        run=RunConfig(steps=1_000_000),
    )


def vqgan_plus_tokenizer() -> TokenizerTraining:
    """VQGAN+ (Weber et al. 2024, "MaskBit", arXiv:2409.16211): f16, 4096 codes, a ResNet's logits.

    `vqgan train-tokenizer vqgan-plus --loss.classifier models/resnet50 --data imagenet/
    --out runs/plus`; 55 M parameters; docs/how-to/perceptual-terms.md says how to make the
    classifier. Published: hardware and time not; rFID 1.39, PSNR 21.0 at 256 pixels; 1.52 with 1024
    codes of 256 channels. Images there are in [0, 1], so its weight of 4 of the squares is 1 here.
    The published 16 images a GPU are taken to be 256 in all. Differs in the crops (resized at
    random there), in that biases, norms and codes do not decay, and in that the average of the
    weights begins at once. Not trained here.
    """
    optim = OptimConfig(
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        warmup_steps=5_000,
        schedule="cosine",
        final_lr=1e-5,
        clip_norm=1.0,
    )
    return TokenizerTraining(
        model=TokenizerConfig(
            autoencoder=AutoencoderConfig(
                attention_resolutions=(),
                middle_attention=False,
                decoder_extra_blocks=0,
                block_bias=False,
                shortcut_of="output",
                latent_kernel=1,
                z_channels=64,
                pixel_range="unit",
            ),
            quantizer=VQConfig(codebook_size=4096, dim=64, init_from_data=False, revive_after=0),
            projections=False,
        ),
        discriminator=VQGANPlusConfig(),
        loss=LossConfig(
            reconstruction="l2",
            perceptual_weight=0.0,
            classifier_weight=0.1,
            adversarial_weight=0.02,
            adaptive=False,
            disc_start=20_000,
            lecam_weight=0.001,
            lecam_of="mean",
        ),
        optim=optim,
        disc_optim=optim,
        ema_decay=0.999,
        data=DataConfig(image_size=256, batch_size=256),
        run=RunConfig(steps=1_350_000),
    )
