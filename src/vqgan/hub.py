"""Models on the Hugging Face hub: where `from_pretrained` finds them, what `push` makes of them.

A repository holds what a model directory holds, under the same names, and a model card:

    config.json  model.safetensors  [provenance.json]  README.md
    tokenizer/...  prior/...  [condition_tokenizer/...]  classes.json  for a pipeline

Nothing else is downloaded, and nothing of it is executed. `huggingface_hub` keeps the cache and the
tokens and is imported when a repository is asked for, not before. It honours `HF_HOME`, `HF_TOKEN`,
`HF_ENDPOINT` and `HF_HUB_OFFLINE`.

`provenance.json` says where weights are from; every key may be missing. An importer writes

    format, source, sha256   the published layout, the file's name and its digest
    url, licence             where it was published, and the licence of the weights
    published                an object of numbers that its authors state
    notes                    a text or a list of texts

and training writes `data` (on what), `steps`, and `metrics`, an object: the last evaluation.
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vqgan.errors import InputError
from vqgan.serialization import from_json, model_directory, read_json, stored_weights

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PARTS = {"tokenizer": "Tokenizer", "prior": "Prior", "condition_tokenizer": "Tokenizer"}
_PIPELINE = ("tokenizer", "prior")  # the parts that it must have
_FILES = ("config.json", "model.safetensors", "classes.json", "provenance.json", "README.md")
_NAMES = (*_FILES, *(f"{part}/{name}" for part in _PARTS for name in _FILES))
_LOG_IN = "log in with `hf auth login`, or pass a token"


def locate(
    source: Path | str,
    kind: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The directory that holds a model: `source` itself, or the local copy of a repository.

    A directory that exists is taken as it is. Else a string `owner/name`, or `owner/name@revision`,
    is a repository on the hub; a `Path` never is.

    Args:
      kind: What is looked for: `Tokenizer`, `Prior` or `Pipeline`.
      revision: Branch, tag or commit of the repository.
      subfolder: Where in the repository, or in the directory, the model is.
      cache_dir: Where downloads are kept, unless it is the cache of `huggingface_hub`.
      local_files_only: Ask nobody; take what is in the cache.
      token: For private repositories; by default the one that is logged in.

    Raises:
      InputError: there is no such directory, repository, revision or model, or it is not within
        reach. Only what is on the hub is checked to be of that kind.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise InputError(
                f"{source}: is a directory here, which has no revision {revision}; leave one out"
            )
        return Path(source, subfolder or "")
    name, _, tag = str(source).partition("@")
    if isinstance(source, Path) or not _REPOSITORY.fullmatch(name):
        raise InputError(
            f"{source}: no such model directory, and a repository on the hub is owner/name"
        )
    if tag and revision is not None:
        raise InputError(f"{source}: names a revision, and so does revision={revision}; leave one")
    options = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    where = f"{name}, subfolder {subfolder}" if subfolder else name
    wanted = [prefix + file for file in _wanted(kind)]
    configs = [prefix + file for file in _NAMES if file.endswith("config.json")]
    # The small files first: the weights of a model of another kind are not worth the time.
    snapshot = _download(name, configs, revision or tag or None, options)
    _check_kind(snapshot / prefix, kind, where)
    # By its number, so that both downloads are of one commit whatever is pushed in between.
    directory = _download(name, wanted, snapshot.name, options) / prefix
    for part in _PIPELINE if kind == "Pipeline" else ("",):
        if not (directory / part / "model.safetensors").exists():
            missing = str(Path(part, "model.safetensors"))
            raise InputError(f"{where}: has no {missing}: push it again, it did not all arrive")
    return directory


def push(
    directory: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    card: str | None = None,
) -> str:
    """Uploads a model, a pipeline or a run directory's model, as one commit; returns its address.

    The repository is made where there is none. Files of an earlier model that this one does not
    have are removed from it; what else is in it stays.

    Args:
      repo_id: `owner/name`.
      private: Of a new repository. One that exists and is public is then refused.
      revision: The branch to push to; made where there is none.
      card: README.md as it shall be. By default it is the directory's own, or `model_card`.

    Raises:
      InputError: the directory holds no whole model, or the hub is out of reach or refuses.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise InputError(f"{repo_id}: a repository on the hub is owner/name")
    directory = model_directory(Path(directory))
    if card is None and (directory / "README.md").exists():
        card = (directory / "README.md").read_text()
    generated = model_card(directory, repo_id, revision=revision)  # which also checks the model
    names = [n for n in _uploaded(directory) if (directory / n).is_file() and n != "README.md"]
    with _explained(f"{repo_id}: ", revision):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(token=token, library_name="vqgan")
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise InputError(f"{repo_id}: is there and public: make it private, or push elsewhere")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [n for n in there if n in _NAMES and n not in names and n != "README.md"]
        api.create_commit(
            repo_id,
            operations=[
                CommitOperationAdd("README.md", (card or generated).encode()),
                *(CommitOperationAdd(n, directory / n) for n in names),
                *(CommitOperationDelete(n) for n in stale),
            ],
            commit_message=commit_message or "Upload with vqgan",
            revision=revision,
        )
    return url if revision is None else f"{url}/tree/{revision}"


def read_provenance(directory: Path | str) -> dict[str, Any]:
    """What `provenance.json` in a directory says, or nothing where there is none.

    Raises:
      InputError: it is not a JSON object.
    """
    path = Path(directory) / "provenance.json"
    if not path.exists():
        return {}
    provenance = read_json(path)
    if not isinstance(provenance, dict):
        raise InputError(f"{path}: is not a JSON object")
    return provenance


def model_card(directory: Path | str, repo_id: str, *, revision: str | None = None) -> str:
    """README.md of a model or pipeline directory; what nobody stated, it calls "not stated".

    Raises:
      InputError: the directory holds no whole model.
    """
    from huggingface_hub import ModelCardData

    directory = model_directory(Path(directory))
    models = {part: _Model.read(directory / part) for part in _parts(directory)}
    kind = "Pipeline" if "." not in models else models["."].kind
    sources = [model.provenance for model in models.values() if model.provenance]
    if kind == "Pipeline" and (whole := read_provenance(directory)):
        sources.insert(0, whole)
        licences = [whole.get("licence")] if whole.get("licence") else _licences(models)
    else:
        licences = _licences(models)
    front = ModelCardData(
        library_name="vqgan",
        tags=["vqgan", "jax", "flax", f"vqgan-{kind.lower()}"],
        pipeline_tag="image-to-image" if kind == "Tokenizer" else "unconditional-image-generation",
        **_front_licence(licences),
    )
    sections = [
        f"# {repo_id.split('/')[1]}",
        _WHAT[kind],
        _usage(kind, models, repo_id, revision),
        *(_table(_title(part, model), model.facts()) for part, model in models.items()),
        _table("Data", {"Trained on": _stated(s.get("data") for s in sources)}),
        *_metrics(sources),
        _table("Source of the weights", _source_facts(sources)),
    ]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _wanted(kind: str) -> tuple[str, ...]:
    return _NAMES if kind == "Pipeline" else _FILES


def _download(
    name: str, patterns: list[str], revision: str | None, options: dict[str, Any]
) -> Path:
    """The local copy of a commit, with the files of these names that it has."""
    with _explained(f"{name}: no directory here; ", revision):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class Bar(tqdm):
            def __init__(self, *args, **kwargs):
                kwargs["disable"] = not (weights and sys.stderr.isatty())
                super().__init__(*args, **kwargs)

        weights = any(pattern.endswith(".safetensors") for pattern in patterns)
        return Path(
            snapshot_download(
                name,
                revision=revision,
                # The library warns where nothing matches, and this file is in every repository.
                allow_patterns=[*patterns, ".gitattributes"],
                library_name="vqgan",
                tqdm_class=Bar,
                **options,
            )
        )


def _check_kind(directory: Path, kind: str, where: str) -> None:
    """Raises InputError where a repository's configs are not those of a model of that kind."""
    found = {part: _model_type(directory / part) for part in (".", *_PARTS)}
    wanted = {part: _PARTS[part] for part in _PIPELINE} if kind == "Pipeline" else {".": kind}
    absent = [part for part, model_type in wanted.items() if found[part] != model_type]
    if not absent:
        return
    if found["."] in _PARTS.values():
        raise InputError(f"{where}: holds a {found['.']}, not a {kind}")
    inside = [part for part, model_type in _PARTS.items() if found[part] == model_type]
    if kind == "Pipeline" and inside:
        raise InputError(f"{where}: has no {absent[0]}/config.json, so it is not a whole pipeline")
    here = [part for part in inside if _PARTS[part] == kind]
    if here:
        raise InputError(f"{where}: holds a pipeline; take its part with subfolder={here[0]}")
    raise InputError(
        f"{where}: no {kind} of vqgan in it (by config.json); where it has published weights, "
        "download them and make a model of them with `vqgan convert`"
    )


def _model_type(directory: Path) -> Any:
    path = directory / "config.json"
    description = read_json(path) if path.exists() else None
    return description.get("model_type") if isinstance(description, dict) else None


@contextlib.contextmanager
def _explained(what: str, revision: str | None) -> Iterator[None]:
    """Makes one line with a mend of what `huggingface_hub` raises; a full disk stays an OSError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = _explanation(error, revision)
        if message is None:
            raise
        raise InputError(f"{what}{message}") from error


def _explanation(error: BaseException, revision: str | None) -> str | None:
    from huggingface_hub import errors

    # What httpx, or httpx2, raises where nobody answers: hub releases differ in which they use.
    no_answer = errors.HfHubHTTPError.__bases__[0]
    first_line = " ".join(str(error).split("\n")[0].split())
    match error:
        case errors.LocalEntryNotFoundError():
            cause = error.__cause__
            if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
                return (
                    "not in the cache, or not all of it, and the hub may not be asked "
                    "(local_files_only, HF_HUB_OFFLINE): load it once online"
                )
            return _explanation(cause, revision) or f"cannot be loaded ({first_line})"
        case RuntimeError() if error.__cause__ is not None:  # of an upload in parts
            return _explanation(error.__cause__, revision)
        case errors.GatedRepoError():
            return f"its owner wants to be asked first: ask on its page, then {_LOG_IN}"
        case errors.RepositoryNotFoundError():
            return f"no such repository on the hub; where it is private, {_LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {revision}; take a branch, tag or commit"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            said = error.server_message or f"status {error.response.status_code}"
            return f"the hub refuses ({' '.join(said.split())}): {_LOG_IN} that may do this"
        case errors.HfHubHTTPError():
            return f"the hub fails ({first_line}): try again later"
        case errors.LocalTokenNotFoundError():
            return f"a token is asked for and there is none: {_LOG_IN}"
        case errors.OfflineModeIsEnabled():
            return "the hub may not be asked: unset HF_HUB_OFFLINE"
        case ValueError():  # of names and of a card's front matter
            return " ".join(str(error).split())
    if isinstance(error, no_answer):
        return f"the hub does not answer ({first_line}): check the network and HF_ENDPOINT"
    return None


def _parts(directory: Path) -> list[str]:
    """Where in a directory the models are: at `.`, or in the parts of a pipeline."""
    if not (directory / "prior").is_dir():
        return ["."]
    return [part for part in _PARTS if part in _PIPELINE or (directory / part).is_dir()]


def _uploaded(directory: Path) -> list[str]:
    """Names of the files that a directory of its kind may have."""
    if _parts(directory) == ["."]:
        return [*_FILES]
    return [name for name in _NAMES if name not in ("config.json", "model.safetensors")]


@dataclass(frozen=True)
class _Model:
    """What a card says of one model directory."""

    kind: str
    config: Any
    parameters: int
    provenance: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "_Model":
        from vqgan.prior.transformer import PriorConfig
        from vqgan.tokenizer.model import TokenizerConfig

        classes = {"Tokenizer": TokenizerConfig, "Prior": PriorConfig}
        path = directory / "config.json"
        description = read_json(path)
        kind = description.get("model_type") if isinstance(description, dict) else None
        if kind not in classes:
            raise InputError(f"{path}: holds a {kind or 'model of no type'}, not a model of vqgan")
        config: Any = from_json(classes[kind], description.get("config"), where=str(path))
        with stored_weights(directory / "model.safetensors") as weights:
            count = sum(prod(tensor.shape) for tensor in weights.values())
        return cls(kind, config, count, read_provenance(directory))

    def facts(self) -> dict[str, Any]:
        numbers = {"Parameters": f"{self.parameters:,}"}
        if self.kind == "Prior":
            return numbers | {
                "Codes": self.config.codebook_size,
                "Grid": " x ".join(map(str, self.config.grid)),
                "Condition": _condition(self.config),
                "Layers, heads, width": (
                    f"{self.config.depth}, {self.config.heads}, {self.config.width}"
                ),
            }
        net, quantizer = self.config.autoencoder, self.config.quantizer
        return numbers | {
            "Quantizer": type(quantizer).__name__.removesuffix("Config"),
            "Codebook size": getattr(quantizer, "used_codes", 0) or quantizer.codebook_size,
            "Pixels a token, along each side": net.factor,
            "Resolution": f"{net.resolution} x {net.resolution} pixels; others work too",
            "Channels of an image": net.in_channels,
            **_CONTENT[self.config.content],
            "Channels of the network, by level": ", ".join(map(str, net.widths())),
            "Channels of the latents": net.z_channels,
        }


_CONTENT = {
    "images": {},
    "labels": {"Content": "label maps: one-hot maps in, logits of the classes out"},
    "depth": {"Content": "depth maps"},
}
_WHAT = {
    "Tokenizer": "An image tokenizer (VQGAN, arXiv:2012.09841): images to code ids and back.",
    "Prior": "A transformer over the code ids of an image tokenizer (VQGAN, arXiv:2012.09841).",
    "Pipeline": "An image tokenizer and a transformer over its codes (VQGAN, arXiv:2012.09841).",
}
_CALLS = {
    "Tokenizer": """ids = tokenizer.encode(images)  # images: float32 [b, h, w, c] in [-1, 1]
images = tokenizer.decode(ids)""",
    "Prior": "ids = prior.sample({condition}rng=jax.random.key(0){batch})",
    "Pipeline": "images = pipeline.generate({condition}rng=jax.random.key(0){batch})",
}


def _condition(config: Any) -> str:
    if config.prefix:
        rows, columns = config.prefix.grid
        return f"{rows} x {columns} codes of another tokenizer, or images for it in a pipeline"
    return f"one of {config.num_classes} classes" if config.num_classes else "none"


def _usage(kind: str, models: Mapping[str, _Model], repo_id: str, revision: str | None) -> str:
    prior: Any = next((model.config for model in models.values() if model.kind == "Prior"), None)
    given = ""
    if prior is not None and prior.num_classes:
        given = "jax.numpy.array([0]), "  # a class that there is in any case
    elif prior is not None and prior.prefix:
        given = "condition, "
    call = _CALLS[kind].format(condition=given, batch="" if given else ", batch=4")
    place = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    imports = "import vqgan" if kind == "Tokenizer" else "import jax\nimport vqgan"
    load = f"{kind.lower()} = vqgan.{kind}.from_pretrained({place})"
    return f"## Use\n\n`pip install jax-vqgan`, then\n\n```python\n{imports}\n\n{load}\n{call}\n```"


def _metrics(sources: list[dict[str, Any]]) -> list[str]:
    """One table of what training measured, one of what the weights' authors published."""
    measured, published = _numbers(sources, "metrics"), _numbers(sources, "published")
    steps = _stated(source.get("steps") for source in sources)
    tables = [_table("Metrics", {"Steps of training": steps} | measured)] if measured else []
    if published:
        tables.append(_table("Metrics, as published and not measured again", published))
    return tables or [_table("Metrics", {"Metrics": "not stated", "Steps of training": steps})]


def _numbers(sources: list[dict[str, Any]], key: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for source in sources:
        value = source.get(key)
        numbers |= value if isinstance(value, dict) else {key: value} if value else {}
    return numbers


_SOURCE = {
    "licence": "Licence of the weights",
    "url": "Published at",
    "source": "File",
    "sha256": "SHA-256 of the file",
    "format": "Format",
    "notes": "Notes",
}


def _source_facts(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of the weights' origin, keys that only their writer knows among it."""
    others = {key for source in sources for key in source}
    others -= {*_SOURCE, "data", "steps", "metrics", "published"}
    facts = {title: _stated(s.get(key) for s in sources) for key, title in _SOURCE.items()}
    facts = {t: v for t, v in facts.items() if v != "not stated" or t == _SOURCE["licence"]}
    return facts | {key: _stated(s.get(key) for s in sources) for key in sorted(others)}


def _stated(values: Any) -> str:
    """What was stated, each thing once."""
    said = [_text(value) for value in values if value not in (None, "", [], {})]
    return "; ".join(dict.fromkeys(said)) or "not stated"


def _licences(models: Mapping[str, _Model]) -> list[Any]:
    return [model.provenance.get("licence") for model in models.values()]


# Those of the hub's list that such weights come under.
_KNOWN_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *(
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "creativeml-openrail-m",
        "openrail",
        "gpl-3.0",
        "unlicense",
    ),
}


def _front_licence(licences: list[Any]) -> dict[str, Any]:
    """The front matter's entries: none unless a licence is stated for every part."""
    if not all(licences):
        return {}
    names = {re.sub(r"[^a-z0-9.]+", "-", str(licence).lower()).strip("-") for licence in licences}
    if len(names) == 1 and names <= _KNOWN_LICENCES:
        return {"license": names.pop()}
    return {"license": "other", "license_name": "-and-".join(sorted(names))}


def _title(part: str, model: _Model) -> str:
    return f"The {model.kind.lower() if part == '.' else part.replace('_', ' ')}"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {_text(name)} | {_text(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _text(value: Any) -> str:
    """A value in one line of a table."""
    if isinstance(value, list | tuple):
        return "; ".join(map(_text, value))
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(number)}" for name, number in value.items())
    if isinstance(value, float):
        value = f"{value:.6g}"
    return " ".join(str(value).split()).replace("\\|", "|").replace("|", "\\|")
