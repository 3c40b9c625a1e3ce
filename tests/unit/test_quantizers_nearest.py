"""Quantizers that take the nearest code, by their formulas in NumPy: VQ, EMA, SimVQ.

The contract of all is in test_quantizer_contract.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import (
    EMA,
    FIXED,
    NORMALIZED,
    SIMVQ,
    SMALL,
    USED,
    VQ_USED,
    assert_same,
    gradients,
    latents,
    make,
    run,
    unit,
)

from vqgan.serialization import flat_weights
from vqgan.tokenizer.quantizers import (
    EMAConfig,
)

# Vector quantisation.


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=25, deadline=None)
def test_vq_finds_the_nearest(seed, scale):
    quantizer, z = make(SMALL), scale * latents(seed)
    distances = np.square(
        np.asarray(z, np.float64)[..., None, :] - np.asarray(quantizer.codebook[...], np.float64)
    ).sum(-1)
    chosen = np.take_along_axis(distances, np.asarray(run(quantizer, z).ids)[..., None], -1)[..., 0]
    # Up to rounding: of two codes at the same distance either will do.
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-5, atol=1e-6)


def test_vq_takes_the_lowest_id_of_equal_codes():
    quantizer = make(SMALL)
    quantizer.codebook[...] = jnp.tile(quantizer.codebook[...][:4], (3, 1))
    assert (run(quantizer, latents()).ids < 4).all()


@pytest.mark.parametrize("beta_on", ["commitment", "codebook"])
def test_vq_losses_and_where_beta_goes(beta_on):
    quantizer = make(dataclasses.replace(SMALL, beta=0.3, beta_on=beta_on))
    z = latents()
    out = run(quantizer, z)
    distance = np.square(np.asarray(out.z_q) - np.asarray(z)).mean()
    for name, value in out.losses.items():
        factor = 0.3 if name == beta_on else 1.0
        np.testing.assert_allclose(value, factor * distance, rtol=1e-6)
    assert out.losses.keys() == {"commitment", "codebook"}


def test_vq_commitment_pulls_latents_and_codebook_pulls_codes():
    quantizer, z = make(SMALL), latents()
    out = run(quantizer, z)
    pull = 2 * np.asarray(z - out.z_q) / z.size

    to_z, to_params = gradients(quantizer, z, lambda out: out.losses["commitment"])
    np.testing.assert_allclose(to_z, SMALL.beta * pull, rtol=1e-5, atol=1e-7)
    assert not to_params["codebook"].any()

    to_z, to_params = gradients(quantizer, z, lambda out: out.losses["codebook"])
    expected = np.zeros_like(to_params["codebook"])
    np.add.at(expected, np.asarray(out.ids).ravel(), -pull.reshape(-1, 3))
    np.testing.assert_allclose(to_params["codebook"], expected, rtol=1e-5, atol=1e-7)
    assert not to_z.any()


def test_vq_starts_from_the_first_batch_only():
    quantizer = make(dataclasses.replace(SMALL, revive_after=0), spread=False)
    z = latents()
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    codes = np.asarray(quantizer.codebook[...])
    rows = np.asarray(z).reshape(-1, 3)
    assert all((rows == code).all(-1).any() for code in codes)
    assert len(np.unique(codes, axis=0)) == len(codes)  # 24 latents are enough for 12 codes

    other = latents(5)
    quantizer.maintain(other, run(quantizer, other).ids, jax.random.key(1))
    np.testing.assert_array_equal(quantizer.codebook[...], codes)


def test_vq_keeps_its_random_start_where_told():
    quantizer = make(FIXED, spread=False)
    before, z = np.asarray(quantizer.codebook[...]), latents()
    assert (np.abs(before) <= 1 / 12).all() and before.min() < 0 < before.max()
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    np.testing.assert_array_equal(quantizer.codebook[...], before)


def test_vq_revives_dead_codes_after_exactly_so_many_batches():
    quantizer = make(dataclasses.replace(SMALL, init_from_data=False, revive_after=3))
    before, z = np.asarray(quantizer.codebook[...]), latents()
    used = jnp.arange(24, dtype=jnp.int32).reshape(z.shape[:3]) % 4
    late = jnp.where(used == 0, 4, used)  # code 4 is used once, in the first batch
    for batch, ids in enumerate([late, used, used], start=1):
        quantizer.maintain(z, ids, jax.random.key(batch))
        moved = (np.asarray(quantizer.codebook[...]) != before).any(-1)
        assert moved.tolist() == [False] * 5 + [batch == 3] * 7
    rows = np.asarray(z).reshape(-1, 3)
    assert all((rows == code).all(-1).any() for code in np.asarray(quantizer.codebook[...])[5:])

    quantizer.maintain(z, used, jax.random.key(4))  # now it is code 4's turn, and no other's
    again = np.asarray(quantizer.codebook[...])
    assert (again[4] != before[4]).any()
    np.testing.assert_array_equal(again[:4], before[:4])
    assert quantizer.batches_unused[...][5:].tolist() == [1] * 7


def test_vq_normalize_searches_and_returns_directions():
    quantizer, z = make(NORMALIZED), 5 * latents()
    out, codes = run(quantizer, z), unit(np.asarray(quantizer.codebook[...]))
    np.testing.assert_array_equal(out.ids, (unit(np.asarray(z)) @ codes.T).argmax(-1))
    np.testing.assert_allclose(out.z_q, codes[np.asarray(out.ids)], rtol=1e-6)
    distance = np.square(np.asarray(out.z_q) - unit(np.asarray(z))).mean()
    np.testing.assert_allclose(out.losses["commitment"], 0.25 * distance, rtol=1e-5)
    np.testing.assert_allclose(out.losses["codebook"], distance, rtol=1e-5)


def test_vq_normalize_keeps_directions_from_the_first_batch():
    quantizer = make(NORMALIZED, spread=False)
    np.testing.assert_allclose(np.linalg.norm(quantizer.codebook[...], axis=-1), 1, rtol=1e-6)
    z = 5 * latents()
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    rows = unit(np.asarray(z).reshape(-1, 3))
    near = np.abs(np.asarray(quantizer.codebook[...])[:, None] - rows[None]).max(-1).min(-1)
    assert (near < 1e-6).all()


def test_vq_rotation_is_finite_where_latent_and_code_are_opposite_or_zero():
    quantizer = make(dataclasses.replace(FIXED, codebook_size=1, rotation=True))
    for code in ([1.0, 0.0, 0.0], [0.0, 0.0, 0.0]):
        quantizer.codebook[...] = jnp.array([code])
        z = jnp.array([[-2.0, 0, 0], [0, 0, 0], [1e-20, 0, 0]]).reshape(1, 1, 3, 3)
        to_z, _ = gradients(quantizer, z, lambda out: out.z_q.sum())
        assert np.isfinite(to_z).all() and np.abs(to_z).max() < 10
        np.testing.assert_array_equal(to_z[0, 0, 1], 1)  # straight through, without a direction


def test_vq_k_means_is_lloyds_on_the_first_batch_only():
    config = dataclasses.replace(SMALL, codebook_size=4, k_means=3)
    quantizer, plain = make(config), make(dataclasses.replace(config, k_means=0))
    z, key = latents(), jax.random.key(0)
    for each in (quantizer, plain):
        each.maintain(z, run(each, z).ids, key)
    rows = np.asarray(z, np.float64).reshape(-1, 3)
    centres = np.asarray(plain.codebook[...], np.float64)
    for _ in range(3):
        nearest = np.square(rows[:, None] - centres).sum(-1).argmin(-1)
        centres = np.array([rows[nearest == k].mean(0) for k in range(4)])
    np.testing.assert_allclose(quantizer.codebook[...], centres, rtol=1e-4, atol=1e-5)
    quantizer.maintain(z, run(quantizer, z).ids, key)
    np.testing.assert_allclose(quantizer.codebook[...], centres, rtol=1e-4, atol=1e-5)


def test_vq_k_means_keeps_centres_that_are_nearest_to_none():
    quantizer = make(dataclasses.replace(SMALL, codebook_size=30, k_means=2))
    z = latents()  # of 24 latents
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    assert np.isfinite(quantizer.codebook[...]).all()
    assert len(np.unique(quantizer.codebook[...], axis=0)) == 24


def test_vq_used_is_the_search_among_these_codes_alone():
    quantizer, z = make(VQ_USED), latents()
    alone = make(dataclasses.replace(FIXED, codebook_size=len(USED)))
    alone.codebook[...] = quantizer.codebook[...][jnp.array(USED)]
    assert quantizer.codebook_size == len(USED)
    assert_same(run(quantizer, z), run(alone, z))
    _, to_params = gradients(quantizer, z, lambda out: out.losses["codebook"])
    moved = np.flatnonzero(to_params["codebook"].any(-1))
    assert len(moved) and set(moved) <= set(USED)
    before = flat_weights(quantizer)
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    assert_same(flat_weights(quantizer), before)


@pytest.mark.parametrize("unknown", [3, len(USED)])
def test_vq_unknown_codes_share_an_id_as_in_taming(unknown):
    config = dataclasses.replace(FIXED, used_codes=len(USED), unknown_id=unknown)
    quantizer, z = make(config), latents()
    assert quantizer.codebook_size == len(USED) + (unknown == len(USED))
    plain = run(make(FIXED), z)
    out = run(quantizer, z)
    np.testing.assert_array_equal(out.z_q, plain.z_q)
    assert_same(out.losses, plain.losses)
    expected = [USED.index(i) if i in USED else unknown for i in np.asarray(plain.ids).ravel()]
    assert unknown in expected and len(set(expected)) > 3
    assert np.asarray(out.ids).ravel().tolist() == expected
    stands_for = USED[unknown] if unknown < len(USED) else USED[0]
    np.testing.assert_array_equal(
        quantizer.codes(jnp.full((1, 1, 1), unknown))[0, 0, 0], quantizer.codebook[...][stands_for]
    )


def test_vq_used_codes_may_be_listed_twice():
    quantizer = make(dataclasses.replace(FIXED, used_codes=4), used=(3, 5, 3, 5))
    assert set(np.asarray(run(quantizer, latents()).ids).ravel()) == {0, 1}


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_vq_in_chunks_takes_the_lowest_id_of_equal_codes(chunk):
    quantizer = make(dataclasses.replace(SMALL, chunk=chunk))
    quantizer.codebook[...] = jnp.tile(quantizer.codebook[...][:4], (3, 1))
    ids = run(quantizer, latents()).ids
    assert (ids < 4).all() and len(np.unique(ids)) > 1


# Moving averages.


def test_ema_follows_the_formula_of_the_paper():
    quantizer = make(dataclasses.replace(EMA, init_from_data=False, revive_after=0), spread=False)
    assert not jax.tree.leaves(nnx.state(quantizer, nnx.Param))  # nothing for an optimiser
    codes = np.asarray(latents(1, (12, 3)), np.float64)
    quantizer.codebook[...] = quantizer.sums[...] = jnp.array(codes, jnp.float32)
    counts, sums = np.ones(12), codes.copy()
    for batch in range(3):
        z = np.asarray(latents(batch), np.float64)
        ids = np.square(z[..., None, :] - codes).sum(-1).argmin(-1)
        assert run(quantizer, jnp.array(z)).ids.tolist() == ids.tolist()
        quantizer.maintain(jnp.array(z, jnp.float32), jnp.array(ids, jnp.int32), jax.random.key(0))
        hard = np.eye(12)[ids.ravel()]
        counts = 0.9 * counts + 0.1 * hard.sum(0)
        sums = 0.9 * sums + 0.1 * hard.T @ z.reshape(-1, 3)
        smooth = (counts + 0.1) / (counts.sum() + 12 * 0.1) * counts.sum()
        codes = sums / smooth[:, None]
        np.testing.assert_allclose(quantizer.codebook[...], codes, rtol=1e-4, atol=1e-6)


def test_ema_settles_on_the_means_of_clusters():
    centres = np.asarray(10 * latents(4, (4, 3)))
    near = jax.random.normal(jax.random.key(5), (4, 6, 4, 3)) * 0.1
    z = near + centres[None, None]
    config = EMAConfig(codebook_size=4, dim=3, decay=0.5, init_from_data=False)
    quantizer = make(config, spread=False)
    quantizer.codebook[...] = quantizer.sums[...] = jnp.array(centres) + 1.0
    for batch in range(30):
        quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(batch))
    found = np.asarray(quantizer.codebook[...])
    np.testing.assert_allclose(found, z.mean((0, 1)), atol=1e-3)


def test_ema_starts_from_the_first_batch_and_revives():
    quantizer, z = make(dataclasses.replace(EMA, revive_after=2), spread=False), latents()
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    rows = np.asarray(z).reshape(-1, 3)
    codes = np.asarray(quantizer.codebook[...])
    assert all((rows == code).all(-1).any() for code in codes)
    np.testing.assert_array_equal(quantizer.sums[...], codes)

    later, same = latents(7), jnp.zeros(z.shape[:3], jnp.int32)
    for batch in range(2):
        quantizer.maintain(later, same, jax.random.key(batch))
    rows = np.asarray(later).reshape(-1, 3)
    assert all((rows == code).all(-1).any() for code in np.asarray(quantizer.codebook[...])[1:])
    assert quantizer.counts[...][1:].tolist() == [1.0] * 11


# SimVQ.


def test_simvq_searches_images_of_a_fixed_table_and_learns_the_layer():
    quantizer, z = make(SIMVQ), latents()
    assert set(nnx.to_flat_state(nnx.state(quantizer, nnx.Param)).paths) == {("layer",)}
    table, layer = (np.asarray(x[...], np.float64) for x in (quantizer.table, quantizer.layer))
    flat, codes = np.asarray(z, np.float64), table @ layer
    out, ids = run(quantizer, z), np.square(flat[..., None, :] - codes).sum(-1).argmin(-1)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.z_q, codes[ids], rtol=1e-4, atol=1e-6)
    distance = np.square(codes[ids] - flat).mean()
    np.testing.assert_allclose(out.losses["codebook"], distance, rtol=1e-5)
    np.testing.assert_allclose(out.losses["commitment"], 0.25 * distance, rtol=1e-5)
    to_z, to_params = gradients(quantizer, z, lambda out: out.losses["codebook"])
    pull = 2 * (codes[ids] - flat) / z.size
    expected = np.einsum("bhwd,bhwe->de", table[ids], pull)
    np.testing.assert_allclose(to_params["layer"], expected, rtol=1e-4, atol=1e-6)
    assert not to_z.any()
