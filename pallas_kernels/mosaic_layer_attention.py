"""The attention of one token at the beginning of a decode layer's kernel (`decode_layer_mosaic.py`): its parts, and what the warp groups do.

A program takes a few generations of a question and one kv head, through one list of blocks of 64 slots: those of the prompt, then those
of each generation's suffix, where the rows of the other generations are masked. All programs do equal work, and no softmax is merged
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
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_attention_steps import (
    complete,
    largest_of_columns,
    leave_softmax,
    rotate_heads,
    store_heads,
    store_weights,
    sum_of_columns,
)
from pallas_kernels.mosaic_instructions import ROWS, tiled
from pallas_kernels.mosaic_ring import Slots

BLOCK = 64
"""Slots of keys, or of values, that a slot of the ring brings."""
MOST_QUERIES = 32
"""Query heads of a tile."""
AT_ONCE = 2
"""Blocks that a warp group multiplies between two exchanges of its warps."""
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
        """Query heads of a tile."""
        return self.generations * self.share

    @property
    def columns(self) -> int:
        """Of the tensor core's right operand, which has them by eights."""
        return 8 * math.ceil(self.query_rows / 8)

    @property
    def turns(self) -> int:
        """Units that a program takes at most."""
        return math.ceil(self.questions * self.kv_heads * self.tiles / self.programs)

    def units(self, refs: "AttentionRefs", layer) -> "Iterator[Unit]":
        """What this program takes, in turns; the last one has no blocks where nothing is left. Programs of a question are side by side."""
        slot, count = refs.given.slot[0], self.questions * self.kv_heads * self.tiles
        for turn in range(self.turns):
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
                self.generations,
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
    """Generations, of which a whole tile has `generations`."""
    generations: int
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
        # Compared with each generation's end: a division would be waited for longer.
        ends = (behind >= end * self.suffix_blocks for end in range(1, self.generations))
        of_suffix = sum((passed.astype(jnp.int32) for passed in ends), jnp.int32(0))
        member = jnp.where(of_prompt, -1, of_suffix)
        first = BLOCK * jnp.where(of_prompt, place, behind - of_suffix * self.suffix_blocks)
        row = first + jnp.where(of_prompt, self.prompt_row, self.suffix_row + of_suffix * self.suffix_stride)
        return Block(of_prompt, member, row, jnp.where(of_prompt, self.prompt_length, self.slot) - first)


class AttentionMemory(NamedTuple):
    """In shared memory."""

    ring: Any
    """Of keys and values."""
    queries: Any
    new: Any
    """Keys, then values, of each generation."""
    weights: Any
    """Of a warp group's blocks, as rows of heads."""
    reduced: Any
    """A warp's part of a reduction."""
    values: Any
    """Weighted, of a warp group's softmax."""
    stats: Any
    """Its largest scores and its sums."""

    def of(self, warpgroup) -> "AttentionMemory":
        """What is a warp group's own, and what all share."""
        own = (ref.at[warpgroup] for ref in self[3:])
        return AttentionMemory(*self[:3], *own)


def attention_memory(attention: Attention, warpgroups: int, stages: int, dtype) -> AttentionMemory:
    """The scratch types; four columns of values more than needed: threads that store them together meet other banks."""
    depth, columns = attention.depth, attention.columns
    return AttentionMemory(
        plgpu.SMEM((stages, BLOCK, depth), dtype, transforms=tiled(128, 2)),
        plgpu.SMEM((columns, depth), dtype, transforms=tiled(128, 2)),
        plgpu.SMEM((2, attention.generations, depth), dtype),
        plgpu.SMEM((warpgroups, AT_ONCE, columns, BLOCK), dtype, transforms=tiled(128, 2)),
        plgpu.SMEM((warpgroups, AT_ONCE, 4, columns), jnp.float32),
        plgpu.SMEM((warpgroups, columns, depth + 4), jnp.float32),
        plgpu.SMEM((warpgroups, 2, columns), jnp.float32),
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
    ring: Slots
    """Of keys and values, a block's in two slots that follow each other."""
    memory: AttentionMemory
    together: Any
    """Barrier: all warp groups that multiply are here."""
    attended: Any
    """Barrier: all that the ring brought is read."""


def key_stages(attention: Attention, warpgroups: int, room: int) -> int:
    """Slots of keys and values that so many bytes have room for beside the rest of the memory; each array begins at a multiple of 1024."""
    types = attention_memory(attention, warpgroups, 1, jnp.bfloat16)
    sizes = [math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for t in types]
    slot, *others = (1024 * math.ceil(size / 1024) for size in sizes)
    return (room - sum(others)) // slot


def copy_keys_and_values(attention: Attention, refs: AttentionRefs, layer, interpret: bool) -> None:
    """Keep the ring filled with a block's keys, then its values, and so on; then wait until its memory is free."""
    used = 0
    for unit in attention.units(refs, layer):

        @pl.loop(0, unit.blocks)
        def _(index, unit=unit, start=used):
            block, first = unit.block(index), start + 2 * index
            for which in range(2):
                slot = refs.ring.claim(first + which)

                def copy(cache, slot=slot):
                    plgpu.copy_gmem_to_smem(cache.at[pl.ds(block.row, BLOCK)], slot.data[0], slot.full)

                pl.when(block.of_prompt)(lambda which=which, copy=copy: copy(refs.given.prompt[which]))
                pl.when(~block.of_prompt)(lambda which=which, copy=copy: copy(refs.given.suffix[which]))

        used = used + 2 * unit.blocks
    if interpret:
        refs.ring.drain(used)
    plgpu.barrier_wait(refs.attended)


def attend(
    attention: Attention, refs: AttentionRefs, out, *, threads: int, layer, eps: float, interpret: bool
) -> None:
    """Leave the heads' outputs in `out` [M, H Hd], with permuted columns, and new keys and values in the cache."""
    used, own = 0, refs.memory.of(lax.axis_index("warpgroup"))
    for turn, unit in enumerate(attention.units(refs, layer)):

        @pl.when(unit.blocks > 0)
        def _(unit=unit, used=used, turn=turn):
            rotate_heads(attention, refs, unit, layer, eps, threads, interpret)
            plgpu.commit_smem()
            _meet(refs)
            softmax = _softmax(attention, own, refs.ring, unit, used, interpret)
            if turn == attention.turns - 1:
                plgpu.barrier_arrive(refs.attended)
            (total,) = sum_of_columns([softmax.total], own.reduced, interpret)
            leave_softmax(softmax.values, softmax.highest, total, own, interpret)
            _meet(refs)
            store_heads(attention, refs.memory, unit, out, threads, interpret)
            pl.when(lax.axis_index("warpgroup") == 1)(lambda: _store_new(attention, refs, unit))
            if attention.turns > 1:  # the others have read the memory that follows
                _meet(refs)

        if turn == attention.turns - 1:
            pl.when(unit.blocks == 0)(lambda: plgpu.barrier_arrive(refs.attended))
        used = used + 2 * unit.blocks


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
    """Of every other block of the list, `AT_ONCE` a step; the other warp group's are given back when they have come."""
    own, columns = lax.axis_index("warpgroup"), attention.columns

    def slots_of(index) -> list[Slots]:
        return [ring.at(used + 2 * index + which) for which in range(2)]

    def give_back(index) -> None:
        @pl.when(index < unit.blocks)
        def _():
            for slot in slots_of(index):
                plgpu.barrier_wait(slot.full)
                plgpu.barrier_arrive(slot.empty)

    def step(turn, softmax: Softmax) -> Softmax:
        first = 2 * AT_ONCE * turn
        given, last = [], unit.blocks - 1 - lax.rem(unit.blocks - 1 + own, 2)
        for index in (first + own + 2 * i for i in range(AT_ONCE)):
            # One that does not exist is the last one, of which nothing is seen a second time.
            block, exists = unit.block(lax.min(index, last)), index <= last
            given.append((*slots_of(lax.min(index, last)), block, exists))
        softmax = _add_blocks(attention, memory, given, softmax, interpret)
        for i in range(AT_ONCE):
            give_back(first + 2 * i + 1 - own)
        return softmax

    def filled(value, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    softmax = Softmax(
        filled(LOWEST, (columns,), plgpu.Layout.WGMMA.reduce(0)),
        filled(0, (BLOCK, columns), plgpu.Layout.WGMMA),
        filled(0, (attention.depth, columns), plgpu.Layout.WGMMA),
    )
    blocks = lax.div(unit.blocks + 1 - own, 2)
    turns = lax.div(blocks + AT_ONCE - 1, AT_ONCE)
    softmax = lax.fori_loop(0, turns, step, softmax)
    # The other one may have begun a step more.
    for i in range(AT_ONCE):
        pl.when(own == 1)(lambda i=i: give_back(2 * AT_ONCE * turns + 2 * i))
    return softmax


def _add_blocks(
    attention: Attention,
    memory: AttentionMemory,
    given: list[tuple[Slots, Slots, Block, Any]],
    softmax: Softmax,
    interpret: bool,
) -> Softmax:
    """The softmax with some blocks more: (slots of keys and of values, block, whether it exists)."""
    columns, scale = attention.columns, attention.scale * math.log2(math.e)
    for keys, _, block, exists in given:
        _await(memory, keys, block, 0, exists, interpret)
    scores = _products([(keys.data[0], memory.queries.T) for keys, *_ in given])
    for keys, _, _, exists in given:
        pl.when(exists)(lambda keys=keys: plgpu.barrier_arrive(keys.empty))

    # Slots in use, the new one among them; and of a suffix, the columns of its generation.
    slot = plgpu.broadcasted_iota(jnp.int32, (BLOCK, columns), 0, layout=plgpu.Layout.WGMMA)
    member = lax.div(
        plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=plgpu.Layout.WGMMA.reduce(0)), attention.share
    )
    for i, (_, _, block, exists) in enumerate(given):
        visible = jnp.where(exists, block.used + block.takes_new.astype(jnp.int32), 0)
        scores[i] = jnp.where(slot < visible, scores[i] * scale, -jnp.inf)
    largest = largest_of_columns(scores, memory.reduced, interpret)
    seen = [(member >= b.member) & (member <= jnp.where(b.of_prompt, ROWS, b.member)) for _, _, b, _ in given]
    highest = softmax.highest
    for of_block, each in zip(seen, largest, strict=True):
        highest = jnp.maximum(highest, jnp.where(of_block, each, LOWEST))
    correction = jnp.exp2(softmax.highest - highest)
    total = softmax.total * lax.broadcast_in_dim(correction, softmax.total.shape, [1])
    for i, of_block in enumerate(seen):
        base = jnp.where(of_block, highest, HIGHEST)
        weights = jnp.exp2(scores[i] - lax.broadcast_in_dim(base, scores[i].shape, [1]))
        store_weights(weights, memory.weights.at[i], interpret)
        total = total + weights
    plgpu.commit_smem()

    for _, values, block, exists in given:
        _await(memory, values, block, 1, exists, interpret)
    (weighted,) = _products(
        *[[(values.data[0].T, memory.weights.at[i].T)] for i, (_, values, *_) in enumerate(given)]
    )
    for _, values, _, exists in given:
        pl.when(exists)(lambda values=values: plgpu.barrier_arrive(values.empty))
    before = softmax.values * lax.broadcast_in_dim(correction, softmax.values.shape, [1])
    return Softmax(highest, total, before + weighted)


def _await(memory: AttentionMemory, slots: Slots, block: Block, which: int, exists, interpret: bool) -> None:
    """Wait for a block's keys (0) or values (1), if it exists, and put the new token's where they belong."""
    pl.when(exists)(lambda: plgpu.barrier_wait(slots.full))

    @pl.when(exists & (block.used < BLOCK))
    def _():
        new = memory.new.at[which, lax.max(block.member, 0)]
        complete(slots.data[0], new, block.used, block.takes_new, zeros=which == 1, interpret=interpret)
        plgpu.commit_smem()


def _products(*terms: list[tuple[Any, Any]]) -> list:
    """Sums of products left @ right of shared memory, float32: one of each place of the `terms`."""
    shapes = [(left.shape[0], right.shape[1]) for left, right in terms[0]]

    def whole(*sums):
        for pairs in terms:
            for each, (left, right) in zip(sums, pairs, strict=True):
                plgpu.wgmma(each, left, right)
        plgpu.wgmma_wait(0)
        return [each[...] for each in sums]

    return list(pl.run_scoped(whole, *[plgpu.ACC(shape, jnp.float32) for shape in shapes]))


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
    most = max(1, min(group, MOST_QUERIES // share))
    fitting = (n for n in range(1, most) if questions * kv_heads * math.ceil(group / n) <= programs)
    return next(fitting, most)

