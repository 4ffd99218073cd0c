"""A decode layer's products, and what stands between them, in one launch: for Hopper GPUs by Pallas Mosaic GPU.

    attended  = parts of an attention, merged (or rows as they are)
    residual += attended @ out^T           rows = norm(residual)
    gated     = activation(rows @ gate^T) * (rows @ up^T)
    residual += gated @ down^T             rows = norm(residual)            parts = rows @ qkv^T, of the next layer

With few rows, a product of its own spends half its time on its start, its first reads and its end (docs/benchmarks.md). Here one
program a multiprocessor stays for all of them, and its warp groups have roles. One copies weights (TMA) into a ring in shared
memory, as far ahead as it holds them, and never waits for anything but room: the next product's weights arrive while the others
still multiply, store, wait for the other programs, and norm. One brings rows of x, and meets the other programs before it does. The
others multiply: each takes 64 rows of weights, dequantizes them in registers and hands them to the tensor core as its left operand,
as in `int4_matmul_mosaic.py`.

Between two steps, all programs meet at a counter in device memory, which only ever counts up: a chain of layers
takes the counter along, starting from 0, and each knows from its number in the chain what the counter must reach. They run at the
same time because there is one for each multiprocessor, and whatever ran there before ends without waiting for them; a program that
waits for seconds all the same ends with an error.

Rows of gate and up alternate by eights (`interleave_gate`), so that a thread's accumulators hold both of a pair. Activations have
permuted columns between the products (`rows.permute_columns`), as the products read them.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.codes import LAYER_CODE
from pallas_kernels.int4_matmul_mosaic import Plan, add_product, dequantized_groups
from pallas_kernels.mosaic_instructions import ROWS, swizzle_bytes, tiled
from pallas_kernels.mosaic_layer_steps import (
    add_norm_row,
    merge_heads,
    order_copies,
    prefetch,
    store_gated,
    synchronize,
)
from pallas_kernels.rows import AttentionParts
from pallas_kernels.tuning import LAYER_X_STAGES, Int4Config

PRODUCTS = ("out", "gate_up", "down", "qkv")
MEETINGS = 6
"""Of all programs, in a layer that is not the last."""
UNROLL = 2
"""Blocks that a warp group multiplies between two waits for the tensor core to end."""
IN_FLIGHT = 3
"""Blocks of weights that are on their way at the same time: what the memory needs to be busy. More of them would only be in the way of
x, whose copies wait in the same queue."""
COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 208
"""Of a thread: of two warp groups that copy, and two that multiply."""


class _Product(NamedTuple):
    """One of the layer's products."""

    plan: Plan
    tiles: int
    """Of rows of weights."""

    @property
    def units(self) -> int:
        """Tiles times splits of K: what a program takes one of, or several in turn."""
        return self.tiles * self.plan.config.split_k


class _Layer(NamedTuple):
    """What is known of a launch before it runs."""

    products: tuple[_Product, ...]
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

    def units(self, product: _Product) -> "Iterator[_Unit]":
        """What a program multiplies of a product, in turns; the last one has no blocks where nothing is left."""
        for turn in range(math.ceil(product.units / self.programs)):
            unit = lax.axis_index("program") + turn * self.programs
            tile, split = lax.rem(unit, product.tiles), lax.div(unit, product.tiles)
            first, last = product.plan.split(split)
            yield _Unit(tile, split, first, jnp.where(unit < product.units, last, first))


class _Unit(NamedTuple):
    """A tile of a product's weights, and the blocks of K from `first` to before `last`."""

    tile: Any
    split: Any
    first: Any
    last: Any


class _Operands(NamedTuple):
    """A product's arrays in device memory."""

    x: Any
    packed: Any
    scales: Any
    out: Any


class _Slots(NamedTuple):
    """Slots in shared memory that are filled with blocks and multiplied, and their barriers."""

    data: tuple[Any, ...]
    full: Any
    empty: Any

    def at(self, block) -> "_Slots":
        """The slot of a block, by its number among all that the program multiplies."""
        slot = lax.rem(block, self.full.shape[0])
        return _Slots(tuple(ref.at[slot] for ref in self.data), self.full.at[slot], self.empty.at[slot])

    def fill(self, block, *sources) -> None:
        """Begin to copy what the slot has, once all who multiply have read what it had."""
        slot = self.at(block)

        @pl.when(block >= self.full.shape[0])
        def _():
            plgpu.barrier_wait(slot.empty)

        for source, target in zip(sources, slot.data, strict=True):
            plgpu.copy_gmem_to_smem(source, target, slot.full)

    def drain(self, used) -> None:
        """Wait until all of the `used` blocks are read: what the interpreter asks of who fills them, and a GPU does not need.

        Nor should it have it: for some shapes ptxas (CUDA 13) adds to `used` what the loop before it counted, and this one never ends.
        """
        stages = self.full.shape[0]

        @pl.loop(jnp.maximum(0, used - stages), used)
        def _(block):
            plgpu.barrier_wait(self.at(block).empty)


class _Refs(NamedTuple):
    """Arrays in device memory, and what the warp groups of a program share."""

    parts: AttentionParts | None
    """What is merged to out's rows first; None: nothing is."""
    operands: tuple[_Operands, ...]
    residual: Any
    norms: tuple[Any, Any]
    number: Any
    """Of the layer, in the chain and in the stacks of norms."""
    counter: Any
    residual_out: Any
    rows_out: tuple[Any, Any]
    weights: _Slots
    """Bytes and scales."""
    x: _Slots
    left: Any
    """Of the interpreter: where a warp group puts its left operand; None on a GPU."""
    stored: Any
    """Barrier: all warp groups have stored what a step leaves."""
    met: Any
    """Barrier: what all programs stored before may be read."""
    squares: Any
    """A warp's part of a row's sum of squares."""
    all_here: Any
    """Barrier of the interpreter, whose programs are one cluster; None on a GPU, where they meet at the counter."""


def _copy_weights(layer: _Layer, refs: _Refs) -> None:
    """Keep the ring of weights filled, through all products."""
    used = 0
    for product, operands in zip(layer.products, refs.operands, strict=False):
        plan, config = product.plan, product.plan.config
        for unit in layer.units(product):
            rows = pl.ds(unit.tile * config.block_n, config.block_n)

            @pl.loop(unit.first, unit.last)
            def _(step, plan=plan, operands=operands, rows=rows, start=used - unit.first):
                block = start + step
                pl.when(block >= IN_FLIGHT)(lambda: plgpu.barrier_wait(refs.weights.at(block - IN_FLIGHT).full))
                columns = pl.ds(step * plan.block_bytes, plan.block_bytes)
                groups = pl.ds(step * plan.groups, plan.groups)
                refs.weights.fill(block, operands.packed.at[0, rows, columns], operands.scales.at[0, groups, rows])

            used = used + unit.last - unit.first
    if layer.interpret:
        late = pl.loop(jnp.maximum(0, used - IN_FLIGHT), used)
        late(lambda block: plgpu.barrier_wait(refs.weights.at(block).full))
        refs.weights.drain(used)


def _copy_x(layer: _Layer, refs: _Refs) -> None:
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
                refs.x.fill(start + step, operands.x.at[:, pl.ds(step * block_k, block_k)])

            used = used + unit.last - unit.first
        if name in ("out", "down"):
            # The counter counts the one before out in any case, so that layers with and without it may follow each other.
            meet(2 if name == "out" and refs.parts is None else 1)
    if layer.interpret:
        refs.x.drain(used)


def _multiply(layer: _Layer, refs: _Refs) -> None:
    """Multiply what the rings bring; before that merge, and between out and gate_up and after down norm what is this program's."""
    used, number = 0, refs.number[0]

    def meet(norm=None) -> None:
        plgpu.barrier_arrive(refs.stored)
        if norm is not None:
            prefetch(norm, layer.interpret)
        plgpu.barrier_wait(refs.met)

    if refs.parts is not None:
        merge_heads(*refs.parts, refs.operands[0].x, layer.programs, layer.warpgroups, layer.interpret)
        meet()
    for name, product, operands in zip(PRODUCTS, layer.products, refs.operands, strict=False):
        for unit in layer.units(product):

            @pl.when(unit.first < unit.last)
            def _(product=product, operands=operands, unit=unit, used=used, gated=name == "gate_up"):
                _multiply_unit(layer, refs, product, operands, unit, used, gated=gated)

            used = used + unit.last - unit.first
        if name == "gate_up":
            meet()
        elif name != "qkv":
            norm = refs.norms[name == "down"].at[number]
            meet(norm)
            _norm(layer, refs, operands.out, norm, name == "down")
            if product is not layer.products[-1]:
                meet()


def _multiply_unit(
    layer: _Layer, refs: _Refs, product: _Product, operands: _Operands, unit: _Unit, used, *, gated: bool
):
    """Partial sums of a unit, or gate times up; `used` blocks of the rings were before."""
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
    if gated:
        store_gated(sums, operands.out, unit.tile * layer.warpgroups + own, layer.activation, layer.interpret)
    else:
        rows = pl.ds(unit.tile * config.block_n + own * ROWS, ROWS)
        operands.out.at[unit.split, :, rows].T[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)


def _multiply_blocks(refs: _Refs, plan: Plan, sums, blocks: list) -> None:
    """Add the products of blocks, each dequantized while the tensor core multiplies the one before.

    It ends the last one here: what it reads in registers, the compiler protects within an iteration and not in the next (weights of one
    group a block came out wrong on an H200).
    """
    rows = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
    for block, before in zip(blocks, [None, *blocks], strict=False):
        weights, x = refs.weights.at(block), refs.x.at(block)
        packed, scales = weights.data
        plgpu.barrier_wait(weights.full)
        groups = list(dequantized_groups(plan, packed.at[rows], lambda group, scales=scales: scales.at[group, rows]))
        plgpu.barrier_wait(x.full)
        for index, group in enumerate(groups):
            add_product(refs.left, sums, group, x.data[0].at[:, pl.ds(index * plan.group, plan.group)])
        plgpu.barrier_arrive(weights.empty)
        if before is not None:
            plgpu.wgmma_wait(len(groups))
            plgpu.barrier_arrive(refs.x.at(before).empty)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.x.at(blocks[-1]).empty)


def _norm(layer: _Layer, refs: _Refs, parts, norm, after_down: bool) -> None:
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


@partial(jax.jit, static_argnames=("configs", "programs", "rows", "eps", "activation", "interpret"))
def _launch(
    attended,
    residual,
    norms,
    number,
    counter,
    weights,
    *,
    configs: tuple[Int4Config, ...],
    programs: int,
    rows: int,
    eps: float,
    activation: str,
    interpret: bool,
):
    """(residual, parts of qkv or normed rows, counter); residual has as many rows as a tile."""
    (m, width), dtype = residual.shape, residual.dtype
    products = []
    for (packed, scales), config in zip(weights, configs, strict=True):
        n, k = packed.shape[1:]
        group = k // scales.shape[1]
        plan = Plan(config, k // config.block_k, group, LAYER_CODE, 0, False, interpret)
        products.append(_Product(plan, n // config.block_n))
    layer = _Layer(tuple(products), programs, rows, eps, activation, interpret)
    left = [
        jax.ShapeDtypeStruct((c.split_k, m, packed.shape[1]), jnp.float32)
        for c, (packed, _) in zip(configs, weights, strict=True)
    ]
    left[1] = jax.ShapeDtypeStruct((m, weights[1][0].shape[1] // 2), dtype)
    normed, merged = (jax.ShapeDtypeStruct((m, k), dtype) for k in (width, weights[0][0].shape[2]))
    merges = isinstance(attended, AttentionParts)
    # What products leave, the residual, the rows after out and after down, and out's own.
    outputs = [*left, normed, normed, normed, *([merged] if merges else [])]

    def kernel(*refs):
        given, inputs, left, rows, memory = _cut(refs, 1 + merges, 5 + 2 * len(products), len(products), 3 + merges)
        residual, post_norm, following_norm, number, counter, *flat = inputs
        residual_out, after_out, after_down, *merged = rows
        x = ((merged or given)[0], after_out, left[1], after_down)
        operands = [_Operands(*of) for of in zip(x, flat[::2], flat[1::2], left, strict=False)]
        ours = _Refs(
            AttentionParts(*given) if merges else None,
            tuple(operands),
            residual,
            (post_norm, following_norm),
            number,
            counter,
            residual_out,
            (after_out, after_down),
            *memory,
        )
        role = lax.axis_index("warpgroup")

        @pl.when(role == layer.warpgroups)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            _copy_weights(layer, ours)

        @pl.when(role == layer.warpgroups + 1)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            _copy_x(layer, ours)

        @pl.when(role < layer.warpgroups)
        def _():
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            _multiply(layer, ours)

    packed, scales = weights[0]
    call = plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(1,) if interpret else (programs,),
        grid_names=("cluster",) if interpret else ("program",),
        cluster=(programs,) if interpret else (),
        cluster_names=("program",) if interpret else (),
        num_threads=layer.warpgroups + 2,
        thread_name="warpgroup",
        scratch_types=(
            *_ring_memory(layer, dtype, packed.dtype, scales.dtype),
            plgpu.Barrier(num_arrivals=layer.warpgroups),
            plgpu.Barrier(num_arrivals=1),
            plgpu.SMEM((4 * layer.warpgroups,), jnp.float32),
            plgpu.ClusterBarrier(collective_axes=("program",)) if interpret else None,
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    shared = counter if interpret else jax.new_ref(counter)
    flat = [array for pair in weights for array in pair]
    given = attended if merges else (attended,)
    out = call(*given, residual, *norms, number, shared, *flat)
    residual, _, after_down = out[len(products) :][:3]
    result = out[3] if len(products) > 3 else after_down
    return residual, result, counter if interpret else jax.freeze(shared)


def _ring_memory(layer: _Layer, x_dtype, packed_dtype, scales_dtype) -> tuple:
    """What `_Refs.weights`, `x` and `left` have."""
    plan, left = layer.products[0].plan, None
    config, stages = plan.config, plan.config.stages

    def slots(count: int, *data) -> _Slots:
        full = plgpu.Barrier(num_arrivals=len(data), num_barriers=count)
        return _Slots(data, full, plgpu.Barrier(num_arrivals=layer.warpgroups, num_barriers=count))

    packed = plgpu.SMEM((stages, config.block_n, plan.block_bytes), packed_dtype, transforms=tiled(plan.block_bytes, 1))
    scales = plgpu.SMEM((stages, plan.groups, config.block_n), scales_dtype)
    x = plgpu.SMEM((LAYER_X_STAGES, config.block_m, config.block_k), x_dtype, transforms=tiled(128, 2))
    if layer.interpret:
        shape = (layer.warpgroups, ROWS, plan.group)
        left = plgpu.SMEM(shape, x_dtype, transforms=tiled(swizzle_bytes(plan.group), 2))
    return slots(stages, packed, scales), slots(LAYER_X_STAGES, x), left


def _cut(refs: tuple, *sizes: int) -> Iterator[tuple]:
    """So many of them, and the rest."""
    for size in sizes:
        yield refs[:size]
        refs = refs[size:]
    yield refs


def decode_layer(
    attended,
    residual,
    norms: tuple,
    number,
    counter,
    weights: Sequence[tuple],
    *,
    configs: tuple[Int4Config, ...],
    programs: int,
    eps: float,
    activation: str,
    interpret: bool = False,
):
    """(residual, partial sums [S, M, N] of the next layer's qkv, counter); without its weights, (residual, normed rows, counter).

    Args:
      attended: parts of the attention, float32, with heads of 64, 128 or 256; or its rows [M, H Hd] with permuted columns.
      residual: [M, D].
      norms: stacks [L, D] of the norm in front of gate_up and of the one that follows the layer.
      number: of the layer, int or int32 [].
      counter: int32 [1], 0 for layer 0, then what the layer before returned.
      weights: (bytes uint8 [1, N, K], scales bfloat16 [1, K/G, N]) of out, gate_up (`interleave_gate`), down and the next layer's qkv.
      configs: each product's blocks, all with the same tile and stages; gate_up's K is not split.
      programs: multiprocessors of the GPU.
    """
    m, block_m = residual.shape[0], configs[0].block_m
    number = jnp.asarray(number, jnp.int32).reshape(1)

    def whole_tile(rows):
        return rows if m == block_m else jnp.pad(rows, ((0, block_m - m), (0, 0)))

    if not isinstance(attended, AttentionParts):
        attended = whole_tile(attended)
    how: dict[str, Any] = dict(configs=configs, programs=programs, rows=m, eps=eps, activation=activation)
    residual, result, counter = _launch(
        attended, whole_tile(residual), norms, number, counter, weights, interpret=interpret, **how
    )
    return residual[:m], result[..., :m, :], counter
