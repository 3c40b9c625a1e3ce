"""Discriminators that are far too fast, from early on, with the guard and without; and a sane one.

Runs of stage 1 on the embedded emoji (32 pixels, a small model):

    hinge 20x    no LPIPS, taming's adversarial weight and no warm-up, a discriminator's learning
                 rate of 20 times the autoencoder's, from step 200 of 400
    vanilla 10x  the same with the vanilla loss and 10 times, from step 100 of 300
    demo         the demo's recipe in small: LPIPS, 0.3 times, weight 0.2, a warm-up, both learning
                 rates as there; from step 250 of 450

The first two run with the guard and without, and differ in nothing else; the third runs with it.
Held-out images are evaluated every 10 steps. Prints, for each run, the PSNR when the generator
first sees the discriminator, the lowest and the last since, and what the guard did; draws the
curves. A directory that holds finished runs is only read.

    python benchmarks/wrecked_gan.py --out runs/guard --seeds 0 1

About half an hour on 2 CPU cores.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vqgan import presets
from vqgan.train.config import LossConfig, OptimConfig, TokenizerTraining
from vqgan.train.guard import GuardConfig
from vqgan.train.metrics import read_metrics
from vqgan.train.tokenizer import train_tokenizer

LR = 1e-3
# The default's times, shortened to the length of these runs.
RULE = GuardConfig(hold=30, calm=100)
HINGE = LossConfig(perceptual_weight=0.0, disc_start=200, guard_rule=RULE)
VANILLA = dataclasses.replace(HINGE, adversarial="vanilla", disc_start=100)
NO_GUARD = ", no guard"


def small(loss: LossConfig, steps: int, seed: int) -> TokenizerTraining:
    """The demo's training with a smaller model; its optimisers too."""
    base = presets.emoji_tokenizer()
    autoencoder = dataclasses.replace(
        base.model.autoencoder, base_channels=16, z_channels=32, norm_groups=4
    )
    quantizer = dataclasses.replace(base.model.quantizer, codebook_size=256, dim=16)
    run = dataclasses.replace(
        base.run,
        steps=steps,
        seed=seed,
        log_every=5,
        eval_every=10,
        image_every=0,
        save_every=100,
        eval_images=32,
    )
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, autoencoder=autoencoder, quantizer=quantizer),
        discriminator=dataclasses.replace(base.discriminator, base_channels=16),
        loss=loss,
        run=run,
    )


def wreck(loss: LossConfig, times: float, steps: int, seed: int) -> TokenizerTraining:
    return dataclasses.replace(
        small(loss, steps, seed),
        optim=OptimConfig(lr=LR, betas=(0.5, 0.9), warmup_steps=20),
        disc_optim=OptimConfig(lr=times * LR, betas=(0.5, 0.9)),
        ema_decay=0.9,
    )


def configs(seed: int) -> dict[str, TokenizerTraining]:
    """The runs by name."""
    guarded = {
        "hinge 20x": wreck(HINGE, 20.0, 400, seed),
        "vanilla 10x": wreck(VANILLA, 10.0, 300, seed),
    }
    free = {
        name + NO_GUARD: dataclasses.replace(c, loss=dataclasses.replace(c.loss, guard=False))
        for name, c in guarded.items()
    }
    loss = dataclasses.replace(
        presets.emoji_tokenizer().loss, disc_start=250, disc_warmup=100, guard_rule=RULE
    )
    return guarded | free | {"demo": small(loss, 450, seed)}


def outcome(config: TokenizerTraining, lines: list[dict]) -> dict[str, float]:
    """PSNR before, at the worst and at the end; what the guard did and its lowest factor."""
    start = config.loss.disc_start
    held_out = [(x["step"], x["psnr"]) for x in lines if x["kind"] == "eval"]
    before = next(psnr for step, psnr in held_out if step == start)
    since = [psnr for step, psnr in held_out if step > start]
    train = [x for x in lines if x["kind"] == "train"]
    factors = [x["guard_factor"] for x in train if "guard_factor" in x]
    counts = {k: int(train[-1][k]) for k in train[-1] if k[6:] in ("holds", "lowers", "returns")}
    return {
        "before": round(before, 2),
        "lowest": round(min(since), 2),
        "lost at most": round(before - min(since), 2),
        "last": round(since[-1], 2),
        **counts,
        **({"lowest factor": min(factors)} if factors else {}),
    }


def draw(axes: list[Axes], name: str, seed: int, config: TokenizerTraining, lines: list[dict]):
    """PSNR above, the guard's factor below; steps since the generator sees the discriminator."""
    start = config.loss.disc_start
    free = name.endswith(NO_GUARD)
    look = {"color": f"C{seed}", "linestyle": "--" if free else "-", "lw": 1.2}
    label = f"seed {seed}, {'no guard' if free else 'guard'}"
    held_out = [(x["step"] - start, x["psnr"]) for x in lines if x["kind"] == "eval"]
    shown = [(step, psnr) for step, psnr in held_out if step >= -50]
    axes[0].plot(*zip(*shown, strict=True), label=label, **look)
    if not free:
        factor = [(x["step"] - start, x["guard_factor"]) for x in lines if x["kind"] == "train"]
        axes[1].plot(*zip(*[x for x in factor if x[0] >= -50], strict=True), **look)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    kinds = ["hinge 20x", "vanilla 10x", "demo"]
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, 3, sharex="col", height_ratios=(3, 1))
    report: dict[str, dict[str, float]] = {}
    for seed in options.seeds:
        for name, config in configs(seed).items():
            out = options.out / f"{name}, seed {seed}".replace(", ", "-").replace(" ", "-")
            train_tokenizer(config, out)
            lines = read_metrics(out / "metrics.jsonl")
            report[f"{name}, seed {seed}"] = outcome(config, lines)
            axes = panels[:, kinds.index(name.removesuffix(NO_GUARD))]
            draw(axes, name, seed, config, lines)
            before = report[f"{name}, seed {seed}"]["before"]
            if not name.endswith(NO_GUARD):
                axes[0].axhline(before - 0.5, color=f"C{seed}", lw=0.6, linestyle=":")
    for (above, below), kind in zip(panels.T, kinds, strict=True):
        above.set_title(kind)
        above.legend(loc="lower right", fontsize=8)
        below.set_ylim(-0.05, 1.05)
        below.set_xlabel("steps since the generator sees the discriminator")
    panels[0, 0].set_ylabel("held-out PSNR, dB; dotted: 0.5 below the start")
    panels[1, 0].set_ylabel("the guard's factor")
    figure.savefig(options.out / "guard.png", dpi=100)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
