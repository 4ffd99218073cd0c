"""Drawing a token for NVIDIA GPUs: statistics of blocks of the logits, then one program a row that finds the token.

The first kernel reads all logits and leaves (largest, sum of weights) of each block; the second one reads these and the one block in
which the quantile falls, which is probably still in the L2 cache, and may write down what it finds. Weights are 2^(scale (logit - largest)), scale = log2(e) / temperature: as the
temperature is positive the largest logit is that before the division, and a weight costs a subtraction, a product and an exp2.

The order of the sums depends on the shape only, so the same inputs give the same tokens, and a row's token does not depend on the others.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.completions import Completions, Ends
from pallas_kernels.completions_triton import Recording, no_recording, record_token, recording

BLOCK, WARPS = 2048, 4
"""Logits of a block, and warps of a program. A thread has four loads of 16 bytes in flight, and 64 rows of 128,256 or 151,936 logits are
about 4,000 programs, 30 for each multiprocessor of an H200, so that a last turn which is not full costs little. Not tuned by measurement."""


@triton.jit
def block_sums_kernel(
    logits_ptr,
    highest_ptr,
    sums_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Largest logit and sum of weights relative to it of block program_id(0) % BLOCKS of row program_id(0) // BLOCKS."""
    program = tl.program_id(0)
    row, block = program // BLOCKS, program % BLOCKS
    column = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * V + column, mask=column < V, other=float("-inf"))
    highest = tl.max(logits, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(highest_ptr + program, highest)
    tl.store(sums_ptr + program, tl.sum(tl.exp2((logits - shift) * SCALE), axis=0))


@triton.jit
def _quantile(weights, index, target, COUNT: tl.constexpr):
    """As `inverse_cdf._quantile`: the first index whose prefix sum exceeds target, else the last one that has weight."""
    prefix = tl.cumsum(weights, axis=0)
    first = tl.min(tl.where((weights > 0) & (prefix > target), index, COUNT), axis=0)
    last = tl.max(tl.where(weights > 0, index, 0), axis=0)
    chosen = tl.where(first < COUNT, first, last)
    before = tl.sum(tl.where(index == chosen, prefix - weights, 0.0), axis=0)
    return chosen, target - before


@triton.jit
def find_token_kernel(
    logits_ptr,
    highest_ptr,
    sums_ptr,
    uniform_ptr,
    step_ptr,
    remaining_ptr,
    packed_ptr,
    stops_ptr,
    token_ptr,
    logprob_ptr,
    remaining_out_ptr,
    packed_out_ptr,
    M: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    STEPS: tl.constexpr,
    RECORD: tl.constexpr,
    STOPS: tl.constexpr,
    PAD: tl.constexpr,
):
    """Row program_id(0), from the statistics of its BLOCKS blocks. STEPS: there are numbers of many steps.

    RECORD: the token goes into the record, which is `packed_ptr` and `packed_out_ptr` at once (`record_token`).
    """
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS_PAD)
    exists = block < BLOCKS
    highest = tl.load(highest_ptr + row * BLOCKS + block, mask=exists, other=float("-inf"))
    sums = tl.load(sums_ptr + row * BLOCKS + block, mask=exists, other=0.0)
    step = tl.load(step_ptr) if STEPS else 0
    uniform = tl.load(uniform_ptr + step * M + row)
    if RECORD:
        # In front of the reductions: `record_token` overwrites it.
        remaining = tl.load(remaining_ptr + row)
    largest = tl.max(highest, axis=0)
    weights = sums * tl.exp2((highest - largest) * SCALE)
    mass = tl.sum(weights, axis=0)
    chosen, target = _quantile(weights, block, uniform * mass, BLOCKS_PAD)
    start = logits_ptr + row.to(tl.int64) * V
    offset = tl.arange(0, BLOCK)
    column = chosen * BLOCK + offset
    logits = tl.load(start + column, mask=column < V, other=float("-inf"))
    inside, _ = _quantile(tl.exp2((logits - largest) * SCALE), offset, target, BLOCK)
    # `tl.max` passes over a NaN; the mass does not.
    token = tl.where(mass == mass, chosen * BLOCK + inside, 0)
    logit = tl.load(start + token)
    logprob = (logit - largest) * INVERSE_TEMPERATURE - tl.log(mass)
    if RECORD:
        token, logprob = record_token(
            token, logprob, row, step, remaining, stops_ptr, remaining_out_ptr, packed_out_ptr, M, STOPS, PAD
        )
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)


def kernel_constants(rows: int, vocab: int, temperature: float, block: int = BLOCK) -> tuple[dict, dict]:
    """The shapes of either kernel, shared by the GPU launch and the interpreter's tests."""
    shared = {"V": vocab, "BLOCK": block, "BLOCKS": triton.cdiv(vocab, block), "SCALE": math.log2(math.e) / temperature}
    padded = triton.next_power_of_2(shared["BLOCKS"])
    return shared, {"M": rows, "BLOCKS_PAD": padded, "INVERSE_TEMPERATURE": 1 / temperature, **shared}


def draw_token(logits, uniform, temperature: float, step, block: int = BLOCK, warps: int = WARPS):
    """Launch the kernels; the first four arguments are those of `pallas_kernels.draw_token`."""
    token, logprob, *_ = _launch(logits, uniform, temperature, step, no_recording(logits), block, warps)
    return token, logprob


def draw_and_record(logits, uniform, completions: Completions, temperature: float, step, ends: Ends):
    """Launch the kernels; the arguments are those of `pallas_kernels.draw_and_record`."""
    how = recording(completions, ends, arguments=5)
    token, _, remaining, packed = _launch(logits, uniform, temperature, step, how, BLOCK, WARPS)
    return token, Completions(packed, remaining)


def _launch(logits, uniform, temperature, step, record: Recording, block: int, warps: int):
    """(token, log-probability, the record's outputs)"""
    from pallas_kernels.triton_launch import triton_call

    rows, vocab = logits.shape
    shared, row = kernel_constants(rows, vocab, temperature, block)
    return triton_call(
        logits,
        *block_sums(logits, shared, warps),
        uniform,
        0 if step is None else step,
        *record.arguments,
        kernel=find_token_kernel,
        out_shape=[*(jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32)), *record.outputs],
        grid=(rows,),
        num_warps=warps,
        input_output_aliases=record.aliases,
        STEPS=step is not None,
        **record.constants,
        **row,
    )


def block_sums(logits, shared: dict, warps: int = WARPS):
    """Launch the first kernel: (largest logit, sum of weights) of every block, `[M, blocks]`; `shared` are `kernel_constants`' first."""
    from pallas_kernels.triton_launch import triton_call

    statistic = jax.ShapeDtypeStruct((len(logits), shared["BLOCKS"]), jnp.float32)
    return triton_call(
        logits,
        kernel=block_sums_kernel,
        out_shape=[statistic, statistic],
        grid=(len(logits) * shared["BLOCKS"],),
        num_warps=warps,
        **shared,
    )
