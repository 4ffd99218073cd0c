"""Partial sums that programs of the decode layers' kernel hand each other: bfloat16, with columns in the order in which threads have them.

All programs store theirs at once, and while a few read them the others wait. With half the bytes, and stores of 8 bytes in which a thread's four columns are
side by side, a layer of Qwen2.5-1.5B takes 40.4 instead of 44.9 us (64 rows, one H200, docs/benchmarks.md). Parts of a K split are rounded before they are
added, to float32: about as much as rounding a product once. Of every 16 columns, 8h + 2r + j is at 4r + 2h + j.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic_instructions import Numbers, thread_index


def store_sums(sums, out, interpret: bool) -> None:
    """Store a warp group's float32 sums [64, M] into `out` [M, 64] of device memory."""
    if interpret:
        natural = sums.T.reshape(-1, 4, 2, 4, 2)
        out[...] = natural.transpose(0, 1, 3, 2, 4).reshape(out.shape).astype(out.dtype)
        return
    m = out.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_, sums, out):
        of, kind = Numbers(), ir.MemRefType(out.type)
        pair, pairs = ir.VectorType.get((2,), kind.element_type), ir.VectorType.get((2,), of.i32)
        stride, target = kind.get_strides_and_offset()[0][0], utils.memref_ptr(out)
        # Thread 32 w + 4 r + t has column 16 w + 8 h + r of rows 8 b + 2 t and the next. Of those, it and the one of r xor 1 exchange one.
        thread = of.rem(thread_index(), 128)
        odd = of.rem(of.div(thread, 4), 2)
        chosen = of.either(of.equal(odd, 0), 0x5410, 0x3276)
        row = of.add(of.mul(of.rem(thread, 4), 2), odd)
        offset = of.add(of.mul(row, stride), of.mul(of.div(thread, 8), 4))
        for block, registers in enumerate(sums.registers.reshape(m // 8, 2)):
            both = []
            for register in registers:
                own = utils.bitcast(arith.truncf(pair, register), of.i32)
                other = utils.shfl_bfly(own, 4)
                both.append(utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", own, other, chosen, result_types=of.i32))
            place = utils.getelementptr(target, [of.add(offset, 8 * block * stride)], kind.element_type)
            llvm.store(vector.from_elements(pairs, both), place)

    store(sums, out)


def place_of_column(column, of: Numbers):
    """Where a column is, i32."""
    inside = of.rem(column, 16)
    place = of.add(of.mul(of.div(of.rem(inside, 8), 2), 4), of.mul(of.div(inside, 8), 2), of.rem(inside, 2))
    return of.add(of.sub(column, inside), place)


def sums_of(parts):
    """The twin of what reads them: float32 sums [..., N] of parts [S, ..., N], in plain order."""
    total = jnp.sum(parts.astype(jnp.float32), axis=0)
    return jnp.swapaxes(total.reshape(*total.shape[:-1], -1, 4, 2, 2), -3, -2).reshape(total.shape)
