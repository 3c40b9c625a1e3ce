"""`vqgan convert` from the command line: a download to pictures and back, and how it says no."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_cli import refusal, settings  # noqa: F401 (a fixture)

from vqgan.cli import main
from vqgan.convert import taming
from vqgan.convert.exporting import Exported
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig


@pytest.fixture(scope="module")
def download(tmp_path_factory):
    """A taming checkpoint with its YAML."""
    autoencoder = AutoencoderConfig(
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=16,
        z_channels=4,
    )
    config = TokenizerConfig(
        autoencoder=autoencoder,
        quantizer=VQConfig(codebook_size=8, dim=4, beta_on="codebook"),
    )
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    tokenizer.quantizer.codebook[...] = jax.random.normal(jax.random.key(0), (8, 4))
    place = tmp_path_factory.mktemp("download")
    taming.save(Exported(tokenizer=tokenizer), place / "last.ckpt")
    return place / "last.ckpt", tokenizer


def test_from_a_download_to_pictures_and_back(download, tmp_path, capsys):
    file, tokenizer = download
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    main(["convert", str(file), model, "--licence", "mit"])
    assert "taming" in capsys.readouterr().out
    data = tiny.images(tmp_path / "images", count=2)
    main(["reconstruct", "--model", model, "--images", str(data), "--out", out])
    assert capsys.readouterr().out.count("PSNR") == 2
    main(["convert", model, str(tmp_path / "back.safetensors"), "--to", "taming"])
    assert (tmp_path / "back.yaml").exists()
    main(["convert", str(tmp_path / "back.safetensors"), str(tmp_path / "again")])
    again = Tokenizer.from_pretrained(tmp_path / "again")
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)), jnp.float32)
    np.testing.assert_array_equal(again.encode(images), tokenizer.encode(images))


def test_help_lists_the_formats_with_examples(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["convert", "--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    for word in ("taming", "net2net", "llamagen", "ibq", "maskgit", "diffusers", "vqgan-jax"):
        assert word in said
    assert said.count("vqgan convert ") > 8 and "--to" in said


class _Malicious:
    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_a_pickle_with_code_in_it_is_refused_by_name(capsys, tmp_path):
    payload = _Malicious()
    _Malicious.sentinel = tmp_path / "ran"
    file, model = tmp_path / "model.ckpt", tmp_path / "model"
    file.write_bytes(pickle.dumps({"state_dict": payload}))
    line = refusal(capsys, "convert", file, model)
    assert "system" in line and str(file) in line
    assert not (tmp_path / "ran").exists() and not model.exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "html", "text", "directory"])
def test_files_that_are_no_weights(kind, download, capsys, tmp_path):
    file, _ = download
    path, model = tmp_path / "model.ckpt", tmp_path / "model"
    content = {
        "empty": b"",
        "cut": file.read_bytes()[:-1000],
        "html": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "text": b"hello\n",
    }
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    assert str(path) in refusal(capsys, "convert", path, model)
    assert not model.exists()


def test_configs_that_are_none(download, capsys, tmp_path):
    file, _ = download
    model = tmp_path / "model"
    line = refusal(capsys, "convert", file, model, "--config", tmp_path / "no.yaml")
    assert "no such config" in line
    (tmp_path / "bad.yaml").write_text("model: [")
    line = refusal(capsys, "convert", file, model, "--config", tmp_path / "bad.yaml")
    assert "not a YAML" in line
    assert not model.exists()
