"""Drawing by a proposal and correcting the draw, for NVIDIA GPUs: in the place of `find_token_kernel`, and no launch more than it.

The statistics of blocks are those of `draw_token_triton.py`. One program a row then finds all its candidates at the same time, as rows
of one tile, so that their loads wait for each other's latency once; gathers the rows of the head; chooses; and may write down what it chose. For 64 rows of 1,536
and four candidates these are 0.8 MB, beside the 2.1 MB of the blocks that are searched.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import draw_token_triton
from pallas_kernels.completions import Completions, Ends
from pallas_kernels.completions_triton import Recording, no_recording, record_token, recording

WARPS, BLOCK_D = 8, 1024
"""Warps of a program that searches, and columns of the head's rows that it has in flight. Not tuned by measurement."""


@triton.jit
def _quantiles(weights, index, targets, COUNT: tl.constexpr):
    """`draw_token_triton._quantile` for the rows of `targets`, all of one row of weights or each of its own."""
    prefix = tl.cumsum(weights, axis=1)
    has_weight, index = weights > 0, index[None, :]
    first = tl.min(tl.where(has_weight & (prefix > targets[:, None]), index, COUNT), axis=1)
    last = tl.max(tl.where(has_weight, index, 0), axis=1)
    chosen = tl.where(first < COUNT, first, last)
    before = tl.sum(tl.where(index == chosen[:, None], prefix - weights, 0.0), axis=1)
    return chosen, targets - before


@triton.jit
def _pick(values, index, place):
    """values[place]"""
    return tl.sum(tl.where(index == place, values, 0), axis=0)


@triton.jit
def find_corrected_kernel(
    logits_ptr,
    hidden_ptr,
    head_ptr,
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
    D: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    STEPS: tl.constexpr,
    RECORD: tl.constexpr,
    STOPS: tl.constexpr,
    PAD: tl.constexpr,
):
    """Row program_id(0), from the statistics of its BLOCKS blocks; STEPS and RECORD as of `draw_token_triton.find_token_kernel`."""
    row = tl.program_id(0)
    step = tl.load(step_ptr) if STEPS else 0
    numbers = uniform_ptr + (step * M + row) * (2 * CANDIDATES - 1)
    candidate = tl.arange(0, CANDIDATES)
    uniform = tl.load(numbers + candidate)
    choices = tl.load(numbers + CANDIDATES - 1 + candidate, mask=candidate > 0, other=0.0)

    if RECORD:
        # In front of the reductions: `record_token` overwrites it.
        remaining = tl.load(remaining_ptr + row)
    block = tl.arange(0, BLOCKS_PAD)
    exists = block < BLOCKS
    highest = tl.load(highest_ptr + row * BLOCKS + block, mask=exists, other=float("-inf"))
    sums = tl.load(sums_ptr + row * BLOCKS + block, mask=exists, other=0.0)
    largest = tl.max(highest, axis=0)
    weights = sums * tl.exp2((highest - largest) * SCALE)
    mass = tl.sum(weights, axis=0)
    shared = tl.broadcast_to(weights[None, :], (CANDIDATES, BLOCKS_PAD))
    chosen, targets = _quantiles(shared, block, uniform * mass, BLOCKS_PAD)
    start = logits_ptr + row.to(tl.int64) * V
    offset = tl.arange(0, BLOCK)
    column = chosen[:, None] * BLOCK + offset[None, :]
    logits = tl.load(start + column, mask=column < V, other=float("-inf"))
    inside, _ = _quantiles(tl.exp2((logits - largest) * SCALE), offset, targets, BLOCK)
    # `tl.max` passes over a NaN; the mass does not.
    tokens = tl.where(mass == mass, chosen * BLOCK + inside, 0)
    proposed = tl.load(start + tokens)

    products = tl.zeros((CANDIDATES, BLOCK_D), tl.float32)
    rows = head_ptr + tokens.to(tl.int64) * D
    for first in tl.static_range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        weight = tl.load(rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
        products += weight * hidden[None, :]
    exact = tl.sum(products, axis=1)

    ratio = (exact - proposed) * INVERSE_TEMPERATURE
    place, held = 0, _pick(ratio, candidate, 0)
    for other in tl.static_range(1, CANDIDATES):
        offered = _pick(ratio, candidate, other)
        takes = _pick(choices, candidate, other) < tl.exp(offered - held)
        place, held = tl.where(takes, other, place), tl.where(takes, offered, held)
    ordinary = tl.min((ratio < float("inf")).to(tl.int32), axis=0) == 1
    valid = (mass == mass) & ordinary & (held > float("-inf"))

    same = (tokens[:, None] == tokens[None, :]) & (candidate[None, :] < candidate[:, None])
    again = tl.max(same.to(tl.int32), axis=1) == 1
    top = tl.maximum(largest, tl.max(exact, axis=0))
    before = tl.sum(tl.where(again, 0.0, tl.exp2((proposed - top) * SCALE)), axis=0)
    after = tl.sum(tl.where(again, 0.0, tl.exp2((exact - top) * SCALE)), axis=0)
    corrected = tl.maximum(mass * tl.exp2((largest - top) * SCALE) - before, 0.0) + after
    logprob = (_pick(exact, candidate, place) - top) * INVERSE_TEMPERATURE - tl.log(corrected)
    token = tl.where(valid, _pick(tokens, candidate, place), 0)
    logprob = tl.where(valid, logprob, float("nan"))
    if RECORD:
        token, logprob = record_token(
            token, logprob, row, step, remaining, stops_ptr, remaining_out_ptr, packed_out_ptr, M, STOPS, PAD
        )
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)


def kernel_constants(
    rows: int, vocab: int, width: int, numbers: int, temperature: float, block: int = draw_token_triton.BLOCK
) -> tuple[dict, dict]:
    """The shapes of either kernel, shared by the GPU launch and the interpreter's tests."""
    shared, row = draw_token_triton.kernel_constants(rows, vocab, temperature, block)
    columns = min(BLOCK_D, triton.next_power_of_2(width))
    # Triton 3.6 cannot compile a scan along fewer than four columns of several rows.
    padded = max(4, row["BLOCKS_PAD"])
    return shared, {
        **row,
        "D": width,
        "CANDIDATES": (numbers + 1) // 2,
        "BLOCKS_PAD": padded,
        "BLOCK_D": columns,
    }


def draw_corrected(proposal, hidden, head, uniform, temperature: float, step):
    """Launch the kernels; the arguments are those of `pallas_kernels.draw_corrected`."""
    token, logprob, *_ = _launch(proposal, hidden, head, uniform, temperature, step, no_recording(proposal))
    return token, logprob


def draw_corrected_and_record(proposal, hidden, head, uniform, completions, temperature: float, step, ends: Ends):
    """Launch the kernels; the arguments are those of `pallas_kernels.draw_corrected_and_record`."""
    how = recording(completions, ends, arguments=7)
    token, _, remaining, packed = _launch(proposal, hidden, head, uniform, temperature, step, how)
    return token, Completions(packed, remaining)


def _launch(proposal, hidden, head, uniform, temperature, step, record: Recording):
    """(token, log-probability, the record's outputs)"""
    from pallas_kernels.triton_launch import triton_call

    rows, vocab = proposal.shape
    shared, row = kernel_constants(rows, vocab, hidden.shape[1], uniform.shape[-1], temperature)
    return triton_call(
        proposal,
        hidden,
        head,
        *draw_token_triton.block_sums(proposal, shared),
        uniform,
        0 if step is None else step,
        *record.arguments,
        kernel=find_corrected_kernel,
        out_shape=[*(jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32)), *record.outputs],
        grid=(rows,),
        num_warps=WARPS,
        input_output_aliases=record.aliases,
        STEPS=step is not None,
        **record.constants,
        **row,
    )
