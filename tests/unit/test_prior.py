"""The transformer: causality, the cache against the full pass, positions, conditions, files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vqgan.errors import InputError
from vqgan.nn import rotary_table, rotate
from vqgan.prior.cache import KVCache
from vqgan.prior.transformer import Prior, PriorConfig

LLAMA = PriorConfig(
    codebook_size=11,
    grid=(3, 4),
    num_classes=3,
    depth=2,
    heads=2,
    width=16,
    mlp_multiple=8,
    dropout=0.0,
    label_dropout=0.0,
)
MINGPT = dataclasses.replace(LLAMA, position="learned", norm="layernorm", mlp="gelu", bias=True)
STYLES = {"llama": LLAMA, "mingpt": MINGPT}


def lively(config: PriorConfig, seed: int = 0) -> Prior:
    """A prior with large weights in every tensor, so that every part moves the logits."""
    prior = Prior(config, rngs=nnx.Rngs(seed))
    graph, state = nnx.split(prior)
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), state)
    return nnx.merge(graph, state)


@pytest.fixture(scope="module", params=STYLES)
def prior(request) -> Prior:
    return lively(STYLES[request.param])


def random_ids(batch: int, grid: tuple[int, int] = (3, 4), seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, *grid), 0, 11)


def test_position_i_sees_the_ids_before_it_and_no_others(prior):
    ids = random_ids(1)
    logits = prior(ids).reshape(12, 11)
    for j in (0, 5, 10):
        changed = ids.reshape(-1).at[j].add(1).reshape(ids.shape) % 11
        difference = np.abs(prior(changed).reshape(12, 11) - logits).max(axis=1)
        assert np.all(difference[: j + 1] == 0)
        assert np.all(difference[j + 1 :] > 1e-3)


def test_cached_steps_give_the_logits_of_the_full_pass(prior):
    ids, classes = random_ids(3), jnp.array([0, 2, 1])
    config = prior.config
    before = ids.reshape(3, -1)[:, :-1]
    inputs = jnp.concatenate([prior.condition(classes)[:, None], prior.tokens(before)], axis=1)
    caches = [KVCache.init((3, config.heads, 12, config.head_dim), config.dtype)] * config.depth

    @jax.jit
    def stepwise(prior, inputs, caches):
        def body(caches, at):
            logits, caches = prior._step(inputs[:, at], at, caches, rotation=rotation)
            return caches, logits

        rotation = prior._rotation(config.grid)
        return jax.lax.scan(body, caches, jnp.arange(12))[1].swapaxes(0, 1)

    full = prior(ids, classes).reshape(3, 12, 11)
    np.testing.assert_allclose(stepwise(prior, inputs, caches), full, rtol=1e-5, atol=1e-5)


def test_the_class_changes_every_position(prior):
    ids = random_ids(4)[:1].repeat(4, axis=0)
    logits = jnp.concatenate([prior(ids[:3], jnp.arange(3)), prior(ids[:1])])
    for a in range(4):
        for b in range(a):
            assert np.abs(logits[a] - logits[b]).max(axis=-1).min() > 1e-3


def test_log_prob_is_the_sum_of_gathered_log_softmax(prior):
    ids, classes = random_ids(2), jnp.array([1, 0])
    logs = np.asarray(jax.nn.log_softmax(prior(ids, classes))).reshape(-1, 11)
    expected = logs[np.arange(24), np.ravel(ids)].reshape(2, 12).sum(axis=1)
    np.testing.assert_allclose(prior.log_prob(ids, classes), expected, rtol=1e-5)


def test_all_sequences_together_have_probability_one():
    config = dataclasses.replace(LLAMA, codebook_size=3, grid=(2, 2))
    sequences = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 4), axis=-1).reshape(81, 2, 2)
    log_prob = lively(config).log_prob(sequences, jnp.full(81, 2))
    np.testing.assert_allclose(jnp.exp(log_prob).sum(), 1.0, rtol=1e-5)


def test_saved_and_loaded_prior_is_the_same_bit_for_bit(prior, tmp_path):
    prior.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(tmp_path / "prior")
    assert loaded.config == prior.config
    assert np.array_equal(loaded(random_ids(2)), prior(random_ids(2)))


def test_works_under_the_callers_jit(prior):
    ids, classes = random_ids(2), jnp.array([0, 1])
    outer = jax.jit(lambda prior, ids, classes: (prior(ids, classes), prior.log_prob(ids)))
    logits, log_prob = outer(prior, ids, classes)
    np.testing.assert_allclose(logits, prior(ids, classes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_prob, prior.log_prob(ids), rtol=1e-5)


def test_compiles_once_a_shape(prior):
    prior(random_ids(5))
    compiled = Prior._logits._cache_size()
    prior(random_ids(5, seed=1), jnp.zeros(5, jnp.int32))
    assert Prior._logits._cache_size() == compiled


def test_eight_devices_compute_what_one_does(prior):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    ids, classes = random_ids(8), jnp.arange(8) % 3
    by_image = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = jax.device_put(prior, NamedSharding(mesh, PartitionSpec()))
    logits = everywhere(jax.device_put(ids, by_image), jax.device_put(classes, by_image))
    assert len(logits.sharding.device_set) == 8
    np.testing.assert_allclose(logits, prior(ids, classes), rtol=1e-5, atol=1e-5)
    drawn = everywhere.sample(jax.device_put(classes, by_image), rng=jax.random.key(0))
    assert np.array_equal(drawn, prior.sample(classes, rng=jax.random.key(0)))


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same():
    def gradient(prior):
        graph, state = nnx.split(prior)

        def loss(state):
            return nnx.merge(graph, state).log_prob(random_ids(2)).sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(state))

    plain = gradient(lively(MINGPT))
    remat = gradient(lively(dataclasses.replace(MINGPT, remat=True)))
    for a, b in zip(plain, remat, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_near_float32():
    prior = Prior(LLAMA, rngs=nnx.Rngs(0))
    half = Prior(dataclasses.replace(LLAMA, dtype="bfloat16"), rngs=nnx.Rngs(0))
    a, b = prior(random_ids(2)), half(random_ids(2))
    assert b.dtype == jnp.float32 and not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(a).max()))
    assert half.sample(batch=2, rng=jax.random.key(0)).shape == (2, 3, 4)


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
def test_dropout_is_on_with_a_key_only(field):
    prior = lively(dataclasses.replace(LLAMA, **{field: 0.2}))
    ids, (one, two) = random_ids(2), jax.random.split(jax.random.key(0))
    assert np.array_equal(prior(ids, key=one), prior(ids, key=one))
    assert not np.allclose(prior(ids, key=one), prior(ids, key=two))
    assert not np.allclose(prior(ids, key=one), prior(ids))


def test_label_dropout_takes_the_null_class_at_its_rate():
    config = dataclasses.replace(LLAMA, grid=(1, 1), label_dropout=0.3)
    prior, images = lively(config), 4000
    ids, classes = jnp.zeros((images, 1, 1), jnp.int32), jnp.arange(images) % 3
    logits = prior(ids, classes, key=jax.random.key(0))
    kept = np.isclose(logits, prior(ids, classes), atol=1e-4).all(axis=(1, 2, 3))
    null = np.isclose(logits, prior(ids), atol=1e-4).all(axis=(1, 2, 3))
    assert np.all(kept ^ null)
    assert abs(null.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / images)
    assert np.array_equal(prior(ids, classes), prior(ids, classes))


def test_rotation_keeps_norms_and_scores_see_differences_of_positions_only():
    table = rotary_table((6, 8), 8).reshape(6, 8, 4, 2)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def at(x, row, column):
        return rotate(x, table[row, column][None])[0, 0, 0]

    np.testing.assert_allclose(jnp.linalg.norm(at(q, 5, 3)), jnp.linalg.norm(q), rtol=1e-6)
    score = at(q, 1, 2) @ at(k, 3, 1)
    for down, right in ((1, 0), (0, 4), (2, 5)):
        shifted = at(q, 1 + down, 2 + right) @ at(k, 3 + down, 1 + right)
        np.testing.assert_allclose(shifted, score, rtol=1e-5)
    assert abs(at(q, 1, 2) @ at(k, 3, 2) - score) > 1e-3
    assert abs(at(q, 1, 2) @ at(k, 2, 1) - score) > 1e-3
    assert np.array_equal(at(q, 0, 0), q[0, 0, 0])


def test_rotation_turns_interleaved_pairs_first_half_by_row():
    q = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    turned = rotate(q, rotary_table((6, 7), 8)[2 * 7 + 3][None])[0, 0, 0]
    pairs = np.array([1 + 2j, 3 + 4j, 5 + 6j, 7 + 8j])
    angles = np.array([2.0, 2.0 * 1e-2, 3.0, 3.0 * 1e-2])  # base 1e4 over half of the head
    expected = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(turned, expected.view(float), rtol=1e-5)


def test_zeroed_class_slot_hides_the_condition_from_scores_but_not_from_values():
    zero = lively(dataclasses.replace(LLAMA, class_slot_rotation="zero"))
    rotation = zero._rotation((3, 4))
    assert np.all(rotation[0] == 0) and np.array_equal(rotation[1:], rotary_table((3, 4), 8)[:-1])
    assert not np.allclose(zero(random_ids(1)), lively(LLAMA)(random_ids(1)))
    assert not np.allclose(zero(random_ids(1), jnp.array([0])), zero(random_ids(1), jnp.array([1])))


def test_rotary_priors_run_on_other_grids_and_learned_ones_refuse():
    ids = random_ids(2, (4, 5))
    assert lively(LLAMA)(ids).shape == (2, 4, 5, 11)
    assert lively(LLAMA).sample(batch=1, grid=(4, 5), rng=jax.random.key(0)).shape == (1, 4, 5)
    for call in (
        lambda: lively(MINGPT)(ids),
        lambda: lively(MINGPT).log_prob(ids),
        lambda: lively(MINGPT).sample(grid=(4, 5), rng=jax.random.key(0)),
    ):
        with pytest.raises(InputError, match=r"grid \(4, 5\).*\(3, 4\)"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(random_ids(1) + 11), "id .*11, 0 to 10"),
        (lambda p: p(random_ids(1) - 11), "id -.*11, 0 to 10"),
        (lambda p: p(random_ids(1), jnp.array([3])), "class 3: .*3, 0 to 2"),
        (lambda p: p.log_prob(random_ids(1), jnp.array([-1])), "class -1: .*3, 0 to 2"),
        (lambda p: p.sample(jnp.array([0, 7]), rng=jax.random.key(0)), "class 7: .*3, 0 to 2"),
        (lambda p: p.sample(jnp.array([0]), batch=2, rng=jax.random.key(0)), "batch 2"),
        (lambda p: p.sample(guidance=2.0, rng=jax.random.key(0)), "guidance 2.0"),
    ],
)
def test_bad_input_is_named(prior, call, message):
    with pytest.raises(InputError, match=message):
        call(prior)


def test_unconditional_priors_refuse_a_class():
    prior = lively(dataclasses.replace(LLAMA, num_classes=0))
    assert prior(random_ids(1)).shape == (1, 3, 4, 11)
    with pytest.raises(InputError, match="unconditional"):
        prior(random_ids(1), jnp.array([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 15}, "width 15"),
        ({"heads": 8}, "rope2d"),
        ({"depth": 0}, "positive"),
        ({"grid": (0, 4)}, "positive"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Prior(dataclasses.replace(LLAMA, **change), rngs=nnx.Rngs(0))


def test_hidden_width_rounds_up_to_the_multiple():
    config = PriorConfig(codebook_size=8, grid=(2, 2), width=768, mlp_multiple=256)
    assert config.mlp_width == 2048  # LlamaGen-B
    assert dataclasses.replace(config, width=1280).mlp_width == 3584  # LlamaGen-XL
    assert dataclasses.replace(config, width=64, mlp_multiple=32).mlp_width == 192
    assert dataclasses.replace(config, mlp="gelu").mlp_width == 3072


def test_weights_start_small_and_normal_and_biases_at_zero():
    prior = Prior(dataclasses.replace(MINGPT, width=64), rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(prior)):
        value = np.asarray(variable[...])
        if path[-1] in ("kernel", "embedding") and value.size > 500:
            assert abs(value.std() - 0.02) < 0.002, path
        if path[-1] == "bias":
            assert np.all(value == 0), path
