"""DiffAugment: what the discriminator is shown is changed at random, differentiably.

Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training" (arXiv:2006.10738).
Real and generated images are drawn for separately, from the same distribution, and the generator's
gradient goes back through the change. For sets of a few thousand images or fewer.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Augmentation = Literal["colour", "translation", "cutout"]
Images = Float[Array, "b h w c"]

_SHIFT = 1 / 8  # largest translation, of a side
_HOLE = 1 / 2  # side of what is cut out, of a side


def diff_augment(images: Images, policy: tuple[Augmentation, ...], key: Key[Array, ""]) -> Images:
    """Images in [-1, 1] under each change of `policy` in turn, every image drawn for by itself."""
    for name, change in _CHANGES.items():
        if name in policy:
            images = change(images, jax.random.fold_in(key, list(_CHANGES).index(name)))
    return images


def _colour(x: Images, key: Key[Array, ""]) -> Images:
    """Brightness by -1/2 to 1/2, then saturation times 0 to 2, then contrast times 1/2 to 3/2."""
    draws = jax.random.uniform(key, (3, len(x)))
    brightness, saturation, contrast = draws[:, :, None, None, None]
    x = x + (brightness - 0.5)
    grey = x.mean(3, keepdims=True)
    x = (x - grey) * (2 * saturation) + grey
    middle = x.mean((1, 2, 3), keepdims=True)
    return (x - middle) * (contrast + 0.5) + middle


def _translation(x: Images, key: Key[Array, ""]) -> Images:
    """Shifted by up to an eighth of each side; what comes in is zero."""
    _, h, w, c = x.shape
    down, right = (int(side * _SHIFT + 0.5) for side in (h, w))
    keys = jax.random.split(key)
    rows = jax.random.randint(keys[0], (len(x),), 0, 2 * down + 1)
    columns = jax.random.randint(keys[1], (len(x),), 0, 2 * right + 1)
    padded = jnp.pad(x, ((0, 0), (down, down), (right, right), (0, 0)))

    def window(image: Array, row: Array, column: Array) -> Array:
        return jax.lax.dynamic_slice(image, (row, column, jnp.zeros_like(row)), (h, w, c))

    return jax.vmap(window)(padded, rows, columns)


def _cutout(x: Images, key: Key[Array, ""]) -> Images:
    """A rectangle of half of each side, around a random pixel, becomes zero."""
    _, h, w, _ = x.shape
    keys = jax.random.split(key)
    hole = jnp.ones((len(x), 1, 1), bool)
    for axis, side in ((1, h), (2, w)):
        size = int(side * _HOLE + 0.5)
        middle = jax.random.randint(keys[axis - 1], (len(x), 1), 0, side + (1 - size % 2))
        offset = jnp.arange(side)[None] - (middle - size // 2)
        hole = hole & jnp.expand_dims((offset >= 0) & (offset < size), 3 - axis)
    return jnp.where(hole[..., None], 0.0, x)


_CHANGES = {"colour": _colour, "translation": _translation, "cutout": _cutout}
