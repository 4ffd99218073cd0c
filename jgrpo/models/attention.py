"""Causal grouped-query attention over whole sequences (training and prefill).

On a GPU in half precision this is cuDNN's flash attention; elsewhere a scan over blocks of queries, so that
no `[T, T]` array of scores exists. Rows are right-padded: `lengths` masks the padded keys, and what
padded queries return is unspecified but finite.

Rows that hold several sequences say so with `segments`; those always take the blocks, since JAX's public entry to cuDNN
knows lengths but no segments (a bias of `[T, T]` would undo the point).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

QUERY_BLOCK = 256


def causal_attention(
    q: Float[Array, "B T H Hd"],
    k: Float[Array, "B T K Hd"],
    v: Float[Array, "B T K Hd"],
    lengths: Int[Array, " B"],
    window: int | Int[Array, ""] | None = None,
    segments: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H Hd"]:
    """softmax(scale · q kᵀ) v, each query seeing the keys up to itself and at most `window` positions back.

    `scale` is 1/√Hd by default. With `segments`, a query sees the keys of its own segment only; a `softcap` c makes the
    scores c · tanh(score / c). Those, and a traced `window` (layers that differ), always take the blockwise path.
    """
    if segments is None and softcap is None and _cudnn_applies(q, window):
        span = None if window is None else (int(window) - 1, 0)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scale,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=span,
            implementation="cudnn",
        )
    return blockwise_attention(q, k, v, lengths, window, segments=segments, scale=scale, softcap=softcap)


def _cudnn_applies(q: Array, window: int | Array | None) -> bool:
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and not isinstance(window, Array)
    )


def blockwise_attention(
    q: Float[Array, "B T H Hd"],
    k: Float[Array, "B T K Hd"],
    v: Float[Array, "B T K Hd"],
    lengths: Int[Array, " B"],
    window: int | Int[Array, ""] | None = None,
    block: int = QUERY_BLOCK,
    segments: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H Hd"]:
    """The same function in plain XLA: scores of one block of queries at a time, softmax in float32."""
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    block = min(block, time)
    num_blocks = -(-time // block)
    padded = jnp.pad(q, ((0, 0), (0, num_blocks * block - time), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, num_blocks, block, kv_heads, heads // kv_heads, head_dim)
    keys = jnp.arange(time)
    factor = head_dim**-0.5 if scale is None else scale

    @jax.checkpoint
    def attend(index: Array, q_block: Array) -> Array:
        queries = index * block + jnp.arange(block)
        visible = keys[None, :] <= queries[:, None]
        if window is not None:
            visible &= queries[:, None] - keys[None, :] < window
        mask = visible[None] & (keys[None, None, :] < lengths[:, None, None])
        if segments is not None:
            own = jnp.take(segments, queries, axis=1, mode="clip")
            mask &= own[:, :, None] == segments[:, None, :]
        scores = jnp.einsum("btkgd,bskd->bkgts", q_block, k, preferred_element_type=jnp.float32)
        scores = scores * factor if softcap is None else softcap * jnp.tanh(scores * factor / softcap)
        # A finite floor keeps a padded query, which may see no key at all, free of NaN.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bskd->btkgd", weights, v)

    def step(_: None, xs: tuple[Array, Array]) -> tuple[None, Array]:
        return None, attend(*xs)

    _, out = jax.lax.scan(step, None, (jnp.arange(num_blocks), jnp.moveaxis(blocks, 1, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, num_blocks * block, heads, head_dim)[:, :time]
