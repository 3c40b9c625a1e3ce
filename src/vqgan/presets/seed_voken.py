"""SEED-Voken: IBQ (Shi et al. 2024, arXiv:2412.02692) and Open-MAGVIT2 (Luo et al. 2024,
arXiv:2409.04410).

Both train with L1, LPIPS and a discriminator of fixed weight from the first step on, whose hinge
loss is held by LeCam. Three things differ here. The generator minimises the hinge's term, not
-log sigmoid. The learning rate stays, where theirs falls tenfold twice, late in the run. And they
compute in float16, here in bfloat16; IBQ's 8192 codes are published in bfloat16 as well. IBQ also
updates the discriminator before the generator. Images are cropped at random but not flipped.
Hardware and times are of the configs and of issue 39 of the repository.
"""

from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig
from vqgan.presets import imagenet
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import IBQConfig, LFQConfig
from vqgan.train.config import LossConfig, OptimConfig, RunConfig, TokenizerTraining


def _training(model: TokenizerConfig, epochs: int) -> TokenizerTraining:
    """What IBQ and Open-MAGVIT2 have in common."""
    optim = OptimConfig(lr=1e-4, betas=(0.5, 0.9))
    return TokenizerTraining(
        model=model,
        discriminator=PatchGANConfig(dtype="bfloat16"),
        loss=LossConfig(adversarial_weight=0.1, adaptive=False, disc_start=0, lecam_weight=0.05),
        optim=optim,
        disc_optim=optim,
        ema_decay=0.999,
        data=DataConfig(image_size=256, batch_size=256, flip=False),
        run=RunConfig(steps=imagenet.steps(epochs, 256)),
    )


def ibq_tokenizer() -> TokenizerTraining:
    """IBQ: f16, 16384 codes of 256 dimensions, all of which get a gradient at every step.

    `vqgan train-tokenizer ibq --data imagenet/ --out runs/ibq`; 111 M parameters. Published: 64
    Ascend 910B (8 x 8, batch 4 each), 4 to 7 days by the codebook's size; rFID 1.37, LPIPS 0.2235,
    96 % of the codes in use on the ImageNet validation split at 256 pixels. Other sizes by
    `--model.quantizer.codebook-size`: 1024 has 2.24, 8192 has 1.87, 262144 has 1.00. The rate falls
    there after 250 and 300 of 330 epochs. Not trained here.
    """
    # 8 nodes x 8 devices x batch 4 = 256
    return _training(
        TokenizerConfig(
            autoencoder=AutoencoderConfig(num_res_blocks=4, dtype="bfloat16"),
            quantizer=IBQConfig(codebook_size=16384, dim=256),
        ),
        epochs=330,
    )


def open_magvit2_tokenizer() -> TokenizerTraining:
    """Open-MAGVIT2: f16, 2^18 codes without a codebook (LFQ), a decoder normed by the latents.

    `vqgan train-tokenizer open-magvit2 --data imagenet/ --out runs/magvit2`; 115 M parameters.
    Published: 32 devices (4 x 8, batch 8 each), Ascend 910B for this version, the time not (an
    earlier one took 32 V100 4 to 5 days); rFID 1.17, PSNR 21.90, all codes in use on the ImageNet
    validation split at 256 pixels. The rate falls there after 200 and 250 of 270 epochs.
    Not trained here.
    """
    # 4 nodes x 8 devices x batch 8 = 256
    return _training(
        TokenizerConfig(
            autoencoder=AutoencoderConfig(
                num_res_blocks=4,
                attention_resolutions=(),
                z_channels=18,
                middle_blocks=4,
                middle_attention=False,
                decoder_extra_blocks=0,
                block_bias=False,
                latent_kernel=1,
                downsample="conv_symmetric",
                upsample="depth_to_space",
                adaptive_norm=True,
                dtype="bfloat16",
            ),
            quantizer=LFQConfig(dim=18, commitment_weight=0.25, entropy_weight=0.1),
            projections=False,
        ),
        epochs=270,
    )
