"""One training step of an imported model against taming's: losses, weights, gradients, updates.

The order of the two updates: taming updates the autoencoder, runs it again, and lets the
discriminator learn from the new reconstruction. Here both learn from the one reconstruction of
before the step. The autoencoder's update is the same in both; the discriminator's is compared with
taming's loss on that one reconstruction.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import nchw
from flax import nnx
from reference import import_torch
from test_taming_parity import LOSS, parameters, saved, vqmodel

from vqgan import convert
from vqgan.adversarial.lpips import load_lpips
from vqgan.convert import table, taming
from vqgan.pictures import to_float
from vqgan.train.config import LossConfig, OptimConfig, TokenizerTraining
from vqgan.train.reconstruction import Perceptual
from vqgan.train.state import split
from vqgan.train.tokenizer import setup, step

pytestmark = pytest.mark.parity

LR = 5.4e-5  # 12 images x 4.5e-6, the published rate
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)


def taming_step(model, images):
    """taming's training step, by hand: losses by name, gradients, parameters after Adam.

    LPIPS stays in evaluation mode, without its dropout; sums are in double precision.
    """
    torch = import_torch()
    model = model.double().train()
    model.loss.perceptual_loss.eval()
    judge = model.loss.discriminator
    x = torch.from_numpy(nchw(images)).double()
    autoencoder = [p for n, p in model.named_parameters() if not n.startswith("loss.")]
    optim, disc_optim = (
        torch.optim.Adam(parameters, lr=LR, betas=(0.5, 0.9))
        for parameters in (autoencoder, judge.parameters())
    )
    reconstruction, q_loss = model(x)
    total, log = model.loss(
        q_loss, x, reconstruction, 0, 1, last_layer=model.get_last_layer(), split="train"
    )
    optim.zero_grad()
    total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if not n.startswith("loss.")}
    optim.step()

    disc_loss, _ = model.loss(q_loss, x, reconstruction, 1, 1, split="train")
    disc_optim.zero_grad()
    disc_loss.backward()
    grads |= {f"loss.discriminator.{n}": p.grad.clone() for n, p in judge.named_parameters()}
    disc_optim.step()
    losses = {name.removeprefix("train/"): value.item() for name, value in log.items()}
    losses["disc_loss"] = disc_loss.item()
    after = {n: t.detach().numpy() for n, t in model.state_dict().items()}
    return losses, {n: g.numpy() for n, g in grads.items()}, after


def our_step(imported):
    """The same step here: metrics, and both models after it."""
    tokenizer, judge = imported.model, imported.parts["discriminator"]
    optim = OptimConfig(lr=LR, betas=(0.5, 0.9))
    config = TokenizerTraining(
        model=tokenizer.config,
        discriminator=judge.config,
        loss=LossConfig(disc_start=0, adversarial_weight=LOSS["disc_weight"]),
        optim=optim,
        disc_optim=optim,
    )
    stage, init = setup(config)
    _, params, codebook_stats = split(tokenizer)
    _, disc_params, disc_stats = split(judge)
    state = dataclasses.replace(
        init(),
        params=params,
        codebook_stats=codebook_stats,
        disc_params=disc_params,
        disc_stats=disc_stats,
    )
    batch = {"image": jnp.asarray(PIXELS)}
    one = jax.jit(functools.partial(step, stage))
    state, metrics = one(state, batch, jax.random.key(0), Perceptual(lpips=load_lpips("vgg16")))
    tokenizer = nnx.merge(stage.tokenizer, state.params, state.codebook_stats)
    judge = nnx.merge(stage.discriminator, state.disc_params, state.disc_stats)
    return metrics, tokenizer, judge


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    model = vqmodel()
    before = {n: t.numpy().copy() for n, t in model.state_dict().items()}
    imported = convert.load(saved(model, folder, parameters()))
    metrics, tokenizer, judge = our_step(imported)
    theirs = taming_step(model, np.asarray(to_float(PIXELS)))
    ours = table.write(tokenizer, taming.tokenizer_table(tokenizer.config))
    more = table.write(judge, taming.discriminator_table(judge.config))
    ours |= {f"loss.discriminator.{name}": value for name, value in more.items()}
    return metrics, ours, before, *theirs


def test_losses_and_adaptive_weight(steps):
    metrics, _, _, losses, _, _ = steps
    pairs = {
        "nll_loss": metrics["l1"] + metrics["lpips"],
        "quant_loss": metrics["commitment"] + metrics["codebook"],
        "g_loss": metrics["adversarial"],
        "d_weight": metrics["adversarial_weight"],
        "total_loss": metrics["loss"],
        "disc_loss": metrics["disc_loss"],
    }
    for name, ours in pairs.items():
        np.testing.assert_allclose(ours, losses[name], rtol=1e-4, err_msg=name)


def test_updated_parameters(steps):
    """Equal to 1e-5 of the largest parameter, wherever a gradient is more than rounding.

    Adam's first step is the sign of the gradient. Where that is rounding (attention's key bias has
    none at all, nor has a bias before a norm of one channel), so is the sign, and the step is
    bounded only.
    """
    _, ours, before, _, grads, after = steps
    floor = 1e-6 * max(np.abs(gradient).max() for gradient in grads.values())
    compared = total = 0
    for name, gradient in grads.items():
        size = np.abs(gradient)
        sure = size > max(1e-3 * size.max(), floor)
        scale = np.abs(after[name]).max()
        np.testing.assert_allclose(
            ours[name][sure], after[name][sure], rtol=0, atol=1e-5 * scale, err_msg=name
        )
        moved = np.abs(after[name] - before[name])[sure]
        assert moved.size == 0 or moved.min() > 0.5 * LR, name
        assert np.abs(ours[name] - before[name]).max() < 1.01 * LR, name
        compared, total = compared + sure.sum(), total + sure.size
    assert compared > 0.9 * total


def test_running_statistics_of_the_discriminator(steps):
    """Ours see the real and the fake batch; taming's also the fake one of the generator's pass."""
    _, ours, before, _, _, after = steps
    name = "loss.discriminator.main.3.running_mean"
    assert not np.allclose(ours[name], before[name])
    fake_twice = after[name]  # moved by fake, real, fake
    assert np.abs(ours[name] - fake_twice).max() < np.abs(before[name] - fake_twice).max()
