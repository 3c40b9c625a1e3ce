"""What is particular to each quantizer: its formulas, in NumPy. The contract of all is in
test_quantizer_contract.py."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import (
    BSQ,
    EMA,
    FIXED,
    GUMBEL,
    IBQ,
    LFQ,
    NORMALIZED,
    RESIDUAL,
    SIMVQ,
    SMALL,
    USED,
    VQ_USED,
    assert_same,
    everything,
    gradients,
    gumbel_logits,
    latents,
    make,
    run,
    unit,
)
from scipy.special import logsumexp, softmax, xlogy

from vqgan.serialization import flat_weights
from vqgan.tokenizer.quantizers import (
    BSQConfig,
    EMAConfig,
    FSQConfig,
    LFQConfig,
    ProductConfig,
    ResidualConfig,
)


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_vq_in_chunks_takes_the_lowest_id_of_equal_codes(chunk):
    quantizer = make(dataclasses.replace(SMALL, chunk=chunk))
    quantizer.codebook[...] = jnp.tile(quantizer.codebook[...][:4], (3, 1))
    ids = run(quantizer, latents()).ids
    assert (ids < 4).all() and len(np.unique(ids)) > 1


def test_gumbel_in_chunks_draws_each_code_with_its_probability():
    gumbel = make(dataclasses.replace(GUMBEL, codebook_size=13, chunk=4))
    z = jnp.broadcast_to(latents(shape=(1, 1, 1, 3)), (1, 100, 200, 3))
    ids = run(gumbel, z, key=jax.random.key(0), step=jnp.int32(0)).ids
    found = np.bincount(np.asarray(ids).ravel(), minlength=13) / ids.size
    p = softmax(gumbel_logits(gumbel, z[0, 0, 0]))
    np.testing.assert_allclose(found, p, atol=5 * np.sqrt(p.max() / ids.size))


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


# Gumbel-softmax.


@pytest.fixture
def gumbel():
    quantizer = make(GUMBEL)
    quantizer.proj_bias[...] = latents(6, (12,))
    return quantizer


def test_gumbel_evaluates_to_the_most_probable_code(gumbel):
    z = 3 * latents()
    logits, out = gumbel_logits(gumbel, z), run(gumbel, z)
    np.testing.assert_array_equal(out.ids, logits.argmax(-1))
    assert len(np.unique(out.ids)) > 3
    p = softmax(logits, axis=-1)
    np.testing.assert_allclose(
        out.losses["kl"], 0.3 * (p * np.log(12 * p)).sum(-1).mean(), rtol=1e-5
    )


@pytest.mark.parametrize("step", [0, 4, 10, 99])
def test_gumbel_draws_at_the_temperature_of_the_step(gumbel, step):
    soft = make(dataclasses.replace(GUMBEL, straight_through=False))
    nnx.update(soft, nnx.state(gumbel))
    z, key = 3 * latents(), jax.random.key(8)
    noise = np.asarray(jax.random.gumbel(key, (*z.shape[:3], 12)), np.float64)
    temperature = 1 / 16 + (1 - 1 / 16) * (1 + np.cos(np.pi * min(step / 10, 1))) / 2
    p = softmax((gumbel_logits(gumbel, z) + noise) / temperature, axis=-1)
    table, weights = np.asarray(gumbel.codebook[...], np.float64), np.asarray(latents(2))

    out = run(soft, z, key=key, step=jnp.int32(step))
    np.testing.assert_array_equal(out.ids, p.argmax(-1))
    np.testing.assert_allclose(out.z_q, p @ table, rtol=1e-4, atol=1e-5)

    hard = run(gumbel, z, key=key, step=jnp.int32(step))
    np.testing.assert_array_equal(hard.ids, out.ids)
    np.testing.assert_array_equal(hard.z_q, gumbel.codes(hard.ids))
    assert (np.asarray(hard.ids) != np.asarray(run(gumbel, z).ids)).any()
    # Either way the latents get the gradient of the mean by the probabilities.
    to_logits = p * (weights @ table.T - (p * (weights @ table.T)).sum(-1, keepdims=True))
    expected = to_logits / temperature @ np.asarray(gumbel.proj_weight[...])
    chosen = {"hard": np.eye(12)[p.argmax(-1)], "soft": p}
    for quantizer, name in ((gumbel, "hard"), (soft, "soft")):
        to_z, to_params = gradients(
            quantizer,
            z,
            lambda out: (out.z_q * weights).sum(),
            key=key,
            step=jnp.int32(step),
        )
        np.testing.assert_allclose(to_z, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            to_params["codebook"],
            np.einsum("bhwk,bhwd->kd", chosen[name], weights),
            rtol=1e-3,
            atol=1e-5,
        )


def test_gumbel_draws_each_code_with_its_probability(gumbel):
    z = jnp.broadcast_to(latents(shape=(1, 1, 1, 3)), (1, 100, 200, 3))
    ids = run(gumbel, z, key=jax.random.key(0), step=jnp.int32(0)).ids
    found = np.bincount(np.asarray(ids).ravel(), minlength=12) / ids.size
    p = softmax(gumbel_logits(gumbel, z[0, 0, 0]))
    np.testing.assert_allclose(found, p, atol=5 * np.sqrt(p.max() / ids.size))


def test_gumbel_without_a_step_is_at_the_end_of_its_schedule(gumbel):
    z, key = latents(), jax.random.key(0)
    ended = gradients(gumbel, z, everything, key=key, step=jnp.int32(10))
    # Up to rounding: here the temperature is a constant that XLA knows, there it is not.
    for a, b in zip(
        jax.tree.leaves(gradients(gumbel, z, everything, key=key)),
        jax.tree.leaves(ended),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_gumbel_divergence_has_the_gradient_of_its_formula(gumbel):
    def formula(z, weight, bias):
        p = jax.nn.softmax(jnp.einsum("bhwd,kd->bhwk", z, weight) + bias[None, None, None])
        return 0.3 * (p * jnp.log(12 * p)).sum(-1).mean()

    z = 3 * latents()
    to_z, to_params = gradients(gumbel, z, lambda out: out.losses["kl"])
    given = z, gumbel.proj_weight[...], gumbel.proj_bias[...]
    expected = jax.grad(formula, argnums=(0, 1, 2))(*given)
    found = to_z, to_params["proj_weight"], to_params["proj_bias"]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_gumbel_used_never_chooses_another():
    config = dataclasses.replace(GUMBEL, used_codes=len(USED))
    quantizer, z = make(config), 3 * latents()
    logits = gumbel_logits(quantizer, z)[..., USED]
    out = run(quantizer, z)
    np.testing.assert_array_equal(out.ids, logits.argmax(-1))
    np.testing.assert_array_equal(out.z_q, quantizer.codebook[...][jnp.array(USED)[out.ids]])
    p = softmax(logits, axis=-1)
    np.testing.assert_allclose(
        out.losses["kl"], 0.3 * (p * np.log(12 * p)).sum(-1).mean(), rtol=1e-5
    )


# Entropies, of the three quantizers below.


def entropies(logits):
    """Mean entropy of the rows, and entropy of their mean as MAGVIT-2 computes it."""
    log_p = logits - logsumexp(logits, axis=-1, keepdims=True)
    mean = np.exp(log_p).mean(0)
    return -(np.exp(log_p) * log_p).sum(-1).mean(), -(mean * np.log(mean + 1e-5)).sum()


@pytest.mark.parametrize("config", [IBQ, LFQ, BSQ])
def test_entropies_are_left_out_at_weight_0(config):
    z = latents()
    losses = run(make(config), z).losses
    without = run(make(dataclasses.replace(config, entropy_weight=0.0)), z).losses
    assert losses.keys() - without.keys() == {"sample_entropy", "batch_entropy"}
    assert_same(without, {name: losses[name] for name in without})


# Index backpropagation.


def test_ibq_takes_the_largest_inner_product_and_its_losses():
    config = dataclasses.replace(IBQ, beta=0.3, entropy_weight=0.2, diversity=0.7)
    quantizer, z = make(config), latents()
    table, flat = np.asarray(quantizer.codebook[...], np.float64), np.asarray(z, np.float64)
    logits, out = flat @ table.T, run(quantizer, z)
    np.testing.assert_array_equal(out.ids, logits.argmax(-1))
    nearest = np.square(flat[..., None, :] - table).sum(-1).argmin(-1)
    assert (np.asarray(out.ids) != nearest).any()  # which is another question
    distance = np.square(table[np.asarray(out.ids)] - flat).mean()
    sample, batch = entropies(logits.reshape(-1, 12) / 0.5)
    expected = {
        "propagation": distance,
        "commitment": distance,
        "codebook": 0.3 * distance,
        "sample_entropy": 0.2 * sample,
        "batch_entropy": -0.2 * 0.7 * batch,
    }
    assert out.losses.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(out.losses[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("of", ["z_q", "propagation"])
def test_ibq_gradient_reaches_the_latents_and_every_code(of):
    quantizer, z = make(IBQ), latents()
    table, flat = np.asarray(quantizer.codebook[...], np.float64), np.asarray(z, np.float64)
    p = softmax(flat @ table.T, axis=-1)
    hard = np.eye(12)[(flat @ table.T).argmax(-1)]
    if of == "z_q":
        weights, direct = np.asarray(latents(2), np.float64), 0.0
        found = gradients(quantizer, z, lambda out: (out.z_q * weights).sum())
    else:  # the mean square of z_q - z
        weights = 2 * (hard @ table - flat) / z.size
        direct = -weights
        found = gradients(quantizer, z, lambda out: out.losses["propagation"])
    to_p = weights @ table.T
    to_logits = p * (to_p - (p * to_p).sum(-1, keepdims=True))
    through_p = np.einsum("bhwk,bhwd->kd", to_logits, flat)
    chosen = np.einsum("bhwk,bhwd->kd", hard, weights)

    to_z, to_params = found
    np.testing.assert_allclose(to_z, to_logits @ table + direct, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_params["codebook"], through_p + chosen, rtol=1e-4, atol=1e-5)
    assert (~hard.any((0, 1, 2))).any() and to_params["codebook"].all()


@pytest.mark.parametrize("name", ["sample_entropy", "batch_entropy"])
def test_ibq_entropies_have_the_gradients_of_their_formulas(name):
    def formula(z, table):
        p = jax.nn.softmax(jnp.einsum("bhwd,kd->bhwk", z, table) / 0.5)
        if name == "sample_entropy":
            return 0.2 * -(p * jnp.log(p)).sum(-1).mean()
        mean = p.mean((0, 1, 2))
        return -0.2 * 0.7 * -(mean * jnp.log(mean)).sum()

    quantizer, z = make(dataclasses.replace(IBQ, entropy_weight=0.2, diversity=0.7)), latents()
    to_z, to_params = gradients(quantizer, z, lambda out: out.losses[name])
    expected = jax.grad(formula, argnums=(0, 1))(z, quantizer.codebook[...])
    for a, b in zip((to_z, to_params["codebook"]), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max())


def test_ibq_losses_pull_where_they_should():
    quantizer, z = make(IBQ), latents()
    pull = 2 * np.asarray(z - run(quantizer, z).z_q) / z.size
    to_z, to_params = gradients(quantizer, z, lambda out: out.losses["commitment"])
    np.testing.assert_allclose(to_z, pull, rtol=1e-5, atol=1e-7)
    assert not to_params["codebook"].any()
    to_z, to_params = gradients(quantizer, z, lambda out: out.losses["codebook"])
    assert not to_z.any() and to_params["codebook"].any()


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
