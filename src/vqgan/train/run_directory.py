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


def claim(out: Path, config: Any) -> None:
    """Writes `config.json` into a new run directory, or checks it against the one that is there.

    Raises:
      InputError: naming the fields in which the directory's run has another config.
    """
    path = out / "config.json"
    if path.exists():
        before = from_json(type(config), read_json(path).get("config"), where=str(path))
        changed = [
            name
            for name in differing_fields(before, config)
            if name.removeprefix("run.") not in _CADENCE and not _longer(name, config)
        ]
        if changed:
            raise InputError(
                f"{out}: holds a run with another {', '.join(changed)}; "
                "give it the same options or choose another --out"
            )
    if jax.process_index() == 0:
        data = {"training": type(config).__name__, "config": to_json(config)}
        atomic.write_json(data, path)


def _longer(name: str, config: Any) -> bool:
    """Whether the field is the run's length and nothing else follows from it."""
    optimisers = [getattr(config, part, None) for part in ("optim", "disc_optim")]
    fixed = all(o is None or o.schedule == "constant" for o in optimisers)
    return name == "run.steps" and fixed
