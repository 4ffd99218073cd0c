"""Logits to a drawn token and its log-probability: temperature, top-k, top-p, min-p.

Order and meaning are those of `transformers`' logits processors: temperature, then top-k, then top-p of what
top-k kept, then min-p. All three keep the tokens at or above a threshold, so they are one number a row,
found by bisection over the 32 bits of a float, without a sort over the vocabulary. A GPU takes four bits a read: XLA
fuses the fifteen candidates into one. On a CPU it does not, and one bit a read is five times faster. The threshold is exact. At ties all tokens
that equal the last one kept are kept (`transformers` does so for top-k; for top-p its sort keeps an arbitrary one of them).
With top-k the bisection reads only the k blocks of tokens that have the largest maxima: 32 rows of 151,936 logits took a CPU 56 ms
for k = 50 and 113 ms with top-p as well, and take it 16 and 24.

A token is drawn by inverting the cumulative distribution from one uniform number a row (`pallas_kernels.draw_token` where nothing
is truncated, the default; else `pallas_kernels/inverse_cdf.py`). `pallas_kernels.draw_corrected` does the same by rounded logits and a correction.

Two log-probabilities matter. `logprob` is that of the distribution which was drawn from, truncated and
renormalised. A trainer computes log-softmax(logits / temperature) over the whole vocabulary, so `log_kept`,
the log of the probability mass that truncation kept, comes along: logprob + log_kept is the trainer's number.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

import pallas_kernels
from pallas_kernels import inverse_cdf
from pallas_kernels.completions import Completions, Ends, record
from pallas_kernels.inverse_cdf import Total, block_width, draw_kept, total_of
from pallas_kernels.reference import take_layer

GPU_BITS_A_READ = 4
"""Bits of a threshold that a GPU finds in one read of the logits; they must divide 32."""


class Draw(NamedTuple):
    """One drawn token for every row."""

    token: Int32[Array, "..."]
    logprob: Float32[Array, "..."]
    """Log-probability under the truncated, renormalised distribution."""
    log_kept: Float32[Array, "..."]
    """Log of the mass that truncation kept; logprob + log_kept is log-softmax(logits / temperature)[token]."""


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
    if keeps_everything(logits.shape[-1], top_k=top_k, top_p=top_p, min_p=min_p):
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


def keeps_everything(vocab: int, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> bool:
    """Whether these settings truncate nothing."""
    return not 0 < top_k < vocab and top_p >= 1.0 and min_p <= 0.0


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
    if keeps_everything(logits.shape[-1], top_k=top_k, top_p=top_p, min_p=min_p):
        return _from_all(logits, uniform, temperature)
    logits = logits / temperature
    total = total_of(logits)
    threshold = keep_threshold(logits, top_k=top_k, top_p=top_p, min_p=min_p, total=total)
    token, logprob, kept = draw_kept(logits, threshold, uniform)
    return Draw(token, logprob, jnp.log(kept.mass) - jnp.log(total.mass))


def draw_and_record(
    logits: Float[Array, "M V"],
    uniform: Float32[Array, "T M"],
    completions: Completions,
    step: Int[Array, ""],
    ends: Ends,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Int32[Array, " M"], Completions]:
    """`draw` with the numbers of `step`, and the completions with what was drawn; of rows that are done the token is the pad token.

    The step goes by its number: a slice in front of a kernel would be copied, or fused with it by a computed address.
    """
    logits = logits.astype(jnp.float32)
    if temperature != 0.0 and keeps_everything(logits.shape[-1], top_k=top_k, top_p=top_p, min_p=min_p):
        return pallas_kernels.draw_and_record(
            logits, uniform, completions, temperature=temperature, step=step, ends=ends
        )
    number = take_layer(uniform, step)
    drawn = draw(logits, number, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return record(completions, step, ends, *drawn)


def _from_all(logits: Float32[Array, "... V"], uniform: Float32[Array, "..."], temperature: float) -> Draw:
    rows = logits.reshape(-1, logits.shape[-1])
    drawn = pallas_kernels.draw_token(rows, uniform.reshape(-1), temperature=temperature)
    token, logprob = (part.reshape(logits.shape[:-1]) for part in drawn)
    return Draw(token, logprob, jnp.zeros_like(logprob))


def _greedy(logits: Float32[Array, "... V"]) -> Draw:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    log_kept = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    return Draw(token, jnp.zeros_like(log_kept), log_kept)


def _kth_largest(logits: Float32[Array, "... N"], k: int) -> Float32[Array, "..."]:
    return _largest_threshold(logits, lambda kept: kept.astype(jnp.int32), jnp.int32(k))


def _blocks_of_largest(logits: Float32[Array, "... V"], k: int) -> Float32[Array, "... N"]:
    """The k blocks with the largest logits, which are an eighth of a large vocabulary for k = 50; all logits, if more than half.

    They hold every logit above the k-th largest one, and k that are not below it: outside, none is above the k blocks' maxima.
    """
    vocab, width = logits.shape[-1], block_width(logits)
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
    bits = GPU_BITS_A_READ if inverse_cdf.on_gpu() else 1

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
