"""Label maps and depth maps from picture files, for tokenizers of these.

Like images they are NumPy arrays `[h, w, c]`; their type says what they are: uint16 are labels,
float32 are depths in [-1, 1], and uint8 are the bytes of images.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt16
from PIL import Image, ImageOps

from vqgan.data.sources import read_image
from vqgan.data.transforms import Picture
from vqgan.errors import InputError
from vqgan.tokenizer.model import Content

VOID = np.uint16(65535)
"""The label of pixels of no class."""


def reader(content: Content, classes: int) -> Callable[[Path], Picture]:
    """What reads a file as a picture of this content; `classes` counts those of label maps."""
    match content:
        case "labels":
            return functools.partial(read_labels, classes=classes)
        case "depth":
            return read_depth
        case "images":
            return read_image


def read_labels(path: Path, classes: int) -> UInt16[np.ndarray, "h w 1"]:
    """A picture whose values, of 1, 8 or 16 bits or numbers in a palette, are classes.

    The values 255 and 65535, where they count no class, mark pixels of no class and become `VOID`.

    Raises:
      InputError: colours instead of numbers, a format that changes values, or a value that is no
        class. A damaged file raises nearly anything.
    """
    with Image.open(path) as picture:
        if picture.format == "JPEG":
            raise InputError(f"{path}: JPEG changes labels; save label maps as PNG")
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
            raise InputError(
                f"{path}: a picture in {picture.mode}; a label map has one channel, whose values "
                "are the numbers of classes"
            )
        values = np.asarray(ImageOps.exif_transpose(picture)).astype(np.int64)
    no_class = (values < 0) | (values >= classes)
    void = no_class & np.isin(values, (255, 65535))
    if (wrong := values[no_class & ~void]).size:
        raise InputError(
            f"{path}: value {wrong.max()}, but classes are 0 to {classes - 1}; mark pixels of no "
            "class with 255, or raise model.autoencoder.in_channels and out_channels"
        )
    return np.where(void, VOID, values).astype(np.uint16)[..., None]


def read_depth(path: Path) -> Float32[np.ndarray, "h w 1"]:
    """A picture of one channel, of any depth of bits, from its own minimum, -1, to its maximum, 1.

    So are depths normalised in taming-transformers; a picture that is flat becomes -1. Its files of
    ImageNet's depths, float32 values as the four bytes of RGBA, are read as well.

    Raises:
      InputError: colours, or values that are not finite. A damaged file raises nearly anything.
    """
    with Image.open(path) as picture:
        turned = ImageOps.exif_transpose(picture)
        if turned.mode == "RGBA":
            values = np.ascontiguousarray(turned).view("<f4")[..., 0]
        elif turned.mode in ("L", "F") or turned.mode.startswith("I"):
            values = np.asarray(turned)
        else:
            raise InputError(f"{path}: a picture in {turned.mode}; a depth map has one channel")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: depths that are not finite; a depth map has one channel")
    low, high = values.min(), values.max()
    unit = (values - low) / max(1e-8, high - low)
    return (2.0 * unit - 1.0).astype(np.float32)[..., None]
