"""A decode step's layers for its few rows, from 8-bit weights: all of them in one launch, or one a launch with attentions apart.

    parts     = rows @ qkv^T
    attended  = attention of the new tokens
    residual += attended @ out^T           rows = norm(residual)
    gated     = activation(rows @ gate^T) * (rows @ up^T)
    residual += gated @ down^T             rows = norm(residual), for the next layer

Products of few rows spend half their time on their starts and ends (docs/benchmarks.md); in one kernel, each product's weights
are on their way while the one before still multiplies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from pallas_kernels import dispatch, gated_activation, reference, tuning
from pallas_kernels.add_rms_norm import reference as add_rms_norm
from pallas_kernels.codes import LAYER_CODE, dequantize
from pallas_kernels.rope_attention import NewTokens, rope_attention
from pallas_kernels.rope_cache import Scales
from pallas_kernels.rows import Rows

Norms = tuple[Float[Array, "L D"], Float[Array, "L D"]]


class LayerMatrix(NamedTuple):
    """A matrix of all layers as these operations read it, in `codes.LAYER_CODE`; of gate_up, whose rows alternate, see `interleave_gate`."""

    packed: UInt8[Array, "L N K"]
    scales: Float[Array, "L K_g N"]
    """Transposed: a block's are then next to each other."""


class LayerMatrices(NamedTuple):
    """Of all layers."""

    qkv: LayerMatrix
    out: LayerMatrix
    gate_up: LayerMatrix
    down: LayerMatrix


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


def decode_layers(
    tokens: NewTokens,
    residual: Float[Array, "M D"],
    rows: Rows,
    norms: Norms,
    matrices: LayerMatrices,
    *,
    eps: float,
    activation: str,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "M D"], Caches]:
    """(normed rows after the last layer, the caches with the new tokens).

    Where one kernel cannot do all (`dispatch.layer_attention_problem`), each layer is `rope_attention` and `decode_layer`.

    Args:
      tokens: what every layer's attention is given.
      rows: the residual, normed for the first layer.
      norms: stacks of the norm in front of gate_up and of the one that follows a layer; RMS norms, no offset.
      eps: of all norms.
      activation: one of `gated_activation.ACTIVATIONS`.
      scale, window, softcap: of the attentions, as in `decode_attention`.
      implementation: "reference", "mosaic" (one kernel), or None for what runs here.

    Raises:
      ValueError: the implementation is unknown, or the kernel was asked for and cannot run here.
    """
    _check_implementation("decode_layers", implementation)
    configs = _configs(residual.shape[0], matrices, residual.dtype)
    problem = "no GPU with a kernel for these matrices and rows"
    if configs is not None:
        problem = attention_problem(tokens, matrices.qkv.packed.shape[1], residual.dtype, window, softcap)
    if implementation == dispatch.MOSAIC and problem:
        raise ValueError(f"decode_layers: one kernel cannot run here: {problem}")
    if not problem and implementation != dispatch.REFERENCE:
        from pallas_kernels.decode_layers_mosaic import decode_layers as kernel

        how: dict[str, Any] = dict(configs=configs, programs=dispatch.current_device().multiprocessors, scale=scale)
        result, caches = kernel(
            tokens, residual, rows.in_permuted_order(), norms, matrices, eps=eps, activation=activation, **how
        )
        return result, Caches(*caches)
    counter, apart = layer_counter(), configs is not None and implementation != dispatch.REFERENCE
    following: Array = first_qkv(rows, matrices, implementation=implementation)
    shape = tokens.k.shape[1:3]
    how = dict(scale=scale, window=window, softcap=softcap, eps=eps, permuted=apart, dtype=residual.dtype)
    for layer in range(len(norms[0])):
        parts = following.reshape(following.shape[0], *shape, -1)
        own: dict[str, Any] = dict(layer=layer, implementation=implementation)
        attended, k, v, scales = rope_attention(parts, **tokens._asdict(), **how, **own)
        written = (*tokens.scales[:2], *scales) if tokens.scales is not None and scales is not None else None
        tokens = tokens._replace(k=k, v=v, scales=written)
        own |= dict(eps=eps, activation=activation)
        residual, following, counter = decode_layer(attended, residual, norms, matrices, counter, **own)
    return following, Caches(tokens.k, tokens.v, None if tokens.scales is None else tokens.scales[2:])


def layer_counter() -> Int32[Array, "2"]:
    """What a chain of `decode_layer` begins with: programs that came to a meeting, and pieces that are stored, none so far."""
    return jnp.zeros((2,), jnp.int32)


def first_qkv(rows: Rows, matrices: LayerMatrices, *, implementation: str | None = None) -> Float[Array, "S M N"]:
    """Partial sums of layer 0's qkv, of rows normed for it; arguments and errors are those of `decode_layer`."""
    configs = _chosen("first_qkv", implementation, rows.plain.shape[0], matrices, rows.plain.dtype)
    if configs is None:
        return _product(rows.plain, matrices.qkv, 0)
    from pallas_kernels.decode_layers_mosaic import first_qkv as kernel

    programs = dispatch.current_device().multiprocessors
    return kernel(rows.in_permuted_order(), matrices.qkv, config=configs[0], programs=programs)


def decode_layer(
    attended: Rows,
    residual: Float[Array, "M D"],
    norms: Norms,
    matrices: LayerMatrices,
    counter: Int32[Array, "2"],
    *,
    layer: int,
    eps: float,
    activation: str,
    implementation: str | None = None,
) -> DecodedLayer:
    """A layer after its attention, and the next one's qkv.

    Args:
      attended: the heads' outputs.
      norms: stacks of the norm in front of gate_up and of the one that follows a layer; RMS norms, no offset.
      counter: `layer_counter()` for layer 0, then what the layer before returned; the kernel's programs meet there.
      layer: its number.
      eps: of all norms.
      activation: one of `gated_activation.ACTIVATIONS`.
      implementation: "reference", "mosaic", or None for the kernel where it runs.

    Raises:
      ValueError: the implementation is unknown, or the kernel was asked for and cannot run here.
    """
    configs = _chosen("decode_layer", implementation, residual.shape[0], matrices, residual.dtype)
    last = layer == len(norms[0]) - 1
    if configs is None:
        return DecodedLayer(*_reference(attended, residual, norms, matrices, layer, last, eps, activation), counter)
    from pallas_kernels.decode_layers_mosaic import decode_layer as kernel

    qkv, *others = zip(matrices, configs, strict=True)
    used, blocks = zip(*others, *([] if last else [qkv]), strict=True)
    how: dict[str, Any] = dict(configs=blocks, programs=dispatch.current_device().multiprocessors)
    how |= dict(eps=eps, activation=activation)
    return DecodedLayer(*kernel(attended.in_permuted_order(), residual, norms, layer, counter, used, **how))


def _check_implementation(name: str, implementation: str | None) -> None:
    if implementation not in (None, dispatch.REFERENCE, dispatch.MOSAIC):
        raise ValueError(f"{name}: implementation={implementation!r} is unknown; use 'reference', 'mosaic' or None")


def _chosen(
    name: str, implementation: str | None, m: int, matrices: LayerMatrices, dtype
) -> tuple[tuning.Int4Config, ...] | None:
    """Blocks of the kernel; None: the jnp twin."""
    _check_implementation(name, implementation)
    configs = _configs(m, matrices, dtype)
    if implementation == dispatch.MOSAIC and configs is None:
        raise ValueError(f"{name}: the kernel cannot run {m} rows with matrices {_shapes(matrices)} here")
    return None if implementation == dispatch.REFERENCE else configs


def attention_problem(tokens: NewTokens, width: int, dtype, window, softcap) -> str | None:
    """Why the kernel of all layers cannot have their attention; `width` is that of qkv."""
    device, (_, questions, group, kv_heads, suffix, head_dim) = dispatch.current_device(), tokens.k.shape
    share, slots = width // head_dim // kv_heads - 2, (tokens.prompt_k.shape[3], suffix)
    _, tiles = tuning.layer_attention_tile(questions, group, kv_heads, share, device.multiprocessors)
    has_window = window is not None and window < sum(slots)
    return dispatch.layer_attention_problem(
        device, dtype, head_dim, share, tiles, has_window, softcap, tokens.k.dtype, slots
    )


def has_layer_kernel(m: int, shapes: Sequence[tuple[int, int]], dtype, scales_dtype) -> bool:
    """Whether this device has the kernel for M rows and a layer's matrices (N, K), in the order of `LayerMatrices`, all of `dtype`."""
    device = dispatch.current_device()
    if dispatch.decode_layer_problem(device, dtype, scales_dtype, m):
        return False
    return tuning.decode_layer_configs(m, tuple(shapes), device.multiprocessors) is not None


def _shapes(matrices: LayerMatrices) -> tuple[tuple[int, int], ...]:
    """(N, K)"""
    return tuple((matrix.packed.shape[1], matrix.packed.shape[2]) for matrix in matrices)


def _configs(m: int, matrices: LayerMatrices, dtype) -> tuple[tuning.Int4Config, ...] | None:
    shapes = _shapes(matrices)
    if not has_layer_kernel(m, shapes, dtype, matrices.out.scales.dtype):
        return None
    return tuning.decode_layer_configs(m, shapes, dispatch.current_device().multiprocessors)


def interleave_gate(gate_up: Array) -> Array:
    """[..., 2F, K] with rows of gate and of up in turn, eight at a time: a thread of the kernel then has both of a pair."""
    *lead, rows, width = gate_up.shape
    return gate_up.reshape(*lead, 2, rows // 16, 8, width).swapaxes(-4, -3).reshape(gate_up.shape)


def _product(x: Array, matrix: LayerMatrix, layer: int) -> Float[Array, "1 M N"]:
    weight = dequantize(matrix.packed[layer], matrix.scales[layer].T, x.dtype, LAYER_CODE)
    return reference.einsum_to(x.dtype, "mk,nk->mn", x, weight)[None]


def _reference(
    attended: Rows, residual, norms: Norms, matrices: LayerMatrices, layer: int, last: bool, eps, activation
) -> tuple[Array, Array]:
    """The jnp twin of `decode_layer`."""
    how: dict[str, Any] = dict(eps=eps, offset=0.0, bias=None, branch_scale=None, permuted=False)
    out = _product(attended.plain.astype(residual.dtype), matrices.out, layer)
    residual, rows = add_rms_norm(residual, out, norms[0], layer, **how)
    both = _product(rows.plain, matrices.gate_up, layer)
    sixteens = both.reshape(1, both.shape[1], -1, 2, 8)
    halves = jnp.moveaxis(sixteens, 3, 2).reshape(both.shape)
    gated = gated_activation.reference(halves, activation, residual.dtype, layer, None, permuted=False)
    residual, rows = add_rms_norm(residual, _product(gated.plain, matrices.down, layer), norms[1], layer, **how)
    return residual, rows.plain if last else _product(rows.plain, matrices.qkv, layer + 1)
