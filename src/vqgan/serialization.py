"""Configs as JSON and models as directories: `config.json` beside `model.safetensors`.

Reading is strict. An unknown key, a value of another type, a tensor that is missing, left over or
of another shape is an error, and all of them are reported together.
"""

import contextlib
import dataclasses
import errno
import json
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, runtime_checkable

import cattrs
import jax
import jax.numpy as jnp
import numpy as np
from cattrs.v import format_exception
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vqgan import atomic
from vqgan.errors import InputError

T = TypeVar("T")
P = TypeVar("P", bound="Pretrained")  # not Self, which beartype does not take here


def _strict(kind: type):
    def structure(value: Any, _: type) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError(f"{value!r} is not of type {kind.__name__}")
        return value

    return structure


def _structure_tuple(value: Any, kind: Any) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r} is not a list")
    members = get_args(kind)
    if members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ValueError(f"{value!r} does not have {len(members)} entries")
    return tuple(_converter.structure(v, m) for v, m in zip(value, members, strict=True))


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (int, float, bool, str):
    _converter.register_structure_hook(_kind, _strict(_kind))
_converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, _structure_tuple)
# int | None and the like: cattrs' own hook would let any value of a primitive union through.
_converter.register_structure_hook_func(
    lambda kind: get_origin(kind) is types.UnionType and type(None) in get_args(kind),
    lambda value, kind: None if value is None else _converter.structure(value, get_args(kind)[0]),
)


def _structure_by_kind(value: Any, union: Any) -> Any:
    """One of several configs, told apart by their field `kind`; the first where there is none."""
    members = {cls.kind: cls for cls in get_args(union)}
    kind = value.get("kind", next(iter(members))) if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in members:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(members)}")
    return _converter.structure(value, members[kind])


_converter.register_structure_hook_func(
    lambda kind: (
        get_origin(kind) is types.UnionType and all(map(dataclasses.is_dataclass, get_args(kind)))
    ),
    _structure_by_kind,
)


def to_json(config: Any) -> dict[str, Any]:
    """A config (a frozen dataclass, nested at will) as JSON data."""
    return _converter.unstructure(config)


def from_json(cls: type[T], data: Any, *, where: str) -> T:
    """JSON data as a config of class `cls`.

    Raises:
      InputError: naming `where` and every key that is unknown, missing or of a wrong value.
    """
    try:
        return _converter.structure(data, cls)
    except Exception as error:
        found = cattrs.transform_error(error, format_exception=_explain)
        problems = "; ".join(found).replace("$.", "")
        raise InputError(f"{where}: {problems}") from error


def _explain(error: BaseException, kind: Any) -> str:
    """What the hooks above have to say of a value; of all else, what cattrs has."""
    return str(error) if type(error) is ValueError else format_exception(error, kind)


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises InputError where it is missing or malformed."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def check_replaceable(directory: Path) -> None:
    """Raises InputError where writing a model into its place would take away anything else."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file; give a directory for the model")
    if any(directory.iterdir()) and not _holds_model(directory):
        raise InputError(f"{directory}: holds something that is no model; give another place")


def _holds_model(directory: Path) -> bool:
    """Whether `save_pretrained` may have written it, a single model or a pipeline."""
    places = (directory, directory / "tokenizer")
    for config in (place / "config.json" for place in places):
        with contextlib.suppress(InputError):
            description = read_json(config)
            if isinstance(description, dict) and {"model_type", "config"} <= description.keys():
                return True
    return False


def flat_weights(module: nnx.Module) -> dict[str, np.ndarray]:
    """Every variable of a module by its dotted path, for example `encoder.conv_in.kernel`.

    In C order: safetensors writes the memory of an array as it lies, whatever its strides.
    """
    return {
        ".".join(map(str, path)): np.asarray(variable[...], order="C")
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor that is read from its file when it is needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _StoredTensor:
    """A tensor of an open safetensors file."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


@contextlib.contextmanager
def stored_weights(path: Path) -> Iterator[dict[str, LazyTensor]]:
    """Yields the tensors of a safetensors file by name; they can be read within the block.

    Raises:
      InputError: the file is missing or broken.
    """
    try:
        # With mmap, the default, the pages of the file count as memory beside what is read of them.
        with safe_open(path, framework="np", backend="pread") as file:
            yield {name: _StoredTensor(file, name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def with_weights(abstract: T, weights: Mapping[str, Any], *, where: str) -> T:
    """Fills a module made by `nnx.eval_shape`, without a random initialisation in between.

    Args:
      weights: An array or a `LazyTensor` for every variable, by dotted path. All shapes are
        compared first; then one tensor at a time is read beside the model.

    Raises:
      InputError: naming every tensor that is missing, unexpected or of another shape.
    """
    graphdef, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    expected = {".".join(map(str, path)): variable.shape for path, variable in flat}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} is unexpected" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has shape {shape}, not {expected[name]}"
        for name in sorted(expected.keys() & weights.keys())
        if (shape := tuple(weights[name].shape)) != expected[name]
    ]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    filled = [
        (path, variable.replace(_array(weights[".".join(map(str, path))], variable.dtype)))
        for path, variable in flat
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _array(value: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(value.read() if isinstance(value, LazyTensor) else value, dtype)


def model_directory(directory: Path) -> Path:
    """`model/` of a training run's directory; any other directory itself.

    Raises:
      InputError: there is no such directory.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory")
    inside = directory / "model"
    pipeline = (inside / "prior").is_dir() and not (directory / "prior").is_dir()
    return inside if pipeline or (inside / "model.safetensors").exists() else directory


class Pretrained(nnx.Module):
    """A model that lives in a directory, as `config.json` and `model.safetensors`.

    Subclasses name their `config_class` and keep the `config` that they are built from.
    """

    config_class: ClassVar[type]
    config: Any

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config

    def save_pretrained(
        self, directory: Path | str, *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the model; an earlier model of that name is replaced once the new one is complete.

        `provenance` says where the weights are from, in the keys that vqgan/hub.py lists.

        Raises:
          InputError: something is there that is no model.
        """
        check_replaceable(Path(directory))
        with atomic.new_directory(directory) as new:
            description = {"model_type": type(self).__name__, "config": to_json(self.config)}
            atomic.write_json(description, new / "config.json")
            if provenance:
                atomic.write_json(dict(provenance), new / "provenance.json")
            weights = flat_weights(self)
            try:
                save_file(weights, new / "model.safetensors", metadata={"format": "vqgan"})
            except SafetensorError as error:  # of a full disk, above all
                raise OSError(errno.EIO, str(error), str(directory)) from None

    @classmethod
    def from_pretrained(
        cls: type[P],
        source: Path | str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> P:
        """Reads a model that `save_pretrained` wrote, or that `push_to_hub` uploaded.

        Args:
          source: A directory, or else `owner/name` on the Hugging Face hub; see `hub.locate`, which
            the other arguments are for.

        Raises:
          InputError: the model is missing or out of reach, of another kind, or of a config or
            tensors that do not fit; nothing is loaded in part.
        """
        from vqgan import hub  # which is built on this module

        found = hub.locate(
            source,
            cls.__name__,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        return cls._read(model_directory(found))

    @classmethod
    def _read(cls: type[P], directory: Path) -> P:
        path = directory / "config.json"
        if not path.exists():
            raise InputError(f"{directory}: no config.json in it, so it is not a model directory")
        description = read_json(path)
        found = description.get("model_type") if isinstance(description, dict) else None
        if found != cls.__name__:
            raise InputError(f"{path}: holds a {found or 'model of no type'}, not a {cls.__name__}")
        config: Any = from_json(cls.config_class, description.get("config"), where=str(path))
        weights_path = directory / "model.safetensors"
        abstract = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
        with stored_weights(weights_path) as weights:
            return with_weights(abstract, weights, where=str(weights_path))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        card: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> str:
        """Uploads the model with a model card and returns its address; arguments as `hub.push`.

        `provenance` says where the weights are from, in the keys that vqgan/hub.py lists; without
        it the card calls data, metrics and licence "not stated".

        Raises:
          InputError: the hub is out of reach or refuses.
        """
        from vqgan import hub  # which is built on this module

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder, "saved"), provenance=provenance)
            return hub.push(
                Path(folder, "saved"),
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                revision=revision,
                card=card,
            )


def differing_fields(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configs of the same class differ."""
    if type(a) is not type(b) or not dataclasses.is_dataclass(a):
        return [] if a == b else [prefix]
    return [
        name
        for field in dataclasses.fields(a)
        for name in differing_fields(
            getattr(a, field.name), getattr(b, field.name), f"{prefix}.{field.name}".lstrip(".")
        )
    ]
