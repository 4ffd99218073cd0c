"""activation(x @ Wg^T) * (x @ Wu^T) of 16-bit weights for NVIDIA GPUs (sm_80 and up): W streamed once, [M, F] written once.

A program holds the same columns of gate and up, so K is not split: the activation needs whole sums. Rows of gate and up
alternate in a tile of weights, in an order that leaves both sums of a column to one thread: one wide product, whose left operand
is read once, where two would read it twice. Sums, bias and activation are float32, rounded once.

With few rows a GPU holds about as many programs as there are tiles, and a few tiles too many take a second round. Tiles are powers
of two, so a second one of `EXTRA` columns stands beside the first: 64 + 8 columns turn the 140 programs of 8,960 columns into 125
for the 132 multiprocessors of an H200.

Both operands lie in shared memory: an asynchronous product then reads no register that the next iteration overwrites, and
needs no wait of its own (contrast `int4_matmul_triton.py`).
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import triton
import triton.language as tl

from pallas_kernels import tuning
from pallas_kernels.gated_activation import IS_GELU
from pallas_kernels.gated_activation_triton import gate_times_up


@triton.jit
def weight_rows(first, F: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr):
    """Rows of W for `COLUMNS` columns of gate and of up: in turn, or eight in turn where they are the rows of the sums."""
    TURN: tl.constexpr = 8 if SWAP else 1
    row = tl.arange(0, 2 * COLUMNS)
    column = row // (2 * TURN) * TURN + row % TURN
    return tl.minimum(first + column, F - 1) + row // TURN % 2 * F


@triton.jit
def gate_and_store(
    sums,
    first,
    rows_m,
    bias_ptr,
    out_ptr,
    M: tl.constexpr,
    F: tl.constexpr,
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Take the sums of `weight_rows` apart, and write activation(gate) * up to `COLUMNS` columns from `first` on."""
    ROWS: tl.constexpr = rows_m.shape[0]
    if SWAP:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (COLUMNS // 8, 2, 8, ROWS)), (0, 2, 3, 1)))
        gate, up = tl.reshape(gate, (COLUMNS, ROWS)), tl.reshape(up, (COLUMNS, ROWS))
    else:
        gate, up = tl.split(tl.reshape(sums, (ROWS, COLUMNS, 2)))
    columns = first + tl.arange(0, COLUMNS)
    inside = columns < F
    if BIASED:
        gate_bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        up_bias = tl.load(bias_ptr + F + columns, mask=inside, other=0.0).to(tl.float32)
        gate += gate_bias[:, None] if SWAP else gate_bias[None, :]
        up += up_bias[:, None] if SWAP else up_bias[None, :]
    out = gate_times_up(gate, up, GELU).to(out_ptr.dtype.element_ty)
    if SWAP:
        mask = (rows_m < M)[None, :] & inside[:, None]
        tl.store(out_ptr + rows_m[None, :] * F + columns[:, None], out, mask=mask)
    else:
        mask = (rows_m < M)[:, None] & inside[None, :]
        tl.store(out_ptr + rows_m[:, None] * F + columns[None, :], out, mask=mask)


@triton.jit
def gated_matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    layer_ptr,
    out_ptr,
    M: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    STACKED: tl.constexpr,
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N + EXTRA columns of BLOCK_M rows; grid (M tiles, F tiles)."""
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    if STACKED:
        weight_ptr += layer * tl.full((), 2 * F * K, tl.int64)
    if BIASED:
        bias_ptr += layer * (2 * F)
    rows_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * (BLOCK_N + EXTRA)
    step = tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_ptr + tl.minimum(rows_m, M - 1)[:, None] * K + step
    weight_ptrs = weight_ptr + weight_rows(first, F, BLOCK_N, SWAP)[:, None] * K + step
    sums = tl.zeros((2 * BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, 2 * BLOCK_N), tl.float32)
    if EXTRA:
        extra_ptrs = weight_ptr + weight_rows(first + BLOCK_N, F, EXTRA, SWAP)[:, None] * K + step
        extra_sums = tl.zeros((2 * EXTRA, BLOCK_M) if SWAP else (BLOCK_M, 2 * EXTRA), tl.float32)

    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_ptrs + start)
        weight = tl.load(weight_ptrs + start)
        sums = tl.dot(weight, tl.trans(x), sums) if SWAP else tl.dot(x, tl.trans(weight), sums)
        if EXTRA:
            extra = tl.load(extra_ptrs + start)
            extra_sums = tl.dot(extra, tl.trans(x), extra_sums) if SWAP else tl.dot(x, tl.trans(extra), extra_sums)

    gate_and_store(sums, first, rows_m, bias_ptr, out_ptr, M, F, BIASED, GELU, BLOCK_N, SWAP)
    if EXTRA:
        gate_and_store(extra_sums, first + BLOCK_N, rows_m, bias_ptr, out_ptr, M, F, BIASED, GELU, EXTRA, SWAP)


def kernel_constants(x, weight, bias, activation: str, config: tuning.GatedConfig) -> dict:
    """The kernel's shapes and blocks, shared by the GPU launch and the interpreter's tests."""
    return {
        "M": x.shape[0],
        "F": weight.shape[-2] // 2,
        "K": x.shape[1],
        "STACKED": weight.ndim == 3,
        "BIASED": bias is not None,
        "GELU": IS_GELU[activation],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "EXTRA": config.extra_n,
        "BLOCK_K": config.block_k,
        "SWAP": config.swapped,
        "STAGES": config.stages,
    }


def grid(constants: dict) -> tuple[int, int]:
    """Tiles of the same weights are neighbours, so that they meet in the cache."""
    columns = constants["BLOCK_N"] + constants["EXTRA"]
    return triton.cdiv(constants["M"], constants["BLOCK_M"]), triton.cdiv(constants["F"], columns)


def gated_matmul(x, weight, activation, layer, bias, config: tuning.GatedConfig | None = None):
    """Launch the kernel: [M, F] in x's dtype; the arguments are those of `pallas_kernels.gated_matmul`.

    `config` overrides the tuned blocks.
    """
    from pallas_kernels.triton_launch import triton_call

    (m, k), n = x.shape, weight.shape[-2]
    config = config or tuning.gated_config(m, n, k)
    constants = kernel_constants(x, weight, bias, activation, config)
    layered = constants["STACKED"] or constants["BIASED"]
    return triton_call(
        x,
        weight,
        x if bias is None else bias,
        layer if layered else 0,
        kernel=gated_matmul_kernel,
        out_shape=jax.ShapeDtypeStruct((m, n // 2), x.dtype),
        grid=grid(constants),
        num_warps=config.warps,
        num_stages=config.stages,
        LAYER_IS_POINTER=layered and isinstance(layer, jax.Array),
        **constants,
    )
