"""The attention of one token at the beginning of a decode layer's kernel (`decode_layer_mosaic.py`): what the warp groups do.

A program takes a few generations of a question and one kv head, through one list of blocks of 64 slots: those of the prompt, then those
of each generation's suffix, where the heads of the other generations are masked. All programs do equal work, and no softmax is merged
between them. Memory gives a prompt up about once, the L2 cache to the other programs of its question; these start at different places of
their lists, so that reads of both kinds mix.

Keys and values come through a ring of their own, in place of the rings of the products, and need nothing that this step makes: they are on
their way while the new token's heads are still summed, normed and rotated. New keys and values go to the cache, and into the last block of
a suffix in shared memory. The warp groups that multiply take blocks in turn, each with a softmax of its own (float32, base 2), and merge
them at the end. Slots are the rows of the tensor core's left operand, which has no fewer than 64, and query heads the columns of the right one.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
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
from pallas_kernels.mosaic_instructions import ROWS
from pallas_kernels.mosaic_ring import Slots

PIECES = 4
"""In which a block is copied, so that of the last one of a list little is copied that is not in use."""
LOWEST = -1e30
"""Start of the running maximum: below every score, and finite, so that heads that have seen nothing yet make no NaN."""
HIGHEST = 1e30
"""In place of a maximum where a head sees nothing of a block: its weights are then 0."""


def copy_keys_and_values(attention: Attention, refs: AttentionRefs, layer, interpret: bool) -> None:
    """Keep the rings filled with a block's keys, then its values, and so on; then wait until their memory is free."""
    used = (0, 0)
    for unit in attention.units(refs, layer):

        @pl.loop(0, unit.blocks)
        def _(index, unit=unit, used=used):
            block, warpgroup = unit.block(index), lax.rem(index, 2)
            ring = refs.ring.part(warpgroup, 2)
            first = jnp.where(warpgroup == 0, *used) + index - warpgroup
            for which in range(2):
                slot = ring.claim(first + which)
                for piece in range(PIECES):
                    _copy_piece(refs, block, which, slot, piece)

        used = tuple(before + 2 * unit.blocks_of(warpgroup) for warpgroup, before in enumerate(used))
    if interpret:
        for warpgroup, count in enumerate(used):
            refs.ring.part(warpgroup, 2).drain(count)
    plgpu.barrier_wait(refs.attended)


def _copy_piece(refs: AttentionRefs, block: Block, which: int, slot: Slots, piece: int) -> None:
    """Copy a piece of a block's keys (0) or values (1); of one that is not in use, only say that it is there."""
    size = BLOCK // PIECES
    first, in_use = size * piece, block.used > size * piece

    def copy(cache) -> None:
        plgpu.copy_gmem_to_smem(
            cache.at[pl.ds(block.row + first, size)], slot.data[0].at[pl.ds(first, size)], slot.full
        )

    pl.when(in_use & block.of_prompt)(lambda: copy(refs.given.prompt[which]))
    pl.when(in_use & ~block.of_prompt)(lambda: copy(refs.given.suffix[which]))
    pl.when(~in_use)(lambda: plgpu.barrier_arrive(slot.full))


def attend(attention: Attention, refs: AttentionRefs, out, *, threads: int, layer, eps: float, interpret: bool) -> None:
    """Leave the heads' outputs in `out` [M, H Hd], with permuted columns, and new keys and values in the cache."""
    warpgroup, used = lax.axis_index("warpgroup"), 0
    own, ring = refs.memory.of(warpgroup), refs.ring.part(warpgroup, 2)
    for turn, unit in enumerate(attention.units(refs, layer)):

        @pl.when(unit.blocks > 0)
        def _(unit=unit, used=used, turn=turn):
            rotate_heads(attention, refs, unit, layer, eps, threads, interpret)
            plgpu.commit_smem()
            _meet(refs)
            softmax = _softmax(attention, own, ring, unit, used, interpret)
            if turn == attention.turns - 1:
                plgpu.barrier_arrive(refs.attended)
            total = sum_of_columns(softmax.total, own.reduced, interpret)
            leave_softmax(softmax.values, softmax.highest, total, own, interpret)
            _meet(refs)
            store_heads(attention, refs.memory, unit, out, threads, interpret)
            pl.when(warpgroup == 1)(lambda: _store_new(attention, refs, unit))
            if attention.turns > 1:  # the others have read the memory that follows
                _meet(refs)

        if turn == attention.turns - 1:
            pl.when(unit.blocks == 0)(lambda: plgpu.barrier_arrive(refs.attended))
        used = used + 2 * unit.blocks_of(warpgroup)


def _meet(refs: AttentionRefs) -> None:
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

    def step(turn, softmax: Softmax) -> Softmax:
        slots = (ring.at(used + 2 * turn + which) for which in range(2))
        return _add_block(attention, memory, *slots, unit.block(2 * turn + own), softmax, interpret)

    softmax = Softmax(
        filled(LOWEST, (columns,), plgpu.Layout.WGMMA.reduce(0)),
        filled(0, (BLOCK, columns), plgpu.Layout.WGMMA),
        filled(0, (attention.depth, columns), plgpu.Layout.WGMMA),
    )
    return lax.fori_loop(0, unit.blocks_of(own), step, softmax)


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
