"""Published weights into this library, and models of this library back to the PyTorch world.

    imported = vqgan.convert.load("last.ckpt", config="model.yaml")   # a Tokenizer or a Pipeline
    vqgan.convert.convert("last.ckpt", "models/f16", config="model.yaml")   # as a model directory
    vqgan.convert.export("models/f16", "f16.ckpt", format="taming")

Each format is a file of this package; `families.py` lists them. Nothing in a file that is read is
ever executed, and torch is not needed.
"""

from collections.abc import Callable
from pathlib import Path

from vqgan import atomic
from vqgan.adversarial.discriminators import load_discriminator
from vqgan.adversarial.lpips import LPIPS
from vqgan.convert.exporting import Exported
from vqgan.convert.families import FAMILIES, Family, exporters, family_of
from vqgan.convert.source import Imported, Weights, open_source, sha256
from vqgan.errors import InputError
from vqgan.serialization import Pretrained
from vqgan.tokenizer.model import Tokenizer

_PARTS: dict[str, Callable[[Path], Pretrained]] = {
    "discriminator": load_discriminator,
    "lpips": LPIPS.from_pretrained,
}


def load(
    src: Path | str,
    *,
    format: str = "auto",
    config: Path | str | None = None,
    weights: Weights = "ema",
    unverified: bool = False,
) -> Imported:
    """Reads a published model.

    Args:
      src: a file of weights, or a directory that holds one.
      format: a name out of `FAMILIES`; `auto` goes by the tensors' names.
      config: the published YAML or JSON; by default what lies beside the file.
      weights: `ema` prefers averaged weights where the file has them, `raw` does not.
      unverified: take LPIPS weights that are not the published ones.

    Raises:
      InputError: the file cannot be read, is of no known format, or holds other tensors than its
        format asks for; all of them are named.
    """
    source = open_source(src, config, weights, unverified)
    return family_of(source, format).load(source)


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    format: str = "auto",
    config: Path | str | None = None,
    weights: Weights = "ema",
    unverified: bool = False,
    licence: str | None = None,
) -> Imported:
    """Reads a published model and writes it as a model directory of this library.

    The directory also gets `provenance.json`, which says where the weights come from, and a folder
    for each other model that the file held: `discriminator`, `lpips`.

    Args:
      licence: of the weights, for their provenance; see `load` for the other arguments.

    Raises:
      InputError: as `load`, or `dst` is there already and holds something else than an import.
    """
    dst = Path(dst)
    check_replaceable(dst, Path(src))
    source = open_source(src, config, weights, unverified)
    imported = family_of(source, format).load(source)
    provenance = {
        "format": imported.format,
        "source": source.path.name,
        "sha256": sha256(source.path),
        "weights": weights,
        "licence": licence,
        "notes": list(imported.notes),
    }
    with atomic.new_directory(dst) as new:
        imported.model.save_pretrained(new, provenance=provenance)
        for name, part in imported.parts.items():
            part.save_pretrained(new / name)
    return imported


def export(
    src: Path | str | Tokenizer, dst: Path | str, *, format: str = "taming"
) -> tuple[str, ...]:
    """Writes a tokenizer of this library in a published format.

    Args:
      src: a tokenizer, or its directory, whose `discriminator` and `lpips` go along where the
        format has a place for them.
      dst: the file, or the directory, as the format has it.

    Returns:
      Notes for the user.

    Raises:
      InputError: the format cannot say what the tokenizer is; every reason is named.
    """
    known = exporters()
    if format not in known:
        raise InputError(f"to {format}: no such export; there are {', '.join(known)}")
    save = known[format].save
    assert save is not None
    return save(_exported(src), Path(dst))


def _exported(src: Path | str | Tokenizer) -> Exported:
    if isinstance(src, Tokenizer):
        return Exported(tokenizer=src)
    places = [Path(src), Path(src) / "model", Path(src) / "tokenizer"]
    places.append(places[1] / "tokenizer")
    held = [place for place in places if (place / "model.safetensors").is_file()]
    tokenizer = Tokenizer.from_pretrained(held[0] if held else src)
    parts = {
        name: load_part(held[0] / name)
        for name, load_part in _PARTS.items()
        if held and (held[0] / name).is_dir()
    }
    return Exported(tokenizer=tokenizer, parts=parts)


def check_replaceable(dst: Path, src: Path) -> None:
    """Raises InputError where writing `dst` would take away anything but an earlier import.

    Its mark is `provenance.json`; the published weights themselves are often called like ours.
    """
    if not dst.exists():
        return
    if not dst.is_dir():
        raise InputError(f"{dst}: is a file; give a directory for the model")
    if src.resolve().is_relative_to(dst.resolve()):
        raise InputError(f"{dst}: holds {src}, which it would replace; give another place")
    if any(dst.iterdir()) and not (dst / "provenance.json").exists():
        raise InputError(f"{dst}: holds something that is no converted model; give another place")


__all__ = ["FAMILIES", "Family", "Imported", "convert", "export", "load"]
