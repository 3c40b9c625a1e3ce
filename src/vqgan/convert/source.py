"""What is imported: a file of weights, the config that belongs to it, and what comes of both."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vqgan.convert.containers import Checkpoint, LazyTensor, open_checkpoint
from vqgan.errors import InputError
from vqgan.pipeline import Pipeline
from vqgan.serialization import Pretrained

Weights = Literal["ema", "raw"]

# What a directory's file of weights is called, first found first taken.
_WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "flax_model.msgpack",
    "pytorch_model.bin",
    "model.ckpt",
    "last.ckpt",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened file of weights and its published config."""

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any] | None
    """Of the YAML or JSON beside it or given; None where there is none."""
    weights: Weights = "ema"
    """Whether averaged weights are preferred where a file has both."""
    unverified: bool = False
    """Whether files pass that should hold published values and hold others."""

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """The tensors of the model: those of Lightning's `state_dict`, where there is one."""
        return self.checkpoint.below("state_dict") or self.checkpoint.tensors

    def has(self, *names: str) -> bool:
        """Whether tensors of all these names are in the file."""
        return all(name in self.tensors for name in names)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An imported model, and what else the file held."""

    format: str
    model: Pretrained | Pipeline
    parts: dict[str, Pretrained] = field(default_factory=dict)
    """Models beside it, by the folder they go to: `discriminator`, `lpips`."""
    notes: tuple[str, ...] = ()
    """What a user should know: what was left out, what was assumed."""


def open_source(
    path: Path | str,
    config: Path | str | None = None,
    weights: Weights = "ema",
    unverified: bool = False,
) -> Source:
    """Opens a file of weights, or the directory that holds one, with its config.

    Raises:
      InputError: there is no such file, or it or the config cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        held = [path / name for name in _WEIGHTS if (path / name).is_file()]
        if not held:
            raise InputError(f"{path}: none of {', '.join(_WEIGHTS)} in it; name the file itself")
        path = held[0]
    checkpoint = open_checkpoint(path)
    found = Path(config) if config is not None else _beside(path)
    data = None if found is None else read_config(found)
    return Source(
        path=path, checkpoint=checkpoint, config=data, weights=weights, unverified=unverified
    )


def _beside(path: Path) -> Path | None:
    """The config that lies where published code puts it, if any."""
    names = [f"{path.stem}.yaml", f"{path.stem}.yml", f"{path.stem}.json"]
    names += ["config.json", "config.yaml", "model.yaml"]
    places = [path.with_name(name) for name in names]
    # taming-transformers: logs/RUN/checkpoints/last.ckpt and logs/RUN/configs/DATE-project.yaml
    places += sorted((path.parent.parent / "configs").glob("*-project.yaml"))
    return next((place for place in places if place.is_file()), None)


def read_config(path: Path) -> dict[str, Any]:
    """A YAML or JSON config as data. Raises InputError where it is not one."""
    try:
        text = path.read_text()
        # YAML would do for JSON too, but that it takes 1e-05 for a string.
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such config") from None
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML or JSON config ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a config, which would be a mapping of names to values")
    return data


def averaged(found: Mapping[str, LazyTensor], weights: Weights) -> dict[str, LazyTensor]:
    """The tensors with their moving averages in their place, where the file has them.

    Lightning code of this family keeps the average of `a.b.c` as `model_ema.abc`. Averages that
    belong to nothing stay, for the importer to name.
    """
    raw = {name: value for name, value in found.items() if not name.startswith("model_ema.")}
    average = {name: value for name, value in found.items() if name.startswith("model_ema.")}
    for counter in ("decay", "num_updates"):
        average.pop(f"model_ema.{counter}", None)
    for name in raw:
        value = average.pop(f"model_ema.{name.replace('.', '')}", None)
        if value is not None and weights == "ema":
            raw[name] = value
    return raw | average


def fields(
    config: Mapping[str, Any],
    known: Sequence[str],
    *,
    where: str,
    ignored: Sequence[str] = (),
    needed: Sequence[str] = (),
) -> dict[str, Any]:
    """The known fields of a published config.

    Raises:
      InputError: naming all fields that are unknown, or needed and not there.
    """
    if unknown := sorted(config.keys() - set(known) - set(ignored)):
        raise InputError(f"{where}: {', '.join(unknown)}: unknown here, so the model may differ")
    if missing := [name for name in needed if name not in config]:
        raise InputError(f"{where}: {', '.join(missing)}: missing")
    return {name: config[name] for name in known if name in config}


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
