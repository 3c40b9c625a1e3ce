"""Imported diffusers models against `diffusers.VQModel` itself, and the way back."""

import json
import re
import warnings
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from comparing import SIZES, assert_close, assert_same_ids, images, nchw, nhwc, randomise
from flax import nnx
from reference import import_torch, import_torchvision

from vqgan import convert
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig

pytestmark = pytest.mark.parity

OPTIONS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 12,
    "sample_size": 32,
    "num_vq_embeddings": 40,
    "vq_embed_dim": 6,
}
DOWN, UP = OPTIONS["down_block_types"], OPTIONS["up_block_types"]


@cache
def vqmodel_class():
    import_torchvision()  # which it imports
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers").VQModel


def vqmodel(**changes):
    with warnings.catch_warnings():  # of its own deprecated arguments
        warnings.simplefilter("ignore")
        model = vqmodel_class()(**OPTIONS | changes)
    randomise(model.state_dict().items())
    return model.eval()


def saved(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def read_back(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = vqmodel_class().from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False
        )
    assert not any(report.values()), report
    return model.eval()


def compare(model, tokenizer, x):
    """Latents, ids, reconstructions, and images from ids, of both."""
    torch = import_torch()
    with torch.no_grad():
        z = model.encode(torch.from_numpy(nchw(x))).latents
        quantised, _, (_, _, ids) = model.quantize(z)
        reconstruction = nhwc(model.decode(z).sample)
        from_codes = nhwc(model.decode(quantised, force_not_quantize=True).sample)
    out = tokenizer(jnp.asarray(x))
    assert_close(out.z, nhwc(z))
    codebook = np.asarray(tokenizer.quantizer.codebook)
    assert_same_ids(
        out.ids,
        ids.numpy().reshape(out.ids.shape),
        lambda: ((np.asarray(out.z)[..., None, :] - codebook) ** 2).sum(-1),
    )
    assert_close(out.reconstruction, reconstruction)
    assert_close(tokenizer.decode(out.ids), from_codes)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {  # three levels, attention in the middle of them only, more blocks, no attention below
            "block_out_channels": (32, 32, 96),
            "down_block_types": (DOWN[0], DOWN[1], DOWN[0]),
            "up_block_types": (UP[1], UP[0], UP[1]),
            "layers_per_block": 2,
            "mid_block_add_attention": False,
            "norm_num_groups": 16,
            "vq_embed_dim": None,
            "sample_size": 30,
            "in_channels": 1,
            "out_channels": 2,
        },
    ],
    ids=["plain", "three levels"],
)
def test_vqmodel(changes, safe, tmp_path):
    model = vqmodel(**changes)
    imported = convert.load(saved(model, tmp_path, safe_serialization=safe))
    for size in SIZES:
        compare(model, imported.model, images(*size, model.config.in_channels))


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_attention(convolutions, tmp_path):
    """As before diffusers 0.17, which still reads them; the first configs lack half the entries."""
    torch, model = import_torch(), vqmodel()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in model.state_dict().items():
        found = re.search(r"\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.", name)
        if found:
            name = name.replace(found[1], old[found[1]])
            if convolutions and name.endswith("weight"):
                value = value[:, :, None, None]
        state[name] = value
    saved(model, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("norm_type", "scaling_factor", "lookup_from_codebook", "norm_num_groups"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not convolutions:
        read_back(tmp_path)
    for size in SIZES:
        compare(model, convert.load(tmp_path).model, images(*size))


def test_weights_alone(tmp_path):
    model = vqmodel()
    saved(model, tmp_path)
    (tmp_path / "config.json").unlink()
    imported = convert.load(tmp_path / "diffusion_pytorch_model.safetensors")
    assert any("no config" in note for note in imported.notes)
    for size in SIZES:
        compare(model, imported.model, images(*size))


def test_losses(tmp_path):
    torch, model = import_torch(), vqmodel()
    tokenizer = convert.load(saved(model, tmp_path)).model
    x = images(32, 64)
    with torch.no_grad():
        z = model.encode(torch.from_numpy(nchw(x))).latents
        expected = model.quantize(z)[1]
    losses = tokenizer(jnp.asarray(x)).losses
    np.testing.assert_allclose(sum(losses.values()), expected.numpy(), rtol=1e-4)
    # Both terms have the same value; only their gradients tell which of them has beta.
    z = z.detach().requires_grad_()
    model.quantize.embedding.weight.requires_grad_()
    model.quantize(z)[1].backward()

    def loss(quantizer):
        return sum(quantizer(jnp.asarray(nhwc(z.detach()))).losses.values())

    gradient = nnx.grad(loss)(tokenizer.quantizer)
    assert_close(gradient["codebook"][...], model.quantize.embedding.weight.grad)


# The way back.


def test_back_to_the_same_tensors(tmp_path):
    torch, model = import_torch(), vqmodel()
    convert.convert(saved(model, tmp_path / "theirs"), tmp_path / "ours")
    convert.export(tmp_path / "ours", tmp_path / "back", format="diffusers")
    back = read_back(tmp_path / "back")
    expected, found = model.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for name in OPTIONS:
        assert tuple(np.ravel(back.config[name])) == tuple(np.ravel(OPTIONS[name])), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_multipliers": (1, 3, 2), "attention_resolutions": (16, 8), "num_res_blocks": 2},
        {"middle_attention": False, "attention_resolutions": (), "norm_groups": 8},
    ],
    ids=["plain", "three levels", "no attention"],
)
def test_diffusers_reads_what_was_trained_here(changes, tmp_path):
    options = {
        "base_channels": 32,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "resolution": 32,
        "attention_resolutions": (16,),
        "z_channels": 8,
    }
    autoencoder = AutoencoderConfig(**options | changes)
    quantizer = VQConfig(codebook_size=24, dim=6)
    ours = Tokenizer(
        TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer), rngs=nnx.Rngs(0)
    )
    # Codes among the latents, so that several are in use.
    latents = ours.latents(jnp.asarray(images(32, 64))).reshape(-1, 6)
    ours.quantizer.codebook[...] = latents[:: len(latents) // 24][:24]
    notes = convert.export(ours, tmp_path / "out", format="diffusers")
    assert any("beta" in note for note in notes)
    for size in SIZES:
        compare(read_back(tmp_path / "out"), ours, images(*size))
