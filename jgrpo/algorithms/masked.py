"""Sums, means and standard deviations over the valid entries of an array.

Invalid entries may hold anything, NaN and inf included: they are selected away before any arithmetic, so that
neither a value nor a gradient can pass through them. Nothing valid gives 0, never 0/0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Axes = int | tuple[int, ...] | None


def masked_sum(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], axis: Axes = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Sum of x over the valid entries along `axis` (None: all axes)."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis, keepdims=keepdims)


def masked_mean(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], axis: Axes = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Mean of x over the valid entries along `axis`; 0 where there is none."""
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    return masked_sum(x, mask, axis, keepdims) / jnp.maximum(count, 1)


def masked_centre(x: Float[Array, "*S"], mask: Bool[Array, "*S"], axis: Axes = None) -> Float[Array, "*S"]:
    """x − mean over the valid entries along `axis`; 0 at invalid ones.

    The minimum is taken off first: equal values then centre to exactly 0, where a rounded mean would leave
    a residue that a division by a tiny std blows up.
    """
    minimum = jnp.min(jnp.where(mask, x, jnp.inf), axis=axis, keepdims=True)
    shifted = jnp.where(mask, x - minimum, 0)
    return jnp.where(mask, shifted - masked_mean(shifted, mask, axis, keepdims=True), 0)


def masked_std(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], axis: Axes = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Sample standard deviation (n − 1) over the valid entries along `axis`; 0 where fewer than two are valid."""
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    squares = jnp.sum(masked_centre(x, mask, axis) ** 2, axis=axis, keepdims=keepdims)
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def masked_min(x: Float[Array, "*S"], mask: Bool[Array, "*S"], axis: Axes = None) -> Float[Array, "..."]:
    """Least valid entry along `axis`; 0 where there is none."""
    least = jnp.min(jnp.where(mask, x, jnp.inf), axis=axis)
    return jnp.where(jnp.any(mask, axis=axis), least, 0)


def masked_max(x: Float[Array, "*S"], mask: Bool[Array, "*S"], axis: Axes = None) -> Float[Array, "..."]:
    """Greatest valid entry along `axis`; 0 where there is none."""
    return -masked_min(-x, mask, axis)
