"""Products with a dequantized layer, for many rows: the matrix in 16 bits first, then the library's matrix product.

What a training forward and a prefill do, where arithmetic is the limit and the weights are read once for thousands of rows.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import dispatch, reference


def layer_weight(
    x: Float[Array, "M D"],
    packed: Num[Array, "*L N W"],
    scales: Float[Array, "*L N G"],
    layer: Int[Array, ""] | int | None,
    code: str = "int4",
    tail: Float[Array, "N R"] | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, "N KR"]]:
    """x unchanged, and the weight of `layer` in x's dtype, with the columns of `tail` behind it.

    Nothing of it can be computed before x is: see `reference.layer_weight`.
    """
    group = reference.group_size(packed, scales, code)
    if dispatch.dequantize_problem(dispatch.current_device(), x.dtype, group * scales.shape[-1], group) is None:
        from pallas_kernels.dequantize_triton import dequantize

        if layer is None:
            x, packed = lax.optimization_barrier((x, packed))
        else:
            x, layer = lax.optimization_barrier((x, jnp.asarray(layer, jnp.int32)))
        return x, dequantize(packed, scales, layer, x.dtype, code, tail)
    return reference.layer_weight(x, packed, scales, layer, code, tail)


def matmul(x, packed, scales, layer, xa, lora_b, out_dtype, code: str = "int4") -> Float[Array, "M N"]:
    """x @ dequant(W[layer])^T (+ xa @ lora_b^T), summed in float32 inside a product.

    A float32 sum of base and adapter would be the largest array of a training forward. So the adapter is R more columns of
    the one product, which copies x; where x is wider than the result, its product is rounded and added instead.
    """
    widens = packed.shape[-2] >= x.shape[1]
    wide = jnp.concatenate([x, xa.astype(x.dtype)], axis=-1) if widens and xa is not None else x
    out = reference.product(wide, packed, scales, layer, lora_b if widens else None, out_dtype, code, layer_weight)
    if widens or xa is None or lora_b is None:
        return out
    return out + reference.einsum_to(out_dtype, "mr,nr->mn", xa.astype(x.dtype), lora_b.astype(x.dtype))
