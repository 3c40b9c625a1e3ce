"""Corruption, the training loss and the units of likelihood."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vqgan.prior.autoregressive import bits_per_dim, bits_per_token, corrupt, loss
from vqgan.prior.transformer import Prior, PriorConfig

KEY = jax.random.key(0)
CONFIG = PriorConfig(
    codebook_size=10,
    grid=(3, 4),
    num_classes=2,
    depth=2,
    heads=2,
    width=16,
    dropout=0.0,
    label_dropout=0.0,
)


@pytest.fixture
def prior() -> Prior:
    graph, state = nnx.split(Prior(CONFIG, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(lambda x: x * 15, state))


def random_ids(batch: int) -> jax.Array:
    return jax.random.randint(jax.random.key(3), (batch, 3, 4), 0, 10)


@pytest.mark.parametrize("pkeep", [0.0, 0.5, 0.9, 1.0])
def test_corruption_keeps_its_share_and_spreads_the_rest_evenly(pkeep):
    ids = jnp.full((400, 10, 10), 3)
    corrupted = np.asarray(corrupt(ids, 10, pkeep, KEY))
    share = np.bincount(corrupted.ravel(), minlength=10) / ids.size
    expected = np.full(10, (1 - pkeep) / 10) + pkeep * (np.arange(10) == 3)
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / ids.size))


def test_loss_is_the_mean_negative_log_likelihood(prior):
    ids, classes = random_ids(5), jnp.array([0, 1, 1, 0, 1])
    nats, metrics = loss(prior, ids, classes)
    np.testing.assert_allclose(nats, -prior.log_prob(ids, classes).mean() / 12, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll_bits_per_token"], nats / math.log(2), rtol=1e-6)
    best = np.argmax(prior(ids, classes), axis=-1)
    assert metrics["accuracy"] == pytest.approx(np.mean(best == np.asarray(ids)))


def test_inputs_are_corrupted_and_targets_are_not(prior):
    ids = random_ids(5)
    clean, _ = loss(prior, ids, key=KEY, pkeep=1.0)
    corrupted, _ = loss(prior, ids, key=KEY, pkeep=0.0)
    assert abs(clean - corrupted) > 1e-3
    # Where inputs do not matter, corruption can only show in the targets.
    prior.tokens.embedding[...] = jnp.zeros_like(prior.tokens.embedding[...])
    clean, _ = loss(prior, ids, key=KEY, pkeep=1.0)
    corrupted, _ = loss(prior, ids, key=KEY, pkeep=0.0)
    assert clean == corrupted


def test_without_a_key_nothing_is_random(prior):
    noisy = Prior(dataclasses.replace(CONFIG, dropout=0.5, label_dropout=0.5), rngs=nnx.Rngs(0))
    ids = random_ids(2)
    assert loss(noisy, ids, pkeep=0.1)[0] == loss(noisy, ids)[0]
    assert loss(noisy, ids, key=KEY)[0] != loss(noisy, ids, key=jax.random.key(1))[0]


def test_uniform_logits_cost_the_logarithm_of_the_codebook(prior):
    prior.head.kernel[...] = jnp.zeros_like(prior.head.kernel[...])
    log_prob = prior.log_prob(random_ids(2))
    np.testing.assert_allclose(bits_per_token(log_prob, 12), math.log2(10), rtol=1e-6)
    per_dim = bits_per_dim(log_prob, 24, 32, 3)
    np.testing.assert_allclose(per_dim, 12 * math.log2(10) / (24 * 32 * 3), rtol=1e-6)


@pytest.mark.slow
def test_learns_a_pattern_a_class_and_samples_it():
    config = dataclasses.replace(CONFIG, width=32)
    graph, state = nnx.split(Prior(config, rngs=nnx.Rngs(0)))
    patterns = jnp.stack([jnp.arange(12).reshape(3, 4) % 5, 9 - jnp.arange(12).reshape(3, 4) % 3])
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(state, memory, key):
        def objective(state):
            return loss(nnx.merge(graph, state), patterns, jnp.arange(2), key=key)[0]

        value, grads = jax.value_and_grad(objective)(state)
        updates, memory = optimiser.update(grads, memory)
        return optax.apply_updates(state, updates), memory, value

    memory, first = optimiser.init(state), None
    for i in range(100):
        state, memory, value = step(state, memory, jax.random.fold_in(KEY, i))
        first = value if first is None else first
    assert value < 0.1 * first
    trained = nnx.merge(graph, state)
    assert np.array_equal(trained.sample(jnp.arange(2), rng=KEY, temperature=0.0), patterns)
