"""Label maps and depth maps: from files, through transforms and losses, to pictures and numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from PIL import Image

from vqgan import convert
from vqgan.adversarial.losses import label_loss, pixel_loss
from vqgan.cli import main
from vqgan.data.codes import write_codes
from vqgan.data.maps import VOID, read_depth, read_labels, reader
from vqgan.data.pipeline import DataConfig, eval_batches, image_augment
from vqgan.data.sources import ImageFolder
from vqgan.data.transforms import center_square, resize_smallest_side
from vqgan.errors import InputError
from vqgan.eval.labels import class_counts, mean_iou, pixel_accuracy
from vqgan.eval.runner import evaluate_tokenizer
from vqgan.pictures import from_model, palette, shown, to_model
from vqgan.serialization import from_json, to_json
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig
from vqgan.train import sharding
from vqgan.train import tokenizer as stage1
from vqgan.train.config import LossConfig, OptimConfig, RunConfig, TokenizerTraining
from vqgan.train.sharding import AXES
from vqgan.train.tokenizer import train_tokenizer

CLASSES = 5


def autoencoder(channels):
    return AutoencoderConfig(
        in_channels=channels,
        out_channels=channels,
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=16,
        z_channels=8,
        norm_groups=4,
    )


LABELS = TokenizerTraining(
    model=TokenizerConfig(
        autoencoder=autoencoder(CLASSES),
        quantizer=VQConfig(codebook_size=32, dim=4),
        content="labels",
    ),
    loss=LossConfig(reconstruction="bce", perceptual_weight=0.0, disc_start=-1),
    optim=OptimConfig(lr=3e-3, betas=(0.9, 0.99)),
    ema_decay=0.0,
    data=DataConfig(image_size=16, batch_size=8, holdout=0.25, threads=2),
    run=RunConfig(
        steps=160, log_every=1, eval_every=0, image_every=0, save_every=0, eval_images=16
    ),
)
DEPTH = dataclasses.replace(
    LABELS,
    model=TokenizerConfig(
        autoencoder=autoencoder(1), quantizer=VQConfig(codebook_size=32, dim=4), content="depth"
    ),
    loss=LossConfig(perceptual_weight=0.0, disc_start=-1),
    run=RunConfig(steps=2, log_every=1, eval_every=0, image_every=0, save_every=0),
)


def maps(folder, count=16, size=16, *, void=False):
    """A folder of label maps: one class left of an edge, another right of it."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        labels = np.full((size, size + 4), rng.integers(CLASSES), np.uint8)
        labels[:, rng.integers(4, size) :] = rng.integers(CLASSES)
        if void:
            labels[:2] = 255
        Image.fromarray(labels).save(folder / f"{i}.png")
    return folder


def save(array, path):
    Image.fromarray(array).save(path)
    return path


def opened(path):
    with Image.open(path) as picture:
        return picture.mode, np.asarray(picture)


# From files.


def test_labels_of_every_kind_of_file(tmp_path):
    labels = np.random.default_rng(0).integers(0, 200, (4, 6))
    grey = save(labels.astype(np.uint8), tmp_path / "l.png")
    deep = save(labels.astype(np.uint16), tmp_path / "i.png")
    indexed = Image.fromarray(labels.astype(np.uint8))
    indexed.putpalette(np.random.default_rng(1).integers(0, 255, 768, np.uint8).tobytes())
    indexed.save(tmp_path / "p.png")
    assert opened(tmp_path / "p.png")[0] == "P"
    for path in (grey, deep, tmp_path / "p.png"):
        found = read_labels(path, 200)
        assert found.dtype == np.uint16 and found.shape == (4, 6, 1)
        np.testing.assert_array_equal(found[..., 0], labels)
    bits = save(labels > 100, tmp_path / "1.png")
    np.testing.assert_array_equal(read_labels(bits, 2)[..., 0], labels > 100)


def test_255_is_no_class_unless_there_are_so_many(tmp_path):
    path = save(np.array([[0, 4, 255]], np.uint8), tmp_path / "a.png")
    np.testing.assert_array_equal(read_labels(path, 5)[0, :, 0], [0, 4, VOID])
    np.testing.assert_array_equal(read_labels(path, 256)[0, :, 0], [0, 4, 255])
    deep = save(np.array([[0, 299, 65535]], np.uint16), tmp_path / "b.png")
    np.testing.assert_array_equal(read_labels(deep, 300)[0, :, 0], [0, 299, VOID])


@pytest.mark.parametrize(
    ("array", "name", "words"),
    [
        (np.full((4, 4), 7, np.uint8), "a.png", "value 7, but classes are 0 to 4"),
        (np.full((4, 4), 300, np.uint16), "a.png", "value 300, but classes are 0 to 4"),
        (np.zeros((4, 4, 3), np.uint8), "a.png", "a picture in RGB"),
        (np.zeros((4, 4), np.uint8), "a.jpg", "JPEG changes labels"),
    ],
)
def test_files_that_are_no_label_maps_are_named(tmp_path, array, name, words):
    save(array, tmp_path / name)
    source = ImageFolder(tmp_path, "all", read=reader("labels", CLASSES))
    with pytest.raises(InputError, match=rf"{name}: {words}"):
        list(eval_batches(source, 4, 1, threads=1))


def test_a_damaged_map_is_left_out(tmp_path, caplog):
    maps(tmp_path, 2)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    source = ImageFolder(tmp_path, "all", read=reader("labels", CLASSES))
    assert sum(b["valid"].sum() for b in eval_batches(source, 4, 2)) == 1 and source.broken == 1


def test_depths_keep_their_sixteen_bits(tmp_path):
    depths = np.random.default_rng(0).integers(1000, 40000, (8, 8), np.uint16)
    depths[0, :2] = 1000, 40000
    found = read_depth(save(depths, tmp_path / "a.png"))
    assert found.dtype == np.float32 and found.shape == (8, 8, 1)
    np.testing.assert_allclose(found[..., 0], (depths - 1000.0) / 39000 * 2 - 1, atol=2e-7)
    assert len(np.unique(found)) == len(np.unique(depths))
    flat = read_depth(save(np.full((4, 4), 9, np.uint8), tmp_path / "flat.png"))
    np.testing.assert_array_equal(flat, -1.0)


def test_depths_as_taming_stores_them(tmp_path):
    """Four bytes of RGBA are one float32."""
    depths = np.random.default_rng(0).normal(size=(4, 6)).astype("<f4")
    path = save(depths.view(np.uint8).reshape(4, 6, 4), tmp_path / "a.png")
    expected = (depths - depths.min()) / np.ptp(depths) * 2 - 1
    np.testing.assert_allclose(read_depth(path)[..., 0], expected, atol=1e-6)
    save(np.full((4, 4, 4), 255, np.uint8), tmp_path / "b.png")  # four bytes of a NaN
    with pytest.raises(InputError, match=r"b\.png: depths that are not finite"):
        read_depth(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"c\.png: a picture in RGB"):
        read_depth(save(np.zeros((4, 4, 3), np.uint8), tmp_path / "c.png"))


# Through transforms.


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_resized_labels_are_those_of_the_nearest_pixels(height, width, size):
    """Every label is a place of its own. The middle of each pixel lies in the one it is from."""
    places = np.arange(height * width, dtype=np.uint16).reshape(height, width, 1)
    resized = resize_smallest_side(places, size)[..., 0]
    assert min(resized.shape) == size
    for new, old, found in (
        (resized.shape[0], height, resized // width),
        (resized.shape[1], width, (resized % width).T),
    ):
        middles = (2 * np.arange(new) + 1)[:, None] * old
        assert (2 * new * found.astype(int) <= middles).all()
        assert (middles <= 2 * new * (found.astype(int) + 1)).all()


def test_crops_and_flips_move_labels_and_change_none(tmp_path):
    """Every label is a place of its own, so that an augmented map tells where it came from."""
    places = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20, 1)
    augment = image_augment(DataConfig(image_size=12))
    flipped = set()
    for seed in range(16):
        square = augment({"image": places}, np.random.default_rng(seed))["image"][..., 0]
        steps = np.diff(square.astype(int), axis=1)
        assert (np.diff(square.astype(int), axis=0) == 20).all()
        assert (steps == steps[0, 0]).all() and abs(steps[0, 0]) == 1
        flipped.add(int(steps[0, 0]))
    assert flipped == {-1, 1}


def test_depths_are_resized_as_numbers():
    ramp = np.linspace(-1, 1, 64, dtype=np.float32)[None, :, None].repeat(64, 0)
    small = center_square(ramp, 16)
    assert small.dtype == np.float32 and np.abs(small).max() <= 1.0
    middles = np.linspace(-1, 1, 64).reshape(16, 4).mean(1)
    np.testing.assert_allclose(small[8, 2:-2, 0], middles[2:-2], atol=1e-3)
    edge = np.where(ramp > 0, np.float32(1), np.float32(-1))
    assert np.abs(center_square(edge, 48)).max() == 1.0  # no overshoot


# To the model and back.


def test_one_hot_is_exact_and_void_is_nothing():
    labels = np.array([[[[0], [4]], [[2], [VOID]]]], np.uint16)
    x = np.asarray(to_model(labels, CLASSES))
    expected = np.concatenate([np.eye(5), np.zeros((1, 5))])[[0, 4, 2, 5]].reshape(1, 2, 2, 5)
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(from_model(x, "labels")[0, 0], labels[0, 0])


def test_pictures_of_maps():
    colours = palette()
    assert len(np.unique(colours[:256], axis=0)) == 256
    assert not colours[0].any() and (colours != 255).any(axis=1).all()
    gaps = np.abs(colours[:21, None].astype(int) - colours[None, :21]).max(-1)
    assert gaps[~np.eye(21, dtype=bool)].min() > 60
    labels = np.array([[[[0], [3]], [[7], [VOID]]]], np.uint16)
    expected = [[colours[0], colours[3]], [colours[7], [255, 255, 255]]]
    np.testing.assert_array_equal(shown(labels)[0], expected)
    depths = np.array([-1.0, 0.0, 1.0], np.float32).reshape(1, 1, 3, 1)
    np.testing.assert_array_equal(shown(depths).ravel(), [0, 128, 255])


# Losses and numbers.


def test_label_loss_is_the_cross_entropy_of_every_class():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 4, CLASSES)).astype(np.float32) * 5
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, (2, 4, 4))]
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    entropy = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    x, y = jnp.asarray(logits), jnp.asarray(labels)
    np.testing.assert_allclose(pixel_loss("bce", y, x), entropy.mean(), rtol=1e-5)
    weights = (1.0, 2.0, 0.0, 0.5, 3.0)
    np.testing.assert_allclose(
        pixel_loss("bce", y, x, weights), (entropy * weights).mean(), rtol=1e-5
    )
    y = y.at[0].set(0.0)  # a map of no class at all
    np.testing.assert_allclose(label_loss(y, x), entropy[1].mean(), rtol=1e-5)
    gradient = jax.grad(lambda x: label_loss(y, x))(x)
    assert not gradient[0].any() and gradient[1].all()
    assert label_loss(jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))) == 0.0
    large = jnp.full((1, 1, 1, 2), 1e4)
    assert label_loss(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), large) == 5e3


def test_accuracy_and_iou_over_all_maps():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, CLASSES - 1, (2, 3, 8, 8))  # the last class never occurs
    labels[0, :2] = VOID
    x = to_model(labels[..., None].astype(np.uint16), CLASSES)
    counts = np.asarray(class_counts(x, jax.nn.one_hot(guesses, CLASSES))).sum(0)
    known = labels != VOID
    assert pixel_accuracy(counts) == pytest.approx((labels == guesses)[known].mean())
    overlaps = [
        ((labels == k) & (guesses == k)).sum() / (((labels == k) | (guesses == k)) & known).sum()
        for k in range(CLASSES - 1)
    ]
    assert mean_iou(counts) == pytest.approx(np.mean(overlaps))


# Training.


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Eight devices are the business of other tests, and slow."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = jax.make_mesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", lambda **sizes: mesh)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on maps with pixels of no class, and its numbers by step."""
    place = tmp_path_factory.mktemp("labels")
    data = maps(place / "maps", 24, void=True)
    config = dataclasses.replace(LABELS, data=dataclasses.replace(LABELS.data, source=str(data)))
    train_tokenizer(config, place / "run")
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    return place, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_training_finds_the_classes(trained):
    place, lines = trained
    losses = [line["bce"] for line in lines if line["kind"] == "train"]
    assert losses[0] > 0.65 and np.mean(losses[-20:]) < 0.42  # the frequencies alone: 0.5
    last = lines[-1]
    assert last["kind"] == "eval" and {"bce", "accuracy", "mean_iou", "usage"} <= last.keys()
    assert "lpips" not in last and "l1" not in last
    picture = opened(next((place / "run" / "images").glob("*160*")))[1]
    known = {tuple(colour) for colour in palette()[:CLASSES]} | {(255, 255, 255)}
    assert {tuple(colour) for colour in picture.reshape(-1, 3)} <= known
    tokenizer = Tokenizer.from_pretrained(place / "run")
    assert tokenizer.config.content == "labels"
    read = reader("labels", CLASSES)
    sources = (
        ImageFolder(place / "maps", split, holdout=0.25, read=read) for split in ("train", "test")
    )
    seen, held_out = (
        evaluate_tokenizer(tokenizer, eval_batches(source, 16, 8), None) for source in sources
    )
    assert held_out["accuracy"] == pytest.approx(last["accuracy"])
    assert seen["accuracy"] > 0.45  # so few maps teach little about others; chance: 0.2


@pytest.mark.slow
def test_reconstruct_shows_colours_and_says_how_many_are_right(trained, tmp_path, capsys):
    place, _ = trained
    name = place / "maps" / "3.png"
    command = ["reconstruct", "--model", place / "run", "--images", name, "--out", tmp_path]
    main([str(word) for word in command])
    assert "accuracy" in capsys.readouterr().out
    pair = opened(tmp_path / "3.png")[1]
    left = shown(read_labels(name, CLASSES)[None])[0]
    np.testing.assert_array_equal(pair[2:18, 2:22], left)
    photo = save(np.zeros((16, 16, 3), np.uint8), tmp_path / "photo.png")
    command[4] = photo
    with pytest.raises(SystemExit):
        main([str(word) for word in command])
    assert "photo.png: a picture in RGB" in capsys.readouterr().err


@pytest.mark.slow
def test_depth_is_trained_on_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(stage1, "load_lpips", lambda net: None)
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    for i in range(16):
        depths = rng.integers(1, 2**16) * np.linspace(0.1, 1, 20)[:, None].repeat(16, 1)
        save(depths.astype(np.uint16), tmp_path / "maps" / f"{i}.png")
    data = dataclasses.replace(DEPTH.data, source=str(tmp_path / "maps"))
    tokenizer = train_tokenizer(dataclasses.replace(DEPTH, data=data), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"l1", "psnr"} <= json.loads(lines[-1]).keys()
    assert tokenizer.config.content == "depth"
    assert opened(next((tmp_path / "run" / "images").iterdir()))[0] == "L"


def test_codes_of_maps_are_stored_and_decode_to_labels(trained, tmp_path):
    place, _ = trained
    tokenizer = Tokenizer.from_pretrained(place / "run")
    source = ImageFolder(place / "maps", "test", holdout=0.25, read=reader("labels", CLASSES))
    codes = write_codes(
        lambda pictures: tokenizer.encode(to_model(pictures, CLASSES)),
        source,
        tmp_path / "codes",
        image_size=16,
        codebook_size=32,
        passes=("center", "flip"),
        batch_size=16,
    )
    assert codes.info.count == 2 * len(source)
    pictures = next(eval_batches(source, 16, 16))["image"]
    ids = np.stack([codes[i]["ids"] for i in range(len(source))])
    found = from_model(tokenizer.decode(jnp.asarray(ids)), "labels")
    again = stage1.reconstruct(tokenizer, pictures)[: len(source)]
    assert (found == again).mean() > 0.99  # another order of sums may tip a pixel
    flips = {tuple(codes[len(source) + i]["ids"].ravel()) for i in range(len(source))}
    direct = tokenizer.encode(to_model(pictures[: len(source), :, ::-1], CLASSES))
    assert flips == {tuple(row) for row in np.asarray(direct).reshape(len(source), -1)}


# Refusals.


def with_(config, part, **changes):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (with_(LABELS, "loss", reconstruction="l1"), "bce is for labels"),
        (with_(DEPTH, "loss", reconstruction="bce"), "bce is for labels"),
        (with_(LABELS, "loss", perceptual_weight=1.0), "loss.perceptual_weight 1.0"),
        (with_(LABELS, "loss", disc_start=5), "loss.disc_start 5"),
        (with_(LABELS, "loss", disc_start_fraction=0.5), "loss.disc_start 80"),
        (with_(LABELS, "loss", class_weights=(1.0, 2.0)), "loss.class_weights are 2.*5 classes"),
        (with_(DEPTH, "loss", class_weights=(1.0,)), "loss.class_weights are 1.*no classes"),
        (
            with_(LABELS, "model", autoencoder=dataclasses.replace(autoencoder(5), in_channels=4)),
            "in_channels 4 and out_channels 5 must both be the number of classes",
        ),
        (
            with_(LABELS, "model", autoencoder=dataclasses.replace(autoencoder(5), output="tanh")),
            "output linear",
        ),
        (with_(DEPTH, "model", autoencoder=autoencoder(3)), "must both be 1"),
        (with_(LABELS, "data", source="emoji"), "emoji: not labels"),
        (with_(DEPTH, "data", source="emoji"), "emoji: not depth"),
    ],
)
def test_contradictions_end_before_the_run(config, words, tmp_path):
    if config.data.source != "emoji":
        config = with_(config, "data", source=str(maps(tmp_path / "maps", 4)))
    with pytest.raises(InputError, match=words):
        train_tokenizer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("content", "channels"), [("labels", CLASSES), ("depth", 1)])
def test_the_files_of_taming_say_what_they_are_of(content, channels, tmp_path):
    network = dataclasses.replace(autoencoder(channels), base_channels=32, norm_groups=32)
    config = TokenizerConfig(
        autoencoder=network, quantizer=VQConfig(codebook_size=8, dim=4), content=content
    )
    convert.export(Tokenizer(config, rngs=nnx.Rngs(0)), tmp_path / "a.ckpt", format="taming")
    assert convert.load(tmp_path / "a.ckpt").model.config.content == content


def test_a_tokenizer_of_before_is_one_of_images():
    """A config.json without the field."""
    config = TokenizerConfig(autoencoder=autoencoder(3))
    description = to_json(config)
    assert description.pop("content") == "images"
    assert from_json(TokenizerConfig, description, where="config.json") == config
