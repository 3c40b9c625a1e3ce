"""The smallest runs of both stages, by command line; and, run as a script, one that ends itself.

`python tiny.py KIND STEP COMMAND ...` is `vqgan COMMAND ...` in a process that sends itself the
signal KIND right after it has logged step STEP ("NONE 0" for a run that is left alone).
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

_TOKENIZER = """
--model.autoencoder.base-channels 8 --model.autoencoder.norm-groups 4
--model.autoencoder.channel-multipliers 1 2 --model.autoencoder.attention-resolutions 8
--model.autoencoder.resolution 16 --model.autoencoder.z-channels 8
--model.autoencoder.dropout 0.1
--model.quantizer.codebook-size 16 --model.quantizer.dim 4 --model.quantizer.revive-after 2
--discriminator.base-channels 4 --discriminator.num-layers 1
--loss.perceptual-weight 0 --loss.disc-start 4 --loss.disc-warmup 1
--optim.schedule constant --optim.warmup-steps 3
--data.image-size 16 --data.batch-size 8 --data.holdout 0.3 --data.threads 2
--run.log-every 1 --run.eval-every 5 --run.image-every 0 --run.save-every 2
"""
_PRIOR = """
--model.depth 1 --model.heads 2 --model.width 16 --pkeep 0.9
--optim.schedule constant --optim.warmup-steps 3
--data.batch-size 8 --data.holdout 0.3 --data.threads 2
--run.log-every 1 --run.eval-every 5 --run.image-every 0 --run.save-every 2
"""


def images(folder: Path, count: int = 12, size: int = 20) -> Path:
    """A folder of PNG files in two classes: coloured gradients with a disc."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((size, size)) / size
    for i in range(count):
        a, b, c, d = rng.uniform(0, 255, (4, 3))
        picture = rows[..., None] * a + columns[..., None] * b
        disc = np.hypot(rows - rng.uniform(), columns - rng.uniform()) < 0.3
        picture = np.where(disc[..., None], c if i % 2 else d, picture)
        path = folder / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path)
    return folder


def tokenizer_command(data: Path, out: Path, *more: str) -> list[str]:
    """Stage 1 with everything on that a step can do, perceptual loss excepted."""
    return [
        *("train-tokenizer", "small", "--data", str(data), "--out", str(out)),
        *_TOKENIZER.split(),
        *more,
    ]


def prior_command(tokenizer: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Stage 2, class-conditional, with every kind of corruption on."""
    return [
        *("train-prior", "small", "--tokenizer", str(tokenizer)),
        *("--data", str(data), "--out", str(out)),
        *_PRIOR.split(),
        *more,
    ]


def _send_after(number: int, last: int) -> None:
    """Makes this process send itself a signal once a step is in metrics.jsonl."""
    from vqgan.train.metrics import RunLog

    scalars = RunLog.scalars

    def scalars_and_signal(self, step, kind, values, note=""):
        scalars(self, step, kind, values, note)
        if (step, kind) == (last, "train"):
            os.kill(os.getpid(), number)

    RunLog.scalars = scalars_and_signal


if __name__ == "__main__":
    kind, step, *command = sys.argv[1:]
    if kind != "NONE":
        _send_after(getattr(signal, kind), int(step))
    import vqgan.train.tokenizer
    from vqgan.cli import main

    # The networks that judge held-out images are of no use to these tests, and slow.
    vqgan.train.tokenizer.load_lpips = lambda name: None
    main(command)
