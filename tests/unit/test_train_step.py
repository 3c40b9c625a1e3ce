"""The step of stage 1 against the same thing computed the long way, and what it keeps to."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vqgan.adversarial.feature_heads import FeatureHeadsConfig
from vqgan.adversarial.losses import discriminator_loss, generator_loss, pixel_loss
from vqgan.adversarial.lpips import LPIPS
from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.adversarial.stylegan2 import StyleGAN2Config
from vqgan.data.pipeline import DataConfig
from vqgan.pictures import to_float
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import FSQConfig, VQConfig
from vqgan.train.config import LossConfig, OptimConfig, RunConfig, TokenizerTraining
from vqgan.train.optim import optimizer, schedule
from vqgan.train.reconstruction import Perceptual
from vqgan.train.tokenizer import setup, step

KEY = jax.random.key(7)
CONFIG = TokenizerTraining(
    model=TokenizerConfig(
        autoencoder=AutoencoderConfig(
            base_channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            resolution=16,
            z_channels=8,
            norm_groups=4,
        ),
        quantizer=VQConfig(codebook_size=16, dim=4, init_from_data=False, revive_after=0),
    ),
    discriminator=PatchGANConfig(base_channels=4, num_layers=1),
    loss=LossConfig(perceptual_weight=0.0, disc_start=0, codebook_weight=0.7),
    data=DataConfig(image_size=16, batch_size=4),
    run=RunConfig(steps=100),
)


# An optimiser that moves nothing and keeps the gradients as its state.
GRADIENTS = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def batch(seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), np.uint8)
    return {"image": jnp.asarray(images)}


def with_loss(**changes):
    return dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, **changes))


def spread_codes(state):
    """The state with codes that are apart, as after training, so that several are in use."""
    codebook = jax.random.normal(KEY, (16, 4)) * 0.3
    state.params["quantizer"]["codebook"] = nnx.Param(codebook)
    return state


class Distance(LPIPS):
    """In place of LPIPS: small, and neither of the pixel losses."""

    def __init__(self):
        pass

    def __call__(self, a, b):
        return jnp.abs(a - b).mean((1, 2, 3)) ** 1.5


class Gradients:
    """The gradients by plain differentiation of each loss as one function of the parameters."""

    def __init__(self, stage, state, images, lpips):
        self.stage, self.state, self.images, self.lpips = stage, state, images, lpips
        self.loss = stage.config.loss

    def output(self, params):
        return nnx.merge(self.stage.tokenizer, params, self.state.codebook_stats)(self.images)

    def nll(self, params):
        reconstruction = self.output(params).reconstruction
        pixel = pixel_loss(self.loss.reconstruction, self.images, reconstruction)
        total = self.loss.reconstruction_weight * pixel
        if self.lpips is not None:
            total += self.loss.perceptual_weight * self.lpips(self.images, reconstruction).mean()
        return total

    def logits(self, disc_params, images):
        discriminator = nnx.merge(
            self.stage.discriminator, disc_params, self.state.disc_stats, copy=True
        )
        return discriminator(images, train=True)

    def adversarial(self, params):
        fake = self.logits(self.state.disc_params, self.output(params).reconstruction)
        return generator_loss(self.loss.adversarial, fake)

    def weight(self):
        at_last = [
            jax.grad(f)(self.state.params)["decoder"]["conv_out"]["kernel"][...]
            for f in (self.nll, self.adversarial)
        ]
        nll, gan = map(np.linalg.norm, map(np.ravel, at_last))
        return self.loss.adversarial_weight * min(nll / (gan + 1e-4), 1e4)

    def autoencoder(self):
        weight = self.weight()

        def total(params):
            codebook = sum(self.output(params).losses.values())
            adversarial = weight * self.adversarial(params)
            return self.nll(params) + adversarial + self.loss.codebook_weight * codebook

        return jax.value_and_grad(total)(self.state.params)

    def discriminator(self):
        fake = self.output(self.state.params).reconstruction
        return jax.value_and_grad(
            lambda p: discriminator_loss(
                self.loss.adversarial, self.logits(p, self.images), self.logits(p, fake)
            )
        )(self.state.disc_params)


def assert_trees_close(found, expected):
    """Equal to 1e-5 of each array's largest entry. Some gradients are 0 but for rounding (keys'
    biases, which the softmax does not see), so an array is given a hundredth of the largest."""
    largest = max(np.abs(y).max() for y in jax.tree.leaves(expected))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(y).max(), 1e-2 * largest)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("kind", ["hinge", pytest.param("non_saturating", marks=pytest.mark.slow)])
def test_gradients_of_both_players_equal_the_long_way(kind):
    stage, init = setup(with_loss(adversarial=kind), GRADIENTS, GRADIENTS)
    state = spread_codes(init())
    jitted = jax.jit(functools.partial(step, stage, perceptual=Perceptual(lpips=Distance())))
    new, metrics = jitted(state, batch(), key=KEY)
    long_way = Gradients(stage, state, to_float(batch()["image"]), Distance())

    loss, grads = long_way.autoencoder()
    assert_trees_close(new.optim, grads)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["adversarial_weight"], long_way.weight(), rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)

    disc_loss, grads = long_way.discriminator()
    assert_trees_close(new.disc_optim, grads)
    np.testing.assert_allclose(metrics["disc_loss"], disc_loss, rtol=1e-5)
    assert 0 < metrics["usage"] <= 1 and metrics["perplexity"] > 1.5


@pytest.fixture(scope="module")
def started():
    """Five steps across the discriminator's warm-up (from 2) and its start (at 3)."""
    config = dataclasses.replace(with_loss(disc_start=3, disc_warmup=1), ema_decay=0.5)
    stage, init = setup(config)
    jitted = jax.jit(functools.partial(step, stage))
    states, metrics = [init()], []
    for _ in range(5):
        state, values = jitted(states[-1], batch(), key=KEY, perceptual=Perceptual())
        states.append(state)
        metrics.append(jax.device_get(values))
    return states, metrics, jitted


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_discriminator_learns_from_its_warm_up_on(started):
    states, metrics, _ = started
    frozen = [
        same(a.disc_params, b.disc_params) and same(a.disc_stats, b.disc_stats)
        for a, b in itertools.pairwise(states)
    ]
    assert frozen == [True, True, False, False, False]
    assert [m["disc_loss"] > 0 for m in metrics] == [False, False, True, True, True]


def test_generator_sees_the_discriminator_from_disc_start_on(started):
    _, metrics, _ = started
    assert [m["adversarial_weight"] > 0 for m in metrics] == [False, False, False, True, True]


def test_the_start_of_the_discriminator_does_not_recompile(started):
    _, metrics, jitted = started
    assert jitted._cache_size() == 1
    assert len({frozenset(m) for m in metrics}) == 1


def test_averaged_weights(started):
    states, _, _ = started
    for old, new in itertools.pairwise(states):
        assert new.step == old.step + 1
        expected = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * p, old.ema, new.params)
        for x, y in zip(*map(jax.tree.leaves, (new.ema, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_every_step_notes_the_codes_that_it_used(started):
    states, metrics, _ = started
    graphdef, images = setup(CONFIG)[0].tokenizer, to_float(batch()["image"])
    last, counts = np.full(16, -1), np.zeros(16)
    for number, state in enumerate(states[:-1]):
        tokenizer = nnx.merge(graphdef, state.params, state.codebook_stats)
        ids = np.asarray(tokenizer.encode(images)).ravel()
        last[ids] = number
        counts = counts * (1 - 1 / CONFIG.usage_window) + np.bincount(ids, minlength=16)
        np.testing.assert_array_equal(states[number + 1].codes.last_used, last[None])
        np.testing.assert_allclose(states[number + 1].codes.counts, counts[None], rtol=1e-6)
        assert metrics[number]["dead_codes"] == (last < 0).sum()


def test_codes_that_maintenance_moves_move_in_the_average_too():
    quantizer = dataclasses.replace(CONFIG.model.quantizer, init_from_data=True)
    model = dataclasses.replace(CONFIG.model, quantizer=quantizer)
    stage, init = setup(dataclasses.replace(with_loss(disc_start=-1), model=model))
    new, _ = jax.jit(functools.partial(step, stage))(
        init(), batch(), key=KEY, perceptual=Perceptual()
    )
    codes, average = (
        np.asarray(part["quantizer"]["codebook"][...]) for part in (new.params, new.ema)
    )
    np.testing.assert_array_equal(codes, average)
    assert np.abs(codes).max() > 1 / 16  # outside of where they were born


def test_overfits_one_batch():
    config = dataclasses.replace(
        with_loss(disc_start=-1), optim=OptimConfig(lr=3e-3, betas=(0.9, 0.99))
    )
    stage, init = setup(config)
    jitted = jax.jit(functools.partial(step, stage), donate_argnums=0)
    smooth = jnp.linspace(0, 255, 16).astype(jnp.uint8)
    images = jnp.broadcast_to(smooth.reshape(1, 16, 1, 1), (4, 16, 16, 3))
    state, losses = init(), []
    for _ in range(30):
        state, metrics = jitted(state, {"image": images}, key=KEY, perceptual=Perceptual())
        losses.append(float(metrics["l1"]))
    assert losses[-1] < 0.5 * losses[0], losses


# The optimiser.


def test_accumulated_batches_make_one_update_of_their_mean():
    many = optimizer(OptimConfig(lr=0.1, accumulate=2), steps=10)
    one = optimizer(OptimConfig(lr=0.1), steps=5)
    params = {"kernel": jnp.ones(3)}
    first, second = {"kernel": jnp.array([1.0, 2.0, 3.0])}, {"kernel": jnp.array([3.0, 0.0, 1.0])}
    state = many.init(params)
    updates, state = many.update(first, state, params)
    assert not updates["kernel"].any()
    updates, state = many.update(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = one.update(mean, one.init(params), params)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-6)


def test_clipping_bounds_the_norm_before_adam():
    params = {"kernel": jnp.zeros(2)}
    optim = optimizer(OptimConfig(lr=1.0, betas=(0.0, 0.0), eps=1.0, clip_norm=1.0), steps=1)
    updates, _ = optim.update({"kernel": jnp.array([30.0, 40.0])}, optim.init(params), params)
    clipped = np.array([0.6, 0.8])
    np.testing.assert_allclose(updates["kernel"], -clipped / (clipped + 1), rtol=1e-5)


def test_weight_decay_is_decoupled_and_on_kernels_only():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2), "codebook": jnp.ones(2)}
    optim = optimizer(OptimConfig(lr=0.1, weight_decay=0.5), steps=1)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optim.update(nothing, optim.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5, rtol=1e-6)
    assert not updates["bias"].any() and not updates["codebook"].any()


def test_schedule_warms_up_and_falls():
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr=0.1)
    rates = [float(schedule(config, 20)(i)) for i in range(21)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.4375, 0.625, 0.8125, 1.0], rtol=1e-6)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    np.testing.assert_allclose(rates[20], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates[12], 0.55, rtol=1e-6)


def test_schedule_counts_updates_not_batches():
    config = OptimConfig(lr=1.0, schedule="cosine", accumulate=4)
    np.testing.assert_allclose(schedule(config, 40)(10), 0.0, atol=1e-7)
    assert schedule(config, 40)(5) > 0.4


def test_a_first_batch_whose_codes_are_all_zero_has_gradients():
    """FSQ of few levels rounds what is small to 0, and an untrained encoder's latents can be."""
    model = dataclasses.replace(CONFIG.model, quantizer=FSQConfig(levels=(4, 3, 3)))
    stage, init = setup(dataclasses.replace(with_loss(disc_start=-1), model=model))
    jitted, state = jax.jit(functools.partial(step, stage, perceptual=Perceptual())), init()
    small = jax.tree.map(lambda x: x * 0.01, state.params["quant_conv"])
    state.params["quant_conv"] = small
    tokenizer = nnx.merge(stage.tokenizer, state.params, state.codebook_stats)
    assert not tokenizer(to_float(batch()["image"])).z_q.any()
    for _ in range(2):
        state, metrics = jitted(state, batch(), key=KEY)
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["grad_norm"] < 100
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


# Other discriminators.


def small_maps(x):
    return [x, x.reshape(len(x), 8, 2, 8, 6).transpose(0, 1, 3, 2, 4).reshape(len(x), 8, 8, 12)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("judge", "extractor"),
    [
        (StyleGAN2Config(resolution=16, base_channels=4, max_channels=8), None),
        (FeatureHeadsConfig(map_channels=(3, 12), width=8), jax.tree_util.Partial(small_maps)),
    ],
    ids=["stylegan2", "features"],
)
def test_the_generator_follows_any_discriminator(judge, extractor):
    stage, init = setup(dataclasses.replace(CONFIG, discriminator=judge), GRADIENTS, GRADIENTS)
    state = spread_codes(init())
    one = jax.jit(functools.partial(step, stage))
    new, metrics = one(state, batch(), key=KEY, perceptual=Perceptual(), extractor=extractor)
    output = nnx.merge(stage.tokenizer, state.params, state.codebook_stats)(
        to_float(batch()["image"])
    )
    logits = nnx.merge(stage.discriminator, state.disc_params, state.disc_stats)(
        output.reconstruction if extractor is None else extractor(output.reconstruction), train=True
    )
    np.testing.assert_allclose(metrics["disc_fake"], logits.mean(), rtol=1e-4, atol=1e-6)
    assert metrics["adversarial_weight"] > 0
    # The hinge's pulls on the last bias cancel.
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(new.disc_optim) if g.ndim > 1)


# What else the discriminator's loss and the adversarial weight can be.


@pytest.fixture(scope="module")
def regularised():
    """Steps 0 to 3 with everything on, from disc_start 1 of a ramp over 2; gradients are kept."""
    changes = {"lecam_weight": 0.5, "lecam_decay": 0.5, "r1_weight": 3.0, "r1_every": 2}
    config = with_loss(**changes, disc_start_fraction=0.01, disc_warmup=5, disc_ramp=2)
    stage, init = setup(config, GRADIENTS, GRADIENTS)
    jitted = jax.jit(functools.partial(step, stage, perceptual=Perceptual()))
    states, metrics = [spread_codes(init())], []
    for _ in range(4):
        state, values = jitted(states[-1], batch(), key=KEY)
        states.append(state)
        metrics.append(jax.device_get(values))
    return stage, states, metrics


def test_lecam_and_lazy_r1_add_their_gradients(regularised):
    stage, states, metrics = regularised
    images = to_float(batch()["image"])
    assert [m["r1"] > 0 for m in metrics] == [True, False, True, False]
    for at, r1_weight in ((1, 0.0), (2, 3.0 * 2)):
        long_way = Gradients(stage, states[at], images, None)
        fake = long_way.output(states[at].params).reconstruction

        def loss(p, long_way=long_way, fake=fake, state=states[at], r1_weight=r1_weight):
            real, made = long_way.logits(p, images), long_way.logits(p, fake)
            lecam = jnp.square(jax.nn.relu(real - state.logit_means[1])).mean()
            lecam += jnp.square(jax.nn.relu(state.logit_means[0] - made)).mean()
            slopes = jax.grad(lambda x: long_way.logits(p, x).mean((1, 2, 3)).sum())(images)
            r1 = jnp.square(slopes).sum((1, 2, 3)).mean() / 2
            return discriminator_loss("hinge", real, made) + 0.5 * lecam + r1_weight * r1

        assert_trees_close(states[at + 1].disc_optim, jax.grad(loss)(states[at].disc_params))


def test_logit_averages_follow_the_logits(regularised):
    _, states, metrics = regularised
    for old, new, m in zip(states, states[1:], metrics, strict=False):
        now = np.array([m["disc_real"], m["disc_fake"]])
        np.testing.assert_allclose(new.logit_means, (old.logit_means + now) / 2, rtol=1e-5)


def test_the_weight_ramps_up_from_a_fraction_of_the_run(regularised):
    _, _, metrics = regularised  # the optimiser moves nothing, so the ratio of norms is the same
    weights = np.array([m["adversarial_weight"] for m in metrics])
    np.testing.assert_allclose(weights / weights[-1], [0, 0.5, 1, 1], rtol=0.05)


@pytest.mark.slow
def test_both_players_see_augmented_images():
    stage, init = setup(with_loss(augment=("cutout", "translation")), GRADIENTS, GRADIENTS)
    jitted = jax.jit(functools.partial(step, stage, perceptual=Perceptual()))
    states = [jitted(init(), batch(), key=jax.random.key(seed)) for seed in (0, 0, 1)]
    real = [float(metrics["disc_real"]) for _, metrics in states]
    assert real[0] == real[1] != real[2]
    norms = [float(metrics["grad_norm"]) for _, metrics in states]
    assert norms[0] == norms[1] != norms[2]
