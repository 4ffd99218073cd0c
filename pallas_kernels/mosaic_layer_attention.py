"""The attention of one token at the beginning of a decode layer's kernel (`decode_layer_mosaic.py`): its parts, and what the warp groups do.

A program takes a few generations of a question and one kv head, through one list of blocks of 64 slots: those of the prompt, then those
of each generation's suffix, where the rows of the other generations are masked. All programs do equal work, and no softmax is merged
between them. Memory gives a prompt up about once, the L2 cache to the other programs of its question; these start at different places of
their lists, so that reads of both kinds mix.

Keys and values come through the ring that brings the weights, in front of these, and need nothing that this step makes: they are on their
way while the new token's heads are still summed, normed and rotated. New keys and values go to the cache, and into the last block of
a suffix in shared memory. The warp groups that multiply take blocks in turn, each with a softmax of its own (float32, base 2), and one
hands its softmax to the other at the end. The heads of a tile are the first rows of the tensor core's left operand, which has at least 64.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul_mosaic import add_product_of_columns
from pallas_kernels.mosaic_attention_steps import rotate_heads, store_heads
from pallas_kernels.mosaic_instructions import ROWS, tiled
from pallas_kernels.mosaic_ring import Slots

BLOCK = 64
"""Slots of keys, or of values, that a slot of the ring brings."""
IN_FLIGHT = 6
"""Slots of keys and values that are on their way at the same time."""
LOWEST = -1e30
"""Start of the running maximum: below every score, and finite, so that rows that have seen nothing yet make no NaN."""
HIGHEST = 1e30
"""In place of a maximum where a row sees nothing of a block: its weights are then 0."""


class Attention(NamedTuple):
    """What is known of it before a launch."""

    questions: int
    group: int
    """Generations of a question."""
    kv_heads: int
    share: int
    """Query heads of a kv head."""
    depth: int
    prompt_slots: int
    suffix_slots: int
    """Of the caches, used or not."""
    generations: int
    """Of a tile."""
    programs: int
    scale: float

    @property
    def tiles(self) -> int:
        """Of a question and kv head."""
        return math.ceil(self.group / self.generations)

    @property
    def query_rows(self) -> int:
        """Of a tile."""
        return self.generations * self.share

    def units(self, refs: "AttentionRefs", layer) -> "Iterator[Unit]":
        """What this program takes, in turns; the last one has no blocks where nothing is left. Programs of a question are side by side."""
        slot, count = refs.given.slot[0], self.questions * self.kv_heads * self.tiles
        for turn in range(math.ceil(count / self.programs)):
            unit = lax.axis_index("program") + turn * self.programs
            exists = unit < count
            unit = lax.min(unit, count - 1)
            tile, rest = lax.rem(unit, self.tiles), lax.div(unit, self.tiles)
            head, question = lax.rem(rest, self.kv_heads), lax.div(rest, self.kv_heads)
            prompt_length, first = refs.given.prompt_lengths[question], tile * self.generations
            members = lax.min(self.generations, self.group - first)
            prompt_blocks = lax.div(prompt_length + BLOCK - 1, BLOCK)
            suffix_blocks = lax.div(slot, BLOCK) + 1
            blocks = prompt_blocks + members * suffix_blocks
            prompt_row = ((layer * self.questions + question) * self.kv_heads + head) * self.prompt_slots
            generation = question * self.group + first
            of_layer = layer * self.questions * self.group
            suffix_row = ((of_layer + generation) * self.kv_heads + head) * self.suffix_slots
            yield Unit(
                question,
                generation,
                head,
                members,
                jnp.where(exists, blocks, 0),
                prompt_blocks,
                suffix_blocks,
                lax.div(blocks * tile, self.tiles),
                prompt_length,
                slot,
                prompt_row,
                suffix_row,
                self.kv_heads * self.suffix_slots,
            )


class Block(NamedTuple):
    """Slots of keys and values."""

    of_prompt: Any
    member: Any
    """The generation of the tile; -1: the prompt."""
    row: Any
    """Where the slots begin, in the caches as rows of a head's depth."""
    used: Any
    """Slots that the caches hold, BLOCK and more: all."""

    @property
    def takes_new(self) -> Any:
        """Whether the slot behind those in use is the new token's."""
        return ~self.of_prompt & (self.used < BLOCK)


class Unit(NamedTuple):
    """A tile of generations of a question, and a kv head."""

    question: Any
    generation: Any
    """The first one, counted over all questions."""
    head: Any
    members: Any
    """Generations."""
    blocks: Any
    prompt_blocks: Any
    suffix_blocks: Any
    start: Any
    """The block of its list that it begins with."""
    prompt_length: Any
    slot: Any
    prompt_row: Any
    suffix_row: Any
    """Of the first generation, in the caches as rows of a head's depth; the next one's is `suffix_stride` further."""
    suffix_stride: int

    def block(self, index) -> Block:
        """The block that comes at an index."""
        place = self.start + index
        place = jnp.where(place >= self.blocks, place - self.blocks, place)
        of_prompt, behind = place < self.prompt_blocks, place - self.prompt_blocks
        of_suffix = lax.div(behind, self.suffix_blocks)
        member = jnp.where(of_prompt, -1, of_suffix)
        first = BLOCK * jnp.where(of_prompt, place, behind - of_suffix * self.suffix_blocks)
        row = first + jnp.where(of_prompt, self.prompt_row, self.suffix_row + of_suffix * self.suffix_stride)
        return Block(of_prompt, member, row, jnp.where(of_prompt, self.prompt_length, self.slot) - first)


class AttentionMemory(NamedTuple):
    """In shared memory, in place of rows of x, which come later."""

    queries: Any
    new: Any
    """Keys, then values, of each generation."""
    values: Any
    """Weighted, of the softmax that is handed over."""
    stats: Any
    """Its largest score and its sum."""


def attention_memory(attention: Attention, dtype) -> AttentionMemory:
    """The scratch types; eight columns of values more than needed: threads that access them together meet other banks."""
    depth = attention.depth
    return AttentionMemory(
        plgpu.SMEM((ROWS, depth), dtype, transforms=tiled(128, 2)),
        plgpu.SMEM((2, attention.generations, depth), dtype),
        plgpu.SMEM((ROWS, depth + 8), jnp.float32),
        plgpu.SMEM((2, ROWS), jnp.float32),
    )


class Given(NamedTuple):
    """What an attention reads of device memory."""

    qkv: Any
    """Partial sums [S, M, (H + 2 K) Hd]."""
    cos: Any
    sin: Any
    prompt: tuple[Any, Any]
    """Keys and values, as rows of a head's depth."""
    prompt_lengths: Any
    suffix: tuple[Any, Any]
    """The same of the generations, of which the new token's are written."""
    slot: Any
    norms: tuple[Any, Any] | None
    bias: Any


class AttentionRefs(NamedTuple):
    """Arrays in device memory, and what the warp groups share."""

    given: Given
    memory: AttentionMemory
    together: Any
    """Barrier: both warp groups are here."""
    handed: Any
    """Barrier: a softmax is in memory."""


def copy_keys_and_values(
    attention: Attention, refs: AttentionRefs, ring: Slots, copies: int, in_flight: int, layer
) -> Any:
    """Fill the ring's slots with a block's keys, then its values, and so on: how many. `copies` fill a slot.

    At the end, at most `in_flight` of them are still on their way.
    """
    used, size = 0, BLOCK // copies
    for unit in attention.units(refs, layer):

        @pl.loop(0, unit.blocks)
        def _(index, unit=unit, start=used):
            block = unit.block(index)
            for which in range(2):
                place = start + 2 * index + which
                pl.when(place >= IN_FLIGHT)(lambda place=place: ring.await_block(place - IN_FLIGHT))
                slot = ring.claim(place)

                def copy(cache, slot=slot):
                    for part in range(copies):
                        source = cache.at[pl.ds(block.row + part * size, size)]
                        plgpu.copy_gmem_to_smem(source, slot.data[-1].at[pl.ds(part * size, size)], slot.full)

                pl.when(block.of_prompt)(lambda which=which, copy=copy: copy(refs.given.prompt[which]))
                pl.when(~block.of_prompt)(lambda which=which, copy=copy: copy(refs.given.suffix[which]))

        used = used + 2 * unit.blocks
    pl.loop(jnp.maximum(0, used - IN_FLIGHT), jnp.maximum(0, used - in_flight))(ring.await_block)
    return used


def attend(attention: Attention, refs: AttentionRefs, ring: Slots, out, left, threads: int, layer, eps: float, interpret: bool):
    """Leave the heads' outputs in `out` [M, H Hd], with permuted columns, and new keys and values in the cache: how many slots were used."""
    used = 0
    for turn, unit in enumerate(attention.units(refs, layer)):

        @pl.when(unit.blocks > 0)
        def _(unit=unit, used=used, turn=turn):
            if turn:  # the other one has read the memory that follows
                _meet(refs)
            rotate_heads(attention, refs, unit, layer, eps, threads, interpret)
            plgpu.commit_smem()
            _meet(refs)
            softmax = _softmax(attention, refs, ring, unit, left, used)
            _hand_over(attention, refs, softmax, unit, out, interpret)

        used = used + 2 * unit.blocks
    return used


def _meet(refs: AttentionRefs) -> None:
    plgpu.barrier_arrive(refs.together)
    plgpu.barrier_wait(refs.together)


class Softmax(NamedTuple):
    """Of the rows of a tile of queries, in base 2."""

    highest: Any
    total: Any
    values: Any


def _softmax(attention: Attention, refs: AttentionRefs, ring: Slots, unit: Unit, left, used) -> Softmax:
    """Of every other block of the list; the other warp group's are given back when they have come."""
    own = lax.axis_index("warpgroup")

    def give_back(index) -> None:
        for which in range(2):
            slot = ring.at(used + 2 * index + which)
            plgpu.barrier_wait(slot.full)
            plgpu.barrier_arrive(slot.empty)

    def step(turn, softmax: Softmax) -> Softmax:
        pl.when(own == 1)(lambda: give_back(2 * turn))
        softmax = _add_block(attention, refs, ring, unit, left, used, 2 * turn + own, softmax)
        pl.when((own == 0) & (2 * turn + 1 < unit.blocks))(lambda: give_back(2 * turn + 1))
        return softmax

    rows, values = (ROWS,), (ROWS, attention.depth)
    softmax = Softmax(
        plgpu.layout_cast(jnp.full(rows, LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
        plgpu.layout_cast(jnp.full(rows, 0, jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
        plgpu.layout_cast(jnp.full(values, 0, jnp.float32), plgpu.Layout.WGMMA),
    )
    softmax = lax.fori_loop(0, lax.div(unit.blocks + 1 - own, 2), step, softmax)
    pl.when((own == 1) & (lax.rem(unit.blocks, 2) == 1))(lambda: give_back(unit.blocks - 1))
    return softmax


def _add_block(
    attention: Attention, refs: AttentionRefs, ring: Slots, unit: Unit, left, used, index, softmax: Softmax
) -> Softmax:
    """The softmax with one block more."""
    block = unit.block(index)
    keys, values = (ring.at(used + 2 * index + which) for which in range(2))
    plgpu.barrier_wait(keys.full)
    _complete(refs, block, 0, keys.data[-1])
    scores = _product(lambda sums: plgpu.wgmma(sums, refs.memory.queries, keys.data[-1].T), BLOCK)
    plgpu.barrier_arrive(keys.empty)

    # Slots in use, the new one among them; and of a suffix, the rows of its generation.
    visible = block.used + block.takes_new.astype(jnp.int32)
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=plgpu.Layout.WGMMA)
    scores = jnp.where(column < visible, scores, -jnp.inf)
    member = lax.div(_iota(1), attention.share)
    seen = (member >= block.member) & (member <= jnp.where(block.of_prompt, ROWS, block.member))
    scale = attention.scale * math.log2(math.e)
    highest = jnp.maximum(softmax.highest, jnp.where(seen, scores.max(axis=1) * scale, LOWEST))
    base = jnp.where(seen, highest, HIGHEST)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(base, scores.shape, [0]))
    correction = jnp.exp2(softmax.highest - highest)
    total = softmax.total * correction + weights.sum(axis=1)

    plgpu.barrier_wait(values.full)
    _complete(refs, block, 1, values.data[-1])
    weights = weights.astype(values.data[-1].dtype)
    weighted = _product(lambda sums: add_product_of_columns(left, sums, weights, values.data[-1]), attention.depth)
    plgpu.barrier_arrive(values.empty)
    before = softmax.values * lax.broadcast_in_dim(correction, softmax.values.shape, [0])
    return Softmax(highest, total, before + weighted)


def _iota(reduced: int):
    """Of rows (1) or of columns (0) of what the tensor core reads and leaves: int32 [64]."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(reduced))


def _product(multiply, columns: int):
    """What `multiply` adds to sums [64, columns] that are 0."""

    def whole(sums):
        multiply(sums)
        plgpu.wgmma_wait(0)
        return sums[...]

    return pl.run_scoped(whole, plgpu.ACC((ROWS, columns), jnp.float32))


def _complete(refs: AttentionRefs, block: Block, which: int, slots) -> None:
    """Put the new token's keys (0) or values (1) behind the slots in use, and zeros behind these: whatever lies there may be NaN."""

    @pl.when(block.used < BLOCK)
    def _():
        row, given = _iota(1), plgpu.load(slots, layout=plgpu.Layout.WGMMA)
        place = refs.memory.new.at[which, lax.max(block.member, 0)]
        new = plgpu.load(place, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

        def rows(vector):
            return lax.broadcast_in_dim(vector, given.shape, [0])

        is_new = rows(row == jnp.where(block.takes_new, block.used, -1))
        behind = jnp.where(is_new, lax.broadcast_in_dim(new, given.shape, [1]), jnp.zeros_like(given))
        slots[...] = jnp.where(rows(row < block.used), given, behind)
        plgpu.commit_smem()


def _hand_over(attention: Attention, refs: AttentionRefs, softmax: Softmax, unit: Unit, out, interpret: bool) -> None:
    """The last warp group hands its softmax to the first one, which stores the outputs of both."""
    own, memory = lax.axis_index("warpgroup"), refs.memory
    values = memory.values.at[:, pl.ds(0, attention.depth)]

    @pl.when(own == 1)
    def _():
        values[...] = softmax.values
        for index, vector in enumerate(softmax[:2]):
            memory.stats.at[index][...] = vector
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.handed)
        _store_new(attention, refs, unit)

    @pl.when(own == 0)
    def _():
        plgpu.barrier_wait(refs.handed)
        highest, total = (
            plgpu.load(memory.stats.at[i], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) for i in range(2)
        )
        top = jnp.maximum(softmax.highest, highest)
        factors = [jnp.exp2(each - top) for each in (softmax.highest, highest)]
        inverse = 1 / (softmax.total * factors[0] + total * factors[1])
        both = (softmax.values, plgpu.load(values, layout=plgpu.Layout.WGMMA, optimized=False))
        of_each = [
            lax.broadcast_in_dim(factor * inverse, value.shape, [0]) * value
            for factor, value in zip(factors, both, strict=True)
        ]
        store_heads(attention, of_each[0] + of_each[1], unit, out, interpret)


def _store_new(attention: Attention, refs: AttentionRefs, unit: Unit) -> None:
    """Copy new keys and values to the caches, whose blocks have all been read."""
    for member in range(attention.generations):

        @pl.when(member < unit.members)
        def _(member=member):
            row = unit.suffix_row + member * unit.suffix_stride + unit.slot
            for which, cache in enumerate(refs.given.suffix):
                plgpu.copy_smem_to_gmem(refs.memory.new.at[which, pl.ds(member, 1)], cache.at[pl.ds(row, 1)])

    plgpu.wait_smem_to_gmem(0)


def tile_of_generations(questions: int, group: int, kv_heads: int, share: int, programs: int) -> int:
    """As few generations as leave no more tiles than programs, but no more than a tile has rows for."""
    most = max(1, min(group, ROWS // share))
    fitting = (n for n in range(1, most) if questions * kv_heads * math.ceil(group / n) <= programs)
    return next(fitting, most)

