"""The fused int4 matmul for NVIDIA GPUs (sm_80 and up): out = x @ dequant(W[layer])^T (+ xa @ B[layer]^T).

Bound by the bytes of the packed weights while M is small, so the kernel is built around their path: 16-byte
asynchronous copies of [BLOCK_N, BLOCK_K / 2] bytes; one 32-bit register = 4 bytes = 4 low + 4 high nibbles, unpacked by
`prmt` straight into pairs of bfloat16 (0x43nn = 128 + n, exact), minus 136, times the group's scale. Joining the low and
the high half of each group restores the order of K without moving data, so x is read as it lies.

Three forms of the product (`tuning.Int4Config.product`):

- mma: x [BLOCK_M, k] is the left operand of `mma.sync`, the weights its right one.
- mma_swapped: the weights are the left operand. Fewer register moves; two warps, since with four Triton takes wgmma.
- wgmma (Hopper): the weights are the left operand, from registers; x^T is read from shared memory by the tensor core.
  Its fragments hold elements (2t, 2t+1, 2t+8, 2t+9) of every 16 where a thread's four bytes are (4t .. 4t+3), so x's
  columns are permuted to match before the launch (`rows.permute_columns`), unless whatever produced x did so. The
  weight tile is stored as blocks of 8 rows x 16 bytes, which lie free of bank conflicts.

Rows N and M are clamped for reads and masked for writes. With SPLIT_K > 1 float32 partial sums are written, for XLA or for
the consumer to add. The first split adds the LoRA product; where xa = x @ A^T comes as partial sums too, the splits share
them out, since each may add its own share of xa times B^T.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import dispatch, reference, tuning
from pallas_kernels.rows import permute_columns

_BF16_PAIRS = tl.constexpr(
    """{
.reg .b32 low, high;
and.b32 low, $4, 0x0f0f0f0f;
shr.u32 high, $4, 4;
and.b32 high, high, 0x0f0f0f0f;
prmt.b32 $0, low, 0x43434343, 0x4140;
prmt.b32 $1, low, 0x43434343, 0x4342;
prmt.b32 $2, high, 0x43434343, 0x4140;
prmt.b32 $3, high, 0x43434343, 0x4342;
}"""
)
_FP16_PAIRS = tl.constexpr(_BF16_PAIRS.value.replace("0x43434343", "0x64646464"))


@triton.jit
def _unpack(packed, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes -> (low nibble - 8, high nibble - 8) in DTYPE, exact."""
    if PTX and tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            _BF16_PAIRS, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        return low - 136.0, high - 136.0
    elif PTX and tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            _FP16_PAIRS, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
        return low - 1032.0, high - 1032.0
    else:
        return ((packed & 0xF).to(tl.int32) - 8).to(DTYPE), ((packed >> 4).to(tl.int32) - 8).to(DTYPE)


@triton.jit
def _dequantized(
    packed, scales, ROWS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr
):
    """Bytes [ROWS, GROUPS * HALF] and scales [ROWS, GROUPS] -> weights [ROWS, GROUPS * 2 * HALF]; registers only."""
    low, high = _unpack(packed, PTX, DTYPE)
    low = tl.reshape(low, (ROWS, GROUPS, HALF)) * scales[:, :, None]
    high = tl.reshape(high, (ROWS, GROUPS, HALF)) * scales[:, :, None]
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (ROWS, GROUPS * 2 * HALF))


@triton.jit
def _scale_pair(words, DTYPE: tl.constexpr):
    """Words of two bfloat16 scales -> (the first ones, the second ones) in DTYPE."""
    first = (words << 16).to(tl.float32, bitcast=True).to(DTYPE)
    return first, (words & 0xFFFF0000).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _halves(packed):
    """[EIGHTS, COLUMNS] -> its first and its second half of the columns; registers only."""
    return tl.split(tl.permute(tl.reshape(packed, (packed.shape[0], 2, packed.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def int4_matmul_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    layer_ptr,
    xa_ptr,
    b_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    XA_PARTS: tl.constexpr,
    B_STACKED: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    WGMMA: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of one K split; grid (M tiles, N tiles, SPLIT_K)."""
    HALF: tl.constexpr = GROUP // 2
    BYTES: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    # A block is dequantized in steps, so that its 16-bit weights take the registers of one step only.
    STEPS: tl.constexpr = (4 if GROUPS % 4 == 0 else 2 if GROUPS % 2 == 0 else 1) if WGMMA else 1
    STEP_GROUPS: tl.constexpr = GROUPS // STEPS
    STEP_K: tl.constexpr = BLOCK_K // STEPS
    STEP_BYTES: tl.constexpr = STEP_K // 2
    BLOCKS: tl.constexpr = K // BLOCK_K
    PER_SPLIT: tl.constexpr = (BLOCKS + SPLIT_K - 1) // SPLIT_K

    split = tl.program_id(2)
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    packed_ptr += layer * tl.full((), N * (K // 2), tl.int64)
    scales_ptr += layer * tl.full((), N * (K // GROUP), tl.int64)
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, BLOCKS)

    rows_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_m = tl.minimum(rows_m, M - 1)
    safe_n = tl.minimum(rows_n, N - 1)

    x_ptrs = x_ptr + safe_m[:, None] * K + tl.arange(0, STEP_K)[None, :]
    # Two bfloat16 scales as one word: asynchronous copies move four bytes at least.
    PAIRED_SCALES: tl.constexpr = STEPS > 1 and STEP_GROUPS == 1 and scales_ptr.dtype.element_ty == tl.bfloat16
    word_ptrs = scales_ptr.to(tl.pointer_type(tl.uint32)) + safe_n[:, None] * (K // GROUP // 2)
    word_ptrs += tl.arange(0, STEPS // 2 if STEPS > 1 else 1)[None, :]
    scale_ptrs = scales_ptr + safe_n[:, None] * (K // GROUP) + tl.arange(0, STEP_GROUPS)[None, :]
    if WGMMA:  # [BLOCK_N / 8, BYTES / 16 * 8 * 16]
        # In shared memory the 8 rows of 16 bytes that one matrix of `ldmatrix` takes lie side by side: no bank twice. As one
        # axis, since Triton orders several by the registers they end in, which put the rows 256 bytes apart.
        within = tl.arange(0, 8 * BYTES)[None, :]
        rows = tl.arange(0, BLOCK_N // 8)[:, None] * 8 + within // 16 % 8
        columns = within // 128 * 16 + within % 16
        offsets = tl.minimum(tl.program_id(1) * BLOCK_N + rows, N - 1) * (K // 2) + columns
        packed_ptrs = packed_ptr + tl.max_contiguous(offsets, (1, 16))
    else:
        packed_ptrs = packed_ptr + safe_n[:, None] * (K // 2) + tl.arange(0, BYTES)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(packed_ptrs + block * BYTES)
        parts = (packed,) if STEPS == 1 else _halves(packed)
        if STEPS == 4:
            parts = _halves(parts[0]) + _halves(parts[1])
        if PAIRED_SCALES:
            words = tl.load(word_ptrs + block * (STEPS // 2))
            if STEPS == 2:
                pairs = _scale_pair(words, DTYPE)
            else:
                first_words, second_words = tl.split(words)
                pairs = _scale_pair(first_words[:, None], DTYPE) + _scale_pair(second_words[:, None], DTYPE)
        for step in tl.static_range(STEPS):
            if PAIRED_SCALES:
                scales = pairs[step]
            else:
                scales = tl.load(scale_ptrs + block * GROUPS + step * STEP_GROUPS).to(DTYPE)
            packed = parts[step]
            x = tl.load(x_ptrs + block * BLOCK_K + step * STEP_K)
            if WGMMA:
                blocks = tl.reshape(packed, (BLOCK_N // 8, STEP_BYTES // 16, 8, 4, 2, 2))
                packed = tl.reshape(tl.permute(blocks, (0, 2, 1, 4, 3, 5)), (BLOCK_N, STEP_BYTES))
            weights = _dequantized(packed, scales, BLOCK_N, STEP_GROUPS, HALF, PTX, DTYPE)
            acc = tl.dot(weights, tl.trans(x), acc) if SWAP else tl.dot(x, tl.trans(weights), acc)
        if WGMMA and PTX:
            # A use outside of products makes Triton wait for them here. Left to itself it lets them run on into the next
            # iteration, which overwrites registers they still read (seen with Triton 3.6: wrong sums under load).
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)

    if R > 0 and split < XA_PARTS:
        rank = tl.arange(0, R_PAD)
        if B_STACKED:
            b_ptr += layer * tl.full((), N * R, tl.int64)
        valid = (rank < R)[None, :]
        b = tl.load(b_ptr + safe_n[:, None] * R + rank[None, :], mask=valid, other=0.0).to(DTYPE)
        xa_ptrs = xa_ptr + safe_m[:, None] * R + rank[None, :]
        if XA_PARTS == 1:
            xa = tl.load(xa_ptrs, mask=valid, other=0.0).to(DTYPE)
        else:
            total = tl.zeros((BLOCK_M, R_PAD), tl.float32)
            for part in tl.range(split, XA_PARTS, SPLIT_K):
                total += tl.load(xa_ptrs + part * (M * R), mask=valid, other=0.0).to(tl.float32)
            xa = total.to(DTYPE)
        acc = tl.dot(b, tl.trans(xa), acc) if SWAP else tl.dot(xa, tl.trans(b), acc)

    out_ptr += split * tl.full((), M * N, tl.int64)
    if SWAP:
        mask = (rows_m < M)[None, :] & (rows_n < N)[:, None]
        tl.store(out_ptr + rows_m[None, :] * N + rows_n[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = (rows_m < M)[:, None] & (rows_n < N)[None, :]
        tl.store(out_ptr + rows_m[:, None] * N + rows_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def kernel_constants(
    m: int, n: int, k: int, group: int, rank: int, config: tuning.Int4Config, xa_parts: int = 1
) -> dict:
    """The kernel's shape and block parameters, shared by the GPU launch and the interpreter's tests."""
    return {
        "M": m,
        "N": n,
        "K": k,
        "GROUP": group,
        "R": rank,
        "R_PAD": max(16, triton.next_power_of_2(rank)) if rank else 0,
        "XA_PARTS": xa_parts,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "SWAP": config.product != tuning.MMA,
        "WGMMA": config.product == tuning.WGMMA,
        "STAGES": config.stages,
    }


def grid(m: int, n: int, config: tuning.Int4Config) -> tuple[int, int, int]:
    """Tiles of the same weights are neighbours, so that they meet in the cache."""
    return triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), config.split_k


def int4_matmul(x, packed, scales, layer, xa, lora_b, out_dtype, config: tuning.Int4Config | None = None):
    """[M, N]: the kernel's partial sums added up; the arguments are those of `pallas_kernels.int4_matmul`."""
    parts = partial_sums(x, None, packed, scales, layer, xa, lora_b, out_dtype, config)
    if parts.shape[0] == 1:
        return parts[0]
    # Slices and additions rather than a reduction: XLA then fuses them with what follows into one elementwise kernel.
    summands = [parts[split].astype(jnp.float32) for split in range(parts.shape[0])]
    return functools.reduce(jnp.add, summands).astype(out_dtype)


def partial_sums(x, permuted, packed, scales, layer, xa, lora_b, out_dtype, config: tuning.Int4Config | None = None):
    """Launch the kernel: [S, M, N], float32 or, where K is not split, `out_dtype`; that of the Mosaic form in any case.

    `permuted` is x with permuted columns where the caller has it, `config` overrides the tuned blocks and form; `xa` is one
    matrix or, with a leading axis, partial sums.
    """
    from pallas_kernels.triton_launch import triton_call

    (m, k), n, group = x.shape, packed.shape[-2], reference.group_size(packed, scales)
    if config is None:
        mosaic = dispatch.mosaic_problem(dispatch.current_device(), x.dtype, scales.dtype, group) is None
        config = tuning.int4_config(m, n, k, group, mosaic=mosaic)
    rank = 0 if xa is None else xa.shape[-1]
    xa_parts = xa.shape[0] if xa is not None and xa.ndim == 3 else 1
    if config.product in tuning.READS_PERMUTED:
        x = permute_columns(x) if permuted is None else permuted
    if config.product == tuning.MOSAIC:
        from pallas_kernels import int4_matmul_mosaic

        return int4_matmul_mosaic.partial_sums(x, packed, scales, layer, xa, lora_b, out_dtype, config)
    unused = scales  # a pointer that the kernel never follows
    return triton_call(
        x,
        packed,
        scales,
        0 if layer is None else layer,
        unused if xa is None else xa,
        unused if lora_b is None else lora_b,
        kernel=int4_matmul_kernel,
        out_shape=jax.ShapeDtypeStruct((config.split_k, m, n), jnp.float32 if config.split_k > 1 else out_dtype),
        grid=grid(m, n, config),
        num_warps=config.warps,
        num_stages=config.stages,
        B_STACKED=lora_b is not None and lora_b.ndim == 3,
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        PTX=True,
        DTYPE=_triton_type(x.dtype),
        **kernel_constants(m, n, k, group, rank, config, xa_parts),
    )


def _triton_type(dtype):
    return {"bfloat16": tl.bfloat16, "float16": tl.float16}[jnp.dtype(dtype).name]
