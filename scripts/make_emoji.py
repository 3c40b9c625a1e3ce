"""Makes the embedded set of `vqgan.data.emoji` from the Noto emoji of emoji-datasource-google.

    python scripts/make_emoji.py SRC_DIR [OUT_DIR]

SRC_DIR holds `emoji.json` (one entry a base emoji: category, subcategory, files of its variants),
`noto-emoji-64.zip` (64x64 RGBA PNG) and the licence of the images. Running it twice gives the same
bytes, for one version of Pillow's WebP encoder.

What is in the set: every base emoji but those of the category Component, which are bare skin tones.
A base that comes in skin tones gives one picture more. The tones take turns down the list, so that
each of the five is in the set equally often, gendered siblings, which are neighbours in the list,
differ in tone, and People & Body are a third of the set rather than two thirds. For two people the
two tones take turns apart, so that most couples are mixed, as in the source.

Pixels: composited on white, then each channel rounded to a multiple of 3. That changes no value by
more than 1 in 255, keeps black and white, and saves a quarter of the bytes. One lossless WebP sheet
a class, row by row in the order of `index.json`, is a third smaller than single PNG files.

Split: groups of look-alikes stay on one side, and at most a tenth of each class is `test`. A group
is joined from
  - a base and its variants;
  - bases of one code sequence but for gender, age and direction: 1F468 man, 1F469 woman and 1F9D1
    person count as one, signs for male, female and rightwards are left out;
  - the couples and families, the clock faces, the keycaps and the moon phases, each one group: they
    differ in a detail;
  - any two pictures within 25 dB of each other, such as the flags of Norway and Bouvet Island.
A flag is a pair of regional letters, which counts as a whole. The groups of a class come in the
order of a hash of their names; each goes to `test` while that has room for it, unless it would fill
more than a quarter of the room (keycaps alone would be half of the symbols).
"""

import argparse
import collections
import hashlib
import io
import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
SIZE, COLUMNS = 64, 32
LEVEL = 3
TEST_FRACTION = 0.1
LOOK_ALIKE_DB = 25.0
LICENCE = "LICENSE-APACHE-2.0.txt"


def tones_of(file: str) -> tuple[str, ...]:
    """Skin tones in a file name, one a person; a single one stands for all."""
    return tuple(re.findall("|".join(TONES), file))


def chosen_variants(entries: list[dict]) -> dict[str, str]:
    """File of the one variant of each base that has variants, by the base's file."""
    chosen = {}
    toned = [entry for entry in entries if entry["variants"]]
    pairs = itertools.count()
    for turn, entry in enumerate(toned):
        tones = list(TONES)
        wanted = [tones[turn % 5]]
        if len(entry["variants"]) > len(TONES):
            wanted.append(tones[(turn + next(pairs)) % 5])
        matches = [v for v in entry["variants"] if set(tones_of(v)) == set(wanted)]
        in_order = [v for v in matches if list(tones_of(v)) == wanted]
        chosen[entry["image"]] = (in_order or matches)[0]
    return chosen


def group_key(entry: dict) -> str:
    """Names what an emoji shows, whoever shows it and whichever way they face."""
    name, subcategory = entry["short_name"], entry["subcategory"]
    if re.fullmatch(r"clock\d+", name):
        return "clock face"
    if name == "moon" or re.search(r"(new|crescent|quarter|gibbous|full)_moon", name):
        return "moon phase"
    if subcategory in ("family", "keycap"):
        return subcategory
    sequence = entry["unified"].split("-")
    if entry["category"] == "People & Body":
        person = {"1F468": "1F9D1", "1F469": "1F9D1"}
        age = {"1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"}
        sequence = [(person | age).get(code, code) for code in sequence]
        sequence = [code for code in sequence if code not in ("2640", "2642", "27A1")]
    return "-".join(code for code in sequence if code not in ("200D", "FE0F"))


def read_rgb(archive: zipfile.ZipFile, file: str) -> np.ndarray:
    """A picture on white, its channels multiples of LEVEL."""
    picture = Image.open(io.BytesIO(archive.read(file))).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    pixels = np.asarray(canvas.convert("RGB")).astype(np.int32)
    return ((pixels + LEVEL // 2) // LEVEL * LEVEL).astype(np.uint8)


def look_alikes(images: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of images whose PSNR is at least LOOK_ALIKE_DB."""
    flat = images.reshape(len(images), -1).astype(np.float64)  # sums of squares stay exact
    squares = np.square(flat).sum(axis=1)
    errors = (squares[:, None] + squares[None, :] - 2 * flat @ flat.T) / flat.shape[1]
    near = np.argwhere(np.triu(errors <= 255**2 / 10 ** (LOOK_ALIKE_DB / 10), k=1))
    return [(int(i), int(j)) for i, j in near]


def joined(keys: list[str], pairs: Iterable[tuple[int, int]]) -> list[str]:
    """One name a group: keys, merged where a pair of members links them."""
    name = {key: key for key in keys}
    for i, j in pairs:
        first, second = sorted((name[keys[i]], name[keys[j]]))
        name = {key: first if value == second else value for key, value in name.items()}
    return [name[key] for key in keys]


def held_out(classes: list[str], groups: list[str]) -> set[str]:
    """Groups for `test`. A group counts towards the class of its first member."""
    class_of = dict(zip(reversed(groups), reversed(classes), strict=True))
    size = collections.Counter(groups)
    room = {name: int(TEST_FRACTION * n) for name, n in collections.Counter(classes).items()}
    left = dict(room)
    chosen = set()
    for group in sorted(class_of, key=lambda g: hashlib.sha256(g.encode()).digest()):
        name = class_of[group]
        if size[group] <= min(left[name], room[name] // 4):
            left[name] -= size[group]
            chosen.add(group)
    return chosen


def sheet(images: np.ndarray) -> Image.Image:
    """Tiles [n, 64, 64, 3] row by row on a white sheet of COLUMNS columns."""
    rows = -(-len(images) // COLUMNS)
    tiles = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    tiles[: len(images)] = images
    grid = tiles.reshape(rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * SIZE, COLUMNS * SIZE, 3))


def describe(entry: dict, file: str) -> dict:
    """The index entry of one picture, as yet without its split."""
    tones = [TONES[tone] for tone in tones_of(file)]
    name = "-".join([entry["short_name"].replace("_", "-"), *dict.fromkeys(tones)])
    return {"name": name, "class": CLASSES[entry["category"]], "base": entry["unified"].lower()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    default = Path(__file__).parents[1] / "src/vqgan/data/emoji"
    parser.add_argument("out", type=Path, nargs="?", default=default)
    arguments = parser.parse_args()

    entries = json.loads((arguments.source / "emoji.json").read_text())
    entries = [entry for entry in entries if entry["category"] in CLASSES]
    entries.sort(key=lambda e: (list(CLASSES).index(e["category"]), e["sort_order"], e["unified"]))
    variants = chosen_variants(entries)
    pictures = [
        (entry, file)
        for entry in entries
        for file in (entry["image"], variants.get(entry["image"]))
        if file
    ]
    with zipfile.ZipFile(arguments.source / "noto-emoji-64.zip") as archive:
        images = np.stack([read_rgb(archive, file) for _, file in pictures])
    index = [describe(entry, file) for entry, file in pictures]
    groups = joined([group_key(entry) for entry, _ in pictures], look_alikes(images))
    test = held_out([item["class"] for item in index], groups)
    for item, group in zip(index, groups, strict=True):
        item["split"] = "test" if group in test else "train"

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in CLASSES.values():
        members = [i for i, item in enumerate(index) if item["class"] == name]
        path = arguments.out / f"{name}.webp"
        sheet(images[members]).save(path, lossless=True, quality=80, method=6)
    lines = ",\n".join(json.dumps(item) for item in index)
    (arguments.out / "index.json").write_text(f"[\n{lines}\n]\n")
    shutil.copyfile(arguments.source / LICENCE, arguments.out / LICENCE)


if __name__ == "__main__":
    main()
