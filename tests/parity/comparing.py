"""How imported models are compared with the published code: random everywhere, and relative."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

SIZES = [(32, 32), (32, 64)]  # height and width: a square one and one that is not


def randomise(tensors: Iterable[tuple[str, Any]], seed: int = 0) -> None:
    """Random values into every floating PyTorch tensor, in place: no zeros, no identity norms.

    Args:
      tensors: names and tensors, as `state_dict().items()` gives them.
    """
    rng = np.random.default_rng(seed)
    for name, tensor in tensors:
        if tensor.dtype.is_floating_point:
            value = random_array(rng, name, tuple(tensor.shape))
            tensor.data.copy_(tensor.new_tensor(value))


def random_array(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a size that keeps signals alive through a deep network."""
    if name.endswith("running_var"):
        return rng.uniform(0.5, 2.0, shape).astype(np.float32)
    if len(shape) > 1:  # kernels: variance by the fan-in; embeddings: near one
        fan_in = np.prod(shape[1:]) if "emb" not in name else 1
        return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)
    centre = 1.0 if name.endswith(("weight", "scale")) else 0.0
    return (centre + 0.2 * rng.normal(size=shape)).astype(np.float32)


def images(height: int, width: int, channels: int = 3, *, batch: int = 2, seed: int = 0):
    """Float32 images `[b, h, w, c]` in [-1, 1]."""
    shape = (batch, height, width, channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    scale = np.abs(theirs).max()
    assert scale > 1e-3, "nothing to compare"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def assert_same_ids(ours: Any, theirs: Any, cost: Callable[[], np.ndarray]) -> None:
    """Equal ids, but where the two codes are as good as each other up to rounding.

    Args:
      cost: what the quantizer minimises, `[..., k]`, taken only where ids differ.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert len(np.unique(theirs)) > 3, "too few codes in use to compare"
    if np.array_equal(ours, theirs):
        return
    costs = cost()
    a, b = (np.take_along_axis(costs, ids[..., None], axis=-1)[..., 0] for ids in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(costs).max())


def nchw(x: Any) -> np.ndarray:
    """`[b, h, w, c]` as PyTorch has it."""
    return np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x: Any) -> np.ndarray:
    """`[b, c, h, w]` as it is here."""
    return np.ascontiguousarray(np.asarray(x).transpose(0, 2, 3, 1))
