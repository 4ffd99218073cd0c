"""Norm, rotation and cache write of one token's heads for NVIDIA GPUs: one program for each row and head.

The halves that the rotation mixes are loaded apart, so nothing is shuffled. Values are rounded to the compute dtype where
the jnp twin rounds them.
"""

import jax
import triton
import triton.language as tl


@triton.jit
def rope_and_cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_in_ptr,
    v_in_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slot_ptr,
    layer_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    NORMED: tl.constexpr,
    DTYPE: tl.constexpr,
    SLOT_IS_POINTER: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
):
    """`k_ptr` and `v_ptr` are the caches `k_in_ptr` and `v_in_ptr`; programs (row, head) of q's, then k's, then v's heads."""
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0)
    head = tl.program_id(1)
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    slot = tl.load(slot_ptr) if SLOT_IS_POINTER else slot_ptr
    depth = tl.arange(0, HALF)
    source = qkv_ptr + row * ((H + 2 * KV) * D) + head * D + depth
    first = tl.load(source).to(tl.float32)
    second = tl.load(source + HALF).to(tl.float32)

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
        target = q_ptr + (row * H + head) * D + depth
        tl.store(target, first.to(q_ptr.dtype.element_ty))
        tl.store(target + HALF, second.to(q_ptr.dtype.element_ty))
    else:
        kv_head = (head - H) % KV
        cache_ptr = k_ptr if head < H + KV else v_ptr
        offset = layer * tl.full((), ROWS * KV * C * D, tl.int64) + (row * KV + kv_head) * tl.full((), C * D, tl.int64)
        target = cache_ptr + offset + slot * D + depth
        tl.store(target, first.to(k_ptr.dtype.element_ty))
        tl.store(target + HALF, second.to(k_ptr.dtype.element_ty))


def kernel_constants(qkv, k, eps: float, normed: bool) -> dict:
    """The kernel's shapes, shared by the GPU launch and the interpreter's tests."""
    _, questions, group, kv_heads, slots, head_dim = k.shape
    return {
        "G": group,
        "ROWS": questions * group,
        "H": qkv.shape[-1] // head_dim - 2 * kv_heads,
        "KV": kv_heads,
        "C": slots,
        "D": head_dim,
        "EPS": eps,
        "NORMED": normed,
    }


def grid(constants: dict) -> tuple[int, int]:
    """Rows times heads."""
    return constants["ROWS"], constants["H"] + 2 * constants["KV"]


def rope_and_cache(qkv, cos, sin, k, v, slot, layer, norms, eps):
    """Launch the kernel; the arguments are those of `pallas_kernels.rope_and_cache`."""
    from pallas_kernels.triton_launch import triton_call

    constants = kernel_constants(qkv, k, eps, norms is not None)
    q_norm, k_norm = norms or (cos, cos)  # pointers that the kernel doesn't follow
    rotated = jax.ShapeDtypeStruct((*qkv.shape[:2], constants["H"], constants["D"]), qkv.dtype)
    cache = jax.ShapeDtypeStruct(k.shape, k.dtype)
    return triton_call(
        qkv,
        cos,
        sin,
        k,
        v,
        q_norm,
        k_norm,
        slot,
        layer,
        kernel=rope_and_cache_kernel,
        out_shape=[rotated, cache, cache],
        grid=grid(constants),
        num_warps=1,
        input_output_aliases={3: 1, 4: 2},
        DTYPE={"bfloat16": tl.bfloat16, "float16": tl.float16}[qkv.dtype.name],
        SLOT_IS_POINTER=isinstance(slot, jax.Array),
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        **constants,
    )
