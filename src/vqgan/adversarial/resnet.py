"""ResNet, a classifier of images, with frozen weights: what VQGAN+'s perceptual term looks through.

He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), in the form that
is called v1.5: a bottleneck block strides in its 3x3 convolution. The default is ResNet-50, the
network of VQGAN+ (arXiv:2409.16211).

    images [b, h, w, 3] in [-1, 1]  ->  resized  ->  standardised by ImageNet's pixels
    -> 7x7 of stride 2, 3x3 maxima of stride 2  ->  stages, each but the first halves the sides
    -> mean over positions  ->  linear  ->  logits

Every convolution is followed by batch norm, which here is that of inference: its running statistics
are weights like the others.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vqgan.adversarial.lpips import Frozen
from vqgan.errors import InputError
from vqgan.nn import conv_general_dilated
from vqgan.serialization import Pretrained

# Of ImageNet's pixels in [0, 1].
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Shape of the network. The default is ResNet-50; (3, 4, 23, 3) is 101, (3, 8, 36, 3) 152."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks of each stage."""
    bottleneck: bool = True
    """Blocks of 1x1, 3x3 and 1x1, else of two 3x3: ResNet-18 has (2, 2, 2, 2) of those, ResNet-34
    (3, 4, 6, 3)."""
    width: int = 64
    """Channels within the blocks of the first stage; they double a stage, and are four times as
    many between bottleneck blocks."""
    classes: int = 1000
    resize: int = 224
    """Side to which images are resized, bilinear and without aliasing, whatever their shape, as
    VQGAN+ does; 0 takes them as they are."""


class _ConvNorm(nnx.Module):
    """A convolution without bias, then batch norm by its running statistics."""

    epsilon = 1e-5

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1):
        self.kernel = Frozen(jnp.zeros((size, size, inputs, outputs)))
        self.scale = Frozen(jnp.ones(outputs))
        self.bias = Frozen(jnp.zeros(outputs))
        self.mean = Frozen(jnp.zeros(outputs))
        self.var = Frozen(jnp.ones(outputs))
        self.padding = size // 2
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        # The norm is linear: its gain goes into the kernel, which is smaller than the map.
        gain = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        y = conv_general_dilated(
            x,
            self.kernel[...] * gain[None, None, None],
            window_strides=(self.stride, self.stride),
            padding=((self.padding, self.padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + (self.bias[...] - self.mean[...] * gain)[None, None, None]


class _Block(nnx.Module):
    """relu(x + convolutions of x); a 1x1 convolution on x where its shape changes."""

    def __init__(self, inputs: int, outputs: int, width: int, *, stride: int, bottleneck: bool):
        shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.convs = nnx.List(_ConvNorm(*shape, stride=stride) for *shape, stride in shapes)
        changes = stride != 1 or inputs != outputs
        self.shortcut = _ConvNorm(inputs, outputs, 1, stride=stride) if changes else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = self.convs[0](x)
        for conv in list(self.convs)[1:]:
            y = conv(jax.nn.relu(y))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class _Linear(nnx.Module):
    def __init__(self, inputs: int, outputs: int):
        self.kernel = Frozen(jnp.zeros((inputs, outputs)))
        self.bias = Frozen(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        return x @ self.kernel[...] + self.bias[...][None]


class ResNet(Pretrained):
    """The network of the module's docstring; `vqgan convert` makes one of torchvision's files.

    Pass it through `nnx.split` into a compiled function, or its weights (102 MB of ResNet-50)
    become constants of it.
    """

    config_class = ResNetConfig

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.stem = _ConvNorm(3, config.width, 7, stride=2)
        widths = [config.width * 2**stage for stage in range(len(config.blocks))]
        outputs = [width * (4 if config.bottleneck else 1) for width in widths]
        inputs = [config.width, *outputs[:-1]]
        self.stages = nnx.List(
            nnx.List(
                _Block(
                    outputs[stage] if i else inputs[stage],
                    outputs[stage],
                    widths[stage],
                    stride=2 if stage and not i else 1,
                    bottleneck=config.bottleneck,
                )
                for i in range(depth)
            )
            for stage, depth in enumerate(config.blocks)
        )
        self.head = _Linear(outputs[-1], config.classes)

    def __call__(self, images: Float[Array, "b h w c"]) -> list[Array]:
        """The last stage's map `[b, h2, w2, d]` and the logits `[b, classes]`.

        Raises:
          InputError: images that are not of 3 channels.
        """
        last = self.features(images)[-1]
        return [last, self.head(last.mean((1, 2)))]

    def features(self, images: Float[Array, "b h w c"]) -> list[Float[Array, "b _ _ _"]]:
        """The feature map of every stage. Raises InputError as the call does."""
        if images.shape[-1] != 3:
            raise InputError(
                f"ResNet: images have {images.shape[-1]} channels, but it is defined for 3; set "
                "the classifier's weight to 0"
            )
        side = self.config.resize
        if side:
            shape = (len(images), side, side, 3)
            images = jax.image.resize(images, shape, "bilinear", antialias=True)
        x = ((images + 1) / 2 - MEAN[None, None, None]) / DEVIATION[None, None, None]
        x = _max_pool(jax.nn.relu(self.stem(x)))
        maps = []
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The largest of every 3x3, of stride 2. Behind a ReLU, so zeros around change no maximum.

    As maxima of slices: see LPIPS's.
    """
    for axis in (1, 2):
        x = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        stop = x.shape[axis] - 2
        first, second, third = (
            jax.lax.slice_in_dim(x, i, i + stop, stride=2, axis=axis) for i in range(3)
        )
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x
