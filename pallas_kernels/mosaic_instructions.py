"""Steps of `int4_matmul_mosaic.py` written in Mosaic GPU's instructions; its interpreter cannot run them, so each has a twin in jnp."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.codes import PER_BYTE, fast8_levels

PARTS_AT_ONCE = 16
"""Registers that hold parts while `sum_parts` adds them up, at least one result's."""
ROWS = 64
"""Rows of weights that one warp group multiplies: the tensor core's smallest left operand."""

# A register of four bytes -> two pairs of byte * scale: 0x4300 | the low seven bits is 128 + those, and the sign picks -128 or -256.
_INT8_PAIRS = """{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 c, a, 0x00800080, 0xc300c300, 0xea;
lop3.b32 d, b, 0x00800080, 0xc300c300, 0xea;
lop3.b32 a, a, 0x007f007f, 0x43004300, 0xea;
lop3.b32 b, b, 0x007f007f, 0x43004300, 0xea;
add.rn.bf16x2 a, a, c;
add.rn.bf16x2 b, b, d;
mul.rn.bf16x2 $0, a, $3;
mul.rn.bf16x2 $1, b, $3;
}"""
# A register of four bytes -> two pairs of (byte as the low half of 0x43nn, less 256) * scale, rounded once.
_FAST8_PAIRS = """{
.reg .b32 a, b, center;
mov.b32 center, 0xc380c380;
mul.rn.bf16x2 center, $3, center;
prmt.b32 a, $2, 0x43434343, 0x4140;
prmt.b32 b, $2, 0x43434343, 0x4342;
fma.rn.bf16x2 $0, a, $3, center;
fma.rn.bf16x2 $1, b, $3, center;
}"""
# A register of four bytes -> four pairs of (nibble - 8) * scale: 0x43nn is 128 + n, 136 is subtracted, both exact.
_INT4_PAIRS = """{
.reg .b32 low, high, a, b, c, d, zero;
mov.b32 zero, 0x43084308;
and.b32 low, $4, 0x0f0f0f0f;
shr.u32 high, $4, 4;
and.b32 high, high, 0x0f0f0f0f;
prmt.b32 a, low, 0x43434343, 0x4140;
prmt.b32 b, low, 0x43434343, 0x4342;
prmt.b32 c, high, 0x43434343, 0x4140;
prmt.b32 d, high, 0x43434343, 0x4342;
sub.rn.bf16x2 a, a, zero;
sub.rn.bf16x2 b, b, zero;
sub.rn.bf16x2 c, c, zero;
sub.rn.bf16x2 d, d, zero;
mul.rn.bf16x2 $0, a, $5;
mul.rn.bf16x2 $1, b, $5;
mul.rn.bf16x2 $2, c, $5;
mul.rn.bf16x2 $3, d, $5;
}"""


class Numbers:
    """int32 arithmetic of values and Python numbers, for instructions."""

    def __init__(self) -> None:
        self.i32 = ir.IntegerType.get_signless(32)

    def value(self, number):
        """Of a number, a constant."""
        return number if isinstance(number, ir.Value) else utils.c(number, self.i32)

    def add(self, *terms):
        """The sum of all."""
        total = self.value(terms[0])
        for term in terms[1:]:
            total = arith.addi(total, self.value(term))
        return total

    def sub(self, value, other):
        """value - other."""
        return arith.subi(self.value(value), self.value(other))

    def mul(self, value, other):
        """value * other."""
        return arith.muli(self.value(value), self.value(other))

    def div(self, value, other):
        """value // other, neither below 0."""
        return arith.divui(self.value(value), self.value(other))

    def rem(self, value, other):
        """value % other, neither below 0."""
        return arith.remui(self.value(value), self.value(other))

    def xor(self, value, other):
        """value ^ other."""
        return arith.xori(self.value(value), self.value(other))

    def below(self, value, limit):
        """value < limit, neither below 0."""
        return arith.cmpi(arith.CmpIPredicate.ult, self.value(value), self.value(limit))

    def equal(self, value, other):
        """value == other."""
        return arith.cmpi(arith.CmpIPredicate.eq, self.value(value), self.value(other))

    def least(self, value, other):
        """The smaller one, neither below 0."""
        return arith.minui(self.value(value), self.value(other))

    def either(self, condition, value, other):
        """value where the condition holds, else other."""
        return arith.select(condition, self.value(value), self.value(other))

    def swizzled(self, row, column, width: int):
        """Byte of a 16-bit element of a matrix of rows of `width`, in tiles of 8 rows of 128 bytes whose chunks of 16 are swizzled."""
        line = self.rem(row, 8)
        tile = self.add(self.mul(self.div(row, 8), width // 64), self.div(column, 64))
        inside = self.xor(self.mul(self.rem(column, 64), 2), self.mul(line, 16))
        return self.add(self.mul(tile, 1024), self.mul(line, 128), inside)


def program_index(interpret: bool):
    """Of this program, int32 []; no compiler takes it for what it was before."""
    if interpret:
        return lax.axis_index("program")

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
    def read(_):
        word = ir.IntegerType.get_signless(32)
        index = utils.inline_ptx("mov.u32 $0, %ctaid.x;", result_types=word, has_side_effects=True)
        layout = fragmented_array.WGSplatFragLayout(())
        registers = np.array(index, dtype=object).reshape(layout.registers_shape(()))
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return read()


def thread_index():
    """Of this thread in its program, i32, read anew: addresses that follow from it are not kept from layer to layer, which took more registers than
    there are.
    """
    return utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=ir.IntegerType.get_signless(32), has_side_effects=True)


def synchronize_threads(threads: int) -> None:
    """Wait for so many threads of whole warp groups; they are the same ones wherever this is called."""

    @plgpu.inline_mgpu()
    def wait(_):
        utils.inline_ptx(f"bar.sync 14, {threads};", convergent=True)

    wait()


def dequantize(packed, scale, code: str, interpret: bool):
    """A group's bytes [64, G/2 or G] and scales bfloat16 [64] -> weights bfloat16 [64, G], in the order of x's permuted columns."""
    per_byte = PER_BYTE[code]
    group = per_byte * packed.shape[1]
    if interpret:
        nibbles = [(packed & 0xF).astype(jnp.int32) - 8, (packed >> 4).astype(jnp.int32) - 8]
        if code == "fast8":
            levels = fast8_levels(packed, jnp)
        else:
            levels = packed if code == "int8" else jnp.concatenate(nibbles, axis=1)
        weights = levels.astype(scale.dtype) * scale[:, None]
        return weights.reshape(ROWS, -1, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(ROWS, group)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT, plgpu.Layout.WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, group), scale.dtype, layout=plgpu.Layout.WGMMA),
    )
    def dequantized(_, packed, scale):
        word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        layout = fragmented_array.WGMMA_LAYOUT
        blocks = (
            group // per_byte // 16
        )  # a thread's four bytes of 16 are a fragment of each nibble, or one of the bytes
        # Nibble, block, columns (2t, 2t+1) or 8 further, row or 8 further.
        fragments = np.empty((per_byte, blocks, 2, 2), dtype=object)
        several = llvm.StructType.get_literal([word] * 2 * per_byte)
        code_of = {"int4": _INT4_PAIRS, "int8": _INT8_PAIRS, "fast8": _FAST8_PAIRS}[code]
        words, scales = packed.registers.reshape(blocks, 2), scale.registers.reshape(2)
        for row in range(2):
            twice = utils.bitcast(utils.vector_concat([scales[row]] * 2), word)
            for block in range(blocks):
                operands = [utils.bitcast(words[block, row], word), twice]
                constraints = ",".join(["=r"] * 2 * per_byte + ["r", "r"])
                pairs = llvm.inline_asm(several, operands, code_of, constraints, asm_dialect=0)
                for i, (nibble, columns) in enumerate(np.ndindex(per_byte, 2)):
                    fragments[nibble, block, columns, row] = utils.bitcast(llvm.extractvalue(word, pairs, [i]), pair)
        registers = fragments.reshape(layout.registers_shape((ROWS, group)))
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return dequantized(packed, scale)


def sum_parts(parts, out, threads: int, interpret: bool, last=None) -> None:
    """Add up parts [P, M, R] of device memory, in float32, into `out` bfloat16 [M, R] of shared memory; by `threads` threads.

    `last`: index of the last row that there is, int32 []; those after it become copies of it. None: all are there.
    """
    if interpret:
        out[...] = jnp.sum(parts[...].astype(jnp.float32), axis=0).astype(out.dtype)
        return
    (count, m, rank), swizzle = parts.shape, swizzle_bytes(out.shape[1])
    limit, limit_type = ((), ()) if last is None else ((jnp.int32(last),), (plgpu.Layout.WG_SPLAT,))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(tiled(swizzle, 2)), *limit_type))
    def add(_, parts, out, *limit):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        kind, result = ir.MemRefType(parts.type).element_type, ir.MemRefType(out.type).element_type
        source, target = utils.memref_ptr(parts), utils.memref_ptr(out)
        strides, _ = ir.MemRefType(parts.type).get_strides_and_offset()
        pair = ir.VectorType.get((2,), kind)
        pair_f32, pair_result = (ir.VectorType.get((2,), t) for t in (f32, result))

        def number(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        def mix(op, value, other):
            return op(value, number(other))

        thread = mix(arith.remui, thread_index(), threads)
        width = swizzle // 2  # columns of a tile; the tiles of 8 rows follow each other, then those of the next columns

        def place(first: int) -> tuple:
            """Row and column of this thread's next pair."""
            index = mix(arith.remui, mix(arith.addi, thread, first), m * rank // 2)
            return mix(arith.divui, index, rank // 2), mix(arith.muli, mix(arith.remui, index, rank // 2), 2)

        def load(row, column, part: int):
            for most in limit:
                row = arith.minui(row, most.registers.item())
            offset = arith.addi(mix(arith.muli, row, strides[1]), mix(arith.addi, column, part * strides[0]))
            return llvm.load(pair, utils.getelementptr(source, [offset], kind))

        def store(row, column, values: list) -> None:
            values = values if kind == f32 else [arith.extf(pair_f32, value) for value in values]
            total = values[0]
            for value in values[1:]:
                total = arith.addf(total, value)
            value = total if result == f32 else arith.truncf(pair_result, total)
            tile = arith.addi(mix(arith.muli, mix(arith.divui, row, 8), rank // width), mix(arith.divui, column, width))
            byte = arith.addi(
                mix(arith.muli, tile, 8 * swizzle),
                arith.addi(
                    mix(arith.muli, mix(arith.remui, row, 8), swizzle),
                    mix(arith.muli, mix(arith.remui, column, width), 2),
                ),
            )
            # The hardware's order of 16-byte chunks within a tile: chunk xor the address's bits from 128 bytes on.
            bits = mix(arith.andi, mix(arith.shrui, byte, 7), swizzle // 16 - 1)
            byte = arith.xori(byte, mix(arith.shli, bits, 4))
            llvm.store(value, utils.getelementptr(target, [byte], ir.IntegerType.get_signless(8)))

        # Several loads are on their way at once: the compiler leaves none before a store, which might change what it reads.
        firsts = list(range(0, m * rank // 2, threads))
        several = max(1, PARTS_AT_ONCE // count)
        for batch in (firsts[start : start + several] for start in range(0, len(firsts), several)):
            places = [place(first) for first in batch]
            loaded = [[load(*where, part) for part in range(count)] for where in places]
            for where, values in zip(places, loaded, strict=True):
                store(*where, values)

    add(parts, out, *limit)


def swizzle_bytes(columns: int) -> int:
    """Bytes of a row of a tile of so many 16-bit columns, a multiple of 16: the widest that divides them."""
    return next(swizzle for swizzle in (128, 64, 32) if 2 * columns % swizzle == 0)


def tiled(swizzle: int, itemsize: int) -> tuple:
    """The layout in shared memory of a matrix that the tensor core or `ldmatrix` reads."""
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
