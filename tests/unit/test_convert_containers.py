"""Containers give back what was written, claim no more than is there, and never run anything."""

import argparse
import collections
import datetime
import json
import math
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from vqgan import convert
from vqgan.convert.containers import Checkpoint, open_checkpoint, write_torch
from vqgan.errors import InputError

RNG = np.random.default_rng(0)
KINDS = ["?", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8", "c8", "c16", ml_dtypes.bfloat16]


def random(shape=(3, 5), dtype="f4"):
    return (RNG.normal(size=shape) * 50).astype(dtype)


TREE = {
    "state_dict": {
        "encoder.conv_in.weight": random((4, 3, 2, 2)),
        "encoder.conv_in.bias": random(4),
    },
    "kinds": {str(np.dtype(kind)): random(dtype=kind) for kind in KINDS},
    "list": [random((0, 3)), np.array(3.5, "f4"), (random((1, 2)).T,)],
    "lr": 0.25,
    "steps": 2**40,
    "name": "Größe",
    "nested": {"flag": True, "none": None, "list": [1, -2]},
}
# What is left of the tree's values when it is flat.
VALUES = {
    "lr": 0.25,
    "steps": 2**40,
    "name": "Größe",
    "nested.flag": True,
    "nested.none": None,
    "nested.list.0": 1,
    "nested.list.1": -2,
}


def flat_arrays(tree, name=""):
    if isinstance(tree, np.ndarray):
        return {name[1:]: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    items = [(k, v) for k, v in items if isinstance(v, np.ndarray | dict | list | tuple)]
    return {n: a for k, v in items for n, a in flat_arrays(v, f"{name}.{k}").items()}


ARRAYS = flat_arrays(TREE)


def assert_same_bits(checkpoint, arrays):
    assert checkpoint.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        lazy, read = checkpoint.tensors[name], checkpoint.tensors[name].read()
        assert (lazy.shape, lazy.dtype) == (read.shape, read.dtype) == (array.shape, array.dtype)
        assert read.tobytes() == array.tobytes(), name
        assert read.flags.c_contiguous and read.flags.writeable


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# Torch files, made by hand.


def plain(value) -> bytes:
    """Opcodes that push a plain value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def storage(kind="FloatStorage", key="0", numel=24, *view) -> bytes:
    rest = b"".join(map(plain, (key, "cpu", numel, *view)))
    return b"(" + plain("storage") + b"ctorch\n" + kind.encode() + b"\n" + rest + b"tQ"


def tensor(where, offset, shape, strides, rebuild="_rebuild_tensor_v2") -> bytes:
    rest = b"\x89N" if rebuild.endswith("2") else b""
    places = b"".join(map(plain, (offset, shape, strides)))
    return b"ctorch._utils\n" + rebuild.encode() + b"\n(" + where + places + rest + b"tR"


def mapping(**entries: bytes) -> bytes:
    return b"}(" + b"".join(plain(key) + value for key, value in entries.items()) + b"u"


def torch_zip(path, pickled: bytes, top="archive", compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{top}/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"{top}/{name.replace('__', '/')}", data)
    return path


def torch_legacy(path, body: bytes, system=None, keys=(), storages=()):
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    heads = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    data = b"".join(struct.pack("<q", s.size) + s.tobytes() for s in storages)
    path.write_bytes(b"".join(heads) + body + pickle.dumps(list(keys), 2) + data)
    return path


def program(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


BASE = np.arange(24, dtype="f4")
VIEWS = mapping(
    whole=tensor(storage(), 0, (4, 6), (6, 1)),
    transposed=tensor(storage(), 0, (6, 4), (1, 6)),
    inner=tensor(storage(), 7, (2, 3), (6, 2)),
    old=tensor(storage(), 5, (2,), (3,), rebuild="_rebuild_tensor"),
    repeated=tensor(storage(), 1, (2, 3), (0, 1)),
    scalar=tensor(storage(), 23, (), ()),
    empty=tensor(storage(), 0, (0, 3), (3, 1)),
    singular=tensor(storage(), 2, (1, 3), (100, 1)),
    parameter=b"ctorch._utils\n_rebuild_parameter\n("
    + (tensor(storage(), 0, (2,), (1,)) + b"\x88NtR"),
    storage=storage(),
)
EXPECTED_VIEWS = {
    "whole": BASE.reshape(4, 6),
    "transposed": BASE.reshape(4, 6).T,
    "inner": BASE.reshape(4, 6)[1:3, 1::2],
    "old": BASE[5:9:3],
    "repeated": np.stack([BASE[1:4]] * 2),
    "scalar": BASE[23],
    "empty": np.zeros((0, 3), "f4"),
    "singular": BASE[None, 2:5],
    "parameter": BASE[:2],
    "storage": BASE,
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["archive", "epoch=3-last"])
def test_views_of_one_storage_in_a_zip(tmp_path, top, compression):
    data = {"data__0": BASE.tobytes(), "byteorder": b"little"}
    path = torch_zip(tmp_path / "x", program(VIEWS), top, compression, **data)
    assert_same_bits(open_checkpoint(path), EXPECTED_VIEWS)


def test_views_of_one_storage_in_a_legacy_file(tmp_path):
    # Two storages, of which the second is a part of a root; the keys' order is that of the file.
    views = VIEWS[:-1] + plain("part") + storage("LongStorage", "7", 9, ("view", 2, 3)) + b"u"
    roots = [np.arange(9), BASE]
    path = torch_legacy(tmp_path / "x", program(views), keys=("7", "0"), storages=roots)
    assert_same_bits(open_checkpoint(path), EXPECTED_VIEWS | {"part": np.arange(2, 5)})


def test_only_the_bytes_of_a_view_are_read(tmp_path):
    path = tmp_path / "x"
    write_torch(path, {"a": random(1000), "b": random(1000)})
    checkpoint = open_checkpoint(path)
    before, lazy = checkpoint.tensors["a"].read(), checkpoint.tensors["b"]
    start = path.read_bytes().index(lazy.read().tobytes())
    os.truncate(path, start)  # all of b goes
    assert np.array_equal(checkpoint.tensors["a"].read(), before)
    with pytest.raises(InputError, match="4000 bytes are missing"):
        lazy.read()
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        lazy.read()


def test_dtypes_that_the_tensor_names(tmp_path):
    def v3(kind):
        rest = b"".join(map(plain, (0, (2, 3), (3, 1)))) + b"\x89Nctorch\n" + kind + b"\n"
        return b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage("UntypedStorage") + rest + b"tR"

    kinds = {b"uint16": "u2", b"float8_e4m3fn": ml_dtypes.float8_e4m3fn}
    body = mapping(**{kind.decode(): v3(kind) for kind in kinds}, unknown=v3(b"float1"))
    data = bytes(range(24))
    path = torch_zip(tmp_path / "x", program(body), data__0=data)
    found = {
        kind.decode(): np.frombuffer(data, dtype)[:6].reshape(2, 3) for kind, dtype in kinds.items()
    }
    assert_same_bits(open_checkpoint(path), found)


def test_bytes_other_than_0_and_1_are_true(tmp_path):
    path = torch_zip(
        tmp_path / "x",
        program(mapping(a=tensor(storage("BoolStorage", numel=3), 0, (3,), (1,)))),
        data__0=b"\x00\x01\x07",
    )
    assert open_checkpoint(path).tensors["a"].read().view("u1").tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "claim",
    [
        tensor(storage(), 0, (25,), (1,)),
        tensor(storage(), 1, (24,), (1,)),
        tensor(storage(), 0, (4, 6), (7, 1)),
        tensor(storage(), -1, (2,), (1,)),
        tensor(storage(), 0, (2,), (-1,)),
        tensor(storage(), 0, (-2,), (1,)),
        tensor(storage(), 0, (2, 2), (1,)),
        tensor(storage(), 0, (2**40,), (0,)),
        tensor(storage(), 0, (0, 2**40, 2**40), (0, 0, 0)),
        tensor(storage(), 0, (1,) * 70, (1,) * 70),
        tensor(storage(numel=2**60), 0, (2,), (1,)),
        tensor(storage(key="9"), 0, (2,), (1,)),
        tensor(storage("DoubleStorage"), 0, (2,), (1,)),
        tensor(storage("FloatStorage", "0", 24, ("view", 20, 5)), 0, (5,), (1,)),
    ],
)
def test_tensors_that_claim_what_is_not_there(tmp_path, claim):
    path = torch_zip(tmp_path / "x", program(mapping(good=claim)), data__0=BASE.tobytes())
    assert "download it again" in refusal(path)


# Roundtrips.


def test_written_torch_files_are_read_back(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"  # the name says nothing
    write_torch(path, TREE)
    checkpoint = open_checkpoint(path)
    assert checkpoint.container == "torch" and checkpoint.path == path
    assert_same_bits(checkpoint, ARRAYS)
    assert checkpoint.values == VALUES
    below = checkpoint.below("state_dict.encoder")
    assert below.keys() == {"conv_in.weight", "conv_in.bias"}
    assert checkpoint.below("state_dic") == {} and checkpoint.below("") == checkpoint.tensors


def test_storages_lie_at_multiples_of_64(tmp_path):
    write_torch(tmp_path / "x", {"a": random(3), "b": random(5)})
    data = (tmp_path / "x").read_bytes()
    for lazy in open_checkpoint(tmp_path / "x").tensors.values():
        assert data.index(lazy.read().tobytes()) % 64 == 0


def test_big_endian_arrays_are_written_as_numbers(tmp_path):
    write_torch(tmp_path / "x", {"a": BASE.astype(">f4")})
    assert_same_bits(open_checkpoint(tmp_path / "x"), {"a": BASE})


@pytest.mark.parametrize("leaf", [np.zeros(2, "u2"), np.array(["text"]), object(), {1, 2}])
def test_what_torch_cannot_hold_leaves_no_file(tmp_path, leaf):
    with pytest.raises(InputError, match="x: "):
        write_torch(tmp_path / "x", {"a": np.zeros(2), "b": leaf})
    assert not list(tmp_path.iterdir())


SAFE = {name: array for name, array in ARRAYS.items() if array.dtype != np.complex128}


def test_safetensors(tmp_path):
    save_file(
        {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in SAFE.items()},
        tmp_path / "x",
        {"made.by": "us"},
    )
    checkpoint = open_checkpoint(str(tmp_path / "x"))
    assert checkpoint.container == "safetensors"
    assert_same_bits(checkpoint, SAFE)
    assert checkpoint.values == {"__metadata__.made.by": "us"}


def write_shards(folder):
    save_file({"a": BASE}, folder / "1.safetensors", {"format": "pt"})
    save_file({"b": BASE[:5], "unlisted": BASE}, folder / "2.safetensors")
    index = {
        "metadata": {"total_size": 116},
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors"},
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path, index


def test_shards_beside_their_index(tmp_path):
    path, index = write_shards(tmp_path)
    checkpoint = open_checkpoint(path)
    assert_same_bits(checkpoint, {"a": BASE, "b": BASE[:5]})
    assert checkpoint.values == {"__metadata__.format": "pt", "__metadata__.total_size": 116}
    for shard, words in {
        "../1.safetensors": "is no name of a file beside it",
        "1.safetensors": "b is not in 1.safetensors",
        path.name: "neither a torch file",  # an index of an index
        "3.safetensors": "3.safetensors: no such file",
    }.items():
        index["weight_map"]["b"] = shard
        path.write_text(json.dumps(index))
        with pytest.raises(InputError, match=words):
            open_checkpoint(path)
    write_torch(tmp_path / "2.safetensors", {"b": BASE})
    index["weight_map"]["b"] = "2.safetensors"
    path.write_text(json.dumps(index))
    assert "2 kinds of files" in refusal(path)


def test_safetensors_whose_header_length_is_a_brace(tmp_path):
    """A header of 123 bytes starts the file with "{", which is no JSON all the same."""
    header = {"a": {"dtype": "F32", "shape": [24], "data_offsets": [0, 96]}}
    text = json.dumps(header).ljust(ord("{"))
    data = struct.pack("<Q", len(text)) + text.encode() + BASE.tobytes()
    assert data[:1] == b"{"
    (tmp_path / "x").write_bytes(data)
    assert_same_bits(open_checkpoint(tmp_path / "x"), {"a": BASE})


def test_flax_msgpack(tmp_path):
    tree = TREE | {"scalar": np.float32(0.5), "complex": 1j, "params": {"0": {"kernel": random()}}}
    (tmp_path / "x").write_bytes(serialization.to_bytes(tree))
    checkpoint = open_checkpoint(tmp_path / "x")
    assert checkpoint.container == "msgpack"
    assert_same_bits(checkpoint, flat_arrays(tree))
    assert checkpoint.values == VALUES | {"scalar": 0.5}


def test_flax_msgpack_of_large_arrays_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"params": {"kernel": random((7, 9)), "bias": random(3)}, "step": 3}
    data = serialization.to_bytes(tree)
    assert data.count(b"__msgpack_chunked_array__") == 1
    (tmp_path / "x").write_bytes(data)
    checkpoint = open_checkpoint(tmp_path / "x")
    assert_same_bits(checkpoint, flat_arrays(tree))
    assert checkpoint.values == {"step": 3}


def test_numbers_and_names_of_every_size_in_msgpack(tmp_path):
    numbers = [
        sign * 2**n + d for n in (4, 7, 8, 15, 16, 31, 32, 62) for d in (-1, 0) for sign in (1, -1)
    ]
    tree = {str(n): n for n in numbers} | {
        "n" * size: "v" * size for size in (31, 32, 255, 256, 3000)
    }
    data = serialization.msgpack_serialize(tree | {"float": 1.5})
    # Lists and maps may say their length in more bytes than they need.
    for code, entries in ((b"\xdc\x00", b""), (b"\xdd\0\0\0", b""), (b"\xde\0", b"\xa1a")):
        data += b"\xa1" + bytes([ord("a") + code[0] - 0xDC]) + code + b"\x01" + entries + b"\x07"
    data = b"\xde" + struct.pack(">H", len(tree) + 4) + data[3:]
    (tmp_path / "x").write_bytes(data)
    expected = tree | {"float": 1.5, "a.0": 7, "b.0": 7, "c.a": 7}
    assert open_checkpoint(tmp_path / "x").values == expected


# What training leaves in a file.


class Config(dict):
    """A third party's dict, whose entries are attributes too."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__ = self


class Callback:
    """A third party's object with slots, and a parent that makes a circle."""

    __slots__ = ("best", "parent")

    def __init__(self):
        self.best, self.parent = random(2), self


LEFTOVERS = {
    "args": argparse.Namespace(vq_model="VQ-16", cloud=pathlib.PurePosixPath("/a/b"), codes=16384),
    "callbacks": {Callback: {"best": 0.5}},
    "callback": Callback(),
    "config": Config(width=3, weights=random(3)),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, {"b": [2]}),
    "set": {7},
    "when": datetime.datetime(2020, 1, 1),
    "number": np.float64(0.125),
    "count": np.int64(5),
    "small": ml_dtypes.bfloat16(1.5),
    "array": random((3, 2)),
    "fortran": random((3, 2)).T,
    "swapped": BASE.astype(">f4"),
    "brain": random(3, ml_dtypes.bfloat16),
    "empty": np.zeros((0, 2)),
    "words": np.array(["no", "tensor"]),
    "objects": np.array([None, 1], object),
    "fields": [np.zeros(2, [("a", "f4")]), np.dtype([("a", "f4")])],
    "bytes": [b"", b"raw", bytearray(b"raw")],
    1: {(2, "x"): 3},
}
LEFTOVERS["again"] = LEFTOVERS["ordered"]
LEFTOVERS["circle"] = [LEFTOVERS["set"]]
LEFTOVERS["circle"].append(LEFTOVERS["circle"])


@pytest.mark.parametrize("protocol", range(6))
def test_leftovers_of_training_do_not_stop_an_import(tmp_path, protocol):
    leftovers = (
        LEFTOVERS
        if protocol > 1
        else LEFTOVERS | {"callback": {"best": LEFTOVERS["callback"].best}}
    )
    checkpoint = open_checkpoint(torch_zip(tmp_path / "x", pickle.dumps(leftovers, protocol)))
    arrays = {
        "callback.best": LEFTOVERS["callback"].best,
        "config.weights": LEFTOVERS["config"]["weights"],
        "swapped": BASE,
    } | {name: LEFTOVERS[name] for name in ("array", "fortran", "brain", "empty")}
    assert_same_bits(checkpoint, arrays)
    assert checkpoint.values == {
        "args.vq_model": "VQ-16",
        "args.cloud": "/a/b",
        "args.codes": 16384,
        f"callbacks.{__name__}.Callback.best": 0.5,
        "config.width": 3,
        "ordered.a": 1,
        "again.a": 1,
        "default.b.0": 2,
        "set.0": 7,
        "circle.0.0": 7,
        "number": 0.125,
        "count": 5,
        "small": 1.5,
        "1.2.x": 3,
    }


def test_unknown_storages_and_calls_are_left_out(tmp_path):
    body = mapping(
        quantised=tensor(storage("QInt8Storage"), 0, (2,), (1,)),
        sparse=b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
        good=tensor(storage(), 0, (24,), (1,)),
    )
    path = torch_zip(tmp_path / "x", program(body), data__0=BASE.tobytes())
    assert_same_bits(open_checkpoint(path), {"good": BASE})


# Nothing runs.


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A file that appears if a payload runs: by the shell, or by an import or call of `venom`."""
    sentinel = tmp_path / "sentinel"
    touch = f"open({str(sentinel)!r}, 'w').close()"
    (tmp_path / "venom.py").write_text(f"{touch}\ndef bite(*_):\n    {touch}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield sentinel
    sys.modules.pop("venom", None)


def payloads(sentinel) -> dict[str, tuple[bytes, str]]:
    """Pickles that run something in Python's unpickler, and what each asks for."""
    command = plain(f"touch {sentinel}")
    code = plain(f"open({str(sentinel)!r}, 'w').close()")
    system, call = b"cposix\nsystem\n", command + b"\x85R"
    nested = b"cposix\nsystem\n" + b"c_codecs\nencode\n" + command + b"\x85R" + b"\x85R"
    state = b"}" + plain("__setstate__") + system + b"sb" + command + b"b"
    return {
        "reduce": (system + call, "posix.system"),
        "os": (b"cos\nsystem\n" + call, "os.system"),
        "eval": (b"cbuiltins\neval\n" + code + b"\x85R", "builtins.eval"),
        "exec of Python 2": (b"c__builtin__\nexec\n" + code + b"\x85R", "builtins.exec"),
        "getattr": (b"cbuiltins\ngetattr\n" + system + b"(tR", "builtins.getattr"),
        "by the stack": (plain("posix") + plain("system") + b"\x93" + call, "posix.system"),
        "dotted": (plain("os") + plain("path.os.system") + b"\x93" + call, "os.path.os.system"),
        "instance": (b"(" + command + b"iposix\nsystem\n", "posix.system"),
        "object": (b"(" + system + command + b"o", "posix.system"),
        "new object": (b"csubprocess\nPopen\n" + command + b"\x85\x81", "subprocess.Popen"),
        "nested": (nested, "posix.system"),
        "an argument": (b"ccollections\nOrderedDict\n" + system + call + b"\x85R", "posix.system"),
        "set state": (b"cargparse\nNamespace\n)\x81" + state, "posix.system"),
        "in a dict": (mapping(a=system + call), "posix.system"),
        "a pickle in a pickle": (b"c_pickle\nloads\n" + plain("x") + b"\x85R", "_pickle.loads"),
        "run a module": (b"crunpy\n_run_code\n" + code + b"\x85R", "runpy._run_code"),
        "import": (b"cimportlib\nimport_module\n" + plain("venom") + b"\x85R", "importlib"),
        "extension": (b"\x82\x01", "EXT1"),
    }


def test_the_payloads_are_real(sentinel):
    for name in ("reduce", "os", "eval", "by the stack", "instance", "object", "nested"):
        pickle.loads(program(payloads(sentinel)[name][0]))
        assert sentinel.exists(), name
        sentinel.unlink()
    pickle.loads(program(b"cvenom\nbite\n)R"))
    assert sentinel.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "keys"])
def test_what_pickles_ask_for_is_refused_by_name_and_not_run(tmp_path, sentinel, kind):
    for name, (opcodes, asked) in payloads(sentinel).items():
        path = tmp_path / name
        if kind == "zip":
            torch_zip(path, program(opcodes))
        elif kind == "legacy":
            torch_legacy(path, program(opcodes))
        elif kind == "plain":
            path.write_bytes(program(opcodes))
        else:  # the last of the five pickles of a legacy file
            torch_legacy(path, program(b"}"))
            path.write_bytes(path.read_bytes().removesuffix(pickle.dumps([], 2)) + program(opcodes))
        message = refusal(path)
        assert asked in message and "which is refused" in message and "another copy" in message
        assert not sentinel.exists(), name


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cvenom\nbite\n)R",
        b"cvenom\nbite\n)R)R",
        b"cvenom\nbite\n)\x81",
        b"(ivenom\nbite\n",
        b"(cvenom\nbite\no",
        b"cargparse\nNamespace\n)\x81}" + plain("__setstate__") + b"cvenom\nbite\nsb}b",
        b"cvenom\nbite\n)\x81}" + plain("__reduce__") + b"cvenom\nbite\nsbN}" + b"\x86b",
        b"cvenom\nbite\nN}" + plain("__call__") + b"cvenom\nbite\ns\x86b",
    ],
)
def test_third_parties_are_neither_imported_nor_called(tmp_path, sentinel, opcodes):
    assert open_checkpoint(torch_zip(tmp_path / "x", program(opcodes))).tensors == {}
    assert not sentinel.exists() and "venom" not in sys.modules


def test_a_pickle_changes_nothing_for_the_next(tmp_path):
    """State given to the constructors of data is not kept by them."""
    poison = b"ccollections\nOrderedDict\nN}" + plain("fromkeys") + b"Ns\x86b"
    poison += b"0ctorch._utils\n_rebuild_tensor_v2\n}" + plain("__defaults__") + b"Nsb"
    torch_zip(tmp_path / "x", program(poison))
    open_checkpoint(tmp_path / "x")
    write_torch(tmp_path / "y", TREE)
    assert_same_bits(open_checkpoint(tmp_path / "y"), ARRAYS)


def test_torchscript_is_refused_by_name(tmp_path):
    for entry in ("constants.pkl", "code____torch__.py"):
        path = torch_zip(
            tmp_path / entry, program(b"}"), "model", **{entry.replace("code__", "code__", 1): b""}
        )
        assert "TorchScript" in refusal(path)


def test_big_endian_files_are_refused(tmp_path):
    assert "big-endian" in refusal(torch_zip(tmp_path / "x", program(b"}"), byteorder=b"big"))
    system = {"protocol_version": 1001, "little_endian": False}
    assert "big-endian" in refusal(torch_legacy(tmp_path / "y", program(b"}"), system))


# Pickles and trees made to exhaust the machine.


def doubling(times: int) -> bytes:
    """A list of twice a list of twice a list ..."""
    return b"]q\x00" + b"".join(b"]h\x00a" + b"h\x00aq\x00" for _ in range(times))


@pytest.mark.parametrize(
    "opcodes",
    [
        doubling(60),
        b"]" * 20_000 + b"a" * 19_999,
        b")" + b"\x85" * 20_000,
        b"}" + b")" + b"\x85" * 20_000 + b"N" + b"s",
        b"Nr\xff\xff\xff\x7f" + b"\x8e" + struct.pack("<Q", 2**60),
        b"X\xff\xff\xff\x7f",
        b"cnumpy\ndtype\n" + plain("(1000000000,)f8") + b"\x85R",
        b"](" + b"N" * 5_000 + b"eq\x000" + b"cbuiltins\nlist\nh\x00\x85R0" * 5_000 + b"N",
        plain("x" * 20_000).replace(b"q\x00", b"q\x010")
        + b"c_codecs\nencode\nh\x01\x85R0" * 5_000
        + b"N",
    ],
)
def test_pickles_made_to_exhaust_the_machine(tmp_path, monkeypatch, opcodes):
    monkeypatch.setattr(convert.lazy, "MAX_ENTRIES", 10_000)
    monkeypatch.setattr(convert.pickles, "MAX_PICKLE_BYTES", 2**22)
    path = torch_zip(tmp_path / "x", program(opcodes))
    try:
        assert open_checkpoint(path).tensors == {}
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


def test_msgpack_made_to_exhaust_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.lazy, "MAX_ENTRIES", 10_000)
    for data in (
        b"\x81\xa1a" + b"\x91" * 20_000 + b"\x01",
        b"\x81\xa1a\xdd\xff\xff\xff\xff\x01",
        b"\x81\xa1a\xc6\xff\xff\xff\xff\x01",
        b"\x81\xa1a\xdd\x00\x01\x00\x00" + bytes(2**16),
    ):
        (tmp_path / "x").write_bytes(data)
        assert "damaged" in refusal(tmp_path / "x")


def test_compressed_entries_that_claim_more_than_they_can_hold(tmp_path):
    bomb = torch_zip(tmp_path / "x", b"N" * 10_000_000, compression=zipfile.ZIP_DEFLATED)
    data = bomb.read_bytes()
    bomb.write_bytes(data.replace(struct.pack("<I", 10_000_000), struct.pack("<I", 2**31 - 1)))
    assert "claims 2147483647 bytes" in refusal(bomb)


# Files that are no weights.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes; download it again"),
        (b"\n <!DOCTYPE html><html>", "a web page, not weights; download it again"),
        (b"<html><body>404</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(9), "gzip; unpack it"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "a tar file"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b'{"model_type": "vq"}', "JSON without a weight_map"),
        (b'{"weight_map"', "damaged or cut off"),
        (b"GGUF" + bytes(9), "neither a torch file nor safetensors nor flax msgpack"),
        (b"\x00", "neither a torch file"),
        (pickle.dumps({"a": 1}, 2), "a pickle, but not one of torch.save"),
        (struct.pack("<Q", 9) + b"{", "neither a torch file"),  # cut off within its header
        (struct.pack("<Q", 2) + b"{}x", "damaged or cut off"),
    ],
)
def test_files_that_are_no_weights(tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    assert words in refusal(tmp_path / "x")


def test_places_without_weights(tmp_path):
    assert "no such file" in refusal(tmp_path / "none")
    assert "a directory; name the file" in refusal(tmp_path)
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a.npy", b"")
    assert "without data.pkl" in refusal(tmp_path / "x")


# Damage.


def small_files(folder) -> dict[str, bytes]:
    tree = {"a": {"w": random((2, 3)), "h": random(4, "f2")}, "step": 3, "name": "x"}
    write_torch(folder / "torch", tree)
    leftovers = pickle.dumps({"args": argparse.Namespace(a=1), "b": random(2), "o": [1, (2,)]}, 2)
    torch_zip(folder / "leftovers", leftovers, compression=zipfile.ZIP_DEFLATED)
    torch_zip(
        folder / "deflated",
        program(VIEWS),
        compression=zipfile.ZIP_DEFLATED,
        data__0=BASE.tobytes(),
    )
    torch_legacy(folder / "legacy", program(VIEWS), keys="0", storages=[BASE])
    save_file({"a": BASE, "b": BASE[:3].astype("i8")}, folder / "safetensors", {"made": "us"})
    # Bare, to be damaged before a zip file guards it with a checksum.
    (folder / "pickle").write_bytes(pickle.dumps(LEFTOVERS, 2)[:-2] + VIEWS[2:] + b".")
    (folder / "msgpack").write_bytes(serialization.msgpack_serialize(tree | {"s": np.float32(1)}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(data: bytes, rng):
    """Copies of a file, each cut off or with some bytes changed."""
    for length in rng.integers(0, len(data), 40):
        yield data[:length]
    for _ in range(160):
        new = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 5)):
            new[place] = rng.choice(
                [0, 1, 0xFF, new[place] ^ (1 << rng.integers(8)), rng.integers(256)]
            )
        yield bytes(new)
    for _ in range(20):  # a run of bytes at another's place
        start, to, count = rng.integers(0, len(data), 3) // (1, 1, 8)
        yield data[:to] + data[start : start + count] + data[to + count :]


def read_all(checkpoint: Checkpoint) -> None:
    for lazy in checkpoint.tensors.values():
        assert math.prod(lazy.shape) * lazy.dtype.itemsize <= 2**26
        read = lazy.read()
        assert (read.shape, read.dtype) == (lazy.shape, lazy.dtype)


@pytest.mark.parametrize(
    "name", ["torch", "leftovers", "deflated", "pickle", "legacy", "safetensors", "msgpack"]
)
def test_damage_is_an_input_error_or_goes_unseen(tmp_path, name):
    """It can only go unseen where it changes numbers or names, not what is where."""
    (tmp_path / "whole").mkdir()
    data = small_files(tmp_path / "whole")[name]
    path, refused = tmp_path / "damaged", 0
    for new in damaged(data, np.random.default_rng(1)):
        path.write_bytes(new)
        if name == "pickle":
            torch_zip(path, new, data__0=BASE.tobytes())
        try:
            read_all(open_checkpoint(path))
        except InputError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{path}: ")
            refused += 1
    assert refused >= 40  # what is cut off, at the least


def test_all_tensors_of_a_file_are_read_in_the_memory_of_one(tmp_path):
    """The peak of a process that reads 64 MB one after the other; keeping all would show."""
    write_torch(tmp_path / "x", {str(i): np.ones((1000, 1000), "f4") for i in range(16)})
    script = """
        import resource, sys
        from vqgan.convert.containers import open_checkpoint
        unit = 1024 if sys.platform == "linux" else 1
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        start = peak()
        checkpoint = open_checkpoint(sys.argv[1])
        total = sum(lazy.read()[0].sum() for lazy in checkpoint.tensors.values())
        one_by_one = peak()
        kept = [lazy.read() for lazy in checkpoint.tensors.values()]
        print(total, one_by_one - start, peak() - start)
    """
    # By way of a shell, since on Linux a process starts with the peak of the one that starts it.
    command = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", textwrap.dedent(script)]
    command.append(str(tmp_path / "x"))
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    total, one_by_one, kept = map(float, out.split())
    size = (tmp_path / "x").stat().st_size
    assert total == 16_000 and size > 64_000_000
    assert one_by_one < 0.3 * size < 0.8 * size < kept
