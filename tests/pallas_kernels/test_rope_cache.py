"""Rotation and cache write against float64: the jnp twin, and the kernel's own code in Triton's interpreter or on a GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import cache_codes, dispatch
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


def oracle(qkv, cos, sin, k, v, norms, rounding: str | None = None, slot: int = SLOT):
    """float64; with `rounding`, rounded to that dtype at the points where kernel and twin round.

    These are: the normed head, its scale, their product, cos, sin and the rotated head (which a code is taken of).
    """
    rounded = (lambda x: x) if rounding is None else (lambda x: x.astype(jnp.dtype(rounding)).astype(np.float64))
    qkv, cos, sin, k, v = (a.astype(np.float64) for a in (qkv, cos, sin, k, v))
    kv_heads, depth = k.shape[3], k.shape[5]
    heads = qkv.reshape(*qkv.shape[:2], -1, depth)
    q, new_k, new_v = np.split(heads, [heads.shape[2] - 2 * kv_heads, heads.shape[2] - kv_heads], axis=2)
    if norms is not None:
        q, new_k = (
            rounded(rounded(x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)) * rounded(scale[LAYER]))
            for x, scale in zip((q, new_k), norms, strict=True)
        )
    cos, sin = rounded(cos)[:, None, None], rounded(sin)[:, None, None]
    half = depth // 2
    q, new_k = (
        np.concatenate([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)
        for x in (q, new_k)
    )
    k[LAYER, :, :, :, slot], v[LAYER, :, :, :, slot] = rounded(new_k), new_v
    return rounded(q), k, v


def assert_codes(codes, scales, want: np.ndarray, dtype: str, code: str) -> None:
    """Codes and scales of a cache whose heads are `want`, as `oracle` rounds them to `dtype`.

    Where a float32 result lies next to a tie, it rounds to the neighbour of the oracle's value x: by one unit in the last place,
    ulp(x) = 2^(exponent of x) · eps of the dtype. So the largest element, scale · LARGEST, is right to one ulp, and

        |code · scale − x| ≤ half a step of the code + ulp(x) + f,    f = 2^-18 · max|x|,

    where f is for sums and products in float32. Half a step is scale / 2 in int8; in float8, whose three bits of fraction make
    steps grow with the value, |x| / 16, and scale · 2^-10 below its smallest normal number.
    """
    codes, scales = np.asarray(codes, np.float64), np.asarray(scales, np.float64)[..., None]
    largest = np.abs(want).max(-1, keepdims=True)
    float32_error = 2.0**-18 * largest
    assert (np.abs(scales * cache_codes.LARGEST[code] - largest) <= ulp(largest, dtype) + float32_error).all()
    half_step = scales / 2 if code == "int8" else np.maximum(np.abs(want) / 16, scales * 2.0**-10)
    assert (np.abs(codes * scales - want) <= half_step + ulp(want, dtype) + float32_error).all()


def ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """Distance to the next larger number of the dtype."""
    return 2.0 ** np.floor(np.log2(np.maximum(np.abs(x), 1e-30))) * float(jnp.finfo(dtype).eps)


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

    *got, scales = jax.jit(run)(SLOT, LAYER) if traced else run(SLOT, LAYER)
    assert scales is None
    assert_close(got, oracle(qkv, cos, sin, k, v, norms), dtype)


@pytest.mark.parametrize("parts", [1, 3])
def test_twin_adds_partial_sums_and_bias(parts: int) -> None:
    qkv, cos, sin, k, v, norms = case(True, "float32")
    split, bias = split_with_bias(qkv, parts)
    tables, stacks = map(jnp.asarray, (cos, sin)), map(jnp.asarray, norms)
    how = dict(layer=LAYER, norms=tuple(stacks), eps=EPS, bias=jnp.asarray(bias), dtype=jnp.float32)
    got = pallas_kernels.rope_and_cache(jnp.asarray(split), *tables, *map(jnp.asarray, (k, v)), SLOT, **how)
    assert_close(got[:3], oracle(qkv, cos, sin, k, v, norms), "float32")


def split_with_bias(qkv, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 partial sums, and a stack of biases, that add up to qkv in `LAYER`."""
    rng = np.random.default_rng(parts)
    bias = rng.normal(size=(3, qkv.shape[-1])).astype(np.float32)
    split = rng.normal(size=(parts, *qkv.shape)).astype(np.float32)
    split[-1] = qkv.astype(np.float32) - bias[LAYER] - split[:-1].sum(0)
    return split, bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("code", cache_codes.LARGEST)
def test_twin_writes_codes(code: str, normed: bool, dtype: str) -> None:
    qkv, cos, sin, k, v, norms = case(normed, dtype)
    codes, scales = zip(*(cache_codes.encode(jnp.asarray(part), code) for part in (k, v)), strict=True)
    how = dict(layer=LAYER, norms=norms and tuple(map(jnp.asarray, norms)), eps=EPS, scales=scales)
    q, *written, new_scales = pallas_kernels.rope_and_cache(*map(jnp.asarray, (qkv, cos, sin)), *codes, SLOT, **how)
    assert relative_error(q, oracle(qkv, cos, sin, k, v, norms)[0]) < TOLERANCE[dtype]
    want = oracle(qkv, cos, sin, k, v, norms, rounding=dtype)[1:]
    for got, scale, before, old_scale, exact in zip(written, new_scales, codes, scales, want, strict=True):
        assert got.dtype == code
        assert_codes(got.astype(jnp.float32), scale, exact, dtype, code)
        others = np.arange(got.shape[4]) != SLOT
        np.testing.assert_array_equal(
            np.asarray(got[..., others, :], np.float32), np.asarray(before[..., others, :], np.float32)
        )
        np.testing.assert_array_equal(scale[..., others], old_scale[..., others])


def test_codes_of_zeros_are_zeros() -> None:
    codes, scales = cache_codes.encode(jnp.zeros((3, 8)), "int8")
    assert not np.asarray(cache_codes.decode(codes, scales, jnp.float32)).any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    qkv, cos, sin, k, v, _ = case(False, "float32")
    with pytest.raises(ValueError, match="want qkv"):
        pallas_kernels.rope_and_cache(qkv[..., :-1], cos, sin, k, v, SLOT, layer=LAYER)
    with pytest.raises(ValueError, match="cos, sin"):
        pallas_kernels.rope_and_cache(qkv, cos[:, 1:], sin[:, 1:], k, v, SLOT, layer=LAYER)
    with pytest.raises(ValueError, match="got scales"):
        pallas_kernels.rope_and_cache(qkv, cos, sin, k.astype(np.int8), v.astype(np.int8), SLOT, layer=LAYER)
    with pytest.raises(ValueError, match="cannot run"):
        pallas_kernels.rope_and_cache(qkv, cos, sin, k, v, SLOT, layer=LAYER, implementation="triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("pointers", [False, True])
@pytest.mark.parametrize(
    "heads", [dict(), dict(heads=7, kv_heads=1, group=1, depth=64), dict(heads=3, kv_heads=3)], ids=str
)
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("narrow", [False, True])
def test_kernel(normed: bool, pointers: bool, heads: dict, coded: bool, splits: int, narrow: bool) -> None:
    """The caches are updated in place; elements that are not written keep what they had. Without splits there is no bias."""
    import torch
    import triton.language as tl

    from pallas_kernels import rope_cache_triton
    from tests.pallas_kernels.launch import DEVICE, DTYPES, poisoned, scalar

    dtype = DTYPES[0 if narrow else -1]
    arguments = case(normed, dtype, **heads)
    qkv, cos, sin, k, v = (torch.tensor(np.asarray(a, np.float32)).to(DEVICE) for a in arguments[:5])
    qkv, k, v = (a.to(getattr(torch, dtype)) for a in (qkv, k, v))
    norms, cache_scales, bias = arguments[5], (cos, cos), None
    if splits:
        qkv, bias = (torch.tensor(a).to(DEVICE) for a in split_with_bias(arguments[0], splits))
    if coded:
        parts = [cache_codes.encode(np.asarray(a, np.float32), "int8") for a in arguments[3:5]]
        k, v = (torch.tensor(np.asarray(codes)).to(DEVICE) for codes, _ in parts)
        cache_scales = tuple(torch.tensor(np.asarray(scale)).to(DEVICE) for _, scale in parts)
    scales = (cos, cos) if norms is None else tuple(torch.tensor(scale).to(DEVICE) for scale in norms)
    sums = qkv if splits else qkv[None]
    constants = rope_cache_triton.kernel_constants(sums, k, EPS, normed, bias is not None)
    q = poisoned(*sums.shape[1:3], constants["H"], constants["D"])
    rope_cache_triton.rope_and_cache_kernel[rope_cache_triton.grid(constants)](
        qkv,
        cos,
        sin,
        k,
        v,
        *cache_scales,
        *scales,
        cos if bias is None else bias,
        scalar(SLOT) if pointers else SLOT,
        scalar(LAYER) if pointers else LAYER,
        q,
        k,
        v,
        *cache_scales,
        DTYPE=getattr(tl, dtype),
        SLOT_IS_POINTER=pointers,
        LAYER_IS_POINTER=pointers,
        num_warps=rope_cache_triton.WARPS,
        **constants,
    )
    if coded:
        assert relative_error(q.float().cpu().numpy(), oracle(*arguments)[0]) < TOLERANCE[dtype]
        want = oracle(*arguments, rounding=dtype)[1:]
        for codes, scale, exact in zip((k, v), cache_scales, want, strict=True):
            assert_codes(codes.cpu().numpy(), scale.cpu().numpy(), exact, dtype, "int8")
        return
    assert_close([a.float().cpu().numpy() for a in (q, k, v)], oracle(*arguments), dtype)


def test_a_float8_cache_takes_the_kernels_where_the_gpu_has_the_type() -> None:
    hopper, ampere = (dispatch.Device("gpu", capability, True) for capability in ((9, 0), (8, 0)))
    for problem in (
        lambda device, cache: dispatch.rope_and_cache_problem(device, jnp.bfloat16, 128, cache),
        lambda device, cache: dispatch.decode_attention_problem(device, jnp.bfloat16, 128, cache_dtype=cache),
    ):
        assert problem(hopper, jnp.float8_e4m3fn) is None
        assert problem(ampere, jnp.int8) is None
        assert "8.9" in str(problem(ampere, jnp.float8_e4m3fn))
