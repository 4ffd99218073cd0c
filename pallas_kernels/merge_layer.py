"""One layer's int4 matrix with its adapter, in the 8 bits that the kernel of a decode step's layers reads, in the place of its stack.

    stack[layer] = fast8(W + B A)

In plain XLA that is eight kernels, of which four pass over the matrix and two more zero the stack first.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import dispatch
from pallas_kernels.codes import dequantize, group_size, quantize_fast8
from pallas_kernels.decode_layers import LayerMatrix, interleave_gate
from pallas_kernels.reference import take_layer


class Source(NamedTuple):
    """What is merged."""

    packed: UInt8[Array, "L N K/2"]
    """int4."""
    scales: Float[Array, "L N K/g"]
    adapter: tuple[Float[Array, "L R K"], Float[Array, "L N R"]] | None
    """(A, with its scale; B); None: the matrix alone."""


def merge_layer(
    into: LayerMatrix | None,
    source: Source,
    index: Int[Array, ""] | int,
    layer: Int[Array, ""] | int,
    *,
    layers: int,
    group: int,
    gate: bool,
    dtype,
    scales_dtype,
    implementation: str | None = None,
) -> LayerMatrix:
    """`into` with the matrix in the place of `layer`.

    Args:
      into: the stack, whose memory the result takes where it is donated; None: a stack of so many `layers`, the others' contents unspecified.
      index: of the matrix in its stack, of which the adapter's is `layer`.
      group: columns that share a scale in the result; divides K.
      gate: it is gate_up, whose rows are put in the order of `interleave_gate`.
      dtype: what B A is computed in and rounded to.
      scales_dtype: of the result.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: the named implementation cannot run here.
    """
    own = group_size(source.packed, source.scales)
    problem = dispatch.merge_layer_problem(dispatch.current_device(), dtype, source.packed.shape[-1] * 2, own, group)
    chosen = dispatch.resolve(
        "merge_layer", implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem
    )
    if chosen == dispatch.TRITON:
        from pallas_kernels.merge_layer_triton import merge_layer as fused

        return fused(into, source, index, layer, layers, group, gate, dtype, scales_dtype)
    return reference(into, source, index, layer, layers, group, gate, dtype, scales_dtype)


def reference(into, source: Source, index, layer, layers, group, gate, dtype, scales_dtype) -> LayerMatrix:
    """The jnp twin."""
    wide = dequantize(take_layer(source.packed, index), take_layer(source.scales, index), jnp.float32)
    if source.adapter is not None:
        a, b = (take_layer(factor, layer).astype(dtype) for factor in source.adapter)
        wide = wide + jnp.matmul(b, a).astype(jnp.float32)
    codes, steps = quantize_fast8(wide, group, scales_dtype)
    return put_layer(into, codes, steps, layer, layers, gate)


def put_layer(
    into: LayerMatrix | None,
    packed: UInt8[Array, "N K"],
    scales: Float[Array, "N K_g"],
    layer: Int[Array, ""] | int,
    layers: int,
    gate: bool,
) -> LayerMatrix:
    """The stack, or one of so many `layers`, with this one's codes."""
    packed, scales = map(interleave_gate, (packed, scales)) if gate else (packed, scales)
    own = LayerMatrix(packed, scales.T)
    if into is None:
        into = LayerMatrix(*(jnp.zeros((layers, *part.shape), part.dtype) for part in own))
    return LayerMatrix(*(lax.dynamic_update_index_in_dim(*pair, layer, 0) for pair in zip(into, own, strict=True)))
