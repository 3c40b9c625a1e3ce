"""Quantizers made of others, by their formulas in NumPy: residual, product.

The contract of all is in test_quantizer_contract.py; multi-scale has a file of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from quantizing import (
    EMA,
    RESIDUAL,
    SMALL,
    gradients,
    latents,
    make,
    run,
)

from vqgan.tokenizer.quantizers import (
    ProductConfig,
    ResidualConfig,
)

# Residual quantisation.


def test_residual_quantises_what_is_left_over():
    quantizer, z = make(RESIDUAL), latents()
    out, rest, expected = run(quantizer, z), np.asarray(z, np.float64), []
    for i, stage in enumerate(quantizer.stages):
        codes = np.asarray(stage.codebook[...], np.float64)
        ids = np.square(rest[..., None, :] - codes).sum(-1).argmin(-1)
        np.testing.assert_array_equal(out.ids[..., i], ids)
        rest = rest - codes[ids]
        expected.append(np.square(rest).mean())
    np.testing.assert_allclose(out.z_q, np.asarray(z) - rest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.losses["codebook"], np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(out.losses["commitment"], 0.25 * np.mean(expected), rtol=1e-5)
    summed = make(dataclasses.replace(RESIDUAL, losses="sum"))
    np.testing.assert_allclose(run(summed, z).losses["codebook"], np.sum(expected), rtol=1e-5)


def test_residual_losses_see_the_codes_before_as_constants():
    quantizer, z = make(RESIDUAL), latents()
    out, rest = run(quantizer, z), np.asarray(z, np.float64)
    to_z, to_params = gradients(quantizer, z, lambda out: sum(out.losses.values()))
    pull = np.zeros_like(rest)
    for i, stage in enumerate(quantizer.stages):
        ids = np.asarray(out.ids[..., i])
        rest = rest - np.asarray(stage.codebook[...], np.float64)[ids]
        pull += 0.25 * 2 * rest / z.size / 3
        expected = np.zeros((12, 3))
        np.add.at(expected, ids.ravel(), -2 * rest.reshape(-1, 3) / z.size / 3)
        np.testing.assert_allclose(
            to_params[f"stages.{i}.codebook"], expected, rtol=1e-4, atol=1e-6
        )
    np.testing.assert_allclose(to_z, pull, rtol=1e-4, atol=1e-6)


def test_residual_codes_of_fewer_ids_are_coarser():
    quantizer, z = make(RESIDUAL, spread=False), latents()
    for batch in range(3):  # every stage is filled from what the ones before leave over
        quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(batch))
    ids = run(quantizer, z).ids
    errors = [float(jnp.square(z - quantizer.codes(ids[..., :n])).mean()) for n in (1, 2, 3)]
    assert 0 < errors[2] < errors[1] < errors[0]
    np.testing.assert_array_equal(
        quantizer.codes(ids[..., :1]), quantizer.stages[0].codes(ids[..., 0])
    )


def test_residual_stages_begin_with_what_the_one_before_leaves_over():
    quantizer, z = make(RESIDUAL, spread=False), latents()
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    rest = np.asarray(z)
    for i, stage in enumerate(quantizer.stages):
        rows = rest.reshape(-1, 3)
        gaps = np.abs(np.asarray(stage.codebook[...])[:, None] - rows).max(-1).min(-1)
        assert gaps.max() < 1e-6, i
        rest = rest - np.asarray(run(stage, jnp.array(rest)).z_q)


def test_residual_with_one_codebook_averages_over_all_stages():
    config = ResidualConfig(
        inner=dataclasses.replace(EMA, init_from_data=False, revive_after=0), depth=2
    )
    quantizer, z = make(config), latents()
    inner = quantizer.stages[0]
    inner.sums[...] = inner.codebook[...]
    codes, ids = np.asarray(inner.codebook[...], np.float64), np.asarray(run(quantizer, z).ids)
    seen = [np.asarray(z, np.float64), np.asarray(z, np.float64) - codes[ids[..., 0]]]
    quantizer.maintain(z, jnp.array(ids), jax.random.key(0))
    counts, sums = 0.9 * np.ones(12), 0.9 * codes
    for i in range(2):
        hard = np.eye(12)[ids[..., i].ravel()]
        counts, sums = counts + 0.1 * hard.sum(0), sums + 0.1 * hard.T @ seen[i].reshape(-1, 3)
    np.testing.assert_allclose(inner.counts[...], counts, rtol=1e-5)
    np.testing.assert_allclose(inner.sums[...], sums, rtol=1e-4, atol=1e-6)
    assert len(quantizer.stages) == 1


# Product quantisation.


def test_product_quantises_each_group_by_itself():
    config = ProductConfig(inner=dataclasses.replace(SMALL, dim=2), groups=3)
    quantizer, z = make(config), latents(shape=(2, 3, 4, 6))
    assert config.dim == 6 and quantizer.codebook_size == 12
    out = run(quantizer, z)
    alone = [run(stage, z[..., 2 * i : 2 * i + 2]) for i, stage in enumerate(quantizer.stages)]
    for i, each in enumerate(alone):
        np.testing.assert_array_equal(out.ids[..., i], each.ids)
        np.testing.assert_array_equal(out.z_q[..., 2 * i : 2 * i + 2], each.z_q)
    for name, value in out.losses.items():
        np.testing.assert_allclose(value, np.mean([each.losses[name] for each in alone]), rtol=1e-6)
    quantizer.maintain(z, out.ids, jax.random.key(0))  # each starts from its own channels
    for i, stage in enumerate(quantizer.stages):
        rows = np.asarray(z[..., 2 * i : 2 * i + 2]).reshape(-1, 2)
        assert all((rows == code).all(-1).any() for code in np.asarray(stage.codebook[...]))
