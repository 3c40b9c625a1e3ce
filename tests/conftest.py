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
# Keys of a generator that compiles in a tenth of the default one's time: a third of all compiling
# was of random numbers, a program a shape. Processes that tests start have the default.
jax.config.update("jax_default_prng_impl", "rbg")
_cache = Path(os.environ.get("VQGAN_TEST_CACHE", Path(tempfile.gettempdir()) / "vqgan-test-cache"))
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
