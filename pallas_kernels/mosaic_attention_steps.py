"""Steps of `mosaic_layer_attention.py` written in Mosaic GPU's instructions; its interpreter cannot run them, so each has a twin in jnp."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic_instructions import ROWS, Numbers, thread_index, tiled
from pallas_kernels.mosaic_partial_sums import place_of_column, sums_of
from pallas_kernels.rows import permute_columns

AT_A_TIME = 4
"""Heads whose loads a warp begins before it waits for the first."""


def _scalars(given) -> list:
    return [scalar.registers.item() for scalar in given]


def _place(ref, offset, kind):
    return utils.getelementptr(utils.memref_ptr(ref), [offset], kind)


def rotate_heads(attention, refs, unit, layer, eps: float, threads: int, interpret: bool) -> None:
    """Sum, norm and rotate a unit's new heads: queries, keys and values in shared memory.

    A warp takes a head at a time, of which a lane has a few columns of either half. Roundings are those of `rope_cache_triton.py`.
    """
    if interpret:
        pl.when(lax.axis_index("warpgroup") == 0)(lambda: _rotate_in_jnp(attention, refs, unit, layer, eps))
        return
    depth, share, generations, kv_heads = attention.depth, attention.share, attention.generations, attention.kv_heads
    half, each, rows = depth // 2, depth // 64, attention.queries
    heads, given = kv_heads * share, refs.given
    (parts, _, width), stride = given.qkv.shape, given.qkv.shape[1] * given.qkv.shape[2]

    @plgpu.inline_mgpu(
        arg_types=(
            *[plgpu.RefType()] * 6,
            plgpu.RefType(tiled(128, 2)),
            plgpu.RefType(),
            *[plgpu.Layout.WG_SPLAT] * 5,
        )
    )
    def rotate(_, qkv, cos, sin, bias, q_norm, k_norm, queries, new, *scalars):
        question, generation, head, members, layer = _scalars(scalars)
        of, f32, bf16 = Numbers(), ir.F32Type.get(), ir.BF16Type.get()
        wide, narrow = ir.VectorType.get((each,), f32), ir.VectorType.get((each,), bf16)

        def load(ref, offset):
            # Volatile: the compiler would move it behind the branches that use it, and each would be waited for.
            kind = ir.MemRefType(ref.type).element_type
            value = llvm.load(ir.VectorType.get((each,), kind), _place(ref, offset, kind), volatile_=True)
            return value if kind == f32 else arith.extf(wide, value)

        def rounded(value):
            return arith.extf(wide, arith.truncf(narrow, value))

        lane, warp = of.rem(thread_index(), 32), of.div(thread_index(), 32)
        column = of.mul(lane, each)
        place = place_of_column(column, of)
        angle = of.add(of.mul(question, half), column)
        cosine, sine = (load(table, angle) for table in (cos, sin))
        scales = None
        if given.norms is not None:
            own = of.add(of.mul(layer, depth), column)
            scales = [[load(norm, of.add(own, start)) for start in (0, half)] for norm in (q_norm, k_norm)]

        def begin(first):
            """What is loaded of a warp's next head; of one that does not exist, another's."""
            row = of.add(warp, first)
            is_query, is_value = of.below(row, rows), of.below(rows + generations - 1, row)
            behind = of.sub(row, rows)
            of_new = of.sub(behind, of.either(is_value, generations, 0))
            member = of.either(is_query, of.div(row, share), of_new)
            exists = arith.andi(of.below(row, rows + 2 * generations), of.below(member, members))
            of_new = of.add(head, of.either(is_value, heads + kv_heads, heads))
            projected = of.either(is_query, of.add(of.mul(head, share), of.rem(row, share)), of_new)
            first_column = of.either(exists, of.mul(projected, depth), 0)
            generation_ = of.add(generation, of.either(exists, member, 0))
            offset = of.add(of.mul(generation_, width), first_column, place)
            halves = []
            for start in (0, half):
                pieces = [load(qkv, of.add(offset, part * stride + start)) for part in range(parts)]
                if given.bias is not None:
                    own = of.add(of.mul(layer, width), first_column, column)
                    pieces.append(load(bias, of.add(own, start)))
                halves.append(pieces)
            return row, behind, is_query, is_value, exists, halves

        def end(row, behind, is_query, is_value, exists, halves):
            summed = []
            for pieces in halves:
                total = pieces[0]
                for piece in pieces[1:]:
                    total = arith.addf(total, piece)
                summed.append(rounded(total))
            one, other = summed
            if scales is not None:
                chosen = [arith.select(is_query, *of_each) for of_each in zip(*scales, strict=True)]
                one, other = _normed(summed, chosen, rounded, depth, eps, f32)
            turned = (
                arith.subf(arith.mulf(one, rounded(cosine)), arith.mulf(other, rounded(sine))),
                arith.addf(arith.mulf(other, rounded(cosine)), arith.mulf(one, rounded(sine))),
            )
            for start, rotated, plain in zip((0, half), turned, summed, strict=True):
                value, at = arith.truncf(narrow, arith.select(is_value, plain, rotated)), of.add(column, start)
                with utils.when(arith.andi(exists, is_query)):
                    llvm.store(value, _place(queries, of.swizzled(row, at, depth), ir.IntegerType.get_signless(8)))
                with utils.when(arith.andi(exists, of.below(rows - 1, row))):
                    llvm.store(value, _place(new, of.add(of.mul(behind, depth), at), bf16))

        turns = list(range(0, rows + 2 * generations, threads // 32))
        for some in range(0, len(turns), AT_A_TIME):
            for begun in [begin(first) for first in turns[some : some + AT_A_TIME]]:
                end(*begun)

    scalars = (unit.question, unit.generation, unit.head, unit.members, layer)
    unused = given.cos  # pointers that nothing follows
    bias, norms = unused if given.bias is None else given.bias, given.norms or (unused, unused)
    rotate(given.qkv, given.cos, given.sin, bias, *norms, refs.memory.queries, refs.memory.new, *scalars)


def _normed(halves, scales, rounded, depth: int, eps: float, f32):
    """The RMS norm of a warp's head, of which each lane has columns of both halves."""
    total = None
    for value in halves:
        square = vector.reduction(f32, vector.CombiningKind.ADD, arith.mulf(value, value))
        total = square if total is None else arith.addf(total, square)
    for distance in (16, 8, 4, 2, 1):
        total = arith.addf(total, utils.shfl_bfly(total, distance))

    def number(value):
        return arith.constant(f32, ir.FloatAttr.get(f32, value))

    mean = arith.addf(arith.mulf(total, number(1 / depth)), number(eps))
    inverse = utils.inline_ptx("rsqrt.approx.f32 $0, $1;", mean, result_types=f32)
    return [
        rounded(arith.mulf(rounded(arith.mulf(value, vector.broadcast(value.type, inverse))), rounded(scale)))
        for value, scale in zip(halves, scales, strict=True)
    ]


def _rotate_in_jnp(attention, refs, unit, layer, eps: float) -> None:
    """The twin."""
    share, depth, kv_heads, dtype = attention.share, attention.depth, attention.kv_heads, refs.memory.queries.dtype
    heads, given = kv_heads * share, refs.given

    def rounded(value):
        return value.astype(dtype).astype(jnp.float32)

    cos, sin = (rounded(table[unit.question]) for table in (given.cos, given.sin))

    def projected(generation, head, norm, rotates=True):
        columns = pl.ds(head * depth, depth)
        total = sums_of(given.qkv[:, generation, columns])
        value = rounded(total if given.bias is None else total + given.bias[layer, columns].astype(jnp.float32))
        if norm is not None:
            value = rounded(value * lax.rsqrt(jnp.mean(value * value) + eps))
            value = rounded(value * rounded(norm[layer].astype(jnp.float32)))
        if not rotates:
            return value
        one, other = jnp.split(value, 2)
        return jnp.concatenate([one * cos - other * sin, other * cos + one * sin])

    of_queries, of_keys = given.norms or (None, None)
    for member in range(attention.generations):

        @pl.when(member < unit.members)
        def _(member=member):
            generation = unit.generation + member
            for head in range(share):
                value = projected(generation, unit.head * share + head, of_queries)
                refs.memory.queries[member * share + head] = value.astype(dtype)
            key = projected(generation, heads + unit.head, of_keys)
            value = projected(generation, heads + kv_heads + unit.head, None, rotates=False)
            for which, new in enumerate((key, value)):
                refs.memory.new[which, member] = new.astype(dtype)


def complete(slots, new, used, takes_new, *, zeros: bool, interpret: bool) -> None:
    """Put the new token's row `new` [Hd] behind the `used` rows of `slots` [64, Hd], where there is one, and zeros behind it if asked for.

    By a warp group; whatever lies in slots out of use may be NaN, and as values, times a weight of 0, would stay that.
    """
    count, depth = slots.shape
    if interpret:
        row = lax.broadcasted_iota(jnp.int32, slots.shape, 0)
        behind = jnp.where((row == used) & takes_new, new[...][None], 0 if zeros else slots[...])
        slots[...] = jnp.where(row < used, slots[...], behind.astype(slots.dtype))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tiled(128, 2)), plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 2))
    def put(_, slots, new, *scalars):
        used, takes_new = _scalars(scalars)
        of, bf16, byte = Numbers(), ir.BF16Type.get(), ir.IntegerType.get_signless(8)
        eight, chunks = ir.VectorType.get((8,), bf16), depth // 8
        zero = arith.constant(eight, ir.DenseElementsAttr.get_splat(eight, ir.FloatAttr.get(bf16, 0.0)))
        thread, takes_new = of.rem(thread_index(), 128), of.equal(takes_new, 1)
        for first in range(0, count * chunks, 128):
            index = of.add(thread, first)
            row, chunk = of.div(index, chunks), of.rem(index, chunks)
            is_new = arith.andi(takes_new, of.equal(row, used))
            behind = arith.cmpi(arith.CmpIPredicate.uge, row, used) if zeros else is_new
            with utils.when(behind):
                value = llvm.load(eight, _place(new, of.mul(chunk, 8), bf16))
                value = arith.select(is_new, value, zero)
                llvm.store(value, _place(slots, of.swizzled(row, of.mul(chunk, 8), depth), byte))

    put(slots, new, used, takes_new.astype(jnp.int32))


def largest_of_columns(scores, memory, interpret: bool):
    """The largest of each column of float32 [64, N], by a warp group; `memory` [4, N] is its own, and free at its next barrier."""
    if interpret:
        return scores.max(axis=0)
    return _reduce_columns(scores, memory, arith.maximumf)


def sum_of_columns(values, memory, interpret: bool):
    """The sum of each column, likewise."""
    if interpret:
        return values.sum(axis=0)
    return _reduce_columns(values, memory, arith.addf)


def _reduce_columns(values, memory, op):
    columns = values.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(0)),
    )
    def reduce(_, values, memory):
        of, f32 = Numbers(), ir.F32Type.get()
        pair, layout = ir.VectorType.get((2,), f32), fragmented_array.WGMMA_LAYOUT.reduce((0,))
        lane, warp = of.rem(utils.thread_idx(), 32), of.rem(of.div(utils.thread_idx(), 32), 4)
        own = of.add(of.mul(warp, columns), of.mul(lane, 2))
        # Of each of the thread's columns, two in eight: of all rows of its warp.
        each = [
            op(*(vector.extract(row, [], [i]) for row in rows))
            for rows in values.registers.reshape(columns // 8, 2)
            for i in range(2)
        ]
        for distance in (4, 8, 16):
            others = [utils.shfl_bfly(value, distance) for value in each]
            each = [op(value, other) for value, other in zip(each, others, strict=True)]
        with utils.when(of.below(lane, 4)):
            for eight in range(columns // 8):
                both = vector.from_elements(pair, each[2 * eight : 2 * eight + 2])
                llvm.store(both, _place(memory, of.add(own, 8 * eight), f32))
        utils.warpgroup_barrier()
        wholes = []
        for eight in range(columns // 8):
            at = of.add(of.mul(of.rem(lane, 4), 2), 8 * eight)
            whole = llvm.load(pair, _place(memory, at, f32))
            for other in range(1, 4):
                whole = op(whole, llvm.load(pair, _place(memory, of.add(at, other * columns), f32)))
            wholes.append(whole)
        registers = np.array(wholes, dtype=object).reshape(layout.registers_shape((columns,)))
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return reduce(values, memory)


def store_weights(weights, out, interpret: bool) -> None:
    """float32 weights [64, N] of slots, as bfloat16 rows of heads [N, 64] of shared memory."""
    if interpret:
        out[...] = weights.T.astype(out.dtype)
        return
    columns = weights.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(tiled(128, 2))))
    def store(_, weights, out):
        of, bf16, byte = Numbers(), ir.BF16Type.get(), ir.IntegerType.get_signless(8)
        thread = of.rem(utils.thread_idx(), 128)
        slot = of.add(of.mul(of.div(thread, 32), 16), of.div(of.rem(thread, 32), 4))
        head = of.mul(of.rem(thread, 4), 2)
        registers = weights.registers.reshape(columns // 8, 2)
        for block, half, j in np.ndindex(columns // 8, 2, 2):
            value = arith.truncf(bf16, vector.extract(registers[block, half], [], [j]))
            at = of.swizzled(of.add(head, 8 * block + j), of.add(slot, 8 * half), ROWS)
            llvm.store(value, _place(out, at, byte))

    store(weights, out)


def leave_softmax(values, highest, total, memory, interpret: bool) -> None:
    """Leave weighted values [Hd, N] as rows of heads, and stats [N], in a warp group's part of the memory; float32."""
    depth, columns = values.shape
    if interpret:
        memory.values[:, pl.ds(0, depth)] = values.T
        memory.stats[0], memory.stats[1] = highest, total
        return

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            *[plgpu.Layout.WGMMA.reduce(0)] * 2,
            *[plgpu.RefType()] * 2,
        )
    )
    def leave(_, values, highest, total, memory, stats):
        of, f32 = Numbers(), ir.F32Type.get()
        stride = ir.MemRefType(memory.type).shape[1]
        thread = of.rem(thread_index(), 128)
        row = of.add(of.mul(of.div(thread, 32), 16), of.div(of.rem(thread, 32), 4))
        head = of.mul(of.rem(thread, 4), 2)
        registers = values.registers.reshape(depth // 64, columns // 8, 2)
        for tile, block, half, j in np.ndindex(depth // 64, columns // 8, 2, 2):
            value = vector.extract(registers[tile, block, half], [], [j])
            at = of.add(of.mul(of.add(head, 8 * block + j), stride), row, 64 * tile + 8 * half)
            llvm.store(value, _place(memory, at, f32))
        with utils.when(of.below(thread, 4)):
            for index, vector_ in enumerate((highest, total)):
                for block, value in enumerate(vector_.registers.reshape(columns // 8)):
                    llvm.store(value, _place(stats, of.add(head, columns * index + 8 * block), f32))

    leave(values, highest, total, memory.values, memory.stats)


def store_heads(attention, memory, unit, out, threads: int, interpret: bool) -> None:
    """Merge the softmaxes that the warp groups left, and store a unit's heads into `out` [M, H Hd] with permuted columns."""
    depth, share = attention.depth, attention.share
    if interpret:
        pl.when(lax.axis_index("warpgroup") == 0)(lambda: _store_in_jnp(attention, memory, unit, out))
        return
    width, rows, each = out.shape[1], attention.queries, depth // 32

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, *[plgpu.Layout.WG_SPLAT] * 3))
    def store(_, values, stats, out, *scalars):
        generation, head, members = _scalars(scalars)
        of, f32, bf16 = Numbers(), ir.F32Type.get(), ir.BF16Type.get()
        wide, pair = ir.VectorType.get((each,), f32), ir.VectorType.get((2,), bf16)
        groups, count, stride = ir.MemRefType(values.type).shape

        def power(value):
            return utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", value, result_types=f32)

        lane, warp = of.rem(thread_index(), 32), of.div(thread_index(), 32)
        column = of.mul(lane, each)
        for first in range(0, rows, threads // 32):
            row = of.add(warp, first)
            member = of.div(row, share)
            with utils.when(arith.andi(of.below(row, rows), of.below(member, members))):
                highest, total, given = [], [], []
                for group in range(groups):
                    of_stats = of.add(row, 2 * count * group)
                    highest.append(llvm.load(f32, _place(stats, of_stats, f32)))
                    total.append(llvm.load(f32, _place(stats, of.add(of_stats, count), f32)))
                    at = of.add(of.mul(of.add(row, count * group), stride), column)
                    given.append(llvm.load(wide, _place(values, at, f32)))
                top = arith.maximumf(*highest)
                factors = [power(arith.subf(one, top)) for one in highest]
                whole = arith.addf(*[arith.mulf(one, factor) for one, factor in zip(total, factors, strict=True)])
                inverse = arith.divf(arith.constant(f32, ir.FloatAttr.get(f32, 1.0)), whole)
                pieces = [
                    arith.mulf(one, vector.broadcast(wide, arith.mulf(factor, inverse)))
                    for one, factor in zip(given, factors, strict=True)
                ]
                merged = arith.addf(*pieces)
                of_row = of.mul(of.add(generation, member), width)
                of_head = of.mul(of.add(of.mul(head, share), of.rem(row, share)), depth)
                for i in range(each // 2):
                    # Column 16 c + 4 t + 2 h + j goes to 16 c + 8 h + 2 t + j.
                    first_of_pair = of.add(column, 2 * i)
                    inside = of.rem(first_of_pair, 16)
                    place = of.add(
                        of.sub(first_of_pair, inside),
                        of.mul(of.rem(of.div(inside, 2), 2), 8),
                        of.mul(of.div(inside, 4), 2),
                    )
                    value = arith.truncf(pair, utils.vector_slice(merged, slice(2 * i, 2 * i + 2)))
                    llvm.store(value, _place(out, of.add(of_row, of_head, place), bf16))

    store(memory.values, memory.stats, out, unit.generation, unit.head, unit.members)


def _store_in_jnp(attention, memory, unit, out) -> None:
    """The twin."""
    depth, share = attention.depth, attention.share
    highest, total, values = memory.stats[:, 0], memory.stats[:, 1], memory.values[...][:, :, :depth]
    factors = jnp.exp2(highest - highest.max(axis=0))
    whole = jnp.sum(values * factors[:, :, None], axis=0) / jnp.sum(total * factors, axis=0)[:, None]
    for member in range(attention.generations):

        @pl.when(member < unit.members)
        def _(member=member):
            own = permute_columns(whole[member * share : (member + 1) * share]).reshape(-1)
            columns = pl.ds(unit.head * share * depth, share * depth)
            out[unit.generation + member, columns] = own.astype(out.dtype)
