"""Floating-point operations of one GAN training step: ours against taming-transformers.

    python benchmarks/step_flops.py [--size 128] [--batch 1]

Both train the paper's f16 tokenizer (`imagenet_vqgan`: 128 channels times 1, 1, 2, 2, 4, two
residual blocks, attention at 16, 1024 codes of 256; PatchGAN of 64 channels and three layers; LPIPS
on VGG16) after the start of the discriminator. A multiplication and an addition are two operations.

taming is counted by PyTorch over the step that its Lightning module makes of a batch; it needs the
`reference` extra. Ours is counted in two ways. XLA's cost analysis sees the compiled program: all
operations, but no multiplication by padding. For a like comparison the second way follows PyTorch's
rules: only convolutions and matrix products, padding included, of the step before compilation.
"""

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from vqgan.adversarial.lpips import load_lpips
from vqgan.train.config import LossConfig, TokenizerTraining
from vqgan.train.tokenizer import setup, step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
from reference import import_torch, taming_vqmodel

DDCONFIG = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
}


def taming_step_flops(size: int, batch: int) -> int:
    """Operations of taming's step on `batch` images of `size` x `size`, by PyTorch's counter.

    As Lightning runs it: a forward pass of the autoencoder, both LPIPS passes and the loss for each
    of the two optimisers in turn, with only the parameters of that optimiser requiring gradients;
    the adaptive weight takes two gradients at the last layer on the way. The optimisers'
    elementwise arithmetic does not enter the count.
    """
    torch = import_torch()
    from torch.utils.flop_counter import FlopCounterMode

    model = taming_vqmodel(DDCONFIG, n_embed=1024, embed_dim=256, disc_start=0, disc_weight=0.8)
    model.loss.perceptual_loss.eval()
    discriminator = list(model.loss.discriminator.parameters())
    judges = {id(p) for p in model.loss.parameters()}
    autoencoder = [p for p in model.parameters() if id(p) not in judges]
    players = [autoencoder, discriminator]
    optimizers = [torch.optim.Adam(p, lr=4.5e-6, betas=(0.5, 0.9)) for p in players]
    images = torch.rand(batch, 3, size, size) * 2 - 1
    with FlopCounterMode(display=False) as counter:
        for index, optimizer in enumerate(optimizers):
            model.requires_grad_(False)
            for parameter in players[index]:
                parameter.requires_grad_(True)
            reconstruction, codebook_loss = model(images)
            loss, _ = model.loss(
                codebook_loss, images, reconstruction, index, 1, last_layer=model.get_last_layer()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return counter.get_total_flops()


def our_step(size: int, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """The step of the same training as a function, and the shapes of its arguments."""
    config = TokenizerTraining(loss=LossConfig(disc_start=0))
    stage, init = setup(config)
    arguments = (
        jax.eval_shape(init),
        {"image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)},
        jax.eval_shape(lambda: jax.random.key(0)),
        load_lpips("vgg16"),
    )
    return functools.partial(step, stage), arguments


def compiled_flops(function: Any, arguments: tuple[Any, ...]) -> int:
    """Operations of the compiled program, by XLA's cost analysis."""
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return int(analysis["flops"])


def traced_flops(function: Any, arguments: tuple[Any, ...]) -> int:
    """Operations of convolutions and matrix products before compilation, by PyTorch's rules.

    The gradient of a convolution that shrinks its map counts a few per cent higher than there.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _count(live)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, parameters["dimension_numbers"]
            taps = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])  # and input channels
            # Zeros between the pixels of a strided layer's gradient are not multiplied.
            taps //= math.prod(parameters["lhs_dilation"])
            total += 2 * equation.outvars[0].aval.size * taps
        elif name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[a] for a in contracted)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in parameters["branches"])
        else:
            inner = (parameters.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
            repeats = parameters.get("length", 1) if name == "scan" else 1
            total += repeats * sum(_count(getattr(i, "jaxpr", i)) for i in inner if i is not None)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    options = parser.parse_args()
    theirs = taming_step_flops(options.size, options.batch)
    print(f"{options.batch} image(s) of {options.size}x{options.size}, operations a step")
    print(f"taming-transformers, PyTorch's counter      {theirs / 1e9:9.1f} G")
    function, arguments = our_step(options.size, options.batch)
    for name, count in (("XLA's cost analysis", compiled_flops), ("PyTorch's rules", traced_flops)):
        ours = count(function, arguments)
        print(f"{f'vqgan, {name}':43} {ours / 1e9:9.1f} G  {ours / theirs:.3f} of taming's")


if __name__ == "__main__":
    main()
