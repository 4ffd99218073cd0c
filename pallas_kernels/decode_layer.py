"""A decoder layer for the few rows of a decode step, from 8-bit weights in one launch: its attention, and what follows up to the next one.

    attended  = attention of the new tokens (or rows as they are)
    residual += attended @ out^T           rows = norm(residual)
    gated     = activation(rows @ gate^T) * (rows @ up^T)
    residual += gated @ down^T             rows = norm(residual)            parts = rows @ qkv^T, of the next layer

Products of few rows spend half their time on their starts and ends (docs/benchmarks.md); as one kernel, each product's weights
are on their way while the one before still multiplies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Shaped, UInt8

from pallas_kernels import dispatch, gated_activation, reference, tuning
from pallas_kernels.add_rms_norm import reference as add_rms_norm
from pallas_kernels.codes import LAYER_CODE, dequantize
from pallas_kernels.rope_attention import NewTokens, rope_attention
from pallas_kernels.rope_cache import Scales
from pallas_kernels.rows import Rows, permute_columns


class LayerMatrix(NamedTuple):
    """A matrix as this operation reads it, in `codes.LAYER_CODE`; of gate_up, whose rows alternate, see `interleave_gate`."""

    packed: UInt8[Array, "1 N K"]
    scales: Float[Array, "1 K_g N"]
    """Transposed: a block's are then next to each other."""


class Caches(NamedTuple):
    """Keys and values of all layers with the new tokens', and of a cache in 8 bits their scales."""

    k: Shaped[Array, "L Q G K C Hd"]
    v: Shaped[Array, "L Q G K C Hd"]
    scales: Scales | None = None


class DecodedLayer(NamedTuple):
    """What a layer leaves."""

    residual: Float[Array, "M D"]
    following: Float[Array, "S M N"] | Float[Array, "M D"]
    """Partial sums of the next layer's qkv; of the last layer, its normed rows."""
    counter: Int32[Array, "2"]
    caches: Caches | None
    """None where the layer was given rows that had attended."""


def layer_counter() -> Int32[Array, "2"]:
    """What a chain of layers begins with: programs that came to a meeting, and pieces that are stored, none so far."""
    return jnp.zeros((2,), jnp.int32)


def decode_layer(
    attended: Rows | NewTokens,
    residual: Float[Array, "M D"],
    norms: tuple[Float[Array, "L D"], Float[Array, "L D"]],
    matrices: Sequence[LayerMatrix],
    counter: Int32[Array, "2"],
    *,
    layer: Int[Array, ""] | int,
    eps: float,
    activation: str,
    scale: float | None = None,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> DecodedLayer:
    """The layer, of three matrices the last one.

    Where the kernel cannot begin with the attention (`dispatch.layer_attention_problem`), that is `rope_attention` in front of it.

    Args:
      attended: what the attention is given, or the heads' outputs, of which the kernel reads permuted columns.
      norms: stacks of the norm in front of gate_up and of the one that follows the layer; RMS norms, no offset.
      matrices: out, gate_up, down and, of a layer that is not the last, qkv of the next one.
      counter: `layer_counter()` for layer 0, then what the layer before returned; the kernel's programs meet there.
      layer: index into the norms and caches, and the number of layers that the counter has seen.
      eps: of all norms.
      activation: one of `gated_activation.ACTIVATIONS`.
      scale, window, softcap: of the attention, as in `decode_attention`.
      implementation: "reference", "mosaic", or None for the kernel where it runs.

    Raises:
      ValueError: the implementation is unknown, the kernel was asked for and cannot run here, or an attention has no scale.
    """
    m, shapes = residual.shape[0], tuple(matrix.packed.shape[1:] for matrix in matrices)
    configs = _configs(m, shapes, residual.dtype, matrices[0].scales.dtype)
    if implementation not in (None, dispatch.REFERENCE, dispatch.MOSAIC):
        raise ValueError(
            f"decode_layer: implementation={implementation!r} is unknown; use 'reference', 'mosaic' or None"
        )
    if implementation == dispatch.MOSAIC and configs is None:
        raise ValueError(f"decode_layer: the kernel cannot run {m} rows with matrices {shapes} here")
    if isinstance(attended, NewTokens) and scale is None:
        raise ValueError("decode_layer: the attention of new tokens needs the scale of its scores")
    fused, caches = configs is not None and implementation != dispatch.REFERENCE, None
    if isinstance(attended, NewTokens) and not (fused and _attends(attended, residual.dtype, window, softcap)):
        how: dict[str, Any] = dict(layer=layer, scale=scale, window=window, softcap=softcap, eps=eps)
        how |= dict(permuted=fused, dtype=residual.dtype, implementation=None if fused else implementation)
        attended, k, v, scales = rope_attention(**attended._asdict(), **how)
        caches = Caches(k, v, scales)
    if not fused:
        assert isinstance(attended, Rows)
        left = _reference(attended, residual, norms, matrices, layer, eps, activation)
        return DecodedLayer(*left, counter, caches)
    assert configs is not None
    given = attended
    if isinstance(attended, Rows):
        given = permute_columns(attended.plain) if attended.permuted is None else attended.permuted
    from pallas_kernels.decode_layer_mosaic import decode_layer as kernel

    residual, following, counter, written = kernel(
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
        scale=scale or 0.0,
    )
    return DecodedLayer(residual, following, counter, Caches(*written) if written else caches)


def _attends(tokens: NewTokens, dtype, window, softcap) -> bool:
    """Whether the kernel can begin with their attention."""
    device, (_, questions, group, kv_heads, _, head_dim) = dispatch.current_device(), tokens.k.shape
    share = tokens.qkv.shape[-1] // head_dim // kv_heads - 2
    _, tiles = tuning.layer_attention_tile(questions, group, kv_heads, share, device.multiprocessors)
    how = (head_dim, share, tiles, window is not None, softcap, tokens.k.dtype)
    slots = (tokens.prompt_k.shape[3], tokens.k.shape[4])
    return dispatch.layer_attention_problem(device, dtype, *how, slots) is None


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


def _reference(attended: Rows, residual, norms, matrices, layer, eps, activation) -> tuple[Array, Array]:
    """The jnp twin of what follows the attention."""
    out, gate_up, down, *qkv = (
        dequantize(packed[0], scales[0].T, residual.dtype, LAYER_CODE) for packed, scales in matrices
    )

    def product(x, weight):
        return reference.einsum_to(x.dtype, "mk,nk->mn", x, weight)[None]

    residual, rows = add_rms_norm(
        residual,
        product(attended.plain.astype(residual.dtype), out),
        norms[0],
        layer,
        eps,
        0.0,
        None,
        None,
        permuted=False,
    )
    both = product(rows.plain, gate_up)
    sixteens = both.reshape(1, both.shape[1], -1, 2, 8)
    halves = jnp.moveaxis(sixteens, 3, 2).reshape(both.shape)
    gated = gated_activation.reference(halves, activation, residual.dtype, layer, None, permuted=False)
    residual, rows = add_rms_norm(
        residual, product(gated.plain, down), norms[1], layer, eps, 0.0, None, None, permuted=False
    )
    return residual, product(rows.plain, qkv[0]) if qkv else rows.plain
