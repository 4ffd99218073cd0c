"""What an attention in the decode layers' kernel has: its shape, a program's blocks, its memory; `mosaic_layer_attention.py` has what it does."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_instructions import tiled
from pallas_kernels.mosaic_ring import Slots

BLOCK = 64
"""Slots of keys, or of values, that a slot of the ring brings."""


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
    def queries(self) -> int:
        """Query heads of a tile."""
        return self.generations * self.share

    @property
    def columns(self) -> int:
        """Of the tensor core's right operand, which has them by eights."""
        return 8 * math.ceil(self.queries / 8)

    @property
    def turns(self) -> int:
        """Units that a program takes at most."""
        return math.ceil(self.questions * self.kv_heads * self.tiles / self.programs)

    def units(self, refs: "AttentionRefs", program, layer) -> "Iterator[Unit]":
        """What a program takes, in turns; the last one has no blocks where nothing is left. Programs of a question are side by side."""
        slot, count = refs.given.slot[0], self.questions * self.kv_heads * self.tiles
        for turn in range(self.turns):
            unit = program + turn * self.programs
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

    @property
    def slots(self) -> Any:
        """Of the ring: for keys and for values of every block."""
        return 2 * self.blocks

    def blocks_of(self, warpgroup) -> Any:
        """Every other one of the list."""
        return lax.div(self.blocks + 1 - warpgroup, 2)

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
    """In shared memory, beside the ring."""

    queries: Any
    new: Any
    """Keys, then values, of each generation."""
    weights: Any
    """Of a warp group's block, as rows of heads."""
    reduced: Any
    """A warp's part of a reduction."""
    values: Any
    """Weighted, of a warp group's softmax."""
    stats: Any
    """Its largest scores and its sums."""

    def of(self, warpgroup) -> "AttentionMemory":
        """What is a warp group's own, and what all share."""
        own = (ref.at[warpgroup] for ref in self[2:])
        return AttentionMemory(*self[:2], *own)


def attention_memory(attention: Attention, warpgroups: int, dtype) -> AttentionMemory:
    """The scratch types; four columns of values more than needed: threads that store them together meet other banks."""
    depth, columns = attention.depth, attention.columns
    return AttentionMemory(
        plgpu.SMEM((columns, depth), dtype, transforms=tiled(128, 2)),
        plgpu.SMEM((2, attention.generations, depth), dtype),
        plgpu.SMEM((warpgroups, columns, BLOCK), dtype, transforms=tiled(128, 2)),
        plgpu.SMEM((warpgroups, 4, columns), jnp.float32),
        plgpu.SMEM((warpgroups, columns, depth + 4), jnp.float32),
        plgpu.SMEM((warpgroups, 2, columns), jnp.float32),
    )


def memory_bytes(memory: Any) -> int:
    """Of scratch types, each of which begins at a multiple of 1024."""
    sizes = (math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for t in jax.tree.leaves(memory))
    return sum(1024 * math.ceil(size / 1024) for size in sizes)


class Given(NamedTuple):
    """What an attention reads of device memory."""

    qkv: Any
    """Partial sums [S, M, (H + 2 K) Hd] (`mosaic_partial_sums.py`)."""
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
    """That of the products' weights, of which a block of keys and one of values have a slot each."""
    memory: AttentionMemory
    together: Any
    """Barrier of the interpreter: all warp groups that multiply are here; None on a GPU, which has an instruction for it."""
