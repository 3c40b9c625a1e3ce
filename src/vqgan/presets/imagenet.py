"""ImageNet, which all published presets were trained on: epochs as steps."""

IMAGES = 1_281_167
"""In the training split of ILSVRC 2012."""


def steps(epochs: int, batch_size: int) -> int:
    """Batches in so many epochs, each without its incomplete last one."""
    return epochs * (IMAGES // batch_size)
