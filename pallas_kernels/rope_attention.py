"""From the fused q, k, v projection of one token to its attention: `rope_and_cache`, then `decode_attention_rows`.

Where a program of the attention owns whole generations (`AttentionConfig.takes_new_tokens`), nothing between the two has to wait for another
program, so they are one kernel: a launch less for each layer, and queries, keys and values that are not read back from memory.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import dispatch, rope_cache, tuning
from pallas_kernels.decode_attention import Scales, check_shapes, decode_attention_rows
from pallas_kernels.rows import Rows


class NewTokens(NamedTuple):
    """What an attention of one token begins with beside qkv: the arrays that `rope_attention` takes, by their names."""

    cos: Float[Array, "Q Hd_2"]
    sin: Float[Array, "Q Hd_2"]
    prompt_k: Shaped[Array, "L Q K P Hd"]
    prompt_v: Shaped[Array, "L Q K P Hd"]
    prompt_lengths: Int[Array, "Q"]
    k: Shaped[Array, "L Q G K C Hd"]
    v: Shaped[Array, "L Q G K C Hd"]
    slot: Int[Array, ""]
    norms: tuple[Float[Array, "L Hd"], Float[Array, "L Hd"]] | None = None
    bias: Float[Array, "L HKK_Hd"] | None = None
    scales: Scales | None = None


def rope_attention(
    qkv: Float[Array, "*S Q G HKK_Hd"],
    cos: Float[Array, "Q Hd_2"],
    sin: Float[Array, "Q Hd_2"],
    prompt_k: Shaped[Array, "L Q K P Hd"],
    prompt_v: Shaped[Array, "L Q K P Hd"],
    prompt_lengths: Int[Array, "Q"],
    k: Shaped[Array, "L Q G K C Hd"],
    v: Shaped[Array, "L Q G K C Hd"],
    slot: Int[Array, ""] | int,
    *,
    layer: Int[Array, ""] | int,
    scale: float,
    permuted: bool,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    norms: tuple[Float[Array, "L Hd"], Float[Array, "L Hd"]] | None = None,
    eps: float = 1e-6,
    bias: Float[Array, "L HKK_Hd"] | None = None,
    scales: Scales | None = None,
    dtype=None,
    implementation: str | None = None,
) -> tuple[Rows, Shaped[Array, "L Q G K C Hd"], Shaped[Array, "L Q G K C Hd"], rope_cache.Scales | None]:
    """(the heads' outputs, then k, v and their scales with `slot` of `layer` written); slots < `slot` and the prompt are visible too.

    Args:
      implementation: "reference", "triton", or None for the rule in `dispatch.py`: the kernel, or both operations by their own rules.

    The other arguments and errors are those of `rope_and_cache` and `decode_attention_rows`, whose order of scales this has.
    """
    parts, dtype = qkv if qkv.ndim == 4 else qkv[None], jnp.dtype(dtype or qkv.dtype)
    (_, questions, group, kv_heads, _, head_dim), heads = k.shape, parts.shape[-1] // k.shape[5] - 2 * k.shape[3]
    config = tuning.attention_config(
        questions * group * kv_heads, questions * kv_heads, head_dim, max(1, heads // kv_heads)
    )
    static_window = window is None or isinstance(window, int)
    fits = config.takes_new_tokens(heads // kv_heads, group)
    problem = dispatch.rope_attention_problem(
        dispatch.current_device(), dtype, head_dim, static_window, softcap, k.dtype, fits
    )
    chosen = dispatch.resolve(
        "rope_attention", implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem
    )
    prompt = (prompt_k, prompt_v, prompt_lengths)
    if chosen == dispatch.TRITON:
        from pallas_kernels.rope_attention_triton import rope_attention as fused

        rope_cache.check_shapes(parts, cos, sin, k, v, bias)
        check_shapes((questions, group, heads, head_dim), *prompt, k, v)
        slot, layer = (i if isinstance(i, int) else jnp.asarray(i, jnp.int32) for i in (slot, layer))
        how: dict[str, Any] = dict(norms=norms, eps=eps, bias=bias, dtype=dtype, config=config, permuted=permuted)
        out, k, v = fused(parts, cos, sin, *prompt, k, v, slot, layer, scale, window, **how)
        return out, k, v, None
    q, k, v, written = rope_cache.rope_and_cache(
        qkv,
        cos,
        sin,
        k,
        v,
        slot,
        layer=layer,
        norms=norms,
        eps=eps,
        scales=None if scales is None else scales[2:],
        bias=bias,
        dtype=dtype,
        implementation=implementation,
    )
    out = decode_attention_rows(
        q,
        *prompt,
        k,
        v,
        slot + 1,
        permuted=permuted,
        layer=layer,
        scale=scale,
        window=window,
        softcap=softcap,
        scales=None if scales is None or written is None else (*scales[:2], *written),
        implementation=implementation,
    )
    return out, k, v, written
