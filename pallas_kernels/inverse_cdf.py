"""Drawing from rows of logits by inverting the cumulative distribution, in plain jnp.

In two levels, blocks of about sqrt(V) tokens and then inside one block, from one uniform number a row. On a GPU the logits are
read once: largest logit and sum of each block come from one reduction of pairs, which a CPU does not vectorise. Gumbel-max draws
from the same distribution but hashes V random numbers a row: on a CPU, 32 rows of 151,936 logits took it 299 ms, log-probability
included, against 33 ms. The number has 23 bits, so probabilities far below 1e-7 are met only as often as that grid allows.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


def on_gpu() -> bool:
    """Whether several reductions of one array become one read of it."""
    return jax.default_backend() == "gpu"


class Total(NamedTuple):
    """Of a row of logits."""

    largest: Float32[Array, "..."]
    mass: Float32[Array, "..."]
    """Sum of exp(logits - largest)."""


def total_of(logits: Float32[Array, "... V"]) -> Total:
    """Largest logit and mass, in one read on a GPU."""
    return Total(*_reduce_pairs(*_block_sums(logits)))


def draw_kept(
    logits: Float32[Array, "... V"], threshold: Float32[Array, "..."] | None, uniform: Float32[Array, "..."]
) -> tuple[Int32[Array, "..."], Float32[Array, "..."], Total]:
    """(token, its log-probability, total) of what is kept, the logits at or above `threshold`; None: all.

    The token is the one at quantile `uniform` of the weights exp(logits - largest). A NaN, an infinite logit or a row of nothing but
    -inf gives token 0 with log-probability NaN.
    """

    tokens, total = tokens_at(logits, threshold, uniform[..., None])
    token = jnp.where(jnp.isnan(total.mass), 0, tokens[..., 0])
    logit = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, logit - total.largest - jnp.log(total.mass), total


def tokens_at(
    logits: Float32[Array, "... V"], threshold: Float32[Array, "..."] | None, uniform: Float32[Array, "... N"]
) -> tuple[Int32[Array, "... N"], Total]:
    """(tokens at the quantiles `uniform`, N of every row; total) of what is kept. Where the total is NaN the tokens mean nothing."""

    def kept(values: Float32[Array, "... N W"]) -> Float32[Array, "... N W"]:
        return values if threshold is None else jnp.where(values >= threshold[..., None, None], values, -jnp.inf)

    vocab, width = logits.shape[-1], block_width(logits)
    one = logits[..., None, :]
    highest, sums = _block_sums(kept(one))
    total = Total(*(part[..., 0] for part in _reduce_pairs(highest, sums)))
    weights = sums * jnp.exp(highest - total.largest[..., None, None])
    block, target = _quantile(weights, uniform * total.mass[..., None])
    places = block[..., None] * width + jnp.arange(width)
    inside = kept(jnp.take_along_axis(one, jnp.minimum(places, vocab - 1), axis=-1))
    relative = jnp.exp(inside - total.largest[..., None, None])
    offset, _ = _quantile(jnp.where(places < vocab, relative, 0.0), target)
    return block * width + offset, total


def block_width(logits: Float32[Array, "... V"]) -> int:
    """About the square root of V."""
    return math.isqrt(logits.shape[-1] - 1) + 1


def _block_sums(logits: Float32[Array, "... V"]) -> tuple[Float32[Array, "... blocks"], Float32[Array, "... blocks"]]:
    """`exp_sums` of blocks."""
    vocab, width = logits.shape[-1], block_width(logits)
    blocks = -(-vocab // width)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * width - vocab)]
    padded = jnp.pad(logits, padding, constant_values=-jnp.inf)
    return exp_sums(padded.reshape(*logits.shape[:-1], blocks, width))


def exp_sums(values: Float32[Array, "... N"]) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """(largest m, sum of exp(values - m)) along the last axis; -inf and 0 where all are -inf.

    On a GPU in one read, as a reduction of such pairs (Milakov & Gimelshein 2018, arXiv:1805.02867).
    """
    if on_gpu():
        return _reduce_pairs(values, jnp.where(values == -jnp.inf, 0.0, 1.0))
    highest = jnp.max(values, axis=-1)
    return highest, jnp.sum(jnp.exp(values - _finite(highest)[..., None]), axis=-1)


def _reduce_pairs(
    highest: Float32[Array, "... N"], sums: Float32[Array, "... N"]
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """The same of everything, from parts of it."""

    def combine(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
        both = jnp.maximum(x[0], y[0])
        shift = _finite(both)
        return both, x[1] * jnp.exp(x[0] - shift) + y[1] * jnp.exp(y[0] - shift)

    start = jnp.float32(-jnp.inf), jnp.float32(0)
    return jax.lax.reduce((highest, sums), start, combine, (highest.ndim - 1,))


def _finite(highest: Float32[Array, "..."]) -> Float32[Array, "..."]:
    return jnp.where(highest == -jnp.inf, 0.0, highest)


def _quantile(
    weights: Float32[Array, "... N"], target: Float32[Array, "..."]
) -> tuple[Int32[Array, "..."], Float32[Array, "..."]]:
    """First index whose prefix sum exceeds target, and what of target is left inside that entry.

    An entry of weight 0 is never returned, whatever rounding does: it would have log-probability -inf. Where rounding leaves
    no prefix sum above the target it is the last entry that has weight.
    The prefix sums are a masked reduction because an XLA cumsum is a chain of small kernels on a GPU.
    """
    count = weights.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    prefix = jnp.sum(jnp.where(index[:, None] >= index, weights[..., None, :], 0.0), axis=-1)
    exceeds = (weights > 0) & (prefix > target[..., None])
    first = jnp.min(jnp.where(exceeds, index, count), axis=-1)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1)
    chosen = jnp.where(first < count, first, last)
    before = jnp.take_along_axis(prefix - weights, chosen[..., None], axis=-1)[..., 0]
    return chosen, target - before
