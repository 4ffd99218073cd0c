"""Residual, branch and norm for NVIDIA GPUs: one program a row, which stays in registers from the first load to the last store.

Partial sums, bias and residual are added in float32 and rounded once, where the jnp twin rounds the branch first. The norm
reads the rounded residual, so that what is normed is what is kept.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import triton
import triton.language as tl

from pallas_kernels.rows import Rows


@triton.jit
def permuted_column(column):
    """Where `rows.permute_columns` puts a column: 4t + 2h + j of every 16 goes to 8h + 2t + j."""
    inner = column % 16
    return column - inner + (inner // 2 % 2) * 8 + (inner // 4) * 2 + inner % 2


@triton.jit
def normed_rows(x, scale_ptrs, inside, D: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """x / rms(x) * (OFFSET + scale), float32 that DTYPE holds exactly; x is 0 outside."""
    scale = tl.load(scale_ptrs, mask=inside, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + EPS)
    if OFFSET != 0.0:
        normed = normed * (OFFSET + scale.to(tl.float32))
    else:
        normed = normed.to(DTYPE).to(tl.float32) * scale.to(DTYPE).to(tl.float32)
    return normed.to(DTYPE).to(tl.float32)


@triton.jit
def add_rms_norm_kernel(
    residual_ptr,
    parts_ptr,
    scale_ptr,
    bias_ptr,
    branch_scale_ptr,
    layer_ptr,
    sum_ptr,
    rows_ptr,
    permuted_ptr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    BRANCH_NORMED: tl.constexpr,
    PERMUTED: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
):
    """Row program_id(0)."""
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(residual_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    branch = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        branch += tl.load(parts_ptr + (part * M + row) * D + column, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        branch += tl.load(bias_ptr + layer * D + column, mask=inside, other=0.0).to(tl.float32)
    if BRANCH_NORMED:
        branch = normed_rows(branch, branch_scale_ptr + layer * D + column, inside, D, EPS, OFFSET, DTYPE)
    x = (x + branch).to(DTYPE).to(tl.float32)
    tl.store(sum_ptr + row * D + column, x.to(sum_ptr.dtype.element_ty), mask=inside)
    normed = normed_rows(x, scale_ptr + layer * D + column, inside, D, EPS, OFFSET, DTYPE).to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + row * D + column, normed, mask=inside)
    if PERMUTED:
        tl.store(permuted_ptr + row * D + permuted_column(column), normed, mask=inside)


def kernel_constants(residual, parts, eps: float, offset: float, bias, branch_scale, permuted: bool) -> dict:
    """The kernel's shapes, shared by the GPU launch and the interpreter's tests."""
    return {
        "M": residual.shape[0],
        "D": residual.shape[1],
        "BLOCK": triton.next_power_of_2(residual.shape[1]),
        "PARTS": parts.shape[0],
        "EPS": eps,
        "OFFSET": offset,
        "BIASED": bias is not None,
        "BRANCH_NORMED": branch_scale is not None,
        "PERMUTED": permuted,
    }


def warps(width: int) -> int:
    """Eight elements a thread, up to sixteen warps."""
    return max(1, min(16, triton.next_power_of_2(width) // 256))


def add_rms_norm(residual, parts, scale, layer, eps, offset, bias, branch_scale, permuted):
    """Launch the kernel; the arguments are those of `pallas_kernels.add_rms_norm`."""
    from pallas_kernels.triton_launch import triton_call

    rows = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    unused = jax.ShapeDtypeStruct((16,), residual.dtype)
    total, normed, reordered = triton_call(
        residual,
        parts,
        scale,
        *(residual if array is None else array for array in (bias, branch_scale)),
        layer,
        kernel=add_rms_norm_kernel,
        out_shape=[rows, rows, rows if permuted else unused],
        grid=(residual.shape[0],),
        num_warps=warps(residual.shape[1]),
        DTYPE={"bfloat16": tl.bfloat16, "float16": tl.float16}[residual.dtype.name],
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        **kernel_constants(residual, parts, eps, offset, bias, branch_scale, permuted),
    )
    return total, Rows(normed, reordered if permuted else None)
