"""Files that torch and its company write, read without them; and ours, read by torch."""

import argparse
import copy

import ml_dtypes
import numpy as np
import pytest
from reference import import_torch

from vqgan.convert.containers import open_checkpoint, write_torch
from vqgan.errors import InputError

pytestmark = pytest.mark.parity

KINDS = {
    "bool": "?",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "int64": "i8",
    "uint8": "u1",
    "float16": "f2",
    "bfloat16": ml_dtypes.bfloat16,
    "float32": "f4",
    "float64": "f8",
    "complex64": "c8",
    "complex128": "c16",
}
WITHOUT_STORAGE = {
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
FORMS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


@pytest.fixture(params=FORMS)
def save(request, tmp_path):
    """Saves with torch in one of its two forms, and opens the file with ours."""

    def save_and_open(tree, **options):
        import_torch().save(tree, tmp_path / "x.pt", **FORMS[request.param], **options)
        return open_checkpoint(tmp_path / "x.pt")

    return save_and_open


def bits(tensor) -> bytes:
    """A torch tensor's bytes in C order."""
    torch = import_torch()
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def assert_same_bits(checkpoint, tensors):
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        lazy, read = checkpoint.tensors[name], checkpoint.tensors[name].read()
        kind = (KINDS | WITHOUT_STORAGE)[str(tensor.dtype).removeprefix("torch.")]
        assert lazy.shape == read.shape == tuple(tensor.shape), name
        assert lazy.dtype == read.dtype == np.dtype(kind), name
        assert read.flags.c_contiguous and read.tobytes() == bits(tensor), name


def random(kind, *shape):
    torch = import_torch()
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(
        getattr(torch, kind)
    )


def test_all_dtypes(save):
    tensors = {kind: random(kind, 3, 5) for kind in KINDS | WITHOUT_STORAGE}
    assert_same_bits(save(tensors), tensors)


@pytest.mark.parametrize("kind", ["float32", "int64", "bfloat16", "bool"])
def test_views_of_shared_storages(save, kind):
    base = random(kind, 6, 8, 2)
    tensors = {
        "base": base,
        "again": base,
        "transposed": base.permute(2, 0, 1),
        "row": base[3],
        "steps": base[1:5:2, 2::3, 1],
        "scalar": base[2, 2, 1],
        "empty": base[3:3],
        "expanded": base[:1].expand(4, 8, 2),
        "one": base[2:3, :, :1].transpose(0, 2),
        "channels_last": base[None].contiguous(memory_format=import_torch().channels_last),
        "scalar of its own": random(kind)[()],
        "empty of its own": random(kind, 0, 3),
    }
    assert_same_bits(save(tensors), tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(save, protocol):
    tensors = {"a": random("float32", 3), "b": random("int64", 2, 2)}
    assert_same_bits(save(tensors, pickle_protocol=protocol), tensors)


def trained():
    """A model with buffers and its optimiser after a step."""
    torch = import_torch()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_training_checkpoint(save):
    torch = import_torch()
    omegaconf = pytest.importorskip("omegaconf")
    model, optimizer = trained()
    parameter = torch.nn.Parameter(random("float32", 4))
    marked = torch.nn.Parameter(random("float32", 2))
    marked.note = "kept as an attribute"  # another constructor
    config = {"model": {"widths": [8, {"last": 16}], "name": "vq", "none": None}, "lr": 0.5}
    checkpoint = save(
        {
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "parameter": parameter,
            "marked": marked,
            "args": argparse.Namespace(vq_model="VQ-16"),
            "hyper_parameters": omegaconf.OmegaConf.create(config),
            "missing": omegaconf.DictConfig("???"),
            "callbacks": {torch.nn.Linear: {"best": 0.25}},
            "size": model[0].weight.shape,
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "rng": torch.get_rng_state(),
            "numpy": {"state": np.arange(5, dtype=np.uint32), "score": np.float64(0.5)},
            "sparse": torch.eye(3).to_sparse(),
            "epoch": 3,
        }
    )
    tensors = {f"state_dict.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.state.{index}.{name}": value for name, value in state.items()}
    tensors |= {"parameter": parameter, "marked": marked, "rng": torch.get_rng_state()}
    numbers = checkpoint.tensors.pop("numpy.state").read()
    assert np.array_equal(numbers, np.arange(5)) and numbers.dtype == np.uint32
    assert_same_bits(checkpoint, tensors)
    found = {n: v for n, v in checkpoint.values.items() if not n.startswith("optimizer.")}
    assert found == {
        "args.vq_model": "VQ-16",
        "hyper_parameters.model.widths.0": 8,
        "hyper_parameters.model.widths.1.last": 16,
        "hyper_parameters.model.name": "vq",
        "hyper_parameters.model.none": None,
        "hyper_parameters.lr": 0.5,
        "callbacks.torch.nn.modules.linear.Linear.best": 0.25,
        **{f"size.{axis}": size for axis, size in enumerate(model[0].weight.shape)},
        "numpy.score": 0.5,
        "epoch": 3,
    }
    assert checkpoint.values["optimizer.param_groups.0.lr"] == 0.125


@pytest.mark.filterwarnings("ignore:.*retrieve source code.*", "ignore:TypedStorage is deprecated")
def test_a_whole_model_and_a_storage(save):
    model, _ = trained()
    checkpoint = save({"model": model, "storage": random("float32", 2, 3).storage()})
    named = dict(model.state_dict()) | {"storage": random("float32", 6)}
    found = {name.rsplit(".", 1)[-1]: lazy for name, lazy in checkpoint.tensors.items()}
    assert found["running_mean"].read().tobytes() == bits(model[1].running_mean)
    assert found["storage"].read().tobytes() == bits(named["storage"])
    assert len(checkpoint.tensors) == len(named)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_torchscript_is_refused(tmp_path):
    torch = import_torch()
    torch.jit.script(trained()[0]).save(str(tmp_path / "x.pt"))
    with pytest.raises(InputError, match="TorchScript"):
        open_checkpoint(tmp_path / "x.pt")


def arrays(kinds):
    rng = np.random.default_rng(0)
    shapes = {"square": (4, 6), "scalar": (), "empty": (0, 2), "one": (1,)}
    return {
        name: {
            kind: np.asarray(rng.normal(size=shape) * 50).astype(code)
            for kind, code in kinds.items()
        }
        for name, shape in shapes.items()
    } | {"transposed": {kind: np.arange(6).reshape(2, 3).astype(c).T for kind, c in kinds.items()}}


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(tmp_path, mmap):
    torch = import_torch()
    written = arrays(KINDS)
    plain = {"epoch": 3, "large": 2**70, "lr": 1e-4, "name": "Größe", "none": None}
    plain |= {"yes": True, "list": [1, [2.5]], "tuple": (1, "a", ()), "empty": {}, 7: [{}]}
    path = tmp_path / "x.pt"
    write_torch(path, {"state_dict": written, "plain": copy.deepcopy(plain)})
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert loaded["plain"] == plain and type(loaded["plain"]["yes"]) is bool
    for name, group in written.items():
        for kind, array in group.items():
            tensor = loaded["state_dict"][name][kind]
            assert tensor.dtype == getattr(torch, kind) and tuple(tensor.shape) == array.shape
            assert bits(tensor) == array.tobytes(), (name, kind)
            assert not tensor.requires_grad
