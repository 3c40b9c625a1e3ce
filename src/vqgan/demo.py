"""`vqgan demo`: both stages on the embedded emoji, then pictures and a report."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqgan import atomic, presets
from vqgan.adversarial.lpips import load_lpips
from vqgan.data.codes import CodeSource
from vqgan.data.pipeline import eval_batches
from vqgan.data.sources import open_source
from vqgan.eval.runner import evaluate_prior, evaluate_tokenizer
from vqgan.pictures import (
    grid,
    inputs_over_outputs,
    save_codebook_usage,
    save_curves,
    save_png,
    to_uint8,
)
from vqgan.pipeline import Pipeline
from vqgan.tokenizer.model import Tokenizer
from vqgan.train.config import PriorTraining, TokenizerTraining
from vqgan.train.metrics import read_metrics
from vqgan.train.prior import train_prior
from vqgan.train.tokenizer import reconstruct, train_tokenizer

# What the presets' step counts are made for, and how the time is shared out.
_MINUTES = 9.0
_TOKENIZER_SHARE = 0.68
_PRIOR_SHARE = 0.95
_SAMPLES_A_CLASS = 12


def demo(minutes: float, out: Path) -> dict[str, Any]:
    """Trains both stages and writes pictures and `report.json`; returns the report.

    Args:
      minutes: scales the number of steps; no phase of training outlasts its share of it.
    """
    began = time.monotonic()
    stage1, stage2 = _scaled(minutes / _MINUTES)
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.monotonic() - began - sum(seconds.values()), 1)

    if (out / "prior" / "config.json").exists():  # stage 2 has begun on this very tokenizer
        tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    else:
        limit = began + 60 * minutes * _TOKENIZER_SHARE
        tokenizer = train_tokenizer(stage1, out / "tokenizer", deadline=limit)
    lap("tokenizer")
    pipeline = train_prior(
        stage2,
        out / "tokenizer" / "model",
        out / "prior",
        deadline=began + 60 * minutes * _PRIOR_SHARE,
    )
    lap("prior")
    pipeline.save_pretrained(out / "model")
    report: dict[str, Any] = {}
    report |= _tokenizer_report(tokenizer, stage1.data.image_size, out)
    report |= _prior_report(pipeline, out)
    _draw_samples(pipeline, out / "samples.png")
    logs = {stage: read_metrics(out / stage / "metrics.jsonl") for stage in ("tokenizer", "prior")}
    save_curves(logs, out / "curves.png")
    lap("report")
    report["seconds"] = seconds | {"total": round(time.monotonic() - began, 1)}
    report["steps"] = {stage: lines[-1]["step"] for stage, lines in logs.items()}
    report["images_per_second"] = {stage: _median_speed(lines) for stage, lines in logs.items()}
    atomic.write_json(report, out / "report.json")
    _say(report, out)
    return report


def _scaled(factor: float) -> tuple[TokenizerTraining, PriorTraining]:
    """The emoji presets, longer or shorter."""
    stage1, stage2 = presets.emoji_tokenizer(), presets.emoji_prior()

    def scaled(part: Any, *names: str) -> Any:
        return dataclasses.replace(part, **{n: round(getattr(part, n) * factor) for n in names})

    return (
        dataclasses.replace(
            stage1,
            loss=scaled(stage1.loss, "disc_start", "disc_warmup"),
            run=scaled(stage1.run, "steps"),
        ),
        dataclasses.replace(stage2, run=scaled(stage2.run, "steps")),
    )


def _tokenizer_report(tokenizer: Tokenizer, size: int, out: Path) -> dict[str, float]:
    """Held-out numbers, `reconstructions.png` and `codebook.png`."""
    held_out = open_source("emoji", split="test")
    values = evaluate_tokenizer(tokenizer, eval_batches(held_out, size, 16), load_lpips("vgg16"))
    images = next(eval_batches(held_out, size, 48, limit=48))["image"]
    picture = inputs_over_outputs(images, reconstruct(tokenizer, images), columns=12)
    save_png(picture.repeat(2, axis=0).repeat(2, axis=1), out / "reconstructions.png")
    counts = np.array(CodeSource(out / "prior" / "codes" / "test").info.counts).sum(axis=0)
    save_codebook_usage(counts, out / "codebook.png")
    names = {"usage": "codebook_usage", "perplexity": "codebook_perplexity"}
    return {names.get(name, name): value for name, value in values.items()}


def _prior_report(pipeline: Pipeline, out: Path) -> dict[str, float]:
    """Held-out bits a token beside what knowing nothing, or only frequencies, costs."""
    train, test = (CodeSource(out / "prior" / "codes" / split) for split in ("train", "test"))
    bits = evaluate_prior(pipeline.prior, eval_batches(test, None, 32))["bits_per_token"]
    return {
        "bits_per_token": bits,
        "uniform_bits": float(np.log2(pipeline.tokenizer.codebook_size)),
        "unigram_bits": train.unigram_entropy_bits,
        "below_unigram": 1 - bits / train.unigram_entropy_bits,
    }


def _draw_samples(pipeline: Pipeline, path: Path) -> None:
    """A row of new images a class."""
    classes = jnp.repeat(jnp.arange(len(pipeline.class_names)), _SAMPLES_A_CLASS)
    images = pipeline.generate(
        classes, rng=jax.random.key(0), temperature=0.95, top_k=100, guidance=2.0
    )
    save_png(grid(to_uint8(images), _SAMPLES_A_CLASS, scale=2), path)


def _median_speed(lines: list[dict]) -> float:
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return round(float(np.median(speeds)), 1) if speeds else float("nan")


def _say(report: dict[str, Any], out: Path) -> None:
    print(
        f"reconstructions: PSNR {report['psnr']:.1f} dB, SSIM {report['ssim']:.2f}, "
        f"LPIPS {report['lpips']:.3f}, {report['codebook_usage']:.0%} of the codebook in use\n"
        f"prior: {report['bits_per_token']:.2f} bits a token, "
        f"{report['below_unigram']:.0%} below the unigram entropy\n"
        f"{report['seconds']['total']:.0f} s; look at {out}/reconstructions.png, "
        f"{out}/samples.png, {out}/codebook.png and {out}/curves.png"
    )
