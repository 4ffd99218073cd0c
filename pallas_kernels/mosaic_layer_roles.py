"""What the warp groups of a decode layer's kernel do: `decode_layer_mosaic.py` says how they work together, and launches them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul_mosaic import Plan, add_product, dequantized_groups
from pallas_kernels.mosaic_instructions import ROWS
from pallas_kernels.mosaic_layer_attention import attend, copy_keys_and_values
from pallas_kernels.mosaic_layer_plan import Cut, Layer, Operands, Product, Refs, Unit
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
from pallas_kernels.mosaic_ring import Copies

PRODUCTS = ("out", "gate_up", "down", "qkv")
MEETINGS = 6
"""Of all programs, in a layer that is not the last."""
UNROLL = 2
"""Blocks that a warp group multiplies between two waits for the tensor core to end."""
IN_FLIGHT = 3
"""Blocks of weights that are on their way at the same time: what the memory needs to be busy. More of them would only be in the way of
x, whose copies wait in the same queue."""


def copy_weights(layer: Layer, refs: Refs) -> None:
    """Keep the ring of weights filled, through all products; before them, that of keys and values."""
    used = 0
    if layer.attention:
        copy_keys_and_values(layer.attention, refs.attention, refs.number[0], layer.interpret)
    for product, operands in zip(layer.products, refs.operands, strict=False):
        for unit in layer.units(product):

            @pl.loop(unit.first, unit.last)
            def _(step, product=product, operands=operands, unit=unit, start=used - unit.first):
                block = start + step
                pl.when(block >= IN_FLIGHT)(lambda: refs.weights.await_block(block - IN_FLIGHT))
                refs.weights.fill(block, _weights_of(product.plan, operands, unit, step))

            used = used + unit.last - unit.first
    if layer.interpret:
        pl.loop(jnp.maximum(0, used - IN_FLIGHT), used)(refs.weights.await_block)
        refs.weights.drain(used)


def _weights_of(plan: Plan, operands: Operands, unit: Unit, step) -> Copies:
    """Bytes and scales for a slot."""
    rows, columns = pl.ds(unit.tile * ROWS, plan.config.block_n), pl.ds(step * plan.block_bytes, plan.block_bytes)
    groups = pl.ds(step * plan.groups, plan.groups)
    return lambda packed, scales: [
        (operands.packed.at[0, rows, columns], packed),
        (operands.scales.at[0, groups, rows], scales),
    ]


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
        if name != "out" or layer.attention:
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
            meet(2 if name == "out" and not layer.attention else 1)
    if layer.interpret:
        refs.x.drain(used)


def multiply(layer: Layer, refs: Refs) -> None:
    """Multiply what the rings bring; before that attend, and between out and gate_up and after down norm what is this program's."""
    used, number = 0, refs.number[0]

    def meet(*needed_then) -> None:
        plgpu.barrier_arrive(refs.stored)
        for row in needed_then:
            prefetch(row, layer.interpret)
        plgpu.barrier_wait(refs.met)

    if layer.attention:
        how = dict(threads=128 * layer.warpgroups, layer=number, eps=layer.eps, interpret=layer.interpret)
        attend(layer.attention, refs.attention, refs.operands[0].x, **how)
        meet()
    for name, product, operands in zip(PRODUCTS, layer.products, refs.operands, strict=False):
        for unit in layer.units(product):

            @pl.when(unit.first < unit.last)
            def _(product=product, operands=operands, unit=unit, used=used):
                _multiply_unit(layer, refs, product, operands, unit, used)

            used = used + unit.last - unit.first
            if unit.piece:
                _say_stored(layer, refs, unit)
        if name == "gate_up":
            if layer.cut:
                _finish_tiles(layer, refs, layer.cut, operands.out)
            meet()
        elif name != "qkv":
            norm = refs.norms[name == "down"].at[number]
            # The residual is as old as the attention: no longer in the cache, unlike what out has added to it.
            own_row = lax.min(lax.axis_index("program"), layer.rows - 1)
            meet(norm, *([refs.residual.at[own_row]] if name == "out" else []))
            _norm(layer, refs, operands.out, norm, name == "down")
            if product is not layer.products[-1]:
                meet()


def _multiply_unit(layer: Layer, refs: Refs, product: Product, operands: Operands, unit: Unit, used) -> None:
    """Partial sums of a unit, or gate times up; `used` slots of either ring were before."""
    config, own = product.plan.config, lax.axis_index("warpgroup")

    def all_blocks(sums):
        count = unit.last - unit.first
        several = lax.div(count, UNROLL)

        @pl.loop(0, several)
        def _(turn):
            _multiply_blocks(refs, product.plan, sums, [used + turn * UNROLL + i for i in range(UNROLL)])

        @pl.loop(several * UNROLL, count)
        def _(index):
            _multiply_blocks(refs, product.plan, sums, [used + index])

        return sums[...]

    sums = pl.run_scoped(all_blocks, plgpu.ACC((ROWS, config.block_m), jnp.float32))

    tile = unit.tile + own
    if product.gated and not unit.piece:
        store_gated(sums, operands.out, tile, layer.activation, layer.interpret)
        return
    out = operands.out
    if unit.piece:
        out, tile = refs.pieces.sums, tile - layer.cut.first * layer.warpgroups
    out.at[unit.split, :, pl.ds(tile * ROWS, ROWS)].T[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)


def _say_stored(layer: Layer, refs: Refs, unit: Unit) -> None:
    """Of a piece, by each warp group; the interpreter's programs all say it, with a piece or without."""
    if layer.interpret:
        plgpu.barrier_arrive(refs.pieces.all_stored)
    else:
        pl.when(unit.first < unit.last)(lambda: count_in(refs.pieces.counter, 1))


def _finish_tiles(layer: Layer, refs: Refs, cut: Cut, out) -> None:
    """Of tiles that are cut, gate times up: by programs that had no piece, which are done before the others."""
    program, columns = lax.axis_index("program"), layer.products[1].plan.config.block_n // 2
    if layer.interpret:
        plgpu.barrier_wait(refs.pieces.all_stored)

    @pl.when(program >= cut.pieces)
    def _():
        if not layer.interpret:
            await_count(refs.pieces.counter, (refs.number[0] + 1) * (cut.pieces * layer.warpgroups))
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
    for block in blocks:
        weights = refs.weights.at(block)
        packed, scales = weights.data
        plgpu.barrier_wait(weights.full)
        groups = list(dequantized_groups(plan, packed.at[rows], lambda group, scales=scales: scales.at[group, rows]))
        x = refs.x.at(block)
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
