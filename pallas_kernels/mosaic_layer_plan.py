"""What the warp groups of the decode layers' kernel share: its products and their units, and the slots that bring blocks; `mosaic_layer_roles.py` has what they do."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_attention_plan import Attention, AttentionRefs, attention_memory, memory_bytes
from pallas_kernels.mosaic_instructions import program_index
from pallas_kernels.mosaic_product_plan import Plan
from pallas_kernels.mosaic_ring import Slots
from pallas_kernels.tuning import layer_room


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


ATTENTION = "attention"
ALL = ("qkv", ATTENTION, "out", "gate_up", "down")
"""Steps of a launch of all layers; the others are names of products."""
FIRST, ONE = ("qkv",), ("out", "gate_up", "down", "qkv")
"""Those of launches with attentions apart: of what precedes the first attention, and what follows one. The last has no qkv, others the next layer's."""


class Product(NamedTuple):
    """One of the layer's products."""

    plan: Plan
    tiles: int
    """Of rows of weights."""
    gated: bool = False
    """Gate and up, whose sums are needed whole."""
    ahead: int = 0
    """Layers between the launch's and the one whose weights it has."""

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

    steps: tuple[str, ...]
    """`ALL`, `FIRST` or `ONE`, with or without its qkv."""
    products: dict[str, Product]
    attention: Attention | None
    """None: it is not one of the steps."""
    count: int
    """Layers, one after another."""
    programs: int
    rows: int
    eps: float
    activation: str
    interpret: bool
    program: Any = None
    """This program's index, once the kernel runs."""

    @property
    def warpgroups(self) -> int:
        """Those that multiply; two more copy."""
        return self.plan.warpgroups

    @property
    def plan(self) -> Plan:
        """Of a product; what warp groups and rings are made from is the same in all."""
        return next(iter(self.products.values())).plan

    @property
    def cut(self) -> Cut | None:
        """Of gate and up."""
        return self.products["gate_up"].cut(self.programs) if "gate_up" in self.products else None

    @property
    def stages(self) -> int:
        """Slots of the ring, as many as fit beside what else is in shared memory."""
        config, beside = self.plan.config, 0
        if self.attention:
            beside = memory_bytes(attention_memory(self.attention, self.warpgroups, jnp.bfloat16))
        slot, room = layer_room(config.block_m, beside)
        return min(config.stages, room // slot)

    def meetings_after(self, step: str) -> int:
        """Of all programs; between the two after out and after down there is the norm."""
        if step in ("out", "down"):
            return 1 if step == self.steps[-1] and not self.attention else 2
        return int(step != self.steps[-1])

    @property
    def meetings(self) -> int:
        """Of a layer that is not the last."""
        return sum(map(self.meetings_after, ALL if self.attention else ONE))

    def number(self, refs: "Refs", turn) -> Any:
        """Of a layer, in the chain and in the stacks of weights, caches and norms."""
        return turn if self.attention else refs.number[0] + turn

    def here(self) -> "Layer":
        """The same, with this program's index."""
        return self._replace(program=program_index(self.interpret))

    def each(self, body: Callable[["Layer", Any, tuple], tuple]) -> tuple:
        """Call `body` with every layer, counted from the launch's first, and how many slots of its rings were used before; it returns how many are then.

        What follows from the program's index is reckoned again in every layer: kept, it would be more than a warp group that copies has
        registers for, and a value in local memory is as far as the L2 cache after every meeting.
        """

        def of_turn(turn, used: tuple) -> tuple:
            return body(self.here(), turn, used)

        none = (jnp.int32(0),) * 2
        return of_turn(0, none) if self.count == 1 else lax.fori_loop(0, self.count, of_turn, none)

    def units(self, product: Product) -> "Iterator[Unit]":
        """What a program multiplies of a product, in turns: first its piece; the first and the last have no blocks where nothing is left."""
        program, cut = self.program, product.cut(self.programs)
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
    """[parts, M, N] in device memory (`mosaic_partial_sums.py`)."""
    counter: Any
    """Of programs that have stored their piece, of all layers of the chain."""
    stored: Any
    """Barrier: all warp groups of this program have stored their part of its piece."""
    all_stored: Any
    """Barrier of the interpreter in its place; None on a GPU."""


class Refs(NamedTuple):
    """Arrays in device memory, and what the warp groups of a program share."""

    operands: dict[str, Operands]
    residual: Any
    norms: tuple[Any, Any]
    number: Any
    """Of the first layer, in the chain and in the stacks of weights and norms."""
    counter: Any
    """Of programs that came to a meeting, of all layers of the chain."""
    rows: dict[str, Any]
    """What the norms after out and after down leave."""
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
