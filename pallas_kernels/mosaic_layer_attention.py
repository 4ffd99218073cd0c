"""The attention of one token in the kernel of decode layers (`decode_layers_mosaic.py`): what the warp groups do.

A program takes a few generations of a question and one kv head, through one list of blocks of 64 slots: those of the prompt, then those
of each generation's suffix, where the heads of the other generations are masked. All programs do equal work, and no softmax is merged
between them. Memory gives a prompt up about once, the L2 cache to the other programs of its question; these start at different places of
their lists, so that reads of both kinds mix.

Keys and values come through the ring that brings the products' weights, in slots of the same size, and need nothing that this step makes: they are on
their way while the layer before is at its end, and this one's weights while their softmax is. New keys and values go to the cache, and into the last block of
a suffix in shared memory. The warp groups that multiply take blocks in turn, each with a softmax of its own (float32, base 2), and merge
them at the end. Slots are the rows of the tensor core's left operand, which has no fewer than 64, and query heads the columns of the right one.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_attention_plan import BLOCK, Attention, AttentionMemory, AttentionRefs, Block, Unit
from pallas_kernels.mosaic_attention_steps import (
    complete,
    largest_of_columns,
    leave_softmax,
    rotate_heads,
    store_heads,
    store_weights,
    sum_of_columns,
)
from pallas_kernels.mosaic_instructions import ROWS, synchronize_threads
from pallas_kernels.mosaic_ring import Slots

PIECES = 4
"""In which a block is copied, so that of the last one of a list little is copied that is not in use."""
LOWEST = -1e30
"""Start of the running maximum: below every score, and finite, so that heads that have seen nothing yet make no NaN."""
HIGHEST = 1e30
"""In place of a maximum where a head sees nothing of a block: its weights are then 0."""


def copy_keys_and_values(
    attention: Attention, refs: AttentionRefs, claim: Callable[[Any], Slots], program, layer, used
):
    """Fill the ring with a block's keys, then its values, and so on, after `used` slots; returns how many are used then."""
    for unit in attention.units(refs, program, layer):

        @pl.loop(0, unit.blocks)
        def _(index, unit=unit, used=used):
            block = unit.block(index)
            for which in range(2):
                slot = claim(used + 2 * index + which)
                for piece in range(PIECES):
                    _copy_piece(refs, block, which, slot, piece)

        used = used + unit.slots
    return used


def _copy_piece(refs: AttentionRefs, block: Block, which: int, slot: Slots, piece: int) -> None:
    """Copy a piece of a block's keys (0) or values (1); of one that is not in use, only say that it is there."""
    size = BLOCK // PIECES
    first, in_use = size * piece, block.used > size * piece

    def copy(cache) -> None:
        slots = slot.data[0].at[pl.ds(first, size)]
        plgpu.copy_gmem_to_smem(cache.at[pl.ds(block.row + first, size)], slots, slot.full)

    pl.when(in_use & block.of_prompt)(lambda: copy(refs.given.prompt[which]))
    pl.when(in_use & ~block.of_prompt)(lambda: copy(refs.given.suffix[which]))
    pl.when(~in_use)(lambda: plgpu.barrier_arrive(slot.full))


def attend(
    attention: Attention, refs: AttentionRefs, out, program, *, threads: int, layer, used, eps: float, interpret: bool
):
    """Leave the heads' outputs in `out` [M, H Hd], with permuted columns, and new keys and values in the cache.

    `used` slots of the ring were before; returns how many are used then.
    """
    warpgroup = lax.axis_index("warpgroup")
    own = refs.memory.of(warpgroup)
    for unit in attention.units(refs, program, layer):

        @pl.when(unit.blocks > 0)
        def _(unit=unit, used=used):
            rotate_heads(attention, refs, unit, layer, eps, threads, interpret)
            plgpu.commit_smem()
            _meet(refs, threads)
            softmax = _softmax(attention, own, refs.ring, unit, used, interpret)
            total = sum_of_columns(softmax.total, own.reduced, interpret)
            leave_softmax(softmax.values, softmax.highest, total, own, interpret)
            _meet(refs, threads)
            store_heads(attention, refs.memory, unit, out, threads, interpret)
            pl.when(warpgroup == 1)(lambda: _store_new(attention, refs, unit))
            if attention.turns > 1:  # the others have read the memory that follows
                _meet(refs, threads)

        used = used + unit.slots
    return used


def _meet(refs: AttentionRefs, threads: int) -> None:
    """Of all warp groups that multiply; what they stored in shared memory may then be read."""
    if refs.together is None:
        synchronize_threads(threads)
        return
    plgpu.barrier_arrive(refs.together)
    plgpu.barrier_wait(refs.together)


class Softmax(NamedTuple):
    """Of the columns of a tile's query heads, in base 2."""

    highest: Any
    """[N]"""
    total: Any
    """[64, N]: of every 64th slot."""
    values: Any
    """[Hd, N], weighted."""


def _softmax(attention: Attention, memory: AttentionMemory, ring: Slots, unit: Unit, used, interpret: bool) -> Softmax:
    """Of the warp group's blocks, every other one of the list."""
    own, columns = lax.axis_index("warpgroup"), attention.columns

    def filled(value, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def slots(index) -> list[Slots]:
        both = (ring.at(used + 2 * index + which) for which in range(2))
        return [slot._replace(data=(slot.data[0].at[pl.ds(0, BLOCK)],)) for slot in both]

    def leave(index) -> None:
        """To the other warp group; who waits for a slot has to wait for all."""
        for slot in slots(index):
            plgpu.barrier_wait(slot.full)
            plgpu.barrier_arrive(slot.empty)

    def step(turn, softmax: Softmax) -> Softmax:
        index = 2 * turn + own
        pl.when(own == 1)(lambda: leave(index - 1))
        softmax = _add_block(attention, memory, *slots(index), unit.block(index), softmax, interpret)
        pl.when((own == 0) & (index + 1 < unit.blocks))(lambda: leave(index + 1))
        return softmax

    softmax = Softmax(
        filled(LOWEST, (columns,), plgpu.Layout.WGMMA.reduce(0)),
        filled(0, (BLOCK, columns), plgpu.Layout.WGMMA),
        filled(0, (attention.depth, columns), plgpu.Layout.WGMMA),
    )
    softmax = lax.fori_loop(0, unit.blocks_of(own), step, softmax)
    last = unit.blocks - 1
    pl.when((own == 1) & (lax.rem(last, 2) == 0))(lambda: leave(last))
    return softmax


def _add_block(
    attention: Attention,
    memory: AttentionMemory,
    keys: Slots,
    values: Slots,
    block: Block,
    softmax: Softmax,
    interpret: bool,
) -> Softmax:
    """The softmax with one block more."""
    _await(memory, keys, block, 0, interpret)
    scores = _product(keys.data[0], memory.queries.T)
    plgpu.barrier_arrive(keys.empty)

    # Slots in use, the new one among them; and of a suffix, the columns of its generation.
    visible = block.used + block.takes_new.astype(jnp.int32)
    slot = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
    scores = jnp.where(slot < visible, scores * (attention.scale * math.log2(math.e)), -jnp.inf)
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape[1:], 0, layout=plgpu.Layout.WGMMA.reduce(0))
    member = lax.div(column, attention.share)
    seen = (member >= block.member) & (member <= jnp.where(block.of_prompt, ROWS, block.member))
    largest = largest_of_columns(scores, memory.reduced, interpret)
    highest = jnp.maximum(softmax.highest, jnp.where(seen, largest, LOWEST))
    base = jnp.where(seen, highest, HIGHEST)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(base, scores.shape, [1]))
    store_weights(weights, memory.weights, interpret)
    plgpu.commit_smem()

    _await(memory, values, block, 1, interpret)
    weighted = _product(values.data[0].T, memory.weights.T)
    plgpu.barrier_arrive(values.empty)
    correction = jnp.exp2(softmax.highest - highest)

    def corrected(before):
        return before * lax.broadcast_in_dim(correction, before.shape, [1])

    return Softmax(highest, corrected(softmax.total) + weights, corrected(softmax.values) + weighted)


def _await(memory: AttentionMemory, slots: Slots, block: Block, which: int, interpret: bool) -> None:
    """Wait for a block's keys (0) or values (1), and put the new token's where they belong."""
    plgpu.barrier_wait(slots.full)

    @pl.when(block.used < BLOCK)
    def _():
        new = memory.new.at[which, lax.max(block.member, 0)]
        complete(slots.data[0], new, block.used, block.takes_new, zeros=which == 1, interpret=interpret)
        plgpu.commit_smem()


def _product(left, right):
    """left @ right, float32, of shared memory."""

    def whole(sums):
        plgpu.wgmma(sums, left, right)
        plgpu.wgmma_wait(0)
        return sums[...]

    return pl.run_scoped(whole, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def _store_new(attention: Attention, refs: AttentionRefs, unit: Unit) -> None:
    """Copy new keys and values to the caches, whose blocks have all been read."""
    for member in range(attention.generations):

        @pl.when(member < unit.members)
        def _(member=member):
            row = unit.suffix_row + member * unit.suffix_stride + unit.slot
            for which, cache in enumerate(refs.given.suffix):
                plgpu.copy_smem_to_gmem(refs.memory.new.at[which, pl.ds(member, 1)], cache.at[pl.ds(row, 1)])

    plgpu.wait_smem_to_gmem(0)
