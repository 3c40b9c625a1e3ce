"""The order of things in a run, with callables that only take notes."""

import json
import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest

from vqgan.train.checkpoint import Checkpoints
from vqgan.train.config import RunConfig
from vqgan.train.loop import NonFiniteError, Stopped, fit
from vqgan.train.metrics import read_metrics


class Run:
    """A run whose state is a count; `events` is what happened, in order."""

    def __init__(self, out, **run):
        self.out = out
        defaults = {"steps": 4, "log_every": 1, "eval_every": 0, "image_every": 0}
        self.config = RunConfig(**({**defaults, "save_every": 0} | run))
        self.events = []

    def batches(self, start):
        run = self
        run.events.append(f"open {start}")

        class Stream:
            at = start

            def __next__(self):
                run.events.append(f"batch {self.at}")
                self.at += 1
                return self.at - 1

            def close(self):
                run.events.append("close")

        return Stream()

    def step(self, state, batch):
        self.events.append(f"step {batch}")
        assert int(state["count"]) == batch
        count = state["count"] + 1
        return {"count": count}, {"loss": self.loss(batch + 1)}

    def loss(self, step):
        return jnp.float32(1 / step)

    def evaluate(self, state):
        self.events.append(f"eval {int(state['count'])}")
        return {"score": abs(float(state["count"]) - 3)}  # best after step 3

    def picture(self, state):
        self.events.append(f"picture {int(state['count'])}")
        return np.zeros((4, 4, 3), np.uint8)

    def export(self, state, directory):
        self.events.append(f"export {int(state['count'])}")
        directory.mkdir(exist_ok=True)

    def fit(self, **more):
        return fit(
            {"count": jnp.zeros((), jnp.int32)},
            self.step,
            batches=self.batches,
            evaluate=self.evaluate,
            picture=self.picture,
            export=self.export,
            run=self.config,
            out=self.out,
            title="test",
            images_per_step=1,
            meta={"config": {}},
            best_of="score",
            **more,
        )


def logged(out, kind):
    lines = read_metrics(out / "metrics.jsonl")
    return [line["step"] for line in lines if line["kind"] == kind]


def test_order_of_a_run(tmp_path):
    run = Run(tmp_path, steps=3, eval_every=2, image_every=2, save_every=2)
    assert int(run.fit()["count"]) == 3
    assert run.events == [
        *("open 0", "batch 0", "step 0", "batch 1", "step 1"),
        # Of the old state, and only then the next batch.
        *("eval 2", "picture 2", "export 2"),
        *("batch 2", "step 2"),
        *("eval 3", "picture 3", "export 3", "close"),
    ]
    assert logged(tmp_path, "train") == [1, 2, 3] and logged(tmp_path, "eval") == [2, 3]
    assert (tmp_path / "images" / "step_0000002_sample.png").exists()


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    Run(tmp_path, steps=2).fit()
    with (tmp_path / "metrics.jsonl").open("a") as log:  # what a killed process left behind
        log.write(json.dumps({"step": 3, "kind": "train", "loss": 9.0}) + "\n" + '{"step": 4, "ki')
    run = Run(tmp_path, steps=4)
    assert int(run.fit()["count"]) == 4
    assert run.events[:3] == ["open 2", "batch 2", "step 2"]
    assert logged(tmp_path, "train") == [1, 2, 3, 4]
    assert all(line.get("loss") != 9.0 for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_checkpoints_carry_the_best_number(tmp_path):
    def newest():
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            return checkpoints.meta(checkpoints.latest())

    Run(tmp_path, steps=2, eval_every=1).fit()
    assert newest() == {"config": {}, "step": 2, "best": {"score": 1.0, "step": 2}}
    Run(tmp_path, steps=4, eval_every=1).fit()
    assert newest()["best"] == {"score": 0.0, "step": 3}
    Run(tmp_path, steps=6, eval_every=1).fit()  # remembers what it has not seen itself
    assert newest() == {"config": {}, "step": 6, "best": {"score": 0.0, "step": 3}}


def test_a_run_that_is_over_does_nothing(tmp_path):
    Run(tmp_path).fit()
    again = Run(tmp_path)
    again.fit()
    assert again.events == ["open 4", "close"]


def test_deadline_ends_in_good_order(tmp_path):
    run = Run(tmp_path, steps=1000)
    run.fit(deadline=time.monotonic() - 1)
    assert run.events[-4:] == ["eval 1", "picture 1", "export 1", "close"]
    assert logged(tmp_path, "eval") == [1]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signals_save_and_leave_and_the_next_run_makes_up_for_it(tmp_path, number, status):
    before = signal.getsignal(number)
    run = Run(tmp_path, eval_every=2)
    step = run.step

    def step_with_signal(state, batch):
        if batch == 1:
            os.kill(os.getpid(), number)
        return step(state, batch)

    run.step = step_with_signal
    with pytest.raises(Stopped, match="stopped at step 2") as stopped:
        run.fit()
    assert stopped.value.exit_status == status
    assert run.events[-2:] == ["export 2", "close"]
    assert signal.getsignal(number) == before
    again = Run(tmp_path, eval_every=2)
    again.fit()
    assert again.events[:4] == ["open 2", "eval 2", "batch 2", "step 2"]  # its evaluation was due
    assert logged(tmp_path, "eval") == [2, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(tmp_path, value):
    run = Run(tmp_path, log_every=2, save_every=3, steps=6)
    run.loss = lambda step: jnp.float32(value if step == 3 else 1.0)
    with pytest.raises(NonFiniteError, match="step 3: loss not finite"):
        run.fit()
    # Found before the state was saved, though no log was due.
    assert "export 3" not in run.events and run.events[-1] == "close"
