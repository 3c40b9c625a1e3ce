"""Quantizers whose gradient passes through the probabilities of all codes, by their formulas in
NumPy: Gumbel-softmax, IBQ.

The contract of all is in test_quantizer_contract.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantizing import (
    GUMBEL,
    IBQ,
    USED,
    entropies,
    everything,
    gradients,
    gumbel_logits,
    latents,
    make,
    run,
)
from scipy.special import softmax

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


def test_gumbel_in_chunks_draws_each_code_with_its_probability():
    gumbel = make(dataclasses.replace(GUMBEL, codebook_size=13, chunk=4))
    z = jnp.broadcast_to(latents(shape=(1, 1, 1, 3)), (1, 100, 200, 3))
    ids = run(gumbel, z, key=jax.random.key(0), step=jnp.int32(0)).ids
    found = np.bincount(np.asarray(ids).ravel(), minlength=13) / ids.size
    p = softmax(gumbel_logits(gumbel, z[0, 0, 0]))
    np.testing.assert_allclose(found, p, atol=5 * np.sqrt(p.max() / ids.size))


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
