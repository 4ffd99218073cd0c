"""What the warp groups of a decode layer's kernel share: its products and their units, and the slots that bring blocks; `mosaic_layer_roles.py` has what they do."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul_mosaic import Plan
from pallas_kernels.mosaic_instructions import ROWS
from pallas_kernels.mosaic_layer_attention import Attention, AttentionRefs, key_stages
from pallas_kernels.mosaic_ring import Slots
from pallas_kernels.tuning import LAYER_X_STAGES


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

    def halves(self, programs: int) -> int:
        """Half tiles that the last turn of gate and up has, if halves of the tiles that are left are enough for the programs; else 0.

        A turn of them takes half a turn of tiles: both warp groups multiply the same 64 rows of weights, each by every other block of K.
        """
        left = self.tiles % programs
        return 2 * left if self.gated and 2 * left <= programs and self.plan.steps % 2 == 0 else 0


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
    def has_halves(self) -> bool:
        """Whether a product has half tiles, whose sums a warp group hands to the other."""
        return any(product.halves(self.programs) for product in self.products)

    @property
    def stages(self) -> int:
        """Slots for weights; one fewer where sums that are handed over take its room."""
        return self.products[0].plan.config.stages - self.has_halves

    @property
    def key_stages(self) -> int:
        """Slots for keys and values, in place of those for weights and x."""
        config = self.products[0].plan.config
        sums = 4 * ROWS * (config.block_m + 8) if self.has_halves else 0
        rows = 2 * LAYER_X_STAGES * config.block_m * config.block_k
        return key_stages(self.attention, self.warpgroups, self.stages * config.block_n * config.block_k + sums + rows)

    @property
    def weight_copies(self) -> int:
        """That fill a slot of weights: its bytes and its scales, each warp group's apart where half tiles bring them two blocks."""
        return 2 * (self.warpgroups if self.has_halves else 1)

    def units(self, product: Product) -> "Iterator[Unit]":
        """What a program multiplies of a product, in turns; the last one has no blocks where nothing is left."""
        program, halves = lax.axis_index("program"), product.halves(self.programs)
        turns = product.tiles // self.programs if halves else math.ceil(product.units / self.programs)
        for turn in range(turns):
            unit = program + turn * self.programs
            tile, split = lax.rem(unit, product.tiles), lax.div(unit, product.tiles)
            first, last = product.plan.split(split)
            yield Unit(tile * self.warpgroups, split, first, jnp.where(unit < product.units, last, first))
        if halves:
            steps = jnp.where(program < halves, product.plan.steps, 0)
            yield Unit(turns * self.programs * self.warpgroups + program, 0, 0, steps, half=True)


class Unit(NamedTuple):
    """A tile of a product's weights, or half of one, and the blocks of K from `first` to before `last`."""

    tile: Any
    """The first of its tiles of `ROWS` rows, one a warp group."""
    split: Any
    first: Any
    last: Any
    half: bool = False
    """It has `ROWS` rows, and a slot of the ring of weights two blocks of them."""

    @property
    def slots(self) -> Any:
        """Of weights, that it fills."""
        count = self.last - self.first
        return lax.div(count, 2) if self.half else count


class Operands(NamedTuple):
    """A product's arrays in device memory."""

    x: Any
    packed: Any
    scales: Any
    out: Any


class Handed(NamedTuple):
    """Sums in shared memory that one warp group hands to the other, and the barrier that says so."""

    sums: Any
    ready: Any


class Refs(NamedTuple):
    """Arrays in device memory, and what the warp groups of a program share."""

    operands: tuple[Operands, ...]
    residual: Any
    norms: tuple[Any, Any]
    number: Any
    """Of the layer, in the chain and in the stacks of norms."""
    counter: Any
    residual_out: Any
    rows_out: tuple[Any, Any]
    weights: Slots
    """Bytes and scales."""
    x: Slots
    left: Any
    """Of the interpreter: where a warp group puts its left operand; None on a GPU."""
    handed: Handed | None
    """None: no product has half tiles."""
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


class Blocks(NamedTuple):
    """Numbers of slots of either ring: how many were used before, or the next ones."""

    weights: Any
    x: Any
