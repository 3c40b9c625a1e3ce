"""The weights of LPIPS as its makers publish them: torchvision's trunks, and the heads.

    vgg16-397923af.pth, alexnet-owt-7be5be79.pth     features.I.{weight,bias}, classifier.*
    vgg.pth, alex.pth of LPIPS v0.1                  linI.model.1.weight

Either makes a whole LPIPS: what a file does not have is taken from the published weights that are
installed with this library. A file with other values than the published ones is refused, unless it
is said to be meant so: a distance by other weights is not the LPIPS of papers.
"""

import numpy as np
from flax import nnx

from vqgan.adversarial.lpips import LPIPS, LPIPSConfig, Net, published_weights
from vqgan.convert import table
from vqgan.convert.source import Imported, Source, sha256
from vqgan.convert.table import Entry, Table
from vqgan.convert.taming import HEAD, VGG16_FEATURES
from vqgan.errors import InputError
from vqgan.serialization import flat_weights

# Convolutions, counted with the activations and poolings between them.
_FEATURES: dict[Net, tuple[int, ...]] = {"vgg16": VGG16_FEATURES, "alexnet": (0, 3, 6, 8, 10)}
# What the sha256 of the published files is, or, of torchvision's, starts with.
_TRUNKS = {"vgg16": "397923af", "alexnet": "7be5be79"}
_HEADS = {
    "vgg16": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alexnet": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
}


def recognise(source: Source) -> bool:
    """Whether the file holds a torchvision trunk, or the heads and nothing else."""
    if source.has("lin0.model.1.weight"):
        return all(name.startswith("lin") for name in source.tensors)
    return source.has("features.0.weight", "classifier.6.weight")


def load(source: Source) -> Imported:
    """LPIPS with the trunk or the heads of the file.

    Raises:
      InputError: tensors that do not fit, or other values than the published ones.
    """
    net = _net(source)
    heads = source.has("lin0.model.1.weight")
    entries = _heads_table() if heads else _trunk_table(net)
    published = published_weights(net)
    model = table.read(
        nnx.eval_shape(lambda: LPIPS(LPIPSConfig(net=net), rngs=nnx.Rngs(0))),
        entries,
        source.tensors,
        where=str(source.path),
        ignore=(r"classifier\..*",),
        defaults={name: value for name, value in published.items() if name not in entries},
    )
    found = flat_weights(model)
    if not source.unverified and not all(
        np.array_equal(found[name], published[name]) for name in entries
    ):
        known = f"{'is' if heads else 'starts with'} {(_HEADS if heads else _TRUNKS)[net]}"
        raise InputError(
            f"{source.path}: not the published {'heads' if heads else net}: its sha256 is "
            f"{sha256(source.path)}, theirs {known}; download it again, or say --unverified"
        )
    rest = "trunk is the published one" if heads else "heads are the published ones"
    return Imported(format="lpips", model=model, notes=(f"the {rest}",))


def _net(source: Source) -> Net:
    """Told apart by the width of the second stage."""
    name = "lin1.model.1.weight" if source.has("lin0.model.1.weight") else "features.3.weight"
    alexnet = source.has(name) and 192 in source.tensors[name].shape[:2]
    return "alexnet" if alexnet else "vgg16"


def _trunk_table(net: Net) -> Table:
    entries: Table = {}
    for i, feature in enumerate(_FEATURES[net]):
        entries[f"convs.{i}.kernel"] = Entry((f"features.{feature}.weight",), table.CONV)
        entries[f"convs.{i}.bias"] = Entry((f"features.{feature}.bias",))
    return entries


def _heads_table() -> Table:
    return {f"heads.{i}": Entry((f"lin{i}.model.1.weight",), HEAD) for i in range(5)}
