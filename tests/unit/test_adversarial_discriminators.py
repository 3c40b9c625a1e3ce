"""What all discriminators keep to, and what each of the newer ones is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqgan.adversarial.discriminators import load_discriminator, make_discriminator
from vqgan.adversarial.feature_heads import FeatureHeadsConfig
from vqgan.adversarial.layers import ActNorm, blur_pool
from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.adversarial.stylegan2 import StyleGAN2Config, batch_deviation
from vqgan.adversarial.vqgan_plus import VQGANPlusConfig, VQGANPlusDiscriminator
from vqgan.errors import InputError
from vqgan.serialization import from_json, to_json
from vqgan.train.config import TokenizerTraining

PATCH = PatchGANConfig(base_channels=4, num_layers=2, norm_groups=4)
CONFIGS = {
    "batch": PATCH,
    "batch, blur": dataclasses.replace(PATCH, blur=True),
    "group, blur": dataclasses.replace(PATCH, norm="group", blur=True),
    "actnorm": dataclasses.replace(PATCH, norm="actnorm"),
    "none": dataclasses.replace(PATCH, norm="none"),
    "stylegan2": StyleGAN2Config(resolution=16, base_channels=4, max_channels=8),
    "features": FeatureHeadsConfig(map_channels=(3, 12), width=8, norm_groups=2),
    "vqgan-plus": VQGANPlusConfig(base_channels=8, num_stages=2, norm_groups=4, grid=4),
}


def images(n=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (n, 16, 16, 3)), jnp.float32)


def maps(x):
    """The image itself, and every 2x2 pixels of it as one."""
    b, h, w, c = x.shape
    tiles = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return [x, tiles.reshape(b, h // 2, w // 2, 4 * c)]


def made(config):
    """A discriminator with random weights in every tensor, and its logits of images."""
    model = make_discriminator(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), params))
    seen = maps if config.kind == "features" else lambda x: x
    return model, lambda x, train=True: model(seen(x), train=train)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_learns_to_tell_two_kinds_of_images_apart(config):
    model = make_discriminator(config, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    seen = maps if config.kind == "features" else lambda x: x
    real = jnp.repeat(images()[:, ::4], 4, axis=1)  # rows in fours: blur leaves these

    def logits(params, x):
        return nnx.merge(graphdef, params, stats, copy=True)(seen(x), train=True)

    @jax.jit
    def update(params, fake):
        def loss(params):
            margins = jax.nn.relu(1 - logits(params, real)), jax.nn.relu(1 + logits(params, fake))
            return margins[0].mean() + margins[1].mean()

        value, grads = jax.value_and_grad(loss)(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda p, g: p - 0.1 * g / (norm + 1e-6), params, grads), value

    losses = []
    for seed in range(40):
        params, value = update(params, images(seed=seed + 1))
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3]), losses


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_lives_in_a_directory_and_in_a_config(config, tmp_path):
    model, logits = made(config)
    logits(images())  # so that statistics, where there are any, have moved
    model.save_pretrained(tmp_path / "judge")
    again = load_discriminator(tmp_path / "judge")
    assert type(again) is type(model) and again.config == config
    x = maps(images(seed=3)) if config.kind == "features" else images(seed=3)
    np.testing.assert_array_equal(again(x, train=False), model(x, train=False))
    training = TokenizerTraining(discriminator=config)
    assert from_json(TokenizerTraining, to_json(training), where="x") == training


@pytest.mark.parametrize("name", ["group, blur", "none", "features", "vqgan-plus"])
def test_without_batch_statistics_images_do_not_see_one_another(name):
    _, logits = made(CONFIGS[name])
    together = logits(images(4))
    np.testing.assert_allclose(together[:1], logits(images(4)[:1]), atol=1e-5)


def test_batch_statistics_are_seen():
    for name in ("batch", "stylegan2"):
        _, logits = made(CONFIGS[name])
        assert np.abs(logits(images(4))[:1] - logits(images(4)[:2])[:1]).max() > 1e-4, name


def test_blur_removes_what_a_stride_would_fold():
    rows, _ = jnp.indices((16, 16))
    stripes = jnp.broadcast_to((1.0 - 2.0 * (rows % 2))[None, :, :, None], (1, 16, 16, 2))
    inside = blur_pool(stripes)[:, 1:-1, 1:-1]
    np.testing.assert_allclose(inside, 0.0, atol=1e-6)
    np.testing.assert_allclose(blur_pool(jnp.ones((1, 8, 6, 1)))[:, 1:-1, 1:-1], 1.0, rtol=1e-6)
    assert blur_pool(jnp.ones((1, 8, 6, 1))).shape == (1, 4, 3, 1)


def test_blurred_logits_lie_where_the_others_do():
    plain, blurred = (made(CONFIGS[name])[1](images()) for name in ("batch", "batch, blur"))
    assert plain.shape == blurred.shape


def test_actnorm_keeps_the_statistics_of_its_first_batch():
    norm = ActNorm(3, rngs=nnx.Rngs(0))
    first, second = images(seed=1) * 3 + 1, images(seed=2)
    y = np.asarray(norm(first, train=True))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=1e-4)
    expected = (second - first.mean((0, 1, 2), keepdims=True)) / first.std((0, 1, 2), keepdims=True)
    for train in (True, False):
        np.testing.assert_allclose(norm(second, train=train), expected, atol=1e-4)


def test_deviation_over_groups_of_images():
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 3)).astype(np.float32)
    found = np.asarray(batch_deviation(jnp.asarray(x), 2))
    for i in range(4):
        pair = x[[i % 2, i % 2 + 2]]
        np.testing.assert_allclose(found[i], pair.std(0).mean(), rtol=1e-4)
    assert not np.allclose(found[0], found[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PatchGANConfig(base_channels=4, norm="group"), "norm_groups 32 does not divide"),
        (StyleGAN2Config(resolution=48), "resolution 48"),
        (StyleGAN2Config(resolution=4), "resolution 4 "),
        (FeatureHeadsConfig(width=12), "norm_groups 8 does not divide"),
        (VQGANPlusConfig(base_channels=48), "norm_groups 32 does not divide"),
        (VQGANPlusConfig(num_stages=0), "num_stages 0 and grid 16 must be"),
        (FeatureHeadsConfig(map_channels=()), "map_channels is empty"),
    ],
)
def test_configs_that_contradict_themselves(config, message):
    with pytest.raises(InputError, match=message):
        make_discriminator(config, rngs=nnx.Rngs(0))


def test_inputs_that_do_not_fit():
    with pytest.raises(InputError, match=r"\(8, 8, 3\).*\(16, 16, 3\)"):
        made(CONFIGS["stylegan2"])[0](jnp.ones((2, 8, 8, 3)), train=True)
    with pytest.raises(InputError, match=r"3 channels.*in_channels=1"):
        VQGANPlusDiscriminator(VQGANPlusConfig(in_channels=1, base_channels=32), rngs=nnx.Rngs(0))(
            images(), train=True
        )
    with pytest.raises(InputError, match=r"\(3,\) channels.*\(3, 12\)"):
        made(CONFIGS["features"])[0]([jnp.ones((2, 8, 8, 3))], train=True)


def test_a_directory_without_a_discriminator(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "Tokenizer"}')
    with pytest.raises(InputError, match="holds Tokenizer, not one of PatchGAN"):
        load_discriminator(tmp_path)
