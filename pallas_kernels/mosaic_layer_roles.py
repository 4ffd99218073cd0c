"""What the warp groups of the decode layers' kernel do: `decode_layers_mosaic.py` says how they work together, and launches them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_instructions import ROWS
from pallas_kernels.mosaic_layer_attention import PIECES, attend, copy_keys_and_values
from pallas_kernels.mosaic_layer_plan import ATTENTION, Cut, Layer, Operands, Product, Refs, Unit
from pallas_kernels.mosaic_layer_steps import (
    add_norm_row,
    await_count,
    count_in,
    gate_pieces,
    order_copies,
    prefetch,
    store_gated,
    synchronize,
)
from pallas_kernels.mosaic_partial_sums import store_sums
from pallas_kernels.mosaic_product_plan import Plan
from pallas_kernels.mosaic_product_steps import add_product, dequantized_groups
from pallas_kernels.mosaic_ring import Slots

BLOCKS_BEFORE = 3
"""Of x for what follows a piece, on their way before the piece is counted in."""
UNROLL = 2
"""Blocks that a warp group multiplies between two waits for the tensor core to end."""
IN_FLIGHT, MORE_IN_FLIGHT = 3, 3
"""Blocks that are on their way at the same time: what the memory needs to be busy. More of them would only be in the way of x, whose copies wait
in the same queue; but of keys and values, of which a program with several generations has many and x none, so many more."""


def copy_weights(layer: Layer, refs: Refs) -> None:
    """Keep the ring filled, through all products, attentions and layers."""

    def of_layer(layer: Layer, turn, before: tuple) -> tuple:
        (used, other), number = before, layer.number(refs, turn)
        for step in layer.steps:
            if step == ATTENTION:
                used = _copy_attention(layer, refs, number, used)
                continue
            product, operands = layer.products[step], refs.operands[step]
            for unit in layer.units(product):

                @pl.loop(unit.first, unit.last)
                def _(index, product=product, operands=operands, unit=unit, start=used - unit.first):
                    block = start + index
                    _await_block(refs, block - IN_FLIGHT)
                    slot = refs.weights.claim(block)
                    _copy_block(product, operands, unit, number + product.ahead, index, slot)
                    if layer.attention:  # of keys or values there are four copies
                        for _ in range(PIECES - 2):
                            plgpu.barrier_arrive(slot.full)

                used = used + unit.last - unit.first
        return used, other

    used, _ = layer.each(of_layer)
    if layer.interpret:
        pl.loop(jnp.maximum(0, used - IN_FLIGHT), used)(refs.weights.await_block)
        refs.weights.drain(used)


def _await_block(refs: Refs, block, condition=True) -> None:
    """Of the ring, if it is one."""
    pl.when((block >= 0) & condition)(lambda: refs.weights.await_block(block))


def _copy_attention(layer: Layer, refs: Refs, number, used):
    """Keys and values; the blocks on their way become more, and in the end as many as before."""
    more = MORE_IN_FLIGHT if layer.attention.generations > 1 else 0

    def claim(block) -> Slots:
        _await_block(refs, block - IN_FLIGHT - more, block - used >= more)
        return refs.attention.ring.claim(block)

    end = copy_keys_and_values(layer.attention, refs.attention, claim, layer.program, number, used)
    for late in range(more):  # a program with a tile has at least four: of a prompt's block and a suffix's
        _await_block(refs, end - IN_FLIGHT - more + late, end > used)
    return end


def _copy_block(product: Product, operands: Operands, unit: Unit, number, index, slot: Slots) -> None:
    """Bytes and scales."""
    plan = product.plan
    rows, columns = pl.ds(unit.tile * ROWS, plan.config.block_n), pl.ds(index * plan.block_bytes, plan.block_bytes)
    groups = pl.ds(index * plan.groups, plan.groups)
    packed, scales = slot.data
    plgpu.copy_gmem_to_smem(operands.packed.at[number, rows, columns], packed, slot.full)
    plgpu.copy_gmem_to_smem(operands.scales.at[number, groups, rows], scales, slot.full)


def copy_x(layer: Layer, refs: Refs) -> None:
    """Meet the other programs where their results are needed, and keep the ring of x filled."""

    def of_layer(layer: Layer, turn, before: tuple) -> tuple:
        (other, used), counted = before, layer.number(refs, turn) * layer.meetings
        for step in layer.steps:
            if step != ATTENTION:
                units = list(layer.units(layer.products[step]))
                for previous, unit in zip([None, *units], units, strict=False):
                    piece = previous if previous is not None and previous.piece else None
                    _copy_unit_of_x(layer, refs, step, unit, used, piece)
                    used = used + unit.last - unit.first
                if units[-1].piece:
                    _count_piece(layer, refs, units[-1])
            for _ in range(layer.meetings_after(step)):
                counted += 1
                _meet_programs(layer, refs, counted)
            order_copies(layer.interpret)
        return other, used

    _, used = layer.each(of_layer)
    if layer.interpret:
        refs.x.drain(used)


def _copy_unit_of_x(layer: Layer, refs: Refs, step: str, unit: Unit, used, piece: Unit | None) -> None:
    """Blocks of x for a unit, after so many slots of the ring; with a few of them on their way, count in the piece before, if there is one."""
    block_k = layer.products[step].plan.config.block_k

    @pl.loop(unit.first, unit.last)
    def _(index):
        slot = refs.x.claim(used + index - unit.first)
        columns = refs.operands[step].x.at[:, pl.ds(index * block_k, block_k)]
        plgpu.copy_gmem_to_smem(columns, slot.data[0], slot.full)
        if piece is not None:
            last = lax.min(unit.first + BLOCKS_BEFORE, unit.last) - 1
            pl.when(index == last)(lambda: _count_piece(layer, refs, piece))


def _count_piece(layer: Layer, refs: Refs, piece: Unit) -> None:
    """For the programs that add all up, once this one's is stored. By a warp group that does not multiply, because stores are waited for."""

    @pl.when(piece.first < piece.last)
    def _():
        plgpu.barrier_wait(refs.pieces.stored)
        if not layer.interpret:
            count_in(refs.pieces.counter)


def _meet_programs(layer: Layer, refs: Refs, meetings) -> None:
    """For the warp groups that multiply, at so many meetings since the chain's begin."""
    plgpu.barrier_wait(refs.stored)
    if layer.interpret:
        plgpu.barrier_arrive(refs.all_here)
        plgpu.barrier_wait(refs.all_here)
    else:
        synchronize(refs.counter, meetings * layer.programs)
    plgpu.barrier_arrive(refs.met)


def multiply(layer: Layer, refs: Refs) -> None:
    """Multiply what the rings bring, and attend; after out and after down, norm what is this program's."""

    def of_layer(layer: Layer, turn, before: tuple) -> tuple:
        (used, of_x), number = before, layer.number(refs, turn)
        for step in layer.steps:
            if step == ATTENTION:
                how = dict(threads=128 * layer.warpgroups, eps=layer.eps, interpret=layer.interpret)
                how |= dict(layer=number, used=used)
                used = attend(layer.attention, refs.attention, refs.operands["out"].x, layer.program, **how)
            else:
                used, of_x = _multiply_units(layer, refs, step, number, used, of_x)
            meetings = layer.meetings_after(step)
            if step in ("out", "down"):
                norm = refs.norms[step == "down"].at[number]
                own_row = lax.min(layer.program, layer.rows - 1)
                # The residual of long ago is no longer in the cache, unlike what out has just added to it.
                _meet(layer, refs, norm, *([refs.residual.at[own_row]] if step == "out" else []))
                _norm(layer, refs, step, norm, plain=step == layer.steps[-1] and turn == layer.count - 1)
                meetings -= 1
            for _ in range(meetings):
                _meet(layer, refs)
        return used, of_x

    layer.each(of_layer)


def _meet(layer: Layer, refs: Refs, *needed_then) -> None:
    """Meet the other programs; rows of device memory that are needed then are on their way."""
    plgpu.barrier_arrive(refs.stored)
    for row in needed_then:
        prefetch(row, layer.interpret)
    plgpu.barrier_wait(refs.met)


def _multiply_units(layer: Layer, refs: Refs, step: str, number, used, of_x) -> tuple:
    """What is this program's of a product; so many slots of either ring were used before, and are then."""
    product, operands = layer.products[step], refs.operands[step]
    for unit in layer.units(product):

        @pl.when(unit.first < unit.last)
        def _(unit=unit, used=used, of_x=of_x):
            _multiply_unit(layer, refs, product, operands, unit, used, of_x)

        used, of_x = (before + unit.last - unit.first for before in (used, of_x))
        if unit.piece:
            _say_stored(layer, refs, unit)
    if product.gated and layer.cut:
        _finish_tiles(layer, refs, layer.cut, operands.out, number)
    return used, of_x


def _multiply_unit(layer: Layer, refs: Refs, product: Product, operands: Operands, unit: Unit, used, of_x) -> None:
    """Partial sums of a unit, or gate times up; so many slots of either ring were used before."""
    config, own = product.plan.config, lax.axis_index("warpgroup")

    def all_blocks(sums):
        count = unit.last - unit.first
        several = lax.div(count, UNROLL)

        @pl.loop(0, several)
        def _(turn):
            some = [turn * UNROLL + i for i in range(UNROLL)]
            _multiply_blocks(refs, product.plan, sums, [(used + i, of_x + i) for i in some])

        @pl.loop(several * UNROLL, count)
        def _(index):
            _multiply_blocks(refs, product.plan, sums, [(used + index, of_x + index)])

        return sums[...]

    sums = pl.run_scoped(all_blocks, plgpu.ACC((ROWS, config.block_m), jnp.float32))

    tile = unit.tile + own
    if product.gated and not unit.piece:
        store_gated(sums, operands.out, tile, layer.activation, layer.interpret)
        return
    out = operands.out
    if unit.piece:
        out, tile = refs.pieces.sums, tile - layer.cut.first * layer.warpgroups
    out = out.at[unit.split, :, pl.ds(tile * ROWS, ROWS)]
    if operands.out.dtype == jnp.float32:
        # For the kernel that follows.
        out.T[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
    else:
        store_sums(sums, out, layer.interpret)


def _say_stored(layer: Layer, refs: Refs, unit: Unit) -> None:
    """Of a piece, by each warp group; the interpreter's programs all say it, with a piece or without."""
    pl.when(unit.first < unit.last)(lambda: plgpu.barrier_arrive(refs.pieces.stored))
    if layer.interpret:
        plgpu.barrier_arrive(refs.pieces.all_stored)


def _finish_tiles(layer: Layer, refs: Refs, cut: Cut, out, number) -> None:
    """Of tiles that are cut, gate times up: by programs that had no piece, which are done before the others."""
    program, columns = layer.program, layer.plan.config.block_n // 2
    if layer.interpret:
        plgpu.barrier_wait(refs.pieces.all_stored)

    @pl.when(program >= cut.pieces)
    def _():
        if not layer.interpret:
            await_count(refs.pieces.counter, (number + 1) * cut.pieces)
        gate_pieces(
            refs.pieces.sums,
            out.at[:, pl.ds(cut.first * columns, cut.tiles * columns)],
            program - cut.pieces,
            layer.programs - cut.pieces,
            rows=layer.rows,
            threads=128 * layer.warpgroups,
            activation=layer.activation,
            interpret=layer.interpret,
        )


def _multiply_blocks(refs: Refs, plan: Plan, sums, blocks: list) -> None:
    """Add the products of blocks, each dequantized while the tensor core multiplies the one before.

    It ends the last one here: what it reads in registers, the compiler protects within an iteration and not in the next (weights of one
    group a block came out wrong on an H200).
    """
    rows, reading = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS), None
    for block, of_x in blocks:
        weights = refs.weights.at(block)
        packed, scales = weights.data
        plgpu.barrier_wait(weights.full)
        groups = list(dequantized_groups(plan, packed.at[rows], lambda group, scales=scales: scales.at[group, rows]))
        x = refs.x.at(of_x)
        plgpu.barrier_wait(x.full)
        for index, group in enumerate(groups):
            add_product(refs.left, sums, group, x.data[0].at[:, pl.ds(index * plan.group, plan.group)])
        plgpu.barrier_arrive(weights.empty)
        if reading is not None:
            plgpu.wgmma_wait(len(groups))
            plgpu.barrier_arrive(reading.empty)
        reading = x
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(reading.empty)


def _norm(layer: Layer, refs: Refs, step: str, norm, *, plain) -> None:
    """Add the partial sums of this program's rows to the residual, and norm it; with permuted columns, or `plain`."""
    for turn in range(math.ceil(layer.rows / layer.programs)):
        row = layer.program + turn * layer.programs

        @pl.when(row < layer.rows)
        def _(row=row):
            add_norm_row(
                refs.residual.at[row],
                refs.operands[step].out.at[:, row],
                norm,
                refs.rows[step].at[row],
                refs.squares,
                plain,
                eps=layer.eps,
                threads=128 * layer.warpgroups,
                interpret=layer.interpret,
            )
