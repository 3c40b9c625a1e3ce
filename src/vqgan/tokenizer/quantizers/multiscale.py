"""Multi-scale residual quantisation, of VAR (Tian et al. 2024, arXiv:2404.02905).

    f_0 = 0        ids_i = argmin_k |area_i(z - f_i) - e_k|²
    h_i = cubic(e[ids_i])        f_(i+1) = f_i + (1 - r) h_i + r phi_i(h_i)        z_q = f_n
    loss = the mean over i >= 1 of |f_i - stop_gradient(z)|² + beta |stop_gradient(f_i) - z|²

`area_i` averages what is left over down to the grid of scale i, `cubic` interpolates its codes back
to the grid of the latents, and phi_i, a 3x3 convolution, smooths what comes of it. Latents `[b, h,
w, d]`, one codebook `[k, d]` for all scales. The gradient of `z_q` goes straight through; codebook
and convolutions learn from the loss alone.

Every scale has a grid of its own, so ids are not a grid but a sequence `[b, l]`: scale by scale
from coarse to fine, each row by row, l the sum over the grids (680 by default, for the 256
positions of a 16x16 grid). It is the order in which a prior of next scales draws them, and ids that
end with a scale are ids of a coarser picture: `codes`, and with it `Tokenizer.decode`, takes them
up to the end of any scale, which `MultiScaleConfig.ends` lists. Ids do not say of which grids they
are. They are those of the config, and latents of another size are an InputError; published code
takes other scales at a call, which it was not trained for.

`area` is PyTorch's, adaptive average pooling, and `cubic` its bicubic kernel with a = -0.75 and
half-pixel centres (that of `jax.image.resize` has a = -0.5): both are small constant matrices.
The price is 2 to 3 times as many ids as positions, searched and drawn, and that images have one
size.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vqgan.errors import InputError
from vqgan.nn import conv
from vqgan.tokenizer.quantizers.base import Quantizer, QuantizerOutput, straight_through, unit
from vqgan.tokenizer.quantizers.care import chosen
from vqgan.tokenizer.quantizers.chunked import nearest
from vqgan.tokenizer.quantizers.vq import VectorQuantizer, VQConfig

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig:
    """Residual quantizer over scales. The defaults are VAR's, for latents of 16x16."""

    kind: Literal["multiscale"] = "multiscale"
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Rows of each scale's grid, coarse to fine; the last is the grid of the latents."""
    columns: tuple[int, ...] = ()
    """Columns of each scale's grid; () has as many as rows."""
    codebook_size: int = 4096
    """Codes in the table that all scales share."""
    dim: int = 32
    beta: float = 0.25
    """Weight of the commitment term; that of the codebook has weight 1."""
    cosine: bool = False
    """Search by the angle between latent and code. Codes keep their lengths, unlike those of the
    vector quantizer's `normalize`."""
    phis: int = 4
    """Convolutions, each for the scales about one part of the way from first to last: 1 serves all
    of them, as many as there are scales one each, and 0 leaves them out."""
    phi_ratio: float = 0.5
    """Share of the convolution's output, r above."""
    init_from_data: bool = True
    """Start from what the first batch has to quantise, over all scales, not from U(-1/k, 1/k)."""
    k_means: int = 0
    """Lloyd iterations on the first batch, with such latents to start from; 0 takes these."""
    revive_after: int = 100
    """Batches that a code may go unused, at any scale, before it is moved; 0 never moves any."""
    chunk: int = 8192
    """Codes compared at once; more are searched in turns, for a memory of `bhw x chunk` floats."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of each scale; the last is the grid of the latents."""
        return tuple(zip(self.scales, self.columns or self.scales, strict=True))

    @property
    def ends(self) -> tuple[int, ...]:
        """How many ids there are up to the end of each scale; the last is all of them."""
        return tuple(itertools.accumulate(rows * columns for rows, columns in self.grids))

    def table(self) -> VQConfig:
        """The quantizer that holds the codes and looks after them."""
        return VQConfig(
            codebook_size=self.codebook_size,
            dim=self.dim,
            init_from_data=self.init_from_data,
            k_means=self.k_means,
            revive_after=self.revive_after,
            chunk=self.chunk,
        )

    def check(self) -> None:
        """Raises InputError where the fields contradict one another."""
        self.table().check()
        for name in ("scales", "columns"):
            sides = getattr(self, name)
            if list(sides) != sorted(sides) or any(side < 1 for side in sides):
                raise InputError(f"quantizer.{name} {sides}: must be from 1 on and never decrease")
        if not self.scales or len(self.columns) not in (0, len(self.scales)):
            raise InputError(
                f"quantizer.columns {self.columns}: must be as many as the scales {self.scales}, "
                "of which there is at least one, or none"
            )
        if not 0 <= self.phis <= len(self.scales):
            raise InputError(
                f"quantizer.phis {self.phis}: must be from 0 to the {len(self.scales)} scales"
            )
        if not 0 <= self.phi_ratio <= 1:
            raise InputError(f"quantizer.phi_ratio {self.phi_ratio}: must be from 0 to 1")

    def check_grid(self, rows: int, columns: int) -> None:
        """Raises InputError where latents are not of the grid of the last scale."""
        if (rows, columns) != self.grids[-1]:
            height, width = self.grids[-1]
            raise InputError(
                f"latents of {rows}x{columns}: quantizer.scales are for {height}x{width}, so give "
                "images of that size or other scales"
            )

    def phi_of(self, scale: int) -> int:
        """Which convolution a scale has: of centres spread over [0, 1], the nearest to its place.

        Four convolutions have their centres further out than any other number of them, as
        published.
        """
        n = self.phis
        margin = 1 / (3 * n if n == 4 else 2 * n)
        centres = np.linspace(margin, 1 - margin, n)
        return int(np.argmin(np.abs(centres - scale / max(len(self.scales) - 1, 1))))


class MultiScaleQuantizer(Quantizer):
    """Quantizer in stages of growing grids, each of what those before left over. The gradient of
    `z_q` goes straight through to the latents."""

    def __init__(self, config: MultiScaleConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.codebook_size = config.codebook_size
        self.table = VectorQuantizer(config.table(), rngs=rngs)
        self.phis = nnx.List(
            [conv(config.dim, config.dim, 3, rngs=rngs) for _ in range(config.phis)]
        )

    def __call__(
        self,
        z: Float[Array, "b h w d"],
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> QuantizerOutput:
        """As every quantizer. Raises InputError for latents of another grid than the last."""
        self.config.check_grid(*z.shape[1:3])
        rest = z = z.astype(jnp.float32)
        z_q, ids, commitment, codebook = jnp.zeros_like(z), [], [], []
        for i, grid in enumerate(self.config.grids):
            ids.append(self._nearest(area(jax.lax.stop_gradient(rest), grid)))
            part = self._part(i, self.table.codes(ids[-1]))
            rest, z_q = rest - part, z_q + part
            commitment.append(jnp.mean(jnp.square(jax.lax.stop_gradient(z_q) - z)))
            codebook.append(jnp.mean(jnp.square(z_q - jax.lax.stop_gradient(z))))
        return QuantizerOutput(
            z_q=straight_through(z, z_q),
            ids=jnp.concatenate([each.reshape(len(z), -1) for each in ids], axis=1),
            losses={
                "commitment": self.config.beta * jnp.mean(jnp.stack(commitment)),
                "codebook": jnp.mean(jnp.stack(codebook)),
            },
        )

    def codes(self, ids: Int[Array, "b l"]) -> Float[Array, "b h w d"]:
        """The sum over the scales of ids, which may end with any scale.

        Raises:
          InputError: ids are no sequence, or end within a scale.
        """
        z_q = jnp.zeros((len(ids), *self.config.grids[-1], self.config.dim))
        for i, each in enumerate(self._by_scale(ids)):
            z_q = z_q + self._part(i, self.table.codes(each))
        return z_q

    def maintain(
        self, z: Float[Array, "b h w d"], ids: Int[Array, "b l"], key: Key[Array, ""]
    ) -> None:
        z = jax.lax.stop_gradient(z.astype(jnp.float32))
        parts = list(self._by_scale(ids))
        seen = self._searched(z, lambda i, rows: self.table.codes(parts[i]))
        if self.config.init_from_data:
            seen = jax.lax.cond(
                self.table.batches_seen[...] == 0,
                lambda: self._searched(z, functools.partial(self._first_codes, key)),
                lambda: seen,
            )
        self.table.maintain(seen[:, None], ids[:, None], key)

    def _searched(
        self, z: Float[Array, "b h w d"], codes: Callable[[int, Array], Array]
    ) -> Float[Array, "b l d"]:
        """What all scales have to quantise, where `codes` of (scale, its latents) are theirs."""
        rest, seen = z, []
        for i, grid in enumerate(self.config.grids):
            rows = area(rest, grid)
            rest = rest - self._part(i, codes(i, rows))
            seen.append(rows.reshape(len(z), -1, self.config.dim))
        return jnp.concatenate(seen, axis=1)

    def _first_codes(
        self, key: Key[Array, ""], scale: int, rows: Float[Array, "b p q d"]
    ) -> Float[Array, "b p q d"]:
        """The nearest of some of the latents themselves.

        Before the first batch there are no codes of use. Had they no part in what is left over,
        all scales would start with codes as large as latents, too large for all but the first.
        """
        count = max(self.config.codebook_size // len(self.config.scales), 1)
        few = chosen(rows.reshape(-1, self.config.dim), count, jax.random.fold_in(key, scale))
        return few[nearest(rows, few, self.config.chunk)]

    def _by_scale(self, ids: Int[Array, "b l"]) -> Iterator[Int[Array, "b p q"]]:
        """The grid of ids of each scale, up to the one that ids end with."""
        ends = self.config.ends
        if ids.ndim != 2 or ids.shape[1] not in ends:
            raise InputError(
                f"ids of shape {ids.shape}: must be [b, l] of whole scales, with l one of "
                f"{', '.join(map(str, ends))}"
            )
        count = ends.index(ids.shape[1]) + 1
        parts = jnp.split(ids, ends[: count - 1], axis=1)
        for part, grid in zip(parts, self.config.grids, strict=False):
            yield part.reshape(len(ids), *grid)

    def _nearest(self, z: Float[Array, "b p q d"]) -> Int[Array, "b p q"]:
        table = self.table.codebook[...]
        if self.config.cosine:
            z, table = unit(z), unit(table)
        return nearest(z, table, self.config.chunk)

    def _part(self, scale: int, codes: Float[Array, "b p q d"]) -> Float[Array, "b h w d"]:
        """What the codes of a scale add to z_q."""
        config = self.config
        phi = self.phis[config.phi_of(scale)] if config.phis else None
        return _spread(codes, phi, config.grids[-1], config.phi_ratio)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _spread(
    codes: Float[Array, "b p q d"], phi: nnx.Conv | None, grid: Grid, ratio: float
) -> Float[Array, "b h w d"]:
    """Codes interpolated to a grid and, in part, convolved.

    Compiled as one and kept apart, so that it rounds alike within any program and by itself: the
    codes of ids are to equal z_q bit for bit.
    """
    h = cubic(jax.lax.optimization_barrier(codes), grid)
    if phi is not None:
        h = (1 - ratio) * h + ratio * phi(h)
    return jax.lax.optimization_barrier(h)


def area(x: Float[Array, "b h w d"], grid: Grid) -> Float[Array, "b p q d"]:
    """Means over the cells of a coarser grid: `interpolate(mode="area")` of PyTorch."""
    return _resized(x, [area_matrix(*sides) for sides in zip(x.shape[1:3], grid, strict=True)])


def cubic(x: Float[Array, "b p q d"], grid: Grid) -> Float[Array, "b h w d"]:
    """Interpolation to a finer grid: `interpolate(mode="bicubic")` of PyTorch."""
    return _resized(x, [cubic_matrix(*sides) for sides in zip(x.shape[1:3], grid, strict=True)])


def _resized(
    x: Float[Array, "b h w d"], matrices: list[Float[np.ndarray, "_ _"]]
) -> Float[Array, "b p q d"]:
    """One matrix along the rows and one along the columns; what keeps its length stays as it is.

    The latents come first in the products, so that how many there are does not change how each of
    them is summed: an image is to have the same codes alone and in a batch.
    """
    down, along = matrices
    precision = jax.lax.Precision.HIGHEST  # which the choice of a code needs
    if len(down) != x.shape[1]:
        x = jnp.einsum("bhwd,ph->bpwd", x, down, precision=precision)
    if len(along) != x.shape[2]:
        x = jnp.einsum("bpwd,qw->bpqd", x, along, precision=precision)
    return x


@functools.cache
def area_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "{outputs} {inputs}"]:
    """Adaptive average pooling: each output is the mean of all inputs that its cell touches."""
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        start, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:end] = 1 / (end - start)
    return matrix.astype(np.float32)


@functools.cache
def cubic_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "{outputs} {inputs}"]:
    """Cubic convolution (Keys 1981) with a = -0.75; beyond its ends the input goes on as there.

    Output i lies at `(i + 1/2) inputs / outputs - 1/2` and is made of the four inputs around it.
    """
    a, matrix = -0.75, np.zeros((outputs, inputs))
    for i in range(outputs):
        place = (i + 0.5) * inputs / outputs - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x = abs(place - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(tap, 0), inputs - 1)] += near if x <= 1 else far
    return matrix.astype(np.float32)
