"""A run directory belongs to one config."""

from pathlib import Path
from typing import Any

import jax

from vqgan import atomic
from vqgan.errors import InputError
from vqgan.serialization import differing_fields, from_json, read_json, to_json

# Of RunConfig: what may change when a run is started again. The length may, as far as no
# learning-rate schedule depends on it.
_CADENCE = ("log_every", "eval_every", "image_every", "save_every", "keep", "eval_images")


def claim(out: Path, config: Any, **inputs: str) -> None:
    """Writes `config.json` into a new run directory, or checks it against the one that is there.

    Args:
      inputs: marks of whatever else the run is made from, by name; they may not change either.

    Raises:
      InputError: naming the fields in which the directory's run has another config.
    """
    path = out / "config.json"
    if path.exists():
        found = read_json(path)
        before = from_json(type(config), found.get("config"), where=str(path))
        changed = [
            name
            for name in differing_fields(before, config)
            if name.removeprefix("run.") not in _CADENCE and not _longer(name, config)
        ]
        changed += [name for name, mark in inputs.items() if found.get(name) != mark]
        if changed:
            raise InputError(
                f"{out}: holds a run with another {', '.join(changed)}; "
                "give it the same options or choose another --out"
            )
    if jax.process_index() == 0:
        data = {"training": type(config).__name__, "config": to_json(config), **inputs}
        atomic.write_json(data, path)


def _longer(name: str, config: Any) -> bool:
    """Whether the field is the run's length and nothing else follows from it."""
    optimisers = [getattr(config, part, None) for part in ("optim", "disc_optim")]
    fixed = all(o is None or o.schedule == "constant" for o in optimisers)
    fixed = fixed and not getattr(getattr(config, "loss", None), "disc_start_fraction", 0.0)
    return name == "run.steps" and fixed
