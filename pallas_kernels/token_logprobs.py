"""Log-probability of given tokens and entropy of their distribution, from hidden states: lm_head, log-softmax, gather.

Logits exist for `chunk` positions at a time, [chunk, V], in the forward and again in the backward. With z = logits /
temperature, p = softmax(z):

    logprob = z[target] - lse(z)         d logprob / d z_i = 1[i = target] - p_i
    entropy = -sum_i p_i log p_i         d entropy / d z_i = -p_i (log p_i + entropy)

The backward recomputes the logits of a chunk and uses the saved lse and entropy, so it makes one pass over them.
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


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | tuple[Array, Array],
    targets: Int[Array, "N"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 4096,
    implementation: str | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(log p(target), entropy) of softmax(hidden @ head^T / temperature), both float32[N].

    Differentiable in `hidden`, and in `head` when it is an array.

    Args:
      head: the output matrix, or (packed, scales) of an int4 one, which is frozen.
      targets: token ids in [0, V); use any valid id where a position is masked later.
      softcap: c makes the logits c * tanh(logit / c) before the temperature divides them (Gemma 2).
      chunk: positions whose logits exist at the same time.
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
    if temperature <= 0 or chunk <= 0:
        raise ValueError(f"token_logprobs: temperature and chunk must be positive, got {temperature} and {chunk}")
    return _token_logprobs((float(temperature), softcap), int(chunk), hidden, head, targets)


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


def _chunk_logprobs(transform: Transform, hidden, head, targets):
    hidden, weight = _head_weight(hidden, head)
    z = _scaled_logits(hidden, weight, transform)
    lse = jax.nn.logsumexp(z, axis=-1)
    log_p = z - lse[:, None]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    target = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
    return target - lse, entropy, lse


def _all_chunks(transform: Transform, chunk: int, hidden, head, targets):
    def step(_, xs):
        return None, _chunk_logprobs(transform, xs[0], head, xs[1])

    _, outs = lax.scan(step, None, (_chunked(hidden, chunk), _chunked(targets, chunk)))
    return tuple(_unchunked(out, hidden.shape[0]) for out in outs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_logprobs(transform: Transform, chunk: int, hidden, head, targets):
    return _all_chunks(transform, chunk, hidden, head, targets)[:2]


def _forward(transform, chunk, hidden, head, targets):
    head_is_trained = any(leaf.perturbed for leaf in (head if isinstance(head, tuple) else (head,)))
    if head_is_trained and isinstance(head, tuple):
        raise TypeError("token_logprobs: a quantized head is frozen; differentiate the adapter, not the base")
    hidden, targets = hidden.value, targets.value
    head = tuple(leaf.value for leaf in head) if isinstance(head, tuple) else head.value
    logprobs, entropy, lse = _all_chunks(transform, chunk, hidden, head, targets)
    trained = () if head_is_trained else None  # a pytree without leaves: static knowledge for the backward
    return (logprobs, entropy), (hidden, head, targets, entropy, lse, trained)


def _dense(cotangent) -> Array:
    return jnp.zeros(cotangent.shape, jnp.float32) if isinstance(cotangent, SymbolicZero) else cotangent


def _chunk_gradient(transform: Transform, head, xs) -> tuple[Array, Array]:
    """d loss / d logits [n, V] in hidden's dtype, and d loss / d hidden, of one chunk."""
    hidden, targets, entropy, lse, d_logprob, d_entropy = xs
    hidden, weight = _head_weight(hidden, head)
    z = _scaled_logits(hidden, weight, transform)
    log_p = z - lse[:, None]
    onehot = jnp.arange(weight.shape[0]) == targets[:, None]
    p = jnp.exp(log_p)
    dz = d_logprob[:, None] * (onehot - p) - d_entropy[:, None] * p * (log_p + entropy[:, None])
    d_logits = (dz * _scale_slope(z, transform)).astype(hidden.dtype)
    d_hidden = reference.einsum_f32("nv,vd->nd", d_logits, weight)
    return d_logits, d_hidden.astype(hidden.dtype)


def _backward(transform, chunk, residuals, cotangents):
    hidden, head, targets, entropy, lse, trained = residuals
    rows = (hidden, targets, entropy, lse, *(_dense(cotangent) for cotangent in cotangents))

    def step(d_head, xs):
        d_logits, d_hidden = _chunk_gradient(transform, head, xs)
        if trained is not None:
            d_head += reference.einsum_f32("nv,nd->vd", d_logits, xs[0])
        return d_head, d_hidden

    start = None if trained is None else jnp.zeros(head.shape, jnp.float32)
    d_head, d_hidden = lax.scan(step, start, tuple(_chunked(row, chunk) for row in rows))
    return _unchunked(d_hidden, hidden.shape[0]), None if d_head is None else d_head.astype(head.dtype), None


_token_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
