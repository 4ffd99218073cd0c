"""What the warp groups of a decode layer's kernel do: `decode_layer_mosaic.py` says how they work together, and launches them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul_mosaic import Plan, add_product, dequantized_groups
from pallas_kernels.mosaic_instructions import ROWS
from pallas_kernels.mosaic_layer_steps import (
    add_norm_row,
    merge_heads,
    order_copies,
    prefetch,
    store_gated,
    synchronize,
)
from pallas_kernels.rows import AttentionParts

PRODUCTS = ("out", "gate_up", "down", "qkv")
MEETINGS = 6
"""Of all programs, in a layer that is not the last."""
UNROLL = 2
"""Blocks that a warp group multiplies between two waits for the tensor core to end."""
IN_FLIGHT = 3
"""Blocks of weights that are on their way at the same time: what the memory needs to be busy. More of them would only be in the way of
x, whose copies wait in the same queue."""


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


Copies: TypeAlias = Callable[..., Iterable[tuple[Any, Any]]]
"""A slot's arrays -> (source, target) of every copy into them."""


class Slots(NamedTuple):
    """Slots in shared memory that are filled with blocks and multiplied, and their barriers."""

    data: tuple[Any, ...]
    full: Any
    empty: Any

    def at(self, block) -> "Slots":
        """The slot of a block, by its number among all that the program multiplies."""
        slot = lax.rem(block, self.full.shape[0])
        return Slots(tuple(ref.at[slot] for ref in self.data), self.full.at[slot], self.empty.at[slot])

    def fill(self, block, copies: "Copies") -> None:
        """Begin to copy what the slot has, once all who multiply have read what it had."""
        slot = self.at(block)

        @pl.when(block >= self.full.shape[0])
        def _():
            plgpu.barrier_wait(slot.empty)

        for source, target in copies(*slot.data):
            plgpu.copy_gmem_to_smem(source, target, slot.full)

    def drain(self, used) -> None:
        """Wait until all of the `used` blocks are read: what the interpreter asks of who fills them, and a GPU does not need.

        Nor should it have it: for some shapes ptxas (CUDA 13) adds to `used` what the loop before it counted, and this one never ends.
        """
        stages = self.full.shape[0]

        @pl.loop(jnp.maximum(0, used - stages), used)
        def _(block):
            plgpu.barrier_wait(self.at(block).empty)


class Handed(NamedTuple):
    """Sums in shared memory that one warp group hands to the other, and the barrier that says so."""

    sums: Any
    ready: Any


class Refs(NamedTuple):
    """Arrays in device memory, and what the warp groups of a program share."""

    parts: AttentionParts | None
    """What is merged to out's rows first; None: nothing is."""
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


def copy_weights(layer: Layer, refs: Refs) -> None:
    """Keep the ring of weights filled, through all products."""
    used = 0
    for product, operands in zip(layer.products, refs.operands, strict=False):
        for unit in layer.units(product):

            @pl.loop(unit.first, unit.first + unit.slots)
            def _(step, product=product, operands=operands, unit=unit, start=used - unit.first):
                block = start + step
                pl.when(block >= IN_FLIGHT)(lambda: plgpu.barrier_wait(refs.weights.at(block - IN_FLIGHT).full))
                refs.weights.fill(block, _weights_of(layer, product.plan, operands, unit, step))

            used = used + unit.slots
    if layer.interpret:
        late = pl.loop(jnp.maximum(0, used - IN_FLIGHT), used)
        late(lambda block: plgpu.barrier_wait(refs.weights.at(block).full))
        refs.weights.drain(used)


def _weights_of(layer: Layer, plan: Plan, operands: Operands, unit: Unit, step) -> Copies:
    """Bytes and scales for a slot, in `weight_copies`."""
    parts = layer.weight_copies // 2
    size = plan.config.block_n // parts

    def copies(packed, scales):
        for part in range(parts):
            tile, block = (unit.tile, 2 * step + part) if unit.half else (unit.tile + part, step)
            rows, columns = pl.ds(tile * ROWS, size), pl.ds(block * plan.block_bytes, plan.block_bytes)
            yield operands.packed.at[0, rows, columns], packed.at[pl.ds(part * size, size)]
            yield operands.scales.at[0, pl.ds(block * plan.groups, plan.groups), rows], scales.at[part]

    return copies


def copy_x(layer: Layer, refs: Refs) -> None:
    """Meet the other programs where their results are needed, and keep the ring of x filled."""
    used, number, counted = 0, refs.number[0], 0

    def meet(meetings: int = 1) -> None:
        nonlocal counted
        counted += meetings
        plgpu.barrier_wait(refs.stored)
        if layer.interpret:
            plgpu.barrier_arrive(refs.all_here)
            plgpu.barrier_wait(refs.all_here)
        else:
            synchronize(refs.counter, (number * MEETINGS + counted) * layer.programs, meetings)
        plgpu.barrier_arrive(refs.met)

    for name, product, operands in zip(PRODUCTS, layer.products, refs.operands, strict=False):
        if name != "out" or refs.parts is not None:
            meet()
            order_copies(layer.interpret)
        block_k = product.plan.config.block_k
        for unit in layer.units(product):

            @pl.loop(unit.first, unit.last)
            def _(step, operands=operands, block_k=block_k, start=used - unit.first):
                columns = operands.x.at[:, pl.ds(step * block_k, block_k)]
                refs.x.fill(start + step, lambda x: [(columns, x)])

            used = used + unit.last - unit.first
        if name in ("out", "down"):
            # The counter counts the one before out in any case, so that layers with and without it may follow each other.
            meet(2 if name == "out" and refs.parts is None else 1)
    if layer.interpret:
        refs.x.drain(used)


def multiply(layer: Layer, refs: Refs) -> None:
    """Multiply what the rings bring; before that merge, and between out and gate_up and after down norm what is this program's."""
    used, number = Blocks(0, 0), refs.number[0]

    def meet(*needed_then) -> None:
        plgpu.barrier_arrive(refs.stored)
        for row in needed_then:
            prefetch(row, layer.interpret)
        plgpu.barrier_wait(refs.met)

    if refs.parts is not None:
        merge_heads(*refs.parts, refs.operands[0].x, layer.programs, layer.warpgroups, layer.interpret)
        meet()
    for name, product, operands in zip(PRODUCTS, layer.products, refs.operands, strict=False):
        for unit in layer.units(product):

            @pl.when(unit.first < unit.last)
            def _(product=product, operands=operands, unit=unit, used=used, gated=name == "gate_up"):
                _multiply_unit(layer, refs, product, operands, unit, used, gated=gated)

            used = Blocks(used.weights + unit.slots, used.x + unit.last - unit.first)
        if name == "gate_up":
            meet()
        elif name != "qkv":
            norm = refs.norms[name == "down"].at[number]
            # The residual is as old as the attention: no longer in the cache, unlike what out has added to it.
            own_row = lax.min(lax.axis_index("program"), layer.rows - 1)
            meet(norm, *([refs.residual.at[own_row]] if name == "out" else []))
            _norm(layer, refs, operands.out, norm, name == "down")
            if product is not layer.products[-1]:
                meet()


class Blocks(NamedTuple):
    """Numbers of slots of either ring: how many were used before, or the next ones."""

    weights: Any
    x: Any


def _multiply_unit(
    layer: Layer, refs: Refs, product: Product, operands: Operands, unit: Unit, used: Blocks, *, gated: bool
) -> None:
    """Partial sums of a unit, or gate times up; `used` slots of the rings were before."""
    config, own = product.plan.config, lax.axis_index("warpgroup")

    def of(index) -> Blocks:
        return Blocks(used.weights + index, used.x + (2 * index if unit.half else index))

    def all_blocks(sums):
        several = lax.div(unit.slots, UNROLL)

        @pl.loop(0, several)
        def _(turn):
            _multiply_blocks(refs, product.plan, sums, [of(turn * UNROLL + i) for i in range(UNROLL)], unit.half)

        @pl.loop(several * UNROLL, unit.slots)
        def _(index):
            _multiply_blocks(refs, product.plan, sums, [of(index)], unit.half)

        return sums[...]

    sums = pl.run_scoped(all_blocks, plgpu.ACC((ROWS, config.block_m), jnp.float32))
    if unit.half:
        _add_partner(
            refs, sums, lambda whole: store_gated(whole, operands.out, unit.tile, layer.activation, layer.interpret)
        )
    elif gated:
        store_gated(sums, operands.out, unit.tile + own, layer.activation, layer.interpret)
    else:
        rows = pl.ds((unit.tile + own) * ROWS, ROWS)
        operands.out.at[unit.split, :, rows].T[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)


def _add_partner(refs: Refs, sums, store: Callable[[Any], None]) -> None:
    """Of half a tile: the last warp group hands its sums to the first one, which stores those of both."""
    own, handed = lax.axis_index("warpgroup"), refs.handed
    memory = handed.sums.at[:, pl.ds(0, sums.shape[1])]

    @pl.when(own == 1)
    def _():
        memory[...] = sums
        plgpu.commit_smem()
        plgpu.barrier_arrive(handed.ready)

    @pl.when(own == 0)
    def _():
        plgpu.barrier_wait(handed.ready)
        store(sums + plgpu.load(memory, layout=plgpu.Layout.WGMMA, optimized=False))


def _multiply_blocks(refs: Refs, plan: Plan, sums, blocks: list[Blocks], half: bool) -> None:
    """Add the products of blocks, each dequantized while the tensor core multiplies the one before.

    It ends the last one here: what it reads in registers, the compiler protects within an iteration and not in the next (weights of one
    group a block came out wrong on an H200). Of half a tile, a warp group multiplies one of two blocks of x and waits for both.
    """
    own, reading = lax.axis_index("warpgroup"), None
    rows = pl.ds(own * ROWS, ROWS)
    for block in blocks:
        weights = refs.weights.at(block.weights)
        packed, scales = weights.data
        plgpu.barrier_wait(weights.full)
        apart = scales.shape[0] > 1
        own_scales = scales.at[own, :, pl.ds(0, ROWS)] if apart else scales.at[0, :, rows]
        groups = list(dequantized_groups(plan, packed.at[rows], lambda group, scales=own_scales: scales.at[group]))
        x = refs.x.at(block.x + own if half else block.x)
        plgpu.barrier_wait(x.full)
        for index, group in enumerate(groups):
            add_product(refs.left, sums, group, x.data[0].at[:, pl.ds(index * plan.group, plan.group)])
        plgpu.barrier_arrive(weights.empty)
        if half:
            others = refs.x.at(block.x + 1 - own)
            plgpu.barrier_wait(others.full)
            plgpu.barrier_arrive(others.empty)
        if reading is not None:
            plgpu.wgmma_wait(len(groups))
            plgpu.barrier_arrive(reading.empty)
        reading = x
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(reading.empty)


def _norm(layer: Layer, refs: Refs, parts, norm, after_down: bool) -> None:
    """Add the partial sums of this program's rows to the residual, and norm it."""
    source = refs.residual_out if after_down else refs.residual
    permuted = not after_down or len(layer.products) > 3
    for turn in range(math.ceil(layer.rows / layer.programs)):
        row = lax.axis_index("program") + turn * layer.programs

        @pl.when(row < layer.rows)
        def _(row=row):
            add_norm_row(
                source.at[row],
                parts.at[:, row],
                norm,
                refs.residual_out.at[row],
                refs.rows_out[after_down].at[row],
                refs.squares,
                eps=layer.eps,
                threads=128 * layer.warpgroups,
                permuted=permuted,
                interpret=layer.interpret,
            )
