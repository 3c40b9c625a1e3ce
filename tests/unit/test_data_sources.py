"""Where images come from: folders with every kind of file, arrays, the embedded emoji."""

import importlib.util
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqgan.data import emoji
from vqgan.data.sources import ArraySource, Emoji, ImageFolder, ImageSource, open_source
from vqgan.errors import InputError


def save(path: Path, color=(255, 0, 0), size=(6, 4), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def only(folder: Path) -> np.ndarray:
    """The image of a folder with one file."""
    return ImageFolder(folder, "all")[0]["image"]


def test_classes_are_sorted_first_folders(tmp_path):
    for name in ("dog/deep/er/1.PNG", "cat/2.jpg", "cat/3.webp", ".hidden/4.png", "cat/.5.png"):
        save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = ImageFolder(tmp_path, "all")
    assert isinstance(source, ImageSource)
    assert source.class_names == ("cat", "dog")
    assert [f.name for f in source.files] == ["2.jpg", "3.webp", "1.PNG"]
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    assert source[0]["label"].dtype == np.int32


def test_loose_images_mean_no_classes(tmp_path):
    save(tmp_path / "a.png")
    assert ImageFolder(tmp_path, "all").class_names == ()
    save(tmp_path / "album" / "b.png")
    source = ImageFolder(tmp_path, "all")
    assert source.class_names == () and len(source) == 2 and source[1]["label"] == 0


def test_links_are_followed_but_not_round_in_a_circle(tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    assert [f.name for f in ImageFolder(tmp_path / "data", "all").files] == ["a.png"]


def test_transparency_falls_on_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (0, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = only(tmp_path)
    assert image.dtype == np.uint8 and image.shape == (2, 2, 3)
    assert image[0, 0].tolist() == [10, 20, 30]
    assert abs(int(image[0, 1, 0]) - 127) <= 1
    assert (image[1] == 255).all()


def test_palette_transparency_falls_on_white(tmp_path):
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 0, 0, 0, 200, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    assert only(tmp_path).tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_16_bit_values_keep_their_upper_byte(tmp_path):
    values = np.array([[0, 0x1234, 0x80FF, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert only(tmp_path)[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / "a.tiff")
    image = only(tmp_path)
    assert image.shape == (4, 4, 3) and (image == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = only(tmp_path)
    assert image.shape == (32, 16, 3)
    assert image[:14].min() > 200 and image[18:].max() < 50


def test_broken_files_are_skipped_warned_of_once_and_counted(tmp_path, caplog):
    for i in range(4):
        save(tmp_path / f"{i}.png", (i, 0, 0))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.png").write_bytes(b"not an image")
    source = ImageFolder(tmp_path, "all")
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as pool:
        reds = list(pool.map(lambda i: source[i % 4]["image"][0, 0, 0], range(64)))
    assert reds == [0, 2, 2, 0] * 16
    assert source.broken == 2
    assert source.read(1) is None and source.read(2) is not None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert any("1.png" in m for m in messages) and any("3.png" in m for m in messages)


def test_all_broken_is_an_input_error(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(InputError, match="none of its 2 images"):
        ImageFolder(tmp_path, "all")[0]


def test_an_index_past_the_end_ends_iteration(tmp_path):
    save(tmp_path / "a.png")
    assert len(list(iter(ImageFolder(tmp_path, "all")))) == 1


def test_holdout_is_stable_and_disjoint(tmp_path):
    for i in range(100):
        save(tmp_path / f"{i:03d}.png")
    train, test = (ImageFolder(tmp_path, s, holdout=0.2) for s in ("train", "test"))
    assert not set(train.files) & set(test.files)
    assert len(train) + len(test) == 100 and 5 < len(test) < 40
    for i in range(100, 120):
        save(tmp_path / f"{i:03d}.png")
    assert set(train.files) <= set(ImageFolder(tmp_path, "train", holdout=0.2).files)
    assert set(test.files) <= set(ImageFolder(tmp_path, "test", holdout=0.2).files)


@pytest.mark.parametrize("holdout", [1e-9, 1 - 1e-9])
def test_two_files_are_one_a_split(tmp_path, holdout):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    assert len(ImageFolder(tmp_path, "train", holdout=holdout)) == 1
    assert len(ImageFolder(tmp_path, "test", holdout=holdout)) == 1


def test_one_file_has_no_test_split(tmp_path):
    save(tmp_path / "a.png")
    assert len(ImageFolder(tmp_path, "train")) == 1
    with pytest.raises(InputError, match="no image left for the test split"):
        ImageFolder(tmp_path, "test")


def test_folders_of_splits_count(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "test/4.png", "5.png"):
        save(tmp_path / name)
    sources = {split: ImageFolder(tmp_path, split) for split in ("train", "test", "all")}
    names = {split: [f.name for f in source.files] for split, source in sources.items()}
    assert names == {
        "train": ["1.png", "2.png"],
        "test": ["3.png"],
        "all": ["1.png", "2.png", "3.png"],
    }
    assert all(source.class_names == ("cat", "dog") for source in sources.values())
    assert sources["test"][0]["label"] == 1


def test_array_source():
    images = np.zeros((3, 4, 5, 7), np.uint8)
    assert ArraySource(images)[2]["image"].shape == (4, 5, 7)
    assert ArraySource(images).class_names == ()
    assert ArraySource(images, [0, 2, 1]).class_names == ("0", "1", "2")
    with pytest.raises(InputError, match="labels must lie in 0 to 1"):
        ArraySource(images, [0, 2, 1], ["a", "b"])
    with pytest.raises(InputError, match="3 images, but labels"):
        ArraySource(images, [0, 1], ["a", "b"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:cifar10", "the sources are emoji and a folder"),
        ("tfds:mnist", "the sources are emoji and a folder"),
        ("shards/*.tar", "the sources are emoji and a folder"),
        ("no/such/folder", "no/such/folder: no such folder"),
    ],
)
def test_what_is_no_source(spec, message):
    with pytest.raises(InputError, match=message):
        open_source(spec, split="train")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="no image in it"):
        open_source(str(tmp_path), split="train")


def test_emoji_decode_fast_and_have_the_published_sizes():
    emoji.load.cache_clear()
    start = time.monotonic()
    train, test, both = (open_source("emoji", split=split) for split in ("train", "test", "all"))
    assert time.monotonic() - start < 2.0
    assert isinstance(train, Emoji) and (len(train), len(test), len(both)) == (2011, 218, 2229)
    assert len(train.class_names) == 9 and train.class_names == test.class_names
    for source in (train, test):
        counts = np.bincount(source.labels, minlength=9)
        assert counts.min() >= 8
        assert counts[train.class_names.index("people")] < 0.35 * len(source)


def test_emoji_are_where_the_index_says():
    source = Emoji("all")
    image = {entry["name"]: source[i]["image"] for i, entry in enumerate(source.entries)}
    assert len(image) == len(source)
    assert (image["white-large-square"][32, 32] > 200).all()
    assert (image["black-large-square"][32, 32] < 80).all()
    red, green, blue = image["large-green-square"][32, 32].astype(int)
    assert green > red and green > blue
    assert (image["grinning"][0, 0] == 255).all()


def test_emoji_tones_are_equally_frequent():
    tones = ("medium-light", "medium-dark", "light", "medium", "dark")
    counts = dict.fromkeys(tones, 0)
    bases = [entry["base"] for entry in Emoji("all").entries]
    for entry in Emoji("all").entries:
        if bases.count(entry["base"]) == 2:
            for tone in tones:
                counts[tone] += entry["name"].endswith(f"-{tone}")
    # "-light" also ends "-medium-light", and "-dark" "-medium-dark".
    counts["light"] -= counts["medium-light"]
    counts["dark"] -= counts["medium-dark"]
    assert max(counts.values()) - min(counts.values()) <= 5 and min(counts.values()) > 60


def test_emoji_splits_share_no_base_and_no_look_alike():
    train, test = Emoji("train"), Emoji("test")
    assert not {e["base"] for e in train.entries} & {e["base"] for e in test.entries}
    small = [s.images[:, ::2, ::2].reshape(len(s), -1).astype(np.float32) for s in (train, test)]
    a, b = small
    errors = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    assert 10 * np.log10(255**2 / (errors.min() / a.shape[1])) < 26


def test_emoji_genders_and_directions_share_a_split():
    split = {entry["base"]: entry["split"] for entry in Emoji("all").entries}
    assert split["1f9d1-200d-1f680"] == split["1f468-200d-1f680"] == split["1f469-200d-1f680"]
    assert split["1f6b6"] == split["1f6b6-200d-2640-fe0f-200d-27a1-fe0f"]
    assert split["1f1f3-1f1f4"] == split["1f1e7-1f1fb"]  # the same flag twice


def test_emoji_script_gives_one_variant_of_the_wanted_tones():
    path = Path(__file__).parents[2] / "scripts" / "make_emoji.py"
    spec = importlib.util.spec_from_file_location("make_emoji", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tones = list(script.TONES)
    single = {"image": "1f44b.png", "variants": [f"1f44b-{tone}.png" for tone in tones]}
    pair = [f"a-{first}-b-{second}.png" for first in tones for second in tones]
    entries = [dict(single, image=f"{i}.png") for i in range(4)] + [
        {"image": "p", "variants": pair}
    ]
    chosen = script.chosen_variants(entries)
    assert [script.tones_of(chosen[f"{i}.png"]) for i in range(4)] == [(t,) for t in tones[:4]]
    assert script.tones_of(chosen["p"]) == (tones[4], tones[4])
    assert script.joined(["a", "b", "c", "d"], [(1, 2), (2, 3)]) == ["a", "b", "b", "b"]
