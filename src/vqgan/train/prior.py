"""Stage 2 training: a transformer learns the code sequences of a tokenizer (arXiv:2012.09841, 3.2).

The tokenizer encodes the data once, before the training; the codes are stored in the run directory.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from vqgan.data.codes import CodeSource, write_codes
from vqgan.data.pipeline import eval_batches
from vqgan.data.sources import open_source
from vqgan.errors import InputError
from vqgan.eval.runner import evaluate_prior
from vqgan.pictures import grid, to_uint8
from vqgan.pipeline import Pipeline
from vqgan.prior.autoregressive import loss as prior_loss
from vqgan.prior.transformer import Prior
from vqgan.serialization import to_json
from vqgan.tokenizer.model import Tokenizer
from vqgan.train import loop, sharding
from vqgan.train.config import PriorTraining
from vqgan.train.optim import optimizer
from vqgan.train.run_directory import claim
from vqgan.train.state import PriorState, compiled, copy, create, describe, moving_average, to_float

Batch = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """What a step needs and does not change: config, module structure, optimiser."""

    config: PriorTraining
    prior: nnx.GraphDef
    optim: optax.GradientTransformation


def setup(
    config: PriorTraining, optim: optax.GradientTransformation | None = None
) -> tuple[Stage2, Callable[[], PriorState]]:
    """The fixed part of a run, and a function that makes the state it starts from."""
    optim = optim or optimizer(config.optim, config.run.steps)

    def module() -> Prior:
        return Prior(config.model, rngs=nnx.Rngs(config.run.seed))

    def init() -> PriorState:
        params = nnx.state(module(), nnx.Param)
        return PriorState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optim=optim.init(params),
            ema=copy(params),
        )

    graphdef, _ = nnx.split(nnx.eval_shape(module))
    return Stage2(config=config, prior=graphdef, optim=optim), init


def step(
    stage: Stage2, state: PriorState, batch: Batch, key: Key[Array, ""]
) -> tuple[PriorState, Metrics]:
    """One update.

    Args:
      batch: `ids` int32 `[b, h, w]` and `label` int32 `[b]`.
      key: the run's; the step's own are derived from it.
    """
    key = jax.random.fold_in(key, state.step)
    condition = batch["label"] if stage.config.model.num_classes else None

    def objective(params: nnx.State) -> tuple[Float[Array, ""], Metrics]:
        prior = nnx.merge(stage.prior, params)
        return prior_loss(prior, batch["ids"], condition, pkeep=stage.config.pkeep, key=key)

    (nats, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, optim = stage.optim.update(grads, state.optim, state.params)
    params = optax.apply_updates(state.params, updates)
    new = PriorState(
        step=state.step + 1,
        params=params,
        optim=optim,
        ema=moving_average(state.ema, params, stage.config.ema_decay),
    )
    return new, {"loss": nats, **metrics, "grad_norm": optax.global_norm(grads)}


def train_prior(
    config: PriorTraining,
    tokenizer_dir: Path | str,
    out: Path | str,
    *,
    optim: optax.GradientTransformation | None = None,
    deadline: float | None = None,
) -> Pipeline:
    """Trains a prior in the run directory `out`, or goes on with the run that is there.

    Images are encoded at the tokenizer's `resolution`. `out/model` becomes a Pipeline directory.

    Args:
      optim: an optax transform in place of the configured one.
      deadline: `time.monotonic()` at which to stop early, in good order.

    Raises:
      InputError: as `train_tokenizer`; or the tokenizer does not load.
    """
    out = Path(out)
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    size = tokenizer.config.autoencoder.resolution
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=size))
    train, test = (_codes(config, tokenizer, split, out) for split in ("train", "test"))
    config = dataclasses.replace(config, model=_fitted(config, train))
    stage, init = setup(config, optim)
    claim(out, config)
    mesh = sharding.make_mesh(fsdp=config.run.fsdp, tensor=config.run.tensor)
    print(f"prior: {describe(jax.eval_shape(init))}", flush=True)
    state = create(init, mesh)
    key = jax.random.key(config.run.seed)
    one_step = compiled(functools.partial(step, stage), state, mesh, key=key)

    def averaged(state: PriorState) -> Pipeline:
        prior = nnx.merge(stage.prior, sharding.on_host(state.ema, mesh))
        return Pipeline(tokenizer, prior, train.info.class_names if config.model.num_classes else ())

    def export(state: PriorState, directory: Path) -> None:
        pipeline = averaged(state)
        if jax.process_index() == 0:
            pipeline.save_pretrained(directory)

    state = loop.fit(
        state,
        one_step,
        batches=functools.partial(sharding.global_batches, train, config.data, config.run, mesh),
        evaluate=lambda s: evaluate_prior(averaged(s).prior, eval_batches(test)),
        picture=lambda s: _samples(averaged(s), config.run.seed),
        export=export,
        run=config.run,
        out=out,
        title="prior",
        images_per_step=config.data.batch_size,
        meta={"config": to_json(config)},
        deadline=deadline,
    )
    return averaged(state)
