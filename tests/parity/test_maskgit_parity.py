"""Imported MaskGIT tokenizers against evaluations of the published architecture written here.

Neither the published code nor its port is on PyPI. The first network is Flax linen, whose automatic
names are those of the published file; the second is PyTorch, with the names of the port.
"""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import (
    SIZES,
    assert_close,
    assert_same_ids,
    images,
    nchw,
    nhwc,
    random_array,
    randomise,
)
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import import_torch

from vqgan import convert

pytestmark = pytest.mark.parity

WIDTH, MULTIPLIERS, BLOCKS, LATENTS, CODES = 32, (1, 2, 1), 2, 8, 24


class ResBlock(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        y = x
        for _ in range(2):
            y = linen.swish(linen.GroupNorm()(y))
            y = linen.Conv(self.width, (3, 3), use_bias=False)(y)
        if x.shape[-1] == self.width:
            return x + y
        return y + linen.Conv(self.width, (1, 1), use_bias=False)(y)


class Encoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH, (3, 3), use_bias=False)(x)
        for level, multiplier in enumerate((*MULTIPLIERS, MULTIPLIERS[-1])):
            if 0 < level < len(MULTIPLIERS):
                x = sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
            for _ in range(BLOCKS):
                x = ResBlock(WIDTH * multiplier)(x)
        return linen.Conv(LATENTS, (1, 1))(linen.swish(linen.GroupNorm()(x)))


class Decoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH * MULTIPLIERS[-1], (3, 3))(x)
        for level, multiplier in enumerate((MULTIPLIERS[-1], *MULTIPLIERS[::-1])):
            if level > 1:
                x = jnp.kron(x, jnp.ones((1, 2, 2, 1)))
                x = linen.Conv(x.shape[-1], (3, 3))(x)
            for _ in range(BLOCKS):
                x = ResBlock(WIDTH * multiplier)(x)
        return linen.Conv(3, (3, 3))(linen.swish(linen.GroupNorm()(x)))


def flax_network():
    """A published file's tree with random values, and what it makes of latents and of images."""
    parts = {"encoder": (Encoder(), 3), "decoder": (Decoder(), LATENTS)}
    shapes = {
        name: jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, channels)))
        for name, (module, channels) in parts.items()
    }
    rng = np.random.default_rng(0)
    params = {}
    for part, variables in shapes.items():
        for path, leaf in flatten_dict(variables["params"]).items():
            value = random_array(rng, path[-1], leaf.shape[::-1])  # outputs first, for its fan-in
            params[(part, *path)] = value.transpose()
    params["quantizer", "codebook"] = rng.normal(size=(CODES, LATENTS)).astype(np.float32)
    params = unflatten_dict(params)

    def network(part, x):
        return np.asarray(parts[part][0].apply({"params": params[part]}, jnp.asarray(x)))

    return {"params": params}, network, params["quantizer"]["codebook"]


def port_network():
    """The same of the port: a state dict, and NHWC in and out."""
    torch = import_torch()
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            if inputs != outputs:
                self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False)

        def forward(self, x):
            y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
            return y + (self.nin_shortcut(y) if hasattr(self, "nin_shortcut") else x)

    def blocks(inputs, outputs):
        return [Block(inputs if i == 0 else outputs, outputs) for i in range(BLOCKS)]

    widths = [WIDTH * m for m in MULTIPLIERS]
    lowest, levels = widths[-1], len(widths)

    def part(inputs, first, before, last, outputs, *, kernel, bias):
        """All but the order of execution: from `first` channels, by `before` a level, to `last`."""
        module = nn.Module()
        module.conv_in = nn.Conv2d(inputs, first, 3, padding=1, bias=bias)
        module.mid = nn.ModuleList(blocks(lowest, lowest))
        stages = nn.ModuleList(nn.Module() for _ in widths)
        for stage, width, previous in zip(stages, widths, before, strict=True):
            stage.block = nn.ModuleList(blocks(previous, width))
        module.norm_out = nn.GroupNorm(32, last, eps=1e-6)
        module.conv_out = nn.Conv2d(last, outputs, kernel, padding=kernel // 2)
        return module, stages

    model = nn.Module()
    model.encoder, down = part(
        3, WIDTH, [WIDTH, *widths[:-1]], lowest, LATENTS, kernel=1, bias=False
    )
    model.encoder.down = down
    model.decoder, up = part(
        LATENTS, lowest, [*widths[1:], lowest], widths[0], 3, kernel=3, bias=True
    )
    model.decoder.up = up
    for level in range(1, levels):
        up[level].upsample_conv = nn.Conv2d(widths[level], widths[level], 3, padding=1)
    model.quantize = nn.Module()
    model.quantize.embedding = nn.Embedding(CODES, LATENTS)
    randomise(model.state_dict().items())

    def encode(x):
        for level, stage in enumerate(down):
            x = F.avg_pool2d(x, 2) if level else x
            for block in stage.block:
                x = block(x)
        for block in model.encoder.mid:
            x = block(x)
        return x

    def decode(x):
        for block in model.decoder.mid:
            x = block(x)
        for level in reversed(range(levels)):
            for block in up[level].block:
                x = block(x)
            if level:
                x = up[level].upsample_conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return x

    def network(name, x):
        module, inside = getattr(model, name), {"encoder": encode, "decoder": decode}[name]
        with torch.no_grad():
            x = inside(module.conv_in(torch.from_numpy(nchw(x))))
            return nhwc(module.conv_out(F.silu(module.norm_out(x))))

    return model.state_dict(), network, model.quantize.embedding.weight.detach().numpy()


@pytest.fixture(scope="module", params=["flax", "port"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "flax":
        tree, network, codebook = flax_network()
        path = folder / "tokenizer_imagenet256_checkpoint"
        path.write_bytes(msgpack_serialize(tree))
    else:
        tree, network, codebook = port_network()
        path = folder / "maskgit-vqgan-imagenet-f16-256.bin"
        import_torch().save(tree, path)
    return convert.load(path), network, codebook


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_latents_ids_and_images_are_those_of_the_published_network(case, height, width):
    imported, network, codebook = case
    assert imported.format == "maskgit"
    x = images(height, width)
    ours = imported.model(jnp.asarray(x))

    z = network("encoder", (x + 1) / 2)  # which sees pixels in [0, 1]
    cost = ((z[..., None, :].astype(np.float64) - codebook) ** 2).sum(-1)
    ids = cost.argmin(-1)
    assert_close(ours.z, z)
    assert_same_ids(ours.ids, ids, lambda: cost)
    decoded = 2 * network("decoder", codebook[ids]) - 1
    assert_close(imported.model.decode(jnp.asarray(ids, jnp.int32)), decoded)
    assert_close(ours.reconstruction, 2 * network("decoder", codebook[np.asarray(ours.ids)]) - 1)
