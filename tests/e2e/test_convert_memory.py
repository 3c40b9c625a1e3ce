"""An import holds the model once, whatever the size of the file."""

import subprocess
import sys

import pytest
from flax import nnx

from vqgan.convert import taming
from vqgan.convert.exporting import Exported
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig

_CHILD = """
import sys
from pathlib import Path
import jax.numpy as jnp
from vqgan import convert
from vqgan.convert import families
jnp.zeros(8).block_until_ready()
# Not getrusage, whose peak starts at that of the process that started this one.
status = lambda: dict(line.split(":", 1) for line in Path("/proc/self/status").open())
kilobytes = lambda name: int(status()[name].split()[0])
before = kilobytes("VmRSS")
convert.convert(sys.argv[1], sys.argv[2])
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
def test_peak_memory_of_an_import(tmp_path):
    """The paper's f16 network, 290 MB: at most 1.3 times the file over what imports need."""
    config = TokenizerConfig(autoencoder=AutoencoderConfig())
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    file = tmp_path / "last.ckpt"
    taming.save(Exported(tokenizer=tokenizer), file)
    del tokenizer
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, file, tmp_path / "model"],
        capture_output=True,
        text=True,
        check=True,
    )
    ratio = int(done.stdout.split()[-1]) / file.stat().st_size
    print(f"peak {ratio:.2f} of {file.stat().st_size / 2**20:.0f} MiB")
    assert 0.9 < ratio < 1.3  # the model itself is held
