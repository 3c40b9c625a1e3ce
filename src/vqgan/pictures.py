"""Pictures for models and for people: ranges, colours of labels, grids, and a run's curves.

Off the device a picture's type says what it is: uint8 are images, uint16 labels, and float32 depths
in [-1, 1] (vqgan/data/maps.py reads the latter two).
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real, UInt8
from PIL import Image

from vqgan import atomic
from vqgan.data.maps import VOID
from vqgan.tokenizer.model import Content


def to_float(images: UInt8[Array | np.ndarray, "b h w c"]) -> Float[Array, "b h w c"]:
    """Bytes to [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: np.ndarray | Array) -> np.ndarray:
    """[-1, 1] to bytes, clipped and rounded."""
    scaled = (np.asarray(images, np.float32) + 1.0) * 127.5
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def to_model(pictures: Real[Array | np.ndarray, "b h w c"], channels: int) -> Array:
    """What a tokenizer of so many channels takes, float32 `[b, h, w, channels]`.

    Bytes in [-1, 1], depths as they are, and labels one-hot: all zeros where a label is no class.
    """
    if pictures.dtype == np.uint16:
        return jax.nn.one_hot(jnp.asarray(pictures)[..., 0], channels)
    return to_float(pictures) if pictures.dtype == np.uint8 else jnp.asarray(pictures, jnp.float32)


def from_model(outputs: np.ndarray | Array, content: Content) -> np.ndarray:
    """Pictures out of what a tokenizer of this content gives: the inverse of `to_model`.

    A label is the class of the largest logit.
    """
    outputs = np.asarray(outputs)
    match content:
        case "labels":
            return outputs.argmax(-1, keepdims=True).astype(np.uint16)
        case "depth":
            return np.clip(outputs, -1.0, 1.0)
        case "images":
            return to_uint8(outputs)


def shown(pictures: Real[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w _"]:
    """Pictures as people see them: labels in the colours of `palette`, and white where there is no
    class; depths in grey, large values bright."""
    if pictures.dtype == np.uint16:
        colours = palette()[pictures[..., 0] % _COLOURS]
        return np.where(pictures == VOID, np.uint8(255), colours)
    return pictures if pictures.dtype == np.uint8 else to_uint8(pictures)


_COLOURS = 1024


@functools.cache
def palette() -> UInt8[np.ndarray, "k 3"]:
    """Colours of the first classes, always the same: black for class 0, then each time the colour
    that is farthest from all before and from white, which no class has."""
    levels = np.linspace(0, 255, 12).round()
    lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    chosen = [0]
    distance = np.minimum(*(np.square(lattice - lattice[end]).sum(1) for end in (0, -1)))
    while len(chosen) < _COLOURS:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(lattice - lattice[chosen[-1]]).sum(1))
    return lattice[chosen].astype(np.uint8)


def grid(images: np.ndarray, columns: int, *, gap: int = 2, scale: int = 1) -> np.ndarray:
    """uint8 images `[n, h, w, c]` as one, row by row on white, each enlarged `scale` times."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet


def inputs_over_outputs(inputs: np.ndarray, outputs: np.ndarray, columns: int = 8) -> np.ndarray:
    """Alternating rows of uint8 images: what went in, and below it what came out."""
    n, h, w, c = inputs.shape
    columns = min(columns, n)
    n -= n % columns
    rows = [x[:n].reshape(-1, columns, h, w, c) for x in (inputs, outputs)]
    return grid(np.stack(rows, axis=1).reshape(-1, h, w, c), columns)


def save_png(picture: np.ndarray, path: Path | str) -> None:
    """A uint8 `[h, w, c]` picture into a PNG file, whole or not at all."""
    with atomic.new_file(path) as new:
        Image.fromarray(picture.squeeze()).save(new, format="PNG")


def save_curves(records: Mapping[str, Sequence[Mapping]], path: Path | str) -> None:
    """Every number of one or more runs' metrics over the step: training lines, held-out dots.

    Args:
      records: a list of metrics.jsonl records for each run by its name.
    """
    names = {
        (run, name)
        for run, lines in records.items()
        for line in lines
        for name in line
        if name not in ("step", "kind")
    }
    ordered = sorted(names)
    columns = 4
    rows = max(-(-len(ordered) // columns), 1)
    with _figure(4 * columns, 2.4 * rows, path) as figure:
        for i, (run, name) in enumerate(ordered):
            axes = figure.add_subplot(rows, columns, i + 1)
            for kind, style in (("train", "-"), ("eval", "o")):
                lines = [x for x in records[run] if x["kind"] == kind and name in x]
                axes.plot([x["step"] for x in lines], [x[name] for x in lines], style, ms=4)
            axes.set_title(f"{run}: {name}", fontsize=9)
            axes.tick_params(labelsize=7)


def save_codebook_usage(counts: np.ndarray, path: Path | str) -> None:
    """How often each code is used, most used first, on a logarithmic scale."""
    ordered = np.sort(counts)[::-1]
    with _figure(8, 3, path) as figure:
        axes = figure.add_subplot()
        axes.bar(np.arange(len(ordered)), np.maximum(ordered, 0.1), width=1.0)
        axes.set_yscale("log")
        axes.set_xlabel("codes, most used first")
        axes.set_ylabel("times used")
        used = int((ordered > 0).sum())
        axes.set_title(f"{used} of {len(ordered)} codes in use on held-out images")


class _figure:
    """A matplotlib figure that is written to `path` at the end of the block."""

    def __init__(self, width: float, height: float, path: Path | str):
        from matplotlib.figure import Figure  # slow to import, and only runs that draw need it

        self._figure = Figure(figsize=(width, height), layout="constrained")
        self._path = path

    def __enter__(self):
        return self._figure

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            with atomic.new_file(self._path) as new:
                self._figure.savefig(new, format="png", dpi=100)
