"""One program on one device, on eight, and on two processes of four: the same numbers.

Up to float32 rounding, that is: sums over a batch are taken in another order. Adam divides by the
root of the second moment, so where a gradient is nothing but rounding its first updates are too;
the tests here give it an epsilon that is large beside rounding.
"""

import dataclasses
import functools
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, Mesh, NamedSharding
from safetensors.numpy import load_file

from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig
from vqgan.prior.transformer import PriorConfig
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig
from vqgan.train import prior, sharding, tokenizer
from vqgan.train.config import (
    LossConfig,
    OptimConfig,
    PriorTraining,
    RunConfig,
    TokenizerTraining,
)
from vqgan.train.metrics import read_metrics
from vqgan.train.reconstruction import Perceptual
from vqgan.train.state import compiled, create

pytestmark = pytest.mark.multidevice

OPTIM = OptimConfig(lr=1e-3, eps=1e-3)
STAGE_1 = TokenizerTraining(
    model=TokenizerConfig(
        autoencoder=AutoencoderConfig(
            base_channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(8,),
            resolution=16,
            z_channels=8,
            norm_groups=4,
            dropout=0.1,
        ),
        quantizer=VQConfig(codebook_size=16, dim=4, revive_after=2),
    ),
    discriminator=PatchGANConfig(base_channels=4, num_layers=1),
    loss=LossConfig(perceptual_weight=0.0, disc_start=3, disc_warmup=1),
    optim=OPTIM,
    disc_optim=OPTIM,
    data=DataConfig(image_size=16, batch_size=8),
    run=RunConfig(steps=5),
)
STAGE_2 = PriorTraining(
    model=PriorConfig(codebook_size=16, grid=(4, 4), num_classes=3, depth=2, heads=2, width=16),
    pkeep=0.9,
    optim=dataclasses.replace(OPTIM, weight_decay=0.01),
    run=RunConfig(steps=5),
)


def one_device() -> Mesh:
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def train(setup, step, config, batches, mesh, **fixed):
    """Metrics of every step, and the last state on the host."""
    stage, init = setup(config)
    state = create(init, mesh)
    one_step = compiled(functools.partial(step, stage), state, mesh, key=jax.random.key(0), **fixed)
    metrics = []
    for batch in batches:
        state, values = one_step(state, jax.device_put(batch, NamedSharding(mesh, sharding.BATCH)))
        metrics.append(jax.device_get(values))
    return metrics, state


def assert_close(a, b):
    (metrics_a, state_a), (metrics_b, state_b) = a, b
    for x, y in zip(metrics_a, metrics_b, strict=True):
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=1e-5, err_msg=name)
    leaves_a, leaves_b = (jax.tree_util.tree_leaves_with_path(s) for s in (state_a, state_b))
    for (path, x), (_, y) in zip(leaves_a, leaves_b, strict=True):
        np.testing.assert_allclose(
            np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5, err_msg=str(path)
        )


def test_five_gan_steps_on_one_device_and_eight():
    rng = np.random.default_rng(0)
    batches = [{"image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8)} for _ in range(5)]
    runs = [
        train(tokenizer.setup, tokenizer.step, STAGE_1, batches, mesh, perceptual=Perceptual())
        for mesh in (one_device(), sharding.make_mesh())
    ]
    assert len(jax.tree.leaves(runs[1][1].params)[0].sharding.device_set) == 8
    assert all(metrics["adversarial_weight"] > 0 for metrics in runs[0][0][3:])
    assert_close(*runs)


def test_five_steps_of_the_prior_over_data_fsdp_and_tensor(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    rng = np.random.default_rng(0)
    batches = [
        {
            "ids": rng.integers(0, 16, (8, 4, 4)).astype(np.int32),
            "label": rng.integers(0, 3, 8).astype(np.int32),
        }
        for _ in range(5)
    ]
    runs = [
        train(prior.setup, prior.step, STAGE_2, batches, mesh)
        for mesh in (one_device(), sharding.make_mesh(fsdp=2, tensor=2))
    ]
    used = {axis for x in jax.tree.leaves(runs[1][1].params) for axis in x.sharding.spec}
    assert {"fsdp", "tensor"} <= used
    assert_close(*runs)


def start(command, devices, **environment):
    cache = str(jax.config.jax_compilation_cache_dir)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_NUM_CPU_DEVICES": str(devices),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, tiny.__file__, "NONE", "0", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_train_as_one_does(tmp_path):
    data = tiny.images(tmp_path / "images")
    eps = ("--optim.eps", "1e-3", "--disc-optim.eps", "1e-3")
    more = ("--steps", "5")
    outs = [tmp_path / "one", tmp_path / "two"]
    commands = [tiny.tokenizer_command(data, out, *more, *eps) for out in outs]
    finish(start(commands[0], 1))
    address = f"localhost:{free_port()}"
    first, second = finish(
        *(
            start(
                commands[1],
                4,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i),
            )
            for i in range(2)
        )
    )
    assert "tokenizer 5/5" in first and "tokenizer 5/5" not in second
    lines = [read_metrics(out / "metrics.jsonl") for out in outs]
    assert len(lines[0]) == len(lines[1]) == 6  # five steps and an evaluation
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"kind", "images_per_second"}:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    weights = [load_file(out / "model" / "model.safetensors") for out in outs]
    assert weights[0].keys() == weights[1].keys()
    for name, one in weights[0].items():
        np.testing.assert_allclose(weights[1][name], one, rtol=1e-4, atol=1e-5, err_msg=name)
