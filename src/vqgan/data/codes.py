"""Stored codes: stage 1 encodes a data set once, and stage 2 trains on the result.

A directory of codes is `codes.json`, a CodesInfo, beside one ArrayRecord file for each pass over
the images. A record is the label as little-endian int32, then the ids in row-major order as
little-endian uint16, or uint32 where the codebook is larger than 2**16.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from jaxtyping import Integer, Real

from vqgan import atomic
from vqgan.data.pipeline import readable
from vqgan.data.sources import ImageSource, Item
from vqgan.data.transforms import Picture, center_square, flip, ten_crop
from vqgan.errors import InputError
from vqgan.serialization import from_json, read_json, to_json

Encode = Callable[[Real[np.ndarray, "b h w c"]], Any]
View = tuple[str, Picture, int]


@dataclass(frozen=True, kw_only=True)
class CodesInfo:
    """What a directory of codes holds."""

    codebook_size: int
    grid: tuple[int, ...]
    """Shape of one image's ids: `(h, w)`, `(h, w, q)` with q codes a position, or `(l,)` where they
    are a sequence over several scales."""
    count: int
    """Records, over all passes."""
    passes: tuple[str, ...]
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    tokenizer: str
    """Which tokenizer encoded the images."""
    counts: tuple[tuple[int, ...], ...]
    """How often each code occurs, `[q, codebook_size]`."""


PASSES: dict[str, Callable[[Picture, int], list[Picture]]] = {
    "center": lambda image, size: [center_square(image, size)],
    "flip": lambda image, size: [flip(center_square(image, size))],
    # LlamaGen's augmentation: corners and centre of an image a tenth larger, each also flipped.
    "ten-crop": lambda image, size: ten_crop(center_square(image, int(1.1 * size)), size),
}
"""Each pass stores every image's views as records of their own."""


def write_codes(
    encode: Encode,
    source: ImageSource,
    out_dir: Path | str,
    *,
    image_size: int,
    codebook_size: int,
    passes: Sequence[str] = ("center", "flip"),
    batch_size: int = 64,
    tokenizer: str = "",
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> "CodeSource":
    """Encodes every readable image of a source once a pass and stores the ids.

    The directory appears when it is complete; a run that is killed leaves none.

    Args:
      encode: pictures of the source, `[batch_size, h, w, c]`, to ids `[batch_size, h', w']`,
        `[batch_size, h', w', q]` or `[batch_size, l]`. All calls have one shape: the last is filled
        up with copies.
      out_dir: replaced if it holds codes.
      passes: names out of `PASSES`.
      tokenizer: a note of what encodes.
      progress: called with the records written so far and how many there are if no image is broken.

    Raises:
      InputError: an unknown pass, no readable image, or an `out_dir` that holds something else.
      ValueError: ids outside of the codebook.
    """
    unknown = [name for name in passes if name not in PASSES]
    if unknown or not passes or len(set(passes)) < len(passes):
        raise InputError(f"passes {list(passes)}: give some of {', '.join(PASSES)}, each once")
    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / "codes.json").exists():
        raise InputError(f"{out_dir}: exists and holds no codes; remove it or give another place")

    views = _views(source, passes, image_size, threads)
    first = next(views, None)
    if first is None:
        raise InputError(f"{source.name}: none of its {len(source)} images can be read")
    total = len(source) * sum(len(PASSES[name](first[1], image_size)) for name in passes)
    with atomic.new_directory(out_dir) as new:
        count, grid, counts = _write_records(
            encode,
            itertools.chain([first], views),
            {name: new / _file_name(name) for name in passes},
            codebook_size=codebook_size,
            batch_size=batch_size,
            progress=(lambda done: progress(done, total)) if progress else lambda done: None,
        )
        info = CodesInfo(
            codebook_size=codebook_size,
            grid=grid,
            count=count,
            passes=tuple(passes),
            class_names=source.class_names,
            image_size=image_size,
            channels=first[1].shape[2],
            tokenizer=tokenizer,
            counts=tuple(tuple(row) for row in counts.tolist()),
        )
        (new / "codes.json").write_text(json.dumps(to_json(info)) + "\n")
    return CodeSource(out_dir)


def _views(source: ImageSource, passes: Sequence[str], size: int, threads: int) -> Iterator[View]:
    """Every view of every image: its pass, the picture, and the label."""

    def views(item: Item) -> list[View]:
        image, label = item["image"], int(item["label"])
        return [(name, view, label) for name in passes for view in PASSES[name](image, size)]

    with closing(iter(readable(source, views, threads=threads))) as groups:
        for group in groups:
            yield from group


def _write_records(
    encode: Encode,
    views: Iterator[View],
    paths: dict[str, Path],
    *,
    codebook_size: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> tuple[int, tuple[int, ...], Integer[np.ndarray, "q k"]]:
    """Encodes and writes all views; returns how many, the grid, and how often each code occurs."""
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(closing(ArrayRecordWriter(str(path), "group_size:1")))
            for name, path in paths.items()
        }
        done, counts = 0, np.zeros((1, codebook_size), np.int64)
        while batch := list(itertools.islice(views, batch_size)):
            ids = _encoded(encode, [view for _, view, _ in batch], batch_size, codebook_size)
            counts = counts + _frequencies(ids, codebook_size)
            for (name, _, label), row in zip(batch, ids, strict=True):
                start = np.int32(label).astype("<i4").tobytes()
                writers[name].write(start + row.astype(_id_type(codebook_size)).tobytes())
            done += len(batch)
            progress(done)
    return done, ids.shape[1:], counts


def _frequencies(ids: Integer[np.ndarray, "b *grid"], size: int) -> Integer[np.ndarray, "q k"]:
    """How often each code occurs, by its place among the q codes of a position."""
    by_place = np.moveaxis(ids, -1, 0) if ids.ndim == 4 else [ids]
    return np.stack([np.bincount(codes.ravel(), minlength=size) for codes in by_place])


def _encoded(
    encode: Encode, views: list[Picture], batch_size: int, codebook_size: int
) -> Integer[np.ndarray, "b *grid"]:
    """Ids of some views, encoded as one batch of full size."""
    filled = views + views[:1] * (batch_size - len(views))
    ids = np.asarray(encode(np.stack(filled)))[: len(views)]
    if ids.min() < 0 or ids.max() >= codebook_size:
        raise ValueError(f"ids {ids.min()} to {ids.max()} leave a codebook of {codebook_size}")
    return ids


def _file_name(name: str) -> str:
    return f"codes-{name}.array_record"


def _id_type(codebook_size: int) -> str:
    return "<u2" if codebook_size <= 2**16 else "<u4"


class CodeSource:
    """Stored codes as items `{"ids": int32 [*grid], "label": int32}`, pass by pass."""

    def __init__(self, directory: Path | str):
        """Raises InputError where the directory is missing, incomplete or does not fit together."""
        directory = Path(directory)
        if not (directory / "codes.json").is_file():
            raise InputError(f"{directory}: no codes.json in it, so it holds no codes")
        path = directory / "codes.json"
        self.name = str(directory)
        self.info = from_json(CodesInfo, read_json(path), where=str(path))
        files = [directory / _file_name(name) for name in self.info.passes]
        count = sum(_count(file) for file in files)
        if count != self.info.count:
            raise InputError(f"{directory}: {count} records, but codes.json says {self.info.count}")
        self._records = ArrayRecordDataSource([str(file) for file in files])
        self._type = np.dtype(_id_type(self.info.codebook_size))
        size = 4 + self._type.itemsize * int(np.prod(self.info.grid))
        if len(self._records[0]) != size:
            raise InputError(
                f"{directory}: records do not have the grid of codes.json; encode again"
            )

    def __len__(self) -> int:
        return self.info.count

    def __getitem__(self, index: int) -> Item:
        record = self._records[range(len(self))[index]]
        ids = np.frombuffer(record, self._type, offset=4).astype(np.int32)
        return {
            "ids": ids.reshape(self.info.grid),
            "label": np.frombuffer(record, "<i4", count=1)[0].astype(np.int32),
        }

    def read(self, index: int) -> Item | None:
        """The item itself: stored codes are never broken."""
        return self[index]

    @property
    def unigram_entropy_bits(self) -> float:
        """Entropy of the codes' frequencies in bits a token, the mean over codes of a position."""
        counts = np.array(self.info.counts, np.float64)
        p = counts / counts.sum(axis=1, keepdims=True)
        return float(-np.sum(p * np.log2(np.where(p > 0, p, 1.0)), axis=1).mean())


def _count(file: Path) -> int:
    """Records in a file. Raises InputError where it cannot be read."""
    if not file.is_file():
        raise InputError(f"{file}: no such file, the codes are incomplete; encode again")
    try:
        with closing(ArrayRecordReader(str(file))) as reader:
            return reader.num_records()
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(f"{file}: cannot be read ({error}); encode again") from None
