"""The guard on made-up numbers, and what the training loop does for it."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import Run
from test_train_step import KEY, batch, same, setup, step, with_loss

from vqgan.data.pipeline import DataConfig
from vqgan.pictures import to_float
from vqgan.train import loop
from vqgan.train.checkpoint import Checkpoints
from vqgan.train.config import RunConfig
from vqgan.train.guard import (
    Guard,
    GuardConfig,
    Watch,
    compare,
    compares,
    guard_metrics,
    new_guard,
    observe,
    strength,
)
from vqgan.train.loop import Stopped
from vqgan.train.metrics import read_metrics
from vqgan.train.reconstruction import Perceptual
from vqgan.train.tokenizer import look, train_tokenizer

RULE = GuardConfig(window=20, patience=3, hold=15, calm=40, max_returns=1)


@functools.partial(jax.jit, static_argnames="rule")
def one_step(guard, value, averaged, weight, age, rule=RULE):
    """What a run does with its guard before and after a step."""
    guard = jax.lax.cond(
        compares(rule, guard, age),
        lambda: compare(rule, guard, value, averaged, age),
        lambda: dataclasses.replace(guard, leap=jnp.zeros(())),
    )
    return observe(rule, guard, value, weight, age >= 0)


def watched(values, guard=None, *, start=40, weights=None, averaged=None):
    """The guard after each of some reconstruction terms; the discriminator is in from `start`.

    Averaged weights have the same terms unless told otherwise: then nothing is a leap.
    """
    guard, guards = guard or new_guard(), []
    weights = np.ones(len(values)) if weights is None else weights
    averaged = values if averaged is None else averaged
    for numbers in zip(values, averaged, weights, strict=True):
        guard = one_step(guard, *map(jnp.float32, numbers), guard.watched - start)
        guards.append(guard)
    return guards


def wreck(steps=400, start=60):
    """Terms that double once the discriminator has come in and do not recover."""
    return [1.0] * start + [2.0] * (steps - start)


def first(guards, what):
    return next(i for i, guard in enumerate(guards) if what(guard))


def test_a_break_holds_then_lowers_then_asks_to_return():
    guards = watched(wreck())
    held = first(guards, lambda g: g.holds == 1)
    lowered = first(guards, lambda g: g.lowers == 1)
    asks = first(guards, lambda g: g.stage == 3)
    assert 60 < held < 75 and held < lowered < asks
    assert [float(strength(guards[i])) for i in (held - 1, held, lowered - 1)] == [1, 0, 1]
    # Held for 15 steps, and then patience again.
    assert lowered - held == asks - lowered == 15 + RULE.patience
    assert float(strength(guards[asks - 1])) == 0.5
    # Nothing further happens until the loop has returned.
    assert all(g.stage == 3 and strength(g) == 0 for g in guards[asks:])
    assert guards[-1].holds == guards[-1].lowers == 1 and guards[-1].returns == 0
    values = guard_metrics(guards[asks - 1])
    assert {k: float(v) for k, v in values.items()} == {
        "guard_factor": 0.5,
        "guard_holds": 1.0,
        "guard_lowers": 1.0,
        "guard_returns": 0.0,
    }


def test_a_benign_run_is_left_alone():
    """Noise of a tenth, a slow decay, and a rise by a few per cent at the discriminator's start."""
    rng = np.random.default_rng(0)
    terms = np.exp(-np.arange(1000) / 800) + (np.arange(1000) >= 60) * 0.02
    guards = watched(terms * rng.normal(1, 0.1, 1000), start=60)
    assert all(g.stage == 0 and strength(g) == 1 for g in guards)
    assert guards[-1].holds == 0


def test_nothing_is_a_break_before_the_discriminator_comes_in():
    guards = watched(wreck(), start=10**6)
    assert all(g.broken == 0 and g.stage == 0 for g in guards)


def test_a_single_bad_batch_is_no_break():
    terms = np.ones(200)
    terms[100] = 2.2
    assert watched(terms)[-1].holds == 0


def test_all_is_forgiven_after_a_calm_while():
    guards = watched([1.0] * 60 + [1.5] * 5 + [1.0] * 135)
    held = first(guards, lambda g: g.stage == 1)
    forgiven = held + first(guards[held:], lambda g: g.stage == 0)
    assert RULE.hold + RULE.calm <= forgiven - held <= RULE.hold + RULE.calm + 20
    assert strength(guards[-1]) == 1 and guards[-1].lowers == 0


def test_a_surging_weight_halves_the_margin():
    terms = [1.0] * 100 + [1.08] * 100
    weights = np.ones(200)
    assert watched(terms, weights=weights)[-1].holds == 0
    weights[100:] = 1e4
    assert watched(terms, weights=weights)[-1].holds == 1
    # Steps without a weight (before the discriminator learns) say nothing about its average.
    assert watched(terms, weights=np.r_[np.zeros(50), np.ones(150)])[-1].holds == 0


def difficult(steps, noise=0.3, seed=0):
    """Terms of averaged weights: batches differ by a factor that drowns what is to be seen."""
    return np.exp(np.random.default_rng(seed).normal(0, noise, steps))


def test_a_new_term_that_is_worse_than_the_average_is_held_within_few_steps():
    """By 40 % where the gap varies by 3 % and batches by 30."""
    averaged = difficult(120)
    gaps = np.random.default_rng(1).normal(0.05, 0.03, 120) + (np.arange(120) >= 60) * np.log(1.4)
    guards = watched(averaged * np.exp(gaps), start=60, averaged=averaged)
    held = first(guards, lambda g: g.holds == 1)
    assert 60 <= held <= 62
    assert guards[held].spoilt == 1 and guards[held].leap == 0 and strength(guards[held]) == 0


def test_an_old_term_is_judged_by_its_fast_average_alone():
    averaged = np.ones(200)
    values = np.where(np.arange(200) >= 60 + RULE.window, 1.5, 1.0)
    late = first(watched(values, start=60, averaged=averaged), lambda g: g.holds == 1)
    values = np.where(np.arange(200) >= 60 + RULE.window - 1, 1.5, 1.0)
    soon = first(watched(values, start=60, averaged=averaged), lambda g: g.holds == 1)
    assert soon == 60 + RULE.window - 1 and late > soon + RULE.patience


def test_the_averaged_weights_are_asked_around_each_coming_of_the_term():
    guards = watched([1.0] * 80 + [2.0] * 5 + [1.0] * 100, start=60)
    asked = [bool(compares(RULE, g, g.watched - 60)) for g in guards]
    held = first(guards, lambda g: g.holds == 1)
    window, back = RULE.window, held + RULE.hold
    # Entry i is about step i + 1, the step after guard i.
    assert not any(asked[: 60 - window - 1]) and all(asked[60 - window - 1 : 60 + window - 1])
    assert all(asked[held : back + window]) and not any(asked[back + window :])


def test_what_is_usual_is_learnt_without_the_term_only():
    averaged = np.ones(100)
    values = np.where(np.arange(100) < 60, 1.2, 1.25)
    guards = watched(values, start=60, averaged=averaged)
    np.testing.assert_allclose(
        guards[-1].gap / (1 - (1 - 1 / RULE.window) ** RULE.window), np.log(1.2), rtol=1e-5
    )
    assert guards[-1].compared == RULE.window
    # Before so many steps are compared, nothing is a leap.
    early = watched(np.where(np.arange(60) < 10, 1.0, 1.3), start=10, averaged=np.ones(60))
    assert all(g.leap == 0 for g in early)


@jax.jit
def leaps(values, averaged, ages):
    """How many breaks there are where only leaps are."""
    rule = dataclasses.replace(RULE, patience=10**6)

    def one(guard, x):
        value, control, age = x
        return one_step(guard, value, control, jnp.ones(()), age, rule), None

    guard = jax.lax.scan(one, new_guard(), (values, averaged, ages))[0]
    return guard.holds + guard.lowers


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    usual=st.floats(-0.3, 0.3),
    deviation=st.floats(0.001, 0.05),
    rise=st.floats(-0.2, 0.03),
    jump=st.floats(0.4, 2.0),
)
def test_noise_and_a_small_rise_are_no_leap_and_a_jump_is_one(seed, usual, deviation, rise, jump):
    ages = np.arange(80) - 60
    averaged = difficult(80, 0.5, seed)
    noise = np.random.default_rng(seed).uniform(-1.7, 1.7, 80) * deviation + usual
    for change, least, most in ((rise, 0, 0), (jump, 1, 2)):
        values = averaged * np.exp(noise + (ages >= 0) * change)
        breaks = leaps(
            *(jnp.asarray(x, jnp.float32) for x in (values, averaged)), jnp.asarray(ages)
        )
        assert least <= breaks <= most


@dataclasses.dataclass(frozen=True)
class State:
    guard: Guard


def test_a_return_keeps_the_lesson_and_the_last_one_gives_up():
    guards = watched(wreck())
    watch = Watch(lambda state, batch: (state, {}), 0)
    assert watch.news(State(guards[0])) == [] and watch.calm(State(guards[0]))
    good, bad = State(guards[50]), State(guards[-1])
    assert watch.asks(bad) and not watch.calm(bad)
    told = watch.news(bad)
    assert len(told) == 2 and "held" in told[0] and "lowered to 0.5" in told[1]
    back = watch.returned(good, bad)
    assert back.guard.factor == 0.25 and back.guard.returns == 1
    assert back.guard.watched == guards[50].watched and back.guard.best == guards[50].best
    assert not watch.asks(back) and not watch.calm(back)
    assert watch.news(back) == ["guard: it goes on with the adversarial term at 0.25"]
    assert watch.news(back) == []
    # `max_returns` is 1: the next break leaves the term out for good, and is not forever in alarm.
    again = watched([2.0] * 100, back.guard)
    assert strength(again[-1]) == 0 and again[-1].stage == 0 and again[-1].returns == 1


class Alarm:
    """Asks to return when the count is 20, until it has; not calm from 15 on."""

    def __init__(self):
        self.returns = 0

    def look(self, state, batch, step):
        return state

    def calm(self, state):
        return int(state["count"]) < 15 or self.returns > 0

    def asks(self, state):
        return int(state["count"]) == 20 and self.returns == 0

    def returned(self, good, bad):
        self.returns += 1
        return good

    def news(self, state):
        return [f"returned {self.returns}"] if self.returns == 1 else []


def test_the_loop_goes_back_to_the_last_calm_checkpoint(tmp_path, capsys):
    run = Run(tmp_path, steps=24, save_every=6)
    assert int(run.fit(watch=Alarm(), save_at=7)["count"]) == 24
    steps = [event for event in run.events if not event.startswith(("batch", "picture", "eval"))]
    assert steps == [
        "open 0",
        *(f"step {i}" for i in range(6)),
        *("export 6", "step 6", "export 7"),
        *(f"step {i}" for i in range(7, 12)),
        "export 12",
        *(f"step {i}" for i in range(12, 20)),  # the save at 18 waits, and is not made
        *("close", "open 12"),
        *(f"step {i}" for i in range(12, 18)),
        "export 18",
        *(f"step {i}" for i in range(18, 24)),
        *("export 24", "close"),
    ]
    said = capsys.readouterr().out
    assert said.count("test 20: guard: back to the last good state, step 12") == 1
    assert "test 12: returned 1" in said


def test_without_a_checkpoint_the_loop_goes_on(tmp_path, capsys):
    run = Run(tmp_path, steps=22)
    assert int(run.fit(watch=Alarm())["count"]) == 22
    assert "no checkpoint to return to" in capsys.readouterr().out


def test_a_signal_in_trouble_leaves_the_last_good_state(tmp_path):
    run = Run(tmp_path, steps=24, save_every=6)
    run_step = run.step

    def step_with_signal(state, number):
        if number == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_step(state, number)

    run.step = step_with_signal
    with pytest.raises(Stopped, match="stopped at step 12"):
        run.fit(watch=Alarm())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 12


@pytest.mark.slow
def test_a_calm_guard_changes_no_bit_and_without_one_nothing_is_watched():
    ends = []
    for guard in (True, False):
        stage, init = setup(with_loss(disc_start=1, guard=guard))
        jitted = jax.jit(functools.partial(step, stage, perceptual=Perceptual()))
        state = init()
        for seed in range(3):
            state, metrics = jitted(state, batch(seed), key=KEY)
        ends.append((state, metrics))
    (on, on_metrics), (off, off_metrics) = ends
    assert same(dataclasses.replace(on, guard=off.guard), off)
    assert int(on.guard.watched) == 3 and same(off.guard, new_guard())
    watched_only = {"guard_factor", "guard_holds", "guard_lowers", "guard_returns"}
    assert on_metrics.keys() - off_metrics.keys() == watched_only


@pytest.mark.slow
def test_a_held_term_moves_the_discriminator_only():
    stage, init = setup(with_loss(disc_start=0))
    jitted = jax.jit(functools.partial(step, stage, perceptual=Perceptual()))
    guard = dataclasses.replace(new_guard(), holding=jnp.int32(5))
    held, metrics = jitted(dataclasses.replace(init(), guard=guard), batch(), key=KEY)
    stage, init = setup(with_loss(disc_start=-1))
    never, _ = jax.jit(functools.partial(step, stage, perceptual=Perceptual()))(
        init(), batch(), key=KEY
    )
    for x, y in zip(*map(jax.tree.leaves, (held.params, never.params)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert metrics["adversarial_weight"] == 0 and not same(held.disc_params, init().disc_params)


def test_the_loop_shows_each_batch_to_its_guard_before_the_step(tmp_path):
    class Nosy(Alarm):
        def look(self, state, batch, step):
            run.events.append(f"look {step}")
            return state

    run = Run(tmp_path, steps=3)
    run.fit(watch=Nosy())
    steps = [event for event in run.events if event.startswith(("look", "step"))]
    assert steps == ["look 0", "step 0", "look 1", "step 1", "look 2", "step 2"]
    calls = []
    watch = Watch(lambda state, batch: (calls.append(batch), {}), 2)
    assert [watch.look("state", i, i) for i in range(2)] == ["state", "state"]
    watch.look("state", 2, 2)
    assert calls == [2]


@pytest.mark.slow
def test_a_break_takes_the_weights_back_to_their_average():
    stage, init = setup(with_loss(disc_start=0, guard_rule=RULE))
    looks = jax.jit(functools.partial(look, stage, perceptual=Perceptual()))
    state = init()
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x * 0.9, state.params))
    looked, _ = looks(state, batch(), key=KEY)
    assert same(dataclasses.replace(looked, guard=state.guard), state)
    assert looked.guard.compared == 0  # the term is in: there is nothing to learn
    spoilt = dataclasses.replace(state.guard, spoilt=jnp.int32(1))
    back, _ = looks(dataclasses.replace(state, guard=spoilt), batch(), key=KEY)
    assert same(back.params, state.ema) and back.guard.spoilt == 0
    # All else goes on; a usual gap below what is found here is a leap, and that is a break.
    usual = dataclasses.replace(
        state.guard, watched=jnp.int32(99), compared=jnp.int32(99), gap=jnp.float32(-9.0)
    )
    leapt, _ = looks(dataclasses.replace(state, guard=usual), batch(), key=KEY)
    assert leapt.guard.holds == 1 and same(leapt.params, state.ema)
    assert same(leapt.optim, state.optim) and same(leapt.ema, state.ema)


@pytest.mark.slow
def test_the_gap_is_that_of_the_weights_to_their_average_on_the_batch():
    stage, init = setup(with_loss(disc_start=1, guard_rule=RULE))
    state = init()
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x * 0.9, state.params))
    looked, _ = jax.jit(functools.partial(look, stage, perceptual=Perceptual()))(
        state, batch(), key=KEY
    )
    x = to_float(batch()["image"])
    l1 = [
        jnp.abs(x - nnx.merge(stage.tokenizer, p, state.codebook_stats)(x).reconstruction).mean()
        for p in (state.params, state.ema)
    ]
    assert looked.guard.compared == 1
    np.testing.assert_allclose(
        looked.guard.gap * RULE.window, np.log(l1[0] / l1[1]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_a_run_that_returns_is_the_same_when_it_was_killed_in_between(
    tmp_path, capsys, monkeypatch
):
    """With a margin that everything exceeds, every intervention comes in its turn."""
    rule = GuardConfig(margin=-0.99, patience=1, window=2, hold=1, calm=1000, max_returns=1)
    config = dataclasses.replace(
        with_loss(disc_start=4, guard_rule=rule),
        data=DataConfig(source="emoji", image_size=16, batch_size=8, threads=1),
        run=RunConfig(
            steps=22, log_every=1, eval_every=0, image_every=0, save_every=3, eval_images=4
        ),
    )
    train_tokenizer(config, tmp_path / "whole")
    said = capsys.readouterr().out
    told = [said.index(word) for word in ("held", "lowered to 0.5", "state, step 4", "at 0.25")]
    assert told == sorted(told)
    lines = [x for x in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "guard_factor" in x]
    assert [x["step"] for x in lines] == [*range(1, 11), *range(5, 23)]
    # What the step after has, unless a leap is seen before it: held in 5, lowered before 6.
    assert [x["guard_factor"] for x in lines[:7]] == [1, 1, 1, 1, 1, 0.5, 0]
    assert [x["adversarial_weight"] > 0 for x in lines[:7]] == [False] * 7
    assert lines[-1]["guard_factor"] == 0 and lines[-1]["guard_returns"] == 1

    stop_asked = loop._stop_asked

    def killed(step, caught):
        if step == 8:
            raise ZeroDivisionError
        return stop_asked(step, caught)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "_stop_asked", killed)
        train_tokenizer(config, tmp_path / "killed")
    train_tokenizer(config, tmp_path / "killed")
    assert "goes on from step 4" in capsys.readouterr().out
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
