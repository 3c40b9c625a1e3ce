"""taming-transformers (Esser, Rombach, Ommer 2021, arXiv:2012.09841).

Its training script multiplies the base learning rate of 4.5e-6 by the batch over all devices; here
the products are written out. Adam's betas are (0.5, 0.9) in stage 1 for both players. There are no
averaged weights, and images are cropped at random but not flipped.

All published weights have the commitment weight of 0.25 on the codebook's term, by mistake; here it
is on the commitment, as the paper has it. Codes start from latents and are revived when they fall
out of use, which the published code does not do.
"""

import dataclasses

from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig
from vqgan.prior.transformer import PriorConfig
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import GumbelConfig, VQConfig
from vqgan.train.config import LossConfig, OptimConfig, PriorTraining, RunConfig, TokenizerTraining


def taming_f16_tokenizer() -> TokenizerTraining:
    """The paper's ImageNet tokenizer (imagenet_vqgan): f16, 1024 codes of 256 dimensions.

    `vqgan train-tokenizer taming-f16 --data imagenet/ --out runs/f16`; 72 M parameters.
    Published: a single 40 GB GPU, the time not; rFID 7.94 on the validation split at 256 pixels.
    The length is ours: 4.7 epochs, the discriminator from the middle on. The authors advise 3 to 5
    epochs before it, as many after it, and more. Not trained here.
    """
    return TokenizerTraining(
        loss=LossConfig(adversarial_weight=0.8, disc_start=250_001),
        optim=OptimConfig(lr=5.4e-5),  # 12 x 4.5e-6
        disc_optim=OptimConfig(lr=5.4e-5),
        ema_decay=0.0,
        data=DataConfig(image_size=256, batch_size=12, flip=False),
        run=RunConfig(steps=500_000),
    )


def taming_f16_16384_tokenizer() -> TokenizerTraining:
    """The same network with 16384 codes, for ImageNet too.

    `vqgan train-tokenizer taming-f16-16384 --data imagenet/ --out runs/f16-16384`; 76 M parameters.
    Published: a single 40 GB GPU at batch 14, the time not; rFID 4.98 on the validation split at
    256 pixels. Its config lies with the weights and was not read: start and weight of the
    adversarial term, and the length, are those of `taming-f16`. Not trained here.
    """
    base = taming_f16_tokenizer()
    return dataclasses.replace(
        base,
        model=TokenizerConfig(quantizer=VQConfig(codebook_size=16384)),
        optim=OptimConfig(lr=6.3e-5),  # 14 x 4.5e-6
        disc_optim=OptimConfig(lr=6.3e-5),
        data=dataclasses.replace(base.data, batch_size=14),
    )


def taming_gumbel_f8_tokenizer() -> TokenizerTraining:
    """The Gumbel tokenizer (vqgan_gumbel_f8): f8, 8192 codes, 32x32 tokens of 256 pixels.

    `vqgan train-tokenizer taming-gumbel-f8 --data openimages/ --out runs/gumbel`; 69 M parameters.
    Published: a single 40 GB GPU at batch 12 or so, the time not; rFID 1.49 on the validation split
    of Open Images at 256 pixels, which it was trained on. The temperature falls over 1,000,001
    steps to next to nothing. Its loss is not in the repository: start and weight of the adversarial
    term are those of `taming-f16`, and the length is ours. Not trained here.
    """
    base = taming_f16_tokenizer()
    model = TokenizerConfig(
        autoencoder=AutoencoderConfig(
            channel_multipliers=(1, 1, 2, 4), attention_resolutions=(32,)
        ),
        quantizer=GumbelConfig(
            codebook_size=8192,
            dim=256,
            kl_weight=1e-8,
            temperature_start=0.9,
            temperature_end=1e-6,
            temperature_steps=1_000_001,
        ),
    )
    return dataclasses.replace(base, model=model, run=RunConfig(steps=1_000_000))


def taming_segmentation_tokenizer() -> TokenizerTraining:
    """The tokenizer of label maps that conditions S-FLCKR (sflckr_cond_stage): f16, 182 classes.

    `vqgan train-tokenizer taming-segmentation --data labels/ --out runs/seg`; 73 M parameters.
    Published: hardware and time not, nor a number for its reconstructions; batch 12, binary
    cross-entropy alone, no discriminator. COCO-Stuff's (coco_cond_stage) has 183 classes:
    `--model.autoencoder.in-channels 183 --model.autoencoder.out-channels 183`. Flipped here; the
    length is ours. Not trained here.
    """
    classes = 182
    return TokenizerTraining(
        model=TokenizerConfig(
            autoencoder=AutoencoderConfig(in_channels=classes, out_channels=classes),
            content="labels",
        ),
        loss=LossConfig(reconstruction="bce", perceptual_weight=0.0, disc_start=-1),
        optim=OptimConfig(lr=5.4e-5),  # 12 x 4.5e-6
        ema_decay=0.0,
        data=DataConfig(image_size=256, batch_size=12),
        run=RunConfig(steps=100_000),
    )


def taming_depth_tokenizer() -> TokenizerTraining:
    """The tokenizer of depth maps that conditions ImageNet (imagenetdepth_vqgan): f16, 1024 codes.

    `vqgan train-tokenizer taming-depth --data depth/ --out runs/depth`; 72 M parameters.
    Published: hardware and time not, nor a number for its reconstructions; batch 3, the
    discriminator from step 50,001 on with weight 0.75. The length is ours. Not trained here.
    """
    base = taming_f16_tokenizer()
    return dataclasses.replace(
        base,
        model=TokenizerConfig(
            autoencoder=AutoencoderConfig(in_channels=1, out_channels=1), content="depth"
        ),
        discriminator=PatchGANConfig(in_channels=1),
        loss=LossConfig(adversarial_weight=0.75, disc_start=50_001),
        optim=OptimConfig(lr=1.35e-5),  # 3 x 4.5e-6
        disc_optim=OptimConfig(lr=1.35e-5),
        data=dataclasses.replace(base.data, batch_size=3),
    )


def _gpt(codebook_size: int, depth: int, heads: int, width: int, num_classes: int) -> PriorConfig:
    """minGPT; the class has no dropout and no null class, so that there is no guidance."""
    return PriorConfig(
        codebook_size=codebook_size,
        grid=(16, 16),
        num_classes=num_classes,
        null_class=num_classes == 0,
        label_dropout=0.0,
        depth=depth,
        heads=heads,
        width=width,
        position="learned",
        norm="layernorm",
        mlp="gelu",
        bias=True,
        dropout=0.0,
    )


def taming_prior() -> PriorTraining:
    """The paper's minGPT as for FacesHQ: 24 layers, 16 heads, width 1024, unconditional.

    `vqgan train-prior taming-gpt --tokenizer runs/f16/model --data faces/ --out runs/gpt`;
    305 M parameters. Published: hardware and time not; batch 2, no dropout; a FID only for models
    of FFHQ (9.6) and CelebA-HQ (10.2) alone, of the same kind. Coordinates as the condition, which
    its config has, are not here. The length is ours. Not trained here.
    """
    return PriorTraining(
        model=_gpt(codebook_size=1024, depth=24, heads=16, width=1024, num_classes=0),
        class_conditional=False,
        # 2 x 4.5e-6; decay on linear layers only
        optim=OptimConfig(lr=9e-6, betas=(0.9, 0.95), weight_decay=0.01),
        ema_decay=0.0,
        data=DataConfig(batch_size=2),
        run=RunConfig(steps=500_000),
    )


def taming_imagenet_prior() -> PriorTraining:
    """The paper's class-conditional minGPT for ImageNet (cin_transformer): 48 layers of width 1536.

    `vqgan train-prior taming-gpt-imagenet --tokenizer runs/f16-16384/model --data imagenet/
    --out runs/cin`; 1412 M parameters, and as many more for each of two Adam moments: give
    `--run.fsdp N` on N devices. Published: hardware and time not; FID 15.98 to 5.20, by the way of
    sampling (top-k 600, top-p 0.92 in its example). Its config lies with the weights and was not
    read: the size is the one that makes the published 1.4 B, batch and length are ours.
    Not trained here.
    """
    return PriorTraining(
        model=_gpt(codebook_size=16384, depth=48, heads=24, width=1536, num_classes=1000),
        # 16 x 4.5e-6
        optim=OptimConfig(lr=7.2e-5, betas=(0.9, 0.95), weight_decay=0.01),
        ema_decay=0.0,
        data=DataConfig(batch_size=16),
        run=RunConfig(steps=1_000_000),
    )
