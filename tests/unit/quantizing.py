"""What the tests of quantizers share: a small config of each kind, and calls compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import logsumexp

from vqgan.tokenizer.quantizers import (
    BSQConfig,
    EMAConfig,
    FSQConfig,
    GumbelConfig,
    IBQConfig,
    LFQConfig,
    MultiScaleConfig,
    ProductConfig,
    ResidualConfig,
    SimVQConfig,
    VQConfig,
    make_quantizer,
)

SMALL = VQConfig(codebook_size=12, dim=3)
FIXED = dataclasses.replace(SMALL, init_from_data=False, revive_after=0)
GUMBEL = GumbelConfig(codebook_size=12, dim=3, kl_weight=0.3, temperature_steps=10)
IBQ = IBQConfig(codebook_size=12, dim=3, entropy_temperature=0.5)
LFQ = LFQConfig(dim=3, entropy_temperature=0.5, entropy_group_bits=2)
BSQ = BSQConfig(dim=3, entropy_temperature=0.5, entropy_group_bits=2, commitment_weight=0.25)
FSQ = FSQConfig(levels=(4, 3, 2))
EMA = EMAConfig(codebook_size=12, dim=3, decay=0.9, epsilon=0.1)
SIMVQ = SimVQConfig(codebook_size=12, dim=3)
RESIDUAL = ResidualConfig(inner=SMALL, depth=3, shared=False)
PRODUCT = ProductConfig(inner=FSQConfig(levels=(5,)), groups=3)
MULTISCALE = MultiScaleConfig(scales=(1, 2, 3), columns=(1, 3, 4), codebook_size=12, dim=3, phis=2)
NORMALIZED = dataclasses.replace(SMALL, normalize=True)
ROTATED = dataclasses.replace(SMALL, rotation=True, k_means=2)
USED = (7, 2, 9, 4, 0)
VQ_USED = dataclasses.replace(FIXED, used_codes=len(USED))


def latents(seed=0, shape=(2, 3, 4, 3)):
    return jax.random.normal(jax.random.key(seed), shape)


def make(config, *, spread=True, used=USED):
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    for i, stage in enumerate(getattr(quantizer, "stages", [quantizer])):
        if spread and hasattr(stage, "codebook"):  # among the latents, as after training
            stage.codebook[...] = latents(1 + i, stage.codebook.shape)
    if getattr(quantizer, "used", None) is not None:
        quantizer.used[...] = jnp.array(used)
    return quantizer


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, z, options):
    return nnx.merge(graphdef, state)(z, **options)


def run(quantizer, z, **options):
    """A call, compiled once for all tests of a config."""
    return _run(*nnx.split(quantizer), z, options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(graphdef, objective, params, rest, z, options):
    return jax.grad(
        lambda z, params: objective(nnx.merge(graphdef, params, rest)(z, **options)),
        argnums=(0, 1),
    )(z, params)


def gradients(quantizer, z, objective, **options):
    """Of objective(output) with respect to the latents and the parameters by name."""
    graphdef, params, rest = nnx.split(quantizer, nnx.Param, ...)
    to_z, to_params = _gradients(graphdef, objective, params, rest, z, options)
    return to_z, {
        ".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(to_params)
    }


def everything(out):
    """An objective that all of an output has a part in."""
    return out.z_q.sum() + sum(out.losses.values())


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rotation_by_matrices(z, code):
    """The d x d matrix that the rotation trick multiplies its latent by."""
    a, b = unit(z), unit(code)
    r = unit(a + b)
    turn = np.eye(len(z)) - 2 * np.outer(r, r) + 2 * np.outer(b, a)
    np.testing.assert_allclose(turn @ turn.T, np.eye(len(z)), atol=1e-9)
    return turn * np.linalg.norm(code) / np.linalg.norm(z)


def gumbel_logits(quantizer, z):
    weight, bias = (
        np.asarray(x[...], np.float64) for x in (quantizer.proj_weight, quantizer.proj_bias)
    )
    return np.asarray(z, np.float64) @ weight.T + bias


def entropies(logits):
    """Mean entropy of the rows, and entropy of their mean as MAGVIT-2 computes it."""
    log_p = logits - logsumexp(logits, axis=-1, keepdims=True)
    mean = np.exp(log_p).mean(0)
    return -(np.exp(log_p) * log_p).sum(-1).mean(), -(mean * np.log(mean + 1e-5)).sum()
