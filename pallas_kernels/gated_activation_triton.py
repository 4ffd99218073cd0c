"""activation(gate) * up for NVIDIA GPUs: elementwise, in float32 from the partial sums on, rounded once."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import triton
import triton.language as tl

from pallas_kernels.add_rms_norm_triton import permuted_column
from pallas_kernels.gated_activation import IS_GELU
from pallas_kernels.rows import Rows

BLOCK, WARPS = 1024, 4


@triton.jit
def gate_times_up(gate, up, GELU: tl.constexpr):
    """activation(gate) * up of float32 arrays."""
    if GELU:
        # x/2 (1 + tanh y) = x sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3)
        out = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        out = gate * tl.sigmoid(gate) * up
    return out


@triton.jit
def gated_activation_kernel(
    parts_ptr,
    bias_ptr,
    layer_ptr,
    rows_ptr,
    permuted_ptr,
    M: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    BIASED: tl.constexpr,
    PERMUTED: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
):
    """Columns program_id(1) * BLOCK + [0, BLOCK) of row program_id(0)."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        source = parts_ptr + (part * M + row).to(tl.int64) * (2 * F) + column
        gate += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(source + F, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
        gate += tl.load(bias_ptr + layer * (2 * F) + column, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias_ptr + layer * (2 * F) + F + column, mask=inside, other=0.0).to(tl.float32)
    out = gate_times_up(gate, up, GELU).to(rows_ptr.dtype.element_ty)
    start = row.to(tl.int64) * F
    tl.store(rows_ptr + start + column, out, mask=inside)
    if PERMUTED:
        tl.store(permuted_ptr + start + permuted_column(column), out, mask=inside)


def kernel_constants(parts, activation: str, bias, permuted: bool) -> dict:
    """The kernel's shapes, shared by the GPU launch and the interpreter's tests."""
    return {
        "M": parts.shape[1],
        "F": parts.shape[2] // 2,
        "BLOCK": BLOCK,
        "PARTS": parts.shape[0],
        "GELU": IS_GELU[activation],
        "BIASED": bias is not None,
        "PERMUTED": permuted,
    }


def grid(constants: dict) -> tuple[int, int]:
    """Rows times blocks of columns."""
    return constants["M"], triton.cdiv(constants["F"], constants["BLOCK"])


def gated_activation(parts, activation, dtype, layer, bias, permuted) -> Rows:
    """Launch the kernel; the arguments are those of `pallas_kernels.gated_activation`."""
    from pallas_kernels.triton_launch import triton_call

    constants = kernel_constants(parts, activation, bias, permuted)
    rows = jax.ShapeDtypeStruct((constants["M"], constants["F"]), dtype)
    plain, reordered = triton_call(
        parts,
        parts if bias is None else bias,
        0 if bias is None else layer,
        kernel=gated_activation_kernel,
        out_shape=[rows, rows if permuted else jax.ShapeDtypeStruct((16,), dtype)],
        grid=grid(constants),
        num_warps=WARPS,
        LAYER_IS_POINTER=bias is not None and isinstance(layer, jax.Array),
        **constants,
    )
    return Rows(plain, reordered if permuted else None)
