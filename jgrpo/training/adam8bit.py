"""Adam with its two moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861), as an optax transformation.

A moment is stored as one byte an element, an index into a table of 256 levels, and one float32 a block of 256 elements, the
block's largest magnitude. The levels ("dynamic map") have as many digits of precision as their exponent leaves room for:
0.1 + 0.9 (j + 1/2) / n for j < n, times 10^(e - 6), with n = 2^e levels for e = 0 … 6, and 0 and 1. The first moment has them with
both signs, the second, which is never negative, twice as many with one. These are bitsandbytes' tables
(`create_dynamic_map`). Quantizing takes the nearest level.

The arithmetic is float32, and the direction is that of the moments before they are rounded again: with a full table, Adam's
own. It runs over `CHUNK` blocks of a leaf at a time, in place where the caller donates: no float32 copy of the moments of a
leaf exists, which matters because the layers of a model are stacked and a leaf may be half of it.

Deviations:
- blocks of 256, as bitsandbytes has them, not the paper's 2048: an outlier costs the precision of fewer neighbours, for 3 %
  instead of 0.4 % more bytes.
- a second moment above 0 is never rounded to 0. Where it would be, its root falls to epsilon while the first moment may be
  there still, and the step is thousands of times too long; the smallest level makes it too short instead.
- leaves below `SMALL` elements stay float32, as in bitsandbytes; what they would save is nothing.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

BLOCK = 256
"""Elements that share a scale."""
SMALL = 4096
"""Leaves with fewer elements stay float32."""
DECADES = 7
ZERO = 127
"""Code of 0 in the signed table; in the other it is 0."""
CHUNK = 2**14
"""Blocks that have their moments in float32 at the same time: 4 million elements, 16 MB each."""


class Moment(NamedTuple):
    """One moment of a leaf in the order of its memory, n blocks, the last filled up with zeros."""

    codes: UInt8[Array, "n 256"]
    absmax: Float[Array, " n"]
    """Largest magnitude of each block."""


class Adam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`; a small leaf has a float32 array instead of a `Moment`."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


@cache
def levels(signed: bool) -> Float[np.ndarray, "256"]:
    """The table in ascending order, from -0.993 (signed) or 0 to 1."""
    parts = [np.zeros(1), np.ones(1)]
    for exponent in range(DECADES):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        part = (0.1 + 0.9 * (np.arange(count) + 0.5) / count) * 10.0 ** (exponent - DECADES + 1)
        parts += [part, -part] if signed else [part]
    return np.sort(np.concatenate(parts)).astype(np.float32)


def quantize_blocks(blocks: Float[Array, "n 256"], signed: bool) -> Moment:
    """Nearest levels. What is above 0 stays above 0 where not `signed`."""
    absmax = jnp.abs(blocks).max(axis=1)
    scaled = blocks / jnp.where(absmax > 0, absmax, 1.0)[:, None]
    ranks = nearest_rank(jnp.abs(scaled), signed)
    if signed:
        codes = jnp.where(scaled < 0, ZERO - jnp.minimum(ranks, ZERO), ZERO + ranks)  # there is no level at -1
    else:
        codes = jnp.where(scaled > 0, jnp.maximum(ranks, 1), 0)
    return Moment(codes.astype(jnp.uint8), absmax)


def nearest_rank(x: Float[Array, "*N"], signed: bool) -> Float[Array, "*N"]:
    """Place of the level nearest to x in [0, 1] among those from 0 to 1, in ascending order.

    By arithmetic, since a binary search in the table would be 8 dependent gathers: inside a decade the levels are evenly
    spaced. Decades meet in the middle between the last level of one and the first of the next.
    """
    table = levels(signed)[ZERO if signed else 0 :]
    middles = (table[1:] + table[:-1]) / 2
    rank = jnp.zeros_like(x)
    for exponent in range(DECADES):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        first = count if signed else count - 1
        index = jnp.floor((x * 10.0 ** (DECADES - 1 - exponent) - 0.1) / 0.9 * count)
        rank = jnp.where(x > middles[first - 1], first + jnp.clip(index, 0, count - 1), rank)
    return jnp.where(x > middles[-1], len(table) - 1, rank)


def dequantize_blocks(moment: Moment, signed: bool) -> Float[Array, "n 256"]:
    """The values that the codes stand for."""
    return jnp.asarray(levels(signed))[moment.codes] * moment.absmax[:, None]


def as_blocks(array: Array) -> Array:
    """An array of any shape as `[n, 256]`; a view of it where 256 divides its size."""
    return jnp.pad(array.reshape(-1), (0, -array.size % BLOCK)).reshape(-1, BLOCK)


def scale_by_adam_8bit(b1: float, b2: float, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with moments in 8 bits. Gradients are float32, or are read as such.

    Where `update(…, apply=…)` is false, a `Moment` stays as it was, in place; everything else is the caller's to keep.
    """

    def init(params: optax.Params) -> Adam8bitState:
        def zeros(signed: bool) -> Any:
            return jax.tree.map(
                lambda leaf: _zeros(leaf.size, signed) if _is_large(leaf) else _wide_zeros(leaf), params
            )

        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(True), zeros(False))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, *, apply: Any = True, **_: Any
    ) -> tuple[Any, Adam8bitState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        corrections = 1 - jnp.asarray(b1, jnp.float32) ** count, 1 - jnp.asarray(b2, jnp.float32) ** count

        def adam(g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
            # m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  m̂ / (√v̂ + ε)
            g = g.astype(jnp.float32)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            return (m / corrections[0]) / (jnp.sqrt(v / corrections[1]) + eps), m, v

        def leaf(g: Array, m: Any, v: Any) -> tuple[Array, Any, Any]:
            return _in_chunks(adam, apply, g, m, v) if isinstance(m, Moment) else adam(g, m, v)

        flat, treedef = jax.tree.flatten(updates)
        moments = (treedef.flatten_up_to(tree) for tree in (state.mu, state.nu))
        parts = zip(*(leaf(*triple) for triple in zip(flat, *moments, strict=True)), strict=True)
        directions, mu, nu = (treedef.unflatten(part) for part in parts)
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def state_bytes(sizes: Iterable[int], bits: int) -> int:
    """Bytes of both moments of leaves with that many elements."""
    if bits == 32:
        return sum(8 * size for size in sizes)
    return sum(2 * math.ceil(size / BLOCK) * (BLOCK + 4) if size >= SMALL else 8 * size for size in sizes)


def _is_large(leaf: Array) -> bool:
    return leaf.size >= SMALL


def _wide_zeros(leaf: Array) -> Array:
    return jnp.zeros(leaf.shape, jnp.float32)


def _zeros(size: int, signed: bool) -> Moment:
    blocks = math.ceil(size / BLOCK)
    return Moment(jnp.full((blocks, BLOCK), ZERO if signed else 0, jnp.uint8), jnp.zeros(blocks, jnp.float32))


def _in_chunks(adam: Any, apply: Any, grad: Array, mu: Moment, nu: Moment) -> tuple[Array, Moment, Moment]:
    """(direction, moments) of one leaf, up to `CHUNK` blocks at a time.

    Always a loop, of two turns at least: inlined, its intermediate results could be alive with those of other leaves, and the
    moments be dequantized long before there is a gradient.
    """
    carry = as_blocks(grad.astype(jnp.float32)), mu, nu
    blocks = carry[0].shape[0]
    size = min(CHUNK, -(-blocks // 2))

    def step(index: Array, carry: Any) -> Any:
        # The last chunk starts early enough to be whole; the rows that it has in common with the one before stay.
        start = jnp.minimum(index * size, blocks - size)
        due = (start + jnp.arange(size) >= index * size) & apply
        old = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), carry)
        direction, m, v = adam(old[0], dequantize_blocks(old[1], True), dequantize_blocks(old[2], False))
        new = direction, quantize_blocks(m, True), quantize_blocks(v, False)
        new = jax.tree.map(lambda a, b: jnp.where(due if a.ndim == 1 else due[:, None], a, b), new, old)
        # The direction takes the gradient's place: buffers of a loop's carry are written in place.
        return jax.tree.map(lambda a, part: jax.lax.dynamic_update_slice_in_dim(a, part, start, 0), carry, new)

    direction, mu, nu = jax.lax.fori_loop(0, -(-blocks // size), step, carry)
    return direction.reshape(-1)[: grad.size].reshape(grad.shape), mu, nu
