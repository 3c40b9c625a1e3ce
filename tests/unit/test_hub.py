"""Models on the hub: what is pushed comes back bit for bit, and what is in the way is said.

The hub is `hub_server.HubServer`, on loopback. The constants of `huggingface_hub` that name the
hub, its cache and its files are replaced for each test: they are read from the environment when
that library is first imported, which another test may have done already. One test sets the
environment, as a user would, in a process of its own.

Not tested here: the live service and its own checks of cards and names, Xet (large files go through
Git LFS instead, in one piece each, never in parts), gated repositories, and pull requests.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from flax import nnx
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import OWNER, READER, HubServer, Repository

from vqgan import hub
from vqgan.errors import InputError
from vqgan.pipeline import Pipeline
from vqgan.prior.conditions import CodePrefix
from vqgan.prior.transformer import Prior, PriorConfig
from vqgan.serialization import flat_weights, stored_weights, with_weights
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import VQConfig

# huggingface_hub 2.4 uploads to Git LFS in a way that httpx2 calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CONFIG = TokenizerConfig(
    autoencoder=AutoencoderConfig(
        base_channels=4,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=8,
        z_channels=4,
        norm_groups=2,
    ),
    quantizer=VQConfig(codebook_size=6, dim=2),
)
IMPORTED = {
    "format": "taming",
    "source": "last.ckpt",
    "sha256": "0" * 64,
    "licence": "MIT",
    "url": "https://example.org/weights",
    "published": {"rFID": 4.98},
    "notes": ["shown in\none line", "a | b"],
}
TRAINED = {"data": "a folder of 7 cats", "steps": 1200, "metrics": {"PSNR": 21.53125}}


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = HubServer()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "AGENT_HARNESSES_PATH": str(tmp_path / "harnesses.json"),
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(CONFIG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def other():
    return Tokenizer(CONFIG, rngs=nnx.Rngs(4))


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    config = PriorConfig(
        codebook_size=6, grid=(4, 4), num_classes=2, depth=1, heads=1, width=8, mlp_multiple=8
    )
    return Pipeline(tokenizer, Prior(config, rngs=nnx.Rngs(5)), ("cat", "dog"))


def same(a, b):
    a, b = flat_weights(a), flat_weights(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def refusal(action, *arguments, **options):
    with pytest.raises(InputError) as error:
        action(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in Path(directory).rglob("*")
        if path.is_file()
    }


def publish(server, repo, files, private=False):
    """A repository that nobody has pushed with this library."""
    server.repositories[repo] = Repository(private)
    server.repositories[repo].commit("main", files)


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_what_is_pushed_comes_back(server, tokenizer):
    address = tokenizer.push_to_hub("me/tok", commit_message="First")
    assert address == f"{server.url}/me/tok"
    files = server.repositories["me/tok"].files()
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert len(server.repositories["me/tok"].commits) == 2  # its making, and the model at once
    assert files["model.safetensors"] in server.large.values() and server.verified  # by Git LFS
    assert not server.repositories["me/tok"].private

    loaded = Tokenizer.from_pretrained("me/tok")
    assert loaded.config == tokenizer.config and same(loaded, tokenizer)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(loaded.encode(images), tokenizer.encode(images))


def test_only_what_is_needed_is_downloaded(server, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    mine = files_of(tmp_path / "tok")
    theirs = {"modeling.py": b"raise SystemExit", "optimizer.bin": b"0", "other/config.json": b"{"}
    publish(server, "me/tok", mine | theirs | {".gitattributes": b""})
    assert same(Tokenizer.from_pretrained("me/tok"), tokenizer)
    assert server.downloads() == [".gitattributes", "config.json", "model.safetensors"]
    server.requests.clear()
    Tokenizer.from_pretrained("me/tok")  # the hub says which commit is the newest: that is here
    assert server.downloads() == [] and server.requests


def test_revisions(server, tokenizer, other):
    tokenizer.push_to_hub("me/tok")
    address = other.push_to_hub("me/tok", revision="v2")
    assert address.endswith("/me/tok/tree/v2")
    assert same(Tokenizer.from_pretrained("me/tok"), tokenizer)
    assert same(Tokenizer.from_pretrained("me/tok", revision="v2"), other)
    assert same(Tokenizer.from_pretrained("me/tok@v2"), other)
    commit = server.repositories["me/tok"].branches["v2"]
    assert same(Tokenizer.from_pretrained("me/tok", revision=commit), other)
    card = server.repositories["me/tok"].files("v2")["README.md"].decode()
    assert 'from_pretrained("me/tok", revision="v2")' in card
    assert "no revision v3;" in refusal(Tokenizer.from_pretrained, "me/tok", revision="v3")
    assert "leave one" in refusal(Tokenizer.from_pretrained, "me/tok@v2", revision="v2")


def test_a_pipeline_and_its_parts(server, pipeline):
    pipeline.push_to_hub("me/pipe")
    files = server.repositories["me/pipe"].files()
    assert {"classes.json", "prior/config.json", "tokenizer/model.safetensors"} < files.keys()
    loaded = Pipeline.from_pretrained("me/pipe")
    assert same(loaded.tokenizer, pipeline.tokenizer) and same(loaded.prior, pipeline.prior)
    assert loaded.class_names == ("cat", "dog")

    server.requests.clear()
    part = Prior.from_pretrained(
        "me/pipe", subfolder="prior", cache_dir=constants.HF_HUB_CACHE + 2 * "x"
    )
    assert same(part, pipeline.prior)
    assert "tokenizer/model.safetensors" not in server.downloads()
    said = refusal(Tokenizer.from_pretrained, "me/pipe")
    assert "subfolder=tokenizer" in said
    said = refusal(Prior.from_pretrained, "me/pipe", subfolder="tokenizer")
    assert "subfolder tokenizer: holds a Tokenizer, not a Prior" in said
    assert "subfolder none: no Prior" in refusal(Prior.from_pretrained, "me/pipe", subfolder="none")


def test_a_condition_tokenizer_comes_along(server, tokenizer, other):
    config = PriorConfig(
        codebook_size=6,
        grid=(2, 2),
        prefix=CodePrefix(codebook_size=6, grid=(2, 3)),
        position="learned",
        depth=1,
        heads=1,
        width=8,
        mlp_multiple=8,
    )
    prior = Prior(config, rngs=nnx.Rngs(6))
    Pipeline(tokenizer, prior, condition_tokenizer=other).push_to_hub("me/pipe")
    assert same(Pipeline.from_pretrained("me/pipe").condition_tokenizer, other)
    card = server.repositories["me/pipe"].files()["README.md"].decode()
    assert "## The condition tokenizer" in card and "generate(condition, rng=" in card
    assert "| Condition | 2 x 3 codes of another tokenizer" in card


def test_without_a_network(server, tokenizer, pipeline, monkeypatch):
    tokenizer.push_to_hub("me/tok")
    pipeline.push_to_hub("me/pipe")
    Tokenizer.from_pretrained("me/tok")
    Tokenizer.from_pretrained("me/pipe", subfolder="tokenizer")
    server.close()
    assert same(Tokenizer.from_pretrained("me/tok"), tokenizer)
    assert same(Tokenizer.from_pretrained("me/tok", local_files_only=True), tokenizer)
    said = refusal(Tokenizer.from_pretrained, "me/none")
    assert "the hub does not answer" in said and "no directory here" in said
    said = refusal(Tokenizer.from_pretrained, "me/none", local_files_only=True)
    assert "not in the cache" in said
    said = refusal(Pipeline.from_pretrained, "me/pipe", local_files_only=True)  # a part of it is
    assert "not in the cache" in said or "prior/config.json" in said
    assert "does not answer" in refusal(tokenizer.push_to_hub, "me/tok")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert same(Tokenizer.from_pretrained("me/tok"), tokenizer)
    assert "not in the cache" in refusal(Tokenizer.from_pretrained, "me/none")
    assert "unset HF_HUB_OFFLINE" in refusal(tokenizer.push_to_hub, "me/tok")


def test_private_repositories(server, tokenizer, monkeypatch):
    tokenizer.push_to_hub("me/secret", private=True)
    assert server.repositories["me/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    said = refusal(Tokenizer.from_pretrained, "me/secret")
    assert "no such repository" in said and "`hf auth login`" in said and "token" in said
    assert "token" in refusal(Tokenizer.from_pretrained, "me/secret", token="hf_of_nobody")
    assert "there is none" in refusal(Tokenizer.from_pretrained, "me/secret", token=True)
    assert same(Tokenizer.from_pretrained("me/secret", token=READER), tokenizer)


PARTS = {
    "diffusers": ({"_class_name": "VQModel"}, "diffusion_pytorch_model.safetensors"),
    "dalle-mini": ({"model_type": "vqgan", "embed_dim": 256}, "flax_model.msgpack"),
    "no config": (None, "last.ckpt"),
}


@pytest.mark.parametrize("published", PARTS)
@pytest.mark.parametrize("model", [Tokenizer, Prior, Pipeline])
def test_what_others_have_published(server, published, model):
    config, weights = PARTS[published]
    files = {weights: b"0", "model.safetensors": b"0", ".gitattributes": b""}
    if config is not None:
        files["config.json"] = json.dumps(config).encode()
    publish(server, "they/have", files)
    said = refusal(model.from_pretrained, "they/have")
    assert f"no {model.__name__} of vqgan" in said and "`vqgan convert`" in said
    assert "model.safetensors" not in server.downloads()  # which may be gigabytes


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("tokenizer/model.safetensors", "no tokenizer/model.safetensors"),
        ("prior/model.safetensors", "no prior/model.safetensors"),
        ("prior/config.json", "no prior/config.json"),
        ("classes.json", "classes.json: no such file"),
    ],
)
def test_repositories_of_which_a_part_is_missing(server, pipeline, tmp_path, missing, words):
    pipeline.save_pretrained(tmp_path / "pipe")
    files = files_of(tmp_path / "pipe")
    del files[missing]
    publish(server, "me/pipe", files)
    assert words in refusal(Pipeline.from_pretrained, "me/pipe")


def test_weights_that_did_not_all_arrive(server, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    files = files_of(tmp_path / "tok")
    publish(server, "me/tok", files | {"model.safetensors": files["model.safetensors"][:-1]})
    assert "cannot be read" in refusal(Tokenizer.from_pretrained, "me/tok")
    del files["model.safetensors"]
    publish(server, "me/tok2", files)
    assert "no model.safetensors" in refusal(Tokenizer.from_pretrained, "me/tok2")


def test_a_model_of_the_other_kind(server, tokenizer):
    tokenizer.push_to_hub("me/tok")
    assert "holds a Tokenizer, not a Prior" in refusal(Prior.from_pretrained, "me/tok")
    assert "holds a Tokenizer, not a Pipeline" in refusal(Pipeline.from_pretrained, "me/tok")


@pytest.mark.parametrize("token", [READER, "hf_of_nobody", False])
def test_a_push_that_is_refused(server, tokenizer, other, token):
    tokenizer.push_to_hub("me/tok")
    before = server.repositories["me/tok"].files()
    for repo in ("me/tok", "me/new"):
        said = refusal(other.push_to_hub, repo, token=token)
        assert said.startswith(f"{repo}: the hub refuses") and "pass a token" in said
    assert server.repositories.keys() == {"me/tok"}
    assert server.repositories["me/tok"].files() == before


def test_private_does_not_become_public_unseen(server, tokenizer):
    tokenizer.push_to_hub("me/tok")
    commits = len(server.repositories["me/tok"].commits)
    assert "public" in refusal(tokenizer.push_to_hub, "me/tok", private=True)
    assert len(server.repositories["me/tok"].commits) == commits


def test_nothing_is_asked_before_the_model_is_whole(server, tokenizer, tmp_path):
    directory = tmp_path / "tok"
    assert "no such model" in refusal(hub.push, directory, "me/tok")
    tokenizer.save_pretrained(directory)
    assert "owner/name" in refusal(hub.push, directory, "tok")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-1])
    assert "cannot be read" in refusal(hub.push, directory, "me/tok")
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "provenance.json").write_text("[]")
    assert "provenance.json: is not a JSON object" in refusal(hub.push, directory, "me/tok")
    (directory / "provenance.json").unlink()
    (directory / "config.json").write_text('{"model_type": "VQModel"}')
    assert "holds a VQModel" in refusal(hub.push, directory, "me/tok")
    assert server.requests == []


def test_a_push_replaces_the_model_and_leaves_the_rest(server, tokenizer, other, pipeline):
    publish(server, "me/repo", {".gitattributes": b"", "picture.png": b"mine"})
    pipeline.push_to_hub("me/repo")
    tokenizer.push_to_hub("me/repo", provenance=IMPORTED)
    names = {".gitattributes", "picture.png", "README.md", "config.json", "model.safetensors"}
    assert server.repositories["me/repo"].files().keys() == names | {"provenance.json"}
    other.push_to_hub("me/repo")
    assert server.repositories["me/repo"].files().keys() == names
    assert same(Tokenizer.from_pretrained("me/repo"), other)
    assert "not a Pipeline" in refusal(Pipeline.from_pretrained, "me/repo")


def test_the_directory_of_a_run_is_pushed_as_it_is_loaded(server, tokenizer, pipeline, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    hub.push(tmp_path / "run", "me/tok")
    assert same(Tokenizer.from_pretrained("me/tok"), tokenizer)
    pipeline.save_pretrained(tmp_path / "run" / "model")
    hub.push(tmp_path / "run", "me/pipe")
    assert same(Pipeline.from_pretrained("me/pipe").prior, pipeline.prior)


def test_the_card_of_imported_weights(server, tokenizer):
    tokenizer.push_to_hub("me/tok", provenance=IMPORTED)
    files = server.repositories["me/tok"].files()
    assert json.loads(files["provenance.json"]) == IMPORTED
    card = files["README.md"].decode()
    front = front_matter(card)
    assert front["library_name"] == "vqgan" and front["license"] == "mit"
    assert front["pipeline_tag"] == "image-to-image" and "vqgan" in front["tags"]
    assert 'vqgan.Tokenizer.from_pretrained("me/tok")' in card
    for row in (
        "| Codebook size | 6 |",
        "| Pixels a token, along each side | 2 |",
        "| Resolution | 8 x 8 pixels; others work too |",
        "| Channels of the network, by level | 4, 8 |",
        "| Licence of the weights | MIT |",
        "| File | last.ckpt |",
        f"| SHA-256 of the file | {'0' * 64} |",
        "| Published at | https://example.org/weights |",
        "| rFID | 4.98 |",
        "| Trained on | not stated |",
        "| Notes | shown in one line; a \\| b |",
    ):
        assert row in card.splitlines(), row
    assert "as published and not measured again" in card


def test_the_card_of_trained_weights(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok", provenance=TRAINED)
    assert hub.read_provenance(tmp_path / "tok") == TRAINED
    card = hub.model_card(tmp_path / "tok", "me/tok")
    for row in (
        "| Trained on | a folder of 7 cats |",
        "| Steps of training | 1200 |",
        "| PSNR | 21.5312 |",
        "| Licence of the weights | not stated |",
    ):
        assert row in card.splitlines(), row
    assert "license" not in front_matter(card) and "published" not in card


def test_the_card_invents_nothing(tokenizer, pipeline, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    card = hub.model_card(tmp_path / "tok", "me/tok")
    for row in ("| Trained on ", "| Metrics ", "| Licence of the weights "):
        assert row + "| not stated |" in card.splitlines(), row
    assert "license" not in front_matter(card)
    assert not (tmp_path / "tok" / "provenance.json").exists()

    # A licence of one part is not a licence of the whole.
    pipeline.save_pretrained(tmp_path / "pipe")
    tokenizer.save_pretrained(tmp_path / "pipe" / "tokenizer", provenance=IMPORTED)
    front = front_matter(card := hub.model_card(tmp_path / "pipe", "me/pipe"))
    assert "license" not in front and "| Licence of the weights | MIT |" in card
    pipeline.prior.save_pretrained(tmp_path / "pipe" / "prior", provenance={"licence": "My Own 1"})
    front = front_matter(hub.model_card(tmp_path / "pipe", "me/pipe"))
    assert (front["license"], front["license_name"]) == ("other", "mit-and-my-own-1")


@pytest.mark.slow
def test_the_lines_of_a_card_run(server, pipeline):
    config = dataclasses.replace(pipeline.prior.config, num_classes=0)
    unconditional = Prior(config, rngs=nnx.Rngs(0))
    for model, name, count in ((pipeline, "images", 1), (unconditional, "ids", 4)):
        model.push_to_hub("me/model")
        card = server.repositories["me/model"].files()["README.md"].decode()
        namespace: dict = {}
        exec(card.split("```python\n")[1].split("```")[0], namespace)
        assert len(namespace[name]) == count


def test_ones_own_card(server, tokenizer, tmp_path):
    tokenizer.push_to_hub("me/tok", card="# Mine")
    assert server.repositories["me/tok"].files()["README.md"] == b"# Mine"
    tokenizer.save_pretrained(tmp_path / "tok")
    (tmp_path / "tok" / "README.md").write_text("# Of the directory")
    hub.push(tmp_path / "tok", "me/tok")
    assert server.repositories["me/tok"].files()["README.md"] == b"# Of the directory"
    said = refusal(tokenizer.push_to_hub, "me/tok", card="---\na: [\n---\n")
    assert said.startswith("me/tok: ")
    assert server.repositories["me/tok"].files()["README.md"] == b"# Of the directory"


def test_a_directory_comes_first(server, tokenizer, other, tmp_path, monkeypatch):
    other.push_to_hub("me/tok")
    server.requests.clear()
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("me/tok")
    assert same(Tokenizer.from_pretrained("me/tok"), tokenizer)
    assert same(Tokenizer.from_pretrained("me", subfolder="tok"), tokenizer)
    assert "leave one out" in refusal(Tokenizer.from_pretrained, "me/tok", revision="v2")
    for nowhere in (Path("me/none"), "./me/none", "../none", "none", "/me/none", "a/b/c"):
        assert "no such model directory" in refusal(Tokenizer.from_pretrained, nowhere)
    assert server.requests == []


def test_the_environment_is_honoured_and_nothing_is_imported_early(server, tokenizer, tmp_path):
    tokenizer.push_to_hub("me/tok")
    server.requests.clear()
    program = """
import os, sys
import vqgan
from vqgan import Pipeline, Tokenizer
assert "huggingface_hub" not in sys.modules
Tokenizer.from_pretrained("me/tok")
try:
    Tokenizer.from_pretrained("me/none")
except vqgan.InputError as error:
    said = str(error)
assert ("not in the cache" if "HF_HUB_OFFLINE" in os.environ else "no such repository") in said
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert bool(server.requests) == (not more)
        server.requests.clear()


class Lazy:
    """A tensor of an importer."""

    def __init__(self, array, log):
        self.array, self.log = array, log

    @property
    def shape(self):
        return self.array.shape

    def read(self):
        self.log.append(self)
        return self.array


def test_tensors_are_read_once_and_not_before_all_fit(tokenizer):
    def abstract():
        return nnx.eval_shape(lambda: Tokenizer(CONFIG, rngs=nnx.Rngs(0)))

    log = []
    weights = {name: Lazy(array, log) for name, array in flat_weights(tokenizer).items()}
    assert same(with_weights(abstract(), weights, where="x"), tokenizer)
    assert len(log) == len(weights) == len(set(map(id, log)))
    log.clear()
    weights["quantizer.codebook"] = Lazy(np.zeros((5, 2), np.float32), log)
    del weights["quant_conv.bias"]
    said = refusal(with_weights, abstract(), weights, where="x")
    assert "quantizer.codebook has shape (5, 2), not (6, 2)" in said
    assert "quant_conv.bias is missing" in said and log == []


def test_arrays_of_any_order_are_saved_as_they_are(tmp_path):
    model = Tokenizer(CONFIG, rngs=nnx.Rngs(0))
    kernel = np.asfortranarray(model.encoder.conv_in.kernel[...])  # as some backends have them
    assert not kernel.flags["C_CONTIGUOUS"]
    model.encoder.conv_in.kernel = nnx.Param(kernel)
    model.save_pretrained(tmp_path / "tok")
    with stored_weights(tmp_path / "tok" / "model.safetensors") as stored:
        np.testing.assert_array_equal(stored["encoder.conv_in.kernel"].read(), kernel)
