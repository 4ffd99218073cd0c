"""What a decoder layer does between two attentions, for the few rows of a decode step, from 8-bit weights in one launch.

    residual += attended @ out^T           rows = norm(residual)
    gated     = activation(rows @ gate^T) * (rows @ up^T)
    residual += gated @ down^T             rows = norm(residual)            parts = rows @ qkv^T, of the next layer

Four products of few rows spend half their time on their starts and ends (docs/benchmarks.md); as one kernel, each product's weights
are on their way while the one before still multiplies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt8

from pallas_kernels import dispatch, gated_activation, reference, tuning
from pallas_kernels.add_rms_norm import reference as add_rms_norm
from pallas_kernels.codes import LAYER_CODE, dequantize
from pallas_kernels.rows import AttentionParts, Rows, merge_parts, permute_columns


class LayerMatrix(NamedTuple):
    """A matrix as this operation reads it, in `codes.LAYER_CODE`; of gate_up, whose rows alternate, see `interleave_gate`."""

    packed: UInt8[Array, "1 N K"]
    scales: Float[Array, "1 K_g N"]
    """Transposed: a block's are then next to each other."""


def decode_layer(
    attended: Rows | AttentionParts,
    residual: Float[Array, "M D"],
    norms: tuple[Float[Array, "L D"], Float[Array, "L D"]],
    matrices: Sequence[LayerMatrix],
    counter: Int32[Array, "1"],
    *,
    layer: Int[Array, ""] | int,
    eps: float,
    activation: str,
    implementation: str | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, "S M N"] | Float[Array, "M D"], Int32[Array, "1"]]:
    """(residual, partial sums of the next layer's qkv, counter); of three matrices, (residual, its normed rows, counter).

    Args:
      attended: what is to be merged to the heads' outputs, or those; the kernel reads permuted columns.
      norms: stacks of the norm in front of gate_up and of the one that follows the layer; RMS norms, no offset.
      matrices: out, gate_up, down and, of a layer that is not the last, qkv of the next one.
      counter: [0] for layer 0, then what the layer before returned; the kernel's programs meet there.
      layer: index into the norms, and the number of layers that the counter has seen.
      activation: one of `gated_activation.ACTIVATIONS`.
      implementation: "reference", "mosaic", or None for the kernel where it runs.

    Raises:
      ValueError: the implementation is unknown, the kernel was asked for and cannot run here, or it cannot merge heads of that size.
    """
    m, shapes = residual.shape[0], tuple(matrix.packed.shape[1:] for matrix in matrices)
    configs = _configs(m, shapes, residual.dtype, matrices[0].scales.dtype)
    if implementation not in (None, dispatch.REFERENCE, dispatch.MOSAIC):
        raise ValueError(
            f"decode_layer: implementation={implementation!r} is unknown; use 'reference', 'mosaic' or None"
        )
    if implementation == dispatch.MOSAIC and configs is None:
        raise ValueError(f"decode_layer: the kernel cannot run {m} rows with matrices {shapes} here")
    if configs is None or implementation == dispatch.REFERENCE:
        return _reference(attended, residual, norms, matrices, counter, layer, eps, activation)
    given = _readable(attended)
    from pallas_kernels.decode_layer_mosaic import decode_layer as fused

    return fused(
        given,
        residual,
        norms,
        layer,
        counter,
        matrices,
        configs=configs,
        programs=dispatch.current_device().multiprocessors,
        eps=eps,
        activation=activation,
    )


def has_layer_kernel(m: int, shapes: Sequence[tuple[int, int]], dtype, scales_dtype) -> bool:
    """Whether `decode_layer` is one kernel on this device: M rows, matrices (N, K), all of `dtype`."""
    return _configs(m, tuple(shapes), dtype, scales_dtype) is not None


def _configs(m: int, shapes: tuple, dtype, scales_dtype) -> tuple[tuning.Int4Config, ...] | None:
    device = dispatch.current_device()
    if dispatch.decode_layer_problem(device, dtype, scales_dtype, m):
        return None
    return tuning.decode_layer_configs(m, shapes, device.multiprocessors)


def interleave_gate(gate_up: Array) -> Array:
    """[..., 2F, K] with rows of gate and of up in turn, eight at a time: a thread of the kernel then has both of a pair."""
    *lead, rows, width = gate_up.shape
    return gate_up.reshape(*lead, 2, rows // 16, 8, width).swapaxes(-4, -3).reshape(gate_up.shape)


def _readable(attended: Rows | AttentionParts) -> Float[Array, "M HHd"] | AttentionParts:
    """What the kernel reads: permuted rows, or parts of heads that it can merge."""
    if isinstance(attended, Rows):
        return permute_columns(attended.plain) if attended.permuted is None else attended.permuted
    if (size := attended.values.shape[-1]) not in dispatch.ATTENTION_HEAD_DIMS:
        raise ValueError(
            f"decode_layer: the kernel merges heads of {dispatch.ATTENTION_HEAD_DIMS}, got {size}; give it merged Rows"
        )
    return attended


def _reference(attended, residual, norms, matrices, counter, layer, eps, activation):
    """The jnp twin."""
    out, gate_up, down, *qkv = (
        dequantize(packed[0], scales[0].T, residual.dtype, LAYER_CODE) for packed, scales in matrices
    )

    def product(x, weight):
        return reference.einsum_to(x.dtype, "mk,nk->mn", x, weight)[None]

    rows = attended.plain if isinstance(attended, Rows) else merge_parts(attended).reshape(residual.shape[0], -1)
    residual, rows = add_rms_norm(
        residual, product(rows.astype(residual.dtype), out), norms[0], layer, eps, 0.0, None, None, permuted=False
    )
    both = product(rows.plain, gate_up)
    sixteens = both.reshape(1, both.shape[1], -1, 2, 8)
    halves = jnp.moveaxis(sixteens, 3, 2).reshape(both.shape)
    gated = gated_activation.reference(halves, activation, residual.dtype, layer, None, permuted=False)
    residual, rows = add_rms_norm(
        residual, product(gated.plain, down), norms[1], layer, eps, 0.0, None, None, permuted=False
    )
    return residual, product(rows.plain, qkv[0]) if qkv else rows.plain, counter
