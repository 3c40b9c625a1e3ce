"""Every preset builds at full size, is what its text says, and takes one step, shrunken."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqgan import presets
from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.adversarial.stylegan2 import StyleGAN2Config
from vqgan.adversarial.vqgan_plus import VQGANPlusConfig
from vqgan.cli import main
from vqgan.data.codes import PASSES
from vqgan.prior.transformer import Prior
from vqgan.serialization import from_json, to_json
from vqgan.tokenizer.model import Tokenizer
from vqgan.train import prior as stage2
from vqgan.train import tokenizer as stage1
from vqgan.train.guard import new_guard
from vqgan.train.reconstruction import Perceptual

KEY = jax.random.key(0)
BATCH = 2

# In the default suite; a full-size model alone takes seconds to trace, a step to compile.
QUICK = ("taming-f16", "llamagen-b")


def each(names):
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name in names
    ]


ALL = [
    pytest.param(command, name, id=f"{command}-{name}")
    for command, group in (("tokenizer", presets.TOKENIZERS), ("prior", presets.PRIORS))
    for name in group
]


def preset(command, name):
    return (presets.TOKENIZERS if command == "tokenizer" else presets.PRIORS)[name]


def with_fields(config, **fields):
    """The config with those of the fields that its class has."""
    own = {field.name for field in dataclasses.fields(config) if field.init}
    return dataclasses.replace(config, **{k: v for k, v in fields.items() if k in own})


def shrunken(config):
    """A tokenizer's training with all its kinds and options, a thousandth of its work.

    Two levels at 16 pixels, one block each; the discriminator plays from the first step on; no
    perceptual network.
    """
    quantizer = with_fields(config.model.quantizer, codebook_size=16)
    if isinstance(getattr(type(quantizer), "dim", 0), int):  # a field, not what levels say
        quantizer = with_fields(quantizer, dim=4)
    network = config.model.autoencoder
    autoencoder = dataclasses.replace(
        network,
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        middle_blocks=1,
        attention_resolutions=(8,) if network.attention_resolutions else (),
        resolution=16,
        z_channels=4 if config.model.projections else quantizer.dim,
        norm_groups=4,
    )
    judge = config.discriminator
    if isinstance(judge, PatchGANConfig):
        judge = dataclasses.replace(judge, base_channels=4, num_layers=1, norm_groups=4)
    if isinstance(judge, StyleGAN2Config):
        judge = dataclasses.replace(judge, resolution=16, base_channels=4, max_channels=8)
    if isinstance(judge, VQGANPlusConfig):
        judge = dataclasses.replace(judge, base_channels=8, num_stages=2, norm_groups=4, grid=4)
    loss = dataclasses.replace(config.loss, perceptual_weight=0.0)
    if config.loss.disc_start >= 0:
        loss = dataclasses.replace(loss, disc_start=0, disc_start_fraction=0.0, disc_warmup=0)
    model = dataclasses.replace(config.model, autoencoder=autoencoder, quantizer=quantizer)
    # A warm-up's first rate moves no float32 of the size of 1.
    optims = {
        name: dataclasses.replace(getattr(config, name), warmup_steps=0)
        for name in ("optim", "disc_optim")
    }
    return dataclasses.replace(config, model=model, discriminator=judge, loss=loss, **optims)


def pictures(config):
    """A batch of what the tokenizer is of."""
    rng, channels = np.random.default_rng(0), config.autoencoder.in_channels
    shape = (BATCH, 16, 16)
    if config.content == "labels":
        return jnp.asarray(rng.integers(0, channels, (*shape, 1), np.uint16))
    if config.content == "depth":
        return jnp.asarray(rng.uniform(-1, 1, (*shape, 1)).astype(np.float32))
    return jnp.asarray(rng.integers(0, 256, (*shape, channels), np.uint8))


@jax.tree_util.Partial
def mean_colours(images):
    """In the place of a classifier."""
    return [images.mean((1, 2))]


def shrunken_prior(config):
    """A prior's training with all its kinds and options, of one narrow layer over 2x2 codes."""
    model = dataclasses.replace(
        config.model,
        codebook_size=16,
        grid=(2, 2),
        num_classes=min(config.model.num_classes, 3),
        depth=1,
        heads=2,
        width=16,
        mlp_multiple=8,
    )
    return dataclasses.replace(config, model=model)


def made_up(init):
    """A state of the right shapes, since initialisers take longer to compile than to replace."""
    rng = np.random.default_rng(0)

    def params(tree):
        def leaf(path, x):
            middle = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
            return (middle + 0.1 * rng.standard_normal(x.shape)).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    state = jax.eval_shape(init)
    made = {"params": params(state.params), "step": np.int32(0)}
    made["ema"] = made["params"]
    made["optim"] = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.optim)
    if hasattr(state, "disc_params"):
        made["disc_params"] = params(state.disc_params)
        for name in ("disc_optim", "logit_means", "codebook_stats", "codes"):
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), getattr(state, name))
            made[name] = zeros
        made["disc_stats"] = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state.disc_stats)
        made["guard"] = new_guard()
    return dataclasses.replace(state, **made)


# For one step the compiler takes far longer than what its optimisations save.
quickly_compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def share_moved(before, after):
    """Of the arrays; some have no gradient, as keys' biases, which the softmax does not see."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return np.mean([not np.array_equal(a, b) for a, b in pairs])


def check(metrics):
    assert all(np.isfinite(value) for value in jax.device_get(metrics).values()), metrics
    assert metrics["loss"] != 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("name", each(presets.TOKENIZERS))
def test_a_tokenizer_takes_a_shrunken_step(name):
    config = shrunken(presets.TOKENIZERS[name]())
    stage, init = stage1.setup(config)
    before, played = made_up(init), config.loss.disc_start >= 0
    perceptual = Perceptual(classifier=mean_colours if config.loss.classifier_weight else None)
    step = functools.partial(stage1.step, stage, perceptual=perceptual)
    after, metrics = quickly_compiled(step)(before, {"image": pictures(config.model)}, key=KEY)
    check(metrics)
    assert ("classifier" in metrics) == (config.loss.classifier_weight > 0)
    assert (metrics["adversarial_weight"] > 0) == played and (metrics["disc_loss"] > 0) == played
    assert ("lecam" in metrics, "r1" in metrics) == (
        config.loss.lecam_weight > 0,
        config.loss.r1_weight > 0,
    )
    assert share_moved(before.params, after.params) > 0.9
    moved = share_moved(before.disc_params, after.disc_params)
    assert moved > 0.7 if played else moved == 0


@pytest.mark.parametrize("name", each(presets.PRIORS))
def test_a_prior_takes_a_shrunken_step(name):
    config = shrunken_prior(presets.PRIORS[name]())
    stage, init = stage2.setup(config)
    before = made_up(init)
    batch = {"ids": jnp.arange(8).reshape(BATCH, 2, 2), "label": jnp.array([0, 2])}
    after, metrics = quickly_compiled(functools.partial(stage2.step, stage))(before, batch, key=KEY)
    check(metrics)
    assert share_moved(before.params, after.params) > 0.9


def parameters(model_class, config):
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def said(count):
    """As the texts have it: 4.4 M, 72 M."""
    millions = count / 1e6
    return f"{millions:.1f} M parameters" if millions < 10 else f"{millions:.0f} M parameters"


@pytest.mark.parametrize("name", each(presets.TOKENIZERS))
def test_a_tokenizer_has_the_parameters_that_its_text_says(name):
    make = presets.TOKENIZERS[name]
    config = make()
    config.discriminator.check()
    assert said(parameters(Tokenizer, config.model)) in " ".join(make.__doc__.split())


@pytest.mark.parametrize("name", each(presets.PRIORS))
def test_a_prior_has_the_parameters_that_its_text_says(name):
    make = presets.PRIORS[name]
    assert said(parameters(Prior, make().model)) in " ".join(make.__doc__.split())


@pytest.mark.parametrize(("command", "name"), ALL)
def test_the_text_says_how_to_run_it_and_what_came_of_it(command, name):
    text = " ".join(preset(command, name).__doc__.split())
    given = re.search(rf"`vqgan train-{command} ({name}) [^`]*`", text)
    assert given, text
    needed = ["--out", "--tokenizer"] if command == "prior" else ["--out"]
    assert all(option in given[0] for option in needed)
    assert "Not trained here" in text or "docs/results.md" in text
    assert "Published: " in text or "CPU cores" in text


@pytest.mark.parametrize(("command", "name"), ALL)
def test_the_config_survives_json_and_fits_together(command, name):
    config = preset(command, name)()
    assert from_json(type(config), json.loads(json.dumps(to_json(config))), where="x") == config
    config.model.check()
    if command == "prior":
        assert set(config.passes) <= PASSES.keys()
        return
    assert config.data.image_size == config.model.autoencoder.resolution
    assert getattr(config.discriminator, "resolution", None) in (None, config.data.image_size)
    assert config.loss.disc_start < config.run.steps


@pytest.mark.parametrize("command", ["tokenizer", "prior"])
def test_help_lists_each_preset_with_a_line(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([f"train-{command}", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    group = presets.TOKENIZERS if command == "tokenizer" else presets.PRIORS
    found = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert found.keys() == group.keys()
    assert all(line.endswith(".") for line in found.values())
    assert max(map(len, lines)) < 120


def test_published_numbers_come_from_their_arithmetic():
    f16, vq16, ibq = (presets.TOKENIZERS[n]() for n in ("taming-f16", "llamagen-vq16", "ibq"))
    assert f16.optim.lr == pytest.approx(12 * 4.5e-6) and f16.disc_optim.lr == f16.optim.lr
    assert presets.TOKENIZERS["taming-f16-16384"]().optim.lr == pytest.approx(14 * 4.5e-6)
    assert presets.PRIORS["taming-gpt"]().optim.lr == pytest.approx(2 * 4.5e-6)
    assert presets.PRIORS["taming-gpt-imagenet"]().optim.lr == pytest.approx(16 * 4.5e-6)
    assert vq16.run.steps == 40 * 10_009 and ibq.run.steps == 330 * 5004
    assert ibq.data.batch_size == 8 * 8 * 4
