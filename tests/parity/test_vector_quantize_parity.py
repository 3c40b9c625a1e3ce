"""Quantizers against those of vector-quantize-pytorch, on the same weights and latents.

Where the two define a thing differently, the test says so and compares what both must agree on. The
differences, all in one place:

- a learned codebook: theirs has one loss, whose gradient is that of our two terms at beta 1;
- residual: theirs passes the gradient of z_q once for every stage, unless `quant_grad_frac` is 1;
- FSQ: theirs widens the bounds by the margin by which the paper narrows them, and shifts even
  levels by atanh, the inverse of the tanh that follows, where the paper has tan;
- LFQ and BSQ: channel 0 is the highest bit of their ids, and the lowest of ours; entropies keep the
  logarithm finite by a clamp at 1e-5 there, by adding 1e-5, in the batch's, here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import import_torch, import_vector_quantize

from vqgan.tokenizer.quantizers import (
    BSQConfig,
    EMAConfig,
    FSQConfig,
    LFQConfig,
    ProductConfig,
    ResidualConfig,
    SimVQConfig,
    VQConfig,
    make_quantizer,
)

pytestmark = pytest.mark.parity

K, D = 12, 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def latents(seed=0, channels=D):
    return np.random.default_rng(seed).standard_normal((2, 3, 4, channels)).astype(np.float32)


def table(seed=1, channels=D):
    return np.random.default_rng(seed).standard_normal((K, channels)).astype(np.float32)


def build(config, **values):
    """Our quantizer, with given values of its variables."""
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    for name, value in values.items():
        getattr(quantizer, name)[...] = jnp.array(value)
    return quantizer


@dataclasses.dataclass
class Found:
    """What both sides are asked for."""

    z_q: np.ndarray
    ids: np.ndarray
    losses: dict[str, float]
    straight: np.ndarray
    """Gradient of `(z_q * weights).sum()` with respect to the latents."""
    pull: np.ndarray
    """Gradient of the sum of the losses with respect to the latents."""
    learned: list[np.ndarray]
    """The same, with respect to the parameters."""


def ours(quantizer, z, weights):
    graphdef, params, rest = nnx.split(quantizer, nnx.Param, ...)

    @jax.jit
    def values_and_gradients(z, params):
        def call(z, params):
            return nnx.merge(graphdef, params, rest)(z)

        out = call(z, params)
        straight = jax.grad(lambda z: (call(z, params).z_q * weights).sum())(z)
        pull, learned = jax.grad(
            lambda z, params: sum(call(z, params).losses.values()), argnums=(0, 1)
        )(z, params)
        return vars(out), straight, pull, jax.tree.leaves(learned)

    out, *gradients = values_and_gradients(jnp.array(z), params)
    return Found(**out, straight=gradients[0], pull=gradients[1], learned=gradients[2])


def published(module, z, weights, *, parameters=(), **options):
    """Their training mode. Channels are last; positions are in one row."""
    torch = import_torch()
    x = torch.tensor(z.reshape(2, 12, -1), requires_grad=True)
    z_q, ids, loss = module.train()(x, **options)
    loss = loss.mean()  # over stages, or groups
    (straight,) = torch.autograd.grad(
        (z_q * torch.tensor(weights.reshape(2, 12, -1))).sum(), x, retain_graph=True
    )
    pull, *learned = torch.autograd.grad(loss, [x, *parameters])
    return Found(
        z_q=z_q.detach().numpy().reshape(z.shape),
        ids=ids.numpy(),
        losses={"loss": float(loss.detach())},
        straight=straight.numpy().reshape(z.shape),
        pull=pull.numpy().reshape(z.shape),
        learned=[gradient.numpy() for gradient in learned],
    )


def assert_agree(a, b, *names, ids=None):
    np.testing.assert_array_equal(a.ids, b.ids.reshape(a.ids.shape) if ids is None else ids)
    for name in ("z_q", *names):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), err_msg=name, **CLOSE)


def vector_quantize(codes, **options):
    """Theirs, with given codes."""
    module = import_vector_quantize().VectorQuantize(dim=D, codebook_size=K, **options)
    fill(module, codes)
    return module


def fill(module, codes):
    module._codebook.embed.data.copy_(import_torch().tensor(codes)[None])


LEARNED = {"learnable_codebook": True, "ema_update": False}


@pytest.mark.parametrize("rotation", [False, True])
def test_learned_codebook(rotation):
    z, weights = latents(), latents(2)
    module = vector_quantize(table(), **LEARNED, rotation_trick=rotation, commitment_weight=0.7)
    b = published(module, z, weights, parameters=[module._codebook.embed])
    config = VQConfig(codebook_size=K, dim=D, beta=1.0, rotation=rotation)
    a = ours(build(config, codebook=table()), z, weights)
    assert len(np.unique(a.ids)) > 4
    assert_agree(a, b, "straight")
    # Theirs is one term with both gradients: half of the value of ours.
    for value in a.losses.values():
        np.testing.assert_allclose(0.7 * value, b.losses["loss"], **CLOSE)
    np.testing.assert_allclose(0.7 * a.pull, b.pull, **CLOSE)
    np.testing.assert_allclose(0.7 * a.learned[0], b.learned[0][0], **CLOSE)


def test_moving_averages():
    options = {"decay": 0.9, "eps": 0.1, "rotation_trick": False, "commitment_weight": 0.25}
    module = vector_quantize(table(), **options)
    module._codebook.embed_avg.copy_(module._codebook.embed)
    config = EMAConfig(
        codebook_size=K, dim=D, decay=0.9, epsilon=0.1, init_from_data=False, revive_after=0
    )
    quantizer = build(config, codebook=table(), sums=table())
    for batch in range(3):
        z, weights = latents(batch), latents(9)
        a, b = ours(quantizer, z, weights), published(module, z, weights)
        assert_agree(a, b, "straight", "pull")
        np.testing.assert_allclose(a.losses["commitment"], b.losses["loss"], **CLOSE)
        quantizer.maintain(jnp.array(z), a.ids, jax.random.key(0))
        for mine, name in (
            ("codebook", "embed"),
            ("sums", "embed_avg"),
            ("counts", "cluster_size"),
        ):
            expected = getattr(module._codebook, name)[0].numpy()
            np.testing.assert_allclose(getattr(quantizer, mine)[...], expected, **CLOSE)


def test_cosine_codebook():
    """Theirs moves by averages of directions only, ours by the optimiser: it is frozen here."""
    codes = table() / np.linalg.norm(table(), axis=-1, keepdims=True)
    z, weights = 5 * latents(), latents(2)
    module = vector_quantize(
        codes, use_cosine_sim=True, rotation_trick=False, commitment_weight=0.25
    )
    b = published(module, z, weights, freeze_codebook=True)
    a = ours(build(VQConfig(codebook_size=K, dim=D, normalize=True), codebook=codes), z, weights)
    assert_agree(a, b, "straight", "pull")
    np.testing.assert_allclose(a.losses["commitment"], b.losses["loss"], **CLOSE)


@pytest.mark.parametrize("whole", [False, True])
def test_residual(whole):
    """Without `quant_grad_frac` their z_q passes the gradient on once a stage, with it once; it is
    then in the losses of later stages too, where ours see constants."""
    depth, z, weights = 3, latents(), latents(2)
    module = import_vector_quantize().ResidualVQ(
        dim=D,
        codebook_size=K,
        num_quantizers=depth,
        quant_grad_frac=float(whole),
        rotation_trick=False,
        **LEARNED,
    )
    config = ResidualConfig(
        inner=VQConfig(codebook_size=K, dim=D, beta=1.0), depth=depth, shared=False
    )
    quantizer = build(config)
    for i in range(depth):
        quantizer.stages[i].codebook[...] = jnp.array(table(i) / (i + 1))
        fill(module.layers[i], table(i) / (i + 1))
    parameters = [layer._codebook.embed for layer in module.layers]
    a, b = ours(quantizer, z, weights), published(module, z, weights, parameters=parameters)
    assert_agree(a, b)
    np.testing.assert_allclose(a.losses["commitment"], b.losses["loss"], **CLOSE)
    np.testing.assert_allclose((1 if whole else depth) * a.straight, b.straight, **CLOSE)
    if not whole:
        np.testing.assert_allclose(a.pull, b.pull, **CLOSE)
        for mine, published_one in zip(a.learned, b.learned, strict=True):
            np.testing.assert_allclose(mine, published_one[0], **CLOSE)


def test_residual_with_one_codebook():
    """Their moving average takes the stages one after the other, ours all at once: frozen here."""
    z, weights = latents(), latents(2)
    module = import_vector_quantize().ResidualVQ(
        dim=D, codebook_size=K, num_quantizers=3, shared_codebook=True, rotation_trick=False
    )
    fill(module.layers[0], table())
    quantizer = build(ResidualConfig(inner=EMAConfig(codebook_size=K, dim=D, beta=1.0), depth=3))
    quantizer.stages[0].codebook[...] = jnp.array(table())
    a, b = ours(quantizer, z, weights), published(module, z, weights, freeze_codebook=True)
    assert_agree(a, b, "pull")
    np.testing.assert_allclose(a.losses["commitment"], b.losses["loss"], **CLOSE)


def test_product_is_grouped_residual_of_one_stage():
    z, weights = latents(channels=2 * D), latents(2, 2 * D)
    module = import_vector_quantize().GroupedResidualVQ(
        dim=2 * D, groups=2, codebook_size=K, num_quantizers=1, rotation_trick=False, **LEARNED
    )
    config = ProductConfig(inner=VQConfig(codebook_size=K, dim=D, beta=1.0), groups=2)
    quantizer = build(config)
    for i, group in enumerate(module.rvqs):
        quantizer.stages[i].codebook[...] = jnp.array(table(i))
        fill(group.layers[0], table(i))
    a, b = ours(quantizer, z, weights), published(module, z, weights)
    assert_agree(
        a, b, "straight", "pull", ids=np.moveaxis(b.ids[..., 0], 0, -1).reshape(a.ids.shape)
    )
    np.testing.assert_allclose(a.losses["commitment"], b.losses["loss"], **CLOSE)


@pytest.mark.parametrize("rotation", [False, True])
def test_simvq(rotation):
    z, weights = latents(), latents(2)
    torch = import_torch()
    module = import_vector_quantize().SimVQ(dim=D, codebook_size=K, rotation_trick=rotation)
    layer = np.random.default_rng(5).standard_normal((D, D)).astype(np.float32)
    module.frozen_codebook.copy_(torch.tensor(table()))
    module.code_transform.weight.data.copy_(torch.tensor(layer.T))
    b = published(module, z, weights, parameters=[module.code_transform.weight])
    config = SimVQConfig(codebook_size=K, dim=D, rotation=rotation)
    a = ours(build(config, table=table(), layer=layer), z, weights)
    assert_agree(a, b, "straight", "pull")
    np.testing.assert_allclose(sum(a.losses.values()), b.losses["loss"], **CLOSE)
    np.testing.assert_allclose(a.learned[0].T, b.learned[0], **CLOSE)


def published_fsq(levels, **options):
    return import_vector_quantize().FSQ(list(levels), **options)


LEVELS = [(5, 3, 7), (8, 4, 6), (4, 3, 5)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_has_the_same_codes_and_ids(levels, symmetric):
    module = published_fsq(levels, preserve_symmetry=symmetric)
    quantizer = build(FSQConfig(levels=levels, symmetric=symmetric))
    every = np.arange(quantizer.codebook_size, dtype=np.int32)
    codes = quantizer.codes(jnp.array(every).reshape(1, 1, -1))
    np.testing.assert_allclose(codes[0, 0], module.implicit_codebook, **CLOSE)


def their_fsq(module, z, weights):
    torch = import_torch()
    x = torch.tensor(z.reshape(2, 12, -1), requires_grad=True)
    z_q, ids = module.train()(x)
    (z_q * torch.tensor(weights.reshape(2, 12, -1))).sum().backward()
    return (
        value.detach().numpy() for value in (z_q.reshape(z.shape), ids, x.grad.reshape(z.shape))
    )


@pytest.mark.parametrize("levels", LEVELS)
def test_symmetric_fsq(levels):
    z, weights = 2 * latents(), latents(2)
    a = ours(build(FSQConfig(levels=levels, symmetric=True)), z, weights)
    z_q, ids, straight = their_fsq(published_fsq(levels, preserve_symmetry=True), z, weights)
    np.testing.assert_array_equal(a.ids, ids.reshape(a.ids.shape))
    np.testing.assert_allclose(a.z_q, z_q, **CLOSE)
    np.testing.assert_allclose(a.straight, straight, **CLOSE)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_but_for_the_margin_and_the_shift(levels, monkeypatch):
    """With the paper's margin, and latents moved by what the shifts differ in, they are equal."""
    z, weights = 2 * latents(), latents(2)
    a = ours(build(FSQConfig(levels=levels)), z, weights)
    module = published_fsq(levels)
    bound = module.bound
    monkeypatch.setattr(module, "bound", lambda z, **options: bound(z, eps=-1e-3, **options))
    half = (np.array(levels) - 1) * (1 - 1e-3) / 2
    offset = np.where(np.array(levels) % 2 == 0, 0.5, 0.0) / half
    moved = (z + np.tan(offset) - np.arctanh(offset)).astype(np.float32)
    z_q, ids, straight = their_fsq(module, moved, weights)
    np.testing.assert_array_equal(a.ids, ids.reshape(a.ids.shape))
    np.testing.assert_allclose(a.z_q, z_q, **CLOSE)
    np.testing.assert_allclose(a.straight, straight, **CLOSE)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_as_it_is_differs_at_the_thresholds_only(levels):
    z = np.random.default_rng(3).standard_normal((2, 40, 50, 3)).astype(np.float32)
    quantizer = build(FSQConfig(levels=levels))
    _, ids = published_fsq(levels)(import_torch().tensor(z.reshape(2, 2000, 3)))
    same = np.asarray(quantizer(jnp.array(z)).ids) == ids.numpy().reshape(2, 40, 50)
    assert 0.97 < same.mean() < 1
    bounded = np.asarray(quantizer._bounded(jnp.array(z)))
    to_threshold = np.abs(bounded - np.floor(bounded) - 0.5).min(-1)
    assert same[to_threshold > 0.01].all()


def signs(spherical, *, codebooks=1):
    return import_vector_quantize().LFQ(
        dim=D * codebooks,
        codebook_size=2**D,
        num_codebooks=codebooks,
        entropy_loss_weight=0.2,
        diversity_gamma=0.7,
        commitment_loss_weight=0.3,
        spherical=spherical,
    )


def their_signs(module, z, weights):
    """Ids in our order of bits, loss terms as ours are weighted, gradients."""
    torch = import_torch()
    x = torch.tensor(z.reshape(2, 12, -1), requires_grad=True)
    out, terms = module.train()(x, inv_temperature=2.0, return_loss_breakdown=True)
    bits = (out.indices.numpy()[..., None] >> np.arange(D)[::-1]) & 1
    loss = {
        "commitment": 0.3 * terms.commitment,
        "sample_entropy": 0.2 * terms.per_sample_entropy,
        "batch_entropy": -0.2 * 0.7 * terms.batch_entropy,
    }
    np.testing.assert_allclose(
        float(sum(loss.values()).detach()), float(out.entropy_aux_loss.detach()), rtol=1e-5
    )
    (straight,) = torch.autograd.grad(
        (out.quantized * torch.tensor(weights.reshape(2, 12, -1))).sum(), x, retain_graph=True
    )
    (pull,) = torch.autograd.grad(out.entropy_aux_loss, x)
    return Found(
        z_q=out.quantized.detach().numpy().reshape(z.shape),
        ids=(bits << np.arange(D)).sum(-1),
        losses={name: float(value.detach()) for name, value in loss.items()},
        straight=straight.numpy().reshape(z.shape),
        pull=pull.numpy().reshape(z.shape),
        learned=[],
    )


OPTIONS = {
    "dim": D,
    "entropy_temperature": 0.5,
    "entropy_weight": 0.2,
    "diversity": 0.7,
    "commitment_weight": 0.3,
}


@pytest.mark.parametrize(
    ("config", "codebooks"),
    [
        (LFQConfig(**OPTIONS), 1),
        (BSQConfig(**OPTIONS), 1),
        (ProductConfig(inner=LFQConfig(**OPTIONS), groups=2), 2),
    ],
    ids=["lfq", "bsq", "two codebooks"],
)
def test_signs_and_their_entropies(config, codebooks):
    z, weights = 0.5 * latents(channels=config.dim), latents(2, config.dim)
    a = ours(build(config), z, weights)
    b = their_signs(signs(isinstance(config, BSQConfig), codebooks=codebooks), z, weights)
    assert_agree(a, b, "straight")
    assert a.losses.keys() == b.losses.keys()
    for name, value in b.losses.items():
        # Ours adds 1e-5 to the mean probability of each of the codes.
        atol = 2**D * 1e-5 * 0.2 * 0.7 if name == "batch_entropy" else 1e-5
        np.testing.assert_allclose(a.losses[name], value, rtol=1e-5, atol=atol, err_msg=name)
    np.testing.assert_allclose(a.pull, b.pull, rtol=1e-4, atol=1e-5)
