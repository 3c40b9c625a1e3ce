"""Configs and models are read strictly: all that is wrong is said, and nothing is guessed."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from vqgan.errors import InputError
from vqgan.serialization import differing_fields, from_json, read_json, to_json
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig
from vqgan.train.config import OptimConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, ["colour"]),
        ({"lr": "fast"}, ["lr", "'fast' is not of type float"]),
        ({"accumulate": 1.5}, ["accumulate", "1.5 is not of type int"]),
        ({"accumulate": True}, ["accumulate"]),
        ({"betas": [0.5]}, ["betas"]),
        ({"betas": 0.5}, ["betas"]),
        ({"schedule": "linear"}, ["schedule"]),
        ({"colour": 1, "lr": None, "betas": []}, ["colour", "lr", "betas"]),  # all at once
    ],
)
def test_reading_is_strict(changes, words):
    data = to_json(OptimConfig()) | changes
    with pytest.raises(InputError) as error:
        from_json(OptimConfig, data, where="config.json")
    message = str(error.value)
    assert message.startswith("config.json: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_integers_are_numbers_and_absent_fields_have_their_defaults():
    config = from_json(OptimConfig, {"lr": 1}, where="x")
    assert config == OptimConfig(lr=1.0) and type(config.lr) is float


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_object_is_no_config(data):
    with pytest.raises(InputError, match="x: "):
        from_json(OptimConfig, data, where="x")


def test_files_that_hold_no_json(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(InputError, match="not JSON"):
        read_json(tmp_path / "half.json")


def test_differing_fields_are_named_with_dots():
    a = TokenizerConfig()
    b = dataclasses.replace(a, quantizer=dataclasses.replace(a.quantizer, beta=1.0, dim=3))
    assert differing_fields(a, b) == ["quantizer.dim", "quantizer.beta"]
    assert differing_fields(a, a) == []


@pytest.fixture
def directory(tmp_path):
    config = TokenizerConfig(
        autoencoder=AutoencoderConfig(
            base_channels=4,
            channel_multipliers=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            resolution=8,
            z_channels=4,
            norm_groups=2,
        ),
        quantizer=VQConfig(codebook_size=4, dim=2),
    )
    Tokenizer(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(directory):
    with pytest.raises(InputError) as error:
        Tokenizer.from_pretrained(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_tensor_that_does_not_fit_is_named(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["quant_conv.bias"]
    weights["quantizer.codebook"] = np.zeros((5, 2), np.float32)
    weights["extra.kernel"] = np.zeros(1, np.float32)
    save_file(weights, directory / "model.safetensors")
    message = refusal(directory)
    assert "quant_conv.bias is missing" in message
    assert "extra.kernel is unexpected" in message
    assert "quantizer.codebook has shape (5, 2), not (4, 2)" in message


def test_broken_directories(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in refusal(directory)
    weights.unlink()
    assert "cannot be read" in refusal(directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "Prior"}))
    assert "holds a Prior, not a Tokenizer" in refusal(directory)
    config.write_text("[1, 2]")
    assert "not a Tokenizer" in refusal(directory)
    config.unlink()
    assert "no config.json" in refusal(directory)


def test_a_save_that_fails_leaves_the_old_model(directory, monkeypatch):
    before = (directory / "model.safetensors").read_bytes()
    tokenizer = Tokenizer.from_pretrained(directory)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vqgan.serialization.save_file", full)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save_pretrained(directory)
    assert (directory / "model.safetensors").read_bytes() == before
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


def test_a_save_replaces_models_only(directory):
    tokenizer = Tokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory.parent / "empty").mkdir()
    tokenizer.save_pretrained(directory.parent / "empty")
    work = directory.parent / "work"
    work.mkdir()
    for name in ("config.json", "thesis.tex"):  # a config.json of something else is no mark
        (work / name).write_text("{}")
    for place in (work, work / "thesis.tex"):
        with pytest.raises(InputError, match=r"(is no model|is a file); give"):
            tokenizer.save_pretrained(place)
    assert sorted(path.name for path in work.iterdir()) == ["config.json", "thesis.tex"]
