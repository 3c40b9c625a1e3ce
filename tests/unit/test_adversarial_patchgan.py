import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqgan.adversarial.patchgan import BatchNorm, PatchGAN, PatchGANConfig
from vqgan.errors import InputError
from vqgan.nn import conv_general_dilated


def _patchgan(num_layers: int = 3, base_channels: int = 4) -> PatchGAN:
    config = PatchGANConfig(base_channels=base_channels, num_layers=num_layers)
    return PatchGAN(config, rngs=nnx.Rngs(0))


def _images(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_exactly_its_patch(num_layers, field):
    model = _patchgan(num_layers)
    side = 2 * field // 8 * 8

    def middle_logit(x):
        logits = model(x, train=False)
        return logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]

    seen = np.abs(jax.jit(jax.grad(middle_logit))(_images(1, side, side, 3))).sum((0, 3)) > 0
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert rows.max() - rows.min() + 1 == field
    assert columns.max() - columns.min() + 1 == field


def test_widths_and_size_are_the_published_ones():
    model = _patchgan(base_channels=64)
    assert [c.kernel.shape[2:] for c in model.convs] == [
        (3, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 1),
    ]
    assert [c.bias is not None for c in model.convs] == [True, False, False, False, True]
    assert jax.eval_shape(lambda x: model(x, train=False), _images(1, 256, 256, 3)).shape == (
        1,
        30,
        30,
        1,
    )


def test_widths_stop_growing_at_eight_times_the_base():
    assert [c.kernel.shape[3] for c in _patchgan(5).convs] == [4, 8, 16, 32, 32, 32, 1]


def test_batch_norm_normalises_and_moves_its_statistics_as_torch_does():
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(2.0, 3.0, (2, 3, 5, 3)).astype(np.float32)
    y = norm(jnp.asarray(x), train=True)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)
    unbiased = x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * unbiased, rtol=1e-5)
    before = np.asarray(norm.mean[...])
    evaluated = norm(jnp.asarray(x), train=False)
    expected = (x - before) / np.sqrt(np.asarray(norm.var[...]) + 1e-5)
    np.testing.assert_allclose(evaluated, expected * np.asarray(norm.scale[...]), atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], before)


def test_running_statistics_move_through_a_compiled_split_and_merge():
    graphdef, params, stats = nnx.split(_patchgan(1), nnx.Param, ...)

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            value = model(x, train=True).mean()
            return value, nnx.split(model, nnx.Param, ...)[2]

        return jax.grad(loss, has_aux=True)(params)

    grads, moved = step(params, stats, _images(2, 8, 8, 3))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert all(
        not np.allclose(a, b)
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(moved), strict=True)
    )


def test_initial_weights_follow_pix2pix():
    model = _patchgan(base_channels=64)
    kernel, scale = np.asarray(model.convs[3].kernel[...]), np.asarray(model.norms[-1].scale[...])
    assert abs(kernel.mean()) < 1e-4 and abs(kernel.std() - 0.02) < 1e-4
    assert abs(scale.mean() - 1) < 5e-3 and abs(scale.std() - 0.02) < 3e-3
    assert all(not np.any(n.bias[...]) for n in model.norms)


def test_smallest_image_gives_one_logit_and_a_smaller_one_an_error():
    model = _patchgan(2)
    assert model(_images(1, 12, 12, 3), train=True).shape == (1, 1, 1, 1)
    with pytest.raises(InputError, match="at least 12x12"):
        model(_images(1, 11, 40, 3), train=True)


def test_channels_that_differ_are_named():
    with pytest.raises(InputError, match=r"1 channels.*in_channels=3"):
        _patchgan(1)(_images(1, 8, 8, 1), train=False)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1)), ((0, 2), (1, 1))])
def test_convolution_of_small_maps_equals_the_ordinary_one(side, stride, padding):
    x = _images(2, side, side + 1, 3)
    kernel = _images(3, 3, 3, 2, seed=1)

    def value(convolve, x, kernel):
        y = convolve(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    ours, theirs = (
        jax.value_and_grad(lambda *a, f=f: value(f, *a), argnums=(0, 1), has_aux=True)(x, kernel)
        for f in (conv_general_dilated, jax.lax.conv_general_dilated)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_convolution_is_left_whose_kernel_exceeds_the_map():
    model = _patchgan(3)
    forward = str(jax.make_jaxpr(lambda x: model(x, train=False))(_images(1, 32, 32, 3)))
    # Of five layers, maps of 4x4 -> 3x3 and 3x3 -> 2x2 are the last two.
    assert forward.count("conv_general_dilated[") == 3
    assert forward.count("dot_general[") == 2
