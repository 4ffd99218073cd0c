"""Logits to a drawn token and its log-probability: temperature, top-k, top-p, min-p.

Order and meaning are those of `transformers`' logits processors: temperature, then top-k, then top-p of what
top-k kept, then min-p. All three keep the tokens at or above a threshold, so they are one number a row,
found by bisection over the 32 bits of a float, without a sort over the vocabulary. A GPU takes four bits a read: XLA
fuses the fifteen candidates into one. On a CPU it does not, and one bit a read is five times faster. The threshold is exact. At ties all tokens
that equal the last one kept are kept (`transformers` does so for top-k; for top-p its sort keeps an arbitrary one of them).
With top-k the bisection reads only the k blocks of tokens that have the largest maxima: 32 rows of 151,936 logits took a CPU 56 ms
for k = 50 and 113 ms with top-p as well, and take it 16 and 24.

A token is drawn by inverting the cumulative distribution in two levels (blocks of about sqrt(V) tokens, then
inside one block) from one uniform number a row. On a GPU the logits are read once: largest logit and sum of each block come
from one reduction of pairs, which a CPU does not vectorise. Gumbel-max draws from the same distribution but hashes V random
numbers a row: on a CPU, 32 rows of 151,936 logits took it 299 ms, log-probability included, against 33 ms. The number
has 23 bits, so probabilities far below 1e-7 are met only as often as that grid allows.

Two log-probabilities matter. `logprob` is that of the distribution which was drawn from, truncated and
renormalised. A trainer computes log-softmax(logits / temperature) over the whole vocabulary, so `log_kept`,
the log of the probability mass that truncation kept, comes along: logprob + log_kept is the trainer's number.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

GPU_BITS_A_READ = 4
"""Bits of a threshold that a GPU finds in one read of the logits; they must divide 32."""


def on_gpu() -> bool:
    """Whether several reductions of one array become one read of it."""
    return jax.default_backend() == "gpu"


class Draw(NamedTuple):
    """One drawn token for every row."""

    token: Int32[Array, "..."]
    logprob: Float32[Array, "..."]
    """Log-probability under the truncated, renormalised distribution."""
    log_kept: Float32[Array, "..."]
    """Log of the mass that truncation kept; logprob + log_kept is log-softmax(logits / temperature)[token]."""


class Total(NamedTuple):
    """Of a row of logits."""

    largest: Float32[Array, "..."]
    mass: Float32[Array, "..."]
    """Sum of exp(logits - largest)."""


def truncate(
    logits: Float[Array, "... V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float32[Array, "... V"]:
    """Logits with -inf outside the tokens that top-k, top-p and min-p keep; apply the temperature first."""
    logits = logits.astype(jnp.float32)
    threshold = keep_threshold(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    return logits if threshold is None else jnp.where(logits >= threshold[..., None], logits, -jnp.inf)


def keep_threshold(
    logits: Float32[Array, "... V"],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    total: Total | None = None,
) -> Float32[Array, "..."] | None:
    """The smallest logit that is kept, never above the largest one; None if the settings keep everything.

    `total` of the logits, where it is known, saves a read.
    """
    if _keeps_everything(logits, top_k, top_p, min_p):
        return None
    total, threshold, above = total or total_of(logits), None, logits
    if 0 < top_k < logits.shape[-1]:
        above = _blocks_of_largest(logits, top_k)
        threshold = _kth_largest(above, top_k)
    if top_p < 1.0:
        threshold = _nucleus_threshold(logits, total, top_p, threshold, above)
    if min_p > 0.0:
        relative = total.largest + math.log(min_p)
        threshold = relative if threshold is None else jnp.maximum(threshold, relative)
    assert threshold is not None
    return jnp.minimum(threshold, total.largest)


def _keeps_everything(logits: Float32[Array, "... V"], top_k: int, top_p: float, min_p: float) -> bool:
    return not 0 < top_k < logits.shape[-1] and top_p >= 1.0 and min_p <= 0.0


def draw(
    logits: Float[Array, "... V"],
    uniform: Float32[Array, "..."],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Draw:
    """Draw one token a row with one uniform number in [0, 1) a row.

    Temperature 0 is greedy: the first of the largest logits with logprob 0, and `log_kept` its log-probability
    at temperature 1.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0.0:
        return _greedy(logits)
    logits = logits / temperature
    total = None if _keeps_everything(logits, top_k, top_p, min_p) else total_of(logits)
    threshold = keep_threshold(logits, top_k=top_k, top_p=top_p, min_p=min_p, total=total)
    token, kept = _invert_cdf(logits, threshold, uniform)
    logit = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    logprob = logit - kept.largest - jnp.log(kept.mass)
    log_kept = jnp.zeros_like(logprob) if total is None else jnp.log(kept.mass) - jnp.log(total.mass)
    return Draw(token, logprob, log_kept)


def _greedy(logits: Float32[Array, "... V"]) -> Draw:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    log_kept = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    return Draw(token, jnp.zeros_like(log_kept), log_kept)


def _invert_cdf(
    logits: Float32[Array, "... V"], threshold: Float32[Array, "..."] | None, uniform: Float32[Array, "..."]
) -> tuple[Int32[Array, "..."], Total]:
    """Token at quantile `uniform` of the kept weights exp(logits - largest), and the total of what is kept."""

    def kept(values: Float32[Array, "... N"]) -> Float32[Array, "... N"]:
        return values if threshold is None else jnp.where(values >= threshold[..., None], values, -jnp.inf)

    vocab, width = logits.shape[-1], _block_width(logits)
    highest, sums = _block_sums(kept(logits))
    total = Total(*_reduce_pairs(highest, sums))
    weights = sums * jnp.exp(highest - total.largest[..., None])
    block, target = _quantile(weights, uniform * total.mass)
    tokens = block[..., None] * width + jnp.arange(width)
    inside = kept(jnp.take_along_axis(logits, jnp.minimum(tokens, vocab - 1), axis=-1))
    offset, _ = _quantile(jnp.where(tokens < vocab, jnp.exp(inside - total.largest[..., None]), 0.0), target)
    return block * width + offset, total


def total_of(logits: Float32[Array, "... V"]) -> Total:
    """Largest logit and mass, in one read on a GPU."""
    return Total(*_reduce_pairs(*_block_sums(logits)))


def _block_width(logits: Float32[Array, "... V"]) -> int:
    """About the square root of V."""
    return math.isqrt(logits.shape[-1] - 1) + 1


def _block_sums(logits: Float32[Array, "... V"]) -> tuple[Float32[Array, "... blocks"], Float32[Array, "... blocks"]]:
    """`exp_sums` of blocks."""
    vocab, width = logits.shape[-1], _block_width(logits)
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


def _kth_largest(logits: Float32[Array, "... N"], k: int) -> Float32[Array, "..."]:
    return _largest_threshold(logits, lambda kept: kept.astype(jnp.int32), jnp.int32(k))


def _blocks_of_largest(logits: Float32[Array, "... V"], k: int) -> Float32[Array, "... N"]:
    """The k blocks with the largest logits, which are an eighth of a large vocabulary for k = 50; all logits, if more than half.

    They hold every logit above the k-th largest one, and k that are not below it: outside, none is above the k blocks' maxima.
    """
    vocab, width = logits.shape[-1], _block_width(logits)
    if 2 * k * width > vocab:
        return logits
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -vocab % width)]
    padded = jnp.pad(logits, padding, constant_values=-jnp.inf)
    _, blocks = jax.lax.top_k(jnp.max(padded.reshape(*logits.shape[:-1], -1, width), axis=-1), k)
    tokens = (blocks[..., None] * width + jnp.arange(width)).reshape(*blocks.shape[:-1], k * width)
    inside = jnp.take_along_axis(logits, jnp.minimum(tokens, vocab - 1), axis=-1)
    return jnp.where(tokens < vocab, inside, -jnp.inf)


def _nucleus_threshold(
    logits: Float32[Array, "... V"],
    total: Total,
    top_p: float,
    lowest: Float32[Array, "..."] | None,
    above: Float32[Array, "... N"],
) -> Float32[Array, "..."]:
    """Largest threshold, `lowest` at least, above which lies top_p of the mass of the tokens at or above `lowest`.

    `above`: logits among which are all that are above `lowest`.
    """
    mass, weights = total.mass, jnp.exp(above - total.largest[..., None])
    if lowest is not None:
        mass = jnp.sum(jnp.where(logits >= lowest[..., None], jnp.exp(logits - total.largest[..., None]), 0.0), axis=-1)
    threshold = _largest_threshold(above, lambda kept: jnp.where(kept, weights, 0.0), top_p * mass)
    return threshold if lowest is None else jnp.maximum(threshold, lowest)


def _largest_threshold(
    values: Float32[Array, "... V"],
    weigh: Callable[[Bool[Array, "... V"]], Array],
    needed: Array,
) -> Float32[Array, "..."]:
    """Largest float t for which the sum of weigh(values >= t), 0 outside of what is kept, reaches `needed`.

    Search in the ordered integer image of floats: some bits of the answer with every read, from the top.
    """
    bits = GPU_BITS_A_READ if on_gpu() else 1

    def next_digit(index: Array, prefix: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
        shift = (32 - bits * (index + 1)).astype(jnp.uint32)
        candidates = [prefix | (jnp.uint32(digit) << shift) for digit in range(1, 2**bits)]
        parts = [weigh(values >= _from_ordered_bits(candidate)[..., None]) for candidate in candidates]
        for candidate, mass in zip(candidates, _sums(parts), strict=True):
            prefix = jnp.where(mass >= needed, candidate, prefix)
        return prefix

    start = jnp.zeros(values.shape[:-1], jnp.uint32)
    return _from_ordered_bits(jax.lax.fori_loop(0, 32 // bits, next_digit, start))


def _sums(parts: list[Array]) -> tuple[Array, ...]:
    """Sums along the last axis in one reduction, so that what the parts are computed from is read once."""
    zeros = tuple(jnp.zeros((), part.dtype) for part in parts)
    return jax.lax.reduce(tuple(parts), zeros, lambda x, y: tuple(map(jnp.add, x, y)), (parts[0].ndim - 1,))


def _from_ordered_bits(keys: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """Floats in the order of the integers: their bits with the sign bit flipped, or all bits, if they are negative.

    Below -inf, where the bits are NaNs, it is -inf.
    """
    keys = jnp.maximum(keys, jnp.uint32(0x007FFFFF))  # of -inf
    bits = jnp.where(keys >> 31 == 1, keys ^ jnp.uint32(0x80000000), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
