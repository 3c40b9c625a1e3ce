"""A perceptual term by a classifier: the loss, the ResNet that it looks through, and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from test_train_step import (
    CONFIG,
    GRADIENTS,
    KEY,
    Distance,
    Gradients,
    assert_trees_close,
    batch,
    spread_codes,
)

from vqgan import convert
from vqgan.adversarial.classifier import classifier_loss
from vqgan.adversarial.losses import discriminator_loss
from vqgan.adversarial.lpips import Frozen
from vqgan.adversarial.resnet import ResNet, ResNetConfig, _max_pool
from vqgan.convert.resnet import _RULES
from vqgan.convert.table import torch_table, write
from vqgan.errors import InputError
from vqgan.pictures import to_float
from vqgan.train.config import LossConfig
from vqgan.train.reconstruction import Perceptual, perceptual_networks, reconstruction_terms
from vqgan.train.sharding import make_mesh
from vqgan.train.state import compiled
from vqgan.train.tokenizer import setup, step, train_tokenizer

TINY = ResNetConfig(blocks=(1, 2), width=4, classes=5, resize=16)


def pair(size=12, channels=3):
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, size, size, channels))
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


@functools.cache
def resnet(config=TINY):
    """Random in every weight."""
    model = ResNet(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(model)

    def value(x):
        scale = 1 / np.sqrt(np.prod(x.shape[:-1])) if x.ndim > 1 else 0.2
        return x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree.map(value, state))


def means(x):
    """A function as a classifier: rows and columns, then all of the image as its logits."""
    return [x.mean(1), x.mean(2), 3 * x.mean((1, 2))]


# The loss.


@pytest.mark.parametrize(("term", "arrays"), [("logits", [2]), ("features", [0, 1, 2])])
def test_the_loss_is_the_mean_squared_difference_of_what_is_seen(term, arrays):
    a, b = pair()
    x, y = np.asarray(a), np.asarray(b)
    expected = sum(np.mean((means(x)[i] - means(y)[i]) ** 2) for i in arrays)
    np.testing.assert_allclose(classifier_loss(means, term, a, b), expected, rtol=1e-5)
    assert classifier_loss(means, term, a, a) == 0


def test_what_is_seen_of_real_images_carries_no_gradient():
    a, b = pair()
    to_real, to_made = jax.grad(
        lambda a, b: classifier_loss(means, "features", a, b), argnums=(0, 1)
    )(a, b)
    assert not np.any(to_real) and np.all(to_made != 0)


@pytest.mark.parametrize("returned", [lambda x: x, lambda x: []])
def test_a_classifier_that_returns_no_list_is_refused(returned):
    with pytest.raises(InputError, match=r"classifier: it returns .*, not a list of arrays"):
        classifier_loss(returned, "logits", *pair())


# The network.


def test_resnet_lives_in_a_directory(tmp_path):
    resnet().save_pretrained(tmp_path / "resnet")
    again = ResNet.from_pretrained(tmp_path / "resnet")
    assert again.config == TINY
    last, logits = jax.jit(lambda m, x: m(x))(again, pair()[0])
    expected = jax.jit(lambda m, x: m(x))(resnet(), pair()[0])
    np.testing.assert_array_equal(last, expected[0])
    np.testing.assert_array_equal(logits, expected[1])
    assert last.shape == (2, 2, 2, 32) and logits.shape == (2, 5)


def test_weights_are_out_of_an_optimisers_sight():
    assert not jax.tree.leaves(nnx.state(resnet(), nnx.Param))
    convolutions = 1 + 3 * 3 + 2  # of the stem, three blocks, two shortcuts
    assert len(jax.tree.leaves(nnx.state(resnet(), Frozen))) == 5 * convolutions + 2


def test_batch_norm_is_the_one_of_inference():
    """By the definition, (x - mean) / sqrt(var + 1e-5) * scale + bias, after the convolution."""
    layer = resnet().stages[0][0].convs[0]  # 1x1
    x = np.random.default_rng(2).normal(size=(2, 3, 3, 4)).astype(np.float32)
    weights = {k: np.asarray(getattr(layer, k)[...]) for k in ("scale", "bias", "mean", "var")}
    y = x @ np.asarray(layer.kernel[...])[0, 0]
    y = (y - weights["mean"]) / np.sqrt(weights["var"] + 1e-5) * weights["scale"] + weights["bias"]
    np.testing.assert_allclose(layer(jnp.asarray(x)), y, atol=1e-5)


@pytest.mark.parametrize("side", [7, 8])
def test_maxima_over_slices_are_those_over_windows(side):
    x = jax.nn.relu(jax.random.normal(KEY, (2, side, side + 1, 3)))
    expected = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    np.testing.assert_array_equal(_max_pool(x), expected)


def test_images_are_resized_without_aliasing_or_taken_as_they_are():
    rows, _ = jnp.indices((64, 64))
    stripes = jnp.broadcast_to((1.0 - 2.0 * (rows % 2))[None, :, :, None], (1, 64, 64, 3))
    grey = jnp.zeros((1, 16, 16, 3))
    seen = jax.jit(lambda m, x: m(x)[-1])
    np.testing.assert_allclose(seen(resnet(), stripes), seen(resnet(), grey), atol=0.02)
    as_is = resnet(dataclasses.replace(TINY, resize=0))
    assert np.abs(seen(as_is, stripes) - seen(as_is, grey)).max() > 0.1
    np.testing.assert_allclose(seen(as_is, grey), seen(resnet(), grey), atol=1e-5)


def test_other_channels_are_refused():
    with pytest.raises(InputError, match="ResNet: images have 1 channels"):
        resnet()(pair(channels=1)[0])


# The import.


def published(model):
    """The tensors of a model by torchvision's names, with the counts that its files have too."""
    tensors = write(model, torch_table(model, _RULES))
    return tensors | {"bn1.num_batches_tracked": np.asarray(7)}


@pytest.mark.parametrize("bottleneck", [True, False])
def test_an_import_has_the_architecture_and_the_weights_of_the_file(bottleneck, tmp_path):
    config = dataclasses.replace(TINY, bottleneck=bottleneck, resize=224)
    tensors = published(resnet(config))
    last = "layer2.1.bn3.running_var" if bottleneck else "layer2.1.bn2.running_var"
    assert {"conv1.weight", "layer2.0.downsample.1.running_mean", "fc.bias", last} <= tensors.keys()
    assert ("layer1.0.downsample.0.weight" in tensors) == bottleneck
    save_file(tensors, tmp_path / "resnet.safetensors")
    imported = convert.convert(tmp_path / "resnet.safetensors", tmp_path / "model")
    assert imported.format == "resnet" and imported.model.config == config
    again = ResNet.from_pretrained(tmp_path / "model")
    for x, y in zip(*(jax.tree.leaves(nnx.state(m)) for m in (again, resnet(config))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = published(resnet())
    del tensors["layer2.1.bn2.bias"]
    tensors["layer2.1.se.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "resnet.safetensors")
    problems = r"layer2\.1\.bn2\.bias is missing; layer2\.1\.se\.weight is unexpected"
    with pytest.raises(InputError, match=problems):
        convert.load(tmp_path / "resnet.safetensors")


def test_grouped_and_wide_resnets_are_refused(tmp_path):
    tensors = published(resnet())
    tensors["layer1.0.conv2.weight"] = np.ones((8, 2, 3, 3), np.float32)
    save_file(tensors, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match="has 2 to 8 channels, not 4: a ResNeXt or a wide ResNet"):
        convert.load(tmp_path / "resnet.safetensors")


# Training.


def test_terms_of_the_loss_add_up():
    loss = LossConfig(
        reconstruction="l2",
        reconstruction_weight=4.0,
        perceptual_weight=0.5,
        classifier_weight=0.1,
        classifier_term="features",
    )
    networks = Perceptual(lpips=Distance(), classifier=means)
    total, terms = reconstruction_terms(*pair(), loss, networks)
    assert terms.keys() == {"l2", "lpips", "classifier"}
    expected = 4 * terms["l2"] + 0.5 * terms["lpips"] + 0.1 * terms["classifier"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(
        terms["classifier"], classifier_loss(means, "features", *pair()), rtol=1e-5
    )


class WithClassifier(Gradients):
    """The long way, with the new term among those of the reconstruction."""

    def nll(self, params):
        made = self.output(params).reconstruction
        term = classifier_loss(means, "logits", self.images, made)
        return super().nll(params) + self.loss.classifier_weight * term

    def weight(self):
        at_last = (
            jax.grad(f)(self.state.params)["decoder"]["conv_out"]["kernel"][...].ravel()
            for f in (self.nll, self.adversarial)
        )
        nll, gan = map(jnp.linalg.norm, at_last)
        return self.loss.adversarial_weight * nll / (gan + 1e-4)

    def judged(self, params):
        """VQGAN+'s loss of the discriminator: LeCam on the mean logits."""
        real = self.logits(params, self.images)
        made = self.logits(params, self.output(self.state.params).reconstruction)
        average_real, average_made = self.state.logit_means
        lecam = jax.nn.relu(real.mean() - average_made) ** 2
        lecam += jax.nn.relu(average_real - made.mean()) ** 2
        return discriminator_loss("hinge", real, made) + self.loss.lecam_weight * lecam


@pytest.mark.slow
def test_gradients_with_the_classifier_equal_the_long_way():
    loss = dataclasses.replace(
        CONFIG.loss, classifier_weight=5.0, lecam_weight=0.5, lecam_of="mean"
    )
    stage, init = setup(dataclasses.replace(CONFIG, loss=loss), GRADIENTS, GRADIENTS)
    state = dataclasses.replace(spread_codes(init()), logit_means=jnp.array([0.4, -0.3]))
    networks = Perceptual(classifier=jax.tree_util.Partial(means))
    new, metrics = jax.jit(functools.partial(step, stage))(state, batch(), KEY, networks)

    @jax.jit
    def expected(state, images):
        long_way = WithClassifier(stage, state, images, None)
        judged = jax.grad(long_way.judged)(state.disc_params)
        return *long_way.autoencoder(), long_way.weight(), judged

    total, grads, weight, disc_grads = expected(state, to_float(batch()["image"]))
    assert_trees_close(new.optim, grads)
    assert_trees_close(new.disc_optim, disc_grads)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-4)
    assert metrics["classifier"] > 0 and metrics["lecam"] > 0


@pytest.mark.parametrize(
    ("changes", "channels", "given", "message"),
    [
        ({"classifier_weight": 0.1}, 3, None, "classifier_weight 0.1: of which classifier"),
        ({"classifier": "models/r"}, 3, None, "loss.classifier models/r: .*weight is 0"),
        ({}, 3, means, "loss.classifier given: .*weight is 0"),
        (
            {"classifier": "models/r", "classifier_weight": 0.1},
            1,
            None,
            "loss.classifier models/r: sees images of 3 channels, and these have 1",
        ),
        ({"classifier": "./r", "classifier_weight": 0.1}, 3, None, r"\./r: no such model"),
    ],
)
def test_contradictions_are_refused(changes, channels, given, message):
    loss = LossConfig(perceptual_weight=0.0, **changes)
    with pytest.raises(InputError, match=message):
        perceptual_networks(loss, channels, given)


def test_the_network_is_the_named_one_or_the_given_one(tmp_path):
    resnet().save_pretrained(tmp_path / "resnet")
    named = {"classifier": str(tmp_path / "resnet"), "classifier_weight": 0.1}
    loss = LossConfig(perceptual_weight=0.0, **named)
    networks = perceptual_networks(loss, 3)
    assert networks.lpips is None and networks.classifier.config == TINY
    given = perceptual_networks(loss, 1, means).classifier
    np.testing.assert_array_equal(given(pair()[0])[-1], means(pair()[0])[-1])


@pytest.mark.parametrize("kind", ["module", "function"])
def test_the_networks_are_arguments_of_the_compiled_step(kind):
    networks = perceptual_networks(
        LossConfig(perceptual_weight=0.0, classifier_weight=0.1),
        3,
        resnet() if kind == "module" else means,
    )

    def one(state, images, *, perceptual):
        return state, classifier_loss(perceptual.classifier, "logits", *images)

    state = {"step": jnp.zeros(())}
    _, value = compiled(one, state, make_mesh(), perceptual=networks)(state, pair())
    expected = classifier_loss(networks.classifier, "logits", *pair())
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_nothing_is_left_of_a_run_whose_classifier_is_not_there(tmp_path):
    missing = str(tmp_path / "missing")
    loss = dataclasses.replace(CONFIG.loss, classifier=missing, classifier_weight=0.1)
    data = dataclasses.replace(CONFIG.data, source="emoji")
    config = dataclasses.replace(CONFIG, loss=loss, data=data)
    with pytest.raises(InputError, match="missing: no such"):
        train_tokenizer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
