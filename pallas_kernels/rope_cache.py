"""From the fused q, k, v projection of one token to rotated queries and a cache that holds its keys and values.

Between the projection and the attention of a decode step stand the sum of the projection's partial sums, its bias, a norm of
each head, the rotation and two writes into the cache: in plain XLA half a dozen kernels that each take longer to start than
to run. The caches are updated in place.
"""

from typing import TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import cache_codes, dispatch
from pallas_kernels.reference import take_layer
from pallas_kernels.rows import joined

Scales: TypeAlias = tuple[Float[Array, "L Q G K C"], Float[Array, "L Q G K C"]]


def rope_and_cache(
    qkv: Float[Array, "*S Q G HKK_Hd"],
    cos: Float[Array, "Q Hd_2"],
    sin: Float[Array, "Q Hd_2"],
    k: Shaped[Array, "L Q G K C Hd"],
    v: Shaped[Array, "L Q G K C Hd"],
    slot: Int[Array, ""] | int,
    *,
    layer: Int[Array, ""] | int,
    norms: tuple[Float[Array, "L Hd"], Float[Array, "L Hd"]] | None = None,
    eps: float = 1e-6,
    scales: Scales | None = None,
    bias: Float[Array, "L HKK_Hd"] | None = None,
    dtype=None,
    implementation: str | None = None,
) -> tuple[Float[Array, "Q G H Hd"], Shaped[Array, "L Q G K C Hd"], Shaped[Array, "L Q G K C Hd"], Scales | None]:
    """(rotated q, then k, v and their scales with `slot` of `layer` written).

    Args:
      qkv: the heads of q, then k, then v of every row; with a leading axis, the partial sums of them.
      cos, sin: of the rows' angles, one row of the table for a group; float32.
      k, v: the stacked caches; given up to the result where the caller can (inside a loop, always).
      norms: scales of the RMS norms of q's and k's heads, of which the layer's row is taken; None: no norm.
      scales: of a cache in 8 bits (`cache_codes.py`): the keys' and the values'; None for other caches.
      bias: of the projection, a stack of which the layer's row is taken; None: none, or qkv holds it.
      dtype: of the queries and of all roundings on the way; qkv's by default.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run here.
    """
    parts, dtype = qkv if qkv.ndim == 4 else qkv[None], jnp.dtype(dtype or qkv.dtype)
    check_shapes(parts, cos, sin, k, v, bias)
    if (scales is not None) != cache_codes.is_coded(k.dtype) or (scales and scales[0].shape != k.shape[:-1]):
        raise ValueError(f"rope_and_cache: a cache of {k.dtype}{k.shape} got scales {scales and scales[0].shape}")
    slot, layer = (i if isinstance(i, int) else jnp.asarray(i, jnp.int32) for i in (slot, layer))
    problem = dispatch.rope_and_cache_problem(dispatch.current_device(), dtype, k.shape[5], k.dtype)
    chosen = dispatch.resolve(
        "rope_and_cache", implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem
    )
    if chosen == dispatch.TRITON:
        from pallas_kernels.rope_cache_triton import rope_and_cache as fused

        return fused(parts, cos, sin, k, v, slot, layer, norms, eps, scales, bias, dtype)
    qkv = joined(parts, dtype)
    qkv = qkv if bias is None else qkv + take_layer(bias, layer).astype(dtype)
    return reference(qkv, cos, sin, k, v, slot, layer, norms, eps, scales)


def check_shapes(parts, cos, sin, k, v, bias) -> None:
    """ValueError where the arguments of `rope_and_cache` do not fit each other."""
    kv_heads, head_dim = k.shape[3], k.shape[5]
    heads = parts.shape[-1] // head_dim - 2 * kv_heads
    want, table = (*k.shape[1:3], (heads + 2 * kv_heads) * head_dim), (k.shape[1], head_dim // 2)
    if parts.shape[1:] != want or v.shape != k.shape or cos.shape != table or sin.shape != cos.shape:
        raise ValueError(
            f"rope_and_cache: cache {k.shape} and {v.shape} want qkv {want} and cos, sin {table}, "
            f"got {parts.shape[1:]}, {cos.shape}, {sin.shape}"
        )
    if bias is not None and (bias.ndim != 2 or bias.shape[1] != want[2]):
        raise ValueError(f"rope_and_cache: bias must be [L, {want[2]}], got {bias.shape}")


def reference(qkv, cos, sin, k, v, slot, layer, norms, eps, scales):
    """The jnp twin: rounds to qkv's dtype after the norm and once after the rotation, as the kernel does."""
    kv_heads, head_dim = k.shape[3], k.shape[5]
    parts = qkv.reshape(*qkv.shape[:-1], -1, head_dim)
    q_new, k_new, v_new = jnp.split(parts, [parts.shape[-2] - 2 * kv_heads, parts.shape[-2] - kv_heads], axis=-2)
    if norms is not None:
        q_new, k_new = (_norm(x, scale[layer], eps) for x, scale in zip((q_new, k_new), norms, strict=True))
    q_new, k_new = (_rotate(x, cos, sin) for x in (q_new, k_new))
    k, v, scales = write((k, v), (k_new, v_new), slot, layer, scales)
    return q_new, k, v, scales


def write(
    caches: tuple[Array, Array],
    new: tuple[Float[Array, "Q G K Hd"], Float[Array, "Q G K Hd"]],
    slot: Int[Array, ""] | int,
    layer: Int[Array, ""] | int,
    scales: Scales | None,
) -> tuple[Array, Array, Scales | None]:
    """(k, v, their scales) with new keys and values in one slot of every row of a layer, in plain XLA."""
    at = (layer, 0, 0, 0, slot)
    if scales is not None:
        codes, fresh = zip(*(cache_codes.encode(part, caches[0].dtype) for part in new), strict=True)
        new = (codes[0], codes[1])
        scales = tuple(  # type: ignore[assignment]
            lax.dynamic_update_slice(stack, part[None, ..., None], at)
            for stack, part in zip(scales, fresh, strict=True)
        )
    k, v = (
        lax.dynamic_update_slice(stack, part[None, :, :, :, None].astype(stack.dtype), (*at, 0))
        for stack, part in zip(caches, new, strict=True)
    )
    return k, v, scales


def _norm(x, scale, eps):
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def _rotate(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (table.astype(x.dtype).astype(jnp.float32)[:, None, None] for table in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
