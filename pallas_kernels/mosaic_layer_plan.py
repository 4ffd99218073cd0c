"""What the warp groups of a decode layer's kernel share: its products and their units, and the slots that bring blocks; `mosaic_layer_roles.py` has what they do."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul_mosaic import Plan
from pallas_kernels.mosaic_attention_plan import Attention, AttentionRefs, key_stages
from pallas_kernels.mosaic_ring import Slots
from pallas_kernels.tuning import LAYER_X_STAGES


class Cut(NamedTuple):
    """Tiles of gate and up that whole turns leave, with their K cut into pieces, which as many programs multiply before their own tiles.

    Programs that have no piece add them up at the end.
    """

    first: int
    """Of the tiles."""
    tiles: int
    parts: int
    """Pieces of each."""

    @property
    def pieces(self) -> int:
        """Of all tiles; the first programs have one each."""
        return self.tiles * self.parts


class Product(NamedTuple):
    """One of the layer's products."""

    plan: Plan
    tiles: int
    """Of rows of weights."""
    gated: bool = False
    """Gate and up, whose sums are needed whole."""

    @property
    def units(self) -> int:
        """Tiles times splits of K: what a program takes one of, or several in turn."""
        return self.tiles * self.plan.config.split_k

    def cut(self, programs: int) -> Cut | None:
        """Of gate and up, where the tiles that whole turns leave are so few that at least one program of eight has no piece of them."""
        turns, left = divmod(self.tiles, programs)
        if not self.gated or not left:
            return None
        parts = min(self.plan.steps, (programs - max(1, programs // 8)) // left)
        return Cut(turns * programs, left, parts) if parts > 1 else None


class Layer(NamedTuple):
    """What is known of a launch before it runs."""

    products: tuple[Product, ...]
    """out, gate_up, down, and qkv of the next layer where there is one."""
    attention: Attention | None
    """What comes before out; None: nothing does."""
    programs: int
    rows: int
    eps: float
    activation: str
    interpret: bool

    @property
    def warpgroups(self) -> int:
        """Those that multiply; two more copy."""
        return self.products[0].plan.warpgroups

    @property
    def cut(self) -> Cut | None:
        """Of gate and up."""
        return self.products[1].cut(self.programs)

    @property
    def key_stages(self) -> int:
        """Slots for keys and values, in place of those for weights and x."""
        config = self.products[0].plan.config
        rows = 2 * LAYER_X_STAGES * config.block_m * config.block_k
        weights = config.stages * config.block_n * config.block_k
        return key_stages(self.attention, self.warpgroups, weights + rows)

    def units(self, product: Product) -> "Iterator[Unit]":
        """What a program multiplies of a product, in turns: first its piece; the first and the last have no blocks where nothing is left."""
        program, cut = lax.axis_index("program"), product.cut(self.programs)
        if cut:
            tile, part = lax.rem(program, cut.tiles), lax.div(program, cut.tiles)
            first, last = product.plan.split(part, cut.parts)
            last = jnp.where(program < cut.pieces, last, first)
            yield Unit((cut.first + tile) * self.warpgroups, part, first, last, piece=True)
        for turn in range(math.ceil((cut.first if cut else product.units) / self.programs)):
            unit = program + turn * self.programs
            tile, split = lax.rem(unit, product.tiles), lax.div(unit, product.tiles)
            first, last = product.plan.split(split)
            yield Unit(tile * self.warpgroups, split, first, jnp.where(unit < product.units, last, first))


class Unit(NamedTuple):
    """A tile of a product's weights, and the blocks of K from `first` to before `last`."""

    tile: Any
    """The first of its tiles of `ROWS` rows, one a warp group."""
    split: Any
    first: Any
    last: Any
    piece: bool = False
    """Of a tile that is cut."""


class Operands(NamedTuple):
    """A product's arrays in device memory."""

    x: Any
    packed: Any
    scales: Any
    out: Any


class Pieces(NamedTuple):
    """Sums of the tiles that are cut."""

    sums: Any
    """[parts, M, N] in device memory."""
    counter: Any
    """Of pieces that are stored, by each warp group, of all layers of the chain."""
    all_stored: Any
    """Barrier of the interpreter in its place; None on a GPU."""


class Refs(NamedTuple):
    """Arrays in device memory, and what the warp groups of a program share."""

    operands: tuple[Operands, ...]
    residual: Any
    norms: tuple[Any, Any]
    number: Any
    """Of the layer, in the chain and in the stacks of norms."""
    counter: Any
    """Of programs that came to a meeting, of all layers of the chain."""
    residual_out: Any
    rows_out: tuple[Any, Any]
    weights: Slots
    """Bytes and scales."""
    x: Slots
    left: Any
    """Of the interpreter: where a warp group puts its left operand; None on a GPU."""
    pieces: Pieces | None
    """None: no tile is cut."""
    stored: Any
    """Barrier: all warp groups have stored what a step leaves."""
    met: Any
    """Barrier: what all programs stored before may be read."""
    squares: Any
    """A warp's part of a row's sum of squares."""
    all_here: Any
    """Barrier of the interpreter, whose programs are one cluster; None on a GPU, where they meet at the counter."""
    attention: AttentionRefs | None
    """None: the launch has none."""
