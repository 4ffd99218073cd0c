"""The kernels compile for Ampere and Hopper, fit their shared memory and spill no registers."""

import importlib.util
import os
import subprocess
import sys

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # what one block may ask for


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability):
    command = [sys.executable, "-m", "tests.pallas_kernels.compile_kernels", str(capability)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert len(kernels) == (46 if capability >= 89 else 44)  # a cache of float8 needs sm_89
    for name, shared, stack in kernels:
        assert int(shared) <= SHARED_MEMORY[capability], name
        assert int(stack) == 0, name
