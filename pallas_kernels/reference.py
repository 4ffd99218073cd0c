"""jnp twins of the kernels: the oracle of their tests, and the path on CPU, TPU and GPUs below compute capability 8.0.

How the bytes of a quantized matrix are read: `codes.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import cache_codes, dispatch
from pallas_kernels.codes import dequantize, group_size

__all__ = [
    "decode_attention",
    "dequantize",
    "einsum_f32",
    "einsum_to",
    "group_size",
    "int4_matmul",
    "layer_weight",
    "take_layer",
]


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """einsum accumulated and returned in float32; XLA's CPU backend has no 16-bit dot with a float32 result."""
    if dispatch.current_device().backend == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def einsum_to(dtype, spec: str, a: Array, b: Array) -> Array:
    """einsum accumulated in float32 and rounded once to `dtype`; on an accelerator no float32 result is stored."""
    if dispatch.current_device().backend == "cpu":
        return einsum_f32(spec, a, b).astype(dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)


def take_layer(stack: Array, layer: Int[Array, ""] | int | None) -> Array:
    """`stack[layer]`; a traced index stays one dynamic slice that XLA can fuse into its consumer."""
    return stack if layer is None else lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def layer_weight(x: Array, packed, scales, layer, code: str = "int4") -> tuple[Array, Float[Array, "N K"]]:
    """x unchanged, and the dequantized weight of `layer` in x's dtype.

    Inside a decoding loop the weights are loop-invariant, and XLA may hoist their dequantization into a
    full-precision copy that lives through the loop. The barrier ties them to x, which changes every iteration. With a
    stack, tying the index is enough and no large array passes through the barrier.
    """
    if layer is None:
        x, packed, scales = lax.optimization_barrier((x, packed, scales))
    else:
        x, layer = lax.optimization_barrier((x, jnp.asarray(layer, jnp.int32)))
        packed, scales = take_layer(packed, layer), take_layer(scales, layer)
    return x, dequantize(packed, scales, x.dtype, code)


def int4_matmul(x, packed, scales, layer, xa, lora_b, out_dtype, code: str = "int4") -> Float[Array, "M N"]:
    """x @ dequant(W[layer])^T (+ xa @ lora_b^T), accumulated in float32, rounded once to `out_dtype`.

    The adapter's product is R more columns of the same product: a sum of two would hold both in float32, which for the MLP
    of a training forward was the largest memory of a step.
    """
    x, weight = layer_weight(x, packed, scales, layer, code)
    if xa is not None:
        x = jnp.concatenate([x, xa.astype(x.dtype)], axis=-1)
        weight = jnp.concatenate([weight, lora_b.astype(weight.dtype)], axis=-1)
    return einsum_to(out_dtype, "mk,nk->mn", x, weight)


def decode_attention(
    q: Float[Array, "Q G H Hd"],
    prompt_k: Float[Array, "L Q K P Hd"],
    prompt_v: Float[Array, "L Q K P Hd"],
    prompt_lengths: Int[Array, "Q"],
    k: Float[Array, "L Q G K C Hd"],
    v: Float[Array, "L Q G K C Hd"],
    length: Int[Array, ""] | int,
    layer: Int[Array, ""] | int,
    scale: float,
    window: int | Int[Array, ""] | None,
    softcap: float | None = None,
    scales=None,
) -> Float[Array, "Q G H Hd"]:
    """One softmax in float32 over the shared prompt and the row's own suffix."""
    prompt_k, prompt_v, k, v = (
        cache_codes.decode(take_layer(stack, layer), None if part is None else take_layer(part, layer), q.dtype)
        for stack, part in zip((prompt_k, prompt_v, k, v), scales or (None,) * 4, strict=True)
    )
    (_groups, _, heads, head_dim), kv_heads = q.shape, prompt_k.shape[1]
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, head_dim)  # n: query heads of one kv head
    prompt_scores = einsum_f32("qgknd,qkpd->qgknp", grouped, prompt_k)
    suffix_scores = einsum_f32("qgknd,qgkcd->qgknc", grouped, k)
    scores = scale * jnp.concatenate([prompt_scores, suffix_scores], axis=-1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    visible = visible_slots(prompt_lengths, length, prompt_k.shape[2], k.shape[3], window)
    probs = jax.nn.softmax(jnp.where(visible[:, None, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    prompt_probs, suffix_probs = jnp.split(probs, [prompt_k.shape[2]], axis=-1)
    out = einsum_f32("qgknp,qkpd->qgknd", prompt_probs, prompt_v)
    out += einsum_f32("qgknc,qgkcd->qgknd", suffix_probs, v)
    return out.astype(q.dtype).reshape(q.shape)


def visible_slots(prompt_lengths, length, prompt_slots: int, suffix_slots: int, window) -> Array:
    """bool[Q, P + C]: the cache slots that the current position, prompt_lengths + length - 1, attends to."""
    prompt = jnp.arange(prompt_slots)
    suffix = jnp.arange(suffix_slots)
    prompt_ok = prompt < prompt_lengths[:, None]
    suffix_ok = jnp.broadcast_to(suffix < length, (prompt_lengths.shape[0], suffix_slots))
    if window is not None:  # a key at position j is seen from position i while i - j < window
        prompt_ok &= prompt > prompt_lengths[:, None] + length - 1 - window
        suffix_ok &= suffix > length - 1 - window
    return jnp.concatenate([prompt_ok, suffix_ok], axis=-1)
