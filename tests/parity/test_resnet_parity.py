"""ResNets against torchvision's, and VQGAN+'s perceptual loss and discriminator against PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, images, nchw, nhwc, randomise
from flax import nnx
from reference import import_torch, import_torchvision

from vqgan import convert
from vqgan.adversarial.classifier import classifier_loss
from vqgan.adversarial.vqgan_plus import VQGANPlusConfig, VQGANPlusDiscriminator

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def pair(request, tmp_path_factory):
    """torchvision's, random in every tensor, and ours from its state dict."""
    torch = import_torch()
    theirs = getattr(import_torchvision().models, request.param)(weights=None).eval()
    randomise(theirs.state_dict().items())
    path = tmp_path_factory.mktemp("resnet") / f"{request.param}.pth"
    torch.save(theirs.state_dict(), path)
    return theirs, convert.load(path).model


def prepared(x):
    """Images in [-1, 1] as VQGAN+ shows them to its classifier, in [0, 1] before."""
    torch = import_torch()
    resized = torch.nn.functional.interpolate(
        (x + 1) / 2, size=224, mode="bilinear", antialias=True, align_corners=False
    )
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    return (resized - mean) / std


def their_maps(model, x):
    """What each stage gives."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def assert_same_gradient(ours, theirs):
    """To 1 % as a whole, and to 1e-4 in the median pixel.

    Of some hundred thousand activations a few are zero but for rounding, and the slope there is
    either of two, so that single pixels differ by more.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    size, error = np.linalg.norm(theirs), np.abs(ours - theirs)
    assert size > 0 and np.linalg.norm(error) < 1e-2 * size
    assert np.median(error) < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("size", [(40, 56), (256, 240)])  # enlarged, and shrunk
def test_feature_maps_and_logits(pair, size):
    theirs, ours = pair
    torch = import_torch()
    x = images(*size)
    with torch.no_grad():
        seen = prepared(torch.from_numpy(nchw(x)))
        expected, logits = their_maps(theirs, seen), theirs(seen)
    maps, found = jax.jit(lambda m, x: (m.features(x), m(x)))(ours, jnp.asarray(x))
    for a, b in zip(maps, expected, strict=True):
        assert_close(a, nhwc(b))
    assert_close(found[0], nhwc(expected[-1]))
    assert_close(found[1], logits.numpy())


@pytest.mark.parametrize("term", ["logits", "features"])
def test_loss_and_gradient_of_vqgan_plus(pair, term):
    theirs, ours = pair
    mse = import_torch().nn.functional.mse_loss
    a, b = images(64, 48), images(64, 48, seed=1)
    real, made = (import_torch().from_numpy(nchw(x)) for x in (a, b))
    made.requires_grad_()
    seen, target = prepared(made), prepared(real)
    expected = mse(theirs(seen), theirs(target))
    if term == "features":
        expected = expected + mse(their_maps(theirs, seen)[-1], their_maps(theirs, target)[-1])
    expected.backward()

    @jax.jit
    def loss(model, b):
        return jax.value_and_grad(lambda b: classifier_loss(model, term, jnp.asarray(a), b))(b)

    value, gradient = loss(ours, jnp.asarray(b))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    assert_same_gradient(gradient, nhwc(made.grad))


# The discriminator.


def torch_discriminator(stages):
    """VQGAN+'s in PyTorch's own layers: 32 channels, blurred; logits of images in [0, 1]."""
    nn = import_torch().nn
    taps = import_torch().tensor([1.0, 3.0, 3.0, 1.0]) / 8

    class Blur(nn.Module):
        def forward(self, x):
            kernel = (taps[:, None] * taps[None]).expand(x.shape[1], 1, 4, 4)
            odd = [side % 2 for side in x.shape[2:]]
            x = nn.functional.pad(x, (1, 1 + odd[1], 1, 1 + odd[0]))
            return nn.functional.conv2d(x, kernel, stride=2, groups=x.shape[1])

    widths = [32, *(32 * 2**n for n in range(stages))]
    layers = [nn.Conv2d(3, 32, 5, padding=2), nn.LeakyReLU(0.1)]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), Blur()]
        layers += [nn.GroupNorm(32, outputs), nn.LeakyReLU(0.1)]
    layers += [nn.AdaptiveMaxPool2d(16), nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 5, padding=2))


def with_weights_of(theirs, stages):
    nn = import_torch().nn
    config = VQGANPlusConfig(base_channels=32, num_stages=stages)
    ours = VQGANPlusDiscriminator(config, rngs=nnx.Rngs(0))
    convs = [ours.conv_in, *(stage.conv for stage in ours.stages), ours.conv_out, ours.logit]
    norms = [stage.norm for stage in ours.stages]
    for layers, kind, weight in ((convs, nn.Conv2d, "kernel"), (norms, nn.GroupNorm, "scale")):
        sources = [layer for layer in theirs if isinstance(layer, kind)]
        for source, target in zip(sources, layers, strict=True):
            value = source.weight.detach().numpy()
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
            getattr(target, weight)[...] = jnp.asarray(value)
            target.bias[...] = jnp.asarray(source.bias.detach().numpy())
    return ours


@pytest.mark.parametrize(
    ("stages", "size"),
    [(1, (32, 32)), (2, (92, 74)), (4, (50, 37))],
    ids=["as many", "pooled, of odd sides", "repeated"],
)
def test_discriminator_of_vqgan_plus(stages, size):
    theirs = torch_discriminator(stages)
    randomise(theirs.state_dict().items())
    ours = with_weights_of(theirs, stages)
    x = images(*size)
    seen = import_torch().from_numpy(nchw(x)).requires_grad_()
    logits = theirs((seen + 1) / 2)
    logits.square().sum().backward()

    @jax.jit
    def judged(x):
        def loss(x):
            logits = ours(x, train=True)
            return jnp.square(logits).sum(), logits

        return jax.grad(loss, has_aux=True)(x)

    gradient, found = judged(jnp.asarray(x))
    assert_close(found, nhwc(logits.detach()))
    assert_same_gradient(gradient, nhwc(seen.grad))
