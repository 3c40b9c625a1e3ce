"""Outputs that are there whole or not at all: written beside their place, then renamed into it."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path in the same folder; it becomes `path` if the block does not raise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path | str) -> Iterator[Path]:
    """Yields a temporary folder; it replaces `path`, and all in it, if the block does not raise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(beside, path)
            shutil.rmtree(old)
        else:
            os.rename(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(data: Any, path: Path | str) -> None:
    """JSON data into a file."""
    with new_file(path) as new:
        new.write_text(json.dumps(data, indent=2) + "\n")
