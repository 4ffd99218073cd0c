"""Norm, rotation and cache write of one token's heads for NVIDIA GPUs: a program for each row and few heads.

A thread holds a few neighbours of either half of a head; a program for each head would be many that start, wait for memory once
and end. The halves that the rotation mixes are loaded apart, so nothing is shuffled. Partial sums and bias are added in float32;
after that, values are rounded to the compute dtype where the jnp twin rounds them.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import cache_codes

HEADS, WARPS = 4, 4
"""Of a row, in one program. On an H200, 16 heads of 128, 256 and 64 rows: 2.1 and 1.6 us; one head and warp 3.7 and 1.9."""


@triton.jit
def sum_heads(
    qkv,
    bias,
    exists,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both halves of heads, float32: partial sums, STRIDE apart, and bias, rounded to DTYPE.

    `qkv` and `bias` point to the first half of every head, [HEADS, D / 2], of which those that `exists` are read.
    """
    first = tl.load(qkv, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(qkv + D // 2, mask=exists, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        first += tl.load(qkv + part * STRIDE, mask=exists, other=0.0).to(tl.float32)
        second += tl.load(qkv + part * STRIDE + D // 2, mask=exists, other=0.0).to(tl.float32)
    if BIASED:
        first += tl.load(bias, mask=exists, other=0.0).to(tl.float32)
        second += tl.load(bias + D // 2, mask=exists, other=0.0).to(tl.float32)
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit
def norm_heads(first, second, scale_ptr, EPS: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """The RMS norm of heads by their halves; `scale_ptr` points to the first half of each one's scale, [HEADS or 1, D / 2]."""
    inverse = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + EPS)[:, None]
    first_scale = tl.load(scale_ptr).to(DTYPE).to(tl.float32)
    second_scale = tl.load(scale_ptr + D // 2).to(DTYPE).to(tl.float32)
    first = ((first * inverse).to(DTYPE).to(tl.float32) * first_scale).to(DTYPE).to(tl.float32)
    second = ((second * inverse).to(DTYPE).to(tl.float32) * second_scale).to(DTYPE).to(tl.float32)
    return first, second


@triton.jit
def rope_and_cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_in_ptr,
    v_in_ptr,
    k_scale_in_ptr,
    v_scale_in_ptr,
    q_norm_ptr,
    k_norm_ptr,
    bias_ptr,
    slot_ptr,
    layer_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    BIASED: tl.constexpr,
    EPS: tl.constexpr,
    NORMED: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    ROUND: tl.constexpr,
    DTYPE: tl.constexpr,
    SLOT_IS_POINTER: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
):
    """Programs (row, HEADS of q's, then k's, then v's heads). The caches that go in are those that come out.

    LARGEST: largest code of a cache in 8 bits; 0: the cache holds values, and there are no scales.
    """
    HALF: tl.constexpr = D // 2
    ALL: tl.constexpr = H + 2 * KV
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    slot = tl.load(slot_ptr) if SLOT_IS_POINTER else slot_ptr
    depth = tl.arange(0, HALF)[None, :]
    exists = (head < ALL)[:, None]
    # Loaded before the heads are waited for: the loads' latencies are most of the time that this takes.
    angle = (row // G) * HALF + depth
    cos = tl.load(cos_ptr + angle).to(DTYPE).to(tl.float32)
    sin = tl.load(sin_ptr + angle).to(DTYPE).to(tl.float32)
    source = qkv_ptr + (row * ALL + head[:, None]) * D + depth
    bias = bias_ptr + (layer * ALL + head[:, None]) * D + depth
    first, second = sum_heads(source, bias, exists, ROWS * ALL * D, PARTS, BIASED, D, DTYPE)

    is_q = (head < H)[:, None]
    rotates = (head < H + KV)[:, None]
    turned_first, turned_second = first, second
    if NORMED:
        scale_ptr = tl.where(is_q, q_norm_ptr, k_norm_ptr) + layer * D + depth
        turned_first, turned_second = norm_heads(first, second, scale_ptr, EPS, D, DTYPE)
    first = tl.where(rotates, turned_first * cos - turned_second * sin, first)
    second = tl.where(rotates, turned_second * cos + turned_first * sin, second)

    q_target = q_ptr + (row * H + head[:, None]) * D + depth
    tl.store(q_target, first.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(q_target + HALF, second.to(q_ptr.dtype.element_ty), mask=is_q)

    position = layer * tl.full((), ROWS * KV * C, tl.int64) + slot
    position += (row * KV + (head - H) % KV) * tl.full((), C, tl.int64)
    is_k = (head >= H) & (head < H + KV)
    is_v = (head >= H + KV) & (head < ALL)
    if LARGEST > 0:
        first = first.to(DTYPE).to(tl.float32)
        second = second.to(DTYPE).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        scale = tl.maximum(largest, SMALLEST_SCALE) / LARGEST
        tl.store(k_scale_ptr + position, scale, mask=is_k)
        tl.store(v_scale_ptr + position, scale, mask=is_v)
        first = first / scale[:, None]
        second = second / scale[:, None]
        if ROUND:
            first = tl.floor(first + 0.5)
            second = tl.floor(second + 0.5)
    target = position[:, None] * D + depth
    first = first.to(k_ptr.dtype.element_ty)
    second = second.to(k_ptr.dtype.element_ty)
    tl.store(k_ptr + target, first, mask=is_k[:, None])
    tl.store(k_ptr + target + HALF, second, mask=is_k[:, None])
    tl.store(v_ptr + target, first, mask=is_v[:, None])
    tl.store(v_ptr + target + HALF, second, mask=is_v[:, None])


def kernel_constants(parts, k, eps: float, normed: bool, biased: bool = False) -> dict:
    """The kernel's shapes, shared by the GPU launch and the interpreter's tests."""
    _, questions, group, kv_heads, slots, head_dim = k.shape
    name = str(k.dtype).removeprefix("torch.")
    return {
        "G": group,
        "ROWS": questions * group,
        "H": parts.shape[-1] // head_dim - 2 * kv_heads,
        "KV": kv_heads,
        "C": slots,
        "D": head_dim,
        "HEADS": HEADS,
        "PARTS": parts.shape[0],
        "BIASED": biased,
        "EPS": eps,
        "NORMED": normed,
        "LARGEST": cache_codes.LARGEST.get(name, 0.0),
        "SMALLEST_SCALE": cache_codes.SMALLEST_SCALE,
        "ROUND": name == "int8",
    }


def grid(constants: dict) -> tuple[int, int]:
    """Rows times groups of heads."""
    return constants["ROWS"], triton.cdiv(constants["H"] + 2 * constants["KV"], constants["HEADS"])


def rope_and_cache(parts, cos, sin, k, v, slot, layer, norms, eps, scales, bias, dtype):
    """Launch the kernel; the arguments are those of `pallas_kernels.rope_and_cache`, qkv always as partial sums."""
    from pallas_kernels.triton_launch import triton_call

    constants = kernel_constants(parts, k, eps, norms is not None, bias is not None)
    q_norm, k_norm = norms or (cos, cos)  # pointers that the kernel doesn't follow
    rotated = jax.ShapeDtypeStruct((*k.shape[1:3], constants["H"], constants["D"]), dtype)
    cache = jax.ShapeDtypeStruct(k.shape, k.dtype)
    coded = () if scales is None else scales
    outputs = [rotated, cache, cache, *(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in coded)]
    q, k, v, *scales_out = triton_call(
        parts,
        cos,
        sin,
        k,
        v,
        *(coded or (cos, cos)),
        q_norm,
        k_norm,
        cos if bias is None else bias,
        slot,
        layer,
        kernel=rope_and_cache_kernel,
        out_shape=outputs if coded else [*outputs, *(jax.ShapeDtypeStruct((1,), jnp.float32),) * 2],
        grid=grid(constants),
        num_warps=WARPS,
        input_output_aliases={3: 1, 4: 2, **({5: 3, 6: 4} if coded else {})},
        DTYPE={"bfloat16": tl.bfloat16, "float16": tl.float16}[dtype.name],
        SLOT_IS_POINTER=isinstance(slot, jax.Array),
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        **constants,
    )
    return q, k, v, tuple(scales_out) if coded else None
