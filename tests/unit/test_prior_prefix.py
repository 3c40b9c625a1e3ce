"""The prior under a prefix of codes, in other orders than raster order, without a null class."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqgan.data.pipeline import DataConfig
from vqgan.errors import InputError
from vqgan.nn import rotary_table
from vqgan.pipeline import Pipeline
from vqgan.prior.autoregressive import loss
from vqgan.prior.cache import KVCache
from vqgan.prior.conditions import CodePrefix
from vqgan.prior.transformer import Prior, PriorConfig
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers.vq import VQConfig
from vqgan.train.config import PriorTraining
from vqgan.train.prior import train_prior

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

KEY = jax.random.key(0)
ORDER = tuple(np.random.default_rng(4).permutation(12).tolist())
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
PREFIX = dataclasses.replace(
    MINGPT, num_classes=0, prefix=CodePrefix(codebook_size=7, grid=(2, 3)), order=ORDER
)
CONFIGS = {
    "llama in order": dataclasses.replace(LLAMA, order=ORDER),
    "mingpt in order, no null class": dataclasses.replace(MINGPT, order=ORDER, null_class=False),
    "prefix in order": PREFIX,
    "prefix of one code": dataclasses.replace(
        PREFIX, prefix=CodePrefix(codebook_size=7, grid=(1, 1)), order=()
    ),
}


def lively(config: PriorConfig, seed: int = 0) -> Prior:
    """A prior with large weights in every tensor, so that every part moves the logits."""
    graph, state = nnx.split(Prior(config, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), state)
    return nnx.merge(graph, state)


# The rest in the slow suite: each shape of a prior compiles every test anew.
QUICK = ("llama in order", "prefix in order")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS
    ],
)
def prior(request) -> Prior:
    return lively(CONFIGS[request.param])


def random_ids(batch: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, 3, 4), 0, 11)


def conditions(config: PriorConfig, batch: int, seed: int = 9) -> jax.Array:
    key = jax.random.key(seed)
    if config.prefix is None:
        return jax.random.randint(key, (batch,), 0, config.num_classes)
    return jax.random.randint(key, (batch, *config.prefix.grid), 0, config.prefix.codebook_size)


def drawing_order(config: PriorConfig) -> list[int]:
    return list(config.order or range(12))


def test_a_code_sees_the_codes_drawn_before_it_and_no_others(prior):
    ids, condition = random_ids(1), conditions(prior.config, 1)
    order = drawing_order(prior.config)
    logits = prior(ids, condition).reshape(12, 11)
    for i in (0, 5, 10):
        changed = ids.reshape(-1).at[order[i]].add(1).reshape(ids.shape) % 11
        difference = np.abs(prior(changed, condition).reshape(12, 11) - logits).max(axis=1)
        assert np.all(difference[order[: i + 1]] == 0)
        assert np.all(difference[order[i + 1 :]] > 1e-3)


def test_greedy_is_the_argmax_of_the_full_pass_in_the_order_of_drawing(prior):
    condition, ids = conditions(prior.config, 4), np.zeros((4, 12), np.int32)
    for position in drawing_order(prior.config):
        logits = prior(jnp.asarray(ids.reshape(4, 3, 4)), condition).reshape(4, 12, 11)
        ids[:, position] = np.argmax(logits[:, position], axis=-1)
    greedy = prior.sample(condition, rng=KEY, temperature=0.0)
    assert np.array_equal(greedy.reshape(4, 12), ids)
    assert len(np.unique(ids)) > 1


def test_loss_is_the_mean_negative_log_likelihood(prior):
    ids, condition = random_ids(3), conditions(prior.config, 3)
    expected = -prior.log_prob(ids, condition).mean() / 12
    np.testing.assert_allclose(loss(prior, ids, condition)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(loss(prior, ids, condition, key=KEY)[0], expected, rtol=1e-5)
    corrupted, _ = loss(prior, ids, condition, pkeep=0.0, key=KEY)
    assert abs(corrupted - expected) > 1e-3


def test_every_embedding_that_is_used_gets_a_gradient(prior):
    ids, condition = random_ids(3), conditions(prior.config, 3)
    graph, state = nnx.split(prior)
    grads = jax.jit(jax.grad(lambda s: loss(nnx.merge(graph, s), ids, condition)[0]))(state)
    moved = np.abs(grads["condition"]["embedding"][...]).max(axis=1) > 0
    assert set(np.flatnonzero(moved)) == set(np.unique(condition).tolist())
    if prior.positions is not None:
        assert np.all(np.abs(grads["positions"]["embedding"][...]).max(axis=1) > 0)


def test_saved_and_loaded_prior_has_the_same_config_and_bits(prior, tmp_path):
    prior.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(tmp_path / "prior")
    ids, condition = random_ids(2), conditions(prior.config, 2)
    assert loaded.config == prior.config
    assert np.array_equal(loaded(ids, condition), prior(ids, condition))


def test_works_under_the_callers_jit(prior):
    ids, condition = random_ids(2), conditions(prior.config, 2)
    outer = jax.jit(
        lambda prior, ids, condition: (
            prior(ids, condition),
            prior.sample(condition, rng=KEY, top_k=5),
        )
    )
    logits, drawn = outer(prior, ids, condition)
    np.testing.assert_allclose(logits, prior(ids, condition), rtol=1e-5, atol=1e-5)
    assert np.array_equal(drawn, prior.sample(condition, rng=KEY, top_k=5))


@pytest.mark.parametrize("config", [LLAMA, MINGPT], ids=["llama", "mingpt"])
def test_raster_order_by_name_changes_no_bit(config):
    plain, named = lively(config), lively(dataclasses.replace(config, order=tuple(range(12))))
    ids, classes = random_ids(3), jnp.array([0, 2, 1])
    assert np.array_equal(named(ids, classes), plain(ids, classes))
    assert np.array_equal(named.log_prob(ids), plain.log_prob(ids))
    assert np.array_equal(named.sample(classes, rng=KEY), plain.sample(classes, rng=KEY))


def test_learned_positions_belong_to_slots_so_that_an_order_only_renames_the_ids():
    plain, ordered = lively(MINGPT), lively(dataclasses.replace(MINGPT, order=ORDER))
    ids, classes = random_ids(2), jnp.array([0, 2])
    sequence = ids.reshape(2, 12)[:, np.array(ORDER)].reshape(2, 3, 4)
    logits = ordered(ids, classes).reshape(2, 12, 11)[:, np.array(ORDER)]
    assert np.array_equal(logits.reshape(2, 3, 4, 11), plain(sequence, classes))
    drawn = ordered.sample(classes, rng=KEY).reshape(2, 12)[:, np.array(ORDER)]
    assert np.array_equal(drawn.reshape(2, 3, 4), plain.sample(classes, rng=KEY))


def test_rotary_positions_go_with_the_ids():
    rotation = lively(dataclasses.replace(LLAMA, order=ORDER))._rotation((3, 4))
    table = rotary_table((3, 4), 8)
    assert np.array_equal(rotation[0], table[0])  # of the class: no turn
    for slot in range(1, 12):
        assert np.array_equal(rotation[slot], table[ORDER[slot - 1]])


def test_every_code_of_the_prefix_changes_all_logits_and_places_matter():
    prior, ids, condition = lively(PREFIX), random_ids(1), conditions(PREFIX, 1)
    logits = prior(ids, condition)
    for place in range(6):
        changed = condition.reshape(-1).at[place].add(1).reshape(condition.shape) % 7
        assert np.abs(prior(ids, changed) - logits).max(axis=-1).min() > 1e-4
    swapped = condition[:, ::-1]
    assert np.abs(prior(ids, swapped) - logits).max(axis=-1).min() > 1e-4


def test_a_prefix_has_rows_of_its_own_and_a_position_a_slot():
    prior = lively(PREFIX)
    assert prior.condition.embedding.shape == (7, 16)
    assert prior.tokens.embedding.shape == (11, 16)
    assert prior.positions.embedding.shape == (6 + 12 - 1, 16)


def test_prefilled_and_stepwise_logits_are_those_of_the_full_pass():
    prior, ids, condition = lively(PREFIX), random_ids(3), conditions(PREFIX, 3)
    prefix = prior.condition(condition.reshape(3, 6))
    before = prior.tokens(ids.reshape(3, 12)[:, np.array(ORDER)][:, :-1])
    inputs = jnp.concatenate([prefix[:, 5:], before], axis=1)
    caches = [KVCache.init((3, 2, 17, 8), "float32")] * 2

    @jax.jit
    def stepwise(prior, inputs, caches):
        def body(caches, i):
            logits, caches = prior._step(inputs[:, i], 5 + i, caches, rotation=None)
            return caches, logits

        placed = prior._placed(prefix[:, :5], jnp.arange(5))
        _, caches = prior._advance(placed, jnp.int32(0), caches, None)
        return jax.lax.scan(body, caches, jnp.arange(12))[1].swapaxes(0, 1)

    full = prior(ids, condition).reshape(3, 12, 11)[:, np.array(ORDER)]
    np.testing.assert_allclose(stepwise(prior, inputs, caches), full, rtol=1e-5, atol=1e-5)


def test_all_sequences_together_have_probability_one():
    config = dataclasses.replace(PREFIX, codebook_size=3, grid=(2, 2), order=(2, 0, 3, 1))
    sequences = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 4), axis=-1).reshape(81, 2, 2)
    log_prob = lively(config).log_prob(sequences, conditions(config, 1).repeat(81, axis=0))
    np.testing.assert_allclose(jnp.exp(log_prob).sum(), 1.0, rtol=1e-5)


def test_samples_follow_the_model():
    config = dataclasses.replace(PREFIX, codebook_size=3, grid=(1, 2), order=(1, 0))
    prior, images = lively(config), 20_000
    condition = conditions(config, 1)
    drawn = prior.sample(condition.repeat(images, axis=0), rng=KEY)
    frequency = np.bincount(np.asarray(drawn).reshape(images, 2) @ [3, 1], minlength=9) / images
    pairs = jnp.stack(jnp.divmod(jnp.arange(9), 3), axis=-1)[:, None]
    expected = np.exp(prior.log_prob(pairs, condition.repeat(9, axis=0)))
    assert np.all(np.abs(frequency - expected) < 5 * np.sqrt(expected / images) + 1e-6)
    table = expected.reshape(3, 3)
    assert np.abs(table - table.sum(1, keepdims=True) * table.sum(0, keepdims=True)).max() > 0.01


def test_without_the_null_class_everything_else_stays():
    full = lively(MINGPT)
    config = dataclasses.replace(MINGPT, null_class=False)
    state = nnx.state(full)
    state["condition"]["embedding"] = nnx.Param(full.condition.embedding[...][:3])
    bare = nnx.merge(nnx.graphdef(Prior(config, rngs=nnx.Rngs(0))), state)
    ids, classes = random_ids(3), jnp.array([0, 2, 1])
    assert np.array_equal(bare(ids, classes), full(ids, classes))
    assert np.array_equal(bare.sample(classes, rng=KEY), full.sample(classes, rng=KEY))
    for call in (
        lambda: bare(ids),
        lambda: bare.log_prob(ids),
        lambda: bare.sample(batch=3, rng=KEY),
    ):
        with pytest.raises(InputError, match=r"no condition.*a class an image"):
            call()
    with pytest.raises(InputError, match=r"guidance 2.0.*no null class"):
        bare.sample(classes, rng=KEY, guidance=2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, c: p(random_ids(2)), "no condition.* 2 by 3 grid of codes"),
        (lambda p, c: p.sample(rng=KEY), "no condition.* 2 by 3 grid of codes"),
        (lambda p, c: p.log_prob(random_ids(2), c[:, :, :2]), r"shape \(2, 2, 2\): \(2, 2, 3\)"),
        (lambda p, c: p(random_ids(2), jnp.array([0, 1])), r"shape \(2,\): \(2, 2, 3\)"),
        (lambda p, c: p(random_ids(2), c + 7), "condition code .*7, 0 to 6"),
        (lambda p, c: p.sample(c - 7, rng=KEY), "condition code -.*7, 0 to 6"),
        (lambda p, c: p.sample(c, batch=3, rng=KEY), "batch 3"),
        (lambda p, c: p.sample(c, rng=KEY, guidance=2.0), "guidance 2.0.*no null class"),
        (lambda p, c: p.sample(c, rng=KEY, grid=(4, 3)), r"grid \(4, 3\).*\(3, 4\)"),
    ],
)
def test_conditions_that_do_not_fit_a_prefix_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(lively(PREFIX), conditions(PREFIX, 2))


def test_grids_of_codes_are_no_classes_and_an_order_has_one_grid():
    prior = lively(dataclasses.replace(LLAMA, order=ORDER))
    with pytest.raises(InputError, match=r"shape \(2, 2, 3\): \(2,\), a class an image"):
        prior(random_ids(2), conditions(PREFIX, 2) % 3)
    with pytest.raises(InputError, match=r"grid \(4, 5\): the order.*\(3, 4\)"):
        prior.sample(grid=(4, 5), rng=KEY)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"order": ORDER[:-1]}, "order .*0 to 11.*11 entries"),
        (LLAMA, {"order": (*ORDER[:-1], ORDER[0])}, "order .*once"),
        (LLAMA, {"order": tuple(range(1, 13))}, "order .*0 to 11"),
        (LLAMA, {"null_class": False, "num_classes": 0}, "null_class false needs classes"),
        (LLAMA, {"null_class": False, "label_dropout": 0.1}, "label_dropout 0.1"),
        (PREFIX, {"null_class": False}, "null_class false needs classes"),
        (PREFIX, {"position": "rope2d"}, "position learned, not rope2d"),
        (PREFIX, {"num_classes": 3}, "prefix and 3 classes"),
        (PREFIX, {"prefix": CodePrefix(codebook_size=0, grid=(2, 3))}, "prefix must be positive"),
        (PREFIX, {"prefix": CodePrefix(codebook_size=7, grid=(2, 0))}, "prefix must be positive"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        Prior(dataclasses.replace(config, **change), rngs=nnx.Rngs(0))


def tokenizer(codebook_size: int, channels: int = 3) -> Tokenizer:
    """Codes of 4x4 pixels each."""
    autoencoder = AutoencoderConfig(
        resolution=16,
        in_channels=channels,
        out_channels=channels,
        base_channels=8,
        norm_groups=4,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        middle_blocks=1,
        middle_attention=False,
        attention_resolutions=(),
        z_channels=4,
    )
    config = TokenizerConfig(
        autoencoder=autoencoder, quantizer=VQConfig(codebook_size=codebook_size, dim=4)
    )
    return Tokenizer(config, rngs=nnx.Rngs(codebook_size))


def test_a_pipeline_makes_codes_of_condition_images_and_is_saved_whole(tmp_path):
    pipeline = Pipeline(tokenizer(11), lively(PREFIX), condition_tokenizer=tokenizer(7, channels=1))
    depth = jax.random.uniform(KEY, (2, 8, 12, 1), minval=-1, maxval=1)
    images = pipeline.generate(depth, rng=KEY)
    codes = pipeline.condition_tokenizer.encode(depth)
    assert images.shape == (2, 12, 16, 3)
    assert np.array_equal(pipeline.generate(codes, rng=KEY), images)
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert np.array_equal(
        Pipeline.from_pretrained(tmp_path / "pipeline").generate(depth, rng=KEY), images
    )


def test_pipelines_refuse_condition_tokenizers_and_images_that_do_not_fit(tmp_path):
    too_many = Pipeline(tokenizer(11), lively(PREFIX), condition_tokenizer=tokenizer(8))
    too_many.save_pretrained(tmp_path / "too many")
    with pytest.raises(InputError, match=r"7 condition codes.*has 8"):
        Pipeline.from_pretrained(tmp_path / "too many")
    unused = Pipeline(tokenizer(11), lively(LLAMA), condition_tokenizer=tokenizer(7))
    unused.save_pretrained(tmp_path / "unused")
    with pytest.raises(InputError, match=r"0 condition codes.*has 7"):
        Pipeline.from_pretrained(tmp_path / "unused")
    with pytest.raises(InputError, match="no condition_tokenizer"):
        Pipeline(tokenizer(11), lively(PREFIX)).generate(jnp.zeros((1, 8, 12, 3)), rng=KEY)


@pytest.mark.parametrize(
    ("model", "message"), [(PREFIX, "model.prefix.*without it"), (LLAMA, "order .*0 to 15")]
)
def test_training_refuses_what_it_cannot_feed_before_it_starts(tmp_path, model, message):
    model = dataclasses.replace(model, order=ORDER)
    tokenizer(11).save_pretrained(tmp_path / "tokenizer")
    source = str(tiny.images(tmp_path / "images", count=4))
    config = PriorTraining(model=model, data=DataConfig(source=source, batch_size=8))
    with pytest.raises(InputError, match=message):
        train_prior(config, tmp_path / "tokenizer", tmp_path / "run")
    assert not (tmp_path / "run").exists()
