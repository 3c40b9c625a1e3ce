"""LPIPS from torchvision's and LPIPS' own files against the package lpips."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from comparing import images, nchw, randomise
from reference import import_torch, import_torchvision, lpips_module

from vqgan import convert
from vqgan.errors import InputError

pytestmark = pytest.mark.parity
FILES = {"vgg16": "vgg", "alexnet": "alex"}


def distances(net, trunk=None):
    """What the package says of some pairs, at two shapes, with its heads and a trunk."""
    torch = import_torch()
    reference = lpips_module(net)
    if trunk is not None:
        convolutions = [m for m in reference.net.modules() if isinstance(m, torch.nn.Conv2d)]
        names = [name for name in trunk if name.startswith("features.") and "weight" in name]
        for theirs, name in zip(convolutions, names, strict=True):
            theirs.weight.data.copy_(trunk[name])
            theirs.bias.data.copy_(trunk[name.replace("weight", "bias")])
    with torch.no_grad():
        return [
            (a, b, reference(torch.from_numpy(nchw(a)), torch.from_numpy(nchw(b))).numpy().ravel())
            for a, b in ((images(*s), images(*s, seed=1)) for s in ((64, 64), (48, 80)))
        ]


@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_trunk_of_torchvision(net, tmp_path):
    """Random weights in torchvision's own state dict, which must be said to be meant."""
    torch = import_torch()
    trunk = getattr(import_torchvision().models, net)(weights=None).state_dict()
    randomise(trunk.items())
    torch.save(trunk, tmp_path / "trunk.pth")
    with pytest.raises(InputError, match=r"sha256 is [0-9a-f]{64}, theirs starts with"):
        convert.load(tmp_path / "trunk.pth")
    model = convert.load(tmp_path / "trunk.pth", unverified=True).model
    for a, b, expected in distances(net, trunk):
        ours = model(jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_published_heads(net):
    """The files themselves, which the package lpips holds, in PyTorch's container of before 1.6."""
    import lpips

    path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{FILES[net]}.pth"
    model = convert.load(path).model
    assert model.config.net == net
    for a, b, expected in distances(net):
        ours = model(jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)
