"""A decode layer's products, and what stands between them, in one launch: for Hopper GPUs by Pallas Mosaic GPU.

    attended  = parts of an attention, merged
    residual += attended @ out^T           rows = norm(residual)
    gated     = activation(rows @ gate^T) * (rows @ up^T)
    residual += gated @ down^T             rows = norm(residual)            parts = rows @ qkv^T, of the next layer

With few rows, a product of its own spends half its time on its start, its first reads and its end (docs/benchmarks.md). Here one
program a multiprocessor stays for all of them. Its warp groups have the roles of `int4_matmul_mosaic.py`, and the one that copies
runs ahead: it fills the ring with the next product's weights while the others still multiply, store, wait for the other
programs, and norm.

Between two steps, all programs wait for each other at a counter in device memory, which only ever counts up: a chain of layers
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
from pallas_kernels.int4_matmul_mosaic import (
    COPY_REGISTERS,
    MULTIPLY_REGISTERS,
    Plan,
    Ring,
    multiply_blocks,
    ring_memory,
)
from pallas_kernels.mosaic_instructions import ROWS
from pallas_kernels.mosaic_layer_steps import add_norm_row, merge_heads, prefetch, publish, store_gated, synchronize
from pallas_kernels.rows import AttentionParts
from pallas_kernels.tuning import Int4Config

PRODUCTS = ("out", "gate_up", "down", "qkv")
MEETINGS = 6
"""Of all programs, in a layer that is not the last."""


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
        """Those that multiply; one more copies."""
        return self.products[0].plan.warpgroups

    def rounds(self, product: _Product) -> range:
        """Turns of a program at a product's units."""
        return range(math.ceil(product.units / self.programs))

    def unit(self, product: _Product, turn: int) -> tuple:
        """(tile, split, first block of K, the one after its last) of a program's turn; no blocks where it has none."""
        unit = lax.axis_index("program") + turn * self.programs
        tile, split = lax.rem(unit, product.tiles), lax.div(unit, product.tiles)
        first, last = product.plan.split(split)
        return tile, split, first, jnp.where(unit < product.units, last, first)


class _Operands(NamedTuple):
    """A product's arrays in device memory."""

    x: Any
    packed: Any
    scales: Any
    out: Any


class _Refs(NamedTuple):
    """Arrays in device memory, and what the warp groups of a program share."""

    parts: AttentionParts
    """What is merged to out's rows first."""
    operands: tuple[_Operands, ...]
    residual: Any
    norms: tuple[Any, Any]
    number: Any
    """Of the layer, in the chain and in the stacks of norms."""
    counter: Any
    residual_out: Any
    rows_out: tuple[Any, Any]
    ring: Ring
    stored: Any
    """Barrier: all warp groups have stored what a step leaves."""
    met: Any
    """Barrier: what all programs stored before may be read."""
    squares: Any
    """A warp's part of a row's sum of squares."""
    all_here: Any
    """Barrier of the interpreter, whose programs are one cluster; None on a GPU, where they meet at the counter."""


def _copy(layer: _Layer, refs: _Refs) -> None:
    """Keep the ring filled through all products, and meet the other programs between the steps."""
    used, meetings = 0, iter(range(MEETINGS))

    def meet() -> None:
        plgpu.barrier_wait(refs.stored)
        if layer.interpret:
            plgpu.barrier_arrive(refs.all_here)
            plgpu.barrier_wait(refs.all_here)
        else:
            synchronize(refs.counter, refs.number, next(meetings), MEETINGS, layer.programs)
        plgpu.barrier_arrive(refs.met)

    def meet_twice() -> None:
        meet()
        meet()

    before = (meet, meet_twice, meet, meet_twice)
    for product, operands, ready in zip(layer.products, refs.operands, before, strict=False):
        used = _copy_product(layer, product, operands, refs.ring, used, ready)
    if len(layer.products) < len(before):
        meet()
    stages = layer.products[0].plan.config.stages

    @pl.loop(jnp.maximum(0, used - stages), used)
    def _(block):
        plgpu.barrier_wait(refs.ring.empty.at[lax.rem(block, stages)])


def _copy_product(layer: _Layer, product: _Product, operands: _Operands, ring: Ring, used, ready):
    """Copy a product's blocks, of which the first weights do not wait for its rows to be `ready`; how many blocks were used."""
    plan, config = product.plan, product.plan.config

    def copy(source, target, slot):
        plgpu.copy_gmem_to_smem(source, target.at[slot], ring.full.at[slot])

    def copy_weights(tile, step, block):
        slot = lax.rem(block, config.stages)

        @pl.when(block >= config.stages)
        def _():
            plgpu.barrier_wait(ring.empty.at[slot])

        rows = pl.ds(tile * config.block_n, config.block_n)
        copy(operands.packed.at[0, rows, pl.ds(step * plan.block_bytes, plan.block_bytes)], ring.packed, slot)
        copy(operands.scales.at[0, pl.ds(step * plan.groups, plan.groups), rows], ring.scales, slot)

    def copy_x(step, block):
        columns = pl.ds(step * config.block_k, config.block_k)
        copy(operands.x.at[:, columns], ring.x, lax.rem(block, config.stages))

    for turn in layer.rounds(product):
        tile, _, first, last = layer.unit(product, turn)
        start = used - first
        if turn == 0:
            filled = jnp.minimum(first + config.stages, last)
            pl.loop(first, filled)(lambda step, tile=tile, start=start: copy_weights(tile, step, start + step))
            ready()
            pl.loop(first, filled)(lambda step, start=start: copy_x(step, start + step))
            first = filled

        @pl.loop(first, last)
        def _(step, tile=tile, start=start):
            copy_weights(tile, step, start + step)
            copy_x(step, start + step)

        used = start + last
    return used


def _multiply(layer: _Layer, refs: _Refs) -> None:
    """Multiply what the ring brings; before that merge, and between out and gate_up and after down norm what is this program's."""
    used = 0

    def meet(norm=None) -> None:
        plgpu.barrier_arrive(refs.stored)
        if norm is not None:
            prefetch(norm.at[refs.number[0]], layer.interpret)
        plgpu.barrier_wait(refs.met)

    merge_heads(*refs.parts, refs.operands[0].x, layer.programs, layer.warpgroups, layer.interpret)
    publish(layer.interpret)
    meet()
    for name, product, operands in zip(PRODUCTS, layer.products, refs.operands, strict=False):
        used = _multiply_product(layer, product, operands, refs.ring, used, gated=name == "gate_up")
        if name != "qkv":
            meet({"out": refs.norms[0], "down": refs.norms[1]}.get(name))
        if name in ("out", "down"):
            _norm(layer, refs, operands.out, name == "down")
        if name == "out" or (name == "down" and len(layer.products) > 3):
            meet()


def _multiply_product(layer: _Layer, product: _Product, operands: _Operands, ring: Ring, used, *, gated: bool):
    """Partial sums, or gate times up, of this program's units; how many blocks of the ring were used."""
    config, own = product.plan.config, lax.axis_index("warpgroup")
    for turn in layer.rounds(product):
        tile, split, first, last = layer.unit(product, turn)

        def all_blocks(sums, first=first, last=last, used=used):
            multiply_blocks(product.plan, ring, sums, first, last, used)
            return sums[...]

        @pl.when(first < last)
        def _(tile=tile, split=split, all_blocks=all_blocks):
            sums = pl.run_scoped(all_blocks, plgpu.ACC((ROWS, config.block_m), jnp.float32))
            if gated:
                store_gated(sums, operands.out, tile * layer.warpgroups + own, layer.activation, layer.interpret)
            else:
                rows = pl.ds(tile * config.block_n + own * ROWS, ROWS)
                operands.out.at[split, :, rows].T[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)

        used = used + last - first
    if gated:
        publish(layer.interpret)
    return used


def _norm(layer: _Layer, refs: _Refs, parts, after_down: bool) -> None:
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
                refs.norms[after_down].at[refs.number[0]],
                refs.residual_out.at[row],
                refs.rows_out[after_down].at[row],
                refs.squares,
                eps=layer.eps,
                threads=128 * layer.warpgroups,
                permuted=permuted,
                interpret=layer.interpret,
            )

    publish(layer.interpret)


@partial(jax.jit, static_argnames=("configs", "programs", "rows", "eps", "activation", "interpret"))
def _launch(
    parts: AttentionParts,
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
        plan = Plan(config, k // config.block_k, group, LAYER_CODE, 0, False, interpret, scales_by_group=True)
        products.append(_Product(plan, n // config.block_n))
    layer = _Layer(tuple(products), programs, rows, eps, activation, interpret)
    left = [
        jax.ShapeDtypeStruct((c.split_k, m, packed.shape[1]), jnp.float32)
        for c, (packed, _) in zip(configs, weights, strict=True)
    ]
    left[1] = jax.ShapeDtypeStruct((m, weights[1][0].shape[1] // 2), dtype)
    normed, attended = (jax.ShapeDtypeStruct((m, k), dtype) for k in (width, weights[0][0].shape[2]))
    # The residual, the rows after out and after down, out's own, and what products leave.
    outputs = [normed, normed, normed, attended, *left]

    def kernel(*refs):
        inputs, rows, left, memory = _cut(refs, 7 + 2 * len(products), 4, len(products))
        stats, values, residual, post_norm, following_norm, number, counter, *flat = inputs
        residual_out, after_out, after_down, attended = rows
        x = (attended, after_out, left[1], after_down)
        operands = [_Operands(*of) for of in zip(x, flat[::2], flat[1::2], left, strict=False)]
        ours = _Refs(
            AttentionParts(stats, values),
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
            plgpu.set_max_registers(COPY_REGISTERS[layer.warpgroups], action="decrease")
            _copy(layer, ours)

        @pl.when(role < layer.warpgroups)
        def _():
            plgpu.set_max_registers(MULTIPLY_REGISTERS[layer.warpgroups], action="increase")
            _multiply(layer, ours)

    packed, scales = weights[0]
    call = plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(1,) if interpret else (programs,),
        grid_names=("cluster",) if interpret else ("program",),
        cluster=(programs,) if interpret else (),
        cluster_names=("program",) if interpret else (),
        num_threads=layer.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            ring_memory(products[0].plan, dtype, packed.dtype, scales.dtype),
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
    residual, _, rows_after, _, *left = call(*parts, residual, *norms, number, shared, *flat)
    result = left[3] if len(products) > 3 else rows_after
    return residual, result, counter if interpret else jax.freeze(shared)


def _cut(refs: tuple, *sizes: int) -> Iterator[tuple]:
    """So many of them, and the rest."""
    for size in sizes:
        yield refs[:size]
        refs = refs[size:]
    yield refs


def decode_layer(
    parts: AttentionParts,
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
      parts: of the attention; float32, heads of 64, 128 or 256.
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
    padded = residual if m == block_m else jnp.pad(residual, ((0, block_m - m), (0, 0)))
    how: dict[str, Any] = dict(configs=configs, programs=programs, rows=m, eps=eps, activation=activation)
    residual, result, counter = _launch(parts, padded, norms, number, counter, weights, interpret=interpret, **how)
    return residual[:m], result[..., :m, :], counter
