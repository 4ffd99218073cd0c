"""Adaptive weight of the entropy bonus (Skywork-OR1, He et al. 2025, arXiv:2505.22312).

The fixed bonus is `Objective.entropy_coef`; a controller passes its own coefficient to `policy_loss`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def next_entropy_coef(
    coefficient: Float[Array, ""], entropy: Float[Array, ""], *, target: float, increment: float, maximum: float
) -> Float[Array, ""]:
    """c + Δ while the batch's mean entropy is below the target, c − Δ while above, kept in [0, maximum]."""
    return jnp.clip(coefficient + increment * jnp.sign(target - entropy), 0.0, maximum)


def active_entropy_coef(coefficient: Float[Array, ""], entropy: Float[Array, ""], *, target: float) -> Float[Array, ""]:
    """The coefficient to use: c where the entropy is at most the target, else 0."""
    return jnp.where(entropy <= target, coefficient, 0.0)
