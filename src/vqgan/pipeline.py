"""Both stages together: a prior draws code ids, a tokenizer makes images of them."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vqgan import atomic, hub
from vqgan.errors import InputError
from vqgan.prior.conditions import Condition
from vqgan.prior.transformer import Prior
from vqgan.serialization import check_replaceable, model_directory, read_json
from vqgan.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class Pipeline:
    """A tokenizer and a prior over its codes: a directory with `tokenizer/` and `prior/` in it."""

    tokenizer: Tokenizer
    prior: Prior
    class_names: tuple[str, ...] = ()
    """Names of the prior's classes, where they have any."""
    condition_tokenizer: Tokenizer | None = None
    """Makes codes of condition images, for a prior with a prefix: `condition_tokenizer/`."""

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> "Pipeline":
        """Reads what `save_pretrained` or `vqgan train-prior` wrote, or `push_to_hub` uploaded.

        Args:
          source: A directory, or else `owner/name` on the Hugging Face hub; see `hub.locate`, which
            the other arguments are for.

        Raises:
          InputError: a part is missing, broken, out of reach, or does not belong to the other one.
        """
        found = hub.locate(
            source,
            cls.__name__,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        directory = model_directory(found)
        tokenizer = Tokenizer.from_pretrained(directory / "tokenizer")
        prior = Prior.from_pretrained(directory / "prior")
        if prior.config.codebook_size != tokenizer.codebook_size:
            raise InputError(
                f"{directory}: the prior is over {prior.config.codebook_size} codes, "
                f"the tokenizer has {tokenizer.codebook_size}"
            )
        names = read_json(directory / "classes.json") if prior.config.num_classes else []
        condition_tokenizer = None
        if (directory / "condition_tokenizer").is_dir():
            condition_tokenizer = Tokenizer.from_pretrained(directory / "condition_tokenizer")
            _check_conditions(directory, condition_tokenizer, prior)
        return cls(tokenizer, prior, tuple(names), condition_tokenizer)

    def save_pretrained(
        self, directory: Path | str, *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Writes both parts; an earlier pipeline there is replaced once the new one is complete.

        `provenance` says where the weights are from, in the keys that vqgan/hub.py lists.

        Raises:
          InputError: something is there that is no model.
        """
        check_replaceable(Path(directory))
        with atomic.new_directory(directory) as new:
            self.tokenizer.save_pretrained(new / "tokenizer")
            self.prior.save_pretrained(new / "prior")
            if self.condition_tokenizer is not None:
                self.condition_tokenizer.save_pretrained(new / "condition_tokenizer")
            atomic.write_json(list(self.class_names), new / "classes.json")
            if provenance:
                atomic.write_json(dict(provenance), new / "provenance.json")

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
        """Uploads both parts with a model card; as `Tokenizer.push_to_hub`.

        Raises:
          InputError: the hub is out of reach or refuses.
        """
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

    def class_id(self, name: str) -> int:
        """The number of a class that is given by its name or its number.

        Raises:
          InputError: there is no such class.
        """
        classes = self.prior.config.num_classes
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdigit() and int(name) < classes:
            return int(name)
        if not classes:
            raise InputError(f"class {name}: this prior is unconditional; leave the class out")
        known = f" or {', '.join(self.class_names)}" if self.class_names else ""
        raise InputError(f"class {name}: there is none; take 0 to {classes - 1}{known}")

    def generate(
        self,
        condition: Condition | Float[Array, "b y x _"] | None = None,
        *,
        rng: Key[Array, ""],
        **sampling: Any,
    ) -> Float[Array, "b h w c"]:
        """New images in [-1, 1], not clipped; arguments as `Prior.sample` takes them.

        Where the prior has a prefix, the condition can also be images for `condition_tokenizer`.

        Raises:
          InputError: as `Prior.sample`; or condition images are not of use here or do not fit.
        """
        if condition is not None and jnp.issubdtype(condition.dtype, jnp.floating):
            if self.condition_tokenizer is None:
                raise InputError("condition images: there is no condition_tokenizer, give codes")
            condition = self.condition_tokenizer.encode(condition)
        return self.tokenizer.decode(self.prior.sample(condition, rng=rng, **sampling))


def _check_conditions(directory: Path, tokenizer: Tokenizer, prior: Prior) -> None:
    """Raises InputError where the prior does not take the condition tokenizer's codes."""
    prefix = prior.config.prefix
    known = 0 if prefix is None else prefix.codebook_size
    if tokenizer.codebook_size > known:
        raise InputError(
            f"{directory}: the prior takes {known} condition codes, "
            f"the condition tokenizer has {tokenizer.codebook_size}"
        )
