"""A run that is stopped or killed at any moment, and started again, ends as if it never was."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from vqgan.train.metrics import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.images(tmp_path_factory.mktemp("images"))


def run(command, *, kind="NONE", step=0):
    """Runs one tiny.py process on one device; returns exit status and output."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_NUM_CPU_DEVICES": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, tiny.__file__, kind, str(step), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def checkpoint(out: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The newest checkpoint's step and arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of restoring to other devices than it was saved from
        with ocp.CheckpointManager(out / "checkpoints") as manager:
            step = manager.latest_step()
            items = ocp.args.Composite(state=ocp.args.StandardRestore())
            state = manager.restore(step, args=items).state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(a: Path, b: Path) -> None:
    """Equal logs but for the clock, equal models and equal states, bit for bit."""
    lines = [read_metrics(out / "metrics.jsonl") for out in (a, b)]
    for line in lines[0] + lines[1]:
        line.pop("images_per_second", None)
    assert lines[0] == lines[1]
    weights = sorted(path.relative_to(a) for path in (a / "model").rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert (a / path).read_bytes() == (b / path).read_bytes(), path
    (step, expected), (step_b, found) = checkpoint(a), checkpoint(b)
    assert step == step_b and expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype
        assert array.tobytes() == found[name].tobytes(), name


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage1") / "undisturbed"
    status, output = run(tiny.tokenizer_command(data, out, "--steps", "12"))
    assert status == 0, output
    return out


def test_stage_1_killed(undisturbed, data, tmp_path):
    command = tiny.tokenizer_command(data, tmp_path / "killed", "--steps", "12")
    status, output = run(command, kind="SIGKILL", step=5)
    assert status == -9, output
    status, output = run(command)
    assert status == 0 and "goes on from step" in output, output
    assert_same_run(undisturbed, tmp_path / "killed")


@pytest.mark.slow
def test_stage_1_killed_and_stopped(undisturbed, data, tmp_path):
    out = tmp_path / "disturbed"
    command = tiny.tokenizer_command(data, out, "--steps", "12")

    status, output = run(command, kind="SIGKILL", step=5)  # checkpoint 2 is whole, 4 may be
    assert status == -9, output
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == 5

    # Step 10, too, is one to evaluate after: the next process must do it.
    status, output = run(command, kind="SIGTERM", step=10)
    assert status == 143, output
    assert "goes on from step" in output
    assert output.splitlines()[-1].startswith("vqgan: stopped at step 10;")
    assert checkpoint(out)[0] == 10

    status, output = run(command, kind="SIGINT", step=11)
    assert status == 130, output
    assert checkpoint(out)[0] == 11

    status, output = run(command)
    assert status == 0 and "goes on from step 11" in output, output
    assert_same_run(undisturbed, out)
    game = [line["disc_loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert game[2] == 0 and all(game[4:]), "the discriminator was to play"


def test_a_run_that_is_over_is_left_alone(undisturbed, data):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    status, output = run(tiny.tokenizer_command(data, undisturbed, "--steps", "12"))
    assert status == 0, output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_stage_2_killed(undisturbed, data, tmp_path):
    runs = [tmp_path / name for name in ("undisturbed", "killed")]
    commands = [
        tiny.prior_command(undisturbed / "model", data, out, "--steps", "8") for out in runs
    ]
    status, output = run(commands[0])
    assert status == 0, output
    status, output = run(commands[1], kind="SIGKILL", step=5)
    assert status == -9, output
    codes = (runs[1] / "codes" / "train" / "codes.json").stat().st_mtime_ns
    status, output = run(commands[1])
    assert status == 0 and "goes on from step" in output, output
    assert (runs[1] / "codes" / "train" / "codes.json").stat().st_mtime_ns == codes
    assert_same_run(*runs)
