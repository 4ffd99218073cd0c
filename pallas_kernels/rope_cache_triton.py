"""Norm, rotation and cache write of one token's heads for NVIDIA GPUs: one program for each row and head.

The halves that the rotation mixes are loaded apart, so nothing is shuffled. Partial sums and bias are added in float32;
after that, values are rounded to the compute dtype where the jnp twin rounds them.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import cache_codes


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
    """Programs (row, head) of q's, then k's, then v's heads. The caches that go in are those that come out.

    LARGEST: largest code of a cache in 8 bits; 0: the cache holds values, and there are no scales.
    """
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0)
    head = tl.program_id(1)
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    slot = tl.load(slot_ptr) if SLOT_IS_POINTER else slot_ptr
    depth = tl.arange(0, HALF)
    first = tl.zeros((HALF,), tl.float32)
    second = tl.zeros((HALF,), tl.float32)
    for part in tl.static_range(PARTS):
        source = qkv_ptr + ((part * ROWS + row) * (H + 2 * KV) + head) * D + depth
        first += tl.load(source).to(tl.float32)
        second += tl.load(source + HALF).to(tl.float32)
    if BIASED:
        bias = bias_ptr + (layer * (H + 2 * KV) + head) * D + depth
        first += tl.load(bias).to(tl.float32)
        second += tl.load(bias + HALF).to(tl.float32)
    first = first.to(DTYPE).to(tl.float32)
    second = second.to(DTYPE).to(tl.float32)

    if head < H + KV:
        if NORMED:
            inverse = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / D + EPS)
            scale_ptr = (q_norm_ptr if head < H else k_norm_ptr) + layer * D + depth
            first_scale = tl.load(scale_ptr).to(DTYPE).to(tl.float32)
            second_scale = tl.load(scale_ptr + HALF).to(DTYPE).to(tl.float32)
            first = ((first * inverse).to(DTYPE).to(tl.float32) * first_scale).to(DTYPE).to(tl.float32)
            second = ((second * inverse).to(DTYPE).to(tl.float32) * second_scale).to(DTYPE).to(tl.float32)
        angle = (row // G) * HALF + depth
        cos = tl.load(cos_ptr + angle).to(DTYPE).to(tl.float32)
        sin = tl.load(sin_ptr + angle).to(DTYPE).to(tl.float32)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated

    if head < H:
        q_target = q_ptr + (row * H + head) * D + depth
        tl.store(q_target, first.to(q_ptr.dtype.element_ty))
        tl.store(q_target + HALF, second.to(q_ptr.dtype.element_ty))
    else:
        kv_head = (head - H) % KV
        cache_ptr = k_ptr if head < H + KV else v_ptr
        position = layer * tl.full((), ROWS * KV * C, tl.int64) + (row * KV + kv_head) * tl.full((), C, tl.int64) + slot
        if LARGEST > 0:
            first = first.to(DTYPE).to(tl.float32)
            second = second.to(DTYPE).to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
            scale = tl.maximum(largest, SMALLEST_SCALE) / LARGEST
            tl.store((k_scale_ptr if head < H + KV else v_scale_ptr) + position, scale)
            first = first / scale
            second = second / scale
            if ROUND:
                first = tl.floor(first + 0.5)
                second = tl.floor(second + 0.5)
        target = cache_ptr + position * D + depth
        tl.store(target, first.to(k_ptr.dtype.element_ty))
        tl.store(target + HALF, second.to(k_ptr.dtype.element_ty))


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
        "PARTS": parts.shape[0],
        "BIASED": biased,
        "EPS": eps,
        "NORMED": normed,
        "LARGEST": cache_codes.LARGEST.get(name, 0.0),
        "SMALLEST_SCALE": cache_codes.SMALLEST_SCALE,
        "ROUND": name == "int8",
    }


def grid(constants: dict) -> tuple[int, int]:
    """Rows times heads."""
    return constants["ROWS"], constants["H"] + 2 * constants["KV"]


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
        num_warps=1,
        input_output_aliases={3: 1, 4: 2, **({5: 3, 6: 4} if coded else {})},
        DTYPE={"bfloat16": tl.bfloat16, "float16": tl.float16}[dtype.name],
        SLOT_IS_POINTER=isinstance(slot, jax.Array),
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        **constants,
    )
    return q, k, v, tuple(scales_out) if coded else None
