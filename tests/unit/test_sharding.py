import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vqgan.errors import InputError
from vqgan.train import sharding

BIG = 2**14


def test_mesh_takes_all_devices():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"tensor": 16}, {"fsdp": 0}, {"tensor": -1}])
def test_mesh_that_does_not_divide(sizes):
    with pytest.raises(InputError, match="does not divide the 8 device"):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params.decoder.conv_out.kernel", (3, 3, 128, 256), (None, None, None, "fsdp")),
        ("params.decoder.conv_out.kernel", (3, 3, 4, 8), (None,) * 4),  # too small to be worth it
        ("params.odd", (BIG + 1, 3), (None, None)),  # nothing that fsdp divides
        ("params.blocks.0.attention.query.kernel", (256, 256), ("fsdp", "tensor")),
        ("params.blocks.0.attention.proj.kernel", (256, 256), ("tensor", "fsdp")),
        ("params.blocks.1.mlp.gate_up.kernel", (256, 2, 512), ("fsdp", None, "tensor")),
        ("params.blocks.1.mlp.down.kernel", (512, 256), ("tensor", "fsdp")),
        ("params.encoder.middle.attention.q.kernel", (1, 1, 256, 256), (None, None, "fsdp", None)),
        # The optimiser's moments go where their parameters are.
        ("optim.0.mu.blocks.0.attention.value.kernel.value", (256, 256), ("fsdp", "tensor")),
        ("step", (), ()),
    ],
)
def test_partition(path, shape, spec):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert sharding.partition(path, shape, mesh) == PartitionSpec(*spec)


def test_nothing_is_split_over_axes_of_size_one():
    mesh = sharding.make_mesh()
    for path in ("blocks.0.attention.query.kernel", "conv.kernel"):
        assert not any(sharding.partition(path, (256, 256), mesh))


def test_tensor_axis_that_does_not_divide():
    mesh = sharding.make_mesh(tensor=8)
    with pytest.raises(InputError, match=r"tensor 8 does not divide dimension 1 of .*query"):
        sharding.partition("blocks.0.attention.query.kernel", (12, 12), mesh)


def test_batches_that_do_not_divide():
    sharding.check_batch(12, sharding.make_mesh(fsdp=2, tensor=2))  # over four devices
    with pytest.raises(InputError, match="batch_size 12 does not divide over 8"):
        sharding.check_batch(12, sharding.make_mesh(fsdp=2))


def test_arrays_come_back_whole():
    mesh = sharding.make_mesh(fsdp=4)
    whole = {"kernel": np.arange(BIG, dtype=np.float32).reshape(128, 128)}
    split = jax.device_put(whole, sharding.shardings(whole, mesh))
    assert split["kernel"].sharding.spec == PartitionSpec("fsdp", None)
    np.testing.assert_array_equal(sharding.on_host(split, mesh)["kernel"], whole["kernel"])
