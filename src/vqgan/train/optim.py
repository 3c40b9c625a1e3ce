"""Optimisers and learning-rate schedules, put together from optax."""

from typing import Any

import jax
import optax

from vqgan.train.config import OptimConfig


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or a cosine down to `final_lr` at batch `steps`."""
    updates = max(steps // config.accumulate, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    else:
        decay = max(updates - config.warmup_steps, 1)
        after = optax.cosine_decay_schedule(config.lr, decay, alpha=config.final_lr / config.lr)
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay, schedule; over `accumulate` batches."""
    b1, b2 = config.betas
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    parts.append(optax.scale_by_learning_rate(schedule(config, steps)))
    chain = optax.chain(*parts)
    if config.accumulate > 1:
        return optax.MultiSteps(chain, config.accumulate).gradient_transformation()
    return chain


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: those called `kernel`, as minGPT has it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(part, "key", None) == "kernel" for part in path), params
    )
