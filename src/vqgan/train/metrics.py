"""Where the numbers of a run go: metrics.jsonl, TensorBoard, pictures, and the terminal."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from vqgan import atomic
from vqgan.pictures import save_png


class RunLog:
    """The log of one run directory; silent in all processes but the first.

    A resumed run first drops what was logged after the step that it starts from.
    """

    def __init__(self, out: Path, *, start: int, steps: int, title: str, active: bool = True):
        self._out, self._active, self._steps, self._title = out, active, steps, title
        self._progress: Progress | None = None
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        _truncate(out / "metrics.jsonl", start)
        self._jsonl = (out / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(out), purge_step=start + 1)
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._progress.add_task(title, total=steps, completed=start)
            self._progress.start()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._active:
            return
        if self._progress:
            self._progress.stop()
        self._jsonl.close()
        self._board.close()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def line(self, text: str) -> None:
        """One plain line for people."""
        if self._progress:
            self._progress.console.print(text, highlight=False)
        elif self._active:
            print(text, flush=True)

    def scalars(self, step: int, kind: str, values: Mapping[str, float], note: str = "") -> None:
        """Writes numbers everywhere; `kind` is "train" or "eval"."""
        if not self._active:
            return
        record = {"step": step, "kind": kind, **values}
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        label = f"{self._title} {step}/{self._steps}"
        self.line(f"{label}  {shown}  {note}" if kind == "train" else f"{label}  {kind}: {shown}")

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A uint8 `[h, w, c]` picture into `images/` and TensorBoard."""
        if not self._active:
            return
        save_png(picture, self._out / "images" / f"step_{step:07d}_{name}.png")
        self._board.add_image(name, picture, step, dataformats="HWC")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _truncate(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    with atomic.new_file(path) as new:
        new.write_text("".join(json.dumps(record) + "\n" for record in kept))
