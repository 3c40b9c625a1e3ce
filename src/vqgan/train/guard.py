"""The guard: a discriminator that starts to wreck the reconstruction is noticed and held.

It watches the reconstruction terms (pixel and perceptual, what the adversarial term competes with)
from the first step on, long before the generator sees the discriminator:

    slow  = average over some `window` steps       best = the lowest that `slow` has been
    fast  = average over some ten steps
    break = fast > (1 + margin) best for `patience` steps

Which is slow, because batches differ. Where the term is new, for `window` steps after it has come
in or come back, each batch is shown before its step to the weights and to their average, so that
its difficulty cancels:

    gap   = log(terms / terms of the averaged weights)
    usual = average of the gap over `window` steps without the term, `deviation` its standard one
    leap  = sum of (gap - usual - log(1 + margin) - deviation / 2), never below 0
    break = leap > log(1 + margin) and leap > `sure` deviations       (a CUSUM test, Page 1954)

The adaptive weight has a slow average too, of its logarithm. Where it surges to `surge` times that
(the discriminator has become flat, and what is amplified is noise), half of the margin is a break.

A first break holds the adversarial term for `hold` steps: its factor is 0. A second one halves its
factor for good, after another hold. A third one asks the loop for the last good state, whose run
goes on with a factor halved once more. After `calm` steps without a break the count starts anew.
When `max_returns` returns have not helped, the adversarial term is left out to the end of the run.
Every break also takes the weights back to their average, which the last steps have hardly reached.
A run that averages no weights (`ema_decay` 0) has the slower test alone.

All of it is a pure function of a small state that is part of the run's, so a run that is killed
and resumed is guarded alike. The discriminator learns on, whatever the guard does.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_FAST = 10  # steps of the fast average


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When the guard acts, and for how long."""

    margin: float = 0.1
    """Of the reconstruction terms above their best average: a share of it."""
    patience: int = 5
    """Steps in a row above the margin that make a break."""
    window: int = 50
    """Steps of the slow averages; nothing is a break before so many are watched. Also those in
    which the term is new and batches are shown to the averaged weights, at the price of two forward
    passes; and as many before the first of them."""
    sure: float = 4.0
    """Standard deviations of the gap that are a break at once; the more, the later."""
    surge: float = 10.0
    """Times its own average that the adaptive weight must be to halve the margin."""
    hold: int = 50
    """Steps without the adversarial term."""
    calm: int = 200
    """Steps without a break, the term being in, after which all is forgiven."""
    max_returns: int = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """What the guard remembers. Scalars, int32 unless said otherwise."""

    watched: Any
    """Steps so far."""
    fast: Any
    slow: Any
    """Moving averages of the reconstruction terms, not yet divided by their weights; float32."""
    best: Any
    """float32; infinite before `window` steps."""
    weighed: Any
    """Steps so far that had an adaptive weight."""
    log_weight: Any
    """Moving average of its logarithm; float32."""
    compared: Any
    """Steps so far without the term whose batch the averaged weights have seen too."""
    gap: Any
    spread: Any
    """Moving averages over those, of the gap and its variance, not yet divided; float32."""
    leap: Any
    """float32; 0 where the averaged weights are not asked."""
    broken: Any
    """Steps in a row above the margin."""
    quiet: Any
    """Steps since then with the term in."""
    holding: Any
    """Steps left of a hold."""
    stage: Any
    """Breaks since all was calm: 0 to 2, and 3 while it asks to return."""
    factor: Any
    """Of the adversarial term when it is not held; float32."""
    spoilt: Any
    """1 from a break until the weights are back at their average."""
    holds: Any
    lowers: Any
    returns: Any
    """How often each has happened."""


def new_guard() -> Guard:
    """The guard of a run that begins."""
    fields = {field.name: jnp.zeros((), jnp.int32) for field in dataclasses.fields(Guard)}
    fields |= {
        name: jnp.zeros(()) for name in ("fast", "slow", "log_weight", "gap", "spread", "leap")
    }
    return Guard(**(fields | {"best": jnp.full((), jnp.inf, jnp.float32), "factor": jnp.ones(())}))


def strength(guard: Guard) -> Float[Array, ""]:
    """What the adversarial term is to be multiplied by."""
    held = (guard.holding > 0) | (guard.stage > 2)
    return jnp.where(held, 0.0, guard.factor)


def compares(config: GuardConfig, guard: Guard, age: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the next step's batch is to be shown to the weights and to their average.

    Args:
      age: steps since the generator first saw the discriminator; negative before.
    """
    out = (age < 0) | (guard.holding > 0)
    return jnp.where(out, age >= -config.window, guard.quiet < config.window)


def compare(
    config: GuardConfig,
    guard: Guard,
    reconstruction: Float[Array, ""],
    averaged: Float[Array, ""],
    age: Int[Array, ""],
) -> Guard:
    """The guard once it has seen what the weights and their average make of a batch.

    Args:
      reconstruction: the reconstruction terms, weighted and summed.
      averaged: those of the averaged weights on the same batch.
      age: as in `compares`.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    gap = jnp.log(jnp.maximum(reconstruction, tiny) / jnp.maximum(averaged, tiny))
    share = _share(config.window, jnp.maximum(guard.compared, 1))
    usual, deviation = guard.gap / share, jnp.sqrt(guard.spread / share)
    judged = _judged(guard, age >= 0)
    margin = math.log1p(config.margin)
    leap = jnp.maximum(guard.leap + gap - usual - margin - deviation / 2, 0.0)
    leap = jnp.where(judged & (guard.compared >= config.window), leap, 0.0)

    def learned(average: Array, value: Array) -> Array:
        return jnp.where(judged, average, _moved(average, value, config.window))

    guard = dataclasses.replace(
        guard,
        compared=guard.compared + ~judged,
        gap=learned(guard.gap, gap),
        spread=learned(guard.spread, jnp.square(gap - usual)),
        leap=leap,
    )
    return _acted(config, guard, leap > jnp.maximum(margin, config.sure * deviation))


def observe(
    config: GuardConfig,
    guard: Guard,
    reconstruction: Float[Array, ""],
    weight: Float[Array, ""],
    begun: Bool[Array, ""],
) -> Guard:
    """The guard after one more step.

    Args:
      reconstruction: the step's reconstruction terms, weighted and summed.
      weight: its adversarial weight as it would be without a guard; 0 in steps without one.
      begun: whether the generator sees the discriminator, held or not.
    """
    guard = _averaged(config, guard, reconstruction, weight)
    over = _judged(guard, begun) & _above(config, guard, weight)
    broken = jnp.where(over, guard.broken + 1, 0)
    quiet = jnp.where(over, 0, guard.quiet + begun * (guard.holding == 0))
    guard = dataclasses.replace(
        guard, broken=broken, quiet=quiet, holding=jnp.maximum(guard.holding - 1, 0)
    )
    guard = _acted(config, guard, broken >= config.patience)
    calm = (guard.stage < 3) & (guard.quiet >= config.calm)
    return dataclasses.replace(guard, stage=jnp.where(calm, 0, guard.stage))


def _judged(guard: Guard, begun: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether the term is in, so that what happens is its doing."""
    return begun & (guard.holding == 0) & (guard.stage < 3) & (guard.factor > 0)


def _acted(config: GuardConfig, guard: Guard, fires: Bool[Array, ""]) -> Guard:
    """What a break leads to."""
    holds = fires & (guard.stage == 0)
    lowers = fires & (guard.stage == 1)
    asks = fires & (guard.stage == 2) & (guard.returns < config.max_returns)
    gives_up = fires & (guard.stage == 2) & (guard.returns >= config.max_returns)
    factor = jnp.where(lowers, guard.factor / 2, guard.factor)
    stage = jnp.where(holds | lowers | asks, guard.stage + 1, guard.stage)
    return dataclasses.replace(
        guard,
        leap=jnp.where(fires, 0.0, guard.leap),
        broken=jnp.where(fires, 0, guard.broken),
        quiet=jnp.where(fires, 0, guard.quiet),
        holding=jnp.where(holds | lowers, config.hold, guard.holding),
        stage=jnp.where(gives_up, 0, stage),
        factor=jnp.where(gives_up, 0.0, factor),
        spoilt=jnp.where(fires, 1, guard.spoilt),
        holds=guard.holds + holds,
        lowers=guard.lowers + lowers,
    )


def _averaged(
    config: GuardConfig,
    guard: Guard,
    reconstruction: Float[Array, ""],
    weight: Float[Array, ""],
) -> Guard:
    watched, weighed = guard.watched + 1, guard.weighed + (weight > 0)
    slow = _moved(guard.slow, reconstruction, config.window)
    trusted = watched >= config.window
    known = jnp.where(trusted, slow / _share(config.window, watched), jnp.inf)
    log_weight = jnp.log(jnp.where(weight > 0, weight, 1.0))
    return dataclasses.replace(
        guard,
        watched=watched,
        fast=_moved(guard.fast, reconstruction, _FAST),
        slow=slow,
        best=jnp.minimum(guard.best, known),
        weighed=weighed,
        log_weight=jnp.where(
            weight > 0, _moved(guard.log_weight, log_weight, config.window), guard.log_weight
        ),
    )


def _above(config: GuardConfig, guard: Guard, weight: Float[Array, ""]) -> Bool[Array, ""]:
    usual = guard.log_weight / _share(config.window, jnp.maximum(guard.weighed, 1))
    surges = (guard.weighed >= config.window) & (weight > config.surge * jnp.exp(usual))
    margin = jnp.where(surges, config.margin / 2, config.margin)
    return guard.fast / _share(_FAST, guard.watched) > guard.best * (1 + margin)


def _moved(average: Array, value: Array, steps: int) -> Float[Array, ""]:
    return average + (value - average) / steps


def _share(steps: int, count: Int[Array, ""]) -> Float[Array, ""]:
    """How much of a moving average that began at 0 is made of values, after `count` of them."""
    return 1.0 - (1.0 - 1.0 / steps) ** count.astype(jnp.float32)


def guard_metrics(guard: Guard) -> dict[str, Float[Array, ""]]:
    """What is logged: the factor that the next step has, and how often the guard has acted."""
    counts = {name: getattr(guard, name) for name in ("holds", "lowers", "returns")}
    values = {name: count.astype(jnp.float32) for name, count in counts.items()}
    return {
        f"guard_{name}": value for name, value in ({"factor": strength(guard)} | values).items()
    }


class Watch:
    """The guard as the training loop sees it, on the host; states have a field `guard`."""

    def __init__(self, look: Callable[[Any, Any], tuple[Any, Any]], begin: int) -> None:
        """
        Args:
          look: from a state and a batch to the state after `compare`, and nothing else.
          begin: the first step, counted from 0, before which it is needed.
        """
        self._look = look
        self._begin = begin
        self._seen: dict[str, int] = {}

    def look(self, state: Any, batch: Any, step: int) -> Any:
        """The state that goes into a step, once the guard has seen its batch."""
        return self._look(state, batch)[0] if step >= self._begin else state

    def calm(self, state: Any) -> bool:
        """Whether nothing is wrong, so that a checkpoint of the state is one to return to."""
        guard = jax.device_get(state.guard)
        return int(guard.stage) == 0 and int(guard.broken) == 0 and float(guard.leap) == 0.0

    def asks(self, state: Any) -> bool:
        """Whether the guard asks for the last good state."""
        return int(jax.device_get(state.guard.stage)) > 2

    def returned(self, good: Any, bad: Any) -> Any:
        """The good state, with the guard's counts from the bad one and half of its factor."""
        old = jax.device_get(bad.guard)
        changes = {
            "factor": old.factor / 2,
            "returns": old.returns + 1,
            "stage": old.stage - 1,  # a break before all is calm asks for another return
            "holds": old.holds,
            "lowers": old.lowers,
        }
        placed = {
            name: jax.device_put(value, getattr(bad.guard, name).sharding)
            for name, value in changes.items()
        }
        return dataclasses.replace(good, guard=dataclasses.replace(good.guard, **placed))

    def news(self, state: Any) -> list[str]:
        """A line for each kind of intervention since the last call; none in the first call."""
        guard = jax.device_get(state.guard)
        now = {name: int(getattr(guard, name)) for name in ("holds", "lowers", "returns")}
        before, self._seen = self._seen or now, now
        says = {
            "holds": "the reconstruction broke away from its best; the adversarial term is held",
            "lowers": f"it broke away again; the adversarial term is lowered to {guard.factor:g}",
            "returns": f"it goes on with the adversarial term at {guard.factor:g}",
        }
        return [f"guard: {says[name]}" for name in now if now[name] > before[name]]
