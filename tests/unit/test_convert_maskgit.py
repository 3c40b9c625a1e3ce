"""MaskGIT's tokenizer out of both of its containers, which here hold the same weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict

from vqgan import convert
from vqgan.convert.containers import write_torch
from vqgan.errors import InputError
from vqgan.serialization import flat_weights
from vqgan.tokenizer.model import Tokenizer

WIDTHS, BLOCKS, LATENTS, CODES = (32, 64), 1, 4, 12


def port_tensors():
    """A state dict of the port, two levels and one residual block each."""
    rng = np.random.default_rng(0)
    tensors = {"quantize.embedding.weight": rng.normal(size=(CODES, LATENTS))}

    def conv(name, inputs, outputs, side, *, bias=True):
        tensors[f"{name}.weight"] = rng.normal(size=(outputs, inputs, side, side)) / (side * 6)
        if bias:
            tensors[f"{name}.bias"] = rng.normal(size=outputs) / 8

    def norm(name, channels):
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, channels)
        tensors[f"{name}.bias"] = rng.normal(size=channels) / 8

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3, bias=False)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3, bias=False)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", outputs, outputs, 1, bias=False)

    low, lowest = WIDTHS
    conv("encoder.conv_in", 3, low, 3, bias=False)
    block("encoder.down.0.block.0", low, low)
    block("encoder.down.1.block.0", low, lowest)
    block("encoder.mid.0", lowest, lowest)
    norm("encoder.norm_out", lowest)
    conv("encoder.conv_out", lowest, LATENTS, 1)
    conv("decoder.conv_in", LATENTS, lowest, 3)
    block("decoder.mid.0", lowest, lowest)
    block("decoder.up.1.block.0", lowest, lowest)
    conv("decoder.up.1.upsample_conv", lowest, lowest, 3)
    block("decoder.up.0.block.0", lowest, low)
    norm("decoder.norm_out", low)
    conv("decoder.conv_out", low, 3, 3)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


FLAX = {
    "encoder.down.0.block.0": "encoder.ResBlock_0",
    "encoder.down.1.block.0": "encoder.ResBlock_1",
    "encoder.mid.0": "encoder.ResBlock_2",
    "decoder.mid.0": "decoder.ResBlock_0",
    "decoder.up.1.block.0": "decoder.ResBlock_1",
    "decoder.up.0.block.0": "decoder.ResBlock_2",
    "encoder.conv_in": "encoder.Conv_0",
    "encoder.conv_out": "encoder.Conv_1",
    "decoder.conv_in": "decoder.Conv_0",
    "decoder.up.1.upsample_conv": "decoder.Conv_1",
    "decoder.conv_out": "decoder.Conv_2",
    "quantize.embedding.weight": "quantizer.codebook",
    "norm_out": "GroupNorm_0",
    "norm1": "GroupNorm_0",
    "norm2": "GroupNorm_1",
    "conv1": "Conv_0",
    "conv2": "Conv_1",
    "nin_shortcut": "Conv_2",
}


def flax_tensors():
    tensors = {}
    for name, value in port_tensors().items():
        for theirs, flax in FLAX.items():
            name = name.replace(theirs, flax)
        if value.ndim == 4:
            name, value = name.replace("weight", "kernel"), value.transpose(2, 3, 1, 0)
        tensors[f"params.{name.replace('weight', 'scale')}"] = np.ascontiguousarray(value)
    return tensors


def flax_file(folder, tensors):
    path = folder / "tokenizer_imagenet256_checkpoint"
    tree = unflatten_dict({tuple(name.split(".")): value for name, value in tensors.items()})
    path.write_bytes(msgpack_serialize(tree))
    return path


def port_file(folder, tensors, config=None):
    path = folder / "pytorch_model.bin"
    write_torch(path, tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return convert.load(flax_file(tmp_path_factory.mktemp("flax"), flax_tensors())).model


def test_both_containers_are_recognised_and_give_the_same_tokenizer(tokenizer, tmp_path):
    port = convert.load(port_file(tmp_path, port_tensors()))
    assert port.format == "maskgit"
    assert port.model.config == tokenizer.config
    ours, theirs = flat_weights(tokenizer), flat_weights(port.model)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    # As many values as in the file, and what the quantizer counts in training.
    counts = sum(value.size for name, value in ours.items() if "batches" in name)
    assert sum(v.size for v in ours.values()) - counts == sum(
        v.size for v in port_tensors().values()
    )


def test_an_imported_tokenizer_can_be_saved_loaded_and_used(tokenizer, tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)
    ids = tokenizer.encode(jnp.asarray(images))
    assert ids.shape == (1, 4, 6) and len(np.unique(ids)) > 3

    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert np.array_equal(again.encode(jnp.asarray(images)), ids)
    assert np.array_equal(again.decode(ids), tokenizer.decode(ids))


@pytest.mark.parametrize("write", [flax_file, port_file])
def test_all_tensors_that_do_not_fit_are_named_together(write, tmp_path):
    tensors = flax_tensors() if write is flax_file else port_tensors()
    missing = next(n for n in tensors if "decoder" in n and n.endswith("bias"))
    shaped = [n for n in tensors if "encoder" in n and n.endswith("bias")][-1]
    del tensors[missing]
    tensors[shaped] = np.zeros(7, np.float32)
    tensors["encoder.attention.bias"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as error:
        convert.load(write(tmp_path, tensors))
    text = str(error.value)
    assert "\n" not in text
    assert f"{missing.removeprefix('params.')} is missing" in text
    assert f"{shaped.removeprefix('params.')} has shape (7,)" in text
    assert "encoder.attention.bias is unexpected" in text


def with_strided_convolutions(tensors):
    tensors["params.encoder.Conv_2.kernel"] = np.zeros((4, 4, 32, 32), np.float32)


def with_layer_norms(tensors):
    for name in [name for name in tensors if "GroupNorm" in name]:
        tensors[name.replace("GroupNorm", "LayerNorm")] = tensors.pop(name)


def with_a_block_more(tensors):
    block = "params.encoder.ResBlock_{}.Conv_0.kernel"
    tensors[block.format(3)] = tensors[block.format(2)]


def without_its_first_convolution(tensors):
    del tensors["params.encoder.Conv_0.kernel"]


def with_a_flat_codebook(tensors):
    tensors["params.quantizer.codebook"] = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_strided_convolutions, "downsampling by 4x4 convolutions is not here"),
        (with_layer_norms, "other norms are not here"),
        (with_a_block_more, "4 residual blocks"),
        (without_its_first_convolution, "encoder.Conv_0.kernel is missing"),
        (with_a_flat_codebook, r"quantizer.codebook has shape \(8,\)"),
    ],
)
def test_other_architectures_are_refused(change, said, tmp_path):
    tensors = flax_tensors()
    change(tensors)
    with pytest.raises(InputError, match=said):
        convert.load(flax_file(tmp_path, tensors))


def test_another_file_under_this_name_is_refused(tmp_path):
    path = port_file(tmp_path, {"encoder.conv_in.weight": np.zeros((32, 3, 3, 3), np.float32)})
    with pytest.raises(InputError, match=r"encoder.down.0.block.0 is missing"):
        convert.load(path, format="maskgit")


CONFIG = {
    "_class_name": "MaskGitVQGAN",
    "_version": "0.0.1",
    "attn_resolutions": [16],
    "channel_mult": [1, 2],
    "commitment_cost": 0.5,
    "dropout": 0.1,
    "hidden_channels": 32,
    "num_channels": 3,
    "num_embeddings": CODES,
    "num_res_blocks": 1,
    "quantized_embed_dim": LATENTS,
    "resample_with_conv": True,
    "resolution": 64,
    "z_channels": LATENTS,
}


def test_the_published_config_says_what_no_shape_can(tokenizer, tmp_path):
    port_file(tmp_path, port_tensors(), CONFIG)
    imported = convert.load(tmp_path)  # the directory, as open-muse has it
    config = imported.model.config
    assert (config.autoencoder.resolution, config.autoencoder.dropout) == (64, 0.1)
    assert (config.quantizer.beta, imported.notes) == (0.5, ())
    assert tokenizer.config.autoencoder.resolution == 256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_res_blocks": 3, "num_embeddings": 9}, "num_res_blocks 3, not 1; num_embeddings 9"),
        ({"resolution": "large"}, "resolution"),
        ({"no_attn_mid_block": False}, "no_attn_mid_block"),
    ],
)
def test_a_config_of_another_model_is_refused(change, said, tmp_path):
    path = port_file(tmp_path, port_tensors(), CONFIG | change)
    with pytest.raises(InputError, match=said):
        convert.load(path)
