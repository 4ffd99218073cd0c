"""An int4 matrix with its adapter to 8 bits, for NVIDIA GPUs: a program reads a tile's bytes once and writes its codes once.

Of the first layer the stack is no argument but a result, so that nobody writes zeros which the layers then overwrite.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.codes import group_size
from pallas_kernels.decode_layers import LayerMatrix

ROWS, GROUPS, WARPS = 32, 2, 4
"""Of a tile, and warps of its program. Not tuned by measurement."""


@triton.jit
def _rounded(x):
    """To the nearest integer, halves to even, of numbers far below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scales(groups):
    """The scales of [ROWS, GROUPS, GROUP] by the rule of `codes.quantize_fast8`, before they are rounded."""
    above = tl.maximum(tl.max(groups, axis=2), 0.0)
    below = tl.maximum(tl.max(-groups, axis=2), 0.0)
    upright = tl.maximum(below / 128.0, tl.div_rn(above, tl.full(above.shape, 254.0, tl.float32)))
    flipped = tl.maximum(above / 128.0, tl.div_rn(below, tl.full(below.shape, 254.0, tl.float32)))
    return tl.where(upright <= flipped, upright, -flipped)


@triton.jit
def merge_layer_kernel(
    packed_ptr,
    scales_ptr,
    a_ptr,
    b_ptr,
    index_ptr,
    layer_ptr,
    into_packed_ptr,
    into_scales_ptr,
    packed_out_ptr,
    scales_out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    OWN_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GATE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """ROWS rows of GROUPS groups; grid (row blocks, blocks of groups). The stacks in `into` are the outputs'."""
    COLUMNS: tl.constexpr = GROUPS * GROUP
    index, layer = tl.load(index_ptr).to(tl.int64), tl.load(layer_ptr).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (row < N)[:, None]
    wide = row.to(tl.int64)[:, None]
    # Split-half groups: the low nibbles of a group's bytes are its first half, the high ones its second.
    inside = column % OWN_GROUP
    byte = column // OWN_GROUP * (OWN_GROUP // 2) + inside % (OWN_GROUP // 2)
    packed = tl.load(packed_ptr + index * (N * K // 2) + wide * (K // 2) + byte[None, :], mask=valid, other=0)
    nibble = tl.where((inside < OWN_GROUP // 2)[None, :], packed & 0xF, packed >> 4)
    own = scales_ptr + index * (N * (K // OWN_GROUP)) + wide * (K // OWN_GROUP) + (column // OWN_GROUP)[None, :]
    weight = (nibble.to(tl.float32) - 8.0) * tl.load(own, mask=valid, other=0.0).to(tl.float32)
    if R > 0:
        delta = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in tl.static_range(0, R, BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)
            ranks = rank < R
            b = tl.load(b_ptr + layer * (N * R) + wide * R + rank[None, :], mask=valid & ranks[None, :], other=0.0)
            a = tl.load(a_ptr + layer * (R * K) + rank[:, None] * K + column[None, :], mask=ranks[:, None], other=0.0)
            delta = tl.dot(b.to(DTYPE), a.to(DTYPE), delta, input_precision="ieee")
        weight += delta.to(DTYPE).to(tl.float32)

    groups = tl.reshape(weight, (ROWS, GROUPS, GROUP))
    scales = _scales(groups).to(scales_out_ptr.dtype.element_ty)
    divisor = tl.where(scales == 0, 1.0, scales.to(tl.float32))
    steps = tl.div_rn(groups, tl.broadcast_to(divisor[:, :, None], (ROWS, GROUPS, GROUP)))
    negative = tl.minimum(tl.maximum(_rounded(steps), -128.0), -1.0)
    positive = tl.minimum(tl.maximum(_rounded(steps * 0.5), 0.0), 127.0)
    codes = (tl.where(steps < -0.5, negative, positive) + 128.0).to(tl.int32).to(tl.uint8)

    place = row
    if GATE:
        place = row % (N // 2) // 8 * 16 + row // (N // 2) * 8 + row % (N // 2) % 8
    out = packed_out_ptr + layer * (N * K) + place.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(out, tl.reshape(codes, (ROWS, COLUMNS)), mask=valid)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    tl.store(scales_out_ptr + layer * (K // GROUP * N) + group[None, :] * N + place[:, None], scales, mask=valid)


def kernel_constants(source, group: int, gate: bool) -> tuple[dict, tuple[int, int]]:
    """The kernel's shapes and its grid, shared by the GPU launch and the interpreter's tests."""
    _, rows, width = source.packed.shape
    rank = 0 if source.adapter is None else source.adapter[0].shape[1]
    groups = GROUPS if 2 * width % (GROUPS * group) == 0 else 1
    shapes = {"N": rows, "K": 2 * width, "OWN_GROUP": group_size(source.packed, source.scales), "GROUP": group}
    blocks = {"R": rank, "BLOCK_R": 32, "ROWS": ROWS, "GROUPS": groups, "GATE": gate}
    return shapes | blocks, (triton.cdiv(rows, ROWS), 2 * width // (groups * group))


def merge_layer(into, source, index, layer, layers: int, group: int, gate: bool, dtype, scales_dtype) -> LayerMatrix:
    """Launch the kernel; the arguments are those of `pallas_kernels.merge_layer`."""
    from pallas_kernels.triton_launch import triton_call

    constants, grid = kernel_constants(source, group, gate)
    n, k = constants["N"], constants["K"]
    shapes = [((layers, n, k), jnp.uint8), ((layers, k // group, n), scales_dtype)]
    packed, scales = triton_call(
        source.packed,
        source.scales,
        *(source.adapter or (source.packed, source.packed)),
        jnp.asarray(index, jnp.int32),
        jnp.asarray(layer, jnp.int32),
        *(into or (source.packed, source.scales)),
        kernel=merge_layer_kernel,
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid=grid,
        num_warps=WARPS,
        input_output_aliases=None if into is None else {6: 0, 7: 1},
        DTYPE={"bfloat16": tl.bfloat16, "float16": tl.float16}[jnp.dtype(dtype).name],
        **constants,
    )
    return LayerMatrix(packed, scales)
