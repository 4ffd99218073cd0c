"""Quantized matrix -> 16-bit matrix for NVIDIA GPUs (sm_80 and up): bound by the bytes it writes.

XLA's own fusions of the unpacking reach a third of the memory's speed on an H200 (this kernel: 57 %), and a training step
dequantizes a layer nearly three times a microbatch. Here a program unpacks a block of bytes in registers: the low nibbles of a group are
its first half, the high ones its second, so each is stored as one contiguous run.
"""

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.codes import NF4, PER_BYTE, group_size

BYTES_OF_A_PROGRAM = 8192
WARPS = 4


@triton.jit
def _levels(codes, table_ptr, CODE: tl.constexpr):
    """Codes as float32 numbers before their scale."""
    if CODE == "nf4":
        return tl.load(table_ptr + codes)
    elif CODE == "int4":
        return codes.to(tl.float32) - 8.0
    elif CODE == "fast8":
        byte = codes.to(tl.float32)
        return tl.where(byte < 128, byte - 128, 2 * byte - 256)
    else:
        return codes.to(tl.float32)


@triton.jit
def dequantize_kernel(
    packed_ptr,
    scales_ptr,
    layer_ptr,
    tail_ptr,
    table_ptr,
    out_ptr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    CODE: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """[ROWS, BYTES] of the packed matrix; grid (row blocks, WIDTH / BYTES). The first column also copies the tail."""
    PER: tl.constexpr = 1 if CODE == "int8" or CODE == "fast8" else 2
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    wide = rows.to(tl.int64)
    packed_ptr += layer * tl.full((), N * WIDTH, tl.int64)
    scales_ptr += layer * tl.full((), N * (WIDTH // GROUP_BYTES), tl.int64)
    groups = tl.program_id(1) * (BYTES // GROUP_BYTES) + tl.arange(0, BYTES // GROUP_BYTES)
    scale_ptrs = scales_ptr + wide[:, None] * (WIDTH // GROUP_BYTES) + groups[None, :]
    scales = tl.load(scale_ptrs, mask=valid[:, None], other=0.0).to(tl.float32)[:, :, None]
    inside = tl.arange(0, GROUP_BYTES)[None, None, :]
    mask = valid[:, None, None]
    packed = tl.load(
        packed_ptr + wide[:, None, None] * WIDTH + groups[None, :, None] * GROUP_BYTES + inside, mask, other=0
    )
    out_rows = out_ptr + wide * (PER * WIDTH + R)
    out = out_rows[:, None, None] + groups[None, :, None] * (PER * GROUP_BYTES) + inside
    if PER == 1:
        tl.store(out, (_levels(packed, table_ptr, CODE) * scales).to(out_ptr.dtype.element_ty), mask)
    else:
        low = _levels(packed & 0xF, table_ptr, CODE) * scales
        high = _levels(packed >> 4, table_ptr, CODE) * scales
        tl.store(out, low.to(out_ptr.dtype.element_ty), mask)
        tl.store(out + GROUP_BYTES, high.to(out_ptr.dtype.element_ty), mask)
    if R > 0 and tl.program_id(1) == 0:
        rank = tl.arange(0, R_PAD)[None, :]
        copied = valid[:, None] & (rank < R)
        tail = tl.load(tail_ptr + wide[:, None] * R + rank, mask=copied, other=0.0)
        tl.store(out_rows[:, None] + PER * WIDTH + rank, tail.to(out_ptr.dtype.element_ty), mask=copied)


def kernel_constants(packed, scales, code: str, rank: int) -> dict:
    """The kernel's shape and block parameters, shared by the GPU launch and the interpreter's tests."""
    n, width = packed.shape[-2:]
    group_bytes = group_size(packed, scales, code) // PER_BYTE[code]
    columns = max(group_bytes, min(512, width & -width))  # whole groups; a power of two that divides the width
    return {
        "N": n,
        "WIDTH": width,
        "GROUP_BYTES": group_bytes,
        "R": rank,
        "R_PAD": triton.next_power_of_2(rank) if rank else 0,
        "CODE": code,
        "ROWS": BYTES_OF_A_PROGRAM // columns,
        "BYTES": columns,
    }


def grid(constants: dict) -> tuple[int, int]:
    """Blocks of rows, blocks of bytes."""
    return triton.cdiv(constants["N"], constants["ROWS"]), constants["WIDTH"] // constants["BYTES"]


def dequantize(
    packed: Num[Array, "*L N W"],
    scales: Float[Array, "*L N G"],
    layer: Int[Array, ""] | int | None,
    dtype,
    code: str,
    tail: Float[Array, "N R"] | None = None,
) -> Float[Array, "N KR"]:
    """Launch the kernel; the arguments are those of `pallas_kernels.dequantized.layer_weight`."""
    from pallas_kernels.triton_launch import triton_call

    rank = 0 if tail is None else tail.shape[1]
    constants = kernel_constants(packed, scales, code, rank)
    columns = PER_BYTE[code] * constants["WIDTH"] + rank
    return triton_call(
        packed,
        scales,
        0 if layer is None else layer,
        scales if tail is None else tail,  # a pointer that the kernel doesn't follow
        jax.numpy.asarray(NF4) if code == "nf4" else scales,
        kernel=dequantize_kernel,
        out_shape=jax.ShapeDtypeStruct((constants["N"], columns), dtype),
        grid=grid(constants),
        num_warps=WARPS,
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        **constants,
    )
