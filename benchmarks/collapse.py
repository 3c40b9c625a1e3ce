"""Collapse: a codebook far too large for its data, and how much of it each quantizer keeps in use.

The embedded emoji at 32 pixels, a small network with an L1 loss alone, and about 2^14 codes:
sixteen for every token of a batch. All runs have the same network, data, steps and Adam; quantizers
bring their own defaults but for what their names say. After every 50 steps 1,500 training images
(96,000 tokens) are encoded: the share of codes that occur, their perplexity, and the PSNR of
held-out images.

    python benchmarks/collapse.py --out runs/collapse [--steps 400]

About ten minutes on 2 CPU cores. A run that left its JSON file is not repeated.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from vqgan import presets
from vqgan.data.pipeline import eval_batches, image_augment, train_batches
from vqgan.data.sources import open_source
from vqgan.eval.image import codebook_usage, perplexity, psnr
from vqgan.pictures import to_float
from vqgan.tokenizer.quantizers import (
    EMAConfig,
    FSQConfig,
    IBQConfig,
    LFQConfig,
    QuantizerConfig,
    SimVQConfig,
    VQConfig,
)
from vqgan.train.config import LossConfig, OptimConfig, TokenizerTraining
from vqgan.train.reconstruction import Perceptual
from vqgan.train.tokenizer import setup, step

CODES, DIM = 2**14, 32
PLAIN = VQConfig(codebook_size=CODES, dim=DIM, init_from_data=False, revive_after=0)
RUNS: dict[str, QuantizerConfig] = {
    "vector, plain": PLAIN,
    "vector, starts from data": dataclasses.replace(PLAIN, init_from_data=True),
    "vector, revived": VQConfig(codebook_size=CODES, dim=DIM, revive_after=20),
    "EMA, revived": EMAConfig(codebook_size=CODES, dim=DIM, revive_after=20),
    "cosine, 8 channels": dataclasses.replace(PLAIN, normalize=True, dim=8),
    "SimVQ": SimVQConfig(codebook_size=CODES, dim=DIM),
    "IBQ": IBQConfig(codebook_size=CODES, dim=DIM),
    "FSQ": FSQConfig(levels=(8, 8, 8, 6, 5)),
    "LFQ": LFQConfig(dim=14),
}


def config(quantizer: QuantizerConfig, steps: int) -> TokenizerTraining:
    base = presets.emoji_tokenizer()
    autoencoder = dataclasses.replace(
        base.model.autoencoder, base_channels=16, z_channels=DIM, norm_groups=4
    )
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, autoencoder=autoencoder, quantizer=quantizer),
        loss=LossConfig(perceptual_weight=0.0, disc_start=-1),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), warmup_steps=20),
        ema_decay=0.0,
        run=dataclasses.replace(base.run, steps=steps),
    )


@jax.jit
def _encode(tokenizer: Any, images: Any) -> Any:
    return tokenizer.encode(to_float(images))


@jax.jit
def _psnr(tokenizer: Any, images: Any) -> Any:
    x = to_float(images)
    return psnr(x, tokenizer(x).reconstruction)


def measure(tokenizer: Any, train: list[dict], test: list[dict]) -> dict[str, float]:
    counts = np.zeros(tokenizer.codebook_size, np.int64)
    for batch in train:
        ids = np.asarray(_encode(tokenizer, batch["image"]))[batch["valid"]]
        counts += np.bincount(ids.ravel(), minlength=len(counts))
    quality = [np.asarray(_psnr(tokenizer, batch["image"]))[batch["valid"]] for batch in test]
    return {
        "usage": float(codebook_usage(counts)),
        "codes": int((counts > 0).sum()),
        "perplexity": float(perplexity(jax.numpy.asarray(counts))),
        "psnr": float(np.concatenate(quality).mean()),
    }


def run(quantizer: QuantizerConfig, steps: int, every: int = 50) -> list[dict[str, float]]:
    """Trains with one quantizer; what `measure` says after every so many steps."""
    told = config(quantizer, steps)
    stage, init = setup(told)
    state = jax.jit(init)()
    one = jax.jit(functools.partial(step, stage), donate_argnums=0)
    source, key = open_source("emoji", split="train"), jax.random.key(told.run.seed)
    seen = list(eval_batches(source, 32, 100, limit=1500))
    unseen = list(eval_batches(open_source("emoji", split="test"), 32, 100))
    data = train_batches(
        source, told.data, seed=told.run.seed, steps=steps, augment=image_augment(told.data)
    )
    curve = []
    for count, batch in enumerate(data, 1):
        state, _ = one(state, {"image": batch["image"]}, key, Perceptual())
        if count % every == 0:
            tokenizer = nnx.merge(stage.tokenizer, state.params, state.codebook_stats)
            curve.append({"step": count} | measure(tokenizer, seen, unseen))
            print(json.dumps(curve[-1]), flush=True)
    return curve


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        steps = [x["step"] for x in curve]
        left.plot(steps, [100 * x["usage"] for x in curve], "o-", ms=3, label=name)
        right.plot(steps, [x["psnr"] for x in curve], "o-", ms=3, label=name)
    left.set_title("codes in use, %")
    right.set_title("held-out PSNR, dB")
    for axes in (left, right):
        axes.set_xlabel("step")
    right.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name, quantizer in RUNS.items():
        file = options.out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not file.exists():
            print(name, flush=True)
            made = json.dumps(run(quantizer, options.steps))
            file.write_text(made + "\n")
        curves[name] = json.loads(file.read_text())
    print(f"{'quantizer':26} codes used  perplexity  PSNR")
    for name, curve in curves.items():
        x = curve[-1]
        print(
            f"{name:26} {x['codes']:6} {x['usage']:4.0%}  {x['perplexity']:9.0f}  {x['psnr']:5.2f}"
        )
    draw(curves, options.out / "collapse.png")


if __name__ == "__main__":
    main()
