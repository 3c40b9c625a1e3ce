"""The contract of every quantizer, and what is particular to each.

A new quantizer joins the first part by a line in CONFIGS.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vqgan.tokenizer.quantizers import VQConfig, make_quantizer

SMALL = VQConfig(codebook_size=12, dim=3)
CONFIGS = {
    "vq": SMALL,
    "vq-swapped": dataclasses.replace(SMALL, beta_on="codebook"),
    "vq-plain": dataclasses.replace(SMALL, init_from_data=False, revive_after=0),
    "vq-one-code": VQConfig(codebook_size=1, dim=3),
}


def latents(seed=0, shape=(2, 3, 4, 3)):
    return jax.random.normal(jax.random.key(seed), shape)


def make(config, *, spread=True):
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    if spread:  # codes that lie among the latents, as after training
        quantizer.codebook[...] = latents(1, quantizer.codebook.shape)
    return quantizer


def gradients(quantizer, z, objective):
    """Of objective(output) with respect to the latents and the codebook."""
    graphdef, params, rest = nnx.split(quantizer, nnx.Param, ...)
    to_z, to_params = jax.grad(
        lambda z, params: objective(nnx.merge(graphdef, params, rest)(z)), argnums=(0, 1)
    )(z, params)
    return to_z, to_params["codebook"][...]


# The contract.


@pytest.fixture(params=CONFIGS)
def quantizer(request):
    return make(CONFIGS[request.param])


def test_ids_are_int32_of_the_grid_and_codes_inverts_them(quantizer):
    z = latents()
    out = quantizer(z)
    assert out.ids.dtype == jnp.int32 and out.ids.shape == z.shape[:3]
    assert (out.ids >= 0).all() and (out.ids < quantizer.codebook_size).all()
    np.testing.assert_array_equal(quantizer.codes(out.ids), out.z_q)


def test_inverse_holds_bit_for_bit_when_compiled(quantizer):
    graphdef, state = nnx.split(quantizer)
    out = jax.jit(lambda state, z: nnx.merge(graphdef, state)(z))(state, 1e3 * latents())
    np.testing.assert_array_equal(quantizer.codes(out.ids), out.z_q)


def test_each_code_is_its_own_nearest(quantizer):
    every = jnp.arange(quantizer.codebook_size, dtype=jnp.int32).reshape(1, 1, -1)
    out = quantizer(quantizer.codes(every))
    np.testing.assert_array_equal(out.ids, every)


def test_gradient_goes_straight_through(quantizer):
    weights = latents(2)
    to_z, to_codebook = gradients(quantizer, latents(), lambda out: (out.z_q * weights).sum())
    np.testing.assert_array_equal(to_z, weights)
    assert not to_codebook.any()


def test_losses_are_finite_scalars(quantizer):
    losses = quantizer(latents()).losses
    assert losses and all(value.shape == () and value >= 0 for value in losses.values())


@given(ids=st.lists(st.integers(0, 11), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_statistics_equal_a_count(ids):
    counts = np.bincount(ids, minlength=12)
    p = counts[counts > 0] / counts.sum()
    found = make(SMALL).statistics(jnp.array(ids, jnp.int32).reshape(1, 1, -1))
    np.testing.assert_allclose(found["usage"], (counts > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["perplexity"], np.exp(-(p * np.log(p)).sum()), rtol=1e-5)


def test_maintenance_is_a_function_of_its_key(quantizer):
    first, second = (nnx.merge(*nnx.split(quantizer), copy=True) for _ in range(2))
    z = latents()
    for each in (first, second):
        each.maintain(z, quantizer(z).ids, jax.random.key(3))
    np.testing.assert_array_equal(first.codebook[...], second.codebook[...])


# Vector quantisation.


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=25, deadline=None)
def test_vq_finds_the_nearest(seed, scale):
    quantizer, z = make(SMALL), scale * latents(seed)
    distances = np.square(
        np.asarray(z, np.float64)[..., None, :] - np.asarray(quantizer.codebook[...], np.float64)
    ).sum(-1)
    chosen = np.take_along_axis(distances, np.asarray(quantizer(z).ids)[..., None], -1)[..., 0]
    # Up to rounding: of two codes at the same distance either will do.
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-5, atol=1e-6)


def test_vq_takes_the_lowest_id_of_equal_codes():
    quantizer = make(SMALL)
    quantizer.codebook[...] = jnp.tile(quantizer.codebook[...][:4], (3, 1))
    assert (quantizer(latents()).ids < 4).all()


@pytest.mark.parametrize("beta_on", ["commitment", "codebook"])
def test_vq_losses_and_where_beta_goes(beta_on):
    quantizer = make(dataclasses.replace(SMALL, beta=0.3, beta_on=beta_on))
    z = latents()
    out = quantizer(z)
    distance = np.square(np.asarray(out.z_q) - np.asarray(z)).mean()
    for name, value in out.losses.items():
        factor = 0.3 if name == beta_on else 1.0
        np.testing.assert_allclose(value, factor * distance, rtol=1e-6)
    assert out.losses.keys() == {"commitment", "codebook"}


def test_vq_commitment_pulls_latents_and_codebook_pulls_codes():
    quantizer, z = make(SMALL), latents()
    out = quantizer(z)
    pull = 2 * np.asarray(z - out.z_q) / z.size

    to_z, to_codebook = gradients(quantizer, z, lambda out: out.losses["commitment"])
    np.testing.assert_allclose(to_z, SMALL.beta * pull, rtol=1e-5, atol=1e-7)
    assert not to_codebook.any()

    to_z, to_codebook = gradients(quantizer, z, lambda out: out.losses["codebook"])
    expected = np.zeros_like(to_codebook)
    np.add.at(expected, np.asarray(out.ids).ravel(), -pull.reshape(-1, 3))
    np.testing.assert_allclose(to_codebook, expected, rtol=1e-5, atol=1e-7)
    assert not to_z.any()


def test_vq_starts_from_the_first_batch_only():
    quantizer = make(dataclasses.replace(SMALL, revive_after=0), spread=False)
    z = latents()
    quantizer.maintain(z, quantizer(z).ids, jax.random.key(0))
    codes = np.asarray(quantizer.codebook[...])
    rows = np.asarray(z).reshape(-1, 3)
    assert all((rows == code).all(-1).any() for code in codes)
    assert len(np.unique(codes, axis=0)) == len(codes)  # 24 latents are enough for 12 codes

    other = latents(5)
    quantizer.maintain(other, quantizer(other).ids, jax.random.key(1))
    np.testing.assert_array_equal(quantizer.codebook[...], codes)


def test_vq_keeps_its_random_start_where_told():
    quantizer = make(CONFIGS["vq-plain"], spread=False)
    before, z = np.asarray(quantizer.codebook[...]), latents()
    assert (np.abs(before) <= 1 / 12).all() and before.min() < 0 < before.max()
    quantizer.maintain(z, quantizer(z).ids, jax.random.key(0))
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
