"""Import and export without torch: taming's format, the accounting of tensors, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from vqgan import convert
from vqgan.adversarial.lpips import LPIPS, LPIPSConfig, published_weights
from vqgan.adversarial.patchgan import PatchGAN, PatchGANConfig
from vqgan.convert import taming
from vqgan.convert.containers import open_checkpoint, write_torch
from vqgan.convert.exporting import Exported
from vqgan.convert.families import FAMILIES, describe
from vqgan.errors import InputError
from vqgan.serialization import flat_weights, with_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import LFQConfig, VQConfig

AUTOENCODER = AutoencoderConfig(
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    resolution=16,
    z_channels=5,
)
CONFIG = TokenizerConfig(
    autoencoder=AUTOENCODER,
    quantizer=VQConfig(
        codebook_size=12, dim=4, beta_on="codebook", init_from_data=False, revive_after=0
    ),
)


def noisy(model, seed=0):
    """The model with random numbers in every variable, also where it starts from zeros."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(model)
    filled = [
        (path, v.replace(jnp.asarray(0.3 * rng.normal(size=v.shape), v.dtype)))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@pytest.fixture(scope="module")
def tokenizer():
    return noisy(Tokenizer(CONFIG, rngs=nnx.Rngs(0)))


def saved(tokenizer, path, **parts):
    """A taming checkpoint with its YAML, a discriminator, and what else its loss holds."""
    judge = noisy(PatchGAN(PatchGANConfig(base_channels=4, num_layers=2), rngs=nnx.Rngs(0)))
    exported = Exported(tokenizer=tokenizer, parts={"discriminator": judge, **parts})
    assert taming.save(exported, path) == ()
    return path


@pytest.fixture
def file(tokenizer, tmp_path):
    """A checkpoint without the 59 MB of LPIPS."""
    return saved(tokenizer, tmp_path / "last.ckpt")


@pytest.fixture
def whole_file(tokenizer, tmp_path):
    abstract = nnx.eval_shape(lambda: LPIPS(LPIPSConfig(net="vgg16"), rngs=nnx.Rngs(0)))
    lpips = with_weights(abstract, published_weights("vgg16"), where="lpips")
    return saved(tokenizer, tmp_path / "last.ckpt", lpips=lpips)


def changed(file, change):
    """The file with its tensors changed in place by a function."""
    state = {n: t.read() for n, t in open_checkpoint(file).below("state_dict").items()}
    change(state)
    write_torch(file, {"state_dict": state})
    return file


def assert_equal_weights(a, b):
    before, after = flat_weights(a), flat_weights(b)
    assert before.keys() == after.keys()
    for name in before:
        if not name.startswith("quantizer.batches_"):  # counts of a training: no format has them
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_there_and_back_bit_for_bit(whole_file, tokenizer, tmp_path):
    imported = convert.convert(whole_file, tmp_path / "model", licence="mit")
    assert imported.format == "taming" and set(imported.parts) == {"discriminator", "lpips"}
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config == CONFIG
    assert_equal_weights(tokenizer, loaded)
    convert.export(tmp_path / "model", tmp_path / "again.ckpt")
    before, after = (
        open_checkpoint(tmp_path / name).tensors for name in ("last.ckpt", "again.ckpt")
    )
    assert before.keys() == after.keys() and len(before) > 150
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].read(), tensor.read(), err_msg=name)


def test_provenance(whole_file, tmp_path):
    convert.convert(whole_file, tmp_path / "model", licence="mit")
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert provenance["format"] == "taming" and provenance["source"] == "last.ckpt"
    assert provenance["licence"] == "mit" and len(provenance["sha256"]) == 64
    assert "LPIPS is the published one" in provenance["notes"]


def test_works_like_the_model_it_came_from(file, tokenizer):
    images = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3), minval=-1.0)
    imported = convert.load(file).model
    np.testing.assert_array_equal(imported.encode(images), tokenizer.encode(images))


def test_architecture_by_shapes_alone(file, tokenizer):
    file.with_suffix(".yaml").unlink()
    imported = convert.load(file)
    assert_equal_weights(tokenizer, imported.model)
    assert any("no config" in note for note in imported.notes)


def test_every_tensor_is_accounted_for_in_one_error(file):
    def change(state):
        del state["encoder.conv_out.bias"]
        state["decoder.surplus.weight"] = np.zeros(3, np.float32)
        state["quant_conv.weight"] = np.zeros((7, 5, 1, 1), np.float32)

    with pytest.raises(InputError) as error:
        convert.load(changed(file, change))
    line = str(error.value)
    assert "encoder.conv_out.bias is missing" in line
    assert "decoder.surplus.weight is unexpected" in line
    assert "quant_conv.weight has shape (7, 5, 1, 1), not (4, 5, 1, 1)" in line
    assert "\n" not in line


def test_leftovers_of_the_loss_are_named_too(file):
    def change(state):
        state["loss.logvar"] = np.zeros(1, np.float32)

    with pytest.raises(InputError, match=r"loss\.logvar is unexpected"):
        convert.load(changed(file, change))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("double_z", True, "double_z is set"),
        ("use_linear_attn", True, "linear attention"),
        ("attn_type", "fancy", "'fancy' is not here"),
        ("colour", "blue", "colour: unknown here"),
        ("ch", 64, "has shape"),
    ],
)
def test_options_that_do_not_fit(file, option, value, words):
    config = yaml.safe_load(file.with_suffix(".yaml").read_text())
    config["model"]["params"]["ddconfig"][option] = value
    file.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=words):
        convert.load(file)


def test_a_config_of_another_class_or_without_what_is_needed(file):
    config = yaml.safe_load(file.with_suffix(".yaml").read_text())
    params = config["model"]["params"]
    config["model"] = {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": params}
    file.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"of src\.IBQ\.models\.ibqgan\.IBQ, which is not among"):
        convert.load(file, format="taming")
    del params["ddconfig"]["ch_mult"], params["ddconfig"]["ch"]
    config["model"] = {"target": "taming.models.vqgan.VQModel", "params": params}
    file.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="ddconfig: ch, ch_mult: missing"):
        convert.load(file)


def test_what_taming_cannot_say(tmp_path):
    autoencoder = AutoencoderConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=16,
        z_channels=6,
        norm_groups=4,
        middle_attention=False,
    )
    config = TokenizerConfig(autoencoder=autoencoder, quantizer=LFQConfig(dim=6))
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    with pytest.raises(InputError) as error:
        convert.export(tokenizer, "never.ckpt", format="taming")
    for word in ("norm_groups 4", "middle_attention False", "quantizer.kind 'lfq'"):
        assert word in str(error.value)
    judge = PatchGAN(PatchGANConfig(base_channels=4, norm="none"), rngs=nnx.Rngs(0))
    exported = Exported(
        tokenizer=Tokenizer(CONFIG, rngs=nnx.Rngs(0)), parts={"discriminator": judge}
    )
    with pytest.raises(InputError, match="cannot say discriminator"):
        taming.save(exported, tmp_path / "never.ckpt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="there are taming"):
        convert.export(tokenizer, "never", format="keras")


def test_a_folder_that_is_no_model_is_kept(file, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"picture")
    with pytest.raises(InputError, match="give another place"):
        convert.convert(file, photos)
    assert (photos / "a.jpg").read_bytes() == b"picture"


def test_the_download_itself_is_kept(file, tmp_path):
    """Published weights are called as ours are, and may lie where they are to be converted to."""
    for name in ("model.safetensors", "provenance.json"):
        (file.parent / name).write_bytes(b"{}")
        with pytest.raises(InputError, match="would replace"):
            convert.convert(file, file.parent)
        with pytest.raises(InputError, match="would replace"):
            convert.convert(file.parent, file.parent)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="give another place"):
        convert.convert(file, other)
    assert file.exists() and (other / "model.safetensors").read_bytes() == b"weights"


def test_an_earlier_import_is_replaced(file, tmp_path):
    for _ in range(2):
        convert.convert(file, tmp_path / "model")
    assert Tokenizer.from_pretrained(tmp_path / "model").config == CONFIG


def test_a_failed_import_leaves_nothing(file, tmp_path):
    with pytest.raises(InputError):
        convert.convert(changed(file, lambda s: s.pop("quant_conv.bias")), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_unknown_formats(file):
    with pytest.raises(InputError, match="format keras: there is none; take auto"):
        convert.load(file, format="keras")
    write_torch(file, {"fc.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(InputError, match=r"no format known here has such tensors \(fc\.weight"):
        convert.load(file)


def test_every_format_says_its_name_and_an_example():
    text = describe()
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert family.name in text and family.example in text
        assert family.example.startswith("vqgan convert ")
