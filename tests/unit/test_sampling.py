"""Filters, draws and the sampling loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vqgan.errors import InputError
from vqgan.prior import sampling
from vqgan.prior.sampling import Sampling
from vqgan.prior.transformer import Prior, PriorConfig

KEY = jax.random.key(0)
CLASSES = jnp.array([0, 2, 1, 0])
CONFIG = PriorConfig(
    codebook_size=11, grid=(3, 4), num_classes=3, depth=2, heads=2, width=16, dropout=0.0
)
GPT = dataclasses.replace(CONFIG, position="learned", norm="layernorm", mlp="gelu", bias=True)

# Eight logits each: arbitrary ones, and few values with many ties.
logit_rows = st.one_of(
    st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8),
    st.lists(st.integers(-3, 3).map(float), min_size=8, max_size=8),
).map(lambda row: np.array([row], np.float32) + 0.0)


@pytest.fixture(scope="module", params=[CONFIG, GPT], ids=["llama", "mingpt"])
def prior(request) -> Prior:
    graph, state = nnx.split(Prior(request.param, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), state)
    return nnx.merge(graph, state)


def settings_of(temperature=1.0, top_k=None, top_p=None, guidance=1.0) -> Sampling:
    return Sampling.of(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)


@settings(deadline=None, max_examples=200)
@given(logit_rows, st.integers(1, 10))
def test_top_k_keeps_the_k_largest_and_ties_with_the_last(logits, k):
    kept = np.isfinite(jax.jit(sampling.keep_top_k)(logits, jnp.int32(k)))
    assert np.array_equal(kept, logits >= np.sort(logits)[:, ::-1][:, min(k, 8) - 1])


@settings(deadline=None, max_examples=200)
@given(logit_rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_of_enough_mass(logits, p):
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    levels = np.unique(logits)[::-1]
    masses = np.array([probabilities[logits >= level].sum() for level in levels])
    assume(np.abs(masses - p).min() > 1e-5)
    threshold = levels[np.argmax(masses >= p)]
    filtered = jax.jit(sampling.keep_top_p)(logits, jnp.float32(p))
    assert np.array_equal(np.isfinite(filtered), logits >= threshold)
    assert np.array_equal(filtered[np.isfinite(filtered)], logits[logits >= threshold])


def test_top_p_of_one_keeps_all_and_a_tiny_one_keeps_the_largest():
    logits = jax.random.normal(KEY, (50, 1000)) * 5
    assert np.all(np.isfinite(sampling.keep_top_p(logits, jnp.float32(1.0))))
    kept = np.isfinite(sampling.keep_top_p(logits, jnp.float32(1e-6)))
    assert np.array_equal(np.argmax(kept, axis=1), np.argmax(logits, axis=1))
    assert np.all(kept.sum(axis=1) == 1)


def test_draws_follow_the_tempered_softmax():
    logits, rows = jnp.array([2.0, 0.5, -1.0, 0.0, 1.0]), 40_000
    for temperature in (0.5, 1.0, 2.0):
        drawn = sampling.draw(jnp.tile(logits, (rows, 1)), settings_of(temperature), KEY)
        frequency = np.bincount(drawn, minlength=5) / rows
        expected = np.asarray(jax.nn.softmax(logits / temperature))
        assert np.all(np.abs(frequency - expected) < 5 * np.sqrt(expected / rows))


def test_filters_apply_after_the_temperature_top_k_first():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]])).repeat(4000, axis=0)

    def support(**numbers):
        return set(np.unique(jax.jit(sampling.draw)(logits, settings_of(**numbers), KEY)))

    assert support(top_p=0.65) == {0, 1}
    assert support(top_p=0.65, temperature=4.0) == {0, 1, 2}
    assert support(top_k=3, top_p=0.75) == {0, 1}  # 0.4 + 0.3 is 0.78 of the three
    assert support(top_p=0.75) == {0, 1, 2}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_draws_stay_inside_the_kept_codes(seed, k):
    logits = jax.random.normal(jax.random.key(seed), (64, 8)) * 10
    drawn = jax.jit(sampling.draw)(logits, settings_of(top_k=k), KEY)
    rank = np.argsort(np.argsort(-np.asarray(logits), axis=1), axis=1)
    assert np.all(rank[np.arange(64), drawn] < k)


def test_guidance_formula():
    logits = jax.random.normal(KEY, (6, 5))
    guided = sampling.guide(logits, jnp.float32(2.5))
    np.testing.assert_allclose(guided, 2.5 * logits[:3] - 1.5 * logits[3:], rtol=1e-5, atol=1e-6)


def test_greedy_is_the_argmax_of_the_full_pass_at_every_position(prior):
    ids = np.zeros((4, 12), np.int32)
    for position in range(12):
        logits = prior(jnp.asarray(ids.reshape(4, 3, 4)), CLASSES).reshape(4, 12, 11)
        ids[:, position] = np.argmax(logits[:, position], axis=-1)
    greedy = prior.sample(CLASSES, rng=KEY, temperature=0.0)
    assert np.array_equal(greedy.reshape(4, 12), ids)
    assert len(np.unique(ids)) > 1


def test_greedy_ignores_the_key_and_equals_top_k_1_and_a_tiny_top_p(prior):
    greedy = prior.sample(CLASSES, rng=KEY, temperature=0.0)
    assert np.array_equal(prior.sample(CLASSES, rng=jax.random.key(7), temperature=0.0), greedy)
    assert np.array_equal(prior.sample(CLASSES, rng=KEY, top_k=1), greedy)
    assert np.array_equal(prior.sample(CLASSES, rng=KEY, top_p=1e-6), greedy)


def test_the_key_decides_the_sample(prior):
    first = prior.sample(CLASSES, rng=KEY)
    assert np.array_equal(prior.sample(CLASSES, rng=KEY), first)
    other = prior.sample(CLASSES, rng=jax.random.key(1))
    assert np.mean(np.asarray(other) != np.asarray(first)) > 0.2
    assert first.dtype == jnp.int32 and first.min() >= 0 and first.max() < 11


def test_samples_follow_the_model():
    config = dataclasses.replace(CONFIG, codebook_size=3, grid=(1, 2))
    prior = Prior(config, rngs=nnx.Rngs(0))
    prior.head.kernel[...] = jax.random.normal(KEY, prior.head.kernel.shape)
    images = 20_000
    drawn = np.asarray(prior.sample(jnp.ones(images, jnp.int32), rng=KEY)).reshape(images, 2)
    frequency = np.bincount(drawn @ [3, 1], minlength=9) / images
    pairs = jnp.stack(jnp.divmod(jnp.arange(9), 3), axis=-1)[:, None]
    expected = np.exp(prior.log_prob(pairs, jnp.ones(9, jnp.int32)))
    assert np.all(np.abs(frequency - expected) < 5 * np.sqrt(expected / images) + 1e-6)
    assert expected.max() > 2 * expected.min()


def test_guidance_of_one_is_plain_and_of_zero_is_unconditional(prior):
    plain = prior.sample(CLASSES, rng=KEY)
    assert np.array_equal(prior.sample(CLASSES, rng=KEY, guidance=jnp.float32(1.0)), plain)
    unconditional = prior.sample(batch=4, rng=KEY)
    assert np.array_equal(prior.sample(CLASSES, rng=KEY, guidance=0.0), unconditional)
    assert not np.array_equal(plain, unconditional)


def test_guidance_raises_the_likelihood_ratio_of_the_class(prior):
    classes = jnp.arange(300) % 3

    def ratio(guidance):
        ids = prior.sample(classes, rng=KEY, guidance=guidance)
        return float((prior.log_prob(ids, classes) - prior.log_prob(ids)).mean())

    assert ratio(0.0) < ratio(1.0) < ratio(2.0)


def test_other_numbers_do_not_compile_anew(prior):
    prior.sample(CLASSES, rng=KEY, temperature=1, top_k=5, top_p=0.9, guidance=2)
    compiled = Prior._sample._cache_size()
    prior.sample(CLASSES, rng=KEY, temperature=0.0, top_k=7, top_p=0.5, guidance=3.5)
    prior.sample(
        CLASSES[::-1],
        rng=jax.random.key(1),
        temperature=jnp.float32(2),
        top_k=1,
        top_p=1,
        guidance=0,
    )
    assert Prior._sample._cache_size() == compiled


def test_samples_under_the_callers_jit(prior):
    outer = jax.jit(
        lambda prior, classes, rng, temperature, k: prior.sample(
            classes, rng=rng, temperature=temperature, top_k=k, guidance=1.5
        )
    )
    inner = prior.sample(CLASSES, rng=KEY, temperature=0.8, top_k=4, guidance=1.5)
    assert np.array_equal(outer(prior, CLASSES, KEY, 0.8, 4), inner)


@pytest.mark.parametrize(
    "numbers",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_numbers_out_of_range_are_named(prior, numbers):
    (name,) = numbers
    with pytest.raises(InputError, match=name):
        prior.sample(CLASSES, rng=KEY, **numbers)
