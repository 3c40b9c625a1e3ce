"""Both stages together: a prior draws code ids, a tokenizer makes images of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Array, Float, Int, Key

from vqgan import atomic
from vqgan.errors import InputError
from vqgan.prior.transformer import Prior
from vqgan.serialization import read_json
from vqgan.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class Pipeline:
    """A tokenizer and a prior over its codes: a directory with `tokenizer/` and `prior/` in it."""

    tokenizer: Tokenizer
    prior: Prior
    class_names: tuple[str, ...] = ()
    """Names of the prior's classes, where they have any."""

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> "Pipeline":
        """Reads what `save_pretrained` or `vqgan train-prior` wrote.

        Raises:
          InputError: a part is missing, broken, or does not belong to the other one.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such model directory")
        inside = directory / "model"
        if not (directory / "prior").is_dir() and (inside / "prior").is_dir():
            directory = inside
        tokenizer = Tokenizer.from_pretrained(directory / "tokenizer")
        prior = Prior.from_pretrained(directory / "prior")
        if prior.config.codebook_size != tokenizer.codebook_size:
            raise InputError(
                f"{directory}: the prior is over {prior.config.codebook_size} codes, "
                f"the tokenizer has {tokenizer.codebook_size}"
            )
        names = read_json(directory / "classes.json") if prior.config.num_classes else []
        return cls(tokenizer, prior, tuple(names))

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes both parts; a directory of that name is replaced once the new one is complete."""
        with atomic.new_directory(directory) as new:
            self.tokenizer.save_pretrained(new / "tokenizer")
            self.prior.save_pretrained(new / "prior")
            atomic.write_json(list(self.class_names), new / "classes.json")

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
        condition: Int[Array, "b"] | None = None,
        *,
        rng: Key[Array, ""],
        **sampling: Any,
    ) -> Float[Array, "b h w c"]:
        """New images in [-1, 1], not clipped; arguments as `Prior.sample` takes them."""
        return self.tokenizer.decode(self.prior.sample(condition, rng=rng, **sampling))
