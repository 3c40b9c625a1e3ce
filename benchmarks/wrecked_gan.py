"""A discriminator that is far too fast, from early on: with the guard, without, and a sane one.

Three runs of stage 1 on the embedded emoji (32 pixels, a small model, L1 only). The first two have
taming's adversarial weight and no warm-up, a discriminator's learning rate of 20 times the
autoencoder's, and differ in the guard alone. The third has the demo's recipe: 0.3 times, weight
0.2, a warm-up. Prints, for each, the held-out PSNR before the generator first sees the
discriminator, the lowest since, and the last; draws the curves.

    python benchmarks/wrecked_gan.py --out runs/guard

Some minutes on 2 CPU cores.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from matplotlib.figure import Figure

from vqgan import presets
from vqgan.train.config import LossConfig, OptimConfig, TokenizerTraining
from vqgan.train.guard import GuardConfig
from vqgan.train.metrics import read_metrics
from vqgan.train.tokenizer import train_tokenizer

LR = 1e-3
START = 200
# The default's times, shortened to the length of these runs.
RULE = GuardConfig(hold=30, calm=100)
HARSH = LossConfig(perceptual_weight=0.0, disc_start=START, guard_rule=RULE)
SANE = dataclasses.replace(HARSH, adversarial_weight=0.2, disc_warmup=50)
RUNS = {
    "discriminator 20x, no guard": (20.0, dataclasses.replace(HARSH, guard=False)),
    "discriminator 20x, guard": (20.0, HARSH),
    "discriminator 0.3x, guard": (0.3, SANE),
}


def config(times: float, loss: LossConfig, steps: int) -> TokenizerTraining:
    base = presets.emoji_tokenizer()
    autoencoder = dataclasses.replace(
        base.model.autoencoder, base_channels=16, z_channels=32, norm_groups=4
    )
    quantizer = dataclasses.replace(base.model.quantizer, codebook_size=256, dim=16)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, autoencoder=autoencoder, quantizer=quantizer),
        discriminator=dataclasses.replace(base.discriminator, base_channels=16),
        loss=loss,
        optim=OptimConfig(lr=LR, betas=(0.5, 0.9), warmup_steps=20),
        disc_optim=OptimConfig(lr=times * LR, betas=(0.5, 0.9)),
        ema_decay=0.9,
        run=dataclasses.replace(
            base.run,
            steps=steps,
            log_every=10,
            eval_every=20,
            image_every=0,
            save_every=100,
            eval_images=64,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    report = {}
    for name, (times, loss) in RUNS.items():
        out = options.out / name.replace(", ", "-").replace(" ", "-")
        train_tokenizer(config(times, loss, options.steps), out)
        lines = [x for x in read_metrics(out / "metrics.jsonl") if x["step"] <= options.steps]
        held_out = [(x["step"], x["psnr"]) for x in lines if x["kind"] == "eval"]
        train = [x for x in lines if x["kind"] == "train"]
        before = next(psnr for step, psnr in held_out if step == START)
        since = [psnr for step, psnr in held_out if step > START]
        report[name] = {
            "before": round(before, 2),
            "lowest": round(min(since), 2),
            "last": round(since[-1], 2),
            **{k: train[-1][k] for k in train[-1] if k.startswith("guard_")},
        }
        above.plot(*zip(*held_out, strict=True), label=name)
        below.plot([x["step"] for x in train], [x.get("guard_factor", 1.0) for x in train])
    above.axvline(START, color="grey", lw=0.8)
    above.set_ylabel("held-out PSNR, dB")
    above.legend()
    below.set_ylabel("the guard's factor")
    below.set_xlabel("step; back where the guard returns to an earlier state")
    figure.savefig(options.out / "guard.png", dpi=100)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
