"""A strict session: warnings are errors, shapes are checked, eight devices to shard over."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A module is compiled whole: cut in parts for threads that a worker does not have, it takes longer.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
_cache = Path(os.environ.get("VQGAN_TEST_CACHE", Path(tempfile.gettempdir()) / "vqgan-test-cache"))
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_configure(config):
    """In the default suite keys are of a generator that compiles in a tenth of the time: a third of
    all compiling was of random numbers, a program a shape. The other suites, and the processes that
    tests start, have JAX's default one."""
    if config.option.markexpr.startswith("not slow"):
        jax.config.update("jax_default_prng_impl", "rbg")
