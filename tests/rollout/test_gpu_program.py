"""What the rollout's program for a GPU must not contain, read from XLA's output for an H200; no GPU is needed."""

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from jgrpo.rollout.weights import matrix_shapes
from tests.rollout import gpu_program as built
from tests.rollout.programs import computations, instructions, loop_bodies

NEEDED = ("jax_cuda13_plugin", "jax_triton")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs the packages of the extra cuda13"
)

CACHE = built.LAYERS * built.QUESTIONS * built.GROUP * built.CONFIG.num_kv_heads * built.TOKENS * built.CONFIG.head_dim
HEAD = built.CONFIG.vocab_size, built.CONFIG.hidden_size
MATRICES = {int(np.prod(shape)) for shape in (*matrix_shapes(built.CONFIG).values(), HEAD)}
OUTSIDE_OF_LAYERS = 5
"""Kernels of a step beside its layers': the head, two that draw and record, the beginning of the layers, and the loop's counter."""
OF_A_LAYER = {"bf16": 7, "int8": 0, "int4": 12}
"""With a merged copy; with an int4 base and adapter there are four products more."""
OF_ALL_LAYERS = {"bf16": 0, "int8": 2, "int4": 0}
"""Of a copy in 8 bits, beside the counter that its programs meet at."""
PADDED = {"bf16": 0, "int8": 0, "int4": 1}
"""Copies of the scales of `down`, 140 a row, with the 144 columns that the hardware's copies ask for (12 MB of the whole model). XLA leaves
them in the loop."""


@pytest.fixture(scope="module", params=["int4", "int8", "bf16"])
def compiled(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(weights, program)"""
    return request.param, text_of(request.param)


def text_of(which: str) -> str:
    """The program that `gpu_program` prints."""
    command = [sys.executable, "-m", "tests.rollout.gpu_program", which]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def step(program: str) -> str:
    """The body of the loop over the tokens of a chunk: the one with kernels that write the cache."""
    bodies = set(re.findall(r" while\(.*?body=%([^\s,]+)", program))
    parts = [text for name, text in computations(program).items() if name in bodies]
    found = [text for text in parts if any(size == CACHE for *_, size in instructions(text, named="custom-call"))]
    assert len(found) == 1
    return found[0]


def test_a_step_copies_neither_caches_nor_weights(compiled: tuple[str, str]) -> None:
    _, program = compiled
    body = loop_bodies(program)
    assert step(program) in body
    moved = [(line, size) for name in ("copy", "copy-start") for line, _, size in instructions(body, named=name)]
    assert [line for line, size in moved if size >= CACHE // built.LAYERS or size in MATRICES] == []


def test_a_step_dequantizes_no_matrix(compiled: tuple[str, str]) -> None:
    """Nor does it make any other array of a matrix's size."""
    kernels = ("fusion", "custom-call", "convert", "copy", "transpose")
    made = [(line, size) for name in kernels for line, _, size in instructions(step(compiled[1]), named=name)]
    assert len(made) >= OUTSIDE_OF_LAYERS
    assert [line for line, size in made if size in MATRICES] == []


def test_logits_are_made_by_one_kernel(compiled: tuple[str, str]) -> None:
    """Of a head in 8 bits too, which takes rows as they are and leaves no parts to be added."""
    weights, program = compiled
    size, body = built.QUESTIONS * built.GROUP * HEAD[0], step(program)
    kernels = ("fusion", "custom-call", "convert", "copy", "transpose", "reduce")
    made = [line for name in kernels for line, _, elements in instructions(body, named=name) if elements == size]
    assert len(made) == 1
    assert " custom-call(" in made[0]
    assert (f" = f32[1,{built.QUESTIONS * built.GROUP},{HEAD[0]}]" in made[0]) == (weights == "int8")


def test_the_host_waits_once_a_chunk(compiled: tuple[str, str]) -> None:
    loops = [line for line in compiled[1].splitlines() if " while(" in line]
    assert len([line for line in loops if "known_trip_count" not in line]) == 1


def test_a_matrix_is_merged_in_place_by_one_kernel() -> None:
    program = text_of("merge")
    assert re.findall(r" = .*? (fusion|custom-call|copy|convert)\(", program) == ["custom-call"]
    outputs = re.findall(r"\{([01])\}: \(\d+, \{\}, m\w+-alias\)", program)
    assert outputs == ["0", "1"]


def test_kernels_of_a_step(compiled: tuple[str, str]) -> None:
    """Every one is a launch of a microsecond or more."""
    weights, program = compiled
    made = re.findall(r"^\s+(?:ROOT )?%\S+ = (.*?) (fusion|custom-call|copy|sort|reduce)\(", step(program), flags=re.M)
    assert "sort" not in [kind for _, kind in made]
    padded = [shape for shape, kind in made if kind == "fusion" and re.match(r"bf16\[\d+,1536,144\]", shape)]
    assert len(padded) == PADDED[weights]
    beside = OUTSIDE_OF_LAYERS + OF_ALL_LAYERS[weights]
    assert len(made) - len(padded) <= beside + OF_A_LAYER[weights] * built.LAYERS
