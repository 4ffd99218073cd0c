"""The beginning of a decode step against float64: the jnp twin, and the kernel's own code in Triton's interpreter or on a GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Positions
from tests.pallas_kernels.oracles import relative_error
from tests.pallas_kernels.test_add_rms_norm import EPS, TOLERANCE, permuted

KINDS = {"llama": {}, "gemma": dict(offset=1.0, factor=6.5)}
SHAPES = [(1, 1, 64, 32), (2, 3, 896, 64), (4, 1, 48, 20), (3, 2, 1536, 64)]
"""Questions, generations, width, angles."""
FILLED, STEP, SLOTS = 32, 5, 9


def case(questions: int, group: int, width: int, angles: int | None):
    """(tokens, table, scale, positions) as numpy; values that float16 and bfloat16 hold, so that every dtype sees the same ones."""
    rng = np.random.default_rng(questions * width)
    table, scale = (
        np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float32) for shape in ((30, width), (3, width))
    )
    lengths = rng.integers(1, SLOTS, questions).astype(np.int32)
    rotations = None
    if angles is not None:
        rotations = np.float32(rng.normal(size=(2, SLOTS + FILLED + STEP, angles)))
    tokens = rng.integers(0, len(table), questions * group).astype(np.int32)
    return tokens, table, scale, Positions(lengths, FILLED, STEP, rotations)


def check(got, given, dtype: str, offset: float = 0.0, factor: float = 1.0) -> None:
    """Residual, rows, permuted rows, slot, cos and sin (or None); rotations are copied bit for bit."""
    tokens, table, scale, positions = given
    residual, rows, reordered, slot, *rotated = got
    want = table[tokens].astype(np.float64) * factor
    assert relative_error(residual, want) < TOLERANCE[dtype]
    want = want / np.sqrt((want * want).mean(-1, keepdims=True) + EPS) * (offset + scale[0])
    assert relative_error(rows, want) < TOLERANCE[dtype]
    np.testing.assert_array_equal(reordered, permuted(np.asarray(rows)))
    assert np.asarray(slot).item() == FILLED + STEP
    if positions.rotations is not None:
        for part, expected in zip(rotated, positions.rotations, strict=True):
            np.testing.assert_array_equal(part, expected[positions.lengths + FILLED + STEP])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin(shape: tuple[int, ...], kind: str, dtype: str) -> None:
    given = case(*shape)
    tokens, table, scale, positions = given

    @jax.jit
    def run(positions):
        arrays = jnp.asarray(table, dtype), jnp.asarray(scale, dtype)
        return pallas_kernels.begin_step(tokens, *arrays, positions, eps=EPS, permuted=True, **KINDS[kind])

    residual, rows, slot, rotated = run(positions)
    assert residual.dtype == rows.plain.dtype == jnp.dtype(dtype)
    assert (slot.dtype, slot.shape) == (jnp.int32, ())
    check((residual, *rows, slot, *rotated), given, dtype, **KINDS[kind])
    assert run(positions._replace(rotations=None)).rotations is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], kind: str, pointer: bool, rotated: bool) -> None:
    from tests.pallas_kernels.launch import DTYPES, begin_step

    given = case(*shape[:3], shape[3] if rotated else None)
    how = dict(eps=EPS, offset=0.0, factor=1.0) | KINDS[kind]
    check(begin_step(*given, how, DTYPES[-1], pointer), given, DTYPES[-1], **KINDS[kind])


def test_shapes_that_do_not_fit_are_refused() -> None:
    tokens, table, scale, positions = case(2, 2, 24, 8)
    for arguments, message in [
        (dict(scale=scale[0]), "wants scale"),
        (dict(tokens=tokens[:3]), "rows of 2 questions"),
        (dict(permuted=True), "sixteens"),
        (dict(implementation="triton"), "cannot run"),
    ]:
        given = dict(tokens=tokens, table=table, scale=scale, positions=positions, eps=EPS)
        with pytest.raises(ValueError, match=message):
            pallas_kernels.begin_step(**given | arguments)
