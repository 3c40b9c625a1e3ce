"""torchvision's ResNets, for a perceptual term by a classifier.

    conv1.weight  bn1.*  layerS.B.convI.weight  layerS.B.bnI.*  layerS.B.downsample.{0,1}.*  fc.*

The architecture is in the names and shapes: the stages, their blocks, whether these are
bottlenecks. Any weights of this form are taken, since what a classifier was trained on is its
user's choice.
"""

from flax import nnx

from vqgan.adversarial.resnet import ResNet, ResNetConfig
from vqgan.convert import table
from vqgan.convert.source import Imported, Source
from vqgan.convert.table import Found, Rules
from vqgan.errors import InputError

_RULES: Rules = (
    (r"^stages\.(\d+)", lambda m: f"layer{int(m[1]) + 1}"),
    (r"\.convs\.(\d+)\.kernel", lambda m: f".conv{int(m[1]) + 1}.weight"),
    (r"\.convs\.(\d+)", lambda m: f".bn{int(m[1]) + 1}"),
    (r"\.shortcut\.kernel", ".downsample.0.weight"),
    (r"\.shortcut", ".downsample.1"),
    (r"^stem\.kernel", "conv1.weight"),
    (r"^stem", "bn1"),
    (r"^head", "fc"),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.(mean|var)$", r".running_\1"),
)


def recognise(source: Source) -> bool:
    """Whether the file holds a ResNet by torchvision's names."""
    return source.has("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight")


def load(source: Source) -> Imported:
    """The ResNet of the file.

    Raises:
      InputError: a variant that is not here, or tensors that do not fit.
    """
    where, found = str(source.path), source.tensors
    config = _config(found, where=where)
    abstract = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    model = table.read(
        abstract,
        table.torch_table(abstract, _RULES),
        found,
        where=where,
        # How many batches the running statistics have seen.
        ignore=(r".*\.num_batches_tracked",),
    )
    return Imported(format="resnet", model=model)


def _config(found: Found, *, where: str) -> ResNetConfig:
    stages = range(1, table.count(found, r"layer(\d+)\."))
    width = table.shape_of(found, "conv1.weight", 4, where=where)[0]
    bottleneck = "layer1.0.conv3.weight" in found
    name = f"layer1.0.conv{2 if bottleneck else 1}.weight"
    if (seen := table.shape_of(found, name, 4, where=where)[:2]) != (width, width):
        raise InputError(
            f"{where}: {name} has {seen[1]} to {seen[0]} channels, not {width}: a ResNeXt or a "
            "wide ResNet, which are not here; take a plain one"
        )
    return ResNetConfig(
        blocks=tuple(table.count(found, rf"layer{stage}\.(\d+)\.") for stage in stages),
        bottleneck=bottleneck,
        width=width,
        classes=table.shape_of(found, "fc.weight", 2, where=where)[0],
    )
