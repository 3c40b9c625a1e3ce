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
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Key

from vqgan.data.codes import CodeSource, write_codes
from vqgan.data.maps import reader
from vqgan.data.pipeline import eval_batches
from vqgan.data.sources import ImageSource, open_source
from vqgan.errors import InputError
from vqgan.eval.runner import evaluate_prior
from vqgan.pictures import from_model, grid, shown, to_model
from vqgan.pipeline import Pipeline
from vqgan.prior.autoregressive import loss as prior_loss
from vqgan.prior.transformer import Prior, PriorConfig
from vqgan.serialization import flat_weights, to_json
from vqgan.tokenizer.model import Tokenizer
from vqgan.train import loop, sharding
from vqgan.train.config import PriorTraining
from vqgan.train.optim import optimizer
from vqgan.train.run_directory import claim
from vqgan.train.state import PriorState, compiled, copy, create, describe, moving_average
from vqgan.train.stream import global_batches

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
    return new, {"loss": nats, **metrics, "grad_norm": optax.tree.norm(grads)}


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
    out, run = Path(out), config.run
    if config.data.resize:
        raise InputError("data.resize is for tokenizers; a prior's views are those of `passes`")
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    size = tokenizer.config.autoencoder.resolution
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=size))
    read = reader(tokenizer.config.content, tokenizer.config.autoencoder.in_channels)
    sources = [
        open_source(config.data.source, split=split, holdout=config.data.holdout, read=read)
        for split in ("train", "test")
    ]
    config = dataclasses.replace(config, model=_fitted(config, tokenizer, sources[0]))
    mesh = sharding.make_mesh(fsdp=run.fsdp, tensor=run.tensor)
    sharding.check_batch(config.data.batch_size, mesh)
    mark = _fingerprint(tokenizer)
    claim(out, config, tokenizer=mark)
    train, test = (
        stored_codes(config, tokenizer, mark, source, out / "codes" / split, passes)
        for split, source, passes in zip(
            ("train", "test"), sources, (config.passes, ("center",)), strict=True
        )
    )
    stage, init = setup(config, optim)
    print(f"prior: {describe(jax.eval_shape(init))}", flush=True)
    state = create(init, mesh)
    key = jax.random.key(run.seed)
    one_step = compiled(functools.partial(step, stage), state, mesh, key=key)

    def averaged(state: PriorState) -> Pipeline:
        """The pipeline with averaged weights, in one piece on this process."""
        prior = nnx.merge(stage.prior, jax.device_put(sharding.on_host(state.ema, mesh)))
        names = train.info.class_names if config.model.num_classes else ()
        return Pipeline(tokenizer, prior, names)

    def evaluate(state: PriorState) -> dict[str, float]:
        ids = eval_batches(test, None, config.data.batch_size, limit=run.eval_images)
        return evaluate_prior(averaged(state).prior, ids)

    def export(state: PriorState, directory: Path) -> None:
        pipeline = averaged(state)
        if jax.process_index() == 0:
            provenance = {"data": config.data.source, "steps": int(state.step)}
            pipeline.save_pretrained(directory, provenance=provenance)

    state = loop.fit(
        state,
        one_step,
        batches=functools.partial(global_batches, train, None, config.data, run, mesh),
        evaluate=evaluate,
        picture=lambda state: _samples(averaged(state), run.seed),
        export=export,
        run=run,
        out=out,
        title="prior",
        images_per_step=config.data.batch_size,
        meta={"config": to_json(config)},
        best_of="bits_per_token",
        deadline=deadline,
    )
    return averaged(state)


def stored_codes(
    config: PriorTraining,
    tokenizer: Tokenizer,
    mark: str,
    source: ImageSource,
    directory: Path,
    passes: tuple[str, ...],
) -> CodeSource:
    """The codes of a source in `directory`, encoded first if they are not there yet."""
    if jax.process_index() == 0 and not (directory / "codes.json").exists():
        channels = tokenizer.config.autoencoder.in_channels
        print(f"prior: encoding {len(source)} images ({', '.join(passes)})", flush=True)
        write_codes(
            lambda pictures: tokenizer.encode(to_model(pictures, channels)),
            source,
            directory,
            image_size=config.data.image_size,
            codebook_size=tokenizer.codebook_size,
            passes=passes,
            batch_size=config.data.batch_size,
            tokenizer=mark,
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"codes in {directory}")
    return CodeSource(directory)


def _fingerprint(tokenizer: Tokenizer) -> str:
    """Changes when any weight does."""
    digest = hashlib.sha256()
    for name, weight in sorted(flat_weights(tokenizer).items()):
        digest.update(name.encode() + weight.tobytes())
    return digest.hexdigest()[:16]


def _fitted(config: PriorTraining, tokenizer: Tokenizer, source: ImageSource) -> PriorConfig:
    """The transformer's config with what the tokenizer and the data dictate.

    Raises:
      InputError: it has a prefix, or does not fit to what is dictated.
    """
    if config.model.prefix is not None:
        raise InputError("model.prefix: no data source has condition images yet; train without it")
    size, side = config.data.image_size, config.data.image_size // tokenizer.factor
    image = jnp.zeros((1, size, size, tokenizer.config.autoencoder.in_channels))
    _, *shape = jax.eval_shape(tokenizer.encode, image).shape
    if shape != [side, side]:
        raise InputError(
            f"tokenizer: its {tokenizer.config.quantizer.kind} quantizer gives ids of shape "
            f"{'x'.join(map(str, shape))} an image; a prior takes one a position, {side}x{side}"
        )
    fitted = dataclasses.replace(
        config.model,
        codebook_size=tokenizer.codebook_size,
        grid=(side, side),
        num_classes=len(source.class_names) if config.class_conditional else 0,
    )
    fitted.check()
    return fitted


def _samples(pipeline: Pipeline, seed: int, columns: int = 8) -> np.ndarray:
    """A picture of new images, a row for each of the first classes."""
    rows = min(pipeline.prior.config.num_classes, 8) or 2
    classes = None
    if pipeline.prior.config.num_classes:
        classes = jnp.repeat(jnp.arange(rows), columns)
    images = pipeline.generate(classes, rng=jax.random.key(seed), batch=rows * columns)
    return grid(shown(from_model(images, pipeline.tokenizer.config.content)), columns)
