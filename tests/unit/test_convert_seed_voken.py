"""SEED-Voken's files, without torch: what is recognised, accounted for, and refused."""

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from vqgan import convert
from vqgan.convert.containers import write_torch
from vqgan.convert.families import family_of
from vqgan.convert.source import open_source
from vqgan.errors import InputError
from vqgan.serialization import flat_weights
from vqgan.tokenizer.model import Tokenizer
from vqgan.tokenizer.quantizers import IBQConfig, LFQConfig

IBQ, MAGVIT2 = "src.IBQ.models.ibqgan.IBQ", "src.Open_MAGVIT2.models.lfqgan.VQModel"
LEVELS = 2
DDCONFIG = {
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "double_z": False,
}
ENTROPIES = {"sample_minimization_weight": 0.5, "batch_maximization_weight": 1.5}
IBQ_ARGS = {
    "ddconfig": DDCONFIG | {"attn_resolutions": [8], "dropout": 0.0},
    "lossconfig": {
        "target": "src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"quant_loss_weight": 1.0, "entropy_loss_weight": 0.2},
    },
    "n_embed": 24,
    "embed_dim": 6,
    "learning_rate": "1e-4",
    "use_entropy_loss": True,
    "entropy_temperature": "2e-2",  # as PyYAML has a number without a point
    "beta": 0.125,
    "use_ema": True,
    "lr_drop_epoch": [250, 300],
    **ENTROPIES,
}
MAGVIT2_ARGS = {
    "ddconfig": DDCONFIG,
    "lossconfig": {
        "target": "src.Open_MAGVIT2.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"codebook_weight": 0.2, "commit_weight": 0.5},
    },
    "n_embed": 16,
    "embed_dim": 4,
    "scheduler_type": "None",
    **ENTROPIES,
}


def conv(name, inputs, outputs, side=3, *, bias=True):
    shapes = {f"{name}.weight": (outputs, inputs, side, side)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def block(name, inputs, outputs, *, bias):
    shapes = norm(f"{name}.norm1", inputs) | norm(f"{name}.norm2", outputs)
    shapes |= conv(f"{name}.conv1", inputs, outputs, bias=bias)
    shapes |= conv(f"{name}.conv2", outputs, outputs, bias=bias)
    if inputs != outputs:
        shapes |= conv(f"{name}.nin_shortcut", inputs, outputs, 1, bias=bias)
    return shapes


def attention(name, channels):
    shapes = norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.{part}", channels, channels, 1)
    return shapes


def magvit2_shapes(blocks=1):
    """The published names of Open-MAGVIT2 with channels 32, 64 and 4 bits."""
    shapes = conv("encoder.conv_in", 3, 32, bias=False) | conv("encoder.conv_out", 64, 4, 1)
    shapes |= conv("encoder.down.0.downsample", 32, 32)
    shapes |= conv("decoder.conv_in", 4, 64) | conv("decoder.conv_out", 32, 3)
    shapes |= conv("decoder.up.1.upsample.conv1", 64, 256)
    shapes |= norm("encoder.norm_out", 64) | norm("decoder.norm_out", 32)
    for i in range(blocks):
        shapes |= block(f"encoder.down.0.block.{i}", 32, 32, bias=False)
        shapes |= block(f"encoder.down.1.block.{i}", 64 if i else 32, 64, bias=False)
        shapes |= block(f"decoder.up.1.block.{i}", 64, 64, bias=False)
        shapes |= block(f"decoder.up.0.block.{i}", 32 if i else 64, 32, bias=False)
        for part in ("encoder", "decoder"):
            shapes |= block(f"{part}.mid_block.{i}", 64, 64, bias=False)
    for level in range(LEVELS):
        for name in ("gamma", "beta"):
            shapes[f"decoder.adaptive.{level}.{name}.weight"] = (64, 4)
            shapes[f"decoder.adaptive.{level}.{name}.bias"] = (64,)
    return shapes


def ibq_shapes(blocks=1):
    """The published names of IBQ with channels 32, 64 and attention at the lower level."""
    shapes = conv("encoder.conv_in", 3, 32) | conv("encoder.conv_out", 64, 4)
    shapes |= conv("encoder.down.0.downsample.conv", 32, 32)
    shapes |= conv("decoder.conv_in", 4, 64) | conv("decoder.conv_out", 32, 3)
    shapes |= conv("decoder.up.1.upsample.conv", 64, 64)
    shapes |= norm("encoder.norm_out", 64) | norm("decoder.norm_out", 32)
    shapes |= conv("quant_conv", 4, 6, 1) | conv("post_quant_conv", 6, 4, 1)
    for part in ("encoder", "decoder"):
        shapes |= attention(f"{part}.mid.attn_1", 64)
        for i in (1, 2):
            shapes |= block(f"{part}.mid.block_{i}", 64, 64, bias=True)
    for i in range(blocks):
        shapes |= block(f"encoder.down.0.block.{i}", 32, 32, bias=True)
        shapes |= block(f"encoder.down.1.block.{i}", 64 if i else 32, 64, bias=True)
        shapes |= attention(f"encoder.down.1.attn.{i}", 64)
    for i in range(blocks + 1):
        shapes |= block(f"decoder.up.1.block.{i}", 64, 64, bias=True)
        shapes |= attention(f"decoder.up.1.attn.{i}", 64)
        shapes |= block(f"decoder.up.0.block.{i}", 32 if i else 64, 32, bias=True)
    return shapes | {"quantize.embedding.weight": (24, 6)}


def patchgan_shapes():
    shapes = conv("loss.discriminator.main.0", 3, 8, 4) | norm("loss.discriminator.main.3", 16)
    shapes |= conv("loss.discriminator.main.2", 8, 16, 4, bias=False)
    for name in ("running_mean", "running_var"):
        shapes[f"loss.discriminator.main.3.{name}"] = (16,)
    return shapes | conv("loss.discriminator.main.5", 16, 1, 4)


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {n: 0.1 * rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    scales = [name for name in tensors if "norm" in name and name.endswith("weight")]
    return tensors | {name: 1 + tensors[name] for name in scales}


def saved(folder, tensors, class_path=None, args=None, **more):
    write_torch(folder / "last.ckpt", {"state_dict": tensors, "epoch": 3, "loops": {"x": 1}})
    if args is not None:
        config = {"model": {"class_path": class_path, "init_args": args}} | more
        (folder / "last.yaml").write_text(yaml.safe_dump(config))
    return folder / "last.ckpt"


def assert_same_weights(a, b):
    a, b = flat_weights(a), flat_weights(b)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def magvit2(tmp_path_factory):
    tensors = random(magvit2_shapes(blocks=3))
    args = MAGVIT2_ARGS | {"ddconfig": DDCONFIG | {"num_res_blocks": 3}}
    path = saved(tmp_path_factory.mktemp("magvit2"), tensors, MAGVIT2, args)
    return tensors, path, convert.load(path)


def test_open_magvit2_is_imported_whole(magvit2, tmp_path):
    tensors, path, imported = magvit2
    assert (imported.format, imported.notes, imported.parts) == ("open-magvit2", (), {})
    weights = flat_weights(imported.model)
    values = sorted(float(np.sum(np.abs(w), dtype=np.float64)) for w in weights.values())
    theirs = sorted(float(np.sum(np.abs(t), dtype=np.float64)) for t in tensors.values())
    np.testing.assert_allclose(values, theirs, rtol=1e-6)
    # Ours counts a decoder's levels from the lowest.
    up = tensors["decoder.up.1.block.2.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(weights["decoder.stages.0.blocks.2.conv2.kernel"], up)
    gamma = tensors["decoder.adaptive.0.gamma.weight"].T
    np.testing.assert_array_equal(weights["decoder.adaptive_norms.1.gamma.kernel"], gamma)
    assert imported.model.config.quantizer == LFQConfig(
        dim=4, commitment_weight=0.5, entropy_weight=0.1, diversity=3.0
    )
    convert.convert(path, tmp_path / "model")
    assert_same_weights(Tokenizer.from_pretrained(tmp_path / "model"), imported.model)


def test_open_magvit2_decodes_what_it_encodes(magvit2):
    tokenizer = magvit2[2].model
    x = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    out = tokenizer(jnp.asarray(x))
    assert out.ids.shape == (2, 4, 6) and len(np.unique(out.ids)) > 3
    signs = np.where(np.asarray(out.z) > 0, 1, 0)
    np.testing.assert_array_equal(out.ids, signs @ [1, 2, 4, 8])
    np.testing.assert_array_equal(tokenizer.quantizer.codes(out.ids), 2.0 * signs - 1)


def test_ibq_is_imported_whole(tmp_path):
    tensors = random(ibq_shapes() | patchgan_shapes())
    imported = convert.load(saved(tmp_path, tensors, IBQ, IBQ_ARGS))
    assert (imported.format, imported.notes, [*imported.parts]) == ("ibq", (), ["discriminator"])
    assert imported.model.config.quantizer == IBQConfig(
        codebook_size=24,
        dim=6,
        beta=0.125,
        entropy_weight=0.1,
        entropy_temperature=0.02,
        diversity=3.0,
    )
    codebook = imported.model.quantizer.codebook[...]
    np.testing.assert_array_equal(codebook, tensors["quantize.embedding.weight"])
    imported.model.save_pretrained(tmp_path / "model")
    assert_same_weights(Tokenizer.from_pretrained(tmp_path / "model"), imported.model)


def test_averages_are_preferred_but_where_there_are_none(tmp_path):
    tensors = random(ibq_shapes() | patchgan_shapes())
    buffers = ("running_mean", "running_var")
    averages = {
        f"model_ema.{name.replace('.', '')}": value + 1
        for name, value in tensors.items()
        if not name.endswith(buffers)
    }
    counters = {"model_ema.decay": np.array(0.999), "model_ema.num_updates": np.array(-1)}
    path = saved(tmp_path, tensors | averages | counters, IBQ, IBQ_ARGS)
    for weights, shift in (("ema", 1), ("raw", 0)):
        imported = convert.load(path, weights=weights)
        codebook = imported.model.quantizer.codebook[...]
        np.testing.assert_array_equal(codebook, tensors["quantize.embedding.weight"] + shift)
        judge = flat_weights(imported.parts["discriminator"])
        bias = tensors["loss.discriminator.main.0.bias"] + shift
        np.testing.assert_array_equal(judge["convs.0.bias"], bias)
        mean = tensors["loss.discriminator.main.3.running_mean"]
        np.testing.assert_array_equal(judge["norms.0.mean"], mean)


@pytest.mark.parametrize("name", ["ibq", "open-magvit2"])
def test_all_that_does_not_fit_is_named_at_once(name, tmp_path):
    shapes = ibq_shapes() if name == "ibq" else magvit2_shapes()
    tensors = random(shapes)
    del tensors["decoder.norm_out.bias"]
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :2]
    tensors["model_ema.encoderextra"] = tensors["surplus"] = np.ones(2, np.float32)
    kind = (IBQ, IBQ_ARGS) if name == "ibq" else (MAGVIT2, MAGVIT2_ARGS)
    with pytest.raises(InputError) as error:
        convert.load(saved(tmp_path, tensors, *kind))
    message = str(error.value)
    assert "\n" not in message
    for words in (
        "decoder.norm_out.bias is missing",
        "encoder.conv_in.weight has shape (32, 2, 3, 3)",
        "model_ema.encoderextra is unexpected",
        "surplus is unexpected",
    ):
        assert words in message


def changed(args, **changes):
    return args | changes


def with_loss(args, **changes):
    loss = args["lossconfig"]
    return args | {"lossconfig": loss | {"params": loss["params"] | changes}}


@pytest.mark.parametrize(
    ("class_path", "args", "words"),
    [
        (IBQ, changed(IBQ_ARGS, colour=1, shape=2), "colour, shape: unknown"),
        (IBQ, changed(IBQ_ARGS, remap="used.npy"), "remap"),
        (IBQ, changed(IBQ_ARGS, beta="much"), "beta 'much': not a number"),
        (IBQ, changed(IBQ_ARGS, sample_minimization_weight=0), "sample_minimization_weight 0"),
        (IBQ, with_loss(IBQ_ARGS, entropy_loss_weight=None), "entropy_loss_weight None"),
        ("src.IBQ.models.ibqgan.VQModel", IBQ_ARGS, "no image tokenizer of IBQ"),
        (MAGVIT2, changed(MAGVIT2_ARGS, beta=1), "beta: unknown"),
        (MAGVIT2, changed(MAGVIT2_ARGS, n_embed=32), "n_embed 32: 16 is all"),
        (MAGVIT2, changed(MAGVIT2_ARGS, embed_dim=5), "embed_dim 5: 4 is all"),
        (MAGVIT2, changed(MAGVIT2_ARGS, ddconfig=DDCONFIG | {"attn": 1}), "attn: unknown"),
        (MAGVIT2, changed(MAGVIT2_ARGS, ddconfig={"ch": 32}), "ch_mult, in_channels"),
        (MAGVIT2, changed(MAGVIT2_ARGS, ddconfig=DDCONFIG | {"ch": "wide"}), "'wide'"),
        (
            MAGVIT2,
            changed(MAGVIT2_ARGS, token_factorization=True, factorized_bits=[3, 3]),
            "factorized_bits [3, 3]: not two numbers of 4 bits",
        ),
        (IBQ, MAGVIT2_ARGS, "no image tokenizer of Open-MAGVIT2"),
    ],
)
def test_configs_that_say_something_else_are_refused(class_path, args, words, tmp_path):
    shapes = ibq_shapes() if "entropy_temperature" in args else magvit2_shapes()
    with pytest.raises(InputError) as error:
        convert.load(saved(tmp_path, random(shapes), class_path, args))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_a_config_four_blocks_may_be_of_either(tmp_path):
    path = saved(tmp_path, random(ibq_shapes(blocks=4)))
    with pytest.raises(InputError, match="--format taming or --format ibq"):
        convert.load(path)
    assert family_of(open_source(path), "taming").name == "taming"
    imported = convert.load(path, format="ibq")
    assert isinstance(imported.model.config.quantizer, IBQConfig)
    assert imported.model.config.autoencoder.num_res_blocks == 4
    assert "no config" in imported.notes[0]


def test_a_config_tells_taming_and_ibq_apart(tmp_path):
    path = saved(tmp_path, random(ibq_shapes(blocks=4)), IBQ, IBQ_ARGS)
    assert family_of(open_source(path), "auto").name == "ibq"
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"n_embed": 24}}}
    (tmp_path / "last.yaml").write_text(yaml.safe_dump(config))
    assert family_of(open_source(path), "auto").name == "taming"
    with pytest.raises(InputError, match=r"taming\.models\.vqgan\.VQModel, which is no image"):
        convert.load(path, format="ibq")


def test_the_config_of_a_prior_holds_its_tokenizer_s(tmp_path):
    first = MAGVIT2_ARGS | {"token_factorization": True, "factorized_bits": [1, 3]}
    first["lossconfig"] = {"target": "src.Open_MAGVIT2.modules.losses.DummyLoss"}
    args = {"first_stage_config": {"target": MAGVIT2, "params": first}, "learning_rate": 3e-4}
    class_path = "src.Open_MAGVIT2.models.cond_transformer_gpt.Net2NetTransformer"
    imported = convert.load(saved(tmp_path, random(magvit2_shapes()), class_path, args))
    assert "id % 2**1 and id // 2**1" in imported.notes[0]
    assert imported.model.config.quantizer == LFQConfig(dim=4)


def test_the_data_say_for_what_size_the_network_is(tmp_path):
    data = {"init_args": {"train": {"params": {"config": {"size": 32}}}}}
    path = saved(tmp_path, random(magvit2_shapes()), MAGVIT2, MAGVIT2_ARGS, data=data)
    imported = convert.load(path)
    assert imported.model.config.autoencoder.resolution == 32
    assert imported.notes == ("resolution 32, as of its data; its ddconfig says 16",)


def test_a_discriminator_that_blurs_is_left_with_a_note(tmp_path):
    shapes = conv("loss.discriminator.block_in.0", 3, 8, 5)
    shapes |= {"loss.discriminator.blocks.0.1.kernel": (1, 1, 4, 4)}
    path = saved(tmp_path, random(magvit2_shapes() | shapes), MAGVIT2, MAGVIT2_ARGS)
    imported = convert.load(path)
    assert not imported.parts
    assert "3 tensors left" in imported.notes[0]


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (
            [
                "first_stage_model.encoder.down.0.block.0.conv1.weight",
                "first_stage_model.quantize.embedding.weight",
                "transformer.class_emb.embedding_table.weight",
                "transformer.blocks.0.attention.wqkv.weight",
                "transformer.head_nm.ada_lin.1.weight",
            ],
            "IBQ's transformer",
        ),
        (
            [
                "first_stage_model.encoder.down.0.block.0.conv1.weight",
                "first_stage_model.decoder.adaptive.0.gamma.weight",
                "transformer.spatial_blocks.0.attention.wqkv.weight",
                "transformer.factorized_blocks.0.attention.wqkv.weight",
            ],
            "Open-MAGVIT2's transformer",
        ),
        (
            [
                "encoder.conv_in.conv_1.weight",
                "encoder.down.0.block.0.conv1.conv_1.weight",
                "decoder.adaptive.0.gamma.weight",
                "decoder.conv_in.conv_1.weight",
            ],
            "Open-MAGVIT2's video tokenizer",
        ),
    ],
)
def test_priors_and_video_tokenizers_are_refused_by_name(names, title, tmp_path):
    path = saved(tmp_path, {name: np.ones((2, 2), np.float32) for name in names})
    with pytest.raises(InputError, match=f"this is {title}, which has no model here"):
        convert.load(path)
