"""Round a matrix to levels that its outputs do not feel: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

A layer's inputs x are seen twice: as the exact model computes them (x), and as the model that is being written does, whose
earlier matrices are rounded already (x̂). The levels Q of a matrix W are to minimize, over the tokens of both,

    ‖W X - Q X̂‖² + λ ‖W - Q‖²        with H = X̂ X̂ᵀ, D = (X - X̂) X̂ᵀ, λ = damping · mean of H's diagonal.

That is ‖W' - Q‖² in the norm of H + λ, up to a constant, of the target W' = W + C with C = W D (H + λ)⁻¹: what W has to become to make
up for the errors before it. Fitted on few tokens, C would follow their noise. So the tokens come in two halves, and the target is W + α C with
the α that fits best where the C of one half is applied to the other (1 where errors have a structure to correct). GPTQ rounds W' a
column at a time, each to its nearest level, and moves the columns that are still to come against the error, by rows of the
factor U of (H + λ)⁻¹ = Uᵀ U (the paper's "Cholesky reformulation", in blocks of 128 columns).

Deviations from the paper: the target W' (the asymmetric objective of GPTAQ, Li et al. 2025, arXiv:2504.02692, solved once in closed
form, with a measured α where that has a constant; the paper has W' = W); every group's scale is that of the exact W, by the rule of
`jgrpo.quantization.quantize`, so that a matrix on its grid already keeps its levels; U = R⁻¹ comes from the one factorization
H + λ = R Rᵀ with R upper triangular, which is Cholesky's of H in reversed order, since H⁻¹ = R⁻ᵀ R⁻¹.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jaxtyping import Float, UInt8

from jgrpo.errors import UserError
from jgrpo.quantization import Int4Weight, pack_nibbles, quantize

DAMPING = (0.01, 0.1, 1.0)
"""λ in means of H's diagonal: the paper's, and what is taken where float32 does not factor H with less."""
BLOCK = 128
"""Columns whose errors reach the columns behind them together."""


class Moments(NamedTuple):
    """What some tokens say about a matrix's inputs; float32, sums over the tokens."""

    inputs: Float[Array, "K K"]
    """H = X̂ X̂ᵀ."""
    drift: Float[Array, "K K"]
    """D = (X - X̂) X̂ᵀ."""


def round_to_inputs(
    weight: Float[Array, "N K"], halves: tuple[Moments, Moments], group_size: int, scale_dtype: Any = jnp.float32
) -> Int4Weight:
    """The weight in four bits for the inputs of two halves of the tokens, in float32.

    Raises UserError where H is not finite, or `group_size` does not divide K.
    """
    scales = quantize(weight, group_size, scale_dtype).scales
    fitted = correction_fit(weight, halves)
    both = jax.tree.map(jnp.add, *halves)
    factor = damped_factor(both.inputs)
    target = weight + fitted * correction(weight, both.drift, factor)
    levels = round_columns(target, scales.astype(jnp.float32), inverse(factor))
    return Int4Weight(pack_nibbles(levels, group_size), scales)


def correction_fit(weight: Float[Array, "N K"], halves: tuple[Moments, Moments]) -> Float[Array, ""]:
    """α between 0 and 1: the least-squares factor of the correction of each half on the other; 0 where there is none to fit."""
    pairs = ((halves[0], halves[1]), (halves[1], halves[0]))
    sums = [_fit(weight, correction(weight, own.drift, damped_factor(own.inputs)), other) for own, other in pairs]
    # ‖W X - (W + α C) X̂‖² is least at α = ⟨W (X - X̂), C X̂⟩ / ‖C X̂‖².
    along, power = map(sum, zip(*sums, strict=True))
    return jnp.where(power > 0, jnp.clip(along / power, 0, 1), 0)


@jax.jit
def _fit(weight: Array, correction: Array, other: Moments) -> tuple[Array, Array]:
    with jax.default_matmul_precision("highest"):
        return jnp.vdot(weight @ other.drift, correction), jnp.vdot(correction @ other.inputs, correction)


def damped_factor(moments: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Upper triangular R with R Rᵀ = H + λ, for the smallest λ of `DAMPING` that float32 factors.

    Raises UserError if none does: H is not finite.
    """
    # An infinite diagonal would factor.
    for damping in DAMPING if bool(jnp.isfinite(moments).all()) else ():
        factor = upper_factor(moments, damping)
        if bool(jnp.isfinite(factor).all()):
            return factor
    raise UserError(
        "the inputs of a linear layer on the calibration text are not finite, so nothing can be rounded against them; "
        "check the run, or export 16 bits"
    )


@jax.jit
def upper_factor(moments: Float[Array, "K K"], damping: float) -> Float[Array, "K K"]:
    """Upper triangular R with R Rᵀ = H + λ; not finite where H + λ is not positive definite in float32."""
    width = moments.shape[0]
    mean = jnp.trace(moments) / width
    damped = moments + jnp.where(mean > 0, damping * mean, 1.0) * jnp.eye(width)
    return jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]


@jax.jit
def inverse(factor: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """U = R⁻¹."""
    return solve_triangular(factor, jnp.eye(factor.shape[0]))


@jax.jit
def correction(
    weight: Float[Array, "N K"], drift: Float[Array, "K K"], factor: Float[Array, "K K"]
) -> Float[Array, "N K"]:
    """C = W D (H + λ)⁻¹, by two triangular solves: where N is below K, less work than an inverse."""
    with jax.default_matmul_precision("highest"):
        wanted = (weight @ drift).T
        return solve_triangular(factor, solve_triangular(factor, wanted), trans=1).T


@jax.jit
def round_columns(
    weight: Float[Array, "N K"], scales: Float[Array, "N K/g"], inverse: Float[Array, "K K"]
) -> UInt8[Array, "N K"]:
    """Levels 0 to 15 of the weight in groups with `scales`, column by column with error feedback by `inverse` U."""
    rows, width = weight.shape
    block = math.gcd(width, BLOCK)
    # Transposed, a column of W is contiguous. One scale for each column.
    steps = jnp.repeat(scales.T, width // scales.shape[1], axis=0)

    def column(ahead: Array, now: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        index, step, row = now
        value = ahead[index]
        # A group of zeros has the scale 0 and can only stay 0.
        level = jnp.clip(jnp.round(value / jnp.where(step == 0, jnp.inf, step)), -8, 7)
        error = (value - level * step) / row[index]
        return ahead - row[:, None] * error, ((level + 8).astype(jnp.uint8), error)

    def columns(rest: Array, start: Array) -> tuple[Array, Array]:
        own, own_steps, own_inverse = (jax.lax.dynamic_slice_in_dim(x, start, block) for x in (rest, steps, inverse))
        square = jax.lax.dynamic_slice_in_dim(own_inverse, start, block, axis=1)
        _, (levels, errors) = jax.lax.scan(column, own, (jnp.arange(block), own_steps, square))
        # U has nothing left of its diagonal: columns before the block stay, its own are not looked at again.
        with jax.default_matmul_precision("highest"):
            return rest - own_inverse.T @ errors, levels

    levels = jax.lax.scan(columns, weight.T, jnp.arange(0, width, block))[1]
    return levels.reshape(width, rows).T
