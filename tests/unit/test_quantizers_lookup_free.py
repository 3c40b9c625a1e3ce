"""Quantizers without a table, by their formulas in NumPy: LFQ, BSQ, FSQ.

The contract of all is in test_quantizer_contract.py.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from quantizing import (
    BSQ,
    IBQ,
    LFQ,
    assert_same,
    entropies,
    gradients,
    latents,
    make,
    run,
    unit,
)
from scipy.special import xlogy

from vqgan.serialization import flat_weights
from vqgan.tokenizer.quantizers import (
    BSQConfig,
    FSQConfig,
    LFQConfig,
)


@pytest.mark.parametrize("config", [IBQ, LFQ, BSQ])
def test_entropies_are_left_out_at_weight_0(config):
    z = latents()
    losses = run(make(config), z).losses
    without = run(make(dataclasses.replace(config, entropy_weight=0.0)), z).losses
    assert losses.keys() - without.keys() == {"sample_entropy", "batch_entropy"}
    assert_same(without, {name: losses[name] for name in without})


# Lookup-free quantisation.


def test_lfq_takes_signs_as_bits_from_the_lowest():
    quantizer = make(LFQ)
    z = jnp.array([[0.2, -3, 0], [-1, 5, 1e-9], [9, 9, 9], [-0.0, -1e-9, -1]]).reshape(1, 2, 2, 3)
    out = run(quantizer, z)
    assert out.ids.ravel().tolist() == [0b001, 0b110, 0b111, 0b000]
    assert out.z_q[0, 0].tolist() == [[1, -1, -1], [-1, 1, 1]]


def test_lfq_has_as_many_codes_as_its_bits_make():
    quantizer = make(LFQ)
    every = quantizer.codes(jnp.arange(8, dtype=jnp.int32).reshape(1, 2, 4))
    codes = {tuple(code) for code in np.asarray(every).reshape(-1, 3).tolist()}
    assert codes == set(itertools.product((-1.0, 1.0), repeat=3))
    assert quantizer.codebook_size == LFQ.codebook_size == 8
    assert flat_weights(quantizer) == {}


def lfq_entropies(z, temperature):
    """By the definition: a softmax over all codes."""
    codes = np.array(list(itertools.product((-1.0, 1.0), repeat=z.shape[-1])))
    return entropies(2 * np.asarray(z, np.float64) @ codes.T / temperature)


@pytest.mark.parametrize("scale", [0.01, 0.3])
@pytest.mark.parametrize(("bits", "groups"), [(6, [6]), (9, [6]), (3, [3, 3]), (4, [3, 3])])
def test_lfq_losses_equal_those_over_all_codes(scale, bits, groups):
    config = LFQConfig(
        dim=6,
        entropy_group_bits=bits,
        entropy_temperature=0.1,
        entropy_weight=0.2,
        diversity=0.7,
        commitment_weight=0.3,
    )
    z = scale * latents(shape=(2, 3, 4, 6))
    losses, flat = run(make(config), z).losses, np.asarray(z).reshape(-1, 6)
    sample, joint = lfq_entropies(flat, 0.1)
    parts = np.split(flat, np.cumsum(groups)[:-1], axis=-1)
    batch = sum(lfq_entropies(part, 0.1)[1] for part in parts)
    assert batch >= joint - 1e-4  # a bound, tight where there is one group
    commitment = 0.3 * np.square(np.abs(flat) - 1).mean()
    expected = {
        "commitment": commitment,
        "sample_entropy": 0.2 * sample,
        "batch_entropy": -0.2 * 0.7 * batch,
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name], value, rtol=2e-5, err_msg=name)


def test_lfq_entropy_pushes_latents_off_zero():
    z = jnp.array([0.02, -0.03, 0.01]).reshape(1, 1, 1, 3)
    config = dataclasses.replace(LFQ, entropy_temperature=0.1)
    to_z, _ = gradients(make(config), z, lambda out: out.losses["sample_entropy"])
    p = 1 / (1 + np.exp(-4 * np.asarray(z) / 0.1))
    slope = -p * (1 - p) * (xlogy(1, p) - xlogy(1, 1 - p)) * 4 / 0.1
    np.testing.assert_allclose(to_z, 0.1 * slope, rtol=1e-4)
    assert (np.sign(to_z) == -np.sign(z)).all()


# Binary spherical quantisation.


def test_bsq_takes_the_nearest_code_on_the_sphere():
    quantizer, z = make(BSQ), 5 * latents()
    out = run(quantizer, z)
    codes = np.array([bits[::-1] for bits in itertools.product((-1, 1), repeat=3)]) / np.sqrt(3)
    np.testing.assert_array_equal(out.ids, (unit(np.asarray(z)) @ codes.T).argmax(-1))
    np.testing.assert_allclose(out.z_q, codes[np.asarray(out.ids)], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(out.z_q, axis=-1), 1, rtol=1e-6)


def test_bsq_losses_equal_those_over_all_codes():
    config = BSQConfig(
        dim=6,
        entropy_group_bits=6,
        entropy_temperature=0.1,
        entropy_weight=0.2,
        diversity=0.7,
        commitment_weight=0.3,
    )
    z = latents(shape=(2, 3, 4, 6))
    out, u = run(make(config), z), unit(np.asarray(z).reshape(-1, 6))
    sample, batch = lfq_entropies(u / np.sqrt(6), 0.1)
    expected = {
        "commitment": 0.3 * np.square(np.asarray(out.z_q).reshape(-1, 6) - u).mean(),
        "sample_entropy": 0.2 * sample,
        "batch_entropy": -0.2 * 0.7 * batch,
    }
    assert out.losses.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(out.losses[name], value, rtol=2e-5, err_msg=name)


# Finite scalar quantisation.


def fsq_by_the_paper(z, levels):
    """Levels of each channel and what is rounded to them, after the paper's appendix."""
    levels = np.array(levels)
    half, offset = (levels - 1) * (1 - 1e-3) / 2, np.where(levels % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(np.asarray(z, np.float64) + np.tan(offset / half)) * half - offset
    return np.round(bounded), bounded


@pytest.mark.parametrize("levels", [(4, 3, 2), (8, 5, 7)])
def test_fsq_rounds_and_counts_as_the_paper(levels):
    z = 2 * latents(shape=(2, 8, 8, 3))
    out = run(make(FSQConfig(levels=levels)), z)
    whole, _ = fsq_by_the_paper(z, levels)
    half = np.array(levels) // 2
    np.testing.assert_allclose(out.z_q, whole / half, rtol=1e-6)
    places = np.array([1, levels[0], levels[0] * levels[1]])
    np.testing.assert_array_equal(out.ids, ((whole + half) * places).sum(-1))
    assert out.losses == {"quantizer": 0.0}


@pytest.mark.parametrize("symmetric", [False, True])
def test_fsq_reaches_every_code_and_no_other(symmetric):
    quantizer = make(FSQConfig(levels=(4, 3, 2), symmetric=symmetric))
    every = jnp.arange(24, dtype=jnp.int32).reshape(1, 4, 6)
    codes = np.asarray(quantizer.codes(every)).reshape(-1, 3)
    assert len(np.unique(codes, axis=0)) == quantizer.codebook_size == 24
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(-3.0, 3.0, 21)] * 3), -1)
    out = run(quantizer, grid)
    assert set(np.asarray(out.ids).ravel()) == set(range(24))
    assert np.abs(out.z_q).max() == 1.0
    if symmetric:
        np.testing.assert_allclose(np.unique(codes[:, 0]), np.array([-3, -1, 1, 3]) / 3, rtol=1e-6)
        # Up to the middle itself, which is a tie.
        mirrored = run(quantizer, -grid).z_q
        off = (np.abs(grid) > 0.1).all(-1)
        np.testing.assert_allclose(np.asarray(out.z_q)[off], -np.asarray(mirrored)[off])
