"""Imported taming-transformers models against taming-transformers itself, and the way back."""

import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from comparing import SIZES, assert_close, assert_same_ids, images, nchw, nhwc, randomise
from reference import import_taming, import_torch, taming_vqmodel

from vqgan import convert
from vqgan.adversarial.lpips import LPIPS, LPIPSConfig, load_lpips
from vqgan.pipeline import Pipeline
from vqgan.serialization import flat_weights
from vqgan.tokenizer.model import Tokenizer

pytestmark = pytest.mark.parity

DDCONFIG = {
    "double_z": False,
    "z_channels": 12,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
LOSS = {"disc_start": 0, "disc_weight": 0.8, "disc_num_layers": 2, "disc_ndf": 8}


def vqmodel(n_embed=40, embed_dim=6, **changes):
    model = taming_vqmodel(DDCONFIG | changes, n_embed=n_embed, embed_dim=embed_dim, **LOSS)
    return randomised(model)


def randomised(model):
    randomise((n, t) for n, t in model.state_dict().items() if "perceptual_loss" not in n)
    return model.eval()


def variant(name, **options):
    """One of taming's other models; its loss is of no matter."""
    module = import_taming("models.vqgan")
    dummy = import_taming("modules.losses.vqperceptual").DummyLoss
    with mock.patch.object(module, "instantiate_from_config", lambda config: dummy()):
        if name == "GumbelVQ":  # whose constructor also makes a temperature schedule
            schedule = {"params": {"lr_max": 0.9, "lr_min": 1e-2, "max_decay_steps": 100}}
            options["temperature_scheduler_config"] = schedule
        return randomised(getattr(module, name)(**options))


def saved(model, folder, params, target="taming.models.vqgan.VQModel", **more):
    """A Lightning checkpoint with what else is in one, and the YAML that belongs to it."""
    torch = import_torch()
    content = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.0.8",
        "state_dict": model.state_dict() | more,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
        "callbacks": {types.SimpleNamespace: {"best_model_score": torch.tensor(1.0)}},
    }
    torch.save(content, folder / "last.ckpt")
    config = {"model": {"base_learning_rate": 4.5e-6, "target": target, "params": params}}
    (folder / "last.yaml").write_text(yaml.safe_dump(config))
    return folder / "last.ckpt"


def parameters(ddconfig=DDCONFIG, n_embed=40, embed_dim=6, **more):
    return {"ddconfig": ddconfig, "n_embed": n_embed, "embed_dim": embed_dim} | more


def squared_distances(z, codebook):
    return ((np.asarray(z)[..., None, :] - np.asarray(codebook)) ** 2).sum(-1)


def compare(model, tokenizer, x, *, tolerance=1e-4):
    """Latents, ids, reconstructions and decoded ids of both."""
    torch = import_torch()
    with torch.no_grad():
        z = model.quant_conv(model.encoder(torch.from_numpy(nchw(x))))
        quantised, _, (_, _, ids) = model.quantize(z)
        reconstruction = nhwc(model.decode(quantised))
    out = tokenizer(jnp.asarray(x))
    ids = ids.numpy().reshape(out.ids.shape)
    assert_close(out.z, nhwc(z), tolerance)
    assert_same_ids(out.ids, ids, lambda: squared_distances(out.z, tokenizer.quantizer.codebook))
    assert_close(out.reconstruction, reconstruction, tolerance)
    assert_close(tokenizer.decode(tokenizer.encode(jnp.asarray(x))), reconstruction, tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 1, "out_ch": 1},  # depth
        {"resamp_with_conv": False, "attn_resolutions": []},
        {"ch_mult": [2, 1, 3], "num_res_blocks": 2, "attn_resolutions": [32, 8]},
    ],
    ids=["plain", "depth", "without resampling convolutions", "three levels"],
)
def test_vqmodel(changes, tmp_path):
    ddconfig = DDCONFIG | changes
    model = variant("VQModel", lossconfig=None, **parameters(ddconfig))
    tokenizer = convert.load(saved(model, tmp_path, parameters(ddconfig))).model
    for size in SIZES:
        compare(model, tokenizer, images(*size, ddconfig["in_channels"]))


def test_architecture_by_shapes_alone(tmp_path):
    model = variant("VQModel", lossconfig=None, **parameters())
    path = saved(model, tmp_path, {})
    (tmp_path / "last.yaml").unlink()
    imported = convert.load(path)
    assert any("no config" in note for note in imported.notes)
    for size in SIZES:
        compare(model, imported.model, images(*size))


def test_gumbel(tmp_path):
    torch = import_torch()
    ddconfig = DDCONFIG | {"z_channels": 6}
    model = variant("GumbelVQ", lossconfig=None, kl_weight=1e-8, **parameters(ddconfig))
    params = parameters(ddconfig, kl_weight=1e-8)
    path = saved(model, tmp_path, params, "taming.models.vqgan.GumbelVQ")
    tokenizer = convert.load(path).model
    assert tokenizer.config.quantizer.kl_weight == 1e-8
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            z = model.quant_conv(model.encoder(torch.from_numpy(nchw(x))))
            logits = model.quantize.proj(z)
            # taming draws noise at evaluation too; without it its hard choice is the argmax.
            ids = logits.argmax(1)
            reconstruction = nhwc(model.decode(model.quantize.embed(ids).permute(0, 3, 1, 2)))
        out = tokenizer(jnp.asarray(x))
        assert_same_ids(out.ids, ids, lambda logits=logits: -nhwc(logits))
        assert_close(out.reconstruction, reconstruction)


def test_segmentation(tmp_path):
    ddconfig = DDCONFIG | {"in_channels": 5, "out_ch": 5}
    params = parameters(ddconfig, n_labels=5, lossconfig=None)
    model = variant("VQSegmentationModel", **params)
    path = saved(model, tmp_path, params, "taming.models.vqgan.VQSegmentationModel")
    tokenizer = convert.load(path).model
    assert tokenizer.config.content == "labels"
    for height, width in SIZES:
        labels = np.random.default_rng(0).integers(0, 5, (2, height, width))
        compare(model, tokenizer, np.eye(5, dtype=np.float32)[labels])


def test_codes_in_use_only(tmp_path):
    """Remapped ids, wherever the nearest of all codes is one in use; taming draws the others."""
    torch = import_torch()
    x = images(32, 64)
    every = variant("VQModel", lossconfig=None, **parameters())
    with torch.no_grad():
        ids = every.encode(torch.from_numpy(nchw(x)))[2][2].numpy()
    used = np.unique(ids)[::2]  # every other one of those that this picture needs
    np.save(tmp_path / "used.npy", used)
    options = parameters(remap=str(tmp_path / "used.npy"), sane_index_shape=True)
    model = variant("VQModel", lossconfig=None, **options)
    tokenizer = convert.load(saved(model, tmp_path, options)).model
    assert tokenizer.codebook_size == len(used) > 3
    with torch.no_grad():
        z = model.quant_conv(model.encoder(torch.from_numpy(nchw(x))))
        ids = model.quantize(z)[2][2].numpy()
        codebook = model.quantize.embedding.weight.numpy()
    in_use = np.isin(squared_distances(nhwc(z), codebook).argmin(-1), used)
    assert 0.05 < in_use.mean() < 0.95
    ours = np.asarray(tokenizer.encode(jnp.asarray(x)))
    np.testing.assert_array_equal(ours[in_use], ids[in_use])
    codes = np.asarray(tokenizer.quantizer.codes(jnp.asarray(ours)))
    np.testing.assert_array_equal(codes[in_use], codebook[used][ids[in_use]])


def test_moving_averages(tmp_path):
    """Latent diffusion's LitEma: dots taken out of the names, parameters only."""
    model = variant("VQModel", lossconfig=None, **parameters())
    average = variant("VQModel", lossconfig=None, **parameters())
    rng = np.random.default_rng(1)
    for value in average.parameters():
        value.data += 0.05 * value.new_tensor(rng.normal(size=tuple(value.shape)))
    torch = import_torch()
    more = {f"model_ema.{n.replace('.', '')}": p.data for n, p in average.named_parameters()}
    more |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    path = saved(model, tmp_path, parameters(use_ema=True), **more)
    compare(average, convert.load(path).model, images(32, 32))
    compare(model, convert.load(path, weights="raw").model, images(32, 32))


def test_first_stage_of_latent_diffusion(tmp_path):
    """Below a prefix, beside a diffusion model, with attention nowhere and fewer code channels."""
    torch = import_torch()
    model = variant("VQModel", lossconfig=None, **parameters(DDCONFIG | {"attn_resolutions": []}))
    model.encoder.mid.attn_1 = model.decoder.mid.attn_1 = torch.nn.Identity()
    state = {f"first_stage_model.{n}": t for n, t in model.state_dict().items()}
    state["model.diffusion_model.out.2.weight"] = torch.ones(2)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    ddconfig = DDCONFIG | {"attn_resolutions": [], "attn_type": "none"}
    inner = {"target": "ldm.models.autoencoder.VQModelInterface", "params": parameters(ddconfig)}
    outer = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion"}
    config = {"model": outer | {"params": {"first_stage_config": inner}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    imported = convert.load(tmp_path / "model.ckpt")
    assert any("1 other" in note for note in imported.notes)
    for size in SIZES:
        compare(model, imported.model, images(*size))


# The loss.


def test_discriminator_and_lpips(tmp_path):
    torch = import_torch()
    model = vqmodel()
    imported = convert.load(saved(model, tmp_path, parameters()))
    assert set(imported.parts) == {"discriminator", "lpips"}
    assert any("LPIPS is the published one" in note for note in imported.notes)
    a, b = images(32, 48), images(32, 48, seed=1)
    ours, theirs = imported.parts["discriminator"], model.loss.discriminator
    for train in (False, True):  # and last with the statistics of a batch, which moves them
        theirs.train(train)
        expected = nhwc(theirs(torch.from_numpy(nchw(a))).detach())
        assert_close(ours(jnp.asarray(a), train=train), expected)
    moved = theirs.state_dict()["main.3.running_var"]
    assert_close(ours.norms[0].var[...], moved)
    expected = model.loss.perceptual_loss(*(torch.from_numpy(nchw(x)) for x in (a, b)))
    ours = imported.parts["lpips"](jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(ours, expected.detach().numpy().ravel(), atol=1e-5)


# The way back.


@pytest.mark.parametrize("kind", ["VQModel", "GumbelVQ"])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_back_to_the_same_tensors(kind, suffix, tmp_path):
    torch = import_torch()
    ddconfig = DDCONFIG | {"z_channels": 6}
    model = vqmodel(z_channels=6)
    if kind == "GumbelVQ":
        model = variant(kind, lossconfig=None, kl_weight=1e-8, **parameters(ddconfig))
    path = saved(model, tmp_path, parameters(ddconfig), f"taming.models.vqgan.{kind}")
    convert.convert(path, tmp_path / "ours")
    back = tmp_path / f"back{suffix}"
    convert.export(tmp_path / "ours", back, format="taming")
    if suffix == ".ckpt":
        found = torch.load(back, weights_only=True)["state_dict"]
    else:
        from safetensors.torch import load_file

        found = load_file(back)
    expected = {n: t for n, t in model.state_dict().items() if "num_batches" not in n}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_taming_loads_what_was_trained_here(quantizer, tmp_path):
    """A tokenizer of ours, exported; built by taming from the exported YAML; the same images."""
    from flax import nnx

    from vqgan.tokenizer.autoencoder import AutoencoderConfig
    from vqgan.tokenizer.model import TokenizerConfig
    from vqgan.tokenizer.quantizers import GumbelConfig, VQConfig

    torch = import_torch()
    quantizers = {
        "vq": VQConfig(codebook_size=24, dim=6),
        "gumbel": GumbelConfig(codebook_size=24, dim=6),
    }
    autoencoder = AutoencoderConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        resolution=32,
        attention_resolutions=(16,),
        z_channels=6,
    )
    config = TokenizerConfig(autoencoder=autoencoder, quantizer=quantizers[quantizer])
    ours = Tokenizer(config, rngs=nnx.Rngs(0))
    x = jnp.asarray(images(32, 64))
    if quantizer == "vq":  # codes among the latents, so that several are in use
        ours.quantizer.codebook[...] = ours.latents(x).reshape(-1, 6)[::40][:24]
    convert.export(ours, tmp_path / "out.ckpt", format="taming")
    model = yaml.safe_load((tmp_path / "out.yaml").read_text())["model"]
    params = {k: v for k, v in model["params"].items() if k != "lossconfig"}
    theirs = variant(model["target"].rsplit(".", 1)[1], lossconfig=None, **params)
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    theirs.load_state_dict(found, strict=True)
    if quantizer == "vq":
        compare(theirs, ours, np.asarray(x))
        return
    with torch.no_grad():
        z = theirs.quant_conv(theirs.encoder(torch.from_numpy(nchw(x))))
        codes = theirs.quantize.embed(theirs.quantize.proj(z).argmax(1)).permute(0, 3, 1, 2)
        assert_close(ours(x).reconstruction, nhwc(theirs.decode(codes)))


# The second stage.


def net2net(tokenizer, condition, *, vocabulary, block, order=None, sos=0, n_classes=7):
    """taming's Net2NetTransformer around given models, random in every tensor."""
    module = import_taming("models.cond_transformer")
    util = import_taming("modules.util")
    permuters = import_taming("modules.transformer.permuter")
    gpt = import_taming("modules.transformer.mingpt").GPT(
        vocabulary, block, n_layer=2, n_head=4, n_embd=32
    )
    randomise(gpt.named_parameters())  # not the masks
    with import_torch().no_grad():
        gpt.pos_emb.mul_(0.3)
    models = {
        "first": tokenizer,
        "class": util.Labelator(n_classes),
        "gpt": gpt,
        "order": order or permuters.Identity(),
    }
    models["codes"] = condition
    with mock.patch.object(
        module, "instantiate_from_config", lambda config: models[config["target"]]
    ):
        conditions = {"none": "__is_unconditional__", "same": "__is_first_stage__"}
        kind = condition if isinstance(condition, str) else "codes"
        return module.Net2NetTransformer(
            transformer_config={"target": "gpt"},
            first_stage_config={"target": "first"},
            cond_stage_config=conditions.get(kind, {"target": kind}),
            permuter_config={"target": "order"},
            sos_token=sos,
        ).eval()


def saved_net2net(model, folder, condition, *, vocabulary, block, **more):
    gpt = {"vocab_size": vocabulary, "block_size": block, "n_layer": 2, "n_head": 4, "n_embd": 32}
    first = {"target": "taming.models.vqgan.VQModel", "params": parameters(lossconfig=None)}
    params = {
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        "first_stage_config": first,
        "cond_stage_config": condition,
        "pkeep": 0.9,
    }
    target = "taming.models.cond_transformer.Net2NetTransformer"
    return saved(model, folder, params | more, target)


def sequence_logits(model, condition, ids):
    """taming's logits for raster ids, a row for each step of its sequence."""
    torch = import_torch()
    flat = torch.from_numpy(ids.reshape(len(ids), -1)).long()
    sequence = torch.cat([condition, model.permuter(flat)], dim=1)
    with torch.no_grad():
        logits = model.transformer(sequence[:, :-1])[0][:, condition.shape[1] - 1 :]
    return model.permuter(logits, reverse=True).numpy()


IDS = np.random.default_rng(0).integers(0, 40, (3, 16, 16)).astype(np.int32)


@pytest.mark.parametrize("kind", ["class", "none"])
def test_net2net_with_one_token_in_front(kind, tmp_path):
    """A class, or the SOS token; in a spiral; with a vocabulary larger than the codebook."""
    torch = import_torch()
    permuters = import_taming("modules.transformer.permuter")
    tokenizer = variant("VQModel", lossconfig=None, **parameters())
    sizes = {"vocabulary": 50, "block": 300}
    order = permuters.SpiralIn(16, 16)
    model = net2net(tokenizer, kind, order=order, sos=5, **sizes)
    conditions = {
        "class": {"target": "taming.modules.util.Labelator", "params": {"n_classes": 7}},
        "none": "__is_unconditional__",
    }
    path = saved_net2net(model, tmp_path, conditions[kind], sos_token=5, **sizes)
    convert.convert(path, tmp_path / "ours")
    pipeline = Pipeline.from_pretrained(tmp_path / "ours")
    classes = np.array([0, 6, 3]) if kind == "class" else None
    first = torch.full((3, 1), 5) if classes is None else torch.from_numpy(classes)[:, None]
    expected = sequence_logits(model, first, IDS)
    condition = None if classes is None else jnp.asarray(classes, jnp.int32)
    ours = pipeline.prior(jnp.asarray(IDS), condition)
    assert_close(ours.reshape(expected[..., :40].shape), expected[..., :40])
    compare(tokenizer, pipeline.tokenizer, images(32, 32))


@pytest.mark.parametrize("kind", ["depth", "same"])
def test_net2net_with_codes_in_front(kind, tmp_path):
    torch = import_torch()
    tokenizer = variant("VQModel", lossconfig=None, **parameters())
    ddconfig = DDCONFIG | {"in_channels": 1, "out_ch": 1, "ch_mult": [1, 1, 1]}
    depth = variant("VQModel", lossconfig=None, **parameters(ddconfig, n_embed=30))
    sizes = {"vocabulary": 40, "block": 512}
    model = net2net(tokenizer, depth if kind == "depth" else "same", **sizes)
    second = {"target": "taming.models.vqgan.VQModel", "params": parameters(ddconfig, n_embed=30)}
    given = second if kind == "depth" else "__is_first_stage__"
    pipeline = convert.load(saved_net2net(model, tmp_path, given, **sizes)).model
    side, codes = (8, 30) if kind == "depth" else (16, 40)
    condition = np.random.default_rng(1).integers(0, codes, (3, side, side)).astype(np.int32)
    expected = sequence_logits(model, torch.from_numpy(condition).long().reshape(3, -1), IDS)
    ours = pipeline.prior(jnp.asarray(IDS), jnp.asarray(condition))
    assert_close(ours.reshape(expected.shape), expected)
    channels = 1 if kind == "depth" else 3
    x = images(32, 32, channels)
    compare(depth if kind == "depth" else tokenizer, pipeline.condition_tokenizer, x)


def test_lpips_files_and_loss_hold_the_same(tmp_path):
    """The LPIPS of a loss survives its own directory."""
    imported = convert.load(saved(vqmodel(), tmp_path, parameters()))
    imported.parts["lpips"].save_pretrained(tmp_path / "lpips")
    again = LPIPS.from_pretrained(tmp_path / "lpips")
    assert again.config == LPIPSConfig(net="vgg16")
    for name, value in flat_weights(load_lpips("vgg16")).items():
        np.testing.assert_array_equal(flat_weights(again)[name], value)
