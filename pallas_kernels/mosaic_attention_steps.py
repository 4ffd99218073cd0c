"""Steps of `mosaic_layer_attention.py` written in Mosaic GPU's instructions; its interpreter cannot run them, so each has a twin in jnp."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic_instructions import tiled
from pallas_kernels.rows import permute_columns


def rotate_heads(attention, refs, unit, layer, eps: float, threads: int, interpret: bool) -> None:
    """Sum, norm and rotate a unit's new heads: queries, keys and values in shared memory.

    A warp takes a head at a time, of which a lane has a few columns of either half. Roundings are those of `rope_cache_triton.py`.
    """
    if interpret:
        pl.when(lax.axis_index("warpgroup") == 0)(lambda: _rotate_in_jnp(attention, refs, unit, layer, eps))
        return
    depth, share, generations, kv_heads = attention.depth, attention.share, attention.generations, attention.kv_heads
    half, each, rows = depth // 2, depth // 64, attention.query_rows
    heads, given = kv_heads * share, refs.given
    (parts, _, width), stride = given.qkv.shape, given.qkv.shape[1] * given.qkv.shape[2]
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(
            *[plgpu.RefType()] * 6,
            plgpu.RefType(tiled(128, 2)),
            plgpu.RefType(),
            *[splat] * 5,
        )
    )
    def rotate(_, qkv, cos, sin, bias, q_norm, k_norm, queries, new, *scalars):
        question, generation, head, members, layer = (scalar.registers.item() for scalar in scalars)
        i32, f32, bf16 = ir.IntegerType.get_signless(32), ir.F32Type.get(), ir.BF16Type.get()
        wide, narrow = ir.VectorType.get((each,), f32), ir.VectorType.get((each,), bf16)

        def number(value):
            return utils.c(value, i32)

        def load(ref, offset):
            kind = ir.MemRefType(ref.type).element_type
            value = llvm.load(
                ir.VectorType.get((each,), kind), utils.getelementptr(utils.memref_ptr(ref), [offset], kind)
            )
            return value if kind == f32 else arith.extf(wide, value)

        def rounded(value):
            return arith.extf(wide, arith.truncf(narrow, value))

        def below(value, limit):
            return arith.cmpi(arith.CmpIPredicate.ult, value, limit if isinstance(limit, ir.Value) else number(limit))

        thread = utils.thread_idx()
        lane, warp = arith.remui(thread, number(32)), arith.divui(thread, number(32))
        column = arith.muli(lane, number(each))
        angle = arith.addi(arith.muli(question, number(half)), column)
        cosine, sine = (rounded(load(table, angle)) for table in (cos, sin))
        for first in range(0, rows + 2 * generations, threads // 32):
            row = arith.addi(warp, number(first))
            is_query, turns = below(row, rows), below(row, rows + generations)
            behind = arith.subi(row, number(rows))
            is_value = arith.cmpi(arith.CmpIPredicate.uge, row, number(rows + generations))
            of_new = arith.subi(behind, arith.select(is_value, number(generations), number(0)))
            member = arith.select(is_query, arith.divui(row, number(share)), of_new)
            of_query = arith.addi(arith.muli(head, number(share)), arith.remui(row, number(share)))
            of_new = arith.addi(head, arith.select(is_value, number(heads + kv_heads), number(heads)))
            projected = arith.muli(arith.select(is_query, of_query, of_new), number(depth))
            exists = arith.andi(below(row, rows + 2 * generations), below(member, members))
            with utils.when(exists):
                offset = arith.addi(
                    arith.muli(arith.addi(generation, member), number(width)), arith.addi(projected, column)
                )
                halves = []
                for start in (0, half):
                    at = arith.addi(offset, number(start))
                    total = load(qkv, at)
                    for part in range(1, parts):
                        total = arith.addf(total, load(qkv, arith.addi(at, number(part * stride))))
                    if given.bias is not None:
                        own = arith.addi(arith.muli(layer, number(width)), arith.addi(projected, column))
                        total = arith.addf(total, load(bias, arith.addi(own, number(start))))
                    halves.append(rounded(total))
                turned = halves
                if given.norms is not None:
                    own = arith.addi(arith.muli(layer, number(depth)), column)
                    scales = []
                    for start in (0, half):
                        at = arith.addi(own, number(start))
                        scales.append(arith.select(is_query, load(q_norm, at), load(k_norm, at)))
                    turned = _normed(halves, scales, rounded, depth, eps, f32)
                one, other = turned
                rotated = (
                    arith.subf(arith.mulf(one, cosine), arith.mulf(other, sine)),
                    arith.addf(arith.mulf(other, cosine), arith.mulf(one, sine)),
                )
                both = [arith.truncf(narrow, arith.select(turns, r, h)) for r, h in zip(rotated, halves, strict=True)]
                with utils.when(is_query):
                    for start, value in zip((0, half), both, strict=True):
                        at = _swizzled(row, arith.addi(column, number(start)), depth, i32)
                        llvm.store(
                            value, utils.getelementptr(utils.memref_ptr(queries), [at], ir.IntegerType.get_signless(8))
                        )
                with utils.when(arith.cmpi(arith.CmpIPredicate.uge, row, number(rows))):
                    for start, value in zip((0, half), both, strict=True):
                        at = arith.addi(arith.muli(behind, number(depth)), arith.addi(column, number(start)))
                        llvm.store(value, utils.getelementptr(utils.memref_ptr(new), [at], bf16))

    scalars = (unit.question, unit.generation, unit.head, unit.members, layer)
    unused = given.cos  # pointers that nothing follows
    bias, norms = unused if given.bias is None else given.bias, given.norms or (unused, unused)
    arrays = (given.qkv, given.cos, given.sin, bias, *norms)
    rotate(*arrays, refs.memory.queries, refs.memory.new, *scalars)


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


def _swizzled(row, column, width: int, i32):
    """Byte of a 16-bit element of a matrix of rows of `width`, in tiles of 8 rows of 128 bytes whose chunks of 16 are swizzled."""

    def mix(op, value, other):
        return op(value, other if isinstance(other, ir.Value) else utils.c(other, i32))

    tile = mix(arith.addi, mix(arith.muli, mix(arith.divui, row, 8), width // 64), mix(arith.divui, column, 64))
    line = mix(arith.remui, row, 8)
    inside = mix(arith.addi, mix(arith.muli, line, 128), mix(arith.muli, mix(arith.remui, column, 64), 2))
    inside = mix(arith.xori, inside, mix(arith.muli, line, 16))
    return mix(arith.addi, mix(arith.muli, tile, 1024), inside)


def _rotate_in_jnp(attention, refs, unit, layer, eps: float) -> None:
    """The twin."""
    share, depth, kv_heads, dtype = attention.share, attention.depth, attention.kv_heads, refs.memory.queries.dtype
    heads, given = kv_heads * share, refs.given

    def rounded(value):
        return value.astype(dtype).astype(jnp.float32)

    cos, sin = (rounded(table[unit.question]) for table in (given.cos, given.sin))

    def projected(generation, head, norm, rotates=True):
        columns = pl.ds(head * depth, depth)
        total = jnp.sum(given.qkv[:, generation, columns], axis=0)
        value = rounded(total + given.bias[layer, columns].astype(jnp.float32) if given.bias is not None else total)
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


def store_heads(attention, values, unit, out, interpret: bool) -> None:
    """Store the outputs of a unit's heads, float32 [64, Hd], into `out` [M, H Hd] with permuted columns."""
    depth, share = attention.depth, attention.share
    if interpret:
        for member in range(attention.generations):

            @pl.when(member < unit.members)
            def _(member=member):
                own = values[member * share : (member + 1) * share]
                columns = pl.ds(unit.head * share * depth, share * depth)
                out[unit.generation + member, columns] = permute_columns(own).reshape(-1).astype(out.dtype)

        return
    width = out.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 3))
    def store(_, values, out, *scalars):
        generation, head, members = (scalar.registers.item() for scalar in scalars)
        i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        pair = ir.VectorType.get((2,), bf16)

        def mix(op, value, other):
            return op(value, other if isinstance(other, ir.Value) else utils.c(other, i32))

        thread = mix(arith.remui, utils.thread_idx(), 128)
        # Thread 32 w + 4 r + t has columns 8 i + 2 t and the next, of rows 16 w + r and 8 further.
        quad = mix(arith.remui, thread, 4)
        first = mix(
            arith.addi,
            mix(arith.muli, mix(arith.divui, thread, 32), 16),
            mix(arith.divui, mix(arith.remui, thread, 32), 4),
        )
        # Column 4 t' + 2 h + j of 16 goes to 8 h + 2 t' + j.
        column = mix(
            arith.addi, mix(arith.muli, mix(arith.remui, quad, 2), 8), mix(arith.muli, mix(arith.divui, quad, 2), 2)
        )
        registers = values.registers.reshape(depth // 8, 2)
        for half in range(2):
            row = mix(arith.addi, first, 8 * half)
            member = mix(arith.divui, row, share)
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, member, members)):
                of_row = mix(arith.muli, mix(arith.addi, generation, member), width)
                of_head = mix(arith.addi, mix(arith.muli, head, share), mix(arith.remui, row, share))
                offset = mix(arith.addi, mix(arith.addi, of_row, mix(arith.muli, of_head, depth)), column)
                for block in range(depth // 8):
                    value = arith.truncf(pair, registers[block, half])
                    at = mix(arith.addi, offset, 16 * (block // 2) + 4 * (block % 2))
                    llvm.store(value, utils.getelementptr(utils.memref_ptr(out), [at], bf16))

    store(values, out, unit.generation, unit.head, unit.members)
