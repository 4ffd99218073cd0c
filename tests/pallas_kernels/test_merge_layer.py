"""An int4 matrix with its adapter in 8 bits: the jnp twin against float64, and the kernel's own code against the twin."""

import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import LayerMatrix, Source, dispatch, interleave_gate
from pallas_kernels.codes import dequantize
from tests.pallas_kernels.oracles import random_int4

INDEX, LAYER, LAYERS, GROUP = 1, 2, 4, 64
CASES = {
    "bare": dict(n=48, k=128, own=64, rank=0),
    "adapter": dict(n=33, k=192, own=32, rank=8),
    "wide rank": dict(n=64, k=256, own=128, rank=40),
    "gate": dict(n=80, k=128, own=64, rank=16, gate=True),
}


def case(n: int, k: int, own: int, rank: int) -> tuple[LayerMatrix, Source, np.ndarray]:
    """(stack that was there, source, W + B A in float64); factors of whole eighths, so that B A is exact in float16 and bfloat16."""
    rng = np.random.default_rng(n + k)
    packed, scales, _ = random_int4(rng, n, k, own, (3,))
    scales = np.asarray(jnp.asarray(scales, jnp.bfloat16), np.float32)
    scales[INDEX, 0] = 0
    adapter, delta = None, np.zeros((n, k))
    if rank:
        a, b = rng.integers(-1, 2, (LAYERS, rank, k)) / 8, rng.integers(-1, 2, (LAYERS, n, rank)) / 8
        b[LAYER, 0] = 0
        adapter, delta = (np.float32(a), np.float32(b)), b[LAYER] @ a[LAYER]
    before = (
        rng.integers(0, 255, (LAYERS, n, k), dtype=np.uint8),
        np.float32(rng.integers(-9, 9, (LAYERS, k // GROUP, n))),
    )
    want = dequantize(packed[INDEX], scales[INDEX], np.float64) + delta
    return LayerMatrix(*before), Source(packed, scales, adapter), want


def arguments(c: dict) -> tuple[dict, bool]:
    """The shapes, and whether it is gate_up."""
    return {name: value for name, value in c.items() if name != "gate"}, c.get("gate", False)


def twin(into: LayerMatrix | None, source: Source, gate: bool, scales_dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    how: dict[str, Any] = dict(layers=LAYERS, group=GROUP, gate=gate, dtype=jnp.float32, scales_dtype=scales_dtype)
    into = None if into is None else LayerMatrix(jnp.asarray(into.packed), jnp.asarray(into.scales, scales_dtype))
    made = pallas_kernels.merge_layer(into, source, INDEX, LAYER, **how)
    return np.asarray(made.packed), np.asarray(made.scales, np.float64)


@pytest.mark.parametrize("name", CASES)
def test_twin(name: str) -> None:
    """Every weight within a step of its own, which above 0 is two of the scale, and no other layer touched."""
    shapes, gate = arguments(CASES[name])
    before, source, want = case(**shapes)
    packed, scales = twin(before, source, gate, jnp.float32)
    want = np.asarray(interleave_gate(want)) if gate else want
    got = dequantize(packed[LAYER], np.float32(scales[LAYER].T), np.float64, "fast8")
    step = np.repeat(np.abs(scales[LAYER].T), GROUP, axis=1)
    assert np.all(np.abs(got - want) <= 1.001 * step)
    assert np.all(got[want == 0] == 0)
    others = np.arange(LAYERS) != LAYER
    np.testing.assert_array_equal(packed[others], before.packed[others])
    np.testing.assert_array_equal(scales[others], before.scales[others])
    for part, first in zip((packed, scales), twin(None, source, gate, jnp.float32), strict=True):
        np.testing.assert_array_equal(part[LAYER], first[LAYER])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str) -> None:
    """The twin's bytes and scales exactly: nothing of these numbers is rounded but the scales and the codes."""
    from tests.pallas_kernels.launch import DTYPES, merge_layer

    shapes, gate = arguments(CASES[name])
    before, source, _ = case(**shapes)
    got = merge_layer(before, source, INDEX, LAYER, GROUP, gate, DTYPES[-1], "float16")
    for part, want in zip(got, twin(before, source, gate, jnp.float16), strict=True):
        np.testing.assert_array_equal(part, want)


def test_rule() -> None:
    hopper = dispatch.Device("gpu", (9, 0), True, "NVIDIA H200")
    assert dispatch.merge_layer_problem(hopper, jnp.bfloat16, 1536, 64, 64) is None
    assert "powers of two" in str(dispatch.merge_layer_problem(hopper, jnp.bfloat16, 1536, 48, 64))
    assert "powers of two" in str(dispatch.merge_layer_problem(hopper, jnp.bfloat16, 96, 32, 64))
    _, source, _ = case(48, 128, 64, 0)
    how: dict[str, Any] = dict(layers=3, group=64, gate=False, dtype="bfloat16", scales_dtype="bfloat16")
    with pytest.raises(ValueError, match="cannot run"):
        pallas_kernels.merge_layer(None, source, 0, 0, **how, implementation="triton")
