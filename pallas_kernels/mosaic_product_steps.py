"""What the warp groups of `int4_matmul_mosaic.py` do: fill a ring with blocks, multiply them, add the adapter's product, and store results."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.codes import PER_BYTE
from pallas_kernels.mosaic_instructions import ROWS, dequantize, sum_parts, swizzle_bytes
from pallas_kernels.mosaic_product_plan import COPIES, Plan

MULTIPLY_REGISTERS = {2: 232, 3: 160, 4: 112}
"""Registers of a thread that multiplies, by the number of warp groups that do."""
SCALES_READ = 8
"""Scales of a row that one copy brings: 16 bytes, the least, from an address that 16 divides."""


class Ring(NamedTuple):
    """Slots in shared memory that are filled with blocks and multiplied, and their barriers."""

    rows: tuple
    """Blocks of x, and the same memory as places for 64 columns of results each."""
    packed: Any
    scales: Any
    full: Any
    empty: Any
    left: Any
    """Of the interpreter: where a warp group puts its left operand; None on a GPU."""


class Refs(NamedTuple):
    """Arrays in device memory, then what the warp groups of a program share."""

    x: Any
    packed: Any
    scales: Any
    layer: Any
    xa: Any
    b: Any
    out: Any
    ring: Ring
    adapter: dict
    """Its x A^T in shared memory and the barrier that says so, or nothing."""
    exchange: dict
    """Sums of a piece, of all warp groups but the first, and the barrier that says so, or nothing."""


class Part(NamedTuple):
    """Of a slot: so many rows of weights and of x, from which rows on, and their block of K."""

    step: Any
    row_n: Any
    rows_n: int
    row_m: Any
    rows_m: int


def fill_slot(plan: Plan, refs: Refs, block, parts: list[Part]) -> None:
    """Copy what a slot holds, one part behind the other, as soon as all have read what it held; nothing where it is only lent."""
    config, ring, layer = plan.config, refs.ring, refs.layer[0]
    slot = lax.rem(block, config.stages)

    @pl.when(block >= config.stages)
    def _():
        plgpu.barrier_wait(ring.empty.at[slot])

    def copy(source, place) -> None:
        plgpu.copy_gmem_to_smem(source, place, ring.full.at[slot])

    for index, (step, row_n, rows_n, row_m, rows_m) in enumerate(parts):
        weights, rows = pl.ds(row_n, rows_n), pl.ds(row_m, rows_m)
        place_n, place_m = pl.ds(index * rows_n, rows_n), pl.ds(index * rows_m, rows_m)
        first_scale = step * plan.groups // SCALES_READ * SCALES_READ
        copy(
            refs.packed.at[layer, weights, pl.ds(step * plan.block_bytes, plan.block_bytes)],
            ring.packed.at[slot, place_n],
        )
        copy(refs.scales.at[layer, weights, pl.ds(first_scale, SCALES_READ)], ring.scales.at[slot, place_n])
        copy(refs.x.at[rows, pl.ds(step * config.block_k, config.block_k)], ring.rows[0].at[slot, place_m])
    for _ in range(plan.copies - COPIES * len(parts)):  # the barrier awaits as many of each slot
        plgpu.barrier_arrive(ring.full.at[slot])


def _adapter_tiles(plan: Plan) -> list:
    """Columns of B and x A^T that one product takes."""
    width = swizzle_bytes(plan.rank) // 2
    return [pl.ds(column, width) for column in range(0, plan.rank, width)]


def sum_xa(plan: Plan, refs: Refs, row_m) -> None:
    """Put x A^T of a tile into shared memory, of the parts that it comes in."""
    parts = refs.xa.at[:, pl.ds(row_m, plan.config.block_m)]
    last = plan.rows - 1 - row_m if plan.rows % plan.config.block_m else None
    sum_parts(parts, refs.adapter["xa"], 128 * plan.warpgroups, plan.interpret, last)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.adapter["ready"])


def load_b(plan: Plan, refs: Refs, rows_n, index: int = 0):
    """B's rows, of the columns that its first or another product takes."""
    layer = refs.layer[0] if plan.b_stacked else 0
    return plgpu.load(refs.b.at[layer, rows_n, _adapter_tiles(plan)[index]], layout=plgpu.Layout.WGMMA, optimized=False)


def add_adapter(plan: Plan, refs: Refs, sums, b, rows_n, rows) -> None:
    """Add B's rows, of which `b` are the first columns, times `rows` of x A^T."""
    for index, tile in enumerate(_adapter_tiles(plan)):
        left = load_b(plan, refs, rows_n, index) if index else b
        add_product(refs.ring.left, sums, left, refs.adapter["xa"].at[rows, tile])
        plgpu.wgmma_wait(0)


def keeps_b(plan: Plan) -> bool:
    """Whether registers hold B's first columns while blocks are multiplied; not beside what is reckoned for several tiles in turn."""
    b, groups = _adapter_tiles(plan)[0].size // 4, _at_once(plan)[1]
    return not plan.config.rest and _registers(plan, groups) + b <= MULTIPLY_REGISTERS[plan.warpgroups]


def _registers(plan: Plan, groups: int) -> int:
    """That a thread needs, about, for sums of tile and piece, a block's bytes, so many dequantized groups and the rest."""
    sums = (plan.config.block_m + plan.config.cut) // 2
    return sums + plan.block_bytes // 8 + groups * plan.group // 4 + 40


class Block(NamedTuple):
    """What is multiplied of a slot: a warp group's rows of weights, of this block of K, with `rows` of x, for these sums."""

    step: Any
    sums: Any
    rows: Any


def multiply_blocks(plan: Plan, ring: Ring, used, rounds, blocks_of: Callable[[Any], list[Block]]) -> None:
    """Add the products of the ring's next slots, after `used`, a round's at a time.

    A group is dequantized while the tensor core multiplies those before it. It ends all of an iteration in it: what it still reads in
    registers, the compiler protects within an iteration and not in the next (weights of one group a block came out wrong on an H200).
    """
    several, most = _at_once(plan)

    def multiply(indices: list) -> None:
        blocks = [
            (used + index * plan.round + i, block) for index in indices for i, block in enumerate(blocks_of(index))
        ]
        before, issued = None, 0  # the slot of the block before, until it is read; groups so far
        for place, block in blocks:
            slot = lax.rem(place, plan.config.stages)
            plgpu.barrier_wait(ring.full.at[slot])
            for index, weights in enumerate(_weights(plan, ring, block.step, slot), 1):
                columns = pl.ds((index - 1) * plan.group, plan.group)
                add_product(ring.left, block.sums, weights, ring.rows[0].at[slot, block.rows, columns])
                issued += 1
                running = most - 1 if index < plan.groups else min(most - 1, plan.groups)
                read = before is not None and running <= index
                if read or running < issued < len(blocks) * plan.groups:
                    plgpu.wgmma_wait(running)
                if read:
                    plgpu.barrier_arrive(ring.empty.at[before])
                    before = None
            before = slot
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(ring.empty.at[before])

    left, several = 0, max(1, several // plan.round)
    if several > 1:
        turns = lax.div(rounds, several)
        pl.loop(0, turns)(lambda turn: multiply([turn * several + index for index in range(several)]))
        left = several * turns
    pl.loop(left, rounds)(lambda index: multiply([index]))


def _at_once(plan: Plan) -> tuple[int, int]:
    """Blocks of an iteration, and groups of them that the tensor core may read at once: what was fastest on an H200 of what registers hold.

    With more groups, the compiler spilled registers or let the tensor core end each product by itself.
    """
    m, block_k, warpgroups = plan.config.block_m, plan.config.block_k, plan.warpgroups
    if PER_BYTE[plan.code] == 2:
        fit = _registers(plan, 2) <= MULTIPLY_REGISTERS[warpgroups]
        return (max(1, 512 // block_k), 2) if fit else (1, 1)
    columns = 256 if warpgroups == 2 or m <= 32 else 128 if m <= 64 else 64
    return max(1, columns // block_k), max(1, columns // plan.group)


def _weights(plan: Plan, ring: Ring, step, slot) -> Iterator[Any]:
    """The groups of a warp group's rows of the block in a slot, each [64, G]."""
    rows = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
    first = lax.rem(step * plan.groups, SCALES_READ)
    return dequantized_groups(plan, ring.packed.at[slot, rows], lambda group: ring.scales.at[slot, rows, first + group])


def dequantized_groups(plan: Plan, packed, scales: Callable[[int], Any]) -> Iterator[Any]:
    """The groups of a warp group's rows of a block, each [64, G]; `scales` gives the place of a group's [64]."""
    group_bytes = plan.group // PER_BYTE[plan.code]
    words = plgpu.load(packed, layout=plgpu.Layout.WGMMA_8BIT)
    for index in range(plan.groups):
        scale = plgpu.load(scales(index), layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        yield dequantize(words[:, index * group_bytes : (index + 1) * group_bytes], scale, plan.code, plan.interpret)


def add_product(memory, sums, left, right) -> None:
    """sums += left @ right^T, begun but not awaited; `left` is in registers, and of the interpreter first put into `memory`."""
    if memory is not None:
        shared = memory.at[lax.axis_index("warpgroup"), :, pl.ds(0, left.shape[1])]
        shared[...] = left
        plgpu.commit_smem()
        left = shared
    plgpu.wgmma(sums, left, right.T)


def begin_store(plan: Plan, ring: Ring, lent, sums, out) -> None:
    """Begin to store a warp group's results by way of the slots that follow a tile's blocks, which nobody fills: in whole lines of memory, where
    threads would write 16 bytes of a row each.
    """
    warpgroup, places = lax.axis_index("warpgroup"), plan.config.block_k // ROWS
    for index in range(plan.lent):
        slot = lax.rem(lent + index, plan.config.stages)
        plgpu.barrier_wait(ring.full.at[slot])

        @pl.when(lax.div(warpgroup, places) == index)
        def _(slot=slot):
            place = ring.rows[1].at[slot * places + lax.rem(warpgroup, places)]
            place.T[...] = sums
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, out)


def end_store(plan: Plan, ring: Ring, lent) -> None:
    """Give the slots back, once they are read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for index in range(plan.lent):
        plgpu.barrier_arrive(ring.empty.at[lax.rem(lent + index, plan.config.stages)])
