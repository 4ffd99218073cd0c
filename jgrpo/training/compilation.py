"""JAX's persistent compilation cache: on an accelerator, the second run of a shape starts in seconds.

XLA keeps what its autotuning found in the same directory, and `pallas_kernels` the compiled Triton kernels. Programs that compile
in less than a second are kept too: a run has dozens of them, and reading one takes a few milliseconds.
"""

import os
from pathlib import Path

import jax

MIN_COMPILE_SECONDS = 0.0


def enable_compilation_cache() -> None:
    """Cache compiled programs in the user's cache directory, unless JAX is told otherwise or runs on a CPU.

    A CPU's programs are made for one kind of processor, and a home directory may be shared by several.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None or jax.default_backend() == "cpu":
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "jgrpo" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
