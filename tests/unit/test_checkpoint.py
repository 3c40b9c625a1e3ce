"""Checkpoints come back as they were, or are refused before anything is written."""

import errno
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqgan.errors import InputError
from vqgan.train.checkpoint import Checkpoints

Usage = namedtuple("Usage", "total used free")


def test_a_state_and_its_meta_come_back(tmp_path):
    state = {"a": jnp.arange(5.0) / 3, "b": {"c": jnp.asarray(7, jnp.int32)}}
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, state, {"config": {"lr": 0.1}})
        checkpoints.wait()
        assert checkpoints.latest() == 3
        found = checkpoints.restore(3, jax.tree.map(jnp.zeros_like, state))
        assert checkpoints.meta(3) == {"config": {"lr": 0.1}}
    jax.tree.map(np.testing.assert_array_equal, found, state)


@pytest.mark.parametrize("other", [{"a": (3,), "b": ()}, {"b": (3,)}, {"a": (4,)}])
def test_a_state_of_other_parts_is_refused_in_one_line(tmp_path, other):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(2, {"a": jnp.zeros(3)}, {})
        checkpoints.wait()
        with pytest.raises(InputError) as refusal:
            checkpoints.restore(2, {name: jnp.zeros(shape) for name, shape in other.items()})
    message = str(refusal.value)
    assert "run/2: a checkpoint of another version" in message and "--out" in message
    assert "\n" not in message


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(100, 81, 19))
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(OSError, match="no space left for a checkpoint") as refusal:
            checkpoints.save(1, {"a": jnp.zeros(5)}, {})
        assert refusal.value.errno == errno.ENOSPC
        assert checkpoints.latest() is None
