"""Resizes, crops and flips of NumPy pictures `[h, w, c]` with any number of channels.

uint8 are images, uint16 are labels, of which nothing lies in between, and float32 are values in
[-1, 1], such as depths.
"""

import numpy as np
from jaxtyping import Float32, Real, UInt8, UInt16
from PIL import Image

Picture = UInt8[np.ndarray, "h w c"] | UInt16[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]
Square = (
    UInt8[np.ndarray, "{size} {size} c"]
    | UInt16[np.ndarray, "{size} {size} c"]
    | Float32[np.ndarray, "{size} {size} c"]
)


def resize_smallest_side(image: Picture, size: int) -> Real[np.ndarray, "h2 w2 c"]:
    """Makes the smaller side `size` pixels and keeps the proportions.

    Antialiased and bicubic, but labels are those of the nearest pixels. An image whose smaller side
    is below `size` is enlarged.
    """
    height, width = image.shape[:2]
    scale = size / min(height, width)
    if scale == 1.0:
        return image
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    if image.dtype == np.uint16:
        rows, columns = _nearest(height, shape[1]), _nearest(width, shape[0])
        return image[rows[:, None], columns[None, :]]
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
    channels = [
        Image.fromarray(image[..., c]).resize(shape, Image.Resampling.BICUBIC)
        for c in range(image.shape[2])
    ]
    resized = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    # Bicubic weights are partly negative, so float32 values overshoot.
    return resized if image.dtype == np.uint8 else np.clip(resized, -1.0, 1.0)


def _nearest(length: int, size: int) -> np.ndarray:
    """For each of `size` pixels, the one of `length` in which its middle lies."""
    return (2 * np.arange(size) + 1) * length // (2 * size)


def crop(image: Picture, top: int, left: int, size: int) -> Square:
    """A square of `size` pixels whose upper left corner is at (top, left)."""
    return image[top : top + size, left : left + size]


def center_crop(image: Picture, size: int) -> Square:
    """The square of `size` pixels in the middle. The image must be at least that large."""
    height, width = image.shape[:2]
    return crop(image, (height - size) // 2, (width - size) // 2, size)


def center_square(image: Picture, size: int) -> Square:
    """The largest square in the middle of an image, resized to `size` pixels."""
    return center_crop(resize_smallest_side(image, size), size)


def random_crop(image: Picture, size: int, rng: np.random.Generator) -> Square:
    """A square of `size` pixels, every place equally likely. The image must be that large."""
    height, width = image.shape[:2]
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    return crop(image, top, left, size)


def ten_crop(image: Picture, size: int) -> list[Square]:
    """The four corners and the centre, then the same five flipped."""
    bottom, right = image.shape[0] - size, image.shape[1] - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    crops = [crop(image, top, left, size) for top, left in corners] + [center_crop(image, size)]
    return crops + [flip(view) for view in crops]


def flip(image: Picture) -> Picture:
    """Left becomes right."""
    return image[:, ::-1]
