"""The beginning of a decode step for NVIDIA GPUs: one program a row, of which the first Q also fetch a question's rotations, and the first the slot."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.add_rms_norm_triton import normed_rows, permuted_column, warps
from pallas_kernels.begin_step import BegunStep, Positions
from pallas_kernels.rows import Rows


@triton.jit
def begin_step_kernel(
    tokens_ptr,
    table_ptr,
    scale_ptr,
    lengths_ptr,
    filled_ptr,
    step_ptr,
    rotations_ptr,
    residual_ptr,
    rows_ptr,
    permuted_ptr,
    slot_ptr,
    cos_ptr,
    sin_ptr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUESTIONS: tl.constexpr,
    POSITIONS: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    FACTOR: tl.constexpr,
    PERMUTED: tl.constexpr,
    DTYPE: tl.constexpr,
    STEP_IS_POINTER: tl.constexpr,
):
    """Row program_id(0), and the rotations of that question if it is below QUESTIONS. R = 0: there are no rotations."""
    row = tl.program_id(0)
    if row < QUESTIONS:
        slot = tl.load(filled_ptr) + (tl.load(step_ptr) if STEP_IS_POINTER else step_ptr)
        if row == 0:
            tl.store(slot_ptr, slot)
        if R > 0:
            angle = tl.arange(0, R_PAD)
            exists = angle < R
            cos_ptrs = rotations_ptr + (tl.load(lengths_ptr + row) + slot) * R + angle
            tl.store(cos_ptr + row * R + angle, tl.load(cos_ptrs, mask=exists), mask=exists)
            tl.store(sin_ptr + row * R + angle, tl.load(cos_ptrs + POSITIONS * R, mask=exists), mask=exists)
    column = tl.arange(0, BLOCK)
    inside = column < D
    start = table_ptr + tl.load(tokens_ptr + row).to(tl.int64) * D
    x = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    if FACTOR != 1.0:
        x = (x * FACTOR).to(DTYPE).to(tl.float32)
    tl.store(residual_ptr + row * D + column, x.to(residual_ptr.dtype.element_ty), mask=inside)
    normed = normed_rows(x, scale_ptr + column, inside, D, EPS, OFFSET, DTYPE).to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + row * D + column, normed, mask=inside)
    if PERMUTED:
        tl.store(permuted_ptr + row * D + permuted_column(column), normed, mask=inside)


def kernel_constants(table, lengths, rotations, eps: float, offset: float, factor: float, permuted: bool) -> dict:
    """The kernel's shapes, shared by the GPU launch and the interpreter's tests."""
    width, (_, count, angles) = table.shape[1], (0, 0, 0) if rotations is None else rotations.shape
    return {
        "D": width,
        "BLOCK": triton.next_power_of_2(width),
        "QUESTIONS": lengths.shape[0],
        "POSITIONS": count,
        "R": angles,
        "R_PAD": triton.next_power_of_2(max(angles, 1)),
        "EPS": eps,
        "OFFSET": offset,
        "FACTOR": factor,  # of the table's dtype
        "PERMUTED": permuted,
    }


def begin_step(tokens, table, scale, positions: Positions, eps, offset, factor, permuted) -> BegunStep:
    """Launch the kernel; the arguments are those of `pallas_kernels.begin_step`."""
    from pallas_kernels.triton_launch import triton_call

    lengths, filled, step, rotations = positions
    rows = jax.ShapeDtypeStruct((len(tokens), table.shape[1]), table.dtype)
    unused = jax.ShapeDtypeStruct((16,), table.dtype)
    rotation = unused if rotations is None else jax.ShapeDtypeStruct((len(lengths), rotations.shape[2]), jnp.float32)
    residual, plain, reordered, slot, *rotated = triton_call(
        tokens,
        table,
        scale,
        lengths,
        jnp.asarray(filled, jnp.int32),
        step,
        table if rotations is None else rotations,
        kernel=begin_step_kernel,
        out_shape=[rows, rows, rows if permuted else unused, jax.ShapeDtypeStruct((), jnp.int32), rotation, rotation],
        grid=(len(tokens),),
        num_warps=warps(table.shape[1]),
        DTYPE={"bfloat16": tl.bfloat16, "float16": tl.float16}[table.dtype.name],
        STEP_IS_POINTER=isinstance(step, jax.Array),
        **kernel_constants(table, lengths, rotations, eps, offset, float(np.asarray(factor, table.dtype)), permuted),
    )
    rows = Rows(plain, reordered if permuted else None)
    return BegunStep(residual, rows, slot, None if rotations is None else tuple(rotated))
