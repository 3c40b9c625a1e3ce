"""Imported vqgan-jax models against taming's VQModel, which it is a port of, on its weights."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from comparing import SIZES, assert_close, assert_same_ids, images, nchw, nhwc, randomise
from flax import serialization, traverse_util
from reference import import_torch, taming_vqmodel

from vqgan import convert

pytestmark = pytest.mark.parity

CONFIG = {
    "architectures": ["del"],
    "attn_resolutions": [16],
    "ch": 32,
    "ch_mult": [1, 2, 1],
    "double_z": False,
    "dropout": 0.0,
    "embed_dim": 6,
    "give_pre_end": False,
    "in_channels": 3,
    "n_embed": 40,
    "num_res_blocks": 2,
    "num_resolutions": 3,
    "out_ch": 3,
    "resamp_with_conv": True,
    "resolution": 32,
    "transformers_version": "4.13.0.dev0",
    "z_channels": 8,
}
_DDCONFIG = ("ch", "ch_mult", "attn_resolutions", "num_res_blocks", "resolution", "z_channels")
_DDCONFIG += ("double_z", "dropout", "in_channels", "out_ch", "resamp_with_conv")


def in_flax(model, *, old_norms: bool) -> dict:
    """A tree of arrays: numbers joined to the names before them, kernels with outputs last."""
    flat = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("loss."):
            continue
        *path, kind = re.sub(r"(down|up|block|attn)\.(\d+)", r"\1_\2", name).split(".")
        value = tensor.numpy()
        norm = "norm" in path[-1]
        if kind == "weight":
            kind = {4: "kernel", 2: "embedding", 1: "scale"}[value.ndim]
        if kind == "kernel":
            value = value.transpose(2, 3, 1, 0)
        if norm and old_norms:
            value = value[None, None, None]
        flat[*path, kind] = np.ascontiguousarray(value)
    return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize(
    ("changes", "old_norms"),
    [({}, False), ({}, True), ({"resamp_with_conv": False, "attn_resolutions": []}, False)],
    ids=["plain", "before flax 0.3.6", "without resampling convolutions"],
)
def test_vqmodel(changes, old_norms, tmp_path):
    torch, config = import_torch(), CONFIG | changes
    model = taming_vqmodel(
        {name: config[name] for name in _DDCONFIG},
        n_embed=config["n_embed"],
        embed_dim=config["embed_dim"],
        disc_start=0,
        disc_ndf=8,
    ).eval()
    randomise((n, t) for n, t in model.state_dict().items() if not n.startswith("loss."))
    (tmp_path / "config.json").write_text(json.dumps(config))
    tree = in_flax(model, old_norms=old_norms)
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    tokenizer = convert.load(tmp_path).model
    codebook = np.asarray(tokenizer.quantizer.codebook)
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            z = model.quant_conv(model.encoder(torch.from_numpy(nchw(x))))
            quantised, _, (_, _, ids) = model.quantize(z)
            reconstruction = nhwc(model.decode(quantised))
        out = tokenizer(jnp.asarray(x))
        assert_close(out.z, nhwc(z))
        ids = ids.numpy().reshape(out.ids.shape)
        assert_same_ids(
            out.ids,
            ids,
            lambda z=out.z: ((np.asarray(z)[..., None, :] - codebook) ** 2).sum(-1),
        )
        assert_close(out.reconstruction, reconstruction)
        assert_close(tokenizer.decode(jnp.asarray(ids, jnp.int32)), reconstruction)
