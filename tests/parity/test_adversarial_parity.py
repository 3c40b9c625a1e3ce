"""PatchGAN, LPIPS and the losses against taming-transformers and the package lpips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage
from flax import nnx
from reference import import_taming, import_torch, lpips_module, taming_loss, taming_lpips

from vqgan.adversarial.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    pixel_loss,
)
from vqgan.adversarial.lpips import load_lpips
from vqgan.adversarial.patchgan import PatchGAN, PatchGANConfig

pytestmark = pytest.mark.parity


def _torch(x):
    """A tensor of a NumPy or JAX array; images go from NHWC to NCHW."""
    x = np.array(x)
    return import_torch().from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x)


def _numpy(x):
    x = x.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def _random_images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def _natural_images(size=96):
    """Two photographs, and the same with blur and with noise."""
    photos = [skimage.data.astronaut()[:size, 180 : 180 + size], skimage.data.cat()[:size, :size]]
    a = np.stack(photos).astype(np.float32) / 127.5 - 1.0
    blurred = (a + np.roll(a, 1, 1) + np.roll(a, 1, 2) + np.roll(a, (1, 1), (1, 2))) / 4
    noisy = np.clip(a + 0.1 * np.random.default_rng(0).normal(size=a.shape), -1, 1)
    return np.concatenate([a, a]), np.concatenate([blurred, noisy]).astype(np.float32)


def _with_weights_of(theirs, num_layers):
    """Our discriminator of 8 base channels with the weights and statistics of taming's."""
    torch = import_torch()
    config = PatchGANConfig(base_channels=8, num_layers=num_layers)
    ours = PatchGAN(config, rngs=nnx.Rngs(0))
    convs, norms = (
        [layer for layer in theirs.modules() if isinstance(layer, kind)]
        for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    )
    for source, target in zip(convs, ours.convs, strict=True):
        target.kernel[...] = jnp.asarray(source.weight.detach().numpy().transpose(2, 3, 1, 0))
        assert (source.bias is None) == (target.bias is None)
        if source.bias is not None:
            target.bias[...] = jnp.asarray(source.bias.detach().numpy())
    for source, target in zip(norms, ours.norms, strict=True):
        target.scale[...] = jnp.asarray(source.weight.detach().numpy())
        target.bias[...] = jnp.asarray(source.bias.detach().numpy())
        target.mean[...] = jnp.asarray(source.running_mean.numpy().copy())
        target.var[...] = jnp.asarray(source.running_var.numpy().copy())
    return ours, norms


def _random_discriminators(num_layers):
    """taming's discriminator with statistics that have moved, ours, and taming's norms."""
    torch = import_torch()
    torch.manual_seed(0)
    package = import_taming("modules.discriminator.model")
    theirs = package.NLayerDiscriminator(ndf=8, n_layers=num_layers).apply(package.weights_init)
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.bias.data.normal_(0, 0.1)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2.0)
    return theirs, *_with_weights_of(theirs, num_layers)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (56, 48)])
def test_patchgan(num_layers, train, size):
    theirs, ours, norms = _random_discriminators(num_layers)
    theirs.train(train)
    for seed in (0, 1):  # the second call goes on from the statistics of the first
        images = _random_images(3, *size, 3, seed=seed)
        logits = ours(jnp.asarray(images), train=train)
        np.testing.assert_allclose(logits, _numpy(theirs(_torch(images))), atol=1e-5)
    for source, target in zip(norms, ours.norms, strict=True):
        np.testing.assert_allclose(target.mean[...], source.running_mean, atol=1e-6)
        np.testing.assert_allclose(target.var[...], source.running_var, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_patchgan_gradients(train):
    theirs, ours, _ = _random_discriminators(3)
    theirs.train(train)
    images = _random_images(2, 32, 32, 3)
    x = _torch(images).requires_grad_()
    theirs(x).square().mean().backward()
    graphdef, params, stats = nnx.split(ours, nnx.Param, ...)

    def loss(params, images):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return jnp.square(model(images, train=train)).mean()

    grads, wish = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(images))
    _same_direction_and_size(wish, _numpy(x.grad))
    first = theirs.main[0].weight.grad.numpy().transpose(2, 3, 1, 0)
    _same_direction_and_size(grads["convs"][0]["kernel"][...], first)
    _same_direction_and_size(grads["norms"][0]["scale"][...], theirs.main[3].weight.grad.numpy())


def _same_direction_and_size(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
@pytest.mark.parametrize("kind", ["random", "natural"])
def test_lpips(net, kind):
    a, b = _random_images(2, 2, 64, 80, 3) if kind == "random" else _natural_images()
    y = _torch(b).requires_grad_()
    expected = lpips_module(net)(_torch(a), y)
    expected.sum().backward()
    distance = functools.partial(load_lpips(net), jnp.asarray(a))
    value, pull = jax.vjp(distance, jnp.asarray(b))
    np.testing.assert_allclose(value, _numpy(expected).ravel(), atol=1e-5)
    (gradient,) = pull(jnp.ones_like(value))
    _same_direction_and_size(gradient, _numpy(y.grad))


def test_lpips_is_also_that_of_taming():
    a, b = _natural_images(64)
    expected = taming_lpips()(_torch(a), _torch(b))
    ours = load_lpips("vgg16")(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(ours, _numpy(expected).ravel(), atol=1e-5)


def test_the_numbers_that_the_unit_test_pins():
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, 64, 64, 3)).astype(np.float32)
    for net, pinned in (("vgg16", [0.3371568, 0.3273038]), ("alexnet", [0.0958002, 0.1279446])):
        value = lpips_module(net).double()(_torch(a).double(), _torch(b).double())
        np.testing.assert_allclose(_numpy(value).ravel(), pinned, atol=2e-7)


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_discriminator_loss(kind):
    package = import_taming("modules.losses.vqperceptual")
    real, fake = 2 * np.random.default_rng(0).normal(size=(2, 3, 5, 5, 1)).astype(np.float32)
    expected = getattr(package, f"{kind}_d_loss")(_torch(real), _torch(fake))
    ours = discriminator_loss(kind, jnp.asarray(real), jnp.asarray(fake))
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-5)


def test_generator_terms_and_adaptive_weight():
    """The whole of taming's generator loss at a last layer that makes the reconstruction."""
    torch = import_torch()
    torch.manual_seed(0)
    theirs = taming_loss(disc_start=0, disc_weight=0.8, disc_num_layers=1, disc_ndf=8).eval()
    images, features = _random_images(2, 32, 32, 3), _random_images(2, 32, 32, 4, seed=1)
    last = torch.nn.Conv2d(4, 3, 3, padding=1)
    reconstruction = last(_torch(features))
    total, log = theirs(
        torch.zeros(()), _torch(images), reconstruction, 0, 1, last_layer=last.weight
    )

    kernel = jnp.asarray(last.weight.detach().numpy().transpose(2, 3, 1, 0))
    bias = jnp.asarray(last.bias.detach().numpy())
    ours, _ = _with_weights_of(theirs.discriminator, 1)
    lpips = load_lpips("vgg16")

    def reconstruct(kernel):
        y = jax.lax.conv_general_dilated(
            jnp.asarray(features),
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias[None, None, None]

    def nll(kernel):
        x, y = jnp.asarray(images), reconstruct(kernel)
        return pixel_loss("l1", x, y) + lpips(x, y).mean()

    def adversarial(kernel):
        return generator_loss("hinge", ours(reconstruct(kernel), train=False))

    nll_value, grad_nll = jax.value_and_grad(nll)(kernel)
    gan_value, grad_gan = jax.value_and_grad(adversarial)(kernel)
    weight = 0.8 * adaptive_weight(grad_nll, grad_gan)
    np.testing.assert_allclose(nll_value, log["train/nll_loss"], rtol=1e-5)
    np.testing.assert_allclose(gan_value, log["train/g_loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weight, log["train/d_weight"], rtol=1e-5)
    np.testing.assert_allclose(nll_value + weight * gan_value, total.item(), rtol=1e-5)
