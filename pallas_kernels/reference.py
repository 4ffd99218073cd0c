"""jnp twins of the kernels: the oracle of their tests, and the path on CPU, TPU and GPUs below compute capability 8.0.

How the bytes of a quantized matrix are read: `codes.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import cache_codes, dispatch
from pallas_kernels.codes import PER_BYTE, dequantize, group_size

__all__ = [
    "decode_attention",
    "dequantize",
    "einsum_f32",
    "einsum_to",
    "group_size",
    "int4_matmul",
    "layer_weight",
    "product",
    "row_slice",
    "take_layer",
    "transposed_product",
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


def layer_weight(x: Array, packed, scales, layer, code: str = "int4", tail=None) -> tuple[Array, Float[Array, "N KR"]]:
    """x unchanged, and the dequantized weight of `layer` in x's dtype, with the columns of `tail` behind it.

    Inside a decoding loop the weights are loop-invariant, and XLA may hoist their dequantization into a
    full-precision copy that lives through the loop. The barrier ties them to x, which changes every iteration. With a
    stack, tying the index is enough and no large array passes through the barrier.
    """
    if layer is None:
        x, packed, scales = lax.optimization_barrier((x, packed, scales))
    else:
        x, layer = lax.optimization_barrier((x, jnp.asarray(layer, jnp.int32)))
        packed, scales = take_layer(packed, layer), take_layer(scales, layer)
    weight = dequantize(packed, scales, x.dtype, code)
    return x, weight if tail is None else jnp.concatenate([weight, tail.astype(weight.dtype)], axis=-1)


DEQUANTIZED_BYTES = 256 * 2**20
"""Dequantized weights that exist at the same time; a larger matrix is multiplied in blocks of its rows."""
BLOCK_MULTIPLE = 128
"""Blocks are multiples of this many rows: whole tiles of a matrix product."""


def row_block(rows: int, width: int, item: int) -> int:
    """Rows of a matrix `[rows, width]`, of `item` bytes a number, to dequantize at once: all, or even parts within the limit."""
    fitting = DEQUANTIZED_BYTES // (width * item)
    if rows <= fitting:
        return rows
    fitting = max(fitting // BLOCK_MULTIPLE, 1) * BLOCK_MULTIPLE
    even = -(-rows // -(-rows // fitting))
    return min(-(-even // BLOCK_MULTIPLE) * BLOCK_MULTIPLE, rows)


def row_slice(stack: Array, layer: Int[Array, ""] | int | None, start: Int[Array, ""], size: int) -> Array:
    """`stack[layer, start : start + size]`, one dynamic slice."""
    if layer is None:
        return lax.dynamic_slice_in_dim(stack, start, size)
    return lax.dynamic_slice(stack, (layer, start, 0), (1, size, stack.shape[-1]))[0]


def int4_matmul(x, packed, scales, layer, xa, lora_b, out_dtype, code: str = "int4") -> Float[Array, "M N"]:
    """x @ dequant(W[layer])^T (+ xa @ lora_b^T), accumulated in float32, rounded once to `out_dtype`.

    The adapter's product is R more columns of the same product: a sum of two would hold both in float32, which for the MLP
    of a training forward was the largest memory of a step.
    """
    if xa is not None:
        x = jnp.concatenate([x, xa.astype(x.dtype)], axis=-1)
    return product(x, packed, scales, layer, lora_b, out_dtype, code, layer_weight)


def product(x, packed, scales, layer, tail, out_dtype, code: str, layer_weight) -> Float[Array, "M N"]:
    """x @ [dequant(W[layer]), tail]^T, whole or in blocks of W's rows (`row_block`); `layer_weight` dequantizes.

    The last block is as long as the others, so it repeats rows of the one before.
    """
    rows, width = packed.shape[-2], PER_BYTE[code] * packed.shape[-1]
    block = row_block(rows, width, x.dtype.itemsize)
    if block == rows:
        x, weight = layer_weight(x, packed, scales, layer, code, tail)
        return einsum_to(out_dtype, "mk,nk->mn", x, weight)

    def step(index, out):
        start = jnp.minimum(index * block, rows - block)
        parts = [row_slice(part, layer, start, block) for part in (packed, scales)]
        own_tail = None if tail is None else row_slice(tail, None, start, block)
        inputs, weight = layer_weight(x, *parts, None, code, own_tail)
        part = einsum_to(out_dtype, "mk,nk->mn", inputs, weight)
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    return lax.fori_loop(0, -(-rows // block), step, jnp.zeros((x.shape[0], rows), out_dtype))


def transposed_product(g, packed, scales, layer, code: str, layer_weight) -> tuple[Array, Float[Array, "M K"]]:
    """g unchanged, and g @ dequant(W[layer]), accumulated in float32, rounded once to g's dtype: the gradient of `product` in x.

    What reads the g that is returned waits for what the weight waits for; let loose, the compiler kept 80 MB more alive.
    """
    rows, width = packed.shape[-2], PER_BYTE[code] * packed.shape[-1]
    block = row_block(rows, width, g.dtype.itemsize)
    if block == rows:
        g, weight = layer_weight(g, packed, scales, layer, code)
        return g, einsum_to(g.dtype, "mn,nk->mk", g, weight)

    def step(index, total):
        start = jnp.minimum(index * block, rows - block)
        own = start + jnp.arange(block) >= index * block  # not those of the block before
        columns = jnp.where(own, lax.dynamic_slice_in_dim(g, start, block, axis=1), 0)
        parts = [row_slice(part, layer, start, block) for part in (packed, scales)]
        columns, weight = layer_weight(columns, *parts, None, code)
        return total + einsum_f32("mn,nk->mk", columns, weight)

    total = lax.fori_loop(0, -(-rows // block), step, jnp.zeros((g.shape[0], width), jnp.float32))
    return g, total.astype(g.dtype)


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
