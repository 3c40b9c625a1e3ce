"""LlamaGen's models, imported, against their architecture written out in PyTorch functions.

Its code is in no package. What follows was compared with it once, on random weights.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import SIZES, assert_close, assert_same_ids, images, nchw, nhwc, random_array
from reference import import_torch

import vqgan.convert

pytestmark = pytest.mark.parity

# The tokenizer: widths by level, channels of the latents and of the codes, and the codes.
WIDTHS, LATENTS, DIM, CODES = (32, 64, 64), 16, 8, 200
# The prior.
DEPTH, HEADS, WIDTH, HIDDEN, VOCABULARY, CLASSES = 3, 2, 48, 256, 60, 5


# Names and shapes of the published tensors.


def conv_shapes(name, inputs, outputs, size):
    return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}


def norm_shapes(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def block_shapes(name, inputs, outputs):
    shapes = norm_shapes(f"{name}.norm1", inputs) | norm_shapes(f"{name}.norm2", outputs)
    shapes |= conv_shapes(f"{name}.conv1", inputs, outputs, 3)
    shapes |= conv_shapes(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        shapes |= conv_shapes(f"{name}.nin_shortcut", inputs, outputs, 1)
    return shapes


def attention_shapes(name, channels):
    shapes = norm_shapes(f"{name}.norm", channels)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= conv_shapes(f"{name}.{layer}", channels, channels, 1)
    return shapes


def half_shapes(half, widths, blocks, resample, lowest):
    """The middle and the blocks of one half, in the order that its blocks are numbered in."""
    low = WIDTHS[-1]
    shapes = block_shapes(f"{half}.mid.0", low, low) | block_shapes(f"{half}.mid.2", low, low)
    shapes |= attention_shapes(f"{half}.mid.1", low)
    before = WIDTHS[0] if half == "encoder" else low
    for i, width in enumerate(widths):
        place = f"{half}.conv_blocks.{i}"
        for j in range(blocks):
            shapes |= block_shapes(f"{place}.res.{j}", before if j == 0 else width, width)
            if i == lowest:
                shapes |= attention_shapes(f"{place}.attn.{j}", width)
        if i < len(widths) - 1:
            shapes |= conv_shapes(f"{place}.{resample}.conv", width, width, 3)
        before = width
    return shapes | norm_shapes(f"{half}.norm_out", before)


def tokenizer_shapes():
    last = len(WIDTHS) - 1
    return (
        conv_shapes("encoder.conv_in", 3, WIDTHS[0], 3)
        | half_shapes("encoder", WIDTHS, 2, "downsample", last)
        | conv_shapes("encoder.conv_out", WIDTHS[-1], LATENTS, 3)
        | conv_shapes("quant_conv", LATENTS, DIM, 1)
        | {"quantize.embedding.weight": (CODES, DIM), "quantize.codebook_used": (65536,)}
        | conv_shapes("post_quant_conv", DIM, LATENTS, 1)
        | conv_shapes("decoder.conv_in", LATENTS, WIDTHS[-1], 3)
        | half_shapes("decoder", WIDTHS[::-1], 3, "upsample", 0)
        | conv_shapes("decoder.conv_out", WIDTHS[0], 3, 3)
    )


def discriminator_shapes():
    """PatchGAN of two strided layers and width 8."""
    shapes = conv_shapes("main.0", 3, 8, 4) | conv_shapes("main.8", 32, 1, 4)
    for conv, inputs, outputs in ((2, 8, 16), (5, 16, 32)):
        shapes[f"main.{conv}.weight"] = (outputs, inputs, 4, 4)
        shapes |= norm_shapes(f"main.{conv + 1}", outputs)
        shapes |= {f"main.{conv + 1}.running_{kind}": (outputs,) for kind in ("mean", "var")}
    return shapes


def prior_shapes():
    shapes = {
        "cls_embedding.embedding_table.weight": (CLASSES + 1, WIDTH),
        "tok_embeddings.weight": (VOCABULARY, WIDTH),
        "norm.weight": (WIDTH,),
        "output.weight": (VOCABULARY, WIDTH),
    }
    for i in range(DEPTH):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
            f"layers.{i}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{i}.feed_forward.w1.weight": (HIDDEN, WIDTH),
            f"layers.{i}.feed_forward.w3.weight": (HIDDEN, WIDTH),
            f"layers.{i}.feed_forward.w2.weight": (WIDTH, HIDDEN),
            f"layers.{i}.attention_norm.weight": (WIDTH,),
            f"layers.{i}.ffn_norm.weight": (WIDTH,),
        }
    return shapes


def random_tensors(shapes, seed):
    torch, rng = import_torch(), np.random.default_rng(seed)
    return {
        name: torch.from_numpy(random_array(rng, name, shape)) for name, shape in shapes.items()
    }


# The tokenizer, evaluated.


def layer(w, name, x, **options):
    return import_torch().nn.functional.conv2d(
        x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options
    )


def norm(w, name, x):
    group_norm = import_torch().nn.functional.group_norm
    return group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def swish(x):
    return x * x.sigmoid()


def block(w, name, x):
    y = layer(w, f"{name}.conv1", swish(norm(w, f"{name}.norm1", x)), padding=1)
    y = layer(w, f"{name}.conv2", swish(norm(w, f"{name}.norm2", y)), padding=1)
    if f"{name}.nin_shortcut.weight" in w:
        x = layer(w, f"{name}.nin_shortcut", x)
    return x + y


def attention(w, name, x):
    y = norm(w, f"{name}.norm", x)
    q, k, v = (layer(w, f"{name}.{part}", y).flatten(2) for part in "qkv")
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    return x + layer(w, f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))


def middle(w, half, x):
    x = attention(w, f"{half}.mid.1", block(w, f"{half}.mid.0", x))
    return block(w, f"{half}.mid.2", x)


def level(w, place, x, blocks):
    for j in range(blocks):
        x = block(w, f"{place}.res.{j}", x)
        if f"{place}.attn.{j}.q.weight" in w:
            x = attention(w, f"{place}.attn.{j}", x)
    return x


def latents(w, x):
    pad = import_torch().nn.functional.pad
    x = layer(w, "encoder.conv_in", x, padding=1)
    for i in range(len(WIDTHS)):
        place = f"encoder.conv_blocks.{i}"
        x = level(w, place, x, 2)
        if i < len(WIDTHS) - 1:
            x = layer(w, f"{place}.downsample.conv", pad(x, (0, 1, 0, 1)), stride=2)
    x = swish(norm(w, "encoder.norm_out", middle(w, "encoder", x)))
    return layer(w, "quant_conv", layer(w, "encoder.conv_out", x, padding=1))


def decoded(w, codes):
    x = layer(w, "decoder.conv_in", layer(w, "post_quant_conv", codes), padding=1)
    x = middle(w, "decoder", x)
    for i in range(len(WIDTHS)):
        place = f"decoder.conv_blocks.{i}"
        x = level(w, place, x, 3)
        if i < len(WIDTHS) - 1:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = layer(w, f"{place}.upsample.conv", x, padding=1)
    return layer(w, "decoder.conv_out", swish(norm(w, "decoder.norm_out", x)), padding=1)


def cosine_distances(w, z):
    """Of `[b, d, h, w]` latents to all codes, `[b, h, w, k]`, and the codes of length 1."""
    normalize = import_torch().nn.functional.normalize
    table = normalize(w["quantize.embedding.weight"], dim=1)
    z = normalize(z, dim=1).permute(0, 2, 3, 1)
    return 2 - 2 * z @ table.T, table


def judged(w, x):
    """Logits of the discriminator in evaluation."""
    functional = import_torch().nn.functional
    x = functional.leaky_relu(layer(w, "main.0", x, stride=2, padding=1), 0.2)
    for conv, stride in ((2, 2), (5, 1)):
        x = layer(w, f"main.{conv}", x, stride=stride, padding=1)
        mean, var, weight, bias = (
            w[f"main.{conv + 1}.{kind}"]
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        x = functional.leaky_relu(functional.batch_norm(x, mean, var, weight, bias), 0.2)
    return layer(w, "main.8", x, padding=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The weights, their import, and the discriminator's weights; as a training file has them."""
    torch = import_torch()
    weights = random_tensors(tokenizer_shapes(), 0)
    judge = random_tensors(discriminator_shapes(), 1)
    counted = {f"main.{i}.num_batches_tracked": torch.tensor(7) for i in (3, 6)}
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}}
    path = tmp_path_factory.mktemp("llamagen") / "0000003.pt"
    content = {
        "model": {name: torch.zeros_like(value) for name, value in weights.items()},
        "optimizer": adam,
        "discriminator": judge | counted,
        "optimizer_disc": adam,
        "steps": 3,
        "args": argparse.Namespace(commit_loss_beta=0.5, image_size=512, lr=1e-4),
        "ema": weights,
    }
    torch.save(content, path)
    return weights, vqgan.convert.load(path), judge


@pytest.mark.parametrize("size", SIZES)
def test_tokenizer_equals_the_published_architecture(tokenizer, size):
    torch = import_torch()
    weights, imported, _ = tokenizer
    x = images(*size)
    z = latents(weights, torch.from_numpy(nchw(x)))
    distances, table = cosine_distances(weights, z)
    ids = distances.argmin(-1)
    ours = imported.model(jnp.asarray(x))
    assert_close(ours.z, nhwc(z))
    assert_same_ids(ours.ids, ids, distances.numpy)
    # From here on with one set of ids, should two codes have been equally near.
    codes = table[torch.from_numpy(np.array(ours.ids)).long()].permute(0, 3, 1, 2)
    assert_close(ours.z_q, nhwc(codes))
    expected = nhwc(decoded(weights, codes))
    assert_close(ours.reconstruction, expected)
    assert_close(imported.model.decode(ours.ids), expected)


def test_discriminator_equals_the_published_architecture(tokenizer):
    _, imported, judge = tokenizer
    x = images(32, 48)
    logits = judged(judge, import_torch().from_numpy(nchw(x)))
    assert_close(imported.parts["discriminator"](jnp.asarray(x), train=False), nhwc(logits))


# The prior, evaluated.


def rms_norm(w, name, x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{name}.weight"]


def turns(rows, columns):
    """By which complex number each pair of channels is turned: 0 for the class, `[1 + t, pairs]`.

    Half of the pairs turn with the row, half with the column.
    """
    torch = import_torch()
    quarter = WIDTH // HEADS // 4
    frequencies = 1e4 ** -(torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (row, column)]
    turned = torch.exp(1j * torch.cat(angles, dim=1))
    return torch.cat([torch.zeros_like(turned[:1]), turned])


def logits_of(w, classes, drawn, grid):
    """Logits of the ids after each of the class and the `[b, n]` drawn ones, `[b, 1 + n, k]`."""
    torch = import_torch()
    silu = torch.nn.functional.silu
    first = w["cls_embedding.embedding_table.weight"][classes][:, None]
    x = torch.cat([first, w["tok_embeddings.weight"][drawn]], dim=1)
    b, t, _ = x.shape
    turn = turns(*grid)[:t, None]
    mask = torch.full((t, t), -torch.inf).triu(1)
    for i in range(DEPTH):
        fused = (
            rms_norm(w, f"layers.{i}.attention_norm", x) @ w[f"layers.{i}.attention.wqkv.weight"].T
        )
        q, k, v = fused.reshape(b, t, 3, HEADS, -1).unbind(2)
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.reshape(b, t, HEADS, -1, 2)) * turn).flatten(
                -2
            )
            for y in (q, k)
        )
        scores = torch.einsum("bqnc,bknc->bnqk", q, k) / q.shape[-1] ** 0.5 + mask
        y = torch.einsum("bnqk,bknc->bqnc", scores.softmax(-1), v).flatten(2)
        x = x + y @ w[f"layers.{i}.attention.wo.weight"].T
        y = rms_norm(w, f"layers.{i}.ffn_norm", x)
        gate, up = (y @ w[f"layers.{i}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (silu(gate) * up) @ w[f"layers.{i}.feed_forward.w2.weight"].T
    return rms_norm(w, "norm", x) @ w["output.weight"].T


@pytest.fixture(scope="module", params=["model", "module", "state_dict", ""])
def prior(request, tmp_path_factory):
    """The weights and their import, from under each name that a file can have them under."""
    weights = random_tensors(prior_shapes(), 2)
    directory = tmp_path_factory.mktemp("llamagen")
    path, config = directory / "c2i.pt", directory / "sizes.json"
    content = {"steps": 3, request.param: weights} if request.param else weights
    import_torch().save(content, path)
    config.write_text(json.dumps({"n_head": HEADS, "image_size": 64}))
    return weights, vqgan.convert.load(path, config=config).model


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_logits_equal_the_published_architecture(prior, grid):
    torch = import_torch()
    weights, ours = prior
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, *grid))
    classes = np.array([0, 4, 2])
    before = torch.from_numpy(ids.reshape(3, -1)[:, :-1])
    expected = logits_of(weights, torch.from_numpy(classes), before, grid)
    logits = ours(jnp.asarray(ids), jnp.asarray(classes))
    assert_close(logits.reshape(expected.shape), expected)
    expected = logits_of(weights, torch.full((3,), CLASSES), before, grid)
    assert_close(ours(jnp.asarray(ids)).reshape(expected.shape), expected)


def test_guided_greedy_samples_are_the_published_ones(prior):
    torch = import_torch()
    weights, ours = prior
    scale, classes = 2.5, torch.arange(CLASSES)
    null, drawn = torch.full_like(classes, CLASSES), torch.zeros((CLASSES, 0), dtype=torch.long)
    for _ in range(16):
        told, untold = (logits_of(weights, c, drawn, (4, 4))[:, -1] for c in (classes, null))
        best = (untold + (told - untold) * scale).argmax(-1)
        drawn = torch.cat([drawn, best[:, None]], dim=1)
    greedy = ours.sample(
        jnp.arange(CLASSES), rng=jax.random.key(0), temperature=0.0, guidance=scale
    )
    assert np.array_equal(greedy.reshape(CLASSES, -1), drawn)
    assert len(np.unique(drawn)) > CLASSES
