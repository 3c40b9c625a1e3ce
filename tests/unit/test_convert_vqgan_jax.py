"""vqgan-jax's msgpack files in: nothing is lost, and what does not fit is said."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util

from vqgan import convert
from vqgan.errors import InputError
from vqgan.serialization import flat_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer
from vqgan.tokenizer.quantizers import VQConfig

CONFIG = {
    "architectures": ["del"],
    "attn_resolutions": [8],
    "ch": 32,
    "ch_mult": [1, 2],
    "double_z": False,
    "dropout": 0.0,
    "embed_dim": 3,
    "give_pre_end": False,
    "in_channels": 3,
    "n_embed": 12,
    "num_res_blocks": 1,
    "num_resolutions": 2,
    "out_ch": 3,
    "resamp_with_conv": True,
    "resolution": 16,
    "transformers_version": "4.13.0.dev0",
    "z_channels": 6,
}


def published_tensors():
    """Random tensors by the paths that `CONFIG` has, written down independently of the importer."""
    rng, flat = np.random.default_rng(0), {}

    def put(path, *shape):
        flat[path] = rng.normal(size=shape).astype(np.float32)

    def conv(path, size, inputs, outputs):
        put(f"{path}/kernel", size, size, inputs, outputs)
        put(f"{path}/bias", outputs)

    def norm(path, channels):
        put(f"{path}/scale", channels)
        put(f"{path}/bias", channels)

    def block(path, inputs, outputs):
        norm(f"{path}/norm1", inputs)
        conv(f"{path}/conv1", 3, inputs, outputs)
        norm(f"{path}/norm2", outputs)
        conv(f"{path}/conv2", 3, outputs, outputs)
        if inputs != outputs:
            conv(f"{path}/nin_shortcut", 1, inputs, outputs)

    def attention(path, channels):
        norm(f"{path}/norm", channels)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{path}/{layer}", 1, channels, channels)

    def middle(path):
        block(f"{path}/block_1", 64, 64)
        attention(f"{path}/attn_1", 64)
        block(f"{path}/block_2", 64, 64)

    conv("encoder/conv_in", 3, 3, 32)
    block("encoder/down_0/block_0", 32, 32)
    conv("encoder/down_0/downsample/conv", 3, 32, 32)
    block("encoder/down_1/block_0", 32, 64)
    attention("encoder/down_1/attn_0", 64)
    middle("encoder/mid")
    norm("encoder/norm_out", 64)
    conv("encoder/conv_out", 3, 64, 6)
    conv("quant_conv", 1, 6, 3)
    put("quantize/embedding/embedding", 12, 3)
    conv("post_quant_conv", 1, 3, 6)
    conv("decoder/conv_in", 3, 6, 64)
    middle("decoder/mid")
    for i in (0, 1):
        block(f"decoder/up_1/block_{i}", 64, 64)
        attention(f"decoder/up_1/attn_{i}", 64)
    conv("decoder/up_1/upsample/conv", 3, 64, 64)
    block("decoder/up_0/block_0", 64, 32)
    block("decoder/up_0/block_1", 32, 32)
    norm("decoder/norm_out", 32)
    conv("decoder/conv_out", 3, 32, 3)
    return flat


def saved(folder, flat, config=CONFIG):
    tree = traverse_util.unflatten_dict({tuple(name.split("/")): flat[name] for name in flat})
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def flat():
    return published_tensors()


def assert_same(tokenizer, flat):
    """Every published tensor is in the model, in the shape it had; and nothing else is."""
    ours = {name: v for name, v in flat_weights(tokenizer).items() if ".batches_" not in name}
    assert sorted(v.tobytes() for v in ours.values()) == sorted(v.tobytes() for v in flat.values())
    pairs = {
        "encoder.conv_in.kernel": "encoder/conv_in/kernel",
        "encoder.stages.1.attentions.0.k.bias": "encoder/down_1/attn_0/k/bias",
        "encoder.downsamples.0.kernel": "encoder/down_0/downsample/conv/kernel",
        "decoder.stages.0.blocks.1.norm2.scale": "decoder/up_1/block_1/norm2/scale",
        "decoder.stages.1.blocks.0.shortcut.kernel": "decoder/up_0/block_0/nin_shortcut/kernel",
        "decoder.upsamples.0.conv.bias": "decoder/up_1/upsample/conv/bias",
        "decoder.middle.blocks.1.conv1.kernel": "decoder/mid/block_2/conv1/kernel",
        "quantizer.codebook": "quantize/embedding/embedding",
    }
    for name, theirs in pairs.items():
        np.testing.assert_array_equal(ours[name], flat[theirs], err_msg=name)


def test_import(flat, tmp_path):
    imported = convert.convert(saved(tmp_path, flat), tmp_path / "ours")
    assert (imported.format, imported.notes) == ("vqgan-jax", ())
    tokenizer = Tokenizer.from_pretrained(tmp_path / "ours")
    assert_same(tokenizer, flat)
    assert tokenizer.config.autoencoder == AutoencoderConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        resolution=16,
        z_channels=6,
    )
    assert tokenizer.config.quantizer == VQConfig(
        codebook_size=12, dim=3, beta_on="codebook", init_from_data=False, revive_after=0
    )
    ids = jnp.arange(12, dtype=jnp.int32).reshape(1, 3, 4)
    assert np.isfinite(tokenizer.decode(ids)).all()


def test_norms_of_before_flax_0_3_6(flat, tmp_path):
    old = {n: v[None, None, None] if "/norm" in n else v for n, v in flat.items()}
    assert_same(convert.load(saved(tmp_path, old)).model, flat)


def test_below_params(flat, tmp_path):
    wrapped = {f"params/{name}": value for name, value in flat.items()}
    assert_same(convert.load(saved(tmp_path, wrapped)).model, flat)


def test_without_config_the_shapes_tell(flat, tmp_path):
    (saved(tmp_path, flat) / "config.json").unlink()
    imported = convert.load(tmp_path)
    assert any("no config" in note and "256" in note for note in imported.notes)
    config = imported.model.config.autoencoder
    assert config.channel_multipliers == (1, 2) and config.attention_resolutions == (128,)
    assert_same(imported.model, flat)


def test_all_tensors_that_do_not_fit_are_named(flat, tmp_path):
    wrong = flat | {"decoder/up_1/attn_0/q/kernel": np.ones((1, 1, 3, 3), np.float32)}
    wrong["encoder/temb_proj/kernel"] = np.ones(3, np.float32)
    del wrong["encoder/norm_out/scale"]
    with pytest.raises(InputError) as error:
        convert.load(saved(tmp_path, wrong))
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message
    assert "encoder.norm_out.scale is missing" in message
    assert "encoder.temb_proj.kernel is unexpected" in message
    assert "decoder.up_1.attn_0.q.kernel has shape (1, 1, 3, 3), not (1, 1, 64, 64)" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"double_z": True}, ["double_z"]),
        ({"give_pre_end": True}, ["give_pre_end"]),
        ({"use_ema": True, "quantizer": "gumbel"}, ["use_ema", "quantizer"]),
        ({"ch": "32"}, ["ch", "'32' is not of type int"]),
        ({"ch_mult": 2}, ["ch_mult"]),
    ],
)
def test_configs_that_are_not_here(flat, changes, words, tmp_path):
    with pytest.raises(InputError) as error:
        convert.load(saved(tmp_path, flat, CONFIG | changes))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_file_without_a_codebook(flat, tmp_path):
    rest = {name: value for name, value in flat.items() if "quantize" not in name}
    (saved(tmp_path, rest) / "config.json").unlink()
    with pytest.raises(InputError, match="no format known here"):
        convert.load(tmp_path)
    with pytest.raises(InputError, match=r"quantize\.embedding\.embedding"):
        convert.load(tmp_path, format="vqgan-jax")
