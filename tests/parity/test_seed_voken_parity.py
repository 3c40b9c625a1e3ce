"""Imported IBQ and Open-MAGVIT2 tokenizers against PyTorch, at random weights.

IBQ's network is taming's, which is on PyPI; its quantizer, and all of Open-MAGVIT2, are evaluated
here from what their papers and configs say.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from comparing import SIZES, assert_close, assert_same_ids, images, nchw, nhwc, randomise
from reference import import_torch, taming_vqmodel

from vqgan import convert

pytestmark = pytest.mark.parity

IBQ_DDCONFIG = {
    "double_z": False,
    "z_channels": 20,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 2,  # 4 in the published ones
    "attn_resolutions": [16],
    "dropout": 0.0,
}
MAGVIT2_DDCONFIG = {
    "double_z": False,
    "z_channels": 6,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 3, 2],
    "num_res_blocks": 1,  # 4 in the published ones
}
ENTROPIES = {"sample_minimization_weight": 1.0, "batch_maximization_weight": 1.0}


def saved(state, averages, class_path, init_args, folder):
    """A Lightning checkpoint with averages of the parameters, and its YAML."""
    torch = import_torch()
    kept = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    kept |= {f"model_ema.{name.replace('.', '')}": value for name, value in averages.items()}
    content = {
        "epoch": 329,
        "state_dict": state | kept,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
    }
    torch.save(content, folder / "last.ckpt")
    config = {
        "trainer": {"devices": 8},
        "model": {"class_path": class_path, "init_args": init_args},
    }
    (folder / "last.yaml").write_text(yaml.safe_dump(config))
    return folder / "last.ckpt"


def with_averages(model, folder, class_path, init_args, weights):
    """The model's checkpoint; the model itself then has the weights that are to be imported."""
    randomise(of_interest(model.state_dict()))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, _ in of_interest(model.named_parameters())}
    randomise(((n, t) for n, t in of_interest(model.state_dict()) if n in trained), seed=1)
    averages = {name: value.clone() for name, value in model.state_dict().items()}
    path = saved(state, {n: averages[n] for n in trained}, class_path, init_args, folder)
    if weights == "raw":
        model.load_state_dict(state)
    return path


def of_interest(tensors):
    tensors = tensors.items() if isinstance(tensors, dict) else tensors
    return [(name, value) for name, value in tensors if "perceptual_loss" not in name]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_ibq(weights, tmp_path):
    torch = import_torch()
    loss = {"disc_start": 0, "disc_num_layers": 2, "disc_ndf": 8}
    model = taming_vqmodel(IBQ_DDCONFIG, n_embed=48, embed_dim=12, **loss).eval()
    args = {"ddconfig": IBQ_DDCONFIG, "n_embed": 48, "embed_dim": 12, "lossconfig": {}, **ENTROPIES}
    path = with_averages(model, tmp_path, "src.IBQ.models.ibqgan.IBQ", args, weights)
    imported = convert.load(path, weights=weights)
    assert imported.format == "ibq"
    tokenizer, judge = imported.model, imported.parts["discriminator"]
    for size in SIZES[:1] if weights == "raw" else SIZES:
        x = images(*size)
        with torch.no_grad():
            z = model.quant_conv(model.encoder(torch.from_numpy(nchw(x))))
            logits = torch.einsum("bdhw,nd->bhwn", z, model.quantize.embedding.weight)
            ids = logits.argmax(-1)
            codes = model.quantize.embedding.weight[ids].permute(0, 3, 1, 2)
            reconstruction = nhwc(model.decode(codes))
            realness = nhwc(model.loss.discriminator(torch.from_numpy(nchw(x))))
        out = tokenizer(jnp.asarray(x))
        assert_close(out.z, nhwc(z))
        assert_same_ids(out.ids, ids, lambda logits=logits: -logits.numpy())
        assert_close(out.reconstruction, reconstruction)
        assert_close(judge(jnp.asarray(x), train=False), realness)


# Open-MAGVIT2: modules hold the weights by their published names, functions compute.


def block(inputs, outputs):
    torch = import_torch()
    parts = {
        "norm1": torch.nn.GroupNorm(32, inputs, eps=1e-6),
        "conv1": torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        "norm2": torch.nn.GroupNorm(32, outputs, eps=1e-6),
        "conv2": torch.nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
    }
    if inputs != outputs:
        parts["nin_shortcut"] = torch.nn.Conv2d(inputs, outputs, 1, bias=False)
    return torch.nn.ModuleDict(parts)


def blocks(inputs, outputs, count):
    torch = import_torch()
    return torch.nn.ModuleList([block(outputs if i else inputs, outputs) for i in range(count)])


def run(blocks, x):
    silu = import_torch().nn.functional.silu
    for parts in blocks:
        y = parts["conv1"](silu(parts["norm1"](x)))
        y = parts["conv2"](silu(parts["norm2"](y)))
        x = (parts["nin_shortcut"](x) if "nin_shortcut" in parts else x) + y
    return x


def magvit2(ch, ch_mult, num_res_blocks, z_channels, in_channels, out_ch, **_):
    """Encoder and decoder, empty modules but for names and shapes."""
    nn = import_torch().nn
    widths, count = [ch * m for m in ch_mult], num_res_blocks
    down, up, adaptive = [], [], []
    for level, width in enumerate(widths):
        inputs = widths[level - 1] if level else ch
        parts = {"block": blocks(inputs, width, count)}
        if level < len(widths) - 1:
            parts["downsample"] = nn.Conv2d(width, width, 3, stride=2, padding=1)
        down.append(nn.ModuleDict(parts))
        inputs = widths[level + 1] if level < len(widths) - 1 else width  # it comes from below
        parts = {"block": blocks(inputs, width, count)}
        if level:
            parts["upsample"] = nn.ModuleDict({"conv1": nn.Conv2d(width, 4 * width, 3, padding=1)})
        up.append(nn.ModuleDict(parts))
        maps = {name: nn.Linear(z_channels, inputs) for name in ("gamma", "beta")}
        adaptive.append(nn.ModuleDict(maps))
    encoder = {
        "conv_in": nn.Conv2d(in_channels, ch, 3, padding=1, bias=False),
        "down": nn.ModuleList(down),
        "mid_block": blocks(widths[-1], widths[-1], count),
        "norm_out": nn.GroupNorm(32, widths[-1], eps=1e-6),
        "conv_out": nn.Conv2d(widths[-1], z_channels, 1),
    }
    decoder = {
        "conv_in": nn.Conv2d(z_channels, widths[-1], 3, padding=1),
        "mid_block": blocks(widths[-1], widths[-1], count),
        "up": nn.ModuleList(up),
        "adaptive": nn.ModuleList(adaptive),
        "norm_out": nn.GroupNorm(32, ch * ch_mult[0], eps=1e-6),
        "conv_out": nn.Conv2d(ch * ch_mult[0], out_ch, 3, padding=1),
    }
    return nn.ModuleDict({"encoder": nn.ModuleDict(encoder), "decoder": nn.ModuleDict(decoder)})


def encode(encoder, x):
    functional = import_torch().nn.functional
    x = encoder["conv_in"](x)
    for level in encoder["down"]:
        x = run(level["block"], x)
        if "downsample" in level:
            x = level["downsample"](x)
    x = run(encoder["mid_block"], x)
    return encoder["conv_out"](functional.silu(encoder["norm_out"](x)))


def decode(decoder, codes):
    functional = import_torch().nn.functional
    deviation = (codes.var((2, 3), correction=1) + 1e-6).sqrt()
    x = run(decoder["mid_block"], decoder["conv_in"](codes))
    for level, maps in reversed(list(zip(decoder["up"], decoder["adaptive"], strict=True))):
        scale, bias = maps["gamma"](deviation), maps["beta"](codes.mean((2, 3)))
        x = functional.group_norm(x, 32, eps=1e-6) * scale[..., None, None] + bias[..., None, None]
        x = run(level["block"], x)
        if "upsample" in level:
            y = level["upsample"]["conv1"](x)
            # A quarter of the channels a pixel, where PyTorch's shuffle has every fourth.
            b, c, h, w = y.shape
            y = y.reshape(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
            x = functional.pixel_shuffle(y, 2)
    return decoder["conv_out"](functional.silu(decoder["norm_out"](x)))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_open_magvit2(weights, tmp_path):
    torch = import_torch()
    model = magvit2(**MAGVIT2_DDCONFIG)
    args = {"ddconfig": MAGVIT2_DDCONFIG, "n_embed": 64, "embed_dim": 6, "lossconfig": {}}
    args |= ENTROPIES | {"token_factorization": True, "factorized_bits": [2, 4]}
    class_path = "src.Open_MAGVIT2.models.lfqgan.VQModel"
    path = with_averages(model, tmp_path, class_path, args, weights)
    imported = convert.load(path, weights=weights)
    assert imported.format == "open-magvit2"
    tokenizer = imported.model
    signs = np.sign(((np.arange(64)[:, None] >> np.arange(6)) & 1) - 0.5)
    # The second has two codes, whose variance shows what it is divided by.
    for size in [(32, 32)] if weights == "raw" else [(32, 32), (4, 8)]:
        x = images(*size, batch=4)
        with torch.no_grad():
            z = encode(model["encoder"], torch.from_numpy(nchw(x)))
            codes = torch.where(z > 0, 1.0, -1.0)
            reconstruction = nhwc(decode(model["decoder"], codes))
        out = tokenizer(jnp.asarray(x))
        low, high = (
            sum(2**i * (nhwc(z)[..., j] > 0) for i, j in enumerate(channels))
            for channels in (range(2), range(2, 6))
        )
        assert_close(out.z, nhwc(z))
        assert_same_ids(out.ids, low + 4 * high, lambda z=z: -nhwc(z) @ signs.T)
        assert_close(out.reconstruction, reconstruction)
    assert_close(tokenizer.decode(tokenizer.encode(jnp.asarray(x))), reconstruction)
    assert any("id % 2**2 and id // 2**2" in note for note in imported.notes)


def test_open_magvit2_by_shapes_alone(tmp_path):
    model = magvit2(**MAGVIT2_DDCONFIG)
    path = with_averages(model, tmp_path, "", {}, "ema")
    (tmp_path / "last.yaml").unlink()
    config = convert.load(path).model.config.autoencoder
    found = [config.base_channels, config.channel_multipliers, config.num_res_blocks]
    assert found == [32, (1, 3, 2), 1]
