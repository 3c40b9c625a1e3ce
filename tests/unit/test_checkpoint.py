"""Checkpoints come back as they were, or are refused before anything is written."""

import errno
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(100, 81, 19))
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(OSError, match="no space left for a checkpoint") as refusal:
            checkpoints.save(1, {"a": jnp.zeros(5)}, {})
        assert refusal.value.errno == errno.ENOSPC
        assert checkpoints.latest() is None
