"""Where images come from: a folder, arrays, or the embedded emoji. One class a kind of source.

Access is random and a pure function of the index, from any number of threads.
"""

import functools
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageOps

from vqgan.data import emoji
from vqgan.errors import InputError

log = logging.getLogger(__name__)

Split = Literal["train", "test", "all"]
Item = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Items, dicts of NumPy arrays and scalars, by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Item `index`; where that is broken, the next one that is not, from the start again."""
        ...

    def read(self, index: int) -> Item | None:
        """Item `index`, or None where it is broken."""
        ...


@runtime_checkable
class ImageSource(Source, Protocol):
    """Items `{"image": uint8 [h, w, c], "label": int32}`; without classes the label is 0.

    Of label maps `image` is uint16, of depth maps float32 (vqgan/data/maps.py).
    """

    @property
    def name(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that labels count; empty means that there are none."""
        ...


class ArraySource:
    """Images of one size that are in memory."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Integer[np.ndarray, "n"] | Sequence[int] | None = None,
        class_names: Sequence[str] = (),
        *,
        name: str = "arrays",
    ):
        """Labels without names get the names "0", "1", ...

        Raises:
          InputError: no images, or labels that are not one an image or have no class.
        """
        if len(images) == 0:
            raise InputError(f"{name}: holds no images")
        if labels is None and class_names:
            raise InputError(f"{name}: class names without labels; give labels as well")
        self.name = name
        self.images = images
        self.labels = (
            np.zeros(len(images), np.int32) if labels is None else np.asarray(labels, np.int32)
        )
        if labels is not None and not class_names:
            class_names = [str(k) for k in range(self.labels.max(initial=-1) + 1)]
        self.class_names = tuple(class_names)
        if self.labels.shape != (len(images),):
            raise InputError(f"{name}: {len(images)} images, but labels {self.labels.shape}")
        if labels is not None and not np.isin(self.labels, range(len(self.class_names))).all():
            raise InputError(f"{name}: labels must lie in 0 to {len(self.class_names) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return {"image": self.images[index], "label": self.labels[index]}

    def read(self, index: int) -> Item | None:
        return self[index]


class Emoji(ArraySource):
    """The embedded emoji, 64x64 RGB in nine classes. All variants of one emoji share a split."""

    def __init__(self, split: Split = "train"):
        images, index = emoji.load()
        class_names = tuple(dict.fromkeys(entry["class"] for entry in index))
        self.entries = [entry for entry in index if split in (entry["split"], "all")]
        super().__init__(
            images if split == "all" else images[[e["split"] == split for e in index]],
            [class_names.index(entry["class"]) for entry in self.entries],
            class_names,
            name="emoji",
        )


class ImageFolder:
    """The images in a folder and below it, in every format that Pillow decodes.

    A class is a sub-folder of the first level; there are classes if every image lies in one. If the
    folder holds `train` beside `val`, `validation` or `test` (the first of these that it has), then
    those are the splits, and classes are counted below them. Otherwise a file is held out if a hash
    of its relative path falls below `holdout`, so that new files move no old one; of two files or
    more, at least one is held out and at least one is not.

    A file that cannot be read is reported once through `logging`, counted in `broken`, and replaced
    by the next one. Hidden files and folders are left out.
    """

    def __init__(
        self,
        path: Path | str,
        split: Split = "train",
        *,
        holdout: float = 0.1,
        read: Callable[[Path], np.ndarray] | None = None,
    ):
        """`read` makes a picture of a file, RGB by default; its InputError is not a broken file.

        Raises:
          InputError: the folder is missing, or has no image (for this split).
        """
        root = Path(path)
        self.name = str(path)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; give a folder of images, or emoji")
        if not 0.0 <= holdout < 1.0:
            raise InputError(f"holdout {holdout} does not lie in [0, 1)")
        files = sorted(_image_files(root, frozenset()))
        if not files:
            raise InputError(f"{root}: no image in it or below it")
        files, held_out, classes = _split(root, files, holdout)
        chosen = [split == "all" or out == (split == "test") for out in held_out]
        if not any(chosen):
            mend = "set holdout above 0, or give two images or more"
            raise InputError(f"{root}: no image left for the {split} split; {mend}")
        self.files = [file for file, keep in zip(files, chosen, strict=True) if keep]
        kept = [name for name, keep in zip(classes, chosen, strict=True) if keep]
        self.class_names = () if "" in classes else tuple(sorted(set(classes)))
        number = {name: k for k, name in enumerate(self.class_names)}
        self._labels = [np.int32(number.get(name, 0)) for name in kept]
        self._read = read or read_image
        self._broken: set[int] = set()
        self._lock = threading.Lock()

    @property
    def broken(self) -> int:
        """How many of the files read so far cannot be read."""
        return len(self._broken)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        """Raises InputError where no file of the folder can be read."""
        index = range(len(self))[index]
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            item = self.read(candidate)
            if item is not None:
                return item
        raise InputError(f"{self.name}: none of its {len(self)} images can be read")

    def read(self, index: int) -> Item | None:
        index = range(len(self))[index]
        if index in self._broken:
            return None
        try:
            image = self._read(self.files[index])
        except InputError:
            raise
        except Exception as error:  # decoders of damaged files raise nearly anything
            with self._lock:
                new = index not in self._broken
                self._broken.add(index)
            if new:
                log.warning("%s: cannot be read (%s); left out", self.files[index], error)
            return None
        return {"image": image, "label": self._labels[index]}


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """An image file, turned as its EXIF data says. Raises nearly anything where it is damaged."""
    with Image.open(path) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))


def to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Any Pillow image as RGB: transparency on white, 16-bit values by their upper byte."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64) >> 8
        return np.repeat(np.clip(values, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(canvas, picture)
    return np.asarray(picture.convert("RGB"))


@functools.cache
def _decodable() -> frozenset[str]:
    """Extensions of the formats that Pillow decodes by itself."""
    Image.init()
    # Stubs without a decoder, and a format that runs Ghostscript.
    foreign = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
    formats = set(Image.OPEN) - foreign
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, name in extensions.items() if name in formats)


def _image_files(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Image files below a folder. Follows links, but not round in a circle."""
    above |= {folder.resolve()}
    suffixes = _decodable()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if entry.is_dir():
                if path.resolve() not in above:
                    yield from _image_files(path, above)
            elif path.suffix.lower() in suffixes:
                yield path


def _split(
    root: Path, files: list[Path], holdout: float
) -> tuple[list[Path], list[bool], list[str]]:
    """Files of all splits, whether each is held out, and its class ("" for none)."""
    paths = [file.relative_to(root).parts for file in files]
    tops = {parts[0] for parts in paths if len(parts) > 1}
    beside = [name for name in ("val", "validation", "test") if name in tops]
    if "train" not in tops or not beside:
        classes = [parts[0] if len(parts) > 1 else "" for parts in paths]
        return files, _hashed(["/".join(parts) for parts in paths], holdout), classes
    pairs = [(f, p) for f, p in zip(files, paths, strict=True) if p[0] in ("train", beside[0])]
    classes = [parts[1] if len(parts) > 2 else "" for _, parts in pairs]
    return [file for file, _ in pairs], [parts[0] != "train" for _, parts in pairs], classes


def _hashed(paths: list[str], holdout: float) -> list[bool]:
    """Which files a holdout takes, by their relative paths."""
    digests = [hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest() for path in paths]
    places = [int.from_bytes(digest[:8]) / 2**64 for digest in digests]
    if len(paths) < 2 or holdout == 0.0:
        return [False] * len(paths)
    held_out = [place < holdout for place in places]
    held_out[places.index(min(places))] = True
    held_out[places.index(max(places))] = False
    return held_out


def open_source(
    spec: str,
    *,
    split: Split,
    holdout: float = 0.1,
    read: Callable[[Path], np.ndarray] | None = None,
) -> ImageSource:
    """The source that a command-line SRC names: `emoji` or a folder, whose files `read` reads.

    Raises:
      InputError: naming what `spec` is not.
    """
    if split not in ("train", "test", "all"):
        raise InputError(f"split {split!r} is none of train, test, all")
    if spec == "emoji":
        return Emoji(split)
    if not Path(spec).is_dir() and (":" in spec or any(c in spec for c in "*?[{")):
        raise InputError(f"{spec}: not a source; the sources are emoji and a folder of images")
    return ImageFolder(spec, split, holdout=holdout, read=read)
