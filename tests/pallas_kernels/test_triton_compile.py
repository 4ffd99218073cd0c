"""Compiled Triton kernels are shared inside a process and between processes, and carry nothing of where they were compiled."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")


def run(*command: str) -> dict:
    command = (sys.executable, "-m", *command)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = (run("tests.pallas_kernels.compile_cached", str(tmp_path)) for _ in range(2))
    assert (first["compiled"], first["different"]) == (3, 3)  # the fourth request repeats the first
    assert second == {**first, "compiled": 0}
    files = list((tmp_path / "triton").iterdir())
    assert [file.suffix for file in files] == [".json"] * 3
    assert not any(str(Path(__file__).parents[2]) in file.read_text() for file in files)


@needs_triton
def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    from pallas_kernels import triton_compile

    blocked = tmp_path / "triton"
    blocked.write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="not kept"):
        triton_compile._keep(blocked / "kernel.json", "{}")


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="needs the GPU packages, but no GPU")
def test_unrolled_layers_launch_one_kernel_through_the_recordable_call() -> None:
    """Layer 1 is no kernel of its own, though Triton makes constants of ones by itself."""
    assert run("tests.pallas_kernels.lower_launches") == {"compiled": 1, "calls": 4, "recordable": 4}
