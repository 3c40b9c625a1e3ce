"""The one training loop. Its order is a contract (and tested):

    restore the newest checkpoint, then for every step
      1. evaluate the old state, if due
      2. save it, if due
      3. only then take the next batch
      4. step
      5. log, if due
      6. stop on numbers that are not finite
      7. go back to the newest checkpoint, if the run's guard asks for that
      8. stop, after a save, on Ctrl-C, SIGTERM or the deadline

Where a run has a guard, only states that it calls calm are saved: a save that is due waits for one.
So the newest checkpoint is the last good state, and none has to be taken back.

Batches and keys are functions of the step, so a run that was killed at any moment and started again
computes what it would have computed.
"""

import contextlib
import datetime
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from vqgan.train.checkpoint import Checkpoints
from vqgan.train.config import RunConfig
from vqgan.train.metrics import RunLog, read_metrics

S = TypeVar("S")
Metrics = Mapping[str, Any]

# Steps between two questions among processes whether one of them got a signal.
_AGREE_EVERY = 10
# Steps between two looks at the guard, each of which waits for the device. It is no option, so that
# a resumed run goes back at the same step.
_LOOK_EVERY = 10


class NonFiniteError(RuntimeError):
    """A loss or another number of a step became infinite or not a number."""


class Stopped(Exception):
    """The run was asked to stop, has saved itself, and goes on when started again."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.exit_status = 128 + signal_number


class Stream(Protocol):
    """An iterator over batches that can be closed."""

    def __next__(self) -> Any: ...
    def close(self) -> None: ...


@runtime_checkable
class Watch(Protocol):
    """What the loop asks of a run's guard; vqgan/train/guard.py is one."""

    def look(self, state: Any, batch: Any, step: int) -> Any: ...
    def calm(self, state: Any) -> bool: ...
    def asks(self, state: Any) -> bool: ...
    def returned(self, good: Any, bad: Any) -> Any: ...
    def news(self, state: Any) -> list[str]: ...


def fit(
    state: S,
    step: Callable[[S, Any], tuple[S, Metrics]],
    *,
    batches: Callable[[int], Stream],
    evaluate: Callable[[S], Mapping[str, float]],
    picture: Callable[[S], np.ndarray],
    export: Callable[[S, Path], None],
    run: RunConfig,
    out: Path,
    title: str,
    images_per_step: int,
    meta: dict[str, Any],
    best_of: str,
    watch: Watch | None = None,
    save_at: int = 0,
    deadline: float | None = None,
) -> S:
    """Runs `step` from the newest checkpoint in `out` (or from `state`) to `run.steps`.

    Args:
      batches: the stream of batches from a given step on.
      evaluate: held-out numbers of a state.
      picture: a uint8 `[h, w, c]` picture of what a state does.
      export: writes a state's model into a directory.
      meta: JSON that every checkpoint carries, the config above all.
      best_of: the held-out number, better where it is lower, whose best value and step every
        checkpoint carries too.
      watch: the run's guard, if it has one.
      save_at: a step after which to save even if no save is due.
      deadline: `time.monotonic()` at which to stop early, as if `run.steps` had been reached.

    Raises:
      NonFiniteError: naming the step and the numbers.
      Stopped: after a signal, once everything is saved.
    """
    first_process = jax.process_index() == 0
    with Checkpoints(out / "checkpoints", keep=run.keep) as checkpoints, _signals() as caught:
        start = checkpoints.latest() or 0
        best: dict[str, float] = {}
        if start:
            state = checkpoints.restore(start, state)
            best = checkpoints.meta(start)["best"]
        log = RunLog(out, start=start, steps=run.steps, title=title, active=first_process)
        clock = _Clock(images_per_step)
        unchecked: list[tuple[int, Metrics]] = []
        done = start
        # A run that a signal stopped has saved its step, and not evaluated it.
        pending = start > 0 and not _evaluated(out, start)
        owed = False  # a save that waits for a calm state
        if watch is not None:
            watch.news(state)  # what happened before is told

        def judge() -> None:
            values = evaluate(state)
            log.scalars(done, "eval", values)
            if values[best_of] < best.get(best_of, math.inf):
                best.update({best_of: values[best_of], "step": done})

        def save() -> None:
            _check_finite(unchecked)
            # In this order: a checkpoint of the last step is the mark of a run that is over.
            export(state, out / "model")
            checkpoints.save(done, state, {**meta, "step": done, "best": best})

        def calm() -> bool:
            return watch is None or watch.calm(state)

        def go_back(watch: Watch) -> tuple[S, int]:
            checkpoints.wait()
            good = checkpoints.latest()
            if good is None:
                log.line(f"{title} {done}: guard: there is no checkpoint to return to")
                return watch.returned(state, state), done
            log.line(f"{title} {done}: guard: back to the last good state, step {good}")
            best.clear()
            best.update(checkpoints.meta(good)["best"])
            return watch.returned(checkpoints.restore(good, state), state), good

        with log, _Streams(batches, start) as streams:
            if start:
                over = start >= run.steps
                log.line(f"{title} {'is complete at' if over else 'goes on from'} step {start}")
            while done < run.steps:
                if done > start or pending:
                    with clock.paused():
                        if _due(done, run.eval_every):
                            judge()
                        if _due(done, run.image_every):
                            log.image(done, "sample", picture(state))
                        due = _due(done, run.save_every) or done == save_at > 0
                        owed = (owed or due) and done > start and checkpoints.latest() != done
                        if owed and calm():
                            save()
                            owed = False
                batch = next(streams)
                if watch is not None:
                    state = watch.look(state, batch, done)
                state, metrics = step(state, batch)
                done += 1
                unchecked.append((done, metrics))
                log.advance(done)
                if done == start + 1:
                    clock.start(done, metrics)
                if _due(done, run.log_every) or done == run.steps:
                    values = _check_finite(unchecked)
                    speed, note = clock.lap(done, run.steps)
                    log.scalars(done, "train", {**values, **speed}, note)
                if watch is not None and _due(done, _LOOK_EVERY):
                    for line in watch.news(state):
                        log.line(f"{title} {done}: {line}")
                    if watch.asks(state):
                        unchecked.clear()
                        state, done = go_back(watch)
                        streams.reopen(done)
                        clock.start(done, metrics)
                        owed = False
                        for line in watch.news(state):
                            log.line(f"{title} {done}: {line}")
                if deadline is not None and time.monotonic() > deadline:
                    log.line(f"{title}: out of time after step {done} of {run.steps}")
                    break
                if _stop_asked(done, caught):
                    good = checkpoints.latest()
                    if good is not None and not calm():
                        checkpoints.wait()  # the last good state is all there is to go on from
                        raise Stopped(good, caught[0] if caught else signal.SIGTERM)
                    save()
                    checkpoints.wait()
                    raise Stopped(done, caught[0] if caught else signal.SIGTERM)
            if done > start or pending or not (out / "model").exists():
                judge()
                log.image(done, "sample", picture(state))
                if checkpoints.latest() != done:
                    save()
                else:
                    export(state, out / "model")
                checkpoints.wait()
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluated(out: Path, step: int) -> bool:
    """Whether the log has held-out numbers of a step."""
    lines = read_metrics(out / "metrics.jsonl")
    return any(line["step"] == step and line["kind"] == "eval" for line in lines)


def _check_finite(unchecked: list[tuple[int, Metrics]]) -> dict[str, float]:
    """Fetches and forgets what has gathered; returns the newest step's numbers."""
    values: dict[str, float] = {}
    for step, metrics in jax.device_get(unchecked):
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(f"step {step}: {', '.join(bad)} not finite")
    unchecked.clear()
    return values


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM; a second Ctrl-C interrupts at once."""
    caught: list[int] = []

    def note(number: int, _: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's business
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_asked(step: int, caught: list[int]) -> bool:
    """Whether to stop here; the processes of one run agree on the step, now and then."""
    if jax.process_count() == 1:
        return bool(caught)
    if step % _AGREE_EVERY:
        return False
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(caught)))))


class _Streams:
    """The run's stream of batches, which can be opened again at another step."""

    def __init__(self, batches: Callable[[int], Stream], start: int):
        self._batches = batches
        self._stream = batches(start)

    def __enter__(self) -> "_Streams":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __next__(self) -> Any:
        return next(self._stream)

    def reopen(self, step: int) -> None:
        self._stream.close()
        self._stream = self._batches(step)


class _Clock:
    """Images a second and the time left, without compilation, evaluation and saving."""

    def __init__(self, images_per_step: int):
        self._images = images_per_step
        self._since = math.nan
        self._last = 0

    def start(self, step: int, metrics: Metrics) -> None:
        """Starts once the first step, which compiles, is over."""
        jax.block_until_ready(metrics)
        self._since, self._last = time.monotonic(), step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of a block."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def lap(self, step: int, steps: int) -> tuple[dict[str, float], str]:
        """Ends a window of steps: its speed for the log, and a note for people."""
        now = time.monotonic()
        if step == self._last:
            return {}, ""
        per_step = (now - self._since) / (step - self._last)
        self._since, self._last = now, step
        speed = self._images / per_step
        left = datetime.timedelta(seconds=round(per_step * (steps - step)))
        return {"images_per_second": speed}, f"{left} left"
