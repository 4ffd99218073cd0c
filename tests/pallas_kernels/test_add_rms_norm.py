"""Residual, branch and norm against float64: the jnp twin, and the kernel's own code in Triton's interpreter or on a GPU."""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from tests.pallas_kernels.oracles import relative_error

EPS, LAYER = 1e-5, 1
TOLERANCE = {"float16": 3e-3, "float32": 2e-6, "bfloat16": 2e-2}
WIDTHS = [(1, 64), (5, 896), (3, 1536), (2, 3584), (33, 48)]
KINDS = {
    "one part": dict(parts=1),
    "sum of parts": dict(parts=5),
    "bias": dict(parts=3, bias=True),
    "gemma": dict(parts=2, offset=1.0, branch_norm=True),
    "branch norm": dict(parts=2, branch_norm=True, bias=True),
}


def case(m: int, width: int, parts: int, bias: bool = False, branch_norm: bool = False, offset: float = 0.0):
    """Arguments as numpy arrays; values that float16 and bfloat16 hold, so that every dtype sees the same ones."""
    rng = np.random.default_rng(m * width + parts)

    def draw(*shape: int) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float32)

    return SimpleNamespace(
        residual=draw(m, width),
        parts=draw(parts, m, width),
        scale=draw(3, width),
        bias=draw(3, width) if bias else None,
        branch_scale=draw(3, width) if branch_norm else None,
        offset=offset,
    )


def oracle(c) -> tuple[np.ndarray, np.ndarray]:
    """float64, from the definitions."""

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * (c.offset + scale[LAYER].astype(np.float64))

    branch = c.parts.astype(np.float64).sum(0) + (0 if c.bias is None else c.bias[LAYER])
    x = c.residual.astype(np.float64) + (branch if c.branch_scale is None else norm(branch, c.branch_scale))
    return x, norm(x, c.scale)


def permuted(x: np.ndarray) -> np.ndarray:
    """Column 4t + 2h + j of every 16 at 8h + 2t + j, one column at a time."""
    out = np.empty_like(x)
    for column in range(x.shape[1]):
        t, h, j = column % 16 // 4, column // 2 % 2, column % 2
        out[:, column // 16 * 16 + 8 * h + 2 * t + j] = x[:, column]
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_twin(kind: str, traced: bool, dtype: str) -> None:
    c = case(5, 896, **KINDS[kind])

    def run(layer):
        stacks = dict(bias=c.bias, branch_scale=c.branch_scale)
        stacks = {name: None if stack is None else jnp.asarray(stack, dtype) for name, stack in stacks.items()}
        return pallas_kernels.add_rms_norm(
            jnp.asarray(c.residual, dtype),
            jnp.asarray(c.parts),
            jnp.asarray(c.scale, dtype),
            layer=layer,
            eps=EPS,
            offset=c.offset,
            permuted=True,
            **stacks,
        )

    residual, rows = jax.jit(run)(LAYER) if traced else run(LAYER)
    assert residual.dtype == rows.plain.dtype == jnp.dtype(dtype)
    for got, want in zip((residual, rows.plain), oracle(c), strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]
    np.testing.assert_array_equal(rows.permuted, permuted(np.asarray(rows.plain)))


def test_the_twin_is_a_residual_and_a_norm_exactly() -> None:
    """A product that is not split, through this operation, is what the layers of a training forward compute."""
    c = case(5, 896, parts=1)
    x, y, scale = (jnp.asarray(a, jnp.bfloat16) for a in (c.residual, c.parts[0], c.scale))
    residual, rows = pallas_kernels.add_rms_norm(x, y[None], scale, layer=LAYER, eps=EPS)
    np.testing.assert_array_equal(np.float32(residual), np.float32(x + y))
    np.testing.assert_array_equal(np.float32(rows.plain), np.float32(pallas_kernels.rms_norm(x + y, scale[LAYER], EPS)))
    assert rows.permuted is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "width"), WIDTHS)
def test_kernel(m: int, width: int, kind: str, pointer: bool) -> None:
    from tests.pallas_kernels.launch import DTYPES, add_rms_norm

    c, dtype = case(m, width, **KINDS[kind]), DTYPES[-1]
    residual, rows, reordered = add_rms_norm(c, LAYER, EPS, dtype, pointer)
    want = oracle(c)
    assert relative_error(residual, want[0]) < TOLERANCE[dtype]
    assert relative_error(rows, want[1]) < TOLERANCE[dtype]
    np.testing.assert_array_equal(reordered, permuted(rows))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, scale = jnp.ones((2, 24)), jnp.ones((3, 24))
    for arguments, message in [
        (dict(parts=jnp.ones((2, 24))), "wants parts"),
        (dict(parts=x[None], bias=scale[0]), "bias must be"),
        (dict(parts=x[None], permuted=True), "sixteens"),
        (dict(parts=x[None], implementation="triton"), "cannot run"),
    ]:
        with pytest.raises(ValueError, match=message):
            pallas_kernels.add_rms_norm(x, scale=scale, layer=0, eps=EPS, **arguments)


def test_rule() -> None:
    hopper = dispatch.Device("gpu", (9, 0), True, "NVIDIA H200")
    assert dispatch.add_rms_norm_problem(hopper, jnp.bfloat16, 8192) is None
    assert "8192" in str(dispatch.add_rms_norm_problem(hopper, jnp.bfloat16, 8200))
    assert "float32" in str(dispatch.add_rms_norm_problem(hopper, jnp.float32, 1536))
