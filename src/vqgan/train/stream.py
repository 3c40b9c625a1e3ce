"""A run's batches as arrays that lie split over all devices of all processes."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from vqgan.data.pipeline import Augment, DataConfig, train_batches
from vqgan.data.sources import Source
from vqgan.train.config import RunConfig
from vqgan.train.sharding import BATCH


def global_batches(
    source: Source,
    augment: Augment | None,
    data: DataConfig,
    run: RunConfig,
    mesh: Mesh,
    start: int,
) -> "GlobalBatches":
    """The batches of a run from step `start` to its end."""
    stream = train_batches(
        source,
        data,
        seed=run.seed,
        steps=run.steps,
        start_step=start,
        augment=augment,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return GlobalBatches(stream, mesh)


class GlobalBatches:
    """A stream of this process's rows as a stream of global arrays, split over the devices."""

    def __init__(self, stream: Any, mesh: Mesh):
        self._stream = stream
        self._sharding = NamedSharding(mesh, BATCH)

    def __next__(self) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(self._sharding, rows)
            for name, rows in next(self._stream).items()
        }

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._stream.close()
