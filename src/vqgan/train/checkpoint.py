"""Checkpoints: the only file that knows Orbax.

A checkpoint is the whole state of a run (models, optimisers, averages, statistics, step) and, as
JSON, its config and its best held-out number. Batches are a pure function of seed and step, so the
step is the data position. Saving runs in the background.
"""

import errno
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vqgan.errors import InputError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file it touches


class Checkpoints:
    """The checkpoints of one run directory. Use as a context manager."""

    def __init__(self, directory: Path | str, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=True
        )
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts saving; `state` may be donated at once.

        Raises:
          OSError: the disk has no room for it. Orbax would notice too late, in the background.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if shutil.disk_usage(self._directory).free < size:
            reason = f"no space left for a checkpoint of {size / 2**20:.0f} MiB"
            raise OSError(errno.ENOSPC, reason, str(self._directory))
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with the shapes and shardings of `like`.

        Raises:
          InputError: the state that was saved has other parts.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            return self._manager.restore(step, args=items).state
        except ValueError as error:  # over many lines, of every array in question
            raise InputError(
                f"{self._directory / str(step)}: a checkpoint of another version of jax-vqgan; go "
                "on with that one, or choose another --out"
            ) from error

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON that was saved with a step."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items).meta

    def wait(self) -> None:
        """Blocks until all saves are on disk."""
        self._manager.wait_until_finished()
