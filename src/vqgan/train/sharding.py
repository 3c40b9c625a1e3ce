"""Sharding is data: a mesh with named axes and rules that give every array its place on it.

Axes: `data` splits batches, `fsdp` splits batches and the storage of parameters and optimiser
state, `tensor` splits the transformer's matrices. Any of them may have size 1, and the models
know of none.
"""

import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vqgan.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
# Smaller arrays are not worth the collectives.
FSDP_MIN_SIZE = 2**14

# Path of a parameter -> the dimension that the `tensor` axis splits.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"attention\.(query|key|value)\.kernel", 1),
    (r"attention\.proj\.kernel", 0),
    (r"mlp\.up\.kernel", 1),
    (r"mlp\.gate_up\.kernel", 2),
    (r"mlp\.down\.kernel", 0),
)


def join_processes() -> None:
    """Makes this process one of many where the environment says so.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` come first, then what JAX
    detects by itself of SLURM.
    """
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(
            address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        )
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()


def make_mesh(*, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All devices of all processes as `(data, fsdp, tensor)`.

    Raises:
      InputError: `fsdp * tensor` does not divide the number of devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or tensor < 1 or devices % (fsdp * tensor):
        raise InputError(
            f"fsdp {fsdp} x tensor {tensor} does not divide the {devices} device(s) there are"
        )
    shape = (devices // (fsdp * tensor), fsdp, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where one array goes: the first tensor rule that its path matches, then its largest
    dimension that is left and that `fsdp` divides.

    Raises:
      InputError: the `tensor` axis does not divide the dimension that a rule names.
    """
    spec: list[str | None] = [None] * len(shape)
    if mesh.shape["tensor"] > 1:
        for pattern, dimension in TENSOR_RULES:
            if re.search(pattern, path) and len(shape) > dimension:
                if shape[dimension] % mesh.shape["tensor"]:
                    raise InputError(
                        f"tensor {mesh.shape['tensor']} does not divide dimension {dimension} "
                        f"of {path}, which is {shape[dimension]}"
                    )
                spec[dimension] = "tensor"
                break
    if mesh.shape["fsdp"] > 1 and np.prod(shape, dtype=np.int64) >= FSDP_MIN_SIZE:
        free = [
            d for d, size in enumerate(shape) if spec[d] is None and not size % mesh.shape["fsdp"]
        ]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "fsdp"
    return PartitionSpec(*spec)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a tree of (abstract) arrays."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(_dotted(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def _dotted(path: tuple) -> str:
    names = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", ""))) for p in path)
    return ".".join(str(name) for name in names)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError where a batch does not divide over the devices that split it."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise InputError(f"data.batch_size {batch_size} does not divide over {parts} devices")


def on_host(tree: Any, mesh: Mesh) -> Any:
    """Whole copies of sharded arrays as NumPy, on every process; all processes must call it."""
    whole = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, whole)
