"""The int4 and int8 matmul for Hopper GPUs by Pallas Mosaic GPU: out = x @ dequant(W[layer])^T (+ xa @ B[layer]^T).

Warp groups have roles. One copies: its single thread keeps a ring of `stages` slots in shared memory filled with blocks of
packed weights, of x and of scales (TMA), and owns few registers. The others multiply: each takes 64 rows of weights, reads
their bytes as fragments, dequantizes in registers (`dequantize`) and hands them to the tensor core as its left operand, whose
right one is x^T in shared memory. While one group dequantizes, the tensor core works for another, and both while the
next blocks arrive: what Triton's programs, whose warps do all of it in turn, do not overlap (docs/benchmarks.md).

x comes with permuted columns (`rows.permute_columns`), as for the `wgmma` form of `int4_matmul_triton.py`: a thread's four bytes
of 16 then are the four elements that its fragment wants. The adapter's product is one more of the tensor core, the first one of the
first part of K.

Mosaic's interpreter (jax >= 0.11, on a CPU) runs the same code but for what `mosaic_instructions.py` holds, and takes the
left operand from shared memory.

Where there are more tiles of whole K than multiprocessors, and no adapter, each of these has one program: it takes tiles in turn, and the
next one's blocks arrive while it ends the last one. Where there are fewer, `mosaic_product_plan.py` says who takes what.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, tuning
from pallas_kernels.codes import PER_BYTE, group_size
from pallas_kernels.mosaic_instructions import ROWS, dequantize, sum_parts, swizzle_bytes, tiled
from pallas_kernels.mosaic_product_plan import Plan

COPY_REGISTERS = {2: 40, 3: 32, 4: 32}
"""Registers of a thread that copies, by the number of warp groups that multiply; theirs are `MULTIPLY_REGISTERS`."""
MULTIPLY_REGISTERS = {2: 232, 3: 160, 4: 112}

SCALES_READ = 8
"""Scales of a row that one copy brings: 16 bytes, the least, from an address that 16 divides."""


class _Ring(NamedTuple):
    """Slots in shared memory that are filled with blocks and multiplied, and their barriers."""

    x: Any
    packed: Any
    scales: Any
    full: Any
    empty: Any
    left: Any
    """Of the interpreter: where a warp group puts its left operand; None on a GPU."""


class _Refs(NamedTuple):
    """Arrays in device memory, then what the warp groups of a program share."""

    x: Any
    packed: Any
    scales: Any
    layer: Any
    xa: Any
    b: Any
    out: Any
    ring: _Ring
    adapter: dict
    """Its x A^T in shared memory and the barrier that says so, or nothing."""


def _copy_blocks(plan: Plan, refs: _Refs) -> None:
    """Fill the ring, a slot as soon as all who multiply have read it."""
    config, layer, share = plan.config, refs.layer[0], plan.share()

    def copy_tile(tile, used):
        (row_m, row_n), start = plan.place(tile), used - share.first
        rows_m, rows_n = pl.ds(row_m, config.block_m), pl.ds(row_n, config.block_n)

        @pl.loop(share.first, share.last)
        def _(step):
            slot = lax.rem(start + step, config.stages)

            @pl.when(start + step >= config.stages)
            def _():
                plgpu.barrier_wait(refs.ring.empty.at[slot])

            def copy(source, ring):
                plgpu.copy_gmem_to_smem(source, ring.at[slot], refs.ring.full.at[slot])

            copy(refs.packed.at[layer, rows_n, pl.ds(step * plan.block_bytes, plan.block_bytes)], refs.ring.packed)
            scales = pl.ds(step * plan.groups // SCALES_READ * SCALES_READ, SCALES_READ)
            copy(refs.scales.at[layer, rows_n, scales], refs.ring.scales)
            copy(refs.x.at[rows_m, pl.ds(step * config.block_k, config.block_k)], refs.ring.x)

    share.each_tile(copy_tile)
    if plan.interpret:  # which asks who fills a ring to wait until it is read
        used = share.turns * (share.last - share.first)
        late = pl.loop(jnp.maximum(0, used - config.stages), used)
        late(lambda block: plgpu.barrier_wait(refs.ring.empty.at[lax.rem(block, config.stages)]))


def _multiply_blocks(plan: Plan, refs: _Refs) -> None:
    """Sums of a warp group's 64 rows of weights over the program's blocks of K, and the adapter's product in the first part."""
    share, own = plan.share(), lax.axis_index("warpgroup") * ROWS

    def multiply_tile(tile, used):
        row_m, row_n = plan.place(tile)
        rows_m, rows_n = pl.ds(row_m, plan.config.block_m), pl.ds(row_n + own, ROWS)

        def all_products(sums):
            @pl.when(share.part == 0)
            def _():
                _add_adapter(plan, refs, sums, rows_m, rows_n)

            _multiply_ring(plan, refs.ring, sums, used, share.first, share.last)
            return sums[...]

        sums = pl.run_scoped(all_products, plgpu.ACC((ROWS, plan.config.block_m), jnp.float32))
        sums = plgpu.layout_cast(sums.astype(refs.out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        refs.out.at[share.part, rows_m, rows_n].T[...] = sums

    share.each_tile(multiply_tile)


def _add_adapter(plan: Plan, refs: _Refs, sums, rows_m, rows_n) -> None:
    """Add B's rows times x A^T, as many columns at a time as a tile has; first of all, since its reads take as long as the first block does."""
    if not plan.rank:
        return
    layer, width = refs.layer[0] if plan.b_stacked else 0, swizzle_bytes(plan.rank) // 2
    tiles = [pl.ds(column, width) for column in range(0, plan.rank, width)]

    def load_b(tile):
        return plgpu.load(refs.b.at[layer, rows_n, tile], layout=plgpu.Layout.WGMMA, optimized=False)

    b = load_b(tiles[0])
    sum_parts(refs.xa.at[:, rows_m], refs.adapter["xa"], 128 * plan.warpgroups, plan.interpret)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.adapter["ready"])
    plgpu.barrier_wait(refs.adapter["ready"])
    for index, tile in enumerate(tiles):
        add_product(refs.ring.left, sums, load_b(tile) if index else b, refs.adapter["xa"].at[:, tile])
        plgpu.wgmma_wait(0)


def _multiply_ring(plan: Plan, ring: _Ring, sums, used, first, last) -> None:
    """Add the products of blocks `first` to `last`, the warp group's rows of their weights; `used` blocks of the ring were before.

    A group is dequantized while the tensor core multiplies those before it. It ends all of an iteration in it: what it still reads in
    registers, the compiler protects within an iteration and not in the next (weights of one group a block came out wrong on an H200).
    """
    blocks, most = _at_once(plan)

    def multiply(steps: list) -> None:
        before, issued = None, 0  # the slot of the block before, until it is read; groups so far
        for step in steps:
            slot = lax.rem(used - first + step, plan.config.stages)
            plgpu.barrier_wait(ring.full.at[slot])
            for index, weights in enumerate(_weights(plan, ring, step, slot), 1):
                add_product(ring.left, sums, weights, ring.x.at[slot, :, pl.ds((index - 1) * plan.group, plan.group)])
                issued += 1
                running = most - 1 if index < plan.groups else min(most - 1, plan.groups)
                read = before is not None and running <= index
                if read or running < issued < len(steps) * plan.groups:
                    plgpu.wgmma_wait(running)
                if read:
                    plgpu.barrier_arrive(ring.empty.at[before])
                    before = None
            before = slot
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(ring.empty.at[before])

    left = first
    if blocks > 1:
        turns = lax.div(last - first, blocks)
        pl.loop(0, turns)(lambda turn: multiply([first + turn * blocks + block for block in range(blocks)]))
        left = first + blocks * turns
    pl.loop(left, last)(lambda step: multiply([step]))


def _at_once(plan: Plan) -> tuple[int, int]:
    """Blocks of an iteration, and groups of them that the tensor core may read at once: what was fastest on an H200 of what registers hold.

    With more groups, the compiler spilled registers or let the tensor core end each product by itself.
    """
    m, block_k, warpgroups = plan.config.block_m, plan.config.block_k, plan.warpgroups
    if PER_BYTE[plan.code] == 2:
        sums, packed, group, others = m // 2, plan.block_bytes // 8, plan.group // 4, 40  # registers
        fit = sums + packed + 2 * group + others <= MULTIPLY_REGISTERS[warpgroups]
        return (max(1, 512 // block_k), 2) if fit else (1, 1)
    columns = 256 if warpgroups == 2 or m <= 32 else 128 if m <= 64 else 64
    return max(1, columns // block_k), max(1, columns // plan.group)


def _weights(plan: Plan, ring: _Ring, step, slot) -> Iterator[Any]:
    """The groups of a warp group's rows of the block in a slot, each [64, G]."""
    rows = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
    first = lax.rem(step * plan.groups, SCALES_READ)
    return dequantized_groups(plan, ring.packed.at[slot, rows], lambda group: ring.scales.at[slot, rows, first + group])


def dequantized_groups(plan: Plan, packed, scales: Callable[[int], Any]) -> Iterator[Any]:
    """The groups of a warp group's rows of a block, each [64, G]; `scales` gives the place of a group's [64]."""
    group_bytes = plan.group // PER_BYTE[plan.code]
    words = plgpu.load(packed, layout=plgpu.Layout.WGMMA_8BIT)
    for index in range(plan.groups):
        scale = plgpu.load(scales(index), layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        yield dequantize(words[:, index * group_bytes : (index + 1) * group_bytes], scale, plan.code, plan.interpret)


def add_product(memory, sums, left, right) -> None:
    """sums += left @ right^T, begun but not awaited; `left` is in registers, and of the interpreter first put into `memory`."""
    if memory is not None:
        shared = memory.at[lax.axis_index("warpgroup"), :, pl.ds(0, left.shape[1])]
        shared[...] = left
        plgpu.commit_smem()
        left = shared
    plgpu.wgmma(sums, left, right.T)


def _ring_memory(plan: Plan, x_dtype, packed_dtype, scales_dtype) -> _Ring:
    """What `_Ring` has."""
    config = plan.config
    stages, left = config.stages, None
    if plan.interpret:
        width, transforms = max(plan.group, plan.rank), tiled(swizzle_bytes(plan.rank or plan.group), 2)
        left = plgpu.SMEM((plan.warpgroups, ROWS, width), x_dtype, transforms=transforms)
    return _Ring(
        plgpu.SMEM((stages, config.block_m, config.block_k), x_dtype, transforms=tiled(128, 2)),
        plgpu.SMEM(
            (stages, config.block_n, plan.block_bytes), packed_dtype, transforms=tiled(min(plan.block_bytes, 128), 1)
        ),
        plgpu.SMEM((stages, config.block_n, SCALES_READ), scales_dtype),
        plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=stages),
        left,
    )


def _adapter_memory(plan: Plan, dtype) -> dict:
    """What `_Refs.adapter` has."""
    if not plan.rank:
        return {}
    shape = (plan.config.block_m, plan.rank)
    return {
        "xa": plgpu.SMEM(shape, dtype, transforms=tiled(swizzle_bytes(plan.rank), 2)),
        "ready": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }


@partial(jax.jit, static_argnames=("group", "code", "config", "programs", "out_dtype", "interpret"))
def _launch(
    x,
    packed,
    scales,
    layer,
    xa,
    lora_b,
    *,
    group: int,
    code: str,
    config: tuning.Int4Config,
    programs: int,
    out_dtype,
    interpret: bool,
):
    """[S, M, N] of whole tiles.

    x [M, K] permuted, packed [L, N, K/2 or K], scales [L, N, K/G or more], layer int32 [1], xa [P, M, R] and lora_b [L or 1, N, R].
    """
    (m, k), n, rank = x.shape, packed.shape[1], 0 if xa is None else xa.shape[-1]
    tiles_m, steps = m // config.block_m, k // config.block_k
    tiles, b_stacked = tiles_m * (n // config.block_n), bool(rank) and lora_b.shape[0] > 1
    # Tiles in turn are of whole K, or the rest of it, and have no adapter to wait for.
    in_turn = config.rest or (not rank and config.split_k == 1 and tiles > programs)
    sharing = programs if in_turn else 0
    plan = Plan(config, steps, group, code, rank, b_stacked, interpret, tiles, tiles_m, sharing)

    def kernel(*refs):
        arrays, others = (refs[:6], refs[6:]) if rank else ((*refs[:4], None, None), refs[4:])
        refs, role = _Refs(*arrays, *others), lax.axis_index("warpgroup")

        @pl.when(role == plan.warpgroups)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS[plan.warpgroups], action="decrease")
            _copy_blocks(plan, refs)

        @pl.when(role < plan.warpgroups)
        def _():
            plgpu.set_max_registers(MULTIPLY_REGISTERS[plan.warpgroups], action="increase")
            _multiply_blocks(plan, refs)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((config.parts, m, n), out_dtype),
        grid=plan.grid,
        grid_names=("program", "split"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(_ring_memory(plan, x.dtype, packed.dtype, scales.dtype), _adapter_memory(plan, x.dtype)),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return call(x, packed, scales, layer, *((xa, lora_b) if rank else ()))


def partial_sums(
    permuted,
    packed,
    scales,
    layer,
    xa,
    lora_b,
    out_dtype,
    config: tuning.Int4Config,
    code: str = "int4",
    interpret: bool = False,
    programs: int | None = None,
):
    """Launch the kernel: [S, M, N], parts rounded to `out_dtype` before they are added (to float32, by who reads them).

    `permuted` is x with permuted columns; `programs` share the tiles of a large product, or the rest of K, by default as many as the GPU has
    multiprocessors; the other arguments are those of `int4_matmul_triton.partial_sums`.
    """
    m = permuted.shape[0]
    config = replace(config, block_m=min(config.block_m, max(16, tuning.power_of_two(m))))  # it may be of more rows
    config = _fitting(config, 0 if xa is None else xa.shape[-1], code)
    programs = dispatch.current_device().multiprocessors if programs is None else programs
    rows = math.ceil(m / config.block_m) * config.block_m
    if rows // config.block_m * (packed.shape[-2] // config.block_n) >= programs:
        config = replace(config, rest=0)  # no program is left over
    if packed.ndim == 2:
        packed, scales = packed[None], scales[None]
    if xa is not None:
        xa = xa if xa.ndim == 3 else xa[None]
        lora_b = lora_b if lora_b.ndim == 3 else lora_b[None]
        rank = _whole_rank(xa.shape[-1])
        xa, lora_b = (_padded(a, a.ndim - 1, rank) for a in (xa, lora_b))
        xa, lora_b = _padded(xa, 1, rows), lora_b.astype(permuted.dtype)
    group, read = group_size(packed, scales, code), math.ceil(scales.shape[-1] / SCALES_READ) * SCALES_READ
    # Whole sixteens of bytes: a copy where K / G is no multiple of 8, for 8,960 inputs and 1,536 outputs 0.4 of 7 MB.
    scales = _padded(scales, 2, read)
    layer = jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
    x = _padded(permuted, 0, rows)
    parts = _launch(
        x,
        packed,
        scales,
        layer,
        xa,
        lora_b,
        group=group,
        code=code,
        config=config,
        programs=programs,
        out_dtype=jnp.dtype(out_dtype),
        interpret=interpret,
    )
    return parts if rows == m else parts[:, :m]


def _whole_rank(rank: int) -> int:
    """What the tensor core takes at least, a multiple of 16; columns of zeros add nothing."""
    return math.ceil(rank / 16) * 16


def _fitting(config: tuning.Int4Config, rank: int, code: str) -> tuning.Int4Config:
    """`config` with fewer stages, and then fewer rows of x, where an adapter's x A^T leaves no room for its own."""
    fits = tuning.mosaic_stages(config, _whole_rank(rank), code)
    if fits < 2 and config.block_m > 16:
        return _fitting(replace(config, block_m=config.block_m // 2), rank, code)
    return replace(config, stages=min(config.stages, fits))


def _padded(array, axis: int, size: int):
    """`array` with zeros up to `size` along `axis`; itself where it has that size."""
    missing = size - array.shape[axis]
    return array if not missing else jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])
