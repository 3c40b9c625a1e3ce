"""The tokenizer's contract, and its blocks against what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqgan.errors import InputError
from vqgan.serialization import flat_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.blocks import AttentionBlock, Upsample, downsample
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig


def small(**changes):
    fields = dict(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        resolution=16,
        z_channels=8,
        norm_groups=4,
    )
    return TokenizerConfig(
        autoencoder=AutoencoderConfig(**(fields | changes)),
        quantizer=VQConfig(codebook_size=16, dim=4),
    )


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(small(), rngs=nnx.Rngs(0))
    # Latents for codes, as initialising from data does it: several are in use.
    tokenizer.quantizer.codebook[...] = tokenizer.latents(images(seed=1)).reshape(-1, 4)[::8]
    return tokenizer


def images(h=16, w=16, c=3, seed=0):
    return jax.random.uniform(jax.random.key(seed), (2, h, w, c), minval=-1.0)


@pytest.mark.parametrize("size", [(16, 16), (10, 24)])  # and one that is not square
def test_decoded_ids_are_the_reconstruction(tokenizer, size):
    x = images(*size)
    out = tokenizer(x)
    ids = tokenizer.encode(x)
    assert ids.shape == (2, size[0] // 2, size[1] // 2) and len(np.unique(ids)) > 3
    np.testing.assert_array_equal(ids, out.ids)
    np.testing.assert_allclose(tokenizer.decode(ids), out.reconstruction, rtol=1e-5, atol=1e-5)
    assert out.reconstruction.shape == x.shape


def test_works_under_the_callers_jit(tokenizer):
    x = images()
    inside = jax.jit(lambda t, x: t.decode(t.encode(x)))(tokenizer, x)
    np.testing.assert_allclose(inside, tokenizer(x).reconstruction, rtol=1e-5, atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other(tokenizer):
    x = images()
    changed = x.at[1].set(0.0)
    np.testing.assert_allclose(tokenizer(x).z[0], tokenizer(changed).z[0], rtol=1e-4, atol=1e-5)


def test_gradient_of_the_reconstruction_reaches_the_encoder(tokenizer):
    graphdef, params, rest = nnx.split(tokenizer, nnx.Param, ...)
    x = images()
    grads = jax.grad(lambda p: jnp.abs(nnx.merge(graphdef, p, rest)(x).reconstruction - x).mean())(
        params
    )
    for layer in (
        grads["encoder"]["conv_in"],
        grads["quant_conv"],
        grads["post_quant_conv"],
        grads["decoder"]["conv_in"],
    ):
        assert np.abs(layer["kernel"][...]).max() > 0
    assert not np.any(grads["quantizer"]["codebook"][...])


def test_dropout_needs_a_key():
    tokenizer = Tokenizer(small(dropout=0.5), rngs=nnx.Rngs(0))
    x = images()
    plain = tokenizer.latents(x)
    np.testing.assert_array_equal(plain, tokenizer.latents(x))
    first, second = (tokenizer.latents(x, jax.random.key(i)) for i in range(2))
    assert np.abs(first - second).max() > 1e-3 < np.abs(first - plain).max()


def test_saved_and_loaded_bit_for_bit(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config == tokenizer.config
    before, after = flat_weights(tokenizer), flat_weights(loaded)
    assert before.keys() == after.keys() and "quantizer.codebook" in before
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype and weight.tobytes() == after[name].tobytes()
    np.testing.assert_array_equal(loaded.encode(images()), tokenizer.encode(images()))


@pytest.mark.parametrize(
    ("h", "w", "c", "word"),
    [(15, 16, 3, "multiples of 2"), (16, 15, 3, "16x15"), (16, 16, 1, "1 channels")],
)
def test_images_that_do_not_fit(tokenizer, h, w, c, word):
    with pytest.raises(InputError, match=word):
        tokenizer.encode(images(h, w, c))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attention_resolutions": (5,)}, "at no level"),
        ({"resolution": 15, "attention_resolutions": ()}, "not a multiple of 2"),
        ({"norm_groups": 3}, "do not divide into 3 groups"),
    ],
)
def test_configs_that_contradict_themselves(changes, word):
    with pytest.raises(InputError, match=word):
        Tokenizer(small(**changes), rngs=nnx.Rngs(0))


def test_channels_in_and_out_are_free():
    tokenizer = Tokenizer(small(in_channels=1, out_channels=5), rngs=nnx.Rngs(0))
    assert tokenizer(images(c=1)).reconstruction.shape == (2, 16, 16, 5)


# Blocks.


def test_attention_is_where_the_config_says():
    config = small(channel_multipliers=(1, 1, 2), attention_resolutions=(16, 4), num_res_blocks=2)
    tokenizer = nnx.eval_shape(lambda: Tokenizer(config, rngs=nnx.Rngs(0)))
    assert [len(stage.attentions) for stage in tokenizer.encoder.stages] == [2, 0, 2]
    # The decoder runs upwards, and has a block more a level.
    assert [len(stage.attentions) for stage in tokenizer.decoder.stages] == [3, 0, 3]


def test_upsample_is_nearest_neighbour_then_convolution():
    upsample = Upsample(4, dtype="float32", rngs=nnx.Rngs(0))
    upsample.conv.bias[...] = jnp.arange(4.0)
    x = images(3, 5, 4)
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(upsample(x), upsample.conv(doubled), rtol=1e-4, atol=1e-5)


def test_downsample_pads_at_the_far_ends_only():
    layer = downsample(4, dtype="float32", rngs=nnx.Rngs(0))
    kernel, x = np.asarray(layer.kernel[...]), np.asarray(images(4, 6, 4))
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = np.zeros((2, 2, 3, 4))
    for i in range(2):
        for j in range(3):
            patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[:, i, j] = np.einsum("bhwc,hwcd->bd", patch, kernel)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_numpy_and_does_not_know_positions():
    block = AttentionBlock(8, groups=4, dtype="float32", rngs=nnx.Rngs(0))
    x = images(3, 4, 8)
    y = block.norm(x)
    q, k, v = (np.asarray(layer(y)).reshape(2, 12, 8) for layer in (block.q, block.k, block.v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = x + block.proj_out(jnp.asarray(weights @ v).reshape(x.shape))
    np.testing.assert_allclose(block(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(block(x[:, ::-1]), block(x)[:, ::-1], rtol=1e-4, atol=1e-5)
