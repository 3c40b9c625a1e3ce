"""FSQ (Mentzer et al. 2023, arXiv:2309.15505) in MaskGIT's tokenizer, where the paper has it.

The encoder's last layer gives as many channels as there are levels, and the decoder starts from
them. Nothing keeps the codes in use, and nothing has to.
"""

import dataclasses

from vqgan.presets.maskgit import maskgit_tokenizer
from vqgan.tokenizer.quantizers import FSQConfig
from vqgan.train.config import TokenizerTraining


def _fsq(levels: tuple[int, ...]) -> TokenizerTraining:
    """MaskGIT's recipe with FSQ in place of its codebook."""
    base = maskgit_tokenizer()
    autoencoder = dataclasses.replace(base.model.autoencoder, z_channels=len(levels))
    model = dataclasses.replace(
        base.model, autoencoder=autoencoder, quantizer=FSQConfig(levels=levels)
    )
    return dataclasses.replace(base, model=model)


def fsq_1000_tokenizer() -> TokenizerTraining:
    """FSQ in MaskGIT's network: f16, levels 8, 5, 5, 5, so 1000 codes in place of its 1024.

    `vqgan train-tokenizer fsq-1000 --data imagenet/ --out runs/fsq`; 53 M parameters. Published:
    hardware and time not; no rFID at 256 pixels in what was read of the paper, which calls its
    results competitive with VQ's, so `maskgit` and its rFID of 2.28 are what to compare with.
    Differs from MaskGIT's recipe as `maskgit` does, but for the entropy, which FSQ has none of.
    Not trained here.
    """
    return _fsq((8, 5, 5, 5))


def fsq_64000_tokenizer() -> TokenizerTraining:
    """The same with levels 8, 8, 8, 5, 5, 5, so 64000 codes, those of Cosmos' tokenizers.

    `vqgan train-tokenizer fsq-64000 --data imagenet/ --out runs/fsq-64000`; 53 M parameters.
    Published: hardware and time not; Cosmos' own f16 network with these levels, which was not
    trained on ImageNet, has rFID 4.57 and PSNR 19.93 on its validation split at 256 pixels (as
    SEED-Voken measured it). Not trained here.
    """
    return _fsq((8, 8, 8, 5, 5, 5))
