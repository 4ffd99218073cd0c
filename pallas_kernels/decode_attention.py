"""Attention of one token for every row, over a cache whose prompt part is stored once for the G rows of a group.

The rows of a group share their prompt's keys and values, so a kernel reads them once and gives its matrix product
G * H/K rows. The softmax runs over prompt and suffix together; where they are computed apart they are merged in float32.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import cache_codes, dispatch, reference
from pallas_kernels.rows import Rows, as_rows

Scales: TypeAlias = tuple[
    Float[Array, "L Q K P"], Float[Array, "L Q K P"], Float[Array, "L Q G K C"], Float[Array, "L Q G K C"]
]


def decode_attention(
    q: Float[Array, "Q G H Hd"],
    prompt_k: Float[Array, "L Q K P Hd"],
    prompt_v: Float[Array, "L Q K P Hd"],
    prompt_lengths: Int[Array, "Q"],
    k: Float[Array, "L Q G K C Hd"],
    v: Float[Array, "L Q G K C Hd"],
    length: Int[Array, ""] | int,
    *,
    layer: Int[Array, ""] | int,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scales: Scales | None = None,
    implementation: str | None = None,
) -> Float[Array, "Q G H Hd"]:
    """softmax(scale * q K^T) V over the prompt slots < prompt_lengths and the suffix slots < length.

    Args:
      length: suffix slots in use, the one of the current token included; at least 1.
      layer: index into the stacked caches.
      scale: positive factor of the scores, usually head_dim ** -0.5.
      window: keys further back than `window - 1` positions are invisible; a row's position is
        prompt_lengths + length - 1. None: everything before is visible. A traced window (layers that differ) always
        takes the reference.
      softcap: c makes the scores c * tanh(score / c), the factor `scale` included (Gemma 2); always the reference.
      scales: of keys and values in 8 bits (`cache_codes.py`): the prompts' keys, the prompts' values, keys, values.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run here.
    """
    how: dict[str, Any] = dict(
        layer=layer, scale=scale, window=window, softcap=softcap, scales=scales, implementation=implementation
    )
    caches = (prompt_k, prompt_v, prompt_lengths, k, v)
    rows = decode_attention_rows(q, *caches, length, permuted=False, **how)
    assert isinstance(rows, Rows)
    return rows.plain.reshape(q.shape)


def decode_attention_rows(
    q: Float[Array, "Q G H Hd"],
    prompt_k: Float[Array, "L Q K P Hd"],
    prompt_v: Float[Array, "L Q K P Hd"],
    prompt_lengths: Int[Array, "Q"],
    k: Float[Array, "L Q G K C Hd"],
    v: Float[Array, "L Q G K C Hd"],
    length: Int[Array, ""] | int,
    *,
    permuted: bool,
    layer: Any,
    scale: float,
    window: Any = None,
    softcap: float | None = None,
    scales: Scales | None = None,
    implementation: str | None = None,
) -> Rows:
    """`decode_attention` as rows `[Q·G, H·Hd]` of the next product, with permuted columns if asked for.

    The other arguments and errors are those of `decode_attention`; permuted columns want a head_dim that divides by 16.
    """
    check_shapes(q.shape, prompt_k, prompt_v, prompt_lengths, k, v)
    _check_scales((prompt_k, prompt_v, k, v), scales)
    if permuted and q.shape[-1] % 16:
        raise ValueError(f"decode_attention: permuted columns come in sixteens, a head has {q.shape[-1]}")
    layer, length = (i if isinstance(i, int) else jnp.asarray(i, jnp.int32) for i in (layer, length))
    device, head_dim = dispatch.current_device(), q.shape[-1]
    static_window = window is None or isinstance(window, int)
    chosen = dispatch.resolve(
        "decode_attention",
        implementation,
        dispatch.decode_attention_rule(device, q.dtype, head_dim, static_window, softcap, k.dtype),
        dispatch.decode_attention_problem(device, q.dtype, head_dim, static_window, softcap, k.dtype),
    )
    if chosen == dispatch.TRITON:
        from pallas_kernels.decode_attention_triton import decode_attention as fused

        caches = (prompt_k, prompt_v, prompt_lengths, k, v)
        return fused(q, *caches, length, layer, scale, window, scales, permuted=permuted)
    out = reference.decode_attention(
        q, prompt_k, prompt_v, prompt_lengths, k, v, length, layer, scale, window, softcap, scales
    )
    return as_rows(out.reshape(out.shape[0] * out.shape[1], -1), permuted)


def _check_scales(caches, scales) -> None:
    want = [cache.shape[:-1] for cache in caches] if cache_codes.is_coded(caches[0].dtype) else None
    got = None if scales is None else [part.shape for part in scales]
    if want != got:
        raise ValueError(f"decode_attention: a cache of {caches[0].dtype} wants scales {want}, got {got}")


def check_shapes(q_shape, prompt_k, prompt_v, prompt_lengths, k, v) -> None:
    """ValueError where the arguments of `decode_attention` do not fit each other."""
    (questions, generations, heads, head_dim), kv_heads = q_shape, k.shape[3]
    layers, prompt_slots, suffix_slots = k.shape[0], prompt_k.shape[3], k.shape[4]
    want_prompt = (layers, questions, kv_heads, prompt_slots, head_dim)
    want_suffix = (layers, questions, generations, kv_heads, suffix_slots, head_dim)
    if (
        prompt_k.shape != want_prompt
        or prompt_v.shape != want_prompt
        or k.shape != want_suffix
        or v.shape != want_suffix
    ):
        raise ValueError(
            f"decode_attention: q {q_shape} wants prompt_k, prompt_v {want_prompt} and k, v {want_suffix}, got "
            f"{prompt_k.shape}, {prompt_v.shape}, {k.shape}, {v.shape}"
        )
    if heads % kv_heads or prompt_lengths.shape != (questions,):
        raise ValueError(
            f"decode_attention: {heads} query heads, {kv_heads} kv heads, prompt_lengths {prompt_lengths.shape}: heads "
            f"must divide and prompt_lengths must be ({questions},)"
        )
