"""The contract that every quantizer keeps. A new one joins by a line in CONFIGS.

What is particular to each, its formulas above all, is in test_quantizers_*.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quantizing import (
    BSQ,
    EMA,
    FIXED,
    FSQ,
    GUMBEL,
    IBQ,
    LFQ,
    MULTISCALE,
    NORMALIZED,
    PRODUCT,
    RESIDUAL,
    ROTATED,
    SIMVQ,
    SMALL,
    VQ_USED,
    assert_same,
    everything,
    gradients,
    gumbel_logits,
    latents,
    make,
    rotation_by_matrices,
    run,
    unit,
)
from scipy.special import softmax, xlogy

from vqgan.cli import main
from vqgan.errors import InputError
from vqgan.eval.runner import evaluate_tokenizer
from vqgan.pictures import to_float
from vqgan.serialization import flat_weights, from_json, to_json, with_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import (
    BSQConfig,
    EMAConfig,
    FSQConfig,
    GumbelConfig,
    IBQConfig,
    LFQConfig,
    ProductConfig,
    ResidualConfig,
    SimVQConfig,
    VQConfig,
    make_quantizer,
)
from vqgan.train.sharding import make_mesh

CONFIGS = {
    "vq": SMALL,
    "vq-one-code": VQConfig(codebook_size=1, dim=3),
    "vq-normalize": NORMALIZED,
    "vq-used": VQ_USED,
    "gumbel": GUMBEL,
    "gumbel-soft": dataclasses.replace(GUMBEL, straight_through=False),
    "gumbel-used": dataclasses.replace(GUMBEL, used_codes=5),
    "ibq": IBQ,
    "lfq": LFQ,
    "bsq": BSQ,
    "fsq": FSQ,
    "ema": EMA,
    "vq-rotation": ROTATED,
    "simvq": SIMVQ,
    "residual": RESIDUAL,
    "residual-shared": ResidualConfig(inner=EMA, depth=2),
    "residual-ibq": ResidualConfig(inner=IBQ, depth=2, shared=False, losses="sum"),
    "product": PRODUCT,
    "product-shared": ProductConfig(inner=dataclasses.replace(SMALL, dim=1), groups=3, shared=True),
    "fsq-symmetric": dataclasses.replace(FSQ, symmetric=True),
    "multiscale": MULTISCALE,
    "multiscale-cosine": dataclasses.replace(MULTISCALE, cosine=True, k_means=2, phis=0),
}
# Other forms of a kind, those with a dash in the name, are in the slow suite.
EACH = [pytest.param(name, marks=pytest.mark.slow if "-" in name else ()) for name in CONFIGS]
SEQUENCES = {"multiscale": 19, "multiscale-cosine": 19}  # whose ids are [b, l]
PLACES = {
    "residual": (3,),
    "residual-shared": (2,),
    "residual-ibq": (2,),
    "product": (3,),
    "product-shared": (3,),
}
# Every code is the one that its own value is quantised to.
STABLE = (
    "vq",
    "vq-one-code",
    "vq-used",
    "vq-normalize",
    "vq-rotation",
    "lfq",
    "bsq",
    "ema",
    "simvq",
)
LOSSLESS = ("fsq", "fsq-symmetric", "product")


@pytest.fixture(params=EACH)
def quantizer(request):
    return make(CONFIGS[request.param])


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_ids_are_int32_of_the_grid_and_codes_inverts_them_bit_for_bit(name, scale):
    quantizer, z = make(CONFIGS[name]), scale * latents()
    out = run(quantizer, z)  # compiled as one; codes are not
    assert out.ids.dtype == jnp.int32
    grid = (*z.shape[1:3], *PLACES.get(name, ()))
    assert out.ids.shape == (len(z), *((SEQUENCES[name],) if name in SEQUENCES else grid))
    assert (out.ids >= 0).all() and (out.ids < quantizer.codebook_size).all()
    np.testing.assert_array_equal(quantizer.codes(out.ids), out.z_q)


@pytest.mark.parametrize("name", [each for each in EACH if each.values[0] in STABLE])
def test_each_code_is_quantised_to_itself(name):
    quantizer = make(CONFIGS[name])
    every = jnp.arange(quantizer.codebook_size, dtype=jnp.int32).reshape(1, 1, -1)
    out = run(quantizer, quantizer.codes(every))
    np.testing.assert_array_equal(out.ids, every)


@pytest.mark.parametrize("name", EACH)
def test_every_id_has_a_code_of_its_own(name):
    quantizer = make(CONFIGS[name])
    (places,), k = PLACES.get(name, (1,)), quantizer.codebook_size
    if name in SEQUENCES:  # as the first scale, of one position
        codes = quantizer.codes(jnp.arange(k, dtype=jnp.int32)[:, None])
        assert len(np.unique(np.asarray(codes).reshape(k, -1), axis=0)) == k
        return
    for place in range(places):
        ids = np.zeros((1, 1, k, places), np.int32)
        ids[..., place] = np.arange(k)
        codes = quantizer.codes(jnp.array(ids if name in PLACES else ids[..., 0]))
        assert len(np.unique(np.asarray(codes)[0, 0], axis=0)) == k


# Gradients of `(z_q * weights).sum()` with respect to the latents, as each quantizer documents its
# own, in evaluation. All others go straight through, to the latents alone.


def to_directions(quantizer, z, weights):
    u, length = unit(z), np.linalg.norm(z, axis=-1, keepdims=True)
    return (weights - u * (u * weights).sum(-1, keepdims=True)) / length


def turned(quantizer, z, weights):
    codes = np.asarray(run(quantizer, jnp.array(z, jnp.float32)).z_q, np.float64)
    found = []
    for at in np.ndindex(z.shape[:-1]):
        matrix = rotation_by_matrices(z[at], codes[at])
        np.testing.assert_allclose(matrix @ z[at], codes[at], rtol=1e-6, atol=1e-9)
        found.append(matrix.T @ weights[at])
    return np.reshape(found, z.shape)


def through_probabilities(quantizer, z, weights):
    """By the Jacobian of `softmax(logits) @ codes`, with logits that are linear in z."""
    if hasattr(quantizer, "proj_weight"):
        used = slice(None) if quantizer.used is None else np.asarray(quantizer.used[...])
        logits = gumbel_logits(quantizer, z)[..., used]
        slope = np.asarray(quantizer.proj_weight[...], np.float64)[used]
        temperature = quantizer.config.temperature_end
    else:
        used, slope = slice(None), np.asarray(quantizer.codebook[...], np.float64)
        logits, temperature = z @ slope.T, 1.0
    p, to_p = softmax(logits / temperature, axis=-1), weights @ quantizer.codebook[...][used].T
    return p * (to_p - (p * to_p).sum(-1, keepdims=True)) @ slope / temperature


def through_residuals(quantizer, z, weights):
    """Each stage's, of what the stages before, with gradients of their own, leave over."""
    rests = [z]
    for stage in quantizer.stages:
        rests.append(rests[-1] - run(stage, jnp.array(rests[-1], jnp.float32)).z_q)
    to_rest = np.zeros_like(z)
    for stage, rest in reversed(list(zip(quantizer.stages, rests, strict=False))):
        to_rest = to_rest + through_probabilities(stage, rest, weights - to_rest)
    return to_rest


def through_bounds(quantizer, z, weights):
    config = getattr(quantizer.config, "inner", quantizer.config)
    levels = np.resize(config.levels, z.shape[-1])
    if config.symmetric:
        return weights / np.cosh(z) ** 2
    half, offset = (levels - 1) * (1 - 1e-3) / 2, np.where(levels % 2 == 1, 0.0, 0.5)
    return weights * half / np.cosh(z + np.tan(offset / half)) ** 2 / (levels // 2)


REPLACED = {
    "vq-normalize": to_directions,
    "bsq": to_directions,
    "vq-rotation": turned,
    "gumbel": through_probabilities,
    "gumbel-soft": through_probabilities,
    "gumbel-used": through_probabilities,
    "ibq": through_probabilities,
    "residual-ibq": through_residuals,
    "fsq": through_bounds,
    "fsq-symmetric": through_bounds,
    "product": through_bounds,
}


@pytest.mark.parametrize("name", EACH)
def test_gradient_goes_straight_through_or_as_documented(name):
    quantizer, z, weights = make(CONFIGS[name]), latents(), latents(2)
    to_z, to_params = gradients(quantizer, z, lambda out: (out.z_q * weights).sum())
    if REPLACED.get(name) not in (through_probabilities, through_residuals):
        assert not any(gradient.any() for gradient in to_params.values())
    if name not in REPLACED:
        np.testing.assert_array_equal(to_z, weights)
        return
    expected = REPLACED[name](quantizer, np.asarray(z, np.float64), np.asarray(weights, np.float64))
    assert np.abs(expected - weights).max() > 0.1  # which is another question
    np.testing.assert_allclose(to_z, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_losses_have_names_and_a_gradient(name):
    quantizer = make(CONFIGS[name])
    losses = run(quantizer, latents()).losses
    assert losses and all(value.shape == () for value in losses.values())
    to_z, _ = gradients(quantizer, latents(), lambda out: sum(out.losses.values()))
    assert to_z.any() == (name not in LOSSLESS)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_values_and_gradients_stay_finite(quantizer, scale):
    z, options = scale * latents(), {"key": jax.random.key(5), "step": jnp.int32(10)}
    found = run(quantizer, z, **options), gradients(quantizer, z, everything, **options)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_evaluation_draws_nothing(quantizer):
    z = latents()
    assert_same(run(quantizer, z), run(quantizer, z))
    # A schedule moves gradients, never the codes that evaluation picks.
    np.testing.assert_array_equal(run(quantizer, z, step=jnp.int32(0)).z_q, run(quantizer, z).z_q)
    key = jax.random.key(4)
    assert_same(run(quantizer, z, key=key), run(quantizer, z, key=key))


def test_under_vmap_as_one_by_one(quantizer):
    z = latents(3, (2, 1, 3, 4, 3))
    # Not the output itself, which by its annotations holds the arrays of one call.
    z_q, ids, losses = jax.vmap(lambda z: tuple(vars(run(quantizer, z)).values()))(z)
    for i in range(2):
        one = run(quantizer, z[i])
        np.testing.assert_array_equal(ids[i], one.ids)
        np.testing.assert_array_equal(z_q[i], one.z_q)
        for name, value in one.losses.items():
            np.testing.assert_allclose(losses[name][i], value, rtol=1e-5, atol=1e-6)


def test_bfloat16_latents_count_as_the_float32_they_equal(quantizer):
    z = latents().astype(jnp.bfloat16)
    out = run(quantizer, z)
    assert out.z_q.dtype == jnp.float32
    assert_same(out, run(quantizer, z.astype(jnp.float32)))
    to_z, _ = gradients(quantizer, z, everything)
    assert to_z.dtype == jnp.bfloat16


@given(data=st.data(), name=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=25, deadline=None)
def test_statistics_equal_a_count(data, name):
    quantizer = make(CONFIGS[name])
    k = quantizer.codebook_size
    places = PLACES.get(name, ())
    ids = data.draw(hnp.arrays(np.int32, (1, 2, 12, *places), elements=st.integers(0, k - 1)))
    rows = ids.reshape(24, -1).T
    counts = np.array([np.bincount(row, minlength=k) for row in rows])
    np.testing.assert_array_equal(quantizer.occurrences(jnp.array(ids)), counts)
    found = quantizer.statistics(jnp.array(ids))
    np.testing.assert_allclose(found["usage"], (counts > 0).mean(), rtol=1e-6)
    expected = np.exp(-xlogy(counts / 24, counts / 24).sum(1)).mean()
    np.testing.assert_allclose(found["perplexity"], expected, rtol=1e-5)


def test_maintenance_is_a_function_of_its_key(quantizer):
    first, second = (nnx.merge(*nnx.split(quantizer), copy=True) for _ in range(2))
    z = latents()
    for each in (first, second):
        each.maintain(z, run(quantizer, z).ids, jax.random.key(3))
    assert_same(flat_weights(first), flat_weights(second))


@pytest.mark.parametrize("name", EACH)
def test_config_and_weights_survive_their_files(name):
    quantizer, whole = make(CONFIGS[name]), TokenizerConfig(quantizer=CONFIGS[name])
    data = json.loads(json.dumps(to_json(whole)))
    assert from_json(TokenizerConfig, data, where="x") == whole
    abstract = nnx.eval_shape(lambda: make_quantizer(CONFIGS[name], rngs=nnx.Rngs(1)))
    again = with_weights(abstract, flat_weights(quantizer), where="x")
    assert_same(run(again, latents()), run(quantizer, latents()))


@pytest.mark.parametrize(
    ("quantizer", "words"),
    [
        (
            {"kind": "pq"},
            "kind 'pq' is not one of vq, gumbel, ibq, lfq, bsq, fsq, ema, simvq, residual, "
            "product, multiscale",
        ),
        ({"kind": ["vq"]}, "kind"),
        ("vq", "kind"),
        ({"kind": "lfq", "codebook_size": 8}, "codebook_size"),
        ({"kind": "gumbel", "beta": 0.25}, "beta"),
    ],
)
def test_json_of_no_quantizer_is_refused_in_one_line(quantizer, words):
    with pytest.raises(InputError) as error:
        from_json(TokenizerConfig, {"quantizer": quantizer}, where="config.json")
    message = str(error.value)
    assert message.startswith("config.json: ") and "\n" not in message
    assert words in message and "quantizer" in message


def test_json_from_before_there_was_a_choice_is_a_vq():
    config = from_json(TokenizerConfig, {"quantizer": {"dim": 8}}, where="x")
    assert config.quantizer == VQConfig(dim=8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VQConfig(codebook_size=0), "codebook_size 0"),
        (VQConfig(used_codes=5), "init_from_data false and revive_after 0"),
        (dataclasses.replace(FIXED, used_codes=13), "used_codes 13"),
        (dataclasses.replace(FIXED, used_codes=5, unknown_id=6), "unknown_id 6"),
        (dataclasses.replace(FIXED, unknown_id=0), "unknown_id 0"),
        (GumbelConfig(temperature_end=0.0), "temperature_end 0.0"),
        (GumbelConfig(temperature_steps=0), "temperature_steps 0"),
        (GumbelConfig(codebook_size=4, used_codes=-1), "used_codes -1"),
        (IBQConfig(entropy_temperature=0.0), "entropy_temperature 0.0"),
        (VQConfig(chunk=0), "chunk 0"),
        (IBQConfig(chunk=0), "chunk 0"),
        (GumbelConfig(chunk=-1), "chunk -1"),
        (LFQConfig(dim=25), "dim 25"),
        (BSQConfig(dim=0), "dim 0: bsq"),
        (BSQConfig(entropy_temperature=0.0), "entropy_temperature 0.0"),
        (FSQConfig(levels=()), "levels ()"),
        (FSQConfig(levels=(8, 1)), "levels (8, 1)"),
        (FSQConfig(levels=(8,) * 9), "at most 2**24"),
        (VQConfig(k_means=-1), "k_means -1"),
        (dataclasses.replace(FIXED, k_means=3), "needs init_from_data"),
        (SimVQConfig(codebook_size=0), "codebook_size 0"),
        (ResidualConfig(depth=0), "quantizer.depth 0"),
        (ResidualConfig(inner=VQConfig(dim=0)), "quantizer.inner.dim 0"),
        (ProductConfig(groups=0), "quantizer.groups 0"),
        (EMAConfig(decay=1.0), "decay 1.0"),
        (EMAConfig(epsilon=0.0), "epsilon 0.0"),
        (LFQConfig(entropy_group_bits=0), "entropy_group_bits 0"),
    ],
)
def test_configs_that_contradict_themselves(config, words):
    with pytest.raises(InputError) as error:
        make_quantizer(config, rngs=nnx.Rngs(0))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_command_line_chooses_by_kind(capsys):
    command = ["train-tokenizer", "small", "--model.quantizer.kind"]
    with pytest.raises(SystemExit):
        main([*command, "lfq", "--model.quantizer.dim", "9", "--help"])
    text = capsys.readouterr().out
    assert "--model.quantizer.entropy-group-bits" in text
    assert "--model.quantizer.codebook-size" not in text
    with pytest.raises(SystemExit) as exit:
        main([*command, "pq", "--out", "x"])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    kinds = "vq, gumbel, ibq, lfq, bsq, fsq, ema, simvq, residual, product, multiscale"
    assert lines == [f"vqgan: --model.quantizer.kind pq: there are {kinds}"]


def test_command_line_chooses_what_is_inside_by_kind(capsys):
    command = ["train-tokenizer", "small", "--model.quantizer.kind", "residual"]
    with pytest.raises(SystemExit):
        main([*command, "--model.quantizer.inner.kind=ema", "--help"])
    text = capsys.readouterr().out
    assert "--model.quantizer.depth" in text and "--model.quantizer.inner.decay" in text
    with pytest.raises(SystemExit) as exit:
        main([*command, "--model.quantizer.inner.kind", "product", "--out", "x"])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("vqgan: --model.quantizer.inner.kind product: there are vq, gumbel")


# Several ids a position.


def small_tokenizer(name):
    autoencoder = AutoencoderConfig(
        base_channels=8,
        norm_groups=4,
        channel_multipliers=(1, 2),
        attention_resolutions=(),
        resolution=16,
        z_channels=8,
    )
    config = TokenizerConfig(autoencoder=autoencoder, quantizer=CONFIGS[name])
    return Tokenizer(config, rngs=nnx.Rngs(0))


def test_evaluation_too_takes_the_mean_over_the_places():
    tokenizer = small_tokenizer("product")
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    valid = np.array([True, True, True, False])
    parts = [{"image": x, "valid": v} for x, v in zip(images[:, None], valid[:, None], strict=True)]
    found = evaluate_tokenizer(tokenizer, parts, None)
    ids = tokenizer.encode(to_float(jnp.array(images[valid])))
    for key, value in tokenizer.quantizer.statistics(ids).items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)
    assert 1 / 5 < found["usage"] < 1  # of five codes, and not of fifteen


@pytest.mark.parametrize("name", ["residual", "product"])
def test_tokenizer_of_several_ids_a_position_decodes_what_it_encodes(name):
    tokenizer = small_tokenizer(name)
    images = jnp.tanh(latents(shape=(2, 16, 16, 3)))
    ids, out = tokenizer.encode(images), tokenizer(images)
    assert ids.shape == (*out.z.shape[:3], *PLACES[name])
    np.testing.assert_array_equal(ids, out.ids)
    np.testing.assert_allclose(tokenizer.decode(ids), out.reconstruction, rtol=1e-4, atol=1e-5)


@pytest.mark.multidevice  # a minute and a half, most of it compiling
@pytest.mark.parametrize("name", EACH)
def test_eight_devices_do_what_one_does(name):
    z, weights = latents(shape=(8, 3, 4, 3)), latents(2, (8, 3, 4, 3))
    spread = jax.device_put(z, jax.NamedSharding(make_mesh(), jax.P("data")))
    graphdef, params, rest = nnx.split(make(CONFIGS[name]), nnx.Param, ...)

    @jax.jit
    def update(z, params, rest):
        def objective(z, params):
            out = nnx.merge(graphdef, params, rest)(z, key=jax.random.key(1), step=jnp.int32(5))
            return (out.z_q * weights).sum() + sum(out.losses.values()), out

        grads, out = jax.grad(objective, argnums=(0, 1), has_aux=True)(z, params)
        quantizer = nnx.merge(graphdef, params, rest, copy=True)
        # By the default generator: it draws alike however the batch lies.
        quantizer.maintain(z, out.ids, jax.random.key(0, impl="threefry2x32"))
        return grads, vars(out), nnx.state(quantizer), quantizer.statistics(out.ids)

    one, eight = update(z, params, rest), update(spread, params, rest)
    assert len(eight[1]["z_q"].sharding.device_set) == 8
    np.testing.assert_array_equal(one[1]["ids"], eight[1]["ids"])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
