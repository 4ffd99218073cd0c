"""The Mosaic GPU kernels compile for an H200, keep everything in registers, and let the tensor core run on while others work."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

INSTRUCTION_CACHE = 128 * 1024
"""Bytes. On an H200, code that is walked again and again takes twice as long an instruction once it is larger (docs/benchmarks.md)."""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the packages of the extra cuda13"
)
def test_kernels_spill_nothing_fit_the_cache_and_wait_for_no_product():
    """Not for an adapter of rank 128 either, whose B comes on top of the sums."""
    command = [sys.executable, "-m", "tests.pallas_kernels.compile_mosaic"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["code"] for kernel in kernels} == {"int4", "int8", "fast8"}
    assert {kernel["block_m"] for kernel in kernels} == {16, 32, 64, 128, 256}
    for kernel in kernels:
        said = kernel.pop("ptxas")
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, (kernel, said)
        assert "serialized" not in said, (kernel, said)
        assert kernel["bytes"] <= INSTRUCTION_CACHE, kernel
        assert "setmaxnreg" not in said, (
            kernel,
            said,
        )  # ptxas says so where it ignores how warp groups share the registers
