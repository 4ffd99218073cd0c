"""x @ W^T of 16-bit weights for NVIDIA GPUs (sm_80 and up): one tile of one K split a program, W streamed once.

Both operands go from memory to shared memory by asynchronous copies and from there to the tensor cores. Either may be the
left one (`tuning.DenseConfig.swapped`): the left operand's tile has at least 64 rows on Hopper, the right one's as few as
x has. Rows N and M are clamped for reads and masked for writes. With SPLIT_K > 1 the parts are float32.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import tuning


@triton.jit
def dense_matmul_kernel(
    x_ptr,
    weight_ptr,
    layer_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of one K split; grid (M tiles, N tiles, SPLIT_K)."""
    BLOCKS: tl.constexpr = K // BLOCK_K
    split = tl.program_id(2)
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    weight_ptr += layer * tl.full((), N * K, tl.int64)
    # Splits differ by one block at most, so that none of them runs idle.
    first = split * BLOCKS // SPLIT_K
    last = (split + 1) * BLOCKS // SPLIT_K

    rows_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows_m, M - 1)[:, None] * K + column[None, :]
    weight_ptrs = weight_ptr + tl.minimum(rows_n, N - 1)[:, None] * K + column[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        x = tl.load(x_ptrs + block * BLOCK_K)
        weight = tl.load(weight_ptrs + block * BLOCK_K)
        acc = tl.dot(weight, tl.trans(x), acc) if SWAP else tl.dot(x, tl.trans(weight), acc)

    out_ptr += split * tl.full((), M * N, tl.int64)
    if SWAP:
        mask = (rows_m < M)[None, :] & (rows_n < N)[:, None]
        tl.store(out_ptr + rows_m[None, :] * N + rows_n[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = (rows_m < M)[:, None] & (rows_n < N)[None, :]
        tl.store(out_ptr + rows_m[:, None] * N + rows_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def kernel_constants(m: int, n: int, k: int, config: tuning.DenseConfig) -> dict:
    """The kernel's shape and block parameters, shared by the GPU launch and the interpreter's tests."""
    return {
        "M": m,
        "N": n,
        "K": k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "SWAP": config.swapped,
        "STAGES": config.stages,
    }


def grid(m: int, n: int, config: tuning.DenseConfig) -> tuple[int, int, int]:
    """Tiles of the same weights are neighbours, so that they meet in the cache."""
    return triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), config.split_k


def partial_sums(x, weight, layer, config: tuning.DenseConfig | None = None):
    """Launch the kernel: [S, M, N], float32 or, where K is not split, x's dtype; `config` overrides the tuned blocks."""
    from pallas_kernels.triton_launch import triton_call

    (m, k), n = x.shape, weight.shape[-2]
    config = config or tuning.dense_config(m, n, k)
    return triton_call(
        x,
        weight,
        0 if layer is None else layer,
        kernel=dense_matmul_kernel,
        out_shape=jax.ShapeDtypeStruct((config.split_k, m, n), jnp.float32 if config.split_k > 1 else x.dtype),
        grid=grid(m, n, config),
        num_warps=config.warps,
        num_stages=config.stages,
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        **kernel_constants(m, n, k, config),
    )
