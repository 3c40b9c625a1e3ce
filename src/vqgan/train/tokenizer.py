"""Stage 1 training: the losses of VQGAN (arXiv:2012.09841, section 3.1) and one step of it.

The autoencoder runs forward once and backward once. The two things that the paper asks of
gradients at the last layer, their norms for the adaptive weight, and the two players' updates all
come from the same reconstruction:

    z, ids, features         = encode, quantise and decode up to the last layer
    reconstruction           = last layer
    dR                       = d(L1 + LPIPS) / d reconstruction         (train/reconstruction.py)
    dG, discriminator update = from one pass of the discriminator over the reconstruction
    weight                   = |dR at the last layer| / |dG at the last layer|
    autoencoder update       = pull dR + weight dG back through everything
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from vqgan.adversarial.classifier import Classifier
from vqgan.adversarial.discriminators import (
    Discriminator,
    load_discriminator,
    make_discriminator,
)
from vqgan.adversarial.lpips import load_lpips
from vqgan.data.maps import reader
from vqgan.data.pipeline import eval_batches, image_augment
from vqgan.data.sources import ImageSource, open_source
from vqgan.errors import InputError
from vqgan.eval.runner import evaluate_tokenizer
from vqgan.pictures import from_model, inputs_over_outputs, shown, to_model
from vqgan.serialization import model_directory, to_json
from vqgan.tokenizer.autoencoder import to_pixels
from vqgan.tokenizer.model import Tokenizer
from vqgan.tokenizer.quantizers import MultiScaleConfig
from vqgan.train import loop, sharding
from vqgan.train.adversarial import (
    Extractor,
    Images,
    Metrics,
    Stage1,
    disc_start,
    feature_extractor,
    play_once_begun,
)
from vqgan.train.code_use import code_metrics, new_code_use, seen
from vqgan.train.config import TokenizerTraining
from vqgan.train.guard import Watch, compare, compares, guard_metrics, new_guard, observe
from vqgan.train.optim import optimizer
from vqgan.train.reconstruction import Perceptual, perceptual_networks, reconstruction_terms
from vqgan.train.run_directory import claim
from vqgan.train.state import (
    TokenizerState,
    compiled,
    copy,
    create,
    describe,
    moving_average,
    split,
)
from vqgan.train.stream import global_batches

Batch = dict[str, Any]


def setup(
    config: TokenizerTraining,
    optim: optax.GradientTransformation | None = None,
    disc_optim: optax.GradientTransformation | None = None,
) -> tuple[Stage1, Callable[[], TokenizerState]]:
    """The fixed part of a run, and a function that makes the state it starts from.

    Any optax transform can take the place of the configured optimisers.
    """
    optim = optim or optimizer(config.optim, config.run.steps)
    disc_optim = disc_optim or optimizer(config.disc_optim, config.run.steps)

    def modules() -> tuple[Tokenizer, Discriminator]:
        rngs = nnx.Rngs(config.run.seed)
        tokenizer = Tokenizer(config.model, rngs=rngs)
        return tokenizer, make_discriminator(config.discriminator, rngs=rngs)

    def init() -> TokenizerState:
        tokenizer, discriminator = modules()
        _, params, codebook_stats = split(tokenizer)
        _, disc_params, disc_stats = split(discriminator)
        return TokenizerState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            codebook_stats=codebook_stats,
            codes=new_code_use(tokenizer.quantizer),
            optim=optim.init(params),
            ema=copy(params),
            disc_params=disc_params,
            disc_stats=disc_stats,
            disc_optim=disc_optim.init(disc_params),
            logit_means=jnp.zeros(2),
            guard=new_guard(),
        )

    tokenizer, discriminator = nnx.eval_shape(modules)
    stage = Stage1(
        config=config,
        tokenizer=split(tokenizer)[0],
        last_layer=nnx.split(tokenizer.decoder.conv_out)[0],
        discriminator=split(discriminator)[0],
        optim=optim,
        disc_optim=disc_optim,
    )
    return stage, init


def step(
    stage: Stage1,
    state: TokenizerState,
    batch: Batch,
    key: Key[Array, ""],
    perceptual: Perceptual,
    extractor: Extractor | None = None,
) -> tuple[TokenizerState, Metrics]:
    """One update of the autoencoder and one of the discriminator.

    Args:
      batch: `image` `[b, h, w, c]`: uint8, or what label and depth maps are (vqgan/pictures.py).
      key: the run's; the step's own are derived from it.
      perceptual: the networks of the perceptual terms.
      extractor: feature maps of images, for a discriminator on features.
    """
    loss = stage.config.loss
    key = jax.random.fold_in(key, state.step)
    images = to_model(batch["image"], stage.config.model.autoencoder.in_channels)

    # Forward, up to the decoder's features and then through the last layer.
    def forward(params: nnx.State) -> tuple[tuple[Array, Array], Any]:
        tokenizer = nnx.merge(stage.tokenizer, params, state.codebook_stats)
        z, q, features = _decoded(tokenizer, images, key, state.step)
        return (features, sum(q.losses.values())), (z, q, tokenizer.quantizer.occurrences(q.ids))

    (features, codebook_loss), pull, aux = jax.vjp(forward, state.params, has_aux=True)
    z, q, counts = aux
    last = state.params["decoder"]["conv_out"]
    reconstruction, pull_last = jax.vjp(functools.partial(_apply_last, stage), last, features)

    # What both losses want of the reconstruction.
    (nll, terms), wish = jax.value_and_grad(reconstruction_terms, has_aux=True)(
        reconstruction, images, loss, perceptual
    )
    game = play_once_begun(
        stage,
        state,
        extractor,
        jax.random.fold_in(key, 4),
        images,
        reconstruction,
        wish,
        pull_last,
    )

    # Back through the last layer and everything before it, once.
    last_grads, features_wish = pull_last(wish + game.wish)
    (grads,) = pull((features_wish, jnp.asarray(loss.codebook_weight)))
    grads["decoder"]["conv_out"] = last_grads
    updates, optim = stage.optim.update(grads, state.optim, state.params)
    updated = optax.apply_updates(state.params, updates)
    params, codebook_stats = _maintain_codebook(stage, state, updated, z, q.ids, key)
    codes = seen(state.codes, counts, state.step, stage.config.usage_window)

    metrics = terms | q.losses | game.metrics
    metrics |= code_metrics(codes, state.step, stage.config.usage_window)
    metrics["loss"] = nll + loss.codebook_weight * codebook_loss + game.loss
    metrics["grad_norm"] = optax.tree.norm(grads)
    guard = state.guard
    if loss.guard and disc_start(stage.config) >= 0:
        begun = state.step >= disc_start(stage.config)
        guard = observe(loss.guard_rule, guard, nll, game.balance, begun)
        metrics |= guard_metrics(guard)
    new = TokenizerState(
        step=state.step + 1,
        params=params,
        codebook_stats=codebook_stats,
        codes=codes,
        optim=optim,
        ema=_average(state.ema, updated, params, stage.config.ema_decay),
        disc_params=game.disc_params,
        disc_stats=game.disc_stats,
        disc_optim=game.disc_optim,
        logit_means=game.logit_means,
        guard=guard,
    )
    return new, metrics


def look(
    stage: Stage1,
    state: TokenizerState,
    batch: Batch,
    key: Key[Array, ""],
    perceptual: Perceptual,
) -> tuple[TokenizerState, Metrics]:
    """What the guard does before a step: see train/guard.py. The arguments are those of `step`.

    A program of its own, so that a run in which the guard finds nothing computes to the bit what it
    would without one: inside of the step it would change the order of sums.
    """
    rule, guard = stage.config.loss.guard_rule, state.guard
    age = state.step - disc_start(stage.config)
    key = jax.random.fold_in(key, state.step)
    images = to_model(batch["image"], stage.config.model.autoencoder.in_channels)

    def nll(params: nnx.State) -> Float[Array, ""]:
        tokenizer = nnx.merge(stage.tokenizer, params, state.codebook_stats)
        features = _decoded(tokenizer, images, key, state.step)[2]
        reconstruction = _apply_last(stage, params["decoder"]["conv_out"], features)
        return reconstruction_terms(reconstruction, images, stage.config.loss, perceptual)[0]

    guard = jax.lax.cond(
        compares(rule, guard, age),
        lambda: compare(rule, guard, nll(state.params), nll(state.ema), age),
        lambda: dataclasses.replace(guard, leap=jnp.zeros(())),
    )
    params = jax.lax.cond(guard.spoilt > 0, lambda: state.ema, lambda: state.params)
    guard = dataclasses.replace(guard, spoilt=jnp.zeros((), jnp.int32))
    return dataclasses.replace(state, params=params, guard=guard), {}


def _decoded(
    tokenizer: Tokenizer, images: Images, key: Key[Array, ""], step: Array
) -> tuple[Array, Any, Array]:
    """Latents, what the quantizer makes of them, the features before the decoder's last layer."""
    z = tokenizer.latents(images, key)
    q = tokenizer.quantizer(z, key=jax.random.fold_in(key, 3), step=step)
    return z, q, tokenizer.decoder_features(q.z_q, key)


def _apply_last(stage: Stage1, last: nnx.State, features: Array) -> Images:
    model = stage.config.model.autoencoder
    y = nnx.merge(stage.last_layer, last)(features)
    return to_pixels(y, model.pixel_range, model.output)


def _maintain_codebook(
    stage: Stage1,
    state: TokenizerState,
    params: nnx.State,
    z: Array,
    ids: Array,
    key: Key[Array, ""],
) -> tuple[nnx.State, nnx.State]:
    """Parameters and codebook statistics after the quantizer has looked after its codes."""
    tokenizer = nnx.merge(stage.tokenizer, params, state.codebook_stats, copy=True)
    tokenizer.quantizer.maintain(z, ids, jax.random.fold_in(key, 2))
    _, params, codebook_stats = split(tokenizer)
    return params, codebook_stats


def _average(ema: nnx.State, updated: nnx.State, maintained: nnx.State, decay: float) -> nnx.State:
    """Moving average of the weights; what maintenance moved, moves here at once."""
    average = moving_average(ema, updated, decay)
    return jax.tree.map(
        lambda a, u, m: a if u is m else jnp.where(u == m, a, m), average, updated, maintained
    )


def train_tokenizer(
    config: TokenizerTraining,
    out: Path | str,
    *,
    optim: optax.GradientTransformation | None = None,
    disc_optim: optax.GradientTransformation | None = None,
    extractor: Extractor | None = None,
    classifier: Classifier | None = None,
    deadline: float | None = None,
) -> Tokenizer:
    """Trains a tokenizer in the run directory `out`, or goes on with the run that is there.

    Args:
      optim, disc_optim: optax transforms in place of the configured ones.
      extractor: feature maps of images `[b, h, w, c]` in [-1, 1], for a discriminator of kind
        "features": a differentiable function or, so that its weights need not become constants of
        the compiled step, a module. VGG16's stages by default.
      classifier: in place of the one that `config.loss.classifier` names, a function or a module of
        images `[b, h, w, c]` in [-1, 1]; see adversarial/classifier.py.
      deadline: `time.monotonic()` at which to stop early, in good order.

    Returns:
      The tokenizer, with averaged weights, as `out/model` holds it.

    Raises:
      InputError: the config contradicts itself or the data, or `out` holds a run of another one.
    """
    start = _start(config.init_from) if config.init_from else None
    if start is not None:
        judge_config = start[1].config if start[1] else config.discriminator
        config = dataclasses.replace(config, model=start[0].config, discriminator=judge_config)
    out, data, run = Path(out), config.data, config.run
    content, channels = config.model.content, config.model.autoencoder.in_channels
    read = reader(content, channels)
    train, test = (
        open_source(data.source, split=split, holdout=data.holdout, read=read)
        for split in ("train", "test")
    )
    _check(config, train)
    perceptual = perceptual_networks(config.loss, channels, classifier)
    mesh = sharding.make_mesh(fsdp=run.fsdp, tensor=run.tensor)
    sharding.check_batch(data.batch_size, mesh)
    claim(out, config)
    stage, init = setup(config, optim, disc_optim)
    print(f"tokenizer: {describe(jax.eval_shape(init))}", flush=True)
    state = create(init, mesh)
    if start is not None:
        state = _started(state, *start)
    fixed = {"key": jax.random.key(run.seed), "perceptual": perceptual}
    one_step = compiled(
        functools.partial(step, stage),
        state,
        mesh,
        extractor=feature_extractor(config, extractor),
        **fixed,
    )
    looks = compiled(functools.partial(look, stage), state, mesh, **fixed)
    guarded = config.loss.guard and disc_start(config) >= 0
    watch = Watch(looks, _first_look(config)) if guarded else None
    judge = load_lpips("vgg16") if channels in (1, 3) and content != "labels" else None

    def averaged(state: TokenizerState) -> Tokenizer:
        """The tokenizer with averaged weights, in one piece on this process."""
        parts = sharding.on_host((state.ema, state.codebook_stats), mesh)
        return nnx.merge(stage.tokenizer, *jax.device_put(parts))

    held_out = functools.partial(eval_batches, test, data.image_size, resize=data.resize)

    def evaluate(state: TokenizerState) -> dict[str, float]:
        images = held_out(data.batch_size, limit=run.eval_images)
        return evaluate_tokenizer(averaged(state), images, judge)

    def picture(state: TokenizerState) -> np.ndarray:
        batch = next(held_out(16, limit=16))
        images = batch["image"][batch["valid"]]
        return inputs_over_outputs(shown(images), shown(reconstruct(averaged(state), images)))

    def export(state: TokenizerState, directory: Path) -> None:
        tokenizer = averaged(state)
        if jax.process_index() == 0:
            steps = int(state.step)
            tokenizer.save_pretrained(directory, provenance={"data": data.source, "steps": steps})

    state = loop.fit(
        state,
        one_step,
        batches=functools.partial(global_batches, train, image_augment(data), data, run, mesh),
        evaluate=evaluate,
        picture=picture,
        export=export,
        run=run,
        out=out,
        title="tokenizer",
        images_per_step=data.batch_size,
        meta={"config": to_json(config)},
        best_of="bce" if content == "labels" else "l1",
        watch=watch,
        # A good state to return to: the last before the generator sees the discriminator.
        save_at=disc_start(config) if guarded else 0,
        deadline=deadline,
    )
    return averaged(state)


def _first_look(config: TokenizerTraining) -> int:
    """The step from which the guard is shown batches; never where nothing is averaged."""
    if not config.ema_decay:
        return config.run.steps
    return disc_start(config) - config.loss.guard_rule.window


def _start(source: str) -> tuple[Tokenizer, Discriminator | None]:
    """The models to start from. Raises InputError where there are none."""
    tokenizer = Tokenizer.from_pretrained(source)
    place = model_directory(Path(source)) / "discriminator"
    return tokenizer, load_discriminator(place) if place.is_dir() else None


def _started(
    state: TokenizerState, tokenizer: Tokenizer, discriminator: Discriminator | None
) -> TokenizerState:
    """A fresh state with the weights of given models, each where its array was."""

    def placed(fresh: nnx.State, given: nnx.State) -> nnx.State:
        return jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), fresh, given)

    _, params, codebook_stats = split(tokenizer)
    state = dataclasses.replace(
        state,
        params=placed(state.params, params),
        ema=placed(state.ema, copy(params)),
        codebook_stats=placed(state.codebook_stats, codebook_stats),
    )
    if discriminator is None:
        return state
    _, disc_params, disc_stats = split(discriminator)
    return dataclasses.replace(
        state,
        disc_params=placed(state.disc_params, disc_params),
        disc_stats=placed(state.disc_stats, disc_stats),
    )


def reconstruct(tokenizer: Tokenizer, pictures: np.ndarray) -> np.ndarray:
    """Pictures (uint8, or what label and depth maps are) through the tokenizer and back."""
    images = to_model(pictures, tokenizer.config.autoencoder.in_channels)
    return from_model(tokenizer(images).reconstruction, tokenizer.config.content)


def _check(config: TokenizerTraining, source: ImageSource) -> None:
    """Raises InputError for what would only fail deep inside the first step."""
    config.model.check()
    judge, model = config.discriminator, config.model.autoencoder
    judge.check()
    if not 0 <= config.loss.disc_start_fraction < 1:
        raise InputError(
            f"loss.disc_start_fraction {config.loss.disc_start_fraction} is not in [0, 1)"
        )
    if config.usage_window < 1:
        raise InputError(f"usage_window {config.usage_window} is not 1 or more")
    if config.loss.r1_every < 1:
        raise InputError(f"loss.r1_every {config.loss.r1_every} is not 1 or more")
    if judge.kind == "stylegan2" and judge.resolution != config.data.image_size:
        raise InputError(
            f"discriminator.resolution {judge.resolution} is not data.image_size "
            f"{config.data.image_size}"
        )
    if config.data.image_size % model.factor:
        raise InputError(
            f"data.image_size {config.data.image_size} is not a multiple of {model.factor}, "
            "the tokenizer's downsampling factor"
        )
    if isinstance(config.model.quantizer, MultiScaleConfig):
        side = config.data.image_size // model.factor
        config.model.quantizer.check_grid(side, side)
    _check_content(config, source)
    channels = source[0]["image"].shape[-1]
    taken = {model.in_channels} | ({judge.in_channels} if disc_start(config) >= 0 else set())
    if config.model.content != "labels" and taken != {channels}:
        raise InputError(
            f"{source.name}: images have {channels} channel(s), the tokenizer takes "
            f"{model.in_channels} and the discriminator {judge.in_channels}"
        )


def _check_content(config: TokenizerTraining, source: ImageSource) -> None:
    """Raises InputError where losses or data do not fit to what the tokenizer is of."""
    loss, content = config.loss, config.model.content
    labels, classes = content == "labels", config.model.autoencoder.in_channels
    if labels != (loss.reconstruction == "bce"):
        raise InputError(
            f"loss.reconstruction {loss.reconstruction} with model.content {content}: bce is for "
            "labels, and labels for bce"
        )
    for name in ("perceptual_weight", "classifier_weight"):
        if labels and getattr(loss, name):
            raise InputError(
                f"loss.{name} {getattr(loss, name)}: there is no perceptual distance of label "
                "maps; set it to 0"
            )
    if labels and disc_start(config) >= 0:
        raise InputError(
            f"loss.disc_start {disc_start(config)}: a discriminator cannot judge logits of label "
            "maps; set loss.disc_start to -1 and loss.disc_start_fraction to 0"
        )
    if loss.class_weights and (not labels or len(loss.class_weights) != classes):
        raise InputError(
            f"loss.class_weights are {len(loss.class_weights)}, but model.content {content} with "
            f"{classes} channels has {classes if labels else 'no'} classes"
        )
    found, expected = source[0]["image"].dtype, {"labels": np.uint16, "depth": np.float32}
    if found != expected.get(content, np.uint8):
        raise InputError(f"{source.name}: not {content}, which the tokenizer is of; give a folder")
