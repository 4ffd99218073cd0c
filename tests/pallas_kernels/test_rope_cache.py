"""Rotation and cache write against float64: the jnp twin, and the kernel's own code in Triton's interpreter or on a GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.pallas_kernels.oracles import relative_error

EPS, LAYER, SLOT = 1e-5, 1, 4
TOLERANCE = {"float16": 3e-3, "float32": 2e-6, "bfloat16": 2e-2}


def case(normed: bool, dtype: str, questions=2, group=3, heads=6, kv_heads=2, depth=16, slots=7):
    """Arguments as numpy arrays: qkv, cos, sin, k, v, norms."""
    rng = np.random.default_rng(heads + depth)
    qkv = np.asarray(jnp.asarray(rng.normal(size=(questions, group, (heads + 2 * kv_heads) * depth)), dtype))
    angles = rng.normal(size=(questions, depth // 2)) * 9
    cache = rng.normal(size=(2, 3, questions, group, kv_heads, slots, depth))
    norms = tuple(rng.normal(size=(3, depth)).astype(np.float32) for _ in range(2)) if normed else None
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return qkv, *tables, *(np.asarray(jnp.asarray(part, dtype)) for part in cache), norms


def oracle(qkv, cos, sin, k, v, norms):
    """float64."""
    qkv, cos, sin, k, v = (a.astype(np.float64) for a in (qkv, cos, sin, k, v))
    kv_heads, depth = k.shape[3], k.shape[5]
    heads = qkv.reshape(*qkv.shape[:2], -1, depth)
    q, new_k, new_v = np.split(heads, [heads.shape[2] - 2 * kv_heads, heads.shape[2] - kv_heads], axis=2)
    if norms is not None:
        q, new_k = (
            x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale[LAYER]
            for x, scale in zip((q, new_k), norms, strict=True)
        )
    cos, sin = cos[:, None, None], sin[:, None, None]
    half = depth // 2
    q, new_k = (
        np.concatenate([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)
        for x in (q, new_k)
    )
    k[LAYER, :, :, :, SLOT], v[LAYER, :, :, :, SLOT] = new_k, new_v
    return q, k, v


def assert_close(got, want, dtype: str) -> None:
    for name, one, other in zip("qkv", got, want, strict=True):
        assert relative_error(np.asarray(one, np.float64), other) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_twin(normed: bool, dtype: str, traced: bool) -> None:
    qkv, cos, sin, k, v, norms = case(normed, dtype)

    def run(slot, layer):
        return pallas_kernels.rope_and_cache(
            *map(jnp.asarray, (qkv, cos, sin, k, v)),
            slot,
            layer=layer,
            norms=norms and tuple(map(jnp.asarray, norms)),
            eps=EPS,
        )

    got = jax.jit(run)(SLOT, LAYER) if traced else run(SLOT, LAYER)
    assert_close(got, oracle(qkv, cos, sin, k, v, norms), dtype)


def test_shapes_that_do_not_fit_are_refused() -> None:
    qkv, cos, sin, k, v, _ = case(False, "float32")
    with pytest.raises(ValueError, match="want qkv"):
        pallas_kernels.rope_and_cache(qkv[..., :-1], cos, sin, k, v, SLOT, layer=LAYER)
    with pytest.raises(ValueError, match="cos, sin"):
        pallas_kernels.rope_and_cache(qkv, cos[:, 1:], sin[:, 1:], k, v, SLOT, layer=LAYER)
    with pytest.raises(ValueError, match="cannot run"):
        pallas_kernels.rope_and_cache(qkv, cos, sin, k, v, SLOT, layer=LAYER, implementation="triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("pointers", [False, True])
@pytest.mark.parametrize("heads", [dict(), dict(heads=7, kv_heads=1, group=1, depth=64)], ids=str)
def test_kernel(normed: bool, pointers: bool, heads: dict) -> None:
    """The caches are updated in place; elements that are not written keep what they had."""
    import torch
    import triton.language as tl

    from pallas_kernels import rope_cache_triton
    from tests.pallas_kernels.launch import DEVICE, DTYPES, poisoned, scalar

    dtype = DTYPES[-1]
    arguments = case(normed, dtype, **heads)
    qkv, cos, sin, k, v = (torch.tensor(np.asarray(a, np.float32)).to(DEVICE) for a in arguments[:5])
    qkv, k, v = (a.to(getattr(torch, dtype)) for a in (qkv, k, v))
    norms = arguments[5]
    scales = (cos, cos) if norms is None else tuple(torch.tensor(scale).to(DEVICE) for scale in norms)
    constants = rope_cache_triton.kernel_constants(qkv, k, EPS, normed)
    q = poisoned(*qkv.shape[:2], constants["H"], constants["D"])
    rope_cache_triton.rope_and_cache_kernel[rope_cache_triton.grid(constants)](
        qkv,
        cos,
        sin,
        k,
        v,
        *scales,
        scalar(SLOT) if pointers else SLOT,
        scalar(LAYER) if pointers else LAYER,
        q,
        k,
        v,
        DTYPE=getattr(tl, dtype),
        SLOT_IS_POINTER=pointers,
        LAYER_IS_POINTER=pointers,
        num_warps=1,
        **constants,
    )
    assert_close([a.float().cpu().numpy() for a in (q, k, v)], oracle(*arguments), dtype)
