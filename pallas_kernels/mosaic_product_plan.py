"""Who multiplies what in `int4_matmul_mosaic.py`: tiles of the result, and the K of each, shared out among programs.

A tile's K is split evenly, or in two: its own program multiplies most of it, and the last `Int4Config.rest` blocks are left to the programs
that have no tile of their own, several tiles in turn. 28,672 rows of weights are 112 tiles of 256: without the rest, 20 of 132 multiprocessors
would have nothing to do.

Where tiles are a few more than programs, these few are cut into pieces, one for each program beside its own tile: 64 rows of weights by
`Int4Config.cut` rows of x, whose K the warp groups share. 17,920 rows of weights are 140 tiles of 128: without pieces, 8 multiprocessors would
work twice as long as the others.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.codes import PER_BYTE
from pallas_kernels.mosaic_instructions import ROWS

COPIES = 3
"""Of a part of a slot: weights, scales and x."""


class Share(NamedTuple):
    """What a program multiplies: `turns` tiles, every `stride`-th from `tile` on, each from block `first` of K to `last`."""

    tile: Any
    stride: int
    turns: Any
    first: Any
    last: Any
    part: Any
    """Of the partial sums: which they are."""

    def each_tile(self, body: Callable[[Any, Any], None], slots: Any) -> None:
        """Call `body` with each tile, and how many slots of the ring the program used before, of so many a tile."""
        if not self.stride:
            body(self.tile, 0)
        else:
            loop = pl.loop(0, self.turns)
            loop(lambda turn: body(self.tile + turn * self.stride, turn * slots))


class Plan(NamedTuple):
    """What is known of a launch before it runs."""

    config: tuning.Int4Config
    steps: int
    """Blocks of K."""
    group: int
    code: str
    rank: int
    b_stacked: bool
    interpret: bool
    tiles: int = 1
    """Of the result."""
    tiles_m: int = 1
    """Of these, those of the same rows of weights."""
    programs: int = 0
    """That share the tiles, those of one K split; 0: one for each."""
    lent: int = 0
    """Slots of the ring through which a tile's results go to device memory, behind its blocks."""
    left: int = 0
    """Tiles of the result that are cut into pieces, one a program at most."""
    rows: int = 0
    """Of x; 0: whole tiles."""

    @property
    def warpgroups(self) -> int:
        """Those that multiply; one more copies."""
        return self.config.block_n // ROWS

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.config.block_k // self.group

    @property
    def block_bytes(self) -> int:
        """Bytes of a row of a block of weights."""
        return self.config.block_k // PER_BYTE[self.code]

    @property
    def copies(self) -> int:
        """That fill a slot at most: weights, scales and x of each part."""
        return COPIES * (self.warpgroups if self.config.cut else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs, of each K split."""
        return self.programs or self.tiles, self.config.split_k

    def place(self, tile) -> tuple:
        """The first row of x and of weights of a tile; of the same weights, programs side by side read once what the L2 cache keeps."""
        n, m = (lax.div(tile, self.tiles_m), lax.rem(tile, self.tiles_m)) if self.tiles_m > 1 else (tile, 0)
        return m * self.config.block_m, n * self.config.block_n

    @property
    def round(self) -> int:
        """Slots of the ring that are filled and multiplied together: a block, or where there is a piece, one for each warp group, and one of the piece."""
        return self.warpgroups + 1 if self.config.cut else 1

    def rounds(self, share: Share) -> Any:
        """Of a tile."""
        return self.steps // self.warpgroups if self.config.cut else share.last - share.first

    def blocks(self, share: Share) -> Any:
        """Slots of the ring that are filled for a tile."""
        return self.rounds(share) * self.round

    def slots(self, share: Share) -> Any:
        """Of the ring that a tile takes, with those that its results go through."""
        return self.blocks(share) + self.lent

    def steps_of(self, index) -> list:
        """The blocks of K of a round beside a piece."""
        return [index * self.warpgroups + block for block in range(self.warpgroups)]

    def piece(self) -> tuple:
        """The first row of x and of weights of this program's piece of the tiles that are left.

        Where programs are more than pieces, two make the same one, to the bit: cheaper than a second kind of program.
        """
        across = self.config.block_m // self.config.cut
        index = lax.rem(lax.axis_index("program"), jnp.int32(self.left * self.warpgroups * across))
        row_m, row_n = lax.rem(index, across) * self.config.cut, lax.div(index, across) * ROWS
        return row_m, self.tiles * self.config.block_n + row_n

    def split(self, index, splits: int | None = None) -> tuple:
        """The first block of a K split, of the config's or of so many, and the one after its last."""
        # Not `//`: Mosaic's lowering of its signs took a third of a rollout's.
        splits = self.config.split_k if splits is None else splits
        return tuple(lax.div(jnp.int32(end * self.steps), jnp.int32(splits)) for end in (index, index + 1))

    def share(self) -> Share:
        """This program's."""
        index = lax.axis_index("program")
        if not self.config.rest:
            turns = _turns(self.tiles - index, self.programs) if self.programs else 1
            split = lax.axis_index("split")
            return Share(index, self.programs, turns, *self.split(split), split)
        helpers, begun = self.programs - self.tiles, self.steps - self.config.rest
        helps, own = index >= self.tiles, index - self.tiles
        of_helper = (own, _turns(self.tiles - own, helpers), begun, self.steps, 1)
        tile, turns, first, last, part = (
            jnp.where(helps, jnp.int32(theirs), jnp.int32(else_))
            for theirs, else_ in zip(of_helper, (index, 1, 0, begun, 0), strict=True)
        )
        return Share(tile, helpers, turns, first, last, part)


def _turns(left, stride: int) -> Any:
    """Tiles that a program takes, each `stride`-th of those that are left."""
    return lax.div(jnp.int32(left + stride - 1), jnp.int32(stride))


def can_cut(config: tuning.Int4Config, tiles: int, steps: int, programs: int) -> bool:
    """Whether the tiles that are more than programs can be cut as the config says: a piece for a program, for whose warp groups a slot has rows
    enough, and K whole blocks.
    """
    cut, warpgroups = config.cut, config.block_n // ROWS
    if not cut or tiles <= programs or steps % warpgroups or config.block_m % cut or warpgroups * cut > config.block_m:
        return False
    return (tiles - programs) * warpgroups * (config.block_m // cut) <= programs
