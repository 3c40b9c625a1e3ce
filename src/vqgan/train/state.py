"""The state of a run: what it is, how it is born in its shards, how a step is compiled over it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vqgan.train.code_use import CodeUse
from vqgan.train.guard import Guard
from vqgan.train.sharding import replicated, shardings

S = TypeVar("S")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenizerState:
    """Stage 1: all that a step changes, so all that a checkpoint holds."""

    step: Any
    """Updates so far, an int32 scalar; its shape or its sharding in trees of those."""
    params: nnx.State
    codebook_stats: nnx.State
    codes: CodeUse
    optim: Any
    ema: nnx.State
    """Exponential moving average of `params`."""
    disc_params: nnx.State
    disc_stats: nnx.State
    disc_optim: Any
    logit_means: Any
    """Moving averages of the mean real and the mean fake logit, float32 `[2]`, for LeCam."""
    guard: Guard


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PriorState:
    """Stage 2."""

    step: Any
    params: nnx.State
    optim: Any
    ema: nnx.State


def create(init: Callable[[], S], mesh: Mesh) -> S:
    """Runs `init` compiled, every array born where the sharding rules put it."""
    places = shardings(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=places)()


def compiled(
    step: Callable[..., tuple[S, Any]], state: S, mesh: Mesh, **fixed: Any
) -> Callable[[S, Any], tuple[S, Any]]:
    """Compiles `step(state, batch, **fixed)`: the state is donated and stays in its shards.

    `fixed` are arrays, or modules, that a run does not change; every device gets a copy.
    """
    jitted = jax.jit(
        step, donate_argnums=0, out_shardings=(shardings(state, mesh), replicated(mesh))
    )
    # Not device_put, which would have to reach the devices of other processes.
    everywhere = jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))
    return functools.partial(jitted, **everywhere(fixed))


def moving_average(ema: nnx.State, params: nnx.State, decay: float) -> nnx.State:
    """One update of the average of the weights."""
    return jax.tree.map(lambda e, p: e * decay + p * (1 - decay), ema, params)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, parameters, and whatever else a module keeps."""
    graphdef, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states
    return graphdef, params, rest


def copy(params: nnx.State) -> nnx.State:
    """The same values in buffers of their own, so that both may be donated."""
    return jax.tree.map(jnp.copy, params)


def describe(state: Any) -> str:
    """Size of a state before it is allocated: parameters and bytes."""
    abstract = jax.tree.leaves(state)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract)
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return f"{params / 1e6:.1f} M parameters, {size / 2**20:.0f} MiB of state"
