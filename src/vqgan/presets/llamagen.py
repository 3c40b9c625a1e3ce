"""LlamaGen (Sun et al. 2024, arXiv:2406.06525): tokenizers with short codes of length 1, and GPTs.

Stage 1 trains all of it with Adam at a constant rate, clipped to norm 1, in bfloat16, against a
discriminator of fixed weight. Its script also takes a weight decay, but never uses it. It crops
from images resized to 1 to 1.25 times the size; here they are resized to the size itself. Averaged
weights are an option of both stages that its commands do not set. Hardware and times are of issue 8
of the repository.
"""

import dataclasses

from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig
from vqgan.presets import imagenet
from vqgan.prior.transformer import PriorConfig
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig
from vqgan.train.config import LossConfig, OptimConfig, PriorTraining, RunConfig, TokenizerTraining


def llamagen_vq16_tokenizer() -> TokenizerTraining:
    """LlamaGen's VQ-16: f16, 16384 codes of 8 dimensions, found by their direction.

    `vqgan train-tokenizer llamagen-vq16 --data imagenet/ --out runs/vq16`; 72 M parameters.
    Published: 8 A100 of 80 GB, about 2 days; rFID 2.19 on the ImageNet validation split at 256
    pixels. Not trained here.
    """
    optim = OptimConfig(lr=1e-4, betas=(0.9, 0.95), clip_norm=1.0)
    return TokenizerTraining(
        model=TokenizerConfig(
            autoencoder=AutoencoderConfig(attention_resolutions=(16,), dtype="bfloat16"),
            quantizer=VQConfig(
                codebook_size=16384, dim=8, normalize=True, init_from_data=False, revive_after=0
            ),
        ),
        discriminator=PatchGANConfig(dtype="bfloat16"),
        loss=LossConfig(
            reconstruction="l2", adversarial_weight=0.5, adaptive=False, disc_start=20_000
        ),
        optim=optim,
        disc_optim=optim,
        ema_decay=0.0,
        data=DataConfig(image_size=256, batch_size=128),
        run=RunConfig(steps=imagenet.steps(40, 128)),
    )


def llamagen_vq8_tokenizer() -> TokenizerTraining:
    """LlamaGen's VQ-8: the same at f8, 32x32 tokens of 256 pixels.

    `vqgan train-tokenizer llamagen-vq8 --data imagenet/ --out runs/vq8`; 70 M parameters.
    Published: hardware and time not; rFID 0.59 on the ImageNet validation split at 256 pixels.
    Not trained here.
    """
    base = llamagen_vq16_tokenizer()
    autoencoder = dataclasses.replace(
        base.model.autoencoder, channel_multipliers=(1, 2, 2, 4), attention_resolutions=(32,)
    )
    return dataclasses.replace(base, model=dataclasses.replace(base.model, autoencoder=autoencoder))


def _gpt(depth: int, heads: int, width: int) -> PriorTraining:
    """A class-conditional GPT over 16x16 codes of VQ-16, as LlamaGen trains its smaller ones."""
    return PriorTraining(
        model=PriorConfig(
            codebook_size=16384,
            grid=(16, 16),
            num_classes=1000,
            depth=depth,
            heads=heads,
            width=width,
            class_slot_rotation="zero",
            mlp_multiple=256,
            dropout=0.1,
            label_dropout=0.1,
            dtype="bfloat16",
        ),
        passes=("ten-crop",),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0),
        ema_decay=0.0,
        data=DataConfig(image_size=256, batch_size=256),
        # An epoch there is one of the ten crops of each image.
        run=RunConfig(steps=imagenet.steps(300, 256)),
    )


def llamagen_b_prior() -> PriorTraining:
    """LlamaGen-B: 12 layers of width 768 with 2-D rotary positions, by class.

    `vqgan train-prior llamagen-b --tokenizer runs/vq16/model --data imagenet/ --out runs/gpt-b`;
    111 M parameters. Published: 8 A100 of 80 GB, about a day; FID 5.46 on ImageNet at 256 pixels
    (16x16 tokens, guidance 2.0, 50,000 samples, ADM's evaluator). Differs in that the head starts
    at random instead of at zero, and that embeddings do not decay. Not trained here.
    """
    return _gpt(depth=12, heads=12, width=768)


def llamagen_l_prior() -> PriorTraining:
    """LlamaGen-L: the same with 24 layers of width 1024.

    `vqgan train-prior llamagen-l --tokenizer runs/vq16/model --data imagenet/ --out runs/gpt-l`;
    343 M parameters. Published: 8 A100 of 80 GB, about 2 days; FID 3.80 by the protocol of
    `llamagen-b`, from which it differs by its size alone. Not trained here.
    """
    return _gpt(depth=24, heads=16, width=1024)
