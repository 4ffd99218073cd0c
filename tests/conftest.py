"""Settings that every test shares: CPU, JAX's compilation cache, our own warnings as errors."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jgrpo-test-compilation-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when Triton is first imported, which transformers does where it is installed; "0" runs the kernels on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Mosaic's interpreter runs every warp group in a thread of its own that XLA's CPU pool lends, and that sleeps until another one
# arrives at a barrier: with a thread for each of two cores, the one that would arrive never starts, and the test hangs.
if [int(part) for part in version("jax").split(".")[:2]] >= [0, 11]:
    os.environ.setdefault("PJRT_NPROC", "32")

import jax


@pytest.fixture(autouse=True)
def _own_warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"(jgrpo|pallas_kernels)(\.|$)")
        yield


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """A process that keeps every program of the whole suite runs into the kernel's limit on memory maps."""
    yield
    jax.clear_caches()
