"""x Wᵀ for every form of W, with the adapter beside it: the one matmul entry point of all linear layers.

A zero-point is linear in the inputs of its group: Σ (n - z)·s·x = Σ (n - 8)·s·x + (8 - z)·s·Σ x. So an asymmetric weight is
the symmetric product plus one more low-rank product, over the sums of the groups, which rides in the adapter's place:
the kernels know symmetric levels only. Where groups are so many that it would not fit there, it is a product of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

import pallas_kernels
from jgrpo.quantization.weights import MixedWeight, PackedWeight, Weight, dequantize
from pallas_kernels import Rows

EPILOGUE_RANK = 256
"""Widest low-rank product that the kernel takes beside the weights: twice as many columns (14,336 inputs in groups of 32) need
more shared memory than a Hopper GPU gives one block."""


def matmul(
    x: Float[Array, "*B K"],
    weight: Weight,
    layer: int | Int[Array, ""] | None = None,
    adapter: tuple[Float[Array, "*L R K"], Float[Array, "*L N R"]] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "*B N"]:
    """x Wᵀ + (x Aᵀ) Bᵀ: the matmul entry point of every linear layer.

    `layer` picks from a stacked weight; an adapter `(a, b)` is either stacked likewise or that layer's own, and its
    scale is already in `a`. The result has `x.dtype` unless `out_dtype` is given; sums are in float32.
    """
    if isinstance(weight, MixedWeight):
        return _mixed(x, weight, layer, adapter, out_dtype)
    a, b = adapter if adapter is not None else (None, None)
    xa = None if a is None else _project(x, a, layer)
    if isinstance(weight, PackedWeight):
        return _packed(x, weight, layer, xa, b, out_dtype)
    out = _dot(x, _at(weight, layer), out_dtype)
    return out if xa is None or b is None else out + _dot(xa, _at(b, layer), out_dtype)


def matmul_parts(
    rows: Rows,
    weight: Weight,
    layer: int | Int[Array, ""],
    adapter: tuple[Float[Array, "*L R K"], Float[Array, "*L N R"]] | None = None,
) -> Float[Array, "S M N"]:
    """`matmul` for the few rows of a decode step, as partial sums that its consumer adds; not differentiable.

    One part in the rows' dtype where no kernel splits the product, which is then exactly `matmul`'s result.
    """
    if isinstance(weight, MixedWeight) and isinstance(layer, int):
        part, index = weight.where[layer]
        return matmul_parts(rows, weight.parts[part], index, _own(adapter, layer))
    if isinstance(weight, MixedWeight) or (adapter is not None and not isinstance(weight, PackedWeight)):
        return matmul(rows.plain, weight, layer, adapter)[None]
    if not isinstance(weight, PackedWeight):
        return _dense_parts(rows.plain, weight, layer)
    a, b = adapter if adapter is not None else (None, None)
    if weight.zeros is not None:
        xa, b = _with_zeros(rows.plain, weight, layer, None if a is None else _project(rows.plain, a, layer), b)
        if xa.shape[-1] > EPILOGUE_RANK:
            return matmul(rows.plain, weight, layer, adapter)[None]
    else:
        xa = None if a is None else _dense_parts(rows.plain, a, layer)
    b = None if b is None else b.astype(rows.plain.dtype)
    how: dict[str, Any] = dict(layer=layer, xa=xa, lora_b=b, code=weight.code)
    return pallas_kernels.int4_partial_sums(rows, weight.packed, weight.scales, **how)


def gated_matmul(
    rows: Rows,
    weight: Weight,
    layer: int | Int[Array, ""],
    adapter: tuple[Float[Array, "*L R K"], Float[Array, "*L N R"]] | None = None,
    *,
    activation: str,
    bias: Float[Array, "L N"] | None = None,
    permuted: bool = False,
) -> Rows:
    """activation(gate) * up, the halves of `matmul_parts` and its bias, in the rows' dtype; not differentiable.

    `permuted` asks for the rows with permuted columns too. A plain array without an adapter is one kernel where
    that is faster; all else is the product, then the gate.
    """
    if isinstance(weight, Array | tuple) and adapter is None and not permuted:
        own = weight[layer] if isinstance(weight, tuple) else weight
        return Rows(pallas_kernels.gated_matmul(rows.plain, own, activation=activation, layer=layer, bias=bias))
    parts = matmul_parts(rows, weight, layer, adapter)
    how: dict[str, Any] = dict(activation=activation, dtype=rows.plain.dtype, layer=layer, bias=bias, permuted=permuted)
    return pallas_kernels.gated_activation(parts, **how)


def _dense_parts(x: Array, weight: Any, layer: Any) -> Array:
    """Partial sums of x Wᵀ for an array that is one layer's, a stack, or one of a tuple."""
    if isinstance(weight, tuple) or weight.ndim == 2:
        return pallas_kernels.dense_partial_sums(x, _at(weight, layer))
    return pallas_kernels.dense_partial_sums(x, weight, layer=layer)


def reads_permuted(weight: Weight, layer: int | Int[Array, ""], rows: int, dtype: Any) -> bool:
    """Whether `matmul_parts` of that many rows reads them with permuted columns."""
    if isinstance(weight, MixedWeight) and isinstance(layer, int):
        part, index = weight.where[layer]
        return reads_permuted(weight.parts[part], index, rows, dtype)
    if not isinstance(weight, PackedWeight):
        return False
    return pallas_kernels.reads_permuted(rows, dtype, weight.packed, weight.scales, weight.code)


def _packed(x: Array, weight: Any, layer: Any, xa: Array | None, b: Array | None, out_dtype: Any) -> Array:
    apart = None
    if weight.zeros is not None:
        xa, b = _with_zeros(x, weight, layer, xa, b)
        if xa.shape[-1] > EPILOGUE_RANK:
            apart, xa, b = _dot(xa, b, jnp.float32), None, None
    out = pallas_kernels.int4_matmul(
        x.reshape(-1, x.shape[-1]),
        weight.packed,
        weight.scales,
        layer=layer,
        xa=None if xa is None else xa.reshape(-1, xa.shape[-1]),
        lora_b=None if b is None else b.astype(x.dtype),
        out_dtype=(out_dtype or x.dtype) if apart is None else jnp.float32,
        code=weight.code,
    ).reshape(*x.shape[:-1], -1)
    return out if apart is None else (out + apart).astype(out_dtype or x.dtype)


def _with_zeros(x: Array, weight: Any, layer: Any, xa: Array | None, b: Array | None) -> tuple[Array, Array]:
    """The adapter's factors with those of the zero-points beside them: sums of the inputs and (8 - zero) · scale of each group.

    `[..., R + K/g]` and `[N, R + K/g]`.
    """
    sums = x.reshape(*x.shape[:-1], -1, weight.group_size).sum(-1, dtype=jnp.float32).astype(x.dtype)
    offsets = (8.0 - _at(weight.zeros, layer).astype(jnp.float32)) * _at(weight.scales, layer).astype(jnp.float32)
    offsets = offsets.astype(x.dtype)
    if xa is None or b is None:
        return sums, offsets
    return jnp.concatenate([xa, sums], -1), jnp.concatenate([_at(b, layer).astype(x.dtype), offsets], -1)


def _mixed(x: Array, weight: MixedWeight, layer: Any, adapter: Any, out_dtype: Any) -> Array:
    own = _own(adapter, layer)
    if isinstance(layer, int):
        part, index = weight.where[layer]
        return matmul(x, weight.parts[part], index, own, out_dtype)
    parts, indices = (jnp.asarray(column, jnp.int32)[layer] for column in zip(*weight.where, strict=True))

    def branch(part: Any) -> Any:
        return lambda x, index, own: matmul(x, part, index, own, out_dtype)

    return jax.lax.switch(parts, [branch(part) for part in weight.parts], x, indices, own)


def _own(adapter: Any, layer: Any) -> tuple[Array, Array] | None:
    return None if adapter is None else (_at(adapter[0], layer), _at(adapter[1], layer))


def _project(x: Array, a: Any, layer: Any) -> Array:
    """x Aᵀ of the adapter."""
    return jnp.einsum("...k,rk->...r", x, _at(a, layer).astype(x.dtype))


def _dot(x: Array, weight: Array, out_dtype: Any) -> Array:
    out = jnp.einsum("...k,nk->...n", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(out_dtype or x.dtype)


def _at(stack: Any, layer: Any) -> Array:
    """The layer's own matrix: `stack[layer]`, or `stack` itself where it has no layer axis."""
    if isinstance(stack, tuple):
        return stack[layer]
    return stack if stack.ndim == 2 else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def embed(table: Weight, tokens: Int[Array, "*B"], dtype: Any) -> Float[Array, "*B D"]:
    """Rows of the embedding `[V, D]`; of a quantized one, only the rows asked for are dequantized."""
    if isinstance(table, PackedWeight):
        return dequantize(jax.tree.map(lambda leaf: leaf[tokens], table), dtype)
    assert isinstance(table, Array)
    return table[tokens].astype(dtype)
