"""Natural photographs: stage 1 trained here and with taming-transformers, side by side.

Fifty photographs (the npm package `tabler-ui` 0.0.34, fetched when this runs), the smaller side
resized to 256 pixels; sorted by name, every fifth is held out. Random 64-pixel crops, half of them
mirrored, the same ones in the same order for all. Three runs:

    taming   taming's own VQModel, PatchGAN and loss (LPIPS included), Adam
    same     the same architecture, data, steps and Adam here; the quantizer with its defaults
    best     the same network at equal wall time, with the quantizer and recipe in `best()`

Held out are 24 crops of each of ten photographs, those of a grid. The speed of all three is
measured first, in turns in one process, before and after the discriminator begins; the steps of
`best` are as many as fit into the time of taming's, compilation left out.

    python benchmarks/photographs.py --out runs/photographs [--photos DIR] [--steps 1000]

Needs the `reference` extra, and npm unless `--photos` names a folder that has the photographs.
Every run leaves a JSON file and is not repeated while that is there. About an hour on 2 CPU cores.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from vqgan.adversarial.lpips import load_lpips
from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig, image_augment, train_batches
from vqgan.data.sources import read_image
from vqgan.data.transforms import crop, resize_smallest_side
from vqgan.eval.image import psnr, ssim
from vqgan.pictures import inputs_over_outputs, save_png, to_float, to_uint8
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig
from vqgan.train.config import LossConfig, OptimConfig, RunConfig, TokenizerTraining
from vqgan.train.reconstruction import Perceptual
from vqgan.train.tokenizer import setup, step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
from reference import import_torch, taming_vqmodel

SIDE, SIZE, BATCH, SEED = 256, 64, 4, 0
CODES, DIM = 512, 64
LR, BETAS = 4e-4, (0.5, 0.9)
GAN_AFTER = 0.6  # of the steps
NETWORK = AutoencoderConfig(
    base_channels=32,
    channel_multipliers=(2, 2, 4),
    num_res_blocks=1,
    attention_resolutions=(),
    resolution=SIZE,
    z_channels=DIM,
)
DDCONFIG = {
    "double_z": False,
    "z_channels": DIM,
    "resolution": SIZE,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [2, 2, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def same(steps: int) -> TokenizerTraining:
    """What taming's run is told, in this library's words."""
    adam = OptimConfig(lr=LR, betas=BETAS)
    return TokenizerTraining(
        model=TokenizerConfig(
            autoencoder=NETWORK, quantizer=VQConfig(codebook_size=CODES, dim=DIM)
        ),
        discriminator=PatchGANConfig(base_channels=32, num_layers=2),
        loss=LossConfig(disc_start=round(GAN_AFTER * steps)),
        optim=adam,
        disc_optim=adam,
        ema_decay=0.0,
        data=DataConfig(image_size=SIZE, batch_size=BATCH),
        run=RunConfig(steps=steps, seed=SEED),
    )


def best(steps: int) -> TokenizerTraining:
    """The recipe that did best here, with as many codes."""
    base = same(steps)
    quantizer = VQConfig(codebook_size=CODES, dim=DIM, k_means=5, revive_after=50, rotation=True)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, quantizer=quantizer),
        loss=dataclasses.replace(
            base.loss, adversarial_weight=0.2, disc_warmup=round(0.05 * steps)
        ),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), warmup_steps=50, schedule="cosine"),
        ema_decay=0.99,
    )


def photographs(folder: Path | None) -> list[np.ndarray]:
    """The photographs in the order of their names, the smaller side of `SIDE` pixels."""
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            fetch = ["npm", "pack", "--silent", "tabler-ui@0.0.34"]
            subprocess.run(fetch, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(Path(scratch) / "tabler-ui-0.0.34.tgz") as package:
                package.extractall(scratch, filter="data")
            folder = Path(scratch) / "package" / "dist" / "demo" / "photos"
        files = sorted(folder.glob("*-1500.jpg"))
        if len(files) != 50:
            sys.exit(f"{folder}: {len(files)} photographs called *-1500.jpg, not 50")
        return [resize_smallest_side(read_image(file), SIDE) for file in files]


class Photographs:
    """A training source of pictures of any size, of which crops are taken at full size."""

    def __init__(self, pictures: list[np.ndarray]):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pictures[index], "label": np.int32(0)}

    def read(self, index: int) -> dict[str, Any]:
        return self[index]


def batches(pictures: list[np.ndarray], config: TokenizerTraining) -> Iterator[dict]:
    """The training data of a run: the first `n` of a longer run's are those of a shorter one."""
    augment = image_augment(dataclasses.replace(config.data, resize=SIDE))
    return train_batches(
        Photographs(pictures), config.data, seed=SEED, steps=config.run.steps, augment=augment
    )


def crops(pictures: list[np.ndarray]) -> np.ndarray:
    """All squares of a grid over each picture, uint8."""
    return np.stack(
        [
            crop(picture, top, left, SIZE)
            for picture in pictures
            for top in range(0, picture.shape[0] - SIZE + 1, SIZE)
            for left in range(0, picture.shape[1] - SIZE + 1, SIZE)
        ]
    )


class Trainer(Protocol):
    """One of the two implementations, in the middle of a run."""

    def step(self, images: np.ndarray) -> None: ...
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 there and back."""
        ...


class Taming:
    """taming's training step, as its Lightning module makes it of a batch.

    LPIPS is kept in evaluation mode, without its dropout, which Lightning would turn on.
    """

    def __init__(self, config: TokenizerTraining):
        torch = import_torch()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as XLA has them
        torch.manual_seed(SEED)
        self.torch = torch
        self.model = taming_vqmodel(
            DDCONFIG,
            n_embed=CODES,
            embed_dim=DIM,
            disc_start=config.loss.disc_start,
            disc_weight=0.8,
            disc_ndf=32,
            disc_num_layers=2,
            codebook_weight=1.0,
        ).train()
        self.model.loss.perceptual_loss.eval()
        judge = list(self.model.loss.discriminator.parameters())
        others = {id(p) for p in self.model.loss.parameters()}
        self.players = [[p for p in self.model.parameters() if id(p) not in others], judge]
        self.optimizers = [torch.optim.Adam(p, lr=LR, betas=BETAS) for p in self.players]
        self.steps = 0

    def _nchw(self, images: np.ndarray) -> Any:
        scaled = np.asarray(to_float(images)).transpose(0, 3, 1, 2)
        return self.torch.from_numpy(np.ascontiguousarray(scaled))

    def step(self, images: np.ndarray) -> None:
        x = self._nchw(images)
        for index, optimizer in enumerate(self.optimizers):
            self.model.requires_grad_(False)
            for parameter in self.players[index]:
                parameter.requires_grad_(True)
            reconstruction, codebook_loss = self.model(x)
            last = self.model.get_last_layer()
            loss, _ = self.model.loss(
                codebook_loss, x, reconstruction, index, self.steps, last_layer=last
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.steps += 1

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return to_uint8(self.model(self._nchw(images))[0].numpy().transpose(0, 2, 3, 1))

    def ids(self, images: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self.model.encode(self._nchw(images))[2][2].numpy()


class Ours:
    """The same with this library."""

    def __init__(self, config: TokenizerTraining):
        self.stage, init = setup(config)
        self.state = jax.jit(init)()
        self.key = jax.random.key(SEED)
        one = functools.partial(step, self.stage)
        self.one = jax.jit(one, donate_argnums=0)
        self.perceptual = Perceptual(lpips=load_lpips("vgg16"))

    def step(self, images: np.ndarray) -> None:
        self.state, _ = self.one(self.state, {"image": images}, self.key, self.perceptual)
        jax.block_until_ready(self.state.step)

    def tokenizer(self) -> Any:
        return nnx.merge(self.stage.tokenizer, self.state.ema, self.state.codebook_stats)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        return to_uint8(self.tokenizer()(to_float(images)).reconstruction)

    def ids(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.tokenizer().encode(to_float(images)))


RUNS: dict[str, tuple[Callable[[TokenizerTraining], Any], Callable[[int], TokenizerTraining]]] = {
    "taming": (Taming, same),
    "same": (Ours, same),
    "best": (Ours, best),
}


def pace(pictures: list[np.ndarray], rounds: int = 5, block: int = 6) -> dict[str, list[float]]:
    """Median seconds a step of each run, before and after the discriminator begins; in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for start in (1_000_000, 0):
        trainers = {}
        for name, (trainer, config) in RUNS.items():
            begun = config(100)
            loss = dataclasses.replace(begun.loss, disc_start=start, disc_warmup=0)
            trainers[name] = trainer(dataclasses.replace(begun, loss=loss))
        data = [batch["image"] for batch in batches(pictures, same(block + 2))]
        times: dict[str, list[float]] = {name: [] for name in RUNS}
        for trainer in trainers.values():
            for images in data[:2]:
                trainer.step(images)
        for _ in range(rounds):
            for name, trainer in trainers.items():
                begin = time.perf_counter()
                for images in data[2:]:
                    trainer.step(images)
                times[name].append((time.perf_counter() - begin) / block)
        for name in RUNS:
            seconds[name].append(statistics.median(times[name]))
    return seconds


def seconds_of(config: TokenizerTraining, pace: list[float], steps: int) -> float:
    """Predicted time of a run's first steps: what `pace` says, before the discriminator and after.

    Times that are measured in turns bear other work on the machine, which those of a run do not.
    """
    without = min(config.loss.disc_start - config.loss.disc_warmup, steps)
    return without * pace[0] + (steps - without) * pace[1]


def steps_within(seconds: float, pace: list[float]) -> int:
    """The largest number of steps of `best` that fits."""
    steps = 1
    while seconds_of(best(steps + 1), pace, steps + 1) <= seconds:
        steps += 1
    return steps


def measure(trainer: Any, held_out: np.ndarray) -> dict[str, float]:
    """Means over held-out crops, and the share of codes that any of them uses."""
    lpips = load_lpips("vgg16")
    totals = {"psnr": 0.0, "ssim": 0.0, "lpips": 0.0}
    codes: set[int] = set()
    for at in range(0, len(held_out), 24):
        images = held_out[at : at + 24]
        x, y = to_float(images), to_float(trainer.reconstruct(images))
        values = {"psnr": psnr(x, y), "ssim": ssim(x, y), "lpips": lpips(x, y)}
        for name, value in values.items():
            totals[name] += float(np.asarray(value).sum())
        codes |= set(trainer.ids(images).ravel().tolist())
    means = {name: total / len(held_out) for name, total in totals.items()}
    return means | {"usage": len(codes) / CODES}


def run(
    name: str, steps: int, train: list[np.ndarray], held_out: np.ndarray, every: int, out: Path
) -> dict[str, Any]:
    """Trains one of `RUNS`; its curve. Seconds are those that the steps took."""
    make, config_of = RUNS[name]
    config = config_of(steps)
    trainer = make(config)
    curve, seconds, begin = [], 0.0, time.perf_counter()
    for count, batch in enumerate(batches(train, config), 1):
        trainer.step(batch["image"])
        if count == 1:  # which compiles
            begin = time.perf_counter()
        if count % every == 0 or count == steps:
            seconds += time.perf_counter() - begin
            curve.append({"step": count, "seconds": seconds} | measure(trainer, held_out))
            print(name, json.dumps(curve[-1]), flush=True)
            begin = time.perf_counter()
    shown = held_out[:: len(held_out) // 16][:16]
    save_png(inputs_over_outputs(shown, trainer.reconstruct(shown)), out / f"{name}.png")
    return {"steps": steps, "curve": curve}


def remembered(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, made first where there is none."""
    if not path.exists():
        made = json.dumps(make())
        path.write_text(made + "\n")
    return json.loads(path.read_text())


def draw(results: dict[str, Any], speeds: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 3), ("psnr", "ssim", "lpips"), strict=True):
        for name, result in results.items():
            curve, config = result["curve"], RUNS[name][1](result["steps"])
            minutes = [seconds_of(config, speeds[name], x["step"]) / 60 for x in curve]
            axes.plot(minutes, [x[metric] for x in curve], "o-", ms=3, label=name)
        axes.set_title(f"held-out {metric.upper()}")
        axes.set_xlabel("minutes of training steps")
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--photos", type=Path, help="folder that has the fifty photographs")
    parser.add_argument("--steps", type=int, default=1000, help="of taming's run")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = photographs(options.photos)
    train = [p for i, p in enumerate(pictures) if i % 5 != 4]
    held_out = crops([p for i, p in enumerate(pictures) if i % 5 == 4])
    speeds = remembered(options.out / "pace.json", lambda: pace(train))
    print(f"seconds a step, without and with the discriminator: {json.dumps(speeds)}", flush=True)
    budget = seconds_of(same(options.steps), speeds["taming"], options.steps)
    lengths = {"best": steps_within(budget, speeds["best"])}
    results = {}
    for name in options.runs:
        steps = lengths.get(name, options.steps)
        results[name] = remembered(
            options.out / f"{name}.json",
            functools.partial(run, name, steps, train, held_out, 200, options.out),
        )
    print("run      steps  minutes   PSNR   SSIM   LPIPS  codes in use")
    for name, result in results.items():
        steps, x = result["steps"], result["curve"][-1]
        minutes = seconds_of(RUNS[name][1](steps), speeds[name], steps) / 60
        print(
            f"{name:8} {steps:5}  {minutes:7.1f}  {x['psnr']:5.2f}  {x['ssim']:.3f}"
            f"  {x['lpips']:.4f}  {x['usage']:.0%}"
        )
    draw(results, speeds, options.out / "photographs.png")


if __name__ == "__main__":
    main()
