"""The command line: what it makes, and how it says no."""

import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from vqgan.adversarial.patchgan import PatchGAN, PatchGANConfig
from vqgan.cli import main
from vqgan.pipeline import Pipeline
from vqgan.serialization import flat_weights
from vqgan.tokenizer.model import Tokenizer


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """The command line sets JAX up for a process of its own; here it must not."""
    cache = str(jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Both stages after two steps on all eight devices."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
        more = ("--steps", "2")
        main(tiny.tokenizer_command(data, place / "tokenizer", *more))
        main(tiny.prior_command(place / "tokenizer", data, place / "prior", *more))
    return place


def refusal(capsys, *argv):
    """The one line with which a command refuses its input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in argv])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vqgan: "), lines
    return lines[0]


# What it makes.


def test_from_a_folder_to_new_images(trained, data, tmp_path, capsys):
    assert {"config.json", "metrics.jsonl", "model", "checkpoints"} <= set(
        os.listdir(trained / "tokenizer")
    )
    lines = (trained / "tokenizer" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["train", "train", "eval"]
    assert {"lpips", "psnr", "ssim"} <= json.loads(lines[-1]).keys()
    assert Tokenizer.from_pretrained(trained / "tokenizer").factor == 2
    pipeline = Pipeline.from_pretrained(trained / "prior")
    assert pipeline.class_names == ("even", "odd")

    folder = data / "even"
    model, pairs = str(trained / "tokenizer"), tmp_path / "pairs"
    main(["reconstruct", "--model", model, "--images", str(folder), "--out", str(pairs)])
    assert len(list(pairs.glob("*.png"))) == len(list(folder.iterdir()))
    assert "PSNR" in capsys.readouterr().out

    for out in ("a", "b"):
        what = "--class odd 0 -n 2 --seed 3"
        places = ("--model", str(trained / "prior"), "--out", str(tmp_path / out))
        main(["sample", *places, *what.split()])
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"odd_0000.png", "odd_0001.png", "even_0000.png", "even_0001.png", "grid.png"}
    for name in names:  # one seed, one picture
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_starts_from_a_model(trained, data, tmp_path):
    """Its architecture is the model's, whatever the options say; without a rate it stays as it is.

    The discriminator that lies beside it comes along.
    """
    start = tmp_path / "start"
    shutil.copytree(trained / "tokenizer" / "model", start)
    judge = PatchGAN(PatchGANConfig(base_channels=8, num_layers=1), rngs=nnx.Rngs(5))
    judge.save_pretrained(start / "discriminator")
    more = f"--init-from {start} --steps 1 --optim.lr 0 --disc-optim.lr 0 --loss.disc-start 0"
    command = tiny.tokenizer_command(data, tmp_path / "run", *more.split())
    main([*command, "--model.autoencoder.z-channels", "16"])
    before, after = (Tokenizer.from_pretrained(place) for place in (start, tmp_path / "run"))
    assert after.config == before.config
    for name, value in flat_weights(before).items():
        if not name.startswith("quantizer.batches"):
            np.testing.assert_array_equal(flat_weights(after)[name], value, err_msg=name)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"]["discriminator"]["base_channels"] == 8


def test_help_and_doctor(capsys):
    main(["--help"])
    assert "train-tokenizer" in capsys.readouterr().out
    main(["doctor"])
    assert "jax-vqgan" in capsys.readouterr().out


def test_import_is_quick_and_leaves_jax_alone():
    code = (
        "import sys, time; t = time.perf_counter(); import vqgan; "
        "t = time.perf_counter() - t; assert t < 2, t; "
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_second_process_compiles_nothing_anew(tmp_path):
    """The compiled program of the first process is read by the second."""
    code = (
        "import jax; from vqgan.cli import _start_jax; _start_jax(); "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); seen = []; "
        "jax.monitoring.register_event_listener(lambda name, **_: seen.append(name)); "
        "from test_train_step import *; stage, init = setup(CONFIG); "
        "jax.jit(functools.partial(step, stage))(jax.jit(init)(), batch(), key=KEY, "
        "perceptual=Perceptual()); "
        "print(sum(n.endswith('/cache_misses') for n in seen), "
        "sum(n.endswith('/cache_hits') for n in seen))"
    )
    unit = os.path.join(os.path.dirname(tiny.__file__), "unit")
    environment = os.environ | {"PYTHONPATH": unit, "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        counts.append([int(count) for count in done.stdout.split()])
    (misses, _), (misses_again, hits) = counts
    assert misses > 0 and misses_again == 0 and hits == misses
    assert (tmp_path / "vqgan" / "compiled").is_dir()


# How it says no.


def test_unknown_names(capsys, tmp_path):
    assert "train-tokenizer" in refusal(capsys, "trian-tokenizer")
    assert "emoji" in refusal(capsys, "train-tokenizer", "emojo", "--out", tmp_path)
    assert "--out" in refusal(capsys, "train-tokenizer", "small")
    assert "--tokenizer" in refusal(capsys, "train-prior", "small", "--out", tmp_path)


def test_folders_without_images(capsys, tmp_path, caplog):
    out = tmp_path / "out"
    missing = tmp_path / "missing"
    assert str(missing) in refusal(capsys, *tiny.tokenizer_command(missing, out))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "note.txt").write_text("no image")
    assert "no image" in refusal(capsys, *tiny.tokenizer_command(empty, out))
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(3):
        (broken / f"{i}.png").write_bytes(b"\x89PNG but not really")
    assert "none of its" in refusal(capsys, *tiny.tokenizer_command(broken, out))
    assert "cannot be read" in caplog.text
    assert not out.exists()


def test_sizes_that_do_not_fit(capsys, data, tmp_path):
    def command(*more):
        return tiny.tokenizer_command(data, tmp_path / "out", *more)

    assert "not a multiple of 2" in refusal(capsys, *command("--data.image-size", "31"))
    assert "resolution" in refusal(capsys, *command("--model.autoencoder.resolution", "15"))
    assert "batch_size 3" in refusal(capsys, *command("--data.batch-size", "3"))
    assert "tensor 3" in refusal(capsys, *command("--run.tensor", "3"))
    assert not (tmp_path / "out").exists()


def test_model_directories_that_are_none(capsys, data, trained, tmp_path):
    def reconstruct(model):
        return ("reconstruct", "--model", model, "--images", data, "--out", tmp_path / "out")

    assert "no such model directory" in refusal(capsys, *reconstruct(tmp_path / "nothing"))
    (tmp_path / "bare").mkdir()
    assert "config.json" in refusal(capsys, *reconstruct(tmp_path / "bare"))
    prior = trained / "prior" / "model" / "prior"
    assert "not a Tokenizer" in refusal(capsys, *reconstruct(prior))

    strange = tmp_path / "strange"
    Tokenizer.from_pretrained(trained / "tokenizer").save_pretrained(strange)
    description = json.loads((strange / "config.json").read_text())
    description["config"]["autoencoder"]["colour"] = "blue"
    (strange / "config.json").write_text(json.dumps(description))
    assert "colour" in refusal(capsys, *reconstruct(strange))

    missing = ("reconstruct", "--model", trained / "tokenizer", "--images", tmp_path / "no.png")
    assert "no such image" in refusal(capsys, *missing, "--out", tmp_path / "out")


def test_classes_out_of_range(capsys, trained, tmp_path):
    command = ("sample", "--model", trained / "prior", "--out", tmp_path / "out", "--class")
    assert "class 2: there is none" in refusal(capsys, *command, "2")
    assert "even, odd" in refusal(capsys, *command, "cats")
    assert "top_p" in refusal(capsys, *command, "0", "--top-p", "0")
    assert not (tmp_path / "out").exists()


def test_run_of_another_config(capsys, trained, data):
    more = ("--steps", "2", "--optim.lr", "0.5")
    line = refusal(capsys, *tiny.tokenizer_command(data, trained / "tokenizer", *more))
    assert "optim.lr" in line and "disc" not in line


def test_prior_over_another_tokenizer(capsys, trained, data, tmp_path):
    other = tmp_path / "tokenizer"
    weights = other / "model.safetensors"
    shutil.copytree(trained / "tokenizer" / "model", other)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    codes = trained / "prior" / "codes"
    before = {path: path.read_bytes() for path in codes.rglob("*") if path.is_file()}
    command = tiny.prior_command(other, data, trained / "prior", "--steps", "2")
    line = refusal(capsys, *command, "--data.batch-size", "8")
    assert "tokenizer" in line
    assert before and all(path.read_bytes() == content for path, content in before.items())


def test_output_below_a_file(capsys, data, trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    assert str(tmp_path) in refusal(capsys, *tiny.tokenizer_command(data, out))
    command = ("sample", "--model", trained / "prior", "--class", "0", "-n", "1", "--out", out)
    assert str(tmp_path) in refusal(capsys, *command)


def test_full_disk(capsys, data, trained, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr("pathlib.Path.write_text", full)
    out = tmp_path / "out"
    line = refusal(capsys, *tiny.tokenizer_command(data, out))
    assert "No space left on device" in line and str(out) in line
    assert list(out.iterdir()) == []  # nothing in part

    monkeypatch.undo()
    monkeypatch.setattr("PIL.Image.Image.save", lambda image, path, *_, **__: full(path))
    command = ("reconstruct", "--model", trained / "tokenizer", "--images", data / "even")
    assert "No space left" in refusal(capsys, *command, "--out", out)


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_the_run(capsys, data, tmp_path):
    more = "--steps 6 --optim.lr inf --optim.warmup-steps 0"
    with pytest.raises(SystemExit) as exit:
        main(tiny.tokenizer_command(data, tmp_path / "out", *more.split()))
    assert exit.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vqgan: step 2: ") and "l1" in line and "not finite" in line
    steps = [p for p in (tmp_path / "out" / "checkpoints").iterdir() if p.name.isdigit()]
    assert not steps, "a state with such numbers was saved"
