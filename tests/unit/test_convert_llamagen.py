"""LlamaGen's files: what is read, what is refused and what is assumed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vqgan.convert
from vqgan.adversarial.patchgan import PatchGAN, PatchGANConfig
from vqgan.convert import llamagen, table
from vqgan.convert.containers import Checkpoint, LazyTensor, write_torch
from vqgan.convert.source import Source
from vqgan.convert.taming import abstract, discriminator_table
from vqgan.errors import InputError
from vqgan.prior.transformer import Prior
from vqgan.serialization import flat_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig

TOKENIZER = TokenizerConfig(
    autoencoder=AutoencoderConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(128,),
        z_channels=8,
    ),
    quantizer=VQConfig(
        codebook_size=12, dim=4, normalize=True, init_from_data=False, revive_after=0
    ),
)
WIDTH, CLASSES, CODES = 16, 3, 20


def prior_tensors(depth=2, width=WIDTH, hidden=256, rows=CLASSES + 1):
    rng = np.random.default_rng(0)
    shapes = {
        "cls_embedding.embedding_table.weight": (rows, width),
        "tok_embeddings.weight": (CODES, width),
        "norm.weight": (width,),
        "output.weight": (CODES, width),
    }
    for i in range(depth):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (hidden, width),
            f"layers.{i}.feed_forward.w3.weight": (hidden, width),
            f"layers.{i}.feed_forward.w2.weight": (width, hidden),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tokenizers():
    """Two sets of random published tensors, with the buffer that is beside them."""
    rng, tensors = np.random.default_rng(1), {}
    entries = llamagen.tokenizer_table(TOKENIZER)
    for path, variable in nnx.to_flat_state(nnx.state(abstract(TOKENIZER))):
        entry = entries.get(".".join(map(str, path)))
        if entry is not None:
            value = rng.normal(size=variable.shape, scale=0.1).astype(np.float32)
            tensors[entry.theirs[0]] = entry.layout.to_theirs(value)
    tensors["quantize.codebook_used"] = np.zeros(65536, np.float32)
    return tensors, {name: value + np.float32(0.01) for name, value in tensors.items()}


def save(path, content, config=None):
    write_torch(path, content)
    if config is not None:
        path.with_suffix(".json").write_text(json.dumps(config))
    return path


def told(**options):
    """A config of the smallest prior, which is of no published size."""
    return {"n_head": 2, "block_size": 9} | options


def test_a_training_file_becomes_a_model_directory(tmp_path, tokenizers):
    config = PatchGANConfig(base_channels=4, num_layers=1)
    judge = PatchGAN(config, rngs=nnx.Rngs(2))
    raw, averaged = tokenizers
    adam = {"state": {"0": {"exp_avg": np.ones(3, np.float32)}}}
    content = {
        "model": raw,
        "optimizer": adam,
        "discriminator": table.write(judge, discriminator_table(config)),
        "optimizer_disc": adam,
        "steps": 5,
        "args": {"commit_loss_beta": 0.5, "image_size": 512, "lr": 1e-4, "codebook_size": 12},
        "ema": averaged,
    }
    path = save(tmp_path / "0000005.pt", content)
    imported = vqgan.convert.convert(path, tmp_path / "model")
    assert imported.format == "llamagen"
    model = Tokenizer.from_pretrained(tmp_path / "model")
    assert model.config.quantizer.beta == 0.5
    assert model.config.autoencoder.resolution == 512
    assert model.config.autoencoder.attention_resolutions == (256,)
    written = table.write(model, llamagen.tokenizer_table(model.config))
    for name, value in written.items():
        assert np.array_equal(value, averaged[name]), name
    kept = PatchGAN.from_pretrained(tmp_path / "model" / "discriminator")
    for name, value in flat_weights(judge).items():
        assert np.array_equal(flat_weights(kept)[name], value), name
    x = jax.random.uniform(jax.random.key(0), (1, 8, 12, 3), minval=-1)
    codes = model.quantizer.codes(model.encode(x))
    np.testing.assert_allclose(jnp.linalg.norm(codes, axis=-1), 1.0, atol=1e-5)
    other = vqgan.convert.load(path, weights="raw").model
    assert np.array_equal(other.quantizer.codebook[...], raw["quantize.embedding.weight"])


def test_a_discriminator_of_another_kind_is_left_with_a_note(tmp_path, tokenizers):
    other = {"blocks.0.conv_res.weight": np.zeros((8, 3, 1, 1), np.float32)}
    path = save(tmp_path / "a.pt", {"model": tokenizers[0], "discriminator": other})
    imported = vqgan.convert.load(path)
    assert not imported.parts
    assert any("no PatchGAN" in note and "1 tensors" in note for note in imported.notes)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"encoder_ch_mult": [1, 1]}, "encoder_ch_mult"),
        ({"codebook_size": 16384}, "codebook_size is 16384, but 12"),
        ({"codebook_l2": True}, "codebook_l2"),
    ],
)
def test_a_tokenizers_config_that_does_not_fit_is_refused(tmp_path, tokenizers, option, named):
    path = save(tmp_path / "vq.pt", {"model": tokenizers[0]}, option)
    with pytest.raises(InputError, match=named):
        vqgan.convert.load(path)


def test_a_config_turns_the_normalisation_off(tmp_path, tokenizers):
    path = save(tmp_path / "vq.pt", {"model": tokenizers[0]}, {"codebook_l2_norm": False})
    assert not vqgan.convert.load(path).model.config.quantizer.normalize


def test_a_prior_becomes_a_model_directory(tmp_path):
    tensors = prior_tensors()
    idle = {
        "freqs_cis": np.zeros((10, 4, 2), np.float32),
        "layers.0.attention.kv_cache.k_cache": np.zeros(3, np.float32),
    }
    path = save(tmp_path / "consolidated.pth", tensors | idle, told())
    assert not vqgan.convert.convert(path, tmp_path / "model").notes
    prior = Prior.from_pretrained(tmp_path / "model")
    config = prior.config
    assert (config.grid, config.heads, config.num_classes) == ((3, 3), 2, CLASSES)
    assert config.class_slot_rotation == "zero"
    block = prior.blocks[1]
    fused = np.concatenate(
        [layer.kernel[...].T for layer in (block.attention.query, block.attention.key)]
    )
    assert np.array_equal(fused, tensors["layers.1.attention.wqkv.weight"][: 2 * WIDTH])
    for i, name in enumerate(("w1", "w3")):
        value = tensors[f"layers.1.feed_forward.{name}.weight"]
        assert np.array_equal(block.mlp.gate_up.kernel[:, i], value.T)
    ids = prior.sample(jnp.arange(2), rng=jax.random.key(0), grid=(2, 3), guidance=2.0)
    assert ids.shape == (2, 2, 3)


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_all_that_does_not_fit_is_named_at_once(tmp_path, tokenizers, kind):
    if kind == "tokenizer":
        tensors, missing, bent = dict(tokenizers[0]), "decoder.mid.1.q.bias", "quant_conv.bias"
    else:
        tensors, bent = prior_tensors(), "layers.1.attention.wqkv.weight"
        missing = "layers.1.feed_forward.w3.weight"
    del tensors[missing]
    tensors[bent] = np.zeros((5, 7), np.float32)
    tensors["extra.weight"] = np.zeros(2, np.float32)
    beside = {"discriminator_2": {"weight": np.zeros(2, np.float32)}}
    path = save(tmp_path / "a.pt", {"model": tensors} | beside, told() if kind == "prior" else None)
    with pytest.raises(InputError) as caught:
        vqgan.convert.load(path)
    message = str(caught.value)
    assert f"{missing} is missing" in message
    assert f"{bent} has shape (5, 7)" in message
    assert "extra.weight is unexpected" in message
    assert "discriminator_2.weight is unexpected" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (told(n_kv_head=1), "n_kv_head 1"),
        (told(rope_base=5e5), "rope_base"),
        (told(norm_eps=1e-6), "norm_eps"),
        (told(cls_token_num=120), "cls_token_num"),
        (told(model_type="t2i"), "model_type t2i"),
        (told(gpt_model="GPT-S"), "gpt_model GPT-S"),
        (told(multiple_of=64), "multiple_of 64 makes 64"),
        (told(block_size=10), "block_size 10, no square"),
        (told(downsample_size=0), "downsample_size 0"),
        (told(n_layer=3), "n_layer is 3, but 2"),
        (told(num_classes=1000), "num_classes is 1000, but 3"),
        (told(qk_norm=True), "qk_norm"),
        ({}, "give a config .* with n_head"),
    ],
)
def test_a_prior_that_is_not_here_is_refused(tmp_path, options, named):
    path = save(tmp_path / "a.pt", {"model": prior_tensors()}, options)
    with pytest.raises(InputError, match=named) as caught:
        vqgan.convert.load(path)
    assert "\n" not in str(caught.value)


def test_a_text_conditional_model_is_refused_by_name(tmp_path):
    tensors = prior_tensors()
    del tensors["cls_embedding.embedding_table.weight"]
    tensors["cls_embedding.cap_proj.fc1.weight"] = np.zeros((WIDTH, 8), np.float32)
    with pytest.raises(InputError, match="text-conditional"):
        vqgan.convert.load(save(tmp_path / "t2i_XL_256.pt", {"model": tensors}))


def test_keys_that_heads_share_are_refused(tmp_path):
    tensors = prior_tensors()
    for i in range(2):
        tensors[f"layers.{i}.attention.wqkv.weight"] = np.zeros((2 * WIDTH, WIDTH), np.float32)
    with pytest.raises(InputError, match="n_kv_head"):
        vqgan.convert.load(save(tmp_path / "a.pt", {"model": tensors}, told()))


def test_without_class_dropout_there_is_no_null_class(tmp_path):
    options = told(class_dropout_prob=0.0, num_classes=4)
    config = vqgan.convert.load(
        save(tmp_path / "a.pt", {"model": prior_tensors()}, options)
    ).model.config
    assert (config.num_classes, config.null_class, config.label_dropout) == (4, False, 0.0)


# Sizes, of which files hold only a part. Nothing of that size is made: tensors have shapes only.


def only_shapes(path, depth, width, *, values=(), freqs=None):
    hidden = -(-(8 * width // 3) // 256) * 256
    shapes = {
        "cls_embedding.embedding_table.weight": (1001, width),
        "tok_embeddings.weight": (16384, width),
        "layers.0.attention.wqkv.weight": (3 * width, width),
        "layers.0.feed_forward.w1.weight": (hidden, width),
        f"layers.{depth - 1}.ffn_norm.weight": (width,),
    }
    if freqs is not None:
        shapes["freqs_cis"] = freqs
    tensors = {
        n: LazyTensor(s, np.dtype(np.float32), lambda: np.zeros(0)) for n, s in shapes.items()
    }
    checkpoint = Checkpoint(path, "torch", tensors, dict(values))
    return Source(path=path, checkpoint=checkpoint, config=None)


def config_of(source):
    notes = []
    return llamagen.prior_config(source, source.checkpoint.tensors, notes), notes


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "side"),
    [
        ("c2i_B_256.pt", 12, 768, 12, 16),
        ("c2i_L_384.pt", 24, 1024, 16, 24),
        ("c2i_XL_384.pt", 36, 1280, 20, 24),
        ("c2i_XXL_384.pt", 48, 1536, 24, 24),
        ("c2i_3B_384.pt", 24, 3200, 32, 24),
    ],
)
def test_heads_and_grid_of_the_published_files(tmp_path, name, depth, width, heads, side):
    config, notes = config_of(only_shapes(tmp_path / name, depth, width))
    assert (config.heads, config.grid, config.num_classes) == (heads, (side, side), 1000)
    assert notes == [f"a grid of {side} by {side} codes, by the file's name"]


def test_heads_and_grid_by_the_arguments_of_the_training(tmp_path):
    values = {
        "args.gpt_model": "GPT-B",
        "args.image_size": 384,
        "args.downsample_size": 8,
        "args.dropout_p": 0.2,
        "args.drop_path_rate": 0.1,
        "args.lr": 1e-4,
    }
    config, notes = config_of(only_shapes(tmp_path / "a.pt", 12, 768, values=values.items()))
    assert (config.heads, config.grid) == (12, (48, 48))
    assert config.dropout == 0.0  # the training has either of both
    assert any("drop_path_rate" in note for note in notes)


def test_heads_and_grid_by_the_rotary_table_of_older_files(tmp_path):
    config, notes = config_of(only_shapes(tmp_path / "a.pt", 6, 768, freqs=(577, 48, 2)))
    assert (config.heads, config.grid, notes) == (8, (24, 24), [])


def test_a_grid_that_nothing_tells_is_assumed_with_a_note(tmp_path):
    config, notes = config_of(only_shapes(tmp_path / "a.pt", 12, 768))
    assert config.grid == (16, 16)
    assert any("16 by 16" in note and "image_size" in note for note in notes)
