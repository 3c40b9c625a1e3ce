"""One round between the two players of stage 1, the tokenizer and the discriminator.

Both players' terms come from one pass of the discriminator over the reconstruction; see
train/tokenizer.py for the step that the round is a part of.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from vqgan.adversarial.augment import diff_augment
from vqgan.adversarial.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    r1_penalty,
)
from vqgan.adversarial.lpips import LPIPS, load_lpips
from vqgan.train.config import LossConfig, TokenizerTraining
from vqgan.train.guard import strength
from vqgan.train.state import TokenizerState, split

Metrics = dict[str, Float[Array, ""]]
Images = Float[Array, "b h w c"]
Extractor = Callable[[Images], list[Array]]


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """What a step needs and does not change: configs, module structure, optimisers."""

    config: TokenizerTraining
    tokenizer: nnx.GraphDef
    last_layer: nnx.GraphDef
    discriminator: nnx.GraphDef
    optim: optax.GradientTransformation
    disc_optim: optax.GradientTransformation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Game:
    """Outcome of one round between the two players."""

    wish: Images
    """Gradient of the weighted adversarial term with respect to the reconstruction."""
    loss: Float[Array, ""]
    balance: Float[Array, ""]
    """The adversarial weight, whether or not the generator sees the discriminator yet."""
    disc_params: nnx.State
    disc_stats: nnx.State
    disc_optim: Any
    logit_means: Float[Array, "2"]
    metrics: Metrics


def disc_start(config: TokenizerTraining) -> int:
    """The step from which the generator sees the discriminator; -1 means never."""
    loss = config.loss
    if loss.disc_start_fraction:
        return round(loss.disc_start_fraction * config.run.steps)
    return loss.disc_start


def play_once_begun(
    stage: Stage1,
    state: TokenizerState,
    extractor: Extractor | None,
    key: Key[Array, ""],
    images: Images,
    reconstruction: Images,
    nll_wish: Images,
    pull_last: Callable,
) -> Game:
    """The adversarial round from its first step on, which is traced: nothing recompiles.

    Args:
      extractor: feature maps of images, for a discriminator on features.
      nll_wish: gradient of the reconstruction terms with respect to the reconstruction.
      pull_last: from a gradient at the reconstruction to those of the decoder's last layer.
    """
    loss, start = stage.config.loss, disc_start(stage.config)
    judge = functools.partial(_judge, stage, extractor, key)
    play = functools.partial(
        _play, stage, state, judge, images, reconstruction, nll_wish, pull_last
    )
    names = ["adversarial", "adversarial_weight", "disc_loss", "disc_real", "disc_fake"]
    names += ["lecam"] * bool(loss.lecam_weight) + ["r1"] * bool(loss.r1_weight)

    def rest() -> Game:
        zero = jnp.zeros(())
        return Game(
            wish=jnp.zeros_like(reconstruction),
            loss=zero,
            balance=zero,
            disc_params=state.disc_params,
            disc_stats=state.disc_stats,
            disc_optim=state.disc_optim,
            logit_means=state.logit_means,
            metrics=dict.fromkeys(names, zero),
        )

    begin = start - loss.disc_warmup
    if start < 0:
        return rest()
    if begin <= 0:
        return play()
    return jax.lax.cond(state.step >= begin, play, rest)


def _judge(
    stage: Stage1,
    extractor: Extractor | None,
    key: Key[Array, ""],
    params: nnx.State,
    stats: nnx.State,
    x: Images,
    *,
    draw: int,
) -> tuple[Array, nnx.State]:
    """The discriminator's logits, and its statistics after it has seen these images.

    Args:
      draw: which of the step's random augmentations it sees them under.
    """
    x = diff_augment(x, stage.config.loss.augment, jax.random.fold_in(key, draw))
    discriminator = nnx.merge(stage.discriminator, params, stats, copy=True)
    seen = x if extractor is None else extractor(x)
    logits = discriminator(seen, train=True)
    return logits, split(discriminator)[2]


def _play(
    stage: Stage1,
    state: TokenizerState,
    judge: Callable[..., tuple[Array, nnx.State]],
    images: Images,
    reconstruction: Images,
    nll_wish: Images,
    pull_last: Callable,
) -> Game:
    """Both players' terms from one pass of the discriminator over the reconstruction."""
    loss = stage.config.loss
    params = state.disc_params
    real, pull_real, stats = jax.vjp(
        lambda p: judge(p, state.disc_stats, images, draw=0), params, has_aux=True
    )
    fake, pull_fake, stats = jax.vjp(
        lambda p, x: judge(p, stats, x, draw=1), params, reconstruction, has_aux=True
    )

    # The generator's side.
    generator, fake_wish = jax.value_and_grad(lambda f: generator_loss(loss.adversarial, f))(fake)
    wish = pull_fake(fake_wish)[1]
    balance = jnp.asarray(loss.adversarial_weight)
    if loss.adaptive:
        at_last = (pull_last(w)[0]["kernel"][...] for w in (nll_wish, wish))
        balance = balance * adaptive_weight(*at_last)
    begun = state.step - disc_start(stage.config)
    weight = jnp.where(begun >= 0, balance, 0.0)
    if loss.disc_ramp:
        weight = weight * jnp.clip((begun + 1) / loss.disc_ramp, 0.0, 1.0)
    if loss.guard:
        weight = weight * strength(state.guard)

    # The discriminator's side.
    def against(real: Array, fake: Array) -> tuple[Array, Metrics]:
        terms = {"disc_loss": discriminator_loss(loss.adversarial, real, fake)}
        total = terms["disc_loss"]
        if loss.lecam_weight:
            of_mean = loss.lecam_of == "mean"
            seen = (real.mean(), fake.mean()) if of_mean else (real, fake)
            terms["lecam"] = lecam_loss(*seen, state.logit_means)
            total = total + loss.lecam_weight * terms["lecam"]
        return total, terms

    (real_wish, fake_wish), terms = jax.grad(against, argnums=(0, 1), has_aux=True)(real, fake)
    grads = jax.tree.map(jnp.add, pull_real(real_wish)[0], pull_fake(fake_wish)[0])
    if loss.r1_weight:
        terms["r1"], penalty = _lazy_r1(loss, state, judge, images)
        grads = jax.tree.map(jnp.add, grads, penalty)
    means = jnp.stack([jnp.mean(real), jnp.mean(fake)])
    updates, optim = stage.disc_optim.update(grads, state.disc_optim, params)

    return Game(
        wish=weight * wish,
        loss=weight * generator,
        balance=balance,
        disc_params=optax.apply_updates(params, updates),
        disc_stats=stats,
        disc_optim=optim,
        logit_means=state.logit_means + (1 - loss.lecam_decay) * (means - state.logit_means),
        metrics={
            "adversarial": generator,
            "adversarial_weight": weight,
            "disc_real": means[0],
            "disc_fake": means[1],
            **terms,
        },
    )


def _lazy_r1(
    loss: LossConfig,
    state: TokenizerState,
    judge: Callable[..., tuple[Array, nnx.State]],
    images: Images,
) -> tuple[Float[Array, ""], nnx.State]:
    """The R1 penalty and its weighted gradient, every `r1_every` steps for as many at once."""

    def penalty(params: nnx.State) -> Float[Array, ""]:
        return r1_penalty(lambda x: judge(params, state.disc_stats, x, draw=0)[0], images)

    def now() -> tuple[Float[Array, ""], nnx.State]:
        value, grads = jax.value_and_grad(penalty)(state.disc_params)
        return value, jax.tree.map(lambda g: loss.r1_weight * loss.r1_every * g, grads)

    def later() -> tuple[Float[Array, ""], nnx.State]:
        return jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.disc_params)

    return jax.lax.cond(state.step % loss.r1_every == 0, now, later)


def feature_extractor(config: TokenizerTraining, given: Extractor | None) -> Extractor | None:
    """What shows images to a discriminator on features, as an argument of the compiled step."""
    if config.discriminator.kind != "features":
        return None
    if given is None:
        return jax.tree_util.Partial(LPIPS.features, load_lpips("vgg16"))
    return given if isinstance(given, nnx.Module) else jax.tree_util.Partial(given)
