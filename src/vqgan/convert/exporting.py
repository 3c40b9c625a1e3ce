"""What goes back to the PyTorch world, and what a format can say of it."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vqgan import atomic
from vqgan.convert.containers import write_torch
from vqgan.errors import InputError
from vqgan.serialization import Pretrained
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig

Sayable = Mapping[str, tuple[Any, ...]]
"""The values that a format can express, by the dotted name of the config's field."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A tokenizer, and the models that lie beside it: `discriminator`, `lpips`."""

    tokenizer: Tokenizer
    parts: dict[str, Pretrained] = field(default_factory=dict)


def check_sayable(config: TokenizerConfig, sayable: Sayable, name: str) -> None:
    """Raises InputError naming every field whose value the format cannot express."""
    problems = []
    for path, values in sayable.items():
        found: Any = config
        for part in path.split("."):
            found = getattr(found, part, values[0])  # a field that only some quantizers have
        if found not in values:
            problems.append(f"{path} {found!r} (only {' or '.join(map(repr, values))})")
    if problems:
        raise InputError(f"{name} cannot say {'; '.join(problems)}")


def write_weights(path: Path, tensors: dict[str, np.ndarray], *, nested: bool = True) -> None:
    """Tensors by name into a `.safetensors` file, or else a PyTorch one.

    Args:
      nested: below `state_dict` in a PyTorch file, as Lightning has it.
    """
    if path.suffix != ".safetensors":
        write_torch(path, {"state_dict": tensors} if nested else tensors)
        return
    with atomic.new_file(path) as new:
        try:
            save_file(tensors, new, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, above all
            raise OSError(errno.EIO, str(error), str(path)) from None
