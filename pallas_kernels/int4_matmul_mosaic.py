"""The int4 and int8 matmul for Hopper GPUs by Pallas Mosaic GPU: out = x @ dequant(W[layer])^T (+ xa @ B[layer]^T).

Warp groups have roles. One copies: its single thread keeps a ring of `stages` slots in shared memory filled with blocks of
packed weights, of x and of scales (TMA), and owns few registers. The others multiply: each takes 64 rows of weights, reads
their bytes as fragments, dequantizes in registers (`dequantize`) and hands them to the tensor core as its left operand, whose
right one is x^T in shared memory. While one group dequantizes, the tensor core works for another, and both while the
next blocks arrive: what Triton's programs, whose warps do all of it in turn, do not overlap (docs/benchmarks.md).

x comes with permuted columns (`rows.permute_columns`), as for the `wgmma` form of `int4_matmul_triton.py`: a thread's four bytes
of 16 then are the four elements that its fragment wants. The adapter's product is one more of the tensor core, of the first part of K: the
last one, or the first where registers do not hold B so long.

Results of 64 rows of x and more go to memory by way of slots of the ring that nobody fills, in whole lines: threads by themselves would write 16
bytes of a row each, which took up to 3 of 20 us (docs/benchmarks.md).

Mosaic's interpreter (jax >= 0.11, on a CPU) runs the same code but for what `mosaic_instructions.py` holds, and takes the
left operand from shared memory.

Where there are more tiles of whole K than multiprocessors, and no adapter, each of these has one program: it takes tiles in turn, and the
next one's blocks arrive while it ends the last one. Otherwise `mosaic_product_plan.py` says who takes what.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math
from dataclasses import replace
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, tuning
from pallas_kernels.codes import group_size
from pallas_kernels.mosaic_instructions import ROWS, swizzle_bytes, tiled
from pallas_kernels.mosaic_product_plan import Plan, Share, can_cut
from pallas_kernels.mosaic_product_steps import (
    MULTIPLY_REGISTERS,
    SCALES_READ,
    Block,
    Part,
    Refs,
    Ring,
    add_adapter,
    begin_store,
    end_store,
    fill_slot,
    keeps_b,
    load_b,
    multiply_blocks,
    sum_xa,
)

COPY_REGISTERS = {2: 40, 3: 32, 4: 32}
"""Registers of a thread that copies, by the number of warp groups that multiply; theirs are `MULTIPLY_REGISTERS`."""
RING_ROWS = 64
"""Results of so many rows of x go through the ring; of 16, threads store them as fast."""


def _copy(plan: Plan, refs: Refs) -> None:
    """Fill the ring for all that the program multiplies."""
    config, share = plan.config, plan.share()

    def copy_tile(tile, used):
        row_m, row_n = plan.place(tile)

        def block_of_tile(slot, step) -> None:
            fill_slot(plan, refs, slot, [Part(step, row_n, config.block_n, row_m, config.block_m)])

        @pl.loop(0, plan.rounds(share))
        def _(index):
            if not config.cut:
                block_of_tile(used + index, share.first + index)
                return
            slot, steps = used + index * plan.round, plan.steps_of(index)
            for block, step in enumerate(steps):
                block_of_tile(slot + block, step)
            piece_m, piece_n = plan.piece()
            of_piece = [Part(step, piece_n, ROWS, piece_m, config.cut) for step in steps]
            fill_slot(plan, refs, slot + len(steps), of_piece)

        for lent in range(plan.lent):
            fill_slot(plan, refs, used + plan.blocks(share) + lent, [])

    share.each_tile(copy_tile, plan.slots(share))
    if plan.interpret:  # which asks who fills a ring to wait until it is read
        used = share.turns * plan.slots(share)
        late = pl.loop(jnp.maximum(0, used - config.stages), used)
        late(lambda block: plgpu.barrier_wait(refs.ring.empty.at[lax.rem(block, config.stages)]))


def _multiply(plan: Plan, refs: Refs) -> None:
    """Sums of all that the program multiplies."""
    share, sums = plan.share(), [plgpu.ACC((ROWS, plan.config.block_m), jnp.float32)]
    if plan.config.cut:
        sums.append(plgpu.ACC((ROWS, plan.config.cut), jnp.float32))

    def multiply_tile(tile, used):
        pl.run_scoped(partial(_multiply_tile, plan, refs, share, tile, used), *sums)

    share.each_tile(multiply_tile, plan.slots(share))


def _multiply_tile(plan: Plan, refs: Refs, share: Share, tile, used, sums, piece_sums=None) -> None:
    """A warp group's rows of a tile. A piece's blocks are between the tile's: by themselves, their copies were waited for."""
    (row_m, row_n), warpgroup = plan.place(tile), lax.axis_index("warpgroup")
    rows_m, rows_n = pl.ds(row_m, plan.config.block_m), pl.ds(row_n + warpgroup * ROWS, ROWS)
    last = plan.rank and keeps_b(plan)

    def blocks_of(index) -> list[Block]:
        if not plan.config.cut:
            return [Block(share.first + index, sums, slice(None))]
        of_tile = [Block(step, sums, slice(None)) for step in plan.steps_of(index)]
        rows = pl.ds(warpgroup * plan.config.cut, plan.config.cut)
        return [*of_tile, Block(index * plan.warpgroups + warpgroup, piece_sums, rows)]

    def adapter() -> None:
        @pl.when(share.part == 0)
        def _():
            plgpu.barrier_wait(refs.adapter["ready"])
            add_adapter(plan, refs, sums, b, rows_n, slice(None))

    if plan.rank:
        b = load_b(plan, refs, rows_n)
        pl.when(share.part == 0)(lambda: sum_xa(plan, refs, row_m))
        if not last:
            adapter()
    multiply_blocks(plan, refs.ring, used, plan.rounds(share), blocks_of)
    if last:
        adapter()
    out, lent = refs.out.at[share.part, rows_m, rows_n], used + plan.blocks(share)
    if plan.lent:
        begin_store(plan, refs.ring, lent, sums[...].astype(refs.out.dtype), out)
    else:
        _store(sums[...], out)
    if plan.config.cut:
        _end_piece(plan, refs, piece_sums)
    if plan.lent:
        end_store(plan, refs.ring, lent)


def _end_piece(plan: Plan, refs: Refs, sums) -> None:
    """The first warp group adds up all that they have of K, and the adapter's product."""
    (row_m, row_n), warpgroup, others = plan.piece(), lax.axis_index("warpgroup"), refs.exchange["sums"]
    rows_m, rows_n = pl.ds(row_m, plan.config.cut), pl.ds(row_n, ROWS)

    @pl.when(warpgroup > 0)
    def _():
        others.at[warpgroup - 1][...] = sums[...]
        plgpu.barrier_arrive(refs.exchange["ready"])

    @pl.when(warpgroup == 0)
    def _():
        if plan.rank:
            add_adapter(plan, refs, sums, load_b(plan, refs, rows_n), rows_n, rows_m)
        plgpu.barrier_wait(refs.exchange["ready"])
        layout = plgpu.Layout.WGMMA
        theirs = [plgpu.load(others.at[other], layout=layout, optimized=False) for other in range(plan.warpgroups - 1)]
        _store(sum(theirs, sums[...]), refs.out.at[0, rows_m, rows_n])


def _store(sums, out) -> None:
    """[64, M] in registers to [M, 64]."""
    out.T[...] = plgpu.layout_cast(sums.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)


def _ring_memory(plan: Plan, x_dtype, packed_dtype, scales_dtype) -> Ring:
    """What `Ring` has."""
    config = plan.config
    stages, left = config.stages, None
    x = plgpu.SMEM((stages, config.block_m, config.block_k), x_dtype, transforms=tiled(128, 2))
    results = plgpu.SMEM((stages * config.block_k // ROWS, config.block_m, ROWS), x_dtype, transforms=tiled(128, 2))
    rows = (x, results if plan.lent else None)
    if plan.lent and not plan.interpret:  # which takes two names of a memory for a race
        rows = plgpu.RefUnion(*rows)
    if plan.interpret:
        width, transforms = max(plan.group, plan.rank), tiled(swizzle_bytes(plan.rank or plan.group), 2)
        left = plgpu.SMEM((plan.warpgroups, ROWS, width), x_dtype, transforms=transforms)
    return Ring(
        rows,
        plgpu.SMEM(
            (stages, config.block_n, plan.block_bytes), packed_dtype, transforms=tiled(min(plan.block_bytes, 128), 1)
        ),
        plgpu.SMEM((stages, config.block_n, SCALES_READ), scales_dtype),
        plgpu.Barrier(num_arrivals=plan.copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=stages),
        left,
    )


def _adapter_memory(plan: Plan, dtype) -> dict:
    """What `Refs.adapter` has."""
    if not plan.rank:
        return {}
    shape = (plan.config.block_m, plan.rank)
    return {
        "xa": plgpu.SMEM(shape, dtype, transforms=tiled(swizzle_bytes(plan.rank), 2)),
        "ready": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }


def _exchange_memory(plan: Plan) -> dict:
    """What `Refs.exchange` has."""
    if not plan.config.cut:
        return {}
    others = plan.warpgroups - 1
    return {
        "sums": plgpu.SMEM((others, ROWS, plan.config.cut), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=others),
    }


def _lent(config: tuning.Int4Config, x_dtype, out_dtype) -> int:
    """`Plan.lent`. All of these slots are given back at once, so the ring must have as many."""
    slots = math.ceil(config.block_n / config.block_k)
    through_ring = out_dtype == x_dtype and config.block_m >= RING_ROWS and slots <= config.stages
    return slots if through_ring else 0


def _clips(config: tuning.Int4Config, m: int, x_dtype, out_dtype, interpret: bool) -> bool:
    """Whether the last tile may have fewer rows: copies by TMA, of eights of rows, leave out what an array does not have.

    What threads store, and the interpreter, needs whole tiles.
    """
    return m >= config.block_m and m % 8 == 0 and _lent(config, x_dtype, out_dtype) > 0 and not interpret


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
    """[S, M, N].

    x [M, K] permuted, of whole tiles unless `_clips`, packed [L, N, K/2 or K], scales [L, N, K/G or more], layer int32 [1], xa [P, M, R] and
    lora_b [L or 1, N, R].
    """
    (m, k), n, rank = x.shape, packed.shape[1], 0 if xa is None else xa.shape[-1]
    tiles_m, steps = math.ceil(m / config.block_m), k // config.block_k
    tiles, b_stacked = tiles_m * (n // config.block_n), bool(rank) and lora_b.shape[0] > 1
    # Tiles in turn are of whole K, or the rest of it, and have no adapter to wait for.
    in_turn = config.rest or (not rank and config.split_k == 1 and tiles > programs and not config.cut)
    sharing = programs if in_turn else 0
    lent, whole = _lent(config, x.dtype, out_dtype), programs if config.cut else tiles
    shares = (whole, tiles_m, sharing, lent, tiles - whole)
    plan = Plan(config, steps, group, code, rank, b_stacked, interpret, *shares, rows=m)

    def kernel(*refs):
        arrays, others = (refs[:6], refs[6:]) if rank else ((*refs[:4], None, None), refs[4:])
        refs, role = Refs(*arrays, *others), lax.axis_index("warpgroup")

        @pl.when(role == plan.warpgroups)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS[plan.warpgroups], action="decrease")
            _copy(plan, refs)

        @pl.when(role < plan.warpgroups)
        def _():
            plgpu.set_max_registers(MULTIPLY_REGISTERS[plan.warpgroups], action="increase")
            _multiply(plan, refs)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((config.parts, m, n), out_dtype),
        grid=plan.grid,
        grid_names=("program", "split"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            _ring_memory(plan, x.dtype, packed.dtype, scales.dtype),
            _adapter_memory(plan, x.dtype),
            _exchange_memory(plan),
        ),
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
    tiles_m = math.ceil(m / config.block_m)
    tiles = tiles_m * (packed.shape[-2] // config.block_n)
    if tiles >= programs:
        config = replace(config, rest=0)  # no program is left over
    if tiles_m > 1 or not can_cut(config, tiles, permuted.shape[1] // config.block_k, programs):
        config = replace(config, cut=0)
    clips = _clips(config, m, permuted.dtype, jnp.dtype(out_dtype), interpret)
    rows = m if clips else tiles_m * config.block_m
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
