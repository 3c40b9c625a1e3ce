"""diffusers' directories in and out: nothing is lost, and what does not fit is said."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from vqgan import convert
from vqgan.adversarial.patchgan import PatchGAN, PatchGANConfig
from vqgan.convert.containers import write_torch
from vqgan.convert.exporting import Exported
from vqgan.convert.families import exporters
from vqgan.errors import InputError
from vqgan.serialization import flat_weights, with_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import IBQConfig, VQConfig

CONFIG = TokenizerConfig(
    autoencoder=AutoencoderConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        resolution=16,
        z_channels=6,
        norm_groups=4,
    ),
    quantizer=VQConfig(
        codebook_size=12, dim=3, beta_on="codebook", init_from_data=False, revive_after=0
    ),
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def abstract(config):
    return nnx.eval_shape(lambda: Tokenizer(config, rngs=nnx.Rngs(0)))


def random_tokenizer(config=CONFIG, seed=0):
    """Different values in every variable, so that no two can be taken for each other."""
    rng, empty = np.random.default_rng(seed), abstract(config)
    weights = {
        ".".join(map(str, path)): rng.normal(size=variable.shape)
        if isinstance(variable, nnx.Param)
        else np.zeros(variable.shape)
        for path, variable in nnx.to_flat_state(nnx.state(empty))
    }
    return with_weights(empty, weights, where="random")


@pytest.fixture(scope="module")
def tokenizer():
    return random_tokenizer()


@pytest.fixture
def published(tokenizer, tmp_path):
    convert.export(tokenizer, tmp_path / "vqvae", format="diffusers")
    return tmp_path / "vqvae"


def assert_same(a, b):
    a, b = flat_weights(a), flat_weights(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_there_and_back(tokenizer, published, tmp_path):
    imported = convert.convert(published, tmp_path / "ours")
    assert (imported.format, imported.notes, imported.model.config) == ("diffusers", (), CONFIG)
    ours = Tokenizer.from_pretrained(tmp_path / "ours")
    assert_same(ours, tokenizer)
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 16, 32, 3)), jnp.float32)
    np.testing.assert_array_equal(ours(x).reconstruction, tokenizer(x).reconstruction)
    convert.export(tmp_path / "ours", tmp_path / "again", format="diffusers")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (published / name).read_bytes()


def test_the_file_itself_is_enough_to_name(tokenizer, published):
    assert_same(convert.load(published / WEIGHTS).model, tokenizer)


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_attention(tokenizer, published, convolutions):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, value in load_file(published / WEIGHTS).items():
        for new, name_of_old in old.items():
            if new in name:
                name = name.replace(new, name_of_old)
                if convolutions and value.ndim == 2:
                    value = value[:, :, None, None]
        tensors[name] = value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    (published / WEIGHTS).unlink()
    write_torch(published / "diffusion_pytorch_model.bin", tensors)
    assert_same(convert.load(published).model, tokenizer)


def test_half_precision(tokenizer, published):
    tensors = load_file(published / WEIGHTS)
    save_file({n: v.astype(np.float16) for n, v in tensors.items()}, published / WEIGHTS)
    ours, full = flat_weights(convert.load(published).model), flat_weights(tokenizer)
    for name, value in full.items():
        np.testing.assert_array_equal(ours[name], value.astype(np.float16).astype(value.dtype))


def test_without_config_the_shapes_tell(tmp_path):
    autoencoder = dataclasses.replace(CONFIG.autoencoder, base_channels=32, norm_groups=32)
    config = dataclasses.replace(CONFIG, autoencoder=autoencoder)
    tokenizer = random_tokenizer(config)
    convert.export(tokenizer, tmp_path / "vqvae", format="diffusers")
    (tmp_path / "vqvae" / "config.json").unlink()
    imported = convert.load(tmp_path / "vqvae")
    assert any("resolution of 256" in note for note in imported.notes)
    expected = dataclasses.replace(autoencoder, resolution=256, attention_resolutions=(128,))
    assert imported.model.config.autoencoder == expected
    assert_same(imported.model, tokenizer)


@pytest.mark.parametrize("sample_size", [5, 7, 8, 300])
def test_attention_sits_by_block_whatever_the_sample_size(tokenizer, published, sample_size):
    edit(published, sample_size=sample_size)
    imported = convert.load(published)
    config = imported.model.config.autoencoder
    assert [config.attends(level) for level in (0, 1)] == [False, True]
    assert config.resolution == sample_size + sample_size % 2
    assert bool(imported.notes) == bool(sample_size % 2)
    assert_same(imported.model, tokenizer)


def test_absent_entries_have_the_published_defaults(tmp_path):
    autoencoder = AutoencoderConfig(
        base_channels=64,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=32,
        z_channels=3,
    )
    quantizer = dataclasses.replace(CONFIG.quantizer, codebook_size=256)
    config = TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)
    convert.export(random_tokenizer(config), tmp_path / "vqvae", format="diffusers")
    (tmp_path / "vqvae" / "config.json").write_text('{"_class_name": "VQModel"}')
    assert convert.load(tmp_path / "vqvae").model.config == config


def test_scaling_of_latents_is_noted(published):
    edit(published, scaling_factor=1)
    assert any("scaling_factor 1.0" in note for note in convert.load(published).notes)


def test_all_tensors_that_do_not_fit_are_named(published):
    tensors = load_file(published / WEIGHTS)
    del tensors["encoder.conv_norm_out.bias"]
    tensors["decoder.up_blocks.0.attentions.1.to_q.weight"] = np.ones((3, 3), np.float32)
    tensors["logit_scale"] = np.ones((), np.float32)
    save_file(tensors, published / WEIGHTS)
    with pytest.raises(InputError) as error:
        convert.load(published)
    message = str(error.value)
    assert "\n" not in message and str(published) in message
    assert "encoder.conv_norm_out.bias is missing" in message
    assert "logit_scale is unexpected" in message
    assert "up_blocks.0.attentions.1.to_q.weight has shape (3, 3), not (16, 16)" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": "relu"}, ["act_fn 'relu'"]),
        ({"norm_type": "spatial"}, ["norm_type 'spatial'", "MoVQ"]),
        ({"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]}, ["DownBlock2D"]),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, ["attention at other levels"]),
        ({"up_block_types": ["UpDecoderBlock2D"]}, ["differ in length"]),
        ({"block_out_channels": [8, 12]}, ["[8, 12]", "multiples"]),
        ({"block_out_channels": []}, ["length"]),
        ({"block_out_channels": [0, 8]}, ["multiples"]),
        ({"_class_name": "AutoencoderKL"}, ["AutoencoderKL", "only VQModel"]),
        ({"norm_num_groups": 3}, ["norm_num_groups 3", "[8, 16]"]),
        ({"latent_channels": 0, "sample_size": -1}, ["latent_channels 0", "sample_size -1"]),
        ({"double_z": True, "layers_per_block": "1"}, ["double_z", "layers_per_block"]),
        ({"act_fn": "gelu", "norm_type": "spatial"}, ["gelu", "spatial"]),  # at once
    ],
)
def test_configs_that_are_not_here(published, changes, words):
    edit(published, **changes)
    with pytest.raises(InputError) as error:
        convert.load(published)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_movq_is_known_by_its_tensors_too(published):
    (published / "config.json").unlink()
    tensors = load_file(published / WEIGHTS)
    tensors["decoder.conv_norm_out.conv_y.weight"] = np.ones((8, 3, 1, 1), np.float32)
    save_file(tensors, published / WEIGHTS)
    with pytest.raises(InputError, match="MoVQ"):
        convert.load(published)


@pytest.mark.parametrize("name", ["encoder.conv_out.weight", "quantize.embedding.weight"])
def test_shapes_that_tell_nothing(published, name):
    (published / "config.json").unlink()
    save_file(load_file(published / WEIGHTS) | {name: np.ones(3, np.float32)}, published / WEIGHTS)
    with pytest.raises(InputError, match=rf"{name} has shape \(3,\), not one of . numbers"):
        convert.load(published)


# The way back.


def in_autoencoder(**changes):
    autoencoder = dataclasses.replace(CONFIG.autoencoder, **changes)
    return dataclasses.replace(CONFIG, autoencoder=autoencoder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (in_autoencoder(downsample="average", upsample="nearest"), ["downsample", "upsample"]),
        (in_autoencoder(block_bias=False, output="tanh"), ["block_bias", "output"]),
        (in_autoencoder(pixel_range="unit"), ["pixel_range"]),
        (in_autoencoder(decoder_extra_blocks=0), ["decoder_extra_blocks"]),
        (in_autoencoder(channel_multipliers=(2, 1)), ["channel_multipliers [2, 1]"]),
        (
            dataclasses.replace(CONFIG, quantizer=IBQConfig(codebook_size=12, dim=3)),
            ["quantizer.kind 'ibq'"],
        ),
        (
            dataclasses.replace(
                CONFIG, quantizer=dataclasses.replace(CONFIG.quantizer, normalize=True)
            ),
            ["quantizer.normalize"],
        ),
    ],
)
def test_what_the_format_cannot_say_is_not_written(config, words, tmp_path):
    with pytest.raises(InputError) as error:
        convert.export(abstract(config), tmp_path / "out", format="diffusers")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not any(tmp_path.iterdir())


def test_what_else_is_there_stays(tokenizer, published, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    for place in ("thesis", "thesis/chapter.txt"):
        with pytest.raises(InputError, match="is there and is no diffusers model"):
            convert.export(tokenizer, tmp_path / place, format="diffusers")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "words"
    before = (published / WEIGHTS).read_bytes()
    convert.export(random_tokenizer(seed=1), published, format="diffusers")
    assert (published / WEIGHTS).read_bytes() != before  # one of its kind is replaced


def test_what_is_left_out_is_noted(tmp_path):
    quantizer = dataclasses.replace(CONFIG.quantizer, beta_on="commitment")
    config = dataclasses.replace(in_autoencoder(dropout=0.1), quantizer=quantizer)
    judge = PatchGAN(PatchGANConfig(base_channels=4, num_layers=1), rngs=nnx.Rngs(0))
    exported = Exported(tokenizer=random_tokenizer(config), parts={"discriminator": judge})
    save = exporters()["diffusers"].save
    assert save is not None
    notes = save(exported, tmp_path / "out")
    assert len(notes) == 3
    for note, word in zip(notes, ["beta", "dropout", "discriminator"], strict=True):
        assert word in note
