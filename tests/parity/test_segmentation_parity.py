"""The loss of label maps, and how depths are normalised, against taming-transformers."""

import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from reference import import_taming, import_torch

from vqgan.adversarial.losses import pixel_loss
from vqgan.data.maps import read_depth

pytestmark = pytest.mark.parity

CLASSES = 7


def maps(seed=0):
    """Logits, from small to far out, and one-hot labels, `[b, h, w, c]`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 8, 12, CLASSES)) * rng.choice([0.1, 3.0, 60.0], (2, 8, 12, 1))
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, (2, 8, 12))]
    return logits.astype(np.float32), labels


def nchw(x):
    return import_torch().from_numpy(x.transpose(0, 3, 1, 2).copy())


def test_the_loss_of_label_maps_and_its_gradient():
    torch = import_torch()
    loss = import_taming("modules.losses.segmentation").BCELossWithQuant(codebook_weight=0.7)
    logits, labels = maps()
    x, qloss = nchw(logits).requires_grad_(), torch.tensor(0.3)
    total, log = loss(qloss, nchw(labels), x, "train")
    total.backward()
    ours, gradient = jax.value_and_grad(lambda y: pixel_loss("bce", jnp.asarray(labels), y))(
        jnp.asarray(logits)
    )
    np.testing.assert_allclose(ours, log["train/bce_loss"], rtol=1e-6)
    np.testing.assert_allclose(ours + 0.7 * 0.3, total.detach(), rtol=1e-6)
    expected = x.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9)


def test_weights_of_classes_are_those_of_torch():
    torch = import_torch()
    logits, labels = maps(1)
    weights = (0.0, 1.0, 2.5, 1.0, 0.1, 7.0, 1.0)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        nchw(logits), nchw(labels), weight=torch.tensor(weights)[None, :, None, None]
    )
    ours = pixel_loss("bce", jnp.asarray(labels), jnp.asarray(logits), weights)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_depths_are_normalised_alike(tmp_path):
    unused = {"albumentations": types.ModuleType("albumentations")}  # for its images only
    with mock.patch.dict(sys.modules, unused):
        dataset = import_taming("data.imagenet")
    depths = np.random.default_rng(0).gamma(2.0, size=(9, 11)).astype("<f4")
    Image.fromarray(depths.view(np.uint8).reshape(9, 11, 4)).save(tmp_path / "a.png")
    expected = dataset.BaseWithDepth.preprocess_depth(None, tmp_path / "a.png")
    np.testing.assert_allclose(read_depth(tmp_path / "a.png")[..., 0], expected, atol=1e-6)
