"""Sampler correction: importance weights ρ = exp(ℓ_old − ℓ_s) between the trainer's policy and the sampler's.

With one set of weights the gap is rounding only, so this is off by default; the gap is always logged. ρ is
either truncated (TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training")
or masked (MIS, and IcePop of arXiv:2510.18855), per token or per sequence. At sequence level ρ is the geometric mean
of the row, not the product, so that its bounds mean the same at every length.

All take log_rho = ℓ_old − ℓ_s of shape [*S, C] and return weights of that shape, without gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms.ratios import sequence_level, token_level


def truncated_weights(rho: Float[Array, "*S C"], *, low: float, high: float) -> Float[Array, "*S C"]:
    """TIS: min(ρ, high). There is no lower truncation."""
    return jnp.minimum(rho, high)


def bounded_weights(rho: Float[Array, "*S C"], *, low: float, high: float) -> Float[Array, "*S C"]:
    """MIS: ρ inside [low, high], 0 outside. IcePop is this per token with bounds (0.5, 5)."""
    return jnp.where((rho >= low) & (rho <= high), rho, 0.0)


def sampler_weights(
    log_rho: Float[Array, "*S C"], mask: Bool[Array, "*S C"], *, level, bound, low: float, high: float
) -> Float[Array, "*S C"]:
    """bound(exp(level(log ρ))) with a `level` of `ratios` and a `bound` of this module; constants for the gradient."""
    return jax.lax.stop_gradient(bound(jnp.exp(level(log_rho, mask)), low=low, high=high))


SAMPLER_CORRECTIONS = {
    "token_truncate": partial(sampler_weights, level=token_level, bound=truncated_weights),
    "token_mask": partial(sampler_weights, level=token_level, bound=bounded_weights),
    "sequence_truncate": partial(sampler_weights, level=sequence_level, bound=truncated_weights),
    "sequence_mask": partial(sampler_weights, level=sequence_level, bound=bounded_weights),
}
