"""Batches as a pure function of (seed, step), for any number of processes."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqgan.data import transforms
from vqgan.data.pipeline import DataConfig, eval_batches, image_augment, train_batches
from vqgan.data.sources import ArraySource, ImageFolder
from vqgan.errors import InputError

CONFIG = DataConfig(image_size=4, batch_size=6, threads=2)


class Numbers:
    """Items that are their own index."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"ids": np.full((2, 2), index, np.int32), "label": np.int32(index)}

    def read(self, index: int) -> dict | None:
        return self[index]


def noise(count: int, size: int = 8) -> ArraySource:
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (count, size, size + 3, 3), np.uint8))


def labels(source, *, batch_size=6, **options) -> np.ndarray:
    config = DataConfig(batch_size=batch_size, threads=2)
    stream = train_batches(source, config, augment=None, **options)
    return np.array([batch["label"] for batch in stream])


def images(source, config=CONFIG, **options) -> np.ndarray:
    stream = train_batches(source, config, augment=image_augment(config), **options)
    return np.array([batch["image"] for batch in stream])


def test_the_seed_decides_everything():
    source = noise(7)
    first = images(source, seed=1, steps=5)
    assert first.shape == (5, 6, 4, 4, 3) and first.dtype == np.uint8
    assert np.array_equal(first, images(source, seed=1, steps=5))
    assert not np.array_equal(first, images(source, seed=2, steps=5))


def test_threads_change_nothing():
    source = noise(7)
    one = DataConfig(image_size=4, batch_size=6, threads=1)
    assert np.array_equal(images(source, seed=1, steps=9), images(source, one, seed=1, steps=9))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 20), start=st.integers(0, 9), blocks=st.sampled_from([1, 2, 3, 6]))
def test_start_and_processes_select_from_one_stream(count, start, blocks):
    source = Numbers(count)
    whole = labels(source, seed=3, steps=9)
    parts = [
        labels(source, seed=3, steps=9, start_step=start, process_index=p, process_count=blocks)
        for p in range(blocks)
    ]
    if start < 9:
        assert np.array_equal(np.concatenate(parts, axis=1), whole[start:])
    else:
        assert all(len(part) == 0 for part in parts)


def test_processes_augment_as_one_does():
    source = noise(7)
    whole = images(source, seed=3, steps=4)
    parts = [images(source, seed=3, steps=4, process_index=p, process_count=2) for p in range(2)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64])
def test_each_epoch_has_every_item_once_in_another_order(count):
    epochs = labels(Numbers(count), batch_size=1, seed=0, steps=4 * count).reshape(4, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if count >= 10:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_augmentation_differs_between_epochs():
    epochs = images(noise(1, size=32), DataConfig(image_size=16, batch_size=1), seed=0, steps=8)
    assert len({epoch.tobytes() for epoch in epochs}) > 2


def test_closing_stops_the_threads():
    before = set(threading.enumerate())
    stream = train_batches(noise(7), CONFIG, seed=0, steps=1000, augment=image_augment(CONFIG))
    next(stream)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    for thread in started:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 4}, "batch_size 6 does not divide into 4 processes"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_what_train_batches_rejects(options, message):
    arguments = {"seed": 0, "steps": 1, "augment": None, **options}
    with pytest.raises(InputError, match=message):
        train_batches(Numbers(3), CONFIG, **arguments)


def test_a_size_that_is_not_positive():
    with pytest.raises(InputError, match="image_size must be at least 1"):
        image_augment(DataConfig(image_size=0))
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        train_batches(Numbers(3), DataConfig(batch_size=0), seed=0, steps=1, augment=None)


def test_resize_cuts_crops_from_a_larger_picture():
    """Training and held-out crops are parts of the picture resized to `resize`, pixel for pixel."""
    picture = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
    source = ArraySource(picture[None])
    config = DataConfig(image_size=8, resize=12, flip=False, batch_size=6, threads=2)
    resized = transforms.resize_smallest_side(picture, 12)
    rows, columns = resized.shape[0] - 8 + 1, resized.shape[1] - 8 + 1
    parts = {resized[y : y + 8, x : x + 8].tobytes() for y in range(rows) for x in range(columns)}
    seen = images(source, config, seed=0, steps=20).reshape(-1, 8, 8, 3)
    assert {crop.tobytes() for crop in seen} <= parts
    assert len({crop.tobytes() for crop in seen}) > 20
    batch = next(eval_batches(source, 8, 1, resize=12))
    np.testing.assert_array_equal(batch["image"][0], transforms.center_crop(resized, 8))
    with pytest.raises(InputError, match=r"data.resize 6 is less than data.image_size 8"):
        image_augment(DataConfig(image_size=8, resize=6))


def test_unreadable_data_reach_the_caller(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    stream = train_batches(
        ImageFolder(tmp_path, "all"), CONFIG, seed=0, steps=2, augment=image_augment(CONFIG)
    )
    with pytest.raises(InputError, match="none of its 1 images"):
        next(stream)
    stream.close()


def test_augmentation_without_randomness_is_the_centre_crop():
    config = DataConfig(image_size=8, batch_size=7, crop="center", flip=False, threads=1)
    source = noise(7)
    batch = images(source, config, seed=0, steps=1)[0]
    expected = {image[:, 1:9].tobytes() for image in source.images}
    assert {image.tobytes() for image in batch} == expected


def test_eval_takes_each_readable_image_once_and_pads(tmp_path):
    for i in range(6):
        Image.new("RGB", (5 + i, 9), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"not an image")
    source = ImageFolder(tmp_path, "all")
    batches = list(eval_batches(source, 4, 3))
    assert [batch["image"].shape for batch in batches] == [(3, 4, 4, 3)] * 2
    assert np.concatenate([batch["valid"] for batch in batches]).tolist() == [True] * 5 + [False]
    reds = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    assert reds.tolist() == [0, 1, 3, 4, 5, 4]


def test_eval_of_codes_leaves_them_alone_and_spreads_a_limit():
    batches = list(eval_batches(Numbers(10), None, 4, limit=5))
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.concatenate([b["label"] for b in batches])[valid].tolist() == [0, 2, 4, 6, 8]
    assert batches[0]["ids"].shape == (4, 2, 2)
    assert sum(b["valid"].sum() for b in eval_batches(Numbers(3), None, 4, limit=9)) == 3


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), size=st.integers(1, 24), c=st.integers(1, 5))
def test_resize_fits_the_smaller_side(h, w, size, c):
    image = np.full((h, w, c), 77, np.uint8)
    resized = transforms.resize_smallest_side(image, size)
    assert min(resized.shape[:2]) == size and resized.shape[2] == c
    assert (resized == 77).all()
    assert abs(max(resized.shape[:2]) - size * max(h, w) / min(h, w)) <= 0.5 + 1e-9


def test_channels_are_resized_alike():
    image = noise(1, size=16).images[0]
    together = transforms.resize_smallest_side(image, 5)
    five = transforms.resize_smallest_side(np.concatenate([image, image[..., :2]], -1), 5)
    assert np.array_equal(five[..., :3], together) and np.array_equal(
        five[..., 3:], together[..., :2]
    )


def test_random_crop_reaches_every_place():
    image = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1)
    rng = np.random.default_rng(0)
    corners = {int(transforms.random_crop(image, 4, rng)[0, 0, 0]) for _ in range(200)}
    assert corners == {0, 1, 2, 6, 7, 8}


def test_ten_crop_is_corners_and_centre_and_their_mirror_images():
    image = np.arange(25, dtype=np.uint8).reshape(5, 5, 1)
    crops = transforms.ten_crop(image, 3)
    assert [int(view[0, 0, 0]) for view in crops[:5]] == [0, 2, 10, 12, 6]
    assert all(
        np.array_equal(view[:, ::-1], mirrored)
        for view, mirrored in zip(crops[:5], crops[5:], strict=True)
    )
