"""Log-probability of given tokens and entropy of their distribution, from hidden states: lm_head, log-softmax, gather.

Logits exist for `chunk` positions at a time, [chunk, V], in the forward and again in the backward. With z = logits /
temperature, p = softmax(z):

    logprob = z[target] - lse(z)         d logprob / d z_i = 1[i = target] - p_i
    entropy = -sum_i p_i log p_i         d entropy / d z_i = -p_i (log p_i + entropy)

The backward recomputes the logits of a chunk and uses the saved lse and entropy, so it makes one pass over them.

An int4 head is dequantized in slices of the vocabulary as well, so that neither it nor the logits are ever whole. With the
slices' largest logit so far m, their s = sum e^(z - m) and u = sum e^(z - m) (z - m) stay bounded, and at the end

    lse = m + log s          entropy = log s - u / s

The backward needs lse and entropy only, so its slices add up to the gradient in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, reference
from pallas_kernels.dequantized import layer_weight

Transform = tuple[float, float | None]
"""(temperature, softcap): how logits become z."""
Blocks = tuple[int, int]
"""(positions, entries of the vocabulary) whose logits exist at the same time."""

LOWEST = -1e30
"""Below every logit, and finite: the difference of two of them is 0 and not NaN."""


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | tuple[Array, Array],
    targets: Int[Array, "N"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 4096,
    vocabulary_chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(log p(target), entropy) of softmax(hidden @ head^T / temperature), both float32[N].

    Differentiable in `hidden`, and in `head` when it is an array.

    Args:
      head: the output matrix, or (packed, scales) of an int4 one, which is frozen.
      targets: token ids in [0, V); use any valid id where a position is masked later.
      softcap: c makes the logits c * tanh(logit / c) before the temperature divides them (Gemma 2).
      chunk: positions whose logits exist at the same time.
      vocabulary_chunk: entries of the vocabulary whose logits, and rows of an int4 head that are dequantized, exist at the
        same time; None: all of them. An array is never sliced: there is nothing to dequantize.
      implementation: "reference" or None; there is one implementation on every backend.

    Raises:
      ValueError: shapes do not fit, `temperature` or `chunk` is not positive, or `implementation` is unknown.
      TypeError: under differentiation with respect to the scales of an int4 head.
    """
    dispatch.resolve("token_logprobs", implementation, dispatch.REFERENCE, "only the reference exists")
    vocabulary, width = (head[0].shape[0], 2 * head[0].shape[1]) if isinstance(head, tuple) else head.shape
    if hidden.ndim != 2 or hidden.shape[1] != width or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logprobs: hidden {hidden.shape} and targets {targets.shape} do not fit a head [{vocabulary}, {width}]"
        )
    if temperature <= 0 or chunk <= 0 or (vocabulary_chunk is not None and vocabulary_chunk <= 0):
        raise ValueError(
            f"token_logprobs: temperature and chunks must be positive, got {temperature}, {chunk} and {vocabulary_chunk}"
        )
    entries = min(vocabulary_chunk or vocabulary, vocabulary) if isinstance(head, tuple) else vocabulary
    return _token_logprobs((float(temperature), softcap), (int(chunk), entries), hidden, head, targets)


def _chunked(array: Array, chunk: int) -> Array:
    """[N, ...] -> [chunks, size, ...], zero-padded; sizes are evened out so that the padding is less than one row each."""
    count = max(1, -(-array.shape[0] // chunk))
    size = -(-array.shape[0] // count)
    padding = [(0, count * size - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(count, size, *array.shape[1:])


def _unchunked(array: Array, n: int) -> Array:
    return array.reshape(-1, *array.shape[2:])[:n]


def _head_weight(hidden, head) -> tuple[Array, Array]:
    """hidden unchanged, and the head in hidden's dtype (an int4 head is dequantized again for each chunk)."""
    if isinstance(head, tuple):
        packed, scales = head
        return layer_weight(hidden, packed, scales, None)
    return hidden, head.astype(hidden.dtype)


def _scaled_logits(hidden, weight, transform: Transform) -> Float[Array, "N V"]:
    temperature, softcap = transform
    logits = reference.einsum_f32("nd,vd->nv", hidden, weight)
    return (logits if softcap is None else softcap * jnp.tanh(logits / softcap)) / temperature


def _scale_slope(z, transform: Transform) -> Float[Array, "N V"] | float:
    """dz / d logit from z itself: 1 / temperature, times 1 - tanh^2 under a soft-cap."""
    temperature, softcap = transform
    return (1.0 if softcap is None else 1.0 - jnp.square(z * temperature / softcap)) / temperature


def _slices(head, entries: int) -> int:
    """How many slices of the head there are: 1 where it is not sliced."""
    return -(-head[0].shape[0] // entries) if isinstance(head, tuple) else 1


def _slice_logits(transform: Transform, entries: int, index, hidden, head, targets):
    """(z of one slice, its weight, which of its entries no slice before had, which is the target) of an int4 head.

    The last slice is as long as the others, so it starts inside the one before.
    """
    packed, scales = head
    start = jnp.minimum(index * entries, packed.shape[0] - entries)
    rows = [reference.row_slice(part, None, start, entries) for part in (packed, scales)]
    hidden, weight = layer_weight(hidden, rows[0], rows[1], None)
    number = start + jnp.arange(entries)
    own = number >= index * entries
    return _scaled_logits(hidden, weight, transform), weight, own, own & (number == targets[:, None])


def _sliced_logprobs(transform: Transform, entries: int, hidden, head, targets):
    def step(carry, index):
        m, s, u, target = carry
        z, _, own, onehot = _slice_logits(transform, entries, index, hidden, head, targets)
        m_new = jnp.maximum(m, jnp.max(z, axis=-1, where=own, initial=LOWEST))
        shrink, below = jnp.exp(m - m_new), z - m_new[:, None]
        e = jnp.where(own, jnp.exp(below), 0.0)
        u = shrink * (u + (m - m_new) * s) + jnp.sum(e * below, axis=-1)
        s = shrink * s + jnp.sum(e, axis=-1)
        return (m_new, s, u, target + jnp.sum(jnp.where(onehot, z, 0.0), axis=-1)), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    start = (jnp.full(targets.shape, LOWEST, jnp.float32), zero, zero, zero)
    (m, s, u, target), _ = lax.scan(step, start, jnp.arange(_slices(head, entries)))
    lse = m + jnp.log(s)
    return target - lse, jnp.log(s) - u / s, lse


def _sliced_gradient(transform: Transform, entries: int, head, xs) -> Array:
    """d loss / d hidden of one chunk of positions."""
    hidden, targets, *saved = xs

    def step(total, index):
        z, weight, own, onehot = _slice_logits(transform, entries, index, hidden, head, targets)
        d_logits = jnp.where(own, _logit_gradient(transform, z, onehot, *saved), 0.0).astype(hidden.dtype)
        return total + reference.einsum_f32("nv,vd->nd", d_logits, weight), None

    total, _ = lax.scan(step, jnp.zeros(hidden.shape, jnp.float32), jnp.arange(_slices(head, entries)))
    return total.astype(hidden.dtype)


def _chunk_logprobs(transform: Transform, hidden, head, targets):
    hidden, weight = _head_weight(hidden, head)
    z = _scaled_logits(hidden, weight, transform)
    lse = jax.nn.logsumexp(z, axis=-1)
    log_p = z - lse[:, None]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    target = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
    return target - lse, entropy, lse


def _all_chunks(transform: Transform, blocks: Blocks, hidden, head, targets):
    chunk, entries = blocks
    logprobs = _chunk_logprobs if _slices(head, entries) == 1 else partial(_sliced_logprobs, entries=entries)

    def step(_, xs):
        return None, logprobs(transform, hidden=xs[0], head=head, targets=xs[1])

    _, outs = lax.scan(step, None, (_chunked(hidden, chunk), _chunked(targets, chunk)))
    return tuple(_unchunked(out, hidden.shape[0]) for out in outs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_logprobs(transform: Transform, blocks: Blocks, hidden, head, targets):
    return _all_chunks(transform, blocks, hidden, head, targets)[:2]


def _forward(transform, blocks, hidden, head, targets):
    head_is_trained = any(leaf.perturbed for leaf in (head if isinstance(head, tuple) else (head,)))
    if head_is_trained and isinstance(head, tuple):
        raise TypeError("token_logprobs: a quantized head is frozen; differentiate the adapter, not the base")
    hidden, targets = hidden.value, targets.value
    head = tuple(leaf.value for leaf in head) if isinstance(head, tuple) else head.value
    logprobs, entropy, lse = _all_chunks(transform, blocks, hidden, head, targets)
    trained = () if head_is_trained else None  # a pytree without leaves: static knowledge for the backward
    return (logprobs, entropy), (hidden, head, targets, entropy, lse, trained)


def _dense(cotangent) -> Array:
    return jnp.zeros(cotangent.shape, jnp.float32) if isinstance(cotangent, SymbolicZero) else cotangent


def _chunk_gradient(transform: Transform, head, xs) -> tuple[Array, Array]:
    """d loss / d logits [n, V] in hidden's dtype, and d loss / d hidden, of one chunk."""
    hidden, targets, *saved = xs
    hidden, weight = _head_weight(hidden, head)
    z = _scaled_logits(hidden, weight, transform)
    onehot = jnp.arange(weight.shape[0]) == targets[:, None]
    d_logits = _logit_gradient(transform, z, onehot, *saved).astype(hidden.dtype)
    d_hidden = reference.einsum_f32("nv,vd->nd", d_logits, weight)
    return d_logits, d_hidden.astype(hidden.dtype)


def _logit_gradient(transform: Transform, z, onehot, entropy, lse, d_logprob, d_entropy) -> Float[Array, "N V"]:
    log_p = z - lse[:, None]
    p = jnp.exp(log_p)
    dz = d_logprob[:, None] * (onehot - p) - d_entropy[:, None] * p * (log_p + entropy[:, None])
    return dz * _scale_slope(z, transform)


def _backward(transform, blocks, residuals, cotangents):
    hidden, head, targets, entropy, lse, trained = residuals
    rows = (hidden, targets, entropy, lse, *(_dense(cotangent) for cotangent in cotangents))
    chunk, entries = blocks

    def step(d_head, xs):
        if _slices(head, entries) > 1:
            return d_head, _sliced_gradient(transform, entries, head, xs)
        d_logits, d_hidden = _chunk_gradient(transform, head, xs)
        if trained is not None:
            d_head += reference.einsum_f32("nv,nd->vd", d_logits, xs[0])
        return d_head, d_hidden

    start = None if trained is None else jnp.zeros(head.shape, jnp.float32)
    d_head, d_hidden = lax.scan(step, start, tuple(_chunked(row, chunk) for row in rows))
    return _unchunked(d_hidden, hidden.shape[0]), None if d_head is None else d_head.astype(head.dtype), None


_token_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
