"""Codes that stage 1 stores for stage 2."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from vqgan.data.codes import CodeSource, write_codes
from vqgan.data.pipeline import DataConfig, eval_batches, train_batches
from vqgan.data.sources import ArraySource, ImageFolder
from vqgan.errors import InputError


def encode(images: np.ndarray) -> np.ndarray:
    """Each 2x2 patch of the red channel becomes its upper left value."""
    assert images.shape[0] == 4 and images.dtype == np.uint8
    return images[:, ::2, ::2, 0].astype(np.int32)


def striped(count: int) -> ArraySource:
    """Images 8x8 of which no two columns of patches are alike."""
    columns = np.arange(8) // 2 + 4 * np.arange(count)[:, None]
    images = np.broadcast_to(columns[:, None, :, None], (count, 8, 8, 3)).astype(np.uint8)
    return ArraySource(images, np.arange(count) % 3, ("a", "b", "c"))


def write(source, out, encode=encode, **options) -> CodeSource:
    arguments = {"image_size": 8, "codebook_size": 256, "batch_size": 4, "threads": 2, **options}
    return write_codes(encode, source, out, **arguments)


def test_codes_come_back_pass_by_pass(tmp_path):
    source = striped(5)
    seen = []
    codes = write(
        source, tmp_path / "codes", progress=lambda done, total: seen.append((done, total))
    )
    assert len(codes) == 10 and seen == [(4, 10), (8, 10), (10, 10)]
    expected = source.images[:, ::2, ::2, 0]
    for i in range(5):
        center, flipped = codes[i], codes[5 + i]
        assert center["ids"].dtype == np.int32 and center["label"].dtype == np.int32
        assert np.array_equal(center["ids"], expected[i])
        assert np.array_equal(flipped["ids"], expected[i, :, ::-1])
        assert center["label"] == flipped["label"] == i % 3


def test_info_describes_the_codes(tmp_path):
    info = write(striped(5), tmp_path / "codes", tokenizer="runs/a").info
    assert info.grid == (4, 4) and info.count == 10 and info.passes == ("center", "flip")
    assert info.class_names == ("a", "b", "c") and info.tokenizer == "runs/a"
    assert info.image_size == 8 and info.channels == 3
    assert np.array_equal(info.counts, [[8] * 20 + [0] * 236])
    assert CodeSource(tmp_path / "codes").info == info


def test_unigram_entropy(tmp_path):
    codes = write(striped(5), tmp_path / "codes")
    assert codes.unigram_entropy_bits == pytest.approx(math.log2(20))


def test_several_codes_a_position_have_their_own_frequencies(tmp_path):
    def two_levels(images):
        ids = encode(images)
        return np.stack([ids, np.zeros_like(ids)], axis=-1)

    source = striped(4)
    codes = write(source, tmp_path / "codes", two_levels, passes=("center",))
    assert codes.info.grid == (4, 4, 2) and codes.info.count == 4
    assert np.array_equal(codes[1]["ids"], two_levels(source.images)[1])
    assert codes.unigram_entropy_bits == pytest.approx((math.log2(16) + 0) / 2)


def test_large_codebooks_keep_their_ids(tmp_path):
    codes = write(striped(4), tmp_path / "codes", lambda x: encode(x) + 70_000, codebook_size=2**17)
    assert codes[0]["ids"].min() == 70_000


def test_ten_crop_stores_ten_views(tmp_path):
    source = ArraySource(np.random.default_rng(0).integers(0, 256, (2, 22, 22, 3), np.uint8))
    codes = write(source, tmp_path / "codes", passes=("ten-crop",), image_size=20)
    ids = np.stack([codes[i]["ids"] for i in range(len(codes))])
    crops = source.images[1]
    assert len(codes) == 20
    assert np.array_equal(ids[10], crops[:20:2, :20:2, 0])
    assert np.array_equal(ids[13], crops[2::2, 2::2, 0])
    assert np.array_equal(ids[15], crops[:20, 19::-1][::2, ::2, 0])


def test_broken_images_are_left_out(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"not an image")
    codes = write(ImageFolder(folder, "all"), tmp_path / "codes", passes=("center",))
    assert [codes[i]["ids"][0, 0] for i in range(len(codes))] == [0, 2]


def test_stage_2_reads_codes_as_stage_1_reads_images(tmp_path):
    codes = write(striped(5), tmp_path / "codes")
    stream = train_batches(codes, DataConfig(batch_size=5), seed=0, steps=2, augment=None)
    batches = list(stream)
    assert batches[0]["ids"].shape == (5, 4, 4)
    seen = np.concatenate([batch["ids"] for batch in batches])
    stored = np.stack([codes[i]["ids"] for i in range(10)])
    assert sorted(map(bytes, seen)) == sorted(map(bytes, stored))
    assert sum(batch["valid"].sum() for batch in eval_batches(codes, None, 4)) == 10


def test_failing_leaves_nothing_and_keeps_what_was_there(tmp_path):
    calls = []

    def failing(images):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        write(striped(5), tmp_path / "codes", failing)
    assert list(tmp_path.iterdir()) == []
    before = write(striped(5), tmp_path / "codes")
    with pytest.raises(KeyboardInterrupt):
        write(striped(3), tmp_path / "codes", failing)
    assert len(CodeSource(tmp_path / "codes")) == len(before)
    assert len(write(striped(3), tmp_path / "codes")) == 6


def test_killing_leaves_no_directory_of_codes(tmp_path):
    program = """
        import os, signal, sys
        import numpy as np
        from vqgan.data.codes import write_codes
        from vqgan.data.sources import ArraySource

        def encode(images):
            if encode.calls:
                os.kill(os.getpid(), signal.SIGKILL)
            encode.calls += 1
            return np.zeros((4, 2, 2), np.int32)

        encode.calls = 0
        source = ArraySource(np.zeros((9, 8, 8, 3), np.uint8))
        write_codes(encode, source, sys.argv[1], image_size=8, codebook_size=2, batch_size=4)
    """
    out = tmp_path / "codes"
    command = [sys.executable, "-c", textwrap.dedent(program), str(out)]
    process = subprocess.run(command, env=os.environ, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())


def test_what_write_codes_rejects(tmp_path):
    source = striped(4)
    with pytest.raises(InputError, match="give some of center, flip, ten-crop"):
        write(source, tmp_path / "codes", passes=("mirror",))
    (tmp_path / "letters").mkdir()
    with pytest.raises(InputError, match="exists and holds no codes"):
        write(source, tmp_path / "letters")
    with pytest.raises(ValueError, match="codebook of 8"):
        write(source, tmp_path / "codes", codebook_size=8)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_incomplete_directories_are_input_errors(tmp_path):
    directory = tmp_path / "codes"
    with pytest.raises(InputError, match="holds no codes"):
        CodeSource(directory)
    write(striped(4), directory)
    record = directory / "codes-flip.array_record"
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"codes-flip\.array_record"):
        CodeSource(directory)
    record.unlink()
    with pytest.raises(InputError, match=r"codes-flip\.array_record: no such file"):
        CodeSource(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 7}, "8 records, but codes.json says 7"),
        ({"grid": [4, 5]}, "do not have the grid"),
        ({"color": "red"}, "color"),
    ],
)
def test_mismatched_directories_are_input_errors(tmp_path, change, message):
    write(striped(4), tmp_path / "codes")
    path = tmp_path / "codes" / "codes.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        CodeSource(tmp_path / "codes")
