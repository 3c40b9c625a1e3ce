"""The embedded emoji: Noto Emoji at 64x64 on white, in nine classes. See README.md beside this.

`scripts/make_emoji.py` makes the files: `index.json` with the name, class, split and base of every
picture, and one WebP sheet a class whose tiles stand row by row in the order of the index.
"""

import functools
import io
import json
from importlib import resources

import numpy as np
from jaxtyping import UInt8
from PIL import Image

SIZE = 64


@functools.cache
def load() -> tuple[UInt8[np.ndarray, "n 64 64 3"], list[dict[str, str]]]:
    """All pictures and their index entries (`name`, `class`, `base`, `split`), decoded once."""
    files = resources.files(__package__)
    index = json.loads((files / "index.json").read_text())
    classes = [entry["class"] for entry in index]
    images = [
        _tiles((files / f"{name}.webp").read_bytes(), classes.count(name))
        for name in dict.fromkeys(classes)
    ]
    return np.concatenate(images), index


def _tiles(sheet: bytes, count: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    rows, columns = pixels.shape[0] // SIZE, pixels.shape[1] // SIZE
    grid = pixels.reshape(rows, SIZE, columns, SIZE, 3).swapaxes(1, 2)
    return grid.reshape(rows * columns, SIZE, SIZE, 3)[:count]
