"""Steps of `mosaic_layer_roles.py` written in Mosaic GPU's instructions; its interpreter cannot run them, so each that computes has a twin in jnp."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.gated_activation import ACTIVATIONS, IS_GELU
from pallas_kernels.mosaic_instructions import Numbers, thread_index
from pallas_kernels.mosaic_partial_sums import sums_of
from pallas_kernels.rows import permute_columns

AT_A_TIME = 16
"""Pieces of a sum whose loads a thread begins before it waits for the first: four registers each."""


def synchronize(counter, count) -> None:
    """Count this program in, and wait until all are: until `counter` has come to `count`, int32 [].

    What their warp groups wrote before may then be read, by loads.
    """
    count_in(counter)
    await_count(counter, count)


def count_in(counter) -> None:
    """Add 1 to a counter, int32 [1] of device memory: who then sees it may read what this warp group wrote before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def add(_, counter):
        # Each thread's writes come before the one that counts them.
        utils.warpgroup_barrier()
        chosen = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        one = utils.c(1, ir.IntegerType.get_signless(32))
        place = utils.memref_ptr(counter)
        utils.inline_ptx(
            "red.release.gpu.global.add.u32 [$0], $1;", place, one, predicate=chosen, has_side_effects=True
        )

    add(counter)


def await_count(counter, count) -> None:
    """Wait until a counter has come to `count`, int32 []. A warp group that waits for seconds ends with an error."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(_, counter, count):
        chosen = arith.extui(
            ir.IntegerType.get_signless(32), utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        )
        utils.inline_ptx(_WAIT, utils.memref_ptr(counter), count.registers.item(), chosen)
        utils.warpgroup_barrier()

    wait(counter, count)


_WAIT = """{
.reg .pred other, waits, late;
.reg .b32 count, polls;
mov.b32 polls, 0;
setp.eq.b32 other, $2, 0;
@other bra met;
again:
ld.acquire.gpu.global.u32 count, [$0];
add.u32 polls, polls, 1;
setp.gt.u32 late, polls, 0x800000;
@late trap;
setp.lt.u32 waits, count, $1;
@waits bra again;
met:
}"""


def order_copies(interpret: bool) -> None:
    """Let copies (TMA) that this thread begins read what other programs stored before the last meeting.

    They are of another proxy than loads and stores; one fence between a store and the copy is enough, wherever on the way it is.
    """
    if interpret:
        return

    @plgpu.inline_mgpu()
    def fence(_):
        utils.inline_ptx("fence.proxy.async.global;")

    fence()


def prefetch(row, interpret: bool) -> None:
    """Have a row of device memory in the L2 cache soon; by at least as many threads as it has lines of 128 bytes."""
    if interpret:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def ask(_, row):
        i32, memref = ir.IntegerType.get_signless(32), ir.MemRefType(row.type)
        line = 128 // utils.bytewidth(memref.element_type)
        thread = thread_index()
        inside = arith.cmpi(arith.CmpIPredicate.ult, thread, utils.c(-(-memref.shape[0] // line), i32))
        place = utils.getelementptr(
            utils.memref_ptr(row), [arith.muli(thread, utils.c(line, i32))], memref.element_type
        )
        utils.inline_ptx("prefetch.global.L2 [$0];", place, predicate=inside, has_side_effects=True)

    ask(row)


def _digit(value, divisor: int, modulus: int, factor: int, i32):
    """value // divisor % modulus * factor."""
    value = arith.remui(arith.divui(value, utils.c(divisor, i32)), utils.c(modulus, i32))
    return arith.muli(value, utils.c(factor, i32))


def store_gated(sums, out, tile, activation: str, interpret: bool) -> None:
    """activation(gate) * up of float32 sums [64, M], whose rows are of gate and up in turn by eights, into `out` [M, F].

    The 32 results of a row of x go to columns 32 * `tile` and on, in the order of `rows.permute_columns`.
    """
    if interpret:
        gate, up = jnp.moveaxis(sums.reshape(4, 2, 8, -1), 1, 0).reshape(2, 32, -1)
        gated = (ACTIVATIONS[activation](gate) * up).astype(out.dtype)
        out[:, pl.ds(32 * tile, 32)] = permute_columns(gated.T)
        return
    (m, width), gelu = out.shape, IS_GELU[activation]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_, sums, out):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        kind, target = ir.MemRefType(out.type).element_type, utils.memref_ptr(out)
        pair = ir.VectorType.get((2,), kind)
        lane = arith.remui(thread_index(), utils.c(128, i32))
        # Thread 32 w + 4 r + t of a warp group has column 8 w + r of the results in rows 8 b + 2 t and the next. Of those, it and
        # the one of r xor 1 exchange one, so that each stores both columns of one row.
        column, odd = arith.divui(lane, utils.c(4, i32)), _digit(lane, 4, 2, 1, i32)
        row = arith.addi(_digit(lane, 1, 4, 2, i32), odd)
        chosen = arith.select(
            arith.cmpi(arith.CmpIPredicate.eq, odd, utils.c(0, i32)), utils.c(0x5410, i32), utils.c(0x3276, i32)
        )

        # Column 16 c + 4 t + 2 h + j goes to 16 c + 8 h + 2 t + j.
        pieces = [_digit(column, *of, i32) for of in ((16, 2, 16), (4, 4, 2), (2, 2, 8))]
        offset = arith.addi(arith.muli(row, utils.c(width, i32)), pieces[0])
        for piece in pieces[1:]:
            offset = arith.addi(offset, piece)
        registers = sums.registers.reshape(m // 8, 2)
        for block in range(m // 8):
            values = []
            for half in range(2):
                gate, up = (vector.extract(register, [], [half]) for register in registers[block])
                values.append(arith.truncf(kind, _gate_times_up(gate, up, gelu, f32)))
            own = utils.bitcast(vector.from_elements(pair, values), i32)
            other = utils.shfl_bfly(own, 4)
            both = utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", own, other, chosen, result_types=i32)
            place = arith.addi(offset, utils.c(8 * block * width, i32))
            llvm.store(utils.bitcast(both, pair), utils.getelementptr(target, [place], kind))

    store(sums, out.at[:, pl.ds(32 * tile, 32)])


def gate_pieces(
    pieces, out, program, programs: int, *, rows: int, threads: int, activation: str, interpret: bool
) -> None:
    """activation(gate) * up of the sums of `pieces` [P, M, 2F] (`mosaic_partial_sums.py`), with gate and up in turn by eights, into `out` [M, F].

    Of its first `rows` rows, this `program` of so many does its part, by `threads` threads; columns come in the order of
    `rows.permute_columns`.
    """
    if interpret:

        @pl.when((program == 0) & (lax.axis_index("warpgroup") == 0))
        def _():
            sums = sums_of(pieces[...])
            gate, up = jnp.moveaxis(sums.reshape(len(sums), -1, 2, 8), 2, 0).reshape(2, len(sums), -1)
            out[...] = permute_columns((ACTIVATIONS[activation](gate) * up).astype(out.dtype))

        return
    (count, _, width), gelu = pieces.shape, IS_GELU[activation]
    chunks = width // 8  # of four results
    items = rows * chunks

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def gate(_, pieces, out, block):
        of, f32 = Numbers(), ir.F32Type.get()
        kind = ir.MemRefType(out.type).element_type
        eight, wide, pair = (ir.VectorType.get((n,), of_each) for n, of_each in ((8, kind), (8, f32), (2, kind)))
        strides, out_strides = (ir.MemRefType(ref.type).get_strides_and_offset()[0] for ref in (pieces, out))
        source, target = utils.memref_ptr(pieces), utils.memref_ptr(out)
        item = of.add(of.mul(block.registers.item(), threads), of.rem(thread_index(), threads))
        inside, item = of.below(item, items), of.least(item, items - 1)
        row, chunk = of.div(item, chunks), of.rem(item, chunks)
        own = of.add(of.mul(row, strides[1]), of.mul(chunk, 8))

        def load(piece: int):
            # Volatile: the compiler would move it behind the branch that stores, and each would be waited for.
            place = utils.getelementptr(source, [of.add(own, piece * strides[0])], kind)
            return llvm.load(eight, place, volatile_=True)

        sums = None
        for first in range(0, count, AT_A_TIME):
            some = range(first, min(first + AT_A_TIME, count))
            for piece in [load(piece) for piece in some]:
                piece = arith.extf(wide, piece)
                sums = piece if sums is None else arith.addf(sums, piece)
        # Two of gate, the two of up, and again.
        values = [
            arith.truncf(kind, _gate_times_up(*(vector.extract(sums, [], [i + up]) for up in (0, 2)), gelu, f32))
            for i in (0, 1, 4, 5)
        ]
        # Of 16 columns, the chunk t has 4 t + 2 h + j: they go to 8 h + 2 t + j.
        first_column = of.add(of.mul(of.div(chunk, 4), 16), of.mul(of.rem(chunk, 4), 2))
        place = of.add(of.mul(row, out_strides[0]), first_column)
        with utils.when(inside):
            for h in range(2):
                both = vector.from_elements(pair, values[2 * h : 2 * h + 2])
                llvm.store(both, utils.getelementptr(target, [of.add(place, 8 * h)], kind))

    @pl.loop(0, math.ceil(items / (programs * threads)))
    def _(turn):
        gate(pieces, out, program + turn * programs)


def _gate_times_up(gate, up, gelu: bool, f32):
    """activation(gate) * up of float32 values: gate * sigmoid(s) * up, s = gate or 2 sqrt(2/pi) (gate + 0.044715 gate^3)."""

    def number(value):
        return arith.constant(f32, ir.FloatAttr.get(f32, value))

    inner = gate
    if gelu:
        cube = arith.mulf(arith.mulf(gate, gate), gate)
        inner = arith.mulf(arith.addf(gate, arith.mulf(cube, number(0.044715))), number(1.5957691216057308))
    power = arith.mulf(inner, number(-1.4426950408889634))
    power = utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", power, result_types=f32)
    sigmoid = utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", arith.addf(power, number(1.0)), result_types=f32)
    return arith.mulf(arith.mulf(gate, sigmoid), up)


def add_norm_row(residual, parts, scale, rows, squares, plain, *, eps: float, threads: int, interpret: bool) -> None:
    """residual += the sum of parts [S, D] (`mosaic_partial_sums.py`); rows = residual / rms(residual) * scale, with permuted columns unless `plain`. One row, by `threads` threads.

    Roundings are those of `add_rms_norm_triton.py`: the branch is added in float32, and the rounded sum is what is normed.
    """
    if interpret:

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            total = (residual[...].astype(jnp.float32) + sums_of(parts[...])).astype(residual.dtype)
            residual[...] = total
            wide = total.astype(jnp.float32)
            normed = (wide * lax.rsqrt(jnp.mean(wide * wide) + eps)).astype(rows.dtype) * scale[...].astype(rows.dtype)
            rows[...] = jnp.where(plain, normed, permute_columns(normed[None])[0])

        return
    (count, width) = parts.shape

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 5, plgpu.Layout.WG_SPLAT))
    def add(_, residual, parts, scale, rows, squares, plain):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        wide, kind = ir.VectorType.get((8,), f32), ir.MemRefType(rows.type).element_type
        plain = arith.cmpi(arith.CmpIPredicate.ne, plain.registers.item(), utils.c(0, i32))
        narrow = ir.VectorType.get((8,), kind)
        stride = ir.MemRefType(parts.type).get_strides_and_offset()[0][0]
        thread = arith.remui(thread_index(), utils.c(threads, i32))

        def load(ref, offset, width: int):
            element = ir.MemRefType(ref.type).element_type
            value = llvm.load(ir.VectorType.get((width,), element), _place(ref, offset))
            return value if element == f32 else arith.extf(ir.VectorType.get((width,), f32), value)

        def _place(ref, offset):
            return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.MemRefType(ref.type).element_type)

        # Eight columns of a thread in turn, of 16 those of t = 2k', 2k' + 1 and 8 further, as the parts have them side by side; threads beyond the last
        # columns repeat the last ones and store nothing.
        chunks, mine, total = width // 8, [], arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        for start in range(0, chunks, threads):
            chunk = arith.addi(thread, utils.c(start, i32))
            inside = arith.cmpi(arith.CmpIPredicate.ult, chunk, utils.c(chunks, i32))
            chunk = arith.minui(chunk, utils.c(chunks - 1, i32))
            half, place = arith.remui(chunk, utils.c(2, i32)), arith.muli(chunk, utils.c(8, i32))
            column = arith.subi(place, arith.muli(half, utils.c(4, i32)))

            def load_both(ref, column=column):
                further = arith.addi(column, utils.c(8, i32))
                return utils.vector_concat([load(ref, column, 4), load(ref, further, 4)])

            value = None
            for part in range(count):
                piece = load(parts, arith.addi(place, utils.c(part * stride, i32)), 8)
                value = piece if value is None else arith.addf(value, piece)
            pairs = [utils.vector_slice(value, slice(2 * i, 2 * i + 2)) for i in (0, 2, 1, 3)]
            value = arith.truncf(narrow, arith.addf(load_both(residual), utils.vector_concat(pairs)))
            rounded = arith.extf(wide, value)
            square = vector.reduction(f32, vector.CombiningKind.ADD, arith.mulf(rounded, rounded))
            square = arith.select(inside, square, arith.constant(f32, ir.FloatAttr.get(f32, 0.0)))
            total = arith.addf(total, square)
            mine.append((half, inside, column, value, rounded, load_both(scale)))
        total = _sum_of_threads(total, squares, thread, threads, i32, f32)
        mean = arith.addf(
            arith.mulf(total, arith.constant(f32, ir.FloatAttr.get(f32, 1 / width))),
            arith.constant(f32, ir.FloatAttr.get(f32, eps)),
        )
        inverse = utils.inline_ptx("rsqrt.approx.f32 $0, $1;", mean, result_types=f32)
        for half, inside, column, value, rounded, factor in mine:
            normed = arith.mulf(rounded, vector.broadcast(wide, inverse))
            normed = arith.mulf(
                arith.extf(wide, arith.truncf(narrow, normed)), arith.extf(wide, arith.truncf(narrow, factor))
            )
            normed = arith.truncf(narrow, normed)
            with utils.when(inside):
                for i in range(2):
                    four = utils.vector_slice(value, slice(4 * i, 4 * i + 4))
                    llvm.store(four, _place(residual, arith.addi(column, utils.c(8 * i, i32))))
                # Of 16 columns, the pair h of t goes to 8h + 2t; this thread has t = k and k + 2.
                first = arith.subi(column, arith.muli(half, utils.c(2, i32)))
                for i in range(4):
                    pair = utils.vector_slice(normed, slice(2 * i, 2 * i + 2))
                    further, h = divmod(i, 2)
                    permuted = arith.addi(first, utils.c(8 * h + 4 * further, i32))
                    at = arith.select(plain, arith.addi(column, utils.c(8 * further + 2 * h, i32)), permuted)
                    llvm.store(pair, _place(rows, at))

    add(residual, parts, scale, rows, squares, jnp.asarray(plain).astype(jnp.int32))


def _sum_of_threads(value, squares, thread, threads: int, i32, f32):
    """The sum of a float32 of each of so many threads, by way of `squares` in shared memory, one a warp."""
    for distance in (16, 8, 4, 2, 1):
        value = arith.addf(value, utils.shfl_bfly(value, distance))
    shared = utils.memref_ptr(squares)
    first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(thread, utils.c(32, i32)), utils.c(0, i32))
    with utils.when(first):
        llvm.store(value, utils.getelementptr(shared, [arith.divui(thread, utils.c(32, i32))], f32))
    utils.inline_ptx(f"bar.sync 15, {threads};", convergent=True)
    total = None
    for warp in range(threads // 32):
        piece = llvm.load(f32, utils.getelementptr(shared, [warp], f32))
        total = piece if total is None else arith.addf(total, piece)
    return total
