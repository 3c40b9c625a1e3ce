"""Batches. The stream for training is a pure function of (seed, step).

So the position in the data is the step: resuming needs no state of an iterator, and any number of
processes together get the same global batches in the same order. Both stages use it, with images
and with stored codes.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np

from vqgan.data.sources import Item, Source
from vqgan.data.transforms import (
    center_crop,
    flip,
    random_crop,
    resize_smallest_side,
)
from vqgan.errors import InputError

Batch = dict[str, np.ndarray]
Augment = Callable[[Item, np.random.Generator], Item]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they become batches."""

    source: str = "emoji"
    """`emoji`, or a folder of images (label maps or depth maps, if the tokenizer is of these)."""
    image_size: int = 256
    """Height and width in pixels; smaller images are enlarged."""
    resize: int = 0
    """Pixels to which an image's smaller side is resized before it is cropped, so that crops show
    parts of it; 0 means `image_size`."""
    crop: Literal["random", "center"] = "random"
    """Where the square of `image_size` is taken from the resized image."""
    flip: bool = True
    """Whether half of the images are mirrored."""
    batch_size: int = 16
    """Images a step, over all devices and processes."""
    holdout: float = 0.1
    """Fraction of a folder without splits of its own that is held out."""
    threads: int = 8
    """Threads that read and augment, in each process."""


def image_augment(config: DataConfig) -> Augment:
    """Resize, crop and flip of an item's image; all randomness comes from the generator."""
    size, side = config.image_size, _side(config.image_size, config.resize)

    def augment(item: Item, rng: np.random.Generator) -> Item:
        image = resize_smallest_side(item["image"], side)
        random = config.crop == "random"
        image = random_crop(image, size, rng) if random else center_crop(image, size)
        if config.flip and rng.random() < 0.5:
            image = flip(image)
        return {**item, "image": image}

    return augment


class _ProcessRows(grain.MapDataset):
    """One process's rows of global batches `start` to `stop` of an endless stream.

    Of global batch s, rows s*B to (s+1)*B of the stream, process p of n has the p-th of n blocks.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        *,
        batch_size: int,
        start: int,
        stop: int,
        process_index: int,
        process_count: int,
    ):
        super().__init__(stream)
        self._batch_size = batch_size
        self._block = batch_size // process_count
        self._first = start * batch_size + process_index * self._block
        self._length = max(0, stop - start) * self._block

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        step, row = divmod(index, self._block)
        return self._parent[self._first + step * self._batch_size + row]


def train_batches(
    source: Source,
    config: DataConfig,
    *,
    seed: int,
    steps: int,
    augment: Augment | None,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Batches of steps `start_step` to `steps` - 1: shuffled anew each epoch, without a gap between
    epochs, read ahead by threads.

    Args:
      source: images, or stored codes.
      augment: what happens to an item, seeded by its place in the stream; `image_augment(config)`,
        or None for items that are taken as they are.
      process_index: which block of the global batch to return, of `process_count`.

    Returns:
      An iterator over dicts of arrays `[config.batch_size / process_count, ...]`, with `close()`.

    Raises:
      InputError: the batch does not divide into processes, or a size is not positive.
    """
    _check_positive(batch_size=config.batch_size, threads=config.threads)
    if config.batch_size % process_count:
        raise InputError(
            f"batch_size {config.batch_size} does not divide into {process_count} processes"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} does not lie in 0 to 2**32 - 1")
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if augment is not None:
        stream = stream.random_map(augment)
    rows = _ProcessRows(
        stream,
        batch_size=config.batch_size,
        start=start_step,
        stop=steps,
        process_index=process_index,
        process_count=process_count,
    )
    block = config.batch_size // process_count
    batches = rows.to_iter_dataset(_read_options(config.threads, block)).batch(block)
    return iter(batches)


def eval_batches(
    source: Source,
    image_size: int | None,
    batch_size: int,
    *,
    resize: int = 0,
    limit: int | None = None,
    threads: int = 8,
) -> Iterator[Batch]:
    """Every item that can be read, once and in order.

    Args:
      image_size: images are resized and cropped at the centre to it; None takes items as they are.
      resize: the smaller side before cropping, as in `DataConfig`.
      limit: take at most so many items, spread evenly over the source.

    Yields:
      Batches of exactly `batch_size` with a bool array `valid` `[batch_size]`. The last batch is
      filled up with copies of its first item, which are not valid.
    """
    _check_positive(batch_size=batch_size, threads=threads)
    dataset = readable(source, _center(image_size, resize), limit=limit, threads=threads)
    with closing(iter(dataset.batch(batch_size))) as batches:
        for batch in batches:
            count = len(next(iter(batch.values())))
            valid = np.arange(batch_size) < count
            rows = np.where(valid, np.arange(batch_size), 0)
            yield {**{name: values[rows] for name, values in batch.items()}, "valid": valid}


def readable(
    source: Source, transform: Callable[[Item], object], *, limit: int | None = None, threads: int
) -> grain.IterDataset:
    """The items that can be read, transformed by threads, in order."""
    count = len(source) if limit is None else min(limit, len(source))
    spread = grain.MapDataset.range(count).map(lambda i: source.read(i * len(source) // count))
    return spread.map(transform).to_iter_dataset(_read_options(threads, threads))


def _center(size: int | None, resize: int) -> Callable[[Item], Item]:
    if size is None:
        return lambda item: item
    side = _side(size, resize)

    def center(item: Item) -> Item:
        image = resize_smallest_side(item["image"], side)
        return {**item, "image": center_crop(image, size)}

    return center


def _side(size: int, resize: int) -> int:
    """What an image's smaller side becomes before a square of `size` is cut."""
    _check_positive(image_size=size)
    if 0 < resize < size:
        raise InputError(f"data.resize {resize} is less than data.image_size {size}")
    return resize or size


def _read_options(threads: int, block: int) -> grain.ReadOptions:
    """Reads at most two batches ahead."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2 * block))


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, not {size}")
